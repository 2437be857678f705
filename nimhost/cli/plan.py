"""`nimhost plan`"""

from __future__ import annotations

from typing import Any

import click

from nimhost.cli.entities import entities_for
from nimhost.cli.gpus import gib
from nimhost.cli.model_options import complete_model, in_flags, model_options, options_of, speaking_of_flags
from nimhost.cli.options import address_options, format_option, open_client, output_format, retyped
from nimhost.cli.output import FORMATS, print_value
from nimhost.cli.target import read_target

PARTS = (
    ("weights", "weights_bytes"),
    ("activations", "activation_bytes"),
    ("CUDA graphs", "graph_bytes"),
    ("engine", "engine_bytes"),
    ("adapters", "adapter_bytes"),
    ("KV cache", "kv_cache_bytes"),
)


@click.command()
@click.argument("model", shell_complete=complete_model)
@model_options
@format_option(*FORMATS)
@address_options
def plan(model: str, **asked: Any) -> None:
    """Show what deploying a model would take: memory, GPUs, context length and disk. Nothing is fetched or made.

    MODEL and options are those of `nimhost deploy`. Exit code 1 when it would be refused.

    \b
    Examples:
      nimhost plan Qwen/Qwen3-14B --gpu 2
      nimhost plan meta-llama/Llama-3.1-8B-Instruct --arg --max-model-len --arg 16384
    """
    from nimhost.client.wire import Request

    target = read_target(model)
    with speaking_of_flags(), open_client() as client:
        options = options_of(target, client.workspace, asked)
        bodies = {want.resource: want.body() for want in entities_for(target, options)}
        config = bodies["deployment_configs"]
        body = {"workspace": client.workspace, "config": config, "fileset": bodies.get("filesets")}
        found = client.send(Request(method="POST", path="/apis/nimhost/v1/plan", body=body))
    wanted = output_format(*FORMATS)
    if wanted == "table":
        click.echo(retyped("\n".join(lines_of(model, found))))
    else:
        print_value(found, wanted)
    if found["verdict"] == "refused":
        click.get_current_context().exit(1)


def lines_of(model: str, found: dict[str, Any]) -> list[str]:
    """The plan for people."""
    engine = f"{found['engine']} ({found['image']})" if found["image"] else found["engine"]
    return [
        f"{model} with {engine}",
        "",
        *_memory(found),
        *_gpus(found),
        *(f"Note: {in_flags(warning)}" for warning in found["warnings"]),
        *(line for place in found["disk"] if (line := _disk(place))),
        *(f"{_mark(check['ok'])}{check['what']}" for check in found["checks"]),
        "",
        *_verdict(found),
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    m = found["memory"]
    if m is None:
        why = f": {found['unknown']}" if found.get("unknown") else "."
        return [f"What it takes of a GPU is not known{why}"] if found["gpus"]["wanted"] else []
    split = m["tensor_parallel"] * m["pipeline_parallel"]
    rows = [(name, m[key]) for name, key in PARTS if m[key]]
    per_token = m["kv_cache_bytes_per_token"] / 1024
    digits = 0 if per_token >= 10 or per_token == int(per_token) else 1
    context = f"   {m['max_model_len']} tokens, {per_token:.{digits}f} KiB each" if per_token else ""
    return [
        f"Memory of {'each GPU' if split > 1 else 'the GPU'}{'' if m['exact'] else ' (estimated from config.json)'}",
        *(f"  {name:<12}{gib(size):>10}{context if name == 'KV cache' else ''}" for name, size in rows),
        f"  {'sum':<12}{gib(m['need_bytes']):>10}   it may use {gib(m['budget_bytes'])} of {gib(m['gpu_bytes'])}",
        f"Longest context that fits: {m['largest_max_model_len'] or 'none'}"
        + (f" (--max-model-len {m['largest_max_model_len']})" if m["largest_max_model_len"] else ""),
        f"GPUs of this size that it takes: {m['gpus_needed'] or 'more than there can be'}",
    ]


def _gpus(found: dict[str, Any]) -> list[str]:
    gpus, m = found["gpus"], found["memory"]
    if not gpus["wanted"]:
        return ["GPUs: none asked for"]
    if found["verdict"] == "refused" and not gpus["chosen"]:
        return []  # why is said below, and it need not be for want of a GPU
    index = {gpu["uuid"]: gpu for gpu in gpus["there"]}
    chosen = [f"{index[uuid]['index']} ({index[uuid]['name']})" for uuid in gpus["chosen"]]
    split = f", tensor parallel {m['tensor_parallel']}" if m and m["tensor_parallel"] > 1 else ""
    split += f", pipeline parallel {m['pipeline_parallel']}" if m and m["pipeline_parallel"] > 1 else ""
    told = f", --gpu-memory-utilization {gpus['utilization']:g}" if gpus["utilization"] else ""
    return [f"GPUs: {', '.join(chosen)}{split}{told}" if chosen else "GPUs: none that it could have now"]


def _disk(place: dict[str, Any]) -> str | None:
    if place["here"]:
        return f"Disk, {place['what']}: here already" if place["what"] == "image" or place["path"] else None
    needed = gib(place["needed_bytes"]) if place["needed_bytes"] else "size not known"
    if fetched := place.get("download_bytes"):
        needed += f" ({gib(fetched)} to download)"
    free = f", {gib(place['free_bytes'])} free at {place['path']}" if place["free_bytes"] is not None else ""
    return f"Disk, {place['what']}: {needed}{free}"


def _mark(ok: bool | None) -> str:
    return {True: "ok   ", False: "NO   ", None: "     "}[ok]


def _verdict(found: dict[str, Any]) -> list[str]:
    if found["verdict"] == "starts":
        if found["memory"] and not found["memory"]["fits"]:
            return [click.style("By this sum it does not fit; it would be started because of --force.", fg="yellow")]
        return [click.style("It fits and would start.", fg="green")] if found["memory"] else ["It would start."]
    colour = {"refused": "red", "waits": "yellow", "unknown": "magenta"}[found["verdict"]]
    word = {"refused": "Refused: ", "waits": "It would wait: ", "unknown": "Not known: "}[found["verdict"]]
    reason = in_flags(found["reason"] or "")
    if found["verdict"] == "waits" and reason.startswith("Waiting "):
        word, reason = "It would wait ", reason.removeprefix("Waiting ")
    return [
        click.style(word, fg=colour) + reason,
        *filter(None, [in_flags(found["hint"] or "")]),
    ]

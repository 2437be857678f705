"""vLLM: `vllm serve` with the arguments that a deployment asks for.

Flags: https://docs.vllm.ai/en/stable/cli/serve/, .../features/lora/, .../features/tool_calling/ and
.../models/pooling_models/. Nothing is said about quantisation: vLLM reads it from the checkpoint. What has no field
in a config (`--max-model-len`, `--reasoning-parser`, …) goes through `additional_args`.
"""

from __future__ import annotations

from nimhost.engines.order import HostFacts, Order, image_of, mounts_of
from nimhost.engines.parallel import TP_FLAG, VllmSplit, given
from nimhost.engines.spec import FILES_DIR, ContainerSpec, Probe

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CHAT_TEMPLATE = f"{FILES_DIR}/chat-template.jinja"
LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be, from vLLM's default on."""
LORAS = (4, 16)
"""Adapters in one batch: at least and at most. Each one costs memory from the start, whether it is used or not."""
RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

Flag = tuple[str, tuple[str, ...]]


def vllm(order: Order, host: HostFacts) -> ContainerSpec:
    """The container of a vLLM deployment. The user's arguments and variables come last and win. Raises BadRequest."""
    own, served = order.executor.additional_args, served_names(order)
    split = VllmSplit(order.gpus, own, order.model.spec if order.model else None)
    flags = [
        *([("--served-model-name", served)] if served else []),
        *([(TP_FLAG, (str(split.tp),))] if split.tp > 1 else []),
        *_runner(order),
        *_chat(order, host),
        *_lora(order),
        *([("--trust-remote-code", ())] if order.model and order.model.trust_remote_code else []),
    ]
    return ContainerSpec(
        image=image_of(order, host.vllm_image),
        args=(host.weights_path, *(word for flag, v in flags if not given(flag, own) for word in (flag, *v)), *own),
        env=OFFLINE | _lora_env(order) | (order.executor.additional_envs or {}),
        mounts=mounts_of(order, host),
        files=_files(order, host),
        probe=Probe(
            health_path=order.executor.health_check_path or "/health",
            served_names=() if given("--served-model-name", own) else served,
        ),
        gpus=order.gpus,
        shm_bytes=host.shm_bytes if order.gpus else None,
        user=run_as(order),
        policy="vllm",
        warnings=split.warnings,
    )


def served_names(order: Order) -> tuple[str, ...]:
    """The public name first (replies carry it): the model entity's ref, else the name the client gave."""
    name = str(order.model.ref) if order.model else order.label
    return (name,) if name else ()


def max_lora_rank(ranks: tuple[int, ...]) -> int:
    """The smallest rank that vLLM offers and every adapter fits into; one beyond them all is refused when it loads."""
    return next((rank for rank in LORA_RANKS if rank >= max(ranks, default=0)), LORA_RANKS[-1])


def run_as(order: Order) -> str | None:
    """Docker's `user[:group]`, when the config sets one; `:group` leaves the user to the image."""
    user, group = order.executor.run_as_user, order.executor.run_as_group
    if group is None:
        return None if user is None else f"{user}"
    return f":{group}" if user is None else f"{user}:{group}"


def _runner(order: Order) -> list[Flag]:
    """vLLM tells embedding models by their architecture or their sentence-transformers files; the rest must be told."""
    spec = order.model.spec if order.model else None
    plain = spec is not None and spec.is_embedding_model and not spec.is_chat
    return [("--runner", ("pooling",))] if plain or order.model_spec.model_type == "embed" else []


def _chat(order: Order, host: HostFacts) -> list[Flag]:
    tools = order.chat.tools
    flags: list[Flag] = [("--chat-template", (CHAT_TEMPLATE,))] if order.chat.chat_template else []
    if tools.auto_tool_choice:
        flags.append(("--enable-auto-tool-choice", ()))
    if tools.tool_call_parser:
        flags.append(("--tool-call-parser", (tools.tool_call_parser,)))
    if host.tool_parser is not None:
        flags.append(("--tool-parser-plugin", (f"{FILES_DIR}/{host.tool_parser.name}",)))
    return flags


def _files(order: Order, host: HostFacts) -> dict[str, str]:
    """The template is a file: as an argument, vLLM would take it for a path first."""
    template, parser = order.chat.chat_template, host.tool_parser
    files = {CHAT_TEMPLATE: template} if template else {}
    return files | ({f"{FILES_DIR}/{parser.name}": parser.content} if parser else {})


def _lora(order: Order) -> list[Flag]:
    """Both limits are fixed when vLLM starts: made for the adapters registered then, with room for later ones."""
    if not order.model_spec.lora_enabled:
        return []
    ranks = order.model.lora_ranks if order.model else ()
    together = max(LORAS[0], min(len(ranks), LORAS[1]))
    return [
        ("--enable-lora", ()),
        ("--max-lora-rank", (str(max_lora_rank(ranks)),)),
        ("--max-loras", (str(together),)),
    ]


def _lora_env(order: Order) -> dict[str, str]:
    """Adapters are loaded through the load and unload endpoints only, which vLLM serves when this is set."""
    return {RUNTIME_LORA: "1"} if order.model_spec.lora_enabled else {}

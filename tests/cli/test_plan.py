"""How a plan and the GPUs are shown to people."""

from __future__ import annotations

from typing import Any

import click
import pytest
from msgspec.structs import replace

from nimhost.cli.gpus import HEADERS, rows_of
from nimhost.cli.plan import lines_of
from nimhost.deployments.explain import explanation
from nimhost.deployments.observed import Room
from nimhost.models.memory import GIB, Ask
from tests.deployments.make import wanted
from tests.deployments.test_fit import order
from tests.deployments.test_preflight import CARD, absent, here, vllm
from tests.models import public
from tests.models import test_checkpoint as known

GPU: dict[str, Any] = {
    "uuid": "GPU-0", "index": 0, "name": "NVIDIA H100", "memory_bytes": 80 * GIB, "used_bytes": 30 * GIB,
    "free_bytes": 50 * GIB, "simulated": False, "problem": None, "holder": None, "shares": [], "links": {},
    "processes": [],
}  # fmt: skip


def process(pid: int, **fields: Any) -> dict[str, Any]:
    return {"pid": pid, "name": "", "user": "", "used_bytes": 0, "container_id": "", "deployment": None, **fields}


def text(found: dict[str, Any]) -> str:
    return click.unstyle("\n".join(lines_of("Qwen/Qwen3", found)))


def test_a_plan_shows_the_sum_the_gpus_and_the_longest_context() -> None:
    cards = (CARD, replace(CARD, uuid="GPU-1", index=1, name="SIM"))
    two = vllm(order=order(public.QWEN3_14B, gpu=2), ask=Ask(tensor_parallel=2))
    shown = text(explanation(two, replace(here(), gpus=(replace(CARD, name="SIM"), cards[1]), gives_gpus=True)))
    for line in (
        "Qwen/Qwen3 with vllm (vllm/vllm-openai:v1)",
        "Memory of each GPU (estimated from config.json)",
        "  weights       13.8 GiB",
        "  KV cache       3.1 GiB   40960 tokens, 80 KiB each",
        "  sum           19.7 GiB   it may use 22.1 GiB of 24.0 GiB",
        "Longest context that fits: 40960 (--max-model-len 40960)",
        "GPUs of this size that it takes: 2",
        "GPUs: 0 (SIM), 1 (SIM), tensor parallel 2",
        "Disk, image: here already",
        "ok   Docker can hand out GPUs",
        "It fits and would start.",
    ):
        assert line in shown, shown


def test_what_waits_says_once_what_for() -> None:
    d = vllm(order=order(known.QWEN3_1_7B, gpu=2))
    found = explanation(d, replace(here(), gpus=(CARD,))) | {"verdict": "waits", "hint": None}
    shown = text(found | {"reason": "Waiting for GPUs: needs 2 GPUs, 1 free"})
    assert shown.splitlines()[-1] == "It would wait for GPUs: needs 2 GPUs, 1 free"
    shown = text(found | {"reason": "Pulling the image."})
    assert shown.splitlines()[-1] == "It would wait: Pulling the image."


def test_gpus_that_would_idle_are_said() -> None:
    cards = tuple(replace(CARD, uuid=f"GPU-{i}", index=i) for i in range(3))
    d = vllm(order=order(known.QWEN3_1_7B, gpu=3))
    shown = text(explanation(d, replace(here(), gpus=cards)))
    assert "Note: 2 of 3 GPUs stay idle: a model with 16 attention heads" in shown
    assert "Set --gpu to 1, or use all of them with --pipeline-parallel-size 3 in --arg." in shown


def test_a_sum_that_was_overruled_is_not_said_to_fit() -> None:
    shown = text(explanation(vllm(public.LLAMA_70B, force=True), here()))
    assert "By this sum it does not fit; it would be started because of --force." in shown


def test_an_image_that_brings_its_model_needs_no_weights_on_disk() -> None:
    d = replace(wanted(), weights=None)
    room = Room(weights_path="/w", weights_free_bytes=10**12, images_path="/i", images_free_bytes=10**12)
    shown = text(explanation(d, replace(here(), images={}, rooms={d.ref: room})))
    assert "Disk, weights" not in shown
    assert "Disk, image: size not known" in shown


def test_a_refusal_shows_the_sum_and_what_would_fit() -> None:
    shown = text(explanation(vllm(public.LLAMA_70B), absent()))
    assert "Longest context that fits: none" in shown
    assert "Refused: default/m does not fit: weights 131.4" in shown
    assert "It takes " in shown


def test_what_has_to_be_fetched_is_shown_with_the_room_for_it() -> None:
    shown = text(explanation(vllm(), absent(weights_free_bytes=100 * GIB)))
    assert "Disk, weights: 3.2 GiB, 100.0 GiB free at /w" in shown
    assert "Disk, image: 27.0 GiB (13.5 GiB to download), 931.3 GiB free at /i" in shown


def test_an_image_for_other_machines_is_shown_as_that() -> None:
    found = explanation(vllm(), replace(here(), made_for={vllm().ref: "arm64"}, machine="amd64"))
    assert "NO   Image is made for arm64" in text(found)
    found = explanation(vllm(), replace(here(), made_for={vllm().ref: "amd64"}, machine="amd64"))
    assert "ok   Image is made for amd64" in text(found)


def test_an_unknown_model_is_said_to_be_unknown() -> None:
    found = explanation(wanted(), replace(here(), gives_gpus=None)) | {"unknown": "Secret not found: default/hf."}
    assert "What it takes of a GPU is not known: Secret not found: default/hf." in text(found)
    assert "Not known: It would be started. Whether it fits shows when it runs." in text(found)


def test_without_a_gpu_there_is_nothing_to_know() -> None:
    found = explanation(wanted(gpus=0), replace(here(), gives_gpus=None))
    assert text(found).endswith("It would start.")


def test_a_context_that_the_model_was_not_made_for_is_not_said_to_fit() -> None:
    long = vllm(order=order(known.QWEN3_1_7B, "--max-model-len", "1000000"), ask=Ask(max_model_len=1_000_000))
    shown = text(explanation(long, here()))
    assert "Longest context that fits: 40960 (--max-model-len 40960)" in shown
    assert "Refused: --max-model-len 1000000: the model was made for 40960 tokens" in shown
    assert "GPUs: " not in shown


@pytest.mark.parametrize(
    ("per_token", "said"), [(512, "0.5 KiB"), (1024, "1 KiB"), (1536, "1.5 KiB"), (81920, "80 KiB")]
)
def test_small_sizes_are_not_rounded_away(per_token: int, said: str) -> None:
    found = explanation(vllm(), here())
    found["memory"]["kv_cache_bytes_per_token"] = per_token
    assert f" tokens, {said} each" in text(found)


def test_without_docker_the_sum_is_shown_all_the_same() -> None:
    away = replace(here(), docker_problem="Docker cannot be reached.")
    shown = text(explanation(vllm(), away))
    assert "  weights        3.2 GiB" in shown
    assert "Not known: Docker cannot be reached." in shown


@pytest.mark.parametrize(
    ("fields", "used_by"),
    [
        ({}, ["-"]),
        ({"holder": "default/x"}, ["default/x"]),
        (
            {"shares": [{"holder": "default/a", "memory_bytes": 10 * GIB}]},
            ["default/a (share of 10.0 GiB)"],
        ),
        (
            {"holder": "default/x", "processes": [
                process(7, name="python3", user="root", used_bytes=20 * GIB, deployment="default/x"),
                process(9, name="blender", user="eve", used_bytes=GIB), process(11),
            ]},
            [
                "default/x", "python3 (pid 7, user root) 20.0 GiB of default/x", "blender (pid 9, user eve) 1.0 GiB",
                "a process (pid 11)",
            ],
        ),
        ({"problem": "GPU 0: it fell off the bus"}, ["GPU 0: it fell off the bus"]),
    ],
)  # fmt: skip
def test_a_gpu_has_a_row_for_everybody_who_uses_it(fields: dict[str, Any], used_by: list[str]) -> None:
    rows = rows_of({**GPU, **fields})
    assert [row[-1] for row in rows] == used_by
    assert rows[0][:5] == ("0", "NVIDIA H100", "80.0 GiB", "30.0 GiB", "50.0 GiB")
    assert {len(row) for row in rows} == {len(HEADERS)}


@pytest.mark.parametrize(
    ("fields", "reserved"),
    [
        ({}, "-"),
        ({"holder": "default/x"}, "all"),
        ({"shares": [{"holder": "default/a", "memory_bytes": n * GIB} for n in (10, 70)]}, "80.0 GiB"),
    ],
)
def test_what_is_promised_of_a_gpu_is_told_from_what_is_used(fields: dict[str, Any], reserved: str) -> None:
    assert dict(zip(HEADERS, rows_of({**GPU, **fields})[0], strict=True))["RESERVED"] == reserved

"""What is asked of the GPUs, whether that fits, and what is said when it does not: the demonstrations of `plan`."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.fit import ask_of, fit_on, gpus_needed, refusal
from nimhost.engines.numbers import tokens
from nimhost.engines.order import HostFacts, ModelOrder, Order
from nimhost.entities import DeployModelSpec, ExecutorConfig
from nimhost.models.checkpoint import read_spec
from nimhost.models.memory import GIB, Ask
from nimhost.refs import Ref
from tests.models import public
from tests.models import test_checkpoint as known

HOST = HostFacts(
    nim_image="nvcr.io/nim/nvidia/llm-nim:1.13.1", vllm_image="vllm/vllm-openai:v1", nim_cache_dir="/c", shm_bytes=1
)  # fmt: skip


def order(
    config: Any, *args: str, gpu: int = 1, engine: Any = "vllm", share_gib: float | None = None, lora: bool = False,
    name: str = "", **executor: Any,
) -> Order:  # fmt: skip
    ref = Ref("default", "m")
    spec = read_spec(config, name=name) if config else None
    return Order(
        ref=ref,
        engine=engine,
        model_spec=DeployModelSpec(model_namespace="default", model_name="m", lora_enabled=lora),
        executor=ExecutorConfig(gpu=gpu, additional_args=list(args), gpu_memory_gib=share_gib, **executor),
        model=ModelOrder(ref=ref, fileset=Ref("default", "f"), spec=spec),
    )


def ask(config: Any = public.QWEN3_8B, *args: str, **options: Any) -> Ask | None:
    return ask_of(order(config, *args, **options), HOST)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((), {}, Ask()),
        ((), {"gpu": 4}, Ask(tensor_parallel=4)),
        (("-pp", "2"), {"gpu": 4}, Ask(tensor_parallel=2, pipeline_parallel=2)),
        (("--max-model-len=16k",), {}, Ask(max_model_len=16000)),
        (("--max_model_len", "auto"), {}, Ask(max_model_len=0)),
        (("--gpu-memory-utilization", "0.5"), {}, Ask(utilization=0.5, chosen_by_person=True)),
        (("--kv-cache-dtype", "fp8_e4m3"), {}, Ask(kv_value_bytes=1)),
        (("--quantization", "fp8"), {}, Ask(weight_bits=8)),
        (("--enforce-eager", "--max-num-seqs", "4"), {}, Ask(graphs=False, sequences=4)),
        (("--max-num-batched-tokens", "4096"), {}, Ask(batched_tokens=4096)),
        ((), {"lora": True}, Ask(lora_rank=16, loras=4)),
        ((), {"share_gib": 12}, Ask(share_bytes=12 * GIB)),
        (("--cpu-offload-gb", "10"), {}, None),
        (("--quantization", "bitsandbytes"), {}, None),
        ((), {"gpu": 0}, None),
        ((), {"engine": "generic", "image_name": "x"}, None),
        ((), {"engine": "nim"}, Ask(utilization=0.9)),
        ((), {"engine": "nim", "gpu": 2}, Ask(utilization=0.9, tensor_parallel=2)),
        ((), {"engine": "nim", "additional_envs": {"NIM_MAX_MODEL_LEN": "96"}}, Ask(utilization=0.9, max_model_len=96)),
        ((), {"engine": "nim", "gpu": 2, "image_name": "nvcr.io/nim/meta/llama"}, None),
    ],
)  # fmt: skip
def test_the_ask_is_read_from_what_the_engine_will_be_started_with(
    args: tuple[str, ...], options: dict[str, Any], expected: Ask | None
) -> None:
    assert ask(public.QWEN3_8B, *args, **options) == expected


def test_a_model_of_unknown_size_is_never_refused() -> None:
    assert ask(None) is None
    assert refusal(order(None), ask(None), [GIB]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096), ("16k", 16000), ("16K", 16384), ("1.5M", 1572864), ("auto", 0), ("-1", 0), ("many", None),
        (None, None), ("9" * 400, None), ("1." + "9" * 400, None),
    ],
)  # fmt: skip
def test_lengths_are_read_as_vllm_reads_them(text: str | None, expected: int | None) -> None:
    assert tokens(text) == expected


def plan(config: Any, gib: tuple[float, ...], *args: str, **options: Any) -> tuple[bool, int, int | None, str]:
    """(fits, longest context, fewest GPUs of that size, what is said)."""
    made = order(config, *args, **options)
    totals = [int(g * GIB) for g in gib]
    asked = ask_of(made, HOST)
    assert asked is not None
    found, said = fit_on(made, asked, totals), refusal(made, asked, totals)
    assert found is not None
    return found.fits, found.largest_model_len, gpus_needed(made, asked, found.gpu_bytes), " ".join(said or ())


def test_a_1_7b_on_24_gib() -> None:
    assert plan(known.QWEN3_1_7B, (24,)) == (True, 40960, 1, "")


def test_a_14b_on_one_of_24_gib_is_refused_and_on_two_it_fits() -> None:
    fits, longest, needed, said = plan(public.QWEN3_14B, (24, 24))
    assert (fits, longest, needed) == (False, 0, 2)
    assert "weights 27.5" in said
    assert "It fits with --gpu 2." in said
    assert plan(public.QWEN3_14B, (24, 24), gpu=2) == (True, 40960, 2, "")


def test_a_70b_on_one_of_80_gib_is_refused_with_what_would_fit() -> None:
    fits, _, needed, said = plan(public.LLAMA_70B, (80,))
    assert (fits, needed) == (False, 3)
    assert "weights 131.4" in said
    assert "KV cache for 131072 tokens 40.0" in said
    assert "of 80.0 GiB it may use 73.6" in said
    takes = "It takes 3 GPUs of 80 GiB (--gpu 3 --arg --pipeline-parallel-size --arg 3), or 2 with a context of 149"
    assert takes in said
    assert ", or a version of the model in 4 bits (about 41" in said
    assert "--force" in said
    assert plan(public.LLAMA_70B, (80,) * 4, "--max-model-len", "8192", gpu=2)[0]


def test_a_mixture_of_experts_needs_all_its_experts() -> None:
    assert plan(known.QWEN3_30B_A3B, (80,)) == (True, 40960, 1, "")
    fits, _, needed, said = plan(known.QWEN3_30B_A3B, (24, 24, 24, 24))
    assert (fits, needed) == (False, 4)
    assert "--gpu 4" in said


def test_an_embedding_model_shares_a_gpu() -> None:
    assert plan(public.BGE_LARGE, (24,), share_gib=4, name="bge-embed")[:3] == (True, 512, 1)
    fits, _, _, said = plan(public.QWEN3_EMBEDDING_8B, (80,), share_gib=16, name="qwen3-embedding")
    assert not fits
    assert "of 80.0 GiB it may use 16.0" in said
    assert "--gpu-memory 23" in said


@pytest.mark.parametrize(
    ("config", "gib", "options", "ways"),
    [
        (known.LLAMA_8B, (24,), {}, ["--arg --max-model-len --arg 44544"]),
        (known.LLAMA_8B, (24, 24), {}, ["--arg --max-model-len --arg 44544", "--gpu 2"]),
        (known.LLAMA_8B, (24,), {"engine": "nim"}, ["--env NIM_MAX_MODEL_LEN=4"]),
        (public.QWEN3_EMBEDDING_8B, (24,), {"name": "embed"}, ["--max-model-len", "--arg --kv-cache-dtype --arg fp8"]),
    ],
)
def test_the_change_that_makes_it_fit_does(config: Any, gib: Any, options: Any, ways: list[str]) -> None:
    said = plan(config, gib, **options)[3]
    assert [way for way in ways if way not in said] == []


@pytest.mark.parametrize(
    ("options", "args", "way"),
    [
        ({}, (), "--gpu 3 --arg --pipeline-parallel-size --arg 3"),
        ({"gpu": 3}, (), "--gpu 3 --arg --pipeline-parallel-size --arg 3"),
        ({"engine": "nim"}, (), "--gpu 3 --env NIM_PIPELINE_PARALLEL_SIZE=3"),
    ],
)
def test_what_cannot_be_split_inside_its_layers_is_split_by_layers(options: Any, args: Any, way: str) -> None:
    assert f"It fits with {way}." in plan(public.LLAMA_70B, (80, 80, 80), *args, **options)[3]


def test_a_split_by_layers_counts_among_the_gpus_that_it_takes() -> None:
    needed = plan(public.LLAMA_70B, (80,))[2]
    assert needed == 3
    assert plan(public.LLAMA_70B, (80,) * needed, "--pipeline-parallel-size", "3", gpu=needed)[0]
    assert not plan(public.LLAMA_70B, (80, 80), "--pipeline-parallel-size", "2", gpu=2)[0]
    assert plan(public.LLAMA_70B, (80,), "--tensor-parallel-size", "1")[2] is None
    assert plan(public.QWEN3_14B, (24,))[2] == 2


def test_a_split_by_layers_that_is_advised_is_not_refused() -> None:
    assert plan(public.LLAMA_70B, (80, 80, 80), "--pipeline-parallel-size", "3", gpu=3)[0]


def test_copies_of_a_model_need_as_many_gpus_each() -> None:
    said = plan(public.QWEN3_14B, (24,) * 4, "--data-parallel-size", "2", gpu=2)[3]
    assert "It fits with --gpu 4." in said
    assert plan(public.QWEN3_14B, (24,) * 4, "--data-parallel-size", "2", gpu=4)[0]


def test_a_shorter_context_that_is_advised_is_not_refused() -> None:
    assert plan(known.LLAMA_8B, (24,), "--max-model-len", "44544")[0]


def test_the_smallest_of_the_gpus_decides() -> None:
    made = order(public.QWEN3_14B, gpu=2)
    asked = ask_of(made, HOST)
    found = fit_on(made, asked, [80 * GIB, 16 * GIB, 24 * GIB])
    assert found is not None
    assert found.gpu_bytes == 24 * GIB
    assert fit_on(made, asked, [80 * GIB]) is None


def test_all_weights_count_that_are_held_and_none_twice() -> None:
    spec = read_spec(public.QWEN3_8B)
    assert spec.memory is not None
    small = replace(spec, memory=replace(spec.memory, weights_bytes=GIB))
    made = order(None)
    assert made.model is not None
    made = replace(made, model=replace(made.model, spec=small))
    found = fit_on(made, ask_of(made, HOST), [24 * GIB])
    assert found is not None
    assert found.weights_bytes == GIB

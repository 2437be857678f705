"""Whether an order fits into GPUs, the sum that says so, and what would make it fit. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from nimhost.engines.nim import MAX_LORA_RANK, is_multi_llm
from nimhost.engines.numbers import tokens
from nimhost.engines.order import HostFacts, Order
from nimhost.engines.parallel import (
    DP_FLAG,
    PP_FLAG,
    PP_VARIABLE,
    TP_FLAG,
    TP_VARIABLE,
    given,
    tensor_parallel_size,
    value_of,
)
from nimhost.engines.recipes import cook
from nimhost.engines.share import FLAG, NIM_VARIABLES
from nimhost.engines.spec import ContainerSpec
from nimhost.entities import ModelSpec
from nimhost.errors import BadRequest
from nimhost.models.memory import GIB, Ask, Fit, fit

NIM_UTILIZATION = 0.9
NIM_LORAS = 8
OPAQUE = (
    "--config", "--cpu-offload-gb", "--hf-overrides", "--kv-cache-memory-bytes", "--kv-offloading-size",
    "--kv-transfer-config", "--num-gpu-blocks-override", "--speculative-config",
)  # fmt: skip
"""With one of these the sum is another one, and nothing is said about it."""
USEFUL_LEN = 1024
"""A shorter context is no way to make a model fit."""
MOST_GPUS = 64


def ask_of(order: Order, host: HostFacts) -> Ask | None:
    """How the engine of this order will use its GPUs; None where that cannot be told."""
    spec = order.model.spec if order.model else None
    if order.gpus == 0 or order.engine == "generic" or spec is None or spec.memory is None:
        return None
    try:
        made = cook(order, host)
    except BadRequest:  # said when it was created, and again by whoever starts it
        return None
    share_gib = order.executor.gpu_memory_gib
    ask = _vllm(list(made.args[1:]), spec) if order.engine == "vllm" else _nim(made, order.gpus)
    return ask and replace(ask, share_bytes=None if share_gib is None else int(share_gib * GIB))


def _vllm(args: list[str], spec: ModelSpec) -> Ask | None:
    quantised, loader = value_of("--quantization", args), value_of("--load-format", args)
    if any(given(flag, args) for flag in OPAQUE) or loader in ("bitsandbytes", "gguf", "dummy"):
        return None
    if quantised is not None and not (quantised == "fp8" and spec.precision in ("bfloat16", "float16", "float32")):
        return None
    utilization = _number(value_of(FLAG, args))
    rank = _number(value_of("--max-lora-rank", args)) or 16
    ask = Ask(
        tensor_parallel=int(_number(value_of(TP_FLAG, args)) or 1),
        pipeline_parallel=int(_number(value_of(PP_FLAG, args)) or 1),
        chosen_by_person=utilization is not None,
        max_model_len=tokens(value_of("--max-model-len", args)),
        kv_value_bytes=1 if (value_of("--kv-cache-dtype", args) or "").startswith("fp8") else None,
        weight_bits=8 if quantised == "fp8" else None,
        batched_tokens=tokens(value_of("--max-num-batched-tokens", args)),
        sequences=tokens(value_of("--max-num-seqs", args)),
        graphs=not given("--enforce-eager", args),
        lora_rank=int(rank) if given("--enable-lora", args) else 0,
        loras=int(_number(value_of("--max-loras", args)) or 1),
    )
    return ask if utilization is None else replace(ask, utilization=utilization)


def _nim(made: ContainerSpec, gpus: int) -> Ask | None:
    if gpus > 1 and not is_multi_llm(made.image):
        return None  # its profile says how it is split
    env = made.env
    own = next((value for name in NIM_VARIABLES if (value := _number(env.get(name)))), None)
    adapters = "NIM_PEFT_SOURCE" in env
    return Ask(
        tensor_parallel=int(_number(env.get(TP_VARIABLE)) or 1),
        pipeline_parallel=int(_number(env.get(PP_VARIABLE)) or 1),
        utilization=own or NIM_UTILIZATION,
        chosen_by_person=own is not None,
        max_model_len=tokens(env.get("NIM_MAX_MODEL_LEN")),
        lora_rank=int(_number(env.get("NIM_MAX_LORA_RANK")) or MAX_LORA_RANK) if adapters else 0,
        loras=int(_number(env.get("NIM_MAX_GPU_LORAS")) or NIM_LORAS) if adapters else 1,
    )


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,18}(\.\d{0,18})?|\.\d{1,18}", text) else None


# --- does it fit ---------------------------------------------------------------------------------------------------


def fit_on(order: Order, ask: Ask | None, totals_bytes: Iterable[int]) -> Fit | None:
    """On the largest GPUs of the machine, were they empty; None where it is not known or there are too few."""
    spec = order.model.spec if order.model else None
    largest = sorted(totals_bytes, reverse=True)[: order.gpus]
    if ask is None or spec is None or len(largest) < order.gpus or not order.gpus or not largest[-1]:
        return None
    return fit(spec, ask, largest[-1])


def refusal(order: Order, ask: Ask | None, totals_bytes: Sequence[int]) -> tuple[str, str] | None:
    """(the sum, the change that would make it fit) of an order that cannot fit; None for all others."""
    found = fit_on(order, ask, totals_bytes)
    if found is None or ask is None or found.fits:
        return None
    name = order.model.ref if order.model else order.ref
    where = f" on each of {order.gpus} GPUs" if order.gpus > 1 else ""
    return f"{name} does not fit{where}: {sentence(found)}.", advice(order, ask, found, totals_bytes)


def sentence(f: Fit) -> str:
    """The sum in words, in GiB."""
    parts = [
        ("weights", f.weights_bytes), ("activations", f.activation_bytes), ("CUDA graphs", f.graph_bytes),
        ("engine", f.overhead_bytes), ("adapters", f.adapter_bytes),
        (f"KV cache for {f.model_len} tokens", f.kv_bytes),
    ]  # fmt: skip
    summed = " + ".join(f"{name} {gib(size)}" for name, size in parts if size)
    return f"{summed} = {gib(f.need_bytes)} GiB, and of {gib(f.gpu_bytes)} GiB it may use {gib(f.budget_bytes)}"


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}"


def gpus_needed(order: Order, ask: Ask, gpu_bytes: int) -> int | None:
    """The fewest GPUs of that size that it fits on."""
    found = _fewest(order, ask, gpu_bytes)
    return found[0] if found else None


def _fewest(order: Order, ask: Ask, gpu_bytes: int) -> tuple[int, Fit, str] | None:
    """(GPUs, how it fits on them, the argument that this takes)."""
    spec = order.model.spec if order.model else None
    for gpus in range(1, MOST_GPUS + 1):
        split = replace(ask, tensor_parallel=1, pipeline_parallel=1) if gpus == 1 else _split(order, ask, gpus)
        for way, said in ((split, ""), _deeper(order, ask, gpus)):
            found = fit(spec, way, gpu_bytes) if spec and way else None
            if found and found.fits:
                return gpus, found, said
    return None


def _how(fewest: tuple[int, Fit, str]) -> str:
    gpus, _, said = fewest
    return f" (--gpu {gpus}{said})" if said else ""


def advice(order: Order, ask: Ask, found: Fit, totals_bytes: Sequence[int]) -> str:
    """Every single change that is enough by itself, the least costly first; what it would take where none is."""
    ways = [*_lighter(order, ask, found), *_more_gpus(order, ask, totals_bytes)]
    if ways:
        return f"It fits with {', or with '.join(ways)}. To try anyway: --force"
    return f"{_what_it_takes(order, ask, found)} To try anyway: --force"


def _lighter(order: Order, ask: Ask, found: Fit) -> list[str]:
    assert order.model is not None
    assert order.model.spec is not None
    spec, vllm = order.model.spec, order.engine == "vllm"
    ways = []
    if found.largest_model_len >= USEFUL_LEN:
        length = found.largest_model_len
        ways.append(f"--arg --max-model-len --arg {length}" if vllm else f"--env NIM_MAX_MODEL_LEN={length}")
    smaller = fit(spec, replace(ask, kv_value_bytes=1), found.gpu_bytes)
    if vllm and smaller and smaller.fits and found.kv_bytes:
        ways.append("--arg --kv-cache-dtype --arg fp8")
    if ask.share_bytes is not None and found.need_bytes <= found.gpu_bytes * ask.utilization:
        ways.append(f"--gpu-memory {-(-found.need_bytes // GIB)}")
    return ways


def _more_gpus(order: Order, ask: Ask, totals_bytes: Sequence[int]) -> list[str]:
    """The fewest more, split inside the layers, and where that leaves some idle by layers."""
    for gpus in range(order.gpus, len(totals_bytes) + 1):
        bigger = replace(order, executor=replace(order.executor, gpu=gpus))
        for more, said in ((_split(order, ask, gpus), ""), _deeper(order, ask, gpus)):
            found = more and fit_on(bigger, more, totals_bytes)
            if found and found.fits:
                return [f"--gpu {gpus}{said}"]
    return []


def _split(order: Order, ask: Ask, gpus: int) -> Ask | None:
    """As it would be on so many GPUs; None when some would idle."""
    assert order.model is not None
    each, left = divmod(gpus, _replicas(order) * ask.pipeline_parallel)
    if _pinned(order, TP_FLAG, TP_VARIABLE) or left:
        return None
    size = tensor_parallel_size(each, order.model.spec)
    return replace(ask, tensor_parallel=size) if size == each else None


def _deeper(order: Order, ask: Ask, gpus: int) -> tuple[Ask | None, str]:
    """(as it would be on so many GPUs with one more argument, that argument); None when some would idle."""
    assert order.model is not None
    each, left = divmod(gpus, _replicas(order))
    if left or _pinned(order, TP_FLAG, TP_VARIABLE) or _pinned(order, PP_FLAG, PP_VARIABLE):
        return None, ""
    size = tensor_parallel_size(each, order.model.spec)
    deep = each // size
    said = f" --arg {PP_FLAG} --arg {deep}" if order.engine == "vllm" else f" --env {PP_VARIABLE}={deep}"
    return replace(ask, tensor_parallel=size, pipeline_parallel=deep), said


def _pinned(order: Order, flag: str, variable: str) -> bool:
    return given(flag, order.executor.additional_args) or variable in (order.executor.additional_envs or {})


def _replicas(order: Order) -> int:
    """Copies of the whole model that share the GPUs among them."""
    text = value_of(DP_FLAG, order.executor.additional_args) if order.engine == "vllm" else None
    return max(1, int(_number(text) or 1))


def _what_it_takes(order: Order, ask: Ask, found: Fit) -> str:
    assert order.model is not None
    assert order.model.spec is not None
    spec, each = order.model.spec, f"{found.gpu_bytes / GIB:.0f} GiB"
    whole, shorter = (
        _fewest(order, ask, found.gpu_bytes),
        _fewest(order, replace(ask, max_model_len=0), found.gpu_bytes),
    )
    takes = f"It takes {whole[0]} GPUs of {each}{_how(whole)}" if whole else f"It does not fit on GPUs of {each}"
    if shorter and (whole is None or shorter[0] < whole[0]) and shorter[1].largest_model_len >= USEFUL_LEN:
        takes += f", or {shorter[0]}{_how(shorter)} with a context of {shorter[1].largest_model_len} tokens"
    quarter = fit(spec, replace(ask, weight_bits=5, max_model_len=USEFUL_LEN), found.gpu_bytes)
    if quarter and quarter.fits and quarter.weights_bytes < found.weights_bytes:
        takes += f", or a version of the model in 4 bits (about {gib(quarter.weights_bytes)} GiB of weights)"
    return f"{takes}."

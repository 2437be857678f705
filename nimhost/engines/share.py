"""Telling an engine how much of its GPUs it may take, once it is known which ones it gets. Pure.

vLLM: `--gpu-memory-utilization`, a fraction of the GPU's whole memory for weights, activations and KV cache
(https://docs.vllm.ai/en/stable/configuration/engine_args/). NIM passes the same fraction on from a variable: releases
differ in how they spell it, and a name that one does not know does nothing. Other images decide for themselves.
"""

from __future__ import annotations

from msgspec.structs import replace

from nimhost.engines.parallel import given
from nimhost.engines.spec import ContainerSpec

FLAG = "--gpu-memory-utilization"
NIM_VARIABLES = ("NIM_KVCACHE_PERCENT", "NIM_KV_CACHE_PERCENT")


def with_utilization(spec: ContainerSpec, utilization: float) -> ContainerSpec:
    """What the user said wins."""
    if spec.policy == "vllm" and not given(FLAG, list(spec.args)):
        model, *rest = spec.args
        return replace(spec, args=(model, FLAG, f"{utilization:g}", *rest))
    if spec.policy == "nim" and not any(name in spec.env for name in NIM_VARIABLES):
        return replace(spec, env=dict.fromkeys(NIM_VARIABLES, f"{utilization:g}") | spec.env)
    return spec

"""Does a model fit: weights + activations + graphs + adapters + KV cache against what a GPU gives, with the sum. Pure.

The rule is vLLM's own (https://docs.vllm.ai/en/stable/configuration/conserving_memory/): an engine takes a fraction of
the GPU's memory, puts the weights there, measures a step with as many tokens as it will ever batch, and gives the rest
to the KV cache. It refuses to start when that rest does not hold one sequence of the full context length. All numbers
are per GPU; parallelism divides weights and KV cache between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from msgspec import Struct

from nimhost.entities import ModelSpec
from nimhost.sizes import KvLayers

GIB = 1024**3
UTILIZATION = 0.92
"""vLLM's default `--gpu-memory-utilization`: https://docs.vllm.ai/en/stable/api/vllm/config/cache/."""
BLOCK = 16
"""Tokens that the KV cache hands out together."""
CONTEXT_BYTES = GIB // 2
"""What an engine takes beside torch: cuBLAS workspaces, kernels. Seen in vLLM's start-up logs: 0.1 to 0.5 GiB."""
LINKED_BYTES = GIB
"""What NCCL and all-reduce buffers take on each of several GPUs (vLLM pull request 10511: 1.8 GiB more with two)."""
GRAPH_BYTES_PER_LAYER = 16 * 1024**2
"""CUDA graphs of vLLM's default batch sizes: 0.5 GiB were logged for models of 32 layers."""
SAMPLER_BYTES = 16
"""Per sequence and word of the vocabulary: a 32-bit logit, the same sorted, and its 64-bit index."""
ROOMY_BYTES = 70 * GIB
"""From here on vLLM batches more: 8192 tokens and 1024 sequences, below that 2048 and 256 (`EngineArgs`)."""
UNKNOWN_CONTEXT = 10_000_000


class Ask(Struct, frozen=True, kw_only=True):
    """How an engine is going to be started. None: as it does by itself."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    utilization: float = UTILIZATION
    chosen_by_person: bool = False
    """The utilization is in the config, and the engine insists on it."""
    share_bytes: int | None = None
    """A fixed part of each GPU, instead of `utilization`."""
    max_model_len: int | None = None
    """In tokens; 0: whatever fits."""
    kv_value_bytes: int | None = None
    weight_bits: int | None = None
    """Quantised while loading."""
    batched_tokens: int | None = None
    sequences: int | None = None
    graphs: bool = True
    lora_rank: int = 0
    loras: int = 1


class Fit(Struct, frozen=True, kw_only=True):
    """The sum for one of the GPUs, in bytes."""

    gpu_bytes: int
    budget_bytes: int
    """What the engine may take of it."""
    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    overhead_bytes: int
    adapter_bytes: int
    kv_bytes: int
    """For one sequence of `model_len` tokens, its state included."""
    kv_bytes_per_token: int
    """While the sequence is shorter than any window."""
    model_len: int
    largest_model_len: int
    """The longest context that fits, no longer than the model's own; 0: the weights alone are too much."""
    tensor_parallel: int
    pipeline_parallel: int
    exact: bool

    @property
    def fixed_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.overhead_bytes + self.adapter_bytes

    @property
    def need_bytes(self) -> int:
        return self.fixed_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.need_bytes <= self.budget_bytes


def fit(spec: ModelSpec, ask: Ask, gpu_bytes: int) -> Fit | None:
    """The sum on GPUs of `gpu_bytes` each; None where the spec does not say what the model takes."""
    if spec.memory is None:
        return None
    budget_bytes = int(gpu_bytes * ask.utilization) if ask.share_bytes is None else ask.share_bytes
    tokens = ask.batched_tokens or (8192 if gpu_bytes >= ROOMY_BYTES else 2048)
    ways = ask.tensor_parallel * ask.pipeline_parallel
    bits = ask.weight_bits
    held = spec.memory.weights_bytes if bits is None else spec.base_num_parameters * bits // 8
    weights_bytes = ceil(min(held, spec.memory.weights_bytes) / ways)
    activation_bytes = _activations(spec, ask, tokens, gpu_bytes)
    graph_bytes = GRAPH_BYTES_PER_LAYER * ceil(spec.num_layers / ask.pipeline_parallel) if ask.graphs else 0
    overhead_bytes = CONTEXT_BYTES + (LINKED_BYTES if ways > 1 else 0)
    adapter_bytes = _adapters(spec, ask)
    fixed = weights_bytes + activation_bytes + graph_bytes + overhead_bytes + adapter_bytes
    longest = spec.context_size or UNKNOWN_CONTEXT
    largest = _largest(spec, ask, tokens, budget_bytes - fixed, max(longest, ask.max_model_len or 0))
    wanted = ask.max_model_len if ask.max_model_len is not None else spec.context_size
    model_len = wanted if wanted else min(max(largest, BLOCK), longest)
    return Fit(
        gpu_bytes=gpu_bytes,
        budget_bytes=budget_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation_bytes,
        graph_bytes=graph_bytes,
        overhead_bytes=overhead_bytes,
        adapter_bytes=adapter_bytes,
        kv_bytes=kv_bytes(spec, ask, model_len, tokens),
        kv_bytes_per_token=_kv_per_token(spec, ask),
        model_len=model_len,
        largest_model_len=largest,
        tensor_parallel=ask.tensor_parallel,
        pipeline_parallel=ask.pipeline_parallel,
        exact=spec.memory.exact,
    )


def smallest(fits: Iterable[Fit | None]) -> Fit | None:
    """The first one that fits."""
    return next((found for found in fits if found is not None and found.fits), None)


def kv_bytes(spec: ModelSpec, ask: Ask, model_len: int, batched_tokens: int) -> int:
    """KV cache of one sequence of `model_len` tokens on one GPU, with what state space layers keep.

    Per layer and token, 2 x heads x head size numbers (https://docs.vllm.ai/en/stable/design/paged_attention/); a
    windowed layer keeps the window and the tokens of the step under way (vLLM's SlidingWindowSpec). The heads that a
    GPU keeps are at least one, and of latent attention every GPU keeps all.
    """
    memory = spec.memory
    assert memory is not None
    value_bytes = ask.kv_value_bytes or memory.kv_value_bytes
    total = 0
    for group in memory.kv:
        kept = model_len if group.window is None else min(model_len, group.window - 1 + batched_tokens)
        total += ceil(kept / BLOCK) * BLOCK * _values(group, ask) * value_bytes
    state = memory.state_values * memory.kv_value_bytes // (ask.tensor_parallel * ask.pipeline_parallel)
    return total + state


def _kv_per_token(spec: ModelSpec, ask: Ask) -> int:
    assert spec.memory is not None
    value_bytes = ask.kv_value_bytes or spec.memory.kv_value_bytes
    return sum(_values(group, ask) * value_bytes for group in spec.memory.kv)


def _values(group: KvLayers, ask: Ask) -> int:
    layers = ceil(group.layers / ask.pipeline_parallel)
    heads = max(1, group.heads // ask.tensor_parallel)
    return layers * group.values * heads // group.heads


def _largest(spec: ModelSpec, ask: Ask, tokens: int, room_bytes: int, longest: int) -> int:
    """By halving: the KV cache only grows with the length."""
    if kv_bytes(spec, ask, BLOCK, tokens) > room_bytes:
        return 0
    low, high = 1, ceil(longest / BLOCK)
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes(spec, ask, middle * BLOCK, tokens) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return min(low * BLOCK, longest)


def _activations(spec: ModelSpec, ask: Ask, tokens: int, gpu_bytes: int) -> int:
    """The peak of one step: per token the widest part of a layer and two copies of the hidden state, in 16 bits, and
    the sampler's work on every sequence. For Llama 3 8B on an 80 GiB GPU 1.27 GiB; vLLM logged 1.26 (pull request
    10511), with 256 sequences.
    """
    inner = 3 * spec.ffn_hidden_size if spec.gated_mlp else 2 * spec.ffn_hidden_size
    if spec.moe_config is not None:
        expert = spec.moe_config.expert_ffn_size or spec.ffn_hidden_size
        inner = max(inner, spec.moe_config.num_experts_per_tok * (max(2 * expert, spec.hidden_size) + expert))
    step = tokens * 2 * (ceil(inner / ask.tensor_parallel) + 2 * spec.hidden_size)
    if spec.is_embedding_model or (spec.memory is not None and not spec.memory.kv and not spec.memory.state_values):
        return step
    sequences = ask.sequences or (1024 if gpu_bytes >= ROOMY_BYTES else 256)
    return step + sequences * spec.vocab_size * SAMPLER_BYTES


def _adapters(spec: ModelSpec, ask: Ask) -> int:
    """Slots for `loras` adapters of rank `lora_rank` on all projections: rank x (inputs + outputs) numbers of 16 bits
    each, https://arxiv.org/abs/2106.09685 section 4.1. Llama 3 8B with rank 16: 41.9 million, 84 MB.
    """
    if not ask.lora_rank or spec.memory is None:
        return 0
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    keys = spec.memory.kv[0].values // 2 if spec.memory.kv else hidden
    queries = keys * spec.num_attention_heads // spec.num_kv_heads if spec.num_kv_heads else hidden
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    mlp = (3 if spec.gated_mlp else 2) * (hidden + ffn)
    return ask.loras * ask.lora_rank * spec.num_layers * (attention + mlp) * 2 // ask.tensor_parallel

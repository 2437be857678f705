"""What engines were seen to say when GPU memory did not suffice, and the flag that is named."""

from __future__ import annotations

import pytest

from nimhost.deployments.oom import shortage

CONTEXT = """(EngineCore_DP0 pid=18799) ERROR 10-08 20:33:48 [core.py:708] ValueError: To serve at least one request
 with the models's max seq len (40960), (5.62 GiB KV cache is needed, which is larger than the available KV cache memory
 (4.50 GiB). Based on the available memory, the estimated maximum model length is 32768. Try increasing
 `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."""
OLD_CONTEXT = """ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be
stored in KV cache (26064). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"""
OCCUPIED = """ValueError: Free memory on device cuda:0 (10.1/23.69 GiB) on startup is less than desired GPU memory
utilization (0.92, 21.79 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."""
SAMPLER = """RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try
lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."""
NO_CACHE = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
LOADING = """  File "vllm/model_executor/model_loader/utils.py", line 64, in initialize_model
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 23.69 GiB of which
 500.00 MiB is free."""
GRAPHS = """INFO gpu_memory_utilization=0.95
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 592.00 MiB. GPU 0 has a total capacity of 23.69 GiB of
 which 100.00 MiB is free."""


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("log", "usual", "said", "final"),
    [
        (CONTEXT, "", "--arg --max-model-len --arg 32768", True),
        (CONTEXT.partition(" Based")[0], "", "--arg --max-model-len --arg 32784", True),
        (OLD_CONTEXT, "", "--arg --max-model-len --arg 26064", True),
        (OCCUPIED, "", "--arg --gpu-memory-utilization --arg 0.41", False),
        (SAMPLER, "", "--arg --max-num-seqs --arg 64", True),
        (NO_CACHE, "It fits with --gpu 2.", "KV cache. It fits with --gpu 2.", True),
        (LOADING, "It fits with --gpu 2.", "did not suffice. It fits with --gpu 2.", True),
        (LOADING, "", "--gpu N", True),
        (GRAPHS, "", "--arg --gpu-memory-utilization --arg 0.9", True),
    ],
)
def test_the_flag_and_its_value_are_named(log: str, usual: str, said: str, final: bool) -> None:
    found = shortage(log, usual)
    assert found is not None
    assert (said in found.message, found.final) == (True, final), found


@pytest.mark.parametrize("log", ["", "KeyError: 'model'", "INFO: Available KV cache memory: 8.11 GiB"])
def test_other_logs_are_about_something_else(log: str) -> None:
    assert shortage(log) is None


@pytest.mark.parametrize(
    "log",
    [
        OCCUPIED.replace("10.1/23.69", "0.0/0.0"), OCCUPIED.replace("10.1", "..."), CONTEXT.replace("5.62", "."),
        OLD_CONTEXT.replace("26064", "9" * 5000), SAMPLER.replace("256", "9" * 5000),
        GRAPHS.replace("23.69", "0.00"), GRAPHS.replace("592.00", "..."),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_not_counted_with(log: str) -> None:
    found = shortage(log, "It fits with --gpu 2.")
    assert found is not None
    assert "GPU" in found.message

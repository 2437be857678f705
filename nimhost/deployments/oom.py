"""What an engine's log says about GPU memory that did not suffice, and the flag with the value that helps. Pure.

The sentences are vLLM's (`vllm/v1/core/kv_cache_utils.py`, `vllm/v1/worker/`) and torch's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

from nimhost.models.memory import BLOCK, UTILIZATION

HEADROOM = 0.02
"""Fraction of a GPU that is left when one is told to take less."""
_SHORT = "The GPU memory did not suffice."


class Shortage(Struct, frozen=True):
    """`message`: what was short, and the change. `final`: the same arguments would only fail again."""

    message: str
    final: bool = True


def shortage(log: str, usual: str = "") -> Shortage | None:
    """None when the log does not speak of GPU memory. `usual`: the change to name where the log has no number."""
    log = " ".join(log.split())
    for pattern, meaning in _MEANINGS:
        if found := pattern.search(log):
            try:
                return meaning(found, log, usual)
            except (ValueError, ArithmeticError):  # numbers that are none: an engine may log anything
                return Shortage(f"{_SHORT} {_more(usual)}")
    return None


def _context(found: re.Match[str], log: str, usual: str) -> Shortage:
    length, needed, there, estimate = found["length"], float(found["needed"]), float(found["there"]), found["estimate"]
    fits = int(estimate) if estimate else int(int(length) * there / needed) if needed else 0
    fits -= fits % BLOCK
    what = f"The KV cache has {there:g} GiB, and {length} tokens need {needed:g}."
    return Shortage(f"{what} Deploy it with: --arg --max-model-len --arg {fits}" if fits else f"{what} {_more(usual)}")


def _stored(found: re.Match[str], log: str, usual: str) -> Shortage:
    fits = int(found["fits"]) // BLOCK * BLOCK
    what = f"The KV cache holds {found['fits']} tokens, and the context has {found['length']}."
    return Shortage(f"{what} Deploy it with: --arg --max-model-len --arg {fits}")


def _occupied(found: re.Match[str], log: str, usual: str) -> Shortage:
    free, total = float(found["free"]), float(found["total"])
    fraction = max(0.01, int((free / total - HEADROOM / 2) * 100) / 100)
    return Shortage(
        f"Only {free:g} of {total:g} GiB of the GPU were free: somebody else uses it (nimhost gpus). "
        f"To make do with that: --arg --gpu-memory-utilization --arg {fraction:g}",
        final=False,
    )


def _sampler(found: re.Match[str], log: str, usual: str) -> Shortage:
    fewer = max(1, int(found["sequences"]) // 4)
    return Shortage(
        f"The GPU memory did not suffice for {found['sequences']} sequences at once. "
        f"Deploy it with: --arg --max-num-seqs --arg {fewer}"
    )


def _no_cache(found: re.Match[str], log: str, usual: str) -> Shortage:
    return Shortage(f"The weights left no GPU memory for the KV cache. {_more(usual)}")


def _allocation(found: re.Match[str], log: str, usual: str) -> Shortage:
    said = re.search(r"Tried to allocate ([\d.]+) (MiB|GiB).*?total capacity of ([\d.]+) GiB", log, re.DOTALL)
    if said is None or not re.search(r"captur|cudagraph|cuda graph", log, re.IGNORECASE):
        return Shortage(f"{_SHORT} {_more(usual)}")
    tried_gib = float(said[1]) / (1 if said[2] == "GiB" else 1024)
    fraction = int((_utilization(log) - tried_gib / float(said[3]) - HEADROOM) * 100) / 100
    less = f"--arg --gpu-memory-utilization --arg {fraction:g}"
    return Shortage(f"{_SHORT} The CUDA graphs had no room beside the KV cache. Deploy it with: {less}")


def _utilization(log: str) -> float:
    said = re.search(r"gpu_memory_utilization\D{1,4}(0?\.\d+|1\.0)", log)
    return float(said[1]) if said else UTILIZATION


def _more(usual: str) -> str:
    return usual or "Give it more GPUs (--gpu N), or a version of the model with fewer bits."


_MEANINGS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str, str], Shortage]], ...] = tuple(
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        (
            r"max seq len \((?P<length>\d+)\),? \(?(?P<needed>[\d.]+) GiB KV cache is needed.{0,80}?"
            r"available KV cache memory \((?P<there>-?[\d.]+) GiB\)"
            r"(?:.{0,80}?estimated maximum model length is (?P<estimate>\d+))?",
            _context,
        ),
        (
            r"max seq len \((?P<length>\d+)\) is larger than the maximum number of tokens that can be stored"
            r" in KV cache \((?P<fits>\d+)\)",
            _stored,
        ),
        (r"Free memory on device.{0,20}?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less", _occupied),
        (r"out of memory occurred when warming up sampler with (?P<sequences>\d+)", _sampler),
        (r"No available memory for the cache", _no_cache),
        (r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory", _allocation),
    )
)
"""First match wins. Blanks and line ends are one blank."""

"""Which GPUs a deployment gets, or why it has to wait. Pure.

A GPU can be had when it is large enough, nobody has it alone, no other engine is loading on it, and its measured free
memory is enough. Of those, the best: GPUs of one kind, not occupied by strangers, joined by the fastest links; then
the tightest fit, so that large ones stay free for large models and shares stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.need import MARGIN_BYTES, Need
from nimhost.deployments.observed import GpuSlot, Share, Stranger
from nimhost.models.memory import GIB, UTILIZATION, Ask

MOST_CANDIDATES = 12
"""Of more GPUs, only the best ones are combined."""


def free_bytes(slot: GpuSlot) -> int:
    """Measured, and less what was promised to those who have not taken it yet."""
    promised = sum(s.size_bytes for s in slot.shares) + sum(s.used_bytes for s in slot.strangers)
    return max(0, slot.total_bytes - max(slot.used_bytes, promised))


def obstacle(slot: GpuSlot, need: Need) -> str | None:
    """Why this GPU cannot be had now, naming who is in the way; None when it can."""
    gpu = f"GPU {slot.index}"
    if slot.problem:
        return f"{gpu} cannot be used: {slot.problem}"
    if (wanted := need.too_small.get(slot.uuid)) is not None:
        return f"{gpu} has only {_gib(slot.total_bytes)} GiB, {_gib(wanted)} are needed"
    if slot.holder:
        return f"{gpu} is held by {slot.holder}"
    if need.share_bytes is None and slot.shares:
        return f"{gpu} is shared by {', '.join(share.holder for share in slot.shares)}"
    if slot.starting:
        return f"{slot.starting} is starting on {gpu}, and engines start there one after the other"
    if short_of_memory(slot, need):
        wanted, free = need.memory_bytes[slot.uuid], free_bytes(slot)
        has = f"{_gib(free)} of {_gib(slot.total_bytes)} GiB free"
        return f"{gpu} has {has}, {_gib(wanted)} are needed: {_culprits(slot)}"
    return None


def short_of_memory(slot: GpuSlot, need: Need) -> bool:
    """By what was measured; for who was forced, only by what was promised to others."""
    free = _unpromised_bytes(slot) if need.force else free_bytes(slot)
    return free < need.memory_bytes[slot.uuid]


def _culprits(slot: GpuSlot) -> str:
    named = [f"{share.holder} has {_gib(share.size_bytes)} GiB" for share in slot.shares]
    named += [culprit(s) for s in slot.strangers]
    return ", ".join(named) or "it was not given back yet, and the driver names nobody who has it"


def culprit(s: Stranger) -> str:
    who = ", ".join(part for part in (f"pid {s.pid}", f"user {s.user}" if s.user else "") if part)
    has = f"{_gib(s.used_bytes)} GiB" if s.used_bytes else "memory"
    return f"{s.name or 'a process'} ({who}) holds {has}"


def _gib(size_bytes: int) -> str:
    """Whole ones from 10 on: a message that changes with every megabyte would be a new one each time."""
    size = size_bytes / GIB
    return f"{size:.0f}" if size >= 9.95 else f"{size:.1f}"


def waiting(slots: Sequence[GpuSlot], need: Need, ahead: str | None) -> str:
    """The message of a deployment that waits for its GPUs."""
    obstacles = [(slot, obstacle(slot, need)) for slot in slots]
    free = sum(why is None for _, why in obstacles)
    reasons = "; ".join(why for _, why in obstacles if why)
    short = f"Waiting for GPUs: needs {need.gpus}, {free} free"
    queue = (f" {ahead} waits ahead of it." if ahead else "") + _remedy(slots, need)
    return f"{short}: {reasons}.{queue}" if reasons else f"{short}.{queue}"


def _remedy(slots: Iterable[GpuSlot], need: Need) -> str:
    """For one that would wait as long as somebody else's memory is held: how to do with what is free."""
    short = [slot for slot in slots if not (slot.holder or slot.shares or slot.problem) and short_of_memory(slot, need)]
    free = max(((free_bytes(slot) - MARGIN_BYTES, slot) for slot in short), key=lambda pair: pair[0], default=None)
    if free is None or need.gpus > 1 or need.share_bytes is not None or free[0] < GIB:
        return ""
    if need.known_from == "guess":
        return f" To start it beside that, give it a share: --gpu-memory {free[0] // GIB}"
    less = f"--gpu-memory-utilization {int(100 * free[0] / free[1].total_bytes) / 100:g}"
    return f" To start it beside that, ask for less: {less}" if need.known_from == "person" else ""


def waits_for_memory(slots: Iterable[GpuSlot], need: Need) -> bool:
    """Whether only a new measurement can tell when it goes on: no event says that memory is back. What others were
    promised is another matter: the end of their engine is an event."""
    return any(
        not (slot.problem or slot.holder or slot.uuid in need.too_small or (need.share_bytes is None and slot.shares))
        and free_bytes(slot) < need.memory_bytes[slot.uuid] <= _unpromised_bytes(slot)
        and not need.force
        for slot in slots
    )


def _unpromised_bytes(slot: GpuSlot) -> int:
    return slot.total_bytes - sum(share.size_bytes for share in slot.shares)


def choose(slots: Iterable[GpuSlot], need: Need) -> tuple[GpuSlot, ...] | None:
    """The GPUs it gets, by index; None while there are not enough."""
    usable = [slot for slot in slots if obstacle(slot, need) is None]
    if len(usable) < need.gpus:
        return None
    usable = sorted(usable, key=lambda slot: _cost((slot,), need))[: max(MOST_CANDIDATES, need.gpus)]
    best = min(combinations(usable, need.gpus), key=lambda chosen: _cost(chosen, need))
    return tuple(sorted(best, key=lambda slot: (slot.index, slot.uuid)))


def _cost(chosen: Sequence[GpuSlot], need: Need) -> tuple[object, ...]:
    kinds = len({(slot.name, slot.total_bytes) for slot in chosen})
    occupied = sum(bool(slot.strangers) for slot in chosen) if need.share_bytes is None else 0
    slowest = min((a.links.get(b.uuid, 0) for a, b in combinations(chosen, 2)), default=0)
    all_links = sum(a.links.get(b.uuid, 0) for a, b in combinations(chosen, 2))
    room = sum(free_bytes(slot) if need.share_bytes else slot.total_bytes for slot in chosen)
    return kinds, occupied, -slowest, -all_links, room, sorted((slot.index, slot.uuid) for slot in chosen)


def utilization(chosen: Iterable[GpuSlot], need: Need, ask: Ask | None) -> float | None:
    """The fraction of each GPU that the engine is told to take; None: what it takes by itself, or was told already."""
    measured = [slot for slot in chosen if slot.total_bytes]
    if not measured or (ask and ask.chosen_by_person):
        return None
    if need.share_bytes is not None:
        return _floor(need.share_bytes / max(slot.total_bytes for slot in measured))
    usual = ask.utilization if ask else UTILIZATION
    left = min((free_bytes(slot) - MARGIN_BYTES) / slot.total_bytes for slot in measured)
    short = any(free_bytes(slot) < usual * slot.total_bytes for slot in measured)
    return _floor(left) if ask and short and left > 0 else None


def _floor(fraction: float) -> float:
    """Four digits, and never nothing."""
    return max(int(fraction * 10_000), 1) / 10_000


def released(slot: GpuSlot, holder: str) -> GpuSlot:
    """As it will be when `holder` has left it."""
    shares = tuple(share for share in slot.shares if share.holder != holder)
    if slot.holder != holder and shares == slot.shares:
        return slot
    used = sum(stranger.used_bytes for stranger in slot.strangers) + sum(share.size_bytes for share in shares)
    alone = None if slot.holder == holder else slot.holder
    return replace(slot, holder=alone, shares=shares, used_bytes=min(slot.used_bytes, used))


def reserved(slot: GpuSlot, d: Desired) -> GpuSlot:
    """As it is once the engine of `d` is about to start on it."""
    ref = str(d.ref)
    if d.share_bytes is None:
        return replace(slot, holder=slot.holder or ref, starting=ref)
    own = Share(ref, d.share_bytes, d.hash)
    others = tuple(share for share in slot.shares if (share.holder, share.hash) != (own.holder, own.hash))
    return replace(slot, shares=(*others, own), starting=ref)


def kept_for(slot: GpuSlot, d: Desired) -> GpuSlot:
    """As others see it while it is kept for `d`, whose versions take turns on it."""
    ref = str(d.ref)
    shares = [version.share_bytes for version in (d, d.previous) if version is not None]
    if None in shares:
        return replace(slot, holder=slot.holder or ref)
    others = tuple(share for share in slot.shares if share.holder != ref)
    return replace(slot, shares=(*others, Share(ref, max(share or 0 for share in shares))))

"""Which GPUs a deployment gets, or why it has to wait. Pure.

A GPU can be had when nobody has it alone, no other engine is loading on it, and its measured free memory is enough. Of
those, the best: GPUs of one kind, not occupied by strangers, joined by the fastest links; then the tightest fit, so
that large ones stay free for large models and shares stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Share, Stranger
from nimhost.models.memory import GIB, UTILIZATION, Ask, fit

MARGIN_BYTES = GIB // 4
"""Left to others when an engine gets less than it takes by itself."""
UNKNOWN = 0.9
"""What an engine of unknown appetite takes of a GPU."""
MOST_CANDIDATES = 12
"""Of more GPUs, only the best ones are combined."""


class Need(Struct, frozen=True, kw_only=True):
    """What a deployment wants of each of its GPUs."""

    ref: str
    gpus: int
    share_bytes: int | None = None
    """None: it wants them for itself."""
    memory_bytes: Mapping[str, int] = {}
    """uuid -> what has to be free there."""


def need_of(d: Desired, slots: Iterable[GpuSlot]) -> Need:
    share_bytes = d.share_bytes
    memory = {slot.uuid: share_bytes or _wanted(d, slot.total_bytes) for slot in slots}
    return Need(ref=str(d.ref), gpus=d.gpus, share_bytes=share_bytes, memory_bytes=memory)


def _wanted(d: Desired, total_bytes: int) -> int:
    """Of a GPU for itself: the least it can live with where that is known, else what it will take."""
    spec = d.order.model.spec if d.order and d.order.model else None
    found = fit(spec, d.ask, total_bytes) if spec and d.ask else None
    if found is None or d.ask is None:
        return int(total_bytes * UNKNOWN)
    return found.budget_bytes if d.ask.chosen_by_person else min(found.need_bytes, found.budget_bytes)


def free_bytes(slot: GpuSlot) -> int:
    """Measured, and less what was promised to those who have not taken it yet."""
    promised = sum(s.size_bytes for s in slot.shares) + sum(s.used_bytes for s in slot.strangers)
    return max(0, slot.total_bytes - max(slot.used_bytes, promised))


def obstacle(slot: GpuSlot, need: Need) -> str | None:
    """Why this GPU cannot be had now, naming who is in the way; None when it can."""
    gpu = f"GPU {slot.index}"
    if slot.problem:
        return f"{gpu} cannot be used: {slot.problem}"
    if slot.holder:
        return f"{gpu} is held by {slot.holder}"
    if need.share_bytes is None and slot.shares:
        return f"{gpu} is shared by {', '.join(share.holder for share in slot.shares)}"
    if slot.starting and slot.starting != need.ref:
        return f"{slot.starting} is starting on {gpu}, and engines start there one after the other"
    if short_of_memory(slot, need):
        wanted, free = need.memory_bytes[slot.uuid], free_bytes(slot)
        has = f"{_gib(free)} of {_gib(slot.total_bytes)} GiB free"
        return f"{gpu} has {has}, {_gib(wanted)} are needed: {_culprits(slot)}"
    return None


def short_of_memory(slot: GpuSlot, need: Need) -> bool:
    return free_bytes(slot) < need.memory_bytes[slot.uuid]


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
    queue = f" {ahead} waits ahead of it." if ahead else ""
    return f"{short}: {reasons}.{queue}" if reasons else f"{short}.{queue}"


def waits_for_memory(slots: Iterable[GpuSlot], need: Need) -> bool:
    """Whether only a new measurement can tell when it goes on: no event says that memory is back."""
    return any(obstacle(slot, need) is not None and not slot.holder and short_of_memory(slot, need) for slot in slots)


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
    return _floor(left) if ask and short else None


def _floor(fraction: float) -> float:
    return int(fraction * 1000) / 1000


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
    need = need_of(d, (slot,))
    if need.share_bytes is None:
        return replace(slot, holder=slot.holder or need.ref, starting=need.ref)
    others = tuple(share for share in slot.shares if share.holder != need.ref)
    return replace(slot, shares=(*others, Share(need.ref, need.share_bytes)), starting=need.ref)

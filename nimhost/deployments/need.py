"""What a deployment wants of each GPU it could get. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot
from nimhost.models.memory import Fit, fit

MARGIN_BYTES = 2**28
"""Left to others when an engine gets less than it takes by itself."""
UNKNOWN = 0.9
"""What an engine of unknown appetite takes of a GPU."""


class Need(Struct, frozen=True, kw_only=True):
    """What a deployment wants of each of its GPUs."""

    ref: str
    gpus: int
    share_bytes: int | None = None
    """None: it wants them for itself."""
    memory_bytes: Mapping[str, int] = {}
    """uuid -> what has to be free there."""
    too_small: Mapping[str, int] = {}
    """uuid -> what it would take there, where even all of it is less than that."""
    known_from: Literal["sum", "person", "guess"] = "sum"
    """Where `memory_bytes` comes from: the sum of its parts, a person who said so, or nothing better than UNKNOWN."""
    force: bool = False
    """A person wants it started whatever the measured memory says."""


def need_of(d: Desired, slots: Sequence[GpuSlot]) -> Need:
    share_bytes, force = d.share_bytes, bool(d.entity.wish.force)
    if share_bytes is not None:
        memory = dict.fromkeys((slot.uuid for slot in slots), share_bytes)
        small = {slot.uuid: share_bytes for slot in slots if 0 < slot.total_bytes < share_bytes}
        return Need(
            ref=str(d.ref), gpus=d.gpus, share_bytes=share_bytes, memory_bytes=memory, too_small=small, force=force,
            known_from="person",
        )  # fmt: skip
    fits = {slot.uuid: _fit(d, slot.total_bytes) for slot in slots}
    small = {uuid: found.need_bytes for uuid, found in fits.items() if found and not found.fits}
    if len(slots) - len(small) < d.gpus:  # the preflight refuses that; who was forced past it may have them all
        small = {}
    told = d.ask is not None and d.ask.chosen_by_person
    return Need(
        ref=str(d.ref),
        gpus=d.gpus,
        memory_bytes={slot.uuid: _wanted(fits[slot.uuid], slot.total_bytes, told) for slot in slots},
        too_small=small,
        known_from="person" if told else "sum" if any(fits.values()) else "guess",
        force=force,
    )


def _fit(d: Desired, total_bytes: int) -> Fit | None:
    spec = d.order.model.spec if d.order and d.order.model else None
    return fit(spec, d.ask, total_bytes) if spec and d.ask and total_bytes else None


def _wanted(found: Fit | None, total_bytes: int, told: bool) -> int:
    """Of a GPU for itself: the least it can live with where that is known, else what it will take."""
    if found is None:
        return int(total_bytes * UNKNOWN)
    if told:
        return found.budget_bytes
    rounding = total_bytes // 1000  # it is told a fraction with four digits
    return min(found.need_bytes + MARGIN_BYTES + rounding, found.budget_bytes)

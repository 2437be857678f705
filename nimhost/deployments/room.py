"""Room on disk for weights that were decided on and of whose download nothing is known yet: until it has been promised
room, what it will write is counted here, so that two deployments are not both given the same room. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Observed, Room
from nimhost.deployments.preflight import weights_needed
from nimhost.deployments.storage import HubWeights
from nimhost.refs import Ref

Coming = Mapping[tuple[str, str, str], int]
"""A repository, at whatever revision -> bytes that are still to come."""


def coming(d: Desired, observed: Observed) -> Coming:
    """What a deployment whose weights are to be fetched will write; nothing once that has been promised room."""
    room = observed.rooms.get(d.ref)
    if room is None or room.fetching or observed.weights.get(d.ref) is not None:
        return {}
    return {_repository(d): weights_needed(d, room)}


def beside(others: Coming, d: Desired, observed: Observed) -> Mapping[Ref, Room]:
    """The room of a deployment, less what comes for others. Bytes of its own repository come once for all."""
    room = observed.rooms.get(d.ref)
    if room is None:
        return {}
    wanted = sum(size for repository, size in others.items() if repository != _repository(d))
    return {d.ref: replace(room, promised_bytes=room.promised_bytes + wanted)}


def _repository(d: Desired) -> tuple[str, str, str]:
    w = d.weights
    return (w.registry, w.repo_type, w.repo_id) if isinstance(w, HubWeights) else ("", "", "")

"""The things that can be done for a deployment; `plan` decides, `execute` carries out."""

from __future__ import annotations

from msgspec import Struct


class Prepare(Struct, frozen=True, tag=True):
    """Bring image and weights to this machine."""

    image: bool
    weights: bool
    hash: str


class Start(Struct, frozen=True, tag=True):
    """Start the version `hash`: the wish, or the previous one.

    `utilization`: the fraction of each GPU that the engine is told to take; None: as it does by itself.
    """

    gpu_ids: tuple[str, ...]
    hash: str
    utilization: float | None = None


class Remove(Struct, frozen=True, tag=True):
    """Stop and remove these containers; `at_once`: without waiting for them to finish what they do."""

    containers: tuple[str, ...]
    at_once: bool = False


class Halt(Struct, frozen=True, tag=True):
    """Stop a container but keep it for its logs."""

    container: str


class Cancel(Struct, frozen=True, tag=True):
    """Give up the Prepare in flight."""


class Forget(Struct, frozen=True, tag=True):
    """Delete the rows of a deployment that has nothing on this machine any more."""


Action = Prepare | Start | Remove | Halt | Cancel | Forget

"""How bringing a deployment up is going: what the reconciler remembers of it, in its stored status."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

Json = dict[str, Any]


class Failure(Struct, frozen=True, kw_only=True):
    """Why the last attempt did not work. `final`: only a changed wish, or a person who says `start`, can help."""

    message: str
    final: bool


class Run(Struct, frozen=True, kw_only=True):
    """How bringing a deployment up is going: what a restart of the daemon must not forget.

    Times are Unix times in seconds, 0 for never.
    """

    spec_hash: str = ""
    """The wish that all the rest belongs to; another wish starts from a fresh Run."""
    image_id: str | None = None
    """The image this wish was resolved to at its first start: a tag that moves later does not change it."""
    commit: str | None = None
    """The commit of the weights, likewise."""
    resolved: Json | None = None
    """The ContainerSpec, likewise: a new nimhost or a new default never changes what a wish became."""
    attempts: int = 0
    """Failures in a row."""
    retry_at: float = 0.0
    """No new attempt before this time."""
    failure: Failure | None = None
    started_at: float = 0.0
    """The last start of a container."""
    ready_at: float = 0.0
    """When `ready_container` became READY."""
    ready_container: str | None = None
    """The container that has been READY: tells an engine that broke from one that is still loading."""
    exited_container: str | None = None
    """The container whose exit is already counted in `attempts`."""
    waiting_since: float = 0.0
    """When it began to wait for GPUs: its place in the queue."""

    def forgiven(self) -> Run:
        """With nothing held against it: what a person gets who says stop or start."""
        return replace(self, attempts=0, failure=None, retry_at=0.0, waiting_since=0.0)

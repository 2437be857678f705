"""How bringing a deployment up is going: what the reconciler remembers of it, in its stored status."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

Json = dict[str, Any]

Update = Literal["rolling", "failed"]
"""Of a deployment whose wish is not what serves: its version is on the way, or will not come."""


class Serving(Struct, frozen=True, kw_only=True):
    """The version of a deployment that has its traffic, and of the config that it was started with."""

    entity_version: int
    config_version: int


class Failure(Struct, frozen=True, kw_only=True):
    """Why the last attempt did not work. `final`: only a changed wish, or a person who says `start`, can help."""

    message: str
    final: bool
    full_at: float = 0.0
    """When a disk was full, if that is what it was: Unix time in seconds."""
    fetching: bool = False
    """It was image or weights that did not come: over once they are here."""


class Run(Struct, frozen=True, kw_only=True):
    """How bringing a deployment up is going: what a restart of the daemon must not forget.

    Times are Unix times in seconds, 0 for never.
    """

    spec_hash: str = ""
    """The wish that all the rest belongs to; another wish starts from a fresh Run."""
    version: int = 0
    """Of the deployment: where this wish can be read again."""
    config_version: int = 0
    """Of its config, likewise."""
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
    pulling: bool = False
    """The pull of its image has begun: whatever speaks against it was looked at before, the room that it takes too."""
    container: str | None = None
    """The container that was last seen to run, until nimhost removes it or counts its end: where it is missing,
    somebody else removed it."""
    exited_container: str | None = None
    """The container whose exit is already counted in `attempts`."""
    waiting_since: float = 0.0
    """When it began to wait for GPUs: its place in the queue."""
    previous: Run | None = None
    """How the version was run that served before this one: what goes on serving until this one is READY, and what is
    gone back to if it never is. None once it is."""
    replaced_at: float = 0.0
    """When the previous version had to give way, because there are not GPUs enough for both; 0: it has not."""
    kept_gpus: tuple[str, ...] = ()
    """The GPUs that the previous version gave back: they are for this deployment alone, whichever version gets them."""

    def forgiven(self) -> Run:
        """With nothing held against it: what a person gets who says stop or start."""
        previous = self.previous.forgiven() if self.previous else None
        return replace(
            self, attempts=0, failure=None, retry_at=0.0, waiting_since=0.0, container=None, previous=previous
        )

    def without(self, containers: Collection[str]) -> Run:
        """With none of these missed once they are gone."""
        previous = self.previous.without(containers) if self.previous else None
        return replace(self, container=None if self.container in containers else self.container, previous=previous)

    @property
    def failed(self) -> bool:
        """Something is held against this version, or against the previous one."""
        return self.failure is not None or (self.previous is not None and self.previous.failed)

    @property
    def ready_containers(self) -> frozenset[str]:
        """The containers that have been READY, of both versions."""
        of_previous = self.previous.ready_containers if self.previous else frozenset()
        return of_previous | ({self.ready_container} if self.ready_container else set())

    def of(self, spec_hash: str, version: int, config_version: int) -> Run:
        """What is known about this wish. The last version that was READY, and is not given up, is the previous one."""
        known = self
        if spec_hash != self.spec_hash:
            if self.previous and self.previous.spec_hash == spec_hash:  # back by the wish of a person
                known = replace(self.previous, kept_gpus=self.kept_gpus)
            else:
                known = Run(
                    spec_hash=spec_hash, started_at=self.started_at, kept_gpus=self.kept_gpus,
                    previous=self._served(),
                )  # fmt: skip
        return replace(known, version=version, config_version=config_version)

    def _served(self) -> Run | None:
        if self.ready_container is None:
            return self.previous
        broken = self.failure is not None and self.failure.final
        return None if broken else replace(self, previous=None, replaced_at=0.0, kept_gpus=())

    def part(self, spec_hash: str) -> Run | None:
        """What is known of one of the two versions; None when it is neither."""
        return next((run for run in (self, self.previous) if run and run.spec_hash == spec_hash), None)

    def with_part(self, part: Run) -> Run:
        """With what is known now of one of the two versions."""
        return part if part.spec_hash == self.spec_hash else replace(self, previous=part)

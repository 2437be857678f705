"""What the preflight looks at beside containers and GPUs: whether Docker hands out GPUs, and room on disk.

Each reading may fail by itself: then it is None, and nothing is refused because of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Room
from nimhost.deployments.repos import repo_of
from nimhost.deployments.storage import HubWeights
from nimhost.errors import DockerUnavailable, NimhostError
from nimhost.host.containers import Containers, EngineFacts
from nimhost.host.disk import free_bytes, occupied_bytes, same_file_system
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.disk import promised_bytes
from nimhost.refs import Ref

ASK_AGAIN_S = 30.0
"""A Docker that could not hand out GPUs is asked again after this time, while somebody waits for it."""


class Readings:
    def __init__(self, containers: Containers, cache_dir: Path, owner: str = "") -> None:
        self._containers = containers
        self._cache_dir = cache_dir
        self._owner = owner
        self._gives_gpus: bool | None = None
        self._asked_at = 0.0
        self._facts: EngineFacts | None = None

    def forget(self) -> None:
        """Docker went away: what comes back may be set up differently."""
        self._gives_gpus = self._facts = None

    async def gives_gpus(self) -> bool | None:
        """Asked once per connection: the answer takes a container. Raises DockerUnavailable."""
        stale = self._gives_gpus is False and time.monotonic() - self._asked_at > ASK_AGAIN_S
        if self._gives_gpus is None or stale:
            self._gives_gpus, self._asked_at = await self._containers.hands_out_gpus(self._owner), time.monotonic()
        return self._gives_gpus

    async def engine(self) -> EngineFacts:
        """Asked once per connection. Raises HostError."""
        if self._facts is None:
            self._facts = await self._containers.facts()
        return self._facts

    async def rooms(self, desired: Iterable[Desired]) -> Mapping[Ref, Room]:
        """For those that have something to fetch."""
        wanted = tuple(desired)
        if not wanted:
            return {}
        images = await self._images_dir()
        return await asyncio.to_thread(self._rooms, wanted, images)

    async def rooms_for_weights(self, d: Desired) -> Mapping[Ref, Room]:
        """Without Docker, where nothing is known about images."""
        return await asyncio.to_thread(self._rooms, (d,), None)

    async def _images_dir(self) -> Path | None:
        """Where Docker keeps images; None when that is on another machine."""
        try:
            path = Path((await self.engine()).root_dir)
        except DockerUnavailable:
            raise
        except NimhostError:
            return None
        return path if path.is_absolute() and path.exists() else None

    def _rooms(self, desired: Iterable[Desired], images: Path | None) -> Mapping[Ref, Room]:
        """Blocking; in a thread."""
        promised = promised_bytes(self._cache_dir)
        return {d.ref: self._room(d, images, promised) for d in desired}

    def _room(self, d: Desired, images: Path | None, promised: Mapping[str, int]) -> Room:
        cache = self._cache_of(d)
        folder = cache.folder if cache else ""
        return Room(
            weights_path=str(self._cache_dir),
            weights_free_bytes=free_bytes(self._cache_dir),
            weights_there_bytes=occupied_bytes(cache.blobs) if cache else 0,
            promised_bytes=sum(size for repo, size in promised.items() if repo != folder),
            fetching=folder in promised,
            images_path=str(images or ""),
            images_free_bytes=free_bytes(images) if images else None,
            same=images is not None and same_file_system(images, self._cache_dir),
        )

    def _cache_of(self, d: Desired) -> RepoCache | None:
        try:
            return RepoCache(self._cache_dir, repo_of(d.weights)) if isinstance(d.weights, HubWeights) else None
        except NimhostError:
            return None  # not the name of a repository: fetching says so

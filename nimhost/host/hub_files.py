"""The files of a repository on a model hub or NGC, for who looks at a fileset: named, and read in ranges.

What the cache has comes from there. Blocking calls go to threads of their own; a hub that does not answer keeps nobody
waiting for long.
"""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from msgspec import Struct

from nimhost.errors import HubUnavailable, NotFound, WeightsGated, WeightsMissing
from nimhost.host.files import CHUNK_BYTES, StoredFile
from nimhost.host.threads import in_thread
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.hub import NETWORK, Hub, Interrupted, reason
from nimhost.host.weights.ngc import open_registry
from nimhost.host.weights.wire import Limits, Repo

ANSWER_S = 3.0
"""How long the hub may take to confirm a repository that is to be stored."""
QUICK = Limits(stall_s=ANSWER_S, tries=1, patience_s=0)
STEADY = Limits(stall_s=20, tries=2, backoff_s=0.5, patience_s=2)


class ListedFile(Struct, frozen=True):
    path: str
    size_bytes: int
    cached: bool


class RemoteFile:
    """A file on the hub. `begin` before `read`, so that a refusal comes before anything is promised."""

    def __init__(self, hub: Hub, commit: str, file: HubFile) -> None:
        self.file = StoredFile(file.path, file.size_bytes)
        self._hub = hub
        self._url = hub.file_url(commit, file.path)
        self._response: http.client.HTTPResponse | None = None

    async def begin(self, start: int, stop: int) -> None:
        """Asks for the bytes from `start` up to, not including, `stop`. Raises WeightsGated, HubUnavailable."""
        if start < stop:
            self._response = await in_thread(self._open, start, stop)

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """What was asked for with `begin`. Raises HubUnavailable when it breaks off."""
        left = stop - start
        while left and self._response is not None:
            chunk = await in_thread(self._chunk, self._response, min(CHUNK_BYTES, left))
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Not here, where it would wait for a thread that still reads: until the hub says something more."""
        if self._response is not None and not self._response.isclosed():
            threading.Thread(target=self._response.close, daemon=True).start()

    def _open(self, start: int, stop: int) -> http.client.HTTPResponse:
        whole = not start and stop == self.file.size_bytes
        try:
            response = self._hub.open(self._url, start, None if whole else stop)
            if self._hub.sends_part(response, start, self.file.size_bytes) or not start:
                return response
        except Interrupted as failure:
            raise _away(self._hub, str(failure)) from failure
        response.close()
        raise _away(self._hub, "it does not send parts of files")

    def _chunk(self, response: http.client.HTTPResponse, size_bytes: int) -> bytes:
        try:
            chunk = response.read(size_bytes)
        except NETWORK as error:
            raise _away(self._hub, reason(error, STEADY.stall_s)) from error
        if not chunk:
            raise _away(self._hub, "the file ended early")
        return chunk


class HubFiles:
    """`endpoint`: the hub, where a repository does not name another. `offline`: never ask it."""

    def __init__(self, cache_dir: Path, endpoint: str, offline: bool) -> None:
        self._cache_dir = cache_dir
        self._endpoint = endpoint
        self._offline = offline

    async def confirm(self, repo: Repo, token: str | None) -> str | None:
        """The commit that its revision stands for, once a file of it could be read; None when the hub does not answer
        in time, and then nothing is known.

        Raises WeightsGated, WeightsMissing for what can never be fetched, unless it was fetched before.
        """
        if self._offline:
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await in_thread(_confirm, self._hub(repo, token, QUICK))
        except (HubUnavailable, TimeoutError):
            return None
        except (WeightsGated, WeightsMissing):
            if await in_thread(RepoCache(self._cache_dir, repo).find) is None:
                raise
            return None

    async def list_files(self, repo: Repo, token: str | None) -> list[ListedFile]:
        """Every file of the repository, by path. Raises HubUnavailable when the hub is away and nothing is cached."""
        cache = RepoCache(self._cache_dir, repo)
        try:
            commit, files = await self._tree(repo, token)
        except HubUnavailable:
            cached = cache.commit()
            files = await in_thread(cache.files_there, cached) if cached else []
            if not files or cached is None:
                raise
            commit = cached
        return await in_thread(_listed, files, cache.snapshot_dir(commit))

    async def open_file(self, repo: Repo, token: str | None, path: str) -> Path | RemoteFile:
        """Where the cache has it, or the file on the hub. `path` has been checked: it leads nowhere else.

        Raises NotFound, HubUnavailable.
        """
        cache = RepoCache(self._cache_dir, repo)
        known = cache.commit()
        if known is not None and (found := cache.snapshot_dir(known) / path).is_file():
            return found.resolve()
        commit, files = await self._tree(repo, token)
        file = next((f for f in files if f.path == path), None)
        if file is None:
            raise NotFound("There is no such file.")
        return RemoteFile(self._hub(repo, token, STEADY), commit, file)

    async def _tree(self, repo: Repo, token: str | None) -> tuple[str, list[HubFile]]:
        hub = self._hub(repo, token, STEADY)
        if self._offline:
            raise _away(hub, "nimhost is set to work offline ([weights] offline)")
        return await in_thread(_tree, hub)

    def _hub(self, repo: Repo, token: str | None, limits: Limits) -> Hub:
        return open_registry(repo, self._endpoint, token, limits)


def _tree(hub: Hub) -> tuple[str, list[HubFile]]:
    commit = hub.commit(_silent)
    return commit, hub.tree(commit, _silent)


def _listed(files: list[HubFile], snapshot: Path) -> list[ListedFile]:
    listed = [ListedFile(f.path, f.size_bytes, (snapshot / f.path).is_file()) for f in files]
    return sorted(listed, key=lambda file: file.path)


def _confirm(hub: Hub) -> str:
    """The metadata of a gated repository can be read by everybody, its files cannot: one has to be tried."""
    commit, files = _tree(hub)
    if files:
        smallest = min(files, key=lambda file: file.size_bytes)
        try:
            hub.open(hub.file_url(commit, smallest.path), stop=1).close()
        except Interrupted as failure:
            raise _away(hub, str(failure)) from failure
    return commit


def _away(hub: Hub, why: str) -> HubUnavailable:
    return HubUnavailable(f"Storage backend unavailable: {hub.endpoint}: {why}")


def _silent(message: str) -> None:
    """Nobody shows the steps of a question that takes a second."""

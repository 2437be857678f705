"""The weights cache for those who look after it: what is there and who uses it, verified, pruned."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.pulls import Pulls, failed
from nimhost.deployments.repos import repo_in, repo_of
from nimhost.deployments.shelf import Shelved, Use, why_kept, with_users
from nimhost.deployments.storage import HubWeights
from nimhost.entities import Entity
from nimhost.errors import HostError, NimhostError
from nimhost.host.threads import in_thread
from nimhost.host.weights import Weights, WeightsProgress
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.inventory import Held, cache_of, look_at, scan
from nimhost.host.weights.prune import remove
from nimhost.host.weights.verify import Verdict, verify
from nimhost.host.weights.wire import Repo
from nimhost.kinds import KINDS
from nimhost.store import Store

log = logging.getLogger(__name__)
Json = dict[str, Any]
_STEP_BYTES = 64 << 20


class Pruned(Struct, frozen=True):
    """`freed_bytes` of each is what was, or would be, free afterwards; `why` of those that stay."""

    gone: list[tuple[Shelved, int]]
    kept: list[tuple[Shelved, str]]


class Stock:
    """Owned by the daemon. `read_desired`: every deployment as it should be. `on_room` hears of room that was made."""

    def __init__(
        self,
        weights: Weights,
        store: Store,
        pulls: Pulls,
        read_desired: Callable[[], Awaitable[Sequence[Desired]]],
        on_room: Callable[[], None],
    ) -> None:
        self._weights = weights
        self._store = store
        self.pulls = pulls
        self._read_desired = read_desired
        self._on_room = on_room
        self._pruning = asyncio.Lock()

    # --- what there is

    async def shelved(self) -> list[Shelved]:
        """Everything in the cache, with what is being fetched."""
        return [row for row, _ in await self._rows()]

    def progress(self) -> dict[str, WeightsProgress | None]:
        """Of what is being fetched, by folder."""
        return {_folder(self._weights, repo): progress for repo, progress in self._fetching().items()}

    def _fetching(self) -> dict[Repo, WeightsProgress | None]:
        """Also what a pull waits to fetch: nobody may take away what has come of it."""
        return {**self.pulls.in_flight, **self._weights.in_flight}

    async def _rows(self) -> list[tuple[Shelved, Held | None]]:
        desired = await self._read_desired()
        filesets = await self._store.all("filesets")
        held = await in_thread(scan, self._weights.cache_dir)
        uses = await in_thread(self._uses, desired, filesets)
        fetching = {_folder(self._weights, repo): repo for repo in self._fetching()}
        rows = [_row(self._weights, one, fetching) for one in held]
        absent = [_absent(repo, folder) for folder, repo in fetching.items() if not _is_shown(rows, folder)]
        return [
            (row, one)
            for row, one in zip(with_users([*rows, *absent], uses), [*held, *(None for _ in absent)], strict=True)
        ]

    def _uses(self, desired: Sequence[Desired], filesets: Sequence[Entity]) -> list[Use]:
        """Blocking: what a branch stands for lies on the disk."""
        named = [("deployments", str(d.ref), repo_of(d.weights)) for d in desired if isinstance(d.weights, HubWeights)]
        named += [("filesets", f.ref, repo) for f in filesets if (repo := repo_in(f.wish.storage))]
        found = [use for d in desired for use in _mounted(d)]
        for kind, ref, repo in named:
            with suppress(NimhostError):  # not the name of a repository: there is nothing of it here
                cache = RepoCache(self._weights.cache_dir, repo)
                found.append(Use(kind=kind, ref=ref, folder=cache.folder, commit=cache.commit()))  # type: ignore[arg-type]
        return found

    # --- verifying

    async def verify(self, repo: Repo) -> AsyncIterator[Json]:
        """Progress, and at last the verdict. Ends the reading when nobody listens any more."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Json]()
        told, stopped = 0, False

        def on_bytes(done: int, total: int) -> None:
            nonlocal told
            if stopped:
                raise HostError("nobody listens any more")
            if done - told >= _STEP_BYTES or done == total:
                told = done
                step = {"status": "verifying", "done_bytes": done, "total_bytes": total}
                loop.call_soon_threadsafe(news.put_nowait, step)

        task = asyncio.create_task(in_thread(verify, self._weights.cache_dir, repo, on_bytes))
        task.add_done_callback(lambda _: news.put_nowait({}))
        try:
            while step := await news.get():
                yield step
            yield _told(repo, await task)
        except NimhostError as error:
            yield failed(error)
        except OSError as error:
            yield failed(HostError(f"cannot read {repo}: {error.strerror}", "Is the disk all right? See dmesg."))
        finally:
            stopped = True
            task.cancel()

    # --- pruning

    async def prune(self, unused_for_s: float, dry_run: bool) -> Pruned:
        """Remove what nimhost fetched and nobody uses."""
        async with self._pruning:
            found, doubt = Pruned([], []), await self._doubt()
            for row, held in await self._rows():
                why = why_kept(row, time.time(), unused_for_s) or doubt
                if why is None and not dry_run:  # what goes takes time, and somebody may want this one by now
                    why = why_kept(with_users([row], await self._everybody())[0], time.time(), unused_for_s)
                if why is None and held is not None:
                    freed = held.own_bytes if dry_run else await in_thread(remove, self._weights.cache_dir, held)
                    if freed is not None:
                        found.gone.append((row, freed))
                        if not dry_run:
                            self._room_made()
                        continue
                found.kept.append((row, why or "it is being fetched, or another tool has just changed it"))
            return found

    async def discard(self, storages: Iterable[Any]) -> None:
        """What is left of broken-off downloads for filesets that are gone, where nobody else needs it."""
        repos = [repo for storage in storages if (repo := repo_in(storage))]
        async with self._pruning:
            for repo in repos if await self._doubt() is None else ():
                users = with_users([_absent(repo, _folder(self._weights, repo))], await self._everybody())[0]
                if not (users.deployments or users.filesets or users.folder in self.progress()):
                    await in_thread(self._discard, repo)
                    self._room_made()

    def _room_made(self) -> None:
        self.pulls.room_made()
        self._on_room()

    async def _doubt(self) -> str | None:
        """Why it is not known what everything needs."""
        for kind in ("deployments", "deployment-configs", "models", "filesets"):
            for row in await self._store.unreadable(kind):
                return f"{KINDS[kind].label.lower()} {row.ref} cannot be read, and may need it: update or delete that"
        return None

    async def _everybody(self) -> list[Use]:
        return await in_thread(self._uses, await self._read_desired(), await self._store.all("filesets"))

    def _discard(self, repo: Repo) -> None:
        anywhere = Repo(repo.repo_id, "", repo.repo_type, registry=repo.registry)
        try:
            for held in look_at(self._weights.cache_dir, anywhere):
                if not held.repo.revision:
                    remove(self._weights.cache_dir, held)
        except (HostError, OSError) as error:  # the fileset is gone all the same, and prune finds what stayed
            log.warning("what is left of %s stays: %s", repo, error)


def _mounted(d: Desired) -> list[Use]:
    """What its containers have, or had when they last started, whatever it is to have next. The version that served
    before this one is gone back to when this one fails."""
    found = []
    for run in filter(None, (d.status.run, d.status.run.previous)):
        sources = [str(mount.get("source", "")) for mount in (run.resolved or {}).get("mounts", ())]
        folders = [source.rpartition("/")[2] for source in sources if "s--" in source]
        found += [Use(kind="deployments", ref=str(d.ref), folder=folder, commit=run.commit) for folder in folders]
    return found


def _row(weights: Weights, held: Held, fetching: dict[str, Repo]) -> Shelved:
    folder = cache_of(weights.cache_dir, held.repo).folder
    being_fetched = folder in fetching and held.state != "complete"
    return Shelved(
        repo=_asked_for(held.repo),
        commit=held.repo.revision,
        names=held.names,
        repo_type=held.repo.repo_type,
        state="fetching" if being_fetched else held.state,
        size_bytes=held.size_bytes,
        own_bytes=held.own_bytes,
        fetched_by_nimhost=held.ours,
        used_at=held.used_at,
        folder=folder,
    )


def _absent(repo: Repo, folder: str) -> Shelved:
    """A download of which nothing has arrived."""
    return Shelved(
        repo=_asked_for(repo), commit="", repo_type=repo.repo_type, state="fetching", size_bytes=0, own_bytes=0,
        fetched_by_nimhost=True, used_at=time.time(), folder=folder,
    )  # fmt: skip


def _is_shown(rows: Iterable[Shelved], folder: str) -> bool:
    return any(row.folder == folder and row.state == "fetching" for row in rows)


def _asked_for(repo: Repo) -> str:
    return f"ngc://{repo.repo_id}" if repo.registry == "ngc" else repo.repo_id


def _folder(weights: Weights, repo: Repo) -> str:
    return RepoCache(weights.cache_dir, repo).folder


def _told(repo: Repo, verdict: Verdict) -> Json:
    damaged = verdict.damaged
    heal = f"nimhost weights pull {replace(repo, revision=verdict.commit)!s}" if damaged else None
    return {"status": "done", "repo": str(repo), **msgspec.to_builtins(verdict), "damaged": damaged, "heal": heal}

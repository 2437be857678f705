"""Weights that somebody asked for ahead. What is asked for is stored before it is promised and until it is here, so
that a daemon which was killed goes on with it by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from nimhost.errors import DiskFull, HostError, NimhostError, NotFound, WeightsCorrupt
from nimhost.host.weights import Snapshot, Weights, WeightsProgress
from nimhost.host.weights.wire import ALL, Choice, Repo
from nimhost.refs import NGC_KEY, Ref
from nimhost.store import Store

log = logging.getLogger(__name__)
Json = dict[str, Any]

KEY = "pulls"
"""In `meta`: a handful of records that are read whole."""
PAUSE_S = 0.2
"""Followers hear of progress at most this often."""
RETRY_S = (5.0, 300.0)
"""First and longest pause before a pull that nobody follows is tried again."""
GIVE_UP_S = 86_400.0
"""So long it is tried without a byte that comes."""


class Asked(Struct, frozen=True):
    """One wish. `secret`: of the token that opens it; without one, NGC's key for what is of NGC."""

    repo: Repo
    choice: Choice = ALL
    secret: Ref | None = None

    @property
    def what(self) -> tuple[Repo, Choice]:
        return self.repo, self.choice


class Pull:
    """A download that somebody asked for by itself. It goes on without those who follow it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.latest: WeightsProgress | None = None
        self.task: asyncio.Task[Json]
        self.followers = 0
        self.hurry = asyncio.Event()
        """Somebody asked again: no pause goes on."""
        self.full = False
        """The disk was full when it last failed."""
        self._moved = asyncio.Event()

    def tell(self, progress: WeightsProgress | None) -> None:
        self.latest = progress or self.latest
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def wait_for(self, error: NimhostError, pause_s: float) -> None:
        """It is tried again after this time."""
        self.full = isinstance(error, DiskFull)
        done, total = (self.latest.done_bytes, self.latest.total_bytes) if self.latest else (0, 0)
        self.tell(WeightsProgress(done, total, 0.0, f"{error.message}; trying again in {pause_s:g} s"))

    async def follow(self) -> AsyncIterator[Json]:
        """Progress, and at last what became of it."""
        last: WeightsProgress | None = None
        self.followers += 1
        try:
            while not self.task.done():
                moved = self._moved
                if self.latest is not None and self.latest != last:
                    last = self.latest
                    yield {"status": "fetching", **msgspec.to_builtins(last)}
                    await asyncio.sleep(PAUSE_S)
                else:
                    await moved.wait()
            yield _stopped(self.asked.repo) if self.task.cancelled() else self.task.result()
        finally:
            self.followers -= 1


class Pulls:
    """`secret`: the value of a secret; raises NotFound."""

    def __init__(self, weights: Weights, store: Store, secret: Callable[[Ref], Awaitable[str]]) -> None:
        self._weights = weights
        self._store = store
        self._secret = secret
        self._pulls: dict[tuple[Repo, Choice], Pull] = {}
        self._changing = asyncio.Lock()
        """What is stored and what is under way change together."""

    @property
    def in_flight(self) -> Mapping[Repo, WeightsProgress]:
        """What is being fetched, or waited for, and how far that is; not what nothing is known of yet."""
        return {repo: pull.latest for (repo, _), pull in self._pulls.items() if pull.latest is not None}

    async def resume(self) -> None:
        """Go on with what was not done when the last daemon ended. One that works offline leaves it for the next."""
        if self._weights.offline:
            return
        async with self._changing:
            for asked in await self._rewrite(lambda stored: stored):
                if asked.what not in self._pulls:
                    log.info("going on with the pull of %s", asked.repo)
                    self._begin(asked)

    async def ask(self, asked: Asked) -> Pull:
        """Fetch it, or join who does so already. From here on it is not forgotten."""
        async with self._changing:
            found = self._pulls.get(asked.what)
            if found is None:
                await self._rewrite(lambda stored: [*(a for a in stored if a.what != asked.what), asked])
                found = self._begin(asked)
        found.hurry.set()
        return found

    def room_made(self) -> None:
        """Who waits for room on disk need not wait any longer."""
        for pull in self._pulls.values():
            if pull.full:
                pull.hurry.set()

    async def stop(self, repo: Repo) -> bool:
        """Give up the pulls of a repository; whether there were any. What has arrived stays.

        They end also when that cannot be stored, as on the disk that they fill.
        """
        async with self._changing:
            found = [pull for pull in self._pulls.values() if pull.asked.repo == repo]
            try:
                stored = await self._rewrite(lambda stored: stored)
                left = await self._rewrite(lambda stored: [a for a in stored if a.repo != repo])
            finally:
                await self._end(found)
        return bool(found) or left != stored

    async def close(self) -> None:
        """They go on when nimhost starts again."""
        await self._end(list(self._pulls.values()))

    async def _end(self, pulls: list[Pull]) -> None:
        for pull in pulls:
            pull.task.cancel()
        await asyncio.gather(*(pull.task for pull in pulls), return_exceptions=True)

    def _begin(self, asked: Asked) -> Pull:
        pull = self._pulls[asked.what] = Pull(asked)
        pull.task = asyncio.create_task(self._carry_out(pull), name=f"pull {asked.repo}")
        pull.task.add_done_callback(lambda _: self._ended(pull))
        return pull

    def _ended(self, pull: Pull) -> None:
        del self._pulls[pull.asked.what]
        pull.tell(None)

    async def _carry_out(self, pull: Pull) -> Json:
        """What became of it, for those who follow it."""
        repo = pull.asked.repo
        try:
            snapshot = await self._bring(pull)
            outcome = {"status": "done", "repo": str(repo), **msgspec.to_builtins(snapshot)}
            await self._forget(pull)
            return outcome
        except NimhostError as error:
            await self._forget(pull)
            return failed(error)
        except Exception as error:
            # Those who follow it are to hear of whatever it was, and nobody may follow it at all.
            log.exception("pull of %s", repo)
            await self._forget(pull)
            return failed(HostError(f"The download failed: {error!r}"[:500], "More is in the log of nimhost serve."))

    async def _bring(self, pull: Pull) -> Snapshot:
        """What may pass is waited for while nobody follows: who does hears of it and decides. A disk that fills up in
        the middle is waited for in any case, and bytes that arrive as others are never: all of them would be fetched
        again and again. Raises NimhostErrors."""
        until, pause_s, done_bytes = time.monotonic() + GIVE_UP_S, RETRY_S[0], 0
        while True:
            pull.hurry.clear()
            try:
                return await self._weights.fetch(
                    pull.asked.repo, await self._token(pull.asked), pull.tell, pull.asked.choice
                )
            except NimhostError as error:
                log.warning("pull of %s: %s", pull.asked.repo, error.message)
                if pull.latest is not None and pull.latest.done_bytes > done_bytes:
                    until, pause_s = time.monotonic() + GIVE_UP_S, RETRY_S[0]
                    done_bytes = pull.latest.done_bytes
                patient = not pull.followers or (isinstance(error, DiskFull) and done_bytes > 0)
                final = error.final or isinstance(error, WeightsCorrupt)
                if final or not patient or time.monotonic() > until:
                    raise
                wait_s = max(pause_s, getattr(error, "retry_after_s", None) or 0.0)
                pull.wait_for(error, wait_s)
            await _pause(pull.hurry, wait_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def _token(self, asked: Asked) -> str | None:
        if asked.secret is not None:
            return await self._secret(asked.secret)
        if asked.repo.registry != "ngc":
            return None
        try:
            return await self._secret(NGC_KEY)
        except NotFound:
            return None

    # --- what is stored

    async def _forget(self, pull: Pull) -> None:
        async with self._changing:
            try:
                await self._rewrite(lambda stored: [a for a in stored if a.what != pull.asked.what])
            except NimhostError as error:  # the next start finds that it is here, or meets the same again
                log.warning("the pull of %s stays noted: %s", pull.asked.repo, error.message)

    async def _rewrite(self, change: Callable[[list[Asked]], list[Asked]]) -> list[Asked]:
        """What is stored then, the oldest first."""
        async with self._store.transaction() as tx:
            before = _decoded(await tx.meta(KEY))
            after = change(before)
            if after != before:
                await tx.set_meta(KEY, msgspec.json.encode(after).decode())
        return after


def failed(error: NimhostError) -> Json:
    return {"status": "failed", "error": type(error).__name__, "message": error.message, "hint": error.hint}


def _stopped(repo: Repo) -> Json:
    return {"status": "failed", "error": "Stopped", "message": f"The download of {repo} was stopped.",
            "hint": f"It continues where it stopped with: nimhost weights pull {repo}"}  # fmt: skip


def _decoded(text: str | None) -> list[Asked]:
    try:
        return msgspec.json.decode(text, type=list[Asked]) if text else []
    except msgspec.MsgspecError as error:  # whoever asked can ask again
        log.error("the stored pulls cannot be read: %s", error)
        return []


async def _pause(hurry: asyncio.Event, pause_s: float) -> None:
    try:
        async with asyncio.timeout(pause_s):
            await hurry.wait()
    except TimeoutError:
        return

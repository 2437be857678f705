"""Model weights on this machine: what is there, and fetching what is not, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nimhost.errors import HostError, HubUnavailable, NimhostError, WeightsCorrupt, WeightsMissing, all_errors
from nimhost.host.threads import in_thread
from nimhost.host.weights import wire
from nimhost.host.weights.cache import RepoCache, Snapshot, cache_dir_from
from nimhost.host.weights.choice import pick_some
from nimhost.host.weights.wire import Limits, Repo, WeightsProgress

__all__ = ["Limits", "OnProgress", "Repo", "Snapshot", "Weights", "WeightsProgress", "cache_dir_from"]

OnProgress = Callable[[WeightsProgress], None]
_Order = tuple[Repo, wire.Choice, str | None]
"""What is fetched, and the token that opens it: who has a good one must not share the refusal of who has none."""

_CHILD = ("-P", "-m", "nimhost.host.weights.child")
_STDERR_KEPT = 4000


class _Download:
    """A download in flight and everybody who waits for it."""

    def __init__(self, task: asyncio.Task[Snapshot]) -> None:
        self.task = task
        self.waiting: list[OnProgress] = []
        self.latest: WeightsProgress | None = None


class Weights:
    """The weights cache of this machine.

    `endpoint`: the hub, where a repository does not name another. `offline`: never ask it.
    """

    def __init__(self, cache_dir: Path, endpoint: str, offline: bool, limits: Limits | None = None) -> None:
        self.cache_dir = cache_dir
        self.endpoint = endpoint
        self.offline = offline
        self._limits = limits or Limits()
        self._downloads: dict[_Order, _Download] = {}

    def present(self, repo: Repo) -> Snapshot | None:
        """The snapshot if all of it is on disk. Quick, without network, from any thread.

        Raises WeightsMissing for what cannot name a repository, HostError where the cache cannot be read.
        """
        cache = RepoCache(self.cache_dir, repo)
        try:
            found = cache.find(trust_others=self.offline)
        except OSError as error:
            raise HostError(f"cannot read the weights cache: {error}", "Check [weights] cache_dir.") from error
        if found is not None:
            cache.mark_used(found.commit)
        return found

    @property
    def in_flight(self) -> dict[Repo, WeightsProgress | None]:
        """What is being fetched, and how far that is once it is known."""
        return {repo: download.latest for (repo, _, _), download in self._downloads.items()}

    async def fetch(
        self, repo: Repo, token: str | None, on_progress: OnProgress, choice: wire.Choice = wire.ALL
    ) -> Snapshot:
        """The snapshot, downloaded if need be; several callers with the same token share one download.

        With a `choice` it is not complete, and not `present`, until the rest has been fetched too. When the last
        caller is cancelled the download stops at once; the next one continues where it stopped.
        Raises WeightsGated, WeightsMissing, WeightsCorrupt, HubUnavailable, DiskFull or another HostError.
        """
        found = await in_thread(self.present, repo)
        if found is not None:
            if choice != wire.ALL:
                pick_some(repo, await in_thread(RepoCache(self.cache_dir, repo).files_there, found.commit), choice)
            return found
        if self.offline:
            raise WeightsMissing(
                f"{repo} is not in {self.cache_dir}, and nimhost is set to work offline",
                "Set [weights] offline = false, or fetch it elsewhere: "
                f"hf download {repo.repo_id} --revision {repo.revision} --cache-dir {self.cache_dir}",
            )
        order = (repo, choice, token)
        download = self._downloads.get(order) or self._begin(order)
        download.waiting.append(on_progress)
        if download.latest is not None:
            on_progress(download.latest)
        try:
            return await asyncio.shield(download.task)
        finally:
            download.waiting.remove(on_progress)
            if not download.waiting:
                await self._end(order, download)

    async def close(self) -> None:
        """Stop every download; what has arrived stays."""
        for order, download in list(self._downloads.items()):
            await self._end(order, download)

    def _begin(self, order: _Order) -> _Download:
        download = _Download(asyncio.create_task(self._run(order), name=f"weights {order[0]}"))
        self._downloads[order] = download
        return download

    async def _end(self, order: _Order, download: _Download) -> None:
        if self._downloads.get(order) is download:
            del self._downloads[order]
        download.task.cancel()
        with suppress(asyncio.CancelledError, NimhostError):
            await asyncio.shield(download.task)

    async def _run(self, order: _Order) -> Snapshot:
        repo, choice, token = order
        job = wire.Job(repo, self.endpoint, str(self.cache_dir), token, self._limits, choice)
        child = await _start_child()
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        complaint = asyncio.create_task(_tail(child.stderr))
        try:
            child.stdin.write(wire.encode(job) + b"\n")
            verdict = await self._listen(order, child.stdout)
        except BaseException:
            # Only here: after its verdict it ends by itself, and asyncio's kill() would take its exit code away.
            with suppress(ProcessLookupError):
                child.kill()
            raise
        finally:
            child.stdin.close()
            await child.stdout.read()
            exit_code = await child.wait()
            said = await complaint
        if verdict is None:
            raise _died(repo, exit_code, said.replace(token, "***") if token else said)
        if isinstance(verdict, wire.Failed):
            raise _error(verdict)
        return await in_thread(self._settled, repo, choice, verdict)

    async def _listen(self, order: _Order, stdout: asyncio.StreamReader) -> wire.Done | wire.Failed | None:
        """Pass progress on until the child's verdict; None when it ends without one."""
        while line := await stdout.readline():
            news: wire.Line = wire.line_decoder.decode(line)
            if not isinstance(news, WeightsProgress):
                return news
            download = self._downloads.get(order)
            if download is not None:
                download.latest = news
                for tell in list(download.waiting):
                    tell(news)
        return None

    def _settled(self, repo: Repo, choice: wire.Choice, done: wire.Done) -> Snapshot:
        cache = RepoCache(self.cache_dir, repo)
        found = cache.find() if choice == wire.ALL else cache.some(done.commit)
        if found is None or found.commit != done.commit:
            raise WeightsCorrupt(
                f"{repo} was changed in {self.cache_dir} by somebody else while it was fetched",
                "Deploy it again: only what is missing is fetched.",
            )
        return found


async def _start_child() -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, *_CHILD, env=_environment(), start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        raise HostError(
            f"cannot start a process for the download: {error.strerror}", "Is there memory left? free -h, ulimit -u"
        ) from error


def _environment() -> dict[str, str]:
    """The child decides itself whether it is online, and brings its own token."""
    ambient = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")
    inherited = {name: value for name, value in os.environ.items() if name not in ambient}
    return inherited | {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


async def _tail(stderr: asyncio.StreamReader) -> str:
    kept = b""
    while chunk := await stderr.read(4096):
        kept = (kept + chunk)[-_STDERR_KEPT:]
    return kept.decode(errors="replace").strip()


def _error(failed: wire.Failed) -> NimhostError:
    if failed.error == "HubUnavailable":
        return HubUnavailable(failed.message, failed.hint, failed.retry_after_s)
    return all_errors().get(failed.error, HostError)(failed.message, failed.hint)


def _died(repo: Repo, exit_code: int, said: str) -> NimhostError:
    if exit_code < 0:
        return HubUnavailable(
            f"the download of {repo} was killed by signal {-exit_code}",
            "It continues where it stopped. Signal 9 without anybody's doing: out of memory, see dmesg.",
        )
    return HostError(f"the download of {repo} broke off: {said.splitlines()[-1] if said else f'exit code {exit_code}'}")

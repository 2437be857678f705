"""What the tests of the weights cache share."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nimhost.host.weights import Repo, Weights, WeightsProgress
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.inventory import Held, scan
from tests.fakes.hub import FakeHub
from tests.support import eventually, wait_until

MIB = 1 << 20
TINY = Repo("org/tiny")
BIG = Repo("org/big")


def nobody(_: WeightsProgress) -> None:
    """Hears of progress, and does nothing."""


class News:
    """Collects progress."""

    def __init__(self) -> None:
        self.all: list[WeightsProgress] = []

    def __call__(self, progress: WeightsProgress) -> None:
        self.all.append(progress)

    @property
    def messages(self) -> str:
        return "\n".join(dict.fromkeys(p.message for p in self.all if p.message))


def content(root: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def only(cache: Path) -> Held:
    """The one thing that is in the cache."""
    (held,) = scan(cache)
    return held


def children() -> list[int]:
    """The download processes of this one."""
    return [pid for pid in _children_of(os.getpid()) if b"weights.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _has_ended(pid: int) -> bool:
    """Also where nobody has taken note of it yet: an orphan is at the mercy of process 1."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def interrupt_at(weights: Weights, arrived_bytes: int, repo: Repo = BIG) -> None:
    """Whoever fetches it leaves when so much is there."""
    news = News()
    fetch = asyncio.create_task(weights.fetch(repo, None, news))
    await eventually(lambda: bool(news.all) and news.all[-1].done_bytes > arrived_bytes)
    fetch.cancel()
    await asyncio.wait([fetch])


DAEMON = """
import asyncio, sys
from pathlib import Path
from nimhost.host.weights import Limits, Repo, Weights
weights = Weights(Path(sys.argv[1]), sys.argv[2], False, Limits(stall_s=5, part_bytes=int(sys.argv[3])))
print(asyncio.run(weights.fetch(Repo("org/big"), None, lambda p: None)).path, flush=True)
"""


def killed_at(sent_bytes: Sequence[float], cache: Path, hub: FakeHub, part_bytes: int) -> Iterator[None]:
    """A daemon that fetches BIG is killed (-9) each time the hub has sent so much in all; yields after each."""
    for point in sent_bytes:
        with subprocess.Popen(_daemon(cache, hub, part_bytes), stdout=subprocess.DEVNULL) as daemon:
            wait_until(lambda point=point: hub.sent_bytes() >= point, timeout_s=30)
            (child,) = _children_of(daemon.pid)
            daemon.send_signal(signal.SIGKILL)
        wait_until(lambda child=child: _has_ended(child))
        assert RepoCache(cache, BIG).find() is None
        yield


def fetched_by_daemon(cache: Path, hub: FakeHub, part_bytes: int) -> dict[str, bytes]:
    """What is there when such a daemon has done its work."""
    done = subprocess.run(_daemon(cache, hub, part_bytes), capture_output=True, text=True, check=True)
    return content(done.stdout.strip())


def _daemon(cache: Path, hub: FakeHub, part_bytes: int) -> list[str]:
    return [sys.executable, "-c", DAEMON, str(cache), hub.url, str(part_bytes)]

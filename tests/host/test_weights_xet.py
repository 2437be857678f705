"""Files that the hub has in Xet storage only: by Hugging Face's own library, with our progress, patience and hash."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nimhost.errors import HubUnavailable, WeightsCorrupt
from nimhost.host.weights import Limits, Repo, Weights
from nimhost.host.weights import xet as weights_xet
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.disk import missing_bytes
from nimhost.host.weights.inventory import cache_of, scan
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.prune import remove
from nimhost.host.weights.wire import Job
from nimhost.host.weights.xet import Arrivals
from tests.fakes import xet as fake_xet
from tests.fakes.hub import FakeHub
from tests.host.weights_world import News, children, content
from tests.support import eventually

SHARD = "model.safetensors"
SIZE = 3_000_000
FILES = {"config.json": b"{}", SHARD: random.Random(5).randbytes(SIZE)}
TOTAL = sum(map(len, FILES.values()))
REPO = Repo("org/xet")
QUICK = Limits(stall_s=2, tries=4, backoff_s=0.05)
HASTY = Limits(stall_s=0.25, tries=4, backoff_s=0.05)


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library keeps what it keeps besides."""
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.add("org/xet", FILES, xet_only=(SHARD,))
        yield fake


def blobs(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models--org--xet" / "blobs").iterdir()}


async def test_a_file_that_only_xet_has_comes_with_its_progress_in_bytes(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e6
    news = News()
    weights = Weights(cache, hub.url, False, QUICK)
    assert content((await weights.fetch(REPO, None, news)).path) == FILES
    told = [p.done_bytes for p in news.all]
    assert len({done for done in told if 100_000 < done < SIZE}) >= 3, told
    assert told == sorted(told)
    assert (news.all[-1].done_bytes, news.all[-1].total_bytes) == (TOTAL, TOTAL)
    flowing = [p for p in news.all if 100_000 < p.done_bytes < SIZE]
    assert any(p.rate_bytes_s > 0 and p.eta_s is not None for p in flowing)
    assert {p.message for p in flowing} == {""}
    assert weights.present(REPO) is not None
    (held,) = scan(cache)
    assert (held.state, held.ours) == ("complete", True)
    assert blobs(cache) == {file.digest for file in hub.repos["org/xet"].files.values()}, "nothing else is left"


async def test_the_token_goes_to_the_hub_of_the_repository_and_no_further(hub: FakeHub, cache: Path) -> None:
    hub.add("org/gated", FILES, xet_only=(SHARD,), gated=True, readers=("hf_good",))
    repo = Repo("org/gated", endpoint=hub.url)
    with FakeHub() as other:
        assert content((await Weights(cache, other.url, False, QUICK).fetch(repo, "hf_good", News())).path) == FILES
        assert other.requests == []
    assert hub.leaked == []


@pytest.mark.fault(18)
@pytest.mark.fault(20)
async def test_what_a_kill_9_leaves_is_ours_to_continue_from_or_to_remove(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 3e6
    weights = Weights(cache, hub.url, False, QUICK)
    for _ in range(2):
        news = News()
        fetching = weights.fetch(REPO, None, lambda p, news=news: _kill_after(p.done_bytes, news))  # type: ignore[misc]
        with pytest.raises(HubUnavailable, match="killed by signal 9"):
            await fetching
    left = next(held for held in scan(cache) if not held.repo.revision)
    assert (left.state, left.ours) == ("partial", True)
    assert not [name for name in blobs(cache) if "incomplete" in name]
    assert remove(cache, left) is not None
    assert scan(cache) == []
    hub.faults.bytes_per_s = None
    assert content((await weights.fetch(REPO, None, News())).path) == FILES
    assert blobs(cache) == {file.digest for file in hub.repos["org/xet"].files.values()}


def _kill_after(done_bytes: int, news: News) -> None:
    if done_bytes > SIZE // 4 and not news.all:
        news.all.append(None)  # type: ignore[arg-type]
        for pid in children():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.fault(16)
async def test_what_the_library_brings_is_compared_with_the_hash_that_the_hub_promises(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not do so itself."""
    good, wrong = fake_xet.xorb_of, [True]

    def sometimes(content: bytes) -> bytes:
        packed = bytearray(good(content))
        packed[1000] ^= wrong[0]
        return bytes(packed)

    monkeypatch.setattr(fake_xet, "xorb_of", sometimes)
    with pytest.raises(WeightsCorrupt, match=r"model.safetensors of org/xet has not the hash .* twice"):
        await Weights(cache, hub.url, False, QUICK).fetch(REPO, None, News())
    assert hub.sent_bytes(SHARD) > 2 * SIZE
    wrong[0] = False
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(REPO, None, News())).path) == FILES


@pytest.mark.fault(14)
async def test_a_storage_that_falls_silent_is_given_up(hub: FakeHub, cache: Path) -> None:
    """The library itself would wait for minutes."""
    hub.faults.stalls, hub.faults.stall_after_bytes = 100, 500_000
    with pytest.raises(HubUnavailable, match=r"no data of model.safetensors from Xet storage for 1 s") as silent:
        await Weights(cache, hub.url, False, HASTY).fetch(REPO, None, News())
    assert silent.value.final is False
    await eventually(lambda: children() == [])
    hub.faults.stalls = 0
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(REPO, None, News())).path) == FILES


@pytest.mark.fault(2)
async def test_what_the_library_fails_with_is_told_and_may_pass(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.busy_where, hub.faults.busy_status = 100, "/cas/", 401
    with pytest.raises(HubUnavailable, match=r"did not come out of Xet storage: .*401 Unauthorized"):
        await Weights(cache, hub.url, False, QUICK).fetch(REPO, None, News())
    hub.faults.busy = 0
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(REPO, None, News())).path) == FILES


JOB, FILE = Job(REPO, "http://hub", "/cache"), HubFile(SHARD, 1000, "a" * 64, xet=True)


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("error", "means"),
    [
        (RuntimeError("Task error: IO Error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (RuntimeError("503, domain: https://storage/x?X-Signature=s3cret&b=1 and so on"), HubUnavailable),
        (OSError("Client error '401 Unauthorized'"), HubUnavailable),
        (ValueError(), HubUnavailable),
    ],
)
def test_a_full_disk_is_told_from_trouble_on_the_way(error: Exception, means: object) -> None:
    found = weights_xet._meaning(error, JOB, FILE)
    assert (found.errno if isinstance(found, OSError) else type(found)) == means
    assert "s3cret" not in str(found)


@pytest.mark.parametrize(
    ("heard", "told"),
    [
        ([{"received": 300}, {"received": 300}, {"written": 1000}], [300, 600, 1000]),
        ([{"received": 600}, {"received": 600}, {"written": 1000}], [600, 1000, 1000]),  # more than the file
        ([{"received": 100}, {"written": 700}, {"received": 100}], [100, 700, 700]),  # packed
        ([{"written": 400}, {"written": 600}], [400, 1000]),  # it was in the library's cache
    ],
)
def test_how_far_a_file_is_never_goes_back_nor_beyond_its_end(heard: list[dict[str, int]], told: list[int]) -> None:
    meter = Meter(1000)
    arrivals, seen = Arrivals(FILE, meter), []
    for step in heard:
        arrivals.add(**step)
        seen.append(meter.done_bytes)
    assert seen == told
    arrivals.complete()
    assert meter.done_bytes == 1000
    arrivals.discard()
    assert meter.done_bytes == 0


def test_what_is_staged_needs_its_room_once(cache: Path) -> None:
    repo = cache_of(cache, REPO)
    stage = repo.stage(FILE)
    stage.mkdir(parents=True)
    big = HubFile(SHARD, 1 << 20, FILE.digest, xet=True)
    assert missing_bytes(repo, [big]) == 1 << 20
    (stage / "half").write_bytes(bytes(range(256)) * 2048)
    assert missing_bytes(repo, [big]) == 1 << 19

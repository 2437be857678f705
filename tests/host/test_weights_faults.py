"""What the network, the hub, the disk and kill -9 do to a download (rows 2, 14-18, 20 and 29 of the fault table)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nimhost.errors import DiskFull, HostError, HubUnavailable, WeightsCorrupt, WeightsGated
from nimhost.host.weights import Limits, Repo, Weights, WeightsProgress
from nimhost.host.weights import child as weights_child
from nimhost.host.weights import locks as weights_locks
from nimhost.host.weights.cache import PARTIAL, RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.disk import promised_bytes, reserved_space
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.wire import Job
from tests.fakes.hub import FakeHub
from tests.host.weights_world import BIG, MIB, TINY, News, children, content, fetched_by_daemon, interrupt_at, killed_at
from tests.support import eventually

FILES = {
    "config.json": b"{}",
    **{f"model-0000{n}-of-00003.safetensors": random.Random(n).randbytes(4 * MIB) for n in (1, 2, 3)},
}
SHARD = "model-00002-of-00003.safetensors"
SIZE = sum(map(len, FILES.values()))
QUICK = Limits(stall_s=0.4, tries=4, backoff_s=0.05)
PUBLISHED = {"org/big": FILES}


# --- the hub is busy, down, slow -----------------------------------------------------------------------------------


@pytest.mark.fault(2)
@pytest.mark.fault(14)
async def test_busy_hub_is_asked_again_when_it_said_so(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.retry_after_s, hub.faults.busy_where = 1, 0.4, "/cdn/"
    news, began = News(), time.monotonic()
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)
    assert content(got.path) == FILES
    assert time.monotonic() - began >= 0.4
    assert "localhost answers 429, retrying in 0.4 s" in news.messages


@pytest.mark.fault(14)
async def test_busy_metadata_is_asked_again_and_said(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.retry_after_s, hub.faults.busy_where = 2, 0.2, "/api/"
    news = News()
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)).path) == FILES
    assert "127.0.0.1 answers 429, retrying in 0.2 s (2/3)" in news.messages


@pytest.mark.fault(14)
async def test_hub_that_asks_for_more_patience_than_we_have_is_named(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.retry_after_s = 1, 3600
    with pytest.raises(HubUnavailable, match="answers 429") as busy:
        await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert busy.value.retry_after_s == 3600
    assert not busy.value.final


@pytest.mark.fault(14)
async def test_hub_with_errors_is_tried_a_few_times(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.busy_status, hub.faults.retry_after_s = 2, 500, None
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())).path) == FILES
    hub.faults.busy = 100
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1 answers 500, 4 times in a row"):
        await Weights(cache / "other", hub.url, False, QUICK).fetch(BIG, None, News())
    assert hub.faults.busy == 96


@pytest.mark.fault(14)
async def test_hub_that_is_down_is_unavailable_unless_all_is_there(hub: FakeHub, cache: Path) -> None:
    weights = Weights(cache, hub.url, False, QUICK)
    hub.faults.down = True
    with pytest.raises(HubUnavailable) as down:
        await weights.fetch(BIG, None, News())
    assert "[weights] endpoint" in str(down.value.hint)
    hub.faults.down = False
    got = await weights.fetch(BIG, None, News())
    hub.faults.down = True
    assert await weights.fetch(BIG, None, News()) == got


@pytest.mark.fault(14)
async def test_nothing_listens_at_the_endpoint(cache: Path) -> None:
    with pytest.raises(HubUnavailable, match="connection refused"):
        await Weights(cache, "http://127.0.0.1:9", False, QUICK).fetch(BIG, None, News())


@pytest.mark.fault(14)
async def test_page_that_is_not_a_hub(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(HubUnavailable, match="does not answer like a model hub"):
        await Weights(cache, hub.url, False, QUICK).fetch(Repo("org/big", endpoint=f"{hub.url}/__stats?"), None, News())


@pytest.mark.fault(14)
async def test_older_tools_snapshot_is_used_when_the_hub_is_down(hub: FakeHub, cache: Path) -> None:
    """A snapshot without a listing of its files, as versions of Hugging Face's library before 2 left it."""
    weights = Weights(cache, hub.url, False, QUICK)
    shard = safetensors(b"1234")
    hub.add("org/old", {"config.json": b"{}", "model.safetensors": shard})
    got = await weights.fetch(Repo("org/old"), None, News())
    next((cache / ".nimhost").rglob(f"{got.commit}.json")).unlink()
    assert weights.present(Repo("org/old")) is None
    hub.faults.down = True
    assert (await weights.fetch(Repo("org/old"), None, News())).path == got.path
    assert weights.present(Repo("org/old")) is not None


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.fault(18)
async def test_download_that_stalls_says_so_and_goes_on(hub: FakeHub, cache: Path) -> None:
    hub.faults.stalls, hub.faults.stall_after_bytes = 1, MIB
    news = News()
    got = await Weights(cache, hub.url, False, Limits(stall_s=0.4, tries=4, backoff_s=0.5)).fetch(BIG, None, news)
    assert content(got.path) == FILES
    assert "no data for 0.4 s, retrying in 0.5 s (1/3)" in news.messages
    assert hub.sent_bytes() - SIZE < MIB


@pytest.mark.fault(14)
async def test_download_that_stalls_for_good_gives_up(hub: FakeHub, cache: Path) -> None:
    hub.faults.stalls, hub.faults.stall_after_bytes = 100, 0
    with pytest.raises(HubUnavailable, match=r"no data for 0.1 s, 4 times in a row"):
        await Weights(cache, hub.url, False, Limits(stall_s=0.1, tries=4, backoff_s=0.05)).fetch(BIG, None, News())


def test_silence_is_reported_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(1000)
    meter.receive(500)
    assert meter.read().message == ""
    now[0] += 7
    assert meter.read().message == "no data from the hub for 7 s"
    meter.receive(500)
    assert meter.read() == WeightsProgress(1000, 1000, 0.0, "")


def test_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(10_000)
    meter.have(4000)
    for _ in range(20):
        meter.read()
        now[0] += 1
        meter.receive(100)
    assert meter.read().rate_bytes_s == pytest.approx(100)


@pytest.mark.fault(18)
async def test_dropped_connections_continue_where_they_broke(hub: FakeHub, cache: Path) -> None:
    hub.faults.drops, hub.faults.drop_after_bytes = 30, MIB // 4
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES
    assert hub.sent_bytes() == SIZE
    assert len(hub.served) > 30


@pytest.mark.fault(18)
async def test_hub_without_ranges_is_read_from_the_start(hub: FakeHub, cache: Path) -> None:
    hub.faults.drops, hub.faults.drop_after_bytes, hub.faults.ignore_range = 1, 2 * MIB, True
    news = News()
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)).path) == FILES
    assert news.all[-1].done_bytes == SIZE


@pytest.mark.fault(18)
async def test_a_page_in_the_place_of_the_rest_costs_nothing_that_came(hub: FakeHub, cache: Path) -> None:
    hub.faults.drops, hub.faults.drop_after_bytes, hub.faults.pages = 3, 2 * MIB, 2
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes() == SIZE
    assert hub.faults.pages == 0


# --- what came is wrong --------------------------------------------------------------------------------------------


@pytest.mark.fault(16)
async def test_damaged_file_is_fetched_again(hub: FakeHub, cache: Path) -> None:
    hub.faults.corrupt = 1
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES
    assert hub.sent_bytes() == SIZE + 4 * MIB


@pytest.mark.fault(16)
async def test_file_that_is_damaged_twice_is_refused(hub: FakeHub, cache: Path) -> None:
    hub.faults.corrupt = 100
    weights = Weights(cache, hub.url, False, QUICK)
    with pytest.raises(WeightsCorrupt, match="has not the hash that the hub promises"):
        await weights.fetch(BIG, None, News())
    assert weights.present(BIG) is None
    assert not list(cache.glob("models--*/snapshots/*"))


@pytest.mark.fault(16)
async def test_damaged_beginning_of_an_interrupted_download_is_found(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 4e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), 6 * MIB)
    for partial in cache.rglob(f"*{PARTIAL}"):
        with partial.open("r+b") as file:
            file.write(b"damaged")
    hub.faults.bytes_per_s = None
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES


@pytest.mark.fault(16)
async def test_partial_snapshot_is_not_taken_for_a_complete_one(hub: FakeHub, cache: Path) -> None:
    weights = Weights(cache, hub.url, False, QUICK)
    hub.faults.bytes_per_s = 4e6
    await interrupt_at(weights, 6 * MIB)
    assert weights.present(BIG) is None
    hub.faults.bytes_per_s = None
    got = await weights.fetch(BIG, None, News())
    (Path(got.path) / SHARD).unlink()
    assert weights.present(BIG) is None
    assert weights.present(Repo("org/big", got.commit)) is None
    hub.forget()
    assert await weights.fetch(BIG, None, News()) == got
    assert hub.sent_bytes() == 0


@pytest.mark.fault(16)
async def test_truncated_blob_is_not_taken_for_a_whole_one(hub: FakeHub, cache: Path) -> None:
    weights = Weights(cache, hub.url, False, QUICK)
    got = await weights.fetch(BIG, None, News())
    os.truncate((Path(got.path) / SHARD).resolve(), MIB)
    assert weights.present(BIG) is None
    hub.forget()
    assert content((await weights.fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes() == 4 * MIB


@pytest.mark.fault(16)
async def test_what_another_tool_damaged_is_found_and_replaced(hub: FakeHub, cache: Path) -> None:
    """Same size, other bytes: only the hash tells."""
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    next((cache / ".nimhost").rglob(f"{got.commit}.json")).unlink()
    blob = (Path(got.path) / SHARD).resolve()
    blob.write_bytes(b"x" * blob.stat().st_size)
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())).path) == FILES


# --- locks ---------------------------------------------------------------------------------------------------------


def hold_lock(cache: Path, digest: str) -> subprocess.Popen[bytes]:
    """Another program that holds the lock of Hugging Face's tools for a file."""
    path = cache / ".locks" / "models--org--big" / f"{digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    program = "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


@pytest.mark.fault(15)
async def test_lock_of_another_tool_is_waited_for_and_falls_with_its_holder(hub: FakeHub, cache: Path) -> None:
    digest = hub.repos["org/big"].files[SHARD].sha256
    news = News()
    with hold_lock(cache, digest) as holder:
        fetch = asyncio.create_task(Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news))
        await eventually(lambda: f"{SHARD} is being fetched by another process" in news.messages)
        assert hub.sent_bytes(SHARD) == 0
        holder.kill()
        assert content((await fetch).path) == FILES


@pytest.mark.fault(15)
def test_lock_whose_holder_does_nothing_is_overruled(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_locks, "STALE_S", 0.5)
    digest = hub.repos["org/big"].files[SHARD].sha256
    with hold_lock(cache, digest) as holder:
        weights_child.download(Job(BIG, hub.url, str(cache), None, QUICK))
        holder.kill()
    assert RepoCache(cache, BIG).find() is not None


@pytest.mark.fault(15)
async def test_partial_file_of_another_nimhost_is_never_written_to(hub: FakeHub, cache: Path) -> None:
    """Even where the other tools' lock was overruled: two writers would make one damaged file."""
    file = hub.repos["org/big"].files[SHARD]
    repo = RepoCache(cache, BIG)
    repo.make_dirs()
    news = News()
    with repo.partial(HubFile(SHARD, 4 * MIB, file.sha256)).open("wb") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)
        fetch = asyncio.create_task(Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news))
        await eventually(lambda: f"{SHARD} is being fetched by another nimhost" in news.messages)
        assert hub.sent_bytes(SHARD) == 0
        partial.write(file.content[:MIB])
    assert content((await fetch).path) == FILES
    assert hub.starts(SHARD) == [MIB]


@pytest.mark.fault(15)
async def test_left_over_lock_files_hold_nothing_up(hub: FakeHub, cache: Path) -> None:
    for file in hub.repos["org/big"].files.values():
        lock = cache / ".locks" / "models--org--big" / f"{file.digest}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        blobs = cache / "models--org--big" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / f"{file.digest}.incomplete").write_bytes(b"old")
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES


# --- the disk ------------------------------------------------------------------------------------------------------


def with_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    usage = shutil._ntuple_diskusage(free_bytes, 0, free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def files_of(size_bytes: int) -> list[HubFile]:
    return [HubFile("model.safetensors", size_bytes, "0" * 64)]


@pytest.mark.fault(17)
def test_too_little_space_is_refused_before_a_byte_is_pulled(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, SIZE - 1)
    with pytest.raises(DiskFull, match=r"org/big needs 0\.01 GiB in .*/hub, 0\.01 GiB are free"):
        weights_child.download(Job(BIG, hub.url, str(cache), None, QUICK))
    assert hub.sent_bytes() == 0
    with_free(monkeypatch, SIZE)
    weights_child.download(Job(BIG, hub.url, str(cache), None, QUICK))


@pytest.mark.fault(17)
async def test_space_promised_to_another_download_is_not_free(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.bytes_per_s = 1e5
    weights = Weights(cache, hub.url, False, QUICK)
    other = asyncio.create_task(weights.fetch(BIG, None, News()))
    await eventually(lambda: hub.sent_bytes() > 0)
    small = RepoCache(cache, Repo("org/small"))
    small.make_dirs()
    with_free(monkeypatch, SIZE + MIB)
    with pytest.raises(DiskFull, match="are promised to other downloads"), reserved_space(small, files_of(4 * MIB)):
        pass
    other.cancel()
    await asyncio.wait([other])
    with reserved_space(small, files_of(4 * MIB)):  # the promise fell with its process
        pass


@pytest.mark.fault(17)
def test_what_two_downloads_of_one_repository_lack_is_promised_once(cache: Path) -> None:
    """They wait for each other's files. Their processes may have the same number, each in a container of its own."""
    big, small = RepoCache(cache, BIG), RepoCache(cache, TINY)
    big.make_dirs()
    small.make_dirs()
    with reserved_space(big, files_of(4 * MIB)), reserved_space(big, files_of(MIB)), reserved_space(small, files_of(1)):
        assert promised_bytes(cache) == {big.folder: 4 * MIB, small.folder: 1}
    assert promised_bytes(cache) == {}


@pytest.mark.fault(17)
def test_only_what_is_still_to_come_needs_space(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RepoCache(cache, BIG)
    here.make_dirs()
    here.partial(files_of(1)[0]).write_bytes(b"x" * 3 * MIB)
    with_free(monkeypatch, MIB)
    with reserved_space(here, files_of(4 * MIB)):
        pass


@pytest.mark.fault(17)
def test_disk_that_fills_up_is_named_and_what_came_is_kept(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [0], os.pwrite

    def until_full(fd: int, data: bytes, offset: int) -> int:
        if written[0] > 3 * MIB and len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += len(data)
        return write(fd, data, offset)

    job = Job(BIG, hub.url, str(cache), None, QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", until_full)
        with pytest.raises(OSError, match="No space left") as full:
            weights_child.download(job)
    error = weights_child._of_the_disk(full.value, cache)
    assert isinstance(error, DiskFull)
    assert str(cache) in error.message
    assert not error.final
    hub.forget()
    weights_child.download(job)
    assert hub.sent_bytes() <= SIZE - 3 * MIB + MIB


@pytest.mark.fault(17)
async def test_real_disk_that_fills_up_pauses_and_goes_on(hub: FakeHub, small_disk: Path) -> None:
    hub.faults.bytes_per_s = 4e6
    weights = Weights(small_disk / "hub", hub.url, False, QUICK)
    fetch = asyncio.create_task(weights.fetch(BIG, None, News()))
    await eventually(lambda: hub.sent_bytes() > 3 * MIB)
    (small_disk / "somebody-elses").write_bytes(b"x" * 8 * MIB)
    with pytest.raises(DiskFull, match="no space left on the filesystem of"):
        await fetch
    os.truncate(small_disk / "somebody-elses", 7 * MIB)  # on a disk without any room not even the sum is made
    with pytest.raises(DiskFull, match="are free"):
        await weights.fetch(BIG, None, News())
    (small_disk / "somebody-elses").unlink()
    assert content((await weights.fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes() - SIZE < 2 * MIB


@pytest.mark.fault(17)
async def test_cache_that_cannot_be_written_says_whose_fault_it_is(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="the weights cache"):
        await Weights(tmp_path / "file" / "hub", hub.url, False, QUICK).fetch(BIG, None, News())


# --- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(18)
@pytest.mark.fault(20)
def test_daemon_killed_at_any_point_fetches_next_to_nothing_twice(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 4e6
    points = [part * SIZE for part in (0.02, 0.3, 0.6, 0.9, 0.99)]
    for _ in killed_at(points, cache, hub, part_bytes=16 * MIB):
        pass
    assert fetched_by_daemon(cache, hub, part_bytes=16 * MIB) == FILES
    twice = hub.sent_bytes() - SIZE
    assert twice < len(points) * 3 * 256 * 1024, "three connections, five kills: at most what was in the sockets"
    assert sorted(hub.starts(SHARD))[-1] > 3 * MIB


@pytest.mark.fault(18)
async def test_killed_download_process_is_not_the_end(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    weights = Weights(cache, hub.url, False, QUICK)
    fetch = asyncio.create_task(weights.fetch(BIG, None, News()))
    await eventually(lambda: hub.sent_bytes() > MIB)
    (child,) = children()
    os.kill(int(child), signal.SIGKILL)
    with pytest.raises(HubUnavailable, match="killed by signal 9") as killed:
        await fetch
    assert not killed.value.final
    hub.faults.bytes_per_s = None
    assert content((await weights.fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes() - SIZE < MIB


@pytest.mark.fault(20)
async def test_killed_between_the_last_byte_and_the_manifest(hub: FakeHub, cache: Path) -> None:
    """Every blob is there, nothing says so yet: the next start finds out without fetching."""
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    next((cache / ".nimhost").rglob(f"{got.commit}.json")).unlink()
    hub.forget()
    assert await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News()) == got
    assert hub.sent_bytes() == 0


@pytest.mark.fault(29)
async def test_token_is_nowhere_but_in_the_request(hub: FakeHub, cache: Path) -> None:
    canary = "hf_canary_9f2b"
    hub.add("org/big", FILES, gated=True, readers=(canary,))
    hub.faults.bytes_per_s = 2e6
    news = News()
    fetch = asyncio.create_task(Weights(cache, hub.url, False, QUICK).fetch(BIG, canary, news))
    await eventually(lambda: hub.sent_bytes() > MIB)
    (child,) = children()
    for name in ("cmdline", "environ"):
        assert canary.encode() not in Path(f"/proc/{child}/{name}").read_bytes()
    hub.faults.bytes_per_s = None
    await fetch
    assert canary not in repr(news.all)
    assert not [p for p in cache.rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]
    assert hub.leaked == []
    hub.tokens.clear()
    with pytest.raises(WeightsGated) as refused:
        await Weights(cache / "new", hub.url, False, QUICK).fetch(BIG, canary, News())
    assert canary not in f"{refused.value}{refused.value.hint}"


@pytest.mark.fault(29)
async def test_tokens_of_the_users_own_are_not_used_unasked(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/big", FILES, gated=True, readers=("hf_of_the_user",))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    with pytest.raises(WeightsGated):
        await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())

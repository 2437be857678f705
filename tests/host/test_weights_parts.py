"""One big file over several connections: in parts, each resumed by itself."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from nimhost.errors import DiskFull, HubUnavailable, WeightsGated
from nimhost.host.weights import Limits, Weights, WeightsProgress
from nimhost.host.weights.cache import PARTIAL, RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.disk import missing_bytes
from nimhost.host.weights.parts import MOST_PARTS, Parts, arrived_bytes
from tests.fakes.hub import FakeHub
from tests.host.weights_world import BIG, MIB, News, content, fetched_by_daemon, interrupt_at, killed_at

SHARD = "model.safetensors"
SIZE = 8 * MIB + 12345
FILES = {"config.json": b"{}", SHARD: random.Random(7).randbytes(SIZE)}
QUICK = Limits(stall_s=0.4, tries=4, backoff_s=0.05, part_bytes=MIB)
PUBLISHED = {"org/big": FILES}


def partial_of(cache: Path) -> Path:
    return next(cache.rglob(f"*{PARTIAL}"))


async def test_a_big_file_comes_over_several_connections(hub: FakeHub, cache: Path) -> None:
    """Each is held to 1 MB/s: together they are faster."""
    hub.faults.bytes_per_s = 1e6
    began = time.monotonic()
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES
    assert sorted(hub.starts(SHARD)) == list(range(0, SIZE, MIB))
    assert time.monotonic() - began < SIZE / 1e6
    assert hub.sent_bytes(SHARD) == SIZE
    assert not list(cache.rglob(f"*{PARTIAL}"))


@pytest.mark.fault(18)
async def test_each_part_continues_where_it_was(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), 3 * MIB)
    there = arrived_bytes(partial_of(cache), SIZE)
    assert 3 * MIB <= there < SIZE
    assert partial_of(cache).stat().st_size > SIZE, "the table follows the bytes"
    hub.faults.bytes_per_s = None
    hub.forget()
    news = News()
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)).path) == FILES
    assert hub.sent_bytes(SHARD) == SIZE - there
    assert news.all[-1].done_bytes == news.all[-1].total_bytes


@pytest.mark.fault(18)
def test_killed_at_five_points_next_to_nothing_comes_twice(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    connections, before = 0, 0
    for _ in killed_at([part * SIZE for part in (0.02, 0.3, 0.6, 0.9, 0.99)], cache, hub, part_bytes=MIB):
        connections, before = connections + min(len(hub.served) - before, QUICK.parallel), len(hub.served)
    assert fetched_by_daemon(cache, hub, part_bytes=MIB) == FILES
    twice = hub.sent_bytes(SHARD) - SIZE
    print(f"{twice:,} bytes fetched twice, over {connections} connections")
    assert twice < connections * 256 * 1024, "what was in the sockets"


@pytest.mark.fault(18)
async def test_dropped_and_stalled_connections_cost_nothing_twice(hub: FakeHub, cache: Path) -> None:
    hub.faults.drops, hub.faults.drop_after_bytes = 10, MIB // 4
    hub.faults.stalls, hub.faults.stall_after_bytes = 2, MIB // 2
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES
    assert hub.sent_bytes(SHARD) == SIZE


@pytest.mark.fault(18)
async def test_a_hub_without_ranges_is_read_over_one_connection(hub: FakeHub, cache: Path) -> None:
    hub.faults.ignore_range = True
    news = News()
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)
    assert content(got.path) == FILES
    assert news.all[-1].done_bytes == news.all[-1].total_bytes


@pytest.mark.fault(18)
@pytest.mark.parametrize("fault", ["pages", "shifted"])
async def test_what_is_no_part_of_the_file_costs_nothing_that_came(hub: FakeHub, cache: Path, fault: str) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), 3 * MIB)
    there = arrived_bytes(partial_of(cache), SIZE)
    hub.faults.bytes_per_s = None
    hub.forget()
    setattr(hub.faults, fault, 3)
    assert content((await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes(SHARD) < SIZE - there + MIB
    assert getattr(hub.faults, fault) == 0


@pytest.mark.fault(14)
async def test_a_hub_that_stays_away_ends_all_connections(hub: FakeHub, cache: Path) -> None:
    hub.faults.busy, hub.faults.busy_status, hub.faults.retry_after_s, hub.faults.busy_where = 500, 503, None, "/cdn/"
    with pytest.raises(HubUnavailable, match="answers 503, 4 times in a row"):
        await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())


@pytest.mark.fault(2)
async def test_a_refusal_in_the_middle_ends_it(hub: FakeHub, cache: Path) -> None:
    hub.add("org/big", {SHARD: FILES[SHARD]}, gated=True)
    with pytest.raises(WeightsGated):
        await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())


@pytest.mark.fault(16)
async def test_a_damaged_part_is_found_by_the_hash_of_the_whole(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), 3 * MIB)
    with partial_of(cache).open("r+b") as file:
        file.write(b"damaged")
    hub.faults.bytes_per_s = None
    news = News()
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, news)
    assert content(got.path) == FILES
    assert news.all[-1].done_bytes == news.all[-1].total_bytes


@pytest.mark.fault(18)
async def test_what_one_connection_brought_before_is_built_on(hub: FakeHub, cache: Path) -> None:
    """A partial file without a table: everything up to its end is there."""
    sha256 = hub.repos["org/big"].files[SHARD].sha256
    here = RepoCache(cache, BIG)
    here.make_dirs()
    here.partial(HubFile(SHARD, SIZE, sha256)).write_bytes(FILES[SHARD][: 3 * MIB + 7])
    got = await Weights(cache, hub.url, False, QUICK).fetch(BIG, None, News())
    assert content(got.path) == FILES
    assert hub.sent_bytes(SHARD) == SIZE - 3 * MIB - 7


@pytest.mark.fault(17)
async def test_only_what_the_parts_lack_needs_room(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), 3 * MIB)
    file = HubFile(SHARD, SIZE, hub.repos["org/big"].files[SHARD].sha256)
    assert missing_bytes(RepoCache(cache, BIG), [file]) == SIZE - arrived_bytes(partial_of(cache), SIZE)


@pytest.mark.fault(17)
async def test_a_disk_that_fills_up_pauses_all_parts(hub: FakeHub, small_disk: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    weights = Weights(small_disk / "hub", hub.url, False, QUICK)
    (small_disk / "somebody-elses").write_bytes(b"x" * 5 * MIB)

    def fill(progress: WeightsProgress) -> None:
        if progress.done_bytes > MIB and not (small_disk / "more").exists():
            (small_disk / "more").write_bytes(b"x" * 4 * MIB)

    with pytest.raises(DiskFull, match="no space left on the filesystem of"):
        await weights.fetch(BIG, None, fill)
    (small_disk / "more").unlink()
    hub.faults.bytes_per_s = None
    assert content((await weights.fetch(BIG, None, News())).path) == FILES
    assert hub.sent_bytes(SHARD) - SIZE < QUICK.parallel * MIB


@pytest.mark.parametrize(
    "table",
    [b"", b"x", b"nimhost1", b"nimhost1" + bytes(8), b"nimhost1" + (1).to_bytes(8, "little"),
     b"nimhost1" + (600).to_bytes(8, "little") + (601).to_bytes(8, "little") + bytes(8),
     b"nimhost2" + (600).to_bytes(8, "little") + bytes(16)],
)  # fmt: skip
def test_a_table_that_makes_no_sense_counts_nothing(tmp_path: Path, table: bytes) -> None:
    path = tmp_path / "partial"
    path.write_bytes(bytes(1000) + table)
    fd = os.open(path, os.O_RDWR)
    try:
        assert Parts.read(fd, 1000) is None
        assert arrived_bytes(path, 1000) == (0 if table else 1000)
        parts = Parts.open(fd, 1000, 600)
        assert parts.done == ([0, 0] if table else [600, 400])
        again = Parts.read(fd, 1000)
        assert again is not None
        assert again.done == parts.done
    finally:
        os.close(fd)


@pytest.mark.parametrize("size_bytes", [2, 1000, 10**9, 10**13])
def test_there_are_never_more_parts_than_a_table_holds(tmp_path: Path, size_bytes: int) -> None:
    fd = os.open(tmp_path / "partial", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 0)
        parts = Parts.open(fd, size_bytes, 1)
        assert 1 <= len(parts.done) <= MOST_PARTS
        assert sum(parts.stop(n) - parts.start(n) for n in range(len(parts.done))) == size_bytes
    finally:
        os.close(fd)

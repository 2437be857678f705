"""10,000 entities cost a page, a create and the event loop about what 100 do. Counts and CPU time, not wall time."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from nimhost.entities import DeploymentConfig, DeployModelSpec, ExecutorConfig, Model
from nimhost.kinds import KINDS
from nimhost.loopwatch import LoopWatch
from nimhost.refs import Ref
from nimhost.store import Store
from tests.api.conftest import World as ApiWorld
from tests.api.conftest import open_world
from tests.e2e.daemon import DaemonProcess
from tests.support import eventually, wait_until
from tests.world import World

MODELS = "/apis/models/v2/workspaces/default/models"
MANY, FEW = 10_000, 100
ROUNDS = 40
PAGE = f"{MODELS}?page_size=100"
FILTERS = [
    "filter[lora_enabled]=true", "filter[lora_enabled]=false", "filter[description][$like]=number",
    "filter[adapters]=false", "filter[name][$gte]=model-05000&sort=-name",
]  # fmt: skip
QUERIES = [PAGE, f"{PAGE}&sort=name", f"{PAGE}&sort=-name", f"{PAGE}&sort=-updated_at", f"{PAGE}&page=LAST"]


async def fill(store: Store, count: int) -> None:
    async with store.transaction() as tx:
        for number in range(count):
            wish = Model(description=f"number {number}", custom_fields={"n": number})
            await tx.insert("models", "default", f"model-{number:05}", wish)


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[tuple[ApiWorld, ApiWorld]]:
    """With few models, with many."""
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    async with open_world(tmp_path / "few") as few, open_world(tmp_path / "many") as many:
        await fill(few.store, FEW)
        await fill(many.store, MANY)
        gc.collect()
        gc.freeze()  # as the daemon does; what all the tests before have left is not looked through meanwhile
        yield few, many
        gc.unfreeze()


async def cost_s(world: ApiWorld, path: str) -> float:
    """CPU time of this process for one request."""
    begun = time.process_time()
    reply = await world("GET", path)
    spent_s = time.process_time() - begun
    assert reply.status_code == 200
    assert len(reply.json()["data"]) == 100
    return spent_s


async def test_a_page_of_many_costs_no_more_than_twice_a_page_of_few(worlds: tuple[ApiWorld, ApiWorld]) -> None:
    few, many = worlds
    ratios, worst = {}, {}
    for query in QUERIES:
        first, last = query.replace("LAST", "1"), query.replace("LAST", str(MANY // 100))
        times = [(await cost_s(few, first), await cost_s(many, last)) for _ in range(ROUNDS)]
        of_few, of_many = (min(column) for column in zip(*times, strict=True))  # a busy machine only adds
        ratios[query.removeprefix(MODELS)] = round(of_many / of_few, 2)
        worst[query.removeprefix(MODELS)] = _p99_ms([many_s for _, many_s in times])
    print(f"\na page of 100 of {MANY} against one of {FEW}: {ratios}; p99 in ms: {worst}")
    assert {query: ms for query, ms in worst.items() if ms > 20} == {}
    assert {query: ratio for query, ratio in ratios.items() if ratio > 2} == {}


def _p99_ms(times_s: list[float]) -> float:
    return round(sorted(times_s)[int(len(times_s) * 0.99)] * 1000, 1)


async def test_a_filter_looks_at_every_row_once(worlds: tuple[ApiWorld, ApiWorld]) -> None:
    """It has to: what is filtered by stands inside the wishes. Then it also counts them."""
    _, many = worlds
    await fill_configs(many.store, MANY // 3)
    found = {}
    for query in FILTERS:
        times = [await cost_s(many, f"{PAGE}&{query}") for _ in range(ROUNDS // 4)]
        found[query] = (round(min(times) * 1000, 1), _p99_ms(times))
    print(f"\nfilters over {MANY} models and {MANY // 3} configs, best and p99 in ms: {found}")
    assert {query: ms for query, ms in found.items() if ms[0] > 100} == {}


async def test_creates_are_as_fast_with_many_as_with_few(worlds: tuple[ApiWorld, ApiWorld]) -> None:
    """CPU time: how long the disk takes to have each of them for sure is the disk's."""
    costs, per_s = [], []
    for world in worlds:
        before, begun = time.process_time(), time.perf_counter()
        for number in range(200):
            assert (await world("POST", MODELS, {"name": f"new-{number}"})).status_code == 201
        costs.append(time.process_time() - before)
        per_s.append(round(200 / (time.perf_counter() - begun)))
    print(f"\ncreates per second, with {FEW} and with {MANY}: {per_s}")
    assert costs[1] < 2 * costs[0]


def test_a_daemon_with_many_starts_soon_and_stays_small(tmp_path: Path) -> None:
    took_s, held_mb = {}, {}
    for name, count in (("few", FEW), ("many", MANY)):
        directory = tmp_path / name
        (directory / "data").mkdir(parents=True, mode=0o700)
        asyncio.run(filled(directory / "data" / "nimhost.db", count))
        daemon = DaemonProcess(directory, {"NIMHOST_DOCKER__HOST": f"unix://{tmp_path}/none.sock"})
        begun = time.perf_counter()
        daemon.start()
        took_s[name] = round(time.perf_counter() - begun, 2)
        try:
            last = f"default/model-{count - 1:05}"
            # 404 either way: but a model that the routes know is told apart from one that nobody knows
            wait_until(lambda d=daemon, m=last: "No providers found" in _asked(d, m), 30)
            assert daemon.process is not None
            status = Path(f"/proc/{daemon.process.pid}/status").read_text()
            held_mb[name] = int(status.partition("VmRSS:")[2].split()[0]) // 1024
        finally:
            daemon.stop()
            daemon.http.close()
    print(f"\nseconds until it listens: {took_s}; memory in MB once all is routed: {held_mb}")
    assert took_s["many"] < took_s["few"] + 10
    assert held_mb["many"] < held_mb["few"] + 100


def _asked(daemon: DaemonProcess, model: str) -> str:
    return daemon.http.post("/v1/chat/completions", json={"model": model, "messages": []}).text


async def filled(path: Path, count: int) -> None:
    store = await Store.open(path)
    await fill(store, count)
    await store.close()


async def fill_configs(store: Store, count: int) -> None:
    async with store.transaction() as tx:
        for number in range(count):
            wish = DeploymentConfig(
                engine="vllm", model_spec=DeployModelSpec(lora_enabled=number % 2 == 0),
                executor_config=ExecutorConfig(gpu=0), model_entity_id=f"default/model-{number:05}",
            )  # fmt: skip
            await tx.insert("deployment-configs", "default", f"config-{number:05}", wish)


async def test_a_page_takes_as_few_statements_with_many_as_with_few(worlds: tuple[ApiWorld, ApiWorld]) -> None:
    counts = []
    for world in worlds:
        statements: list[str] = []
        await world.store._reader.set_trace_callback(statements.append)
        await world("GET", PAGE)
        counts.append(len(statements))
    assert counts[0] == counts[1]
    assert counts[1] <= 4, "one for the workspace, one for the page, and what it shows beside the rows"


async def test_pages_are_capped(worlds: tuple[ApiWorld, ApiWorld]) -> None:
    _, many = worlds
    assert (await many("GET", f"{MODELS}?page_size={KINDS['models'].page_size_max + 1}")).status_code == 422
    for kind in KINDS.values():
        assert kind.page_size <= kind.page_size_max <= 1000


async def test_changes_do_not_hold_up_the_loop_when_there_are_many(tmp_path: Path) -> None:
    """Each of them wakes the reconciler and makes the routes anew, from all models."""
    async with World(tmp_path) as world:
        store = world.daemon.store
        await fill(store, MANY)
        await eventually(lambda: Ref("default", f"model-{MANY - 1:05}") in world.daemon.gateway.table.known, 30)
        gc.collect()
        longest_s = []
        for number in range(3):
            watch = LoopWatch()
            watch.start()
            for part in range(10):
                reply = await world.http.post(MODELS, json={"name": f"new-{number}-{part}"})
                assert reply.status_code == 201
            ref = Ref("default", f"new-{number}-9")
            await eventually(lambda ref=ref: ref in world.daemon.gateway.table.known, 30)
            watch.stop()
            longest_s.append(watch.longest_cpu_s)
    print(f"\nmost CPU time at once: {[round(s * 1000, 1) for s in longest_s]} ms")
    assert min(longest_s) < 0.01


async def test_a_store_that_follows_its_writes_has_what_a_new_one_reads(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "nimhost.db")
    await fill(store, 5)
    await store.all("models")
    async with store.transaction() as tx:
        first = await tx.get("models", "default", "model-00000")
        changed = await tx.update_wish(first, Model(description="changed"))
        await tx.delete(await tx.get("models", "default", "model-00001"))
        await tx.insert("models", "default", "model-00001", Model(description="again"))
        assert [e.wish.description for e in await tx.all("models")] == [
            "changed", "number 2", "number 3", "number 4", "again",
        ]  # fmt: skip
    async with store.transaction() as tx:
        await tx.set_status(changed, changed.status)
        await tx.delete(await tx.get("models", "default", "model-00003"))
    async with store.transaction(keep=False) as tx:
        await tx.delete(await tx.get("models", "default", "model-00002"))
    with suppress(ZeroDivisionError):
        async with store.transaction() as tx:
            await tx.delete(await tx.get("models", "default", "model-00004"))
            raise ZeroDivisionError
    followed = await store.by_ref("models")
    await store.close()
    again = await Store.open(tmp_path / "nimhost.db")
    read = await again.by_ref("models")
    await again.close()
    assert followed == read
    assert list(followed) == list(read)
    assert len(read) == 4

"""The weights cache of a daemon: what may go is asked anew for each thing that goes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nimhost.config import Deployments
from nimhost.config import Weights as WeightsSettings
from nimhost.deployments.desired import Desired
from nimhost.deployments.pulls import Asked, Pulls
from nimhost.deployments.weights_stock import Stock
from nimhost.entities import Fileset, HuggingFaceStorage
from nimhost.errors import DiskFull, NotFound
from nimhost.host.weights import Limits, Repo, Weights
from nimhost.refs import Ref
from nimhost.store import Store
from tests.fakes.hub import FakeHub
from tests.support import eventually
from tests.test_unreadable import damage
from tests.world import IMAGE, World

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 1000}
NAMES = ("org/first", "org/second")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        for number, name in enumerate(NAMES):
            fake.add(name, FILES | {"config.json": b'{"n": %d}' % number})
        yield fake


@pytest.fixture
async def weights(hub: FakeHub, cache: Path) -> Weights:
    """With both repositories in it."""
    made = Weights(cache, hub.url, False, Limits(stall_s=5, tries=2, backoff_s=0.05))
    for name in NAMES:
        await made.fetch(Repo(name), None, lambda news: None)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


async def add_fileset(store: Store, repo_id: str) -> None:
    async with store.transaction() as tx:
        await tx.insert("filesets", "default", "ff", Fileset(storage=HuggingFaceStorage(repo_id=repo_id)))


async def nothing() -> Sequence[Desired]:
    return ()


def stock_of(
    weights: Weights,
    store: Store,
    read: Callable[[], Awaitable[Sequence[Desired]]] = nothing,
    on_room: Callable[[], None] = lambda: None,
) -> Stock:
    return Stock(weights, store, Pulls(weights, store, no_secret), read, on_room)


async def no_secret(ref: Ref) -> str:
    raise NotFound(f"there is no secret {ref}")


def stays(weights: Weights) -> list[str]:
    return [name for name in NAMES if weights.present(Repo(name)) is not None]


async def test_what_nobody_names_goes(weights: Weights, store: Store) -> None:
    stock = stock_of(weights, store)
    assert [row.repo for row, _ in (await stock.prune(0, dry_run=True)).gone] == list(NAMES)
    assert stays(weights) == list(NAMES)
    assert [row.repo for row, _ in (await stock.prune(0, dry_run=False)).gone] == list(NAMES)
    assert stays(weights) == []


async def test_what_somebody_asks_for_while_others_go_stays(weights: Weights, store: Store) -> None:
    """Removing much takes time; by then a fileset may name what was to go."""
    looks = 0

    async def read_desired() -> Sequence[Desired]:
        nonlocal looks
        looks += 1
        if looks == 3:
            await add_fileset(store, "org/second")
        return ()

    found = await stock_of(weights, store, read_desired).prune(0, dry_run=False)
    assert [row.repo for row, _ in found.gone] == ["org/first"]
    assert [why for _, why in found.kept] == ["fileset default/ff names it"]
    assert stays(weights) == ["org/second"]


@pytest.mark.fault(17)
async def test_who_waits_for_room_goes_on_as_soon_as_something_is_pruned(weights: Weights, tmp_path: Path) -> None:
    cache, patient = WeightsSettings(cache_dir=str(weights.cache_dir), offline=True), Deployments(restart_backoff_s=300)
    async with World(tmp_path, weights=cache, deployments=patient) as world:
        world.docker.pull_error = DiskFull("No space left in /var/lib/docker.")
        world.docker.registry["big:1"] = world.docker.images[IMAGE]
        await world.deploy("one", "big:1")
        await world.wait("one", "PENDING", "No space left in /var/lib/docker.\nTrying again at")
        world.docker.pull_error = None
        prune = "/apis/nimhost/v1/weights/prune"
        assert (await world.http.post(prune, json={"dry_run": True})).json()["freed_bytes"] > 0
        assert world.docker.calls.count("pull") == 1
        assert (await world.http.post(prune, json={})).json()["freed_bytes"] > 0
        await world.wait("one", "READY")


@pytest.mark.fault(38)
@pytest.mark.parametrize("dry_run", [True, False])
async def test_while_something_cannot_be_read_nothing_goes(
    weights: Weights, store: Store, tmp_path: Path, dry_run: bool
) -> None:
    """What it needs is not known."""
    await add_fileset(store, "org/first")
    damage(tmp_path, "filesets", "ff", "wish", '{"storage": 5}')
    found = await stock_of(weights, store).prune(0, dry_run)
    assert found.gone == []
    assert len(found.kept) == 2
    assert all(why.startswith("fileset default/ff cannot be read, and may need it") for _, why in found.kept)
    assert stays(weights) == list(NAMES)


async def test_what_is_left_of_a_download_goes_with_its_last_fileset_unless_another_may_need_it(
    weights: Weights, store: Store, tmp_path: Path, cache: Path
) -> None:
    half = cache / "models--org--first" / "blobs" / f"{'e' * 64}.nimhost-partial"
    half.write_bytes(b"half")
    await add_fileset(store, "org/other")
    damage(tmp_path, "filesets", "ff", "wish", '{"storage": 5}')
    stock = stock_of(weights, store)
    await stock.discard([HuggingFaceStorage(repo_id="org/first")])
    assert half.exists()
    damage(tmp_path, "filesets", "ff", "wish", "{}")
    await stock.discard([HuggingFaceStorage(repo_id="org/first")])
    assert not half.exists()


async def test_what_a_pull_waits_to_go_on_with_stays(
    hub: FakeHub, weights: Weights, store: Store, cache: Path, tmp_path: Path
) -> None:
    half = cache / "models--org--third" / "blobs" / f"{'e' * 64}.nimhost-partial"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    hub.faults.down = True
    stock = stock_of(weights, store)
    await stock.pulls.ask(Asked(Repo("org/third")))
    await eventually(lambda: "trying again in" in str(stock.progress().get("models--org--third")))
    assert {row.repo: row.state for row in await stock.shelved()}["org/third"] == "fetching"
    await stock.prune(0, dry_run=False)
    await stock.discard([HuggingFaceStorage(repo_id="org/third")])
    assert half.exists()
    await stock.pulls.stop(Repo("org/third"))
    await stock.prune(0, dry_run=False)
    assert not half.exists()

"""An update on the heels of another one: while a GPU is about to be free, the version that serves keeps the routes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nimhost.deployments.actions import Action, Prepare, Remove, Start
from nimhost.deployments.observed import Instance
from tests.deployments.make import OLD, decide, gpus, instance, machine, rolling
from tests.deployments.test_rolls import a_world, clients, rolled, running, update
from tests.fakes.containers import FakeContainer
from tests.support import eventually
from tests.world import World

BOTH_HELD = gpus("default/d", "default/d")
BETWEEN = "111111111111"


def old() -> Instance:
    return instance(id="old", hash=OLD, gpu_ids=("GPU-0",))


@pytest.mark.parametrize(
    ("in_flight", "others"),
    [
        (Remove(("older",)), (instance(id="older", hash="older", gpu_ids=("GPU-1",), health="unknown"),)),
        (Start(("GPU-1",), BETWEEN), ()),
        (Start(("GPU-1",), BETWEEN), (instance(id="between", hash=BETWEEN, gpu_ids=("GPU-1",), health="unknown"),)),
        (Prepare(True, False, BETWEEN), (instance(id="between", hash=BETWEEN, gpu_ids=("GPU-1",), health="unknown"),)),
    ],
)
def test_a_gpu_that_is_about_to_be_free_is_waited_for(in_flight: Action, others: tuple[Instance, ...]) -> None:
    verdict = decide(rolling(), machine(old(), *others, gpus=BOTH_HELD), in_flight)
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "old")
    assert (verdict.run.replaced_at, verdict.run.kept_gpus) == (0.0, ())


def test_when_nothing_more_is_about_to_be_free_it_gives_way() -> None:
    verdict = decide(rolling(gpus=2), machine(old(), gpus=gpus("default/d", None)))
    assert (verdict.status, verdict.instance) == ("PENDING", None)
    assert verdict.run.kept_gpus == ("GPU-0", "GPU-1")


async def test_updates_on_each_others_heels_fail_no_request(tmp_path: Path) -> None:
    """Two writes for each, as the command line does it; a container takes a while to start, and to go."""
    async with a_world(tmp_path) as world:
        remove = world.docker.remove

        async def start(container: FakeContainer) -> int:
            await asyncio.sleep(0.05)
            return await world._start_engine(container)

        async def go(container_id: str) -> None:
            await asyncio.sleep(0.2)
            await remove(container_id)

        world.docker.on_start = start
        world.docker.remove = go  # type: ignore[method-assign]
        await world.deploy("one")
        await world.wait("one", "READY")
        async with clients(world, "one") as statuses:
            for version in ("a", "b", "c", "d"):
                await update(world, "one", "--version", f"{version}-at-first")
                await asyncio.sleep(0.02)
                await update(world, "one", "--version", version)
                await serves(world, "one", "--version", version)
            await rolled(world, "one", "--version", "d")
        assert set(statuses) == {200}


async def serves(world: World, name: str, *args: str) -> None:
    """Once they are what is served with; what served before need not be gone."""

    async def there() -> bool:
        found = await world.deployment(name) or {}
        done = (found["status"], found["update"]) == ("READY", None) and args in running(world, name)
        return done and not (found["status_message"].startswith("Serving the previous"))

    await eventually(there, 10)

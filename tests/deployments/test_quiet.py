"""The loop does not turn for nothing, and one row that cannot be read does not stop it for all the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.errors import DockerUnavailable
from tests.support import eventually
from tests.test_unreadable import damage
from tests.world import IMAGE, MODELS, World


def count_ticks(world: World, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    ticks: list[None] = []
    real = world.daemon.reconciler._tick

    async def tick() -> float:
        ticks.append(None)
        return await real()

    monkeypatch.setattr(world.daemon.reconciler, "_tick", tick)
    return ticks


async def test_many_deployments_that_serve_cause_no_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with World(tmp_path, gpus=0) as world:
        names = [f"d{number}" for number in range(8)]
        for name in names:
            await world.deploy(name, gpu=0)
        for name in names:
            await world.wait(name, "READY")
        ticks = count_ticks(world, monkeypatch)

        async def quiet() -> bool:
            seen = len(ticks)
            await asyncio.sleep(2.0)  # this very silence is what is asserted
            return len(ticks) == seen

        await eventually(quiet, 10)


@pytest.mark.fault(21)
async def test_a_pull_that_docker_breaks_off_at_once_is_not_begun_a_hundred_times(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.docker.pull_error = DockerUnavailable("Image other:1: the pull broke off")
        world.docker.registry["other:1"] = world.docker.images[IMAGE]
        await world.deploy("one", image="other:1")
        await eventually(lambda: "pull" in world.docker.calls, 5)
        await asyncio.sleep(1.5)  # as often as it wants to
        assert world.docker.calls.count("pull") < 6
        world.docker.pull_error = None
        await world.wait("one", "READY")


@pytest.mark.fault(38)
async def test_a_provider_that_cannot_be_read_stops_nobody_elses_deployment(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        await world.stop()
        damage(tmp_path, "providers", "one", "wish", "{broken")
        await world.start()
        await world.deploy("two")
        await world.wait("two", "READY")
        assert world.daemon.reconciler.problem is None
        await world.delete("one")
        await world.gone("one")
        assert len(world.docker.containers) == 1


@pytest.mark.fault(38)
async def test_a_model_that_cannot_be_read_stops_nobody_elses_deployment(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.post(f"{MODELS}/models", {"name": "fake"})  # what the engine lists becomes a model of that name
        await world.stop()
        damage(tmp_path, "models", "fake", "wish", "{broken")
        await world.start()
        await world.deploy("one")
        await world.deploy("two", gpu=0)
        await world.wait("two", "READY")
        assert world.daemon.reconciler.problem is None


@pytest.mark.fault(20)
async def test_a_config_whose_last_rows_go_while_the_wishes_are_read_is_missing_and_no_mistake(world: World) -> None:
    await world.deploy("one")
    config = await world.daemon.store.get("deployment-configs", "default", "one")
    await world.delete("one")
    await world.gone("one")
    assert (await world.http.delete(f"{MODELS}/deployment-configs/one")).status_code < 300
    assert await world.daemon.reconciler._wish_of(config, config.version + 1) is None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path) as world:
        yield world

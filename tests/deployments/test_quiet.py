"""The loop does not turn for nothing, and one row that cannot be read does not stop it for all the others."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.deployments import reconciler
from nimhost.deployments.situation import Verdict
from nimhost.entities import Model
from nimhost.errors import DiskFull, DockerUnavailable, RegistryUnavailable
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


@pytest.mark.fault(17)
@pytest.mark.fault(38)
async def test_a_failure_that_cannot_be_stored_is_not_met_again_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One disk for everything, and it is full."""

    async def full(*_: object) -> bool:
        raise DiskFull("The disk that holds nimhost's database is full.")

    world.docker.pull_error = DiskFull("No space left in /var/lib/docker.")
    world.docker.registry["other:1"] = world.docker.images[IMAGE]
    monkeypatch.setattr(reconciler, "AFTER_ERROR_S", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(world.daemon.store, "set_status", full)
        await world.deploy("one", image="other:1")
        await eventually(lambda: world.docker.calls.count("pull") == 2, 5)
    world.docker.pull_error = None
    await world.wait("one", "READY")
    assert world.docker.calls.count("pull") < 6


@pytest.mark.fault(21)
async def test_a_docker_that_fails_to_answer_once_is_asked_again_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events go on: nothing tells that it is well again."""
    monkeypatch.setattr(reconciler, "RECONNECT_S", (0.1, 0.3))
    await world.deploy("one")
    await world.wait("one", "READY")
    with monkeypatch.context() as patch:

        async def busy() -> object:
            raise DockerUnavailable("Docker does not answer")

        patch.setattr(world.docker, "list", busy)
        world.daemon.reconciler.wake()
        await world.wait("one", "UNKNOWN")
    await world.wait("one", "READY")


@pytest.mark.parametrize("away", [False, True])
async def test_changes_that_come_fast_are_looked_at_together(
    world: World, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if away:
        world.docker.away = True
        await eventually(lambda: world.daemon.reconciler._away is not None)
    rounds: list[None] = []
    look = world.daemon.loader._round

    async def round_() -> float:
        rounds.append(None)
        return await look()

    monkeypatch.setattr(world.daemon.loader, "_round", round_)
    ticks, asked = count_ticks(world, monkeypatch), world.docker.calls.count("list")
    began_s = time.monotonic()
    for number in range(1000):
        async with world.daemon.store.transaction() as tx:
            await tx.insert("models", "default", f"m{number}", Model())
    await eventually(lambda: len(world.daemon.gateway.table.known) >= 1000)
    took_s = time.monotonic() - began_s
    together = reconciler.TICKS_AT_ONCE * (took_s / reconciler.WITHIN_S + 1)
    assert len(ticks) <= together
    assert rounds == [], "nothing takes adapters for these"
    if away:
        assert world.docker.calls.count("list") - asked <= took_s / reconciler.RECONNECT_S[0] + 1
    world.docker.away = False
    await world.deploy("one")
    await world.wait("one", "READY")


@pytest.mark.fault(2)
async def test_an_error_that_names_an_odd_file_holds_up_nobody(world: World) -> None:
    world.docker.registry["other:1"] = world.docker.images[IMAGE]
    world.docker.pull_error = RegistryUnavailable(os.fsdecode(b"no caf\xe9 there"))
    await world.deploy("one", image="other:1")
    await world.wait("one", "ERROR", "no caf? there")
    await world.deploy("two")
    await world.wait("two", "READY")
    assert world.docker.calls.count("pull") == world.settings.deployments.restart_limit


async def test_a_download_that_is_cancelled_before_it_began_is_over(world: World) -> None:
    world.docker.registry["other:1"] = world.docker.images[IMAGE]
    reconciler_ = world.daemon.reconciler
    launch = reconciler_._launch

    def launch_and_cancel(v: Verdict, now_s: float) -> None:
        launch(v, now_s)
        for _, task in reconciler_._in_flight.values():
            task.cancel()
        reconciler_._launch = launch  # type: ignore[method-assign]

    reconciler_._launch = launch_and_cancel  # type: ignore[method-assign]
    await world.deploy("one", image="other:1")
    await world.wait("one", "READY")

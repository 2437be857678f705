"""The loop on a Docker in memory: what it does when things happen, and that it does no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.config import Deployments
from nimhost.errors import DiskFull, DockerError, ImageNotFound, RegistryUnavailable
from tests.fakes.engine import Faults
from tests.support import eventually
from tests.world import IMAGE, MODELS, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path) as world:
        yield world


async def test_what_is_deployed_serves_and_what_is_deleted_is_gone(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    assert len(world.engines) == 1
    await world.delete("one")
    await world.gone("one")
    assert world.docker.containers == {}
    assert (await world.http.get(f"{MODELS}/providers/one")).status_code == 404


async def test_a_restart_adopts_and_starts_nothing(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    before = list(world.docker.containers)
    world.docker.calls.clear()
    await world.restart()
    shown = await world.wait("one", "READY")
    assert list(world.docker.containers) == before
    assert not {"run", "create", "start", "stop", "remove"} & set(world.docker.calls)
    assert [entry["status"] for entry in shown["status_history"]].count("READY") == 1


async def test_a_quiet_daemon_asks_docker_nothing(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    await quiet(world)
    calls = len(world.docker.calls)
    await quiet(world)
    assert len(world.docker.calls) == calls


async def quiet(world: World) -> None:
    """Returns when nothing was written for half a second."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.daemon.store.wait_change(world.daemon.store.revision), 0.5)
            continue
        return


@pytest.mark.fault(1)
@pytest.mark.fault(20)
async def test_a_pull_that_hangs_can_be_deleted_at_once(world: World) -> None:
    world.docker.registry["slow:1"] = world.docker.images[IMAGE]
    world.docker.pull_hangs = True
    await world.deploy("one", "slow:1")
    await world.wait("one", "PENDING", "Pulling container image slow:1")
    await world.delete("one")
    await world.gone("one")


@pytest.mark.fault(20)
async def test_a_pull_is_begun_again_after_a_restart(world: World) -> None:
    world.docker.registry["slow:1"] = world.docker.images[IMAGE]
    world.docker.pull_hangs = True
    await world.deploy("one", "slow:1")
    await world.wait("one", "PENDING", "Pulling container image slow:1")
    world.docker.pull_hangs = False
    await world.restart()
    await world.wait("one", "READY")


@pytest.mark.fault(2)
async def test_a_registry_that_is_away_is_tried_again_until_the_limit(world: World) -> None:
    world.docker.pull_error = RegistryUnavailable("The registry is away.")
    await world.deploy("one", "slow:1")
    ended = await world.wait("one", "ERROR", "The registry is away.")
    assert world.docker.calls.count("pull") == world.settings.deployments.restart_limit
    assert ended["status_history"][-1]["status"] == "ERROR"


@pytest.mark.fault(2)
@pytest.mark.fault(22)
async def test_what_failed_to_be_fetched_does_not_count_once_it_is_here(world: World) -> None:
    world.docker.registry["slow:1"] = world.docker.images[IMAGE]
    world.docker.pull_error = RegistryUnavailable("The registry is away.")
    await world.deploy("one", "slow:1")
    limit = world.settings.deployments.restart_limit
    await world.wait("one", "PENDING", f"(attempt {limit})")
    world.docker.pull_error = None
    await world.wait("one", "READY")
    (container,) = world.docker.containers
    world.docker.exit(container, 1)
    await eventually(lambda: world.docker.calls.count("start") == 2)
    await world.wait("one", "READY")


@pytest.mark.fault(22)
async def test_a_start_that_fails_after_every_pull_comes_to_an_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes the image each time."""
    world.docker.registry["slow:1"] = world.docker.images[IMAGE]

    async def failing(_: object) -> str:
        world.docker.images.clear()
        raise DockerError("Docker: no such device")

    monkeypatch.setattr(world.docker, "_create", failing)
    await world.deploy("one", "slow:1")
    await world.wait("one", "ERROR", "no such device")
    assert world.docker.calls.count("pull") == world.settings.deployments.restart_limit


@pytest.mark.fault(17)
async def test_a_full_disk_pauses_and_goes_on(world: World) -> None:
    world.docker.pull_error = DiskFull("No space left in /var/lib/docker.")
    world.docker.registry["slow:1"] = world.docker.images[IMAGE]
    await world.deploy("one", "slow:1")
    await world.wait("one", "PENDING", "No space left in /var/lib/docker.")
    world.docker.pull_error = None
    await world.wait("one", "READY")


@pytest.mark.fault(3)
async def test_the_first_error_of_a_start_is_the_one_that_is_shown(world: World) -> None:
    world.docker.start_error = DockerError("driver failed")
    await world.deploy("one")
    await world.wait("one", "ERROR", "driver failed")
    assert world.docker.containers == {}


@pytest.mark.fault(4)
async def test_an_engine_that_was_removed_between_two_looks_starts_again_and_its_history_says_why(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    (gone,) = world.docker.containers
    await world.stop()
    await world.docker.remove(gone)
    await world.start()
    await eventually(lambda: world.docker.calls.count("start") == 2)
    said = f"Container {gone[:12]} is gone: it was removed, and not by nimhost."
    history = (await world.wait("one", "READY"))["status_history"]
    assert [entry["status"] for entry in history if said in entry["status_message"]] == ["PENDING"], history


IN_VAIN = "It is tried again: Docker: cannot remove container: permission denied. See: dmesg"


async def stop_in_vain(world: World, patch: pytest.MonkeyPatch) -> None:
    """`one` is to stop, and Docker refuses to remove its container."""

    async def refusing(container_id: str) -> None:
        raise DockerError("Docker: cannot remove container: permission denied", "See: dmesg")

    patch.setattr("nimhost.deployments.reconciler.AFTER_ERROR_S", 0.05)
    patch.setattr(world.docker, "remove", refusing)
    await world.deploy("one")
    await world.wait("one", "READY")
    await world.http.post(f"{MODELS}/deployments/one/stop")
    await world.wait("one", "PENDING", IN_VAIN)


@pytest.mark.fault(4)
async def test_a_container_that_docker_does_not_remove_is_told_and_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        await stop_in_vain(world, patch)
        await world.delete("one")
        await world.wait("one", "DELETING", IN_VAIN)
    await world.gone("one")


@pytest.mark.fault(4)
async def test_a_container_that_docker_did_not_remove_and_somebody_else_did_is_not_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stop_in_vain(world, monkeypatch)
    (container,) = world.docker.containers
    await world.docker._remove(container)
    await world.wait("one", "PENDING", "Stopped. Start it with: nimhost start one")
    await quiet(world)
    stopped = await world.wait("one", "PENDING")
    assert "tried again" not in stopped["status_message"]


@pytest.mark.fault(38)
async def test_a_status_that_cannot_be_stored_holds_up_only_its_own_deployment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimhost.deployments.reconciler.AFTER_ERROR_S", 0.05)
    await world.deploy("bad")
    await world.wait("bad", "READY")
    (container,) = world.docker.containers
    log_tail = world.docker.log_tail

    async def unreadable(key: str, lines: int = 80) -> str:
        return "no text: \ud800" if key == container else await log_tail(key, lines)

    monkeypatch.setattr(world.docker, "log_tail", unreadable)
    world.docker.exit(container, 1)
    await world.deploy("good")
    await world.wait("good", "READY", timeout_s=3)
    status = (await world.http.get("/status")).json()
    assert "Deployment 'default/bad' is not stored" in status["problem"]


@pytest.mark.fault(38)
async def test_while_nothing_can_be_stored_nothing_is_started(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> bool:
        raise DiskFull("The disk that holds nimhost's database is full")

    async def told() -> bool:
        return "database is full" in ((await world.http.get("/status")).json()["problem"] or "")

    monkeypatch.setattr("nimhost.deployments.reconciler.AFTER_ERROR_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr("nimhost.deployments.reconciler.publish", full)
        await world.deploy("one")
        await eventually(told)
        assert world.docker.containers == {}
    await world.wait("one", "READY")


@pytest.mark.fault(21)
async def test_docker_goes_and_comes_back(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    world.docker.away = True
    await world.wait("one", "UNKNOWN")
    assert len(world.docker.containers) == 1
    world.docker.away = False
    await world.wait("one", "READY")


@pytest.mark.fault(8)
async def test_an_exited_engine_gives_its_gpus_to_who_waits(tmp_path: Path) -> None:
    patient = Deployments(restart_backoff_s=60)
    async with World(tmp_path, gpus=1, deployments=patient) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        await world.deploy("two")
        await world.wait("two", "PENDING", "held by default/one")
        (container,) = world.docker.containers
        world.docker.exit(container, 1, log="boom")
        await world.wait("one", "PENDING", "Container exited with code 1")
        await world.wait("two", "READY")


@pytest.mark.fault(22)
async def test_failures_survive_a_restart_of_the_daemon(world: World) -> None:
    world.faults = Faults(crash_exit_code=3, stderr=("no such parser",))
    world.docker.start_error = DockerError("broken")
    await world.deploy("one")
    await world.wait("one", "ERROR", "broken")
    calls = world.docker.calls.count("create")
    await world.restart()
    await world.wait("one", "ERROR", "broken")
    assert world.docker.calls.count("create") == calls


async def test_a_config_that_changes_replaces_the_engine(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    (old,) = world.docker.containers
    reply = await world.http.get(f"{MODELS}/deployment-configs/one")
    wish = {key: reply.json()[key] for key in ("engine", "model_spec", "executor_config")}
    wish["executor_config"]["additional_args"] = ["--new"]
    await world.post(f"{MODELS}/deployment-configs/one", wish)

    async def replaced() -> bool:
        return list(world.docker.containers) != [old] and len(world.docker.containers) == 1

    await eventually(replaced, 10)
    await world.wait("one", "READY")


async def test_a_deployment_pinned_to_a_version_does_not_follow_its_config(world: World) -> None:
    await world.deploy("one")
    await world.delete("one")
    await world.gone("one")
    await world.post(f"{MODELS}/deployments", {"name": "one", "config": "one", "config_version": 1})
    await world.wait("one", "READY")
    before = list(world.docker.containers)
    reply = await world.http.get(f"{MODELS}/deployment-configs/one")
    wish = {key: reply.json()[key] for key in ("engine", "model_spec", "executor_config")}
    wish["executor_config"]["additional_args"] = ["--new"]
    await world.post(f"{MODELS}/deployment-configs/one", wish)
    await world.deploy("other", gpu=0)
    await world.wait("other", "READY")  # a whole round later
    assert before[0] in world.docker.containers


async def test_a_start_that_ends_while_the_machine_is_read_is_not_done_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container list is from before the start, all that follows it from after."""
    world.docker.start_held.clear()
    await world.deploy("one")
    await world.wait("one", "PENDING", "Starting a container")
    read, held = world.gpus.read, asyncio.Event()

    async def slow_read() -> object:
        held.set()
        world.docker.start_held.set()
        await eventually(lambda: any(c.running for c in world.docker.containers.values()), 5)
        return await read()

    monkeypatch.setattr(world.gpus, "read", slow_read)
    world.daemon.reconciler.wake()
    await held.wait()
    await world.wait("one", "READY")
    assert world.docker.calls.count("create") == 1
    assert "remove" not in world.docker.calls


async def test_an_image_name_that_docker_refuses_holds_up_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = world.docker.image

    async def refusing(name: str) -> object:
        if name.startswith("odd"):
            raise ImageNotFound("invalid reference format")
        return await image(name)

    monkeypatch.setattr(world.docker, "image", refusing)
    await world.deploy("bad", "odd/name:1")
    await world.deploy("good")
    await world.wait("good", "READY")
    assert (await world.http.get("/status")).json()["problem"] is None


@pytest.mark.fault(21)
async def test_events_that_break_off_in_an_odd_way_are_listened_to_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    broke = asyncio.Event()

    async def breaking() -> AsyncIterator[object]:
        broke.set()
        raise DockerError("an event was cut in the middle")
        yield  # type: ignore[unreachable]

    with monkeypatch.context() as patch:
        patch.setattr(world.docker, "events", breaking)
        world.docker.away = True
        world.docker.away = False
        await asyncio.wait_for(broke.wait(), 5)
    await world.deploy("one")
    await world.wait("one", "READY")


@pytest.mark.fault(5)
async def test_a_container_that_is_not_ours_stays_so_after_the_next_start(world: World) -> None:
    """A database restored from an old copy, which then starts as many containers as the newer one had."""
    await world.deploy("late")
    await world.wait("late", "READY")
    (late,) = world.docker.containers
    async with world.daemon.store.transaction() as tx:
        await tx.set_meta("epoch", "0")
        for kind in ("deployments", "providers"):
            for entity in await tx.all(kind):
                if entity.name == "late":
                    await tx.delete(entity)
    await world.restart()
    assert (await world.http.get("/status")).json()["unowned_containers"] == [late]
    await world.deploy("one", gpu=0)
    await world.wait("one", "READY")
    await world.restart()
    await world.wait("one", "READY")
    assert late in world.docker.containers


async def test_the_loop_survives_its_own_mistakes_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistake(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("nimhost.deployments.reconciler.AFTER_ERROR_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr("nimhost.deployments.reconciler.plan", mistake)
        await world.deploy("one")

        async def told() -> bool:
            status = (await world.http.get("/status")).json()
            return "a mistake" in (status["problem"] or "") and not status["controllers"]["healthy"]

        await eventually(told, 5)
    await world.wait("one", "READY")
    assert (await world.http.get("/status")).json()["controllers"]["healthy"]

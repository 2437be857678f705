"""Somebody pauses an engine's container, removes it, or stops Docker, behind nimhost's back."""

from __future__ import annotations

from pathlib import Path

from nimhost.config import Deployments
from tests.world import MODELS, World

CHAT = "/v1/chat/completions"
ASK = {"model": "default/fake", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_paused_engine_gets_no_traffic_until_it_goes_on_and_the_command_for_that_is_told(
    tmp_path: Path,
) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (container,) = world.docker.containers.values()
        world.docker.pause(container.id)
        await world.wait("one", "PENDING", f"paused (it goes on with: docker unpause {container.seen.name}).")
        refused = await world.http.post(CHAT, json=ASK)
        assert (refused.status_code, "docker unpause" in refused.text) == (503, True)
        world.docker.pause(container.id, paused=False)
        await world.wait("one", "READY")
        assert (await world.http.post(CHAT, json=ASK)).status_code == 200
        assert list(world.docker.containers) == [container.id]


async def test_an_engine_that_stays_paused_is_replaced_as_one_that_hangs(tmp_path: Path) -> None:
    settings = Deployments(restart_backoff_s=0.05, unhealthy_restart_s=0.0)
    async with World(tmp_path, deployments=settings) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (container,) = world.docker.containers.values()
        world.docker.pause(container.id)
        await world.wait("one", "PENDING")
        await world.wait("one", "READY")
        assert container.id not in world.docker.containers


async def test_a_container_on_its_way_out_is_said_to_be_removed(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (container,) = world.docker.containers.values()
        container.change(state="removing", port=None)
        world.docker._emit("die", container, 137)
        await world.wait("one", "PENDING", "its container is being removed.")
        await world.docker._remove(container.id)
        await world.wait("one", "READY")


async def test_logs_say_that_docker_is_away_and_not_that_there_is_no_container(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        world.docker.away = True
        await world.wait("one", "UNKNOWN")
        refused = await world.http.get(f"{MODELS}/deployments/one/logs")
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith(
            "The container of deployment 'default/one' cannot be reached: Docker"
        )

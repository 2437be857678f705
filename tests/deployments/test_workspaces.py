"""What the loop makes of workspaces that go and of aliases that come, in a whole daemon on a Docker in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.refs import Ref
from tests.support import eventually
from tests.world import IMAGE, MODELS, World

WORKSPACES = "/apis/entities/v2/workspaces"
THERE = MODELS.replace("default", "ws1")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path) as world:
        yield world


async def deploy_there(world: World) -> None:
    await world.post(WORKSPACES, {"name": "ws1"})
    repository, _, tag = IMAGE.rpartition(":")
    executor = {"gpu": 1, "image_name": repository, "image_tag": tag, "health_check_path": "/health"}
    config = {"name": "one", "engine": "generic", "model_spec": {}, "executor_config": executor}
    await world.post(f"{THERE}/deployment-configs", config)
    await world.post(f"{THERE}/deployments", {"name": "one", "config": "one"})

    async def ready() -> bool:
        return (await world.http.get(f"{THERE}/deployments/one")).json()["status"] == "READY"

    await eventually(ready)


@pytest.mark.fault(4)
@pytest.mark.parametrize("restarted", [False, True])
async def test_the_containers_of_a_deleted_workspace_go_and_then_its_rows(world: World, restarted: bool) -> None:
    await world.deploy("stays")
    await world.wait("stays", "READY")
    await deploy_there(world)
    assert len(world.docker.containers) == 2
    assert (await world.http.delete(f"{WORKSPACES}/ws1")).status_code == 200
    assert (await world.http.get(f"{WORKSPACES}/ws1")).status_code == 404
    if restarted:
        await world.restart()

    async def clean() -> bool:
        rows = [e for kind in ("deployments", "providers", "models") for e in await world.daemon.store.all(kind)]
        return len(world.docker.containers) == 1 and not [e for e in rows if e.workspace == "ws1"]

    await eventually(clean)
    assert (await world.wait("stays", "READY"))["status"] == "READY"


async def test_an_alias_leads_to_an_engine_as_soon_as_it_is_made_and_until_it_is_deleted(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    served = (await world.http.get(f"{MODELS}/deployments/one/models")).json()["models"]
    entity = served[0]["model_entity_id"]
    virtual = "/apis/inference-gateway/v2/workspaces/default/virtual-models"
    await world.post(virtual, {"name": "fast", "default_model_entity": entity})
    alias, gateway = Ref("default", "fast"), world.daemon.gateway

    def upstreams(ref: Ref) -> list[str]:
        return [target.route.upstream.base_url for target in gateway.table.models.get(ref, ())]

    await eventually(lambda: upstreams(alias))
    assert upstreams(alias) == upstreams(Ref(*entity.split("/")))
    listed = (await world.http.get(virtual)).json()["data"]
    assert {v["name"]: v["autoprovisioned"] for v in listed} == {"fast": False, entity.split("/")[1]: True}
    assert (await world.http.delete(f"{virtual}/fast")).status_code == 204
    await eventually(lambda: not upstreams(alias))

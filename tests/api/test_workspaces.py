"""Workspaces and projects, dry runs, and that a workspace takes along exactly what is in it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import FILESETS, MODELS, SECRETS, WORKSPACES, World

WS = f"{WORKSPACES}/ws1"
Json = dict[str, Any]


def inside(path: str) -> str:
    return path.replace("/default", "/ws1")


@pytest.fixture
async def full(world: World) -> World:
    """A workspace `ws1` with one of everything, and neighbours in `default`."""
    await world.make(WORKSPACES, name="ws1")
    await world.make(inside(SECRETS), name="key", value="x")
    await world.make(inside(FILESETS), name="ff")
    await world("PUT", f"{inside(FILESETS)}/ff/-/a.txt", content=b"x")
    models = inside(MODELS)
    await world.make(f"{models}/models", name="mm", fileset="ff")
    await world.make(f"{models}/adapters", name="ad", model="mm", fileset="ff", finetuning_type="lora")
    config = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}}
    await world.make(f"{models}/deployment-configs", name="cfg", model_entity_id="mm", **config)
    await world.make(f"{models}/deployments", name="dd", config="cfg")
    await world.make(f"{models}/providers", name="pp", host_url="http://x", api_key_secret_name="key")
    await world.make(f"{WORKSPACES}/ws1/projects", name="pro")
    await world.make(f"{MODELS}/models", name="mine")
    return world


def told(reply: Any) -> list[str]:
    assert reply.status_code == 200, reply.text
    assert reply.json()["dry_run"] is True
    return sorted(f"{e['kind']} {e['workspace'] or ''}/{e['name']}" for e in reply.json()["would_delete"])


async def left(world: World, workspace: str) -> list[str]:
    kinds = ("secrets", "filesets", "models", "adapters", "deployment-configs", "deployments", "providers", "projects")
    return sorted([f"{k} {e.name}" for k in kinds for e in await world.store.all(k) if e.workspace == workspace])


async def test_a_dry_run_says_what_a_workspace_would_take_along_and_takes_nothing(full: World) -> None:
    before = await left(full, "ws1")
    full.store.changed.clear()
    assert told(await full("DELETE", f"{WS}?dry_run=true")) == [
        "adapters ws1/ad", "deployment-configs ws1/cfg", "deployments ws1/dd", "filesets ws1/ff", "models ws1/mm",
        "projects ws1/pro", "providers ws1/dd", "providers ws1/pp", "secrets ws1/key", "workspaces /ws1",
    ]  # fmt: skip
    assert await left(full, "ws1") == before
    assert not full.store.changed.is_set()
    assert (await full("GET", WS)).status_code == 200
    assert (await full("GET", f"{inside(FILESETS)}/ff/-/a.txt")).content == b"x"


async def test_a_deleted_workspace_is_gone_at_once_and_its_deployments_end_as_deleted_ones_do(full: World) -> None:
    base = full.parts.files.directory("ws1", "ff")
    gone = await full("DELETE", WS)
    assert (gone.status_code, gone.json()["message"]) == (200, "Workspace marked for deletion")
    assert (await full("GET", WS)).json()["detail"] == "Workspace 'ws1' not found"
    assert (await full("GET", f"{inside(MODELS)}/models")).status_code == 404
    assert await left(full, "ws1") == ["deployments dd", "providers dd"]
    deployment = await full.store.get("deployments", "ws1", "dd")
    assert (deployment.wish.deleting, deployment.status.status) == (True, "DELETING")
    assert not base.exists()
    assert await left(full, "default") == ["models mine"]
    again = await full("POST", WORKSPACES, {"name": "ws1"})
    assert again.status_code == 201
    assert (await full("GET", f"{inside(MODELS)}/models")).json()["data"] == []


async def test_a_workspace_that_others_need_stays_whole_and_names_them(full: World) -> None:
    before = await left(full, "ws1")
    await full.make(f"{MODELS}/models", name="user", fileset="ws1/ff")
    for query in ("", "?dry_run=true"):
        reply = await full("DELETE", f"{WS}{query}")
        assert (reply.status_code, "model default/user" in reply.json()["detail"]) == (409, True)
    assert await left(full, "ws1") == before
    assert (await full.store.get("deployments", "ws1", "dd")).wish.deleting is False


async def test_adapters_elsewhere_go_with_the_models_of_a_workspace(full: World) -> None:
    await full.make(FILESETS, name="lora")
    await full("PUT", f"{FILESETS}/lora/-/f", content=b"x")
    body = {"name": "far", "model": "ws1/mm", "fileset": "lora", "finetuning_type": "lora"}
    await full.make(f"{MODELS}/adapters", **body)
    assert "adapters default/far" in told(await full("DELETE", f"{WS}?dry_run=true"))
    assert (await full("DELETE", WS)).status_code == 200
    assert await full.store.all("adapters") == []


@pytest.mark.parametrize("name", ["default", "system"])
async def test_the_two_that_always_exist_cannot_be_deleted(world: World, name: str) -> None:
    reply = await world("DELETE", f"{WORKSPACES}/{name}")
    assert (reply.status_code, "always exists" in reply.json()["detail"]) == (409, True)


async def test_projects_are_kept_and_updated(world: World) -> None:
    path = f"{WORKSPACES}/default/projects"
    made = await world.make(path, name="pro", description="d")
    assert set(made) == {"id", "name", "workspace", "description", "created_at", "updated_at"}
    assert (await world("PUT", f"{path}/pro", {"description": "e"})).json()["description"] == "e"
    assert [p["name"] for p in (await world("GET", f"{path}?sort=-name")).json()["data"]] == ["pro"]
    gone = await world("DELETE", f"{path}/pro")
    assert (gone.status_code, gone.json()["message"]) == (200, "Resource deleted successfully.")
    assert (await world("GET", f"{path}/pro")).status_code == 404


# --- dry runs ------------------------------------------------------------------------------------------------------


async def test_a_dry_create_answers_what_would_be_and_stores_nothing(world: World) -> None:
    await world.make_config()
    world.store.changed.clear()
    revision = world.store.revision
    reply = await world("POST", f"{MODELS}/deployments?dry_run=true", {"name": "dd", "config": "cfg"})
    assert (reply.status_code, reply.json()["status"], reply.json()["config_version"]) == (200, "CREATED", 1)
    assert await world.store.all("deployments") == await world.store.all("providers") == []
    assert (world.store.changed.is_set(), world.store.revision) == (False, revision)
    assert (await world("POST", f"{MODELS}/deployments", {"name": "dd", "config": "cfg"})).status_code == 201


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (f"{MODELS}/models", {"name": "mm", "fileset": "nope"}, 400),
        (f"{MODELS}/models", {"name": "mm", "nope": 1}, 422),
        (f"{MODELS}/models", {"name": "taken"}, 409),
        (FILESETS, {"name": "ff", "storage": {"type": "s3", "bucket": "b"}}, 400),
    ],
)
async def test_a_dry_create_refuses_what_a_create_would(world: World, path: str, body: Json, status: int) -> None:
    await world.make(f"{MODELS}/models", name="taken")
    assert (await world("POST", f"{path}?dry_run=true", body)).status_code == status


async def test_dry_updates_and_deletes_change_nothing(world: World) -> None:
    await world.make(f"{MODELS}/models", name="mm", description="d")
    await world.make(SECRETS, name="ss", value="x")
    await world.make(f"{MODELS}/providers", name="pp", host_url="http://x")
    shown = await world("PATCH", f"{MODELS}/models/mm?dry_run=1", {"description": "e"})
    assert (shown.status_code, shown.json()["description"]) == (200, "e")
    put = await world("PUT", f"{MODELS}/providers/pp?dry_run=yes", {"host_url": "http://y"})
    assert (put.status_code, put.json()["host_url"]) == (200, "http://y")
    assert told(await world("DELETE", f"{SECRETS}/ss?dry_run=true")) == ["secrets default/ss"]
    assert (await world("GET", f"{MODELS}/models/mm")).json()["description"] == "d"
    assert (await world("GET", f"{MODELS}/providers/pp")).json()["host_url"] == "http://x"
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "x"
    assert (await world("DELETE", f"{SECRETS}/ss?dry_run=perhaps")).status_code == 422


async def test_a_dry_fileset_leaves_the_files_of_another_alone(world: World) -> None:
    await world.make(FILESETS, name="ff")
    await world("PUT", f"{FILESETS}/ff/-/a.txt", content=b"x")
    assert (await world("POST", f"{FILESETS}?dry_run=true", {"name": "ff"})).status_code == 409
    assert told(await world("DELETE", f"{FILESETS}/ff?dry_run=true")) == ["filesets default/ff"]
    assert (await world("GET", f"{FILESETS}/ff/-/a.txt")).content == b"x"

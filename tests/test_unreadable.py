"""Rows that cannot be read fail alone: the daemon starts, the others are there, and the broken one can be deleted."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.entities import Model, ModelStatus
from nimhost.errors import HostError
from nimhost.store import Store
from tests.deployments.test_specs import files_of, tiny  # noqa: F401  (a fixture)
from tests.engines.make import spec
from tests.support import eventually
from tests.world import MODELS, World

FILESETS = "/apis/files/v2/workspaces/default/filesets"
WORKSPACES = "/apis/entities/v2/workspaces"
Json = dict[str, Any]


def damage(directory: Path, kind: str, name: str, column: str, text: str) -> None:
    with sqlite3.connect(directory / "nimhost.db") as db:
        changed = db.execute(f"UPDATE entities SET {column} = ? WHERE kind = ? AND name = ?", (text, kind, name))
        assert changed.rowcount == 1
    db.close()


async def test_what_could_not_be_read_again_is_not_stored(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "nimhost.db")
    async with store.transaction() as tx:
        model = await tx.insert("models", "default", "mm", Model())
    odd = ModelStatus(spec=replace(spec(), context_size=4096.0), spec_status="ready")
    with pytest.raises(HostError, match=r"Model 'default/mm' is not stored.*int.*spec.context_size"):
        await store.set_status(model, odd)
    with pytest.raises(HostError, match="is not stored"):
        async with store.transaction() as tx:
            await tx.insert("models", "default", "other", Model(description=5))  # type: ignore[arg-type]
    rows = await store.all("models")
    await store.close()
    assert [(row.name, row.status) for row in rows] == [("mm", ModelStatus())]


@pytest.mark.fault(38)
async def test_a_model_whose_spec_cannot_be_read_is_described_anew(tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    async with World(tmp_path) as world:
        await world.http.post(FILESETS, json={"name": "ff", "storage": {"type": "local", "path": str(tiny)}})
        made = await world.post(f"{MODELS}/models", {"name": "mm", "fileset": "ff"})
        await world.stop()
        odd = {"spec": {**made["spec"], "context_size": 4096.5}, "spec_status": "ready"}
        damage(tmp_path, "models", "mm", "status", json.dumps(odd))
        await world.start()

        async def described() -> bool:
            reply = await world.http.get(f"{MODELS}/models/mm")
            assert reply.status_code == 200
            return reply.json()["spec"] == made["spec"]

        await eventually(described, 20)


@pytest.mark.fault(38)
@pytest.mark.parametrize("text", ['{"spec": 5}', '{"spec": {"family": 1}}', "[" * 100_000])
async def test_a_wish_that_cannot_be_read_fails_alone_and_can_be_deleted(tmp_path: Path, text: str) -> None:
    async with World(tmp_path) as world:
        for name in ("one", "two"):
            await world.post(f"{MODELS}/models", {"name": name})
        await world.stop()
        damage(tmp_path, "models", "one", "wish", text)
        await world.start()
        listed = (await world.http.get(f"{MODELS}/models")).json()["data"]
        shown = {row["name"]: row.get("unreadable") for row in listed}
        problem = "It cannot be read: what is stored is no model. Delete it, and make it again."
        assert shown == {"one": problem, "two": None}
        assert set(listed[1]) <= set(listed[0])  # who reads them all finds all fields
        assert (await world.http.get(f"{MODELS}/models/two")).status_code == 200
        reply = await world.http.get(f"{MODELS}/models/one")
        assert (reply.status_code, reply.json()) == (
            500,
            {
                "detail": "Model 'default/one' cannot be read: what is stored is no model.",
                "hint": "Delete it, and make it again: nimhost models delete one --workspace default",
            },
        )
        tried = await world.http.delete(f"{MODELS}/models/one?dry_run=true")
        assert tried.json()["would_delete"] == [{"kind": "models", "workspace": "default", "name": "one"}]
        assert (await world.http.delete(f"{MODELS}/models/one")).status_code == 204
        await world.post(f"{MODELS}/models", {"name": "one"})


async def test_a_provider_that_cannot_be_read_is_shown_as_one_that_failed(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.post(f"{MODELS}/providers", {"name": "up", "host_url": "http://127.0.0.1:9/v1"})
        await world.stop()
        damage(tmp_path, "providers", "up", "wish", '{"host_url": 5}')
        await world.start()
        row = (await world.http.get(f"{MODELS}/providers")).json()["data"][0]
        assert (row["status"], row["host_url"], row["served_models"]) == ("ERROR", "", [])
        assert row["status_message"].startswith("It cannot be read: what is stored is no model provider.")


async def test_a_workspace_takes_what_cannot_be_read_along(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.post(WORKSPACES, {"name": "ws"})
        await world.post("/apis/models/v2/workspaces/ws/models", {"name": "one"})
        await world.stop()
        damage(tmp_path, "models", "one", "wish", "[]")
        await world.start()
        assert (await world.http.delete(f"{WORKSPACES}/ws")).status_code == 200
        with sqlite3.connect(tmp_path / "nimhost.db") as db:
            assert db.execute("SELECT count(*) FROM entities WHERE workspace = 'ws'").fetchone() == (0,)
        db.close()


@pytest.mark.fault(4)
@pytest.mark.fault(38)
async def test_the_engine_of_a_deployment_that_cannot_be_read_runs_until_that_is_deleted(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        for name in ("one", "two"):
            await world.deploy(name)
            await world.wait(name, "READY")
        await world.stop()
        damage(tmp_path, "deployments", "one", "wish", '{"config": 5}')
        await world.start()
        await world.wait("two", "READY")
        await world.http.post(f"{MODELS}/deployments/two/stop")  # several rounds of the reconciler
        await world.wait("two", "PENDING", "Stopped")
        assert len(world.engines) == 1
        assert (await world.http.delete(f"{MODELS}/deployments/one")).status_code == 202
        await eventually(lambda: not world.engines, 20)

"""Secrets beside plain CRUD: access, the NGC key of the environment, and rotation of the key that survives anything."""

from __future__ import annotations

import asyncio
import base64
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nimhost.api.rotation import rotate, sealed_in, sealed_rows
from nimhost.entities import ApiEndpoint, Model, Secret
from nimhost.errors import HostError, StartError
from nimhost.host.vault import Vault
from nimhost.store import Store
from tests.api.conftest import MODELS, SECRETS, World, open_world

SYSTEM = SECRETS.replace("default", "system")
NGC = f"{SYSTEM}/ngc-api-key"
ROTATE = "/apis/secrets/v2/rotate-encryption-keys"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NGC_API_KEY", raising=False)


async def test_a_value_is_shown_by_access_only_without_the_newline_of_a_shell(world: World) -> None:
    made = await world.make(SECRETS, name="ss", value="canary\r\n")
    assert set(made) == {"name", "workspace", "description", "created_at", "updated_at"}
    access = await world("GET", f"{SECRETS}/ss/access")
    assert access.json() == {"name": "ss", "workspace": "default", "value": "canary"}
    assert access.headers["cache-control"] == "no-store"
    await world("PATCH", f"{SECRETS}/ss", {"description": "d"})
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "canary"
    await world("PATCH", f"{SECRETS}/ss", {"value": "other"})
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "other"


# --- the NGC key of the environment --------------------------------------------------------------------------------


async def test_without_a_key_in_the_environment_the_secret_is_just_not_there(world: World) -> None:
    assert (await world("GET", NGC)).status_code == 404
    assert (await world("GET", SYSTEM)).json()["data"] == []
    reply = await world("PUT", f"{MODELS.replace('default', 'system')}/providers/nv",
                        {"host_url": "http://x", "api_key_secret_name": "ngc-api-key"})  # fmt: skip
    assert reply.json()["detail"] == "Secret 'ngc-api-key' not found in workspace 'system'"


async def test_the_key_of_the_environment_is_a_secret_that_is_read_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGC_API_KEY", "nvapi-env")
    shown = await world("GET", NGC)
    assert (shown.status_code, shown.json()["name"], "nvapi-env" in shown.text) == (200, "ngc-api-key", False)
    assert (await world("GET", f"{NGC}/access")).json()["value"] == "nvapi-env"
    for method, body in (("PATCH", {"value": "x"}), ("PATCH", {"description": "x"}), ("DELETE", None)):
        refused = await world(method, NGC, body)
        assert (refused.status_code, "NGC_API_KEY" in refused.json()["detail"]) == (403, True)
    assert (await world("GET", f"{SECRETS}/ngc-api-key")).status_code == 404
    made = await world("PUT", f"{MODELS.replace('default', 'system')}/providers/nv",
                       {"host_url": "http://x", "api_key_secret_name": "ngc-api-key"})  # fmt: skip
    assert made.status_code == 200


async def test_it_comes_last_on_the_last_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "nvapi-env")
    for name in ("s1", "s2"):
        await world.make(SYSTEM, name=name, value="x")

    async def page(number: int, size: int = 2, path: str = SYSTEM) -> tuple[list[str], int, int]:
        body = (await world("GET", f"{path}?page={number}&page_size={size}")).json()
        paging = body["pagination"]
        return [s["name"] for s in body["data"]], paging["total_results"], paging["total_pages"]

    assert await page(1) == (["s1", "s2"], 3, 2)
    assert await page(2) == (["ngc-api-key"], 3, 2)
    assert await page(3) == ([], 3, 2)
    assert await page(1, 3) == (["s1", "s2", "ngc-api-key"], 3, 1)
    assert (await page(1, 10, SECRETS.replace("default", "-")))[0] == ["s1", "s2", "ngc-api-key"]
    assert (await page(1, 10, SECRETS))[0] == []


async def test_a_stored_one_wins_and_gives_way_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "nvapi-env")
    await world.make(SYSTEM, name="ngc-api-key", value="nvapi-mine")
    assert (await world("GET", f"{NGC}/access")).json()["value"] == "nvapi-mine"
    assert len((await world("GET", SYSTEM)).json()["data"]) == 1
    assert (await world("DELETE", NGC)).status_code == 204
    assert (await world("GET", f"{NGC}/access")).json()["value"] == "nvapi-env"


# --- rotation ------------------------------------------------------------------------------------------------------


async def key_of(world: World, model: str) -> str:
    row = await world.store.get("models", "default", model)
    return world.parts.vault.open(row.wish.api_endpoint.api_key, f"default/{model}#api_endpoint")


async def test_rotation_wraps_everything_anew_and_what_was_there_still_opens(world: World, tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        await world.make(SECRETS, name=name, value=f"value of {name}")
    made = await world.make(f"{MODELS}/models", name="mm", api_endpoint={"url": "http://x", "api_key": "canary"})
    assert made["api_endpoint"] == {"url": "http://x", "model_id": None, "api_key": None, "format": None}
    before = {row.ref: sealed_in(row)[0] for row in await sealed_rows(world.store)}
    key = (tmp_path / "key").read_bytes()
    shown = (await world("GET", f"{SECRETS}/s1")).json()
    reply = await world("POST", ROTATE)
    assert (reply.status_code, reply.json()) == (202, {"rotated_secrets": 3, "success": True})
    assert (tmp_path / "key").read_bytes() != key
    assert {p.name for p in tmp_path.iterdir() if "key" in p.name} == {"key"}
    for row in await sealed_rows(world.store):
        old, new = before[row.ref].split("."), sealed_in(row)[0].split(".")
        assert (old[1] == new[1], old[2] == new[2]) == (False, True)
    assert (await world("GET", f"{SECRETS}/s1/access")).json()["value"] == "value of s1"
    assert await key_of(world, "mm") == "canary"
    assert world.parts.vault.open(before["default/s2"], "default/s2") == "value of s2"
    assert (await world("GET", f"{SECRETS}/s1")).json() == shown
    sealed = [sealed_in(row) for row in await sealed_rows(world.store)]
    fresh = Vault.load(tmp_path / "key", sealed)
    assert [fresh.open(*one) for one in sealed] == ["value of s1", "value of s2", "canary"]


async def test_secrets_that_are_written_during_rotations_open_afterwards(world: World, tmp_path: Path) -> None:
    async def write(number: int) -> None:
        await world.make(SECRETS, name=f"s{number}", value=f"v{number}")

    async with world.store.transaction():  # all of them queue up behind this, in turns
        work = []
        for number in range(20):
            work += [asyncio.ensure_future(world("POST", ROTATE)), asyncio.ensure_future(write(number))]
            await asyncio.sleep(0.01)
    await asyncio.gather(*work)
    fresh = Vault.load(tmp_path / "key")
    for row in await world.store.all("secrets"):
        assert fresh.open(row.wish.value, row.ref) == f"v{row.name[1:]}"


async def test_a_secret_that_does_not_open_stops_the_rotation_and_is_named(world: World, tmp_path: Path) -> None:
    await world.make(SECRETS, name="good", value="x")
    await world.make(SECRETS, name="bad", value="x")
    async with world.store.transaction() as tx:
        bad = await tx.get("secrets", "default", "bad")
        await tx.rewrite_wish(bad, Secret(value="v1.AAAA.AAAA"))
    before, key = await world.store.all("secrets"), (tmp_path / "key").read_bytes()
    reply = await world("POST", ROTATE)
    assert (reply.status_code, "default/bad" in reply.json()["detail"]) == (500, True)
    assert await world.store.all("secrets") == before
    assert (tmp_path / "key").read_bytes() == key
    await world("DELETE", f"{SECRETS}/bad")
    assert (await world("POST", ROTATE)).json()["rotated_secrets"] == 1


async def test_a_commit_that_fails_leaves_the_old_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.make(SECRETS, name="ss", value="x")

    async def fail() -> None:
        raise sqlite3.OperationalError("no")

    with monkeypatch.context() as broken:
        broken.setattr(world.store._db, "commit", fail)
        assert (await world("POST", ROTATE)).status_code == 500
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "x"
    await world.make(SECRETS, name="s2", value="y")
    assert (await world("POST", ROTATE)).json()["rotated_secrets"] == 2
    assert (await world("GET", f"{SECRETS}/s2/access")).json()["value"] == "y"


KEY = base64.b64encode(b"k" * 32).decode()


async def test_a_key_of_the_environment_needs_no_file_and_cannot_be_rotated_here(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path / "key", (), KEY)
    sealed = vault.seal("x", "default/ss")
    assert not (tmp_path / "key").exists()
    assert Vault.load(tmp_path / "key", [(sealed, "default/ss")], KEY).open(sealed, "default/ss") == "x"
    async with open_world(tmp_path, vault=vault) as world:
        await world.make(SECRETS, name="ss", value="x")
        reply = await world("POST", ROTATE)
        assert (reply.status_code, "NIMHOST_ENCRYPTION_KEY" in reply.json()["detail"]) == (409, True)
        assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "x"


@pytest.mark.parametrize("key", ["", "short", base64.b64encode(b"x" * 31).decode(), "ключ"])
def test_a_malformed_key_of_the_environment_stops_the_start_and_is_not_repeated(tmp_path: Path, key: str) -> None:
    with pytest.raises(StartError, match="NIMHOST_ENCRYPTION_KEY does not hold a key") as caught:
        Vault.load(tmp_path / "key", (), key)
    assert not key or key not in str(caught.value)


def test_another_key_of_the_environment_stops_the_start(tmp_path: Path) -> None:
    sealed = Vault.load(tmp_path / "key").seal("x", "default/ss")
    with pytest.raises(StartError, match="The key in NIMHOST_ENCRYPTION_KEY does not open the secrets"):
        Vault.load(tmp_path / "key", [(sealed, "default/ss")], KEY)


ROTATION = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from nimhost.api.rotation import rotate, sealed_in, sealed_rows
    from nimhost.host.vault import Vault
    from nimhost.store import Store

    directory, point = Path(sys.argv[1]), int(sys.argv[2])
    step = 0

    def at(event, args):
        global step
        if event in ("open", "os.rename", "os.link", "os.remove") and "key" in str(args[0]):
            count()

    def count():
        global step
        step += 1
        if step == point:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        store = await Store.open(directory / "db")
        vault = Vault.load(directory / "key", [sealed_in(row) for row in await sealed_rows(store)])
        execute, commit, adopt = store._db.execute, store._db.commit, vault.adopt_next_key

        async def counting(sql, *params):
            if sql.startswith("UPDATE"):
                count()
            return await execute(sql, *params)

        async def committing():
            count()
            await commit()
            count()

        store._db.execute, store._db.commit = counting, committing
        sys.addaudithook(at)
        await rotate(store, vault)
        count()
        print("rotated", flush=True)
        os._exit(0)

    asyncio.run(main())
"""


@pytest.mark.fault(20)
async def test_a_rotation_killed_between_any_two_steps_loses_nothing(tmp_path: Path) -> None:
    """Each point is tried on the files that the one before left, so that half-done rotations follow each other."""
    store = await Store.open(tmp_path / "db")
    vault = Vault.load(tmp_path / "key")
    async with store.transaction() as tx:
        for name in ("s1", "s2"):
            await tx.insert("secrets", "default", name, Secret(value=vault.seal(f"value of {name}", f"default/{name}")))
        endpoint = ApiEndpoint(api_key=vault.seal("canary", "default/mm#api_endpoint"))
        await tx.insert("models", "default", "mm", Model(api_endpoint=endpoint))
    await store.close()
    outcomes, point = set(), 0
    while True:
        point += 1
        command = [sys.executable, "-c", textwrap.dedent(ROTATION), str(tmp_path), str(point)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        outcomes.add((tmp_path / "key.new").exists())
        store = await Store.open(tmp_path / "db")
        sealed = [sealed_in(row) for row in await sealed_rows(store)]
        await store.close()
        fresh = Vault.load(tmp_path / "key", sealed)
        assert [fresh.open(*one) for one in sealed] == ["value of s1", "value of s2", "canary"], point
        assert not (tmp_path / "key.new").exists()
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
        if done.returncode == 0:
            break
    assert point >= 8
    assert outcomes == {True, False}


@pytest.mark.parametrize("then", ["a start", "a rotation", "a rotation that is cut off"])
async def test_a_new_key_that_cannot_be_moved_is_in_use_and_found_by_the_next_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    await world.make(SECRETS, name="ss", value="x")

    def fail(path: Path) -> None:
        raise HostError("cannot be moved")

    with monkeypatch.context() as broken:
        broken.setattr("nimhost.host.vault._move_next", fail)
        with pytest.raises(HostError, match="cannot be moved"):
            await rotate(world.store, world.parts.vault)
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "x"
    await world.make(SECRETS, name="s2", value="y")
    assert (tmp_path / "key.new").exists()
    if then == "a rotation":
        await rotate(world.store, world.parts.vault)
    elif then != "a start":
        world.parts.vault.write_next_key()
    sealed = [sealed_in(row) for row in await sealed_rows(world.store)]
    fresh = Vault.load(tmp_path / "key", sealed)
    assert [fresh.open(*one) for one in sealed] == ["x", "y"]

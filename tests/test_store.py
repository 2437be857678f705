"""The store: whole or not at all, one winner, no late status over a newer wish, and honest about a bad file."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiosqlite import Connection

import nimhost.store.schema as schema
from nimhost.entities import Adapter, Deployment, DeploymentStatus, Entity, Model, Provider, ProviderStatus, Secret
from nimhost.errors import AlreadyExists, Conflict, DiskFull, NotFound, NotReady, StartError
from nimhost.filters import parse_filter
from nimhost.kinds import KINDS
from nimhost.store import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "nimhost.db")
    yield opened
    await opened.close()


async def add_provider(store: Store, name: str = "p", **more: Any) -> Entity:
    async with store.transaction() as tx:
        return await tx.insert("providers", "default", name, Provider(host_url="http://x", **more))


# --- opening -------------------------------------------------------------------------------------------------------


async def test_a_new_store_has_its_two_workspaces_and_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "nimhost.db"
    store = await Store.open(path)
    await add_provider(store)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    names = [e.name for e in await store.all("workspaces")]
    await store.close()
    assert names == ["system", "default"]
    assert modes == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_what_was_stored_is_there_after_a_restart_with_the_same_owner(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "nimhost.db")
    before = await add_provider(store)
    await store.close()
    again = await Store.open(tmp_path / "nimhost.db")
    assert await again.get("providers", "default", "p") == before
    assert again.owner == store.owner
    assert len(await again.all("workspaces")) == 2
    await again.close()


def plant(path: Path, sql: str) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(sql)
    db.close()


async def make(path: Path) -> None:
    store = await Store.open(path)
    for number in range(200):
        await add_provider(store, f"p{number}", description="x" * 500)
    await store.close()


@pytest.mark.fault(38)
async def test_a_database_from_the_future_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "nimhost.db"
    await make(path)
    plant(path, "PRAGMA user_version = 99")
    with pytest.raises(StartError, match=r"written by a newer nimhost \(schema 99") as caught:
        await Store.open(path)
    assert "--data-dir" in (caught.value.hint or "")


@pytest.mark.fault(38)
@pytest.mark.parametrize("damage", ["garbage", "page", "cut", "empty"])
async def test_a_damaged_database_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "nimhost.db"
    await make(path)
    whole = path.read_bytes()
    broken = {
        "garbage": b"not a database at all" * 300,
        "page": whole[:-8192] + b"\xff" * 8192,
        "cut": whole[: len(whole) // 2],
        "empty": b"",
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(StartError) as caught:
        await Store.open(path)
    assert str(path) in caught.value.message
    assert "backup" in (caught.value.hint or "")
    assert path.read_bytes() == broken


@pytest.mark.fault(38)
async def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nimhost.db"
    plant(path, "CREATE TABLE theirs (x)")
    with pytest.raises(StartError, match="is not a database of nimhost"):
        await Store.open(path)


@pytest.mark.fault(38)
async def test_a_database_locked_by_another_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nimhost.db"
    await make(path)
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_S", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StartError, match="is locked by another program"):
        await Store.open(path)
    other.rollback()
    other.close()
    await (await Store.open(path)).close()


@pytest.mark.fault(38)
async def test_a_data_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be opened"):
        await Store.open(tmp_path / "file" / "nimhost.db")


@pytest.mark.fault(38)
async def test_a_full_disk_refuses_the_write_changes_nothing_and_the_store_goes_on(store: Store) -> None:
    await add_provider(store, "before")
    store.changed.clear()
    pages = next(iter(await store._db.execute_fetchall("PRAGMA page_count")))[0]
    await store._db.execute_fetchall(f"PRAGMA max_page_count = {pages}")

    async def fill() -> None:
        async with store.transaction() as tx:
            for number in range(100):
                await tx.insert("models", "default", f"m{number}", Model(description="x" * 900))

    with pytest.raises(DiskFull, match="nothing was changed"):
        await fill()
    assert await store.all("models") == []
    assert not store.changed.is_set()
    await store._db.execute_fetchall("PRAGMA max_page_count = 100000")
    await add_provider(store, "after")
    assert [e.name for e in await store.all("providers")] == ["before", "after"]


@pytest.mark.fault(38)
async def test_a_lock_held_by_somebody_else_is_not_ready_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_S", 0.05)
    store = await Store.open(tmp_path / "nimhost.db")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotReady, match="locked by another program"):
        await add_provider(store)
    other.rollback()
    other.close()
    await add_provider(store)
    await store.close()


async def test_a_migration_is_applied_once_and_a_failing_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nimhost.db"
    await make(path)
    applied = []

    async def second(db: Connection) -> None:
        await db.execute("CREATE TABLE more (x)")
        applied.append(2)

    async def third(db: Connection) -> None:
        await db.execute("CREATE TABLE yet_more (x)")
        raise sqlite3.OperationalError("no")

    first = list(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", [*first, second])
    for _ in range(2):
        await (await Store.open(path)).close()
    assert applied == [2]
    monkeypatch.setattr(schema, "MIGRATIONS", [*first, second, third])
    with pytest.raises(StartError):
        await Store.open(path)
    monkeypatch.setattr(schema, "MIGRATIONS", [*first, second])
    store = await Store.open(path)
    tables = await store._db.execute_fetchall("SELECT name FROM sqlite_master WHERE name LIKE '%more'")
    await store.close()
    assert [row[0] for row in tables] == ["more"]


# --- writing -------------------------------------------------------------------------------------------------------


async def test_of_many_who_create_one_name_exactly_one_wins(store: Store) -> None:
    results = await asyncio.gather(*(add_provider(store) for _ in range(20)), return_exceptions=True)
    losers = [r for r in results if isinstance(r, AlreadyExists)]
    assert len(losers) == 19
    assert str(losers[0]) == "Model provider with workspace 'default' and name 'p' already exists"
    assert len(await store.all("providers")) == 1


async def test_a_transaction_that_raises_leaves_nothing_and_wakes_nobody(store: Store) -> None:
    store.changed.clear()
    before = store.revision

    async def fail() -> None:
        async with store.transaction() as tx:
            await tx.insert("providers", "default", "p", Provider(host_url="http://x"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert await store.find("providers", "default", "p") is None
    assert not store.changed.is_set()
    assert store.revision == before


async def test_a_reader_sees_a_transaction_only_when_it_is_whole(store: Store) -> None:
    async with store.transaction() as tx:
        await tx.insert("providers", "default", "p", Provider(host_url="http://x"))
        assert await tx.find("providers", "default", "p")
        assert await store.find("providers", "default", "p") is None
        assert (await store.page("providers", "default"))[1] == 0
        assert not store.changed.is_set()
    assert await store.find("providers", "default", "p")
    assert store.changed.is_set()


async def test_a_cancelled_transaction_is_undone_and_the_next_one_works(store: Store) -> None:
    written = asyncio.Event()

    async def hang() -> None:
        async with store.transaction() as tx:
            await tx.insert("providers", "default", "p", Provider(host_url="http://x"))
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.find("providers", "default", "p") is None
    await add_provider(store)


async def test_a_task_cancelled_while_it_commits_has_committed_and_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    committing, go_on = asyncio.Event(), asyncio.Event()
    commit = store._db.commit

    async def slow_commit() -> None:
        committing.set()
        await go_on.wait()
        await commit()

    store.changed.clear()
    monkeypatch.setattr(store._db, "commit", slow_commit)
    task = asyncio.create_task(add_provider(store))
    await committing.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.find("providers", "default", "p")
    assert store.changed.is_set()
    await add_provider(store, "next")


async def test_a_status_for_an_older_wish_is_not_written(store: Store) -> None:
    old = await add_provider(store)
    async with store.transaction() as tx:
        new = await tx.update_wish(old, Provider(host_url="http://y"))
    assert await store.set_status(old, ProviderStatus(status="READY")) is False
    assert (await store.get("providers", "default", "p")).status.status == "CREATED"
    assert await store.set_status(new, ProviderStatus(status="READY")) is True
    assert (await store.get("providers", "default", "p")).status.status == "READY"


async def test_a_status_for_a_deleted_entity_does_not_bring_it_back(store: Store) -> None:
    entity = await add_provider(store)
    async with store.transaction() as tx:
        await tx.delete(entity)
    assert await store.set_status(entity, ProviderStatus(status="READY")) is False
    assert await store.find("providers", "default", "p") is None


async def test_a_status_wakes_who_watches_statuses_and_not_the_reconciler(store: Store) -> None:
    entity = await add_provider(store)
    store.changed.clear()
    seen = store.revision
    waiting = asyncio.create_task(store.wait_change(seen))
    await asyncio.sleep(0)
    assert not waiting.done()
    await store.set_status(entity, ProviderStatus(status="READY"))
    assert await asyncio.wait_for(waiting, 2) == seen + 1
    assert not store.changed.is_set()
    assert await store.wait_change(seen) == seen + 1


async def test_two_who_change_one_wish_do_not_overwrite_each_other(store: Store) -> None:
    entity = await add_provider(store)
    async with store.transaction() as tx:
        await tx.update_wish(entity, Provider(host_url="http://first"))
    with pytest.raises(Conflict, match="changed by somebody else"):
        async with store.transaction() as tx:
            await tx.update_wish(entity, Provider(host_url="http://second"))
    assert (await store.get("providers", "default", "p")).wish.host_url == "http://first"


async def test_versions_are_kept_newest_first_and_go_with_the_entity(store: Store) -> None:
    async with store.transaction() as tx:
        first = await tx.insert("deployments", "default", "d", Deployment(config="a"))
        second = await tx.update_wish(first, Deployment(config="b"), new_version=True)
        await tx.update_wish(second, Deployment(config="b", desired="stopped"))
    rows = await store.versions("deployments", "default", "d")
    assert [(r.version, r.wish.config, r.wish.desired) for r in rows] == [(2, "b", "stopped"), (1, "a", "running")]
    assert (await store.version("deployments", "default", "d", 1)).wish.config == "a"
    assert await store.current_versions("deployments", [("default", "d"), ("default", "x")]) == {("default", "d"): 2}
    with pytest.raises(NotFound, match="has no version 3"):
        await store.version("deployments", "default", "d", 3)
    async with store.transaction() as tx:
        await tx.delete(await tx.get("deployments", "default", "d"))
    left = await store._db.execute_fetchall("SELECT count(*) FROM versions")
    assert list(left) == [(0,)]


async def test_history_ends_with_the_status_and_does_not_repeat_or_grow_without_end() -> None:
    status = DeploymentStatus()
    for number in range(150):
        status = status.moved("PENDING", f"step {number // 2}", f"t{number}")
    assert (status.status_history[-1].status, status.status_history[-1].status_message) == ("PENDING", "step 74")
    assert len(status.status_history) == 75
    for number in range(150):
        status = status.moved("PENDING", f"more {number}", "t")
    assert len(status.status_history) == 100


async def test_of_an_adapter_the_loser_is_told_its_model(store: Store) -> None:
    wish = Adapter(model="default/base", fileset="default/lora", finetuning_type="lora")

    async def add() -> None:
        async with store.transaction() as tx:
            await tx.insert("adapters", "default", "ad", wish)

    results = await asyncio.gather(*(add() for _ in range(10)), return_exceptions=True)
    losers = [str(r) for r in results if isinstance(r, AlreadyExists)]
    assert losers == ["Model adapter already exists: default/base/ad"] * 9
    assert len(await store.adapters_of(["default/base", "default/other"])) == 1


async def test_a_transaction_that_is_not_kept_is_undone_and_tells_nobody(store: Store) -> None:
    store.changed.clear()
    revision = store.revision
    async with store.transaction(keep=False) as tx:
        await tx.insert("models", "default", "mm", Model())
        tx.after = pytest.fail
        assert await tx.find("models", "default", "mm")
    assert await store.find("models", "default", "mm") is None
    assert (store.changed.is_set(), store.revision) == (False, revision)


# --- pages ---------------------------------------------------------------------------------------------------------


async def test_pages_filters_and_sorts(store: Store) -> None:
    for name in ("alpha", "beta", "gamma", "delta"):
        entity = await add_provider(store, name, project=None if name == "beta" else "Main")
        await store.set_status(entity, ProviderStatus(status="READY" if name < "c" else "ERROR"))

    async def names(query: str, sort: str = "name", page: int = 1, page_size: int = 10) -> tuple[list[str], int]:
        pairs = [tuple(part.split("=", 1)) for part in query.split("&") if part]
        filter, _ = parse_filter(pairs, KINDS["providers"])  # type: ignore[arg-type]
        rows, total = await store.page("providers", "default", filter=filter, sort=sort, page=page, page_size=page_size)
        return [row.name for row in rows], total

    assert await names("", page=2, page_size=3) == (["gamma"], 4)
    assert await names("", page=9) == ([], 4)
    assert await names("", sort="-created_at") == (["delta", "gamma", "beta", "alpha"], 4)
    assert await names("", sort="-status") == (["beta", "alpha", "delta", "gamma"], 4)
    assert await names("filter[status]=READY") == (["alpha", "beta"], 2)
    assert await names("filter[name][$like]=TA") == (["beta", "delta"], 2)
    assert await names("filter[name][in]=alpha,gamma") == (["alpha", "gamma"], 2)
    assert await names('filter={"project":null}') == (["beta"], 1)
    assert await names('filter={"project":{"$exists":true},"status":"ERROR"}') == (["delta", "gamma"], 2)
    assert await names('filter={"$or":[{"name":"alpha"},{"$not":{"status":"READY"}}]}') == (
        ["alpha", "delta", "gamma"],
        3,
    )
    assert await names("filter[name]=a' OR 1=1 --") == ([], 0)


# --- crashes -------------------------------------------------------------------------------------------------------

WRITER = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from nimhost.api.deploy import insert_deployment
    from nimhost.entities import *
    from nimhost.store import Store
    from nimhost.store.rows import Transaction

    point = int(sys.argv[2])
    statements = 0

    async def main():
        store = await Store.open(Path(sys.argv[1]))
        execute = store._db.execute

        async def counting(sql, *params):
            global statements
            if not sql.startswith(("SELECT", "BEGIN")):
                statements += 1
                if statements == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return await execute(sql, *params)

        async with store.transaction() as tx:
            model = DeployModelSpec()
            config = DeploymentConfig(engine="nim", model_spec=model, executor_config=ExecutorConfig(gpu=0))
            await tx.insert("deployment-configs", "default", "cfg", config)
        store._db.execute = counting
        print("ready", flush=True)
        async with store.transaction() as tx:
            await insert_deployment(tx, "default", "d", Deployment(config="cfg"))
            if point == 99:
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


def run_until_killed(command: list[str]) -> str:
    """What it printed before it killed itself."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def run_and_kill(command: list[str], after: str) -> int:
    """How many lines it printed until the kill -9 that followed the line `after`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        lines = 0
        for line in child.stdout:
            lines += 1
            if line == after:
                os.kill(child.pid, signal.SIGKILL)
    return lines


@pytest.mark.fault(20)
@pytest.mark.parametrize("point", [1, 2, 3, 99, 100])
async def test_killed_between_any_two_statements_leaves_a_whole_deployment_or_none(tmp_path: Path, point: int) -> None:
    path = tmp_path / "nimhost.db"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(point)]
    assert run_until_killed(command) == "ready\n"
    store = await Store.open(path)
    rows = [len(await store.all(kind)) for kind in ("deployment-configs", "deployments", "providers")]
    versions = await store._db.execute_fetchall("SELECT count(*) FROM versions")
    await store.close()
    assert rows == ([1, 1, 1] if point == 100 else [1, 0, 0])
    assert list(versions) == [(2 if point == 100 else 1,)]


WRITERS = """
    import asyncio, os, shutil, signal, sys
    from pathlib import Path
    from tests.api.conftest import FILESETS, MODELS, WORKSPACES, open_world

    directory, what = Path(sys.argv[1]), sys.argv[2]
    statements = 0
    STEPS = {
        "adapter": ("POST", f"{MODELS}/models/base/adapters",
                    {"name": "new", "fileset": "lora", "finetuning_type": "lora"}),
        "alias": ("PATCH", "/apis/inference-gateway/v2/workspaces/default/virtual-models/fast",
                  {"default_model_entity": "other"}),
        "version": ("POST", f"{MODELS}/deployments/dd", {"config": "cfg", "config_version": 1}),
        "model": ("DELETE", f"{MODELS}/models/base", None),
        "provider": ("DELETE", f"{MODELS}/providers/pp", None),
        "workspace": ("DELETE", f"{WORKSPACES}/ws1", None),
    }

    async def prepare(world):
        await world.make(WORKSPACES, name="ws1")
        for ws in ("default", "ws1"):
            models = MODELS.replace("default", ws)
            await world.make(FILESETS.replace("default", ws), name="lora")
            await world("PUT", f"{FILESETS.replace('default', ws)}/lora/-/f", content=b"x")
            await world.make(f"{models}/models", name="base", model_providers=[f"{ws}/pp"])
            for name in ("a1", "a2"):
                body = {"name": name, "model": f"{ws}/base", "fileset": "lora", "finetuning_type": "lora"}
                await world.make(f"{models}/adapters", **body)
            config = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}}
            await world.make(f"{models}/deployment-configs", name="cfg", **config)
            await world.make(f"{models}/deployments", name="dd", config="cfg")
            await world.make(f"{models}/providers", name="pp", host_url="http://x")
        await world.make("/apis/inference-gateway/v2/workspaces/default/virtual-models", name="fast")

    async def main(where, point):
        async with open_world(where) as world:
            if not point:
                return await prepare(world)
            db = world.store._db
            execute, commit = db.execute, db.commit

            def count():
                global statements
                statements += 1
                if statements == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            async def counting(sql, *params):
                if not sql.startswith(("SELECT", "BEGIN")):
                    count()
                return await execute(sql, *params)

            async def committing():
                count()
                await commit()
                count()

            db.execute, db.commit = counting, committing
            method, path, body = STEPS[what]
            reply = await world(method, path, body)
            assert reply.is_success, reply.text

    def run(where, point):
        "In a process of its own, which costs no imports."
        pid = os.fork()
        if not pid:
            asyncio.run(main(where, point))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status

    start, point = directory / "0", 0
    run(start, 0)
    while True:
        point += 1
        copy = directory / str(point)
        shutil.copytree(start, copy)
        if not run(copy, point):
            break
"""


def everything(path: Path) -> dict[str, tuple[str, ...]]:
    """Every row, without what differs from run to run: ids and times."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT kind, workspace, name, version, wish, json_extract(status, '$.status') FROM entities")
        versions = db.execute(
            "SELECT e.kind, e.workspace, e.name, v.version, v.wish FROM versions v"
            " LEFT JOIN entities e ON e.id = v.entity_id"
        )
        found = {"rows": tuple(sorted(map(str, rows))), "versions": tuple(sorted(map(str, versions)))}
    db.close()
    return found


@pytest.mark.fault(20)
@pytest.mark.parametrize("what", ["adapter", "alias", "version", "model", "provider", "workspace"])
def test_killed_between_any_two_statements_of_a_write_nothing_or_all_of_it_is_there(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITERS), str(tmp_path), what]
    subprocess.run(command, check=True, timeout=120)
    points = sorted(int(path.name) for path in tmp_path.iterdir())
    before, *seen = [everything(tmp_path / str(point) / "nimhost.db") for point in points]
    after = seen[-1]
    assert before != after
    assert len(seen) > 3
    assert seen == [before] * (len(seen) - 2) + [after] * 2  # only the last kill comes after the commit


@pytest.mark.fault(20)
async def test_killed_while_the_database_is_made_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "nimhost.db"
    program = """
        import asyncio, os, signal, sys
        from pathlib import Path
        import nimhost.store.schema as schema
        from nimhost.store import Store

        async def dies(db):
            await schema._create_tables(db)
            os.kill(os.getpid(), signal.SIGKILL)

        schema.MIGRATIONS[:] = [dies]
        asyncio.run(Store.open(Path(sys.argv[1])))
    """
    run_until_killed([sys.executable, "-c", textwrap.dedent(program), str(path)])
    assert not path.exists()
    store = await Store.open(path)
    assert len(await store.all("workspaces")) == 2
    await store.close()
    assert {p.name for p in tmp_path.iterdir()} == {"nimhost.db"}


@pytest.mark.fault(38)
async def test_the_log_of_a_database_that_was_moved_away_becomes_no_part_of_a_new_one(tmp_path: Path) -> None:
    """A killed daemon leaves its last writes beside the database: they would be put into whatever is there next."""
    path, away = tmp_path / "nimhost.db", tmp_path / "away"
    program = """
        import asyncio, os, signal, sys
        from pathlib import Path
        from nimhost.entities import Provider
        from nimhost.store import Store

        async def dies():
            store = await Store.open(Path(sys.argv[1]))
            for number in range(300):
                async with store.transaction() as tx:
                    await tx.insert("providers", "default", f"p{number}", Provider(host_url="x" * 500))
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(dies())
    """
    run_until_killed([sys.executable, "-c", textwrap.dedent(program), str(path)])
    away.mkdir()
    path.rename(away / path.name)
    left = {file.name: file.read_bytes() for file in tmp_path.glob("nimhost.db-wal")}
    with pytest.raises(StartError, match="belongs to a database that is not there any more") as caught:
        await Store.open(path)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("nimhost.db*") if "shm" not in file.name} == left
    assert caught.value.hint == f"Move it to where the database is now, or delete it: {path}-wal"

    (tmp_path / "nimhost.db-wal").rename(away / "nimhost.db-wal")
    new, old = await Store.open(path), await Store.open(away / path.name)
    assert (len(await new.all("providers")), len(await old.all("providers"))) == (0, 300)
    await new.close()
    await old.close()


@pytest.mark.fault(20)
async def test_killed_in_the_middle_of_many_writes_keeps_every_write_that_was_answered(tmp_path: Path) -> None:
    program = """
        import asyncio, sys
        from pathlib import Path
        from nimhost.entities import Provider
        from nimhost.store import Store

        async def main():
            store = await Store.open(Path(sys.argv[1]))
            for number in range(100000):
                async with store.transaction() as tx:
                    await tx.insert("providers", "default", f"p{number}", Provider(host_url="http://x"))
                print(number, flush=True)

        asyncio.run(main())
    """
    path = tmp_path / "nimhost.db"
    answered = run_and_kill([sys.executable, "-c", textwrap.dedent(program), str(path)], after="50\n")
    store = await Store.open(path)
    rows = await store.all("providers")
    await store.close()
    assert len(rows) in (answered, answered + 1)


async def test_a_secret_is_not_shown_by_repr_of_an_error(store: Store) -> None:
    async with store.transaction() as tx:
        await tx.insert("secrets", "default", "s", Secret(value="canary"))
    with pytest.raises(AlreadyExists) as caught:
        async with store.transaction() as tx:
            await tx.insert("secrets", "default", "s", Secret(value="canary"))
    assert "canary" not in repr(caught.value)

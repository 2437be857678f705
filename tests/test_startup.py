"""What a start does once."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.config import Deployments
from nimhost.deployments.discovery import Discovery, Question
from nimhost.deployments.routing import provider_key
from nimhost.engines.spec import ContainerSpec, Mount, Probe
from nimhost.entities import Entity, Fileset, Provider
from nimhost.host.container import Launch
from nimhost.host.files import FileStorage
from nimhost.startup import NVIDIA_BUILD, seed, sweep_files
from nimhost.store import Store
from tests.support import eventually
from tests.world import IMAGE, World


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "nimhost.db")
    yield opened
    await opened.close()


async def test_nvidias_hosted_models_are_there_from_the_first_start_until_somebody_deletes_them(store: Store) -> None:
    await seed(store)
    provider = await store.get("providers", *NVIDIA_BUILD)
    assert (provider.wish.host_url, provider.wish.api_key_secret_name) == (
        "https://integrate.api.nvidia.com",
        "ngc-api-key",
    )
    await seed(store)
    assert len(await store.all("providers")) == 1
    async with store.transaction() as tx:
        await tx.delete(provider)
    await seed(store)
    assert await store.all("providers") == []


async def test_a_first_start_keeps_a_provider_that_a_user_made(store: Store) -> None:
    async with store.transaction() as tx:
        mine = await tx.insert("providers", *NVIDIA_BUILD, Provider(host_url="http://mine"))
    await seed(store)
    assert await store.all("providers") == [mine]


async def test_without_a_key_nobody_is_asked_and_the_status_says_what_is_missing(store: Store) -> None:
    await seed(store)
    provider = await store.get("providers", *NVIDIA_BUILD)
    key = provider_key(provider, None)
    discovery = Discovery(store, lambda: None)
    discovery.watch([Question(provider=provider, problem=key.problem)])

    async def judged() -> Entity | None:
        found = await store.get("providers", *NVIDIA_BUILD)
        return found if found.status.status == "ERROR" else None

    found = await eventually(judged)
    assert found is not None
    message = found.status.status_message
    assert message.startswith("No key yet: ")
    assert "nimhost secrets create ngc-api-key --from-file - --workspace system" in message
    assert "NGC_API_KEY" in message
    _, task = discovery._tasks[provider.id]
    await eventually(task.done)
    assert discovery._client is None
    await discovery.close()


async def test_files_of_a_fileset_whose_row_is_gone_are_swept_and_no_others(store: Store, tmp_path: Path) -> None:
    files = FileStorage(tmp_path / "filesets")
    await files.open()
    for workspace, name in (("default", "kept"), ("default", "gone"), ("nows", "gone")):
        path = files.directory(workspace, name) / "sub" / "f"
        path.parent.mkdir(parents=True)
        path.write_text("x")
    async with store.transaction() as tx:
        await tx.insert("filesets", "default", "kept", Fileset())
    await sweep_files(files, store)
    assert await files.filesets() == [("default", "kept")]
    assert (files.directory("default", "kept") / "sub" / "f").read_text() == "x"
    files.close()


async def test_files_of_a_fileset_that_cannot_be_read_stay_and_the_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "nimhost.db"
    store = await Store.open(path)
    async with store.transaction() as tx:
        await tx.insert("filesets", "default", "damaged", Fileset())
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entities SET wish = '{\"storage\": 5}' WHERE kind = 'filesets'")
    db.close()
    files = FileStorage(tmp_path / "filesets")
    await files.open()
    files.directory("default", "damaged").mkdir(parents=True)
    store = await Store.open(path)
    await sweep_files(files, store)
    assert await files.filesets() == [("default", "damaged")]
    await store.close()
    files.close()


async def test_the_banner_names_what_runs_and_not_what_has_exited(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = ""

    def banner() -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return "Adopted: " in said

    async with World(tmp_path, deployments=Deployments(restart_limit=0)) as world:
        await world.deploy("runs")
        await world.wait("runs", "READY")
        await world.deploy("broken")
        await world.wait("broken", "READY")
        broken = next(c for c in await world.docker.list() if "broken" in c.name)
        world.docker.exit(broken.id, 1)
        await world.wait("broken", "ERROR")
        await world.restart()
        await eventually(banner)
    assert "Adopted: default/runs\n" in said


async def test_files_of_containers_that_are_gone_are_swept_at_the_next_start(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        kept, gone, other = (tmp_path / "container-files" / hash_ / "template.jinja" for hash_ in ("a1", "b2", "c3"))
        for path in (kept, gone, other):
            path.parent.mkdir(parents=True)
            path.write_text("x")
        gone.with_name("template.jinja.77.tmp").write_text("half")
        spec = ContainerSpec(image=IMAGE, probe=Probe("/health"), mounts=(Mount(str(kept), "/t"),))
        stopped = await world.docker.run(Launch(spec=spec, name="stopped"))
        await world.docker.stop(stopped.id, 1)
        await world.restart()
        assert [path.exists() for path in (kept, gone, other)] == [True, False, False]
        assert sorted(path.name for path in (tmp_path / "container-files").iterdir()) == ["a1"]


async def test_nothing_is_swept_while_docker_is_away(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        path = tmp_path / "container-files" / "a1" / "template.jinja"
        path.parent.mkdir(parents=True)
        path.write_text("x")
        world.docker.away = True
        await world.restart()
        assert path.exists()

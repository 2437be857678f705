"""NGC storage through a whole daemon: filesets, their files, what the model is, and a deployment of its weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Weights as WeightsSettings
from tests.deployments.test_specs import FILESETS, SECRETS, files_of
from tests.fakes.ngc import KEY, FakeNgc
from tests.tiny import tiny_model
from tests.world import IMAGE, MODELS, World

Json = dict[str, Any]
NAME = "nvidia/nemo/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def ngc(tiny: Path) -> Iterator[FakeNgc]:
    with FakeNgc() as fake:
        fake.publish(NAME, "1.0", files_of(tiny))
        yield fake


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    weights = WeightsSettings(endpoint="http://127.0.0.1:9", cache_dir=str(tmp_path / "weights"))
    async with World(tmp_path, weights=weights) as opened:
        reply = await opened.http.post(SECRETS, json={"name": "ngc-key", "value": KEY})
        assert reply.status_code == 201, reply.text
        yield opened


def storage_at(ngc: FakeNgc, **more: Any) -> Json:
    said = {"type": "ngc", "org": "nvidia", "team": "nemo", "target": "tiny", "target_type": "model",
            "api_key_secret": "ngc-key", "host": ngc.url}  # fmt: skip
    return {**said, **more}


async def add(world: World, ngc: FakeNgc, **more: Any) -> Any:
    return await world.http.post(FILESETS, json={"name": "ff", "storage": storage_at(ngc, **more)})


async def test_the_newest_version_is_pinned_when_the_fileset_is_made(world: World, ngc: FakeNgc) -> None:
    stored = (await add(world, ngc)).json()["storage"]
    assert (stored["version"], stored.get("original_version")) == ("1.0", None)


async def test_files_are_listed_and_read_in_ranges(world: World, ngc: FakeNgc, tiny: Path) -> None:
    await add(world, ngc)
    listed = (await world.http.get(f"{FILESETS}/ff/files")).json()["data"]
    expected = files_of(tiny)
    assert {f["path"]: f["size"] for f in listed} == {path: len(content) for path, content in expected.items()}
    assert {f["cache_status"] for f in listed} == {"not_cached"}
    part = await world.http.get(f"{FILESETS}/ff/-/model.safetensors", headers={"Range": "bytes=8-99"})
    assert (part.status_code, part.content) == (206, expected["model.safetensors"][8:100])
    assert (await world.http.get(f"{FILESETS}/ff/-/config.json")).content == expected["config.json"]
    assert (await world.http.get(f"{FILESETS}/ff/-/nope.json")).status_code == 404
    assert ngc.leaked == []


@pytest.mark.parametrize(
    ("storage", "detail"),
    [
        ({"api_key_secret": "bad"}, "Access denied to storage backend: NGC refuses the API key"),
        ({"api_key_secret": "nope"}, "Secret not found: nope"),
        ({"target": "other"}, "Invalid storage configuration: there is no NGC model nvidia/nemo/other"),
        ({"version": "7"}, "Invalid storage configuration: NGC model nvidia/nemo/tiny has no version '7'."),
        ({"target_type": "resource"}, "Invalid storage configuration: there is no NGC resource nvidia/nemo/tiny"),
        ({"org": "../x"}, "storage.org: '../x' cannot be the name of something on NGC."),
        ({"version": "1/../2"}, "storage.version: '1/../2' cannot be the name of something on NGC."),
        ({"host": "ngc"}, "storage.host: 'ngc' is not an address."),
    ],
)
async def test_what_can_never_be_fetched_is_refused(
    world: World, ngc: FakeNgc, storage: dict[str, str], detail: str
) -> None:
    await world.http.post(SECRETS, json={"name": "bad", "value": "nvapi-bad"})
    reply = await add(world, ngc, **storage)
    assert (reply.status_code, reply.json()["detail"][: len(detail)]) == (400, detail)
    assert "nvapi-bad" not in reply.text
    assert (await world.http.get(f"{FILESETS}/ff")).status_code == 404


async def test_the_key_of_the_environment_opens_it(world: World, ngc: FakeNgc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", KEY)
    reply = await add(world, ngc, api_key_secret="system/ngc-api-key")
    assert (reply.status_code, reply.json()["storage"]["version"]) == (200, "1.0")
    assert (await world.http.get(f"{FILESETS}/ff/-/config.json")).status_code == 200


@pytest.mark.fault(14)
async def test_an_ngc_that_is_away_is_no_reason_to_refuse(world: World, ngc: FakeNgc) -> None:
    ngc.faults.down = True
    reply = await add(world, ngc)
    assert (reply.status_code, reply.json()["storage"].get("version")) == (200, None)


async def test_a_model_is_described_without_fetching_its_weights(world: World, ngc: FakeNgc) -> None:
    await add(world, ngc)
    made = (await world.http.post(f"{MODELS}/models", json={"name": "mm", "fileset": "default/ff"})).json()
    assert made["spec"]["family"] == "qwen3"
    assert ngc.sent_bytes("model.safetensors") < 1_000_000


async def deploy(world: World, **wish: Any) -> None:
    repository, _, tag = IMAGE.rpartition(":")
    config = {
        "name": "dd", "engine": "vllm", "model_spec": {"model_name": "mm"},
        "executor_config": {"gpu": 1, "image_name": repository, "image_tag": tag},
    }  # fmt: skip
    await world.post(f"{MODELS}/models", {"name": "mm", "fileset": "default/ff"})
    await world.post(f"{MODELS}/deployment-configs", config)
    await world.post(f"{MODELS}/deployments", {"name": "dd", "config": "dd", **wish})


async def test_weights_of_ngc_are_fetched_once_and_mounted(world: World, ngc: FakeNgc, tiny: Path) -> None:
    await add(world, ngc)
    await deploy(world)
    await world.wait("dd", "PENDING", "Container created", 30)
    (container,) = world.docker.containers.values()
    (mount,) = (m for m in container.spec.mounts if m.target == "/model-store")
    assert mount.source.endswith("/weights/.nimhost/ngc/ngc-models--nvidia--nemo--tiny")
    assert mount.read_only
    root = Path(mount.source) / "snapshots" / "1.0"
    expected = files_of(tiny)
    assert (root / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert any(str(part).startswith("/model-store/snapshots/1.0") for part in (*container.spec.args,))
    ngc.forget()
    await world.http.post(f"{MODELS}/deployments/dd/stop")
    await world.http.post(f"{MODELS}/deployments/dd/start")
    await world.wait("dd", "PENDING", "Container created", 30)
    assert ngc.requests == [], "a second start asks nobody"


async def test_a_key_that_lost_its_access_is_said_on_the_deployment(world: World, ngc: FakeNgc) -> None:
    await add(world, ngc)
    await deploy(world, desired="stopped")
    ngc.artifacts[NAME].readers = ("nvapi-somebody-else",)
    await world.http.post(f"{MODELS}/deployments/dd/start")
    failed = await world.wait("dd", "ERROR", "the API key has no access to NGC model nvidia/nemo/tiny", 30)
    assert "nimhost secrets create ngc-key" in failed["status_message"]
    assert KEY not in str(failed)

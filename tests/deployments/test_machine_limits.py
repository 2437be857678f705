"""What this machine, its driver, its Docker, the hub and NGC allow, under the whole loop: said before anything is made,
or in words that name the cause."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.config import Gpus as GpuSettings
from nimhost.config import SimulatedGpu
from nimhost.config import Weights as WeightsSettings
from nimhost.errors import DockerUnavailable, RegistryDenied
from nimhost.host.container import Container, Image
from nimhost.host.gpus import GpuFacts
from tests.fakes.hub import FakeHub
from tests.models import public
from tests.models.weights_dir import make_weights_dir
from tests.world import IMAGE, MODELS, World

FILES = "/apis/files/v2/workspaces/default"
PLAN = "/apis/nimhost/v1/plan"
GPUS = "/apis/nimhost/v1/gpus"
Json = dict[str, Any]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path / "world") as world:
        yield world


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as opened:
        opened.add("org/tiny", {"config.json": b"{}", "model.safetensors": bytes(5000)})
        yield opened


@pytest.fixture
async def online(tmp_path: Path, hub: FakeHub) -> AsyncIterator[World]:
    weights = WeightsSettings(cache_dir=str(tmp_path / "cache"), endpoint=hub.url)
    async with World(tmp_path / "world", weights=weights) as world:
        yield world


def config(**more: Any) -> Json:
    """Of a model `mm` with the image that is here."""
    repository, _, tag = IMAGE.rpartition(":")
    executor = {"gpu": 1, "image_name": repository, "image_tag": tag, **more.pop("executor", {})}
    return {"engine": "vllm", "model_spec": {"model_name": "mm", **more}, "executor_config": executor}


async def add_model(world: World, storage: Json, **spec: Any) -> None:
    reply = await world.http.post(f"{FILES}/filesets", json={"name": "mm", "storage": storage})
    assert reply.status_code == 200, reply.text
    await world.post(f"{MODELS}/models", {"name": "mm", "fileset": "default/mm"})
    await world.post(f"{MODELS}/deployment-configs", {"name": "mm", **config(**spec)})


async def refused(world: World, says: str) -> Json:
    """A deployment that is refused with 400, of which nothing stays."""
    reply = await world.http.post(f"{MODELS}/deployments", json={"name": "mm", "config": "mm"})
    assert (reply.status_code, says in reply.json()["detail"]) == (400, True), reply.text
    assert await world.deployment("mm") is None
    found: Json = reply.json()
    return found


# --- GPUs and their driver


async def test_a_driver_that_is_broken_is_the_reason_not_that_there_is_no_gpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read() -> GpuFacts:
        return GpuFacts(problem="NVIDIA's driver is installed but not loaded; run: sudo modprobe nvidia")

    monkeypatch.setattr(world.gpus, "read", read)
    generic = {"engine": "generic", "model_spec": {}, "executor_config": {
        "gpu": 1, "image_name": "fake-engine", "image_tag": "1", "health_check_path": "/health"}}  # fmt: skip
    await world.post(f"{MODELS}/deployment-configs", {"name": "gg", **generic})
    reply = await world.http.post(f"{MODELS}/deployments", json={"name": "gg", "config": "gg"})
    assert reply.status_code == 400
    assert "has no GPU that can be used: NVIDIA's driver is installed but not loaded" in reply.json()["detail"]


@pytest.mark.fault(6)
async def test_gpus_that_settings_leave_out_are_marked_and_count_for_who_wants_a_number(tmp_path: Path) -> None:
    cards = [SimulatedGpu(name="SIM", memory_gib=24, uuid=f"GPU-{i}") for i in range(2)]
    world = World(tmp_path)
    world.settings = replace(world.settings, gpus=GpuSettings(devices=["GPU-1"]))
    world.gpus.settings = list(cards)
    async with world:
        world.docker.add_foreign(
            Container(id="f" * 64, name="theirs", image="x", state="running", gpu_ids=("count:1",))
        )
        await world.deploy("one")
        await world.wait("one", "READY")
        found = (await world.http.get(GPUS)).json()["data"]
        assert [(gpu["uuid"], gpu["usable"], gpu["holder"]) for gpu in found] == [
            ("GPU-0", False, "container theirs"), ("GPU-1", True, "default/one"),
        ]  # fmt: skip


async def test_a_share_that_is_too_large_holds_up_nobody(world: World) -> None:
    await world.deploy("first", gpu_memory_gib=20)
    await world.wait("first", "READY")
    world.gpus.settings = [replace(gpu, memory_gib=16) for gpu in world.gpus.settings]
    await world.http.post(f"{MODELS}/deployments/first/stop")
    await world.wait("first", "PENDING", "Stopped")
    await world.http.post(f"{MODELS}/deployments/first/start")
    await world.wait("first", "ERROR", "20 GiB of a GPU are asked for, the largest here has 16.0")
    await world.deploy("second")
    await world.wait("second", "READY")


# --- without Docker


@pytest.mark.fault(21)
async def test_without_docker_a_plan_still_knows_the_gpus_and_the_disk(world: World, tmp_path: Path) -> None:
    weights = make_weights_dir(tmp_path / "qwen3-14b", public.QWEN3_14B)
    world.docker.away = True
    body = {"config": config(executor={"gpu": 2}), "fileset": {"storage": {"type": "local", "path": str(weights)}}}
    found = (await world.http.post(PLAN, json=body)).json()
    assert found["verdict"] == "unknown"
    assert len(found["gpus"]["there"]) == 2
    assert found["memory"]["fits"]
    assert {place["what"]: place["here"] for place in found["disk"]} == {"weights": True, "image": None}
    with pytest.raises(DockerUnavailable):
        await world.docker.list()


# --- weights that can never be fetched


async def test_a_repository_that_vanished_is_refused_before_anything_is_made(online: World, hub: FakeHub) -> None:
    await add_model(online, {"type": "huggingface", "repo_id": "org/tiny"})
    hub.repos.clear()
    await refused(online, "No weights to serve: there is no repository org/tiny at ")


@pytest.mark.parametrize("revision", ["v9", "../../etc"])
async def test_a_revision_that_does_not_exist_is_refused_by_its_name(
    online: World, hub: FakeHub, revision: str
) -> None:
    await add_model(online, {"type": "huggingface", "repo_id": "org/tiny"}, model_revision=revision)
    reply = await refused(online, "No weights to serve: ")
    assert f"'{revision}'" in reply["detail"]


@pytest.mark.fault(14)
async def test_a_hub_that_is_away_is_no_reason_to_refuse(online: World, hub: FakeHub) -> None:
    await add_model(online, {"type": "huggingface", "repo_id": "org/tiny"}, model_revision="v9")
    hub.faults.down = True
    await online.post(f"{MODELS}/deployments", {"name": "mm", "config": "mm"})


async def test_a_directory_has_no_revisions(world: World, tmp_path: Path) -> None:
    weights = make_weights_dir(tmp_path / "tiny", public.QWEN3_8B)
    await add_model(world, {"type": "local", "path": str(weights)}, model_revision="v2")
    await refused(world, "model_spec.model_revision is 'v2', but fileset 'default/mm' is a directory")


async def test_the_plan_of_what_failed_for_good_says_so(world: World) -> None:
    world.docker.pull_error = RegistryDenied("Image x:1: denied")
    await world.deploy("one", image="x:1", gpu=0)
    await world.wait("one", "ERROR", "denied")
    found = (await world.http.get(f"{MODELS}/deployments/one/plan")).json()
    assert found["verdict"] == "refused"
    assert found["reason"].startswith("It failed, and is not tried again: Image x:1: denied")
    assert found["hint"] == "Try again with: nimhost start one"


# --- images


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (
            None,
            "wants an NGC API key, and there is none.\nnimhost secrets create ngc-api-key --workspace system --from-",
        ),
        ("nvapi-1", "the NGC API key (secret system/ngc-api-key) has no access to nvcr.io/nim/x:1, or it does not"),
    ],
)
async def test_ngc_denies_without_a_key_and_with_one_that_has_no_access(
    world: World, key: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NGC_API_KEY", raising=False)
    if key is not None:
        secrets = "/apis/secrets/v2/workspaces/system/secrets"
        assert (await world.http.post(secrets, json={"name": "ngc-api-key", "value": key})).status_code == 201
    world.docker.pull_error = RegistryDenied("Image nvcr.io/nim/x:1: unauthorized", "Check the image's name")
    await world.deploy("one", image="nvcr.io/nim/x:1", gpu=0)
    failed = await world.wait("one", "ERROR", says)
    assert "nvapi-1" not in str(failed)


async def test_an_image_for_other_cpus_is_refused_once_it_is_here(world: World) -> None:
    world.docker.images["arm:1"] = Image(id="sha256:arm", name="arm:1", size_bytes=1, architecture="arm64")
    await world.deploy("one", image="arm:1")
    failed = await world.wait("one", "ERROR", "Image arm:1 is made for arm64, and this machine is amd64.")
    assert "--image NAME:TAG" in failed["status_message"]
    assert world.docker.containers == {}
    await world.http.delete(f"{MODELS}/deployments/one")


async def test_a_group_alone_is_that_of_the_user_of_the_image(world: World) -> None:
    world.docker.images[IMAGE] = replace(world.docker.images[IMAGE], user="app:app")
    await world.deploy("one", run_as_group=1000)
    await world.wait("one", "READY")
    (container,) = world.docker.containers.values()
    assert container.spec.user == "app:1000"

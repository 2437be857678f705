"""GPUs that change over time, under the whole loop: memory that stays held, cards that vanish, drivers too old."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.config import Deployments
from nimhost.deployments import readings
from nimhost.host.container import Container
from tests.fakes.engine import Faults
from tests.support import eventually
from tests.world import IMAGE, World

GIB = 1024**3


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """One GPU."""
    async with World(tmp_path, gpus=1) as world:
        yield world


def held(world: World, used_gib: float, *processes: dict[str, Any], gpu: int = 0) -> None:
    """The next measurement finds this."""
    world.gpus.settings[gpu] = replace(world.gpus.settings[gpu], used_gib=used_gib, processes=list(processes))


def containers_of(world: World, name: str) -> list[Container]:
    return [
        c.seen
        for c in world.docker.containers.values()
        if c.seen.labels.get("io.nimhost.deployment") == f"default/{name}"
    ]


async def shown(world: World) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = (await world.http.get("/apis/nimhost/v1/gpus")).json()["data"]
    return data


@pytest.mark.fault(8)
async def test_memory_that_is_not_given_back_keeps_the_gpu_and_the_culprit_is_named(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    await world.deploy("two")
    await world.wait("two", "PENDING", "GPU 0 is held by default/one")
    held(world, 20, {"pid": 4242, "name": "python", "user": "bob", "used_gib": 20, "container": "gone"})
    await world.delete("one")
    await world.wait(
        "two", "PENDING", "GPU 0 has 4.0 of 24 GiB free, 22 are needed: python (pid 4242, user bob) holds 20 GiB"
    )
    held(world, 0)
    await world.wait("two", "READY")  # nobody said that it came back: it was measured


@pytest.mark.fault(8)
async def test_a_stranger_on_the_gpu_is_named_and_a_small_one_is_no_obstacle(world: World) -> None:
    desktop = {"pid": 900, "name": "Xorg", "user": "root", "used_gib": 1}
    held(world, 15, desktop, {"pid": 77, "name": "blender", "user": "eve", "used_gib": 14})
    await world.deploy("one")
    await world.wait(
        "one", "PENDING", "Xorg (pid 900, user root) holds 1.0 GiB, blender (pid 77, user eve) holds 14 GiB"
    )
    (gpu,) = await shown(world)
    assert [(p["pid"], p["name"], p["user"], p["deployment"]) for p in gpu["processes"]] == [
        (900, "Xorg", "root", None), (77, "blender", "eve", None),
    ]  # fmt: skip
    held(world, 1, desktop)
    await world.wait("one", "READY")


async def test_a_process_of_an_engine_is_shown_as_its_deployment_and_is_no_stranger(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    (container,) = containers_of(world, "one")
    held(world, 22, {"pid": 5, "name": "python3", "used_gib": 22, "container": container.id})
    (gpu,) = await shown(world)
    assert (gpu["holder"], gpu["processes"][0]["deployment"]) == ("default/one", "default/one")
    assert (gpu["used_bytes"], gpu["free_bytes"]) == (22 * GIB, 2 * GIB)


@pytest.mark.fault(6)
async def test_shares_of_one_gpu_are_handed_out_and_remembered(world: World) -> None:
    for name, gib in (("aa", 10), ("bb", 12)):
        await world.deploy(name, gpu_memory_gib=gib)
        await world.wait(name, "READY")
    (gpu,) = await shown(world)
    assert [(s["holder"], s["memory_bytes"]) for s in gpu["shares"]] == [
        ("default/aa", 10 * GIB), ("default/bb", 12 * GIB),
    ]  # fmt: skip
    await world.deploy("cc", gpu_memory_gib=4)
    await world.wait("cc", "PENDING", "default/aa has 10 GiB, default/bb has 12 GiB")
    await world.deploy("dd")
    await world.wait("dd", "PENDING", "GPU 0 is shared by default/aa, default/bb")
    await world.restart()
    await world.wait("cc", "PENDING", "default/aa has 10 GiB, default/bb has 12 GiB")
    await world.delete("aa")
    await world.wait("cc", "READY")
    assert [c.labels["io.nimhost.share"] for c in containers_of(world, "cc")] == [str(4 * GIB)]


@pytest.mark.fault(7)
async def test_engines_start_one_after_the_other_on_one_gpu(world: World) -> None:
    """Each one measures the memory while it starts: two at once would measure each other."""
    world.faults = Faults(unhealthy=True)
    await world.deploy("aa", gpu_memory_gib=10)
    await world.wait("aa", "PENDING", "initializing")
    await world.deploy("bb", gpu_memory_gib=10)
    await world.wait("bb", "PENDING", "default/aa is starting on GPU 0, and engines start there one after the other")
    assert containers_of(world, "bb") == []
    slow = next(iter(world.engines.values()))
    world.faults = Faults()
    slow.faults.unhealthy = False
    await world.wait("aa", "READY")
    await world.wait("bb", "READY")
    await world.deploy("cc", gpu_memory_gib=2)
    await world.wait("cc", "READY")  # who has started waits no longer, and nobody behind it


async def test_nobody_waits_behind_an_engine_that_is_loading(tmp_path: Path) -> None:
    """It waited once; that is over when it starts."""
    async with World(tmp_path, gpus=2) as world:
        await world.deploy("aa", gpu=2)
        await world.wait("aa", "READY")
        await world.deploy("bb")
        await world.wait("bb", "PENDING", "is held by default/aa")
        world.faults = Faults(unhealthy=True)
        await world.delete("aa")
        await world.wait("bb", "PENDING", "initializing")
        world.faults = Faults()
        await world.deploy("cc")
        await world.wait("cc", "READY")


@pytest.mark.fault(9)
@pytest.mark.usefixtures("attentive")
async def test_a_container_that_lost_its_gpu_is_made_anew_at_once(tmp_path: Path) -> None:
    """After `systemctl daemon-reload` on the host; the host's GPU is fine."""
    patient = Deployments(restart_backoff_s=0.05, unhealthy_restart_s=3600)
    async with World(tmp_path, gpus=1, deployments=patient) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (first,) = containers_of(world, "one")
        world.docker.containers[first.id].write("RuntimeError: Failed to initialize NVML: Unknown Error\n")
        broken = world.engines[first.id]
        world.faults = Faults()
        broken.faults = dataclasses.replace(broken.faults, unhealthy=True)
        await eventually(lambda: [c.id for c in containers_of(world, "one")] not in ([], [first.id]), 10)
        found = await world.wait("one", "READY")
        said = " ".join(entry["status_message"] for entry in found["status_history"])
        assert "lost its GPU, which happens when the host reloads its units" in said


@pytest.mark.fault(9)
@pytest.mark.usefixtures("attentive")
async def test_a_gpu_that_left_the_machine_is_said(tmp_path: Path) -> None:
    quick = Deployments(restart_backoff_s=0.05, unhealthy_restart_s=0.2)
    async with World(tmp_path, gpus=1, deployments=quick) as world:
        await world.deploy("one")
        await world.wait("one", "READY")
        (uuid,) = [gpu["uuid"] for gpu in await shown(world)]
        world.gpus.settings.clear()
        next(iter(world.engines.values())).faults.unhealthy = True
        await world.wait("one", "ERROR", "Not enough GPUs on this system: default/one needs 1, there are none")
        history = (await world.deployment("one") or {})["status_history"]
        assert any(f"{uuid} is no longer on this machine" in entry["status_message"] for entry in history)


@pytest.mark.fault(10)
async def test_without_a_gpu_runtime_nothing_is_pulled_until_it_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "ASK_AGAIN_S", 0.0)
    world.docker.registry["big:1"] = world.docker.images[IMAGE]
    world.docker.gpu_runtime = False
    await world.deploy("one", "big:1")
    found = await world.wait("one", "ERROR", "Docker cannot give GPUs to containers")
    assert "sudo nvidia-ctk runtime configure" in found["status_message"]
    assert "pull" not in world.docker.calls
    world.docker.gpu_runtime = True
    world.daemon.reconciler.wake()
    await world.wait("one", "READY")


@pytest.mark.fault(10)
async def test_the_gpu_runtime_is_asked_for_once_per_connection(world: World) -> None:
    for name in ("aa", "bb"):
        await world.deploy(name, gpu_memory_gib=5)
        await world.wait(name, "READY")
    assert world.docker.calls.count("hands_out_gpus") == 1
    world.docker.away = True
    await world.wait("aa", "UNKNOWN")
    world.docker.away = False
    await world.wait("aa", "READY")
    await world.deploy("cc", gpu_memory_gib=5)
    await world.wait("cc", "READY")
    assert world.docker.calls.count("hands_out_gpus") == 2


@pytest.mark.fault(11)
async def test_a_driver_too_old_for_the_image_is_found_before_the_start(world: World) -> None:
    image = world.docker.images[IMAGE]
    world.docker.images[IMAGE] = replace(image, env={"NVIDIA_REQUIRE_CUDA": "cuda>=12.8"})
    world.gpus.settings[0] = replace(world.gpus.settings[0], driver="550.54.14", cuda="12.4")
    await world.deploy("one")
    await world.wait("one", "ERROR", "needs CUDA 12.8 or newer; driver 550.54.14 of this machine has CUDA 12.4")
    assert "create" not in world.docker.calls
    assert "run" not in world.docker.calls
    world.gpus.settings[0] = replace(world.gpus.settings[0], driver="580.65.06", cuda="13.0")
    world.daemon.reconciler.wake()
    await world.wait("one", "READY")


@pytest.mark.fault(23)
async def test_out_of_memory_at_the_start_ends_with_the_flag_and_its_value(world: World) -> None:
    said = (
        "ValueError: To serve at least one request with the models's max seq len (40960), (5.62 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (4.50 GiB). Based on the available memory, the "
        "estimated maximum model length is 32768. Try increasing `gpu_memory_utilization`"
    )
    world.faults = Faults(unhealthy=True)
    await world.deploy("one")
    await world.wait("one", "PENDING", "initializing")
    world.docker.exit(containers_of(world, "one")[0].id, 1, log=said)
    found = await world.wait("one", "ERROR", "Deploy it with: --arg --max-model-len --arg 32768")
    assert found["status_message"].startswith("Container exited with code 1. The KV cache has 4.5 GiB")
    assert [c.state for c in containers_of(world, "one")] == ["exited"]  # tried once, kept for its logs


@pytest.mark.fault(11)
async def test_an_image_that_asks_for_a_version_without_an_end_fails_alone(world: World) -> None:
    image = world.docker.images[IMAGE]
    world.docker.images["endless:1"] = replace(image, env={"NVIDIA_REQUIRE_CUDA": f"cuda>={'9' * 5000}"})
    world.gpus.settings[0] = replace(world.gpus.settings[0], driver="550.54.14", cuda="12.4")
    await world.deploy("endless", "endless:1", gpu_memory_gib=5)
    failed = await world.wait("endless", "ERROR", "needs CUDA 999")
    assert len(failed["status_message"]) < 1000
    await world.deploy("one", gpu_memory_gib=5)
    await world.wait("one", "READY")

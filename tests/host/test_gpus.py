"""The inventory of GPUs, with NVML played by a small stand-in."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from nimhost.config import SimulatedGpu
from nimhost.errors import ConfigError
from nimhost.host import gpus as gpus_module
from nimhost.host.gpus import GIB, Gpu, GpuFacts, NvmlGpus, SimulatedGpus, container_of, limited


@dataclass
class Device:
    uuid: str
    name: str = "NVIDIA Test"
    total: int = 80 * GIB
    used: int = 0
    compute: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    parts: list[Device | None] | None = None
    fails: dict[str, int] = field(default_factory=dict)
    """Name of a call -> the code that it fails with."""


class Nvml:
    """The calls of pynvml that are used, over `devices`."""

    NVMLError = pynvml.NVMLError
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE
    NVML_ERROR_NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.init_error: int | None = None
        self.count_error: int | None = None
        self.inits = self.reads = self.reads_of_ways = 0
        self.ways: dict[tuple[str, str], int | str] = {}
        """Two uuids -> topology level, or "nvlink"; the other pairs are asked in vain."""
        self.held = threading.Event()
        self.held.set()

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise pynvml.NVMLError(self.init_error)
        self.inits += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 13010

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.reads += 1
        self.held.wait()
        if self.count_error:
            raise pynvml.NVMLError(self.count_error)
        return len(self.devices)

    def __getattr__(self, name: str) -> Any:
        calls: dict[str, Callable[[Any], Any]] = {
            "nvmlDeviceGetUUID": lambda d: d.uuid,
            "nvmlDeviceGetName": lambda d: d.name,
            "nvmlDeviceGetMemoryInfo": lambda d: SimpleNamespace(total=d.total, used=d.used),
            "nvmlDeviceGetMigMode": lambda d: (int(d.parts is not None), 0),
            "nvmlDeviceGetMaxMigDeviceCount": lambda d: len(d.parts),
            "nvmlDeviceGetComputeRunningProcesses": lambda d: processes(d.compute),
            "nvmlDeviceGetGraphicsRunningProcesses": lambda d: processes(d.graphics),
        }

        def call(device: Any, *args: int) -> Any:
            if name == "nvmlDeviceGetHandleByIndex":
                device = self.devices[device]
            if name in device.fails:
                raise pynvml.NVMLError(device.fails[name])
            if name == "nvmlDeviceGetHandleByIndex":
                return device
            if name == "nvmlDeviceGetMigDeviceHandleByIndex":
                part = device.parts[args[0]]
                if part is None:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
                return part
            return calls[name](device)

        return call

    def nvmlDeviceGetP2PStatus(self, one: Device, other: Device, index: int) -> int:  # noqa: N802
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        linked = self.ways.get((one.uuid, other.uuid)) == "nvlink"
        return int(pynvml.NVML_P2P_STATUS_OK if linked else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)

    def nvmlDeviceGetTopologyCommonAncestor(self, one: Device, other: Device) -> int:  # noqa: N802
        self.reads_of_ways += 1
        found = self.ways.get((one.uuid, other.uuid))
        if not isinstance(found, int):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return found


def processes(found: list[tuple[int, int | None]]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found]


def gpus_on(nvml: Nvml) -> NvmlGpus:
    return NvmlGpus(nvml)


async def read_once(nvml: Nvml) -> GpuFacts:
    gpus = gpus_on(nvml)
    facts = await gpus.read()
    await gpus.close()
    return facts


# --- NVML ----------------------------------------------------------------------------------------------------------


async def test_gpus_are_read_with_memory_and_versions() -> None:
    facts = await read_once(Nvml(Device("GPU-a", used=GIB), Device("GPU-b", name="Other", total=24 * GIB)))

    assert (facts.driver, facts.cuda, facts.problem) == ("580.65.06", "13.1", None)
    assert [(g.uuid, g.index, g.name, g.memory_bytes, g.used_bytes, g.simulated) for g in facts.gpus] == [
        ("GPU-a", 0, "NVIDIA Test", 80 * GIB, GIB, False),
        ("GPU-b", 1, "Other", 24 * GIB, 0, False),
    ]


@pytest.mark.fault(8)
async def test_processes_on_a_gpu_are_named() -> None:
    me, gone = os.getpid(), 2**22 + 1
    device = Device("GPU-a", compute=[(me, 3 * GIB), (gone, None)], graphics=[(me, GIB)])
    (gpu,) = (await read_once(Nvml(device))).gpus

    assert [(p.pid, p.used_bytes) for p in gpu.processes] == [(me, 3 * GIB), (gone, 0)]
    assert gpu.processes[0].name
    assert gpu.processes[0].user
    assert (gpu.processes[1].name, gpu.processes[1].user) == ("", "")


@pytest.mark.fault(8)
async def test_a_process_whose_name_was_cut_in_the_middle_of_a_letter_hides_no_gpu() -> None:
    """Linux keeps 15 bytes of a name, and anybody may call a process what he likes."""
    code = "open('/proc/self/comm', 'wb').write(b'model \\xd0'); print(flush=True); input()"
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=pipe, stdout=pipe)
    assert child.stdout is not None
    await child.stdout.readline()
    (gpu,) = (await read_once(Nvml(Device("GPU-a", compute=[(child.pid, GIB)])))).gpus
    await child.communicate(b"\n")
    assert [p.name for p in gpu.processes] == ["model \ufffd"]


async def test_the_ways_between_gpus_are_read_once() -> None:
    nvml = Nvml(Device("GPU-a"), Device("GPU-b"), Device("GPU-c"), Device("GPU-d"))
    nvml.ways = {("GPU-a", "GPU-b"): "nvlink", ("GPU-a", "GPU-c"): pynvml.NVML_TOPOLOGY_SYSTEM}
    gpus = gpus_on(nvml)
    first = (await gpus.read()).gpus
    asked = nvml.reads_of_ways
    again = (await gpus.read()).gpus
    await gpus.close()

    assert [dict(gpu.links) for gpu in first] == [
        {"GPU-b": "nvlink", "GPU-c": "system"}, {"GPU-a": "nvlink"}, {"GPU-a": "system"}, {},
    ]  # fmt: skip
    assert again == first
    assert nvml.reads_of_ways == asked


ID = "4e" * 32


@pytest.mark.parametrize(
    ("cgroups", "container"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", ID),
        (f"0::/docker/{ID}\n", ID),
        (f"12:devices:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", ID),
        (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope/init\n", ID),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", ""),
        ("", ""),
    ],
)
def test_a_process_in_a_container_is_known_by_its_cgroup(cgroups: str, container: str) -> None:
    assert container_of(cgroups) == container


async def test_machine_without_nvml_has_no_gpus_and_says_why() -> None:
    facts = await asyncio.wait_for(read_once(pynvml_without_library()), 5)

    assert facts.gpus == ()
    assert facts.problem == "NVIDIA's driver is not installed on this machine"


def pynvml_without_library() -> Nvml:
    nvml = Nvml()
    nvml.init_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    return nvml


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "modprobe nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "reboot"),
        (pynvml.NVML_ERROR_UNKNOWN, "nvidia-smi"),
    ],
)
async def test_driver_that_does_not_work_says_what_to_do(code: int, words: str) -> None:
    nvml = Nvml()
    nvml.init_error = code

    assert words in ((await read_once(nvml)).problem or "")


async def test_one_gpu_that_cannot_be_read_does_not_hide_the_others() -> None:
    lost = Device("GPU-lost", fails={"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_GPU_IS_LOST})
    mute = Device("GPU-mute", fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_UNKNOWN})
    facts = await read_once(Nvml(lost, mute, Device("GPU-fine")))

    assert [(g.uuid, g.index, g.memory_bytes, g.problem is None) for g in facts.gpus] == [
        ("GPU-mute", 1, 0, False),
        ("GPU-fine", 2, 80 * GIB, True),
    ]
    assert "GPU 0: " in (facts.problem or "")
    assert "GPU 1: " in (facts.problem or "")


async def test_divided_gpu_is_listed_as_its_parts() -> None:
    parts = [Device("MIG-1", total=10 * GIB), None, Device("MIG-2", total=10 * GIB)]
    facts = await read_once(Nvml(Device("GPU-a"), Device("GPU-b", parts=parts)))

    assert [(g.uuid, g.index, g.memory_bytes) for g in facts.gpus] == [
        ("GPU-a", 0, 80 * GIB),
        ("MIG-1", 1, 10 * GIB),
        ("MIG-2", 1, 10 * GIB),
    ]


async def test_gpu_that_cannot_be_divided_is_a_whole_one() -> None:
    device = Device("GPU-a", fails={"nvmlDeviceGetMigMode": pynvml.NVML_ERROR_NOT_SUPPORTED})

    assert [g.uuid for g in (await read_once(Nvml(device))).gpus] == ["GPU-a"]


async def test_gpu_without_memory_of_its_own_has_the_machine_s() -> None:
    device = Device("GPU-a", fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED})
    (gpu,) = (await read_once(Nvml(device))).gpus

    assert gpu.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < gpu.used_bytes < gpu.memory_bytes
    assert gpu.problem is None


@pytest.mark.fault(9)
async def test_driver_that_went_away_is_found_again() -> None:
    nvml = Nvml(Device("GPU-a"))
    gpus = gpus_on(nvml)
    assert len((await gpus.read()).gpus) == 1

    nvml.count_error = pynvml.NVML_ERROR_UNINITIALIZED
    away = await gpus.read()
    assert away.gpus == ()
    assert away.problem

    nvml.count_error = None
    assert len((await gpus.read()).gpus) == 1
    await gpus.close()
    assert nvml.inits == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "_READ_TIMEOUT_S", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_driver_that_hangs_is_a_problem_and_holds_one_thread() -> None:
    nvml = Nvml(Device("GPU-a"))
    nvml.held.clear()
    gpus = gpus_on(nvml)

    readings = await asyncio.gather(*(gpus.read() for _ in range(5)))
    assert all("did not answer" in (facts.problem or "") for facts in readings)
    assert len([t for t in threading.enumerate() if t.name.startswith("nvml")]) == 1

    nvml.held.set()
    assert len((await gpus.read()).gpus) == 1
    assert nvml.reads <= 2
    await gpus.close()


@pytest.mark.usefixtures("impatient")
async def test_driver_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "_CLOSE_S", 0.05)
    nvml = Nvml(Device("GPU-a"))
    nvml.held.clear()
    gpus = gpus_on(nvml)
    assert "did not answer" in ((await gpus.read()).problem or "")
    await asyncio.wait_for(gpus.close(), 5)
    nvml.held.set()


# --- simulated -----------------------------------------------------------------------------------------------------


async def test_simulated_gpus_have_lasting_uuids() -> None:
    first = await SimulatedGpus([SimulatedGpu(name="SIM-80G", memory_gib=80)] * 2).read()
    second = await SimulatedGpus([SimulatedGpu(name="SIM-80G", memory_gib=80)]).read()

    assert first.gpus[0].uuid == second.gpus[0].uuid
    assert first.gpus[0].uuid.startswith("GPU-")
    assert first.gpus[0].uuid != first.gpus[1].uuid
    assert [(g.index, g.memory_bytes, g.simulated) for g in first.gpus] == [(0, 80 * GIB, True), (1, 80 * GIB, True)]
    assert (first.driver, first.cuda) == (None, None)


def test_simulated_gpus_cannot_be_one_and_the_same() -> None:
    with pytest.raises(ConfigError, match="two GPUs have the uuid GPU-1"):
        SimulatedGpus([SimulatedGpu(name="x", memory_gib=1, uuid="GPU-1")] * 2)


async def test_simulated_gpu_shows_what_the_settings_say() -> None:
    process = {"pid": 7, "name": "python", "user": "ada", "used_gib": 2}
    settings = SimulatedGpu(
        name="X", memory_gib=16, uuid="GPU-x", driver="580.1", cuda="13.0", used_gib=3.5, processes=[process]
    )
    facts = await SimulatedGpus([settings]).read()
    (gpu,) = facts.gpus

    assert (facts.driver, facts.cuda, gpu.uuid, gpu.used_bytes) == ("580.1", "13.0", "GPU-x", int(3.5 * GIB))
    assert [(p.pid, p.name, p.user, p.used_bytes) for p in gpu.processes] == [(7, "python", "ada", 2 * GIB)]


async def test_simulated_gpus_are_linked_both_ways() -> None:
    settings = [SimulatedGpu(name="X", memory_gib=1, links={"1": "nvlink"}), SimulatedGpu(name="X", memory_gib=1)]
    one, other = (await SimulatedGpus(settings).read()).gpus
    assert (one.links, other.links) == ({other.uuid: "nvlink"}, {one.uuid: "nvlink"})


async def test_simulated_gpus_change_when_a_test_says_so() -> None:
    gpus = SimulatedGpus([SimulatedGpu(name="X", memory_gib=16)])
    gpus.settings[0] = SimulatedGpu(name="X", memory_gib=16, used_gib=4)
    assert (await gpus.read()).gpus[0].used_bytes == 4 * GIB

    gpus.settings.clear()
    assert (await gpus.read()).gpus == ()


@pytest.mark.parametrize(
    "settings", [{"processes": [{"name": "no pid"}]}, {"links": {"0": "string"}}, {"links": {"7": "nvlink"}}]
)
def test_simulated_gpu_with_wrong_settings_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="GPU 0"):
        SimulatedGpus([SimulatedGpu(name="X", memory_gib=1, **settings)])


# --- limits --------------------------------------------------------------------------------------------------------

THREE = GpuFacts(gpus=tuple(Gpu(uuid=f"GPU-{c}{c}", index=i, name="", memory_bytes=1) for i, c in enumerate("abc")))


@pytest.mark.parametrize(
    ("devices", "kept"),
    [
        ([], ["GPU-aa", "GPU-bb", "GPU-cc"]),
        ([1], ["GPU-bb"]),
        (["2", "GPU-aa"], ["GPU-aa", "GPU-cc"]),
        (["GPU-c"], ["GPU-cc"]),
    ],
)
def test_only_the_named_gpus_are_used(devices: list[str | int], kept: list[str]) -> None:
    facts = limited(THREE, devices)

    assert [gpu.uuid for gpu in facts.gpus] == kept
    assert facts.problem is None


async def test_named_gpu_that_is_not_there_is_said() -> None:
    facts = limited(await SimulatedGpus([SimulatedGpu(name="X", memory_gib=1)]).read(), ["0", "7"])

    assert len(facts.gpus) == 1
    assert "7" in (facts.problem or "")

"""The GPUs of this machine: which there are, how full they are, and who fills them. The only importer of NVML.

`NvmlGpus` reads the real ones, `SimulatedGpus` makes some up from the settings (`[gpus] simulated`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import msgspec
import pynvml
from msgspec import Struct
from msgspec.structs import replace

from nimhost.config import SimulatedGpu
from nimhost.errors import ConfigError
from nimhost.host.threads import Threads

GIB = 1024**3
_READ_TIMEOUT_S = 10.0
_CLOSE_S = 2.0
_HINTS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "NVIDIA's driver is not installed on this machine",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "NVIDIA's driver is installed but not loaded; run: sudo modprobe nvidia",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "NVIDIA's driver was updated under the running kernel; reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to use /dev/nvidiactl",
}


Link = Literal["nvlink", "board", "switch", "switches", "bridge", "node", "system"]
"""The ways between two GPUs, the fastest first: NVLink; PCIe on one board, over one switch, over several, over the
host bridge; within one NUMA node, across them."""
LINKS: tuple[Link, ...] = get_args(Link)
_TOPOLOGY: dict[int, Link] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "board",
    pynvml.NVML_TOPOLOGY_SINGLE: "switch",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "switches",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "bridge",
    pynvml.NVML_TOPOLOGY_NODE: "node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "system",
}
_CONTAINER = re.compile(r"(?:docker[-/]|/)([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.MULTILINE)


class GpuProcess(Struct, frozen=True, kw_only=True):
    pid: int
    name: str = ""
    user: str = ""
    used_bytes: int = 0
    """0 where the driver does not say."""
    container_id: str = ""
    """Of the container it runs in; empty for a process of the host."""


class Gpu(Struct, frozen=True, kw_only=True):
    """A GPU, or a MIG device, which is handed out like one; then `index` is that of the GPU it is a part of."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    used_bytes: int = 0
    processes: tuple[GpuProcess, ...] = ()
    simulated: bool = False
    links: Mapping[str, Link] = {}
    """uuid of another GPU -> the best way there."""
    problem: str | None = None
    """Why it could not be read; its numbers are then 0."""


class GpuFacts(Struct, frozen=True, kw_only=True):
    """One reading. `problem`: why there are no GPUs in it, or not all."""

    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


class Gpus(Protocol):
    async def read(self) -> GpuFacts:
        """What is there now. Never raises: what cannot be read is part of the facts."""
        ...

    async def close(self) -> None: ...


def limited(facts: GpuFacts, devices: Iterable[str | int]) -> GpuFacts:
    """With only these GPUs (uuids, also abbreviated, or indexes). None named: all of them."""
    wanted = [str(device) for device in devices]
    if not wanted:
        return facts
    kept = tuple(gpu for gpu in facts.gpus if any(_is(gpu, device) for device in wanted))
    absent = [device for device in wanted if not any(_is(gpu, device) for gpu in facts.gpus)]
    problem = f"[gpus] devices names {', '.join(absent)}: not found on this machine" if absent else None
    return replace(facts, gpus=kept, problem=facts.problem or problem)


def _is(gpu: Gpu, device: str) -> bool:
    return device == str(gpu.index) if device.isdigit() else gpu.uuid.startswith(device)


# --- simulated -----------------------------------------------------------------------------------------------------


class SimulatedGpus:
    """GPUs that are only said to be there. Change `settings` and the next reading is different."""

    def __init__(self, settings: Iterable[SimulatedGpu]) -> None:
        """Raises ConfigError for settings that make no sense."""
        self.settings = list(settings)
        self._read()

    async def read(self) -> GpuFacts:
        return self._read()

    def _read(self) -> GpuFacts:
        gpus = self.settings
        uuids = [gpu.uuid for gpu in gpus if gpu.uuid]
        if twice := next((uuid for uuid in uuids if uuids.count(uuid) > 1), None):
            raise ConfigError(f"[gpus] simulated: two GPUs have the uuid {twice}.", "Leave uuid out, or name others.")
        return GpuFacts(
            driver=next((gpu.driver for gpu in gpus if gpu.driver), None),
            cuda=next((gpu.cuda for gpu in gpus if gpu.cuda), None),
            gpus=_linked([_simulated(index, gpu) for index, gpu in enumerate(gpus)], _simulated_links(gpus)),
        )

    async def close(self) -> None:
        pass


class _SimulatedProcess(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pid: int
    name: str = ""
    user: str = ""
    used_gib: float = 0.0
    container: str = ""


def _simulated_links(gpus: Sequence[SimulatedGpu]) -> dict[tuple[int, int], Link]:
    """As one side says it; both sides need not."""
    pairs: dict[tuple[int, int], Link] = {}
    for index, gpu in enumerate(gpus):
        for other, link in gpu.links.items():
            if not (other.isdigit() and int(other) < len(gpus)) or link not in LINKS:
                raise ConfigError(
                    f"[gpus] simulated, GPU {index}, links: {other} = '{link}' is not a GPU and a way to it.",
                    f"Ways are: {', '.join(LINKS)}",
                )
            pairs[(min(index, int(other)), max(index, int(other)))] = link
    return pairs


def _linked(gpus: list[Gpu], pairs: Mapping[tuple[int, int], Link]) -> tuple[Gpu, ...]:
    """Pairs are places in `gpus`, the smaller one first."""
    return tuple(
        replace(
            gpu,
            links={gpus[b if a == place else a].uuid: link for (a, b), link in pairs.items() if place in (a, b)},
        )
        for place, gpu in enumerate(gpus)
    )


def _simulated(index: int, gpu: SimulatedGpu) -> Gpu:
    try:
        processes = msgspec.convert(gpu.processes, list[_SimulatedProcess])
    except msgspec.ValidationError as error:
        raise ConfigError(f"[gpus] simulated, GPU {index}, processes: {error}") from error
    return Gpu(
        uuid=gpu.uuid or simulated_uuid(index, gpu.name),
        index=index,
        name=gpu.name,
        memory_bytes=int(gpu.memory_gib * GIB),
        used_bytes=int(gpu.used_gib * GIB),
        processes=tuple(
            GpuProcess(pid=p.pid, name=p.name, user=p.user, used_bytes=int(p.used_gib * GIB), container_id=p.container)
            for p in processes
        ),
        simulated=True,
    )


def simulated_uuid(index: int, name: str) -> str:
    """The same for the same place and name, on every machine and after every restart."""
    return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'nimhost/{index}/{name}')}"


# --- NVML ----------------------------------------------------------------------------------------------------------


class NvmlGpus:
    """The real ones, read in a thread of its own. A driver that is missing, comes late or goes away is no error."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._thread = Threads(1, "nvml")
        self._reading: Future[GpuFacts] | None = None
        self._ready = False
        self._ways: tuple[list[str], dict[tuple[int, int], Link]] = ([], {})
        """Between which GPUs (by uuid): read once, they do not change."""

    async def read(self) -> GpuFacts:
        """Callers at the same time share one reading: a driver that hangs holds one thread, not many."""
        if self._reading is None or self._reading.done():
            self._reading = self._thread.submit(self._read)
        shared = asyncio.shield(asyncio.wrap_future(self._reading))
        try:
            return await asyncio.wait_for(shared, _READ_TIMEOUT_S)
        except TimeoutError:
            return GpuFacts(problem=f"NVIDIA's driver did not answer within {_READ_TIMEOUT_S:.0f} s; see: nvidia-smi")

    async def close(self) -> None:
        ended = asyncio.wrap_future(self._thread.submit(self._shut_down))
        self._thread.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended, _CLOSE_S)

    def _shut_down(self) -> None:
        if self._ready:
            self._ready = False
            with contextlib.suppress(self._nvml.NVMLError):  # it is gone already
                self._nvml.nvmlShutdown()

    def _read(self) -> GpuFacts:
        nvml = self._nvml
        try:
            if not self._ready:
                nvml.nvmlInit()
                self._ready = True
            gpus = [gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _gpus_at(nvml, index)]
            found = [gpu for gpu in gpus if gpu.uuid]
            uuids = [gpu.uuid for gpu in found]
            if self._ways[0] != uuids:
                self._ways = uuids, _nvml_links(nvml, found)
            cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
            return GpuFacts(
                driver=_text(nvml.nvmlSystemGetDriverVersion()),
                cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
                gpus=_linked(found, self._ways[1]),
                problem="; ".join(gpu.problem for gpu in gpus if gpu.problem) or None,
            )
        except nvml.NVMLError as error:
            self._shut_down()  # so that the next reading finds a driver that came back
            return GpuFacts(problem=_sentence(error))


def _nvml_links(nvml: Any, gpus: Sequence[Gpu]) -> dict[tuple[int, int], Link]:
    """Of whole GPUs: parts of one have no ways of their own."""
    whole = [place for place, gpu in enumerate(gpus) if gpu.uuid.startswith("GPU-")]
    pairs = {}
    for a, b in combinations(whole, 2):
        with contextlib.suppress(nvml.NVMLError):  # some machines do not say; then all ways are alike
            pairs[(a, b)] = _nvml_link(nvml, *(nvml.nvmlDeviceGetHandleByIndex(gpus[n].index) for n in (a, b)))
    return pairs


def _nvml_link(nvml: Any, one: Any, other: Any) -> Link:
    with contextlib.suppress(nvml.NVMLError):  # no NVLink at all
        status = nvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == pynvml.NVML_P2P_STATUS_OK:
            return "nvlink"
    return _TOPOLOGY.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other), "system")


def _gpus_at(nvml: Any, index: int) -> list[Gpu]:
    """The GPU at `index`, or its MIG devices. One that fails altogether has no uuid, just a problem."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        parts = _mig_devices(nvml, handle)
        return [_gpu(nvml, part, index) for part in ([handle] if parts is None else parts)]
    except nvml.NVMLError as error:
        return [Gpu(uuid="", index=index, name="", memory_bytes=0, problem=f"GPU {index}: {_sentence(error)}")]


def _mig_devices(nvml: Any, handle: Any) -> list[Any] | None:
    """The devices a GPU is divided into; None for a whole one."""
    try:
        mode, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return None  # most GPUs cannot be divided, and say so like this
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    devices = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError):  # an empty slot
            devices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
    return devices


def _gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    gpu = Gpu(uuid=_text(nvml.nvmlDeviceGetUUID(handle)), index=index, name="", memory_bytes=0)
    try:
        total, used = _memory(nvml, handle)
        name = _text(nvml.nvmlDeviceGetName(handle))
        return replace(gpu, name=name, memory_bytes=total, used_bytes=used, processes=_processes(nvml, handle))
    except nvml.NVMLError as error:
        return replace(gpu, problem=f"GPU {index}: {_sentence(error)}")


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Total and used bytes. A GPU without memory of its own shares the machine's."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.used)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_NOT_SUPPORTED:
            raise
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return kib["MemTotal"] * 1024, (kib["MemTotal"] - kib["MemAvailable"]) * 1024


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found: dict[int, int] = {}
    for read in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with contextlib.suppress(nvml.NVMLError):  # not supported on some GPUs: then nobody is named
            for process in read(handle):
                found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory or 0)
    return tuple(_process(pid, used_bytes) for pid, used_bytes in sorted(found.items()))


def _process(pid: int, used_bytes: int) -> GpuProcess:
    name = user = container_id = ""
    with contextlib.suppress(OSError, KeyError):  # it ended, is hidden from us, or its user has no name
        # Linux cuts names at 15 bytes, if need be in the middle of a letter.
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        container_id = container_of(Path(f"/proc/{pid}/cgroup").read_text(errors="replace"))
        uid = os.stat(f"/proc/{pid}").st_uid
        user = str(uid)
        user = pwd.getpwuid(uid).pw_name
    return GpuProcess(pid=pid, name=name, user=user, used_bytes=used_bytes, container_id=container_id)


def container_of(cgroups: str) -> str:
    """The container in the text of `/proc/PID/cgroup`; empty for a process of the host."""
    found = _CONTAINER.search(cgroups)
    return found[1] if found else ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _sentence(error: Any) -> str:
    return _HINTS.get(error.value) or f"NVIDIA's driver reports: {error}; see: nvidia-smi"

"""One reading of the machine, as the plan sees it: containers of ours, GPUs, images, weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from nimhost.refs import Ref, is_adapter_name


class Health(Struct, frozen=True, kw_only=True):
    """What probing a running engine found.

    unknown: not probed yet. starting: has not answered well since it was first probed. ok. failing: it was ok, and
    now it is not (a single failed probe does not count).
    """

    state: Literal["unknown", "starting", "ok", "failing"] = "unknown"
    detail: str = ""
    since: float = 0.0
    """When it became ok, or failing: Unix time in seconds."""
    models: tuple[str, ...] = ()
    """What it serves, but for `adapters`."""
    adapters: tuple[tuple[str, str], ...] = ()
    """What it says is put on a model: name and where it was loaded from."""

    @property
    def adapter_names(self) -> frozenset[str]:
        """Also of engines that list adapters like models: by their names, which no model can have."""
        return frozenset(name for name in (*self.models, *(name for name, _ in self.adapters)) if is_adapter_name(name))


class Instance(Struct, frozen=True, kw_only=True):
    """One of our containers."""

    id: str
    ref: Ref
    hash: str
    state: Literal["created", "running", "exited"]
    exit_code: int | None = None
    oom_killed: bool = False
    started_at: float = 0.0
    port: int | None = None
    gpu_ids: tuple[str, ...] = ()
    busy: bool = False
    """Requests are under way to it."""
    health: Health = Health()
    log_tail: str = ""
    """Of one that exited, or that stopped answering."""


def url_of(port: int | None) -> str:
    """Where an engine of ours is reached."""
    return f"http://127.0.0.1:{port}"


class Share(Struct, frozen=True, order=True):
    """A part of a GPU's memory that a deployment has, to the byte."""

    holder: str
    size_bytes: int
    hash: str = ""
    """Which version of the deployment has it: two of them may stand side by side."""


class Stranger(Struct, frozen=True, kw_only=True):
    """A process on a GPU that is none of our engines."""

    pid: int
    name: str = ""
    user: str = ""
    used_bytes: int = 0
    """0 where the driver does not say."""


class GpuSlot(Struct, frozen=True, kw_only=True):
    """A GPU that nimhost may use, and who uses it. Memory is 0 where it is not measured."""

    uuid: str
    index: int
    name: str = ""
    total_bytes: int = 0
    used_bytes: int = 0
    problem: str | None = None
    """Why it cannot be used at all."""
    holder: str | None = None
    """Who has it for itself alone."""
    shares: tuple[Share, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    starting: str | None = None
    """Whose engine is loading on it: until that is READY no other one may start there."""
    links: Mapping[str, int] = {}
    """uuid of another GPU -> how fast the way there is; larger is faster."""


class Room(Struct, frozen=True, kw_only=True):
    """Space on disk for what a deployment still has to fetch. None: not known."""

    weights_path: str = ""
    weights_free_bytes: int | None = None
    weights_there_bytes: int = 0
    """What of the weights is here already, verified or not."""
    promised_bytes: int = 0
    """What other downloads will still write beside them."""
    fetching: bool = False
    """A download of these very weights is in flight, and counts among what others see as promised."""
    images_path: str = ""
    images_free_bytes: int | None = None
    same: bool = False
    """Both are one file system."""


class Located(Struct, frozen=True, kw_only=True):
    """Weights on this machine: what to mount, and the checkpoint's directory below it."""

    source: str
    subdirectory: str = ""
    commit: str | None = None


class Observed(Struct, frozen=True, kw_only=True):
    """One reading of the machine. `docker_problem`: why there is no container list, and then nothing is done."""

    docker_problem: str | None = None
    instances: tuple[Instance, ...] = ()
    docker: str = ""
    """Its version; empty where it does not say."""
    gpus: tuple[GpuSlot, ...] = ()
    gpu_problem: str | None = None
    """Why there are no GPUs, or not all."""
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver can run."""
    gives_gpus: bool | None = None
    """Whether Docker can hand GPUs to containers; None: not known, or nobody wants one."""
    images: Mapping[Ref, str | None] = {}
    """Id of the image that a deployment wants; None when it is not on this machine."""
    weights: Mapping[Ref, Located | None] = {}
    requires: Mapping[Ref, str] = {}
    """What the image says about the driver it needs (`NVIDIA_REQUIRE_CUDA`), here or at its registry."""
    made_for: Mapping[Ref, str] = {}
    """The CPUs that the image is made for, in Docker's words (`amd64`, `arm64`), as it says itself, or its registry."""
    downloads: Mapping[Ref, int] = {}
    """Bytes that a pull of the image fetches, as its registry says."""
    asking: frozenset[Ref] = frozenset()
    """Whose image is not here, and its registry is just being asked what it is."""
    keeps_packed: bool = False
    """Docker keeps what it pulls as it came, beside what it unpacked of it."""
    machine: str = ""
    """The CPUs that Docker's machine has, in the same words; empty: not known."""
    rooms: Mapping[Ref, Room] = {}
    room_made_at: float = 0.0
    """When nimhost itself last freed room on disk: Unix time in seconds."""

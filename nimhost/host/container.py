"""What a container engine is to the rest of nimhost: values, and the interface that Docker and the fake have."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from msgspec import Struct

from nimhost.engines.spec import ContainerSpec

GPU_ULIMITS: Mapping[str, int] = {"memlock": -1, "stack": 67_108_864}
"""What NVIDIA asks for containers that use GPUs; bytes, -1 for no limit."""


class EngineFacts(Struct, frozen=True, kw_only=True):
    """The Docker engine itself."""

    version: str
    api_version: str
    root_dir: str
    """Where it keeps images and containers: the file system that a pull fills."""
    keeps_packed: bool = False
    """It keeps the layers of images as they came, beside what it unpacked of them."""
    architecture: str
    """The CPUs of its machine, as Docker calls them: `amd64`, `arm64`; empty: it does not say."""
    nvidia_runtime: bool | None
    """True: it lists NVIDIA's runtime or devices. None: it does not say, only `hands_out_gpus()` can tell."""


class Image(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    size_bytes: int
    env: dict[str, str] = {}
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    architecture: str = ""
    """The CPUs it is made for, as Docker calls them (`amd64`, `arm64`); empty: it does not say."""
    digest: str | None = None
    """`repository@sha256:…`, by which the very same image can be pulled again; None for one that was made here."""


class PullProgress(Struct, frozen=True, kw_only=True):
    """How far a pull is. Layers show their size when their download begins, so `total_bytes` grows at first."""

    done_bytes: int = 0
    total_bytes: int = 0
    layers_done: int = 0
    layers: int = 0
    message: str = ""


class Container(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    image: str
    labels: dict[str, str] = {}
    state: str
    """`created`, `running`, `paused`, `restarting`, `removing`, `exited` or `dead`."""
    exit_code: int | None = None
    """None while it has not exited."""
    oom_killed: bool = False
    error: str = ""
    """Why it could not be started, in Docker's words."""
    started_at: float = 0.0
    """Unix time; 0 if it never was."""
    finished_at: float = 0.0
    port: int | None = None
    """Of this machine, on 127.0.0.1; None while it does not run."""
    gpu_ids: tuple[str, ...] = ()
    """What was asked for it: uuids or indexes; `count:2` for just a number; `all`."""
    mounts: tuple[str, ...] = ()
    """Files and directories of this machine that are mounted into it."""


class Launch(Struct, frozen=True, kw_only=True):
    """A container to be made: what it runs, and what only this machine at this moment knows about it."""

    spec: ContainerSpec
    name: str
    image_id: str | None = None
    env: dict[str, str] = {}
    """Put over `spec.env`. Secrets are in it."""
    labels: dict[str, str] = {}
    gpu_ids: tuple[str, ...] = ()
    ulimits: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Launch({self.name})"


class ContainerEvent(Struct, frozen=True, kw_only=True):
    """Something happened. `connected` is ours: from here on nothing is missed, so now is the time for a full list."""

    kind: str = "container"
    """`container`, `image`, or `engine` for `connected`."""
    action: str
    """`create`, `start`, `die`, `oom`, `destroy` …, `pull`, `delete`, `connected`."""
    container_id: str = ""
    name: str = ""
    exit_code: int | None = None
    labels: dict[str, str] = {}


class Containers(Protocol):
    """The Docker engine. Every method raises DockerUnavailable, with a hint, while it is away; none remembers that."""

    async def facts(self) -> EngineFacts: ...

    async def hands_out_gpus(self, owner: str = "") -> bool:
        """Whether a container can be given GPUs: found out by starting an empty one, so nothing need be pulled."""
        ...

    async def list(self) -> tuple[Container, ...]:
        """Every container of the engine, whoever made it. Whole, or it raises."""
        ...

    async def image(self, name: str) -> Image | None:
        """By name, digest or id; None if it is not on this machine."""
        ...

    async def login(self, name: str) -> tuple[str, str] | None:
        """(user, password) of the user's `docker login` to the registry of an image; None without one."""
        ...

    async def pull(
        self,
        name: str,
        auth: tuple[str, str] | None,
        on_progress: Callable[[PullProgress], None],
        stall_timeout_s: float = 120,
    ) -> Image:
        """Fetch an image (`latest` if no tag is named) with `auth` (user, password) or the user's `docker login`.

        `on_progress` is called on the loop; its message says so when there is no news. Cancelling ends it at once and
        keeps the layers that are done. Raises ImageNotFound, RegistryDenied, RegistryUnavailable (also after
        `stall_timeout_s` without a byte), DiskFull.
        """
        ...

    async def run(self, launch: Launch) -> Container:
        """Create and start, or leave nothing behind: neither when the start fails (that error is raised, not what the
        clean-up met), nor when cancelled (it returns at once, the rest happens behind it).

        Limits that this machine refuses are left out, with a warning in the log. Raises NameTaken, ImageNotFound,
        GpuRuntimeMissing, GpuUnavailable, DockerError.
        """
        ...

    async def stop(self, container_id: str, timeout_s: int) -> None:
        """Ask it to end, kill it after `timeout_s`. One that is gone or not running is fine."""
        ...

    async def remove(self, container_id: str) -> None:
        """Kill and remove it. One that is gone is fine."""
        ...

    async def log_tail(self, container_id: str, lines: int = 80) -> str:
        """The last lines of stdout and stderr, of an exited container too."""
        ...

    def logs(self, container_id: str, *, tail: int, follow: bool) -> AsyncGenerator[bytes, None]:
        """stdout and stderr as written; `follow` waits for more until the container ends. Close it (`aclosing`)."""
        ...

    def events(self) -> AsyncGenerator[ContainerEvent, None]:
        """What happens from now on. First comes `connected`; it never ends but with DockerUnavailable, then call it
        again. Close it (`aclosing`).
        """
        ...

    async def close(self) -> None:
        """End all streams, let running calls end, which an engine that hangs has a few seconds for, free everything."""
        ...

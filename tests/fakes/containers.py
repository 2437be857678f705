"""Docker in memory, for tests that are not about Docker. It passes the same contract tests as the real one.

docker = FakeContainers(images=["my/engine:1"])
docker.on_start = serve_on_a_real_port            # (FakeContainer) -> port; sync or async, default: a made-up port
docker.exit("nimhost-default-x-0123", 1, log="CUDA out of memory")
docker.away = True                                # every call raises DockerUnavailable, event streams end
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nimhost.engines.spec import ContainerSpec
from nimhost.errors import (
    DockerError,
    DockerUnavailable,
    GpuRuntimeMissing,
    ImageNotFound,
    NameTaken,
    NimhostError,
    RegistryUnavailable,
)
from nimhost.host.containers import Container, ContainerEvent, EngineFacts, Image, Launch, PullProgress

log = logging.getLogger(__name__)


@dataclass
class FakeContainer:
    """One container: `seen` is what the interface shows of it."""

    seen: Container
    spec: ContainerSpec
    env: dict[str, str] = field(default_factory=dict)
    ulimits: dict[str, int] = field(default_factory=dict)
    log: list[bytes] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.seen.id

    @property
    def running(self) -> bool:
        return self.seen.state == "running"

    def write(self, text: str | bytes) -> None:
        self.log.append(text.encode() if isinstance(text, str) else text)
        self._notify()

    def tail(self, lines: int) -> list[bytes]:
        return b"".join(self.log).splitlines(keepends=True)[-lines if lines > 0 else 0 :] if lines else []

    def change(self, **fields: Any) -> None:
        self.seen = replace(self.seen, **fields)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


StartHook = Callable[[FakeContainer], "int | Awaitable[int | None] | None"]
StopHook = Callable[[FakeContainer], "Awaitable[None] | None"]


class FakeContainers:
    """`Containers`, in memory. Switches are plain attributes; set them at any time."""

    def __init__(self, images: Iterable[str] = (), registry: Iterable[str] = ()) -> None:
        self.images = {name: fake_image(name) for name in images}
        self.registry = {name: fake_image(name) for name in registry}
        """What can be pulled."""
        self.containers: dict[str, FakeContainer] = {}
        self.calls: list[str] = []
        """The name of every call, in order."""
        self.on_start: StartHook = lambda container: None
        """Called when a container starts; returns the port where it really listens."""
        self.on_stop: StopHook = lambda container: None
        """Called when it has ended, however."""
        self.login_of: dict[str, tuple[str, str]] = {}
        """Registry -> the user's `docker login` there."""
        self.pull_hangs = False
        self.pull_error: NimhostError | None = None
        self.pull_auth: tuple[str, str] | None = None
        """What the last pull was given."""
        self.create_error: NimhostError | None = None
        self.start_error: NimhostError | None = None
        """Raised by every start until it is None again."""
        self.start_held = asyncio.Event()
        """Clear it to hold starts in the middle."""
        self.start_held.set()
        self.refused_limits: set[str] = set()
        self.gpu_runtime = True
        self.keeps_packed = False
        self._away = False
        self._ids = count(1)
        self._ports = count(49153)
        self._listeners: set[asyncio.Queue[ContainerEvent | None]] = set()

    # --- switches --------------------------------------------------------------------------------------------------

    @property
    def away(self) -> bool:
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        """The engine stops answering; its containers stay as they are."""
        self._away = away
        if away:
            for listener in self._listeners:
                listener.put_nowait(None)

    def named(self, name: str) -> FakeContainer:
        """By id or by name."""
        return next(c for c in self.containers.values() if name in (c.id, c.seen.name))

    def exit(self, name: str, code: int, log: str = "", oom_killed: bool = False) -> None:
        """A container ends by itself."""
        container = self.named(name)
        if log:
            container.write(log)
        self._end(container, code, oom_killed)
        hook = self.on_stop(container)
        if inspect.isawaitable(hook):
            self._closing = asyncio.ensure_future(hook)

    def pause(self, name: str, paused: bool = True) -> None:
        """As `docker pause`, or `docker unpause`; the engine behind it answers all the same."""
        container = self.named(name)
        container.change(state="paused" if paused else "running")
        self._emit("pause" if paused else "unpause", container)

    def add_foreign(self, seen: Container) -> None:
        """A container that somebody else made."""
        self.containers[seen.id] = FakeContainer(seen, ContainerSpec(image=seen.image, probe=None))  # type: ignore[arg-type]
        self._emit("create", self.containers[seen.id])

    # --- Containers ------------------------------------------------------------------------------------------------

    async def facts(self) -> EngineFacts:
        await self._call("facts")
        return EngineFacts(
            version="0.0.fake", api_version="1.41", root_dir="/", architecture="amd64", nvidia_runtime=None,
            keeps_packed=self.keeps_packed,
        )  # fmt: skip

    async def hands_out_gpus(self, owner: str = "") -> bool:
        await self._call("hands_out_gpus")
        return self.gpu_runtime

    async def list(self) -> tuple[Container, ...]:
        await self._call("list")
        return tuple(container.seen for container in self.containers.values())

    async def image(self, name: str) -> Image | None:
        await self._call("image")
        return self._image(name)

    async def login(self, name: str) -> tuple[str, str] | None:
        await self._call("login")
        return self.login_of.get(name.partition("/")[0])

    async def pull(
        self,
        name: str,
        auth: tuple[str, str] | None,
        on_progress: Callable[[PullProgress], None],
        stall_timeout_s: float = 120,
    ) -> Image:
        await self._call("pull")
        self.pull_auth = auth
        if self.pull_error:
            raise self.pull_error
        wanted = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        if wanted not in self.registry:
            raise ImageNotFound(f"Image {name}: not found", "Check the name and the tag")
        size_bytes = self.registry[wanted].size_bytes
        for done_bytes in (0, size_bytes // 2):
            on_progress(PullProgress(done_bytes=done_bytes, total_bytes=size_bytes, layers=1))
            await self._hang(name, on_progress, stall_timeout_s)
            self._check_away()
        self.images[wanted] = self.registry[wanted]
        on_progress(PullProgress(done_bytes=size_bytes, total_bytes=size_bytes, layers_done=1, layers=1))
        self._emit_image("pull", wanted)
        return replace(self.images[wanted], name=name)

    async def _hang(self, name: str, on_progress: Callable[[PullProgress], None], stall_timeout_s: float) -> None:
        since = time.monotonic()
        while self.pull_hangs:
            await asyncio.sleep(min(0.05, stall_timeout_s))
            quiet_s = time.monotonic() - since
            on_progress(PullProgress(layers=1, message=f"no progress for {quiet_s:.0f} s"))
            if quiet_s >= stall_timeout_s:
                raise RegistryUnavailable(f"Image {name}: no progress for {quiet_s:.0f} s", "Check the connection")
        await asyncio.sleep(0)

    async def _create(self, launch: Launch) -> str:
        await self._call("create")
        spec, name = launch.spec, launch.name
        if self.create_error:
            raise self.create_error
        image = launch.image_id or spec.image
        if self._image(image) is None:
            raise ImageNotFound(f"Image {image}: No such image: {image}")
        if any(name == other.seen.name for other in self.containers.values()):
            raise NameTaken(f'Docker: Conflict. The container name "/{name}" is already in use')
        for mount in spec.mounts:
            if not Path(mount.source).exists():
                raise DockerError(f"Docker: bind source path does not exist: {mount.source}", "Create it")
        seen = Container(
            id=f"{next(self._ids):064x}", name=name, image=image, labels=launch.labels, state="created",
            gpu_ids=launch.gpu_ids, mounts=tuple(mount.source for mount in spec.mounts),
        )  # fmt: skip
        self.containers[seen.id] = FakeContainer(seen, spec, {**spec.env, **launch.env}, launch.ulimits)
        self._emit("create", self.containers[seen.id])
        return seen.id

    async def _start(self, container_id: str) -> Container:
        await self._call("start")
        container = self._existing(container_id)
        await self.start_held.wait()
        self._refuse_start(container)
        if container.seen.state == "running":
            return container.seen
        container.change(state="running", started_at=time.time(), exit_code=None, finished_at=0.0, oom_killed=False)
        self._emit("start", container)
        port = self.on_start(container)
        if inspect.isawaitable(port):
            port = await port
        if container.running:  # it may have ended at once
            container.change(port=port or next(self._ports))
        return container.seen

    def _refuse_start(self, container: FakeContainer) -> None:
        if self.start_error:
            raise self.start_error
        if container.seen.gpu_ids and not self.gpu_runtime:
            raise GpuRuntimeMissing('Docker: could not select device driver "nvidia" with capabilities: [[gpu]]', "ctk")
        for limit in container.ulimits.keys() & self.refused_limits:
            raise DockerError(f"Docker: error setting rlimit type {limit}: operation not permitted")

    async def run(self, launch: Launch) -> Container:
        refused = launch.ulimits.keys() & self.refused_limits
        allowed = {name: value for name, value in launch.ulimits.items() if name not in refused}
        container_id = await self._create(replace(launch, ulimits=allowed))
        try:
            started = await self._start(container_id)
        except BaseException:
            await self._remove(container_id)
            raise
        for limit in sorted(refused):
            log.warning("this machine refuses the limit %s=%s: started without it", limit, launch.ulimits[limit])
        return started

    async def stop(self, container_id: str, timeout_s: int) -> None:
        await self._call("stop")
        if container := self.containers.get(container_id):
            await self._stop(container, 143)

    async def remove(self, container_id: str) -> None:
        await self._call("remove")
        await self._remove(container_id)

    async def log_tail(self, container_id: str, lines: int = 80) -> str:
        await self._call("log_tail")
        return b"".join(self._existing(container_id).tail(lines)).decode(errors="replace")

    async def logs(self, container_id: str, *, tail: int, follow: bool) -> AsyncGenerator[bytes, None]:
        await self._call("logs")
        container = self._existing(container_id)
        for line in container.tail(tail):
            yield line
        shown = len(container.log)
        while follow and container.running and container_id in self.containers:
            await container.changed.wait()
            new, shown = container.log[shown:], len(container.log)
            for frame in new:
                yield frame

    async def events(self) -> AsyncGenerator[ContainerEvent, None]:
        await self._call("events")
        queue: asyncio.Queue[ContainerEvent | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield ContainerEvent(kind="engine", action="connected")
            while event := await queue.get():
                yield event
        finally:
            self._listeners.discard(queue)
        raise DockerUnavailable("Docker closed the stream of events", "Run: sudo systemctl status docker")

    async def close(self) -> None:
        """Ends the streams. The containers run on, as they do when a daemon ends: a next one may use this object."""
        for listener in self._listeners:
            listener.put_nowait(None)

    async def stop_all(self) -> None:
        """For the end of a test: everything that `on_start` opened gets its `on_stop`."""
        for container in tuple(self.containers.values()):
            await self._stop(container, 137)

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)  # as with the real one, others run meanwhile
        self._check_away()

    def _check_away(self) -> None:
        if self._away:
            raise DockerUnavailable("Docker is not running (as the test wants)", "Run: sudo systemctl start docker")

    def _image(self, name: str) -> Image | None:
        found = self.images.get(name) or self.images.get(f"{name}:latest")
        return found or next((image for image in self.images.values() if name in (image.id, image.digest)), None)

    def _existing(self, container_id: str) -> FakeContainer:
        if container_id not in self.containers:
            raise DockerError(f"Docker: No such container: {container_id}")
        return self.containers[container_id]

    async def _stop(self, container: FakeContainer, code: int) -> None:
        if not container.running:
            return
        self._end(container, code)
        hook = self.on_stop(container)
        if inspect.isawaitable(hook):
            await hook

    def _end(self, container: FakeContainer, code: int, oom_killed: bool = False) -> None:
        container.change(state="exited", exit_code=code, oom_killed=oom_killed, finished_at=time.time(), port=None)
        self._emit("die", container, code)

    async def _remove(self, container_id: str) -> None:
        if container := self.containers.get(container_id):
            await self._stop(container, 137)
            self.containers.pop(container_id, None)
            container.change()
            self._emit("destroy", container)

    def _emit(self, action: str, container: FakeContainer, exit_code: int | None = None) -> None:
        seen = container.seen
        event = ContainerEvent(
            action=action, container_id=seen.id, name=seen.name, exit_code=exit_code, labels=seen.labels
        )
        for listener in self._listeners:
            listener.put_nowait(event)

    def _emit_image(self, action: str, name: str) -> None:
        for listener in self._listeners:
            listener.put_nowait(ContainerEvent(kind="image", action=action, name=name))


def fake_image(name: str, size_bytes: int = 1000, env: Mapping[str, str] = {}) -> Image:
    """An image as `FakeContainers.images` and `.registry` hold them; its id follows from its name."""
    return Image(
        id=f"sha256:{hashlib.sha256(name.encode()).hexdigest()}", name=name, size_bytes=size_bytes, env=dict(env)
    )

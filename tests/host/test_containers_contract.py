"""What every `Containers` does: the fake in memory and the real engine pass the same tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import msgspec
import pytest

from nimhost.engines.spec import ContainerSpec, Mount, Probe
from nimhost.errors import DockerError, DockerUnavailable, ImageNotFound, NameTaken, RegistryUnavailable
from nimhost.host.containers import Container, ContainerEvent, Containers, DockerContainers, Launch, PullProgress
from tests.fakes.containers import FakeContainer, FakeContainers
from tests.host import docker_world
from tests.support import eventually

LABELS = {**docker_world.LABELS, "io.nimhost.deployment": "default/x"}
GPUS = ("GPU-11111111-aaaa", "GPU-22222222-bbbb")


@dataclass
class World:
    """An engine, what it has, and the few things that are done to it in another way when it is real."""

    containers: Containers
    image: str
    pullable: str
    hang_pulls: Callable[[], None]
    cannot_start: Callable[[ContainerSpec], ContainerSpec]
    away: Callable[[], Containers]

    def spec(self, *args: str, **more: Any) -> ContainerSpec:
        return ContainerSpec(image=self.image, args=args, probe=Probe("/"), **more)

    async def run(self, *args: str, name: str = docker_world.NAME, **more: Any) -> Container:
        launch = Launch(spec=self.spec(*args), name=name, labels=LABELS, **more)
        return await self.containers.run(launch)

    async def ours(self) -> list[Container]:
        return [c for c in await self.containers.list() if c.labels.items() >= LABELS.items()]

    async def seen(self, container_id: str) -> Container:
        return next(c for c in await self.containers.list() if c.id == container_id)

    async def exited(self, container_id: str) -> Container:
        async def found() -> Container | None:
            container = await self.seen(container_id)
            return container if container.state == "exited" else None

        return await eventually(found, 15)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.docker)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    real = request.param == "real"
    async with real_world(request.getfixturevalue("machine"), tmp_path) if real else fake_world() as made:
        before = set(threading.enumerate())
        yield made
        await made.containers.close()
        await eventually(lambda: not {t for t in set(threading.enumerate()) - before if t.name.startswith("docker")})


@contextlib.asynccontextmanager
async def fake_world() -> AsyncIterator[World]:
    fake = FakeContainers(images=["program:latest"], registry=["registry.test/one:1"])
    program = FakeProgram(fake)
    fake.on_start, fake.on_stop = program.start, program.stop

    def cannot_start(spec: ContainerSpec) -> ContainerSpec:
        fake.start_error = DockerError("Docker: unable to find user nobody-here")
        return spec

    def away() -> Containers:
        fake.away = True
        return fake

    yield World(
        fake,
        image="program:latest",
        pullable="registry.test/one:1",
        hang_pulls=lambda: setattr(fake, "pull_hangs", True),
        cannot_start=cannot_start,
        away=away,
    )
    await fake.stop_all()


class FakeProgram:
    """container_program.py without a container."""

    def __init__(self, fake: FakeContainers) -> None:
        self.fake = fake
        self.servers: dict[str, asyncio.Server] = {}

    async def start(self, container: FakeContainer) -> int | None:
        match container.spec.args:
            case ("serve",):
                container.write("serving\n")
                self.servers[container.id] = await asyncio.start_server(self.answer, "127.0.0.1", 0)
                return int(self.servers[container.id].sockets[0].getsockname()[1])
            case ("fail", code):
                log = b"a word on stdout\nthe cause on stderr \xc3\xa9\n\xff not UTF-8\n"
                container.write(log)
                self.fake.exit(container.id, int(code))
            case ("talk",):
                container.write("first\n")
                asyncio.get_running_loop().call_later(0.2, self.fake.exit, container.id, 0, "second\n")
        return None

    async def stop(self, container: FakeContainer) -> None:
        if server := self.servers.pop(container.id, None):
            server.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")
        writer.close()


@dataclass
class Machine:
    host: str
    client: docker.APIClient
    registry: int


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    host = docker_world.start_engine()
    docker_world.build_image(host)
    with (
        contextlib.closing(docker.APIClient(base_url=host, version="1.41", timeout=60)) as client,
        docker_world.registry(tmp_path_factory.mktemp("registry")) as registry,
    ):
        docker_world.push_random_image(client, registry, "one", 4_000_000)
        yield Machine(host, client, registry)


@contextlib.asynccontextmanager
async def real_world(machine: Machine, tmp_path: Path) -> AsyncIterator[World]:
    containers = DockerContainers(machine.host)
    docker_world.remove_leftovers(machine.client)
    with docker_world.wire(machine.registry) as wire:
        pullable = f"127.0.0.1:{wire.port}/one:1"
        yield World(
            containers,
            image=docker_world.IMAGE,
            pullable=pullable,
            hang_pulls=lambda: setattr(wire, "held", True),
            cannot_start=lambda spec: msgspec.structs.replace(spec, user="nobody-here"),
            away=lambda: DockerContainers(f"unix://{tmp_path}/none.sock"),
        )
        await containers.close()
        docker_world.remove_leftovers(machine.client)
        with contextlib.suppress(docker.errors.ImageNotFound):
            machine.client.remove_image(pullable, force=True)


# --- what it knows -------------------------------------------------------------------------------------------------


async def test_engine_says_what_it_is(world: World) -> None:
    facts = await world.containers.facts()

    assert facts.version
    assert facts.api_version.startswith("1.")
    assert Path(facts.root_dir).is_absolute()
    assert facts.architecture in ("amd64", "arm64")  # the words that images use, too


async def test_gpu_support_is_found_out_without_an_image(world: World) -> None:
    assert await world.containers.hands_out_gpus() is True
    assert not await world.ours()


async def test_image_that_is_here_is_described(world: World) -> None:
    image = await world.containers.image(world.image)

    assert image is not None
    assert image.id.startswith("sha256:")
    assert image.size_bytes > 0
    assert (await world.containers.image(image.id)) is not None


async def test_image_that_is_not_here_is_none(world: World) -> None:
    assert await world.containers.image("nimhost-test/never-made:1") is None


# --- running -------------------------------------------------------------------------------------------------------


async def test_started_container_is_read_back_with_port_labels_and_gpus(world: World) -> None:
    before = time.time()
    container = await world.run("serve", gpu_ids=GPUS)

    assert container.state == "running"
    assert container.port
    assert container.labels.items() >= LABELS.items()
    assert container.gpu_ids == GPUS
    assert container.started_at >= before - 1
    assert container.exit_code is None
    assert await world.ours() == [container]


async def test_started_container_answers_on_its_loopback_port(world: World) -> None:
    container = await world.run("serve")

    def status() -> int | None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{container.port}/") as reply:
            return int(reply.status)
        return None

    assert await eventually(lambda: asyncio.to_thread(status), 10) == 200


async def test_container_that_exits_shows_its_code_and_log(world: World) -> None:
    container = await world.run("fail", "3")
    exited = await world.exited(container.id)

    assert exited.exit_code == 3
    assert exited.finished_at >= exited.started_at > 0
    assert exited.port is None
    tail = await world.containers.log_tail(container.id)
    assert "a word on stdout" in tail
    assert "the cause on stderr é" in tail
    assert "\ufffd not UTF-8" in tail


async def test_log_tail_is_only_the_last_lines(world: World) -> None:
    container = await world.run("talk")
    await world.exited(container.id)

    assert await world.containers.log_tail(container.id, lines=1) == "second\n"


async def test_stop_ends_it_and_keeps_it(world: World) -> None:
    container = await world.run("serve")
    await world.containers.stop(container.id, timeout_s=5)

    assert (await world.seen(container.id)).state == "exited"


async def test_stop_and_remove_of_what_is_gone_are_fine(world: World) -> None:
    container = await world.run("fail", "0")
    await world.exited(container.id)

    await world.containers.stop(container.id, timeout_s=1)
    await world.containers.remove(container.id)
    await world.containers.stop(container.id, timeout_s=1)
    await world.containers.remove(container.id)

    assert not await world.ours()


async def test_remove_kills_a_running_one(world: World) -> None:
    container = await world.run("quiet")
    await world.containers.remove(container.id)

    assert not await world.ours()


# --- refusals ------------------------------------------------------------------------------------------------------


async def test_a_taken_name_is_refused(world: World) -> None:
    first = await world.run("quiet")

    with pytest.raises(NameTaken):
        await world.run("quiet")
    assert await world.ours() == [first]


async def test_an_absent_image_is_refused(world: World) -> None:
    spec = ContainerSpec(image="nimhost-test/never-made:1", probe=Probe("/"))

    with pytest.raises(ImageNotFound, match="never-made"):
        await world.containers.run(Launch(spec=spec, name=docker_world.NAME, labels=LABELS))
    assert not await world.ours()


async def test_a_missing_mount_source_is_named_and_not_made(world: World, tmp_path: Path) -> None:
    source = tmp_path / "absent"
    spec = world.spec("quiet", mounts=(Mount(str(source), "/model-store"),))

    with pytest.raises(DockerError, match="absent"):
        await world.containers.run(Launch(spec=spec, name=docker_world.NAME, labels=LABELS))
    assert not source.exists()
    assert not await world.ours()


@pytest.mark.fault(3)
async def test_start_that_fails_shows_its_error_and_leaves_nothing(world: World) -> None:
    spec = world.cannot_start(world.spec("quiet"))

    for _ in range(2):  # the second one would report 409 if the first had left its container
        with pytest.raises(DockerError, match="unable to find user") as caught:
            await world.containers.run(Launch(spec=spec, name=docker_world.NAME, labels=LABELS))
        assert not isinstance(caught.value, NameTaken)
    assert not await world.ours()


@pytest.mark.fault(4)
@pytest.mark.parametrize("steps", range(0, 12, 3))
async def test_cancelled_run_leaves_nothing_whenever_it_comes(world: World, steps: int) -> None:
    await world.containers.facts()  # connected
    task = asyncio.create_task(world.run("quiet"))
    await asyncio.sleep(steps * 0.03)  # not a wait: the moment of cancelling is what varies
    cancelled_at = time.monotonic()
    task.cancel()
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    assert time.monotonic() - cancelled_at < 0.2

    if isinstance(result, Container):
        await world.containers.remove(result.id)
    else:
        assert isinstance(result, asyncio.CancelledError)
        await world.containers.close()  # waits for what goes on behind it
        left = docker_left(world)
        assert await left() == []


def docker_left(world: World) -> Callable[[], Awaitable[list[Container]]]:
    """A look through a new object: the world's own is closed."""

    async def look() -> list[Container]:
        if not isinstance(world.containers, DockerContainers):
            return await world.ours()
        second = DockerContainers(world.containers._host)
        try:
            return [c for c in await second.list() if c.labels.items() >= LABELS.items()]
        finally:
            await second.close()

    return look


@pytest.mark.fault(21)
async def test_engine_that_is_away_is_said_to_be_with_a_hint(world: World) -> None:
    away = world.away()
    calls = [away.facts(), away.list(), away.image("x"), away.stop("x", 1), away.remove("x")]
    for call in [*calls, anext(away.events()), away.pull("x", None, lambda _: None)]:
        with pytest.raises(DockerUnavailable) as caught:
            await call
        assert caught.value.hint
    await away.close()


# --- streams -------------------------------------------------------------------------------------------------------


async def test_events_begin_with_connected_and_tell_of_starts_and_exits(world: World) -> None:
    seen: list[ContainerEvent] = []

    async def watch() -> None:
        async with aclosing(world.containers.events()) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 - looked at while it runs

    watching = asyncio.create_task(watch())
    await eventually(lambda: seen)
    container = await world.run("fail", "7")
    await eventually(lambda: [e for e in seen if e.action == "die" and e.container_id == container.id], 15)
    await world.containers.remove(container.id)
    await eventually(lambda: [e for e in seen if e.action == "destroy" and e.container_id == container.id])
    await cancelled_at_once(watching)

    assert seen[0].action == "connected"
    own = [e for e in seen if e.container_id == container.id]
    assert [e.action for e in own] == ["create", "start", "die", "destroy"]
    assert own[2].exit_code == 7
    assert own[2].labels.items() >= LABELS.items()


async def cancelled_at_once(task: asyncio.Task[object]) -> None:
    before = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - before < 0.2


async def test_followed_logs_end_with_the_container(world: World) -> None:
    container = await world.run("talk")
    async with aclosing(world.containers.logs(container.id, tail=100, follow=True)) as logs:
        text = b"".join([chunk async for chunk in logs])

    assert text == b"first\nsecond\n"


async def test_logs_without_follow_end_at_once(world: World) -> None:
    container = await world.run("serve")
    await eventually(lambda: world.containers.log_tail(container.id))
    async with aclosing(world.containers.logs(container.id, tail=100, follow=False)) as logs:
        assert b"".join([chunk async for chunk in logs]) == b"serving\n"


@pytest.mark.parametrize("program", ["serve", "quiet"])  # with and without a first byte
async def test_followed_logs_can_be_cancelled_at_once(world: World, program: str) -> None:
    container = await world.run(program)
    got: list[bytes] = []

    async def follow() -> None:
        async with aclosing(world.containers.logs(container.id, tail=100, follow=True)) as logs:
            async for chunk in logs:
                got.append(chunk)  # noqa: PERF401 - looked at while it runs

    task = asyncio.create_task(follow())
    if program == "serve":
        await eventually(lambda: got)
    else:
        await eventually(lambda: streams(world) or isinstance(world.containers, FakeContainers))
    await cancelled_at_once(task)
    await eventually(lambda: not streams(world))


async def test_closing_ends_open_streams_and_leaves_containers_running(world: World) -> None:
    container = await world.run("quiet")
    seen: list[ContainerEvent] = []

    async def watch() -> None:
        async with aclosing(world.containers.events()) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 - looked at while it runs

    watching = asyncio.create_task(watch())
    await eventually(lambda: seen)
    await world.containers.close()

    with pytest.raises(DockerUnavailable):
        await asyncio.wait_for(watching, 2)
    assert [(c.id, c.state) for c in await docker_left(world)()] == [(container.id, "running")]


def streams(world: World) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in ("docker-logs", "docker-events", "docker-pull")]


# --- pulling -------------------------------------------------------------------------------------------------------


async def test_pull_reports_bytes_and_brings_the_image(world: World) -> None:
    steps: list[PullProgress] = []
    image = await world.containers.pull(world.pullable, None, steps.append)

    assert steps[-1].done_bytes == steps[-1].total_bytes > 0
    assert steps[-1].layers_done == steps[-1].layers == 1
    assert [s.done_bytes for s in steps] == sorted(s.done_bytes for s in steps)
    assert image.name == world.pullable
    found = await world.containers.image(world.pullable)
    assert found is not None
    assert found.id == image.id


@pytest.mark.fault(2)
async def test_pull_of_an_unknown_image_is_final(world: World) -> None:
    with pytest.raises(ImageNotFound, match="unknown") as caught:
        await world.containers.pull(world.pullable.replace("one", "unknown"), None, lambda _: None)
    assert caught.value.final


@pytest.mark.fault(1)
async def test_pull_that_stalls_says_so_and_is_given_up(world: World) -> None:
    world.hang_pulls()
    messages: list[str] = []
    with pytest.raises(RegistryUnavailable, match="no progress") as caught:
        await world.containers.pull(world.pullable, None, lambda p: messages.append(p.message), stall_timeout_s=0.5)

    assert "no progress for" in messages[-1]
    assert not caught.value.final
    assert await world.containers.image(world.pullable) is None
    await eventually(lambda: not streams(world))


@pytest.mark.fault(1)
async def test_pull_that_hangs_before_the_first_byte_can_be_cancelled_at_once(world: World) -> None:
    world.hang_pulls()
    task: asyncio.Task[object] = asyncio.create_task(world.containers.pull(world.pullable, None, lambda _: None))
    await eventually(lambda: streams(world) or isinstance(world.containers, FakeContainers))
    await asyncio.sleep(0.1)  # into the request
    await cancelled_at_once(task)
    await eventually(lambda: not streams(world))


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(13)
async def test_limits_that_the_machine_refuses_are_dropped_with_a_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(world.containers, FakeContainers):
        world.containers.refused_limits = {"nofile"}
    # No machine allows more open files than the kernel's ceiling.
    limits = {"nofile": 2**31 - 1, "stack": 67_108_864}
    container = await world.run("quiet", ulimits=limits)

    assert container.state == "running"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "nofile" in warning

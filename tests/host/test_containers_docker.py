"""What only a real engine can show about `DockerContainers`."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import docker
import pytest

from nimhost.engines.spec import ContainerSpec, Mount, Probe
from nimhost.errors import DockerUnavailable, GpuRuntimeMissing, NimhostError, RegistryDenied, RegistryUnavailable
from nimhost.host.containers import GPU_ULIMITS, ContainerEvent, DockerContainers, Launch, PullProgress
from nimhost.host.docker_requests import probe_labels
from tests.host import docker_world
from tests.support import eventually

pytestmark = pytest.mark.docker
LABELS = docker_world.LABELS
SIZE = 20_000_000


@pytest.fixture(scope="module")
def host() -> str:
    found = docker_world.start_engine()
    docker_world.build_image(found)
    return found


@pytest.fixture
def client(host: str) -> Iterator[docker.APIClient]:
    with contextlib.closing(docker.APIClient(base_url=host, version="1.41", timeout=60)) as made:
        docker_world.remove_leftovers(made)
        yield made
        docker_world.remove_leftovers(made)


@pytest.fixture
async def containers(host: str, client: docker.APIClient) -> AsyncIterator[DockerContainers]:
    made = DockerContainers(host)
    yield made
    await made.close()


@pytest.fixture
def wire(client: docker.APIClient, tmp_path: Path) -> Iterator[docker_world.Wire]:
    with docker_world.registry(tmp_path) as port, docker_world.wire(port) as made:
        docker_world.push_random_image(client, port, "big", SIZE)
        yield made
        with contextlib.suppress(docker.errors.ImageNotFound):
            client.remove_image(f"127.0.0.1:{made.port}/big:1", force=True)


def spec(*args: str, **more: Any) -> ContainerSpec:
    return ContainerSpec(image=docker_world.IMAGE, args=args, probe=Probe("/"), **more)


# --- what Docker is told -------------------------------------------------------------------------------------------


@pytest.mark.fault(12)
@pytest.mark.fault(19)
async def test_engine_has_been_told_all_that_protects(
    containers: DockerContainers, client: docker.APIClient, tmp_path: Path
) -> None:
    wanted = spec("quiet", mounts=(Mount(str(tmp_path), "/model-store"),), shm_bytes=123_456_789, user="1000:1000")
    gpus = ("GPU-11111111-aaaa", "GPU-22222222-bbbb")
    container = await containers.run(
        Launch(spec=wanted, name=docker_world.NAME, labels=LABELS, gpu_ids=gpus, env={"A": "1"})
    )

    found = client.inspect_container(container.id)
    settings = found["HostConfig"]
    assert [request["DeviceIDs"] for request in settings["DeviceRequests"]] == [list(gpus)]
    assert found["NetworkSettings"]["Ports"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(container.port)}]}
    assert [(m["Destination"], m["RW"]) for m in found["Mounts"]] == [("/model-store", False)]
    assert container.mounts == (str(tmp_path),)
    assert settings["ShmSize"] == 123_456_789
    assert settings["RestartPolicy"]["Name"] == "no"
    assert settings["Init"] is True
    assert settings["CapDrop"] == ["ALL"]
    assert settings["SecurityOpt"] == ["no-new-privileges"]
    assert settings["LogConfig"]["Config"] == {"max-size": "50m", "max-file": "3"}
    assert found["Config"]["User"] == "1000:1000"
    assert "A=1" in found["Config"]["Env"]


@pytest.mark.fault(13)
async def test_gpu_limits_are_given_or_dropped_but_never_fatal(
    containers: DockerContainers, caplog: pytest.LogCaptureFixture
) -> None:
    limits = dict(GPU_ULIMITS)
    container = await containers.run(Launch(spec=spec("quiet"), name=docker_world.NAME, labels=LABELS, ulimits=limits))

    assert container.state == "running"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all("memlock" in warning or "stack" in warning for warning in warnings)


async def test_quiet_listing_looks_only_at_what_changed(
    containers: DockerContainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    inspect = docker.APIClient.inspect_container

    def counting(client: docker.APIClient, container: str) -> object:
        looked_at.append(container)
        return inspect(client, container)

    first = await containers.run(Launch(spec=spec("serve"), name=f"{docker_world.NAME}-1", labels=LABELS))
    second = await containers.run(Launch(spec=spec("serve"), name=f"{docker_world.NAME}-2", labels=LABELS))
    await containers.list()
    monkeypatch.setattr(docker.APIClient, "inspect_container", counting)

    await containers.list()
    assert first.id not in looked_at
    assert second.id not in looked_at

    await containers.stop(first.id, timeout_s=5)
    listed = {container.id: container.state for container in await containers.list()}
    assert first.id in looked_at
    assert second.id not in looked_at
    assert (listed[first.id], listed[second.id]) == ("exited", "running")


async def test_many_calls_at_once_share_the_threads(containers: DockerContainers) -> None:
    found = await asyncio.gather(*(containers.image(docker_world.IMAGE) for _ in range(200)))

    assert all(found)
    assert len([t for t in threading.enumerate() if t.name.startswith("docker")]) <= 32


# --- pulls ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault(1)
async def test_pull_shows_bytes_while_they_come(containers: DockerContainers, wire: docker_world.Wire) -> None:
    wire.bytes_per_s = SIZE  # about a second
    steps: list[PullProgress] = []
    await containers.pull(f"127.0.0.1:{wire.port}/big:1", None, steps.append)

    seen = {step.done_bytes for step in steps if 0 < step.done_bytes < step.total_bytes}
    assert len(seen) > 3
    assert steps[-1].done_bytes >= SIZE


@pytest.mark.fault(1)
async def test_pull_can_be_cancelled_in_the_middle_and_done_again(
    containers: DockerContainers, wire: docker_world.Wire
) -> None:
    wire.bytes_per_s = SIZE // 4
    name = f"127.0.0.1:{wire.port}/big:1"
    steps: list[PullProgress] = []
    task = asyncio.create_task(containers.pull(name, None, steps.append))
    await eventually(lambda: steps and steps[-1].done_bytes > 0, 10)
    before = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert time.monotonic() - before < 0.2
    await eventually(lambda: not [t for t in threading.enumerate() if t.name == "docker-pull"])
    assert await containers.image(name) is None
    wire.bytes_per_s = 0
    assert (await containers.pull(name, None, steps.append)).name == name


@pytest.mark.fault(1)
async def test_pull_that_stalls_in_the_middle_says_so_and_is_given_up(
    containers: DockerContainers, wire: docker_world.Wire
) -> None:
    wire.bytes_per_s = SIZE // 4
    steps: list[PullProgress] = []

    def report(step: PullProgress) -> None:
        steps.append(step)
        wire.held = step.done_bytes > 0

    with pytest.raises(RegistryUnavailable, match="no progress"):
        await containers.pull(f"127.0.0.1:{wire.port}/big:1", None, report, stall_timeout_s=1)
    assert steps[-1].done_bytes > 0
    assert "no progress" in steps[-1].message


async def test_image_can_be_pulled_by_its_digest(containers: DockerContainers, wire: docker_world.Wire) -> None:
    tagged = await containers.pull(f"127.0.0.1:{wire.port}/big:1", None, lambda _: None)
    assert tagged.digest is not None

    again = await containers.pull(tagged.digest, None, lambda _: None)

    assert "@sha256:" in tagged.digest
    assert again.id == tagged.id


@contextlib.contextmanager
def refusing_registry(status: int, body: bytes) -> Iterator[int]:
    """Answers everything with `status`."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v2/" else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.fault(2)
@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b'{"errors": [{"code": "UNAUTHORIZED", "message": "no, canary-key"}]}', RegistryDenied),
        (403, b'{"errors": [{"code": "DENIED", "message": "access denied for canary-key"}]}', RegistryDenied),
        (429, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}', RegistryUnavailable),
        (503, b"", RegistryUnavailable),
    ],
)
async def test_registry_that_refuses_is_told_apart_and_no_key_is_shown(
    containers: DockerContainers, status: int, body: bytes, expected: type[NimhostError]
) -> None:
    with refusing_registry(status, body) as port, pytest.raises(expected) as caught:
        await containers.pull(f"127.0.0.1:{port}/x:1", ("$oauthtoken", "canary-key"), lambda _: None)

    assert f"127.0.0.1:{port}/x:1" in caught.value.message
    shown = "".join(str(part) for part in (caught.value, caught.value.hint, caught.value.__cause__))
    assert "canary-key" not in shown


@pytest.mark.fault(2)
async def test_registry_that_is_not_there_may_come_back(containers: DockerContainers) -> None:
    with pytest.raises(RegistryUnavailable) as caught:
        await containers.pull("127.0.0.1:9/x", None, lambda _: None)
    assert not caught.value.final


@pytest.mark.fault(4)
async def test_a_probe_that_a_killed_daemon_left_is_removed_by_its_own_next_one(
    containers: DockerContainers, client: docker.APIClient
) -> None:
    left = [
        client.create_container(docker_world.IMAGE, labels={**LABELS, **probe_labels(owner)})["Id"]
        for owner in ("mine", "another's")
    ]
    assert await containers.hands_out_gpus("mine") is True
    assert [c["Id"] for c in client.containers(all=True, filters={"label": "io.nimhost.probe"})] == left[1:]


# --- an engine that goes away --------------------------------------------------------------------------------------


@pytest.fixture
def second() -> Iterator[Path]:
    """The directory of an engine apart, which has no GPU support, and is not started yet."""
    with docker_world.short_directory() as directory:
        (directory / "hook").mkdir()  # empty: scripts/engine leaves it as it is
        yield directory
        docker_world.stop_engine(directory)


@pytest.mark.fault(10)
@pytest.mark.fault(21)
async def test_restarted_engine_is_found_again_by_the_same_object(second: Path) -> None:
    host = await asyncio.to_thread(docker_world.start_engine, second)
    await asyncio.to_thread(docker_world.build_image, host)
    containers = DockerContainers(host)
    seen: list[ContainerEvent] = []

    async def watch() -> None:
        async with aclosing(containers.events()) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 - looked at while it runs

    try:
        assert await containers.hands_out_gpus() is False
        with pytest.raises(GpuRuntimeMissing):
            await containers.run(Launch(spec=spec("quiet"), name=docker_world.NAME, gpu_ids=("GPU-1",)))
        assert await containers.list() == ()

        watching = asyncio.create_task(watch())
        await eventually(lambda: seen)
        await asyncio.to_thread(docker_world.stop_engine, second)
        with pytest.raises(DockerUnavailable):
            await asyncio.wait_for(watching, 10)
        with pytest.raises(DockerUnavailable, match="not running"):
            await containers.list()

        await asyncio.to_thread(docker_world.start_engine, second)
        assert (await containers.facts()).version
        seen.clear()
        watching = asyncio.create_task(watch())
        await eventually(lambda: seen and seen[0].action == "connected")
        container = await containers.run(Launch(spec=spec("quiet"), name=docker_world.NAME))
        await eventually(lambda: [event for event in seen if event.action == "start"])
        await containers.remove(container.id)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    finally:
        await containers.close()

"""Daemons for the tests. What a daemon made is removed by its own label, whatever happened to the daemon."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from docker.types import DeviceRequest

from nimhost.deployments.labels import PREFIX
from tests.docker.conftest import (  # noqa: F401
    _registry,
    _second_engine,
    docker_engine,
    fake_engine_image,
    gpu_requests,
    light_engine_image,
    registry,
    second_engine,
    tiny_model_dir,
    vllm_image,
)
from tests.e2e.daemon import DaemonProcess
from tests.fakes.hub import FakeHub
from tests.support import wait_until

MakeDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """`make_daemon(NIMHOST_X__Y="...", DOCKER_HOST=...)`: started, and cleaned up after the test."""
    made: list[DaemonProcess] = []

    def make(start: bool = True, **env: str) -> DaemonProcess:
        directory = tmp_path / f"daemon-{len(made)}"
        directory.mkdir()
        daemon = DaemonProcess(directory, env)
        made.append(daemon)
        if start:
            daemon.start()
        return daemon

    yield make
    for daemon in made:
        daemon.close()
        _remove_containers(daemon)


def _remove_containers(daemon: DaemonProcess) -> None:
    if not (daemon.directory / "data" / "nimhost.db").exists():
        return
    socket = daemon.env.get("DOCKER_HOST", "").removeprefix("unix://")
    if socket and not Path(socket).exists():
        return  # there never was an engine to make any; and docker-py leaks a socket when it cannot connect
    with contextlib.closing(_client(daemon)) as client:
        wait_until(lambda: _removed(client, f"{PREFIX}owner={daemon.owner()}"), 20)


def _removed(client: docker.DockerClient, label: str) -> bool:
    """Again until none is left: a killed daemon may have been in the middle of making or removing one."""
    found = client.api.containers(all=True, filters={"label": label})
    for container in found:
        with contextlib.suppress(docker.errors.APIError):
            client.api.remove_container(container["Id"], force=True, v=True)
    return not found


def _client(daemon: DaemonProcess) -> docker.DockerClient:
    host = daemon.env.get("DOCKER_HOST")
    return docker.DockerClient(host, version="1.41") if host else docker.from_env(version="1.41")


@pytest.fixture
def daemon(make_daemon: MakeDaemon, gpu_requests: None) -> DaemonProcess:  # noqa: F811
    """A daemon on the machine's engine, with two simulated GPUs."""
    return make_daemon()


@pytest.fixture
def provider() -> Iterator[str]:
    """An external provider: its URL."""
    with running_provider("gpt-4") as url:
        yield url


@contextlib.contextmanager
def running_provider(*models: str) -> Iterator[str]:
    """The URL of one that serves these models, in a process of its own."""
    engine = Path(__file__).parent.parent / "fakes" / "engine.py"
    process = subprocess.Popen(
        [sys.executable, str(engine), "--served-model-name", *models, "--host", "127.0.0.1", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    port = next(line.split()[-1] for line in process.stderr if "startup complete" in line)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
        process.stderr.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def run_foreign(docker_engine: docker.DockerClient) -> Iterator[Callable[..., Container]]:  # noqa: F811
    """`docker run --gpus` of somebody else's."""
    started: list[Container] = []

    def run(image: str, gpus: list[str]) -> Container:
        request = DeviceRequest(driver="nvidia", device_ids=gpus, capabilities=[["gpu"]])
        started.append(docker_engine.containers.run(image, detach=True, device_requests=[request]))
        return started[-1]

    yield run
    for container in started:
        with contextlib.suppress(docker.errors.NotFound):
            container.remove(force=True)

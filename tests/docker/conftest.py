"""What the tests with a real Docker engine share. Without an engine they are skipped, and say why."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError, DockerException
from docker.models.containers import Container
from docker.types import DeviceRequest

from tests import images
from tests.docker import registry as registries
from tests.support import wait_until
from tests.tiny import tiny_model

ENGINE = Path(__file__).parents[2] / "scripts" / "engine"
OWNER_LABEL = "io.nimhost.owner"


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[docker.DockerClient]:
    """The machine's engine (DOCKER_HOST), as scripts/test has started it."""
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except DockerException as exc:
        pytest.skip(f"no Docker engine answers (start one with scripts/engine start): {exc}")
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="session")
def gpu_requests(docker_engine: docker.DockerClient, fake_engine_image: str) -> None:
    """Skips where the engine takes no GPU device requests. Only a real start tells: `docker info` does not."""
    request = DeviceRequest(device_ids=["GPU-none"], capabilities=[["gpu"]])
    probe = docker_engine.containers.create(fake_engine_image, ["-V"], entrypoint="python3", device_requests=[request])
    try:
        probe.start()
    except APIError as exc:
        pytest.skip(f"this engine takes no GPU device requests (one started by scripts/engine does): {exc.explanation}")
    finally:
        probe.remove(force=True)


@pytest.fixture(scope="session")
def fake_engine_image(docker_engine: docker.DockerClient) -> str:
    return images.fake_engine(docker_engine)


@pytest.fixture(scope="session")
def light_engine_image(docker_engine: docker.DockerClient) -> str:
    return images.light_engine(docker_engine)


@pytest.fixture(scope="session")
def vllm_image(docker_engine: docker.DockerClient) -> str:
    return images.vllm_cpu(docker_engine)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def _registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registries.Registry]:
    if not registries.available():
        pytest.skip(f"{registries.PROGRAM} is not installed (scripts/test installs it when it runs as root)")
    with registries.Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def registry(_registry: registries.Registry) -> Iterator[registries.Registry]:
    """A registry to pull from, healthy at the start of each test."""
    yield _registry
    _registry.gate.heal()


@pytest.fixture
def run(docker_engine: docker.DockerClient) -> Iterator[Callable[..., Container]]:
    """`docker run -d` with port 8000 published on loopback; what it started is removed after the test."""
    owner = str(uuid.uuid4())

    def start(image: str, *command: str, client: docker.DockerClient = docker_engine, **options: Any) -> Container:
        options = {"ports": {"8000/tcp": ("127.0.0.1", None)}, "init": True, **options}
        return client.containers.run(image, list(command), detach=True, labels={OWNER_LABEL: owner}, **options)

    yield start
    for container in docker_engine.containers.list(all=True, filters={"label": f"{OWNER_LABEL}={owner}"}):
        container.remove(force=True, v=True)


def url_of(container: Container) -> str:
    """Where its port 8000 is now; another one after each start."""

    def port() -> str | None:
        container.reload()
        assert container.status != "exited", container.logs(tail=30).decode()
        return next((at["HostPort"] for at in container.ports.get("8000/tcp") or []), None)

    return f"http://127.0.0.1:{wait_until(port, 10)}"


class SecondEngine:
    """An engine apart, to stop, kill and restart under a daemon without disturbing the others."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.docker_host = f"unix://{directory}/docker.sock"
        self.hook = directory / "hook" / "nvidia-container-runtime-hook"  # replace it to make GPU starts fail

    def start(self) -> None:
        self._do("start")

    def stop(self) -> None:
        self._do("stop")

    def restart(self) -> None:
        self._do("restart")

    def kill(self) -> None:
        """As the kernel would when memory is short: the socket and the pid file stay."""
        os.kill(int((self._directory / "dockerd.pid").read_text()), signal.SIGKILL)

    def client(self) -> docker.DockerClient:
        """Close it after use."""
        return docker.DockerClient(self.docker_host, timeout=600)

    def _do(self, verb: str) -> None:
        command = [str(ENGINE), verb, "--second", str(self._directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


@pytest.fixture(scope="session")
def _second_engine() -> Iterator[SecondEngine]:
    if os.geteuid() != 0:
        pytest.skip("a second Docker engine needs root")
    # Not pytest's directories: a socket's path may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="nimhost-engine-"))
    engine = SecondEngine(directory)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def second_engine(_second_engine: SecondEngine) -> Iterator[SecondEngine]:
    """A running second engine, with a hook that lets GPUs through and without containers at the end."""
    hook = _second_engine.hook.read_text() if _second_engine.hook.exists() else None
    _second_engine.start()
    yield _second_engine
    if hook is not None:
        _second_engine.hook.write_text(hook)
    _second_engine.start()
    with contextlib.closing(_second_engine.client()) as client:
        for container in client.containers.list(all=True):
            container.remove(force=True, v=True)

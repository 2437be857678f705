"""A real Docker engine for tests of the layer that drives it: an image whose arguments say what it does, a registry on
loopback, and a wire to that registry that can be slowed down and cut.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker

from tests import images
from tests.support import wait_until

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("container_program.py")
IMAGE = "nimhost-test/program:latest"
OWNER = "io.nimhost.test-containers"
"""The label of what these tests made. Its value is the process that did: another run has another."""
LABELS = {OWNER: str(os.getpid())}
NAME = f"nimhost-contract-{os.getpid()}"


def start_engine(second: Path | None = None) -> str:
    """The DOCKER_HOST of the machine's engine, or of one apart."""
    return _engine("start", second).strip()


def stop_engine(second: Path) -> None:
    _engine("stop", second)


def _engine(verb: str, second: Path | None) -> str:
    command = [str(ROOT / "scripts" / "engine"), verb, *(["--second", str(second)] if second else [])]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def build_image(host: str) -> str:
    recipe = images.Recipe(name=IMAGE, entrypoint=("/usr/bin/python3", "/program.py"), files={"/program.py": PROGRAM})
    with contextlib.closing(docker.DockerClient(base_url=host, timeout=600)) as client:
        return images.build(recipe, client)


def remove_leftovers(client: docker.APIClient) -> None:
    """Of this run, and of runs that were killed."""
    for row in client.containers(all=True, filters={"label": OWNER}):
        maker = row["Labels"][OWNER]
        if maker == str(os.getpid()) or not Path("/proc", maker).exists():
            client.remove_container(row["Id"], force=True)


@dataclass
class Wire:
    """A TCP proxy. `held` stops the bytes; `bytes_per_s` slows them down (0: as fast as it goes)."""

    target: int
    port: int = 0
    held: bool = False
    bytes_per_s: int = 0
    carried: int = 0
    """Bytes that came from the target so far."""
    _sockets: set[socket.socket] = field(default_factory=set)

    def pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(16384):
                while self.held:
                    time.sleep(0.01)
                    sink.getpeername()  # fails when the other side was closed
                if self.bytes_per_s:
                    time.sleep(len(chunk) / self.bytes_per_s)
                sink.sendall(chunk)
                self.carried += len(chunk) if counted else 0
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def wire(target: int) -> Iterator[Wire]:
    """From a port of its own to `target`, until the block ends; then every connection is cut."""
    made = Wire(target)
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as server:
        made.port = server.getsockname()[1]
        threads: list[threading.Thread] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    upstream = stack.enter_context(socket.create_connection(("127.0.0.1", target)))
                    made._sockets |= {stack.enter_context(client), upstream}
                    for ends in ((client, upstream, False), (upstream, client, True)):
                        threads.append(threading.Thread(target=made.pump, args=ends))
                        threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield made
        finally:
            made.held = False
            server.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for end in made._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[int]:
    """Debian's `docker-registry` on a free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    command = ["docker-registry", "serve", str(config)]
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: _listens(port), 10)
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def push_random_image(client: docker.APIClient, port: int, name: str, size_bytes: int) -> None:
    """Into the registry at `port`, and from there only: the engine forgets it."""
    import io
    import tarfile

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("noise")
        entry.size = size_bytes
        tar.addfile(entry, io.BytesIO(os.urandom(size_bytes)))
    repository = f"127.0.0.1:{port}/{name}"
    client.import_image_from_data(data.getvalue(), repository=repository, tag="1")
    for line in client.push(repository, tag="1", stream=True, decode=True):
        assert "error" not in line, line
    client.remove_image(f"{repository}:1", force=True)


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Sockets want short paths. What an engine leaves mounted there is unmounted first."""
    with tempfile.TemporaryDirectory(prefix="nh", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if line.split()[1].startswith(name):
                subprocess.run(["umount", "-l", line.split()[1]], check=True)

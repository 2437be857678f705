"""A real registry on a loopback port, behind a gate that can be slow, hang, drop connections or refuse.

registry.publish("nim/llama:1", layers=(1_000_000, 3_000_000))   random layers, never present on the engine before
registry.push(client, "nimhost-test/fake-engine:latest", "nim/llama:2")   an image of the engine
registry.ref("nim/llama:1")                                       what to pull: 127.0.0.1:PORT/nim/llama:1
registry.gate.bytes_per_s = 100_000
registry.gate.hang() ... registry.gate.release()
registry.gate.refuse("429 Too Many Requests", "Retry-After: 1")
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import docker
import httpx

from tests.support import wait_until

PROGRAM = "docker-registry"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """Debian's docker-registry with its storage in a directory of ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        port = _free_port()
        self._direct = f"127.0.0.1:{port}"
        config = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self._directory / "data")}},
            "http": {"addr": self._direct},
        }
        path = self._directory / "config.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        with (self._directory / "registry.log").open("wb") as log:
            self._process = subprocess.Popen([PROGRAM, "serve", str(path)], stdout=log, stderr=subprocess.STDOUT)
        wait_until(lambda: _listens(port), 10)
        self.gate = Gate(port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.close()
        self._process.terminate()
        self._process.wait(10)

    def ref(self, name: str) -> str:
        """The name under which an engine pulls it, through the gate. Loopback registries need no TLS."""
        return f"127.0.0.1:{self.gate.port}/{name}"

    def push(self, client: docker.DockerClient, image: str, name: str) -> str:
        """Copy an engine's image here. A pull of it on the same engine has nothing to fetch but the manifest."""
        repository, _, tag = f"{self._direct}/{name}".rpartition(":")
        client.images.get(image).tag(repository, tag)
        try:
            for event in client.images.push(repository, tag, stream=True, decode=True):
                assert "error" not in event, event["error"]
        finally:
            client.images.remove(f"{repository}:{tag}")
        return self.ref(name)

    def publish(self, name: str, layers: tuple[int, ...] = (100_000,), env: tuple[str, ...] = ()) -> str:
        """Put an image of random layers of about these sizes here, without any engine."""
        repository, _, tag = name.rpartition(":")
        with httpx.Client(base_url=f"http://{self._direct}/v2/{repository}/", timeout=60) as http:
            tars = [_random_tar(size) for size in layers]
            config = {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": list(env), "Cmd": ["/none"]},
                "rootfs": {"type": "layers", "diff_ids": [_digest(tar) for tar in tars]},
            }
            blob = _upload(http, json.dumps(config).encode())
            manifest = {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **blob},
                "layers": [
                    {
                        "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                        **_upload(http, gzip.compress(tar, compresslevel=1)),
                    }
                    for tar in tars
                ],
            }
            http.put(f"manifests/{tag}", json=manifest, headers={"Content-Type": _MANIFEST}).raise_for_status()
        return self.ref(name)


class Gate:
    """A TCP proxy in front of one port. Faults apply to connections that are already open, too."""

    def __init__(self, upstream_port: int) -> None:
        self.bytes_per_s: float | None = None  # towards the client; settable at any time
        self._upstream_port = upstream_port
        self._refusal: bytes | None = None
        self._open = threading.Event()  # clear: nothing moves
        self._open.set()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)

    def hang(self) -> None:
        """From now on connections stay open, and no byte passes."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def refuse(self, status: str, *headers: str) -> None:
        """Answer each request with this status line instead of passing it on: "401 Unauthorized"."""
        lines = [f"HTTP/1.1 {status}", *headers, "Content-Length: 0", "Connection: close", "", ""]
        self._refusal = "\r\n".join(lines).encode()
        self.drop()

    def drop(self) -> None:
        """Cut every connection, as a network would."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self.bytes_per_s = None
        self._refusal = None
        self.release()

    def close(self) -> None:
        self._closed = True
        self.heal()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.drop()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), self._connect() as upstream:
            pair = {client, upstream}
            self._sockets |= pair
            if self._refusal:
                client.recv(65536)
                client.sendall(self._refusal)
            elif not self._closed:
                back = threading.Thread(target=self._pump, args=(upstream, client, True), daemon=True)
                back.start()
                self._pump(client, upstream, False)
                back.join()
            self._sockets -= pair

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._upstream_port))

    def _pump(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(16384):
                self._open.wait()
                target.sendall(chunk)
                if limited and self.bytes_per_s:
                    time.sleep(len(chunk) / self.bytes_per_s)  # the rate itself, not a wait for something
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def _upload(http: httpx.Client, blob: bytes) -> dict[str, str | int]:
    digest = _digest(blob)
    started = http.post("blobs/uploads/").raise_for_status()
    target = httpx.URL(started.headers["Location"]).copy_merge_params({"digest": digest})
    http.put(target, content=blob).raise_for_status()
    return {"digest": digest, "size": len(blob)}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _random_tar(size: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo(os.urandom(8).hex())
        entry.size = size
        tar.addfile(entry, io.BytesIO(os.urandom(size)))
    return out.getvalue()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False

"""Docker's sentences, as real engines said them, and what they mean."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import urllib3

from nimhost import errors
from nimhost.errors import (
    DiskFull,
    DockerError,
    DockerUnavailable,
    GpuRuntimeMissing,
    GpuUnavailable,
    HostError,
    ImageNotFound,
    NameTaken,
    NimhostError,
    RegistryDenied,
    RegistryUnavailable,
)
from nimhost.host import containers
from nimhost.host.containers import DockerContainers
from nimhost.host.docker_errors import refusal, unreachable

ANY_CALL: list[tuple[int, str, type[NimhostError]]] = [
    (500, 'could not select device driver "" with capabilities: [[gpu]]', GpuRuntimeMissing),
    (500, 'could not select device driver "nvidia" with capabilities: [[gpu]]', GpuRuntimeMissing),
    (400, "Unknown runtime specified nvidia", GpuRuntimeMissing),
    (400, "unknown or invalid runtime name: nvidia", GpuRuntimeMissing),
    (500, "failed to discover GPU vendor from CDI: no known GPU vendor found", GpuRuntimeMissing),
    (500, "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=9", GpuRuntimeMissing),
    (500, "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8", GpuRuntimeMissing),
    (500, "nvidia-container-cli: device error: GPU-1111: unknown device: unknown", GpuUnavailable),
    (500, "nvidia-container-cli: initialization error: nvml error: driver not loaded", GpuUnavailable),
    (500, "write /var/lib/docker/tmp/GetImageBlob1: no space left on device", DiskFull),
    (409, 'Conflict. The container name "/x" is already in use by container "ab". You have to remove it', NameTaken),
    (404, "No such image: nope:1", ImageNotFound),
    (400, 'invalid mount config for type "bind": bind source path does not exist: /nope', DockerError),
    (400, 'OCI runtime create failed: exec: "nope": executable file not found in $PATH: unknown', DockerError),
    (500, "driver failed: Bind for 127.0.0.1:1 failed: port is already allocated", DockerError),
    (500, "Get https://registry.test/v2/: dial tcp: connection refused", DockerError),  # only a pull has a registry
]  # fmt: skip

PULL: list[tuple[int | None, str, type[NimhostError]]] = [
    (404, "manifest for registry.test/x:2 not found: manifest unknown: manifest unknown", ImageNotFound),
    (404, "repository registry.test/x not found: name unknown: repository name not known to registry", ImageNotFound),
    (404, "no matching manifest for linux/arm64/v8 in the manifest list entries", ImageNotFound),
    (400, "invalid reference format", ImageNotFound),
    (404, "pull access denied for x, repository does not exist or may require 'docker login'", RegistryDenied),
    (500, 'Head "https://registry.test/v2/x/manifests/1": unauthorized: authentication required', RegistryDenied),
    (500, 'Head "https://registry.test/v2/x/manifests/1": no basic auth credentials', RegistryDenied),
    (None, 'error parsing HTTP 403 response body: no error details found in HTTP response body: ""', RegistryDenied),
    (500, "Head https://nvcr.io/v2/nim/x/manifests/1: Payment Required", RegistryDenied),
    (None, "unexpected status from HEAD request: 402 Payment Required", RegistryDenied),
    (500, "Forbidden", RegistryDenied),
    (None, "image was found but does not match the specified platform: wanted linux/amd64", ImageNotFound),
    (500, "toomanyrequests: You have reached your unauthenticated pull rate limit.", RegistryUnavailable),
    (None, "error parsing HTTP 429 response body", RegistryUnavailable),
    (500, 'Get "https://r.test/v2/": dial tcp: lookup r.test on 9.9.9.9:53: no such host', RegistryUnavailable),
    (500, 'Get "https://r.test/v2/": net/http: request canceled (Client.Timeout exceeded)', RegistryUnavailable),
    (500, 'Get "https://registry.test/v2/": dial tcp 10.0.0.1:443: i/o timeout', RegistryUnavailable),
    (500, 'Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused', RegistryUnavailable),
    (500, 'Get "https://registry.test/v2/": net/http: TLS handshake timeout', RegistryUnavailable),
    (500, "received unexpected HTTP status: 503 Service Unavailable", RegistryUnavailable),
    (None, "unexpected EOF", RegistryUnavailable),
    (None, "read tcp 10.0.0.2:1->10.0.0.1:443: read: connection reset by peer", RegistryUnavailable),
    (500, "http: server gave HTTP response to HTTPS client", HostError),
    (500, 'Get "https://registry.test/v2/": x509: certificate signed by unknown authority', HostError),
    (None, "failed to register layer: write /x: no space left on device", DiskFull),
    (None, "something new", DockerError),
]  # fmt: skip


@pytest.mark.fault(2)
@pytest.mark.parametrize(("status", "message", "expected"), ANY_CALL)
def test_refusal_of_a_call(status: int, message: str, expected: type[NimhostError]) -> None:
    error = refusal(status, message, image="some/image:1")

    assert type(error) is expected
    assert message in error.message


@pytest.mark.fault(2)
@pytest.mark.parametrize(("status", "message", "expected"), PULL)
def test_refusal_of_a_pull(status: int | None, message: str, expected: type[NimhostError]) -> None:
    error = refusal(status, message, image="registry.test/x:1", pulling=True)

    assert type(error) is expected
    assert error.message == f"Image registry.test/x:1: {message}"


@pytest.mark.fault(2)
def test_only_what_may_pass_is_tried_again() -> None:
    retried = {cls for _, _, cls in (*ANY_CALL, *PULL) if not cls.final}

    assert retried == {DockerError, NameTaken, GpuUnavailable, DiskFull, RegistryUnavailable}


@pytest.mark.fault(10)
def test_missing_gpu_runtime_comes_with_the_command_that_fixes_it() -> None:
    error = refusal(500, 'could not select device driver "nvidia" with capabilities: [[gpu]]')

    assert "sudo nvidia-ctk runtime configure --runtime=docker" in (error.hint or "")


def wrapped(cause: OSError) -> Exception:
    """As requests wraps what urllib3 wraps."""
    return requests.ConnectionError(urllib3.exceptions.ProtocolError("Connection aborted.", cause))


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("cause", "installed", "hint"),
    [
        (FileNotFoundError(2, "No such file"), False, "docs.docker.com"),
        (FileNotFoundError(2, "No such file"), True, "sudo systemctl start docker"),
        (ConnectionRefusedError(111, "Connection refused"), True, "sudo systemctl start docker"),
        (PermissionError(13, "Permission denied"), True, "usermod -aG docker"),
        (TimeoutError("timed out"), True, "systemctl status docker"),
        (ConnectionResetError(104, "reset"), True, "systemctl status docker"),
    ],
)
def test_docker_out_of_reach_says_what_to_type(
    cause: OSError, installed: bool, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/docker" if installed else None)

    error = unreachable(wrapped(cause), "unix:///var/run/docker.sock")

    assert isinstance(error, DockerUnavailable)
    assert hint in (error.hint or "")


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("x"), requests.ReadTimeout("x"), requests.exceptions.ChunkedEncodingError("x"),
        urllib3.exceptions.ProtocolError("x"), urllib3.exceptions.ReadTimeoutError(None, "", "x"),  # type: ignore[arg-type]
        urllib3.exceptions.ClosedPoolError(None, "x"), BrokenPipeError("x"), TimeoutError("x"),  # type: ignore[arg-type]
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_every_error_of_the_transport_is_docker_unavailable(error: Exception) -> None:
    translated = DockerContainers("unix:///x.sock")._translated(error)

    assert isinstance(translated, errors.DockerUnavailable)


@pytest.fixture
def mute_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Accepts and never answers."""
    monkeypatch.setattr(containers, "_HELLO_TIMEOUT_S", 0.3)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "docker.sock"))
        server.listen()
        yield f"unix://{tmp_path}/docker.sock"


@pytest.mark.fault(21)
async def test_engine_that_hangs_holds_up_nobody_else(mute_engine: str) -> None:
    docker = DockerContainers(mute_engine)
    calls = [asyncio.create_task(call) for call in (docker.list(), docker.facts(), anext(docker.events()))]
    slowest_s = 0.0
    while not all(call.done() for call in calls):
        before = time.monotonic()
        await asyncio.sleep(0.01)  # the loop's heartbeat
        slowest_s = max(slowest_s, time.monotonic() - before)

    assert slowest_s < 0.2
    for call in calls:
        with pytest.raises(DockerUnavailable, match="does not answer"):
            await call
    await docker.close()

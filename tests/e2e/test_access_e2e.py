"""A daemon that other machines reach. What this test sends stays on this machine's loopback addresses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess
from tests.support import wait_until

ASK = {"model": "default/gpt-4", "messages": [{"role": "user", "content": "Hi"}]}


def new_daemon(directory: Path, host: str) -> DaemonProcess:
    """Not started. There is no Docker: nothing here needs it, and there is nothing to clean up."""
    return DaemonProcess(directory, {"NIMHOST_SERVER__HOST": host, "DOCKER_HOST": f"unix://{directory}/none.sock"})


@pytest.fixture
def exposed(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = new_daemon(tmp_path, "0.0.0.0")
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    daemon = new_daemon(tmp_path_factory.mktemp("local"), "127.0.0.1")
    daemon.start()
    yield daemon
    daemon.close()


def run(daemon: DaemonProcess, *args: str, token: str = "") -> subprocess.CompletedProcess[str]:
    """The command, by somebody who uses this daemon's data directory."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIMHOST_", "NMP_"))}
    more = {"NIMHOST_SERVER__DATA_DIR": str(daemon.directory / "data"), "NIMHOST_ACCESS_TOKEN": token}
    address = ["--base-url", daemon.url] if daemon.url else ["--base-url", "http://127.0.0.1:1"]
    return subprocess.run(
        [sys.executable, "-m", "nimhost", *address, *args],
        capture_output=True, text=True, timeout=60, check=False, env=inherited | more, cwd=daemon.directory,
    )  # fmt: skip


def make_token(daemon: DaemonProcess, name: str, scope: str, token: str = "") -> str:
    made = run(daemon, "tokens", "create", name, "--scope", scope, token=token)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.fault(36)
def test_without_a_token_it_does_not_start_and_says_how_to_make_one(exposed: DaemonProcess) -> None:
    with pytest.raises(RuntimeError, match="there is no API token") as caught:
        exposed.start()
    assert exposed.process is not None
    assert exposed.process.wait(10) == 1
    assert f"Make one: NIMHOST_SERVER__DATA_DIR={exposed.directory}/data nimhost tokens create NAME" in str(
        caught.value
    )


@pytest.mark.fault(29)
@pytest.mark.fault(36)
def test_tokens_from_the_first_to_the_revoked_one(exposed: DaemonProcess, provider: str) -> None:
    admin = make_token(exposed, "root", "admin")
    exposed.start()
    assert exposed.http.get("/status").status_code == 401
    assert exposed.http.get("/health/live").status_code == 200
    assert run(exposed, "ps").returncode == 1
    assert run(exposed, "ps", token=admin).returncode == 0

    exposed.http.headers.update(bearer(admin))
    exposed.post(f"{MODELS}/providers", {"name": "ext", "host_url": provider})
    laptop, viewer = (make_token(exposed, name, name, admin) for name in ("inference", "read"))
    wait_until(lambda: httpx.post(f"{exposed.url}{GATEWAY}/openai/-/v1/chat/completions", json=ASK,
                                  headers=bearer(laptop), trust_env=False).status_code == 200, 10)  # fmt: skip
    with openai.OpenAI(base_url=f"{exposed.url}/v1", api_key=laptop, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["default/gpt-4"]
        with pytest.raises(openai.AuthenticationError, match="no such API token"):
            client.with_options(api_key="not-needed").models.list()
        with pytest.raises(openai.PermissionDeniedError, match="takes the scope 'inference'"):
            client.with_options(api_key=viewer).models.list()

        exposed.kill()
        exposed.start()
        wait_until(lambda: client.models.list().data, 10)
        listed = run(exposed, "tokens", "list", token=viewer)
        assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [
            ["root", "admin"], ["inference", "inference"], ["read", "read"],
        ]  # fmt: skip
        assert run(exposed, "tokens", "revoke", "inference", token=viewer).returncode == 1
        assert client.models.list().data
        assert run(exposed, "tokens", "revoke", "inference", token=admin).returncode == 0
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

        exposed.stop()
        exposed.start()
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    exposed.stop()
    for file in exposed.directory.rglob("*"):
        if file.is_file():
            found = file.read_bytes()
            assert [token[:14] for token in (admin, laptop, viewer) if token.encode() in found] == [], file


def test_a_token_of_the_environment_lets_in_and_stays_out_of_everything(exposed: DaemonProcess) -> None:
    token = "nimhost_" + "e" * 43
    exposed.env["NIMHOST_SERVER__API_TOKENS"] = f'["ci:read:{token}"]'
    exposed.start()
    assert exposed.http.get("/status").status_code == 401
    assert exposed.http.get("/status", headers=bearer(token)).status_code == 200
    assert exposed.http.get("/status", headers={"x-api-key": token}).status_code == 200
    exposed.stop()
    for file in exposed.directory.rglob("*"):
        assert not file.is_file() or token.encode() not in file.read_bytes(), file


def test_a_settings_file_with_a_token_in_it_is_refused_without_repeating_it(exposed: DaemonProcess) -> None:
    (exposed.directory / "nimhost.toml").write_text(f'[server]\napi_tokens = ["ci:read:nimhost_{"e" * 43}"]\n')
    with pytest.raises(RuntimeError, match=r"entry 1 \('ci'\) has no hash") as caught:
        exposed.start()
    assert exposed.process is not None
    assert exposed.process.wait(10) == 2
    assert "eeee" not in str(caught.value)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /status HTTP/1.1", ["Host: 127.0.0.1:8080"], b"200"),
        ("GET /status HTTP/1.1", ["Host: [::1]:8080"], b"200"),
        ("GET /status HTTP/1.1", ["Host: evil.example"], b"403"),
        ("GET /status HTTP/1.1", ["Host: localhost", "Host: evil.example"], b"400"),
        ("GET /status HTTP/1.1", [], b"403"),
        ("GET /status HTTP/1.0", [], b"403"),
        ("GET http://evil.example/status HTTP/1.1", ["Host: evil.example"], b"403"),
        ("GET http://localhost/status HTTP/1.1", ["Host: localhost"], b"200"),
        ("GET http://localhost/status HTTP/1.1", ["Host: evil.example"], b"403"),
        ("CONNECT evil.example:443 HTTP/1.1", ["Host: evil.example:443"], b"400"),
        ("GET /v1/models HTTP/1.1", ["Host: localhost", "Origin: https://evil.example"], b"403"),
        ("OPTIONS * HTTP/1.1", ["Host: evil.example"], b"403"),
    ],
)
def test_how_a_request_names_its_host(
    local: DaemonProcess, request_line: str, headers: list[str], status: bytes
) -> None:
    head = "\r\n".join([request_line, *headers, "Connection: close", "", ""])
    answer = b""
    with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2])), 20) as raw:
        raw.sendall(head.encode())
        while piece := raw.recv(65_536):
            answer += piece
    assert answer.split()[1] == status, answer


@pytest.mark.fault(40)
def test_idle_connections_cost_a_bounded_amount_and_harm_nobody(local: DaemonProcess) -> None:
    daemon = local
    assert daemon.process is not None
    before_kib = _memory_kib(daemon.process.pid)
    address = ("127.0.0.1", int(daemon.url.rpartition(":")[2]))
    idle = [socket.create_connection(address, 20) for _ in range(2000)]
    try:
        with httpx.Client(base_url=daemon.url, trust_env=False, timeout=20) as client:
            assert [client.get("/health/live").status_code for _ in range(20)] == [200] * 20
        each_kib = (_memory_kib(daemon.process.pid) - before_kib) / len(idle)
    finally:
        for connection in idle:
            connection.close()
    print(f"{len(idle)} idle connections: {each_kib:.1f} KiB each")
    assert each_kib < 40


def _memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def test_revoking_a_token_ends_what_it_asked_for_and_the_engine_stops(exposed: DaemonProcess, provider: str) -> None:
    admin = make_token(exposed, "root", "admin")
    exposed.start()
    exposed.http.headers.update(bearer(admin))
    exposed.post(f"{MODELS}/providers", {"name": "ext", "host_url": provider})
    laptop = make_token(exposed, "laptop", "inference", admin)
    ask, body = f"{GATEWAY}/provider/ext/-/v1/chat/completions", {**ASK, "model": "gpt-4"}
    wait_until(lambda: exposed.http.post(ask, json=body).status_code == 200, 10)
    with httpx.Client(base_url=exposed.url, headers=bearer(laptop), trust_env=False, timeout=20) as client:
        httpx.post(f"{provider}/_fake/faults", json={"hang_after_chunks": 2}, trust_env=False)
        with client.stream("POST", ask, json={**body, "stream": True}) as reply:
            pieces = reply.iter_raw()
            assert next(pieces)
            assert run(exposed, "tokens", "revoke", "laptop", token=admin).returncode == 0
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        wait_until(lambda: httpx.get(f"{provider}/_fake/state", trust_env=False).json()["open_streams"] == 0, 10)
        assert client.post(ask, json=body).status_code == 401

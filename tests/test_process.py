"""The daemon as a process: what became of its streams, and which signals it gets."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import running_provider
from tests.support import wait_until

Serve = Callable[..., tuple[subprocess.Popen[str], httpx.Client]]
CHAT = "/apis/inference-gateway/v2/workspaces/default/provider/slow/-/v1/chat/completions"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve(">&-")`: a daemon without Docker, started by a shell with these redirections, once it serves."""
    started: list[tuple[subprocess.Popen[str], httpx.Client]] = []
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NIMHOST_", "NMP_"))}

    def run(redirected: str = "", before: str = ":") -> tuple[subprocess.Popen[str], httpx.Client]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = f"{sys.executable} -m nimhost serve --port {port} --data-dir {tmp_path}/data"
        process = subprocess.Popen(
            ["bash", "-c", f"{before}; exec {command} {redirected}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, "NIMHOST_DOCKER__HOST": f"unix://{tmp_path}/none.sock"},
            cwd=tmp_path,
        )
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10)
        started.append((process, http))

        def looked() -> bool:
            assert process.poll() is None, process.communicate()
            try:
                return "Docker is not running" in http.get("/status").json()["docker"]["message"]
            except httpx.TransportError:
                return False

        wait_until(looked, 20)
        return process, http

    yield run
    for process, http in started:
        http.close()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.parametrize("redirected", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_without_a_standard_stream_it_serves_and_stops(serve: Serve, redirected: str) -> None:
    process, http = serve(redirected)
    assert http.get("/status").json()["problem"] is None
    process.terminate()
    assert process.wait(20) == 0


def test_who_reads_its_output_may_leave(serve: Serve) -> None:
    process, http = serve("> >(true)")
    made = http.post("/apis/entities/v2/workspaces", json={"name": "later"})
    assert made.status_code == 201
    assert http.get("/status").json()["problem"] is None
    process.terminate()
    assert process.wait(20) == 0


def test_who_stops_reading_its_output_holds_up_nobody(serve: Serve) -> None:
    process, http = serve(">&2")
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    config = {
        "name": "one", "engine": "generic", "model_spec": {},
        "executor_config": {"gpu": 0, "image_name": "none", "image_tag": "1", "health_check_path": "/health"},
    }  # fmt: skip
    models = "/apis/models/v2/workspaces/default"
    assert http.post(f"{models}/deployment-configs", json=config).status_code == 201
    assert http.post(f"{models}/deployments", json={"name": "one", "config": "one"}).status_code == 201
    for _ in range(60):  # each is a line in the log
        assert http.get(f"{models}/deployments/one/logs").status_code == 503
    process.terminate()
    assert process.wait(20) == 0
    assert 0 < process.stderr.read().count("WARNING GET") < 60


def test_a_closed_terminal_lets_replies_end(serve: Serve) -> None:
    process, http = serve("> >(true)")
    with running_provider("slow") as url:
        httpx.post(f"{url}/_fake/faults", json={"chunks": 10, "chunk_delay_s": 0.1}, trust_env=False)
        provider = {"name": "slow", "host_url": url}
        assert http.post("/apis/models/v2/workspaces/default/providers", json=provider).status_code == 201
        body = {"model": "slow", "messages": [{"role": "user", "content": "Hi"}]}
        wait_until(lambda: http.post(CHAT, json=body).status_code == 200)
        with http.stream("POST", CHAT, json={**body, "stream": True}) as reply:
            lines = reply.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGHUP)  # from the kernel
            wait_until(lambda: not _accepts(http), 10)
            process.send_signal(signal.SIGHUP)  # and from the shell
            rest = [line for line in lines if line]
        assert (first[:6], rest[-1]) == ("data: ", "data: [DONE]")
    assert process.wait(20) == 0


def test_under_nohup_a_closed_terminal_is_nothing(serve: Serve) -> None:
    process, http = serve(before="trap '' HUP")
    process.send_signal(signal.SIGHUP)
    assert http.get("/health/live").status_code == 200
    assert process.poll() is None


def _accepts(http: httpx.Client) -> bool:
    try:
        socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=1).close()
    except OSError:
        return False
    return True

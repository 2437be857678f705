"""Engines that answer oddly, or not at all: a scripted one, over real HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nimhost.errors import DockerError, RegistryUnavailable
from nimhost.host import containers as containers_module
from nimhost.host import docker_replies as replies
from nimhost.host.containers import DockerContainers, PullProgress
from nimhost.host.docker_pull import follow_pull
from nimhost.host.docker_stream import BlockingStream, Hold

BROKEN = "RWLayer of container {} is unexpectedly nil"
"""What Docker says of a container whose files are gone (moby, daemon/inspect.go)."""


class OddEngine:
    """`rows`: of its list. Whoever asks about one of `broken` gets an error; `silent`: nobody gets an answer."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        self.silent: set[str] = set()
        """Words of the paths that nothing is answered to."""
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.engine = self
        self.host = f"tcp://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    engine: OddEngine

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone away: as tests mean it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        engine, path = self.server.engine, self.path.partition("?")[0]
        if any(word in path for word in engine.silent):
            engine.closing.wait(60)
            self.close_connection = True
        elif path.endswith("/version"):
            self._reply(200, {"Version": "28.0", "ApiVersion": "1.41", "Arch": "amd64"})
        elif path.endswith("/containers/json"):
            self._reply(200, engine.rows)
        else:
            self._inspect(path.split("/")[-2])

    def _inspect(self, id_: str) -> None:
        if id_ in self.server.engine.broken:
            return self._reply(500, {"message": BROKEN.format(id_)})
        row = next(row for row in self.server.engine.rows if row["Id"] == id_)
        state = {"Status": row["State"], "ExitCode": 3, "FinishedAt": "2026-11-20T11:00:01Z"}
        config = {"Image": row["Image"]}
        return self._reply(200, {"Id": id_, "Name": row["Names"][0], "Config": config, "State": state})

    def _reply(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def engine() -> Iterator[OddEngine]:
    opened = OddEngine()
    yield opened
    opened.close()


def row(id_: str, state: str) -> dict[str, Any]:
    return {
        "Id": id_, "Names": [f"/{id_}"], "Image": "some/image:1", "Labels": {"io.nimhost.owner": "me"}, "Ports": [],
        "State": state, "Status": "Exited (137) 2 hours ago" if state == "exited" else state.title(),
    }  # fmt: skip


@pytest.mark.parametrize("state", ["created", "exited", "removing", "dead"])
async def test_a_container_that_docker_cannot_describe_hides_no_other(engine: OddEngine, state: str) -> None:
    """It runs nothing and holds no GPU: what the list says of it is enough."""
    engine.rows, engine.broken = [row("broken", state), row("whole", "exited")], {"broken"}
    docker = DockerContainers(engine.host)
    broken, whole = await docker.list()
    await docker.close()
    assert (broken.id, broken.name, broken.image, broken.state) == ("broken", "broken", "some/image:1", state)
    assert broken.labels == {"io.nimhost.owner": "me"}
    assert broken.error == BROKEN.format("broken")
    assert broken.exit_code == (137 if state == "exited" else None)
    assert (whole.id, whole.exit_code) == ("whole", 3)


async def test_a_running_container_that_docker_cannot_describe_may_hold_any_gpu(engine: OddEngine) -> None:
    engine.rows, engine.broken = [row("broken", "running")], {"broken"}
    docker = DockerContainers(engine.host)
    with pytest.raises(DockerError, match="unexpectedly nil"):
        await docker.list()
    await docker.close()


@pytest.mark.fault(21)
@pytest.mark.parametrize("word", ["/version", "/containers/json", "/events"])
async def test_an_engine_that_answers_nothing_does_not_hold_up_the_end(
    engine: OddEngine, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers_module, "_CLOSE_S", 0.3)
    engine.silent = {word}
    docker = DockerContainers(engine.host)
    waiting = [asyncio.ensure_future(docker.list()), asyncio.ensure_future(anext(docker.events()))]
    await asyncio.wait(waiting, timeout=0.3)
    began = time.monotonic()
    await docker.close()
    assert time.monotonic() - began < 3
    engine.closing.set()
    await asyncio.wait(waiting, timeout=5)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


# --- pulls ---------------------------------------------------------------------------------------------------------

LAYER = {"id": "a", "status": "Downloading", "progressDetail": {"current": 10, "total": 100}}


async def follow(lines: Iterator[dict[str, Any]], steps: list[PullProgress], stall_timeout_s: float = 0.5) -> None:
    """A pull whose stream says this, ten milliseconds apart."""

    def read(hold: Hold) -> Generator[replies.Json, None, None]:
        for line in lines:
            time.sleep(0.01)
            yield line

    async with BlockingStream("odd", read) as stream:
        await follow_pull("some/image:1", stream, steps.append, stall_timeout_s)


@pytest.mark.fault(1)
async def test_a_pull_that_says_the_same_again_and_again_has_stalled() -> None:
    """As an engine does that keeps its images with containerd: ten times a second, whether or not a byte came."""
    steps: list[PullProgress] = []
    with pytest.raises(RegistryUnavailable, match="no progress for"):
        await asyncio.wait_for(follow(itertools.repeat(LAYER), steps), 20)
    assert steps[0].done_bytes == steps[-1].done_bytes == 10
    assert "no progress for" in steps[-1].message
    assert len(steps) < 10


async def test_a_pull_goes_on_as_long_as_anything_moves() -> None:
    """However slowly, and while one layer stands still."""
    steps: list[PullProgress] = []
    moving = ({"id": "b", "status": "Extracting", "progressDetail": {"current": n // 20}} for n in range(150))
    await asyncio.wait_for(follow((line for pair in zip(moving, itertools.repeat(LAYER)) for line in pair), steps), 20)
    assert all("no progress" not in step.message for step in steps)

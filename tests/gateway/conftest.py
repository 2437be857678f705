"""The gateway behind its own front (uvloop, httptools) on a free port, in the test's own loop; engines beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop

from nimhost.config import Gateway as GatewaySettings
from nimhost.entities import ServedModel
from nimhost.gateway.front import ClientConnection
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.room import Room
from nimhost.gateway.routes import Upstream, build_table
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine
from tests.support import eventually

G = "/apis/inference-gateway/v2/workspaces"


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


class Reply:
    """An HTTP reply as it was on the wire."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.rest = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.raw = raw
        self.status = int(first.split(" ")[1]) if first else 0
        pairs = [line.split(": ", 1) for line in lines]
        self.header_list = [(name, value) for name, value in pairs]
        self.headers = dict(self.header_list)

    @property
    def chunks(self) -> list[bytes]:
        """Data of the HTTP chunks; the last is b"" if the reply came to its end."""
        found, at = [], 0
        while (end := self.rest.find(b"\r\n", at)) != -1:
            size = int(self.rest[at:end], 16)
            found.append(self.rest[end + 2 : end + 2 + size])
            at = end + size + 4
        return found

    @property
    def whole(self) -> bool:
        if "content-length" in self.headers:
            return len(self.rest) == int(self.headers["content-length"])
        return self.chunks[-1:] == [b""]

    @property
    def body(self) -> bytes:
        return self.rest if "content-length" in self.headers else b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)


class Door:
    """The gateway as a client finds it."""

    server: uvicorn.Server

    def __init__(self, gateway: Gateway, port: int) -> None:
        self.gateway, self.port = gateway, port
        self.url = f"http://127.0.0.1:{port}"

    def route(self, *upstreams: Upstream, **more: Any) -> None:
        self.gateway.table = build_table(upstreams, **more)

    async def open(
        self, method: str, path: str, body: bytes = b"", headers: Iterable[str] = (), limit: int = 1 << 26
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request, byte for byte, and leave the reply to the test, which buffers `limit` bytes of it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        lines = [f"{method} {path} HTTP/1.1", "Host: gateway", *headers]
        if not any(line.lower().startswith("connection") for line in headers):
            lines.append("Connection: close")
        framed = any(line.lower().startswith(("transfer-encoding", "content-length")) for line in headers)
        if body and not framed:
            lines.append(f"Content-Length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return reader, writer

    async def ask(self, method: str, path: str, body: bytes = b"", headers: Iterable[str] = ()) -> Reply:
        reader, writer = await self.open(method, path, body, headers)
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        return Reply(raw)

    async def chat(self, body: bytes, path: str = f"{G}/default/provider/p/-/v1/chat/completions") -> Reply:
        return await self.ask("POST", path, body, ["Content-Type: application/json"])


@asynccontextmanager
async def open_door(
    settings: GatewaySettings | None = None, before: Callable[[Gateway], Any] = lambda gateway: gateway, **options: Any
) -> AsyncIterator[Door]:
    """`before`: what stands in front of the gateway."""
    gateway = Gateway(settings or GatewaySettings(), **options)
    config = uvicorn.Config(
        before(gateway),
        http=partial(ClientConnection, Room(1000)),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="critical",
        proxy_headers=False,
        server_header=False,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    listening = socket.create_server(("127.0.0.1", 0))
    await server.startup(sockets=[listening])  # serve() would take over Ctrl-C
    try:
        door = Door(gateway, listening.getsockname()[1])
        door.server = server
        yield door
    finally:
        await _shut_down(server)
        await gateway.close()
        listening.close()


async def _shut_down(server: uvicorn.Server) -> None:
    """What server.shutdown() does, without its pause of 0.1 s: nothing may be left of any request."""
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    await eventually(lambda: not server.server_state.connections and not server.server_state.tasks)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as door:
        yield door


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(served=("qwen-served",), tag="a") as engine:
        yield engine


def engine_upstream(engine: FakeEngine, name: str = "p", **changes: Any) -> Upstream:
    """A deployment's engine that serves `default/qwen`."""
    fields: dict[str, Any] = {
        "provider": Ref("default", name),
        "base_url": engine.url,
        "policy": "vllm",
        "served": (ServedModel("default/qwen", engine.served[0]),),
    }
    return Upstream(**fields | changes)


@contextmanager
def unanswering(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port where attempts to connect are neither accepted nor refused, as by a firewall."""
    with contextlib.ExitStack() as sockets:
        full = sockets.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(4):
            one = sockets.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield full.getsockname()[1]

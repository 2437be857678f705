"""The recorded exchanges of the reference platform, and the machine they were recorded on: two upstreams and a NIM.

`transcripts.json` has one exchange in a line, in the order in which they happened: the command it belongs to, what was
sent, and the status, content type and body that came back. Of a poll only the last answer is kept. UPSTREAM stands for
the address of an OpenAI-compatible server, NOBODY for one where nothing listens.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tests.fakes.containers import FakeContainer
from tests.fakes.engine import FakeEngine, Received, Reply
from tests.world import World

Json = dict[str, Any]
RECORDED = Path(__file__).parent / "transcripts.json"
UPSTREAM_MODELS = ("stub-model", "meta/llama-3.1-8b-instruct", "gpt-4", "gpt-3.5-turbo")


class Exchange(Struct, frozen=True):
    of: str
    method: str
    path: str
    status: int
    type: str
    response: str | None
    request: str = ""
    poll: bool = False

    @property
    def waits(self) -> bool:
        """It was asked until the answer was this one."""
        return self.method == "GET" and (self.poll or "wait" in self.of)

    @property
    def reads(self) -> bool:
        return self.method == "GET" or "/inference-gateway/" in self.path

    @property
    def body(self) -> bytes:
        return _bytes(self.request)

    @property
    def reply(self) -> bytes:
        return _bytes(self.response or "")


def _bytes(text: str) -> bytes:
    """What the recording means: it has bytes that are no UTF-8 as `\\x80`."""
    if not re.search(r"\\x[89a-f][0-9a-f]", text):
        return text.encode()
    return re.sub(rb"\\x([89a-f][0-9a-f])", lambda m: bytes([int(m[1], 16)]), text.encode("latin-1"))


def recorded(upstream: str, nobody: str) -> list[tuple[str, Exchange]]:
    """Every exchange with its id: the number of its command, and a letter when the command had several."""
    text = RECORDED.read_text().replace("UPSTREAM", upstream).replace("NOBODY", nobody)
    exchanges = msgspec.json.decode(text, type=list[Exchange])
    sizes: dict[str, int] = {}
    for exchange in exchanges:
        sizes[exchange.of] = sizes.get(exchange.of, 0) + 1
    letters = {name: count(ord("a")) for name in sizes}
    return [(f"{e.of[:3]}{chr(next(letters[e.of])) if sizes[e.of] > 1 else ''}", e) for e in exchanges]


class Upstream(FakeEngine):
    """Answers as the recorded one did."""

    deltas: tuple[Json, ...] = ({"role": "assistant", "content": ""}, {"content": "Hello "}, {})

    async def _route(self, request: Received) -> Reply:
        if request.path == "/v1/classify":
            return Reply(200, {"jailbreak": False, "score": -0.98})
        if request.path == "/v1/models":
            cards = [{"id": n, "object": "model", "created": 1700000000, "owned_by": "stub"} for n in self.served]
            return Reply(200, {"object": "list", "data": cards}) if self.served != (NO_MODEL,) else _no_route(request)
        if request.path == "/v1/chat/completions":
            return self.chat(request)
        return await self._health(request.path) if "health" in request.path else _no_route(request)

    def chat(self, request: Received) -> Reply:
        try:
            body = request.json()
        except ValueError:
            return Reply(400, {"error": {"message": "bad json", "type": "invalid_request_error"}})
        match body.get("model"):
            case "boom":
                return Reply(500, {"error": {"message": "boom", "type": "server_error"}})
            case "ratelimit":
                return Reply(429, {"error": {"message": "slow down", "type": "rate_limit"}}, {"retry-after": "1"})
        frame = {"id": "chatcmpl-stub", "created": 1700000000, "model": body.get("model")}
        if body.get("stream"):
            return Reply(200, self._stream(frame), {"content-type": "text/event-stream; charset=utf-8"})
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        return Reply(200, {**frame, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _stream(self, frame: Json) -> Any:
        chunk = {**frame, "object": "chat.completion.chunk"}
        for delta in self.deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            yield b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


class Nim(Upstream):
    deltas = ({"role": "assistant", "content": "tok0 "},)


NO_MODEL = "none"


def _no_route(request: Received) -> Reply:
    return Reply(404, {"error": {"message": f"no route {request.method} {request.path}", "type": "not_found"}})


class ReferenceWorld(World):
    """One GPU, which Docker cannot hand out; the images that were there; NIMs that serve the model in $MODEL."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, gpus=1)
        self.docker.gpu_runtime = False
        self.docker.images |= type(self.docker)(images=["nim-stub:1.0"]).images
        self.upstream = Upstream(served=UPSTREAM_MODELS)
        self.may_stop = asyncio.Event()
        """Containers are still there until it is set: in the recording a deletion took its time."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.nobody = f"127.0.0.1:{probe.getsockname()[1]}"

    async def start(self) -> None:
        await self.upstream.start()
        self.engines["upstream"] = self.upstream
        await super().start()

    def exchanges(self) -> list[tuple[str, Exchange]]:
        return recorded(self.upstream.url.removeprefix("http://"), self.nobody)

    async def _start_engine(self, container: FakeContainer) -> int:
        engine = Nim(served=(container.env.get("MODEL", NO_MODEL),), tag=container.id)
        await engine.start()
        self.engines[container.id] = engine
        return engine.port

    async def _stop_engine(self, container: FakeContainer) -> None:
        await self.may_stop.wait()
        await super()._stop_engine(container)

    async def stop(self) -> None:
        self.may_stop.set()
        await super().stop()

"""FakeEngine: the HTTP surface of vLLM and NIM, with faults that can be switched at run time.

In a test, on a free loopback port:

    async with FakeEngine(served=("qwen",), tag="a") as engine:
        engine.faults = Faults(first_byte_delay_s=2)
        ...                                     # engine.url, engine.requests, engine.cancelled

As a program (only the standard library, Python >= 3.11), which is what the test images run:

    python3 engine.py serve /model-store/x --served-model-name a b --port 8000

    FAKE_TAG     instance tag, by default the host name (in a container: its id)
    FAKE_FAULTS  JSON object with fields of Faults
    PORT, NIM_SERVED_MODEL_NAME, NIM_MODEL_NAME as the real ones have them; arguments win

Every reply carries the tag: in the header `x-fake-instance` and in the generated text.

    POST /_fake/faults {..}   replaces all faults ({} heals), 400 for a fault that does not exist
    GET  /_fake/faults
    GET  /_fake/requests      what was received, oldest first (at most the last 1,000)
    GET  /_fake/state         open_streams, cancelled, connections, requests, adapters, uptime_s
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_BODY_BYTES = 200_000_000
CONTROL_PATHS = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache",
    "/start_profile", "/stop_profile", "/pause", "/resume", "/scale_elastic_ep", "/server_info", "/docs",
    "/openapi.json", "/invocations",
)  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Faults:
    """What goes wrong. `paths`: prefixes of the paths that the reply faults apply to."""

    paths: tuple[str, ...] = (
        "/v1/chat", "/v1/completions", "/v1/embeddings", "/v1/classify", "/v1/infer", "/v1/messages", "/v1/responses",
        "/v1/ranking", "/v1/audio",
    )  # fmt: skip
    # while it starts
    crash_exit_code: int | None = None
    """Exit with this code instead of serving, after `stderr` was written."""
    stderr: tuple[str, ...] = ()
    listen_delay_s: float = 0
    ready_delay_s: float = 0
    """Health is 503 for so long after the start (`/v1/health/live` is 200 at once, as a NIM's is)."""
    # health
    unhealthy: bool = False
    health_hang: bool = False
    health_flap_s: float = 0
    """Healthy and unhealthy by turns, each for so long."""
    hide_models: bool = False
    """`/v1/models` lists nothing, whatever health says."""
    # replies
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: str | None = None
    """Body of the reply with `status` (by default an OpenAI error object)."""
    first_byte_delay_s: float = 0
    hang: bool = False
    """Accept, read, never answer."""
    close_before_reply: bool = False
    malformed_json: bool = False
    gzip: bool = False
    event_lines: bool = False
    """Streams carry `event:`, `id:` and comment lines as well."""
    chunks: int | None = None
    """So many content chunks in a stream, instead of one for each word."""
    chunk_bytes: int = 0
    """Pad every content chunk to at least so many characters of text."""
    chunk_delay_s: float = 0
    drop_after_chunks: int | None = None
    hang_after_chunks: int | None = None
    # its life
    exit_after_requests: int | None = None
    """Exit on the request with this number (counted from when the fault was set), without an answer."""
    exit_code: int = 1
    lora_status: int = 0
    """Status of the adapter endpoints."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Faults:
        """Raises TypeError for a field that does not exist."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)


class Received(NamedTuple):
    method: str
    target: str
    """Path and query, as they came."""
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Reply(NamedTuple):
    status: int
    body: Any = None
    """bytes go out as they are, None is an empty body, anything else as JSON; an async iterator is a stream."""
    headers: dict[str, str] = {}  # noqa: RUF012


class FakeEngine:
    def __init__(
        self,
        *,
        served: tuple[str, ...] = ("fake-model",),
        tag: str = "fake",
        faults: Faults | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        root: str | None = None,
        lora: bool = True,
        check_lora_paths: bool = False,
        max_lora_rank: int = 16,
        peft_source: str | None = None,
        peft_refresh_s: float = 30,
        mounts: dict[str, str] | None = None,
        exit: Callable[[int], None] | None = None,
    ) -> None:
        self.served, self.tag, self.host, self.port = served, tag, host, port
        self.root = root or served[0]
        self.lora, self.check_lora_paths, self.max_lora_rank = lora, check_lora_paths, max_lora_rank
        self.peft_source, self.peft_refresh_s = peft_source, peft_refresh_s
        """As a NIM: adapters are the directories in there, looked for no more often than this."""
        self.mounts = mounts or {}
        """Path in the container -> where that is for this process, when it runs in none."""
        self.requests: collections.deque[Received] = collections.deque(maxlen=1000)
        self.scripted: dict[str, Callable[[Received], Reply]] = {}
        """Path -> what a test wants to be answered there, faults apart."""
        self.adapters: dict[str, str] = {}
        """Loaded adapters: name -> path."""
        self._looked_at = -float("inf")
        self.served_requests = 0
        self.open_streams = 0
        self.pieces_sent = 0
        """Pieces of streams that were handed to the socket."""
        self.cancelled = 0
        """Requests whose client left before the reply was complete."""
        self.cancelled_at: float | None = None
        """When the last one left (time.monotonic)."""
        self.connections: set[_Connection] = set()
        self.connections_made = 0
        self.exited: int | None = None
        self._exit = exit
        self._server: asyncio.Server | None = None
        self._started = time.monotonic()
        self.faults = faults or Faults()

    # --- life

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self._countdown = faults.exit_after_requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; a stopped engine can be started again and keeps its port."""
        self._started, self.exited = time.monotonic(), None
        if self.faults.listen_delay_s:
            await asyncio.sleep(self.faults.listen_delay_s)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As if the process were killed: the port is closed and every connection is reset."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        tasks = [connection.task for connection in self.connections if connection.task]
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self.connections:  # noqa: ASYNC110 connection_lost comes in the next turns of the loop
            await asyncio.sleep(0)
        await server.wait_closed()

    def die(self, code: int) -> None:
        """Exit as a program; in a test, close everything and remember the code in `exited`."""
        self.exited = code
        if self._exit:
            self._exit(code)
        elif self._server:
            self._server.close()
            for connection in list(self.connections):
                connection.abort()

    def state(self) -> dict[str, Any]:
        return {
            "tag": self.tag,
            "open_streams": self.open_streams,
            "cancelled": self.cancelled,
            "connections": len(self.connections),
            "connections_made": self.connections_made,
            "requests": self.served_requests,
            "adapters": self.adapters,
            "uptime_s": time.monotonic() - self._started,
        }

    # --- requests

    async def answer(self, request: Received) -> Reply:
        if request.path.startswith("/_fake/"):
            return self._own(request)
        self.requests.append(request)
        self.served_requests += 1
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown <= 0:
                self.die(self.faults.exit_code)
                await asyncio.Event().wait()
        if request.path.startswith(self.faults.paths) and (failed := await self._fail()):
            return failed
        return await self._route(request)

    async def _fail(self) -> Reply | None:
        """The reply faults that come before the reply itself."""
        faults = self.faults
        if faults.hang:
            await asyncio.Event().wait()
        if faults.first_byte_delay_s:
            await asyncio.sleep(faults.first_byte_delay_s)
        if faults.close_before_reply:
            raise ConnectionAbortedError
        if faults.malformed_json:
            return Reply(200, b'{"id": "chatcmpl-fake", "choices": [{"message"', {"content-type": "application/json"})
        if faults.status:
            body = faults.body.encode() if faults.body is not None else _error(f"fault {faults.status}", faults.status)
            return Reply(faults.status, body, {"content-type": "application/json"} | faults.headers)
        return None

    async def _route(self, request: Received) -> Reply:
        path, key = request.path, f"{request.method} {request.path}"
        if path in self.scripted:
            return self.scripted[path](request)
        if path in ("/health", "/v1/health/ready", "/ping"):
            return await self._health(path)
        if key in ROUTES:
            return ROUTES[key](self, request)
        if path in CONTROL_PATHS:
            return Reply(200, {"control": path, "tag": self.tag})
        if any(route.endswith(f" {path}") for route in ROUTES):
            return Reply(405, {"detail": "Method Not Allowed"})
        return Reply(404, {"detail": "Not Found"})

    async def _health(self, path: str) -> Reply:
        faults, age_s = self.faults, time.monotonic() - self._started
        if faults.health_hang:
            await asyncio.Event().wait()
        flapped = faults.health_flap_s and int(age_s / faults.health_flap_s) % 2 == 1
        if faults.unhealthy or age_s < faults.ready_delay_s or flapped:
            return Reply(503, {"object": "health.response", "message": "not ready"} if path != "/health" else None)
        return Reply(200, {"object": "health.response", "message": "ready"} if path != "/health" else None)

    def _own(self, request: Received) -> Reply:
        key = f"{request.method} {request.path}"
        if key == "POST /_fake/faults":
            try:
                self.faults = Faults.from_json(request.json())
            except (TypeError, ValueError) as error:
                return Reply(400, {"detail": str(error)})
        if request.path == "/_fake/faults":
            return Reply(200, dataclasses.asdict(self.faults))
        if request.path == "/_fake/state":
            return Reply(200, self.state())
        if request.path == "/_fake/requests":
            return Reply(200, {"requests": [_show(received) for received in self.requests]})
        return Reply(404, {"detail": "Not Found"})

    # --- routes

    def models(self, _: Received) -> Reply:
        self._look_for_adapters()
        base = [self._card(name, None, self.root) for name in self.served]
        nim = self.peft_source is not None  # which lists adapters like models
        loaded = [
            self._card(name, None if nim else self.served[0], self.root if nim else path)
            for name, path in self.adapters.items()
        ]
        return Reply(200, {"object": "list", "data": [] if self.faults.hide_models else base + loaded})

    def _card(self, name: str, parent: str | None, root: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 1700000000, "owned_by": "vllm", "root": root,
                "parent": parent, "max_model_len": 4096, "permission": []}  # fmt: skip

    def chat(self, request: Received) -> Reply:
        return self._generate(request, "chat.completion")

    def complete(self, request: Received) -> Reply:
        return self._generate(request, "text_completion")

    def _generate(self, request: Received, kind: str) -> Reply:
        body, refused = self._body(request)
        if refused:
            return refused
        model, said = body["model"], _last_text(body)
        text = f"Hello from {self.tag} as {model}: {said}"
        if body.get("stream"):
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            return Reply(200, self._events(body, kind, text), headers)
        usage = _usage(said, text)
        message = {"message": {"role": "assistant", "content": text}} if kind == "chat.completion" else {"text": text}
        choice = {"index": 0, **message, "logprobs": None, "finish_reason": "stop"}
        return Reply(200, {"id": "chatcmpl-fake", "object": kind, "created": 1700000000, "model": self._name(model),
                           "choices": [choice], "usage": usage})  # fmt: skip

    async def _events(self, body: dict[str, Any], kind: str, text: str) -> AsyncIterator[bytes]:
        chat = kind == "chat.completion"
        frame = {"id": "chatcmpl-fake", "object": f"{kind}.chunk" if chat else kind, "created": 1700000000,
                 "model": self._name(body["model"])}  # fmt: skip

        def event(piece: str | None, finish: str | None = None, role: bool = False) -> bytes:
            delta: dict[str, Any] = {"content": piece} if piece is not None else {}
            content = {"delta": {"role": "assistant"} | delta if role else delta} if chat else {"text": piece or ""}
            return self._sse(frame | {"choices": [{"index": 0, **content, "finish_reason": finish}]})

        if chat:
            yield event("", role=True)
        for piece in self._pieces(text):
            yield event(piece)
        yield event(None, finish="stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            yield self._sse(frame | {"choices": [], "usage": _usage(_last_text(body), text)})
        yield b"data: [DONE]\n\n"

    def _pieces(self, text: str) -> list[str]:
        words = [f"{word} " for word in text.split(" ")]
        count = len(words) if self.faults.chunks is None else self.faults.chunks
        return [f"{i} ".ljust(self.faults.chunk_bytes, "x") if self.faults.chunk_bytes else words[i % len(words)]
                for i in range(count)]  # fmt: skip

    def _sse(self, event: dict[str, Any]) -> bytes:
        lines = b": a comment\nevent: delta\nid: 7\n" if self.faults.event_lines else b""
        return lines + b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"

    def embed(self, request: Received) -> Reply:
        body, refused = self._body(request)
        if refused:
            return refused
        texts = body.get("input") or ""
        texts = [texts] if isinstance(texts, str) else texts
        data = [{"object": "embedding", "index": i, "embedding": _vector(str(t))} for i, t in enumerate(texts)]
        return Reply(200, {"object": "list", "data": data, "model": self._name(body["model"]),
                           "usage": {"prompt_tokens": 1, "total_tokens": 1}})  # fmt: skip

    def classify(self, request: Received) -> Reply:
        """NeMo Guard's JailbreakDetect: no model name in the body."""
        jailbreak = b"ignore all" in request.body.lower()
        return Reply(200, {"jailbreak": jailbreak, "score": 0.9 if jailbreak else -0.9, "tag": self.tag})

    def tokenize(self, request: Received) -> Reply:
        body, refused = self._body(request, model_needed=False)
        tokens = list(range(len(_last_text(body).split())))
        return refused or Reply(200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens})

    def detokenize(self, request: Received) -> Reply:
        body, refused = self._body(request, model_needed=False)
        return refused or Reply(200, {"prompt": " ".join(map(str, body.get("tokens", [])))})

    def hash_body(self, request: Received) -> Reply:
        """For uploads: what arrived, so that a test can see that every byte did."""
        digest = hashlib.sha256(request.body).hexdigest()
        return Reply(200, {"sha256": digest, "size_bytes": len(request.body), "text": f"heard by {self.tag}"})

    def load_adapter(self, request: Received) -> Reply:
        if refused := self._adapter_refusal():
            return refused
        body = request.json()
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return Reply(400, _error("Both 'lora_name' and 'lora_path' must be provided.", 400))
        if name in self.adapters and not body.get("load_inplace"):
            return Reply(400, _error(f"The lora adapter '{name}' has already been loaded.", 400))
        if name in self.served:
            return Reply(400, _error(f"The lora adapter '{name}' conflicts with a served base model.", 400))
        if self.check_lora_paths:
            rank = self._rank_in(path)
            if rank is None:
                message = f"Loading lora {name} failed: No adapter found for {path}"
                return Reply(404, _error(message, 404, "NotFoundError"))
            if rank > self.max_lora_rank:
                message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
                return Reply(500, _error(message, 500, "InternalServerError"))
        self.adapters[name] = path
        return Reply(200, f"Success: LoRA adapter '{name}' added successfully.".encode())

    def unload_adapter(self, request: Received) -> Reply:
        if refused := self._adapter_refusal():
            return refused
        name = request.json().get("lora_name")
        if self.adapters.pop(name, None) is None:
            return Reply(404, _error(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError"))
        return Reply(200, f"Success: LoRA adapter '{name}' removed successfully.".encode())

    def _place(self, path: str) -> str:
        for inside, outside in self.mounts.items():
            if path == inside or path.startswith(f"{inside}/"):
                return outside + path[len(inside) :]
        return path

    def _rank_in(self, path: str) -> int | None:
        """None when there is no adapter."""
        try:
            with open(os.path.join(self._place(path), "adapter_config.json")) as file:
                return int(json.load(file).get("r", 8))
        except OSError:
            return None

    def _look_for_adapters(self) -> None:
        if self.peft_source is None or time.monotonic() - self._looked_at < self.peft_refresh_s:
            return
        self._looked_at, root = time.monotonic(), self._place(self.peft_source)
        paths = {name: f"{self.peft_source}/{name}" for name in sorted(os.listdir(root))}
        found = {name: path for name, path in paths.items() if self._rank_in(path) is not None}
        self.adapters = {name: self.adapters.get(name, path) for name, path in found.items()}

    def _adapter_refusal(self) -> Reply | None:
        if self.faults.lora_status:
            return Reply(self.faults.lora_status, _error("fault", self.faults.lora_status))
        return None if self.lora else Reply(404, {"detail": "Not Found"})

    def metrics(self, _: Received) -> Reply:
        text = (
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0",model_name="{self.served[0]}"}} {float(self.open_streams)}\n'
        )
        return Reply(200, text.encode(), {"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    def metadata(self, _: Received) -> Reply:
        info = [{"shortName": name, "modelUrl": f"ngc://nim/{name}"} for name in self.served]
        return Reply(200, {"version": "1.8.6", "modelInfo": info, "tag": self.tag})

    def _name(self, model: str) -> str:
        """What a reply calls the model: vLLM says the first served name for each of its names."""
        return model if model in self.adapters else self.served[0]

    def _body(self, request: Received, model_needed: bool = True) -> tuple[dict[str, Any], Reply | None]:
        try:
            body = request.json()
        except ValueError:
            return {}, Reply(400, _error("There was an error parsing the body", 400))
        if not isinstance(body, dict):
            return {}, Reply(400, _error("Input should be a valid dictionary", 400))
        model = body.get("model")
        self._look_for_adapters()
        if model in self.adapters and self.check_lora_paths and self._rank_in(self.adapters[model]) is None:
            self.die(0)  # a real vLLM does, once it has to read the files again
            raise ConnectionAbortedError
        if (model is None and not model_needed) or model in self.served or model in self.adapters:
            return body, None
        return {}, Reply(404, _error(f"The model `{model}` does not exist.", 404, "NotFoundError"))


ROUTES: dict[str, Callable[[FakeEngine, Received], Reply]] = {
    "GET /v1/models": FakeEngine.models,
    "POST /v1/chat/completions": FakeEngine.chat,
    "POST /v1/completions": FakeEngine.complete,
    "POST /v1/embeddings": FakeEngine.embed,
    "POST /v1/classify": FakeEngine.classify,
    "POST /classify": FakeEngine.classify,
    "POST /tokenize": FakeEngine.tokenize,
    "POST /detokenize": FakeEngine.detokenize,
    "POST /v1/audio/transcriptions": FakeEngine.hash_body,
    "POST /v1/infer": FakeEngine.hash_body,
    "POST /v1/ranking": FakeEngine.hash_body,
    "PUT /v1/infer": FakeEngine.hash_body,
    "POST /v1/load_lora_adapter": FakeEngine.load_adapter,
    "POST /v1/unload_lora_adapter": FakeEngine.unload_adapter,
    "GET /metrics": FakeEngine.metrics,
    "GET /v1/metrics": FakeEngine.metrics,
    "GET /v1/metadata": FakeEngine.metadata,
    "GET /version": lambda _engine, _request: Reply(200, {"version": "0.32.0"}),
    "GET /v1/version": lambda _engine, _request: Reply(200, {"release": "1.8.6", "api": "1.0.0"}),
    "GET /v1/license": lambda _engine, _request: Reply(200, {"name": "fake licence"}),
    "GET /v1/manifest": lambda _engine, _request: Reply(200, {"manifest_file": "", "repository": ""}),
    "GET /v1/health/live": lambda _e, _r: Reply(200, {"object": "health.response", "message": "live"}),
    "GET /load": lambda _engine, _request: Reply(200, {"server_load": 0}),
}


class _Connection(asyncio.Protocol):
    """One client connection: requests one after the other; its end cancels the reply under way."""

    transport: asyncio.Transport

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.reader = asyncio.StreamReader(limit=MAX_BODY_BYTES)
        self.task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.engine.connections.add(self)
        self.engine.connections_made += 1
        self.task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self.reader.feed_data(data)

    def eof_received(self) -> None:
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.engine.connections.discard(self)
        if self.task and not self.task.done():
            if self.busy and self.engine.exited is None:
                self.engine.cancelled += 1
                self.engine.cancelled_at = time.monotonic()
            self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def abort(self) -> None:
        self.transport.abort()

    async def _serve(self) -> None:
        try:
            while True:
                request = await self._read()
                self.busy = True
                reply = await self.engine.answer(request)
                await self._write(request, reply)
                self.busy = False
                if (request.header("connection") or "").lower() == "close":
                    break
            self.transport.close()
        except (ConnectionError, EOFError):
            self.busy = False  # we broke it off ourselves; what was written before still goes out
            self.transport.close()

    async def _read(self) -> Received:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        fields = (line.partition(":") for line in head[1:-2])
        headers = tuple((name.strip(), value.strip()) for name, _, value in fields)
        request = Received(method, target, headers, b"")
        if (request.header("expect") or "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in (request.header("transfer-encoding") or "").lower():
            return request._replace(body=await self._read_chunks())
        return request._replace(body=await self.reader.readexactly(int(request.header("content-length") or 0)))

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return bytes(body)

    async def _write(self, request: Received, reply: Reply) -> None:
        if isinstance(reply.body, AsyncIterator):
            await self._stream(request, reply)
            return
        body, headers = reply.body, dict(reply.headers)
        if body is None:
            body = b""
        elif not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"content-type": "application/json"} | headers
        if self._compressed(request) and body:
            body = gzip.compress(body, mtime=0)
            headers["content-encoding"] = "gzip"
        self._head(reply.status, headers | {"content-length": str(len(body))})
        if request.method != "HEAD":
            self.transport.write(body)
        await self.writable.wait()

    async def _stream(self, request: Received, reply: Reply) -> None:
        faults = self.engine.faults
        headers = dict(reply.headers) | {"transfer-encoding": "chunked"}
        compressed = self._compressed(request)
        self._head(reply.status, headers | ({"content-encoding": "gzip"} if compressed else {}))
        self.engine.open_streams += 1
        try:
            sent = 0
            async for piece in reply.body:
                if sent == faults.drop_after_chunks:
                    raise ConnectionAbortedError
                if sent == faults.hang_after_chunks:
                    await asyncio.Event().wait()
                # Members of one gzip file may follow each other: each event is readable as soon as it is here.
                data = gzip.compress(piece, mtime=0) if compressed else piece
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
                await self.writable.wait()
                sent += 1
                self.engine.pieces_sent += 1
                await asyncio.sleep(faults.chunk_delay_s)  # 0 as well: let the loop notice that the client left
            self.transport.write(b"0\r\n\r\n")
        finally:
            self.engine.open_streams -= 1
            await reply.body.aclose()

    def _compressed(self, request: Received) -> bool:
        return self.engine.faults.gzip and "gzip" in (request.header("accept-encoding") or "")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        own = {"date": "Thu, 01 Jan 1970 00:00:00 GMT", "server": "fake", "x-fake-instance": self.engine.tag}
        headers = own | headers
        lines = [f"HTTP/1.1 {status} Fake", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode("latin-1"))


def _error(message: str, code: int, type: str = "BadRequestError") -> bytes:
    return json.dumps({"error": {"message": message, "type": type, "param": None, "code": code}}).encode()


def _show(received: Received) -> dict[str, Any]:
    shown: dict[str, Any] = {"method": received.method, "path": received.target, "headers": received.headers}
    try:
        return shown | {"body": received.body.decode()}
    except UnicodeDecodeError:
        return shown | {"body_base64": base64.b64encode(received.body).decode()}


def _last_text(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return str(body.get("prompt", ""))


def _usage(prompt: str, text: str) -> dict[str, int]:
    sent, got = len(prompt.split()), len(text.split())
    return {"prompt_tokens": sent, "completion_tokens": got, "total_tokens": sent + got}


def _vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


# --- as a program --------------------------------------------------------------------------------------------------


def _option(args: list[str], name: str) -> list[str]:
    """Values of `--name a b`, `--name=a`: until the next option."""
    for at, arg in enumerate(args):
        if arg.startswith(f"{name}="):
            return [arg.partition("=")[2]]
        if arg == name:
            rest = args[at + 1 :]
            end = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
            return rest[:end]
    return []


def _from_command_line(args: list[str], env: dict[str, str]) -> FakeEngine:
    words = [word for word in args if word != "serve"]
    positional = words[:1] if words and not words[0].startswith("-") else []
    root = (_option(args, "--model") or positional or [env.get("NIM_MODEL_NAME", "fake-model")])[0]
    names = tuple(_option(args, "--served-model-name")) or tuple(
        name for name in env.get("NIM_SERVED_MODEL_NAME", "").split(",") if name
    )
    return FakeEngine(
        served=names or (root,),
        tag=env.get("FAKE_TAG") or socket.gethostname(),
        faults=Faults.from_json(json.loads(env.get("FAKE_FAULTS") or "{}")),
        host=(_option(args, "--host") or ["0.0.0.0"])[0],
        port=int((_option(args, "--port") or [env.get("PORT", "8000")])[0]),
        root=root,
        lora="--enable-lora" in args and env.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"),
        check_lora_paths=True,
        max_lora_rank=int((_option(args, "--max-lora-rank") or ["16"])[-1]),
        peft_source=env.get("NIM_PEFT_SOURCE"),
        peft_refresh_s=float(env.get("NIM_PEFT_REFRESH_INTERVAL", "30")),
        exit=os._exit,
    )


async def _run(engine: FakeEngine) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # process 1 of a container ignores them otherwise
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(engine.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
        _say(f"INFO:     Application startup complete. Serving {', '.join(engine.served)} on port {engine.port}")
        await stopping
    else:
        serving.cancel()
    await engine.stop()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    try:
        engine = _from_command_line(sys.argv[1:], dict(os.environ))
    except (TypeError, ValueError) as error:
        _say(f"FAKE_FAULTS or arguments are wrong: {error}")
        return 2
    _say(f"INFO:     fake engine {engine.tag} starts with {sys.argv[1:]}")
    for line in engine.faults.stderr:
        _say(line)
    if engine.faults.crash_exit_code is not None:
        return engine.faults.crash_exit_code
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(engine))
    return 0


if __name__ == "__main__":
    sys.exit(main())

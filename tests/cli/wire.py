"""A stand-in for the daemon: the routes the CLI uses, on a real socket, with what happens written by the test."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from nimhost.kinds import KINDS

Json = dict[str, Any]
NOW = "2026-01-02T03:04:05.000000Z"


class Asked:
    """One request as it arrived."""

    def __init__(self, method: str, target: str, headers: Any, body: Any) -> None:
        split = urlsplit(target)
        self.method, self.path, self.headers, self.body = method, unquote(split.path), headers, body
        self.raw_path = split.path
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}

    def __repr__(self) -> str:
        return f"{self.method} {self.path}"


class Refusal(Exception):
    def __init__(self, status: int, name: str, detail: object, hint: str | None = None) -> None:
        self.status, self.name, self.detail, self.hint = status, name, detail, hint


class FakeWire:
    """`script` is played to whoever follows progress: snapshots, Events to wait for, and None, which ends it. Without
    one they see how the deployment is.

    `answer` is played to whoever chats: bytes, Events, and None, which breaks off.
    """

    def __init__(self, port: int = 0) -> None:
        self.rows: dict[tuple[str, str, str], Json] = {}
        self.versions: dict[tuple[str, str, str, int], Json] = {}
        self.asked: list[Asked] = []
        self.script: list[Json | threading.Event | None] = []
        self.answer: list[bytes | threading.Event | None] = []
        self.answer_type = "text/event-stream"
        self.said: dict[str, Json] = {}
        """Path -> what is answered there, whatever else there is."""
        self.plan: Json = {"verdict": "starts", "reason": None, "hint": None}
        self.logs = b""
        self.log_end: threading.Event | None = None
        self.refuse: dict[tuple[str, str], Refusal] = {}
        self.refuse_if: Callable[[Asked], Refusal | None] = lambda asked: None
        self.left: list[str] = []
        self.closing = threading.Event()
        self.successor: FakeWire | None = None
        verbs = {f"do_{verb}": _Handler._answer for verb in ("GET", "POST", "PUT", "PATCH", "DELETE")}
        handler = type("Handler", (_Handler,), {"wire": self, **verbs})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = False
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def restart(self) -> FakeWire:
        """Go away, and come back at the same address with the same rows."""
        self.close()
        self.successor = FakeWire(self.port)
        self.successor.rows.update(self.rows)
        return self.successor

    def close(self) -> None:
        if self.successor:
            self.successor.close()
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def put(self, kind: str, name: str, workspace: str = "default", **fields: Any) -> Json:
        row = {"name": name, "workspace": workspace, "created_at": NOW, "updated_at": NOW, **fields}
        if kind == "deployments":
            row = {"status": "CREATED", "status_message": "Deployment created", "status_history": [],
                   "model_provider_id": f"{workspace}/{name}", "desired": "running", **row}  # fmt: skip
        self.rows[kind, workspace, name] = row
        return row

    def ready(self, name: str, served: str, entity: str | None = None, **config: Any) -> None:
        """A READY deployment with its config and provider."""
        executor = {"gpu": 1, "additional_args": [], "additional_envs": None}
        spec = {"model_namespace": "default", "model_name": name}
        self.put(
            "deployment-configs", name, **{"engine": "vllm", "model_spec": spec, "executor_config": executor, **config}
        )
        self.put("deployments", name, config=name, status="READY", status_message="Serving")
        self.provider(name, served, entity or f"default/{name}", model_deployment_id=f"default/{name}")

    def provider(self, name: str, served: str, entity: str, **fields: Any) -> None:
        models = [{"model_entity_id": entity, "served_model_name": served}]
        self.put(
            "providers", name, host_url="http://x", status="READY", status_message="", served_models=models, **fields
        )

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, _, name in self.rows if k == kind)

    def sent(self, method: str, ending: str) -> list[Any]:
        """Bodies of the requests of that method whose path ends so."""
        return [asked.body for asked in self.asked if asked.method == method and asked.path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wire: ClassVar[FakeWire]

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        method = self.command
        size = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        asked = Asked(method, self.path, self.headers, body)
        self.wire.asked.append(asked)
        self.close_connection = True
        try:
            for (verb, ending), refused in self.wire.refuse.items():
                if verb == method and asked.path.endswith(ending):
                    raise refused
            if refusal := self.wire.refuse_if(asked):
                raise refusal
            self._route(asked)
        except Refusal as no:
            said = {"detail": no.detail} | ({"hint": no.hint} if no.hint else {})
            self._json(no.status, said, {"x-nimhost-error": no.name})

    def _route(self, asked: Asked) -> None:
        if asked.path.endswith("/chat/completions"):
            return self._stream(asked, self.wire.answer_type, self.wire.answer)
        if asked.path in self.wire.said:
            return self._json(200, self.wire.said[asked.path])
        parts = asked.path.strip("/").split("/")
        if asked.path == "/apis/nimhost/v1/plan":
            return self._json(200, self.wire.plan)
        if parts[:2] == ["apis", "entities"]:
            raise Refusal(404, "NotFound", "Not Found")
        _, _, _, _, workspace, kind, *rest = parts
        name, action = [*rest, "", ""][:2]
        row = self.wire.rows.get((kind, workspace, name), {})
        if name and not row:
            raise Refusal(404, "NotFound", f"{KINDS[kind].label} '{workspace}/{name}' not found")
        if action == "versions":
            old = self.wire.versions.get((kind, workspace, name, int(rest[2])))
            if old is None:
                raise Refusal(404, "NotFound", "Not Found")
            return self._json(200, old)
        if action == "logs":
            return self._stream(
                asked,
                "text/plain; charset=utf-8",
                [self.wire.logs, *([self.wire.log_end] if self.wire.log_end else [])],
            )
        if action == "progress":
            return self._progress(asked, row)
        if action in ("start", "stop"):
            row |= {"desired": "running" if action == "start" else "stopped", "status": "PENDING"}
            return self._json(200, row)
        return self._crud(asked, kind, workspace, name, row)

    def _crud(self, asked: Asked, kind: str, workspace: str, name: str, row: Json) -> None:
        if asked.method == "GET" and name:
            return self._json(200, row)
        if asked.method == "GET":
            return self._list(asked, kind, workspace)
        if asked.method == "DELETE":
            del self.wire.rows[kind, workspace, name]
            return self._json(202, None)
        if name:
            row.update(asked.body)
            return self._json(200, row)
        if (kind, workspace, asked.body["name"]) in self.wire.rows:
            raise Refusal(409, "AlreadyExists", "exists")
        return self._json(201, self.wire.put(kind, workspace=workspace, **asked.body))

    def _list(self, asked: Asked, kind: str, workspace: str) -> None:
        found = [r for (k, w, _), r in self.wire.rows.items() if k == kind and workspace in ("-", w)]
        page, size = int(asked.query.get("page", 1)), 2
        paging = {"page": page, "page_size": size, "total_pages": -(-len(found) // size), "total_results": len(found)}
        self._json(200, {"data": found[(page - 1) * size : page * size], "pagination": paging})

    def _progress(self, asked: Asked, row: Json) -> None:
        def pieces() -> Iterable[bytes | threading.Event]:
            for step in self.wire.script or [snapshot_of(row)]:
                if step is None:
                    return
                if isinstance(step, threading.Event):
                    yield step
                else:
                    row.update({k: v for k, v in step.items() if k in ("status", "status_message", "desired")})
                    yield f"data: {json.dumps(step)}\n\n".encode()
            yield self.wire.closing

        self._stream(asked, "text/event-stream", pieces())

    def _json(self, status: int, value: Any, headers: Json | None = None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, asked: Asked, content_type: str, pieces: Iterable[bytes | threading.Event | None]) -> None:
        """Chunked; None breaks off without an end."""
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("transfer-encoding", "chunked")
        self.send_header("connection", "close")
        self.end_headers()
        try:
            for piece in pieces:
                if piece is None:
                    return
                if isinstance(piece, threading.Event):
                    self._wait(piece)
                elif piece:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.wire.left.append(asked.path)

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(0.01):
            if self.wire.closing.is_set():
                return
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1):
                raise ConnectionResetError("the client left")


def sse(*texts: str, model: str = "m", **last: Any) -> list[bytes | threading.Event | None]:
    """A streamed chat completion that says these texts."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    chunks: list[Json] = [{"model": model, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"model": model, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **last})
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n"]


def snapshot_of(row: Json) -> Json:
    return {key: row.get(key) for key in ("status", "status_message", "progress", "desired", "update")}


def snapshot(status: str, message: str = "", **progress: Any) -> Json:
    stages = {"image": None, "weights": None, "engine": None, **progress}
    return {"status": status, "status_message": message, "progress": stages, "desired": "running"}

"""FakeRegistry: a registry of images over real HTTP, as far as asking about them goes, with faults on demand.

In a test: `with FakeRegistry() as registry: ref = registry.add("nim/x:1", env=["NVIDIA_REQUIRE_CUDA=cuda>=99"])`. Like
the real ones, it wants a token, which another path gives out, and sends blobs from another host: there, whoever shows
an authorization is remembered in `leaked`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TOKEN = "token-of-the-tests"
Json = dict[str, Any]


class FakeRegistry:
    """Listens from construction to `close`. Thread-safe; attributes can be set at any time."""

    def __init__(self) -> None:
        self.documents: dict[str, tuple[str, bytes]] = {}
        """Path below /v2/ -> media type, content."""
        self.wants: str | None = "Bearer"
        """"Bearer", "Basic", or None: everybody may read."""
        self.challenge = "{}"
        """What it says it wants, with that in the place of `{}`."""
        self.realm = ""
        """Where tokens are given out; empty: here."""
        self.service: str | None = "registry.test"
        self.login: tuple[str, str] | None = None
        """Who alone may read; None: whoever has a token."""
        self.status = 0
        """Every question about an image is answered with this, if it is set."""
        self.rounds = False
        """Every question is sent back to itself."""
        self.padding = 0
        """So many blanks follow each document."""
        self.hangs = threading.Event()
        """Set: connections are taken, and nothing is answered."""
        self.asked: list[str] = []
        self.token_queries: list[dict[str, list[str]]] = []
        self.leaked: list[str] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.registry = self
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, name: str, *, env: tuple[str, ...] = (), sizes: tuple[int, ...] = (1000, 2000),
        machines: tuple[str, ...] = ("amd64", "arm64"), index: bool = True,
    ) -> str:  # fmt: skip
        """Publish an image; what to pull. Without `index` there is one for the first of the machines alone."""
        repository, _, tag = name.rpartition(":")
        entries = []
        for machine in machines:
            config = {"architecture": machine, "os": "linux", "config": {"Env": [*env, f"MACHINE={machine}"]}}
            blob = self._put(f"{repository}/blobs", "application/vnd.oci.image.config.v1+json", config)
            layers = [{"digest": f"sha256:{size:064x}", "size": size} for size in sizes]
            manifest = {"schemaVersion": 2, "config": blob, "layers": layers}
            found = self._put(f"{repository}/manifests", MANIFEST, manifest)
            entries.append({**found, "platform": {"os": "linux", "architecture": machine}})
        entries.append({"digest": "sha256:" + "0" * 64, "size": 1, "platform": {"os": "unknown", "architecture": "x"}})
        document = self.documents[f"{repository}/manifests/{entries[0]['digest']}"]
        if index:
            document = INDEX, json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
        self.documents[f"{repository}/manifests/{tag}"] = document
        return self.ref(name)

    def ref(self, name: str) -> str:
        return f"127.0.0.1:{self.port}/{name}"

    def _put(self, place: str, kind: str, document: Json) -> Json:
        content = json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.documents[f"{place}/{digest}"] = kind, content
        return {"mediaType": kind, "digest": digest, "size": len(content)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    registry: FakeRegistry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone away: as tests mean it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        registry, address = self.server.registry, urlsplit(self.path)
        if registry.hangs.is_set():
            registry.closing.wait(30)
            return
        if address.path == "/token":
            self._give_token(parse_qs(address.query))
        elif address.path.startswith("/cdn/"):
            if "Authorization" in self.headers:
                registry.leaked.append(address.path)
            self._document(address.path.removeprefix("/cdn/"))
        else:
            self._answer(address.path.removeprefix("/v2/"))

    def _answer(self, path: str) -> None:
        registry = self.server.registry
        registry.asked.append(path)
        if registry.status:
            return self._reply(registry.status, b"")
        if registry.rounds:
            return self._reply(302, b"", {"Location": self.path})
        if not self._is_let_in():
            realm = registry.realm or f"http://127.0.0.1:{registry.port}/token"
            service = f'service="{registry.service}",' if registry.service else ""
            challenge = f'{registry.wants} realm="{realm}",{service}scope="x:y"'
            return self._reply(401, b"{}", {"WWW-Authenticate": registry.challenge.format(challenge)})
        if "/blobs/" in path:
            return self._reply(307, b"", {"Location": f"http://localhost:{registry.port}/cdn/{path}?signed=1"})
        return self._document(path)

    def _document(self, path: str) -> None:
        if path not in self.server.registry.documents:
            return self._reply(404, b"{}")
        kind, content = self.server.registry.documents[path]
        return self._reply(200, content + b" " * self.server.registry.padding, {"Content-Type": kind})

    def _is_let_in(self) -> bool:
        wants, shown = self.server.registry.wants, self.headers.get("Authorization", "")
        return wants is None or shown == (f"Bearer {TOKEN}" if wants == "Bearer" else self._basic())

    def _give_token(self, query: dict[str, list[str]]) -> None:
        registry = self.server.registry
        registry.token_queries.append(query)
        if registry.login and self.headers.get("Authorization") != self._basic():
            return self._reply(401, b"{}")
        return self._reply(200, json.dumps({"access_token": TOKEN}).encode())

    def _basic(self) -> str:
        user = ":".join(self.server.registry.login or ("", ""))
        return f"Basic {base64.b64encode(user.encode()).decode()}"

    def _reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

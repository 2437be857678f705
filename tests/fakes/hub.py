"""FakeHub: a stand-in for the Hugging Face hub, faithful enough for `huggingface_hub` itself, with faults on demand.

In a test: `with FakeHub() as hub: hub.add("org/name", {"config.json": b"{}"})`, then set the fault attributes while it
runs. As a program: `python -m tests.fakes.hub DIR [--port N]` serves every `DIR/org/name/` as a repository; `POST
/__faults` takes the fault attributes as JSON, `GET /__stats` shows what was served.

Small files come from the hub itself; large ones (LFS) by redirect from another host name, as the real hub does it,
which refuses requests that show it a token. Files that are `xet_only` come from there by the Xet protocol alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fakes.xet import XetStorage

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
PIECE_BYTES = 16 * 1024


@dataclass
class FakeFile:
    path: str
    content: bytes
    lfs: bool
    xet_only: bool = False
    git_sha1: str = field(init=False)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()
        self.sha256 = hashlib.sha256(self.content).hexdigest()

    @property
    def digest(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1

    def entry(self) -> dict[str, Any]:
        size = len(self.content)
        entry: dict[str, Any] = {"type": "file", "oid": self.git_sha1, "size": size, "path": self.path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": size, "pointerSize": 134}
        if self.xet_only:
            entry["xetHash"] = self.sha256
        return entry


@dataclass
class FakeRepo:
    repo_id: str
    files: dict[str, FakeFile]
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    readers: tuple[str, ...] = ()
    """Tokens that may read it when it is gated or private."""


@dataclass
class Faults:
    """What goes wrong, for as long as it is set. Counters count down to 0 as they are used."""

    down: bool = False
    """Every connection is closed without an answer."""
    busy: int = 0
    """So many requests are answered `busy_status`."""
    busy_status: int = 429
    busy_where: str = ""
    """Only requests whose path contains this."""
    retry_after_s: float | None = 1
    drops: int = 0
    """So many file bodies (of those that are longer) end after `drop_after_bytes`."""
    drop_after_bytes: int = 0
    stalls: int = 0
    """So many file bodies (of those that are longer) stop after `stall_after_bytes`, with the connection open."""
    stall_after_bytes: int = 0
    corrupt: int = 0
    """So many file bodies of LFS files have one wrong byte."""
    bytes_per_s: float | None = None
    """Per connection."""
    ignore_range: bool = False
    pages: int = 0
    """So many requests for a part of a file are answered with a page, as by a proxy in between."""
    shifted: int = 0
    """So many requests for a part of a file are answered with another part."""


@dataclass
class Served:
    """One file body: where it began, and how many bytes were given to the socket."""

    path: str
    start: int
    sent_bytes: int = 0


class FakeHub:
    """Listens from construction to `close`; `url` is its endpoint. Thread-safe."""

    def __init__(self, port: int = 0, page_size: int = 1000) -> None:
        self.faults = Faults()
        self.repos: dict[str, FakeRepo] = {}
        self.renamed: dict[str, str] = {}
        """Old names of repositories, which redirect to the new ones."""
        self.tokens: set[str] = set()
        """Tokens that are valid at all; any other is refused."""
        self.page_size = page_size
        self.served: list[Served] = []
        self.requests: list[str] = []
        self.leaked: list[str] = []
        """Paths on the other host that were asked for with a token."""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), self, self.handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def handler(self) -> type[Handler]:
        """What answers its requests."""
        return Handler

    def add(self, repo_id: str, files: dict[str, bytes], *, xet_only: tuple[str, ...] = (), **rest: Any) -> FakeRepo:
        """Publish a repository (or a new commit of it)."""
        made = {p: FakeFile(p, c, p.endswith(LFS_SUFFIXES), p in xet_only) for p, c in files.items()}
        digest = hashlib.sha1("".join(f"{p}{f.digest}" for p, f in sorted(made.items())).encode())
        self.repos[repo_id] = FakeRepo(repo_id, made, digest.hexdigest(), **rest)
        self.tokens.update(self.repos[repo_id].readers)
        return self.repos[repo_id]

    def sent_bytes(self, path: str | None = None) -> int:
        with self.lock:
            return sum(s.sent_bytes for s in self.served if path in (None, s.path))

    def starts(self, path: str) -> list[int]:
        """Where each request for the body of `path` began."""
        with self.lock:
            return [s.start for s in self.served if s.path == path]

    def forget(self) -> None:
        with self.lock:
            self.served.clear()
            self.requests.clear()

    def use(self, counter: str) -> bool:
        """Take one off a fault's counter; whether there was one."""
        with self.lock:
            left = getattr(self.faults, counter)
            setattr(self.faults, counter, max(0, left - 1))
            return bool(left)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.drop_connections()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: FakeHub, handler: type[Handler]) -> None:
        super().__init__(address, handler)
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        # A small buffer: what is counted as sent is then nearly what was received.
        request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients of ours are killed in the middle of things: not worth a traceback


class Handler(XetStorage, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for name, value in body.items():
            setattr(self.hub.faults, name, value)
        self._json(asdict(self.hub.faults))

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/__stats":
            stats = [asdict(s) for s in self.hub.served]
            return self._json({"served": stats, "requests": self.hub.requests, "sent_bytes": self.hub.sent_bytes()})
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        if self._troubled(path):
            return None
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in path:
                return self._reply(307, b"", {"Location": self.path.replace(old, new)})
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"))
        if path.startswith("/cas/"):
            return self.cas(path.removeprefix("/cas/"))
        return self.answer(path, parse_qs(url.query))

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        """A request that nothing has gone wrong with."""
        if match := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/(.+)", path):
            # The revision is one quoted path segment on the wire: `refs%2Fpr%2F1`.
            return self._api(match[1], match[2], match[3], query)
        if match := re.fullmatch(r"/api/models/(.+?)/xet-read-token/(.+)", path):
            return self.xet_token(match[1], match[2])
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        return self._refuse(404, "RepoNotFound", "Repository not found")

    # --- the hub's rules -------------------------------------------------------------------------------------------

    def _troubled(self, path: str) -> bool:
        faults = self.hub.faults
        if faults.down:
            self.close_connection = True
            return True
        if faults.busy_where in path and self.hub.use("busy"):
            headers = {} if faults.retry_after_s is None else {"Retry-After": f"{faults.retry_after_s:g}"}
            self._reply(faults.busy_status, b"", headers)
            return True
        return False

    def _repo(self, repo_id: str, revision: str, *, content: bool) -> FakeRepo | None:
        """The repository if it may be seen; else the refusal is sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        repo = self.hub.repos.get(repo_id)
        if token is not None and token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token not in repo.readers):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif revision not in (*repo.branches, repo.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif content and repo.gated and token not in repo.readers:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        else:
            return repo
        return None

    def _api(self, repo_id: str, what: str, revision: str, query: dict[str, list[str]]) -> None:
        repo = self._repo(repo_id, revision, content=False)
        if repo is None:
            return None
        if what == "revision":
            siblings = [{"rfilename": path} for path in repo.files]
            return self._json(
                {"id": repo_id, "modelId": repo_id, "sha": repo.commit, "private": repo.private, "tags": [],
                 "gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0, "siblings": siblings}
            )  # fmt: skip
        folders = sorted({str(parent) for path in repo.files for parent in Path(path).parents} - {"."})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
        entries += [file.entry() for file in repo.files.values()]
        first = int(query.get("cursor", ["0"])[0])
        page = entries[first : first + self.hub.page_size]
        following = first + self.hub.page_size
        link = f'<{self.hub.url}/api/models/{repo_id}/tree/{revision}?recursive=true&cursor={following}>; rel="next"'
        return self._json(page, {"Link": link} if following < len(entries) else {})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id, revision, content=True)
        if repo is None:
            return None
        file = repo.files.get(path)
        if file is None or (file.xet_only and self.command == "GET"):
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes", "ETag": f'"{file.git_sha1}"'}
        if not file.lfs:
            return self._body(file, headers)
        headers |= {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(len(file.content)),
            "Location": f"{self.hub.cdn}/{repo_id}/{path}",
        }
        if file.xet_only:
            route = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{repo.commit}"
            headers |= {"X-Xet-Hash": file.sha256, "X-Xet-Refresh-Route": route}
        return self._reply(302, b"", headers)

    def _cdn(self, where: str) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(where)
            return self._reply(400, b"only one auth mechanism allowed", {})
        repo = next(repo for repo in self.hub.repos.values() if where.startswith(f"{repo.repo_id}/"))
        file = repo.files[where.removeprefix(f"{repo.repo_id}/")]
        return self._body(file, {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"})

    # --- replies ---------------------------------------------------------------------------------------------------

    def _body(self, file: FakeFile, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        size = len(file.content)
        start, end = 0, size
        if wanted and not self.hub.faults.ignore_range:
            if self.hub.use("pages"):
                return self._reply(200, b"<html>Please log in to the network.</html>", {})
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
            start -= min(start, 1000) if self.hub.use("shifted") else 0
            if start >= size:
                return self._reply(416, b"", {"Content-Range": f"bytes */{size}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send(file, start, end)
        return None

    def _send(self, file: FakeFile, start: int, end: int) -> None:
        faults, record = self.hub.faults, Served(file.path, start)
        with self.hub.lock:
            self.hub.served.append(record)
        content = file.content
        if file.lfs and self.hub.use("corrupt"):
            content = content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]
        size = end - start
        stop_at = faults.drop_after_bytes if size > faults.drop_after_bytes and self.hub.use("drops") else None
        stall_at = faults.stall_after_bytes if size > faults.stall_after_bytes and self.hub.use("stalls") else None
        began, position = time.monotonic(), start
        while position < end:
            sent = position - start
            if stop_at is not None and sent >= stop_at:
                self.close_connection = True
                return
            if stall_at is not None and sent >= stall_at:
                self.hub.closing.wait(600)
                return
            piece = content[position : min(position + PIECE_BYTES, end)]
            self.wfile.write(piece)
            record.sent_bytes += len(piece)
            position += len(piece)
            if faults.bytes_per_s:
                ahead = (position - start) / faults.bytes_per_s - (time.monotonic() - began)
                self.hub.closing.wait(max(0.0, ahead))

    def _json(self, body: Any, headers: dict[str, str] | None = None) -> None:
        self._reply(200, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._reply(status, json.dumps({"error": message}).encode(), headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="holds ORG/NAME/ directories")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bytes-per-s", type=float, default=None)
    options = parser.parse_args()
    hub = FakeHub(options.port)
    hub.faults.bytes_per_s = options.bytes_per_s
    for folder in sorted(path for path in options.root.glob("*/*") if path.is_dir()):
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        hub.add(str(folder.relative_to(options.root)), files)
    print(hub.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()

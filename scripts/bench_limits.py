"""What the gateway bears: bodies of 50 MB in both directions, readers that hardly read, and 10,000 idle connections.

One gateway as the daemon runs it, one engine beside it, on this machine. Says how much memory each took at most, and
what a request took for others meanwhile. Every byte is checked; what is refused for want of room is sent again. Exit
code 1 if anything was lost or altered, or if others had to wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from bench_gateway import free_port, rss_mb, running

HERE = Path(__file__).resolve().parent
BASE = "/apis/inference-gateway/v2/workspaces/default"
CHAT, UPLOAD = f"{BASE}/openai/-/v1/chat/completions", f"{BASE}/provider/bench/-/v1/audio/transcriptions"
PIECE = hashlib.shake_256(b"reply").digest(1 << 16)
READ_BYTES = 1 << 16
REFUSED: list[str] = []


# --- the engine: says what came, or sends as much as it is told ----------------------------------------------------


async def serve_engine(port: int) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", port, limit=1 << 20, backlog=2048)
    await server.serve_forever()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            hashed, size = hashlib.sha256(), 0
            async for piece in body_of(reader, head):
                hashed.update(piece)
                size += len(piece)
            wanted = int(head.partition(b"x-reply-bytes: ")[2].partition(b"\r\n")[0] or 0)
            if wanted:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % wanted)
                for _ in range(wanted // len(PIECE)):
                    writer.write(PIECE)
                    await writer.drain()
            else:
                said = json.dumps({"bytes": size, "sha256": hashed.hexdigest()}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))
    writer.close()


async def body_of(reader: asyncio.StreamReader, head: bytes):  # type: ignore[no-untyped-def]
    left = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    while left:
        piece = await reader.read(min(left, READ_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


# --- the clients ---------------------------------------------------------------------------------------------------


async def post(port: int, path: str, body: bytes, kind: str, more: str = "", pause_s: float = 0.0) -> tuple[int, bytes]:
    """Status and the reply's body, a long one as its length and hash. Sent again while there is no room for it."""
    while (found := await post_once(port, path, body, kind, more, pause_s))[0] == 503:
        REFUSED.append(path)
        await asyncio.sleep(0.5)
    return found


async def post_once(port: int, path: str, body: bytes, kind: str, more: str, pause_s: float) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
    writer.write(
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\n"
        f"content-length: {len(body)}\r\n{more}\r\n".encode()
    )
    for at in range(0, len(body), READ_BYTES):
        writer.write(body[at : at + READ_BYTES])
        await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    hashed, size, begin = hashlib.sha256(), 0, b""
    while piece := await reader.read(READ_BYTES):
        hashed.update(piece)
        size += len(piece)
        begin = begin or piece
        await asyncio.sleep(pause_s)
    writer.close()
    return int(head[9:12]), begin if size < READ_BYTES else b"%d %b" % (size, hashed.hexdigest().encode())


async def json_bodies(port: int, size: int, count: int) -> bool:
    text = "x" * (size - 60)
    body = json.dumps({"model": "default/bench", "messages": [{"content": text}]}, separators=(",", ":")).encode()
    sent = body.replace(b"default/bench", b"bench-served")
    return await echoed(port, CHAT, body, sent, "application/json", count)


async def uploads(port: int, size: int, count: int) -> bool:
    body = PIECE * (size // len(PIECE))
    return await echoed(port, UPLOAD, body, body, "application/octet-stream", count)


async def echoed(port: int, path: str, body: bytes, sent: bytes, kind: str, count: int) -> bool:
    wanted = {"bytes": len(sent), "sha256": hashlib.sha256(sent).hexdigest()}
    found = await asyncio.gather(*(post(port, path, body, kind) for _ in range(count)))
    return all(status == 200 and json.loads(said) == wanted for status, said in found)


async def replies(port: int, size: int, count: int, pause_s: float = 0.0) -> bool:
    pieces = size // len(PIECE)
    wanted = b"%d %b" % (pieces * len(PIECE), hashlib.sha256(PIECE * pieces).hexdigest().encode())
    more = f"x-reply-bytes: {pieces * len(PIECE)}\r\n"
    found = await asyncio.gather(*(post(port, UPLOAD, b"{}", "application/json", more, pause_s) for _ in range(count)))
    return all(one == (200, wanted) for one in found)


async def request_times_ms(port: int, count: int) -> list[float]:
    """Of small requests one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body, times = b'{"model":"default/bench"}', []
    request = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    for _ in range(count):
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        times.append((time.perf_counter() - began) * 1000)
    writer.close()
    return times


async def idle(port: int, count: int) -> list[asyncio.StreamWriter]:
    opened: list[asyncio.StreamWriter] = []
    while len(opened) < count:
        batch = min(200, count - len(opened))
        found = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(batch)))
        opened += [writer for _, writer in found]
    return opened


# --- measuring -----------------------------------------------------------------------------------------------------


class Meter:
    """The most memory that a process had, looked at from a thread."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended, self.most_mb = pid, threading.Event(), 0.0

    @contextmanager
    def running(self) -> Iterator[Meter]:
        self._ended.clear()
        self.most_mb = rss_mb(self._pid)
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most_mb = max(self.most_mb, rss_mb(self._pid))


async def measure(port: int, pid: int, args: argparse.Namespace) -> list[str]:
    bad: list[str] = []
    meter, size = Meter(pid), args.megabytes * 1_000_000
    await request_times_ms(port, 500)
    print(f"memory when warm: {rss_mb(pid):.0f} MB")
    work: dict[str, Callable[[], Awaitable[bool]]] = {
        f"1 JSON body of {args.megabytes} MB": lambda: json_bodies(port, size, 1),
        f"{args.clients} JSON bodies of {args.megabytes} MB at once": lambda: json_bodies(port, size, args.clients),
        f"{args.clients} uploads of {args.megabytes} MB at once": lambda: uploads(port, size, args.clients),
        f"{args.clients} replies of {args.megabytes} MB at once": lambda: replies(port, size, args.clients),
        f"{args.clients} replies of 10 MB, read slowly": lambda: replies(port, 10_000_000, args.clients, 0.02),
    }
    for name, one in work.items():
        began = time.monotonic()
        with meter.running():
            right = await one()
        took_s = time.monotonic() - began
        refused = f", {len(REFUSED)} times refused" if REFUSED else ""
        print(f"{name:<36} at most {meter.most_mb:4.0f} MB, {rss_mb(pid):4.0f} MB after, {took_s:5.1f} s{refused}")
        REFUSED.clear()
        bad += [] if right else [f"wrong: {name}"]
    before_mb, before_ms = rss_mb(pid), await request_times_ms(port, 2000)
    opened = await idle(port, args.idle)
    with_mb, with_ms = rss_mb(pid), await request_times_ms(port, 2000)
    each_kb = (with_mb - before_mb) * 1024 / args.idle
    took = f"{statistics.median(before_ms):.2f} ms before and {statistics.median(with_ms):.2f} ms meanwhile"
    print(f"{args.idle:,} idle connections: {with_mb - before_mb:.0f} MB more, {each_kb:.1f} KB each;", end=" ")
    print(f"a request took {took}")
    if statistics.median(with_ms) > 3 * statistics.median(before_ms) + 0.5:
        bad.append("others wait because of idle connections")
    for writer in opened:
        writer.close()
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench limits")
    parser.add_argument("--megabytes", type=int, default=50, help="of a body")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--idle", type=int, default=9_900, help="connections")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        uvloop.run(serve_engine(args.engine))
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    engine, port = free_port(), free_port()
    with running([sys.executable, __file__, "--engine", str(engine)], engine), \
            running([sys.executable, str(HERE / "bench_proxy.py"), str(port), f"http://127.0.0.1:{engine}"], port) \
            as pid:  # fmt: skip
        bad = uvloop.run(measure(port, pid, args))
    print(f"FAILED: {', '.join(bad)}" if bad else f"ok: every byte arrived (cores: {os.cpu_count()})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""The client of `scripts/bench gateway`: raw sockets on uvloop, checks every byte, prints one JSON object.

Argument: one JSON object with `port`, `path`, `model`, `connections`, `requests` (in all), `chunks` (0: no stream) and
`pause_ms` between them, `prompt_bytes`, `headers` and `exact` (compare with the engine's bytes).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop
from bench_upstream import REPLY_BODY, frames


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    transport: asyncio.Transport

    def __init__(self, load: Load) -> None:
        self.load = load

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance
        self.ask()

    def ask(self) -> None:
        if not self.load.take():
            self.transport.close()
            return
        self.received, self.body_at, self.length = bytearray(), 0, -1
        self.first_s = 0.0
        self.began = time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.body_at and not self.read_head():
            return
        if not self.first_s and len(self.received) > self.body_at:
            self.first_s = time.perf_counter() - self.began
        if self.length >= 0:
            if len(self.received) >= self.body_at + self.length:
                self.done(bytes(self.received[self.body_at :]))
        elif self.received.endswith(b"0\r\n\r\n"):
            self.done(dechunk(bytes(self.received[self.body_at :])))

    def read_head(self) -> bool:
        end = self.received.find(b"\r\n\r\n")
        if end == -1:
            return False
        head = bytes(self.received[:end]).lower()
        self.body_at = end + 4
        self.status = int(head[9:12])
        at = head.find(b"\r\ncontent-length:")
        self.length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at != -1 else -1
        return True

    def done(self, body: bytes) -> None:
        self.load.record(self.status, time.perf_counter() - self.began, self.first_s, body)
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.gone()


class Load:
    def __init__(self, order: dict[str, Any]) -> None:
        self.left: int = order["requests"]
        self.open, self.order = order["connections"], order
        self.chunks = order["chunks"]
        self.whole_s: list[float] = []
        self.first_s: list[float] = []
        self.not_200 = self.altered = self.lost_events = 0
        self.finished = asyncio.Event()
        self.expected = b"".join(frames(self.chunks)) if self.chunks else REPLY_BODY
        body = json.dumps(
            {
                "model": order["model"],
                "messages": [{"role": "user", "content": ("Tell me a story. " * 6000)[: order["prompt_bytes"]]}],
                "max_tokens": self.chunks or 128,
                "pause_ms": order["pause_ms"],
                "stream": bool(self.chunks),
            },
            separators=(",", ":"),
        ).encode()
        headers = {
            "host": "localhost",
            "user-agent": "bench/1",
            "accept": "*/*",
            "accept-encoding": "gzip, deflate",
            "content-type": "application/json",
            "content-length": str(len(body)),
            **order["headers"],
        }
        lines = [f"POST {order['path']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.request = "\r\n".join(lines).encode() + body

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def record(self, status: int, whole_s: float, first_s: float, body: bytes) -> None:
        self.whole_s.append(whole_s)
        self.first_s.append(first_s)
        self.not_200 += status != 200
        if self.order["exact"]:
            self.altered += body != self.expected
        if self.chunks:
            self.lost_events += self.chunks + 1 - body.count(b"data: ") if self.order["exact"] else 0

    def gone(self) -> None:
        self.open -= 1
        if not self.open:
            self.finished.set()

    def report(self, wall_s: float) -> dict[str, Any]:
        whole, first = sorted(self.whole_s), sorted(self.first_s)
        return {
            "answers": len(whole),
            "missing": self.order["requests"] - len(whole),
            "wall_s": wall_s,
            "p50_s": whole[len(whole) // 2] if whole else None,
            "p99_s": whole[len(whole) * 99 // 100] if whole else None,
            "first_p50_s": first[len(first) // 2] if first else None,
            "not_200": self.not_200,
            "altered": self.altered,
            "lost_events": self.lost_events,
        }


def dechunk(body: bytes) -> bytes:
    parts, at = [], 0
    while (end := body.find(b"\r\n", at)) != -1:
        size = int(body[at:end], 16)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + size + 4
    return b"".join(parts)


async def main(order: dict[str, Any]) -> None:
    load, loop = Load(order), asyncio.get_running_loop()
    began = time.perf_counter()
    opening = (
        loop.create_connection(lambda: Client(load), "127.0.0.1", order["port"]) for _ in range(order["connections"])
    )
    await asyncio.gather(*opening)
    await load.finished.wait()
    print(json.dumps(load.report(time.perf_counter() - began)))


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))

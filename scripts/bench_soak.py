"""Many requests through the gateway while two engines fail in every way they know, then a look at what is left of them.

Fails (exit 1) if a request got stuck, if a whole reply was not what the engine says, or if a task, a socket, a request
under way or memory is left behind. Memory: of the second half of the run, when caches and pools are full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop
from bench_gateway import free_port, listens, rss_mb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nimhost.api.app import entry
from nimhost.config import Gateway as GatewaySettings
from nimhost.config import Settings
from nimhost.entities import ServedModel
from nimhost.gateway.memory import settle
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.routes import Upstream, build_table
from nimhost.listening import Server
from nimhost.refs import Ref

WORKERS = 64
STUCK_S = 20.0
MOST_GROWTH_MB = 15.0
HEALTHY: dict[str, Any] = {}
FAULTS: list[dict[str, Any]] = [
    HEALTHY, {"status": 500}, {"status": 429}, {"first_byte_delay_s": 0.05}, {"close_before_reply": True}, HEALTHY,
    {"malformed_json": True}, {"drop_after_chunks": 3}, {"hang_after_chunks": 2}, {"hang": True},
    {"chunks": 200, "chunk_bytes": 2000}, {"chunk_delay_s": 0.005, "gzip": True},
]  # fmt: skip
PATH = "/v1/chat/completions"
UPLOAD = "/apis/inference-gateway/v2/workspaces/default/provider/a/-/v1/audio/transcriptions"


# --- the gateway, in a process of its own --------------------------------------------------------------------------


async def serve(port: int, engines: list[int]) -> None:
    limits = GatewaySettings(connect_timeout_s=1.0, first_byte_timeout_s=0.5, idle_timeout_s=0.5)
    settings, gateway = Settings(gateway=limits), Gateway(limits)
    served = (ServedModel("default/soak", "soak"),)
    gateway.table = build_table(
        Upstream(provider=Ref("default", name), base_url=f"http://127.0.0.1:{engine}", policy="vllm", served=served)
        for name, engine in zip("abcdef", engines, strict=False)
    )
    server = Server(entry(gateway, gateway, settings), 1.0, on_stop=lambda: None)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop)
    loop.add_signal_handler(signal.SIGUSR1, lambda: print(json.dumps(left_over(gateway)), flush=True))
    settle()
    await server.serve(sockets=[socket.create_server(("127.0.0.1", port), backlog=2048)])
    await gateway.close()


def left_over(gateway: Gateway) -> dict[str, float]:
    return {
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/proc/self/fd")),
        "under way": sum(standing.under_way for standing in gateway.standings.values()),
        "MB": rss_mb(os.getpid()),
    }


# --- the clients ---------------------------------------------------------------------------------------------------


class Clients:
    def __init__(self, port: int, requests: int) -> None:
        self.port, self.left, self.results = port, requests, Counter[str]()
        self.random = random.Random(1)

    async def work(self) -> None:
        while self.left > 0:
            self.left -= 1
            kind = self.random.choices(("plain", "stream", "leaves", "upload"), (60, 25, 12, 3))[0]
            try:
                async with asyncio.timeout(STUCK_S):
                    self.results[f"{kind}: {await self.ask(kind)}"] += 1
            except TimeoutError:
                self.results["STUCK"] += 1
            except OSError as error:
                self.results[f"{kind}: {type(error).__name__}"] += 1

    async def ask(self, kind: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            writer.write(self.request(kind))
            if kind == "leaves":
                await asyncio.sleep(self.random.random() * 0.1)
                return "left"
            return judge(await reader.read())
        finally:
            writer.close()

    def request(self, kind: str) -> bytes:
        path = UPLOAD if kind == "upload" else PATH
        size = 300_000 if kind == "upload" else self.random.choice((10, 10, 1000, 100_000))
        stream = kind == "stream" or (kind == "leaves" and self.random.random() < 0.5)
        body = json.dumps({"model": "soak", "messages": [{"content": "x" * size}], "stream": stream})
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        return f"{head}content-type: application/json\r\n\r\n{body}".encode()


def judge(raw: bytes) -> str:
    """What became of a request; WRONG for what must not be."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return "WRONG: no reply"
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    whole = len(rest) == int(length) if length else rest.endswith(b"0\r\n\r\n")
    status = head[9:12].decode()
    if length and not whole:
        return "WRONG: short"
    return f"{status} {'whole' if whole else 'broken off'}"


async def faults(engines: list[int], done: asyncio.Event) -> None:
    """Another fault for one of the engines, again and again; healthy in the end."""
    chooser = random.Random(2)
    while not done.is_set():
        await set_fault(chooser.choice(engines), chooser.choice(FAULTS))
        await asyncio.sleep(0.2)
    for engine in engines:
        await set_fault(engine, HEALTHY)


async def set_fault(engine: int, fault: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", engine)
    body = json.dumps(fault)
    writer.write(
        f"POST /_fake/faults HTTP/1.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    )
    await reader.read()
    writer.close()


async def soak(port: int, engines: list[int], requests: int) -> Counter[str]:
    clients, done = Clients(port, requests), asyncio.Event()
    failing = asyncio.create_task(faults(engines, done))
    await asyncio.gather(*(clients.work() for _ in range(WORKERS)))
    done.set()
    await failing
    return clients.results


# --- the run -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench soak")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--serve", nargs="+", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.serve[0], args.serve[1:]))
        return 0
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_running()) for _ in range(2)]
        gateway, port = stack.enter_context(gateway_running(engines))
        uvloop.run(soak(port, engines, min(1000, args.requests)))  # everything has been used once
        before = settled(gateway)
        results = uvloop.run(soak(port, engines, args.requests // 2))
        halfway = settled(gateway)
        results += uvloop.run(soak(port, engines, args.requests // 2))
        after = settled(gateway)
    return report(results, before, halfway, after)


def report(results: Counter[str], before: dict[str, float], halfway: dict[str, float], after: dict[str, float]) -> int:
    for what, count in sorted(results.items()):
        print(f"{count:8}  {what}")
    for name, found in (("before", before), ("halfway", halfway), ("after", after)):
        print(f"{name:8}  " + "  ".join(f"{key} {value:.0f}" for key, value in found.items()))
    bad = [what for what in results if what.startswith("STUCK") or "WRONG" in what]
    bad += [f"{key} left" for key in ("tasks", "files", "under way") if after[key] > before[key]]
    if after["MB"] - halfway["MB"] > MOST_GROWTH_MB:
        bad.append(f"{after['MB'] - halfway['MB']:.0f} MB more")
    print(f"FAILED: {', '.join(bad)}" if bad else "ok: nothing is left")
    return 1 if bad else 0


def settled(gateway: subprocess.Popen[str]) -> dict[str, float]:
    """What is there once idle connections have been closed."""
    time.sleep(6)
    gateway.send_signal(signal.SIGUSR1)
    assert gateway.stdout
    found: dict[str, float] = json.loads(gateway.stdout.readline())
    return found


@contextmanager
def engine_running() -> Iterator[int]:
    port, program = free_port(), Path(__file__).resolve().parent.parent / "tests/fakes/engine.py"
    command = [sys.executable, str(program), "serve", "x", "--served-model-name", "soak", "--port", str(port)]
    with process(command, port, stderr=subprocess.DEVNULL):
        yield port


@contextmanager
def gateway_running(engines: list[int]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    command = [sys.executable, __file__, "--serve", str(port), *map(str, engines)]
    with process(command, port, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as started:
        yield started, port


@contextmanager
def process(command: list[str], port: int, **pipes: int) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 15
        while not listens(port):
            if started.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[1]} did not start to listen on port {port}")
            time.sleep(0.05)
        yield started
    finally:
        started.kill()
        started.wait()


if __name__ == "__main__":
    sys.exit(main())

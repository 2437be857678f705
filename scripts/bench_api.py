"""What the control plane costs with many entities: one daemon, one client, on one machine; Docker is not needed.

For 100 entities and then for as many as asked for: a page of 100, filters and sorts (p50, p99, and CPU time of the
daemon per request), creates per second, how long a start takes with that database, memory, and the longest time for
which the daemon's event loop stood still.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MODELS = "/apis/models/v2/workspaces/default/models"
QUERIES = {
    "page 1": {"page_size": "100"},
    "last page": {"page_size": "100", "page": "LAST"},
    "sort -name": {"page_size": "100", "sort": "-name"},
    "sort -updated_at": {"page_size": "100", "sort": "-updated_at"},
    "filter one name": {"filter[name]": "model-00042"},
    "filter name like": {"filter[name][$like]": "0042"},
    "filter description": {"filter[description]": "number 42"},
    "filter JSON, or": {"filter": '{"$or": [{"name": {"$like": "42"}}, {"fileset": "x"}]}'},
}


class Daemon:
    """`nimhost serve`, with its loop watched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes]
        self.url = ""

    def start(self) -> float:
        """Seconds until it answers."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("NIMHOST_", "NMP_"))}
        env |= {"NIMHOST_DEBUG": "1", "NIMHOST_SERVER__PORT": "0", "DOCKER_HOST": f"unix://{self.directory}/none"}
        begun = time.perf_counter()
        command = [sys.executable, "-m", "nimhost", "serve", "--data-dir", str(self.directory / "data")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.directory)
        while not (found := re.search(r"listens on (http://\S+)", self.log.read_text())):
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(0.005)
        self.url = found[1]
        httpx.get(f"{self.url}{MODELS}?page_size=100", timeout=60).raise_for_status()
        return time.perf_counter() - begun

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def pauses(self) -> str:
        said = re.findall(r"the loop stood still .*", self.log.read_text())
        return said[-1] if said else "the loop never stood still for more than 10 ms"


@contextmanager
def running() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as directory:
        daemon = Daemon(Path(directory))
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.process.kill()
            daemon.process.wait()


async def create(url: str, numbers: range, connections: int) -> float:
    """Creates per second."""
    waiting = iter(numbers)

    async def work(client: httpx.AsyncClient) -> None:
        for number in waiting:
            body = {"name": f"model-{number:05}", "description": f"number {number}", "custom_fields": {"n": number}}
            (await client.post(MODELS, json=body)).raise_for_status()

    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await asyncio.gather(*(work(client) for _ in range(connections)))
    return len(numbers) / (time.perf_counter() - begun)


def measure(daemon: Daemon, entities: int, requests: int) -> None:
    print(f"\n{entities:,} models                p50 ms   p99 ms   CPU ms")
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        for name, query in QUERIES.items():
            query = {key: str(-(-entities // 100)) if value == "LAST" else value for key, value in query.items()}
            times, cpu_s = [], daemon.cpu_s()
            for _ in range(requests):
                begun = time.perf_counter()
                client.get(MODELS, params=query).raise_for_status()
                times.append((time.perf_counter() - begun) * 1000)
            cpu_ms = (daemon.cpu_s() - cpu_s) * 1000 / requests
            p99 = statistics.quantiles(times, n=100)[98]
            print(f"  {name:<24} {statistics.median(times):>8.2f} {p99:>8.2f} {cpu_ms:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench api", description=__doc__)
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=200, help="per query")
    options = parser.parse_args()
    with running() as daemon:
        print(f"memory: {daemon.rss_mb():.0f} MB when empty")
        asyncio.run(create(daemon.url, range(100), 1))
        measure(daemon, 100, options.requests)
        middle = options.entities // 2
        one = asyncio.run(create(daemon.url, range(100, middle), 1))
        eight = asyncio.run(create(daemon.url, range(middle, options.entities), 8))
        print(f"\ncreates per second: {one:.0f} one after the other, {eight:.0f} from 8 connections")
        print(f"meanwhile {daemon.pauses()}")
        measure(daemon, options.entities, options.requests)
        print(f"\nmemory: {daemon.rss_mb():.0f} MB with {options.entities:,}; {daemon.pauses()}")
        daemon.stop()
        print(f"start with that database: {daemon.start():.2f} s until a page is served; {daemon.rss_mb():.0f} MB")


if __name__ == "__main__":
    main()

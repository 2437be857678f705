"""The daemon's loop goes on while large things happen: measured by the daemon itself, with its debug switch."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import docker
import httpx
import pytest

from tests.contract.test_scale import filled
from tests.docker.registry import Registry
from tests.e2e.conftest import MakeDaemon, running_provider
from tests.e2e.daemon import MODELS, DaemonProcess, nimhost
from tests.fakes.hub import FakeHub
from tests.support import wait_until

pytestmark = pytest.mark.docker
LONGEST_MS = 25.0
"""Of CPU time between two beats. The aim is 10 for a callback; a machine that is busy makes it look longer."""
LONGEST_LIST_MS = 10.0
REPORT = re.compile(r"stood still (\d+) times, at most ([\d.]+) ms, in (.*); at most ([\d.]+) ms of CPU time")


@pytest.fixture
def daemon(make_daemon: MakeDaemon, gpu_requests: None, hub: FakeHub) -> DaemonProcess:
    daemon = make_daemon(NIMHOST_DEBUG="1", NIMHOST_WEIGHTS__ENDPOINT=hub.url)
    report(daemon)
    return daemon


def report(daemon: DaemonProcess) -> tuple[int, float, str, float]:
    """Pauses, the longest in ms, where it was, and the most CPU time in ms; since the last report."""
    assert daemon.process
    before = daemon.log.stat().st_size
    daemon.process.send_signal(signal.SIGUSR2)
    found = wait_until(lambda: REPORT.search(daemon.log.read_text()[before:]), 20)
    assert found
    return int(found[1]), float(found[2]), found[3], float(found[4])


def judge(daemon: DaemonProcess, what: str, limit_ms: float = LONGEST_MS) -> None:
    pauses, longest_ms, where, cpu_ms = report(daemon)
    print(f"{what}: at most {cpu_ms} ms of CPU time at once; {pauses} pauses, the longest {longest_ms} ms in {where}")
    assert cpu_ms < limit_ms


def test_during_a_pull_of_an_image(
    daemon: DaemonProcess, registry: Registry, docker_engine: docker.DockerClient
) -> None:
    image = registry.publish("bench/big:1", layers=(40_000_000,) * 4)
    try:
        done = nimhost(daemon, "deploy", image, "--name", "big", "--no-wait")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: docker_engine.images.list(image), 120)
        judge(daemon, "pull of 160 MB")
    finally:
        daemon.stop()
        if docker_engine.images.list(image):
            docker_engine.images.remove(image, force=True)


def test_during_a_download_of_weights(daemon: DaemonProcess, hub: FakeHub, fake_engine_image: str) -> None:
    block = os.urandom(1 << 20)
    files = {f"model-{n}.safetensors": bytes([n]) + block * 64 for n in range(4)}
    hub.add("org/model", {"config.json": b'{"model_type": "qwen3"}', "tokenizer.json": b"{}", **files})
    done = nimhost(daemon, "deploy", "org/model", "--image", fake_engine_image, "--name", "one", "--no-wait")
    assert done.returncode == 0, done.stderr
    daemon.wait("one", "READY", 120)
    judge(daemon, "download of 256 MB")


def test_during_the_discovery_of_two_thousand_models(daemon: DaemonProcess, many_models: str) -> None:
    daemon.post(f"{MODELS}/providers", {"name": "ext", "host_url": many_models})

    def found() -> bool:
        return len(daemon.http.get("/v1/models").json()["data"]) == 2000

    wait_until(found, 60)
    judge(daemon, "discovery of 2,000 models")


def test_with_ten_thousand_entities(make_daemon: MakeDaemon, gpu_requests: None) -> None:
    daemon = make_daemon(start=False, NIMHOST_DEBUG="1")
    (daemon.directory / "data").mkdir(mode=0o700)
    asyncio.run(filled(daemon.directory / "data" / "nimhost.db", 10_000))
    daemon.start()
    wait_until(lambda: daemon.http.get("/health/ready").status_code == 200, 20)
    report(daemon)

    def create(numbers: range) -> None:
        with httpx.Client(base_url=daemon.url, trust_env=False, timeout=60) as http:
            for number in numbers:
                http.post(f"{MODELS}/models", json={"name": f"m-{number:05}"}).raise_for_status()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(create, (range(start, 500, 4) for start in range(4))))
    judge(daemon, "creation of 500 models beside 10,000")
    pages: Callable[[str], httpx.Response] = lambda query: daemon.http.get(f"{MODELS}/models?{query}")  # noqa: E731
    for query in (
        "page_size=100",
        "page_size=1000",
        "page_size=1000&page=10",
        "page_size=100&sort=-updated_at",
        "filter[name][$like]=42",
    ):
        assert pages(query).json()["data"]
    judge(daemon, "lists of 10,000 models", LONGEST_LIST_MS)


@pytest.fixture
def many_models() -> Iterator[str]:
    """A provider that serves two thousand models: its URL."""
    with running_provider(*(f"vendor/model-{number:04}" for number in range(2000))) as url:
        yield url

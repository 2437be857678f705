"""Updates on each other's heels, and restarts in between: what people notice of them on a real engine."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import docker
import httpx
import pytest

from tests.e2e.daemon import MODELS, DaemonProcess
from tests.e2e.test_rolls import Clients, settled, update
from tests.support import wait_until

pytestmark = pytest.mark.docker


def test_updates_in_a_row_fail_no_request(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    """Each is two writes, as the command line makes them, while the version before the last one is being removed."""
    daemon.deploy("one", fake_engine_image)
    daemon.wait("one", "READY")
    clients = Clients(daemon)
    with clients.asking():
        for context in ("1024", "2048", "3072", "4096"):
            update(daemon, ["--max-model-len", context])
            time.sleep(0.05)  # the person's command line takes as long
            daemon.http.post(f"{MODELS}/deployments/one", json={"config": "one"}).raise_for_status()
            wait_until(lambda: daemon.deployment("one")["update"] == "rolling", 20)  # type: ignore[index]
            settled_soon(daemon)
    assert set(clients.statuses()) == {200}


def settled_soon(daemon: DaemonProcess) -> None:
    wait_until(lambda: daemon.deployment("one")["update"] is None, 60)  # type: ignore[index]
    settled(daemon)


@pytest.mark.fault(20)
def test_a_model_is_never_unknown_while_its_daemon_is_killed_and_starts_again(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image)
    daemon.wait("one", "READY")
    with asked_by_name(daemon) as statuses:
        for _ in range(4):
            seen = statuses[200]
            daemon.kill()
            daemon.start()
            wait_until(lambda n=seen: statuses[200] > n + 5, 20)
    assert set(statuses) <= {200, 503}, "503: it was asked before the first look"


@contextmanager
def asked_by_name(daemon: DaemonProcess) -> Iterator[Counter[int]]:
    """Somebody who asks for the model again and again, and does not mind that nobody listens."""
    statuses: Counter[int] = Counter()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            body = {"model": "default/fake", "messages": [{"role": "user", "content": "a"}]}
            try:
                statuses[httpx.post(f"{daemon.url}/v1/chat/completions", json=body, trust_env=False).status_code] += 1
            except httpx.TransportError:
                time.sleep(0.01)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: statuses[200] > 5, 20)
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join()

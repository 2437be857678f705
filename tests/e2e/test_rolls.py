"""Updates of running deployments on a real engine, as clients see them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import docker
import httpx
import pytest

from nimhost.deployments.labels import PREFIX
from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess, nimhost
from tests.support import wait_until

pytestmark = pytest.mark.docker
Json = dict[str, Any]
ONE_GPU = '[{ name = "SIM-24G", memory_gib = 24 }]'
QUICK = {"NIMHOST_DEPLOYMENTS__START_LIMIT": "2"}


class Clients:
    """People who ask again and again, some of them for streams."""

    def __init__(self, daemon: DaemonProcess, at_once: int = 4) -> None:
        self.replies: list[tuple[float, int, str]] = []
        """When it was complete (time.monotonic), status, who answered."""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(daemon.url, n % 2 == 0)) for n in range(at_once)]

    @contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: len(self.replies) > 10, 10)
            yield
            seen = len(self.replies)
            wait_until(lambda: len(self.replies) > seen + 10, 10)
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def _ask(self, url: str, stream: bool) -> None:
        body = {"model": "fake", "stream": stream, "messages": [{"role": "user", "content": "a b c d e f g"}]}
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            while not self._over.is_set():
                reply = http.post(f"{GATEWAY}/provider/one/-/v1/chat/completions", json=body)
                whole = reply.status_code != 200 or not stream or reply.text.rstrip().endswith("data: [DONE]")
                status = reply.status_code if whole else -1
                self.replies.append((time.monotonic(), status, reply.headers.get("x-fake-instance", "")))

    def statuses(self) -> Counter[int]:
        return Counter(status for _, status, _ in self.replies)

    def longest_gap_s(self) -> float:
        """The longest time in which nobody was answered well."""
        times = sorted(at for at, status, _ in self.replies if status == 200)
        return max(after - before for before, after in pairwise(times))


def update(daemon: DaemonProcess, args: list[str], **faults: Any) -> None:
    shown = daemon.http.get(f"{MODELS}/deployment-configs/one").json()
    wish = {key: shown[key] for key in ("engine", "model_spec", "executor_config")}
    wish["executor_config"] |= {
        "additional_args": ["--served-model-name", "fake", *args],
        "additional_envs": {"FAKE_FAULTS": json.dumps(faults)},
    }
    daemon.post(f"{MODELS}/deployment-configs/one", wish)


def settled(daemon: DaemonProcess, update: str | None = None, timeout_s: float = 60) -> Json:
    """READY with the new version, or (`failed`) with the old one again."""

    def there() -> Json | None:
        found = daemon.deployment("one")
        assert found is not None
        assert (found["status"], found["update"]) == ("READY", update), found
        return found

    found = wait_until(there, timeout_s)
    assert found is not None
    return found


def holders(daemon: DaemonProcess) -> list[str]:
    """A container that is being removed holds its GPU until it is gone."""
    return [gpu["holder"] for gpu in daemon.http.get("/apis/nimhost/v1/gpus").json()["data"] if gpu["holder"]]


def containers(client: docker.DockerClient, daemon: DaemonProcess, every: bool = False) -> list[Json]:
    found = client.api.containers(all=every, filters={"label": f"{PREFIX}owner={daemon.owner()}"})
    return [{"id": c["Id"], "gpus": c["Labels"][f"{PREFIX}gpus"], "command": c["Command"]} for c in found]


def test_an_update_under_continuous_requests_fails_none_and_leaves_no_gap(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image)
    daemon.wait("one", "READY")
    (old,) = containers(docker_engine, daemon)
    clients = Clients(daemon)
    with clients.asking():
        update(daemon, ["--max-model-len", "1024"], ready_delay_s=1.5)
        shown = daemon.wait_message("one", "Serving the previous version while the new one starts")
        assert (shown["status"], shown["update"], shown["serving"]["config_version"]) == ("READY", "rolling", 1)
        assert nimhost(daemon, "wait", "one").returncode == 0  # for the new one, though it is READY all the time
        assert settled(daemon)["serving"]["config_version"] == 2
        wait_until(lambda: len(containers(docker_engine, daemon, every=True)) == 1, 20)
    print(f"\n{dict(clients.statuses())}, the longest gap was {clients.longest_gap_s() * 1000:.0f} ms")
    assert set(clients.statuses()) == {200}
    assert clients.longest_gap_s() < 1.5
    (new,) = containers(docker_engine, daemon)
    assert {who for _, _, who in clients.replies} == {old["id"][:12], new["id"][:12]}
    history = [entry["status"] for entry in (daemon.deployment("one") or {})["status_history"]]
    assert set(history[history.index("READY") :]) == {"READY"}


def test_where_the_gpus_are_short_requests_end_before_the_engine_is_replaced(
    make_daemon: MakeDaemon, gpu_requests: None, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon = make_daemon(NIMHOST_GPUS__SIMULATED=ONE_GPU)
    daemon.deploy("one", fake_engine_image, additional_envs={"FAKE_FAULTS": json.dumps({"chunk_delay_s": 0.2})})
    daemon.wait("one", "READY")
    body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "a b c d e f g h i j"}]}
    with daemon.http.stream("POST", f"{GATEWAY}/provider/one/-/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        with httpx.Client(base_url=daemon.url, trust_env=False) as other:
            daemon.http, mine = other, daemon.http
            update(daemon, ["--max-model-len", "1024"])
            daemon.wait_message("one", "not GPUs enough for both")
            refused = daemon.chat("one")
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            daemon.http = mine
        assert [line for line in lines if line][-1] == "data: [DONE]"
    began = time.monotonic()
    assert settled(daemon)["serving"]["config_version"] == 2
    print(f"\nserved by the new version {time.monotonic() - began:.1f} s after the last request to the old one")
    assert daemon.chat("one").status_code == 200
    assert len(containers(docker_engine, daemon)) == 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_version_that_crashes_goes_back_to_the_one_before_by_itself(
    make_daemon: MakeDaemon, gpu_requests: None, docker_engine: docker.DockerClient, fake_engine_image: str, gpus: int
) -> None:
    daemon = make_daemon(**QUICK, **({"NIMHOST_GPUS__SIMULATED": ONE_GPU} if gpus == 1 else {}))
    daemon.deploy("one", fake_engine_image)
    daemon.wait("one", "READY")
    clients = Clients(daemon)
    with clients.asking():
        update(daemon, [], crash_exit_code=3, stderr=["ValueError: no such parser"])
        shown = settled(daemon, "failed")
    print(f"\n{dict(clients.statuses())}, the longest gap was {clients.longest_gap_s():.2f} s")
    assert set(clients.statuses()) == ({200} if gpus == 2 else {200, 503})
    assert shown["status_message"].startswith("Serving the previous version: the new one failed.")
    assert "ValueError: no such parser" in shown["status_message"]
    assert shown["serving"]["config_version"] == 1
    waited = nimhost(daemon, "wait", "one")
    assert (waited.returncode, "The update of one failed" in waited.stderr) == (1, True)
    assert "ValueError: no such parser" in nimhost(daemon, "logs", "one").stdout
    assert len(containers(docker_engine, daemon)) == 1
    update(daemon, ["--max-model-len", "1024"])
    settled(daemon)
    wait_until(lambda: len(containers(docker_engine, daemon, every=True)) == 1, 20)


LONG_PAUSE = {"NIMHOST_DEPLOYMENTS__RESTART_BACKOFF_S": "2"}
SLOW_TO_START = {"FAKE_FAULTS": json.dumps({"ready_delay_s": 2})}
STAGES = {
    "beside": (2, {}, {"ready_delay_s": 2}, "Serving the previous version while the new one starts. Container created"),
    "given way": (1, {}, {"ready_delay_s": 2}, "Container created and starting"),
    "in its pause": (1, {}, {"crash_exit_code": 3}, "Trying again at"),
    "going back": (1, SLOW_TO_START, {"crash_exit_code": 3}, "Going back to the previous version"),
    "failed": (2, {}, {"crash_exit_code": 3}, "the new one failed"),
}
"""GPUs, environment of the old version, faults of the new one, what is said meanwhile."""


@pytest.mark.fault(4)
@pytest.mark.fault(6)
@pytest.mark.fault(7)
@pytest.mark.fault(20)
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_in_the_middle_of_a_roll(
    make_daemon: MakeDaemon, gpu_requests: None, docker_engine: docker.DockerClient, fake_engine_image: str, stage: str
) -> None:
    gpus, old, faults, words = STAGES[stage]
    machine = {"NIMHOST_GPUS__SIMULATED": ONE_GPU} if gpus == 1 else {}
    daemon = make_daemon(**QUICK, **machine, **(LONG_PAUSE if stage == "in its pause" else {}))
    daemon.deploy("one", fake_engine_image, additional_envs=old)
    daemon.wait("one", "READY")
    update(daemon, ["--max-model-len", "1024"], **faults)
    daemon.wait_message("one", words)
    daemon.kill()
    daemon.start()
    failing = "crash_exit_code" in faults
    shown = settled(daemon, "failed" if failing else None)
    assert shown["serving"]["config_version"] == (1 if failing else 2)
    wait_until(lambda: len(containers(docker_engine, daemon)) == 1, 20)
    wait_until(lambda: daemon.chat("one").status_code == 200, 10)
    wait_until(lambda: holders(daemon) == ["default/one"], 20)


@pytest.mark.fault(20)
def test_kill_9_while_the_old_version_ends_its_requests(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image, additional_envs={"FAKE_FAULTS": json.dumps({"chunk_delay_s": 2})})
    daemon.wait("one", "READY")
    body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "a b c d e f g h i j"}]}
    with httpx.stream("POST", f"{daemon.url}{GATEWAY}/provider/one/-/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
        update(daemon, ["--max-model-len", "1024"])
        settled(daemon)
        assert len(containers(docker_engine, daemon)) == 2  # the stream goes on
        daemon.kill()
    daemon.start()
    settled(daemon)
    wait_until(lambda: len(containers(docker_engine, daemon, every=True)) == 1, 20)
    wait_until(lambda: daemon.chat("one").status_code == 200, 10)


def test_refresh_rolls_what_is_unchanged(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    deploy = ("deploy", fake_engine_image, "--engine", "generic", "--health-path", "/health", "--name", "one")
    assert nimhost(daemon, *deploy).returncode == 0
    (old,) = containers(docker_engine, daemon)
    assert nimhost(daemon, *deploy).returncode == 0
    assert [c["id"] for c in containers(docker_engine, daemon)] == [old["id"]]
    done = nimhost(daemon, *deploy, "--refresh")
    assert (done.returncode, "one is READY after" in done.stdout) == (0, True), done
    assert "Serving the previous version while the new one starts" in done.stdout
    wait_until(lambda: len(containers(docker_engine, daemon)) == 1, 20)
    assert old["id"] not in {c["id"] for c in containers(docker_engine, daemon)}


CLI_DEPLOY = ("--engine", "generic", "--health-path", "/health", "--name", "one", "--arg", "--served-model-name",
              "--arg", "fake")  # fmt: skip


def test_updates_one_after_the_other_by_the_command_line_fail_no_request(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    assert nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY).returncode == 0
    clients = Clients(daemon)
    with clients.asking():
        for length in ("1024", "2048", "4096", "1024"):
            more = ("--arg", "--max-model-len", "--arg", length, "--update")
            done = nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY, *more)
            assert (done.returncode, "one is READY after" in done.stdout) == (0, True), done
            assert "not GPUs enough" not in done.stdout
    print(f"\n{dict(clients.statuses())}, the longest gap was {clients.longest_gap_s() * 1000:.0f} ms")
    assert set(clients.statuses()) == {200}
    assert len({who for _, _, who in clients.replies}) == 5
    assert "was changed by somebody else" not in daemon.log.read_text()
    shown = daemon.deployment("one") or {}
    assert (shown["entity_version"], shown["config_version"]) == (1, 5)  # one change each


@pytest.mark.fault(22)
def test_an_update_that_failed_is_left_alone_by_the_same_command_and_given_up_by_that_of_before(
    make_daemon: MakeDaemon, gpu_requests: None, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon = make_daemon(**QUICK, NIMHOST_GPUS__SIMULATED=ONE_GPU)
    assert nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY).returncode == 0
    wrong = ("--env", f"FAKE_FAULTS={json.dumps({'crash_exit_code': 3, 'stderr': ['ValueError: no such parser']})}")
    failed = nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY, *wrong, "--update")
    assert (failed.returncode, (failed.stdout + failed.stderr).count("ValueError")) == (1, 1), failed
    assert "The update of one failed, and the previous version serves." in failed.stderr
    (old,) = containers(docker_engine, daemon)
    clients = Clients(daemon)
    with clients.asking():
        again = nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY, *wrong)
        assert (again.returncode, "nimhost start one" in again.stderr) == (1, True), again
        given_up = nimhost(daemon, "deploy", fake_engine_image, *CLI_DEPLOY, "--update")
        assert (given_up.returncode, "one is READY" in given_up.stdout) == (0, True), given_up
    assert set(clients.statuses()) == {200}
    assert [c["id"] for c in containers(docker_engine, daemon)] == [old["id"]]
    assert settled(daemon)["status_message"].startswith("Container is running")

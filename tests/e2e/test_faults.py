"""What is known to go wrong, done to a real daemon on a real engine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container

from nimhost.deployments.labels import PREFIX
from tests.docker.conftest import SecondEngine
from tests.docker.registry import Registry
from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import MODELS, DaemonProcess, containers_of
from tests.images import fake_engine
from tests.support import wait_until

pytestmark = pytest.mark.docker


def identities(client: docker.DockerClient, daemon: DaemonProcess) -> dict[str, tuple[str, str]]:
    """Deployment -> container id and the time it was started: what must not change."""
    return {name: (c["Id"], c["State"]["StartedAt"]) for name, c in containers_of(client, daemon).items()}


@pytest.mark.fault(6)
@pytest.mark.fault(20)
def test_kill_9_while_three_serve_and_one_is_pulled(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str, registry: Registry
) -> None:
    for name in ("aa", "bb"):
        daemon.deploy(name, fake_engine_image, gpu=1)
    daemon.deploy("cc", fake_engine_image, gpu=0)
    for name in ("aa", "bb", "cc"):
        daemon.wait(name, "READY")
    registry.push(docker_engine, fake_engine_image, "slow:1")
    registry.gate.hang()
    daemon.deploy("dd", registry.ref("slow:1"), gpu=0)
    daemon.wait_message("dd", "Pulling container image")
    before = identities(docker_engine, daemon)

    daemon.kill()
    daemon.start()
    started_at = time.monotonic()
    for name in ("aa", "bb", "cc"):
        wait_until(lambda name=name: daemon.chat(name).status_code == 200, 5)
    assert time.monotonic() - started_at < 2
    with daemon.http.stream(
        "POST",
        "/apis/inference-gateway/v2/workspaces/default/provider/aa/-/v1/chat/completions",
        json={"model": "fake", "stream": True, "messages": [{"role": "user", "content": "Hello"}]},
    ) as reply:
        assert [line for line in reply.iter_lines() if line][-1] == "data: [DONE]"
    assert identities(docker_engine, daemon) == before
    for name in ("aa", "bb", "cc"):
        assert _statuses(daemon, name).count("READY") == 1  # adopting is nothing that happens to a deployment
    taken = [gpu["holder"] for gpu in daemon.http.get("/apis/nimhost/v1/gpus").json()["data"]]
    assert sorted(taken) == ["default/aa", "default/bb"]
    registry.gate.heal()
    daemon.wait("dd", "READY", 30)
    docker_engine.images.remove(registry.ref("slow:1"), force=True)


@pytest.mark.fault(20)
@pytest.mark.parametrize("stage", ["Pulling", "Starting", "initializing"])
def test_kill_9_at_a_stage_of_a_deploy(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str, registry: Registry, stage: str
) -> None:
    registry.push(docker_engine, fake_engine_image, "engine:1")
    if stage == "Pulling":
        registry.gate.hang()
    faults = json.dumps({"ready_delay_s": 1.5})
    daemon.deploy("one", registry.ref("engine:1"), gpu=2, additional_envs={"FAKE_FAULTS": faults})
    daemon.wait_message("one", stage)
    daemon.kill()
    registry.gate.heal()
    daemon.start()
    daemon.wait("one", "READY")
    made = docker_engine.containers.list(all=True, filters={"label": f"{PREFIX}owner={daemon.owner()}"})
    assert len(made) == 1
    docker_engine.images.remove(registry.ref("engine:1"), force=True)


@pytest.mark.fault(22)
def test_a_crash_is_healed_and_a_crash_loop_ends_in_an_error_with_its_log(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("healed", fake_engine_image)
    daemon.wait("healed", "READY")
    first = containers_of(docker_engine, daemon)["healed"]["Id"]
    docker_engine.api.kill(first)
    wait_until(lambda: _statuses(daemon, "healed").count("READY") == 2, 20)
    said = [entry["status_message"] for entry in (daemon.deployment("healed") or {})["status_history"]]
    assert [message for message in said if "Container exited with code 137" in message]
    assert containers_of(docker_engine, daemon)["healed"]["Id"] != first

    faults = json.dumps({"crash_exit_code": 3, "stderr": ["ValueError: no such parser"]})
    daemon.deploy("doomed", fake_engine_image, additional_envs={"FAKE_FAULTS": faults})
    ended = daemon.wait("doomed", "ERROR")
    assert "exited with code 3" in ended["status_message"]
    assert "ValueError: no such parser" in ended["status_message"]
    assert daemon.http.post(f"{MODELS}/deployments/doomed/start").status_code == 200
    wait_until(lambda: _statuses(daemon, "doomed").count("ERROR") == 2, 20)  # a person asked: a new chance, that fails
    logs = daemon.http.get(f"{MODELS}/deployments/doomed/logs").text
    assert "ValueError: no such parser" in logs
    # An exited container holds no GPU.
    daemon.deploy("next", fake_engine_image)
    daemon.wait("next", "READY")


@pytest.mark.fault(24)
def test_healthy_is_not_ready_before_the_model_is_listed(
    daemon: DaemonProcess, fake_engine_image: str, tiny_model_dir: Path
) -> None:
    _model(daemon, "tiny", tiny_model_dir)
    _deploy_vllm(daemon, "tiny", fake_engine_image, additional_envs={"FAKE_FAULTS": json.dumps({"hide_models": True})})
    wait_until(lambda: _engine_message(daemon, "tiny") == "/v1/models does not list default/tiny", 30)
    assert (daemon.deployment("tiny") or {})["status"] == "PENDING"


def test_an_engine_that_never_becomes_healthy_ends_in_an_error(
    make_daemon: MakeDaemon, gpu_requests: None, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon = make_daemon(NIMHOST_DEPLOYMENTS__START_TIMEOUT_S="2")
    daemon.deploy("sick", fake_engine_image, additional_envs={"FAKE_FAULTS": json.dumps({"unhealthy": True})})
    ended = daemon.wait("sick", "ERROR")
    assert "not ready 2 s after its start: /health answers 503" in ended["status_message"]
    wait_until(lambda: containers_of(docker_engine, daemon)["sick"]["State"]["Status"] == "exited", 10)


@pytest.mark.fault(2)
def test_an_image_that_does_not_exist_is_an_error_at_once(daemon: DaemonProcess, registry: Registry) -> None:
    daemon.deploy("typo", registry.ref("no/such:1"), gpu=0)
    ended = daemon.wait("typo", "ERROR", 15)
    assert registry.ref("no/such:1") in ended["status_message"]


@pytest.mark.fault(2)
def test_a_busy_registry_is_tried_again(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str, registry: Registry
) -> None:
    registry.push(docker_engine, fake_engine_image, "busy:1")
    registry.gate.refuse("503 Service Unavailable")
    daemon.deploy("busy", registry.ref("busy:1"), gpu=0)
    daemon.wait_message("busy", "Trying again at", 30)
    registry.gate.heal()
    daemon.wait("busy", "READY", 30)
    docker_engine.images.remove(registry.ref("busy:1"), force=True)


@pytest.mark.fault(3)
@pytest.mark.fault(10)
def test_without_a_gpu_runtime_the_error_names_the_fix_and_leaves_nothing(
    make_daemon: MakeDaemon, second_engine: SecondEngine
) -> None:
    with_image(second_engine)
    hidden = second_engine.hook.rename(second_engine.hook.with_suffix(".hidden"))
    second_engine.restart()
    try:
        daemon = make_daemon(DOCKER_HOST=second_engine.docker_host)
        daemon.deploy("one", "nimhost-test/fake-engine:latest")
        ended = daemon.wait("one", "ERROR")
        assert "nvidia-ctk" in ended["status_message"]
        with contextlib.closing(second_engine.client()) as client:
            assert containers_of(client, daemon) == {}
    finally:
        hidden.rename(second_engine.hook)
        second_engine.restart()


@pytest.mark.fault(21)
def test_docker_restarts_under_the_daemon(make_daemon: MakeDaemon, second_engine: SecondEngine) -> None:
    with_image(second_engine)
    daemon = make_daemon(DOCKER_HOST=second_engine.docker_host)
    daemon.deploy("one", "nimhost-test/fake-engine:latest")
    daemon.wait("one", "READY")
    second_engine.stop()
    unknown = daemon.wait("one", "UNKNOWN")
    assert "Docker" in unknown["status_message"]
    refused = daemon.chat("one")
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert daemon.http.get("/health/ready").status_code == 200
    assert daemon.http.get("/status").json()["status"] == "degraded"
    second_engine.start()
    daemon.wait("one", "READY", 30)
    assert daemon.chat("one").status_code == 200


def test_without_docker_it_serves_and_says_what_is_missing(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert daemon.http.get("/health/ready").status_code == 200
    wait_until(lambda: "Without Docker there are only external providers" in daemon.log.read_text(), 5)
    daemon.deploy("one", "image:1", gpu=0)
    unknown = daemon.wait("one", "UNKNOWN")
    assert "Docker" in unknown["status_message"]
    daemon.delete("one")  # nothing was ever started: Docker is not needed to forget it


@pytest.mark.fault(5)
def test_containers_of_others_are_left_alone(
    daemon: DaemonProcess, make_daemon: MakeDaemon, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    """A second nimhost with the very same wish, and a database restored from a copy that does not know a container."""
    daemon.deploy("one", fake_engine_image, gpu=1)
    daemon.wait("one", "READY")
    other = make_daemon()
    other.deploy("one", fake_engine_image, gpu=1)
    other.wait("one", "READY")
    assert containers_of(docker_engine, daemon)["one"]["Id"] != containers_of(docker_engine, other)["one"]["Id"]
    other.delete("one")
    assert daemon.chat("one").status_code == 200

    daemon.stop()
    backup = (daemon.directory / "data" / "nimhost.db").read_bytes()
    daemon.start()
    daemon.deploy("late", fake_engine_image, gpu=0)
    daemon.wait("late", "READY")
    daemon.stop()
    for file in (daemon.directory / "data").glob("nimhost.db*"):
        file.unlink()
    (daemon.directory / "data" / "nimhost.db").write_bytes(backup)
    daemon.start()
    daemon.wait("one", "READY")
    late = containers_of(docker_engine, daemon)["late"]
    assert late["State"]["Status"] == "running"
    wait_until(lambda: daemon.http.get("/status").json()["unowned_containers"] == [late["Id"]], 5)


@pytest.mark.fault(4)
def test_an_orphan_of_ours_is_removed(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image, gpu=0)
    daemon.wait("one", "READY")
    labels = containers_of(docker_engine, daemon)["one"]["Config"]["Labels"]
    stray = {**labels, f"{PREFIX}deployment": "default/stray"}
    orphan: Container = docker_engine.containers.create(fake_engine_image, labels=stray)
    wait_until(lambda: set(containers_of(docker_engine, daemon)) == {"one"}, 20)
    with pytest.raises(docker.errors.NotFound):
        orphan.reload()


@pytest.mark.fault(6)
def test_gpus_of_foreign_containers_are_not_handed_out(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str, run_foreign: Callable[..., Any]
) -> None:
    uuids = [gpu["uuid"] for gpu in daemon.http.get("/apis/nimhost/v1/gpus").json()["data"]]
    foreign = run_foreign(fake_engine_image, uuids)
    daemon.deploy("one", fake_engine_image, gpu=1)
    daemon.wait_message("one", f"held by container {foreign.name}")
    foreign.remove(force=True)
    daemon.wait("one", "READY")


@pytest.mark.fault(27)
def test_an_engine_that_dies_mid_stream_ends_the_stream_with_an_error_event(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    faults = json.dumps({"chunks": 1000, "chunk_delay_s": 0.05})
    daemon.deploy("one", fake_engine_image, gpu=0, additional_envs={"FAKE_FAULTS": faults})
    daemon.wait("one", "READY")
    seen: list[str] = []

    def read_until_it_breaks() -> None:
        url = "/apis/inference-gateway/v2/workspaces/default/provider/one/-/v1/chat/completions"
        body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        with daemon.http.stream("POST", url, json=body) as reply:
            for line in reply.iter_lines():
                seen.append(line)
                if len(seen) == 5:
                    docker_engine.api.kill(containers_of(docker_engine, daemon)["one"]["Id"])

    with pytest.raises(httpx.RemoteProtocolError):  # no proper end: nobody takes it for the whole answer
        read_until_it_breaks()
    last = [line for line in seen if line][-1]
    assert "error" in json.loads(last.removeprefix("data: "))


@pytest.mark.fault(39)
def test_a_second_daemon_on_the_same_directory_names_the_first(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    assert daemon.process is not None
    second = subprocess.run(
        [*daemon.process.args[:4], "--data-dir", str(daemon.directory / "data"), "--port", "0"],  # type: ignore[index]
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert f"pid {daemon.process.pid}" in second.stderr


@pytest.mark.fault(36)
def test_it_does_not_listen_where_others_could_reach_it(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(start=False, NIMHOST_SERVER__HOST="0.0.0.0")
    with pytest.raises(RuntimeError, match="can be reached from other machines"):
        daemon.start()


def test_sigterm_ends_with_0_ends_what_is_followed_and_leaves_engines_running(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image, gpu=0)
    daemon.wait("one", "READY")
    with daemon.http.stream("GET", f"{MODELS}/deployments/one/logs?follow=true") as logs:
        pieces = logs.iter_bytes()
        assert next(pieces)
        assert daemon.stop() == 0
        list(pieces)  # they come to an end, and not to an error
    assert containers_of(docker_engine, daemon)["one"]["State"]["Status"] == "running"


def _statuses(daemon: DaemonProcess, name: str) -> list[str]:
    return [entry["status"] for entry in (daemon.deployment(name) or {})["status_history"]]


def with_image(engine: SecondEngine) -> None:
    with contextlib.closing(engine.client()) as client:
        fake_engine(client)


def _model(daemon: DaemonProcess, name: str, directory: Path) -> None:
    storage = {"type": "local", "path": str(directory)}
    daemon.post("/apis/files/v2/workspaces/default/filesets", {"name": name, "storage": storage}, expect=200)
    daemon.post(f"{MODELS}/models", {"name": name, "fileset": f"default/{name}"})


def _deploy_vllm(daemon: DaemonProcess, name: str, image: str, **executor: Any) -> None:
    repository, _, tag = image.rpartition(":")
    wish = {
        "name": name,
        "engine": "vllm",
        "model_spec": {"model_name": f"default/{name}"},
        "executor_config": {"gpu": 1, "image_name": repository, "image_tag": tag, **executor},
    }
    daemon.post(f"{MODELS}/deployment-configs", wish)
    daemon.post(f"{MODELS}/deployments", {"name": name, "config": name})


def _engine_message(daemon: DaemonProcess, name: str) -> str | None:
    progress = daemon.http.get(f"{MODELS}/deployments/{name}/progress").json()["progress"]
    return progress and progress["engine"] and progress["engine"]["message"]

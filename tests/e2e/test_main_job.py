"""Deploy, chat, delete: on a real engine, over the wire."""

from __future__ import annotations

import json
import time

import docker
import httpx
import pytest

from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess, containers_of
from tests.support import wait_until

pytestmark = pytest.mark.docker


def test_a_deployment_becomes_ready_answers_and_goes(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image)
    ready = daemon.wait("one", "READY")
    assert ready["model_provider_id"] == "default/one"
    assert [entry["status"] for entry in ready["status_history"]][:1] == ["CREATED"]
    assert ready["status_history"][-1]["status"] == "READY"
    assert ready["status_history"][-1]["status_message"] == ready["status_message"]

    reply = daemon.chat("one")
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"]

    daemon.delete("one")
    assert containers_of(docker_engine, daemon) == {}
    assert daemon.http.get(f"{MODELS}/providers/one").status_code == 404
    assert daemon.chat("one").status_code == 404


@pytest.mark.fault(19)
def test_what_docker_is_asked_for(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image, gpu=2)
    daemon.wait("one", "READY")
    made = containers_of(docker_engine, daemon)["one"]
    host = made["HostConfig"]
    gpus = [gpu["uuid"] for gpu in daemon.http.get("/apis/nimhost/v1/gpus").json()["data"]]
    (request,) = host["DeviceRequests"]
    assert request["DeviceIDs"] == gpus
    assert request["Capabilities"] == [["gpu"]]
    assert made["NetworkSettings"]["Ports"]["8000/tcp"][0]["HostIp"] == "127.0.0.1"
    assert host["RestartPolicy"]["Name"] in ("no", "")
    assert host["Init"] is True
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in host["SecurityOpt"][0]
    assert host["ShmSize"] == 16 * 2**30
    assert host["LogConfig"]["Config"]
    labels = made["Config"]["Labels"]
    assert labels["io.nimhost.deployment"] == "default/one"
    assert labels["io.nimhost.gpus"] == ",".join(gpus)
    assert labels["io.nimhost.owner"] == daemon.owner()


@pytest.mark.fault(7)
def test_two_that_want_the_last_gpus_take_turns(daemon: DaemonProcess, fake_engine_image: str) -> None:
    daemon.deploy("first", fake_engine_image, gpu=2)
    daemon.wait("first", "READY")
    daemon.deploy("second", fake_engine_image, gpu=1)
    waiting = daemon.wait_message("second", "held by default/first")
    assert waiting["status"] == "PENDING"
    assert "needs 1, 0 free" in waiting["status_message"]
    refused = daemon.chat("second")
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert "held by default/first" in refused.json()["detail"]
    daemon.delete("first")
    daemon.wait("second", "READY")


def test_a_model_is_reached_by_its_entity_and_over_the_short_route(
    daemon: DaemonProcess, fake_engine_image: str
) -> None:
    """The name that a NIM serves becomes a model entity by the slug rule."""
    repository, _, tag = fake_engine_image.rpartition(":")
    daemon.post(
        f"{MODELS}/deployment-configs",
        {
            "name": "llama",
            "engine": "nim",
            "model_spec": {"model_name": "meta/llama-3.2-1b-instruct"},
            "executor_config": {"gpu": 1, "image_name": repository, "image_tag": tag},
        },
    )
    daemon.post(f"{MODELS}/deployments", {"name": "llama", "config": "llama"})
    daemon.wait("llama", "READY")
    entity = "default/meta-llama-3-2-1b-instruct"
    listed = daemon.http.get(f"{GATEWAY}/openai/-/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [entity]
    message = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    for url, model in (
        (f"{GATEWAY}/openai/-/v1/chat/completions", entity),
        ("/v1/chat/completions", "meta-llama-3-2-1b-instruct"),
        ("/v1/chat/completions", "meta/llama-3.2-1b-instruct"),
        (f"{GATEWAY}/model/meta-llama-3-2-1b-instruct/-/v1/chat/completions", "whatever"),
    ):
        with daemon.http.stream("POST", url, json={**message, "model": model}) as reply:
            lines = [line for line in reply.iter_lines() if line]
        assert reply.status_code == 200, reply.text
        assert lines[-1] == "data: [DONE]"
        assert "delta" in json.loads(lines[0].removeprefix("data: "))["choices"][0]


def test_ready_comes_within_a_second_of_healthy_and_404_within_a_second_of_gone(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    faults = json.dumps({"ready_delay_s": 2})
    daemon.deploy("slow", fake_engine_image, additional_envs={"FAKE_FAULTS": faults})
    daemon.wait("slow", "PENDING")
    port = wait_until(lambda: _port(docker_engine, daemon, "slow"), 10)
    wait_until(lambda: _healthy(daemon, f"http://127.0.0.1:{port}/health"), 10)
    healthy_at = time.monotonic()
    daemon.wait("slow", "READY")
    assert time.monotonic() - healthy_at < 1.5
    daemon.delete("slow")
    assert containers_of(docker_engine, daemon) == {}


def test_a_stopped_deployment_frees_its_gpus_and_starts_again(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("one", fake_engine_image, gpu=2)
    daemon.wait("one", "READY")
    assert daemon.http.post(f"{MODELS}/deployments/one/stop").status_code < 300
    stopped = daemon.wait_message("one", "Stopped. Start it with: nimhost start one")
    assert (stopped["status"], stopped["desired"]) == ("PENDING", "stopped")
    wait_until(lambda: containers_of(docker_engine, daemon) == {}, 10)
    assert daemon.http.post(f"{MODELS}/deployments/one/start").status_code < 300
    daemon.wait("one", "READY")
    assert daemon.chat("one").status_code == 200


def _port(client: docker.DockerClient, daemon: DaemonProcess, name: str) -> str | None:
    made = containers_of(client, daemon).get(name)
    bindings = made and made["NetworkSettings"]["Ports"].get("8000/tcp")
    return bindings[0]["HostPort"] if bindings else None


def _healthy(daemon: DaemonProcess, url: str) -> bool:
    try:
        return daemon.http.get(url).status_code == 200
    except httpx.TransportError:
        return False

"""The test bench itself: images, GPU requests, registry and second engine do what the other tests rely on."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import docker
import httpx
import pytest
from docker.errors import APIError
from docker.models.containers import Container
from docker.types import DeviceRequest

from tests import images
from tests.docker.conftest import SecondEngine, url_of
from tests.docker.registry import Registry
from tests.support import wait_until
from tests.tiny import SENTENCE

pytestmark = pytest.mark.docker

Run = Callable[..., Container]


def healthy(container: Container, timeout_s: float = 30) -> str:
    url = url_of(container)

    def answers() -> bool:
        container.reload()
        assert container.status == "running", container.logs(tail=30).decode()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    wait_until(answers, timeout_s)
    return url


def chat(url: str, model: str, **extra: object) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **extra}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def streamed(url: str, model: str) -> list[str]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        data = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in data[:-1]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def pulled(client: docker.DockerClient, ref: str) -> list[dict[str, object]]:
    """The events of a pull; an `error` in them is raised, as the engine says it."""
    repository, _, tag = ref.rpartition(":")
    events = list(client.api.pull(repository, tag, stream=True, decode=True))
    for event in events:
        if "error" in event:
            raise APIError(event["error"])
    return events


def test_fake_engine_serves_under_names_of_real_images(docker_engine: docker.DockerClient, run: Run) -> None:
    name = "nvcr.io/nim/meta/llama-3.2-1b-instruct:0.0.0-test"
    images.tag_fake_engine(name, client=docker_engine)
    try:
        url = healthy(
            run(name, "/model-store", "--served-model-name", "a", user="1000", read_only=True, cap_drop=["ALL"])
        )
        assert chat(url, "a")
    finally:
        images.untag(name, client=docker_engine)
    assert not docker_engine.images.list(name)


def test_an_image_is_made_once(docker_engine: docker.DockerClient, fake_engine_image: str) -> None:
    before = docker_engine.images.get(fake_engine_image).id
    assert images.fake_engine(docker_engine) == fake_engine_image
    assert docker_engine.images.get(fake_engine_image).id == before


@pytest.mark.usefixtures("gpu_requests")
def test_gpu_request_names_the_gpus_to_the_container(
    docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    request = DeviceRequest(device_ids=["GPU-aaaa", "GPU-bbbb"], capabilities=[["gpu"]])
    program = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])"
    output = docker_engine.containers.run(
        fake_engine_image, ["-c", program], entrypoint="python3", device_requests=[request], remove=True
    )
    assert output.decode().strip() == "GPU-aaaa,GPU-bbbb"


def test_light_engine_answers_behind_the_flags_of_vllm(run: Run, light_engine_image: str, tiny_model_dir: Path) -> None:
    container = run(
        light_engine_image,
        *(
            "/model-store",
            "--served-model-name",
            "tiny",
            "alias",
            "--port",
            "8000",
            "--max-model-len",
            "1024",
            "--enforce-eager",
        ),
        volumes=[f"{tiny_model_dir}:/model-store:ro"],
        user="1000",
        read_only=True,
        cap_drop=["ALL"],
    )
    url = healthy(container)
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert "tiny" in [listed[0]["id"], *listed[0]["aliases"]]
    assert chat(url, "tiny") == SENTENCE
    pieces = streamed(url, "tiny")
    assert "".join(pieces) == SENTENCE
    assert len(pieces) > 10
    container.stop(timeout=10)
    assert container.wait()["StatusCode"] == 0


def test_pull_brings_an_image_that_was_not_here(docker_engine: docker.DockerClient, registry: Registry) -> None:
    ref = registry.publish("library/two-layers:1", layers=(50_000, 60_000), env=("NVIDIA_REQUIRE_CUDA=cuda>=12.8",))
    try:
        pulled(docker_engine, ref)
        image = docker_engine.images.get(ref)
        assert len(image.attrs["RootFS"]["Layers"]) == 2
        assert "NVIDIA_REQUIRE_CUDA=cuda>=12.8" in image.attrs["Config"]["Env"]
    finally:
        images.untag(ref, client=docker_engine)


def test_push_copies_an_image_of_the_engine(
    docker_engine: docker.DockerClient, registry: Registry, fake_engine_image: str
) -> None:
    ref = registry.push(docker_engine, fake_engine_image, "nim/pushed:1")
    try:
        pulled(docker_engine, ref)
        assert docker_engine.images.get(ref).labels[images.LABEL]
    finally:
        images.untag(ref, client=docker_engine)


def test_registry_hangs_and_recovers_as_told(docker_engine: docker.DockerClient, registry: Registry) -> None:
    ref = registry.publish("library/slow:1", layers=(400_000,))
    repository, _, tag = ref.rpartition(":")
    registry.gate.bytes_per_s = 200_000
    events = docker_engine.api.pull(repository, tag, stream=True, decode=True)
    assert any(event["status"] == "Downloading" for event in events)
    registry.gate.hang()
    rest: list[dict[str, str]] = []
    reading = threading.Thread(target=lambda: rest.extend(events))
    reading.start()
    reading.join(0.5)
    hung = reading.is_alive()
    registry.gate.heal()
    reading.join(30)
    images.untag(ref, client=docker_engine)
    assert hung
    assert "Downloaded newer image" in rest[-1]["status"]


def test_registry_refuses_as_told(docker_engine: docker.DockerClient, registry: Registry) -> None:
    ref = registry.publish("library/refused:1")
    registry.gate.refuse("401 Unauthorized", 'WWW-Authenticate: Basic realm="x"')
    with pytest.raises(APIError, match="no basic auth credentials"):
        pulled(docker_engine, ref)


def test_second_engine_comes_back_after_a_kill(second_engine: SecondEngine, docker_engine: docker.DockerClient) -> None:
    with contextlib.closing(second_engine.client()) as client:
        image = images.fake_engine(client)
        container = client.containers.run(
            image, ["--served-model-name", "a"], detach=True, ports={"8000/tcp": ("127.0.0.1", None)}
        )
        healthy(container)
        second_engine.kill()
        second_engine.start()
        container.reload()
        assert container.status == "exited"
        container.start()
        assert chat(healthy(container), "a")
    docker_engine.ping()


def test_second_engine_reports_a_failing_gpu_hook(second_engine: SecondEngine) -> None:
    if not second_engine.hook.exists():
        pytest.skip("this machine has the real NVIDIA hook")
    second_engine.hook.write_text("#!/bin/sh\necho 'nvml error: driver not loaded' >&2\nexit 1\n")
    request = DeviceRequest(device_ids=["GPU-aaaa"], capabilities=[["gpu"]])
    with contextlib.closing(second_engine.client()) as client:
        container = client.containers.create(images.fake_engine(client), device_requests=[request])
        with pytest.raises(APIError, match="driver not loaded"):
            container.start()

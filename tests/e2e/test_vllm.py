"""The last word: a real vLLM, on a CPU, in a container that nimhost started."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import docker
import openai
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import MODELS, DaemonProcess, containers_of, nimhost
from tests.images import VLLM_CPU_ENV

pytestmark = [pytest.mark.docker, pytest.mark.vllm, pytest.mark.timeout(420)]
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager")


@pytest.fixture
def daemon(make_daemon: MakeDaemon, gpu_requests: None, vllm_image: str, tiny_model_dir: Path) -> DaemonProcess:
    """With the tiny model deployed by the CLI, as a user does it."""
    daemon = make_daemon()
    done = nimhost(
        daemon, "deploy", str(tiny_model_dir), "--name", "tiny", "--image", vllm_image,
        *(word for flag in FLAGS for word in ("--arg", flag)),
        *(word for key, value in VLLM_CPU_ENV.items() for word in ("--env", f"{key}={value}")),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + daemon.log.read_text()[-3000:]
    return daemon


def test_a_real_engine_answers_through_every_door(daemon: DaemonProcess, docker_engine: docker.DockerClient) -> None:
    answer = nimhost(daemon, "chat", "tiny", "Hello!", "--max-tokens", "8", "--temperature", "0")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()

    body = {"model": "default/tiny", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
    curl = subprocess.run(
        ["curl", "-s", f"{daemon.url}/v1/chat/completions", "-H", "content-type: application/json",
         "-d", json.dumps({**body, "temperature": 0})],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    reply = json.loads(curl.stdout)
    assert reply["model"] == "default/tiny"
    assert reply["choices"][0]["message"]["content"].strip() == answer.stdout.strip()

    asyncio.run(_through_the_openai_sdk(daemon, body, reply["choices"][0]["message"]["content"]))
    _check_container(daemon, docker_engine)
    listed = nimhost(daemon, "-f", "json", "ps")
    assert "READY" in listed.stdout
    removed = nimhost(daemon, "rm", "tiny")
    assert removed.returncode == 0, removed.stderr
    assert containers_of(docker_engine, daemon) == {}


async def _through_the_openai_sdk(daemon: DaemonProcess, body: dict[str, object], expected: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="not-needed") as client:
        ask = {**body, "temperature": 0}
        whole = await client.chat.completions.create(**ask)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == expected
        async with await client.chat.completions.create(**ask, stream=True) as stream:  # type: ignore[call-overload]
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == expected
        assert [model.id async for model in client.models.list()] == ["default/tiny"]


def _check_container(daemon: DaemonProcess, client: docker.DockerClient) -> None:
    made = containers_of(client, daemon)["tiny"]
    assert made["HostConfig"]["DeviceRequests"][0]["DeviceIDs"][0].startswith("GPU-")
    assert made["NetworkSettings"]["Ports"]["8000/tcp"][0]["HostIp"] == "127.0.0.1"
    (mount,) = made["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/model-store", False)
    assert made["Args"][-len(FLAGS) :] == list(FLAGS)


def test_arguments_that_vllm_refuses_end_at_once_with_its_own_words(
    make_daemon: MakeDaemon, gpu_requests: None, vllm_image: str, tiny_model_dir: Path
) -> None:
    daemon = make_daemon()
    done = nimhost(
        daemon, "deploy", str(tiny_model_dir), "--name", "tiny", "--image", vllm_image, "--arg", "--no-such-flag",
        *(word for key, value in VLLM_CPU_ENV.items() for word in ("--env", f"{key}={value}")),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "does not accept these arguments" in done.stderr
    assert "--no-such-flag" in done.stderr
    assert (daemon.http.get(f"{MODELS}/deployments/tiny").json())["status"] == "ERROR"

"""Adapters on real engines: a real vLLM on a CPU, and the daemon killed in the middle of it all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess, containers_of, nimhost
from tests.images import VLLM_CPU_ENV
from tests.support import wait_until
from tests.tiny import SENTENCE, tiny_lora

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]
FILESETS = "/apis/files/v2/workspaces/default/filesets"
NAME = "default--math"


def serve_base(daemon: DaemonProcess, image: str, model: Path, *args: str, **env: str) -> None:
    """A READY deployment `dd` of a model `base` that takes adapters."""
    storage = {"type": "local", "path": str(model)}
    daemon.post(FILESETS, {"name": "base", "storage": storage}, 200)
    daemon.post(f"{MODELS}/models", {"name": "base", "fileset": "base"})
    repository, _, tag = image.rpartition(":")
    executor = {"gpu": 1, "image_name": repository, "image_tag": tag,
                "additional_args": [*args], "additional_envs": env}  # fmt: skip
    spec = {"model_name": "base", "lora_enabled": True}
    config = {"name": "dd", "engine": "vllm", "model_spec": spec, "executor_config": executor}
    daemon.post(f"{MODELS}/deployment-configs", config)
    daemon.post(f"{MODELS}/deployments", {"name": "dd", "config": "dd"})
    daemon.wait("dd", "READY", 400)


def ask(daemon: DaemonProcess, model: str, url: str = "/v1/chat/completions") -> httpx.Response:
    message = {"role": "user", "content": "Hello!"}
    return daemon.http.post(url, json={"model": model, "messages": [message], "max_tokens": 20, "temperature": 0})


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def timed(call: Callable[[], Any]) -> float:
    began_s = time.monotonic()
    call()
    return time.monotonic() - began_s


@pytest.mark.vllm
@pytest.mark.fault(32)
def test_adapters_of_a_real_vllm(
    make_daemon: MakeDaemon,
    gpu_requests: None,
    docker_engine: docker.DockerClient,
    vllm_image: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    daemon = make_daemon()
    flags = ("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager")
    serve_base(daemon, vllm_image, tiny_model_dir, *flags, **VLLM_CPU_ENV)
    lora = tiny_lora(tmp_path / "lora", base="somebody/else")
    (lora / "adapter_model.safetensors").chmod(0o600)
    daemon.post(FILESETS, {"name": "lora", "storage": {"type": "local", "path": str(lora)}}, 200)

    made = nimhost(
        daemon, "models", "adapters", "create", "base", "math", "--fileset", "lora", "--finetuning-type", "lora"
    )
    assert made.returncode == 0, made.stderr
    assert f"Chat with it: nimhost chat {NAME}" in made.stderr
    assert "default/dd" in nimhost(daemon, "-f", "table", "adapters", "list").stdout
    changed = text(ask(daemon, NAME))
    assert text(ask(daemon, "base")) == SENTENCE != changed
    for url in (f"{GATEWAY}/provider/dd/-/v1/chat/completions", f"{GATEWAY}/openai/-/v1/chat/completions",
                f"{GATEWAY}/model/{NAME}/-/v1/chat/completions"):  # fmt: skip
        assert text(ask(daemon, NAME, url)) == changed
    for word in (NAME, "math", "base--math"):
        said = nimhost(daemon, "chat", word, "Hello!", "--max-tokens", "20", "--temperature", "0")
        assert said.stdout.strip() == changed.strip(), said.stderr

    adapter = f"{MODELS}/adapters/math"
    off_s = timed(lambda: daemon.http.patch(adapter, json={"enabled": False}).raise_for_status())
    for url in ("/v1/chat/completions", f"{GATEWAY}/provider/dd/-/v1/chat/completions"):
        assert ask(daemon, NAME, url).status_code == 404
    on_s = timed(lambda: daemon.http.patch(adapter, json={"enabled": True}).raise_for_status())
    assert text(ask(daemon, NAME)) == changed

    other = tiny_lora(tmp_path / "other", seed=2)
    daemon.post(FILESETS, {"name": "other", "storage": {"type": "local", "path": str(other)}}, 200)
    daemon.http.patch(adapter, json={"fileset": "other"}).raise_for_status()
    another = text(ask(daemon, NAME))
    assert another not in (changed, SENTENCE)

    container = containers_of(docker_engine, daemon)["dd"]["Id"]
    docker_engine.api.kill(container)
    died_s = time.monotonic()

    def back() -> bool:
        reply = ask(daemon, NAME)
        if reply.status_code == 503:
            assert "retry-after" in reply.headers
        return reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == another

    wait_until(back, 400)
    assert containers_of(docker_engine, daemon)["dd"]["Id"] != container
    with capsys.disabled():
        print(f"\nreal vLLM: disabled in {off_s:.2f} s, enabled and loaded in {on_s:.2f} s, "
              f"back {time.monotonic() - died_s:.0f} s after the engine was killed")  # fmt: skip
    assert max(off_s, on_s) < 3, "it was not waited for in vain"
    assert daemon.http.delete(adapter).status_code == 204
    assert ask(daemon, NAME).status_code == 404


@pytest.mark.fault(32)
def test_a_killed_daemon_finds_its_adapters_and_what_it_left(
    make_daemon: MakeDaemon, gpu_requests: None, fake_engine_image: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    daemon = make_daemon()
    serve_base(daemon, fake_engine_image, tiny_model_dir)
    for seed, name in enumerate(("math", "gone"), 1):
        lora = tiny_lora(tmp_path / name, seed=seed)
        daemon.post(FILESETS, {"name": name, "storage": {"type": "local", "path": str(lora)}}, 200)
        body = {"name": name, "model": "base", "fileset": name, "finetuning_type": "lora"}
        assert daemon.post(f"{MODELS}/adapters", body)["loaded_on"] == ["default/dd"]
    url = daemon.http.get(f"{MODELS}/providers/dd").json()["host_url"]
    daemon.kill()
    home = daemon.directory / "data" / "loras" / "default--base"
    (home / ".incoming-0123456789abcdef").mkdir()
    (home / "default--never@0123456789ab").mkdir()
    httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": NAME}).raise_for_status()
    assert ask_engine(url) == ["default--gone"]
    daemon.start()
    wait_until(lambda: sorted(ask_engine(url)) == ["default--gone", NAME], 20)
    wait_until(lambda: len(list(home.iterdir())) == 2, 20)
    wait_until(lambda: NAME in text(ask(daemon, NAME)), 10)


def ask_engine(url: str) -> list[str]:
    return [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"] if m["parent"]]

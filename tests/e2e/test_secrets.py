"""A canary is planted wherever a secret can be, and the whole installation is searched for it."""

from __future__ import annotations

import json
from pathlib import Path

import docker
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess, containers_of, nimhost
from tests.fakes.hub import FakeHub
from tests.support import wait_until

pytestmark = pytest.mark.docker
CANARIES = {name: f"canary-{name}-7d1f2a" for name in ("hub", "provider", "ngc", "unused")}


@pytest.mark.fault(29)
def test_no_secret_is_found_anywhere(
    make_daemon: MakeDaemon,
    gpu_requests: None,
    docker_engine: docker.DockerClient,
    fake_engine_image: str,
    provider: str,
) -> None:
    with FakeHub() as hub:
        hub.add("org/mm", {"config.json": b"{}", "model.safetensors": b"x" * 3_000_000}, gated=True,
                readers=(CANARIES["hub"],))  # fmt: skip
        hub.faults.bytes_per_s = 1_000_000
        daemon = make_daemon(NIMHOST_WEIGHTS__ENDPOINT=hub.url)
        for name, value in CANARIES.items():
            workspace, key = ("system", "ngc-api-key") if name == "ngc" else ("default", name)
            daemon.post(f"/apis/secrets/v2/workspaces/{workspace}/secrets", {"name": key, "value": value})
        daemon.post(f"{MODELS}/providers", {"name": "ext", "host_url": provider, "api_key_secret_name": "provider"})
        deployed = nimhost(daemon, "deploy", "org/mm", "--image", fake_engine_image, "--name", "one", "--no-wait",
                           "--hf-token-secret", "hub")  # fmt: skip
        assert deployed.returncode == 0, deployed.stderr
        wait_until(lambda: hub.sent_bytes() > 100_000, 20)
        assert _leaks(_command_lines()) == set()
        hub.faults.bytes_per_s = None
        daemon.deploy("nim", fake_engine_image, engine="nim")
        daemon.deploy("broken", "127.0.0.1:1/no/such:1", gpu=0)
        daemon.wait("one", "READY", 30)
        daemon.wait("nim", "READY", 30)
        ask = {"model": "default/gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
        wait_until(lambda: daemon.http.post(f"{GATEWAY}/openai/-/v1/chat/completions", json=ask).status_code == 200, 10)
        daemon.wait_message("broken", "Trying again", 30)

        engines = containers_of(docker_engine, daemon)
        assert "NGC_API_KEY=" + CANARIES["ngc"] in engines["nim"]["Config"]["Env"]  # the one documented place
        engines["nim"]["Config"]["Env"].remove("NGC_API_KEY=" + CANARIES["ngc"])
        assert _leaks(json.dumps(engines).encode()) == set()
        assert _leaks(_replies(daemon)) == set()
        daemon.stop()
        for file in daemon.directory.rglob("*"):
            if file.is_file():
                assert _leaks(file.read_bytes()) == set(), file


def test_an_external_provider_answers_without_docker(make_daemon: MakeDaemon, tmp_path: Path, provider: str) -> None:
    daemon = make_daemon(DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    daemon.post(f"{MODELS}/providers", {"name": "openai", "host_url": f"{provider}/v1", "enabled_models": ["gpt-4"]})
    ready = f"{GATEWAY}/provider/openai/ready"
    wait_until(lambda: daemon.http.get(ready).status_code == 200, 10)
    found = wait_until(lambda: _served(daemon, "openai"), 10)
    assert found == [{"model_entity_id": "default/gpt-4", "served_model_name": "gpt-4"}]
    answer = nimhost(daemon, "chat", "gpt-4", "Hello!", "--provider", "openai")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert daemon.http.get("/v1/models").json()["data"][0]["id"] == "default/gpt-4"


def _served(daemon: DaemonProcess, name: str) -> object:
    return daemon.http.get(f"{MODELS}/providers/{name}").json()["served_models"]


def _leaks(found: bytes) -> set[str]:
    return {name for name, value in CANARIES.items() if value.encode() in found}


def _command_lines() -> bytes:
    return b"\0".join(p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists())


def _replies(daemon: DaemonProcess) -> bytes:
    paths = [f"{MODELS}/{kind}" for kind in ("deployments", "providers", "models", "deployment-configs")]
    paths += ["/apis/secrets/v2/workspaces/default/secrets", "/apis/files/v2/workspaces/default/filesets", "/status"]
    paths += [f"{MODELS}/deployments/broken", f"{MODELS}/deployments/nim/logs", f"{MODELS}/providers/ext"]
    return b"".join(daemon.http.get(path).content for path in paths)

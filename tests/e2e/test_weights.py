"""Weights from a hub: once over the wire, shared, and not lost when the daemon is killed in the middle."""

from __future__ import annotations

import os

import docker
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import MODELS, DaemonProcess, containers_of, nimhost
from tests.fakes.hub import FakeHub
from tests.fakes.ngc import KEY, FakeNgc
from tests.support import wait_until

pytestmark = pytest.mark.docker
SIZE = 8_000_000
MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": os.urandom(SIZE),
    "pytorch_model.bin": os.urandom(1000),
}


@pytest.fixture
def daemon(make_daemon: MakeDaemon, gpu_requests: None, hub: FakeHub) -> DaemonProcess:
    return make_daemon(NIMHOST_WEIGHTS__ENDPOINT=hub.url)


def deploy(daemon: DaemonProcess, image: str, model: str, *options: str) -> str:
    done = nimhost(daemon, "deploy", model, "--image", image, "--no-wait", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.fault(18)
@pytest.mark.fault(20)
def test_kill_9_during_a_download_continues_where_it_stopped(
    daemon: DaemonProcess, hub: FakeHub, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    repo = hub.add("org/model", MODEL)
    hub.faults.bytes_per_s = 4_000_000
    deploy(daemon, fake_engine_image, "org/model", "--name", "one")
    wait_until(lambda: hub.sent_bytes("model.safetensors") > SIZE // 3, 20)
    daemon.kill()
    hub.faults.bytes_per_s = None
    daemon.start()
    daemon.wait("one", "READY", 30)
    twice = hub.sent_bytes("model.safetensors") - SIZE
    assert twice < 1_000_000, f"{twice} bytes were fetched twice"
    assert hub.sent_bytes("pytorch_model.bin") == 0  # the same weights once more: not wanted

    made = containers_of(docker_engine, daemon)["one"]
    assert made["Args"][-3:] == [f"/model-store/snapshots/{repo.commit}", "--served-model-name", "default/one"]
    (mount,) = made["Mounts"]
    assert (mount["Source"], mount["RW"]) == (str(daemon.directory / "weights" / "models--org--model"), False)


@pytest.mark.fault(14)
def test_the_second_deployment_moves_no_byte_and_needs_no_hub(
    daemon: DaemonProcess, hub: FakeHub, fake_engine_image: str
) -> None:
    hub.add("org/model", MODEL)
    deploy(daemon, fake_engine_image, "org/model", "--name", "one")
    daemon.wait("one", "READY", 30)
    hub.forget()
    hub.faults.down = True
    deploy(daemon, fake_engine_image, "org/model", "--name", "two")
    daemon.wait("two", "READY", 30)
    assert hub.sent_bytes() == 0


@pytest.mark.fault(2)
def test_a_gated_model_says_what_to_do_and_a_missing_one_that_it_is_missing(
    daemon: DaemonProcess, hub: FakeHub, fake_engine_image: str
) -> None:
    hub.add("org/gated", MODEL, gated=True, readers=("hf_reader",))
    gated = nimhost(daemon, "deploy", "org/gated", "--image", fake_engine_image, "--no-wait")
    assert gated.returncode == 1
    assert "org/gated is gated: it needs a token" in gated.stderr
    assert " secrets create hf-token" in gated.stderr
    missing = nimhost(daemon, "deploy", "org/nowhere", "--image", fake_engine_image, "--no-wait")
    assert missing.returncode == 1
    assert "no repository org/nowhere" in missing.stderr
    assert daemon.http.get(f"{MODELS}/deployments").json()["data"] == []

    daemon.post("/apis/secrets/v2/workspaces/default/secrets", {"name": "hf-token", "value": "hf_reader"})
    deploy(daemon, fake_engine_image, "org/gated", "--name", "allowed", "--hf-token-secret", "hf-token")
    daemon.wait("allowed", "READY", 30)


@pytest.mark.fault(2)
def test_a_gated_model_that_could_not_be_looked_at_says_so_when_it_is_fetched(
    daemon: DaemonProcess, hub: FakeHub, fake_engine_image: str
) -> None:
    hub.add("org/gated", MODEL, gated=True, readers=("hf_reader",))
    hub.faults.busy, hub.faults.busy_where = 1000, "/api/"
    deploy(daemon, fake_engine_image, "org/gated")
    hub.faults.busy = 0
    gated = daemon.wait("org-gated", "ERROR")["status_message"]
    assert "org/gated" in gated
    assert "token_secret" in gated or "--hf-token-secret" in gated


def test_progress_is_told_in_bytes(daemon: DaemonProcess, hub: FakeHub, fake_engine_image: str) -> None:
    hub.add("org/model", MODEL)
    hub.faults.bytes_per_s = 2_000_000
    deploy(daemon, fake_engine_image, "org/model", "--name", "one")

    def weights() -> dict[str, int] | None:
        progress = daemon.http.get(f"{MODELS}/deployments/one/progress").json()["progress"]
        return progress["weights"] if progress and (progress["weights"] or {}).get("done_bytes") else None

    seen = wait_until(weights, 20)
    assert seen is not None
    assert 0 < seen["done_bytes"] < seen["total_bytes"]
    assert seen["total_bytes"] == sum(len(content) for name, content in MODEL.items() if not name.endswith(".bin"))
    hub.faults.bytes_per_s = None
    daemon.wait("one", "READY", 30)


def test_a_deployment_of_ngc_weights_runs_and_keeps_them_from_being_pruned(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/model", "1.0", MODEL)
        daemon.post("/apis/secrets/v2/workspaces/default/secrets", {"name": "ngc-key", "value": KEY})
        storage = {"type": "ngc", "org": "nvidia", "team": "nemo", "target": "model", "target_type": "model",
                   "api_key_secret": "ngc-key", "host": ngc.url}  # fmt: skip
        daemon.post("/apis/files/v2/workspaces/default/filesets", {"name": "one", "storage": storage}, 200)
        daemon.post(f"{MODELS}/models", {"name": "one", "fileset": "default/one"})
        image, _, tag = fake_engine_image.rpartition(":")
        config = {"name": "one", "engine": "vllm", "model_spec": {"model_name": "one"},
                  "executor_config": {"gpu": 1, "image_name": image, "image_tag": tag}}  # fmt: skip
        daemon.post(f"{MODELS}/deployment-configs", config)
        daemon.post(f"{MODELS}/deployments", {"name": "one", "config": "one"})
        daemon.wait("one", "READY", 30)
    made = containers_of(docker_engine, daemon)["one"]
    (mount,) = made["Mounts"]
    folder = daemon.directory / "weights" / ".nimhost" / "ngc" / "ngc-models--nvidia--nemo--model"
    assert (mount["Source"], mount["RW"]) == (str(folder), False)
    assert "/model-store/snapshots/1.0" in made["Args"]
    assert KEY not in str(made)
    listed = nimhost(daemon, "weights", "list")
    assert "ngc://nvidia/nemo/model" in listed.stdout
    assert "default/one, fileset default/one" in listed.stdout
    assert "deployment default/one uses it" in nimhost(daemon, "weights", "prune", "--dry-run").stdout
    assert "There is nothing to remove." in nimhost(daemon, "weights", "prune", "--yes").stdout
    assert folder.is_dir()

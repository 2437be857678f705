"""GPUs on a real engine: shares, starts one after the other, who is in the way, and the plan as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import MODELS, DaemonProcess, containers_of, nimhost
from tests.fakes.hub import FakeHub
from tests.models import public
from tests.models import test_checkpoint as known
from tests.models.weights_dir import make_weights_dir

pytestmark = pytest.mark.docker

UUID = "GPU-only"
HELD = '{ pid = 4242, name = "python", user = "bob", used_gib = 20.0 }'


def one_gpu(**fields: str) -> str:
    more = "".join(f", {name} = {value}" for name, value in fields.items())
    return f'[{{ name = "SIM-24G", memory_gib = 24, uuid = "{UUID}"{more} }}]'


@pytest.fixture
def daemon(make_daemon: MakeDaemon, gpu_requests: None) -> DaemonProcess:
    return make_daemon(NIMHOST_GPUS__SIMULATED=one_gpu())


@pytest.mark.fault(6)
def test_two_deployments_share_a_gpu_and_a_restart_remembers_it(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    daemon.deploy("aa", fake_engine_image, gpu_memory_gib=10)
    daemon.deploy("bb", fake_engine_image, gpu_memory_gib=8)
    for name in ("aa", "bb"):
        daemon.wait(name, "READY")
        assert daemon.chat(name).status_code == 200
    made = containers_of(docker_engine, daemon)
    requests = [made[name]["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] for name in ("aa", "bb")]
    assert requests == [[UUID], [UUID]]
    daemon.deploy("cc", fake_engine_image, gpu_memory_gib=8)
    daemon.wait_message("cc", "default/aa has 10 GiB, default/bb has 8.0 GiB")
    daemon.kill()
    daemon.start()
    daemon.wait_message("cc", "default/aa has 10 GiB, default/bb has 8.0 GiB")
    listed = nimhost(daemon, "gpus")
    assert "default/aa (share of 10.0 GiB)" in listed.stdout
    daemon.delete("aa")
    daemon.wait("cc", "READY")


@pytest.mark.fault(7)
def test_engines_on_one_gpu_start_one_after_the_other(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, fake_engine_image: str
) -> None:
    slow = {"FAKE_FAULTS": json.dumps({"ready_delay_s": 2})}
    daemon.deploy("aa", fake_engine_image, gpu_memory_gib=10, additional_envs=slow)
    daemon.wait_message("aa", "initializing")
    daemon.deploy("bb", fake_engine_image, gpu_memory_gib=10)
    daemon.wait_message("bb", "default/aa is starting on GPU 0, and engines start there one after the other")
    assert set(containers_of(docker_engine, daemon)) == {"aa"}
    daemon.wait("bb", "READY")
    assert (daemon.deployment("aa") or {})["status"] == "READY"


@pytest.mark.fault(8)
def test_a_stranger_on_the_gpu_is_named_to_whoever_waits(
    make_daemon: MakeDaemon, gpu_requests: None, fake_engine_image: str
) -> None:
    daemon = make_daemon(NIMHOST_GPUS__SIMULATED=one_gpu(used_gib="20.0", processes=f"[{HELD}]"))
    daemon.deploy("one", fake_engine_image)
    daemon.wait_message("one", "GPU 0 has 4.0 of 24 GiB free, 22 are needed: python (pid 4242, user bob) holds 20 GiB")
    listed = nimhost(daemon, "gpus")
    assert "python (pid 4242, user bob) 20.0 GiB" in listed.stdout
    shown: list[dict[str, Any]] = json.loads(nimhost(daemon, "gpus", "-f", "json").stdout)
    assert (shown[0]["free_bytes"], shown[0]["processes"][0]["deployment"]) == (4 * 2**30, None)
    daemon.stop()
    daemon.env["NIMHOST_GPUS__SIMULATED"] = one_gpu()
    daemon.start()
    daemon.wait("one", "READY")


def test_plan_and_deploy_say_the_same_and_force_tries_it(
    daemon: DaemonProcess, tmp_path: Path, fake_engine_image: str
) -> None:
    """The directories hold what makes the size: configs and headers."""
    small = make_weights_dir(tmp_path / "qwen3-1.7b", known.QWEN3_1_7B)
    large = make_weights_dir(tmp_path / "qwen3-14b", public.QWEN3_14B)

    fits = nimhost(daemon, "plan", str(small), "--image", fake_engine_image)
    assert fits.returncode == 0, fits.stderr
    assert "weights        3.2 GiB" in fits.stdout
    assert "Longest context that fits: 40960" in fits.stdout
    assert "It fits and would start." in fits.stdout

    refused = nimhost(daemon, "plan", str(large), "--image", fake_engine_image)
    assert refused.returncode == 1
    assert "weights       27.5 GiB" in refused.stdout
    assert "It takes 2 GPUs of 24 GiB" in refused.stdout

    deployed = nimhost(daemon, "deploy", str(large), "--image", fake_engine_image, "--no-wait")
    assert deployed.returncode == 1
    assert "does not fit: weights 27.5" in deployed.stderr
    assert "It takes 2 GPUs of 24 GiB" in deployed.stderr
    for kind in ("deployments", "deployment-configs", "models"):
        assert daemon.http.get(f"{MODELS}/{kind}").json()["data"] == []

    forced = nimhost(daemon, "deploy", str(large), "--image", fake_engine_image, "--no-wait", "--force")
    assert forced.returncode == 0, forced.stderr
    daemon.wait("qwen3-14b", "READY")


def test_a_model_on_the_hub_is_planned_from_its_headers(
    make_daemon: MakeDaemon, gpu_requests: None, tmp_path: Path
) -> None:
    """The files are read as far as the sum needs them: a few thousand bytes of 27.5 GiB."""
    directory = make_weights_dir(tmp_path / "model", public.QWEN3_14B)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files["model.safetensors"] += bytes(1_000_000)
    with FakeHub() as hub:
        hub.add("Qwen/Qwen3-14B", files)
        daemon = make_daemon(
            NIMHOST_GPUS__SIMULATED=one_gpu(),
            NIMHOST_WEIGHTS__ENDPOINT=hub.url,
            NIMHOST_ENGINES__VLLM__IMAGE="127.0.0.1:1/vllm-openai:never-here",
        )
        found = nimhost(daemon, "plan", "Qwen/Qwen3-14B", "-f", "json")
        assert found.returncode == 1, found.stderr
        plan = json.loads(found.stdout)
        assert (plan["verdict"], plan["unknown"], plan["memory"]["exact"]) == ("refused", None, True)
        assert plan["memory"]["weights_bytes"] == pytest.approx(2 * 14.768e9, rel=1e-3)
        assert {place["what"]: place["here"] for place in plan["disk"]} == {"weights": False, "image": False}
        assert hub.sent_bytes("model.safetensors") < 200_000
    assert not (daemon.directory / "weights").exists()

"""What a real registry says about an image, to a real daemon on a real engine, before a byte of it is pulled."""

from __future__ import annotations

import docker
import pytest
from docker.errors import ImageNotFound

from nimhost.host.registry import Registries
from tests.docker.registry import Registry
from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import nimhost
from tests.e2e.test_gpus import one_gpu

pytestmark = pytest.mark.docker


@pytest.mark.fault(11)
def test_a_driver_too_old_for_an_image_of_a_registry_is_found_before_it_is_pulled(
    make_daemon: MakeDaemon, docker_engine: docker.DockerClient, gpu_requests: None, registry: Registry
) -> None:
    ref = registry.publish("nim/new:1", layers=(2_000_000, 3_000_000), env=("NVIDIA_REQUIRE_CUDA=cuda>=99",))
    daemon = make_daemon(NIMHOST_GPUS__SIMULATED=one_gpu(driver='"550.90.07"', cuda='"12.4"'))
    shown = nimhost(daemon, "plan", ref, "--engine", "generic", "--health-path", "/health")
    assert shown.returncode == 1, shown.stderr
    assert "Disk, image: 0.0 GiB (0.0 GiB to download)" in shown.stdout, shown.stdout
    daemon.deploy("one", ref)
    ended = daemon.wait("one", "ERROR")
    said = f"Image {ref} needs CUDA 99 or newer; driver 550.90.07 of this machine has CUDA 12.4."
    assert said in ended["status_message"]
    assert said in shown.stdout
    with pytest.raises(ImageNotFound):
        docker_engine.images.get(ref)


async def test_a_real_registry_says_what_it_has(registry: Registry) -> None:
    ref = registry.publish("nim/known:1", layers=(200_000, 300_000), env=("A=b", "NVIDIA_REQUIRE_CUDA=cuda>=12.8"))
    found = await Registries().ask(ref, "amd64")
    assert found is not None
    assert (found.architecture, found.env) == ("amd64", {"A": "b", "NVIDIA_REQUIRE_CUDA": "cuda>=12.8"})
    assert 500_000 < found.download_bytes < 520_000
    assert await Registries().ask(registry.ref("nim/none:1"), "amd64") is None

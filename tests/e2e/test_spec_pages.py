"""Every bash block of the reference platform's pages "Deploy Models" and "Run Inference", verbatim, by our command."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import docker
import pytest

from tests.e2e.pages import blocks
from tests.e2e.spec_world import EXPECTED, Step, World, judge, run_block, spec_world

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, docker_engine: docker.DockerClient, gpu_requests: None
) -> Iterator[World]:
    with spec_world(tmp_path_factory.mktemp("pages"), docker_engine, "pages") as world:
        world.command("nemo", f'exec {sys.executable} -m nimhost "$@"')
        yield world


def test_every_bash_block_runs_verbatim(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """`nemo` is our command here; what else is not verbatim is in `World.here`."""
    steps: list[Step] = []
    for page in ("deploy-models", "run-inference"):
        for block in blocks(page, "bash"):
            # Only the first command knows the address from the environment: the others have it from that one.
            more = {"NMP_BASE_URL": world.daemon.url} if "config set" in block.text else {}
            steps += run_block(block.heading, world.here(block.text), world.env() | more, world.directory)
    said = judge(steps, EXPECTED)
    with capsys.disabled():
        print(f"\nbash of both pages, by nimhost: {said}")

"""The reference platform's own CLI and SDK, as PyPI has them, through every command and snippet of both pages.

The SDK's snippets run meanwhile, against a daemon of their own: these clients look every three seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import docker
import pytest

from tests.e2e import official_nemo, official_snippets
from tests.e2e.official import official_venv
from tests.e2e.pages import Block, blocks
from tests.e2e.spec_world import ABOVE, EXPECTED, Expected, Step, World, judge, run_block, spec_world
from tests.support import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

AFTER = {
    "Deploy with LoRA Adapters": "Deploy with vLLM",
    "Deployment Cleanup": "Deploy with LoRA Adapters",
    "Custom Parallelism Configuration": "Multi-LLM NIM",
    "Option 2: Set via Deployment Config (Override)": "Option 1: Set via Fileset (Recommended)",
    "Change Tool Calling Config for an Existing Model": "Option 2: Set via Deployment Config (Override)",
}
"""Sections that need what another one made. The others run side by side."""
SECRET = "client.secrets.create(name='anthropic-api-key', {}=os.environ['ANTHROPIC_API_KEY'])"
REPAIRS = {SECRET.format("data"): SECRET.format("value")}
SDK_EXPECTED: Expected = {
    f"Anthropic: {SECRET.format('data')}": ("unexpected keyword argument 'data'", "this SDK has no such argument"),
    "Deploy with LoRA Adapters: client.files.filesets.create(name='qwen3-1-7b'": ABOVE,
    "Deploy with LoRA Adapters: client.models.create(name='qwen3-1-7b'": ABOVE,
}


@pytest.fixture(scope="module")
def venv() -> Path:
    return official_venv()


class Snippets(NamedTuple):
    running: subprocess.Popen[bytes]
    out: Path
    """What each statement came to."""


@pytest.fixture(scope="module")
def sdk(
    tmp_path_factory: pytest.TempPathFactory, docker_engine: docker.DockerClient, gpu_requests: None, venv: Path
) -> Iterator[Snippets]:
    """The snippets of both pages, on their way."""
    with spec_world(tmp_path_factory.mktemp("sdk"), docker_engine, "sdk") as world:
        (world.directory / "my_parser.py").write_text("# a parser\n")
        snippets = [block for page in ("deploy-models", "run-inference") for block in blocks(page, "python")]
        given = {"blocks": [{"heading": b.heading, "text": world.here(b.text)} for b in snippets], "repairs": REPAIRS}
        (world.directory / "given.json").write_text(json.dumps(given))
        with (world.directory / "given.json").open() as stdin, (world.directory / "sdk.out").open("w") as out:
            running = subprocess.Popen(
                [venv / "bin" / "python", official_snippets.__file__], stdin=stdin, stdout=out,
                stderr=subprocess.DEVNULL, cwd=world.directory, env=world.env() | {"NMP_BASE_URL": world.daemon.url},
            )  # fmt: skip
        yield Snippets(running, world.directory / "sdk.out")
        running.kill()
        running.wait(10)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, docker_engine: docker.DockerClient, gpu_requests: None, venv: Path
) -> Iterator[World]:
    with spec_world(tmp_path_factory.mktemp("cli"), docker_engine, "cli") as world:
        socket = world.directory / "nemo.sock"
        program, python = official_nemo.__file__, venv / "bin" / "python"
        running = subprocess.Popen([python, program, "serve", socket], env=world.env(), stderr=subprocess.DEVNULL)
        wait_until(socket.exists, 60)
        world.command("nemo", f'exec {sys.executable} -IS {program} run {socket} "$@"')
        yield world
        running.kill()
        running.wait(10)


def as_accepted(text: str) -> str:
    """The commands in the form that this CLI takes: it wants the name of `create` and `post` in its place."""
    return re.sub(r"( (?:create|post \S+)) \\\n\s*--name (\S+)", r"\1 \2", text)


def chains(found: list[Block]) -> list[list[Block]]:
    """Blocks that have to run one after the other."""
    made: dict[str, list[Block]] = {}
    for block in found:
        first = block.heading
        while first in AFTER:
            first = AFTER[first]
        made.setdefault(first, []).append(block)
    return list(made.values())


def test_the_official_cli_runs_every_command(sdk: Snippets, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def run(chain: list[Block]) -> list[Step]:
        env = world.env()
        return [
            step for b in chain for step in run_block(b.heading, as_accepted(world.here(b.text)), env, world.directory)
        ]

    steps: list[Step] = []
    for page in ("deploy-models", "run-inference"):
        setup, *rest = blocks(page, "bash")
        more = {"NMP_BASE_URL": world.daemon.url}
        steps += run_block(setup.heading, setup.text, world.env() | more, world.directory)
        with ThreadPoolExecutor(4) as pool:
            steps += [step for found in pool.map(run, chains(rest)) for step in found]
    said = judge(steps, EXPECTED)
    with capsys.disabled():
        print(f"\nbash of both pages, by the official CLI: {said}")


def test_the_official_sdk_runs_every_snippet(sdk: Snippets, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdk.running.wait(400) == 0
    said = judge([Step(**json.loads(line)) for line in sdk.out.read_text().splitlines()], SDK_EXPECTED)
    with capsys.disabled():
        print(f"\npython of both pages, by the official SDK: {said}")

"""The README's commands, run in their order on a stand-in for the hub; ELSEWHERE says which ones are not run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.fakes.hub import FakeHub
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
ELSEWHERE = "scripts/"
"""Blocks that begin so are run by CI itself (test), by hand (demo), and by demo and the fixture (install, serve)."""


@pytest.mark.docker
def test_the_three_minutes(make_daemon: MakeDaemon, gpu_requests: None, fake_engine_image: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    with FakeHub() as hub:
        hub.add("Qwen/Qwen3-1.7B", {file.name: file.read_bytes() for file in model.iterdir() if file.suffix != ".gguf"})
        daemon = make_daemon(NIMHOST_WEIGHTS__ENDPOINT=hub.url, NIMHOST_ENGINES__VLLM__IMAGE=fake_engine_image)
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NIMHOST_BASE_URL": daemon.url,
        }
        said = []
        for language, block in BLOCKS:
            code = block.replace("http://127.0.0.1:8080", daemon.url)
            if code.startswith(ELSEWHERE):
                continue
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
            assert done.stdout.strip(), code
            said.append(done.stdout)
    assert "is READY" in said[0]
    assert "READY" in said[0].splitlines()[-1]  # ps
    assert daemon.deployment("qwen-qwen3-1-7b") is None


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`nimhost ([a-z -]+?)(?: [A-Z].*?)?`", README))))
def test_the_commands_it_names_exist(command: str) -> None:
    words = [word for word in command.split() if word != "--help"]
    done = subprocess.run(
        [sys.executable, "-m", "nimhost", *words, "--help"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Usage: " in done.stdout) == (0, True), done.stderr


def test_the_scripts_it_names_exist() -> None:
    for script in re.findall(r"scripts/\w+", README):
        assert os.access(ROOT / script, os.X_OK), script
    for path in re.findall(r"`([a-z_/]+(?:\.py|/))`", README):
        found = [p for p in (ROOT / "nimhost").rglob(path.rstrip("/")) if p.exists()] or list(
            (ROOT / "nimhost").glob(path)
        )
        assert found, path

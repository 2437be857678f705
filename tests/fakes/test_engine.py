"""The FakeEngine as a program: what an image made of it does."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until

PROGRAM = Path(__file__).with_name("engine.py")


@contextmanager
def program(*args: str, faults: dict[str, Any] | None = None, **env: str) -> Iterator[subprocess.Popen[str]]:
    given = {"FAKE_TAG": "t", "FAKE_FAULTS": json.dumps(faults or {}), **env}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *args], env=given, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port_of(process: subprocess.Popen[str]) -> int:
    """The port of `--port 0`, from the line that says that it serves."""
    assert process.stderr
    return next(int(line.rsplit(" ", 1)[1]) for line in process.stderr if "startup complete" in line)


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=5) as reply:
            text = reply.read()
            return reply.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


@pytest.mark.parametrize(
    ("args", "env", "names"),
    [
        (("serve", "/m", "--served-model-name", "a", "b", "--dtype", "auto"), {}, ["a", "b"]),
        (("--model", "/m"), {"NIM_SERVED_MODEL_NAME": "x,y"}, ["x", "y"]),
        ((), {"NIM_MODEL_NAME": "nim"}, ["nim"]),
        (("org/model",), {}, ["org/model"]),
    ],
)
def test_served_names_come_from_arguments_or_environment(
    args: tuple[str, ...], env: dict[str, Any], names: list[str]
) -> None:
    with program(*args, "--port", "0", **env) as process:
        _, models = ask(port_of(process), "/v1/models")
    assert [model["id"] for model in models["data"]] == names


def test_crash_at_start_has_its_code_and_its_last_words() -> None:
    with program(faults={"crash_exit_code": 3, "stderr": ["CUDA out of memory"]}) as process:
        assert process.stderr
        assert "CUDA out of memory\n" in process.stderr.readlines()
        assert process.wait(5) == 3


def test_unknown_fault_is_not_ignored() -> None:
    with program(faults={"no_such": 1}) as process:
        assert process.wait(5) == 2


def test_engine_that_exits_while_it_serves() -> None:
    with program("m", "--port", "0", faults={"exit_after_requests": 2, "exit_code": 0}) as process:
        port = port_of(process)
        assert ask(port, "/health") == (200, None)
        with pytest.raises(OSError):
            ask(port, "/health")
        assert process.wait(5) == 0


def test_faults_are_switched_at_run_time() -> None:
    with program("m", "--port", "0", faults={"unhealthy": True}) as process:
        port = port_of(process)
        assert ask(port, "/health")[0] == 503
        assert ask(port, "/_fake/faults", {"ready_delay_s": 0})[0] == 200
        assert ask(port, "/v1/health/ready")[0] == 200
        assert ask(port, "/_fake/faults", {"no_such": 1})[0] == 400


def test_adapters_as_vllm_has_them(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    args = ("m", "--port", "0", "--enable-lora")
    with program(*args, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as process:
        port = port_of(process)
        load = {"lora_name": "ws--x", "lora_path": str(tmp_path)}
        answers = [adapter_status(port, "load", load), adapter_status(port, "load", load),
                   adapter_status(port, "load", {**load, "load_inplace": True}),
                   adapter_status(port, "load", {"lora_name": "y", "lora_path": "/nowhere"})]  # fmt: skip
        assert answers == [200, 400, 200, 404]
        assert [model["id"] for model in ask(port, "/v1/models")[1]["data"]] == ["m", "ws--x"]
        assert [adapter_status(port, "unload", load) for _ in range(2)] == [200, 404]
    with program(*args) as process:
        assert adapter_status(port_of(process), "load", load) == 404


def test_adapters_that_vllm_refuses(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 32}')
    load = {"lora_name": "ws--x", "lora_path": str(tmp_path)}
    for rank, status in (("16", 500), ("32", 200)):
        args = ("m", "--port", "0", "--enable-lora", "--max-lora-rank", rank)
        with program(*args, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as process:
            port = port_of(process)
            assert adapter_status(port, "load", load) == status
            assert adapter_status(port, "load", {**load, "lora_name": "m"}) == 400


def test_an_adapter_whose_files_are_gone_takes_the_engine_along(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with program("m", "--port", "0", "--enable-lora", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as process:
        port = port_of(process)
        assert adapter_status(port, "load", {"lora_name": "ws--x", "lora_path": str(tmp_path)}) == 200
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(OSError):
            ask(port, "/v1/completions", {"model": "ws--x", "prompt": "Hello!"})
        assert process.wait(5) == 0


def test_adapters_as_a_nim_finds_them(tmp_path: Path) -> None:
    """It lists them like models, and looks anew after its interval only."""
    (tmp_path / "ws--x").mkdir()
    (tmp_path / "ws--x" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for interval, names in (("60", ["m", "ws--x"]), ("0", ["m"])):
        with program("m", "--port", "0", NIM_PEFT_SOURCE=str(tmp_path), NIM_PEFT_REFRESH_INTERVAL=interval) as process:
            port = port_of(process)
            listed = ask(port, "/v1/models")[1]["data"]
            assert [(model["id"], model["parent"]) for model in listed] == [("m", None), ("ws--x", None)]
            (tmp_path / "ws--x" / "adapter_config.json").rename(tmp_path / "kept")
            assert [model["id"] for model in ask(port, "/v1/models")[1]["data"]] == names
            (tmp_path / "kept").rename(tmp_path / "ws--x" / "adapter_config.json")


def adapter_status(port: int, verb: str, body: dict[str, Any]) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{verb}_lora_adapter", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_engine_stops_at_once_when_told() -> None:
    with program("m", "--port", "0") as process:
        port_of(process)
        process.terminate()
        wait_until(lambda: process.poll() is not None, timeout_s=2)
        assert process.returncode == 0

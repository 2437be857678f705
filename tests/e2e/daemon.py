"""A real daemon in a process of its own, to talk to, to kill and to start again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import docker
import httpx

from nimhost.deployments.labels import PREFIX
from tests.support import wait_until

Json = dict[str, Any]
TWO_GPUS = "[{}]".format(
    ", ".join(f'{{ name = "SIM-24G", memory_gib = 24, uuid = "GPU-test-{os.getpid()}-{i}" }}' for i in range(2))
)
"""Their uuids are this test run's own: another one on the same engine holds others."""


class DaemonProcess:
    """`nimhost serve` on a data directory; the port stays the same over restarts."""

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.directory = directory
        self.env = {
            "NIMHOST_SERVER__PORT": "0",
            "NIMHOST_GPUS__SIMULATED": TWO_GPUS,
            "NIMHOST_WEIGHTS__CACHE_DIR": str(directory / "weights"),
            "NIMHOST_DEPLOYMENTS__RESTART_BACKOFF_S": "0.2",
            "NIMHOST_DOCKER__STOP_TIMEOUT_S": "3",
            "HTTPS_PROXY": "http://127.0.0.1:9",  # no registry outside is asked about an image
            **env,
        }
        self.log = directory / "daemon.log"
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(timeout=30, trust_env=False)

    def start(self) -> None:
        """Returns when it listens."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIMHOST_", "NMP_"))}
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nimhost", "serve", "--data-dir", str(self.directory / "data")],
                stdout=log,
                stderr=log,
                env={**inherited, **self.env},
                cwd=self.directory,
            )

        def listening() -> re.Match[str] | None:
            assert self.process is not None
            text = self.log.read_text()[before:]
            if self.process.poll() is not None:
                raise RuntimeError(text)
            return re.search(r"listens on http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)", text)

        found = wait_until(listening, 20)
        assert found is not None
        self.url = f"http://127.0.0.1:{found[1]}"
        self.env["NIMHOST_SERVER__PORT"] = found[1]
        self.http.base_url = httpx.URL(self.url)

    def kill(self) -> None:
        """As `kill -9`: no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """As `kill`: its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.http.close()

    def owner(self) -> str:
        with sqlite3.connect(self.directory / "data" / "nimhost.db") as db:
            (owner,) = db.execute("SELECT value FROM meta WHERE key = 'owner'").fetchone()
        db.close()
        return str(owner)

    # --- what a user does

    def post(self, path: str, body: Json, expect: int = 201) -> Json:
        reply = self.http.post(path, json=body)
        assert reply.status_code == expect, reply.text
        found: Json = reply.json()
        return found

    def deploy(self, name: str, image: str, *, gpu: int = 1, engine: str = "generic", **executor: Any) -> None:
        """A deployment of an image that needs no weights and serves a model called `fake`."""
        repository, _, tag = image.rpartition(":")
        config = {
            "name": name,
            "engine": engine,
            "model_spec": {},
            "executor_config": {
                "gpu": gpu, "image_name": repository, "image_tag": tag, "health_check_path": "/health",
                "additional_args": ["--served-model-name", "fake"], **executor,
            },
        }  # fmt: skip
        self.post(f"{MODELS}/deployment-configs", config)
        self.post(f"{MODELS}/deployments", {"name": name, "config": name})

    def deployment(self, name: str) -> Json | None:
        """None once it is gone."""
        reply = self.http.get(f"{MODELS}/deployments/{name}")
        if reply.status_code == 404:
            return None
        assert reply.status_code == 200, reply.text
        found: Json = reply.json()
        return found

    def wait(self, name: str, status: str, timeout_s: float = 20) -> Json:
        """The deployment once it has that status. Fails at once when it ends in ERROR instead."""
        last: Json = {}

        def there() -> bool:
            nonlocal last
            last = self.deployment(name) or {}
            ended = last.get("status") == "ERROR" and status != "ERROR"
            if ended:
                raise RuntimeError(f"{name}: {last['status_message']}")
            return last.get("status") == status

        try:
            wait_until(there, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{name}: {json.dumps(last, indent=1)}\n{self.log.read_text()[-3000:]}") from error
        return last

    def wait_message(self, name: str, part: str, timeout_s: float = 20) -> Json:
        def there() -> Json | None:
            found = self.deployment(name)
            assert found is not None
            return found if part in found["status_message"] else None

        try:
            found = wait_until(there, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{part!r} never came: {self.deployment(name)}") from error
        assert found is not None
        return found

    def delete(self, name: str, timeout_s: float = 20) -> None:
        assert self.http.delete(f"{MODELS}/deployments/{name}").status_code == 202
        wait_until(lambda: self.deployment(name) is None, timeout_s)

    def chat(self, name: str, content: str = "Hello!", **body: Any) -> httpx.Response:
        """Through the provider route of a deployment."""
        message = {"model": "fake", "messages": [{"role": "user", "content": content}], **body}
        return self.http.post(f"{GATEWAY}/provider/{name}/-/v1/chat/completions", json=message)


MODELS = "/apis/models/v2/workspaces/default"
GATEWAY = "/apis/inference-gateway/v2/workspaces/default"


def containers_of(client: docker.DockerClient, daemon: DaemonProcess) -> dict[str, Any]:
    """Deployment name -> `docker inspect`, of the containers that this daemon made."""
    wanted = {"label": f"{PREFIX}owner={daemon.owner()}"}
    found = {}
    for container in client.api.containers(all=True, filters=wanted):
        with contextlib.suppress(docker.errors.NotFound):  # gone since it was listed
            inspected = client.api.inspect_container(container["Id"])
            found[inspected["Config"]["Labels"][f"{PREFIX}deployment"].partition("/")[2]] = inspected
    return found


def nimhost(daemon: DaemonProcess, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command, as in a script: neither stdin nor stdout is a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "nimhost", *args], env={**os.environ, "NIMHOST_BASE_URL": daemon.url}, input=stdin,
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip

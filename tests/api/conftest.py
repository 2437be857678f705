"""The API in process: a real store, vault and file storage, a host that tells what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from nimhost.api.access import TokenTable
from nimhost.api.app import control_plane, entry
from nimhost.api.parts import CheckDeployment, Parts
from nimhost.config import Settings
from nimhost.entities import Entity
from nimhost.host.files import FileStorage
from nimhost.host.hub_files import HubFiles
from nimhost.host.vault import Vault
from nimhost.store import Store
from nimhost.store.tokens import stored_tokens
from nimhost.tokens import parse_entries
from tests.contract.described import as_described

Json = dict[str, Any]
BASE_URL = "http://127.0.0.1:8080"
MODELS = "/apis/models/v2/workspaces/default"
SECRETS = "/apis/secrets/v2/workspaces/default/secrets"
FILESETS = "/apis/files/v2/workspaces/default/filesets"
WORKSPACES = "/apis/entities/v2/workspaces"


class FakeHost:
    """A HostView: `steps` is the progress of every deployment, `lines` its log."""

    def __init__(self) -> None:
        self.steps: Json | None = None
        self.lines: list[bytes] = []
        self.log_error: Exception | None = None
        self.asked: list[tuple[str, int | None, bool]] = []
        self.log_closed = False
        self._moved = asyncio.Event()

    def summary(self) -> Json:
        return {"status": "degraded", "services": {"ready": ["api"], "not_ready": [{"name": "docker", "message": "x"}]}}

    def readings(self) -> Json:
        gpu = {"index": 0, "uuid": "GPU-1", "name": "SIM", "memory_bytes": 24 << 30, "used_bytes": 1 << 30}
        return {"deployments": {"READY": 2}, "gpus": [gpu]}

    async def gpus(self) -> list[Json]:
        return [{"index": 0, "uuid": "GPU-1", "name": "SIM"}]

    async def logs(self, deployment: Entity, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
        self.asked.append((deployment.ref, tail, follow))
        if self.log_error:
            raise self.log_error
        try:
            for line in self.lines:
                yield line
            if follow:
                await asyncio.Event().wait()
        finally:
            self.log_closed = True

    def progress(self, deployment: Entity) -> Json | None:
        return self.steps

    async def wait_progress(self) -> None:
        await self._moved.wait()

    def tell(self, steps: Json | None) -> None:
        self.steps = steps
        self._moved.set()
        self._moved = asyncio.Event()


class World:
    """The app, and what is behind it."""

    def __init__(self, parts: Parts, client: httpx.AsyncClient, host: FakeHost) -> None:
        self.parts = parts
        self.store = parts.store
        self.client = client
        self.host = host

    async def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        if body is not None:
            more["json"] = body
        return await self.client.request(method, path, **more)

    async def make(self, path: str, **body: Any) -> Json:
        """Creates something; it has to work."""
        reply = await self("POST", path, body)
        assert reply.status_code in (200, 201), reply.text
        return reply.json()

    async def make_config(self, name: str = "cfg", **more: Any) -> Json:
        body = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}} | more
        return await self.make(f"{MODELS}/deployment-configs", name=name, **body)


async def gateway(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(f"gateway {scope['path']}")(scope, receive, send)


@asynccontextmanager
async def open_world(
    directory: Path,
    settings: Settings | None = None,
    check: CheckDeployment | None = None,
    vault: Vault | None = None,
    hub: HubFiles | None = None,
) -> AsyncIterator[World]:
    settings = settings or Settings()
    store = await Store.open(directory / "nimhost.db")
    files = FileStorage(directory / "filesets")
    await files.open()
    host = FakeHost()
    parts = Parts(
        store=store,
        vault=vault or Vault.load(directory / "key"),
        files=files,
        settings=settings,
        host=host,
        check_deployment=check,
        hub=hub,
        tokens=TokenTable(parse_entries(settings.server.api_tokens), await stored_tokens(store)),
    )
    transport = httpx.ASGITransport(entry(control_plane(parts), gateway, settings, parts.tokens))
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url=BASE_URL, event_hooks={"response": [as_described]}
        ) as client:
            yield World(parts, client, host)
    finally:
        files.close()
        await store.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        yield opened

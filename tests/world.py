"""A whole daemon in this process, on a Docker in memory whose containers are fake engines that really listen.

async with World(tmp_path) as world:
    await world.deploy("one")
    await world.wait("one", "READY")
    await world.restart()          # as a new process would start: from the database and what still runs
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from nimhost.config import Deployments, Settings, SimulatedGpu
from nimhost.config import Gpus as GpuSettings
from nimhost.config import Weights as WeightsSettings
from nimhost.daemon import Daemon
from nimhost.host.gpus import SimulatedGpus
from nimhost.host.registry import Registries
from nimhost.host.vault import Vault
from nimhost.store import Store
from tests.fakes.containers import FakeContainer, FakeContainers
from tests.fakes.engine import FakeEngine, Faults
from tests.support import eventually

IMAGE = "fake-engine:1"
MODELS = "/apis/models/v2/workspaces/default"
Json = dict[str, Any]


class World:
    """`docker`, `gpus` and `faults` are for tests to change; `http` speaks to the API."""

    def __init__(self, directory: Path, gpus: int = 2, **settings: Any) -> None:
        simulated = [SimulatedGpu(name="SIM", memory_gib=24) for _ in range(gpus)]
        self.settings = msgspec.structs.replace(
            Settings(
                gpus=GpuSettings(simulated=simulated),
                deployments=Deployments(restart_backoff_s=0.05),
                weights=WeightsSettings(cache_dir=str(directory / "weights"), offline=True),
            ),
            **settings,
        )
        self.directory = directory
        self.docker = FakeContainers(images=[IMAGE])
        self.docker.on_start, self.docker.on_stop = self._start_engine, self._stop_engine
        self.gpus = SimulatedGpus(simulated)
        self.registries: Registries | None = None
        """Who is asked about images that are to be pulled; None: nobody, and nothing is known about them."""
        self.faults = Faults()
        """Of every engine that starts from now on."""
        self.engines: dict[str, FakeEngine] = {}
        self.daemon: Daemon
        self.http: httpx.AsyncClient
        self._store: Store
        self._running: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        for engine in self.engines.values():
            await engine.stop()

    async def start(self) -> None:
        self._store = await Store.open(self.directory / "nimhost.db")
        vault = Vault.load(self.directory / "key")
        self.daemon = Daemon(
            self.settings, self.directory, self._store, vault, self.docker, self.gpus, registries=self.registries
        )
        app: Any = self.daemon.app()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8080")
        await self.daemon.router.recall()
        self._running = asyncio.create_task(self.daemon.run())
        await asyncio.wait_for(self.daemon.first_look.wait(), 5)

    async def stop(self) -> None:
        """The daemon ends; engines keep running."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.http.aclose()
        await self.daemon.close()
        await self._store.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def _start_engine(self, container: FakeContainer) -> int:
        def crash(code: int) -> None:
            self.docker.exit(container.id, code, log="\n".join(engine.faults.stderr))

        engine = FakeEngine(served=("fake",), tag=container.id, faults=self.faults, exit=crash)
        await engine.start()
        self.engines[container.id] = engine
        return engine.port

    async def _stop_engine(self, container: FakeContainer) -> None:
        if engine := self.engines.pop(container.id, None):
            await engine.stop()

    # --- what a user does

    async def deploy(self, name: str, image: str = IMAGE, gpu: int = 1, **executor: Any) -> None:
        repository, _, tag = image.rpartition(":")
        config = {
            "name": name,
            "engine": "generic",
            "model_spec": {},
            "executor_config": {
                "gpu": gpu, "image_name": repository, "image_tag": tag, "health_check_path": "/health", **executor,
            },
        }  # fmt: skip
        await self.post(f"{MODELS}/deployment-configs", config)
        await self.post(f"{MODELS}/deployments", {"name": name, "config": name})

    async def post(self, path: str, body: Json) -> Json:
        reply = await self.http.post(path, json=body)
        assert reply.status_code == 201, reply.text
        found: Json = reply.json()
        return found

    async def deployment(self, name: str) -> Json | None:
        reply = await self.http.get(f"{MODELS}/deployments/{name}")
        if reply.status_code == 404:
            return None
        found: Json = reply.json()
        return found

    async def wait(self, name: str, status: str, message: str = "", timeout_s: float = 10) -> Json:
        """The deployment once it has that status, and `message` in its message."""
        last: Json = {}

        async def there() -> bool:
            nonlocal last
            last = await self.deployment(name) or {}
            return last.get("status") == status and message in last["status_message"]

        try:
            await eventually(there, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{name} is not {status} {message!r}: {last}") from error
        return last

    async def delete(self, name: str) -> None:
        assert (await self.http.delete(f"{MODELS}/deployments/{name}")).status_code == 202

    async def gone(self, name: str) -> None:
        async def away() -> bool:
            return await self.deployment(name) is None

        await eventually(away, 10)

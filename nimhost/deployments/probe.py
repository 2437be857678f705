"""Probing engines: often while they load, seldom once they serve. Tells the reconciler only what changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import httpx
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.observed import Health
from nimhost.engines.spec import Probe

FIRST_INTERVAL_S = 0.25
LOADING_INTERVAL_S = 1.0
STEADY_INTERVAL_S = 5.0
FAILURES_TO_TELL = 3
TIMEOUT_S = 5.0


class Target(Struct, frozen=True, kw_only=True):
    """An engine to probe. `was_ready`: it served before this daemon started."""

    url: str
    probe: Probe
    was_ready: bool = False


class _ModelList(Struct):
    class Item(Struct):
        id: str

    data: list[Item]


class Prober:
    """One task per running engine; `health` answers from memory. `on_change` is called on the loop when it changed."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._tasks: dict[str, tuple[Target, asyncio.Task[None]]] = {}
        self._health: dict[str, Health] = {}
        self._client: httpx.AsyncClient | None = None

    def watch(self, targets: Mapping[str, Target]) -> None:
        """Probe exactly these engines from now on, by container id. A changed address starts afresh."""
        for key, (target, task) in list(self._tasks.items()):
            wanted = targets.get(key)
            if wanted is None or wanted.url != target.url or wanted.probe != target.probe:
                task.cancel()
                del self._tasks[key]
                self._health.pop(key, None)
        for key, target in targets.items():
            if key not in self._tasks:
                self._tasks[key] = (target, asyncio.create_task(self._follow(key, target), name=f"probe {target.url}"))

    def health(self, key: str) -> Health:
        return self._health.get(key, Health())

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self.watch({})
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _follow(self, key: str, target: Target) -> None:
        health = Health()
        failures = 0
        interval_s = FIRST_INTERVAL_S
        while True:
            found = await self._look(target, health.models if health.state == "ok" else None)
            failures = 0 if found.state == "ok" else failures + 1
            proven = health.state in ("ok", "failing") or (target.was_ready and health.state == "unknown")
            if found.state != "ok" and proven:
                if failures >= FAILURES_TO_TELL:
                    since = health.since if health.state == "failing" else time.time()
                    health = self._tell(key, replace(found, state="failing", since=since))
            else:
                health = self._tell(key, found)
            await asyncio.sleep(interval_s)
            interval_s = STEADY_INTERVAL_S if found.state == "ok" else min(LOADING_INTERVAL_S, interval_s * 1.5)

    def _tell(self, key: str, health: Health) -> Health:
        before = self._health.get(key)
        self._health[key] = health
        if before != health:
            self._on_change()
        return health

    async def _look(self, target: Target, models: tuple[str, ...] | None) -> Health:
        """One probe: the health path, then the model list unless it is known."""
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
        try:
            reply = await self._client.get(f"{target.url}/{target.probe.health_path.lstrip('/')}")
            if reply.status_code != 200:
                return Health(state="starting", detail=f"{target.probe.health_path} answers {reply.status_code}")
            if models is not None:
                return Health(state="ok", models=models)
            listing = await self._client.get(target.url + target.probe.models_path)
        except httpx.InvalidURL as error:
            return Health(state="starting", detail=f"{target.probe.health_path} is not a path: {error}")
        except httpx.HTTPError:
            return Health(state="starting", detail="no answer yet")
        models = _model_ids(listing)
        missing = [name for name in target.probe.served_names if name not in models]
        if missing:
            return Health(state="starting", detail=f"{target.probe.models_path} does not list {missing[0]}")
        return Health(state="ok", models=models)


def _model_ids(reply: httpx.Response) -> tuple[str, ...]:
    """The ids of an OpenAI model list; none for anything else (classifiers have no such list)."""
    if reply.status_code != 200:
        return ()
    try:
        return tuple(item.id for item in msgspec.json.decode(reply.content, type=_ModelList).data)
    except msgspec.MsgspecError:
        return ()

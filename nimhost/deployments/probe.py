"""Probing engines: often while they load, seldom once they serve. Tells the reconciler only what changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.model_list import read_model_list
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


def engine_client(timeout_s: float) -> httpx.AsyncClient:
    """To engines of ours, on loopback and without TLS: no certificates are read, which would hold up the loop."""
    return httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=False)


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

    async def relist(self, key: str) -> Health | None:
        """Ask an engine anew what it serves: something has been loaded or unloaded. None: it does not tell."""
        target = self._tasks[key][0] if key in self._tasks else None
        if target is None or self.health(key).state != "ok":
            return None
        try:
            listing = await self._get(target.url + target.probe.models_path)
        except (httpx.HTTPError, TimeoutError):
            return None  # the next probe says more
        if listing.status_code != 200 or key not in self._tasks or self.health(key).state != "ok":
            return None
        return self._tell(key, replace(self.health(key), **_served(listing)))

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
            found = await self._look(target, health if health.state == "ok" else None)
            if found is health:
                found = health = self.health(key)  # what it serves may have been asked anew meanwhile
            elif found.state == "ok":
                found = replace(found, since=time.time())
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

    async def _get(self, url: str) -> httpx.Response:
        """Raises TimeoutError for a reply that has no end, too."""
        if self._client is None:
            self._client = engine_client(TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            return await self._client.get(url)

    async def _look(self, target: Target, known: Health | None) -> Health:
        """One probe: the health path, then the model list unless it is known. `known` itself, if it is still so."""
        try:
            reply = await self._get(f"{target.url}/{target.probe.health_path.lstrip('/')}")
            if reply.status_code != 200:
                return Health(state="starting", detail=f"{target.probe.health_path} answers {reply.status_code}")
            if known is not None:
                return known
            listing = await self._get(target.url + target.probe.models_path)
        except httpx.InvalidURL as error:
            return Health(state="starting", detail=f"{target.probe.health_path} is not a path: {error}")
        except (httpx.HTTPError, TimeoutError) as error:
            return Health(state="starting", detail=_silence(error))
        served = _served(listing)
        missing = [name for name in target.probe.served_names if name not in served["models"]]
        if missing:
            return Health(state="starting", detail=f"{target.probe.models_path} does not list {missing[0]}")
        if target.probe.serves_any and listing.status_code == 200 and read_model_list(listing.content) == []:
            return Health(state="starting", detail=f"{target.probe.models_path} lists no model")
        return Health(state="ok", **served)


NOBODY_THERE = ("connection refused", "connection closed without an answer")
"""Details of a Health: nobody listens. Docker takes connections for a port on which nothing does, and closes them."""


def _silence(error: httpx.HTTPError | TimeoutError) -> str:
    """Why there was no answer."""
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    refused, closed = NOBODY_THERE
    return refused if isinstance(error, httpx.ConnectError) else closed


def _served(reply: httpx.Response) -> dict[str, Any]:
    """`models` and `adapters` of a Health, from an OpenAI model list; none for anything else (classifiers have no such
    list). vLLM lists adapters as models with a `parent`; their `root` is where they were loaded from."""
    items = (read_model_list(reply.content) if reply.status_code == 200 else None) or []
    return {
        "models": tuple(item.id for item in items if not item.parent),
        "adapters": tuple((item.id, str(item.root or "")) for item in items if item.parent),
    }

"""vLLM's endpoints for adapters, on the loopback port: https://docs.vllm.ai/en/stable/features/lora/.

Nobody else reaches them: the gateway lets no control path through. The filesystem resolver is never used: it serves
whatever a client names, and un-serves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import httpx
import msgspec
from msgspec import Struct

from nimhost.deployments.adapters import Engine, Load, Unload, loaded_in
from nimhost.deployments.probe import Prober, engine_client
from nimhost.engines.spec import ADAPTERS_DIR
from nimhost.entities import Json
from nimhost.errors import BadRequest, NimhostError, UpstreamError

log = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""Large adapters of large models take seconds."""
NOT_ENABLED = "This engine was started without adapters. Start it anew: nimhost deploy MODEL --name {name} --refresh"


class _Error(Struct, frozen=True):
    class Inner(Struct, frozen=True):
        message: str = ""

    error: Inner = Inner()


class AdapterCalls:
    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self._client: httpx.AsyncClient | None = None
        self._refusals: dict[tuple[str, str, str], str] = {}
        """Container, adapter, directory -> why that engine refused it."""
        self._unlisted: set[str] = set()
        """Containers that were told something, and have not told since what they have loaded."""

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def refusal(self, engine: Engine, step: Load) -> str | None:
        """Why it is of no use to ask the engine for that again."""
        return self._refusals.get((engine.container, step.name, step.directory))

    def forget_refusals(self) -> None:
        """What kept engines from loading something may be mended."""
        self._refusals.clear()

    def is_unlisted(self, engine: Engine) -> bool:
        """It has to be asked what it has loaded: what is known may be old."""
        return engine.container in self._unlisted

    def forget_others(self, containers: Collection[object]) -> None:
        self._unlisted.intersection_update(containers)

    async def carry_out(self, engine: Engine, steps: Iterable[Load | Unload]) -> bool:
        """Tells the engine, then asks it what it has. False: something is not so, also where the engine says it is."""
        steps = tuple(steps)
        self._unlisted.add(engine.container)
        for step in steps:
            await self._tell(engine, step)
        health = await self._prober.relist(engine.container)
        if health is None:
            return False
        self._unlisted.discard(engine.container)
        loaded = loaded_in(health)
        return all(
            step.name not in loaded
            if isinstance(step, Unload)
            else loaded.get(step.name) == step.directory or self.refusal(engine, step) is not None
            for step in steps
        )

    async def _tell(self, engine: Engine, step: Load | Unload) -> None:
        try:
            if isinstance(step, Load):
                await self.load(engine, step)
            else:
                await self.unload(engine, step.name)
        except NimhostError as error:
            log.warning("%s: adapter %s: %s", engine.deployment, step.name, error.message)
            if error.final and isinstance(step, Load):
                self._refusals[engine.container, step.name, step.directory] = error.message

    async def load(self, engine: Engine, step: Load) -> None:
        """Without a gap where another version is loaded and the engine can replace it in place.

        Raises BadRequest with what the engine says, UpstreamError where it does not answer.
        """
        body: Json = {"lora_name": step.name, "lora_path": f"{ADAPTERS_DIR}/{step.directory}"}
        reply = await self._post(engine, "load", body | ({"load_inplace": True} if step.in_place else {}))
        if step.in_place and _is_loaded(reply):  # an older vLLM
            await self.unload(engine, step.name)
            reply = await self._post(engine, "load", body)
        if not (reply.is_success or _is_loaded(reply)):
            raise BadRequest(_said(engine, reply))

    async def unload(self, engine: Engine, name: str) -> None:
        """What is not loaded is no error. Raises as `load` does."""
        reply = await self._post(engine, "unload", {"lora_name": name})
        if not (reply.is_success or reply.status_code == 404):
            raise BadRequest(_said(engine, reply))

    async def _post(self, engine: Engine, verb: str, body: Json) -> httpx.Response:
        if self._client is None:
            self._client = engine_client(TIMEOUT_S)
        try:
            reply = await self._client.post(f"{engine.url}/v1/{verb}_lora_adapter", json=body)
        except httpx.HTTPError as error:
            raise UpstreamError(f"It does not answer: {str(error) or type(error).__name__}.") from error
        if reply.status_code in (502, 503, 504):
            raise UpstreamError(f"It answers {reply.status_code}.")
        return reply


def _is_loaded(reply: httpx.Response) -> bool:
    """Refused because one of that name is there."""
    return not reply.is_success and "already" in reply.text


def _said(engine: Engine, reply: httpx.Response) -> str:
    try:
        message = msgspec.json.decode(reply.content, type=_Error).error.message
    except msgspec.MsgspecError:
        message = reply.text
    if reply.status_code == 404 and not message:
        return NOT_ENABLED.format(name=engine.deployment.name)
    return f"The engine refused it (HTTP {reply.status_code}): {message[:500]}"

"""vLLM's endpoints for adapters, on the loopback port: https://docs.vllm.ai/en/stable/features/lora/.

Nobody else reaches them: the gateway lets no control path through. The filesystem resolver is never used: it serves
whatever a client names, and un-serves nothing.
"""

from __future__ import annotations

import httpx
import msgspec
from msgspec import Struct

from nimhost.deployments.adapters import Engine, Load
from nimhost.deployments.probe import engine_client
from nimhost.engines.spec import ADAPTERS_DIR
from nimhost.entities import Json
from nimhost.errors import BadRequest, UpstreamError

TIMEOUT_S = 120.0
"""Large adapters of large models take seconds."""
NOT_ENABLED = "This engine was started without adapters. Start it anew: nimhost deploy MODEL --name {name} --refresh"


class _Error(Struct, frozen=True):
    class Inner(Struct, frozen=True):
        message: str = ""

    error: Inner = Inner()


class AdapterCalls:
    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def load(self, engine: Engine, step: Load) -> None:
        """Without a gap where another version is loaded and the engine can replace it in place.

        Raises BadRequest with what the engine says, UpstreamError where it does not answer.
        """
        body: Json = {"lora_name": step.name, "lora_path": f"{ADAPTERS_DIR}/{step.directory}"}
        said = await self._post(engine, "load", body | ({"load_inplace": True} if step.in_place else {}))
        if said and step.in_place and "already" in said:  # an older vLLM
            await self.unload(engine, step.name)
            said = await self._post(engine, "load", body)
        if said and "already" not in said:
            raise BadRequest(said)

    async def unload(self, engine: Engine, name: str) -> None:
        """What is not loaded is no error. Raises UpstreamError where it does not answer."""
        await self._post(engine, "unload", {"lora_name": name})

    async def _post(self, engine: Engine, verb: str, body: Json) -> str | None:
        """What the engine refuses it with; None when it is done."""
        if self._client is None:
            self._client = engine_client(TIMEOUT_S)
        try:
            reply = await self._client.post(f"{engine.url}/v1/{verb}_lora_adapter", json=body)
        except httpx.HTTPError as error:
            raise UpstreamError(f"It does not answer: {str(error) or type(error).__name__}.") from error
        if reply.status_code in (502, 503, 504):
            raise UpstreamError(f"It answers {reply.status_code}.")
        return None if reply.is_success else _said(engine, reply)


def _said(engine: Engine, reply: httpx.Response) -> str:
    try:
        message = msgspec.json.decode(reply.content, type=_Error).error.message
    except msgspec.MsgspecError:
        message = reply.text
    if reply.status_code == 404 and not message:
        return NOT_ENABLED.format(name=engine.deployment.name)
    return f"The engine refused it (HTTP {reply.status_code}): {message[:500]}"

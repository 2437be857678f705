"""What deployments and providers have beside plain CRUD: logs, stop, start, progress, statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from msgspec import Struct
from msgspec.structs import fields as struct_fields
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nimhost.api.decode import read_fields, read_struct
from nimhost.api.http import EndlessReply, JsonReply, event, query_flag, query_int, read_json
from nimhost.api.parts import Parts
from nimhost.api.references import owner_of
from nimhost.api.resource import get_entity, show_entity
from nimhost.api.show import update_of
from nimhost.entities import Entity, ServedModel, Status, Text255, Text1000
from nimhost.errors import Conflict, InvalidRequest, NotFound
from nimhost.kinds import KINDS
from nimhost.store import Store, Transaction, now

Json = dict[str, Any]
FIRST_BYTE_WAIT_S = 1.0
"""How long an error may take to become the reply, before a stream is begun anyway."""
HEARTBEAT_S = 15.0
Work = Coroutine[Any, Any, object]


def routes(parts: Parts) -> list[Route]:
    more = Inference(parts)
    deployment = f"{KINDS['deployments'].path('{workspace}')}/{{name}}"
    provider = f"{KINDS['providers'].path('{workspace}')}/{{name}}"
    return [
        Route(f"{deployment}/logs", more.logs, methods=["GET"]),
        Route(f"{deployment}/progress", more.progress, methods=["GET"]),
        Route(f"{deployment}/models", more.models, methods=["GET"]),
        Route(f"{deployment}/stop", more.stop, methods=["POST"]),
        Route(f"{deployment}/start", more.start, methods=["POST"]),
        Route(f"{provider}/status", more.set_provider_status, methods=["PUT"]),
        Route(f"{deployment}/status", more.set_deployment_status, methods=["POST"]),
    ]


class Inference:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def logs(self, request: Request) -> Response:
        deployment = await self._named(request, "deployments")
        tail = query_int(request, "tail", -1, low=0) if "tail" in request.query_params else None
        follow = query_flag(request, "follow")
        lines = self._parts.host.logs(deployment, tail, follow)
        return await stream_reply(lines, "text/plain; charset=utf-8", endless=follow)

    async def progress(self, request: Request) -> Response:
        """A snapshot, or with `follow=true` (or `Accept: text/event-stream`) one event now and one at every change."""
        deployment = await self._named(request, "deployments")
        if query_flag(request, "follow") or "text/event-stream" in request.headers.get("accept", ""):
            headers = {"cache-control": "no-store"}
            return EndlessReply(self._follow(deployment), headers=headers, media_type="text/event-stream")
        return JsonReply(await self._snapshot(deployment))

    async def models(self, request: Request) -> Response:
        deployment = await self._named(request, "deployments")
        provider = await self._parts.store.find("providers", deployment.workspace, deployment.name)
        served = provider.status.served_models if provider else []
        return JsonReply({"workspace": deployment.workspace, "name": deployment.name, "models": served})

    async def stop(self, request: Request) -> Response:
        return await self._desire(request, "stopped")

    async def start(self, request: Request) -> Response:
        return await self._desire(request, "running")

    async def set_provider_status(self, request: Request) -> Response:
        raw = await read_json(request)
        wanted = {key: value for key, value in raw.items() if value is not None}
        changes = read_fields(struct_fields(_StatusFields), wanted, partial=True)
        if "status" in changes:
            changes.setdefault("status_message", "")
        async with self._parts.store.transaction() as tx:
            provider = await self._named(request, "providers", tx)
            if changes.get("model_deployment_id", provider.ref) != provider.ref and await owner_of(provider, tx):
                raise Conflict(
                    f"Provider '{provider.ref}' belongs to the deployment of that name.",
                    hint="For a provider of its own: nimhost inference providers create NAME --host-url URL",
                )
            if "model_deployment_id" in changes:
                wish = replace(provider.wish, model_deployment_id=changes.pop("model_deployment_id"))
                provider = await tx.update_wish(provider, wish)
            if "served_models" in changes:
                changes["served_models"] = [_served(model, provider) for model in changes["served_models"]]
            if changes:
                provider = await tx.set_status(provider, replace(provider.status, **changes))
        self._parts.store.wake()
        return JsonReply(await show_entity(provider, self._parts))

    async def set_deployment_status(self, request: Request) -> Response:
        """What a client found out; what the daemon finds out next is written over it."""
        query = request.query_params
        version = query_int(request, "version", 1, low=1) if "version" in query else None
        found = read_struct(_DeploymentStatusBody, await read_json(request))
        async with self._parts.store.transaction() as tx:
            deployment = await self._named(request, "deployments", tx)
            if version is not None and not await tx.has_version(deployment, version):
                raise NotFound(f"Deployment '{deployment.ref}' has no version {version}")
            if deployment.status.status == "DELETING" and found.status != "DELETED":
                raise Conflict(f"Deployment '{deployment.ref}' is being deleted.")
            status = deployment.status.moved(found.status, found.status_message, now())
            if found.model_provider_id is not None:
                status = replace(status, model_provider_id=found.model_provider_id)
            deployment = await tx.set_status(deployment, status)
        self._parts.store.wake()
        return JsonReply(await show_entity(deployment, self._parts))

    async def _desire(self, request: Request, desired: str) -> Response:
        async with self._parts.store.transaction() as tx:
            deployment = await self._named(request, "deployments", tx)
            if deployment.wish.deleting:
                raise Conflict(f"Deployment '{deployment.ref}' is being deleted.")
            if deployment.wish.desired != desired or deployment.status.run.failed:
                deployment = await tx.update_wish(deployment, replace(deployment.wish, desired=desired))
                status = replace(deployment.status, run=deployment.status.run.forgiven())
                said = "Starting again." if desired == "running" else "Stopping."
                deployment = await tx.set_status(deployment, status.moved("PENDING", said, now()))
        return JsonReply(await show_entity(deployment, self._parts))

    async def _named(self, request: Request, kind: str, db: Store | Transaction | None = None) -> Entity:
        where = request.path_params
        return await get_entity(db or self._parts.store, kind, where["workspace"], where["name"])

    async def _snapshot(self, deployment: Entity) -> Json:
        config = (deployment.workspace, deployment.wish.config)
        latest = await self._parts.store.current_versions("deployment-configs", [config])
        return {
            "status": deployment.status.status,
            "status_message": deployment.status.status_message,
            "desired": deployment.wish.desired,
            "update": update_of(deployment, deployment.wish.config_version or latest.get(config)),
            "progress": self._parts.host.progress(deployment),
        }

    async def _follow(self, deployment: Entity) -> AsyncIterator[bytes]:
        """Server-sent events until the client leaves or the deployment is gone (a last one says DELETED)."""
        store, last = self._parts.store, None
        while True:
            # The waits begin before the look: a change in between is not missed.
            async with cancelling(store.wait_change(store.revision), self._parts.host.wait_progress()) as waits:
                found = await store.find("deployments", deployment.workspace, deployment.name)
                if found is None or found.id != deployment.id:
                    yield event(_GONE)
                    return
                now = await self._snapshot(found)
                if now != last:
                    yield event(now)
                    last = now
                done, _ = await asyncio.wait(waits, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if not done:
                    yield b": nothing new\n\n"


@asynccontextmanager
async def cancelling(*works: Work) -> AsyncIterator[list[asyncio.Task[object]]]:
    """Runs them meanwhile, and ends what is still running at the end."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _DeploymentStatusBody(Struct):
    status: Status
    status_message: Text1000 = ""
    model_provider_id: Text255 | None = None


class _StatusFields(Struct):
    """The body of a provider's status update; each may be left out. A status without a message has none."""

    model_deployment_id: Text255
    served_models: list[ServedModel]
    status: Status
    status_message: Text1000


def _served(model: ServedModel, provider: Entity) -> ServedModel:
    """With a model entity that has a workspace: by default that of the provider."""
    workspace, slash, name = model.model_entity_id.partition("/")
    if not workspace or (slash and not name):
        raise InvalidRequest.field("Input should be workspace/name", "served_models", input=model.model_entity_id)
    return model if slash else ServedModel(f"{provider.workspace}/{workspace}", model.served_model_name)


_GONE = {"status": "DELETED", "status_message": "", "desired": "stopped", "update": None, "progress": None}


async def stream_reply(chunks: AsyncIterator[bytes], media_type: str, *, endless: bool = True) -> Response:
    """`chunks` as a reply. What goes wrong before the first of them is raised, so that it becomes an error reply.

    `endless`: as in EndlessReply; also for what tells itself when it is whole.
    """
    first = asyncio.ensure_future(anext(chunks, None))
    try:
        await asyncio.wait({first}, timeout=FIRST_BYTE_WAIT_S)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    reply = BegunReply(first, chunks, media_type)
    reply.endless = endless
    return reply


class BegunReply(EndlessReply):
    """Streams the rest of an iterator whose first item is under way, and ends both, whatever happens."""

    def __init__(self, first: asyncio.Future[bytes | None], chunks: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(self._chunks(), media_type=media_type)
        self._first = first
        self._rest = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._first.cancel()
            await asyncio.wait({self._first})
            if isinstance(self._rest, AsyncGenerator):
                await self._rest.aclose()

    async def _chunks(self) -> AsyncIterator[bytes]:
        chunk = await self._first
        if chunk is not None:
            yield chunk
            async for chunk in self._rest:
                yield chunk

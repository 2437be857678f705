"""The ASGI entry: who may ask at all, then the gateway's paths to the gateway and the rest to the control plane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nimhost.api import files, inference, metrics, openapi, plan, platform, requests, resources, weights
from nimhost.api import tokens as api_tokens
from nimhost.api.access import (
    ASKER,
    Asker,
    Guard,
    Picked,
    TokenTable,
    check_right,
    cors_headers,
    find_asker,
    is_loopback,
    needed_right,
    pick,
    preflight_headers,
    read_head,
)
from nimhost.api.http import answering_errors, check_json, error_reply
from nimhost.api.not_served import answer_not_found
from nimhost.api.parts import Parts
from nimhost.api.resource import Endpoint
from nimhost.config import Settings
from nimhost.errors import NimhostError, Unauthorized
from nimhost.gateway.caller import Caller
from nimhost.gateway.cycle import DIRECT
from nimhost.gateway.paths import is_gateway_path
from nimhost.tokens import Token

log = logging.getLogger(__name__)
ADMITTED_LIMIT = 512
OnRefused = Callable[[Caller], None]


def control_plane(parts: Parts) -> ASGIApp:
    """Everything but traffic to models."""
    routes = join_methods(control_routes(parts))
    return answering_errors(Router(routes, redirect_slashes=False, default=answer_not_found))


def join_methods(routes: Iterable[Route]) -> list[Route]:
    """One route for each path: of a method that it has not, the reply can say which it has."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for route in routes:
        by_path.setdefault(route.path, {}).update(dict.fromkeys(route.methods or (), route.endpoint))
    return [
        Route(path, _by_method(endpoints, json_only=not path.endswith("{path:path}")), methods=list(endpoints))
        for path, endpoints in by_path.items()
    ]


def _by_method(endpoints: Mapping[str, Endpoint], json_only: bool) -> Endpoint:
    """`json_only`: everywhere but where files are uploaded. A web page cannot send JSON without asking first."""

    async def answer(request: Request) -> Response:
        if json_only and request.method not in ("GET", "HEAD"):
            check_json(request)
        return await endpoints[request.method](request)

    return answer


def control_routes(parts: Parts) -> list[Route]:
    return [
        *platform.routes(parts),
        *openapi.routes(),
        *metrics.routes(parts),
        *requests.routes(parts),
        *api_tokens.routes(parts),
        *files.routes(parts),
        *weights.routes(parts),
        *inference.routes(parts),
        *plan.routes(parts),
        *resources.routes(parts),
    ]


def entry(
    control: ASGIApp,
    gateway: ASGIApp,
    settings: Settings,
    tokens: TokenTable | None = None,
    *,
    loopback: bool | None = None,
    on_refused: OnRefused = lambda caller: None,
) -> ASGIApp:
    """The app that listens. Whoever may not ask reaches neither of the two.

    `loopback`: only this machine reaches the address; None: as the setting says. `on_refused` is told whoever wanted to
    ask a model and may not.
    """
    if loopback is None:
        loopback = is_loopback(settings.server.host)
    gate = Gate(settings, TokenTable() if tokens is None else tokens, loopback, on_refused)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            to_gateway, picked = is_gateway_path(scope["path"]), pick(scope["headers"])
            if to_gateway and (asker := gate.admitted.get(picked)) and asker.token is None:
                ASKER.set(asker)
                await gateway(scope, receive, send)
            else:
                await gate.pass_on(gateway if to_gateway else control, picked, to_gateway, scope, receive, send)

    return app


class Gate:
    """Does what `access` decides."""

    def __init__(self, settings: Settings, tokens: TokenTable, loopback: bool, on_refused: OnRefused) -> None:
        server = settings.server
        self._guard = Guard(server.host, server.allowed_hosts, server.allowed_origins)
        self._loopback = loopback
        self._tokens, self._on_refused = tokens, on_refused
        self._asking: dict[str, set[asyncio.Task[object]]] = {}
        """By the hash of the token."""
        self.admitted: dict[Picked, Asker] = {}
        """To the gateway, from no web page: a client sends the same few headers again and again."""
        tokens.on_revoked = self._cut

    async def pass_on(
        self, app: ASGIApp, picked: Picked, to_gateway: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if to_gateway and (asker := self.admitted.get(picked)):
            await self._run(app, asker, to_gateway, scope, receive, send)
        else:
            await self._decide(app, picked, to_gateway, scope, receive, send)

    async def _decide(
        self, app: ASGIApp, picked: Picked, to_gateway: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        method, path = scope["method"], scope["path"]
        try:
            head = read_head(picked)
            if origin := self._guard.check(head, method, to_gateway):
                if method == "OPTIONS" and b"access-control-request-method" in head:
                    await _answer_preflight(preflight_headers(head, origin), send)
                    return
                send, scope = _sharing(send, cors_headers(origin)), {**scope, "extensions": {}}
            asker = find_asker(head, path, self._tokens, loopback=self._loopback)
            check_right(asker, needed_right(method, path, to_gateway))
        except NimhostError as error:
            log.warning("refused %s %r: %s", method, path, error)
            if refused := await _refuse(error, to_gateway, scope, receive, send):
                self._on_refused(refused)
            return
        if to_gateway and origin is None:
            if len(self.admitted) >= ADMITTED_LIMIT:
                self.admitted.clear()
            self.admitted[picked] = asker
        await self._run(app, asker, to_gateway, scope, receive, send)

    async def _run(
        self, app: ASGIApp, asker: Asker, to_gateway: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        ASKER.set(asker)
        if asker.token is None:
            await app(scope, receive, send)
        else:
            await self._until_revoked(asker.token, app, to_gateway, scope, receive, send)

    async def _until_revoked(
        self, token: Token, app: ASGIApp, to_gateway: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """A reply that is under way when its token is revoked ends there."""
        begun, task = False, asyncio.current_task()
        direct = scope.get("extensions", {}).get(DIRECT)
        assert task

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        asking = self._asking.setdefault(token.sha256, set())
        asking.add(task)
        try:
            await app(scope, receive, sending)
        except asyncio.CancelledError:
            if token in self._tokens or begun or (direct and direct.begun):
                raise
            task.uncancel()
            await _refuse(_revoked(), to_gateway, scope, receive, send)
        finally:
            asking.discard(task)
            if not asking:
                self._asking.pop(token.sha256, None)

    def _cut(self, token: Token) -> None:
        self.admitted.clear()
        for task in self._asking.pop(token.sha256, ()):
            if task is not asyncio.current_task():  # who revokes its own token is told that it worked
                task.cancel(_revoked())


def _revoked() -> Unauthorized:
    return Unauthorized("This API token has been revoked.")


async def _refuse(error: NimhostError, to_gateway: bool, scope: Scope, receive: Receive, send: Send) -> Caller | None:
    """Returns whom, if it was on its way to the gateway."""
    if not to_gateway:
        await error_reply(error)(scope, receive, send)
        return None
    caller = Caller(scope, receive, send, 0)
    await caller.fail(error)
    return caller


async def _answer_preflight(headers: list[tuple[bytes, bytes]], send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body"})


def _sharing(send: Send, headers: list[tuple[bytes, bytes]]) -> Send:
    """`send`, with replies that a page of another origin may read. What an engine says of that is not its to say."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if not pair[0].startswith(b"access-control-")]
            message = {**message, "headers": kept + headers}
        await send(message)

    return sending


async def _lifespan(receive: Receive, send: Send) -> None:
    """The daemon opens and closes everything itself."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

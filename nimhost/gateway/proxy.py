"""The data plane: a plain ASGI application that carries one request to one upstream and its reply back, byte for byte.

Nothing in a reply is parsed. When the client leaves, the upstream's connection is closed, so that the GPU stops. Before
the first byte of the reply every failure is a typed error of ours; after it the stream ends as broken as it is. Nothing
is sent twice.
"""

from __future__ import annotations

from nimhost.config import Gateway as GatewaySettings
from nimhost.errors import NimhostError, NotFound, NotReady, ProviderRefused
from nimhost.gateway.bodies import merge_if_object, peek_model, rewrite
from nimhost.gateway.caller import Caller, ClientLeft, Receive, Scope, Send, Upload
from nimhost.gateway.exchange import Exchange
from nimhost.gateway.headers import find, reply_headers, request_headers
from nimhost.gateway.paths import Place, is_gateway_path, parse_place
from nimhost.gateway.replies import MethodNotAllowed, model_card, model_list, ready_note
from nimhost.gateway.routes import Route, RouteTable
from nimhost.gateway.upstream import Body, Reply, UpstreamPool
from nimhost.refs import Ref

__all__ = ["Gateway", "is_gateway_path"]

BODY_LIMIT_BYTES = 50_000_000
REFUSAL_BYTES = 500
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class Gateway:
    """`table` is replaced as a whole, at any time; a request keeps the one it began with."""

    def __init__(self, settings: GatewaySettings, *, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self.table = RouteTable()
        self._settings = settings
        self._body_limit_bytes = body_limit_bytes
        self._pool = UpstreamPool(settings.connect_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(scope, receive, send, self._body_limit_bytes)
        try:
            place = parse_place(scope["path"])
            if caller.method not in _METHODS:
                raise MethodNotAllowed("Method Not Allowed")
            if own := self._own_reply(place, caller.method):
                await caller.answer(200, [(b"content-type", b"application/json")], own)
            else:
                await self._forward(caller, place)
        except ClientLeft:
            return
        except NimhostError as error:
            await caller.fail(error)

    async def close(self) -> None:
        await self._pool.close()

    # --- what the gateway answers itself

    def _own_reply(self, place: Place, method: str) -> bytes | None:
        if place.kind == "ready":
            return self._ready(Ref(place.workspace, place.name))
        if place.kind not in ("openai", "short") or method not in ("GET", "HEAD"):
            return None
        first, _, name = place.tail.partition("v1/models")
        if first or (name and not name.startswith("/")) or "v1/models" not in place.tail:
            return None
        workspace, name = place.workspace if place.kind == "openai" else None, name[1:]
        if not name:
            return model_list(self.table.reachable(workspace))
        target = self.table.any_model(name) if workspace is None else self.table.model(workspace, name)
        return model_card(target.ref)

    def _ready(self, ref: Ref) -> bytes:
        try:
            return ready_note(ref, self.table.provider(*ref).upstream.base_url)
        except NotReady as error:
            raise NotFound(f"Provider not ready: {error.message}", error.hint) from None

    # --- what it passes on

    async def _forward(self, caller: Caller, place: Place) -> None:
        route, body = await self._destination(caller, place)
        url = route.url(place.tail)
        headers = request_headers(caller.headers, route, caller.request_id)
        async with Exchange(caller.receive, route, self._settings.first_byte_timeout_s) as exchange:
            if isinstance(body, Upload):
                body.begin(exchange)
                headers += body.framing
            reply = await self._pool.send(route, caller.method, url, caller.query, headers, body)
            try:
                await self._relay(caller, reply, route, exchange)
            finally:
                reply.close()

    async def _destination(self, caller: Caller, place: Place) -> tuple[Route, Body]:
        if place.kind == "provider":
            route = self.table.provider(place.workspace, place.name)
            route.url(place.tail)  # refused before a byte of the body is read
            return route, await self._provider_body(caller, route) if caller.method in _WITH_BODY else None
        if place.kind == "model":
            target = self.table.model(place.workspace, place.name)
            if caller.method not in _WITH_BODY:
                return target.route, None
            return target.route, rewrite(await caller.read(), target.route, target.served_json)
        return await self._by_model_in_body(caller, place)

    async def _by_model_in_body(self, caller: Caller, place: Place) -> tuple[Route, Body]:
        table, body = self.table, await caller.read()
        model = peek_model(body)
        target = table.any_model(model) if place.kind == "short" else table.model(place.workspace, model)
        if caller.method not in _WITH_BODY:
            return target.route, None
        if model == target.served_name and not target.route.merges:
            return target.route, body
        return target.route, rewrite(body, target.route, target.served_json)

    async def _provider_body(self, caller: Caller, route: Route) -> Body:
        """As it came, streamed if it comes in pieces; read whole only if extras are to be merged into it."""
        if route.merges and b"json" in (find(caller.headers, b"content-type") or b"json"):
            return merge_if_object(await caller.read(), route)
        piece, more = await caller.read_piece()
        return Upload(caller, piece) if more else piece

    async def _relay(self, caller: Caller, reply: Reply, route: Route, exchange: Exchange) -> None:
        exchange.upstream_answers(self._settings.idle_timeout_s)
        if reply.status in (401, 403) and route.upstream.policy == "external":
            raise await _refusal(reply, route)
        await caller.start(reply.status, reply_headers(reply.headers, caller.request_id))
        more = True
        while more:
            exchange.upstreams_turn()
            piece = await reply.read()
            more = not reply.complete
            exchange.clients_turn()
            await caller.send_piece(piece, more)


async def _refusal(reply: Reply, route: Route) -> ProviderRefused:
    """What to tell a client when the provider refuses our key: all but the key."""
    upstream, said = route.upstream, b""
    while not reply.complete and len(said) < REFUSAL_BYTES:
        said += await reply.read()
    text = said[:REFUSAL_BYTES].decode("utf-8", "replace") if not find(reply.headers, b"content-encoding") else ""
    for _, value in route.set_headers:
        for secret in (value, value.rpartition(" ")[2]):
            text = text.replace(secret, "***") if secret else text
    what = "the key that nimhost sent" if upstream.headers else "a request without a key"
    return ProviderRefused(
        f"Provider {upstream.provider} refused {what} (HTTP {reply.status}): {text}".rstrip(": "),
        f"See which secret it uses: nimhost inference providers get {upstream.provider.name}",
    )

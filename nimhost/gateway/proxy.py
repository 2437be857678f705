"""The data plane: a plain ASGI application that carries one request to one upstream and its reply back, byte for byte.

Nothing in a reply is parsed. When the client leaves, the upstream's connection is closed, so that the GPU stops. Before
the first byte of the reply every failure is a typed error of ours; after it the stream ends as broken as it is. A
request goes to another upstream only if it could not be sent to the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from functools import partial
from typing import Any

from nimhost.config import Gateway as GatewaySettings
from nimhost.errors import MethodNotAllowed, NimhostError, NotFound, NotReady, ProviderRefused
from nimhost.gateway.balance import Standing, choose, is_failure
from nimhost.gateway.bodies import FormBody, JsonBody, PlainBody, read_form, read_json, read_model
from nimhost.gateway.caller import Caller, ClientLeft, Receive, Scope, Send, Upload
from nimhost.gateway.exchange import Exchange
from nimhost.gateway.headers import COMPRESSION, NOTHING, find, reply_headers, request_headers
from nimhost.gateway.keepalive import KeepAlive, goes_on, tell_instead
from nimhost.gateway.paths import Place, is_gateway_path, parse_place
from nimhost.gateway.replies import model_card, model_list, ready_note
from nimhost.gateway.routes import Route, RouteTable, Target
from nimhost.gateway.translate.pairs import NEEDED
from nimhost.gateway.translated import Interpreter, Translated
from nimhost.gateway.upstream import Body, ConnectionBroken, NothingSent, Reply, UpstreamPool, broken_off
from nimhost.gateway.watch import Watch, WatchRequest
from nimhost.refs import Ref

__all__ = ["Gateway", "is_gateway_path"]

BODY_LIMIT_BYTES = 50_000_000
REFUSAL_BYTES = 500
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

Targets = tuple[Target, ...]
Request = tuple[Route, str, str, bytes, bytes, Body]
AnyBody = JsonBody | FormBody | PlainBody | Upload | None


class Gateway:
    """`table` is replaced as a whole, at any time; a request keeps the one it began with."""

    def __init__(self, settings: GatewaySettings, *, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self.watch: WatchRequest | None = None
        self._table = RouteTable()
        self._settings = settings
        self._body_limit_bytes = body_limit_bytes
        self._pool = UpstreamPool(settings.connect_timeout_s)
        self.standings: dict[Ref, Standing] = {}

    @property
    def table(self) -> RouteTable:
        return self._table

    @table.setter
    def table(self, table: RouteTable) -> None:
        """How a provider did so far stays known as long as there is a provider of that name."""
        self._table = table
        self.standings = {ref: self.standings.get(ref) or Standing() for ref in table.providers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(scope, receive, send, self._body_limit_bytes)
        try:
            place = parse_place(scope["path"])
            if caller.method not in _METHODS:
                raise MethodNotAllowed("Method Not Allowed")
            if own := self._own_reply(place, caller.method):
                await caller.answer(200, [(b"content-type", b"application/json")], own)
            elif self.watch:
                await self._watched(caller, place, self.watch(caller, place))
            else:
                await self._forward(caller, place, None)
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
        targets = self.table.any_model(name) if workspace is None else self.table.model(workspace, name)
        return model_card(targets[0].ref)

    def _ready(self, ref: Ref) -> bytes:
        try:
            upstream = self.table.provider(*ref).route.upstream
        except NotReady as error:
            raise NotFound(f"Provider not ready: {error.message}", error.hint) from None
        if not upstream.proven:
            raise NotFound(f"Provider not ready: {ref} has not answered yet.", "See: nimhost ps")
        return ready_note(ref, upstream.base_url)

    # --- what it passes on

    async def _watched(self, caller: Caller, place: Place, watch: Watch) -> None:
        try:
            await self._forward(caller, place, watch)
        except BaseException as error:
            watch.ended(error if isinstance(error, Exception) else ClientLeft())
            raise
        watch.ended(None)

    async def _forward(self, caller: Caller, place: Place, watch: Watch | None) -> None:
        targets, body = await self._destination(caller, place)
        with Exchange(caller.receive, self._settings.first_byte_timeout_s) as exchange:
            if isinstance(body, Upload):
                body.begin(exchange)
            elif self._settings.keepalive_comments and body and body.streams:
                exchange.keep_alive = KeepAlive(caller)
            left = targets
            while True:
                target = left[0] if len(left) == 1 else self._choose(left)
                try:
                    await self._carry(caller, place.tail, target, body, exchange, watch)
                    return
                except NothingSent as failed:
                    left = tuple(other for other in left if other is not target)
                    if not left:
                        raise failed.error from None

    def _choose(self, targets: Targets) -> Target:
        standings = [(target.priority, self._standing(target)) for target in targets]
        return targets[choose(standings, self._pool.now_s())]

    def _standing(self, target: Target) -> Standing:
        return self.standings.get(target.route.upstream.provider) or Standing()

    async def _carry(
        self, caller: Caller, tail: str, target: Target, body: AnyBody, exchange: Exchange, watch: Watch | None
    ) -> None:
        """One upstream is asked, and its reply passed on, in translation if it does not speak the client's format.

        Raises NothingSent if it cannot be reached.
        """
        route = target.route
        exchange.route = route
        needed, between = NEEDED[target.speaks].get(tail), None
        if needed and isinstance(body, JsonBody):
            between = Interpreter(needed, caller, body, target)
            url, query, headers, sent = between.asked
        else:
            url, query = route.url(tail), caller.query
            without = COMPRESSION if exchange.keep_alive else NOTHING
            headers = request_headers(caller.headers, route, caller.request_id, without)
            sent = body if body is None or isinstance(body, Upload) else body.for_target(target)
        standing = self._standing(target)
        probe = standing.begin()
        try:
            if watch:
                watch.sent(target)
            reply = await self._send((route, caller.method, url, query, headers, sent), standing, exchange)
            try:
                await self._relay(caller, reply, route, exchange, watch, between)
            finally:
                reply.close()
        except ConnectionBroken as error:
            raise broken_off(error, route) from None
        finally:
            standing.end(probe)

    async def _send(self, request: Request, standing: Standing, exchange: Exchange) -> Reply:
        """Waits for the head of the reply, and remembers how the upstream did."""
        try:
            reply = await self._pool.send(*request)
        except (NothingSent, ConnectionBroken):
            standing.fail(self._pool.now_s())
            raise
        except asyncio.CancelledError:
            if exchange.timed_out:
                standing.fail(self._pool.now_s())
            raise
        if is_failure(reply.status):
            standing.fail(self._pool.now_s())
        else:
            standing.succeed()
        return reply

    # --- where to, and with what

    async def _destination(self, caller: Caller, place: Place) -> tuple[Targets, AnyBody]:
        table, with_body = self._table, caller.method in _WITH_BODY
        if place.kind == "provider":
            target = table.provider(place.workspace, place.name)
            target.route.url(place.tail)  # refused before a byte of the body is read
            return (target,), await self._provider_body(caller, target.route) if with_body else None
        if place.kind == "model":
            targets = table.model(place.workspace, place.name)
            return targets, read_json(await caller.read()) if with_body else None
        body = await self._body_with_model(caller)
        model = body.model or ""
        targets = table.any_model(model) if place.kind == "short" else table.model(place.workspace, model)
        return targets, body if with_body else None

    async def _body_with_model(self, caller: Caller) -> JsonBody | FormBody:
        kind = caller.fields.get(b"content-type", b"")
        body = await caller.read()
        return read_form(body, kind) if kind[:19].lower() == b"multipart/form-data" else read_model(body)

    async def _provider_body(self, caller: Caller, route: Route) -> AnyBody:
        """As it came, streamed if it comes in pieces; read whole only if there is something to look for."""
        look_inside = route.merges or self._settings.keepalive_comments
        if look_inside and b"json" in caller.fields.get(b"content-type", b"json"):
            body = await caller.read()
            try:
                return read_json(body)
            except NimhostError:
                return PlainBody(body)
        piece, more = await caller.read_piece()
        return Upload(caller, piece) if more else PlainBody(piece)

    # --- the reply

    async def _relay(
        self,
        caller: Caller,
        reply: Reply,
        route: Route,
        exchange: Exchange,
        watch: Watch | None,
        between: Interpreter | None,
    ) -> None:
        exchange.upstream_answers(self._settings.idle_timeout_s)
        if reply.status in (401, 403) and route.upstream.policy == "external":
            raise await _refusal(reply, route)
        answer: Reply | Translated = reply
        if between:
            exchange.upstreams_turn()
            answer = await between.reply(reply)
        headers = reply_headers(answer.headers, caller.request_id)
        if watch:
            watch.answered(answer.status, headers)
        if not caller.begun:
            await caller.start(answer.status, headers)
        elif not goes_on(answer):
            await tell_instead(answer, route)
        if answer is reply:
            reply.taker = partial(_pass_on, caller, exchange, watch)
        more = True
        while more:
            exchange.upstreams_turn()
            piece = await answer.read()
            more = not answer.complete
            exchange.clients_turn()
            if watch:
                watch.piece(piece)
            await caller.send_piece(piece, more)


def _pass_on(caller: Caller, exchange: Exchange, watch: Watch | None, piece: bytes) -> Awaitable[None] | None:
    """A piece, as soon as it comes. What is returned is to be awaited: the client does not keep up."""
    if watch:
        watch.piece(piece)
    rest = caller.push(piece)
    exchange.upstreams_turn()
    return _Patience(rest, exchange) if rest else None


class _Patience:
    """Awaits the client, and takes none of that time for the upstream's. No coroutine: nobody may come to await it."""

    def __init__(self, rest: Awaitable[None], exchange: Exchange) -> None:
        self._rest, self._exchange = rest, exchange
        exchange.clients_turn()

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._rest.__await__()
        self._exchange.upstreams_turn()


async def _refusal(reply: Reply, route: Route) -> ProviderRefused:
    """What to tell a client when the provider refuses our key: all but the key."""
    upstream, said = route.upstream, b""
    while not reply.complete and len(said) < REFUSAL_BYTES:
        said += await reply.read()
    said += await reply.read() if reply.complete else b""
    text = said[:REFUSAL_BYTES].decode("utf-8", "replace") if not find(reply.headers, b"content-encoding") else ""
    for _, value in route.set_headers:
        for secret in (value, value.rpartition(" ")[2]):
            text = text.replace(secret, "***") if secret else text
    what = "the key that nimhost sent" if upstream.headers else "a request without a key"
    return ProviderRefused(
        f"Provider {upstream.provider} refused {what} (HTTP {reply.status}): {text}".rstrip(": "),
        f"See which secret it uses: nimhost inference providers get {upstream.provider.name}",
    )

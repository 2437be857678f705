"""The data plane: a plain ASGI application that carries one request to one upstream and its reply back, byte for byte
(nothing in it is parsed) or in translation.

When the client leaves, the upstream's connection is closed, so that the GPU stops. Before the first byte of the reply
every failure is a typed error of ours; after it the stream ends as broken as it is. A request goes to another upstream
only if it could not be sent to the first.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from functools import partial
from typing import Any

from nimhost.config import Gateway as GatewaySettings
from nimhost.errors import MethodNotAllowed, NimhostError, NotFound, NotReady, ProviderRefused, RequestLoop
from nimhost.gateway.balance import Standing, choose, is_failure
from nimhost.gateway.bodies import JsonBody, PlainBody, name_in, name_within
from nimhost.gateway.caller import Caller, Upload
from nimhost.gateway.cycle import Receive, Scope, Send
from nimhost.gateway.deadlines import Deadlines
from nimhost.gateway.exchange import ClientLeft, Exchange
from nimhost.gateway.headers import COMPRESSION, NOTHING, OVERHEAD, find, reply_headers, request_headers
from nimhost.gateway.incoming import AnyBody, read_for_model, read_for_provider, read_with_model
from nimhost.gateway.keepalive import KeepAlive, goes_on, tell_instead
from nimhost.gateway.paths import Place, parse_place
from nimhost.gateway.replies import METHODS, model_card, model_list, ready_note
from nimhost.gateway.requestlog import BODY_BYTES, SHOWN_LENGTH
from nimhost.gateway.routes import HOP, Route, RouteTable, Target
from nimhost.gateway.scrape import Scrape, scrape
from nimhost.gateway.traffic import CLIENT_LEFT, OUR_FAULT, Traffic
from nimhost.gateway.translate.pairs import NEEDED, Translation
from nimhost.gateway.translated import Interpreter, Translated
from nimhost.gateway.upstream import Body, ConnectionBroken, NothingSent, Reply, UpstreamPool, broken_off
from nimhost.refs import Ref

BODY_LIMIT_BYTES = 50_000_000
IN_THREAD_BYTES = 262_144
"""A body of that size is not translated on the loop: it takes milliseconds."""
REFUSAL_BYTES, REFUSAL_LENGTH = 16_384, 500
"""So much of a provider's refusal is read, and shown: a key that stands at the end of what is shown is seen whole."""
_HOP = HOP.encode()
_METHODS = frozenset(METHODS)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

Targets = tuple[Target, ...]
Request = tuple[Route, str, str, bytes, bytes, Body]


class Gateway:
    """`table` is replaced as a whole, at any time; a request keeps the one it was sent with."""

    def __init__(self, settings: GatewaySettings, *, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self.traffic = Traffic(log_bodies=settings.log_bodies)
        self._table = RouteTable()
        self._settings = settings
        self.hop = secrets.token_hex(8)
        """Marks what we send on, so that it is known should it come back. A new one each time: it names nobody."""
        self._body_limit_bytes = body_limit_bytes
        self._pool = UpstreamPool(settings.connect_timeout_s)
        self._deadlines = Deadlines()
        self.standings: dict[Ref, Standing] = {}
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the last request to an address ended that the table does not have any more."""
        self._left: dict[str, Standing] = {}
        """By address: what is not in the table any more, and still has requests."""

    @property
    def table(self) -> RouteTable:
        return self._table

    @table.setter
    def table(self, table: RouteTable) -> None:
        """How a provider did so far stays known as long as there is a provider of that name at that address."""
        before, self._table = self.standings, table
        urls = {ref: target.route.upstream.base_url for ref, target in table.providers.items()}
        self.standings = {ref: _standing_at(url, before.get(ref), self._left) for ref, url in urls.items()}
        for ref, standing in before.items():
            if standing.under_way and self.standings.get(ref) is not standing:
                standing.on_idle = self._forget
                self._left[standing.url] = standing

    def is_busy(self, base_url: str) -> bool:
        """Are requests under way to that address?"""
        return base_url in self._left or any(s.under_way and s.url == base_url for s in self.standings.values())

    def _forget(self, standing: Standing) -> None:
        self._left.pop(standing.url, None)
        self.on_idle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller, counted = Caller(scope, receive, send, self._body_limit_bytes), True
        try:
            if _HOP in caller.fields:
                self._refuse_loop(caller)
            place = parse_place(scope["path"])
            counted = place.kind != "ready"
            if caller.method not in _METHODS:
                raise MethodNotAllowed("Method Not Allowed")
            if own := self._own_reply(place, caller.method):
                counted = False
                await caller.answer(200, [(b"content-type", b"application/json")], own)
            else:
                await self._forward(caller, place)
        except ClientLeft:
            caller.record.error = CLIENT_LEFT
        except NimhostError as error:
            await caller.fail(error)
        except asyncio.CancelledError as cut:
            self.traffic.cut_off(caller.record, cut)
            raise
        except Exception:  # only noted: whoever carries the client's connection answers, and logs the traceback
            caller.record.error = OUR_FAULT
            raise
        finally:
            if caller.held:
                caller.held.let_go()
            if counted:
                self.traffic.end(caller)

    async def engine_metrics(self) -> Scrape:
        """What the engines that run here tell of themselves."""
        return await scrape(self._pool, self.table.providers.values())

    async def close(self) -> None:
        self._deadlines.close()
        await self._pool.close()

    def _refuse_loop(self, caller: Caller) -> None:
        if (_HOP, self.hop.encode()) in caller.headers:
            raise RequestLoop(
                "This request has come back to the nimhost that sent it on: the host_url of a provider leads here.",
                "See which: nimhost inference providers list",
            )

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
            return model_list(self.table.reachable(workspace), self.table.created)
        targets = self.table.any_model(name) if workspace is None else self.table.model(workspace, name)
        return model_card(targets[0].ref, self.table.created)

    def _ready(self, ref: Ref) -> bytes:
        try:
            upstream = self.table.provider(*ref).route.upstream
        except NotReady as error:
            raise NotFound(f"Provider not ready: {error.message}", error.hint) from None
        if not upstream.proven:
            why = upstream.message or f"{ref} has not answered yet."
            raise NotFound(f"Provider not ready: {why}", "See: nimhost ps")
        return ready_note(ref, upstream.base_url)

    # --- what it passes on

    async def _forward(self, caller: Caller, place: Place) -> None:
        targets, body = await self._destination(caller, place)
        if self._settings.log_bodies:
            self._keep_bodies(caller, body)
        limits = self._settings
        with Exchange(caller, self._deadlines, limits.first_byte_timeout_s, limits.idle_timeout_s) as exchange:
            if isinstance(body, Upload):
                body.begin(exchange)
            elif self._settings.keepalive_comments and body and body.streams:
                exchange.keep_alive = KeepAlive(caller)
            left = targets
            while True:
                target = left[0] if len(left) == 1 else self._choose(left)
                try:
                    await self._carry(caller, place.tail, target, body, exchange)
                    return
                except NothingSent as failed:
                    left = self._now(other for other in left if other is not target)
                    if not left:
                        raise failed.error from None

    def _keep_bodies(self, caller: Caller, body: AnyBody) -> None:
        raw = b"" if body is None or isinstance(body, Upload) else body.raw
        caller.record.request_body, caller.record.reply_body = raw[:BODY_BYTES], bytearray()

    def _choose(self, targets: Targets) -> Target:
        standings = [(target.priority, self.standings[target.route.upstream.provider]) for target in targets]
        return targets[choose(standings, self._pool.now_s())]

    def _now(self, targets: Iterable[Target]) -> Targets:
        """As the table has them after a wait: an engine that has left it and has no requests may be gone already."""
        return tuple(
            now
            for target in targets
            for now in self._table.models.get(target.ref, ())
            if now.route.upstream.provider == target.route.upstream.provider
        )

    async def _carry(self, caller: Caller, tail: str, target: Target, body: AnyBody, exchange: Exchange) -> None:
        """One upstream is asked, and its reply passed on, in translation if it does not speak the client's format.

        Raises NothingSent if it cannot be reached.
        """
        route = target.route
        exchange.route = route
        needed, between = NEEDED[target.speaks].get(tail), None
        standing = self.standings[route.upstream.provider]
        probe = standing.begin()  # it has to stay from here on, also while a thread translates
        try:
            if needed and isinstance(body, JsonBody):
                between = await _interpreter(needed, caller, body, target)
                url, query, headers, sent = between.asked
            else:
                url, query = route.url(tail), caller.query
                without = COMPRESSION if exchange.keep_alive else NOTHING
                headers = request_headers(caller.headers, route, caller.request_id, without)
                sent = body if body is None or isinstance(body, Upload) else body.for_target(target)
            self.traffic.send(caller.record, target if target.served_name else self._named(target, body))
            reply = await self._send((route, caller.method, url, query, headers, sent), standing, exchange)
            try:
                await self._relay(caller, reply, route, exchange, between)
            finally:
                reply.close()
        except ConnectionBroken as error:
            raise broken_off(error, route) from None
        finally:
            standing.end(probe)

    def _named(self, target: Target, body: AnyBody) -> Target:
        """For whoever counts: which model it is that a provider is asked for on its own route, if it is a known one."""
        if isinstance(body, JsonBody):
            return self._table.called(name_in(body), target)
        raw = body.raw if isinstance(body, PlainBody) else body.first_piece if isinstance(body, Upload) else b""
        return self._table.called(name_within(raw), target) if raw else target

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
        """By the table as it is when the body is here: an engine without requests may be gone a moment later."""
        table, with_body = self._table, caller.method in _WITH_BODY
        if place.kind == "provider":
            target = table.provider(place.workspace, place.name)
            target.route.url(place.tail)  # refused before a byte of the body is read
            looks = self._settings.keepalive_comments
            sent = await read_for_provider(caller, target.route, may_stream=looks) if with_body else None
            return (target if table is self._table else self._table.provider(place.workspace, place.name),), sent
        if place.kind == "model":
            targets = table.model(place.workspace, place.name)
            body = await read_for_model(caller) if with_body else None
            return targets if table is self._table else self._table.model(place.workspace, place.name), body
        said = await read_with_model(caller)
        model, table = said.model or "", self._table
        caller.record.asked = model[:SHOWN_LENGTH]
        targets = table.any_model(model) if place.kind == "short" else table.model(place.workspace, model)
        return targets, said if with_body else None

    # --- the reply

    async def _relay(
        self,
        caller: Caller,
        reply: Reply,
        route: Route,
        exchange: Exchange,
        between: Interpreter | None,
    ) -> None:
        record = caller.record
        record.head_at_s = time.perf_counter()
        exchange.upstream_answers()
        if reply.status in (401, 403) and route.upstream.policy == "external":
            raise await _refusal(reply, route)
        answer: Reply | Translated = reply
        if between:
            exchange.upstreams_turn()
            answer = await between.reply(reply)
            record.head_at_s = time.perf_counter()  # a reply that is no stream came whole in between
        headers = reply_headers(answer.headers, caller.request_id)
        headers.append((OVERHEAD, b"%.3f" % record.overhead_ms(time.perf_counter())))
        if not caller.begun:
            caller.start(answer.status, headers)
        elif not goes_on(answer):
            await tell_instead(answer, route)
        if answer is reply:
            if (whole := reply.whole()) is not None:
                caller.write(whole, False)
                return
            reply.taker = partial(_pass_on, caller, exchange)
        caller.flush_soon()
        more = True
        while more:
            exchange.upstreams_turn()
            piece = await answer.read()
            more = not answer.complete
            exchange.clients_turn()
            if wait := caller.write(piece, more):
                await wait


async def _interpreter(needed: Translation, caller: Caller, body: JsonBody, target: Target) -> Interpreter:
    if len(body.raw) < IN_THREAD_BYTES:
        return Interpreter(needed, caller, body, target)
    return await asyncio.to_thread(Interpreter, needed, caller, body, target)


def _standing_at(url: str, before: Standing | None, left: dict[str, Standing]) -> Standing:
    """What is known of an address: the standing before, or the one that has left and comes back."""
    if before is not None and before.url == url:
        return before
    standing = left.pop(url, None) or Standing(url)
    standing.on_idle = None
    return standing


def _pass_on(caller: Caller, exchange: Exchange, piece: bytes) -> Awaitable[None] | None:
    """A piece, as soon as it comes. What is returned is to be awaited: the client does not keep up."""
    rest = caller.write(piece, True)
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
    while len(said) < REFUSAL_BYTES and (piece := await reply.read()):
        said += piece
    compressed = find(reply_headers(reply.headers, b""), b"content-encoding")
    text = said.decode("utf-8", "replace") if not compressed else ""
    for _, value in route.set_headers:
        for secret in (value, value.rpartition(" ")[2]):
            text = text.replace(secret, "***") if secret else text
    what = "the key that nimhost sent" if upstream.headers else "a request without a key"
    return ProviderRefused(
        f"Provider {upstream.provider} refused {what} (HTTP {reply.status}): {text[:REFUSAL_LENGTH]}".rstrip(": "),
        f"See which secret it uses: nimhost inference providers get {upstream.provider.name}",
    )

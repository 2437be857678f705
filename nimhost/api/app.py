"""The ASGI entry: who may ask at all, then the gateway's paths to the gateway and the rest to the control plane."""

from __future__ import annotations

import ipaddress
import logging
import re
from urllib.parse import urlsplit

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from nimhost.api import files, inference, platform, resources
from nimhost.api.http import answering_errors, error_reply
from nimhost.api.parts import Parts
from nimhost.config import Settings
from nimhost.errors import Forbidden, NimhostError

log = logging.getLogger(__name__)
_GATEWAY = re.compile(r"/v1(/.*)?|/apis/inference-gateway/(?!v2/workspaces/[^/]+/virtual-models(/|$)).*", re.DOTALL)


def control_plane(parts: Parts) -> ASGIApp:
    """Everything but traffic to models."""
    routes = [*platform.routes(parts), *files.routes(parts), *inference.routes(parts), *resources.routes(parts)]
    return answering_errors(Router(routes, redirect_slashes=False))


def entry(control: ASGIApp, gateway: ASGIApp, settings: Settings) -> ASGIApp:
    """The app that listens. Requests by another host name or from a web page of another origin reach neither."""
    guard = Guard(settings.server.host, tuple(settings.server.allowed_hosts))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := guard.refusal(scope):
            log.warning("refused %s %s: %s", scope["method"], scope["path"], refusal.message)
            await error_reply(refusal)(scope, receive, send)
        else:
            await (gateway if is_gateway_path(scope["path"]) else control)(scope, receive, send)

    return app


def is_gateway_path(path: str) -> bool:
    return _GATEWAY.fullmatch(path) is not None


class Guard:
    """Keeps web pages out: a page can send requests to localhost, and with DNS rebinding under a name of its own."""

    def __init__(self, bound: str, allowed: tuple[str, ...]) -> None:
        self._any_address = bound in ("", "0.0.0.0", "::")
        self._allowed = {name.lower() for name in allowed}
        self._names = {"localhost", bound.lower(), *self._allowed}

    def refusal(self, scope: Scope) -> NimhostError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._knows(host):
            return Forbidden(
                f"Requests for the host '{host[:100]}' are refused.",
                hint="If that is a name of this machine, add it to server.allowed_hosts in nimhost.toml.",
            )
        if origin is not None and not self._same(origin, host):
            return Forbidden(
                f"Requests from web pages of '{origin[:100]}' are refused.",
                hint="If you trust that site, add its host to server.allowed_hosts in nimhost.toml.",
            )
        return None

    def _knows(self, host: str) -> bool:
        name = _host_name(host)
        if name in self._names or name.endswith(".localhost"):
            return bool(name)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address  # an address cannot be rebound, only a name can

    def _same(self, origin: str, host: str) -> bool:
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return netloc == host.lower() or netloc in self._allowed


def _host_name(host: str) -> str:
    """`[::1]:8080` is `::1`, `localhost:8080` is `localhost`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


async def _lifespan(receive: Receive, send: Send) -> None:
    """The daemon opens and closes everything itself."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

"""API tokens over the wire: made, listed and revoked. A token is told once, in the reply that makes it."""

from __future__ import annotations

import secrets

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.access import ASKER, FIRST_ADMINISTRATOR, is_loopback
from nimhost.api.decode import read_struct
from nimhost.api.http import JsonReply, empty_reply, read_json
from nimhost.api.parts import Parts
from nimhost.errors import AlreadyExists, Conflict, Forbidden, InvalidRequest
from nimhost.refs import check_name
from nimhost.store import now
from nimhost.store.tokens import delete_token, insert_token
from nimhost.tokens import RANDOM_BYTES, Scope, Token, remember, spell

PATH = "/apis/nimhost/v1/tokens"


class NewToken(Struct, frozen=True, kw_only=True):
    """The body that makes one."""

    name: str
    scopes: list[Scope]


def routes(parts: Parts) -> list[Route]:
    tokens = Tokens(parts)
    return [
        Route(PATH, tokens.list, methods=["GET"]),
        Route(PATH, tokens.create, methods=["POST"]),
        Route(f"{PATH}/{{name}}", tokens.revoke, methods=["DELETE"]),
    ]


class Tokens:
    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._table = parts.tokens
        self._open = not is_loopback(parts.settings.server.host)
        """Other machines reach it."""

    async def list(self, request: Request) -> Response:
        return JsonReply({"data": [shown(token) for token in self._table.all()]})

    async def create(self, request: Request) -> Response:
        wanted: NewToken = read_struct(NewToken, await read_json(request))
        check_name(wanted.name)
        if not wanted.scopes:
            raise InvalidRequest.field("At least one scope is needed", "scopes", input=[])
        if "admin" in wanted.scopes and not ASKER.get().is_administrator:
            raise Forbidden("Only an administrator makes tokens with the scope 'admin'.", FIRST_ADMINISTRATOR)
        text = spell(secrets.token_bytes(RANDOM_BYTES))
        token = remember(wanted.name, wanted.scopes, text, now())
        if self._fixed(token.name):
            raise AlreadyExists(f"The settings have an API token '{token.name}'.", "Take another name.")
        async with self._store.transaction() as tx:
            stored = await insert_token(tx, token)
        self._table.put(stored)
        return JsonReply({**shown(token), "token": text}, 201, {"cache-control": "no-store"})

    async def revoke(self, request: Request) -> Response:
        name = request.path_params["name"]
        if self._fixed(name):
            raise Conflict(
                f"The API token '{name}' is in the settings.",
                "Take it out of server.api_tokens in nimhost.toml and start nimhost again.",
            )
        async with self._store.transaction() as tx:
            stored = await delete_token(tx, name)
            if self._open and not any("admin" in token.scopes for token in [*stored, *self._table.fixed]):
                raise Conflict(
                    f"The API token '{name}' is the last of an administrator, and other machines reach this nimhost: "
                    "without it nobody could make another.",
                    "First make one in its place: nimhost tokens create NAME --scope admin",
                )
        self._table.put(stored)
        return empty_reply(204)

    def _fixed(self, name: str) -> bool:
        return name in [token.name for token in self._table.fixed]


def shown(token: Token) -> dict[str, object]:
    return {
        "name": token.name,
        "scopes": token.scopes,
        "prefix": token.prefix or None,
        "created_at": token.created_at or None,
        "source": "database" if token.created_at else "settings",
    }

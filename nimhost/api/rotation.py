"""Rotation of the key: every secret is wrapped anew in one transaction, or none is."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.http import JsonReply
from nimhost.api.models import ENDPOINT
from nimhost.api.parts import Parts
from nimhost.api.references import Reader
from nimhost.entities import Entity
from nimhost.host.vault import Vault
from nimhost.store import Store


def routes(parts: Parts) -> list[Route]:
    async def rotate_keys(request: Request) -> Response:
        count = await rotate(parts.store, parts.vault)
        return JsonReply({"rotated_secrets": count, "success": True}, 202)

    return [Route("/apis/secrets/v2/rotate-encryption-keys", rotate_keys, methods=["POST"])]


async def rotate(store: Store, vault: Vault) -> int:
    """How many secrets are under a new key now. Raises Conflict where the key is not ours to change, HostError for a
    secret that does not open: nothing was changed then.
    """
    async with store.transaction() as tx:
        await asyncio.to_thread(vault.write_next_key)
        rows = await sealed_rows(tx)
        for row in rows:
            await tx.rewrite_wish(row, _rewrapped(row, vault))
        tx.after = vault.adopt_next_key
    return len(rows)


async def sealed_rows(db: Reader) -> list[Entity]:
    """Everything that holds something sealed."""
    models = [e for e in await db.all("models") if e.wish.api_endpoint and e.wish.api_endpoint.api_key]
    return [*await db.all("secrets"), *models]


def sealed_in(row: Entity) -> tuple[str, str]:
    """The sealed text, and what it is bound to."""
    if row.kind == "secrets":
        return row.wish.value, row.ref
    return row.wish.api_endpoint.api_key, f"{row.ref}{ENDPOINT}"


def _rewrapped(row: Entity, vault: Vault) -> Any:
    text = vault.rewrap(*sealed_in(row))
    if row.kind == "secrets":
        return replace(row.wish, value=text)
    return replace(row.wish, api_endpoint=replace(row.wish.api_endpoint, api_key=text))

"""API tokens as rows: their hashes, never the tokens."""

from __future__ import annotations

import msgspec

from nimhost.errors import AlreadyExists, NotFound
from nimhost.store import Store, Transaction
from nimhost.tokens import Token

KEY = "api_tokens"
"""In `meta`: a handful of records that are read whole at every start and changed by hand."""


async def stored_tokens(store: Store) -> list[Token]:
    """The oldest first."""
    async with store.transaction() as tx:
        return await _read(tx)


async def insert_token(tx: Transaction, token: Token) -> list[Token]:
    """All tokens, with the new one. Raises AlreadyExists."""
    tokens = await _read(tx)
    if token.name in [other.name for other in tokens]:
        raise AlreadyExists(
            f"There is an API token '{token.name}' already.",
            f"Take another name, or: nimhost tokens revoke {token.name}",
        )
    return await _write(tx, [*tokens, token])


async def delete_token(tx: Transaction, name: str) -> list[Token]:
    """The tokens that are left. Raises NotFound."""
    tokens = await _read(tx)
    left = [token for token in tokens if token.name != name]
    if len(left) == len(tokens):
        raise NotFound(f"There is no API token '{name}'.", "See which there are: nimhost tokens list")
    return await _write(tx, left)


async def _read(tx: Transaction) -> list[Token]:
    text = await tx.meta(KEY)
    return msgspec.json.decode(text, type=list[Token]) if text else []


async def _write(tx: Transaction, tokens: list[Token]) -> list[Token]:
    await tx.set_meta(KEY, msgspec.json.encode(tokens).decode())
    return tokens

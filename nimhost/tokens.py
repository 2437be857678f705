"""API tokens, pure: what they look like, what each scope allows, and how they are kept, which is as a hash only."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Literal, get_args

from msgspec import Struct

from nimhost.errors import ConfigError

Scope = Literal["inference", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "nimhost_"
"""Every token begins with it: a key that does not is some other program's, and nobody's name here."""
RANDOM_BYTES = 32
_SHOWN_CHARACTERS = len(PREFIX) + 4
_PLAIN = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{32,200}}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62}):([a-z,]+):(.*)", re.DOTALL)


class Token(Struct, frozen=True, kw_only=True):
    """What is known of a token; never the token itself. It has 256 random bits, so a plain hash cannot be reversed."""

    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    """Of the whole token, in hexadecimal."""
    prefix: str = ""
    """How it begins: enough to recognise it, and no more."""
    created_at: str = ""
    """Empty: it is in the settings."""


def spell(random: bytes) -> str:
    """`random` as a token. It has to come from a source that nobody can guess."""
    return PREFIX + base64.urlsafe_b64encode(random).rstrip(b"=").decode()


def remember(name: str, scopes: Sequence[Scope], token: str, created_at: str) -> Token:
    return Token(
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        sha256=digest(token.encode()).hex(),
        prefix=token[:_SHOWN_CHARACTERS],
        created_at=created_at,
    )


def digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


# --- tokens in the settings ----------------------------------------------------------------------------------------

ENTRY_HINT = (
    'An entry is "NAME:SCOPE:sha256:HASH", SCOPE one or more of inference, read and admin (with commas). The hash of a '
    "token: printf %s TOKEN | sha256sum"
)


def parse_entries(entries: Sequence[str]) -> list[Token]:
    """The tokens of `[server] api_tokens`. Raises ConfigError, which repeats nothing that could be a token."""
    tokens = [_parse_entry(entry, number) for number, entry in enumerate(entries, start=1)]
    for number, token in enumerate(tokens, start=1):
        if token.name in [other.name for other in tokens[: number - 1]]:
            raise ConfigError(f"server.api_tokens: entry {number} has a name that is there twice: '{token.name}'.")
    return tokens


def _parse_entry(entry: str, number: int) -> Token:
    parts = _ENTRY.fullmatch(entry)
    scopes = parts[2].split(",") if parts else []
    if parts is None or not set(scopes) <= set(SCOPES):
        raise ConfigError(f"server.api_tokens: entry {number} cannot be understood.", ENTRY_HINT)
    hashed = _HASH.fullmatch(parts[3])
    if hashed is None:
        raise ConfigError(f"server.api_tokens: entry {number} ('{parts[1]}') has no hash of a token.", ENTRY_HINT)
    return Token(name=parts[1], scopes=tuple(s for s in SCOPES if s in scopes), sha256=hashed[1])


def hash_entry(entry: str) -> str:
    """An entry with the token itself in it, as the environment may have it, as one with its hash."""
    parts = _ENTRY.fullmatch(entry)
    if parts is None or not _PLAIN.fullmatch(parts[3]):
        return entry
    return f"{parts[1]}:{parts[2]}:sha256:{digest(parts[3].encode()).hex()}"

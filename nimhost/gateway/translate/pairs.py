"""Who needs an interpreter, and which. Pure.

A request is only translated if it is for chat in one format and its target speaks nothing but the other one; everything
else passes byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Raw

from nimhost.entities import BackendFormat
from nimhost.gateway.bodies import UNREADABLE, JsonBody, check_values, unreadable
from nimhost.gateway.paths import target_url
from nimhost.gateway.routes import Route, Target
from nimhost.gateway.translate.errors import error_of_chat, error_of_messages
from nimhost.gateway.translate.fields import Asked, Json
from nimhost.gateway.translate.replies import completion_of, message_of, token_count_of
from nimhost.gateway.translate.stream_to_chat import ChatStream
from nimhost.gateway.translate.stream_to_messages import MessageStream
from nimhost.gateway.translate.streams import Stream
from nimhost.gateway.translate.to_chat import to_chat, to_tokenize
from nimhost.gateway.translate.to_messages import to_messages

DEFAULT_MAX_TOKENS = 16_384
"""For a client of OpenAI's that sets no limit: Anthropic's API insists on one, and every current model allows this."""
DEFAULT_VERSION = b"anthropic-version: 2023-06-01\r\n"
"""For a provider whose extra headers name none: the wire that is written here, sampling parameters included."""
_decode, _items = msgspec.json.Decoder().decode, msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode
_NEWER_LIMIT_HOSTS = ("api.openai.com", ".openai.azure.com")
"""Their newer models refuse `max_tokens`; everybody else's know it best."""


class Translation(NamedTuple):
    tail: str
    """Where the upstream is asked instead, below its address without `/v1`."""
    ask: Callable[[Json, Route], Asked]
    reply: Callable[[Json, int], Json]
    """A whole reply for the client; with the time in seconds."""
    error: Callable[[int, bytes], Json]
    """A reply with this status, from 400, for the client."""
    stream: Callable[[Json, int], Stream]
    """For a reply that is a stream; with the request as it was sent by the client, and the time."""
    not_sent: frozenset[bytes]
    """Headers of the client that only mean something in its own format."""
    may_be_absent: bool = False
    """Not every server of the format can do this."""

    def url(self, route: Route) -> str:
        """Raises what `paths.target_url` raises."""
        base = route.upstream.base_url.rstrip("/").removesuffix("/v1")
        return target_url(base, route.upstream.policy, self.tail)

    def request(self, body: JsonBody, target: Target) -> tuple[bytes, Json, tuple[str, ...]]:
        """What is sent, the client's request as it was read, and the fields that were left out. Raises BadRequest,
        BodyTooLarge.
        """
        check_values(body)
        try:
            read = {name: _read(value) for name, value in body.members.items()}
            asked = self.ask(read, target.route)
            members = {name: Raw(_write(value)) for name, value in asked.body.items()}
        except UNREADABLE as error:
            raise unreadable(error) from None
        return JsonBody(b"", members, None).for_target(target), read, asked.ignored

    def headers(self, lines: bytes) -> bytes:
        """To the lines that are sent: what the upstream's format needs besides."""
        if self.tail != MESSAGES or b"\r\nanthropic-version:" in lines:
            return lines
        return lines + DEFAULT_VERSION


def _read(value: Raw) -> Any:
    """A list item by item: a thread that reads a long conversation lets the others have their turn in between."""
    return [_decode(item) for item in _items(value)] if bytes(memoryview(value)[:1]) == b"[" else _decode(value)


def _write(value: object) -> bytes:
    return b"[%b]" % b",".join(map(_encode, value)) if isinstance(value, list) else _encode(value)


MESSAGES = "v1/messages"
_NOT_READ = frozenset({b"accept-encoding"})
_OPENAIS = frozenset({b"openai-organization", b"openai-project", b"openai-beta"})
_ANTHROPICS = frozenset({b"anthropic-version", b"anthropic-beta", b"anthropic-dangerous-direct-browser-access"})


def _ask_messages(chat: Json, route: Route) -> Asked:
    asked = to_messages(chat)
    if not ("max_tokens" in asked.body or "max_tokens" in route.default_body):
        asked.body["max_tokens"] = DEFAULT_MAX_TOKENS
    return asked


def _ask_chat(messages: Json, route: Route) -> Asked:
    host = urlsplit(route.upstream.base_url).hostname or ""
    return to_chat(messages, "max_completion_tokens" if host.endswith(_NEWER_LIMIT_HOSTS) else "max_tokens")


def _chat_stream(chat: Json, now_s: int) -> Stream:
    options = chat.get("stream_options")
    return ChatStream(now_s, with_usage=isinstance(options, dict) and options.get("include_usage") is True)


def _spelled(tail: str, translation: Translation) -> dict[str, Translation]:
    """For all the ways to write it that reach the same place."""
    return {f"{start}{tail}{end}": translation for start in ("v1/", "") for end in ("", "/")}


NEEDED: dict[BackendFormat | None, dict[str, Translation]] = {
    None: {},
    "ANTHROPIC_MESSAGES": _spelled(
        "chat/completions",
        Translation(MESSAGES, _ask_messages, completion_of, error_of_chat, _chat_stream, _NOT_READ | _OPENAIS),
    ),
    "OPENAI_CHAT": _spelled(
        "messages",
        Translation(
            "v1/chat/completions",
            _ask_chat,
            lambda completion, _: message_of(completion),
            error_of_messages,
            lambda _, __: MessageStream(),
            _NOT_READ | _ANTHROPICS,
        ),
    )
    | _spelled(
        "messages/count_tokens",
        Translation(
            "tokenize",
            lambda messages, _: Asked(to_tokenize(messages)),
            lambda tokenized, _: token_count_of(tokenized),
            error_of_messages,
            lambda _, __: MessageStream(),
            _NOT_READ | _ANTHROPICS,
            may_be_absent=True,
        ),
    ),
}
"""The one format that a target speaks -> path -> what a request to it is translated to; not there: it is understood."""

"""What is said over the wire, as values: requests, replies, and the errors that replies stand for. No I/O here.

A *flow* is a generator that yields requests (and pauses) and is sent the decoded replies. One flow serves the
blocking and the async client: each of them only has to perform single steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from msgspec import Struct

from nimhost.errors import ERROR_HEADER, BadRequest, InvalidRequest, NimhostError, Problem, UpstreamError, from_reply

T = TypeVar("T")


class Record(dict[str, Any]):
    """A JSON object of the daemon's, as it came: `deployment["status"]` and `deployment.status` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no '{name}' in this {type(self).__name__}") from None


class Request(Struct, frozen=True, kw_only=True):
    """One request. `body` is sent as JSON; `upload` is the path of a local file that is sent instead, and `on_sent` is
    told how many of its bytes are on their way.

    `quiet_s`: how long the reply may say nothing before that is a timeout; None: as the client is set.
    """

    path: str
    method: str = "GET"
    query: dict[str, str] = {}
    body: Any = None
    upload: str | None = None
    on_sent: Callable[[int], None] | None = None
    quiet_s: float | None = None


class Pause(Struct, frozen=True):
    duration_s: float


Step = Request | Pause
Flow = Generator[Step, Any, T]


class Done(Struct, frozen=True):
    value: Any


def begin(flow: Flow[Any]) -> Step | Done:
    """The first step of a flow, or its result if it has none."""
    return advance(flow, None)


def advance(flow: Flow[Any], outcome: Any) -> Step | Done:
    """The step after `outcome`: what the last one returned, or the NimhostError that it ended in."""
    try:
        return flow.throw(outcome) if isinstance(outcome, NimhostError) else flow.send(outcome)
    except StopIteration as stop:
        return Done(stop.value)


def segment(text: str) -> str:
    """`text` as one segment of a path. Raises BadRequest for bytes of a command line or file name that are no text."""
    try:
        return quote(text, safe="")
    except UnicodeEncodeError:
        raise BadRequest(f"'{text}' is not text in UTF-8.") from None


def decode(status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """The JSON of a successful reply (None for an empty one). Raises what a failed one stands for."""
    if status >= 300:
        raise error_from(status, headers, body)
    if not body:
        return None
    try:
        return json.loads(body, object_hook=Record)
    except ValueError:
        raise UpstreamError(
            f"The answer is not JSON but {headers.get('content-type', 'unnamed')}.",
            "Is it another server that listens there? Check --base-url or NIMHOST_BASE_URL.",
        ) from None


def error_from(status: int, headers: Mapping[str, str], body: bytes) -> NimhostError:
    """The error that a failed reply stands for: same class, message and hint as in the daemon."""
    found = _parse(body)
    name = headers.get(ERROR_HEADER)
    inner = found.get("error")
    detail = found.get("detail") or (inner.get("message") if isinstance(inner, dict) else inner) or found.get("message")
    hint = found.get("hint") or (inner.get("hint") if isinstance(inner, dict) else None)
    error = from_reply(status, name, _sentence(detail) or f"The server answered {status} without a reason.", hint)
    if not detail and name is None:
        error.hint = "Is it nimhost that listens there? Check --base-url or NIMHOST_BASE_URL."
    if isinstance(error, InvalidRequest) and isinstance(detail, list):
        error.problems = tuple(_problem(item) for item in detail if isinstance(item, dict))
    retry_after = headers.get("retry-after", "")
    if hasattr(error, "retry_after_s") and retry_after.isdigit():
        error.retry_after_s = int(retry_after)
    return error


def _parse(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _sentence(detail: object) -> str:
    """A `detail` as one line: the text itself, or each wrong field with what is wrong about it."""
    if not isinstance(detail, list):
        return str(detail or "")
    return "; ".join(_field(item) if isinstance(item, dict) else str(item) for item in detail)


def _field(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item.get("loc", ()) if part != "body")
    return f"{where}: {item.get('msg')}" if where else str(item.get("msg"))


def _problem(item: dict[str, Any]) -> Problem:
    return Problem(tuple(item.get("loc", ())), str(item.get("msg")), str(item.get("type")), item.get("input"))

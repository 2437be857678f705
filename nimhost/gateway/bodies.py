"""Request bodies, pure: read the model's name, replace it, merge extras; every other value keeps its bytes."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from nimhost.errors import BadRequest
from nimhost.gateway.routes import Route

JSON_NEEDED = "The body must be a JSON object; other bodies (audio, images, forms) go to the provider route."


class _Peek(Struct):
    model: str | UnsetType = UNSET


_peek = msgspec.json.Decoder(_Peek)
_members = msgspec.json.Decoder(dict[str, Raw])


def peek_model(body: bytes) -> str:
    """The `model` of a JSON body, reading nothing else of it. Raises BadRequest."""
    try:
        model = _peek.decode(body).model
    except msgspec.ValidationError as error:
        raise BadRequest(f"Could not extract model from openai request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Invalid request body: {error}", JSON_NEEDED) from None
    if model is UNSET:
        raise BadRequest("Could not extract model from openai request: 'model'", "Put a model's name into the body.")
    return model


def rewrite(body: bytes, route: Route, model: Raw | None) -> bytes:
    """The body with the route's extras merged in (shallow) and `model` replaced, where there is a new one.

    Raises BadRequest if the body is not a JSON object.
    """
    try:
        own = _members.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Invalid request body: {error}", JSON_NEEDED) from None
    merged = {**route.default_body, **own, **route.required_body} if route.merges else own
    if model is not None:
        merged["model"] = model
    return msgspec.json.encode(merged)


def merge_if_object(body: bytes, route: Route) -> bytes:
    """The body with the route's extras if it is a JSON object, as it came if it is anything else."""
    try:
        return rewrite(body, route, None)
    except BadRequest:
        return body

"""The list of models that OpenAI-compatible servers give. Pure. Anything may stand there: it comes from outside."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct


class ListedModel(Struct, frozen=True):
    id: str
    root: Any = None
    """vLLM: of an adapter, where it was loaded from."""
    parent: Any = None
    """vLLM: of an adapter, the model that it belongs to."""


class ModelPage(Struct, frozen=True):
    """`after`: the id that the next page begins after; None: there is none."""

    models: list[ListedModel]
    after: str | None = None


class _ModelList(Struct):
    data: list[ListedModel]
    has_more: Any = None
    last_id: Any = None


def read_model_page(body: bytes) -> ModelPage | None:
    """None for what is no such list, whatever it is: text that is not UTF-8, or nested without end, too."""
    try:
        found = msgspec.json.decode(body, type=_ModelList)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if found.has_more is not True or not found.data:
        return ModelPage(found.data)
    return ModelPage(found.data, found.last_id if isinstance(found.last_id, str) else found.data[-1].id)


def read_model_list(body: bytes) -> list[ListedModel] | None:
    """Of a server that lists all it has at once. None for what is no such list."""
    page = read_model_page(body)
    return None if page is None else page.models

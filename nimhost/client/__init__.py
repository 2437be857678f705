"""The Python library: `Client` and `AsyncClient` speak the wire of a nimhost daemon.

Both are imported when first used, so that what only needs the client's settings does not load an HTTP library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nimhost.errors import Unreachable

if TYPE_CHECKING:
    from nimhost.client.http import AsyncClient, Client
    from nimhost.client.wire import Record

__all__ = ["AsyncClient", "Client", "Record", "Unreachable"]

_HOME = {"AsyncClient": "http", "Client": "http", "Record": "wire"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Run NVIDIA NIM and vLLM on your own GPUs behind one OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nimhost.client import AsyncClient as AsyncClient
    from nimhost.client import Client as Client
    from nimhost.errors import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`nimhost.Client`, `nimhost.AsyncClient` and every error (`nimhost.NotFound`), imported when first used."""
    home = "nimhost.client" if name in ("Client", "AsyncClient") else "nimhost.errors"
    found = getattr(importlib.import_module(home), name, None) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module 'nimhost' has no attribute {name!r}")
    return found

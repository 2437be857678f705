"""Waiting for something to become true, instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")
PAUSE_S = 0.01


@overload
async def eventually(fn: Callable[..., Awaitable[T | None]], timeout_s: float = 5.0) -> T: ...
@overload
async def eventually(fn: Callable[..., T | None], timeout_s: float = 5.0) -> T: ...
async def eventually(fn: Callable[..., Any], timeout_s: float = 5.0) -> Any:
    """The first true value of `fn` (plain or async). An assertion that fails in it means "not yet", and is shown."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason: AssertionError | None = None
        try:
            found = fn()
            value = await found if inspect.isawaitable(found) else found
            if value:
                return value
        except AssertionError as error:
            reason = error
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout_s} s: {inspect.getsource(fn).strip()}") from reason
        await asyncio.sleep(PAUSE_S)


def wait_until(fn: Callable[..., T | None], timeout_s: float = 5.0) -> T:
    """The same without a loop."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason: AssertionError | None = None
        try:
            if value := fn():
                return value
        except AssertionError as error:
            reason = error
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout_s} s: {inspect.getsource(fn).strip()}") from reason
        time.sleep(PAUSE_S)

"""Waiting for something to become true, instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PAUSE_S = 0.01


async def eventually(fn: Callable[[], T | Awaitable[T]], timeout_s: float = 5.0) -> T:
    """The first true value of `fn` (plain or async). An assertion that fails in it means "not yet", and is shown."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason: AssertionError | None = None
        try:
            found = fn()
            value: T = await found if inspect.isawaitable(found) else found  # type: ignore[assignment]
            if value:
                return value
        except AssertionError as error:
            reason = error
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout_s} s: {inspect.getsource(fn).strip()}") from reason
        await asyncio.sleep(PAUSE_S)


def wait_until(fn: Callable[[], T], timeout_s: float = 5.0) -> T:
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

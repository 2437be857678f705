"""Blocking calls off the loop, in threads that keep nobody waiting: not at a cancellation, not at the exit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[..., T], *args: object) -> T:
    """What `call` returns or raises. When we are cancelled it is left to end by itself, and so at the exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[T], None] | Callable[[BaseException], None], outcome: object) -> None:
        if not done.done():
            settle(outcome)  # type: ignore[arg-type]

    def run() -> None:
        settle: Callable[[T], None] | Callable[[BaseException], None]
        outcome: object
        try:
            settle, outcome = done.set_result, call(*args)
        except BaseException as error:  # noqa: BLE001  it is raised again where it is waited for
            settle, outcome = done.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, settle, outcome)

    threading.Thread(target=run, daemon=True).start()
    return await done

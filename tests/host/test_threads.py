"""Threads for calls that block: no more than there may be, and none that the exit waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from functools import partial

import pytest

from nimhost.host.threads import Threads


async def test_calls_share_the_threads_and_each_gets_its_own_answer() -> None:
    pool = Threads(3, "shared")
    found = await asyncio.gather(*(asyncio.wrap_future(pool.submit(partial(pow, n, 2))) for n in range(200)))
    assert found == [n * n for n in range(200)]
    assert 1 <= len(_named("shared")) <= 3
    pool.close()


async def test_what_a_call_raises_is_raised_where_it_is_waited_for_and_the_thread_goes_on() -> None:
    pool = Threads(1, "raising")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(pool.submit(lambda: 1 / 0))
    assert await asyncio.wrap_future(pool.submit(lambda: 7)) == 7
    pool.close()


def test_a_call_that_hangs_holds_up_no_other_while_there_is_a_thread() -> None:
    pool, held = Threads(2, "held"), threading.Event()
    hangs = pool.submit(held.wait)
    assert [pool.submit(partial(pow, n, 1)).result(5) for n in range(10)] == list(range(10))
    again, never = pool.submit(held.wait), pool.submit(lambda: "too late")
    assert never.cancel()
    held.set()
    assert (hangs.result(5), again.result(5)) == (True, True)
    pool.close()
    for thread in _named("held"):
        thread.join(5)
    assert _named("held") == []


def test_a_call_that_hangs_does_not_hold_up_the_exit() -> None:
    program = """
import threading
from nimhost.host.threads import Threads
pool = Threads(1, "hung")
pool.submit(threading.Event().wait)
pool.submit(print)
pool.close()
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0


def _named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]

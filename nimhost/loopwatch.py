"""A debugging aid: how long the event loop stood still, and in which line. `NIMHOST_DEBUG=1 nimhost serve` turns it on.

A beat on the loop every few milliseconds, and a thread that looks when the last one was: a beat that is late is a
callback that runs, and the thread sees where.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)
BEAT_S = 0.002
VARIABLE = "NIMHOST_DEBUG"
_OURS = f"{os.path.dirname(__file__)}/"


@contextmanager
def watching() -> Iterator[None]:
    """Watches the running loop when `NIMHOST_DEBUG` is set: says when it stood longer still than before, and the most
    at the end. SIGUSR2: say it now, and begin anew.
    """
    if not os.environ.get(VARIABLE):
        yield
        return
    watch = LoopWatch()
    watch.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, watch.begin_anew)
    try:
        yield
    finally:
        watch.stop()
        log.info("%s", watch.report())


class LoopWatch:
    """Between `start` and `stop`. `longest_s` is the longest pause so far, `where` the stack in it, innermost last.

    A machine that is busy with something else makes pauses too; `longest_cpu_s` has only what the loop itself did.
    """

    def __init__(self, limit_s: float = 0.01) -> None:
        self.limit_s = limit_s
        """Shorter pauses are nobody's concern."""
        self.longest_s = 0.0
        self.longest_cpu_s = 0.0
        """The most CPU time that went by between two beats."""
        self.where: tuple[str, ...] = ()
        self.pauses = 0
        self._beat_at = time.perf_counter()
        self._cpu_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loop watch", daemon=True)
        self._seen: tuple[str, ...] = ()
        self._loop_thread = 0

    def start(self) -> None:
        """On the loop that is to be watched."""
        self._loop_thread = threading.get_ident()
        self._beat_at, self._cpu_s = time.perf_counter(), time.thread_time()
        self._schedule()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._beat is not None:
            self._beat.cancel()
        self._thread.join()

    def begin_anew(self) -> None:
        log.info("%s", self.report())
        self.longest_s = self.longest_cpu_s = 0.0
        self.pauses, self.where = 0, ()

    def report(self) -> str:
        ours = [frame for frame in self.where if _OURS in frame]
        last = " < ".join([*self.where[-1:], *ours[-1:]]) or "nowhere"
        return (
            f"the loop stood still {self.pauses} times, at most {self.longest_s * 1000:.1f} ms, in {last};"
            f" at most {self.longest_cpu_s * 1000:.1f} ms of CPU time at once"
        )

    def _schedule(self) -> None:
        self._beat = asyncio.get_running_loop().call_later(BEAT_S, self._on_beat)

    def _on_beat(self) -> None:
        now, cpu_s = time.perf_counter(), time.thread_time()
        self.longest_cpu_s = max(self.longest_cpu_s, cpu_s - self._cpu_s)
        late_s = now - self._beat_at - BEAT_S
        if late_s > self.limit_s:
            self.pauses += 1
            if late_s > self.longest_s:
                self.longest_s, self.where = late_s, self._seen
                log.warning("%s", self.report())
        self._beat_at, self._cpu_s, self._seen = now, cpu_s, ()
        self._schedule()

    def _look(self) -> None:
        """In the thread: what is the loop doing, while a beat is late?"""
        while not self._ended.wait(BEAT_S):
            if not self._seen and time.perf_counter() - self._beat_at > self.limit_s:
                frame = sys._current_frames().get(self._loop_thread)
                self._seen = _stack(frame)


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=40)
    return tuple(f"{line.filename}:{line.lineno} {line.name}" for line in reversed(summary))

"""The daemon's stdout and stderr. Whoever reads them may be slow, may have stopped (Ctrl-S, a pager) or may be gone:
that holds up nobody."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
from contextlib import suppress

STDOUT, STDERR = 1, 2
WAITING_LINES = 10_000
"""So many wait for a reader; more are dropped, and counted."""
FLUSH_S = 1.0
"""How long the exit waits for the reader."""


def fill_streams() -> None:
    """Opens /dev/null for each standard stream that was closed: else the next file that is opened, such as the
    database, gets its number, and with it what others print. The loop's library even aborts."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(STDOUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(STDERR, "w", closefd=False)


class Lines:
    """Written to a file descriptor in order, by a thread of its own. `put` never waits, and never fails."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: queue.Queue[str] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name=f"writing to {fd}", daemon=True).start()
        atexit.register(self.flush)

    def put(self, line: str) -> None:
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Returns when all is written, or after FLUSH_S."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, FLUSH_S)

    def _write(self) -> None:
        while True:
            rest = f"{self._waiting.get()}\n"
            if self._dropped:
                rest += f"({self._dropped} lines were dropped: nobody read them in time)\n"
                self._dropped = 0
            # Not by sys.stderr: a thread that hangs in it with its lock makes the interpreter abort at the exit.
            data = rest.encode(errors="backslashreplace")
            with suppress(OSError):  # nobody is there any more to read it
                while data:
                    data = data[os.write(self._fd, data) :]
            self._waiting.task_done()


class Log(logging.Handler):
    """The log, as lines on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines(STDERR)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(self.format(record))

"""A program in a pseudo-terminal: what it shows, what is typed, how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading

from tests.support import wait_until

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by what runs in the background of a script, and inherited


class Terminal:
    def __init__(self, command: list[str], columns: int = 100) -> None:
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
        self._process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True, close_fds=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(side)
        self.raw = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how a terminal whose other side is closed reads
            while data := os.read(self._main, 65536):
                self.raw += data.decode(errors="replace")

    @property
    def text(self) -> str:
        """All that was shown, without colours and cursor movements."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def see(self, text: str, timeout_s: float = 20.0) -> None:
        def shown() -> bool:
            assert text in self.text, self.text
            return True

        wait_until(shown, timeout_s)

    def see_prompt(self, number: int) -> None:
        """The prompt of that number waits for a line: only then does Ctrl-D mean its end."""

        def shown() -> bool:
            assert self.text.count("> ") == number, self.text
            return True

        wait_until(shown, 20)

    def type(self, text: str) -> None:
        """`\\x03` is Ctrl-C, `\\x04` Ctrl-D."""
        os.write(self._main, text.encode())

    def exit_code(self, timeout_s: float = 20.0) -> int:
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        os.close(self._main)

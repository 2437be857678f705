"""What runs in the containers of these tests; its first argument says what to do."""

import http.server
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO


def say(text: str, file: TextIO = sys.stdout) -> None:
    print(text, file=file, flush=True)


def serve() -> None:
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 8000), http.server.SimpleHTTPRequestHandler)
    say("serving")
    server.serve_forever()


def fail(code: str) -> None:
    say("a word on stdout")
    say("the cause on stderr \u00e9", sys.stderr)
    sys.stdout.buffer.write(b"\xff not UTF-8\n")
    sys.exit(int(code))


def talk() -> None:
    say("first")
    threading.Event().wait(0.2)
    say("second")


def ignore_stop() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("ready")
    time.sleep(600)


def quiet() -> None:
    time.sleep(600)


PROGRAMS: dict[str, Callable[..., None]] = {
    "serve": serve, "fail": fail, "talk": talk, "ignore-stop": ignore_stop, "quiet": quiet,
}  # fmt: skip
what, *arguments = sys.argv[1:]
PROGRAMS[what](*arguments)

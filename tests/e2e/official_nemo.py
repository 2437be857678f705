"""The official CLI without its two seconds of imports: it is imported once, and each command is a fork of that.

A program for the interpreter that has the CLI (`serve SOCKET`), and for the command that takes its place
(`run SOCKET ARGUMENTS...`), which hands over its arguments, environment, directory and three streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable

SIZE = 1 << 20


def serve(path: str) -> None:
    from nemo_platform.cli.app import cli  # type: ignore[import-not-found]

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: each tells its exit code itself
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen(16)
        os.rename(f"{path}.new", path)  # it is there when it can be connected to
        while True:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    answer(connection, cli)


def answer(connection: socket.socket, cli: Callable[[], object]) -> None:
    """In the fork: be that command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, SIZE, 3)
    given = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(given["directory"])
    os.environ.clear()
    os.environ.update(given["env"])
    sys.argv = ["nemo", *given["arguments"]]
    code: object = 1
    try:
        cli()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        connection.sendall(str(code if isinstance(code, int) else int(code is not None)).encode())
        os._exit(0)


def run(path: str, arguments: list[str]) -> int:
    given = {"arguments": arguments, "env": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(given).encode()], [0, 1, 2])
        return int(connection.recv(100) or 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(run(sys.argv[2], sys.argv[3:]))

"""What a failure means for the next attempt. Pure."""

from __future__ import annotations

import re

from msgspec import Struct
from msgspec.structs import replace

from nimhost.entities import Failure, Run
from nimhost.errors import DiskFull, NimhostError

MESSAGE_LIMIT = 1000
"""Clients of the reference accept no longer status message."""
STEADY_S = 600.0
"""An engine that served this long starts counting its failures anew when it breaks."""
BACKOFF_MAX_S = 300.0


class Limits(Struct, frozen=True, kw_only=True):
    """How patient to be: `[deployments]` of the settings."""

    start_timeout_s: float
    start_limit: int
    restart_limit: int
    restart_backoff_s: float
    unhealthy_restart_s: float


def after_error(run: Run, error: NimhostError, now: float, limits: Limits) -> Run:
    """An effect failed: final when trying again cannot help, else again after a backoff, a limited number of times.

    A full disk is waited for without a limit: somebody will make room.
    """
    attempts = run.attempts + 1
    final = error.final or (attempts >= limits.restart_limit and not isinstance(error, DiskFull))
    message = error.message if error.hint is None else f"{error.message}\n{error.hint}"
    return _failed(run, message, final, attempts, now, limits, getattr(error, "retry_after_s", None))


def after_exit(
    run: Run, *, container: str, exit_code: int | None, oom_killed: bool, log_tail: str, now: float, limits: Limits
) -> Run:
    """A container went away unasked: any exit is a crash, code 0 too.

    Final when the limit is reached, or when the same arguments are known to fail again.
    """
    was_ready = run.ready_container == container
    steady = was_ready and now - run.ready_at > STEADY_S
    attempts = 1 if steady else run.attempts + 1
    limit = limits.restart_limit if was_ready else limits.start_limit
    cause = _known_cause(exit_code, oom_killed, log_tail, was_ready)
    what = f"Container exited with code {exit_code}." if exit_code is not None else "Container is gone."
    message = f"{what} {cause}" if cause else what
    if lines := salient(log_tail):
        message = f"{message}\n\nLast log lines:\n{lines}"
    run = replace(run, exited_container=container)
    return _failed(run, message, cause is not None or attempts >= limit, attempts, now, limits)


def _failed(
    run: Run, message: str, final: bool, attempts: int, now: float, limits: Limits, retry_after_s: float | None = None
) -> Run:
    backoff = min(BACKOFF_MAX_S, limits.restart_backoff_s * 2 ** min(attempts - 1, 20))
    return replace(
        run,
        attempts=attempts,
        retry_at=now + max(backoff, retry_after_s or 0.0),
        failure=Failure(message=message[:MESSAGE_LIMIT], final=final),
        waiting_since=0.0,
    )


def _known_cause(exit_code: int | None, oom_killed: bool, log_tail: str, was_ready: bool) -> str | None:
    """A sentence for exits that the same arguments would only repeat."""
    if oom_killed:
        return "The machine ran out of memory."
    if re.search(r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|No available memory for the cache", log_tail):
        return "The GPU memory did not suffice. Give it more GPUs, or a smaller --max-model-len."
    if exit_code == 2 and not was_ready and "usage:" in log_tail:
        return "The engine does not accept these arguments."
    return None


_CAUSE = re.compile(r"error|exception|failed|fatal|not found|denied", re.IGNORECASE)
_NOISE = re.compile(r"root cause above|^\s*(File \"|~*\^+~*$)", re.IGNORECASE)


def salient(log: str, size: int = 800) -> str:
    """The lines of a log that tell why: its end, and where that is only a traceback's, the last line naming an error.

    vLLM prints the cause above the last lines ("See root cause above").
    """
    lines = [line.rstrip()[:300] for line in log.splitlines() if line.strip()]
    tail = lines[-6:]
    causes = [line for line in lines[:-6] if _CAUSE.search(line) and not _NOISE.search(line)][-2:]
    while len("\n".join(causes + tail)) > size:
        tail.pop(0)
    return "\n".join(causes + tail)

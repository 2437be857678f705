"""What a failure means for the next attempt. Pure."""

from __future__ import annotations

import re

from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.oom import shortage
from nimhost.errors import DiskFull, NimhostError
from nimhost.runs import Failure, Run

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
    drain_timeout_s: float


def after_error(run: Run, error: NimhostError, now: float, limits: Limits, fetching: bool = False) -> Run:
    """An effect failed: final when trying again cannot help, else again after a backoff, a limited number of times.

    `fetching`: it was to bring image and weights. A full disk is waited for without a limit: somebody will make room.
    Until then nothing is pulled to fill it again.
    """
    if isinstance(error, DiskFull):
        run = _paused(run, error.in_full, now, limits)  # in one line, as all that is waited for
    else:
        message = error.message if error.hint is None else f"{error.message}\n{error.hint}"
        attempts = run.attempts + 1
        final = error.final or attempts >= limits.restart_limit
        run = _failed(run, message, final, attempts, now, limits, getattr(error, "retry_after_s", None))
    assert run.failure is not None
    return replace(run, failure=replace(run.failure, fetching=fetching))


def after_fetching(run: Run, image: bool) -> Run:
    """All is here. What did not come until now is not held against the engine. `image`: that had to be fetched, and may
    be another one under the same name: what the wish became is decided again."""
    if run.failure is not None and run.failure.fetching:
        run = replace(run, attempts=0, failure=None, retry_at=0.0)
    return replace(run, image_id=None, resolved=None) if image else run


def _paused(run: Run, message: str, now: float, limits: Limits) -> Run:
    """Twice as long as the last time. It is no failed attempt, and so brings no later one to the limit."""
    last_s = run.retry_at - run.failure.full_at if run.failure and run.failure.full_at else 0.0
    pause_s = min(BACKOFF_MAX_S, max(limits.restart_backoff_s, 2 * last_s))
    failure = Failure(message=message[:MESSAGE_LIMIT], final=False, full_at=now)
    return replace(run, retry_at=now + pause_s, failure=failure, waiting_since=0.0, pulling=False)


def after_exit(
    run: Run,
    *,
    container: str,
    exit_code: int | None,
    oom_killed: bool,
    log_tail: str,
    now: float,
    limits: Limits,
    more_memory: str = "",
    what: str = "Container is gone.",
) -> Run:
    """A container went away unasked: any exit is a crash, code 0 too. `what`: what happened, where it did not exit.

    Final when the limit is reached, or when the same arguments are known to fail again. `more_memory`: what would
    give it more GPU memory, for a log that tells only that there was too little.
    """
    was_ready = run.ready_container == container
    steady = was_ready and now - run.ready_at > STEADY_S
    attempts = 1 if steady else run.attempts + 1
    limit = limits.restart_limit if was_ready else limits.start_limit
    cause, final = _known_cause(exit_code, oom_killed, log_tail, was_ready, more_memory)
    what = f"Container exited with code {exit_code}." if exit_code is not None else what
    message = f"{what} {cause}" if cause else what
    if lines := salient(log_tail):
        message = f"{message}\n\nLast log lines:\n{lines}"
    run = replace(run, exited_container=container, container=None)
    return _failed(run, message, final or attempts >= limit, attempts, now, limits)


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


def _known_cause(
    exit_code: int | None, oom_killed: bool, log_tail: str, was_ready: bool, more_memory: str
) -> tuple[str | None, bool]:
    """(a sentence for an exit that is understood, whether the same arguments would only repeat it)."""
    if oom_killed:
        return "The machine ran out of memory.", True
    if found := shortage(log_tail, more_memory):
        return found.message, found.final
    if lost_gpu(log_tail):
        return LOST_GPU, False
    if exit_code == 2 and not was_ready and "usage:" in log_tail:
        return "The engine does not accept these arguments.", True
    return None, False


LOST_GPU = (
    "The container lost its GPU, which happens when the host reloads its units (systemctl daemon-reload); "
    "a new container has it again."
)
_LOST = re.compile(r"Failed to initialize NVML: Unknown Error|no CUDA-capable device is detected|CUDA error: unknown")


def lost_gpu(log_tail: str) -> bool:
    """Whether a container says that its GPU went away (https://github.com/NVIDIA/nvidia-docker/issues/1730)."""
    return bool(_LOST.search(log_tail))


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

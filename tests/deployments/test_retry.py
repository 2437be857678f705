from __future__ import annotations

import pytest
from msgspec.structs import replace

from nimhost.deployments.retry import BACKOFF_MAX_S, MESSAGE_LIMIT, after_error, after_exit, after_fetching, salient
from nimhost.errors import (
    DiskFull,
    DockerError,
    HubUnavailable,
    ImageNotFound,
    NimhostError,
    RegistryDenied,
    WeightsGated,
)
from nimhost.runs import Run
from tests.deployments.make import LIMITS, NOW


@pytest.mark.fault(2)
@pytest.mark.parametrize("error", [ImageNotFound("no image"), RegistryDenied("no"), WeightsGated("gated")])
def test_what_cannot_work_is_not_tried_again(error: NimhostError) -> None:
    failure = after_error(Run(), error, NOW, LIMITS).failure
    assert failure is not None
    assert failure.final


def test_the_hint_is_part_of_what_the_user_sees() -> None:
    failure = after_error(Run(), ImageNotFound("No image x.", "Try y."), NOW, LIMITS).failure
    assert failure is not None
    assert failure.message == "No image x.\nTry y."


@pytest.mark.fault(14)
def test_a_busy_hub_is_tried_again_when_it_says() -> None:
    run = after_error(Run(), HubUnavailable("429", retry_after_s=77), NOW, LIMITS)
    assert (run.retry_at, run.failure and run.failure.final) == (NOW + 77, False)


def test_backoff_doubles_up_to_a_ceiling_and_ends() -> None:
    run, pauses, finals = Run(), [], []
    for _ in range(LIMITS.restart_limit):
        run = after_error(run, HubUnavailable("down"), NOW, LIMITS)
        pauses.append(run.retry_at - NOW)
        finals.append(run.failure is not None and run.failure.final)
    assert pauses == [2, 4, 8, 16, 32]
    assert finals == [False] * 4 + [True]


@pytest.mark.fault(17)
def test_a_full_disk_is_waited_for_without_a_limit() -> None:
    run, pauses = Run(attempts=LIMITS.restart_limit), []
    for _ in range(10):
        run = after_error(run, DiskFull("full"), NOW, LIMITS)
        assert run.failure is not None
        assert not run.failure.final
        pauses.append(run.retry_at - NOW)
    assert pauses[:3] == [2, 4, 8]
    assert pauses[-1] == BACKOFF_MAX_S


@pytest.mark.fault(17)
def test_what_was_waited_for_on_a_full_disk_counts_for_nothing_else() -> None:
    run = Run()
    for _ in range(10):
        run = after_error(run, DiskFull("full"), NOW, LIMITS)
    hub = after_error(run, HubUnavailable("down"), NOW, LIMITS)
    assert (hub.attempts, hub.failure and hub.failure.final) == (1, False)
    served = replace(run, failure=None, retry_at=0.0)
    crash = after_exit(served, container="c", exit_code=1, oom_killed=False, log_tail="", now=NOW, limits=LIMITS)
    assert (crash.attempts, crash.failure and crash.failure.final) == (1, False)


def exited(log: str, code: int = 1, oom: bool = False, ready: bool = False) -> Run:
    run = Run(ready_container="c" if ready else None, ready_at=NOW)
    return after_exit(run, container="c", exit_code=code, oom_killed=oom, log_tail=log, now=NOW, limits=LIMITS)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("log", "code", "oom", "says"),
    [
        ("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried", 1, False, "The GPU memory did not suffice"),
        ("killed", 137, True, "ran out of memory"),
        ("usage: vllm serve\nvllm: error: unrecognized arguments: --bogus", 2, False, "does not accept"),
    ],
)
def test_an_exit_that_would_only_repeat_is_final(log: str, code: int, oom: bool, says: str) -> None:
    failure = exited(log, code, oom).failure
    assert failure is not None
    assert failure.final
    assert says in failure.message


def test_an_ordinary_crash_is_not_final() -> None:
    failure = exited("segfault", 139).failure
    assert failure is not None
    assert not failure.final


def test_the_cause_above_the_last_lines_is_kept() -> None:
    log = "\n".join(["start", "ValueError: the real cause", *["  at frame"] * 20, "RuntimeError: see root cause above"])
    assert "ValueError: the real cause" in salient(log)
    assert salient(log).endswith("see root cause above")


def test_messages_fit_what_clients_accept() -> None:
    failure = exited("\n".join("error " + "x" * 500 for _ in range(50))).failure
    assert failure is not None
    assert len(failure.message) <= MESSAGE_LIMIT


@pytest.mark.fault(2)
def test_what_is_here_at_last_clears_what_it_cost_and_no_failure_of_an_engine() -> None:
    fetched = after_fetching(after_error(Run(), HubUnavailable("down"), NOW, LIMITS, fetching=True), image=False)
    assert fetched == Run()
    crashed = exited("boom")
    assert after_fetching(crashed, image=True) == crashed
    refused = after_error(Run(), DockerError("no such device"), NOW, LIMITS)
    assert after_fetching(refused, image=True) == refused

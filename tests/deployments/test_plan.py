"""Each rule of the plan, and its laws, as situations."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Cancel, Forget, Halt, Prepare, Remove, Start
from nimhost.deployments.observed import Instance
from nimhost.deployments.plan import orphans, plan
from nimhost.deployments.retry import MESSAGE_LIMIT
from nimhost.refs import Ref
from nimhost.runs import Failure, Run
from tests.deployments.make import HASH, LIMITS, NOW, again, decide, gpus, instance, machine, wanted

REF = Ref("default", "d")


def run(**fields: Any) -> Run:
    return Run(spec_hash=HASH, **fields)


# --- rule 1


def test_an_action_in_flight_is_waited_for() -> None:
    verdict = decide(wanted(), machine(), Start(("GPU-0",), HASH))
    assert (verdict.action, verdict.status) == (None, "PENDING")


@pytest.mark.parametrize("wish", [{"deleting": True}, {"desired": "stopped"}])
def test_a_download_nobody_wants_any_more_is_cancelled(wish: dict[str, Any]) -> None:
    verdict = decide(wanted(**wish), machine(), Prepare(True, True, HASH))
    assert verdict.action == Cancel()


def test_a_download_for_another_wish_is_cancelled() -> None:
    assert decide(wanted(), machine(), Prepare(True, True, "old-hash")).action == Cancel()


def test_a_deletion_stays_visible_while_a_start_is_in_flight() -> None:
    verdict = decide(wanted(deleting=True, status="DELETING"), machine(), Start((), HASH))
    assert (verdict.status, verdict.action) == ("DELETING", None)


# --- rules 2 and 3


def test_a_deletion_removes_containers_of_every_version_then_the_rows() -> None:
    d = wanted(deleting=True)
    both = machine(instance(), instance(id="old", hash="other"))
    assert decide(d, both).action == Remove(("container-d", "old"))
    assert decide(d, machine()).action == Forget()


def test_an_engine_that_is_still_loading_is_not_waited_for_when_it_is_deleted() -> None:
    verdict = decide(wanted(deleting=True), machine(instance(health="starting")))
    assert verdict.action == Remove(("container-d",), at_once=True)


def test_a_deployment_that_never_started_can_be_deleted_without_docker() -> None:
    away = machine(docker_problem="Docker is away.")
    assert decide(wanted(deleting=True), away).action == Forget()
    started = decide(wanted(deleting=True, run=run(started_at=NOW)), away)
    assert (started.status, started.action) == ("DELETING", None)
    assert "Docker is away." in started.message


def test_a_stopped_deployment_frees_its_container_and_forgets_its_failures() -> None:
    verdict = decide(wanted(desired="stopped", run=run(attempts=2, failure=Failure(message="x", final=True))),
                     machine(instance()))  # fmt: skip
    assert (verdict.action, verdict.message) == (Remove(("container-d",)), "Stopping.")
    assert decide(wanted(desired="stopped"), machine()).message == "Stopped. Start it with: nimhost start d"
    assert (verdict.status, verdict.run.failure, verdict.run.attempts) == ("PENDING", None, 0)


# --- law: no container list, no decision


@pytest.mark.fault(21)
def test_without_docker_the_status_is_unknown_and_nothing_is_done() -> None:
    verdict = decide(wanted(status="READY"), machine(docker_problem="Docker cannot be reached."))
    assert (verdict.status, verdict.message, verdict.action) == ("UNKNOWN", "Docker cannot be reached.", None)
    assert verdict.instance is None


# --- rule 5


def test_a_healthy_engine_is_ready_and_remembered() -> None:
    verdict = decide(wanted(), machine(instance()))
    assert (verdict.status, verdict.instance) == ("READY", instance())
    assert (verdict.run.ready_container, verdict.run.ready_at) == ("container-d", NOW)


def test_an_adopted_engine_has_traffic_before_its_first_probe() -> None:
    d = wanted(status="READY", run=run(ready_container="container-d"))
    verdict = decide(d, machine(instance(health="unknown")))
    assert verdict.status == "READY"
    assert verdict.instance is not None


def test_an_engine_never_seen_ready_is_not_trusted_before_its_first_probe() -> None:
    assert decide(wanted(), machine(instance(health="unknown"))).instance is None


def test_a_healthy_engine_needs_no_references() -> None:
    verdict = decide(wanted(problem="Model default/m does not exist."), machine(instance()))
    assert verdict.status == "READY"


# --- rules 6 and 7


@pytest.mark.fault(22)
def test_a_crash_is_counted_once_and_retried_after_a_backoff() -> None:
    d, dead = wanted(), machine(instance(state="exited", exit_code=1, log_tail="boom"))
    first = decide(d, dead)
    assert (first.status, first.run.attempts, first.action) == ("PENDING", 1, Remove(("container-d",), at_once=True))
    assert "exited with code 1" in first.message
    assert "boom" in first.message
    assert first.wake_at == NOW + LIMITS.restart_backoff_s
    d = again(d, first)
    assert decide(d, dead).run.attempts == 1  # the daemon was killed before the removal: not counted again
    waiting = decide(d, machine())
    assert (waiting.status, waiting.action, waiting.run.attempts) == ("PENDING", None, 1)
    assert isinstance(decide(d, machine(), now=NOW + 3).action, Start)


def test_a_long_story_leaves_room_for_when_it_is_tried_again() -> None:
    """Clients of the reference take no message of more than 1000 characters."""
    failure = Failure(message="x" * MESSAGE_LIMIT, final=False)
    verdict = decide(wanted(run=run(attempts=1, retry_at=NOW + 2, failure=failure)), machine())
    assert len(verdict.message) <= MESSAGE_LIMIT
    assert "Trying again at" in verdict.message
    told = decide(wanted(problem="x" * 2 * MESSAGE_LIMIT), machine())
    assert len(told.message) == MESSAGE_LIMIT


def test_an_exit_with_code_0_is_a_crash_too() -> None:
    verdict = decide(wanted(run=run(ready_container="container-d")), machine(instance(state="exited", exit_code=0)))
    assert verdict.run.attempts == 1


@pytest.mark.fault(22)
def test_a_crash_loop_ends_in_error_and_keeps_the_container_for_its_logs() -> None:
    d = wanted(run=run(attempts=LIMITS.start_limit - 1))
    verdict = decide(d, machine(instance(state="exited", exit_code=7, log_tail="cannot load model")))
    assert (verdict.status, verdict.action) == ("ERROR", None)
    assert "cannot load model" in verdict.message
    assert decide(again(d, verdict), machine(instance(state="exited", exit_code=7)), now=NOW + 9999).action is None


def test_an_engine_that_served_long_starts_counting_anew() -> None:
    d = wanted(run=run(attempts=4, ready_container="container-d", ready_at=NOW - 3600))
    assert decide(d, machine(instance(state="exited", exit_code=1))).run.attempts == 1


def test_another_wish_starts_with_a_clean_record() -> None:
    failed = Run(spec_hash="other", attempts=3, failure=Failure(message="no such image", final=True))
    assert isinstance(decide(wanted(run=failed), machine()).action, Start)


def test_a_final_failure_is_an_error_until_the_wish_changes() -> None:
    d = wanted(run=run(attempts=1, failure=Failure(message="Image x was not found.", final=True)))
    verdict = decide(d, machine(), now=NOW + 1e6)
    assert (verdict.status, verdict.message, verdict.action) == ("ERROR", "Image x was not found.", None)


@pytest.mark.fault(4)
@pytest.mark.parametrize(("health", "limit"), [("ok", LIMITS.restart_limit), ("starting", LIMITS.start_limit)])
def test_a_container_that_somebody_removed_is_a_crash_that_is_told(health: str, limit: int) -> None:
    d = again(wanted(), decide(wanted(), machine(instance(health=health))))
    first = decide(d, machine())
    assert (first.status, first.run.attempts, first.action) == ("PENDING", 1, None)
    assert first.message.startswith("Container container-d is gone: it was removed, and not by nimhost.")
    assert first.wake_at == NOW + LIMITS.restart_backoff_s
    d = again(d, first)
    assert decide(d, machine()).run.attempts == 1  # counted once
    assert isinstance(decide(d, machine(), now=NOW + 3).action, Start)
    often = again(d, replace(first, run=replace(d.run, attempts=limit - 1, container="container-d")))
    assert decide(often, machine(), now=NOW + 3).status == "ERROR"


@pytest.mark.fault(4)
def test_a_container_that_was_missed_once_is_not_missed_again_when_the_next_one_ends_at_once() -> None:
    missed = decide(again(wanted(), decide(wanted(), machine(instance()))), machine())
    ended = instance(id="next", state="exited", exit_code=1)
    crashed = decide(again(wanted(), missed), machine(ended), now=NOW + 3)
    assert (crashed.run.attempts, crashed.action) == (2, Remove(("next",), at_once=True))
    after = decide(again(wanted(), crashed), machine(), now=NOW + 60)
    assert isinstance(after.action, Start)
    assert after.run.attempts == 2


@pytest.mark.parametrize(
    ("wish", "there"),
    [
        ({"desired": "stopped"}, instance()),
        ({}, instance(state="exited", exit_code=1)),
        ({"status": "READY"}, instance(health="failing")),
    ],
)
def test_a_container_that_nimhost_removes_is_not_missed(wish: dict[str, Any], there: Instance) -> None:
    before = decide(wanted(), machine(instance())).run
    removing = decide(wanted(run=before, **wish), machine(there), now=NOW + 1e6)
    assert isinstance(removing.action, Remove)
    gone = decide(again(wanted(), removing), machine(), now=NOW + 2e6)
    assert isinstance(gone.action, Start)
    assert gone.run.attempts == removing.run.attempts


@pytest.mark.fault(20)
def test_a_container_left_between_create_and_start_is_removed() -> None:
    verdict = decide(wanted(), machine(instance(state="created", health="unknown")))
    assert verdict.action == Remove(("container-d",), at_once=True)
    assert verdict.run.attempts == 0


# --- rule 8


def test_a_loading_engine_is_pending() -> None:
    verdict = decide(wanted(), machine(instance(health="starting")))
    assert (verdict.status, verdict.action) == ("PENDING", None)
    assert verdict.wake_at == NOW - 10 + LIMITS.start_timeout_s


def test_an_engine_that_never_becomes_healthy_is_stopped_and_its_logs_are_kept() -> None:
    verdict = decide(wanted(), machine(instance(health="starting", started_at=NOW - 601)))
    assert (verdict.status, verdict.action) == ("ERROR", Halt("container-d"))
    assert "not ready 600 s after its start" in verdict.message
    stopped = machine(instance(state="exited", exit_code=137))
    assert decide(again(wanted(), verdict), stopped).message == verdict.message


@pytest.mark.fault(20)
def test_an_engine_that_became_ready_while_no_daemon_ran_is_not_too_late() -> None:
    """It started long ago, and has not been asked yet."""
    there = instance(health="unknown", started_at=NOW - 36_000)
    verdict = decide(wanted(), machine(there))
    assert (verdict.status, verdict.action) == ("PENDING", None)
    assert decide(again(wanted(), verdict), machine(replace(there, health=instance().health))).status == "READY"
    assert decide(wanted(), machine(replace(there, port=None))).action == Halt("container-d")


def test_an_engine_that_stops_answering_is_unrouted_then_replaced() -> None:
    d = wanted(status="READY", run=run(ready_container="container-d", ready_at=NOW))
    broken = instance(health="failing")
    broken = replace(broken, health=replace(broken.health, since=NOW))
    first = decide(d, machine(broken), now=NOW + 1)
    assert (first.status, first.instance, first.action) == ("PENDING", None, None)
    assert decide(d, machine(broken), now=NOW + 121).action == Remove(("container-d",))


def test_a_broken_engine_is_counted_once_however_often_its_removal_fails() -> None:
    d = wanted(status="READY", run=run(ready_container="container-d", ready_at=NOW))
    broken = instance(health="failing")
    broken = replace(broken, health=replace(broken.health, since=NOW))
    first = decide(d, machine(broken), now=NOW + 121)
    second = decide(again(d, first), machine(broken), now=NOW + 130)
    assert (first.run.attempts, second.run.attempts) == (1, 1)
    assert second.action == Remove(("container-d",))


def test_a_final_failure_never_leaves_an_engine_running() -> None:
    """The daemon was killed after it had written the failure and before it could stop the engine."""
    d = wanted(run=run(failure=Failure(message="too late", final=True)))
    verdict = decide(d, machine(instance(health="starting")))
    assert (verdict.status, verdict.action) == ("ERROR", Halt("container-d"))


# --- rules 9 to 11


def test_a_missing_reference_is_an_error_with_its_name() -> None:
    verdict = decide(wanted(problem="Deployment config 'c' does not exist."), machine())
    assert (verdict.status, verdict.message) == ("ERROR", "Deployment config 'c' does not exist.")


def test_more_gpus_than_the_machine_has_is_an_error() -> None:
    verdict = decide(wanted(gpus=3), machine(gpus=gpus(None, None)))
    assert verdict.status == "ERROR"
    assert "needs 3, there are 2" in verdict.message


@pytest.mark.parametrize(
    ("images", "located", "expected"),
    [
        ({}, {}, Prepare(True, True, HASH)),
        ({REF: "id"}, {}, Prepare(False, True, HASH)),
        ({}, {REF: "here"}, Prepare(True, False, HASH)),
    ],
)
def test_what_is_absent_is_prepared(images: object, located: object, expected: Prepare) -> None:
    assert decide(wanted(weights=True), machine(images=images, weights=located)).action == expected


# --- rules 12 and 13


def test_plan_waits_when_gpus_are_taken_and_names_the_holder() -> None:
    verdict = decide(wanted(gpus=2), machine(gpus=gpus("default/x", None)))
    assert (verdict.status, verdict.action) == ("PENDING", None)
    assert "needs 2, 1 free: GPU 0 is held by default/x" in verdict.message
    assert verdict.run.waiting_since == NOW


@pytest.mark.fault(7)
def test_two_deployments_never_get_the_same_gpu() -> None:
    first, second = plan([wanted("a", created=1), wanted("b", created=2)], machine(), {}, NOW, LIMITS)
    assert first.action == Start(("GPU-0",), HASH)
    assert second.action is None
    assert "GPU 0 is held by default/a" in second.message


@pytest.mark.fault(7)
def test_a_start_in_flight_holds_its_gpus() -> None:
    _, second = plan(
        [wanted("a", created=1), wanted("b", created=2)], machine(), {"id-a": Start(("GPU-0",), HASH)}, NOW, LIMITS
    )
    assert second.action is None


def test_who_began_to_wait_first_is_served_first_even_when_a_small_one_would_fit() -> None:
    big = wanted("a", gpus=2, created=5, run=run(waiting_since=NOW - 60))
    small = wanted("b", gpus=1, created=1)
    first, second = plan([small, big], machine(gpus=gpus("default/x", None)), {}, NOW, LIMITS)
    assert (first.desired.ref.name, first.action) == ("a", None)
    assert second.action is None
    assert "default/a waits ahead of it" in second.message


def test_who_cannot_start_at_all_keeps_nobody_waiting() -> None:
    big = wanted("a", gpus=2, created=1, run=run(waiting_since=NOW - 60))
    first, second = plan([big, wanted("b", created=2)], machine(gpus=gpus(None)), {}, NOW, LIMITS)
    assert (first.status, first.run.waiting_since) == ("ERROR", 0.0)
    assert second.action == Start(("GPU-0",), HASH)


@pytest.mark.parametrize("wish", [{"deleting": True}, {"desired": "stopped"}])
@pytest.mark.parametrize("in_flight", [True, False])
def test_who_leaves_keeps_no_place_in_the_queue_and_no_gpus(wish: dict[str, Any], in_flight: bool) -> None:
    """Its engine may take long to end, or not end at all; whoever comes before or after it in the queue."""
    leaving = wanted("d", gpus=2, run=run(waiting_since=5.0, kept_gpus=("GPU-1",), replaced_at=5.0), **wish)
    others = [wanted(name, created=9, run=run(waiting_since=since)) for name, since in (("a", 1.0), ("b", 0.0))]
    there = machine(instance(gpu_ids=("GPU-0",)), gpus=gpus("default/d", None, None))
    doing = {"id-d": Remove(("container-d",))} if in_flight else {}
    verdicts = {v.desired.ref.name: v for v in plan([leaving, *others], there, doing, NOW, LIMITS)}
    assert (verdicts["d"].run.waiting_since, verdicts["d"].run.kept_gpus) == (0.0, ())
    assert [verdicts[name].action for name in "ab"] == [Start(("GPU-1",), HASH), Start(("GPU-2",), HASH)]


def test_a_deployment_without_gpus_does_not_queue_for_them() -> None:
    _, second = plan(
        [wanted("a", gpus=1, run=run(waiting_since=1)), wanted("b", gpus=0)], machine(gpus=gpus("x")), {}, NOW, LIMITS
    )
    assert second.action == Start((), HASH)


def test_the_plan_is_the_same_whatever_order_the_rows_come_in() -> None:
    rows = [wanted(name, created=i) for i, name in enumerate("abcd")]
    forward = plan(rows, machine(gpus=gpus(None, None)), {}, NOW, LIMITS)
    backward = plan(rows[::-1], machine(gpus=gpus(None, None)), {}, NOW, LIMITS)
    assert forward == backward


# --- orphans


@pytest.mark.fault(4)
def test_a_container_of_ours_without_a_deployment_is_an_orphan() -> None:
    assert orphans([instance("a"), instance("b")], [wanted("a")]) == ["container-b"]

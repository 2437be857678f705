"""From one version of a deployment to the next: rule 4 of the plan, as situations."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Instance, Observed, Share
from nimhost.deployments.placement import reserved
from nimhost.deployments.plan import plan
from nimhost.deployments.publish import provider_status
from nimhost.deployments.routing import route_table
from nimhost.deployments.situation import Verdict
from nimhost.engines.order import ModelOrder
from nimhost.entities import Entity, Provider, ProviderStatus, ServedModel
from nimhost.models.memory import GIB
from nimhost.refs import Ref
from nimhost.runs import Failure, Run
from tests.deployments.make import (
    HASH,
    LIMITS,
    NOW,
    OLD,
    again,
    decide,
    gpus,
    instance,
    machine,
    rolling,
    wanted,
    was_ready,
)

FREE = gpus("default/d", None)
"""The old version on GPU 0, another GPU free."""
FULL = gpus("default/d")
FAILED = Failure(message="Container exited with code 3.", final=True)


def old(**fields: Any) -> Instance:
    values: dict[str, Any] = {"id": "old", "hash": OLD, "gpu_ids": ("GPU-0",), "port": 4001} | fields
    models = values.pop("models", ())
    found = instance(**values)
    return replace(found, health=replace(found.health, models=models))


def new(**fields: Any) -> Instance:
    values: dict[str, Any] = {"id": "new", "gpu_ids": ("GPU-1",)} | fields
    return instance(**values)


def run(**fields: Any) -> Run:
    return Run(spec_hash=HASH, **fields)


def seen(verdict: Verdict) -> tuple[object, ...]:
    return verdict.status, verdict.instance and verdict.instance.id, verdict.action, verdict.update


# --- beside


def test_the_new_version_starts_beside_the_old_one_where_a_gpu_is_free() -> None:
    verdict = decide(rolling(), machine(old(), gpus=FREE))
    assert seen(verdict) == ("READY", "old", Start(("GPU-1",), HASH), "rolling")
    assert verdict.message.startswith("Serving the previous version while the new one starts. Starting a container")


def test_without_gpus_there_is_always_room_beside() -> None:
    verdict = decide(rolling(gpus=0, previous_gpus=0), machine(old(gpu_ids=()), gpus=()))
    assert seen(verdict) == ("READY", "old", Start((), HASH), "rolling")


BESIDE: dict[str, tuple[Observed, Action | None]] = {
    "its image is absent": (machine(old(), images={}, gpus=FREE), Prepare(True, False, HASH)),
    "it loads": (machine(old(), new(health="starting"), gpus=FREE), None),
    "it has crashed once": (
        machine(old(), new(state="exited", exit_code=3), gpus=FREE), Remove(("new",), at_once=True),
    ),
    "others hold what it needs besides": (machine(old(), gpus=gpus("default/d", "default/x", "default/x")), None),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_the_old_version_serves_while_the_new_one_is_on_its_way_and(case: str) -> None:
    observed, action = BESIDE[case]
    verdict = decide(rolling(gpus=2 if case.startswith("others") else 1), observed)
    assert seen(verdict) == ("READY", "old", action, "rolling")


@pytest.mark.parametrize(
    "in_flight",
    [Prepare(True, True, HASH), Start(("GPU-1",), HASH), Remove(("a leftover",)), Halt("another leftover")],
)
def test_the_old_version_serves_whatever_is_in_flight(in_flight: Action) -> None:
    verdict = decide(rolling(), machine(old(), images={}, gpus=FREE), in_flight)
    assert seen(verdict) == ("READY", "old", None, "rolling")


def test_traffic_moves_when_the_new_version_is_ready_and_the_old_one_leaves_after_that() -> None:
    both = machine(old(), new(), gpus=gpus("default/d", "default/d"))
    moved = decide(rolling(), both)
    assert seen(moved) == ("READY", "new", None, None)
    assert moved.message.startswith("Container is running and ready")
    assert moved.wake_at is not None
    assert moved.wake_at < NOW + 1  # the routes have followed by then
    d = again(rolling(), moved)
    assert d.status.run.previous is None
    assert seen(decide(d, both)) == ("READY", "new", Remove(("old",)), None)


def test_an_old_version_with_requests_is_left_alone_until_its_time_is_over() -> None:
    busy = machine(old(busy=True), new(), gpus=gpus("default/d", "default/d"))
    d = again(rolling(), decide(rolling(), busy))
    waiting = decide(d, busy, now=NOW + 1)
    assert (waiting.action, waiting.wake_at) == (None, NOW + LIMITS.drain_timeout_s)
    assert decide(d, busy, now=NOW + LIMITS.drain_timeout_s).action == Remove(("old",))


@pytest.mark.fault(20)
def test_a_daemon_killed_while_the_old_version_drained_removes_it_and_trusts_the_new_one() -> None:
    both = machine(old(health="unknown"), new(health="unknown"), gpus=gpus("default/d", "default/d"))
    d = wanted(status="READY", run=run(ready_container="new", ready_at=NOW - 5))
    verdict = decide(d, both)
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "new")
    assert verdict.action == Remove(("old",), at_once=True)


@pytest.mark.fault(20)
def test_an_old_engine_is_trusted_after_a_restart_of_the_daemon_in_the_middle_of_a_roll() -> None:
    """Its health is not known yet, and the new wish has only just been seen."""
    before = wanted(status="READY", run=was_ready())
    verdict = decide(before, machine(old(health="unknown"), images={}, gpus=FREE))
    assert seen(verdict)[:2] == ("READY", "old")
    assert seen(decide(again(before, verdict), machine(old(health="unknown"), images={}, gpus=FREE)))[:2] == (
        "READY", "old",
    )  # fmt: skip


# --- in its place


def test_an_old_version_leaves_the_routes_before_it_is_removed_for_its_gpus() -> None:
    d, there = rolling(), machine(old(), gpus=FULL)
    first = decide(d, there)
    assert seen(first) == ("PENDING", None, None, "rolling")
    assert "not GPUs enough for both" in first.message
    assert decide(again(d, first), there).action == Remove(("old",))


def test_its_last_requests_may_end_but_not_for_ever() -> None:
    d, busy = rolling(), machine(old(busy=True), gpus=FULL)
    d = again(d, decide(d, busy))
    waiting = decide(d, busy, now=NOW + 1)
    assert seen(waiting) == ("PENDING", None, None, "rolling")
    assert waiting.wake_at == NOW + LIMITS.drain_timeout_s
    assert decide(d, busy, now=NOW + LIMITS.drain_timeout_s).action == Remove(("old",))


def test_the_gpus_of_the_old_version_are_kept_for_the_new_one() -> None:
    d = again(rolling(), decide(rolling(), machine(old(), gpus=FULL)))
    first, second = plan([wanted("a"), d], machine(gpus=gpus(None)), {}, NOW, LIMITS)
    assert (first.desired.ref.name, first.action) == ("a", None)
    assert "GPU 0 is held by default/d" in first.message
    assert second.action == Start(("GPU-0",), HASH)


def test_who_waits_in_front_does_not_get_them_either() -> None:
    d = again(rolling(), decide(rolling(), machine(old(), gpus=FULL)))
    big = wanted("a", gpus=2, run=run(waiting_since=1.0))
    first, second = plan([big, d], machine(gpus=gpus(None, None)), {}, NOW, LIMITS)
    assert first.action is None
    assert second.action == Start(("GPU-0",), HASH)


def test_while_others_wait_for_gpus_a_roll_takes_no_further_one() -> None:
    big = wanted("a", gpus=3, run=run(waiting_since=1.0))
    _, verdict = plan([big, rolling()], machine(old(), gpus=gpus("default/d", None, "default/x")), {}, NOW, LIMITS)
    assert seen(verdict) == ("PENDING", None, None, "rolling")
    assert verdict.run.kept_gpus == ("GPU-0",)


def test_nothing_is_given_up_before_everything_else_is_here() -> None:
    verdict = decide(rolling(), machine(old(), images={}, gpus=FULL))
    assert seen(verdict) == ("READY", "old", Prepare(True, False, HASH), "rolling")


def test_the_pauses_between_attempts_are_not_for_the_old_version() -> None:
    failing = run(attempts=1, retry_at=NOW + 5, failure=Failure(message="boom", final=False), replaced_at=NOW - 9)
    verdict = decide(rolling(run=failing), machine(gpus=gpus(None)))
    assert seen(verdict) == ("PENDING", None, None, "rolling")
    assert "Trying again" in verdict.message


# --- and back


def test_a_new_version_that_failed_beside_leaves_the_old_one_serving() -> None:
    d = rolling(run=run(attempts=3, failure=FAILED))
    verdict = decide(d, machine(old(), new(state="exited", exit_code=3), gpus=FREE))
    assert seen(verdict) == ("READY", "old", None, "failed")
    assert verdict.message.startswith("Serving the previous version: the new one failed.")
    assert "nimhost logs d" in verdict.message
    assert "Container exited with code 3." in verdict.message
    assert seen(decide(again(d, verdict), machine(old(), gpus=FREE), now=NOW + 1e6))[:3] == ("READY", "old", None)


def test_a_new_version_that_never_gets_ready_is_stopped_and_the_old_one_serves_on() -> None:
    late = new(health="starting", started_at=NOW - LIMITS.start_timeout_s - 1)
    verdict = decide(rolling(), machine(old(), late, gpus=FREE))
    assert seen(verdict) == ("READY", "old", Halt("new"), "failed")
    assert "not ready 600 s after its start" in verdict.message


@pytest.mark.parametrize(
    ("d", "why"),
    [
        (rolling(problem="Fileset 'x' does not exist."), "Fileset 'x' does not exist."),
        (rolling(gpus=9), "needs 9"),
    ],
)
def test_a_wish_that_cannot_be_started_changes_nothing(d: Desired, why: str) -> None:
    verdict = decide(d, machine(old(), gpus=FREE))
    assert seen(verdict) == ("READY", "old", None, "failed")
    assert why in verdict.message


@pytest.mark.fault(22)
def test_a_replaced_version_comes_back_when_the_new_one_fails_for_good() -> None:
    gone = run(attempts=3, failure=FAILED, replaced_at=NOW - 60, kept_gpus=("GPU-0",))
    d = rolling(run=gone)
    back = decide(d, machine(new(state="exited", exit_code=3), gpus=gpus(None)))
    assert seen(back) == ("PENDING", None, Start(("GPU-0",), OLD), "failed")
    assert "Going back to the previous version" in back.message
    assert "Container exited with code 3." in back.message
    served = decide(again(d, back), machine(old(id="old-2"), gpus=gpus("default/d")))
    assert seen(served) == ("READY", "old-2", None, "failed")
    assert served.run.kept_gpus == ()


def test_what_failed_gives_its_gpu_back_before_the_old_version_starts() -> None:
    gone = run(failure=FAILED, replaced_at=NOW - 60, kept_gpus=("GPU-0",))
    verdict = decide(rolling(run=gone), machine(new(health="starting", gpu_ids=("GPU-0",)), gpus=FULL))
    assert seen(verdict) == ("PENDING", None, Halt("new"), "failed")


def test_an_old_version_that_fails_as_well_ends_in_an_error_with_both_causes() -> None:
    broken = was_ready(attempts=3, failure=Failure(message="Image image:0 is gone.", final=True))
    d = rolling(before=broken, run=run(attempts=3, failure=FAILED, replaced_at=NOW - 60))
    verdict = decide(d, machine(gpus=gpus(None)))
    assert (verdict.status, verdict.action) == ("ERROR", None)
    assert "Container exited with code 3." in verdict.message
    assert "Image image:0 is gone." in verdict.message
    assert decide(again(d, verdict), machine(gpus=gpus(None)), now=NOW + 1e6).action is None


def test_going_back_waits_behind_nobody() -> None:
    gone = run(attempts=3, failure=FAILED, replaced_at=NOW - 60, kept_gpus=("GPU-0",))
    big = wanted("a", gpus=2, run=run(waiting_since=1.0))
    _, back = plan([big, rolling(run=gone)], machine(gpus=gpus(None, "default/x")), {}, NOW, LIMITS)
    assert back.action == Start(("GPU-0",), OLD)


def test_another_wish_ends_the_going_back_and_is_tried() -> None:
    d = rolling(run=Run(spec_hash="bbbbbbbbbbbb", attempts=3, failure=FAILED))
    verdict = decide(d, machine(old(), gpus=FREE))
    assert seen(verdict) == ("READY", "old", Start(("GPU-1",), HASH), "rolling")
    assert verdict.run.previous == was_ready(container="old")


def test_the_wish_of_the_old_version_again_restarts_nothing() -> None:
    d = wanted(hash=OLD, run=run(previous=was_ready(), attempts=3, failure=FAILED), status="READY")
    verdict = decide(d, machine(old(), gpus=FREE))
    assert seen(verdict) == ("READY", "old", None, None)


def test_a_version_that_was_given_up_is_not_gone_back_to() -> None:
    d = wanted(run=Run(spec_hash=OLD, ready_container="old", failure=FAILED))
    assert decide(d, machine(gpus=gpus(None))).run.previous is None


# --- what happens meanwhile


@pytest.mark.fault(22)
def test_an_old_version_that_crashes_while_the_new_one_is_fetched_is_restarted() -> None:
    d = rolling()
    dead = machine(old(state="exited", exit_code=1), images={}, gpus=gpus(None, None))
    stopped = decide(d, dead, Prepare(True, False, HASH))
    assert stopped.action == Cancel()
    first = decide(again(d, stopped), dead)
    assert first.action == Remove(("old",), at_once=True)
    d = again(d, first)
    gone = machine(images={}, gpus=gpus(None, None))
    assert isinstance(decide(d, gone).action, Prepare)  # its pause is not for nothing
    verdict = decide(d, gone, now=NOW + 60)
    assert isinstance(verdict.action, Start)
    assert verdict.action.hash == OLD


def test_an_old_version_that_crashes_does_not_hold_up_a_start() -> None:
    dead = machine(old(state="exited", exit_code=1), gpus=gpus(None, None))
    verdict = decide(rolling(), dead)
    assert isinstance(verdict.action, Start)
    assert verdict.action.hash == HASH
    assert verdict.status == "PENDING"


@pytest.mark.parametrize("wish", [{"deleting": True}, {"desired": "stopped"}])
def test_a_stop_or_a_deletion_in_the_middle_removes_both(wish: dict[str, Any]) -> None:
    verdict = decide(rolling(**wish), machine(old(), new(health="starting"), gpus=FREE))
    assert verdict.action == Remove(("old", "new"))
    assert verdict.instance is None


def test_a_start_after_a_stop_tries_the_new_version_first_and_still_knows_the_old_one() -> None:
    stopped = decide(rolling(run=run(failure=FAILED), desired="stopped"), machine(gpus=FREE))
    assert stopped.run.failure is None
    d = again(rolling(), stopped)
    assert decide(d, machine(gpus=gpus(None))).action == Start(("GPU-0",), HASH)
    assert d.previous is not None


@pytest.mark.fault(4)
def test_a_version_that_nobody_wants_any_more_is_removed_first() -> None:
    between = new(id="between", hash="cccccccccccc", health="starting")
    verdict = decide(rolling(), machine(old(), between, gpus=gpus("default/d", "default/d")))
    assert seen(verdict) == ("READY", "old", Remove(("between",), at_once=True), "rolling")


def test_a_download_for_a_wish_that_changed_again_is_cancelled_without_a_gap() -> None:
    verdict = decide(rolling(), machine(old(), images={}, gpus=FREE), Prepare(True, True, "another"))
    assert seen(verdict) == ("READY", "old", Cancel(), "rolling")


@pytest.mark.fault(21)
def test_docker_away_in_the_middle_decides_nothing() -> None:
    away = machine(docker_problem="Docker cannot be reached.", gpus=FREE)
    assert seen(decide(rolling(), away)) == ("UNKNOWN", None, None, None)
    assert seen(decide(rolling(), away, Prepare(True, True, HASH))) == ("UNKNOWN", None, None, None)


def test_an_old_version_of_which_nothing_is_known_serves_as_long_as_it_can() -> None:
    d = replace(rolling(), previous=None)
    assert seen(decide(d, machine(old(), gpus=FREE)))[:2] == ("READY", "old")
    failed = replace(rolling(run=run(failure=FAILED)), previous=None)
    assert seen(decide(failed, machine(old(), gpus=FREE)))[:2] == ("READY", "old")
    assert decide(failed, machine(gpus=FREE)).status == "ERROR"


def test_a_roll_that_found_another_gpu_after_all_lets_the_old_version_serve_again() -> None:
    d = again(rolling(), decide(rolling(), machine(old(busy=True), gpus=FULL)))
    verdict = decide(d, machine(old(busy=True), gpus=FREE))
    assert seen(verdict) == ("READY", "old", Start(("GPU-1",), HASH), "rolling")
    assert (verdict.run.replaced_at, verdict.run.kept_gpus) == (0.0, ())


def sharing(share_gib: float) -> Desired:
    def with_share(d: Desired) -> Desired:
        assert d.order is not None
        executor = replace(d.order.executor, gpu_memory_gib=share_gib)
        return replace(d, order=replace(d.order, executor=executor))

    d = rolling()
    assert d.previous is not None
    return replace(with_share(d), previous=with_share(d.previous))


def shared(share_gib: float, hash: str = OLD) -> GpuSlot:
    shares = (Share("default/d", int(share_gib * GIB), hash),)
    return GpuSlot(uuid="GPU-0", index=0, total_bytes=24 * GIB, used_bytes=int(share_gib * GIB), shares=shares)


def test_both_versions_have_their_share_of_one_gpu_where_that_has_room_for_two() -> None:
    slot = shared(10)
    verdict = decide(sharing(10), machine(old(), gpus=(slot,)))
    assert isinstance(verdict.action, Start)
    assert (verdict.status, verdict.action.gpu_ids, verdict.action.hash) == ("READY", ("GPU-0",), HASH)
    taken = reserved(slot, sharing(10))
    assert {(share.holder, share.hash) for share in taken.shares} == {("default/d", OLD), ("default/d", HASH)}
    assert reserved(taken, sharing(10)) == taken  # its container is in the list by now, its start not yet over


def test_where_two_shares_are_too_much_the_old_version_gives_way_and_the_room_stays_its_own() -> None:
    first = decide(sharing(16), machine(old(), gpus=(shared(16),)))
    assert seen(first) == ("PENDING", None, None, "rolling")
    d = again(sharing(16), first)
    empty = GpuSlot(uuid="GPU-0", index=0, total_bytes=24 * GIB)
    greedy = replace(wanted("a", created=0), order=sharing(12).order)
    other, own = plan([greedy, d], machine(gpus=(empty,)), {}, NOW, LIMITS)
    assert (other.desired.ref.name, other.action) == ("a", None)
    assert isinstance(own.action, Start)


def test_a_version_that_loads_again_on_a_shared_gpu_keeps_the_next_one_waiting() -> None:
    """Engines measure memory while they start: one after the other."""
    loading = old(id="old-2", health="starting")
    verdict = decide(sharing(10), machine(loading, gpus=(shared(10),)))
    assert verdict.action is None
    assert "one after the other" in verdict.message


def test_traffic_of_the_old_version_is_that_of_its_engine_and_its_model() -> None:
    d = rolling()
    assert d.previous is not None
    assert d.previous.order is not None
    order = replace(d.previous.order, engine="vllm", model=ModelOrder(ref=Ref("default", "before")))
    serving = old(models=("served-before",))
    verdict = decide(replace(d, previous=replace(d.previous, order=order)), machine(serving, gpus=FREE))
    provider = Entity(
        kind="providers", id="p", workspace="default", name="d", created_at="", updated_at="",
        wish=Provider(host_url="http://x", model_deployment_id="default/d"), status=ProviderStatus(),
    )  # fmt: skip
    upstream = route_table([provider], {}, [], [verdict], {}).providers[Ref("default", "d")].route.upstream
    assert (upstream.policy, upstream.base_url) == ("vllm", "http://127.0.0.1:4001")
    assert ServedModel("default/before", "served-before") in upstream.served
    status = provider_status(verdict.desired, verdict.desired.status, verdict.instance, provider.status)
    assert (status.host_url, status.served_models) == (upstream.base_url, list(upstream.served))

"""Rolls that meet each other, people who change their minds, and GPUs that are kept: each was wrong once."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Instance, Share
from nimhost.deployments.plan import plan
from nimhost.deployments.roll import ADAPTERS_S
from nimhost.runs import Failure, Run
from tests.deployments import make
from tests.deployments.make import HASH, LIMITS, NOW, OLD, again, decide, gpus, instance, machine, rolling, wanted

FREE = gpus("default/d", None)
FAILED = Failure(message="Container exited with code 3.", final=True)


@pytest.mark.parametrize("in_flight", [Prepare(True, True, HASH), Start(("GPU-1",), HASH), Remove(("leftover",))])
@pytest.mark.parametrize(("wish", "status"), [({"deleting": True}, "DELETING"), ({"desired": "stopped"}, "PENDING")])
def test_a_stop_or_a_deletion_while_something_is_in_flight_is_not_called_ready(
    in_flight: Action, wish: dict[str, Any], status: str
) -> None:
    old = instance(id="old", hash=OLD)
    verdict = decide(rolling(**wish), machine(old, gpus=FREE), in_flight)
    assert (verdict.status, verdict.instance) == (status, None)


@pytest.mark.parametrize("in_flight", [Prepare(True, True, HASH), Start(("GPU-1",), HASH)])
def test_the_old_wish_again_while_the_new_version_is_brought_leaves_no_gap(in_flight: Action) -> None:
    d = wanted(hash=OLD, run=Run(spec_hash=HASH, previous=make.was_ready()), status="READY")
    verdict = decide(d, machine(instance(id="old", hash=OLD), gpus=FREE), in_flight)
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "old")
    assert verdict.action == (Cancel() if isinstance(in_flight, Prepare) else None)


def test_who_has_given_up_keeps_no_gpus_from_others() -> None:
    broken = make.was_ready(attempts=3, failure=Failure(message="Image image:0 is gone.", final=True))
    d = rolling(before=broken, run=Run(spec_hash=HASH, failure=FAILED, replaced_at=NOW - 60, kept_gpus=("GPU-0",)))
    nothing = machine(gpus=gpus(None))
    first, waiter = plan([d, wanted("a", created=1)], nothing, {}, NOW, LIMITS)
    assert (first.status, first.run.kept_gpus) == ("ERROR", ())
    assert waiter.action == Start(("GPU-0",), HASH)


def test_who_was_passed_over_for_kept_gpus_has_its_turn_as_soon_as_they_are_free() -> None:
    """The status that frees them is no event, and nothing else may happen for long."""
    broken = make.was_ready(attempts=3, failure=Failure(message="Image image:0 is gone.", final=True))
    d = rolling(before=broken, run=Run(spec_hash=HASH, failure=FAILED, replaced_at=NOW - 60, kept_gpus=("GPU-0",)))
    waiter = wanted("a", run=Run(spec_hash=HASH, waiting_since=1.0))
    nothing = machine(gpus=gpus(None))
    passed, freeing = plan([waiter, d], nothing, {}, NOW, LIMITS)
    assert passed.action is None
    assert freeing.wake_at is not None
    assert freeing.wake_at < NOW + 1
    started, _ = plan([again(waiter, passed), again(d, freeing)], nothing, {}, NOW, LIMITS)
    assert started.action == Start(("GPU-0",), HASH)


BROKEN = Failure(message="Image image:0 is gone.", final=True)
NEVER_BACK = {
    "it failed for good": rolling(gpus=2, before=make.was_ready(attempts=3, failure=BROKEN)),
    "nobody knows what it was": replace(rolling(gpus=2), previous=None),
}


@pytest.mark.parametrize("case", NEVER_BACK)
def test_a_wish_for_more_gpus_keeps_none_when_the_old_version_never_comes_back(case: str) -> None:
    """It would keep an idle GPU from others for as long as it waits."""
    d = NEVER_BACK[case]
    kept = replace(d.status.run, kept_gpus=("GPU-0",), waiting_since=NOW - 5)
    d = replace(d, entity=replace(d.entity, status=replace(d.status, run=kept)))
    waiting, other = plan(
        [d, wanted("a", created=9, run=Run(spec_hash=HASH, waiting_since=NOW - 9))],
        machine(gpus=gpus(None, "default/x")), {}, NOW, LIMITS,
    )[::-1]  # fmt: skip
    assert (waiting.status, waiting.run.kept_gpus) == ("PENDING", ())
    assert "needs 2" in waiting.message
    there = machine(gpus=gpus(None, "default/x"))
    started, _ = plan([again(other.desired, other), again(d, waiting)], there, {}, NOW, LIMITS)
    assert started.action == Start(("GPU-0",), HASH)


def test_the_old_wish_again_while_the_old_version_drains_keeps_no_gpu_that_it_does_not_use() -> None:
    d = rolling(gpus=2)
    giving = decide(d, machine(instance(id="old", hash=OLD, gpu_ids=("GPU-0",), busy=True), gpus=FREE))
    assert giving.run.kept_gpus == ("GPU-0", "GPU-1")
    back = wanted(hash=OLD, run=giving.run, status="PENDING")
    there = machine(instance(id="old", hash=OLD, gpu_ids=("GPU-0",)), gpus=FREE)
    first, other = plan([back, wanted("a", created=1)], there, {}, NOW, LIMITS)
    assert (first.status, first.run.kept_gpus) == ("READY", ())
    assert other.action == Start(("GPU-1",), HASH)


def test_the_old_wish_again_after_the_old_version_is_gone_waits_behind_nobody_for_what_is_kept_for_it() -> None:
    """Else both wait for ever: the one for its turn, the other for the GPU."""
    gone = Run(spec_hash=HASH, previous=make.was_ready(), replaced_at=NOW - 5, kept_gpus=("GPU-0",))
    back = wanted(hash=OLD, run=gone, status="PENDING")
    waiter = wanted("a", run=Run(spec_hash=HASH, waiting_since=1.0))
    first, second = plan([waiter, back], machine(gpus=gpus(None)), {}, NOW, LIMITS)
    assert (first.action, second.action) == (None, Start(("GPU-0",), OLD))


def test_two_rolls_that_want_the_same_free_gpu_do_not_take_turns_for_ever() -> None:
    """The first one gets it and the second one serves on, whoever began to wait first."""
    slots = gpus("default/a", "default/b", None)
    there = machine(*(instance(n, id=f"old-{n}", hash=OLD, gpu_ids=(f"GPU-{i}",)) for i, n in enumerate("ab")),
                    gpus=slots)  # fmt: skip
    wishes: list[Desired] = [rolling(n, gpus=2, before=make.was_ready(ready_container=f"old-{n}")) for n in "ab"]
    seen = []
    for tick in range(8):
        verdicts = {v.desired.ref: v for v in plan(wishes, there, {}, NOW + tick / 20, LIMITS)}
        seen.append([(verdicts[d.ref].status, verdicts[d.ref].action) for d in wishes])
        wishes = [again(d, verdicts[d.ref]) for d in wishes]
    assert seen[0] == [("PENDING", None), ("READY", None)]
    assert seen[1:] == [[("PENDING", Remove(("old-a",))), ("READY", None)]] * 7


def test_a_going_back_that_waits_says_for_what_and_has_its_place_in_the_queue() -> None:
    d = rolling(run=Run(spec_hash=HASH, attempts=3, failure=FAILED))
    taken = machine(gpus=gpus("default/x"))
    verdict = decide(d, taken)
    assert verdict.message.startswith("Going back to the previous version: the new one failed.")
    assert "GPU 0 is held by default/x" in verdict.message
    _, later = plan([again(d, verdict), wanted("a", created=9)], taken, {}, NOW + 1, LIMITS)
    assert "default/d waits ahead of it" in later.message


def test_nobody_is_sent_to_logs_that_do_not_exist() -> None:
    verdict = decide(rolling(problem="Fileset 'x' does not exist."), machine(instance(id="old", hash=OLD), gpus=FREE))
    assert "nimhost logs" not in verdict.message
    failed = rolling(run=Run(spec_hash=HASH, failure=FAILED))
    late = machine(instance(id="old", hash=OLD), instance(id="new", state="exited", exit_code=3), gpus=FREE)
    assert "nimhost logs d" in decide(failed, late).message


def test_the_version_that_is_halted_is_not_counted_ready() -> None:
    late = instance(id="new", gpu_ids=("GPU-1",), health="ok")
    failed = rolling(run=Run(spec_hash=HASH, failure=FAILED))
    verdict = decide(failed, machine(instance(id="old", hash=OLD), late, gpus=FREE), Halt("new"))
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "old")


def test_memory_that_was_promised_to_others_is_not_measured_every_second() -> None:
    full = GpuSlot(uuid="GPU-0", index=0, total_bytes=24 << 30, used_bytes=0)
    shared = replace(full, shares=(Share("default/x", 20 << 30, OLD),))
    for share_gib in (None, 10.0):
        d = wanted()
        assert d.order is not None
        d = replace(d, order=replace(d.order, executor=replace(d.order.executor, gpu_memory_gib=share_gib)))
        verdict = decide(d, machine(gpus=(shared,)))
        assert "Waiting for GPUs" in verdict.message
        assert verdict.wake_at is None
    held = replace(full, used_bytes=20 << 30)  # by nobody knows whom: only looking again tells
    assert decide(wanted(), machine(gpus=(held,))).wake_at is not None


# --- adapters


ADAPTER = "default--tone"


def with_adapters(d: Desired, enabled: bool = True) -> Desired:
    assert d.order is not None
    return replace(d, order=replace(d.order, model_spec=replace(d.order.model_spec, lora_enabled=enabled)))


def serving(*adapters: str, since: float = NOW, **fields: Any) -> Instance:
    found = instance(**fields)
    listed = tuple((name, f"/loras/{name}") for name in adapters)
    return replace(found, health=replace(found.health, since=since, adapters=listed))


def test_traffic_moves_when_the_new_version_has_the_adapters_of_the_old_one() -> None:
    d, old = with_adapters(rolling()), serving(ADAPTER, id="old", hash=OLD)
    full = gpus("default/d", "default/d")
    waiting = decide(d, machine(old, serving(id="new"), gpus=full))
    assert (waiting.status, waiting.instance and waiting.instance.id, waiting.update) == ("READY", "old", "rolling")
    assert "its adapters are being loaded" in waiting.message
    assert waiting.wake_at == NOW + ADAPTERS_S
    moved = decide(again(d, waiting), machine(old, serving(ADAPTER, id="new"), gpus=full))
    assert (moved.status, moved.instance and moved.instance.id, moved.action) == ("READY", "new", None)
    gone = decide(again(d, moved), machine(old, serving(ADAPTER, id="new"), gpus=full))
    assert gone.action == Remove(("old",))


WITHOUT_WAITING = {
    "it has not loaded in time": (with_adapters(rolling()), ADAPTER, NOW - ADAPTERS_S),
    "the new version takes none": (with_adapters(rolling(), enabled=False), ADAPTER, NOW),
    "there is none": (with_adapters(rolling()), "not-an-adapter", NOW),
}


@pytest.mark.parametrize("case", WITHOUT_WAITING)
def test_no_adapter_is_waited_for_when(case: str) -> None:
    d, name, since = WITHOUT_WAITING[case]
    both = (serving(name, id="old", hash=OLD), serving(id="new", since=since))
    verdict = decide(d, machine(*both, gpus=gpus("default/d", "default/d")))
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "new")


def test_an_old_version_that_broke_is_not_waited_for() -> None:
    old = serving(ADAPTER, id="old", hash=OLD, health="failing", since=NOW)
    verdict = decide(with_adapters(rolling()), machine(old, serving(id="new"), gpus=gpus("default/d", "default/d")))
    assert (verdict.status, verdict.instance and verdict.instance.id) == ("READY", "new")

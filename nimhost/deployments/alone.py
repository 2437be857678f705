"""Rules 5 to 13 of the plan: how one version of a deployment is brought up and kept up. Pure.

Each rule answers with a verdict, or None when it does not apply.
"""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec.structs import replace

from nimhost.deployments.actions import Halt, Prepare, Remove, Start
from nimhost.deployments.need import need_of
from nimhost.deployments.observed import Instance
from nimhost.deployments.placement import choose, utilization, waiting, waits_for_memory
from nimhost.deployments.preflight import blocked, more_memory, no_room
from nimhost.deployments.retry import LOST_GPU, MESSAGE_LIMIT, after_exit, lost_gpu
from nimhost.deployments.situation import Situation, Verdict, preparing, removal, routable, starting
from nimhost.runs import Run

REMEASURE_S = 1.0
"""How long until memory that somebody holds is measured again, while something waits for it."""


def bring_up(s: Situation) -> Verdict:
    """What to do for the version in `s.desired`, as if it were the only one."""
    return next(verdict for rule in _RULES if (verdict := rule(s)) is not None)


def keep_up(s: Situation) -> Verdict:
    """The same for a version that has been resolved: it needs nothing that it did not have when it last started."""
    return next(verdict for rule in _RESOLVED if (verdict := rule(s)) is not None)


def _healthy(s: Situation) -> Verdict | None:  # 5
    instance = routable(s, s.current)
    if instance is None:
        return None
    run = s.run
    if run.ready_container != instance.id:
        run = replace(run, ready_container=instance.id, ready_at=s.now)
    run = replace(run, container=instance.id, failure=None, retry_at=0.0, waiting_since=0.0, previous=None)
    started = datetime.fromtimestamp(instance.started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = f"Container is running and ready for inference (ID: {instance.id[:12]}, started: {started})"
    return s.verdict("READY", message, run=run, instance=instance)


def _backing_off(s: Situation) -> Verdict | None:  # 6
    failure = s.run.failure
    if failure is None:
        return None
    running = next((i for i in s.current if i.state == "running"), None)
    if failure.final:  # kept for its logs, but it holds no GPU
        return s.verdict("ERROR", failure.message, Halt(running.id) if running else None)
    if s.run.retry_at <= s.now or running or 0 < failure.full_at <= s.observed.room_made_at:
        return None
    uncounted = [i for i in s.current if i.id != s.run.exited_container]
    if uncounted:
        return None
    when = datetime.fromtimestamp(s.run.retry_at, UTC).strftime("%H:%M:%SZ")
    attempt = f"\nTrying again at {when} (attempt {s.run.attempts + 1})."
    action = removal(s.current, at_once=True)
    message = f"{failure.message[: MESSAGE_LIMIT - len(attempt)]}{attempt}"
    return s.verdict("PENDING", message, action, wake_at=s.run.retry_at)


def _exited(s: Situation) -> Verdict | None:  # 7
    gone = [i for i in s.current if i.state != "running"]
    if not gone:
        return _vanished(s)
    removing = Remove(tuple(i.id for i in gone), at_once=True)
    crashed = next((i for i in gone if i.state == "exited" and i.id != s.run.exited_container), None)
    if crashed is None:  # counted before, or never started
        return s.verdict("PENDING", "Removing what is left of an earlier start.", removing)
    run = after_exit(
        s.run,
        container=crashed.id,
        exit_code=crashed.exit_code,
        oom_killed=crashed.oom_killed,
        log_tail=crashed.log_tail,
        now=s.now,
        limits=s.limits,
        more_memory=more_memory(s.desired, s.observed),
    )
    assert run.failure is not None
    return _backing_off(replace(s, run=run)) or s.verdict("PENDING", run.failure.message, removing, run)


def _vanished(s: Situation) -> Verdict | None:
    """Gone between two looks: by `docker rm -f`, say."""
    missed = s.run.container
    if missed is None or s.current:
        return None
    what = f"Container {missed[:12]} is gone: it was removed, and not by nimhost."
    run = after_exit(
        s.run, container=missed, exit_code=None, oom_killed=False, log_tail="", now=s.now, limits=s.limits, what=what
    )
    return _backing_off(replace(s, run=run)) or s.verdict("PENDING", what, run=run)


def _unhealthy(s: Situation) -> Verdict | None:  # 8
    instance = next((i for i in s.current if i.state == "running"), None)
    if instance is None:
        return None
    if s.run.ready_container == instance.id:
        return _broken(s, instance)
    deadline = instance.started_at + s.limits.start_timeout_s
    unasked = instance.health.state == "unknown" and instance.port is not None  # it may have become ready unseen
    if s.now < deadline or unasked:
        message = (
            f"Container created and starting with image {s.desired.image} (ID: {instance.id[:12]}). "
            "The inference engine is initializing, this may take several minutes."
        )
        return s.verdict("PENDING", message, run=replace(s.run, container=instance.id), wake_at=deadline)
    probe = instance.health.detail or "no answer"
    late = f"The engine was not ready {s.limits.start_timeout_s:g} s after its start: {probe}."
    run = after_exit(
        s.run, container=instance.id, exit_code=None, oom_killed=False, log_tail=instance.log_tail, now=s.now,
        limits=replace(s.limits, start_limit=0), what=late,
    )  # fmt: skip
    assert run.failure is not None
    return s.verdict("ERROR", run.failure.message, Halt(instance.id), run)


def _broken(s: Situation, instance: Instance) -> Verdict:
    """It was READY and stopped answering: out of the routes at once, replaced when that lasts or its GPU is gone."""
    message = f"The engine stopped answering its health probe: {instance.health.detail}."
    lasted = instance.health.since + s.limits.unhealthy_restart_s
    if lost_gpu(instance.log_tail):
        message, lasted = f"{message} {LOST_GPU}", s.now
    absent = [uuid for uuid in instance.gpu_ids if all(gpu.uuid != uuid for gpu in s.observed.gpus)]
    if absent and not s.observed.gpu_problem:
        message = f"{message}\n{', '.join(absent)} is no longer on this machine."
    if s.now < lasted:
        return s.verdict("PENDING", message, wake_at=lasted)
    if s.run.exited_container == instance.id:  # counted before, and still to be removed
        return s.verdict("PENDING", f"{message} Restarting it.", Remove((instance.id,)))
    run = after_exit(
        s.run, container=instance.id, exit_code=None, oom_killed=False, log_tail="", now=s.now, limits=s.limits,
        what=message,
    )  # fmt: skip
    return s.verdict("PENDING", f"{message} Restarting it.", Remove((instance.id,)), run)


def _missing(s: Situation) -> Verdict | None:  # 9
    return s.verdict("ERROR", s.desired.problem, run=_out_of_queue(s)) if s.desired.problem else None


def _blocked(s: Situation) -> Verdict | None:  # 10
    why = blocked(s.desired, s.observed)
    if why is None:
        return None
    run = _out_of_queue(s)
    # A download that had begun pauses while its disk is full, and goes on; one that had not is refused.
    if s.run.failure is not None and why == no_room(s.desired, s.observed):
        return s.verdict("PENDING", why.replace("\n", " "), run=run)
    return s.verdict("ERROR", why, run=run)


def _out_of_queue(s: Situation) -> Run:
    """Who cannot start keeps nobody else waiting."""
    return replace(s.run, waiting_since=0.0)


def _prepare(s: Situation) -> Verdict | None:  # 11
    d = s.desired
    image = s.observed.images.get(d.ref) is None
    weights = d.weights is not None and s.observed.weights.get(d.ref) is None
    if not (image or weights):
        return None
    if image and d.ref in s.observed.asking:  # it may be refused before a byte of it is here
        return s.verdict("PENDING", f"Asking the registry of image {d.image} what it is.")
    action = Prepare(image, weights, d.hash)
    return s.verdict("PENDING", preparing(d, action), action, replace(s.run, pulling=image))


def _gpus_short(s: Situation) -> Verdict | None:  # 12
    slots, need = s.observed.gpus, need_of(s.desired, s.observed.gpus)
    if need.gpus == 0 or (s.ahead is None and choose(slots, need)):
        return None
    run = s.run if s.run.waiting_since else replace(s.run, waiting_since=s.now)
    wake_at = s.now + REMEASURE_S if waits_for_memory(slots, need) else None
    message = waiting(slots, need, str(s.ahead) if s.ahead else None)
    return s.verdict("PENDING", message, run=run, wake_at=wake_at)


def _start(s: Situation) -> Verdict:  # 13
    need = need_of(s.desired, s.observed.gpus)
    chosen = choose(s.observed.gpus, need) or ()
    gpu_ids = tuple(gpu.uuid for gpu in chosen)
    action = Start(gpu_ids, s.desired.hash, utilization(chosen, need, s.desired.ask))
    return s.verdict("PENDING", starting(s, gpu_ids), action, replace(s.run, waiting_since=0.0, pulling=False))


_RULES = (_healthy, _backing_off, _exited, _unhealthy, _missing, _blocked, _prepare, _gpus_short, _start)
_RESOLVED = (_healthy, _backing_off, _exited, _unhealthy, _gpus_short, _start)

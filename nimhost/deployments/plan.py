"""What to do next: `plan(desired, observed, in_flight, now, limits)` -> verdicts and actions. Pure.

For each deployment the first rule that matches wins:
 1. an action is in flight -> wait; a Prepare that nobody wants any more is cancelled
 2. deletion wanted -> remove its containers, then its rows
 3. stop wanted -> remove its containers, keep its rows
 4. running under another wish, the new one is ready to start -> replace
 5. running and healthy -> READY
 6. the last failure was final, or its backoff is not over -> wait
 7. exited, or left over from a start that never was -> count it, remove it; rule 6 decides about another attempt
 8. running, not healthy -> PENDING; too long -> stop it and count it
 9. a reference needed to start is missing -> ERROR with its name
10. the preflight says that it cannot run here -> ERROR with the sum and the fix
11. image or weights absent -> Prepare
12. GPUs short, or others waited longer -> PENDING, naming the holder
13. -> Start

Laws: without a complete container list nothing is done; what was decided counts as real (actions in flight hold their
GPUs); at most one action per deployment; who began to wait first is served first, also when a small one would fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Forget, Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Instance, Observed
from nimhost.deployments.placement import choose, need_of, released, reserved, utilization, waiting, waits_for_memory
from nimhost.deployments.preflight import blocked, more_memory
from nimhost.deployments.retry import LOST_GPU, MESSAGE_LIMIT, Limits, after_exit, lost_gpu
from nimhost.entities import Status
from nimhost.refs import Ref
from nimhost.runs import Run

REMEASURE_S = 1.0
"""How long until memory that somebody holds is measured again, while something waits for it."""


class Verdict(Struct, frozen=True, kw_only=True):
    """How one deployment stands, and the one thing to do for it now."""

    desired: Desired
    status: Status
    message: str
    run: Run
    instance: Instance | None = None
    """The engine that may be given traffic; None when there is none."""
    action: Action | None = None
    wake_at: float | None = None


class _Situation(Struct, frozen=True, kw_only=True):
    """All that the rules for one deployment look at."""

    desired: Desired
    observed: Observed
    limits: Limits
    now: float
    run: Run
    current: tuple[Instance, ...]
    old: tuple[Instance, ...]
    ahead: Ref | None
    in_flight: Action | None

    def verdict(
        self,
        status: Status,
        message: str,
        action: Action | None = None,
        run: Run | None = None,
        instance: Instance | None = None,
        wake_at: float | None = None,
    ) -> Verdict:
        return Verdict(
            desired=self.desired,
            status=status,
            message=message,
            action=action,
            run=run or self.run,
            instance=instance,
            wake_at=wake_at,
        )


def plan(
    desired: Iterable[Desired], observed: Observed, in_flight: Mapping[str, Action], now: float, limits: Limits
) -> tuple[Verdict, ...]:
    """One verdict per deployment. `in_flight`: entity id -> the action that is being carried out."""
    wanted = sorted(desired, key=_queue_key)
    slots = _occupied(observed, wanted, in_flight)
    ahead: Ref | None = None
    verdicts = []
    for d in wanted:
        mine = [i for i in observed.instances if i.ref == d.ref]
        verdict = decide(
            _Situation(
                desired=d,
                observed=replace(observed, gpus=slots),
                limits=limits,
                now=now,
                run=_run_of(d),
                current=tuple(i for i in mine if i.hash == d.hash),
                old=tuple(i for i in mine if i.hash != d.hash),
                ahead=ahead,
                in_flight=in_flight.get(d.entity.id),
            )
        )
        if isinstance(verdict.action, Start):
            slots = _taken(slots, verdict.action, d)
        elif verdict.run.waiting_since and ahead is None:
            ahead = d.ref
        verdicts.append(verdict)
    return tuple(verdicts)


def _run_of(d: Desired) -> Run:
    """What is known about bringing up this wish. What is known about containers outlives a changed wish."""
    run = d.status.run
    if run.spec_hash == d.hash:
        return run
    return Run(spec_hash=d.hash, started_at=run.started_at, ready_container=run.ready_container, ready_at=run.ready_at)


def orphans(instances: Iterable[Instance], desired: Iterable[Desired]) -> list[str]:
    """Containers of ours that no deployment stands for: left by a crash, or by a row that went in an odd way."""
    refs = {d.ref for d in desired}
    return [i.id for i in instances if i.ref not in refs]


def decide(s: _Situation) -> Verdict:
    """The rules of the module docstring, under their numbers."""
    return next(verdict for rule in _RULES if (verdict := rule(s)) is not None)


def _in_flight(s: _Situation) -> Verdict | None:  # 1
    if s.in_flight is None:
        return None
    d = s.desired
    if isinstance(s.in_flight, Prepare):
        if d.deleting or d.stopped or s.in_flight.hash != d.hash:
            return s.verdict(d.status.status, d.status.status_message, Cancel())
        serving = _routable(s, s.old)
        return s.verdict("READY" if serving else "PENDING", _preparing(d, s.in_flight), instance=serving)
    if isinstance(s.in_flight, Start) and not d.deleting:
        return s.verdict("PENDING", f"Starting a container with image {d.image}{_on(s.in_flight.gpu_ids)}.")
    return s.verdict(d.status.status, d.status.status_message)


def _deleting(s: _Situation) -> Verdict | None:  # 2
    if not s.desired.deleting:
        return None
    message = "Deployment deletion requested"
    if s.observed.docker_problem and s.run.started_at:
        return s.verdict("DELETING", f"{message}; waiting for Docker. {s.observed.docker_problem}")
    return s.verdict("DELETING", message, _removal(s) or Forget())


def _docker_away(s: _Situation) -> Verdict | None:
    """The law before all rules but deletion: without a complete container list nothing is decided."""
    if s.observed.docker_problem is None:
        return None
    return s.verdict("UNKNOWN", s.observed.docker_problem)


def _stopped(s: _Situation) -> Verdict | None:  # 3
    if not s.desired.stopped:
        return None
    message = f"Stopped. Start it with: nimhost start {s.desired.ref.name}"
    return s.verdict("PENDING", message, _removal(s), s.run.forgiven())


def _replaced(s: _Situation) -> Verdict | None:  # 4
    """The old engine serves until everything is here for the new one; a wish that cannot be started changes nothing."""
    if not s.old or s.current:
        return None
    serving = _routable(s, s.old)
    failure = s.run.failure
    problem = s.desired.problem or blocked(s.desired, s.observed)
    if serving and (problem or (failure and (failure.final or s.run.retry_at > s.now))):
        why = problem or (failure and failure.message)
        return s.verdict("READY", f"Serving the previous version. {why}", instance=serving, wake_at=s.run.retry_at)
    if serving and (preparing := _prepare(s)):
        return replace(preparing, status="READY", instance=serving)
    if serving and (short := _gpus_short(_without_old(s))):
        return replace(
            short, status="READY", message=f"Serving the previous version. {short.message}", instance=serving
        )
    return s.verdict("PENDING", "Replacing the previous version.", Remove(tuple(i.id for i in s.old)))


def _without_old(s: _Situation) -> _Situation:
    """As it will be when the old engine has given its GPUs back."""
    gpus = tuple(released(slot, str(s.desired.ref)) for slot in s.observed.gpus)
    return replace(s, observed=replace(s.observed, gpus=gpus))


def _healthy(s: _Situation) -> Verdict | None:  # 5
    instance = _routable(s, s.current)
    if instance is None:
        return None
    run = s.run
    if run.ready_container != instance.id:
        run = replace(run, ready_container=instance.id, ready_at=s.now, failure=None, retry_at=0.0, waiting_since=0.0)
    started = datetime.fromtimestamp(instance.started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = f"Container is running and ready for inference (ID: {instance.id[:12]}, started: {started})"
    return s.verdict("READY", message, run=run, instance=instance)


def _backing_off(s: _Situation) -> Verdict | None:  # 6
    failure = s.run.failure
    if failure is None:
        return None
    running = next((i for i in s.current if i.state == "running"), None)
    if failure.final:  # kept for its logs, but it holds no GPU
        return s.verdict("ERROR", failure.message, Halt(running.id) if running else None)
    if s.run.retry_at <= s.now or running:
        return None
    uncounted = [i for i in s.current if i.id != s.run.exited_container]
    if uncounted:
        return None
    when = datetime.fromtimestamp(s.run.retry_at, UTC).strftime("%H:%M:%SZ")
    attempt = f"Trying again at {when} (attempt {s.run.attempts + 1})."
    return s.verdict("PENDING", f"{failure.message}\n{attempt}", _removal(s, at_once=True), wake_at=s.run.retry_at)


def _exited(s: _Situation) -> Verdict | None:  # 7
    gone = [i for i in s.current if i.state != "running"]
    if not gone:
        return None
    crashed = next((i for i in gone if i.state == "exited" and i.id != s.run.exited_container), None)
    if crashed is None:  # counted before, or never started
        return s.verdict("PENDING", s.desired.status.status_message, Remove(tuple(i.id for i in gone), at_once=True))
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
    removing = Remove(tuple(i.id for i in gone), at_once=True)
    return _backing_off(replace(s, run=run)) or s.verdict("PENDING", s.desired.status.status_message, removing, run)


def _unhealthy(s: _Situation) -> Verdict | None:  # 8
    instance = next((i for i in s.current if i.state == "running"), None)
    if instance is None:
        return None
    if s.run.ready_container == instance.id:
        return _broken(s, instance)
    deadline = instance.started_at + s.limits.start_timeout_s
    if s.now < deadline:
        message = (
            f"Container created and starting with image {s.desired.image} (ID: {instance.id[:12]}). "
            "The inference engine is initializing, this may take several minutes."
        )
        return s.verdict("PENDING", message, wake_at=deadline)
    probe = instance.health.detail or "no answer"
    late = f"The engine was not ready {s.limits.start_timeout_s:g} s after its start: {probe}."
    run = after_exit(
        s.run, container=instance.id, exit_code=None, oom_killed=False, log_tail=instance.log_tail, now=s.now,
        limits=replace(s.limits, start_limit=0),
    )  # fmt: skip
    assert run.failure is not None
    message = run.failure.message.replace("Container is gone.", late)
    run = replace(run, failure=replace(run.failure, message=message))
    return s.verdict("ERROR", message, Halt(instance.id), run)


def _broken(s: _Situation, instance: Instance) -> Verdict:
    """It was READY and stopped answering: out of the routes at once, replaced when that lasts or its GPU is gone."""
    message = f"The engine stopped answering its health probe: {instance.health.detail}."
    lasted = instance.health.since + s.limits.unhealthy_restart_s
    if lost_gpu(instance.log_tail):
        message, lasted = f"{message} {LOST_GPU}", s.now
    absent = [uuid for uuid in instance.gpu_ids if all(gpu.uuid != uuid for gpu in s.observed.gpus)]
    if absent and not s.observed.gpu_problem:
        message = f"{message} {', '.join(absent)} is no longer on this machine."
    if s.now < lasted:
        return s.verdict("PENDING", message, wake_at=lasted)
    if s.run.exited_container == instance.id:  # counted before, and still to be removed
        return s.verdict("PENDING", f"{message} Restarting it.", Remove((instance.id,)))
    run = after_exit(
        s.run, container=instance.id, exit_code=None, oom_killed=False, log_tail="", now=s.now, limits=s.limits
    )
    run = replace(run, failure=run.failure and replace(run.failure, message=message))
    return s.verdict("PENDING", f"{message} Restarting it.", Remove((instance.id,)), run)


def _missing(s: _Situation) -> Verdict | None:  # 9
    return s.verdict("ERROR", s.desired.problem, run=_out_of_queue(s)) if s.desired.problem else None


def _blocked(s: _Situation) -> Verdict | None:  # 10
    why = blocked(s.desired, s.observed)
    return s.verdict("ERROR", why[:MESSAGE_LIMIT], run=_out_of_queue(s)) if why else None


def _out_of_queue(s: _Situation) -> Run:
    """Who cannot start keeps nobody else waiting."""
    return replace(s.run, waiting_since=0.0)


def _prepare(s: _Situation) -> Verdict | None:  # 11
    d = s.desired
    image = s.observed.images.get(d.ref) is None
    weights = d.weights is not None and s.observed.weights.get(d.ref) is None
    if not (image or weights):
        return None
    action = Prepare(image, weights, d.hash)
    return s.verdict("PENDING", _preparing(d, action), action)


def _gpus_short(s: _Situation) -> Verdict | None:  # 12
    slots, need = s.observed.gpus, need_of(s.desired, s.observed.gpus)
    if need.gpus == 0 or (s.ahead is None and choose(slots, need)):
        return None
    run = s.run if s.run.waiting_since else replace(s.run, waiting_since=s.now)
    wake_at = s.now + REMEASURE_S if waits_for_memory(slots, need) else None
    message = waiting(slots, need, str(s.ahead) if s.ahead else None)
    return s.verdict("PENDING", message[:MESSAGE_LIMIT], run=run, wake_at=wake_at)


def _start(s: _Situation) -> Verdict:  # 13
    need = need_of(s.desired, s.observed.gpus)
    chosen = choose(s.observed.gpus, need) or ()
    gpu_ids = tuple(gpu.uuid for gpu in chosen)
    message = f"Starting a container with image {s.desired.image}{_on(gpu_ids)}."
    run = replace(s.run, waiting_since=0.0)
    return s.verdict("PENDING", message, Start(gpu_ids, utilization(chosen, need, s.desired.ask)), run)


_RULES = (
    _in_flight, _deleting, _docker_away, _stopped, _replaced, _healthy, _backing_off, _exited, _unhealthy, _missing,
    _blocked, _prepare, _gpus_short, _start,
)  # fmt: skip


# --- small words ---------------------------------------------------------------------------------------------------


def _queue_key(d: Desired) -> tuple[float, str, str]:
    waiting = d.status.run.waiting_since or float("inf")
    return (waiting, d.entity.created_at, d.entity.id)


def _occupied(observed: Observed, wanted: Iterable[Desired], in_flight: Mapping[str, Action]) -> tuple[GpuSlot, ...]:
    """The GPUs as they will be once everything is done that was decided, and where engines are loading."""
    slots = observed.gpus
    for d in wanted:
        loading = [i for i in observed.instances if i.ref == d.ref and _is_loading(d, i)]
        uuids = {uuid for i in loading for uuid in i.gpu_ids}
        slots = tuple(replace(g, starting=str(d.ref)) if g.uuid in uuids else g for g in slots)
        action = in_flight.get(d.entity.id)
        if isinstance(action, Start):
            slots = _taken(slots, action, d)
    return slots


def _taken(slots: tuple[GpuSlot, ...], start: Start, d: Desired) -> tuple[GpuSlot, ...]:
    return tuple(reserved(slot, d) if slot.uuid in start.gpu_ids else slot for slot in slots)


def _is_loading(d: Desired, i: Instance) -> bool:
    return i.state == "running" and i.id != d.status.run.ready_container and i.health.state != "ok"


def _removal(s: _Situation, at_once: bool = False) -> Remove | None:
    containers = tuple(i.id for i in (*s.current, *s.old))
    loading = not any(i.state == "running" and i.health.state == "ok" for i in (*s.current, *s.old))
    return Remove(containers, at_once or loading) if containers else None


def _routable(s: _Situation, instances: Iterable[Instance]) -> Instance | None:
    """The engine that may have traffic. One that was READY keeps it until a probe says otherwise."""
    was_ready = s.desired.status.run.ready_container
    for i in instances:
        trusted = i.health.state == "ok" or (i.health.state == "unknown" and i.id == was_ready)
        if i.state == "running" and i.port and trusted:
            return i
    return None


def _preparing(d: Desired, action: Prepare) -> str:
    if action.image:
        return f"Pulling container image {d.image}. This may take several minutes for large images."
    return "Downloading model weights. This may take several minutes."


def _on(gpu_ids: tuple[str, ...]) -> str:
    return f" on {', '.join(gpu_ids)}" if gpu_ids else ""

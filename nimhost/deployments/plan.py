"""What to do next: `plan(desired, observed, in_flight, now, limits)` -> verdicts and actions. Pure.

For each deployment the first rule that matches wins:
 1. an action is in flight -> wait; a Prepare that nobody wants any more, or that is in the way, is cancelled
 2. deletion wanted -> remove its containers, then its rows
 3. stop wanted -> remove its containers, keep its rows
 4. another version served before, or still does -> roll: `roll.py`, which asks the rest for either version
 5. running and healthy -> READY
 6. the last failure was final, or its backoff is not over -> wait
 7. exited, removed by somebody else, or left over from a start that never was -> count it, remove what is left; rule 6
    decides about another attempt
 8. running, not healthy -> PENDING; too long -> stop it and count it
 9. a reference needed to start is missing -> ERROR with its name
10. the preflight says that it cannot run here -> ERROR with the sum and the fix; PENDING for a download that had begun
    when the disk was full
11. image or weights absent -> Prepare, as soon as the registry of the image has been asked about it
12. GPUs short, or others waited longer -> PENDING, naming the holder
13. -> Start

Rules 5 to 13 are in `alone.py`. Laws: without a complete container list nothing is done; what was decided counts as
real (actions in flight hold their GPUs, and the room on disk for the weights they fetch); at most one action per
deployment; who began to wait first is served first, also when a small one would fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Forget, Halt, Prepare, Remove, Start
from nimhost.deployments.alone import bring_up
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Instance, Observed
from nimhost.deployments.placement import kept_for, reserved
from nimhost.deployments.retry import MESSAGE_LIMIT, Limits
from nimhost.deployments.roll import first_in_line, roll, soon_again
from nimhost.deployments.room import beside, coming
from nimhost.deployments.situation import Situation, Verdict, preparing, removal, routable, starting
from nimhost.entities import Status
from nimhost.refs import Ref

STOPPING = "Stopping."
DELETION = "Deployment deletion requested"


def plan(
    desired: Iterable[Desired], observed: Observed, in_flight: Mapping[str, Action], now: float, limits: Limits
) -> tuple[Verdict, ...]:
    """One verdict per deployment. `in_flight`: entity id -> the action that is being carried out."""
    wanted = sorted(desired, key=_queue_key)
    slots = _occupied(observed, wanted, in_flight)
    kept = {d.ref: (d, d.run.kept_gpus) for d in wanted if d.run.kept_gpus and not (d.stopped or d.deleting)}
    fetched = _fetched(observed, wanted, in_flight)
    ahead: Ref | None = None
    verdicts = []
    for d in wanted:
        verdict = decide(
            Situation(
                desired=d,
                observed=replace(observed, gpus=_others_kept(slots, kept, d), rooms=beside(fetched, d, observed)),
                limits=limits,
                now=now,
                run=d.run,
                instances=tuple(i for i in observed.instances if i.ref == d.ref),
                ahead=ahead,
                in_flight=in_flight.get(d.entity.id),
            )
        )
        if isinstance(verdict.action, Prepare) and verdict.action.weights:
            fetched |= coming(d, observed)
        if isinstance(verdict.action, Start):
            slots = _taken(slots, verdict.action, d)
        elif verdict.run.waiting_since and ahead is None:
            ahead = d.ref
        if kept.pop(d.ref, None) and not verdict.run.kept_gpus:  # some who wait for them have had their turn
            verdict = soon_again(verdict, now)
        if verdict.run.kept_gpus:
            kept[d.ref] = (d, verdict.run.kept_gpus)
        verdicts.append(verdict)
    return tuple(verdicts)


def orphans(instances: Iterable[Instance], desired: Iterable[Desired]) -> list[str]:
    """Containers of ours that no deployment stands for: left by a crash, or by a row that went in an odd way."""
    refs = {d.ref for d in desired}
    return [i.id for i in instances if i.ref not in refs]


def decide(s: Situation) -> Verdict:
    """The rules of the module docstring, under their numbers."""
    verdict = next(verdict for rule in _RULES if (verdict := rule(s)) is not None)
    run, leaving = verdict.run, s.desired.deleting or s.desired.stopped
    if leaving or verdict.status in ("READY", "ERROR"):  # who leaves, serves, or has given up keeps no GPUs from others
        run = replace(run, replaced_at=0.0, kept_gpus=(), waiting_since=0.0 if leaving else run.waiting_since)
    if isinstance(verdict.action, Remove):
        run = run.without(verdict.action.containers)
    return replace(verdict, run=run, message=verdict.message[:MESSAGE_LIMIT])


def _in_flight(s: Situation) -> Verdict | None:  # 1
    d, action = s.desired, s.in_flight
    if action is None:
        return None
    if d.deleting or d.stopped:
        status: tuple[Status, str] = ("DELETING", DELETION) if d.deleting else ("PENDING", STOPPING)
        return s.verdict(*status, Cancel() if isinstance(action, Prepare) else None)
    if s.observed.docker_problem is not None:
        return _docker_away(s)
    if isinstance(action, Prepare):
        if action.hash != d.hash:
            return replace(_undisturbed(s, action), action=Cancel())
        verdict = _meanwhile(s, preparing(d, action))
        return replace(verdict, action=Cancel() if verdict.action is not None else None)
    if isinstance(action, Start) and action.hash == d.hash:
        return replace(_meanwhile(s, starting(s, action.gpu_ids)), action=None)
    return replace(_undisturbed(s, action), action=None)


def _meanwhile(s: Situation, doing: str) -> Verdict:
    return roll(s, doing) if _rolls(s) else s.verdict("PENDING", doing)


def _undisturbed(s: Situation, action: Action) -> Verdict:
    """Who serves goes on serving while another container is dealt with; all else waits."""
    match action:
        case Remove(containers=gone) | Halt(container=gone):
            rest = s.without((gone,) if isinstance(gone, str) else gone)
        case _:
            rest = s
    if routable(rest, rest.instances):
        return _brought_up(rest)
    before = s.desired.status
    return s.verdict("PENDING" if before.status == "READY" else before.status, before.status_message)


def _deleting(s: Situation) -> Verdict | None:  # 2
    if not s.desired.deleting:
        return None
    if s.observed.docker_problem and s.run.started_at:
        return s.verdict("DELETING", f"{DELETION}; waiting for Docker. {s.observed.docker_problem}")
    return s.verdict("DELETING", DELETION, removal(s.instances) or Forget())


def _docker_away(s: Situation) -> Verdict | None:
    """The law before all rules but deletion: without a complete container list nothing is decided."""
    if s.observed.docker_problem is None:
        return None
    return s.verdict("UNKNOWN", s.observed.docker_problem)


def _stopped(s: Situation) -> Verdict | None:  # 3
    if not s.desired.stopped:
        return None
    message = f"Stopped. Start it with: nimhost start {s.desired.ref.name}" if not s.instances else STOPPING
    return s.verdict("PENDING", message, removal(s.instances), s.run.forgiven())


def _brought_up(s: Situation) -> Verdict:  # 4 to 13
    return roll(s) if _rolls(s) else bring_up(first_in_line(s))


def _rolls(s: Situation) -> bool:
    return s.run.previous is not None or len(s.current) < len(s.instances)


_RULES = (_in_flight, _deleting, _docker_away, _stopped, _brought_up)


# --- who has which room, and which GPU ------------------------------------------------------------------------------


def _queue_key(d: Desired) -> tuple[float, str, str]:
    waiting = d.status.run.waiting_since or float("inf")
    return (waiting, d.entity.created_at, d.entity.id)


def _fetched(
    observed: Observed, wanted: Iterable[Desired], in_flight: Mapping[str, Action]
) -> dict[tuple[str, str, str], int]:
    """What was decided to be fetched, whoever it is for."""
    found: dict[tuple[str, str, str], int] = {}
    for d in wanted:
        action = in_flight.get(d.entity.id)
        if isinstance(action, Prepare) and action.weights:
            found |= coming(d, observed)
    return found


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
    version = d.at(start.hash)
    return tuple(reserved(slot, version) if slot.uuid in start.gpu_ids else slot for slot in slots)


def _others_kept(
    slots: tuple[GpuSlot, ...], kept: Mapping[Ref, tuple[Desired, tuple[str, ...]]], d: Desired
) -> tuple[GpuSlot, ...]:
    """The GPUs as `d` sees them: what is kept for another deployment is taken."""
    for keeper, uuids in kept.values():
        if keeper.ref != d.ref:
            slots = tuple(kept_for(g, keeper) if g.uuid in uuids else g for g in slots)
    return slots


def _is_loading(d: Desired, i: Instance) -> bool:
    return i.state == "running" and i.id not in d.run.ready_containers and i.health.state != "ok"

"""Rule 4 of the plan: from one version of a deployment to the next without a gap, and back when that fails. Pure.

The new version is what is wished, the previous one is the last that was READY. First match wins:
 a. the new one is READY, with the adapters that the previous one has (for a while, that is waited for) -> it has the
    routes; the others are removed when their last requests have ended
 b. the new one cannot be started, or has failed for good -> the previous one, started again if it is gone
 c. the new one has all it needs but the GPUs of the previous one -> that leaves the routes, and is removed likewise
 d. else the previous one is kept up and serves, while the new one is brought up beside it

What the previous version needs comes first, except that one which does not serve does not hold up a start. Nobody else
gets the GPUs that it gave back before the new version is READY, or it is back on them itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from nimhost.deployments.actions import Remove, Start
from nimhost.deployments.alone import bring_up, keep_up
from nimhost.deployments.observed import Instance
from nimhost.deployments.placement import released
from nimhost.deployments.retry import MESSAGE_LIMIT
from nimhost.deployments.situation import Situation, Verdict, removal, routable

PREVIOUS = "Serving the previous version"
LOADING_ADAPTERS = "It is ready, and its adapters are being loaded."
ADAPTERS_S = 10.0
"""An adapter that does not load holds up the new version no longer than this."""
SOON_S = 0.01
"""Until the routes have followed a verdict: only then it can be known whether an engine has its last requests."""


def roll(s: Situation, doing: str | None = None) -> Verdict:
    """`doing`: what is in flight for the new version, which is asked for nothing else meanwhile."""
    new = s.verdict("PENDING", doing) if doing else bring_up(first_in_line(s))
    if new.status == "READY" and (until := _adapters_awaited_until(s, new)):
        return _tidied(s, _beside(s, s.verdict("PENDING", LOADING_ADAPTERS, wake_at=until)))
    if new.status == "READY":
        return _taken_over(s, new)
    if new.status == "ERROR":
        verdict = _gone_back(s, new)
    elif given := _way_given(s, new, doing):
        verdict = given
    else:
        verdict = _beside(s, new)
    return _tidied(s, verdict)


def soon_again(verdict: Verdict, now: float) -> Verdict:
    """Looked at again as soon as what was decided is so."""
    times = [at for at in (verdict.wake_at, now + SOON_S) if at is not None]
    return replace(verdict, wake_at=min(times))


def _taken_over(s: Situation, new: Verdict) -> Verdict:  # a
    leaving = [i for i in s.instances if i.hash != s.desired.hash]
    if not leaving:
        return new
    if new.run.ready_container != s.run.ready_container:
        return soon_again(new, s.now)
    action, wake_at = _farewell(s, leaving, new.run.ready_at)
    return replace(new, action=action, wake_at=wake_at)


def _adapters_awaited_until(s: Situation, new: Verdict) -> float | None:
    """When the new version takes over though it lacks adapters that the previous one serves; None: now."""
    order, old = s.desired.order, routable(s, _of_previous(s))
    if new.instance is None or old is None or order is None or not order.model_spec.lora_enabled:
        return None
    until = new.instance.health.since + ADAPTERS_S
    lacking = old.health.adapter_names - new.instance.health.adapter_names
    return until if lacking and s.now < until else None


def _gone_back(s: Situation, new: Verdict) -> Verdict:  # b
    kept = _kept_up(s)
    if kept is None:
        return new
    said = f"; what it said: nimhost logs {s.desired.ref.name}" if s.current else "."
    again = f"Fix it and update again{said}"
    run = replace(new.run, previous=kept.run, waiting_since=kept.run.waiting_since)
    message = f"Going back to the previous version: the new one failed. {kept.message}\n{again}\n{new.message}"
    if kept.status == "READY":
        message = f"{PREVIOUS}: the new one failed. {again}\n{new.message}"
    elif kept.status == "ERROR":
        half = MESSAGE_LIMIT // 2 - 50
        message = f"{new.message[:half]}\nThe previous version failed, too: {kept.message[:half]}"
    return replace(
        new, status=kept.status, message=message, run=run, instance=kept.instance,
        action=new.action or kept.action, wake_at=kept.wake_at, update="failed",
    )  # fmt: skip


def _way_given(s: Situation, new: Verdict, doing: str | None) -> Verdict | None:  # c
    leaving = _of_previous(s)
    # What is in flight for neither version, or for one that nobody wants any more, has a GPU that will be free again.
    if doing or s.in_flight is not None or new.action is not None or not leaving or _leftovers(s):
        return None
    held = tuple(uuid for i in leaving for uuid in i.gpu_ids)
    start = bring_up(_only_own(_without_own(s), {*held, *s.run.kept_gpus})).action
    if not isinstance(start, Start):
        return None
    kept = tuple(sorted({*held, *start.gpu_ids}))
    run = replace(new.run, replaced_at=s.run.replaced_at or s.now, kept_gpus=kept, waiting_since=0.0)
    action, wake_at = _farewell(s, leaving, run.replaced_at)
    if not s.run.replaced_at and routable(s, leaving):
        action, wake_at = None, s.now + SOON_S
    message = "Replacing the previous version: there are not GPUs enough for both. Its last requests are ending."
    return s.verdict("PENDING", message, action, run, wake_at=wake_at, update="rolling")


def _beside(s: Situation, new: Verdict) -> Verdict:  # d
    there = _of_previous(s)
    gone = s.run.replaced_at > 0 and not there
    if gone or (isinstance(new.action, Start) and not routable(s, there)):
        run = replace(new.run, replaced_at=s.run.replaced_at or s.now)
        update = None if s.run.previous is None else "rolling"
        return replace(new, run=run if s.run.previous else new.run, update=update)
    kept = _kept_up(s)
    if kept is None or kept.status == "ERROR":  # neither version has a use for what was kept
        new = replace(new, run=replace(new.run, replaced_at=0.0, kept_gpus=()))
    if kept is None:
        return new
    run = replace(new.run, previous=replace(kept.run, waiting_since=0.0))
    wake_at = min((at for at in (new.wake_at, kept.wake_at) if at is not None), default=None)
    message = f"{new.message}\nThe previous version does not serve: {kept.message}"
    if kept.status == "READY":
        message = f"{PREVIOUS} while the new one starts. {new.message}"
    return replace(
        new, status="READY" if kept.status == "READY" else "PENDING", message=message, run=run,
        instance=kept.instance, action=kept.action or new.action, wake_at=wake_at, update="rolling",
    )  # fmt: skip


def _kept_up(s: Situation) -> Verdict | None:
    """How the previous version stands; None when there is none, or it is gone and nobody knows what it was."""
    old = s.previous
    if old is not None and old.run.resolved is not None:
        return keep_up(old)
    serving = routable(s, _of_previous(s))
    if serving is None or s.run.previous is None:
        return None
    return s.verdict("READY", "", run=s.run.previous, instance=serving)


def _tidied(s: Situation, verdict: Verdict) -> Verdict:
    """With the removal of what belongs to neither version: it may hold what one of them waits for."""
    since = max(s.run.replaced_at, s.run.previous.ready_at if s.run.previous else s.run.ready_at)
    action, wake_at = _farewell(s, _leftovers(s), since)
    if action is not None:
        return replace(verdict, action=action)
    times = [at for at in (verdict.wake_at, wake_at) if at is not None]
    return replace(verdict, wake_at=min(times, default=None))


def _farewell(s: Situation, leaving: Iterable[Instance], since: float) -> tuple[Remove | None, float | None]:
    """Removal of those that have no requests any more, and when the others have had time enough."""
    end = since + s.limits.drain_timeout_s
    leaving = tuple(leaving)
    due = tuple(i for i in leaving if not i.busy or s.now >= end)
    return removal(due), end if len(due) < len(leaving) else None


def _of_previous(s: Situation) -> tuple[Instance, ...]:
    return tuple(i for i in s.instances if s.run.previous and i.hash == s.run.previous.spec_hash)


def _leftovers(s: Situation) -> tuple[Instance, ...]:
    known = {s.desired.hash, s.run.previous.spec_hash if s.run.previous else None}
    return tuple(i for i in s.instances if i.hash not in known)


def first_in_line(s: Situation) -> Situation:
    """For what was kept for it, it waits behind nobody."""
    return _only_own(s, s.run.kept_gpus) if s.run.kept_gpus else s


def _only_own(s: Situation, gpu_ids: Iterable[str]) -> Situation:
    """While others wait for GPUs it has these, and no others."""
    if s.ahead is None:
        return s
    own = set(gpu_ids)
    slots = tuple(g if g.uuid in own else replace(g, holder=g.holder or str(s.ahead)) for g in s.observed.gpus)
    return replace(s, ahead=None, observed=replace(s.observed, gpus=slots))


def _without_own(s: Situation) -> Situation:
    """As it will be when its engines have given their GPUs back."""
    slots = tuple(released(slot, str(s.desired.ref)) for slot in s.observed.gpus)
    return replace(s, observed=replace(s.observed, gpus=slots))

"""What the rules of the plan look at, and what they answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.actions import Action, Prepare, Remove
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Instance, Observed
from nimhost.deployments.retry import MESSAGE_LIMIT, Limits
from nimhost.entities import Status
from nimhost.refs import Ref
from nimhost.runs import Run, Update


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
    update: Update | None = None
    """How the change from one version to the next is going; None when there is none under way."""

    @property
    def serving(self) -> Desired:
        """What `instance` was started for: the wish, or the previous version of it."""
        return self.desired.at(self.instance.hash) if self.instance else self.desired


class Situation(Struct, frozen=True, kw_only=True):
    """All that the rules for one deployment look at."""

    desired: Desired
    observed: Observed
    """Its GPUs as this deployment may use them: what is decided for others, or kept for them, is taken."""
    limits: Limits
    now: float
    run: Run
    instances: tuple[Instance, ...]
    """Every container of this deployment, of whatever version."""
    ahead: Ref | None
    """Who waits for GPUs and is served before it."""
    in_flight: Action | None

    @property
    def current(self) -> tuple[Instance, ...]:
        """The containers of the version in question."""
        return tuple(i for i in self.instances if i.hash == self.desired.hash)

    @property
    def previous(self) -> Situation | None:
        """The same, looked at for the version that served before; None when there is none, or it is not known any
        more what that was."""
        desired, run = self.desired.previous, self.run.previous
        if desired is None or run is None:
            return None
        return replace(self, desired=desired, run=run, ahead=None)

    def without(self, containers: Iterable[str]) -> Situation:
        gone = set(containers)
        return replace(self, instances=tuple(i for i in self.instances if i.id not in gone))

    def verdict(
        self,
        status: Status,
        message: str,
        action: Action | None = None,
        run: Run | None = None,
        instance: Instance | None = None,
        wake_at: float | None = None,
        update: Update | None = None,
    ) -> Verdict:
        return Verdict(
            desired=self.desired,
            status=status,
            message=message,
            action=action,
            run=run or self.run,
            instance=instance,
            wake_at=wake_at,
            update=update,
        )


def routable(s: Situation, instances: Iterable[Instance]) -> Instance | None:
    """The engine that may have traffic. One that was READY keeps it until a probe says otherwise."""
    for i in instances:
        trusted = i.health.state == "ok" or (i.health.state == "unknown" and i.id in s.run.ready_containers)
        if i.state == "running" and i.port and trusted:
            return i
    return None


def removal(instances: Iterable[Instance], at_once: bool = False) -> Remove | None:
    """An engine that is still loading is not waited for."""
    there = tuple(instances)
    serving = any(i.state == "running" and i.health.state == "ok" for i in there)
    return Remove(tuple(i.id for i in there), at_once or not serving) if there else None


def hindered(v: Verdict, why: str | None) -> Verdict:
    """With why what is to be done for it fails again and again."""
    said = f"\nIt is tried again: {why[:300]}" if why else ""
    return v if said in v.message else replace(v, message=f"{v.message[: MESSAGE_LIMIT - len(said)]}{said}")


def preparing(d: Desired, action: Prepare) -> str:
    if action.image:
        return f"Pulling container image {d.image}. This may take several minutes for large images."
    return "Downloading model weights. This may take several minutes."


def starting(s: Situation, gpu_ids: tuple[str, ...]) -> str:
    indexes = [f"GPU {slot.index}" for slot in s.observed.gpus if slot.uuid in gpu_ids]
    where = f" on {', '.join(indexes)}" if indexes else ""
    return f"Starting a container with image {s.desired.image}{where}."

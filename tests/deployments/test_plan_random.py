"""The laws of the plan under everything at once: rolls and rolls back, deletions, crashes, failures, Docker that goes
away or restarts, kills, in thousands of random orders."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Forget, Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Health, Instance, Observed, Share
from nimhost.deployments.plan import plan
from nimhost.deployments.retry import after_error
from nimhost.deployments.situation import Verdict
from nimhost.entities import DeploymentStatus
from nimhost.errors import DockerError
from nimhost.models.memory import GIB
from nimhost.refs import Ref
from tests.deployments.make import LIMITS, NOW, wanted

NAMES = ("a", "b", "c")
CALM_ROUNDS = 400
GPU_GIB = 24
CONTENTS: tuple[tuple[int, int | None], ...] = ((0, None), (1, None), (1, None), (2, None), (1, 10), (1, 16))
"""GPUs, and the GiB of each where it is a share."""


class Machine:
    """A few GPUs, deployments whose wishes change, and everything that can happen to their engines."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now = NOW
        self.gpus = [f"GPU-{i}" for i in range(self.dice.choice((1, 2, 3)))]
        self.wishes: dict[str, list[int]] = {name: [0] for name in NAMES}
        """The content of each version; the same one may come back."""
        self.contents: dict[str, list[tuple[int, int | None]]] = {n: [self.dice.choice(CONTENTS)] for n in NAMES}
        self.stopped: set[str] = set()
        self.deleting: set[str] = set()
        self.doomed: set[tuple[str, int]] = set()
        """Contents that never get ready."""
        self.status = {name: DeploymentStatus() for name in NAMES}
        self.containers: dict[str, Instance] = {}
        self.in_flight: dict[str, Action] = {}
        self.images: set[tuple[str, int]] = set()
        self.made = 0
        self.vanished: set[str] = set()
        """Containers that somebody else removed."""
        self.away = False

    # --- what the reconciler would read

    def desired(self, name: str) -> Desired:
        status = self.status[name]
        d = self.version(name, len(self.wishes[name]), status)
        previous = d.run.previous
        if previous is None:
            return d
        return replace(d, previous=self.version(name, previous.version, replace(status, run=previous)))

    def version(self, name: str, number: int, status: DeploymentStatus) -> Desired:
        content = self.wishes[name][number - 1]
        gpus, share_gib = self.contents[name][content]
        d = wanted(
            name, gpus=min(gpus, len(self.gpus)), hash=f"{name}-{content}", deleting=name in self.deleting,
            desired="stopped" if name in self.stopped else "running",
        )  # fmt: skip
        assert d.order is not None
        order = replace(d.order, executor=replace(d.order.executor, gpu_memory_gib=share_gib))
        return replace(d, order=order, entity=replace(d.entity, version=number, status=status))

    def share_bytes(self, i: Instance) -> int | None:
        name, content = i.hash.split("-")
        share_gib = self.contents[name][int(content)][1]
        return None if share_gib is None else share_gib * GIB

    def slots(self) -> tuple[GpuSlot, ...]:
        """As they are now; fails where more is given away than there is."""
        slots = []
        for index, uuid in enumerate(self.gpus):
            on_it = [i for i in self.containers.values() if i.state == "running" and uuid in i.gpu_ids]
            alone = [i for i in on_it if self.share_bytes(i) is None]
            shares = tuple(Share(str(i.ref), self.share_bytes(i) or 0, i.hash) for i in on_it if i not in alone)
            assert len(alone) <= 1, f"{uuid} was given to {[i.id for i in alone]}"
            assert not (alone and shares), f"{uuid} was given to {[i.id for i in on_it]}"
            assert sum(share.size_bytes for share in shares) <= GPU_GIB * GIB, f"{uuid}: {shares}"
            holder = str(alone[0].ref) if alone else None
            slots.append(
                GpuSlot(uuid=uuid, index=index, total_bytes=GPU_GIB * GIB, holder=holder, shares=tuple(sorted(shares)))
            )
        return tuple(slots)

    def observed(self) -> Observed:
        slots = self.slots()
        if self.away:
            return Observed(docker_problem="Docker is not running.")
        present = {Ref("default", name): (name, self.wishes[name][-1]) for name in NAMES}
        images = {ref: "sha256:1" for ref, key in present.items() if key in self.images}
        return Observed(instances=tuple(self.containers.values()), gpus=slots, images=images)

    # --- what it would do

    def tick(self) -> dict[str, Verdict]:
        wishes = [self.desired(name) for name in NAMES]
        verdicts = plan(wishes, self.observed(), {f"id-{n}": a for n, a in self.in_flight.items()}, self.now, LIMITS)
        found = {}
        for v in verdicts:
            name = v.desired.ref.name
            self.status[name] = replace(
                self.status[name], status=v.status, status_message=v.message, run=v.run, update=v.update
            )
            found[name] = v
            if isinstance(v.action, Cancel):
                assert isinstance(self.in_flight.pop(name), Prepare)
            elif v.action is not None:
                assert name not in self.in_flight
                assert not self.away or isinstance(v.action, Forget)
                self.in_flight[name] = v.action
            self.check(v)
        return found

    def check(self, v: Verdict) -> None:
        """What holds after every single tick."""
        assert (v.instance is None) == (v.status != "READY"), (v.status, v.message)
        if v.instance is not None:
            now = self.containers[v.instance.id]
            assert now.state == "running"
            name, content = now.hash.split("-")
            assert (name, int(content)) not in self.doomed
        if v.status == "ERROR":
            assert v.run.kept_gpus == (), "who has given up keeps GPUs from others"
        missed = re.findall(r"Container (\w+) is gone", v.message)
        assert self.vanished.issuperset(missed), "what nimhost removed itself is missed"

    def settle(self) -> None:
        """Ticks as fast as it asks for, while nothing else happens: it has to come to rest, or it would never sleep."""
        before = None
        for _ in range(12):
            verdicts = self.tick()
            shown = {n: (v.status, v.message, v.update, v.instance and v.instance.id) for n, v in verdicts.items()}
            soon = [v.wake_at for v in verdicts.values() if v.wake_at and self.now < v.wake_at < self.now + 0.04]
            if shown == before and not soon:
                return
            before = shown
            self.now += 0.05
        raise AssertionError(f"it does not come to rest: {before}")

    def finish(self, name: str, fails: bool = False) -> None:
        action = self.in_flight.pop(name)
        match action:
            case Prepare(hash=version):
                if not fails:
                    self.images.add((name, int(version.split("-")[1])))
            case Start(gpu_ids=gpu_ids, hash=version):
                if self.begin(name, version) and not fails:
                    self.made += 1
                    self.containers[f"c{self.made}"] = Instance(
                        id=f"c{self.made}", ref=Ref("default", name), hash=version, state="running", port=1,
                        started_at=self.now, gpu_ids=gpu_ids,
                    )  # fmt: skip
            case Remove(containers=containers):
                for container in () if fails else containers:
                    self.containers.pop(container, None)
            case Halt(container=container):
                if not fails and container in self.containers:
                    self.end(container)
            case Forget():
                if not fails:
                    self.forget(name)
        if fails and isinstance(action, Prepare | Start):
            part = self.status[name].run.part(action.hash)
            if part is not None:
                run = self.status[name].run.with_part(after_error(part, DockerError("no"), self.now, LIMITS))
                self.status[name] = replace(self.status[name], run=run)

    def begin(self, name: str, version: str) -> bool:
        run = self.status[name].run
        part = run.part(version)
        if part is None:
            return False
        assert all(i.hash != version for i in self.containers.values() if i.ref.name == name), "its name is taken"
        resolved = replace(part, resolved={"image": "image:1"}, started_at=self.now, waiting_since=0.0)
        self.status[name] = replace(self.status[name], run=run.with_part(resolved))
        return True

    def forget(self, name: str) -> None:
        """And somebody makes another one of that name."""
        assert all(i.ref.name != name for i in self.containers.values()), "a container is left behind"
        self.status[name] = DeploymentStatus()
        self.deleting -= {name}
        self.stopped -= {name}
        self.wishes[name] = [len(self.contents[name])]
        self.contents[name].append(self.dice.choice(CONTENTS))

    def end(self, container: str) -> None:
        self.containers[container] = replace(
            self.containers[container], state="exited", exit_code=1, port=None, health=Health(), busy=False
        )

    # --- what happens

    @property
    def events(self) -> tuple[Callable[[], None], ...]:
        return (
            self.elapse, self.act, self.act, self.act, self.act, self.probe, self.probe, self.probe, self.crash,
            self.wish, self.wish, self.switch, self.delete, self.kill, self.request, self.docker,
        )  # fmt: skip

    def happen(self) -> None:
        self.dice.choice(self.events)()

    def elapse(self) -> None:
        self.now += self.dice.choice((0.1, 3.0, 70.0, 700.0))

    def act(self) -> None:
        if self.in_flight and not self.away:
            self.finish(self.dice.choice(sorted(self.in_flight)), fails=self.dice.random() < 0.15)

    def probe(self) -> None:
        for key, i in self.containers.items():
            if i.state == "running" and self.dice.random() < 0.7:
                self.containers[key] = replace(i, health=self.health(i, failing=self.dice.random() < 0.05))

    def calm_probe(self) -> None:
        for key, i in self.containers.items():
            if i.state == "running" and self.dice.random() < 0.7:
                self.containers[key] = replace(i, health=self.health(i))

    def health(self, i: Instance, failing: bool = False) -> Health:
        name, content = i.hash.split("-")
        if (name, int(content)) in self.doomed:
            return Health(state="starting")
        if failing and i.health.state == "ok":
            return Health(state="failing", since=self.now)
        return Health(state="ok")

    def crash(self) -> None:
        """Or somebody removes it."""
        running = [key for key, i in self.containers.items() if i.state == "running"]
        if running and self.dice.random() < 0.3:
            if self.made % 3:
                self.end(self.dice.choice(running))
            else:
                self.vanished.add(gone := self.dice.choice(running))
                del self.containers[gone]

    def wish(self) -> None:
        """Something new, or what was wished before."""
        if self.dice.random() < 0.4:
            name = self.dice.choice(NAMES)
            if self.dice.random() < 0.4:
                self.wishes[name].append(self.dice.choice(self.wishes[name]))
                return
            self.wishes[name].append(len(self.contents[name]))
            self.contents[name].append(self.dice.choice(CONTENTS))
            if self.dice.random() < 0.3:
                self.doomed.add((name, self.wishes[name][-1]))

    def switch(self) -> None:
        name = self.dice.choice(NAMES)
        if self.dice.random() < 0.3:
            self.stopped ^= {name}
            self.status[name] = replace(self.status[name], run=self.status[name].run.forgiven())

    def delete(self) -> None:
        if self.dice.random() < 0.1:
            self.deleting |= {self.dice.choice(NAMES)}

    def kill(self) -> None:
        """As `kill -9`: what was in flight may or may not have happened; nobody knows any health."""
        if self.dice.random() < 0.3 and not self.away:
            for name in sorted(self.in_flight):
                if self.dice.random() < 0.5:
                    self.finish(name)
            self.in_flight.clear()
            for key, i in self.containers.items():
                self.containers[key] = replace(i, health=Health(), busy=False)

    def request(self) -> None:
        for key, i in self.containers.items():
            self.containers[key] = replace(i, busy=i.state == "running" and self.dice.random() < 0.4)

    def docker(self) -> None:
        """It goes away and comes back, with its containers or without. What was in flight has failed, uncounted."""
        if self.away:
            self.away = False
        elif self.dice.random() < 0.15:
            self.away = True
            self.in_flight.clear()
            if self.dice.random() < 0.4:
                for key in [key for key, i in self.containers.items() if i.state == "running"]:
                    self.end(key)

    def calm_down(self) -> None:
        """Nothing goes wrong any more, but for versions that never get ready."""
        self.away = False
        for _ in range(CALM_ROUNDS):
            self.now += 30
            for name in sorted(self.in_flight):
                self.finish(name)
            for key, i in self.containers.items():
                self.containers[key] = replace(i, busy=False)
                if i.state == "running":
                    self.containers[key] = replace(self.containers[key], health=self.health(i))
            self.settle()


@pytest.mark.fault(6)
@pytest.mark.fault(7)
@pytest.mark.fault(20)
@pytest.mark.fault(21)
@pytest.mark.parametrize("seed", [*range(150), 2492, 4438, 8586])  # the last ones failed once, of thousands
def test_no_order_of_events_overbooks_a_gpu_or_leaves_anything_behind(seed: int) -> None:
    world = Machine(seed)
    for _ in range(200):
        world.settle()
        world.happen()
    world.calm_down()
    _check_idle(world)
    for name in NAMES:
        _check(world, name)


def _check_idle(world: Machine) -> None:
    """Once all is done nobody wakes up, nothing is kept, and who waits for GPUs waits for some that are not there."""
    verdicts = world.tick()
    assert world.in_flight == {}, "it never ends"
    assert [v.wake_at for v in verdicts.values() if v.wake_at is not None] == []
    assert [n for n, v in verdicts.items() if v.run.kept_gpus] == []
    free = sum(slot.holder is None and not slot.shares for slot in world.slots())
    queue = sorted((v.run.waiting_since, n, _sought(v).gpus) for n, v in verdicts.items() if v.run.waiting_since)
    assert not queue or queue[0][2] > free, ("nobody is served", queue, free)


def _sought(v: Verdict) -> Desired:
    """The version that waits."""
    return v.desired.previous if v.update == "failed" and v.desired.previous else v.desired


def _check(world: Machine, name: str) -> None:
    d, now = world.desired(name), world.tick()[name]
    mine = [i for i in world.containers.values() if i.ref.name == name]
    running = [i for i in mine if i.state == "running"]
    story: Any = (now.status, now.message, [(i.id, i.hash, i.state) for i in mine], d.status.run)
    if name in world.stopped:
        assert mine == [], story
        return
    waits = "Waiting for GPUs" in now.message
    if (name, world.wishes[name][-1]) in world.doomed:
        assert now.status == "ERROR" or waits or (now.status, now.update) == ("READY", "failed"), story
    else:
        failed = d.status.run.failure is not None
        assert now.status == "READY" or failed or waits, story
        assert failed or waits or now.update is None, story
    if now.status == "READY":
        expected = d.hash if now.update is None else d.status.run.previous and d.status.run.previous.spec_hash
        assert [i.hash for i in running] == [expected], story
        assert now.update is not None or d.status.run.previous is None, story
    elif not waits:
        assert running == [], story


@pytest.mark.parametrize("seed", range(60))
def test_a_version_that_serves_is_never_without_routes_when_there_is_room_beside(seed: int) -> None:
    """No crashes, no stops, GPUs enough for both: from the first READY on there is always an engine to send to."""
    world = Machine(seed)
    world.gpus = [f"GPU-{i}" for i in range(16)]
    harmless = (world.elapse, world.act, world.act, world.calm_probe, world.calm_probe, world.wish, world.request)
    ready: set[str] = set()
    for _ in range(300):
        for name, verdict in world.tick().items():
            if verdict.instance is not None:
                ready.add(name)
            assert name not in ready or verdict.instance is not None, (seed, name, verdict.message)
        world.dice.choice(harmless)()

"""The loop: wake, observe, plan, record, launch. The only writer of deployment statuses.

It sleeps until something happened: a wish changed, Docker said something, a probe found something else, an action
ended, a backoff is over. A tick with nothing to do changes nothing, so waking it once too often is harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec.structs import replace

from nimhost.deployments.actions import Action, Cancel, Forget, Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired, Find, join, join_previous
from nimhost.deployments.execute import Executor
from nimhost.deployments.observe import Observer
from nimhost.deployments.observed import Observed
from nimhost.deployments.plan import orphans, plan
from nimhost.deployments.publish import forget, publish
from nimhost.deployments.retry import Limits, after_error, after_fetching
from nimhost.deployments.situation import Verdict, hindered
from nimhost.engines.order import HostFacts
from nimhost.entities import Deployment, DeploymentConfig, DeploymentStatus, Entity
from nimhost.errors import Conflict, DockerUnavailable, NimhostError, NotFound, Unstorable
from nimhost.host.containers import Containers
from nimhost.refs import Ref
from nimhost.runs import Run, Serving
from nimhost.store import Store, now

log = logging.getLogger(__name__)

EPOCH, UNOWNED = "epoch", "unowned"
"""Keys of the store: the number of container starts, and the containers that are not ours though they say so."""

RESYNC_S = 60.0
"""A tick at least this often, in case an event was lost."""
TICKS_AT_ONCE, WITHIN_S = 20, 0.4
"""More ticks in that time are put together into one: it costs as much for one change as for a thousand."""
AFTER_ERROR_S = 5.0
RECONNECT_S = (0.5, 5.0)
"""First and longest pause between two tries to reach Docker."""


class Reconciler:
    """Makes the wishes true. `on_tick` gets every verdict, each time: routes are made from them."""

    def __init__(
        self,
        *,
        store: Store,
        observer: Observer,
        executor: Executor,
        containers: Containers,
        host: HostFacts,
        limits: Limits,
        on_tick: Callable[[tuple[Verdict, ...], Observed], Awaitable[None]],
    ) -> None:
        self._store = store
        self._observer = observer
        self._executor = executor
        self._containers = containers
        self._host = host
        self._limits = limits
        self._on_tick = on_tick
        self._wake = asyncio.Event()
        self._recording = asyncio.Lock()
        self._in_flight: dict[str, tuple[Action, asyncio.Task[None]]] = {}
        self._sweeping: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._hindered: dict[str, str] = {}
        """Entity id -> why its last action failed, of those that no limit ends."""
        self._unowned: frozenset[str] = frozenset()
        self._began: deque[float] = deque(maxlen=TICKS_AT_ONCE)
        """When the last ticks began: `time.monotonic()`."""
        self._away: Observed | None = None
        """The last look, if Docker did not answer."""
        self._ask_docker_at = 0.0
        self._unstored: str | None = None
        """The last status that could not be stored in this round, and why."""
        self.problem: str | None = None
        """Why the loop does not get on, for `/status`; None while it does."""

    def wake(self) -> None:
        self._wake.set()

    def room_made(self) -> None:
        """Who waits for room on disk need not wait any longer."""
        self._observer.room_made_at = time.time()
        self.wake()

    async def run(self) -> None:
        """Until cancelled. Containers keep running; what was in flight is continued by the next daemon."""
        async with self._store.transaction() as tx:
            self._observer.epoch = int(await tx.meta(EPOCH) or 0)
            self._unowned = self._observer.unowned = frozenset(json.loads(await tx.meta(UNOWNED) or "[]"))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_docker(), name="docker events")
            group.create_task(self._watch_store(), name="store changes")
            try:
                await self._loop()
            finally:
                await self._abandon()

    async def _loop(self) -> None:
        while True:
            await self._rest()
            self._wake.clear()
            try:
                pause_s = await self._tick()
                self.problem = self._unstored
            except Exception as error:
                # The one supervisor must outlive its own mistakes: say so, show it in /status, try again.
                log.exception("reconciling failed")
                self.problem = f"{type(error).__name__}: {error}"
                pause_s = AFTER_ERROR_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def _rest(self) -> None:
        if len(self._began) == TICKS_AT_ONCE:
            await asyncio.sleep(self._began[0] + WITHIN_S - time.monotonic())
        self._began.append(time.monotonic())

    async def _tick(self) -> float:
        """One round; how long to sleep at most."""
        async with self._recording:
            # Before the reading: an action that ends meanwhile counts as in flight still, never as nothing at all.
            in_flight = {key: action for key, (action, _) in self._in_flight.items()}
            desired = await self.read_desired()
            observed = await self._look(desired)
            await self._remember_unowned()
            now_s = time.time()
            planned = plan(desired, observed, in_flight, now_s, self._limits)
            busy = {v.desired.entity.id for v in planned if v.action is not None} | in_flight.keys()
            self._hindered = {key: why for key, why in self._hindered.items() if key in busy}  # the rest is done
            verdicts = tuple(hindered(v, self._hindered.get(v.desired.entity.id)) for v in planned)
            await self._on_tick(verdicts, observed)  # routes first: who reads READY finds the way open
            self._unstored = None
            current = [v for v in verdicts if await self._record(v)]
        for verdict in current:
            self._launch(verdict, now_s)
        if lost := orphans(observed.instances, desired):
            kept = {Ref(row.workspace, row.name) for row in await self._store.unreadable("deployments")}
            self._sweep([i.id for i in observed.instances if i.id in lost and i.ref not in kept])
        await self._on_tick(verdicts, observed)  # and again with the rows as they are now
        times = [v.wake_at for v in verdicts if v.wake_at is not None] + list(self._not_before.values())
        longest_s = RESYNC_S if observed.docker_problem is None else RECONNECT_S[1]
        return max(0.05, min([longest_s, *(at - now_s for at in times if at > now_s)]))

    async def _look(self, desired: tuple[Desired, ...]) -> Observed:
        """Docker that did not answer is left alone for a moment, unless it is heard of: others wake the loop, too."""
        if self._away is not None and time.monotonic() < self._ask_docker_at:
            return self._away
        self._ask_docker_at = time.monotonic() + RECONNECT_S[0]
        observed = await self._observer.read(desired)
        self._away = None if observed.docker_problem is None else observed
        return observed

    async def _remember_unowned(self) -> None:
        """Containers that a restored database cannot know stay untouched after the next start, too."""
        if self._observer.unowned != self._unowned:
            async with self._store.transaction() as tx:
                await tx.set_meta(UNOWNED, json.dumps(sorted(self._observer.unowned)))
            self._unowned = self._observer.unowned

    async def read_desired(self) -> tuple[Desired, ...]:
        kinds = ("deployments", "deployment-configs", "models", "filesets")
        rows = {kind: await self._store.by_ref(kind) for kind in kinds}

        def find(kind: str, workspace: str, name: str) -> Entity | None:
            return rows[kind].get(Ref(workspace, name))

        return tuple([await self._join(entity, find) for entity in rows["deployments"].values()])

    async def _join(self, entity: Entity, find: Find) -> Desired:
        config = find("deployment-configs", entity.workspace, entity.wish.config)
        number = entity.wish.config_version or (config.version if config else 0)
        d = join(entity, await self._wish_of(config, number), find, self._host, number)
        previous = d.run.previous
        return d if previous is None else await self._with_previous(d, previous, find)

    async def _with_previous(self, d: Desired, run: Run, find: Find) -> Desired:
        """With the version that `run` tells of, if its wish and its config can still be read."""
        wish: Deployment | None = await self._wish_of(d.entity, run.version)
        config = find("deployment-configs", d.ref.workspace, wish.config) if wish else None
        found: DeploymentConfig | None = await self._wish_of(config, run.config_version)
        if wish is None or found is None:
            return d
        return replace(d, previous=join_previous(d, run, wish, found, find, self._host))

    async def _wish_of(self, entity: Entity | None, version: int) -> Any:
        """What was wished in that version; None when there is no such one."""
        if entity is None or entity.version == version:
            return entity.wish if entity else None
        try:
            versions = await self._store.versions(entity.kind, entity.workspace, entity.name)
        except NotFound:  # its last rows went since they were read
            return None
        return next((v.wish for v in versions if v.version == version), None)

    async def _record(self, v: Verdict) -> bool:
        """Store what was found out; False when the wish moved on meanwhile, so that the verdict is void, or when this
        row cannot be stored: all others go on. A store that takes nothing at all ends the round."""
        before: DeploymentStatus = v.desired.status
        after = replace(before, run=v.run, update=v.update, serving=_serving(v)).moved(v.status, v.message, now())
        if v.status == "READY" and after.model_provider_id is None:
            after = replace(after, model_provider_id=str(v.desired.ref))
        try:
            recorded = await publish(self._store, v.desired, after, v.instance)
        except Unstorable as error:
            if self.problem != error.message:
                log.error("%s", error.message)
            self._unstored, self._not_before[v.desired.entity.id] = error.message, time.time() + AFTER_ERROR_S
            return False
        if not recorded:
            self.wake()
        return recorded

    def _launch(self, v: Verdict, now_s: float) -> None:
        key = v.desired.entity.id
        match v.action:
            case None:
                return
            case Cancel():
                if key in self._in_flight:
                    self._in_flight[key][1].cancel()
            case _ if key not in self._in_flight and self._not_before.get(key, 0.0) <= now_s:
                self._not_before.pop(key, None)
                task = asyncio.create_task(self._carry_out(v, v.action), name=f"{v.action} {v.desired.ref}")
                self._in_flight[key] = (v.action, task)
                task.add_done_callback(lambda _: self._landed(key))  # also of one that is cancelled before it began

    def _landed(self, key: str) -> None:
        del self._in_flight[key]
        self.wake()

    async def _carry_out(self, v: Verdict, action: Action) -> None:
        d = v.desired
        try:
            error = await self._attempt(d, action)
            self._hindered.pop(d.entity.id, None)
            if error is not None:
                await self._count_failure(d, action, error)
        except NimhostError as error:  # the store's: a full disk, a database that is locked for a moment
            log.warning("%s: what became of %s is not stored: %s", d.ref, type(action).__name__, error.message)
            self._not_before[d.entity.id] = time.time() + AFTER_ERROR_S

    async def _attempt(self, d: Desired, action: Action) -> NimhostError | None:
        """Carries it out; what went wrong."""
        try:
            await self._perform(d, action)
        except NimhostError as error:
            log.warning("%s: %s: %s", d.ref, type(action).__name__, error.message)
            return error
        except Exception:
            # An action must end in an outcome whatever happens in it, or its deployment would hang for ever.
            log.exception("%s: %s failed", d.ref, type(action).__name__)
            return NimhostError("An unexpected error occurred; see the daemon's log.")
        return None

    async def _perform(self, d: Desired, action: Action) -> None:
        match action:
            case Prepare():
                await self._executor.prepare(action, d)
                await self._prepared(d, action)
            case Start():
                await self._start(d.at(action.hash), action)
            case Remove():
                await self._executor.remove(action)
            case Halt():
                await self._executor.halt(action)
            case Forget():
                await forget(self._store, d)
            case Cancel():
                raise AssertionError("a cancellation is not carried out, it ends what is")

    async def _start(self, d: Desired, action: Start) -> None:
        run = await self._executor.resolve(d)
        started = await self._begin_start(d, run)
        if started is not None:
            await self._executor.start(action, d, run, self._store.owner, started)

    async def _begin_start(self, d: Desired, resolved: Run) -> int | None:
        """Remember a start before it happens; its number, or None when the wish moved on meanwhile."""
        async with self._recording:
            entity = await self._current(d)
            part = entity.status.run.part(d.hash) if entity else None
            if entity is None or part is None:
                return None
            run = replace(
                part, image_id=resolved.image_id, commit=resolved.commit, resolved=resolved.resolved,
                started_at=time.time(), waiting_since=0.0,
            )  # fmt: skip
            try:
                async with self._store.transaction() as tx:
                    epoch = int(await tx.meta(EPOCH) or 0) + 1
                    await tx.set_meta(EPOCH, str(epoch))
                    await tx.set_status(entity, replace(entity.status, run=entity.status.run.with_part(run)))
            except Conflict:
                return None
            self._observer.epoch = epoch
            return epoch

    async def _prepared(self, d: Desired, action: Prepare) -> None:
        async with self._recording:
            entity = await self._current(d)
            part = entity.status.run.part(d.hash) if entity else None
            if entity is not None and part is not None and (after := after_fetching(part, action.image)) != part:
                run = entity.status.run.with_part(after)
                await self._store.set_status(entity, replace(entity.status, run=run))

    async def _count_failure(self, d: Desired, action: Action, error: NimhostError) -> None:
        """Prepare and Start count, unless it was Docker that went away; what removes is simply tried again."""
        if isinstance(error, DockerUnavailable) or not isinstance(action, Prepare | Start):
            away = isinstance(error, DockerUnavailable)
            pause_s = RECONNECT_S[0] if away else AFTER_ERROR_S
            self._not_before[d.entity.id] = time.time() + pause_s  # Docker may answer all else
            if not away:
                self._hindered[d.entity.id] = error.in_full
            return
        async with self._recording:
            entity = await self._current(d)
            part = entity.status.run.part(action.hash) if entity else None
            if entity is None or part is None:
                return
            fetching = isinstance(action, Prepare)
            run = entity.status.run.with_part(after_error(part, error, time.time(), self._limits, fetching))
            await self._store.set_status(entity, replace(entity.status, run=run))

    async def _current(self, d: Desired) -> Entity | None:
        """The deployment as it is stored now, if its wish is still the one in `d`."""
        entity = await self._store.find("deployments", *d.ref)
        same = entity is not None and (entity.id, entity.generation) == (d.entity.id, d.entity.generation)
        return entity if same else None

    def _sweep(self, containers: list[str]) -> None:
        for container in containers:
            if container not in self._sweeping:
                log.warning("removing container %s: no deployment stands for it", container[:12])
                self._sweeping[container] = asyncio.create_task(self._remove_orphan(container))

    async def _remove_orphan(self, container: str) -> None:
        try:
            await self._containers.remove(container)
        except NimhostError as error:
            log.warning("cannot remove container %s: %s", container[:12], error.message)
            await asyncio.sleep(AFTER_ERROR_S)
        finally:
            del self._sweeping[container]
            self.wake()

    async def _watch_docker(self) -> None:
        """Every container event wakes the loop; so does Docker's coming and going."""
        pause_s = RECONNECT_S[0]
        while True:
            try:
                async with contextlib.aclosing(self._containers.events()) as events:
                    async for _ in events:
                        pause_s, self._ask_docker_at = RECONNECT_S[0], 0.0
                        self.wake()
            except NimhostError as error:
                if not isinstance(error, DockerUnavailable):
                    log.warning("Docker's events broke off: %s", error.message)
                self.wake()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_S[1])

    async def _watch_store(self) -> None:
        while True:
            await self._store.changed.wait()
            self._store.changed.clear()
            self.wake()

    async def _abandon(self) -> None:
        tasks = [task for _, task in self._in_flight.values()] + list(self._sweeping.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _serving(v: Verdict) -> Serving | None:
    part = v.run.part(v.instance.hash) if v.instance else None
    return Serving(entity_version=part.version, config_version=part.config_version) if part else None

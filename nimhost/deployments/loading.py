"""Keeps the adapters of running engines in step with the wishes: brings the files, loads, unloads, tidies up.

It is told what runs after every tick of the reconciler, hears of changed wishes itself, and decides with
`adapters.difference`. Which adapters an engine has is asked of the engine, so this has no state that must survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

from msgspec.structs import replace

from nimhost.deployments.adapter_calls import AdapterCalls
from nimhost.deployments.adapter_copies import AdapterCopies
from nimhost.deployments.adapters import (
    LOADING,
    RETRY_S,
    Copy,
    Engine,
    Lacking,
    Load,
    Step,
    Taker,
    Unload,
    Wait,
    Wanted,
    answers,
    difference,
    engines_of,
    loaded_in,
    not_taken,
    refused_by_all,
    retry_pause_s,
    silent_nims,
    takers_of,
    wanted_adapters,
)
from nimhost.deployments.nim_directories import NimDirectories
from nimhost.deployments.observed import Observed
from nimhost.deployments.probe import Prober
from nimhost.deployments.situation import Verdict
from nimhost.entities import Entity, Json
from nimhost.errors import NimhostError
from nimhost.host.threads import in_thread
from nimhost.host.weights import WeightsProgress
from nimhost.refs import Ref, adapter_served_name
from nimhost.store import Store

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 60.0
"""Files that somebody changed by hand are noticed after this time."""
NIM_LOOK_S = 2.0
"""A NIM that is to find something new is asked this often whether it has."""
PATIENCE_S = 3.0
"""How long a request waits for its adapter to be loaded, or gone."""
KINDS = frozenset({"adapters", "filesets", "secrets"})
"""A change of one of these may change an adapter, and so may one of its model."""


class Loader:
    """Owned by the daemon. `on_change` is called when what is to be shown or routed changed."""

    def __init__(self, store: Store, copies: AdapterCopies, prober: Prober, on_change: Callable[[], None]) -> None:
        self._store = store
        self._bringer = copies
        self._prober = prober
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self._takers: tuple[Taker, ...] = ()
        self._engines: tuple[Engine, ...] = ()
        self._whole = False
        """All of our containers are known, with what they have loaded: what none of them has may go."""
        self._silent: frozenset[Ref] = frozenset()
        self._in_use: set[str] = set()
        """Copies that an engine has loaded, also one that should take no adapters any more."""
        self._copies: dict[Ref, Copy | Lacking] = {}
        self._asked = 0
        self._looked_at = 0.0
        self._brought: dict[Ref, int] = {}
        """Adapter -> the value of `_asked` when its files were looked at."""
        self._models: dict[Ref, Ref] = {}
        """Adapter -> the model that the files were brought for: a new adapter may have the name of one that went."""
        self._retry_at: dict[Ref | str, float] = {}
        """By adapter or container; nothing is done for it before."""
        self._failures: dict[Ref | str, int] = {}
        """By adapter or container: in a row."""
        self._routed = (-1, -1)
        self._loop: asyncio.Task[None] | None = None
        self._work: dict[Ref | str, asyncio.Task[None]] = {}
        """By adapter: its files are brought; by container: its engine is brought in step."""
        self._calls = AdapterCalls(prober)
        self._nims = NimDirectories(copies.files, prober)
        self.revision = 0
        """Counts changes of what is to be shown or routed."""

    # --- told by others

    def saw(self, verdicts: tuple[Verdict, ...], observed: Observed, made_of: tuple[int, int]) -> None:
        """After every tick, once its routes are in place. `made_of`: revisions of the store and of this, by then."""
        self._routed = made_of
        takers, engines = takers_of(verdicts), engines_of(verdicts, observed)
        running = [i for i in observed.instances if i.state == "running"]
        whole = observed.docker_problem is None and all(answers(i) for i in running)
        self._in_use = {directory for i in running for directory in loaded_in(i.health).values()}
        seen = (takers, engines, whole, silent_nims(verdicts, observed))
        if seen != (self._takers, self._engines, self._whole, self._silent):
            self._takers, self._engines, self._whole, self._silent = seen
            self._wake.set()
        self._move()

    def wrote(self, written: Iterable[tuple[str, str, str]]) -> None:
        """Something (kind, workspace, name) was written."""
        if any(self._may_matter(*thing) for thing in written):
            self.look_again()

    def _may_matter(self, kind: str, workspace: str, name: str) -> bool:
        """Of models only those that something takes adapters for: others are made by the thousand."""
        if kind == "models":
            return any(taker.model == (workspace, name) for taker in self._takers)
        return kind in KINDS

    def look_again(self) -> None:
        """Files may have changed, or what kept an engine from loading them."""
        self._asked += 1
        self._calls.forget_refusals()
        self._retry_at.clear()
        self._wake.set()

    # --- asked by others

    def waiting(self, wanted: Iterable[Wanted]) -> dict[Ref, dict[str, str]]:
        """Deployment -> adapters that its engines do not all serve as they are wished -> why."""
        found: dict[Ref, dict[str, str]] = {}
        every = tuple(wanted)
        for engine in map(self._current, self._engines):
            for step in self._steps(every, engine):
                if not isinstance(step, Unload):
                    message = step.message if isinstance(step, Wait) else LOADING
                    found.setdefault(engine.deployment, {})[step.name] = message
        return found

    async def check(self, fileset: Entity, model: Entity) -> int:
        """See AdapterCopies.check."""
        return await self._bringer.check(fileset, model)

    def refusal(self, rank: int, model: Ref) -> str | None:
        """Why no engine of that model that runs can load an adapter of that rank; None when one can, or none runs."""
        return refused_by_all(rank, model, self._engines)

    def shown(self, row: Entity) -> Json:
        """For replies about an adapter: its name for engines, the deployments that serve it, why others do not."""
        wanted = Wanted(ref=Ref(row.workspace, row.name), model=Ref(*row.wish.model.split("/", 1)))
        # As of the last tick: those that the gateway sends requests to.
        on = sorted({str(e.deployment) for e in self._engines if e.model == wanted.model and wanted.name in e.loaded})
        return {"served_name": wanted.name, "loaded_on": on, "status_message": self._why(row, wanted, on)}

    def _why(self, row: Entity, wanted: Wanted, on: Collection[str]) -> str | None:
        if why := not_taken(row, self._takers):
            return why
        takers = [taker for taker in self._takers if taker.model == wanted.model]
        waiting, running = self.waiting([wanted]), {engine.deployment for engine in self._engines}
        said = []
        for taker in takers:
            message = waiting.get(taker.deployment, {}).get(wanted.name)
            if message is None and str(taker.deployment) not in on:
                message = LOADING if taker.deployment in running else taker.message
            said += [f"{taker.deployment}: {message}"] if message else []
        return " ".join(said) or None

    async def settle(self, ref: Ref) -> None:
        """Returns when the engines are in step with the wish for this adapter, or it is known why not, or after
        PATIENCE_S. NIMs take longer than anybody would wait."""
        name, written = adapter_served_name(ref), self._store.revision
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    moved = self._moved  # before the look: what happens during it is not missed
                    if await self._is_settled(ref, name, written):
                        return
                    await moved.wait()

    async def _is_settled(self, ref: Ref, name: str, written: int) -> bool:
        row = await self._store.find("adapters", *ref)
        wanted = wanted_adapters([row] if row else [])
        now = {e.container: self._current(e) for e in self._engines}
        taken = any(t.model == w.model for t in self._takers for w in wanted)
        if not taken and not any(name in e.loaded for e in (*now.values(), *self._engines)):
            return True  # nothing to do with any engine
        if self._routed[0] < written or self._routed[1] < self.revision:
            return False
        engines = [e for e in self._engines if e.kind == "vllm"]
        looking = bool(wanted) and (ref in self._work or self._brought.get(ref) != self._asked)
        if engines and (looking or any(e.container in self._work for e in engines)):
            return False
        return all(self._is_done(name, wanted, seen, now[seen.container]) for seen in engines)

    def _is_done(self, name: str, wanted: tuple[Wanted, ...], seen: Engine, now: Engine) -> bool:
        """As far as it goes, and the last tick saw it."""
        step = next((step for step in self._steps(wanted, now) if step.name == name), None)
        return isinstance(step, Wait) or (step is None and seen.loaded == now.loaded)

    # --- the loop

    def start(self) -> None:
        self._store.listeners.append(self.wrote)
        self._loop = asyncio.create_task(self._run(), name="adapters")

    async def close(self) -> None:
        """What engines have loaded stays loaded."""
        tasks = [*self._work.values(), *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._calls.close()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause_s = await self._round()
            except NimhostError as error:  # the disk, say
                log.warning("adapters: %s", error.in_full)
                pause_s = RETRY_S
            except Exception:
                # Adapters must not stop being loaded because of one that surprises us.
                log.exception("loading adapters failed")
                pause_s = RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def _round(self) -> float:
        """One look at everything; how long to sleep at most."""
        now_s = time.monotonic()
        if now_s - self._looked_at >= LOOK_AGAIN_S:
            self._asked, self._looked_at = self._asked + 1, now_s
        models = {taker.model for taker in self._takers}
        every = wanted_adapters((await self._store.by_ref("adapters")).values())
        wanted = tuple(w for w in every if w.model in models)
        self._forget_others(wanted)
        for w in wanted:
            stale = self._brought.get(w.ref) != self._asked or w.ref in self._retry_at
            if stale and self._may_begin(w.ref, now_s):
                self._begin(w.ref, self._bring(w, self._asked))
        for engine in map(self._current, self._engines):
            steps = [step for step in self._steps(wanted, engine) if not isinstance(step, Wait)]
            if (steps or self._calls.is_unlisted(engine)) and self._may_begin(engine.container, now_s):
                self._begin(engine.container, self._carry_out(engine, steps))
        engines = tuple(map(self._current, self._engines))
        looking = await self._nims.fill(wanted, self._copies, self._takers, engines, self._silent)
        if self._whole and not self._work:
            await self._tidy(every)
        self._move()
        times = [at - now_s for at in self._retry_at.values() if at > now_s]
        return max(0.05, min([LOOK_AGAIN_S, *times, *([NIM_LOOK_S] if looking else [])]))

    def _may_begin(self, key: Ref | str, now_s: float) -> bool:
        return key not in self._work and self._retry_at.get(key, 0.0) <= now_s

    def _forget_others(self, wanted: tuple[Wanted, ...]) -> None:
        """What is known about adapters and engines that are no longer there or no longer wanted."""
        same = {w.ref for w in wanted if self._models.get(w.ref, w.model) == w.model}
        self._models = {w.ref: w.model for w in wanted}
        here: set[Ref | str] = same | {e.container for e in self._engines}
        known: tuple[dict[Any, Any], ...] = (self._copies, self._brought, self._retry_at, self._failures)
        for kept in known:
            for key in kept.keys() - here:
                del kept[key]
        self._calls.forget_others(here)
        for key in self._work.keys() - here:
            self._work[key].cancel()

    def _begin(self, key: Ref | str, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del self._work[key]
            if not task.cancelled() and (error := task.exception()) is not None:
                # It must neither end unheard nor begin again at once, whatever it was.
                log.error("adapters: %s", key, exc_info=error)
                self._fail(key, None)
            self._wake.set()
            self._move()

        self._retry_at.pop(key, None)
        self._work[key] = asyncio.create_task(work, name=f"adapters {key}")
        self._work[key].add_done_callback(ended)  # also of one that is cancelled before it began

    def _fail(self, key: Ref | str, error: NimhostError | None) -> None:
        """It is tried again after a while."""
        self._failures[key] = self._failures.get(key, 0) + 1
        pause_s = retry_pause_s(self._failures[key], getattr(error, "retry_after_s", None))
        self._retry_at[key] = time.monotonic() + pause_s

    def _current(self, engine: Engine) -> Engine:
        """With what it has loaded by now."""
        return replace(engine, loaded=loaded_in(self._prober.health(engine.container)))

    def _steps(self, wanted: tuple[Wanted, ...], engine: Engine) -> list[Step]:
        """The difference, where an engine that refused a copy is not asked again."""
        steps: list[Step] = []
        for step in difference(wanted, self._copies, engine):
            said = self._calls.refusal(engine, step) if isinstance(step, Load) else None
            steps.append(Wait(step.name, said) if said else step)
        return steps

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _changed(self) -> None:
        self.revision += 1
        self._on_change()

    # --- files

    async def _bring(self, w: Wanted, asked: int) -> None:
        def say(progress: WeightsProgress) -> None:
            if not isinstance(self._copies.get(w.ref), Copy):
                self._copies[w.ref] = Lacking(message=_downloading(progress))

        before = self._copies.get(w.ref)
        try:
            found: Copy | Lacking = await self._bringer.bring(w, say)
            self._failures.pop(w.ref, None)
        except NimhostError as error:
            found = Lacking(message=error.in_full)
            if found != before:
                log.warning("adapter %s: %s", w.ref, found.message)
            if not error.final:
                self._fail(w.ref, error)
        self._copies[w.ref], self._brought[w.ref] = found, asked
        if found != before:
            self._changed()

    async def _tidy(self, every: tuple[Wanted, ...]) -> None:
        """Copies that no engine has loaded and nobody wants. Those of an adapter that waits for something are kept."""
        keep: dict[Ref, set[str]] = {}
        spared: set[str] = set()
        for w in every:
            copy = self._copies.get(w.ref)
            if isinstance(copy, Copy):
                keep.setdefault(w.model, set()).add(copy.directory)
            else:
                spared.add(w.name)
        loaded = {directory for e in map(self._current, self._engines) for directory in e.loaded.values()}
        await in_thread(self._bringer.files.prune, keep, loaded | self._in_use, spared)

    # --- engines

    async def _carry_out(self, engine: Engine, steps: Iterable[Load | Unload]) -> None:
        failures = self._failures.pop(engine.container, 0)
        if not await self._calls.carry_out(engine, steps):
            self._failures[engine.container] = failures
            self._fail(engine.container, None)
        self._changed()


def _downloading(progress: WeightsProgress) -> str:
    part = f"{progress.done_bytes / 1e6:.0f} of {progress.total_bytes / 1e6:.0f} MB"
    return f"Downloading its files: {part}. {progress.message}".rstrip()

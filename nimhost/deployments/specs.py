"""Finds out what models are: fills their specs, in the request that makes them or later, and says what it waits for.

A model that names a fileset and is not described yet is all the state there is: a restart looks for those. After that
it acts only when told: a model was made or changed (`settle`), or something that a failed one needs has (`touched`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from msgspec.structs import replace

from nimhost.deployments.filesets import Filesets
from nimhost.deployments.storage import origin_of, ref_in, secret_of
from nimhost.entities import Entity, ModelStatus
from nimhost.errors import BadRequest, HostError, NimhostError
from nimhost.host.weights.spec import describe_weights
from nimhost.models.spec import ToolCalling, described, inherited, is_described, not_described
from nimhost.refs import Ref
from nimhost.store import Store

log = logging.getLogger(__name__)

PATIENCE_S = 3.0
"""How long a request waits for a spec."""
PAUSES_S = (10.0, 600.0)
"""First and longest pause between two tries at what may pass."""
PARALLEL = 4

Touched = tuple[str, str, str]
"""Kind, workspace and name of something that was written."""


class _Work:
    """One model that is being described."""

    def __init__(self) -> None:
        self.tried = asyncio.Event()
        """It is known how the first try went."""
        self.task: asyncio.Task[None]


class Specs:
    """Owned by the daemon. `plugins`: whether tool-call plugins are enabled; else filesets hand none down."""

    def __init__(self, store: Store, filesets: Filesets, *, plugins: bool) -> None:
        self._store = store
        self._filesets = filesets
        self._plugins = plugins
        self._room = asyncio.Semaphore(PARALLEL)
        self._work: dict[Ref, _Work] = {}
        self._failed: dict[Touched, set[Ref]] = {}
        """What failed models need -> those models."""

    async def start(self) -> None:
        """Take up what a former process left."""
        self._store.listeners.append(self._retry)
        for model in await self._store.all("models"):
            if not is_described(model):
                self._begin(Ref(model.workspace, model.name))

    async def close(self) -> None:
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self, model: Entity) -> Entity:
        """The model as it is once it is described, or after PATIENCE_S, and then its status says what it waits for."""
        if is_described(model):
            return model
        work = self._begin(Ref(model.workspace, model.name))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await work.tried.wait()
        except TimeoutError:
            await self._mark_slow(model)
        return await self._store.find("models", model.workspace, model.name) or model

    def touched(self, written: Iterable[Touched]) -> None:
        """Look again at these models, and at those that failed for one of the other things."""
        written = set(written)
        self._retry(written)
        for kind, *ref in written:
            if kind == "models":
                self._begin(Ref(*ref))

    def _retry(self, written: Iterable[Touched]) -> None:
        for model in {model for thing in written for model in self._failed.pop(thing, ())}:
            self._begin(model)

    def _begin(self, model: Ref) -> _Work:
        """A fresh try, also where one waits for a better time."""
        if old := self._work.get(model):
            old.task.cancel()
        work = self._work[model] = _Work()
        work.task = asyncio.create_task(self._follow(model, work), name=f"spec of {model}")
        return work

    async def _follow(self, model: Ref, work: _Work) -> None:
        """Until the model is described, gone, or has failed for good."""
        pause_s = PAUSES_S[0]
        try:
            while (failure := await self._attempt(model)) is not None and not failure.final:
                work.tried.set()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSES_S[1])
        finally:
            work.tried.set()
            if self._work.get(model) is work:
                del self._work[model]

    async def _attempt(self, ref: Ref) -> NimhostError | None:
        try:
            return await self._try(ref)
        except NimhostError as failure:  # the store's: a full disk, a database that is locked for a moment
            log.warning("the spec of model %s is not stored: %s", ref, failure)
            return failure

    async def _try(self, ref: Ref) -> NimhostError | None:
        """One attempt, and its outcome in the model's status. None: there is nothing left to do."""
        while True:
            model = await self._store.find("models", *ref)
            if model is None or is_described(model):
                return None
            failure, status = await self._outcome(model)
            if model.status == status or await self._store.set_status(model, status):
                return failure

    async def _outcome(self, model: Entity) -> tuple[NimhostError | None, ModelStatus]:
        where = ref_in(model.wish.fileset, model.workspace)
        fileset = None
        try:
            if where is None:
                raise BadRequest(f"Model {model.ref} names no fileset.")
            fileset = await self._store.find("filesets", *where)
            async with self._room:
                return None, await self._describe(model, fileset)
        except NimhostError as error:
            log.info("spec of model %s: %s", model.ref, error.message)
            failure = error
        except Exception as error:
            # Checkpoints come from anywhere: who dies of one leaves a model without a spec and without a word.
            log.exception("spec of model %s", model.ref)
            failure = HostError(f"Reading it failed: {error!r}"[:500])
        for thing in _needed(where, fileset):
            self._failed.setdefault(thing, set()).add(Ref(model.workspace, model.name))
        message = f"{failure.message.rstrip('.')}. {failure.hint or ''}".strip()
        return failure, not_described(model, message, final=failure.final)

    async def _describe(self, model: Entity, fileset: Entity | None) -> ModelStatus:
        if fileset is None:
            raise BadRequest(f"Fileset '{model.wish.fileset}' does not exist.")
        source = await self._filesets.open(fileset)
        computed = await describe_weights(source, f"{model.name} {origin_of(fileset.wish.storage)}")
        tools = inherited(model, fileset.wish, fileset.ref)
        return described(model, computed, self._allowed(tools))

    def _allowed(self, tools: ToolCalling | None) -> ToolCalling | None:
        return tools if tools is None or self._plugins else replace(tools, tool_call_plugin=None)

    async def _mark_slow(self, model: Entity) -> None:
        """Say that it takes time, unless it has been done by now."""
        async with self._store.transaction() as tx:
            now = await tx.find("models", model.workspace, model.name)
            if now is not None and not is_described(now):
                message = f"Reading what fileset '{now.wish.fileset}' holds; it takes longer than {PATIENCE_S:g} s."
                await tx.set_status(now, not_described(now, message, final=False))


def _needed(where: Ref | None, fileset: Entity | None) -> list[Touched]:
    """What a change of might help: the fileset, and the secret that opens it."""
    if where is None:
        return []
    secret = ref_in(secret_of(fileset.wish.storage), where.workspace) if fileset else None
    return [("filesets", *where), *([("secrets", *secret)] if secret else [])]

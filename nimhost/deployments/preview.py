"""What would become of a deployment, without making it: for `nimhost plan`, dry runs, and early refusals."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace

from nimhost.deployments.desired import Desired, Find, join
from nimhost.deployments.explain import explanation
from nimhost.deployments.filesets import Filesets
from nimhost.deployments.gpu_use import slots_of
from nimhost.deployments.observe import Observer
from nimhost.deployments.preflight import check_wish
from nimhost.deployments.storage import HubWeights, origin_of
from nimhost.engines.order import HostFacts
from nimhost.entities import (
    Deployment,
    DeploymentConfig,
    DeploymentStatus,
    Entity,
    Fileset,
    LocalStorage,
    Model,
    ModelStatus,
)
from nimhost.errors import NimhostError
from nimhost.host.gpus import Gpus, limited
from nimhost.host.weights.spec import describe_weights
from nimhost.store import Store

Json = dict[str, Any]
KINDS_READ = ("models", "filesets", "adapters")


class Previews:
    """Reads the machine; writes nothing."""

    def __init__(
        self,
        *,
        store: Store,
        observer: Observer,
        gpus: Gpus,
        devices: list[str],
        filesets: Filesets,
        host: HostFacts,
    ) -> None:
        self._store = store
        self._observer = observer
        self._gpus = gpus
        self._devices = devices
        self._filesets = filesets
        self._host = host

    async def desired(self, config: Entity, deployment: Entity | None = None) -> Desired:
        """A deployment of this config; `deployment`: the one that there is."""
        return join(deployment or _nobody(config.workspace, config.name), config.wish, await self._find(), self._host)

    async def check(self, d: Desired, force: bool) -> None:
        """Refuse what this machine can never run. Raises BadRequest, naming the field."""
        problem = await asyncio.to_thread(self._observer.local_problem, d.weights)
        facts = limited(await self._gpus.read(), self._devices)
        check_wish(d, slots_of(facts.gpus, ()), problem, force, facts.problem)
        if isinstance(d.weights, HubWeights):
            await self._filesets.confirm(d.weights)

    async def explain(self, config: Entity, deployment: Entity | None = None) -> Json:
        """See `explanation`."""
        return await self._explain(await self.desired(config, deployment))

    async def explain_wish(self, workspace: str, config: DeploymentConfig, fileset: Fileset | None) -> Json:
        """Of a deployment that would be made together with its model: `fileset` is where that comes from.

        What cannot be found out about the model, and why, is in `unknown`.
        """
        name = config.model_spec.model_name or "plan"
        model, unknown = await self._model(workspace, name, fileset) if fileset else (None, None)
        row = fileset and _row(fileset, workspace, name)
        rows = {("models", workspace, name): model, ("filesets", workspace, name): row}
        found = await self._find()

        def find(kind: str, place: str, name: str) -> Entity | None:
            return rows.get((kind, place, name)) or found(kind, place, name)

        d = join(_nobody(workspace, name), config, find, self._host)
        return await self._explain(d) | {"unknown": unknown}

    async def _explain(self, d: Desired) -> Json:
        problem = await asyncio.to_thread(self._observer.local_problem, d.weights)
        d = replace(d, problem=d.problem or problem)
        return explanation(d, await self._observer.preview(d))

    async def _model(self, workspace: str, name: str, fileset: Fileset) -> tuple[Entity, str | None]:
        """The model entity that `deploy` would make, and why its size is not known."""
        row, wish = _row(fileset, workspace, name), Model(fileset=f"{workspace}/{name}")
        try:
            source = await self._filesets.open(row)
            spec = await describe_weights(source, f"{name} {_origin(fileset)}")
        except NimhostError as error:
            return _row(wish, workspace, name), error.in_full
        return _row(replace(wish, spec=spec), workspace, name), None

    async def _find(self) -> Find:
        rows = {(e.kind, e.workspace, e.name): e for kind in KINDS_READ for e in await self._store.all(kind)}
        return lambda *key: rows.get(key)


def _nobody(workspace: str, name: str) -> Entity:
    return Entity(
        kind="deployments", id="", workspace=workspace, name=name, created_at="", updated_at="",
        wish=Deployment(config=name), status=DeploymentStatus(),
    )  # fmt: skip


def _row(wish: Fileset | Model, workspace: str, name: str) -> Entity:
    kind, status = ("models", ModelStatus()) if isinstance(wish, Model) else ("filesets", None)
    return Entity(
        kind=kind, id="", workspace=workspace, name=name, created_at="", updated_at="", wish=wish, status=status
    )


def _origin(fileset: Fileset) -> str:
    storage = fileset.storage
    return (storage.path or "") if isinstance(storage, LocalStorage) else origin_of(storage)

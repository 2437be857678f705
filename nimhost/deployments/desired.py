"""What is wanted: a deployment joined with everything it refers to, in one place. A missing reference is data. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from nimhost.deployments.fit import ask_of
from nimhost.deployments.storage import Weights, ref_in, weights_in
from nimhost.engines.order import ChatOrder, HostFacts, ModelOrder, Order
from nimhost.engines.recipes import image_for, needs_weights
from nimhost.engines.spec import spec_hash
from nimhost.entities import (
    Deployment,
    DeploymentConfig,
    DeploymentStatus,
    DeployModelSpec,
    Entity,
    Fileset,
    LocalStorage,
    Model,
)
from nimhost.errors import NimhostError
from nimhost.models.memory import GIB, Ask
from nimhost.models.spec import chat_of, spec_of
from nimhost.refs import Ref, is_name
from nimhost.runs import Run

Find = Callable[[str, str, str], Entity | None]
"""(kind, workspace, name) -> the row, or None."""


class Desired(Struct, frozen=True, kw_only=True):
    """One deployment as it should be."""

    entity: Entity
    order: Order | None = None
    image: str = ""
    weights: Weights | None = None
    hash: str = ""
    ask: Ask | None = None
    """How its engine will use GPU memory; None where that is not known."""
    problem: str | None = None
    """Why it cannot be started as it is: a reference that is missing, a wish that makes no sense."""
    config_version: int = 0
    """Of the config that it follows."""
    previous: Desired | None = None
    """The version that served before this one, as it was wished then; None when there is none, or it is not known."""

    @property
    def ref(self) -> Ref:
        return Ref(self.entity.workspace, self.entity.name)

    @property
    def status(self) -> DeploymentStatus:
        status: DeploymentStatus = self.entity.status
        return status

    @property
    def run(self) -> Run:
        """What is known about bringing up this very wish."""
        return self.status.run.of(self.hash, self.entity.version, self.config_version)

    def at(self, hash: str) -> Desired:
        """The version that runs under this hash."""
        return self.previous if self.previous is not None and self.previous.hash == hash else self

    @property
    def deleting(self) -> bool:
        return bool(self.entity.wish.deleting)

    @property
    def stopped(self) -> bool:
        return bool(self.entity.wish.desired == "stopped")

    @property
    def gpus(self) -> int:
        return self.order.gpus if self.order else 0

    @property
    def share_bytes(self) -> int | None:
        """How much of each GPU it asks for; None: all, for itself alone."""
        share_gib = self.order.executor.gpu_memory_gib if self.order else None
        return None if share_gib is None else int(share_gib * GIB)


def join(
    entity: Entity, config: DeploymentConfig | None, find: Find, host: HostFacts, config_version: int = 0
) -> Desired:
    """`entity` with what it refers to; `config` is the wish of the version it follows, None when it is gone."""
    if config is None:
        there = find("deployment-configs", entity.workspace, entity.wish.config) is not None
        lacks = f"has no version {config_version}" if there else "does not exist"
        return Desired(entity=entity, problem=f"Deployment config '{entity.wish.config}' {lacks}.")
    order = _order(entity, config, find)
    hash = wish_hash(entity, config, order.model)
    desired = Desired(entity=entity, order=order, hash=hash, config_version=config_version)
    try:
        image = image_for(order, host)
        problem, weights = _weights(order, host, _resolved_commit(desired))
    except NimhostError as error:
        return msgspec.structs.replace(desired, problem=error.message)
    return msgspec.structs.replace(desired, image=image, weights=weights, ask=ask_of(order, host), problem=problem)


def join_previous(
    d: Desired, run: Run, wish: Deployment, config: DeploymentConfig, find: Find, host: HostFacts
) -> Desired:
    """The version of `d` that was run as `run` says: its own wish, whether it is to run at all from `d`.

    It was resolved when it first started, so that nothing it refers to can be missing.
    """
    wish = msgspec.structs.replace(wish, desired=d.entity.wish.desired, deleting=d.entity.wish.deleting)
    status = msgspec.structs.replace(d.status, run=run)
    entity = msgspec.structs.replace(d.entity, version=run.version, wish=wish, status=status)
    found = join(entity, config, find, host, run.config_version)
    image = (run.resolved or {}).get("image", found.image)
    return msgspec.structs.replace(found, hash=run.spec_hash, image=image, weights=None, problem=None)


def model_ref(spec: DeployModelSpec, workspace: str) -> Ref | None:
    """The entity a `model_spec` can point at. `{namespace: default, name: q}` and `{name: default/q}` are the same."""
    name = (spec.model_name or "").partition("@")[0]
    if spec.model_namespace is None and "/" in name:
        namespace, _, name = name.partition("/")
    else:
        namespace = spec.model_namespace or workspace
    return Ref(namespace, name) if is_name(namespace) and is_name(name) else None


def wish_hash(entity: Entity, config: DeploymentConfig, model: ModelOrder | None) -> str:
    """The identity of a wish. Only what a client decides is in it, and defaults are not: a new nimhost with new
    fields, a new default image or a model spec that arrives late never restarts a healthy engine."""
    wish = {
        "engine": config.engine,
        "model_spec": _changed(config.model_spec),
        "executor_config": _changed(config.executor_config),
        "fileset": str(model.fileset) if model and model.fileset else None,
        "storage": _changed(model.storage) if model and model.storage else None,
        "trust_remote_code": model.trust_remote_code if model else False,
        "version": entity.version,
    }
    return spec_hash(wish)


def _changed(value: Any) -> Any:
    """A Struct as a dict of the fields that differ from their defaults."""
    if not isinstance(value, Struct):
        return value
    found = {}
    for f in msgspec.structs.fields(value):
        current = getattr(value, f.name)
        default = f.default_factory() if f.default_factory is not msgspec.NODEFAULT else f.default
        if current != default:
            found[f.encode_name] = _changed(current)
    return found


def _order(entity: Entity, config: DeploymentConfig, find: Find) -> Order:
    ref = _config_model_ref(config, entity.workspace)
    found = find("models", *ref) if ref else None
    return Order(
        ref=Ref(entity.workspace, entity.name),
        engine=config.engine,
        model_spec=config.model_spec,
        executor=config.executor_config,
        model=_model_order(found, find) if found else None,
        model_ref=ref,
    )


def _config_model_ref(config: DeploymentConfig, workspace: str) -> Ref | None:
    if config.model_entity_id and "/" in config.model_entity_id:
        return Ref(*config.model_entity_id.split("/", 1))
    return model_ref(config.model_spec, workspace)


def _model_order(entity: Entity, find: Find) -> ModelOrder:
    model: Model = entity.wish
    fileset = ref_in(model.fileset, entity.workspace)
    found = find("filesets", *fileset) if fileset else None
    storage: Fileset | None = found.wish if found else None
    template, tools = chat_of(entity, storage)
    return ModelOrder(
        ref=Ref(entity.workspace, entity.name),
        fileset=fileset,
        storage=storage.storage if storage else None,
        spec=spec_of(entity),
        chat=ChatOrder(chat_template=template, tools=tools),
        trust_remote_code=model.trust_remote_code,
    )


def _resolved_commit(desired: Desired) -> str | None:
    """The commit this very wish was resolved to when it first started."""
    return desired.run.commit


def _weights(order: Order, host: HostFacts, commit: str | None) -> tuple[str | None, Weights | None]:
    """(why they cannot be had, where they are)."""
    if not needs_weights(order, host):
        return None, None
    model = order.model
    if model is None:
        name = order.model_ref or order.label
        if name is None:
            return "This deployment needs weights, but model_spec.model_name names no model.", None
        return f"This deployment needs weights, but the model entity {name} does not exist.", None
    if model.fileset is None:
        return f"Model {model.ref} has no fileset, so there are no weights to serve.", None
    if model.storage is None:
        return f"Fileset '{model.fileset}' of model {model.ref} does not exist.", None
    if order.revision is not None and isinstance(model.storage, LocalStorage):
        said = f"model_spec.model_revision is '{order.revision}'"
        return f"{said}, but fileset '{model.fileset}' is a directory of this machine, which has no revisions.", None
    return None, weights_in(model.fileset, model.storage, commit or order.revision)

"""Which adapters a running engine should serve, and what to do about the difference to those it does. Pure.

An adapter is a wish for every engine of its model: `difference` compares it with what is on disk (`Copy`) and with what
the engine lists (`Engine.loaded`). Nothing else is remembered, so an engine that starts again, a daemon that was killed
and an adapter that changed are all the same case.

This stands beside the plan, not in it: the plan has one effect per deployment and tick, and an engine that serves is no
reason to wait with an adapter, nor an adapter with an engine. Several engines of one deployment (the old and the new
version, say) each get theirs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Health, Instance, Observed, url_of
from nimhost.deployments.situation import Verdict
from nimhost.engines.nim import MAX_LORA_RANK, PEFT_REFRESH_S
from nimhost.engines.parallel import value_of
from nimhost.engines.spec import ADAPTERS_DIR
from nimhost.engines.vllm import max_lora_rank
from nimhost.entities import Adapter, DeployModelSpec, Entity, ExecutorConfig
from nimhost.refs import DEFAULT_WORKSPACE, Ref, adapter_served_name, is_adapter_name

RANK_FLAG, RANK_VARIABLE = "--max-lora-rank", "NIM_MAX_LORA_RANK"
LOADING = "It is being loaded."
REFRESHING = f"The engine looks for new adapters every {PEFT_REFRESH_S} s."
_OURS = f"{ADAPTERS_DIR}/"
RETRY_S, RETRY_MAX_S = 1.0, 60.0
LOADABLE = "lora"
"""The finetuning type of adapters that engines load beside their model."""


class Wanted(Struct, frozen=True, kw_only=True):
    """An enabled LoRA adapter."""

    ref: Ref
    model: Ref

    @property
    def name(self) -> str:
        """What engines call it."""
        return adapter_served_name(self.ref)


class Copy(Struct, frozen=True, kw_only=True):
    """The files of an adapter as they are for engines: a directory below the one that its model's engines see."""

    directory: str
    rank: int


class Lacking(Struct, frozen=True, kw_only=True):
    """There is no copy (yet), and why."""

    message: str


class Engine(Struct, frozen=True, kw_only=True):
    """A running engine that takes adapters."""

    container: str
    deployment: Ref
    kind: Literal["vllm", "nim"]
    url: str
    model: Ref
    max_rank: int | None = None
    """What it was started for; None: not known."""
    more_rank: str = ""
    """The command that starts it for a larger one; `{rank}` stands for that."""
    loaded: Mapping[str, str] = {}
    """Adapters that it lists -> the directory below ADAPTERS_DIR they were loaded from; "" where it does not say."""


class Load(Struct, frozen=True):
    name: str
    directory: str
    in_place: bool = False
    """Another version of it is loaded."""


class Unload(Struct, frozen=True):
    name: str


class Wait(Struct, frozen=True):
    """Nothing to do now, and why it is not served."""

    name: str
    message: str


Step = Load | Unload | Wait


def wanted_adapters(rows: Iterable[Entity]) -> tuple[Wanted, ...]:
    return tuple(
        Wanted(ref=Ref(row.workspace, row.name), model=Ref(*row.wish.model.split("/", 1)))
        for row in rows
        if is_wanted(row.wish)
    )


def retry_pause_s(failures: int, asked_s: float | None) -> float:
    """How long to wait after so many failures in a row; `asked_s`: what a hub asked for."""
    return max(asked_s or 0.0, min(RETRY_MAX_S, RETRY_S * 2.0 ** min(failures - 1, 20)))


def is_wanted(adapter: Adapter) -> bool:
    return adapter.enabled and adapter.finetuning_type == LOADABLE


def not_taken(row: Entity, takers: Iterable[Taker]) -> str | None:
    """Why nothing is to serve an adapter, ever, as things are, with what to type; None when something is to."""
    adapter: Adapter = row.wish
    if not adapter.enabled:
        return f"Disabled. Enable it with: nimhost adapters update {row.name} --enabled{_in_workspace(row.workspace)}"
    if not is_wanted(adapter):
        return f"Engines load adapters of finetuning_type {LOADABLE}; this one is {adapter.finetuning_type}."
    if any(str(taker.model) == adapter.model for taker in takers):
        return None
    where = f"No deployment of {adapter.model} takes adapters"
    return f"{where}: make one that does with nimhost deploy MODEL --lora --update, its other options as they are."


def difference(wanted: Iterable[Wanted], copies: Mapping[Ref, Copy | Lacking], engine: Engine) -> tuple[Step, ...]:
    """What brings the engine's adapters in step with the wishes. Unloads come first, they make room.

    1 loaded, and nobody wants it → unload; only what we loaded ourselves
    2 its files are not here → wait; a version that is loaded keeps serving
    3 its rank is above what the engine was started for → wait, naming the command that changes that
    4 loaded from this very copy → nothing
    5 a NIM finds the files itself → wait until it lists it
    6 → load, in place of another version
    """
    mine = {w.name: w for w in wanted if w.model == engine.model}
    steps: list[Step] = []
    for name, directory in engine.loaded.items():
        if name not in mine and directory and engine.kind == "vllm":  # 1
            steps.append(Unload(name))
    for name, w in sorted(mine.items()):
        copy = copies.get(w.ref, Lacking(message=LOADING))
        if isinstance(copy, Lacking):  # 2
            steps.append(Wait(name, copy.message))
        elif engine.max_rank is not None and copy.rank > engine.max_rank:  # 3
            steps.append(Wait(name, rank_problem(copy.rank, engine)))
        elif engine.kind == "nim":  # 5
            steps += [] if name in engine.loaded else [Wait(name, REFRESHING)]
        elif engine.loaded.get(name) != copy.directory:  # 4, 6
            steps.append(Load(name, copy.directory, in_place=name in engine.loaded))
    return tuple(steps)


def changes_for_nims(
    mine: Mapping[str, Copy | Lacking], shown: Mapping[str, str], listed: Collection[str], max_rank: int | None
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What to take out of the directory that the NIMs of a model look at, and what to put in (name, copy's directory).

    `mine`: adapters of the model. `shown`: what is in the directory -> the copy it is. `listed`: what NIMs still serve
    although it was taken out: another version under the name would not be noticed. `max_rank`: of the NIM that takes
    least.
    """
    fitting = {
        name: copy.directory
        for name, copy in mine.items()
        if isinstance(copy, Copy) and (max_rank is None or copy.rank <= max_rank)
    }
    spared = {name for name, copy in mine.items() if isinstance(copy, Lacking)}
    hide = tuple(n for n, directory in shown.items() if n not in spared and fitting.get(n) != directory)
    show = tuple((n, directory) for n, directory in sorted(fitting.items()) if n not in shown and n not in listed)
    return hide, show


def rank_problem(rank: int, engine: Engine) -> str:
    start = engine.more_rank.replace("{rank}", str(max_lora_rank((rank,)) if engine.kind == "vllm" else rank))
    return f"Its rank is {rank}, and {engine.deployment} was started for {engine.max_rank} at most. Change it: {start}"


def refused_by_all(rank: int, model: Ref, engines: Sequence[Engine]) -> str | None:
    """Why none of the engines of that model can load such an adapter; None when one can, or there is none."""
    mine = [engine for engine in engines if engine.model == model]
    low = [engine for engine in mine if engine.max_rank is not None and engine.max_rank < rank]
    return rank_problem(rank, low[0]) if mine and len(low) == len(mine) else None


# --- who takes adapters --------------------------------------------------------------------------------------------


class Taker(Struct, frozen=True, kw_only=True):
    """A deployment that takes adapters, whether it runs or not."""

    deployment: Ref
    model: Ref
    kind: Literal["vllm", "nim"]
    message: str
    """How it stands."""
    max_rank: int | None = None


def takers_of(verdicts: Iterable[Verdict]) -> tuple[Taker, ...]:
    return tuple(found for v in verdicts if (found := taker_of(v)) is not None)


def taker_of(v: Verdict) -> Taker | None:
    """None for a deployment that takes none, or goes."""
    d, order = v.desired, v.desired.order
    if order is None or order.model is None or order.engine == "generic":
        return None
    if d.deleting or not order.model_spec.lora_enabled:
        return None
    return Taker(deployment=d.ref, model=order.model.ref, kind=order.engine, message=v.message, max_rank=_max_rank(d))


def engines_of(verdicts: Iterable[Verdict], observed: Observed) -> tuple[Engine, ...]:
    """Every engine that answers and belongs to a deployment that takes adapters, whatever version of it it runs."""
    by_ref = {v.desired.ref: v.desired for v in verdicts if taker_of(v) is not None}
    pairs = [(by_ref[i.ref], i) for i in observed.instances if i.ref in by_ref and answers(i)]
    return tuple(found for d, i in pairs if (found := _engine(d, i)) is not None)


def silent_nims(verdicts: Iterable[Verdict], observed: Observed) -> frozenset[Ref]:
    """Models of NIMs that run and do not answer (yet): what these serve is not known."""
    nims = {taker.deployment: taker.model for taker in takers_of(verdicts) if taker.kind == "nim"}
    running = [i for i in observed.instances if i.state == "running" and not answers(i)]
    return frozenset(nims[i.ref] for i in running if i.ref in nims)


def answers(instance: Instance) -> bool:
    return instance.state == "running" and instance.port is not None and instance.health.state == "ok"


def _engine(d: Desired, instance: Instance) -> Engine | None:
    order = d.order
    if order is None or order.model is None or order.engine == "generic":
        return None
    this = instance.hash == d.hash
    if not this and str(order.model.ref) not in instance.health.models:
        return None  # an older version, of another model
    return Engine(
        container=instance.id,
        deployment=d.ref,
        kind=order.engine,
        url=url_of(instance.port),
        model=order.model.ref,
        max_rank=_max_rank(d) if this else None,
        more_rank=_more_rank(d),
        loaded=loaded_in(instance.health),
    )


def loaded_in(health: Health) -> dict[str, str]:
    """Adapters that an engine lists -> the directory of ours they were loaded from, "" where it does not say.

    By their names, which no model can have: a NIM lists them like models.
    """
    found = {name: "" for name in health.models if is_adapter_name(name)}
    for name, path in health.adapters:
        if is_adapter_name(name):
            found[name] = path.removeprefix(_OURS) if path.startswith(_OURS) else ""
    return found


def _max_rank(d: Desired) -> int | None:
    """What the container of this very wish was started for."""
    run = d.status.run
    if run.spec_hash != d.hash or run.resolved is None or d.order is None:
        return None
    if d.order.engine == "nim":
        text = run.resolved.get("env", {}).get(RANK_VARIABLE, str(MAX_LORA_RANK))
    else:
        text = value_of(RANK_FLAG, list(run.resolved.get("args", ()))) or "16"
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _more_rank(d: Desired) -> str:
    """The command that gives its config another rank; a deployment that follows it starts again by itself."""
    order, wish = d.order, d.entity.wish
    assert order is not None
    assert order.model is not None
    executor = _said(order.executor, ExecutorConfig(gpu=0)) | {"gpu": order.executor.gpu}
    if order.engine == "nim":
        executor["additional_envs"] = {**executor.get("additional_envs", {}), RANK_VARIABLE: "{rank}"}
    else:
        executor["additional_args"] = [*_without(RANK_FLAG, order.executor.additional_args), RANK_FLAG, "{rank}"]
    workspace = _in_workspace(d.ref.workspace)
    words = (
        "nimhost inference deployment-configs update", wish.config, "--engine", order.engine,
        "--model-entity-id", str(order.model.ref),
        "--model-spec", shlex.quote(json.dumps(_said(order.model_spec, DeployModelSpec()))),
        "--executor-config", shlex.quote(json.dumps(executor)),
    )  # fmt: skip
    then = f" && nimhost inference deployments update {d.ref.name} --config {wish.config}{workspace}"
    return " ".join(words) + workspace + (then if wish.config_version else "")


def _in_workspace(workspace: str) -> str:
    return "" if workspace == DEFAULT_WORKSPACE else f" --workspace {workspace}"


def _said(value: Struct, default: Struct) -> dict[str, Any]:
    """The fields that differ from those of `default`."""
    shown, usual = msgspec.to_builtins(value), msgspec.to_builtins(default)
    return {key: field for key, field in shown.items() if field != usual[key]}


def _without(flag: str, arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in arguments:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = word == flag and not skip
    return kept

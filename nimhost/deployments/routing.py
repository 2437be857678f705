"""From rows and verdicts to the gateway's table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from msgspec import Struct
from msgspec.structs import replace

from nimhost.auth_header import render_auth_header
from nimhost.deployments.adapters import LOADING, Wanted, loaded_in, not_taken, taker_of, takers_of, wanted_adapters
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import url_of
from nimhost.deployments.publish import served_models
from nimhost.deployments.situation import Verdict
from nimhost.entities import NO_KEY, BackendFormat, Entity, Provider
from nimhost.errors import NimhostError
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import DEFAULT_WORKSPACE, NGC_KEY, Ref, adapter_served_name

JUST_STARTED = "nimhost has just started, and looks for its engine."


class Key(Struct, frozen=True):
    """The resolved secret of a provider: the header it becomes, or why it cannot be had."""

    headers: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    def __repr__(self) -> str:
        return "Key(…)"


def provider_key(provider: Entity, secret: str | None) -> Key:
    """`secret`: the value of `api_key_secret_name`, None when that secret does not exist."""
    wish: Provider = provider.wish
    if wish.api_key_secret_name is None:
        return Key()
    if secret is None:
        name = wish.api_key_secret_name
        where = "" if provider.workspace == DEFAULT_WORKSPACE else f" --workspace {provider.workspace}"
        other = ", or start nimhost with NGC_API_KEY set" if (provider.workspace, name) == NGC_KEY else ""
        return Key(problem=f"{NO_KEY}set it with: nimhost secrets create {name} --from-file -{where}{other}")
    try:
        return Key(headers=(render_auth_header(wish.auth_header_format, secret),))
    except NimhostError as error:
        return Key(problem=error.in_full)


def not_looked_at(d: Desired) -> Verdict:
    """How a deployment stands before the first look: as it is stored, but nobody knows yet where its engine is."""
    status = d.status
    message = JUST_STARTED if status.status in ("READY", "UNKNOWN") else status.status_message
    return Verdict(desired=d, status=status.status, message=message, run=d.run)


def route_table(
    providers: Iterable[Entity],
    models: Mapping[Ref, Entity],
    workspaces: Iterable[Entity],
    verdicts: Iterable[Verdict],
    keys: Mapping[Ref, Key],
    virtual_models: Iterable[Entity] = (),
    adapters: Iterable[Entity] = (),
    unloaded: Mapping[Ref, Mapping[str, str]] | None = None,
    hop: str = "",
) -> RouteTable:
    """`virtual_models`: the stored ones; every model is reached by its own name without any. `unloaded`: deployment ->
    adapters that its engine has not loaded -> why. `hop`: marks what is sent to external providers as ours."""
    adapters = tuple(adapters)
    wanted = wanted_adapters(adapters)
    by_ref = {v.desired.ref: v for v in verdicts}
    upstreams = []
    for provider in sorted(providers, key=lambda p: p.wish.model_deployment_id is None):  # what runs here comes first
        ref = Ref(provider.workspace, provider.name)
        if provider.wish.model_deployment_id is None:
            upstreams.append(_external(provider, keys.get(ref, Key()), hop))
        elif (verdict := by_ref.get(ref)) is not None:
            upstreams.append(_engine(provider, verdict, wanted, (unloaded or {}).get(ref, {})))
    table = build_table(
        upstreams,
        models=[*models, *(Ref(w.model.workspace, w.name) for w in wanted)],
        waiting=_waiting(by_ref.values()),
        workspaces=[w.name for w in workspaces],
        formats=_formats(upstreams, models),
    )
    by_name = {_reached_as(row): row for row in adapters}
    takers = takers_of(by_ref.values())
    idle = {ref: why for ref, row in by_name.items() if (why := not_taken(row, takers))}
    virtual_models = tuple(virtual_models)
    rows = {**models, **by_name, **{Ref(v.workspace, v.name): v for v in virtual_models}}
    wishes = {Ref(v.workspace, v.name): v.wish.default_model_entity for v in virtual_models}
    aliases = {ref: Ref(*model.split("/", 1)) for ref, model in wishes.items() if model and model != str(ref)}
    table = with_aliases(table, aliases) if aliases else table
    return replace(table, idle_adapters=idle, created={ref: _time(rows[ref]) for ref in table.models if ref in rows})


def _reached_as(adapter: Entity) -> Ref:
    """The name of an adapter as a model, which is in the workspace of its model."""
    workspace, _, _ = adapter.wish.model.partition("/")
    return Ref(workspace, adapter_served_name(Ref(adapter.workspace, adapter.name)))


def _time(row: Entity) -> int:
    return int(datetime.fromisoformat(row.created_at).timestamp())


def _formats(upstreams: Iterable[Upstream], models: Mapping[Ref, Entity]) -> dict[Ref, BackendFormat]:
    """The formats of what is served, where the model's row names one."""
    served = {Ref(*model.model_entity_id.split("/", 1)) for upstream in upstreams for model in upstream.served}
    found = {ref: models[ref].wish.backend_format for ref in served if ref in models}
    return {ref: format_ for ref, format_ in found.items() if format_ is not None}


def with_aliases(table: RouteTable, aliases: Mapping[Ref, Ref]) -> RouteTable:
    """The table in which each alias leads to where its model leads, or waits for what its model waits for."""
    models = {ref: targets for ref, targets in table.models.items() if ref not in aliases}
    waiting = {ref: message for ref, message in table.waiting.items() if ref not in aliases}
    for alias, model in aliases.items():
        if targets := table.models.get(model):
            models[alias] = tuple(target._replace(ref=alias) for target in targets)
        elif model in table.waiting:
            waiting[alias] = table.waiting[model]
    lost = {alias: model for alias, model in aliases.items() if alias not in models and alias not in waiting}
    return replace(table, models=models, waiting=waiting, known=table.known | aliases.keys(), aliases=lost)


def _external(provider: Entity, key: Key, hop: str) -> Upstream:
    """Sent to as soon as its key is known: discovery only decides about models, never about the provider route."""
    wish: Provider = provider.wish
    return Upstream(
        provider=Ref(provider.workspace, provider.name),
        base_url=wish.host_url,
        headers=key.headers,
        default_headers=wish.default_extra_headers or {},
        required_headers=wish.required_extra_headers or {},
        default_body=wish.default_extra_body or {},
        required_body=wish.required_extra_body or {},
        ready=key.problem is None,
        message=key.problem or provider.status.status_message,
        proven=provider.status.status == "READY",
        served=tuple(provider.status.served_models),
        hop=hop,
    )


def _engine(provider: Entity, verdict: Verdict, wanted: Iterable[Wanted], unloaded: Mapping[str, str]) -> Upstream:
    wish: Provider = provider.wish
    instance, d = verdict.instance, verdict.serving
    served = served_models(d, instance.health) if instance and instance.health.models else None
    absent = _absent_adapters(verdict, wanted, unloaded)
    return Upstream(
        provider=Ref(provider.workspace, provider.name),
        base_url=url_of(instance.port) if instance else wish.host_url,
        policy=d.order.engine if d.order else "generic",
        default_headers=wish.default_extra_headers or {},
        required_headers=wish.required_extra_headers or {},
        default_body=wish.default_extra_body or {},
        required_body=wish.required_extra_body or {},
        ready=instance is not None,
        message=verdict.message,
        served=tuple(
            model
            for model in (provider.status.served_models if served is None else served)
            if model.served_model_name not in absent
        ),
        absent=absent,
    )


def _absent_adapters(verdict: Verdict, wanted: Iterable[Wanted], unloaded: Mapping[str, str]) -> dict[str, str | None]:
    """What the upstream does not serve as it should: adapters it has still to load, with the reason, and (None) those
    that nobody wants any more."""
    taker = taker_of(verdict)
    if taker is None:
        return {}
    instance = verdict.instance
    loaded = loaded_in(instance.health) if instance else {}
    names = {w.name for w in wanted if w.model == taker.model}
    reason = LOADING if instance else verdict.message
    absent: dict[str, str | None] = {name: unloaded.get(name, reason) for name in names if name not in loaded}
    return absent | {
        n: None for n, directory in loaded.items() if n not in names and (directory or taker.kind == "nim")
    }


def _waiting(verdicts: Iterable[Verdict]) -> dict[Ref, str]:
    """Models that a deployment is to serve but does not yet."""
    return {
        v.desired.order.model.ref: v.message
        for v in verdicts
        if v.instance is None and v.desired.order is not None and v.desired.order.model is not None
    }

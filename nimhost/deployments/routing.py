"""From rows and verdicts to the gateway's table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from nimhost.auth_header import render_auth_header
from nimhost.deployments.plan import Verdict
from nimhost.deployments.publish import served_models
from nimhost.entities import BackendFormat, Entity, Provider
from nimhost.errors import NimhostError
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import DEFAULT_WORKSPACE, NGC_KEY, Ref


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
        make = f"nimhost secrets create {name} --from-file -{where}{other}"
        return Key(problem=f"Secret '{name}' does not exist; make it with: {make}")
    try:
        return Key(headers=(render_auth_header(wish.auth_header_format, secret),))
    except NimhostError as error:
        return Key(problem=error.in_full)


def route_table(
    providers: Iterable[Entity],
    models: Mapping[Ref, Entity],
    workspaces: Iterable[Entity],
    verdicts: Iterable[Verdict],
    keys: Mapping[Ref, Key],
    virtual_models: Iterable[Entity] = (),
) -> RouteTable:
    """`virtual_models`: the stored ones; every model is reached by its own name without any."""
    by_ref = {v.desired.ref: v for v in verdicts}
    upstreams = []
    for provider in sorted(providers, key=lambda p: p.wish.model_deployment_id is None):  # what runs here comes first
        ref = Ref(provider.workspace, provider.name)
        if provider.wish.model_deployment_id is None:
            upstreams.append(_external(provider, keys.get(ref, Key())))
        elif (verdict := by_ref.get(ref)) is not None:
            upstreams.append(_engine(provider, verdict))
    table = build_table(
        upstreams,
        models=models,
        waiting=_waiting(by_ref.values()),
        workspaces=[w.name for w in workspaces],
        formats=_formats(upstreams, models),
    )
    wishes = {Ref(v.workspace, v.name): v.wish.default_model_entity for v in virtual_models}
    aliases = {ref: Ref(*model.split("/", 1)) for ref, model in wishes.items() if model and model != str(ref)}
    return with_aliases(table, aliases) if aliases else table


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
    return replace(table, models=models, waiting=waiting, known=table.known | aliases.keys())


def _external(provider: Entity, key: Key) -> Upstream:
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
        message=key.problem or "",
        proven=provider.status.status == "READY",
        served=tuple(provider.status.served_models),
    )


def _engine(provider: Entity, verdict: Verdict) -> Upstream:
    wish: Provider = provider.wish
    instance, order = verdict.instance, verdict.desired.order
    served = served_models(verdict.desired, instance.health.models) if instance and instance.health.models else None
    return Upstream(
        provider=Ref(provider.workspace, provider.name),
        base_url=f"http://127.0.0.1:{instance.port}" if instance else wish.host_url,
        policy=order.engine if order else "generic",
        default_headers=wish.default_extra_headers or {},
        required_headers=wish.required_extra_headers or {},
        default_body=wish.default_extra_body or {},
        required_body=wish.required_extra_body or {},
        ready=instance is not None,
        message=verdict.message,
        served=tuple(provider.status.served_models if served is None else served),
    )


def _waiting(verdicts: Iterable[Verdict]) -> dict[Ref, str]:
    """Models that a deployment is to serve but does not yet."""
    return {
        v.desired.order.model.ref: v.message
        for v in verdicts
        if v.instance is None and v.desired.order is not None and v.desired.order.model is not None
    }

"""From rows and verdicts to the gateway's table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from nimhost.auth_header import render_auth_header
from nimhost.deployments.plan import Verdict
from nimhost.deployments.publish import served_models
from nimhost.entities import Entity, Provider
from nimhost.errors import NimhostError
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import Ref


class Key(Struct, frozen=True):
    """The resolved secret of a provider: the header it becomes, or why it cannot be had."""

    headers: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    def __repr__(self) -> str:
        return "Key(…)"


def provider_key(provider: Provider, secret: str | None) -> Key:
    """`secret`: the value of `api_key_secret_name`, None when that secret does not exist."""
    if provider.api_key_secret_name is None:
        return Key()
    if secret is None:
        name = provider.api_key_secret_name
        return Key(problem=f"Secret '{name}' does not exist; make it with: nimhost secrets create {name} --from-file -")
    try:
        return Key(headers=(render_auth_header(provider.auth_header_format, secret),))
    except NimhostError as error:
        return Key(problem=f"{error.message} {error.hint or ''}".strip())


def route_table(
    providers: Iterable[Entity],
    models: Iterable[Entity],
    workspaces: Iterable[Entity],
    verdicts: Iterable[Verdict],
    keys: Mapping[Ref, Key],
) -> RouteTable:
    by_ref = {v.desired.ref: v for v in verdicts}
    upstreams = []
    for provider in sorted(providers, key=lambda p: p.wish.model_deployment_id is None):  # what runs here comes first
        ref = Ref(provider.workspace, provider.name)
        if provider.wish.model_deployment_id is None:
            upstreams.append(_external(provider, keys.get(ref, Key())))
        elif (verdict := by_ref.get(ref)) is not None:
            upstreams.append(_engine(provider, verdict))
    return build_table(
        upstreams,
        models=[Ref(m.workspace, m.name) for m in models],
        waiting=_waiting(by_ref.values()),
        workspaces=[w.name for w in workspaces],
    )


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

"""Which model `nimhost chat MODEL` means. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nimhost.errors import BadRequest, NotReady
from nimhost.refs import slug


class ChatTarget(NamedTuple):
    """Arguments of `client.chat`. With a provider, `model` is what that provider calls it; else it is an entity."""

    model: str
    provider: str | None = None
    workspace: str | None = None


def choose(
    text: str | None,
    provider: str | None,
    workspace: str,
    deployments: Sequence[Any],
    providers: Sequence[Any],
    adapters: Sequence[Any] = (),
) -> ChatTarget:
    """First match wins; `deployments`, `providers` and `adapters` are those of the workspace.

    1 no model: the only one that is ready (at that provider)
    2 a provider is named → that provider, the model verbatim
    3 the name of a deployment → the model it serves
    4 a model entity that a provider serves → that entity
    5 what a provider itself calls a model → that provider
    6 an adapter of the workspace by its own name, also behind that of its model (`base--math`) → that adapter, served
      or not: the gateway says why not
    7 what was deployed under the slug of that name → the model it serves
    8 anything else: an entity that the gateway may know

    Raises NotReady for a deployment that is not, BadRequest when there is no telling which is meant.
    """
    by_name = {d["name"]: d for d in deployments}
    if text is None:  # 1
        return _only(_ready(provider, workspace, deployments, providers))
    if provider is not None:  # 2
        return ChatTarget(text, provider, workspace)
    own = text.removeprefix(f"{workspace}/")
    if own in by_name:  # 3
        return _served_by(by_name[own], providers)
    served = [(p, s) for p in providers for s in p.get("served_models") or []]
    if any(s["model_entity_id"] in (text, f"{workspace}/{text}") for _, s in served):  # 4
        return ChatTarget(own, None, workspace)
    for owner, model in served:  # 5
        if model["served_model_name"] == text:
            return ChatTarget(text, owner["name"], owner["workspace"])
    for adapter in adapters:  # 6
        model_workspace, _, model = adapter["model"].partition("/")
        name = adapter["name"]
        if own in (name, f"{workspace}--{name}", f"{model}--{name}"):
            return ChatTarget(f"{workspace}--{name}", None, model_workspace)
    if "/" in text and slug(text) in by_name:  # 7
        return _served_by(by_name[slug(text)], providers)
    return ChatTarget(text, None, workspace)  # 8


def _served_by(deployment: Any, providers: Sequence[Any]) -> ChatTarget:
    name = deployment["name"]
    if deployment.get("desired") == "stopped":
        raise NotReady(f"{name} is stopped.", f"Start it with: nimhost start {name}")
    if deployment["status"] != "READY":
        hint = f"Look: nimhost logs {name}" if deployment["status"] == "ERROR" else f"Wait: nimhost wait {name}"
        raise NotReady(f"{name} is {deployment['status']}: {deployment['status_message']}", hint)
    owner = deployment.get("model_provider_id") or f"{deployment['workspace']}/{name}"
    provider = next((p for p in providers if f"{p['workspace']}/{p['name']}" == owner), None)
    models = _models(provider) if provider else []
    if provider is None or not models:
        raise BadRequest(f"{name} is READY, but it serves no model to chat with.")
    return ChatTarget(models[0], provider["name"], provider["workspace"])


def _models(provider: Any) -> list[str]:
    """What the provider calls its models, adapters last."""
    names = [served["served_model_name"] for served in provider.get("served_models") or []]
    return sorted(names, key=lambda name: "--" in name)


def _ready(
    provider: str | None, workspace: str, deployments: Sequence[Any], providers: Sequence[Any]
) -> list[ChatTarget]:
    """What could be meant without a name: each READY deployment, and each model of the other READY providers."""
    if provider is not None:
        return [ChatTarget(m, provider, workspace) for p in providers if p["name"] == provider for m in _models(p)]
    owners = {f"{d['workspace']}/{d['name']}" for d in deployments}
    ready = [_served_by(d, providers) for d in deployments if d["status"] == "READY" and _has_models(d, providers)]
    others = [p for p in providers if p.get("status") == "READY" and p.get("model_deployment_id") not in owners]
    return ready + [ChatTarget(m, p["name"], p["workspace"]) for p in others for m in _models(p)]


def _has_models(deployment: Any, providers: Sequence[Any]) -> bool:
    owner = deployment.get("model_provider_id") or f"{deployment['workspace']}/{deployment['name']}"
    return any(f"{p['workspace']}/{p['name']}" == owner and p.get("served_models") for p in providers)


def _only(found: list[ChatTarget]) -> ChatTarget:
    if not found:
        raise BadRequest("No model is ready.", "Deploy one: nimhost deploy Qwen/Qwen3-1.7B   See: nimhost ps")
    if len(found) > 1:
        shown = ", ".join(f"{target.model} (at {target.provider})" for target in found[:8])
        raise BadRequest(f"Several models are ready: {shown}.", "Name one: nimhost chat MODEL")
    return found[0]

"""What a running engine serves, as rows: its provider, and a model entity for everything that has none."""

from __future__ import annotations

from msgspec.structs import replace

from nimhost.deployments.adapters import loaded_in
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Health, Instance, url_of
from nimhost.entities import ApiEndpoint, DeploymentStatus, Entity, Model, ProviderStatus, ServedModel
from nimhost.errors import Conflict
from nimhost.refs import Ref, is_adapter_name, is_name, slug
from nimhost.store import Store, Transaction

NO_MODELS = "Non-OpenAI compliant endpoint, model entity routing disabled"


def served_models(d: Desired, health: Health) -> list[ServedModel]:
    """Model entity -> the name the engine knows it by, for the ids that its `/v1/models` lists.

    The id that is the deployment's own model entity is served as that; any other one gets an entity of its own, named
    by the slug rule, in the deployment's workspace. Adapters follow: they are reached there by the name that engines
    know them by, and are no entities.
    """
    own = str(d.order.model.ref) if d.order and d.order.model else None
    adapters = loaded_in(health)
    models = [name for name in health.models if name not in adapters]
    found = []
    for name in models:
        entity = own if name == own else entity_for(name, d.ref.workspace)
        if entity is not None:
            found.append(ServedModel(model_entity_id=entity, served_model_name=name))
    if own is not None and found and not any(m.model_entity_id == own for m in found):
        found.insert(0, ServedModel(model_entity_id=own, served_model_name=models[0]))
    return found + [ServedModel(str(Ref(d.ref.workspace, name)), name) for name in adapters]


def entity_for(name: str, workspace: str) -> str | None:
    """The model entity for an id that others chose; None when the slug rule makes no name of it."""
    entity = slug(name, workspace)
    return str(Ref(workspace, entity)) if is_name(entity) else None


async def publish(store: Store, d: Desired, status: DeploymentStatus, instance: Instance | None) -> bool:
    """The status of a deployment and that of its provider, together: who reads READY finds what is served.

    False, and nothing written, when the wish moved on since `d` was read. A row that cannot be read stays as it is.
    """
    shown = (await store.by_ref("providers")).get(d.ref)
    if status == d.status and (shown is None or shown.status == provider_status(d, status, instance, shown.status)):
        return True  # as nearly always: nothing to write
    try:
        async with store.transaction() as tx:
            if status != d.status:
                await tx.set_status(d.entity, status)
            provider = await tx.find("providers", *d.ref) if shown is not None else None
            if provider is not None and provider.wish.model_deployment_id == str(d.ref):
                await write_provider(tx, provider, provider_status(d, status, instance, provider.status))
    except Conflict:
        return False
    return True


def provider_status(
    d: Desired, status: DeploymentStatus, instance: Instance | None, before: ProviderStatus
) -> ProviderStatus:
    """Of a deployment's provider. While it does not answer, what it served is still its own."""
    if instance is None or status.status != "READY":
        return replace(before, status=status.status, status_message=status.status_message)
    unread = instance.health.state == "unknown"  # trusted from before a restart: what it serves is what it served then
    served = before.served_models if unread else served_models(d.at(instance.hash), instance.health)
    return ProviderStatus(
        status="READY",
        status_message="" if served else NO_MODELS,
        served_models=served,
        host_url=url_of(instance.port),
    )


async def write_provider(tx: Transaction, provider: Entity, status: ProviderStatus) -> None:
    """The status of a provider, and entities for models that it newly serves; nothing when nothing changed."""
    if provider.status == status:
        return
    await tx.set_status(provider, status)
    for model in status.served_models:
        if model not in provider.status.served_models and not is_adapter_name(model.served_model_name):
            await _ensure_model(tx, provider, model)


async def _ensure_model(tx: Transaction, provider: Entity, model: ServedModel) -> None:
    workspace, _, name = model.model_entity_id.partition("/")
    if await tx.find_unreadable("models", workspace, name):
        return
    entity = await tx.find("models", workspace, name)
    if entity is None:
        anthropic = model.served_model_name.startswith(("claude-", "anthropic.", "anthropic/"))
        external = provider.wish.model_deployment_id is None
        wish = Model(
            description=f"Auto-discovered model from provider {provider.ref}",
            model_providers=[provider.ref],
            backend_format="ANTHROPIC_MESSAGES" if anthropic else "OPENAI_CHAT",
            api_endpoint=ApiEndpoint(url=provider.wish.host_url, model_id=name, format="openai") if external else None,
        )
        await tx.insert("models", workspace, name, wish)
    elif provider.ref not in entity.wish.model_providers:
        providers = [*entity.wish.model_providers, provider.ref]
        await tx.update_wish(entity, replace(entity.wish, model_providers=providers))


async def forget(store: Store, d: Desired) -> None:
    """The last step of a deletion: deployment, provider, and the provider's name on models go together."""
    async with store.transaction() as tx:
        broken = await tx.find_unreadable("providers", *d.ref)
        provider = broken or await tx.find("providers", *d.ref)
        if provider is not None and (broken or provider.wish.model_deployment_id == str(d.ref)):
            await tx.delete(provider)
            await unlink_provider(tx, provider)
        await tx.delete(d.entity)


async def unlink_provider(tx: Transaction, provider: Entity) -> None:
    """Takes the name of a provider that is gone off the models that it served."""
    for model in await tx.all("models"):
        if provider.ref in model.wish.model_providers:
            left = [ref for ref in model.wish.model_providers if ref != provider.ref]
            await tx.update_wish(model, replace(model.wish, model_providers=left))

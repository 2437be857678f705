"""What a running engine serves, as rows: its provider, and a model entity for everything that has none."""

from __future__ import annotations

from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Instance
from nimhost.entities import DeploymentStatus, Entity, Model, ProviderStatus, ServedModel
from nimhost.refs import Ref, is_name, slug
from nimhost.store import Store, Transaction

NO_MODELS = "Non-OpenAI compliant endpoint, model entity routing disabled"


def served_models(d: Desired, models: tuple[str, ...]) -> list[ServedModel]:
    """Model entity -> the name the engine knows it by, for the ids that its `/v1/models` lists.

    The id that is the deployment's own model entity is served as that; any other one gets an entity of its own, named
    by the slug rule, in the deployment's workspace.
    """
    own = str(d.order.model.ref) if d.order and d.order.model else None
    found = []
    for name in models:
        entity = own if name == own else entity_for(name, d.ref.workspace)
        if entity is not None:
            found.append(ServedModel(model_entity_id=entity, served_model_name=name))
    if own is not None and found and not any(m.model_entity_id == own for m in found):
        found.insert(0, ServedModel(model_entity_id=own, served_model_name=models[0]))
    return found


def entity_for(name: str, workspace: str) -> str | None:
    """The model entity for an id that others chose; None when the slug rule makes no name of it."""
    entity = slug(name, workspace)
    return str(Ref(workspace, entity)) if is_name(entity) else None


async def publish_engine(store: Store, d: Desired, instance: Instance) -> None:
    """The provider row of a deployment that is READY, and the model entities for what it serves."""
    served = served_models(d, instance.health.models)
    status = ProviderStatus(
        status="READY",
        status_message="" if served else NO_MODELS,
        served_models=served,
        host_url=f"http://127.0.0.1:{instance.port}",
    )
    shown = await store.find("providers", *d.ref)
    if shown is not None and shown.status == status:
        return  # as nearly always: nothing to write
    async with store.transaction() as tx:
        provider = await tx.find("providers", *d.ref)
        if provider is None or provider.wish.model_deployment_id != str(d.ref):
            return  # deleted, or somebody else's by now
        await write_provider(tx, provider, status)


async def publish_absence(store: Store, d: Desired, status: DeploymentStatus) -> None:
    """The provider row of a deployment that does not answer now. What it served is still its own."""
    async with store.transaction() as tx:
        provider = await tx.find("providers", *d.ref)
        if provider is not None and provider.wish.model_deployment_id == str(d.ref):
            gone = replace(provider.status, status=status.status, status_message=status.status_message)
            if gone != provider.status:
                await tx.set_status(provider, gone)


async def write_provider(tx: Transaction, provider: Entity, status: ProviderStatus) -> None:
    """The status of a provider, and entities for models that it newly serves; nothing when nothing changed."""
    if provider.status == status:
        return
    await tx.set_status(provider, status)
    for model in status.served_models:
        await _ensure_model(tx, provider, model)


async def _ensure_model(tx: Transaction, provider: Entity, model: ServedModel) -> None:
    workspace, _, name = model.model_entity_id.partition("/")
    entity = await tx.find("models", workspace, name)
    if entity is None:
        anthropic = model.served_model_name.startswith(("claude-", "anthropic.", "anthropic/"))
        wish = Model(
            description=f"Auto-discovered model from provider {provider.ref}",
            model_providers=[provider.ref],
            backend_format="ANTHROPIC_MESSAGES" if anthropic else "OPENAI_CHAT",
        )
        await tx.insert("models", workspace, name, wish)
    elif provider.ref not in entity.wish.model_providers:
        providers = [*entity.wish.model_providers, provider.ref]
        await tx.update_wish(entity, replace(entity.wish, model_providers=providers))


async def forget(store: Store, d: Desired) -> None:
    """The last step of a deletion: deployment, provider, and the provider's name on models go together."""
    async with store.transaction() as tx:
        provider = await tx.find("providers", *d.ref)
        if provider is not None and provider.wish.model_deployment_id == str(d.ref):
            await tx.delete(provider)
            for model in await tx.all("models"):
                if provider.ref in model.wish.model_providers:
                    left = [ref for ref in model.wish.model_providers if ref != provider.ref]
                    await tx.update_wish(model, replace(model.wish, model_providers=left))
        await tx.delete(d.entity)

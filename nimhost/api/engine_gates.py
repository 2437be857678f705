"""Code inside engines by way of arguments and variables: the same gates as for the fields of a model."""

from __future__ import annotations

from collections.abc import Callable

from nimhost.api.model_rules import check_tools, check_trust
from nimhost.api.references import Reader
from nimhost.config import Settings
from nimhost.deployments.desired import model_ref
from nimhost.deployments.storage import ref_in
from nimhost.engines.reserved import asks_for_plugin, asks_for_trust
from nimhost.entities import DeploymentConfig, Entity, ToolCallConfig
from nimhost.errors import Forbidden
from nimhost.refs import is_name


async def check_gates(wish: DeploymentConfig, workspace: str, db: Reader, settings: Settings) -> None:
    """`settings` are the asker's (`access.settings_for_asker`). Raises Forbidden, naming the field."""
    plugin, trust = asks_for_plugin(wish.executor_config), asks_for_trust(wish.executor_config)
    if plugin is not None:
        _named(plugin, lambda: check_tools(ToolCallConfig(tool_call_plugin="plugin"), workspace, settings, plugin))
    if trust is None:
        return
    model = await _model(wish, workspace, db)
    if model is not None and model.wish.trust_remote_code:  # allowed when that was set
        return
    fileset = ref_in(model.wish.fileset, model.workspace) if model else None
    found = await db.find("filesets", *fileset) if fileset else None
    _named(trust, lambda: check_trust(found.wish.storage if found else None, settings))


async def _model(wish: DeploymentConfig, workspace: str, db: Reader) -> Entity | None:
    ref = ref_in(wish.model_entity_id, workspace) or model_ref(wish.model_spec, workspace)
    return await db.find("models", *ref) if ref and is_name(ref.name) else None


def _named(where: str, check: Callable[[], None]) -> None:
    try:
        check()
    except Forbidden as error:
        raise Forbidden(f"{where}: {error.message}", error.hint) from None

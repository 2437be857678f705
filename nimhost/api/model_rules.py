"""What a model and a deployment config may ask of engines: code to trust, plugins, templates, GPUs to split over.

A model is only held to account for what a request changes: what an administrator allowed stays allowed when somebody
else edits its description. `settings` are the asker's (`access.settings_for_asker`): an administrator needs no leave.
"""

from __future__ import annotations

import re

from nimhost.api.references import Reader
from nimhost.config import Settings
from nimhost.deployments.storage import origin_of
from nimhost.engines.check import check_parallelism
from nimhost.engines.reserved import check_reserved
from nimhost.entities import (
    DeploymentConfig,
    Fileset,
    GivenSpec,
    Model,
    Storage,
    ToolCallConfig,
)
from nimhost.errors import Forbidden, InvalidRequest, Problem
from nimhost.models.chat_template import check_chat_template
from nimhost.models.spec import FIELD, missing_in, read_tool_calling
from nimhost.refs import parse_ref


async def check_model(before: Model | None, wish: Model, workspace: str, db: Reader, settings: Settings) -> None:
    """`before`: the model as it is, None when it is made. Raises BadRequest, InvalidRequest, Forbidden."""
    moved = before is None or before.fileset != wish.fileset
    found = await db.find("filesets", *parse_ref(wish.fileset, workspace, "fileset")) if wish.fileset else None
    fileset: Fileset | None = found.wish if found else None
    if wish.trust_remote_code and (moved or before is None or not before.trust_remote_code):
        check_trust(fileset.storage if fileset else None, settings)
    if wish.spec and wish.fileset is None:
        check_whole(wish.spec)
    if wish.spec and (before is None or before.spec != wish.spec):
        if wish.spec.chat_template is not None:
            check_chat_template(wish.spec.chat_template, "spec.chat_template")
        check_tools(wish.spec.tool_call_config, workspace, settings, "spec.tool_call_config")
    if fileset and wish.fileset and moved:
        _check_inherited(fileset, wish.fileset, workspace, settings)


def check_whole(spec: GivenSpec) -> None:
    """For a model without files that could tell the rest. Raises InvalidRequest, naming every missing field."""
    if missing := missing_in(spec):
        raise InvalidRequest(
            f"spec: Field required: {', '.join(missing)}",
            "With a fileset, what a spec leaves open is read from the files.",
            problems=tuple(Problem(("body", "spec", name), "Field required", "missing") for name in missing),
        )


def _check_inherited(fileset: Fileset, name: str, workspace: str, settings: Settings) -> None:
    tools = read_tool_calling(fileset.metadata.model, name)
    where = f"fileset '{name}': {FIELD}"
    if tools.chat_template is not None:
        check_chat_template(tools.chat_template, f"{where}.chat_template")
    check_tools(tools.config, parse_ref(name, workspace).workspace, settings, FIELD)


def check_trust(storage: Storage | None, settings: Settings) -> None:
    """Code of a checkpoint runs inside the engine: only from where the settings allow it. Raises Forbidden."""
    origin = origin_of(storage) if storage else ""
    if not any(re.fullmatch(pattern, origin) for pattern in settings.models.trust_remote_code.allow):
        raise Forbidden(
            "Insufficient permissions to set the trust_remote_code field",
            f"Add '{re.escape(origin)}' to models.trust_remote_code.allow in nimhost.toml, or use an administrator's"
            " token."
            if origin
            else "For files that come from no repository it takes an administrator's token.",
        )


def check_tools(tools: ToolCallConfig | None, workspace: str, settings: Settings, field: str) -> None:
    """A plugin has to be allowed. Whether its fileset has one is seen when it is deployed.

    Raises Forbidden, InvalidRequest.
    """
    if tools is None or tools.tool_call_plugin is None:
        return
    if not settings.models.tool_call_plugin.enabled:
        raise Forbidden(
            "tool_call_plugin is disabled at the platform level. Set models.tool_call_plugin.enabled=true in the "
            "platform configuration to allow custom parser plugins."
        )
    parse_ref(tools.tool_call_plugin, workspace, *field.split("."), "tool_call_plugin")


def check_engine(wish: DeploymentConfig, workspace: str, settings: Settings) -> None:
    """Raises BadRequest, InvalidRequest and Forbidden, naming the field."""
    spec = wish.model_spec
    if spec.chat_template is not None:
        check_chat_template(spec.chat_template, "model_spec.chat_template")
    check_tools(spec.tool_call_config, workspace, settings, "model_spec.tool_call_config")
    check_reserved(wish)
    check_parallelism(wish, settings.engines.nim.image)

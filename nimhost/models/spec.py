"""What a fileset says about chats and tools, and the spec of a model put together from all that is known. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace
from msgspec.structs import fields as struct_fields

from nimhost.entities import Entity, Fileset, GivenSpec, Json, Model, ModelSpec, ModelStatus, ToolCallConfig
from nimhost.errors import BadRequest

FIELD = "metadata.model.tool_calling"


class ToolCalling(Struct, frozen=True, kw_only=True):
    """`metadata.model.tool_calling` of a fileset. Metadata is free-form: what is not named here is left alone."""

    chat_template: str | None = None
    tool_call_parser: str | None = None
    tool_call_plugin: str | None = None
    auto_tool_choice: bool | None = None

    @property
    def config(self) -> ToolCallConfig | None:
        """None when nothing but a chat template is set."""
        found = ToolCallConfig(
            tool_call_parser=self.tool_call_parser,
            tool_call_plugin=self.tool_call_plugin,
            auto_tool_choice=self.auto_tool_choice,
        )
        return None if found == ToolCallConfig() else found


def read_tool_calling(model_metadata: Json | None, fileset: str) -> ToolCalling:
    """Of the `metadata.model` of a fileset. Raises BadRequest for a field of another type than it has to be."""
    try:
        return msgspec.convert((model_metadata or {}).get("tool_calling") or {}, ToolCalling)
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"Fileset '{fileset}': {FIELD}: {error}",
            "chat_template, tool_call_parser and tool_call_plugin are text, auto_tool_choice is true or false.",
        ) from None


# --- the spec of a model entity ------------------------------------------------------------------------------------


def spec_of(entity: Entity) -> ModelSpec | None:
    """The spec that counts: the completed one, unless the wish has changed since it was completed."""
    model, status = _halves(entity)
    if status.spec is not None and status.spec_wish == _key(model):
        return status.spec
    return None if model.spec is None or missing_in(model.spec) else complete_spec(model.spec, None, None)


def missing_in(given: GivenSpec) -> list[str]:
    """The fields that every spec has and this one leaves open."""
    return [f.name for f in struct_fields(ModelSpec) if f.required and getattr(given, f.name) is None]


def with_spec(entity: Entity) -> Entity:
    """The entity with the spec that counts as if its user had sent it: how it is shown. As long as there is none, with
    what he did send."""
    model, status = _halves(entity)
    return replace(entity, wish=replace(model, spec=spec_of(entity) or model.spec), status=replace(status, spec=None))


def is_described(entity: Entity) -> bool:
    """Whether there is nothing left to find out about the model."""
    model, status = _halves(entity)
    return model.fileset is None or (status.spec_status == "ready" and status.spec_wish == _key(model))


def inherited(entity: Entity, fileset: Fileset, name: str) -> ToolCalling | None:
    """The tool calling that the fileset (called `name`) hands down now; None when it has done so before.

    It does so once for every fileset that the model gets, and again when the model has no spec of its user's.
    Raises BadRequest: see `read_tool_calling`.
    """
    model, status = _halves(entity)
    if model.spec is not None and status.spec_fileset == model.fileset:
        return None
    return read_tool_calling(fileset.metadata.model, name)


def described(entity: Entity, computed: ModelSpec, tools: ToolCalling | None) -> ModelStatus:
    """The status once the checkpoint was read; `tools`: what is handed down with it."""
    model, _ = _halves(entity)
    return ModelStatus(
        spec=complete_spec(model.spec, computed, tools),
        spec_status="ready",
        spec_wish=_key(model),
        spec_fileset=model.fileset,
    )


def not_described(entity: Entity, message: str, *, final: bool) -> ModelStatus:
    """The status while the checkpoint cannot be read, or not yet."""
    model, status = _halves(entity)
    return replace(
        status,
        spec=spec_of(entity),
        spec_status="failed" if final else "pending",
        spec_message=message,
        spec_wish=_key(model),
    )


def _halves(entity: Entity) -> tuple[Model, ModelStatus]:
    return entity.wish, entity.status


def _key(model: Model) -> str:
    return hashlib.sha256(msgspec.json.encode((model.fileset, model.spec))).hexdigest()[:12]


def complete_spec(own: GivenSpec | None, computed: ModelSpec | None, tools: ToolCalling | None) -> ModelSpec:
    """The spec of a model: what its user sent, its gaps filled from the checkpoint, then what the fileset hands down.

    A field that the user left out (or null) is a gap. The fileset's tool calling wins over the user's, field by field.
    Without `computed` there must be no gap in what every spec has.
    """
    said = {name: value for name, value in asdict(own).items() if value is not None} if own else {}
    spec = ModelSpec(**((asdict(computed) if computed else {}) | said))
    if tools is None:
        return spec
    config = tools.config
    if config is not None and spec.tool_call_config is not None:
        config = replace(config, **_gaps(asdict(config), asdict(spec.tool_call_config)))
    return replace(
        spec,
        chat_template=tools.chat_template or spec.chat_template,
        tool_call_config=config or spec.tool_call_config,
    )


def chat_of(entity: Entity, fileset: Fileset | None) -> tuple[str | None, ToolCallConfig]:
    """Chat template and tool calling of a model as it is served.

    Of its spec; as long as it has none, what its fileset will hand down, but for a plugin, which nobody allowed yet.
    Metadata that makes no sense (it did when the model was made) hands down nothing.
    """
    spec = spec_of(entity)
    if spec is not None:
        return spec.chat_template, spec.tool_call_config or ToolCallConfig()
    try:
        tools = read_tool_calling(fileset.metadata.model if fileset else None, "")
    except BadRequest:
        return None, ToolCallConfig()
    return tools.chat_template, replace(tools.config or ToolCallConfig(), tool_call_plugin=None)


def _gaps(ours: Mapping[str, object], theirs: Mapping[str, object]) -> dict[str, object]:
    """The fields that `ours` leaves open, as `theirs` has them."""
    return {name: theirs[name] for name, value in ours.items() if value is None}

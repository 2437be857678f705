"""How the spec of a model is put together: the user's fields, the checkpoint's, the fileset's tool calling."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import asdict, replace
from msgspec.structs import fields as struct_fields

from nimhost.entities import (
    Entity,
    Fileset,
    FilesetMetadata,
    GivenSpec,
    Model,
    ModelSpec,
    ModelStatus,
    ToolCallConfig,
)
from nimhost.errors import BadRequest
from nimhost.layers import LinearLayerSpec, MoEConfig
from nimhost.models.spec import (
    ToolCalling,
    chat_of,
    complete_spec,
    described,
    inherited,
    is_described,
    not_described,
    read_tool_calling,
    spec_of,
    with_spec,
)
from nimhost.models.tensors import Tensor, linear_layers
from tests.engines.make import spec

COMPUTED = spec(
    context_size=40960, is_chat=True, moe_config=MoEConfig(num_experts=8, num_experts_per_tok=2, num_expert_layers=1)
)
TOOLS: dict[str, Any] = {"tool_call_parser": "hermes", "auto_tool_choice": True, "chat_template": "{{ x }}"}


def entity(status: ModelStatus | None = None, **wish: Any) -> Entity:
    return Entity(
        kind="models", id="m", workspace="default", name="mm", created_at="", updated_at="",
        wish=Model(fileset="default/ff") if not wish else Model(**wish), status=status or ModelStatus(),
    )  # fmt: skip


def fileset(tools: Any) -> Fileset:
    return Fileset(metadata=FilesetMetadata(model={"tool_calling": tools}))


def test_what_the_user_says_wins_and_the_rest_is_filled() -> None:
    own = spec(num_layers=99, context_size=8192)
    made = complete_spec(own, COMPUTED, None)
    assert (made.num_layers, made.context_size) == (99, 8192)
    assert (made.is_chat, made.moe_config) == (True, COMPUTED.moe_config)
    assert complete_spec(replace(own, is_chat=False), COMPUTED, None).is_chat is False
    assert complete_spec(None, COMPUTED, None) == COMPUTED


def test_what_is_said_is_said_also_when_it_is_no() -> None:
    embeds = spec(is_embedding_model=True)
    assert complete_spec(GivenSpec(), embeds, None) == embeds
    assert complete_spec(GivenSpec(is_embedding_model=False), embeds, None).is_embedding_model is False
    assert complete_spec(GivenSpec(is_embedding_model=True, num_layers=0), spec(), None).is_embedding_model is True
    assert complete_spec(GivenSpec(num_layers=0), embeds, None).num_layers == 0


def test_a_spec_with_gaps_is_none_until_they_are_filled() -> None:
    partial = entity(fileset="default/ff", spec=GivenSpec(num_layers=3))
    assert spec_of(partial) is None
    assert with_spec(partial).wish.spec == GivenSpec(num_layers=3)
    done = replace(partial, status=described(partial, COMPUTED, None))
    assert spec_of(done) == replace(COMPUTED, num_layers=3)
    whole = GivenSpec(**asdict(COMPUTED))
    assert spec_of(entity(spec=whole)) == COMPUTED


def test_a_user_can_say_whatever_a_spec_has() -> None:
    given = [(f.name, f.required) for f in struct_fields(GivenSpec)]
    assert given == [(f.name, False) for f in struct_fields(ModelSpec)]


def test_a_fileset_hands_its_tool_calling_down_field_by_field() -> None:
    own = spec(chat_template="own", tool_call_config=ToolCallConfig(tool_call_parser="mine", tool_call_plugin="a/bb"))
    made = complete_spec(own, COMPUTED, ToolCalling(tool_call_parser="hermes", auto_tool_choice=True))
    assert made.chat_template == "own"
    assert made.tool_call_config == ToolCallConfig(
        tool_call_parser="hermes", tool_call_plugin="a/bb", auto_tool_choice=True
    )


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, ToolCalling()),
        ({}, ToolCalling()),
        ({"tool_calling": None, "other": 1}, ToolCalling()),
        ({"tool_calling": {"auto_tool_choice": False, "unknown": 1}}, ToolCalling(auto_tool_choice=False)),
    ],
)
def test_metadata_is_free_form(metadata: Any, expected: ToolCalling) -> None:
    assert read_tool_calling(metadata, "f") == expected


@pytest.mark.parametrize("tools", [{"auto_tool_choice": "yes"}, {"chat_template": 1}, ["hermes"], "hermes"])
def test_tool_calling_of_the_wrong_type_is_refused(tools: Any) -> None:
    with pytest.raises(BadRequest, match=r"Fileset 'ff': metadata\.model\.tool_calling"):
        read_tool_calling({"tool_calling": tools}, "ff")


def test_tool_calling_is_handed_down_once_for_each_fileset() -> None:
    """A spec that is updated later is not touched by the fileset again; another fileset hands its own down."""
    source = fileset(TOOLS)
    model = entity(fileset="default/ff", spec=spec())
    model = replace(model, status=described(model, COMPUTED, inherited(model, source, "ff")))
    shown = spec_of(model)
    assert shown is not None
    assert shown.tool_call_config == ToolCallConfig(tool_call_parser="hermes", auto_tool_choice=True)

    changed = replace(shown, tool_call_config=ToolCallConfig(tool_call_parser="mistral"))
    model = replace(model, wish=replace(model.wish, spec=changed))
    assert not is_described(model)
    assert spec_of(model) == changed  # at once, before anything is read again
    assert inherited(model, source, "ff") is None
    model = replace(model, status=described(model, COMPUTED, None))
    assert spec_of(model).tool_call_config == ToolCallConfig(tool_call_parser="mistral")  # type: ignore[union-attr]

    moved = replace(model, wish=replace(model.wish, fileset="default/gg"))
    assert not is_described(moved)
    assert inherited(moved, source, "gg") == ToolCalling(**TOOLS)


def test_a_model_of_its_own_accord_is_described_once() -> None:
    model = entity()
    assert not is_described(model)
    assert is_described(entity(description="no fileset"))
    model = replace(model, status=described(model, COMPUTED, inherited(model, fileset(TOOLS), "ff")))
    assert is_described(model)
    assert is_described(replace(model, wish=replace(model.wish, description="another")))
    assert not is_described(replace(model, wish=replace(model.wish, spec=COMPUTED)))


def test_a_spec_of_another_fileset_does_not_count_any_more() -> None:
    model = entity()
    model = replace(model, status=described(model, COMPUTED, None))
    moved = replace(model, wish=Model(fileset="default/other"))
    assert spec_of(moved) is None
    waiting = replace(moved, status=not_described(moved, "the hub is away", final=False))
    assert spec_of(waiting) is None
    assert (waiting.status.spec_status, waiting.status.spec_message) == ("pending", "the hub is away")
    assert not is_described(waiting)


def test_before_the_spec_is_known_the_fileset_says_how_to_chat() -> None:
    tools = {**TOOLS, "tool_call_plugin": "default/pp"}
    template, config = chat_of(entity(), fileset(tools))
    assert template == "{{ x }}"
    assert config == ToolCallConfig(tool_call_parser="hermes", auto_tool_choice=True)  # no plugin: nobody allowed it
    assert chat_of(entity(), fileset({"chat_template": 1})) == (None, ToolCallConfig())
    assert chat_of(entity(), None) == (None, ToolCallConfig())
    own: ModelSpec = spec(chat_template="own")
    assert chat_of(entity(fileset="default/ff", spec=own), fileset(tools)) == ("own", ToolCallConfig())


# --- linear layers -------------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, 0)


def test_linear_layers_have_names_and_dimensions() -> None:
    tensors = {
        "model.embed_tokens.weight": tensor("BF16", 100, 8),
        "model.layers.10.self_attn.q_proj.weight": tensor("BF16", 16, 8),
        "model.layers.2.self_attn.q_proj.weight": tensor("F8_E4M3", 16, 8),
        "model.layers.2.self_attn.q_proj.bias": tensor("BF16", 16),
        "model.layers.2.self_attn.q_proj.weight_scale_inv": tensor("F32", 1, 1),
        "model.layers.2.input_layernorm.weight": tensor("BF16", 8),
        "model.layers.2.mlp.experts.0.up_proj.weight": tensor("BF16", 4, 8),
        "model.layers.2.mlp.experts.gate_up_proj": tensor("BF16", 4, 8, 8),
        "model.layers.2.mlp.down_proj.qweight": tensor("I32", 4, 8),
        "lm_head.weight": tensor("BF16", 100, 8),
    }
    assert linear_layers(tensors) == [
        LinearLayerSpec(name="lm_head", in_features=8, out_features=100),
        LinearLayerSpec(name="model.layers.2.self_attn.q_proj", in_features=8, out_features=16),
        LinearLayerSpec(name="model.layers.10.self_attn.q_proj", in_features=8, out_features=16),
    ]


def test_layers_may_have_any_numbers() -> None:
    names = [f"layers.{number}.q" for number in ("2", "10", "²", "9" * 5000)]
    found = linear_layers({f"{name}.weight": tensor("BF16", 16, 8) for name in names})
    assert {layer.name for layer in found} == set(names)


def test_gpt2_stores_its_layers_transposed() -> None:
    tensors = {"h.0.attn.c_attn.weight": tensor("F32", 768, 2304), "wte.weight": tensor("F32", 50257, 768)}
    assert linear_layers(tensors, transposed=True) == [
        LinearLayerSpec(name="h.0.attn.c_attn", in_features=768, out_features=2304)
    ]

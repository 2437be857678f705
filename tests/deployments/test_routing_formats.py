"""Which format a target is spoken to in: the model's, unless its engine speaks both."""

from __future__ import annotations

import pytest

from nimhost.deployments.routing import route_table
from nimhost.entities import BackendFormat, Entity, Model, Provider, ProviderStatus, ServedModel, VirtualModel, Wish
from nimhost.gateway.paths import Policy
from nimhost.gateway.routes import Upstream, build_table
from nimhost.refs import Ref

MODEL = Ref("default", "mm")


def row(kind: str, name: str, wish: Wish, status: object = None) -> Entity:
    return Entity(kind=kind, id=name, workspace="default", name=name, created_at="2026-01-01T00:00:00Z",
                  updated_at="", wish=wish, status=status)  # fmt: skip


@pytest.mark.parametrize(
    ("said", "speaks"),
    [("ANTHROPIC_MESSAGES", "ANTHROPIC_MESSAGES"), ("OPENAI_CHAT", "OPENAI_CHAT"), (None, "OPENAI_CHAT")],
)
def test_a_provider_is_spoken_to_in_the_format_of_its_model(said: BackendFormat | None, speaks: BackendFormat) -> None:
    status = ProviderStatus(served_models=[ServedModel("default/mm", "claude-x")])
    found = route_table(
        [row("providers", "pp", Provider(host_url="http://x"), status)],
        {MODEL: row("models", "mm", Model(backend_format=said))},
        [row("workspaces", "default", Model())],
        [],
        {},
        [row("virtual-models", "alias", VirtualModel(default_model_entity="default/mm"))],
    )
    assert [target.speaks for target in found.model("default", "mm")] == [speaks]
    assert [target.speaks for target in found.model("default", "alias")] == [speaks]
    assert found.provider("default", "pp").speaks is None


@pytest.mark.parametrize(
    ("policy", "speaks"),
    [("vllm", None), *((policy, "ANTHROPIC_MESSAGES") for policy in ("nim", "generic", "external"))],
)
def test_an_engine_that_speaks_both_is_never_translated_for(policy: Policy, speaks: BackendFormat | None) -> None:
    served = (ServedModel("default/mm", "m"),)
    upstream = Upstream(provider=Ref("default", "pp"), base_url="http://x", policy=policy, served=served)
    (target,) = build_table([upstream], formats={MODEL: "ANTHROPIC_MESSAGES"}).model("default", "mm")
    assert target.speaks == speaks

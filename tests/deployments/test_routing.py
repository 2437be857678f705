"""Aliases in the gateway's table."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.routing import Key, route_table, with_aliases
from nimhost.entities import Adapter, Entity, Model, Provider, ProviderStatus, ServedModel, VirtualModel, Wish
from nimhost.errors import NotFound, NotReady
from nimhost.gateway.replies import model_list
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import Ref

MADE = "2026-01-01T00:00:00Z"
A, B = Ref("default", "aa"), Ref("default", "bb")


def table(ready: bool = True) -> RouteTable:
    served = (ServedModel("default/aa", "vendor/a"), ServedModel("default/bb", "vendor/b"))
    upstream = Upstream(provider=A, base_url="http://x", served=served, ready=ready, message="It loads.")
    return build_table([upstream], models=[A, B], workspaces=["default"])


def test_an_alias_leads_where_its_model_leads_under_its_own_name() -> None:
    found = with_aliases(table(), {Ref("default", "fast"): A})
    (target,) = found.model("default", "fast")
    assert (target.ref, target.served_name) == (Ref("default", "fast"), "vendor/a")
    assert found.any_model("fast") == found.model("default", "fast")
    assert found.reachable("default") == [A, B, Ref("default", "fast")]
    assert found.model("default", "aa")[0].ref == A


def test_an_alias_with_the_name_of_a_model_wins_and_aliases_do_not_chain() -> None:
    found = with_aliases(table(), {A: B, Ref("default", "other"): A})
    assert found.model("default", "aa")[0].served_name == "vendor/b"
    assert found.model("default", "other")[0].served_name == "vendor/a"


def test_an_alias_waits_for_what_its_model_waits_for() -> None:
    found = with_aliases(table(ready=False), {Ref("default", "fast"): A})
    with pytest.raises(NotReady, match="Model default/fast is not ready: It loads"):
        found.model("default", "fast")


def test_an_alias_of_nothing_is_known_and_not_found() -> None:
    found = with_aliases(table(), {Ref("default", "fast"): Ref("default", "nope"), A: Ref("default", "nope")})
    for name in ("fast", "aa"):
        with pytest.raises(NotFound, match=f"No providers found for model entity default/{name}"):
            found.model("default", name)


def test_an_alias_that_leads_nowhere_says_to_what() -> None:
    nope, idle = Ref("default", "nope"), Ref("default", "idle")
    found = replace(table(), known=table().known | {idle})
    found = with_aliases(found, {Ref("default", "lost"): nope, Ref("default", "quiet"): idle})
    with pytest.raises(NotFound, match="default/lost: it is another name for default/nope, which does not exist"):
        found.model("default", "lost")
    with pytest.raises(NotFound, match="default/quiet: it is another name for default/idle, which nothing serves"):
        found.any_model("quiet")


def test_an_external_provider_that_has_not_proven_itself_says_why() -> None:
    refused = ProviderStatus(status="ERROR", status_message="http://x/v1/models refused the key (HTTP 401)")
    rows = [row("providers", "pp", Provider(host_url="http://x"), status=refused)]
    upstream = route_table(rows, {}, [], [], {}).provider("default", "pp").route.upstream
    assert (upstream.ready, upstream.proven, upstream.message) == (True, False, refused.status_message)
    unkeyed = route_table(rows, {}, [], [], {Ref("default", "pp"): Key(problem="No key yet: make one")})
    with pytest.raises(NotReady, match="No key yet"):
        unkeyed.provider("default", "pp")


def row(kind: str, name: str, wish: Wish, **more: Any) -> Entity:
    return Entity(
        kind=kind, id=name, workspace="default", name=name, created_at=MADE, updated_at="", wish=wish, **more
    )  # fmt: skip


def test_lists_of_models_say_when_each_was_made_as_its_row_does() -> None:
    status = ProviderStatus(served_models=[ServedModel("default/aa", "vendor/a"), ServedModel("default/xx", "x")])
    found = route_table(
        [row("providers", "pp", Provider(host_url="http://x"), status=status)],
        {A: row("models", "aa", Model())},
        [],
        [],
        {},
        [row("virtual-models", "fast", VirtualModel(default_model_entity="default/aa"))],
    )
    assert found.created == {A: 1767225600, Ref("default", "fast"): 1767225600}
    cards = json.loads(model_list(found.reachable(), found.created))["data"]
    assert {card["id"]: card["created"] for card in cards}["default/aa"] == 1767225600


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"enabled": False}, "Disabled. Enable it with: nimhost adapters update math --enabled"),
        ({"finetuning_type": "prompt_tuning"}, "Engines load adapters of finetuning_type lora"),
        ({}, "No deployment of default/aa takes adapters"),
    ],
)
def test_an_adapter_that_nothing_is_to_serve_says_why_itself(wish: dict[str, Any], why: str) -> None:
    adapter = Adapter(**{"fileset": "f", "model": "default/aa", "finetuning_type": "lora", **wish})
    models = {A: row("models", "aa", Model())}
    found = route_table([], models, [], [], {}, adapters=[row("adapters", "math", adapter)])
    for ask in (found.any_model, lambda name: found.model("default", name)):
        with pytest.raises(NotFound) as caught:
            ask("default--math")
        assert caught.value.message.startswith(f"No providers found for model entity default/default--math: {why}")
        assert caught.value.hint == "See: nimhost adapters get math"
    with pytest.raises(NotFound, match="Model entity not found for default/math") as caught:
        found.any_model("math")
    assert caught.value.hint == "Did you mean default/default--math?"


def test_stored_virtual_models_are_aliases_unless_they_name_themselves_or_nothing() -> None:
    status = ProviderStatus(served_models=[ServedModel("default/aa", "vendor/a")])
    found = route_table(
        [row("providers", "pp", Provider(host_url="http://x"), status=status)],
        {A: row("models", "aa", Model())},
        [row("workspaces", "default", Model())],
        [],
        {},
        [
            row("virtual-models", "fast", VirtualModel(default_model_entity="default/aa")),
            row("virtual-models", "aa", VirtualModel(default_model_entity="default/aa")),
            row("virtual-models", "none", VirtualModel()),
        ],
    )
    assert found.reachable() == [A, Ref("default", "fast")]

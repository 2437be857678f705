"""Aliases in the gateway's table."""

from __future__ import annotations

import pytest

from nimhost.deployments.routing import route_table, with_aliases
from nimhost.entities import Entity, Model, Provider, ProviderStatus, ServedModel, VirtualModel, Wish
from nimhost.errors import NotFound, NotReady
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import Ref

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


def row(kind: str, name: str, wish: Wish, **more: object) -> Entity:
    return Entity(kind=kind, id=name, workspace="default", name=name, created_at="", updated_at="", wish=wish, **more)  # type: ignore[arg-type]


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

"""Where requests for adapters go, and what those are told whose adapter is not there (yet)."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.deployments.discovery import judge
from nimhost.deployments.model_list import read_model_list
from nimhost.entities import Entity, Provider, ServedModel
from nimhost.errors import NotFound, NotReady
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import Ref

BASE, MATH = ServedModel("default/base", "default/base"), ServedModel("default/default--math", "default--math")


def upstream(name: str, *served: ServedModel, workspace: str = "default", **more: Any) -> Upstream:
    return Upstream(provider=Ref(workspace, name), base_url="http://x", policy="vllm", served=served, **more)


def table(*upstreams: Upstream) -> RouteTable:
    return build_table(upstreams, models=[Ref("default", "base")], workspaces=["default", "team"])


def test_an_adapter_that_waits_is_a_503_with_its_reason_on_every_route() -> None:
    found = table(upstream("dd", BASE, absent={"default--math": "It is being loaded."}))
    for ask in (
        lambda: found.any_model("default--math"),
        lambda: found.any_model("default/default--math"),
        lambda: found.model("default", "default--math"),
        lambda: found.provider("default", "dd").route.check_adapter("default--math"),
    ):
        with pytest.raises(NotReady, match="Adapter default--math is not ready: It is being loaded") as caught:
            ask()
        assert caught.value.hint == "See: nimhost adapters get math"
    found.provider("default", "dd").route.check_adapter("default/base")


def test_one_that_nobody_wants_is_a_404_though_the_engine_still_has_it() -> None:
    found = table(upstream("dd", BASE, absent={"default--math": None}))
    with pytest.raises(NotFound):
        found.any_model("default--math")
    with pytest.raises(NotFound):
        found.provider("default", "dd").route.check_adapter("default--math")
    assert found.reachable() == [Ref("default", "base")]


def test_what_one_deployment_has_loaded_is_asked_there() -> None:
    found = table(upstream("one", BASE, MATH), upstream("two", BASE, absent={"default--math": "Loading."}))
    (target,) = found.any_model("default--math")
    assert target.route.upstream.provider.name == "one"
    assert Ref("default", "default--math") not in found.waiting


def test_several_deployments_share_the_requests_for_an_adapter_of_another_workspace() -> None:
    far = ServedModel("team/team--far", "team--far")
    found = table(upstream("one", far, workspace="team"), upstream("two", far, workspace="team"))
    assert len(found.any_model("team--far")) == 2
    waits = table(upstream("one", workspace="team", absent={"team--far": "Loading."}))
    with pytest.raises(NotReady) as caught:
        waits.any_model("team--far")
    assert caught.value.hint == "See: nimhost adapters get far --workspace team"


def test_adapters_of_an_external_vllm_are_no_models() -> None:
    provider = Entity(kind="providers", id="p", workspace="default", name="pp", created_at="2026-01-01T00:00:00Z",
                      updated_at="", wish=Provider(host_url="http://x"))  # fmt: skip
    body = b'{"data": [{"id": "qwen", "parent": null}, {"id": "sql", "parent": "qwen"}, {"id": "other"}]}'
    served = judge(provider, "http://x/v1/models", 200, read_model_list(body)).served_models
    assert [model.served_model_name for model in served] == ["qwen", "other"]

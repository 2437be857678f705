"""Who serves a request, or why nobody does."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nimhost.entities import ServedModel
from nimhost.errors import InvalidRequest, NimhostError, NotFound, NotReady
from nimhost.gateway.routes import RouteTable, Upstream, build_table
from nimhost.refs import Ref


def upstream(name: str, *served: tuple[str, str], workspace: str = "default", **more: Any) -> Upstream:
    models = tuple(ServedModel(entity, served_name) for entity, served_name in served)
    return Upstream(provider=Ref(workspace, name), base_url=f"http://{name}", served=models, **more)


@pytest.fixture
def table() -> RouteTable:
    return build_table(
        [
            upstream("local", ("default/qwen", "qwen-served"), ("default/ws--lora", "ws--lora"), policy="vllm"),
            upstream("cloud", ("default/qwen", "qwen3"), ("default/meta-llama-3-1-8b", "meta/llama-3.1-8b")),
            upstream("other", ("w2/both", "both/id"), workspace="w2"),
            upstream("third", ("default/both", "both/id")),
            upstream("fourth", ("default/both", "named/otherwise")),
            upstream("elsewhere", ("w2/mistral", "mistral"), workspace="w2"),
            upstream("down", ("default/late", "vendor/late"), ready=False, message="PENDING: loads the model"),
        ],
        models=[Ref("default", "qwen"), Ref("default", "alone"), Ref("default", "coming")],
        waiting={Ref("default", "coming"): "Waits for 2 GPUs.", Ref("default", "qwen"): "a second one starts"},
        workspaces=["default", "system", "w2"],
    )


def served_by(table: RouteTable, workspace: str, model: str) -> tuple[str, str]:
    target = table.model(workspace, model)[0]
    return target.route.upstream.provider.name, target.served_name


def error_of(table: RouteTable, workspace: str | None, model: str) -> NimhostError:
    with pytest.raises(NimhostError) as caught:
        table.model(workspace, model) if workspace else table.any_model(model)
    return caught.value


def test_model_is_found_with_and_without_its_workspace(table: RouteTable) -> None:
    assert served_by(table, "default", "qwen") == ("local", "qwen-served")
    assert served_by(table, "default", "default/qwen") == ("local", "qwen-served")


def test_first_ready_provider_is_used(table: RouteTable) -> None:
    down = upstream("down", ("default/qwen", "x"), ready=False)
    other_way = build_table([down, upstream("cloud", ("default/qwen", "qwen3"))])
    assert served_by(other_way, "default", "qwen") == ("cloud", "qwen3")


def test_adapter_is_found_by_its_served_name(table: RouteTable) -> None:
    assert served_by(table, "default", "ws--lora") == ("local", "ws--lora")


def test_vendor_id_is_422_and_names_the_model_to_use(table: RouteTable) -> None:
    error = error_of(table, "default", "meta/llama-3.1-8b")
    assert isinstance(error, InvalidRequest)
    assert "Use default/meta-llama-3-1-8b" in f"{error.message} {error.hint}"


def test_model_of_another_workspace_is_422_and_says_where_it_is(table: RouteTable) -> None:
    error = error_of(table, "default", "w2/mistral")
    assert isinstance(error, InvalidRequest)
    assert "w2" in (error.hint or "")


def test_unknown_model_is_404_with_near_names(table: RouteTable) -> None:
    for typo in ("qwne", "qwen2", "qewn"):
        error = error_of(table, "default", typo)
        assert isinstance(error, NotFound)
        assert error.message == f"Model entity not found for default/{typo}"
        assert "default/qwen" in (error.hint or "")


def test_model_that_nothing_serves_is_404_and_says_so(table: RouteTable) -> None:
    error = error_of(table, "default", "alone")
    assert isinstance(error, NotFound)
    assert error.message == "No providers found for model entity default/alone"


def test_a_client_is_not_told_the_logs_of_an_engine() -> None:
    said = 'Container exited with code 1. It needs more memory.\n\nLast log lines:\n  File "/opt/x.py", line 3'
    down = [upstream("down", ("default/late", "late"), ready=False, message=said, absent={"default--math": said})]
    found = build_table(down, waiting={Ref("default", "coming"): said})
    errors = [error_of(found, "default", name) for name in ("late", "coming", "default--math")]
    with pytest.raises(NotReady) as caught:
        found.provider("default", "down")
    for error in (*errors, caught.value):
        assert error.message.endswith(" is not ready: Container exited with code 1. It needs more memory.")


def test_model_of_a_deployment_that_is_not_ready_is_503_with_its_message(table: RouteTable) -> None:
    for name, message in (("coming", "Waits for 2 GPUs."), ("late", "PENDING: loads the model")):
        error = error_of(table, "default", name)
        assert isinstance(error, NotReady)
        assert message in error.message
        assert error.retry_after_s > 0


def test_ready_target_outweighs_one_that_waits(table: RouteTable) -> None:
    assert Ref("default", "qwen") not in table.waiting


def test_unknown_workspace_is_404(table: RouteTable) -> None:
    error = error_of(table, "nows", "qwen")
    assert isinstance(error, NotFound)
    assert error.message == "Workspace not found: nows"
    with pytest.raises(NotFound):
        table.reachable("nows")


def test_short_route_finds_models_of_every_workspace(table: RouteTable) -> None:
    assert table.any_model("w2/mistral")[0].route.upstream.provider == Ref("w2", "elsewhere")
    assert table.any_model("qwen")[0].served_name == "qwen-served"
    assert table.any_model("default/qwen")[0].served_name == "qwen-served"


def test_short_route_takes_a_vendor_id_that_one_provider_serves(table: RouteTable) -> None:
    (target,) = table.any_model("meta/llama-3.1-8b")
    assert (target.ref, target.served_name) == (Ref("default", "meta-llama-3-1-8b"), "meta/llama-3.1-8b")


def test_short_route_does_not_choose_between_models(table: RouteTable) -> None:
    error = error_of(table, None, "both/id")
    assert isinstance(error, InvalidRequest)
    assert "w2/both, default/both" in (error.hint or "")


def test_vendor_id_of_a_model_that_has_several_providers_leads_to_all_of_them(table: RouteTable) -> None:
    found = table.any_model("named/otherwise")
    assert found == table.model("default", "both")
    assert [target.served_name for target in found] == ["both/id", "named/otherwise"]


def test_short_route_says_that_a_vendor_id_is_not_ready_yet(table: RouteTable) -> None:
    error = error_of(table, None, "vendor/late")
    assert isinstance(error, NotReady)
    assert "loads the model" in error.message


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "default/../x", "..", "", "a b", "x" * 64, "-x", "a/b/c", "\0"]
)
def test_name_that_is_a_path_finds_nothing(table: RouteTable, name: str) -> None:
    assert isinstance(error_of(table, "default", name), InvalidRequest)
    assert isinstance(error_of(table, None, name), NotFound)


def test_provider_is_found_or_says_why_not(table: RouteTable) -> None:
    assert table.provider("default", "local").route.upstream.base_url == "http://local"
    with pytest.raises(NotFound, match="Model provider not found for default/nope"):
        table.provider("default", "nope")
    with pytest.raises(NotReady, match="loads the model"):
        table.provider("default", "down")
    with pytest.raises(InvalidRequest):
        table.provider("default", "a/b")


def test_reachable_models_are_sorted(table: RouteTable) -> None:
    assert [str(ref) for ref in table.reachable()] == [
        "default/both", "default/meta-llama-3-1-8b", "default/qwen", "default/ws--lora", "w2/both", "w2/mistral",
    ]  # fmt: skip
    assert table.reachable("w2") == [Ref("w2", "both"), Ref("w2", "mistral")]


def test_error_for_one_of_ten_thousand_models_does_not_stop_the_loop() -> None:
    names = [f"model-{i}-instruct" for i in range(10_000)]
    table = build_table([upstream("p", *((f"default/{name}", name) for name in names))])
    began = time.perf_counter()
    error_of(table, "default", "modle-17-instruct")
    assert time.perf_counter() - began < 0.05


def test_key_is_not_in_the_representation() -> None:
    table = build_table([upstream("p", ("default/m", "m"), headers=(("Authorization", "Bearer canary"),))])
    assert "canary" not in repr(table)
    assert "canary" not in repr(table.model("default", "m"))

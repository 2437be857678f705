"""What a client asked for, and where it is sent."""

from __future__ import annotations

import pytest

from nimhost.errors import BadRequest, Forbidden, NimhostError, NotFound
from nimhost.gateway.paths import VLLM_PATHS, Place, Policy, is_gateway_path, parse_place, target_url

G = "/apis/inference-gateway/v2/workspaces"
ENGINE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (f"{G}/default/provider/p/-/v1/chat/completions", Place("provider", "default", "p", "v1/chat/completions")),
        (f"{G}/w.1/provider/p/-/", Place("provider", "w.1", "p", "")),
        (f"{G}/default/provider/p/-", Place("provider", "default", "p", "")),
        (f"{G}/default/provider/p/-/a/-/b", Place("provider", "default", "p", "a/-/b")),
        (f"{G}/default/provider/p/ready", Place("ready", "default", "p", "")),
        (f"{G}/default/model/m/-/v1/models", Place("model", "default", "m", "v1/models")),
        (f"{G}/default/model/default/m/-/v1/x", Place("model", "default", "default/m", "v1/x")),
        (f"{G}/default/openai/-/v1/models/a/b", Place("openai", "default", "", "v1/models/a/b")),
        ("/v1/chat/completions", Place("short", "default", "", "v1/chat/completions")),
    ],
)
def test_path_names_its_place(path: str, place: Place) -> None:
    assert is_gateway_path(path)
    assert parse_place(path) == place


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/x", "/apis/models/v2/workspaces/default/models", f"{G}/default",
                                  f"{G}/default/virtual-models", f"{G}/default/providers/x", f"{G}/"])  # fmt: skip
def test_path_of_the_control_plane_is_not_the_gateways(path: str) -> None:
    assert not is_gateway_path(path)


@pytest.mark.parametrize("rest", ["provider/p", "provider/-/v1/x", "model/-/v1/x", "openai/x/-/v1", "provider/p/what"])
def test_path_that_is_no_route_is_not_found(rest: str) -> None:
    with pytest.raises(NotFound):
        parse_place(f"{G}/default/{rest}")


@pytest.mark.parametrize("path", ["/v1", "/", f"x{G[1:]}/default/provider/p/-/v1/x", "/apis/inference-gateway/v2"])
def test_path_of_somewhere_else_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        parse_place(path)


@pytest.mark.parametrize(
    ("base", "tail", "url"),
    [
        (ENGINE, "v1/chat/completions", f"{ENGINE}/v1/chat/completions"),
        (f"{ENGINE}/", "v1/models", f"{ENGINE}/v1/models"),
        ("https://api.example/v1", "v1/chat/completions", "https://api.example/v1/chat/completions"),
        ("https://api.example/v1/", "v1", "https://api.example/v1"),
        ("https://api.example/v1", "models", "https://api.example/v1/models"),
        ("https://api.example/v1", "v1beta/x", "https://api.example/v1/v1beta/x"),
        ("https://api.example/xv1", "v1/x", "https://api.example/xv1/v1/x"),
        ("https://api.example", "sleep", "https://api.example/sleep"),
        ("https://api.example", "a//b/", "https://api.example/a//b/"),
        ("https://api.example", "f/ü x?#%2e", "https://api.example/f/%C3%BC%20x%3F%23%252e"),
        ("https://api.example", "", "https://api.example/"),
    ],
)
def test_url_of_an_external_provider(base: str, tail: str, url: str) -> None:
    assert target_url(base, "external", tail) == url


def test_url_as_long_as_a_client_likes() -> None:
    assert target_url("https://api.example", "external", "x" * 5000) == "https://api.example/" + "x" * 5000


@pytest.mark.parametrize("path", sorted(VLLM_PATHS))
@pytest.mark.parametrize("policy", ["vllm", "nim", "generic"])
def test_every_inference_path_is_let_through(policy: Policy, path: str) -> None:
    assert target_url(ENGINE, policy, path[1:]) == ENGINE + path


@pytest.mark.parametrize(
    "tail", ["v1/infer", "v1/ranking", "v1/biology/nvidia/esmfold", "v1/metrics", "docs", "a/sleepy"]
)
def test_nim_and_generic_images_may_have_paths_of_their_own(tail: str) -> None:
    assert target_url(ENGINE, "nim", tail) == f"{ENGINE}/{tail}"
    assert target_url(ENGINE, "generic", tail) == f"{ENGINE}/{tail}"
    with pytest.raises(NotFound):
        target_url(ENGINE, "vllm", "v1/infer")


CONTROL = [
    "v1/load_lora_adapter",
    "v1/unload_lora_adapter",
    "v1//load_lora_adapter",
    "/v1/load_lora_adapter",
    "v1/load_lora_adapter/",
    "v1/LOAD_lora_adapter",
    "v1/load_lora_adapter;x=1",
    "x/load_lora_adapter",
    "sleep",
    "Sleep/",
    "/wake_up",
    "collective_rpc",
    "v1/pause",
    "update_weights",
    "reset_prefix_cache",
    "start_profile",
    "slots/0",
    "models/unload",
    "v2/repository/models/x/load",
]


@pytest.mark.fault(33)
@pytest.mark.parametrize("tail", CONTROL)
@pytest.mark.parametrize("policy", ["vllm", "nim", "generic"])
def test_control_endpoint_is_refused_however_it_is_written(policy: Policy, tail: str) -> None:
    with pytest.raises(Forbidden) as refused:
        target_url(ENGINE, policy, tail)
    assert refused.value.final


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "tail",
    ["v1/../sleep", "v1/chat/completions/../../load_lora_adapter", "./sleep", "v1/%2e%2e/sleep", "v1%2fsleep",
     "v1\\load_lora_adapter", "v1/load_lora_adapter\x00", "v1/models/..", "v1/\nsleep"],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["vllm", "nim", "generic"])
def test_path_that_servers_read_differently_is_refused(policy: Policy, tail: str) -> None:
    with pytest.raises(BadRequest):
        target_url(ENGINE, policy, tail)


@pytest.mark.fault(33)
def test_control_endpoint_is_refused_below_a_base_path_too() -> None:
    with pytest.raises(Forbidden):
        target_url(f"{ENGINE}/v1", "vllm", "load_lora_adapter")
    with pytest.raises(Forbidden):
        target_url(f"{ENGINE}/v1", "vllm", "v1/load_lora_adapter")


@pytest.mark.parametrize("tail", ["../admin", "v1/../../x", "v1/./x", "a\\..\\b", "a\r\nb"])
def test_external_provider_is_not_left_by_its_path(tail: str) -> None:
    """The key travels with the request: it must not reach what the provider's URL does not name."""
    with pytest.raises(NimhostError):
        target_url("https://api.example/tenant/v1", "external", tail)

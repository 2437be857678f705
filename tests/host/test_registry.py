"""What a registry is asked about an image, and who is shown what; and that whatever goes wrong there is no answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from nimhost.host.containers import DockerContainers, _login
from nimhost.host.registry import (
    CONFIG_BYTES,
    MANIFEST_BYTES,
    Offer,
    Reference,
    Registries,
    may_give_tokens,
    parse_reference,
)
from tests.fakes.registry import INDEX, FakeRegistry

CUDA = "NVIDIA_REQUIRE_CUDA=cuda>=12.8"


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as opened:
        yield opened


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("ubuntu", ("registry-1.docker.io", "library/ubuntu", "latest")),
        ("vllm/vllm-openai:v1", ("registry-1.docker.io", "vllm/vllm-openai", "v1")),
        ("docker.io/vllm/x:v1", ("registry-1.docker.io", "vllm/x", "v1")),
        ("index.docker.io/x", ("registry-1.docker.io", "library/x", "latest")),
        ("nvcr.io/nim/meta/llama:1.2", ("nvcr.io", "nim/meta/llama", "1.2")),
        ("localhost/x:1", ("localhost", "x", "1")),
        ("host:5000/x", ("host:5000", "x", "latest")),
        ("[::1]:5000/x", ("[::1]:5000", "x", "latest")),
        (f"ghcr.io/a/b:1@sha256:{'a' * 64}", ("ghcr.io", "a/b", f"sha256:{'a' * 64}")),
        ("a.b?c/d", None),
        ("evil.test/../admin", None),
        ("host.test/a b", None),
        ("Upper/Case", None),
        ("x@sha256:12", None),
        ("", None),
    ],
)
def test_an_image_is_looked_for_where_docker_looks(image: str, found: tuple[str, str, str] | None) -> None:
    assert parse_reference(image) == (found and Reference(*found))


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        ("127.0.0.1:5000", "http"), ("127.9.9.9", "http"), ("localhost:1", "http"), ("[::1]:5000", "http"),
        ("nvcr.io", "https"), ("10.0.0.1:5000", "https"), ("localhost.evil.test", "https"), ("127.0.0.1.test", "https"),
    ],
)  # fmt: skip
def test_only_this_machine_is_asked_without_tls(host: str, scheme: str) -> None:
    assert Reference(host, "x", "1").url == f"{scheme}://{host}/v2/x"


@pytest.mark.parametrize("index", [True, False])
async def test_the_manifest_of_this_machine_says_size_and_environment(registry: FakeRegistry, index: bool) -> None:
    ref = registry.add("nim/x:1", env=(CUDA,), sizes=(1000, 2345), index=index)
    found = await Registries().ask(ref, "amd64")
    env = {"NVIDIA_REQUIRE_CUDA": "cuda>=12.8", "MACHINE": "amd64"}
    assert found == Offer(env=env, architecture="amd64", download_bytes=3345)


async def test_an_image_for_other_machines_says_for_which(registry: FakeRegistry) -> None:
    ref = registry.add("nim/x:1", machines=("arm64", "s390x"))
    assert await Registries().ask(ref, "amd64") == Offer(architecture="arm64, s390x")
    alone = registry.add("nim/y:1", machines=("arm64",), index=False)
    found = await Registries().ask(alone, "amd64")
    assert found is not None
    assert found.architecture == "arm64"


@pytest.mark.parametrize("service", ["registry.test", None])
async def test_a_token_is_fetched_for_this_repository_alone(registry: FakeRegistry, service: str | None) -> None:
    registry.service = service  # nvcr.io names none
    ref = registry.add("nim/x:1")
    assert await Registries().ask(ref, "amd64")
    asked = {"scope": ["repository:nim/x:pull"]} | ({"service": [service]} if service else {})
    assert registry.token_queries == [asked]


@pytest.mark.parametrize("wants", ["Bearer", "Basic"])
async def test_a_login_is_shown_where_it_is_wanted_and_not_where_blobs_are(registry: FakeRegistry, wants: str) -> None:
    registry.wants, registry.login = wants, ("$oauthtoken", "key:with colon")
    ref = registry.add("nim/x:1")
    assert await Registries().ask(ref, "amd64", registry.login)
    assert registry.leaked == []
    assert await Registries().ask(ref, "amd64", ("$oauthtoken", "wrong")) is None
    assert await Registries().ask(ref, "amd64") is None


@pytest.mark.parametrize(
    "challenge",
    [
        'Basic realm="here, there", {}', '{}, Basic realm="https://elsewhere.test/token"', "Negotiate, {}",
        "Negotiate YWJj==, {}", '{},Digest realm=x, qop="auth, auth-int"', "bearer  {}",
    ],
)  # fmt: skip
async def test_of_several_challenges_in_a_line_the_one_that_can_be_met_is(
    registry: FakeRegistry, challenge: str
) -> None:
    registry.challenge = challenge
    assert await Registries().ask(registry.add("nim/x:1"), "amd64")


@pytest.mark.parametrize(
    ("image", "realm", "shown"),
    [
        ("nvcr.io/x", "https://nvcr.io/proxy_auth", True),
        ("docker.io/x", "https://auth.docker.io/token", True),
        ("nvcr.io/x", "http://nvcr.io/proxy_auth", False),
        ("nvcr.io/x", "http://127.0.0.1/token", False),
        ("nvcr.io/x", "", False),
        ("localhost:5000/x", "http://127.0.0.1:5001/token", True),
        ("localhost:5000/x", "http://192.0.2.1/token", False),
        ("localhost:5000/x", "http://localhost.evil.test/token", False),
        ("localhost:5000/x", "ftp://localhost/token", False),
    ],
)
def test_a_login_goes_nowhere_without_tls(image: str, realm: str, shown: bool) -> None:
    where = parse_reference(image)
    assert where is not None
    assert may_give_tokens(httpx.URL(realm), where) == shown


@pytest.mark.parametrize("realm", ["ftp://127.0.0.1/token", "/token", "http://[", "http://192.0.2.1/token"])
async def test_who_names_no_place_for_tokens_is_asked_no_further(registry: FakeRegistry, realm: str) -> None:
    registry.realm = realm
    assert await Registries().ask(registry.add("nim/x:1"), "amd64", ("user", "key")) is None
    assert len(registry.asked) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda r: setattr(r, "status", 404),
        lambda r: setattr(r, "status", 403),
        lambda r: setattr(r, "status", 429),
        lambda r: setattr(r, "status", 500),
        lambda r: setattr(r, "wants", "Negotiate"),
        lambda r: setattr(r, "padding", MANIFEST_BYTES),
        lambda r: r.documents.clear(),
        lambda r: spoil(r, b"\xff not JSON"),
        lambda r: spoil(r, b"[]"),
        lambda r: spoil(r, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        lambda r: spoil(r, b'{"schemaVersion": 1, "fsLayers": []}'),
        lambda r: spoil(r, b'{"manifests": [{"digest": "sha256:0"}]}'),
        lambda r: spoil(r, b'{"config": {"digest": "sha256:00"}, "layers": [{"digest": "x", "size": 1}]}'),
        lambda r: spoil(r, b'{"config": {"digest": "../x"}, "layers": [{"digest": "x", "size": "many"}]}'),
    ],
)
async def test_whatever_goes_wrong_nothing_is_known(
    registry: FakeRegistry, change: Callable[[FakeRegistry], object]
) -> None:
    ref = registry.add("nim/x:1")
    assert await Registries().ask(ref, "amd64")
    change(registry)
    assert await Registries().ask(ref, "amd64") is None


def spoil(registry: FakeRegistry, content: bytes) -> None:
    registry.documents["nim/x/manifests/1"] = INDEX, content


async def test_a_config_that_is_not_what_the_manifest_names_is_not_believed(registry: FakeRegistry) -> None:
    ref = registry.add("nim/x:1")
    for path, (kind, content) in registry.documents.items():
        if "/blobs/" in path:
            registry.documents[path] = kind, content.replace(b"MACHINE", b"MADHINE")
    assert await Registries().ask(ref, "amd64") is None


async def test_a_config_has_an_end(registry: FakeRegistry) -> None:
    ref = registry.add("nim/x:1", env=("A=" + "x" * (CONFIG_BYTES - 1000),))
    assert await Registries(limit_s=30).ask(ref, "amd64")
    ref = registry.add("nim/x:2", env=("A=" + "x" * CONFIG_BYTES,))
    assert await Registries(limit_s=30).ask(ref, "amd64") is None


async def test_a_registry_that_hangs_or_is_away_holds_nobody_up(registry: FakeRegistry) -> None:
    ref = registry.add("nim/x:1")
    registry.hangs.set()
    began = time.monotonic()
    assert await Registries(limit_s=0.2).ask(ref, "amd64") is None
    assert await Registries(limit_s=0.2).ask("127.0.0.1:9/x:1", "amd64") is None
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "http://127.0.0.1:9"])
async def test_a_proxy_that_leads_nowhere_leaves_nothing_known(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Desktops set such: what it is only Docker can know, which has a proxy of its own."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert await Registries().ask("registry.test/x:1", "amd64") is None


async def test_a_redirect_that_leads_round_in_circles_ends(registry: FakeRegistry) -> None:
    ref = registry.add("nim/x:1")
    registry.wants = None
    registry.rounds = True
    assert await Registries().ask(ref, "amd64") is None
    assert 1 < len(registry.asked) < 10


# --- whose login


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("ghcr.io/a/b:1", ("me", "secret")),
        ("vllm/vllm-openai:v1", ("hub", "pass:word")),
        ("quay.io/a/b", None),
        ("broken.test/a", None),
        ("with-identity.test/a", None),
    ],
)
def test_the_login_of_docker_is_found(
    image: str, found: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auths = {
        "ghcr.io": {"auth": "bWU6c2VjcmV0"},
        "https://index.docker.io/v1/": {"auth": "aHViOnBhc3M6d29yZA=="},
        "with-identity.test": {"identitytoken": "x"},
        "broken.test": {},
    }
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert _login(image) == found


async def test_the_login_is_found_without_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may it hold up what is asked of Docker: a helper may wait until somebody opens a keyring."""
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"ghcr.io": {"auth": "bWU6c2VjcmV0"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    containers = DockerContainers(f"unix://{tmp_path}/nowhere.sock")
    assert await containers.login("ghcr.io/a/b:1") == ("me", "secret")
    await containers.close()


def test_a_configuration_of_docker_that_cannot_be_read_is_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"ghcr.io": {"auth": "%%%"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert _login("ghcr.io/a/b") is None

"""The entry: who is let in, what goes where, and what becomes of errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

import nimhost
import nimhost.api.http as http
from nimhost.api.access import Guard
from nimhost.config import Server, Settings
from nimhost.errors import ERROR_HEADER, DockerUnavailable, Forbidden, NimhostError, all_errors, from_reply, status_of
from nimhost.gateway import front
from nimhost.gateway.paths import is_gateway_path
from nimhost.tokens import hash_entry
from tests.api.conftest import MODELS, SECRETS, World, open_world
from tests.gateway.conftest import open_door

TOKEN = "nimhost_" + "t" * 43


async def test_the_platform_routes(world: World) -> None:
    assert (await world("GET", "/")).text == "OK"
    assert (await world("GET", "/health/live")).json() == {"status": "live"}
    assert (await world("GET", "/health/ready")).json() == {"status": "ready"}
    status = (await world("GET", "/status")).json()
    assert (status["status"], status["controllers"]["healthy"]) == ("degraded", True)
    assert status["services"]["not_ready"] == [{"name": "docker", "message": "x"}]
    assert set((await world("GET", "/cluster-info")).json()) == {"platform_version", "revision"}
    assert (await world("GET", "/apis/auth/discovery")).json() == {"auth_enabled": False, "oidc": None}
    assert (await world("GET", "/apis/nimhost/v1/host")).json()["version"] == nimhost.__version__
    assert (await world("GET", "/apis/nimhost/v1/gpus")).json()["data"][0]["uuid"] == "GPU-1"


@pytest.mark.parametrize(
    ("path", "gateway"),
    [
        ("/v1", False),
        ("/v1/chat/completions", True),
        ("/v1x", False),
        ("/apis/inference-gateway/v2/workspaces/default/openai/-/v1/models", True),
        ("/apis/inference-gateway/v2/workspaces/default/provider/virtual-models/-/x", True),
        ("/apis/inference-gateway/v2/workspaces/default/provider/p/-/a\nb", True),
        ("/apis/inference-gateway/v2/workspaces/default/virtual-models", False),
        ("/apis/inference-gateway/v2/workspaces/default/virtual-models/x", False),
        ("/apis/models/v2/workspaces/default/models", False),
    ],
)
def test_traffic_goes_to_the_gateway_and_the_rest_does_not(path: str, gateway: bool) -> None:
    assert is_gateway_path(path) is gateway


async def test_the_gateway_gets_its_requests(world: World) -> None:
    assert (await world("POST", "/v1/chat/completions", {})).text == "gateway /v1/chat/completions"


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("bound", "allowed", "host", "status"),
    [
        ("127.0.0.1", [], "127.0.0.1:8080", 200),
        ("127.0.0.1", [], "localhost:8080", 200),
        ("127.0.0.1", [], "LOCALHOST", 200),
        ("127.0.0.1", [], "box.localhost:8080", 200),
        ("127.0.0.1", [], "[::1]:8080", 200),
        ("127.0.0.1", [], "127.0.0.2", 200),
        ("127.0.0.1", [], "evil.example:8080", 403),
        ("127.0.0.1", [], "localhost.evil.example", 403),
        ("127.0.0.1", [], "192.168.1.5:8080", 403),
        ("127.0.0.1", [], "", 403),
        ("127.0.0.1", [], "[::1]", 200),
        ("127.0.0.1", [], "[::1]evil.example", 403),
        ("127.0.0.1", [], "[fe80::1]:8080", 403),
        ("127.0.0.1", [], "::1", 403),
        ("127.0.0.1", [], "0.0.0.0:8080", 403),
        ("127.0.0.1", [], "localhost.:8080", 200),
        ("127.0.0.1", [], "127.0.0.1.evil.example:8080", 403),
        ("::", [], "[2001:db8::1]:8080", 200),
        ("127.0.0.1", ["box.lan"], "box.lan:8080", 200),
        ("0.0.0.0", [], "192.168.1.5:8080", 200),
        ("0.0.0.0", [], "evil.example", 403),
        ("192.168.1.5", [], "192.168.1.5:8080", 200),
        ("box.lan", [], "box.lan", 200),
    ],
)
async def test_requests_under_a_strange_host_name_reach_nothing(
    tmp_path: Path, bound: str, allowed: list[str], host: str, status: int
) -> None:
    settings = Settings(server=Server(host=bound, allowed_hosts=allowed, api_tokens=[hash_entry(f"tt:admin:{TOKEN}")]))
    async with open_world(tmp_path, settings) as world:
        for path in ("/health/live", "/status", "/v1/models"):
            reply = await world("GET", path, headers={"host": host, "authorization": f"Bearer {TOKEN}"})
            assert reply.status_code == status
            assert status == 200 or "server.allowed_hosts" in reply.text


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8080", 200),
        ("https://evil.example", 403),
        ("http://localhost:3000", 403),
        ("http://127.0.0.1:80801", 403),
        ("http://127.0.0.1:8080@evil.example", 403),
        ("http://[", 403),
        ("null", 403),
        ("", 403),
        ("http://127.0.0.1:8080/", 403),
        ("http://127.0.0.1:8080.evil.example", 403),
        ("http://chat.lan", 403),
        ("https://chat.lan:444", 403),
        ("https://chat.lan", 200),
    ],
)
async def test_web_pages_of_other_origins_reach_nothing(tmp_path: Path, origin: str, status: int) -> None:
    settings = Settings(server=Server(allowed_origins=["https://chat.lan"]))
    async with open_world(tmp_path, settings) as world:
        for path in ("/health/live", "/v1/models"):
            assert (await world("GET", path, headers={"origin": origin})).status_code == status
        reply = await world("POST", SECRETS, {"name": "ss", "value": "x"}, headers={"origin": origin})
        assert reply.status_code == (201 if status == 200 else 403)
        assert len(await world.store.all("secrets")) == (1 if status == 200 else 0)


async def test_no_reply_lets_other_origins_read_it(world: World) -> None:
    reply = await world("GET", "/health/live")
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", None, "multipart/form-data"]
)
async def test_a_body_that_a_web_page_could_send_without_asking_is_refused(
    world: World, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    body = b'{"name": "ss", "value": "x"}'
    reply = await world("POST", SECRETS, content=body, headers=headers)
    assert (reply.status_code, "application/json" in reply.json()["detail"]) == (415, True)
    assert await world.store.all("secrets") == []


async def test_json_with_a_charset_is_json(world: World) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    reply = await world("POST", SECRETS, content=b'{"name": "ss", "value": "x"}', headers=headers)
    assert reply.status_code == 201


@pytest.mark.fault(40)
async def test_a_body_over_the_limit_is_413_declared_or_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_LIMIT_BYTES", 1000)
    body = b'{"name": "ss", "value": "' + b"x" * 1000 + b'"}'
    headers = {"content-type": "application/json"}
    assert (await world("POST", SECRETS, content=body, headers=headers)).status_code == 413

    async def endless() -> Any:
        while True:
            yield b"x" * 400

    assert (await world("POST", SECRETS, content=endless(), headers=headers)).status_code == 413
    assert await world.store.all("secrets") == []


async def test_a_method_that_is_not_there_is_405(world: World) -> None:
    reply = await world("PATCH", f"{MODELS}/providers", {})
    assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


async def test_a_path_with_a_slash_at_the_end_is_not_redirected(world: World) -> None:
    assert (await world("GET", f"{MODELS}/providers/")).status_code == 404


async def test_a_bug_is_500_without_its_inside_and_the_log_has_the_traceback(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def bug() -> Any:
        raise ZeroDivisionError("inside")

    world.host.summary = bug  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        reply = await world("GET", "/status")
    assert (reply.status_code, reply.json()) == (500, {"detail": "An unexpected error occurred."})
    assert "ZeroDivisionError: inside" in caplog.text


@pytest.mark.parametrize("cls", all_errors().values(), ids=lambda cls: cls.__name__)
async def test_every_error_becomes_a_reply_from_which_a_client_makes_the_same_error(
    world: World, cls: type[NimhostError]
) -> None:
    def fail() -> Any:
        raise cls("What happened.", "What to do.")

    world.host.summary = fail  # type: ignore[method-assign]
    reply = await world("GET", "/status")
    assert (reply.status_code, reply.json()) == (status_of(cls), {"detail": "What happened.", "hint": "What to do."})
    assert reply.headers.get("x-should-retry") == ("false" if cls.final else None)
    again = from_reply(reply.status_code, reply.headers[ERROR_HEADER], reply.json()["detail"], reply.json()["hint"])
    assert (type(again), again.message, again.hint) == (cls, "What happened.", "What to do.")


@pytest.mark.parametrize("head", [{b"host": b""}, {}])
def test_a_guard_without_a_bound_name_lets_no_empty_host_in(head: dict[bytes, bytes]) -> None:
    with pytest.raises(Forbidden):
        Guard("", (), ()).check(head, "GET", False)


async def test_a_reply_that_breaks_off_is_logged_once_and_left_without_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def lines() -> AsyncIterator[bytes]:
        yield b"one"
        raise DockerUnavailable("Docker went away.")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(lines())(scope, receive, send)

    async with open_door(before=lambda gateway: http.answering_errors(app)) as door:
        reply = await door.ask("GET", "/")
    assert (reply.status, reply.chunks, reply.whole) == (200, [b"one"], False)
    assert [record.getMessage() for record in caplog.records] == ["GET /: DockerUnavailable: Docker went away."]


async def test_who_goes_silent_in_a_body_is_told_so_before_the_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name in ((http, "QUIET_LIMIT_S"), (front, "BODY_QUIET_S"), (front, "LINGER_S")):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await http.read_json(Request(scope, receive))

    async with open_door(before=lambda gateway: http.answering_errors(app)) as door:
        reply = await door.ask("POST", "/", b"{", ["Content-Length: 5"])
    assert (reply.status, "Nothing more of the body came" in reply.json()["detail"]) == (408, True)

"""Who may ask for what: tokens and scopes, pages of other origins, and where no token is needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nimhost.api.access import (
    ANONYMOUS,
    ASKER,
    Guard,
    TokenTable,
    check_origin,
    check_right,
    find_asker,
    is_loopback,
    needed_right,
    pick,
    presented_keys,
    read_head,
    settings_for_asker,
)
from nimhost.config import Server, Settings
from nimhost.errors import BadRequest, ConfigError, Forbidden, Unauthorized
from nimhost.tokens import SCOPES, Scope, hash_entry, parse_entries, remember, spell
from tests.api.conftest import FILESETS, MODELS, SECRETS, World, open_world
from tests.support import eventually

TOKENS = "/apis/nimhost/v1/tokens"
SECRET_VALUE = f"{SECRETS}/ss/access"
TEXT = {scope: spell(scope.encode().ljust(32)) for scope in SCOPES}
ENTRIES = [hash_entry(f"{scope}-token:{scope}:{text}") for scope, text in TEXT.items()]
ASK = ("POST", "/v1/chat/completions")


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@asynccontextmanager
async def open_exposed(directory: Path, **server: Any) -> AsyncIterator[World]:
    """Listens for other machines; one token of each scope."""
    async with open_world(directory, Settings(server=Server(host="0.0.0.0", api_tokens=ENTRIES, **server))) as world:
        yield world


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.5.5.5", True), ("::1", True), ("localhost", True), ("LOCALHOST", True),
        ("0.0.0.0", False), ("::", False), ("", False), ("192.168.1.5", False), ("box.lan", False),
        ("localhost.evil.example", False), ("127.evil.example", False),
    ],
)  # fmt: skip
def test_only_addresses_of_this_machine_alone_are_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("method", "path", "to_gateway", "right"),
    [
        ("GET", "/v1/models", True, "inference"),
        ("POST", "/v1/chat/completions", True, "inference"),
        ("GET", "/status", False, "read"),
        ("HEAD", "/status", False, "read"),
        ("GET", f"{MODELS}/providers", False, "read"),
        ("GET", TOKENS, False, "read"),
        ("GET", SECRETS, False, "read"),
        ("GET", SECRET_VALUE, False, "change"),
        ("HEAD", SECRET_VALUE, False, "change"),
        ("GET", "/apis/files/v2/workspaces/default/filesets/ff/-/access", False, "read"),
        ("POST", f"{MODELS}/providers", False, "change"),
        ("PUT", f"{MODELS}/providers/pp", False, "change"),
        ("DELETE", f"{TOKENS}/tt", False, "change"),
        ("OPTIONS", "/status", False, "change"),
        ("PROPFIND", "/status", False, "change"),
    ],
)
def test_what_a_request_takes(method: str, path: str, to_gateway: bool, right: str) -> None:
    assert needed_right(method, path, to_gateway) == right


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ({}, []),
        ({b"authorization": b"Bearer abc"}, [b"abc"]),
        ({b"authorization": b"bearer  abc "}, [b"abc"]),
        ({b"authorization": b"Basic abc"}, []),
        ({b"authorization": b"Bearer"}, []),
        ({b"authorization": b"Bearer "}, []),
        ({b"x-api-key": b"abc"}, [b"abc"]),
        ({b"authorization": b"Bearer abc", b"x-api-key": b"def"}, [b"abc", b"def"]),
    ],
)
def test_where_a_key_can_be(head: dict[bytes, bytes], keys: list[bytes]) -> None:
    assert presented_keys(head) == keys


@pytest.mark.parametrize(
    ("head", "path", "loopback", "who"),
    [
        ({}, "/status", True, "anonymous"),
        ({}, "/status", False, "refused"),
        ({}, "/health/live", False, "anonymous"),
        ({}, "/apis/auth/discovery", False, "anonymous"),
        ({}, "/apis/auth/discovery2", False, "refused"),
        ({}, "/healthx", False, "refused"),
        ({b"authorization": b"Bearer not-needed"}, "/v1/models", True, "anonymous"),
        ({b"authorization": b"Bearer not-needed"}, "/v1/models", False, "refused"),
        ({b"authorization": b"Bearer nimhost_wrong"}, "/v1/models", True, "refused"),
        ({b"authorization": b"Bearer nimhost_wrong"}, "/v1/models", False, "refused"),
        ({b"x-api-key": b"nimhost_wrong"}, "/v1/messages", True, "refused"),
        ({b"authorization": f"Bearer {TEXT['read']}".encode()}, "/status", True, "read-token"),
        ({b"authorization": f"Bearer {TEXT['read']}".encode()}, "/status", False, "read-token"),
        ({b"x-api-key": TEXT["inference"].encode()}, "/v1/messages", False, "inference-token"),
        ({b"authorization": b"Bearer sk-other", b"x-api-key": TEXT["inference"].encode()}, "/v1/messages", False,
         "inference-token"),
        ({b"authorization": TEXT["read"].encode()}, "/status", False, "refused"),
    ],
)  # fmt: skip
def test_who_asks(head: dict[bytes, bytes], path: str, loopback: bool, who: str) -> None:
    table = TokenTable(parse_entries(ENTRIES))
    try:
        asker = find_asker(head, path, table, loopback=loopback)
        found = asker.token.name if asker.token else "anonymous"
    except Unauthorized:
        found = "refused"
    assert found == who


@pytest.mark.parametrize(
    ("site", "dest", "method", "to_gateway", "admitted"),
    [
        (None, None, "POST", True, True),
        (b"same-origin", b"empty", "GET", True, True),
        (b"none", b"document", "GET", True, True),
        (b"cross-site", b"image", "GET", False, False),
        (b"cross-site", b"document", "GET", False, True),
        (b"cross-site", b"document", "POST", False, False),
        (b"cross-site", b"document", "GET", True, False),
        (b"same-site", b"iframe", "GET", False, False),
    ],
)
def test_what_browsers_say_of_requests_without_an_origin(
    site: bytes | None, dest: bytes | None, method: str, to_gateway: bool, admitted: bool
) -> None:
    said = {b"host": b"127.0.0.1:8080", b"sec-fetch-site": site, b"sec-fetch-dest": dest}
    head = {name: value for name, value in said.items() if value is not None}
    guard = Guard("127.0.0.1", (), ())
    if admitted:
        assert guard.check(head, method, to_gateway) is None
    else:
        with pytest.raises(Forbidden, match="other sites"):
            guard.check(head, method, to_gateway)


@pytest.mark.parametrize("origin", ["*", "null", "chat.example", "https://", "https://a/b", "https://u@a", ""])
def test_what_is_no_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        check_origin(origin)


@pytest.mark.parametrize("name", [b"host", b"origin", b"authorization"])
def test_a_header_that_is_there_twice_is_refused(name: bytes) -> None:
    assert read_head(pick([(name, b"a"), (b"accept", b"a"), (b"accept", b"b")])) == {name: b"a"}
    with pytest.raises(BadRequest, match=name.decode()):
        read_head(pick([(name, b"a"), (name, b"a")]))


def test_nobody_but_an_administrator_may_let_code_into_engines() -> None:
    allowed = Settings()
    for scope in SCOPES:
        asker = find_asker(
            {b"x-api-key": TEXT[scope].encode()}, "/x", TokenTable(parse_entries(ENTRIES)), loopback=True
        )
        before = ASKER.set(asker)
        models = settings_for_asker(allowed).models
        ASKER.reset(before)
        assert models.tool_call_plugin.enabled is (scope == "admin")
        assert (models.trust_remote_code == allowed.models.trust_remote_code) is (scope != "admin")
    assert settings_for_asker(allowed) is allowed
    with pytest.raises(Forbidden, match="'admin'"):
        check_right(ANONYMOUS, "administrate")


# --- tokens as they are kept ---------------------------------------------------------------------------------------


def test_a_token_is_remembered_by_its_hash_only() -> None:
    text = spell(bytes(range(32)))
    token = remember("tt", ("read", "inference"), text, "now")
    assert (len(text), token.prefix, token.scopes) == (51, text[:12], ("inference", "read"))
    assert text[12:] not in repr(token)
    assert TokenTable([token]).find(text.encode()) is token
    assert TokenTable([token]).find(text[:-1].encode()) is None


@pytest.mark.parametrize(
    "entry",
    [
        "", "tt", "tt:admin", "tt:admin:", "tt:root:sha256:" + "0" * 64, "tt:admin,:sha256:" + "0" * 64,
        "tt:admin:sha256:" + "0" * 63, "tt:admin:sha256:" + "G" * 64, ":admin:sha256:" + "0" * 64,
        f"tt:admin:{TEXT['admin']}", "tt:admin:nimhost_short", f"tt:root:{TEXT['admin']}", TEXT["admin"],
    ],
)  # fmt: skip
def test_an_entry_that_is_no_token_is_refused_without_repeating_it(entry: str) -> None:
    with pytest.raises(ConfigError, match="entry 1") as caught:
        parse_entries([entry])
    assert TEXT["admin"] not in f"{caught.value.message}{caught.value.hint}"


def test_a_name_is_there_once() -> None:
    with pytest.raises(ConfigError, match="entry 2 has a name that is there twice: 'read-token'"):
        parse_entries([ENTRIES[1], ENTRIES[1]])


def test_the_environment_may_spell_a_token_and_the_settings_have_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    from nimhost.config import load

    monkeypatch.chdir("/")
    plain = f'["laptop:inference,read:{TEXT["read"]}", "{ENTRIES[0]}", "bad:read:nimhost_x"]'
    settings = load(env={"NIMHOST_SERVER__API_TOKENS": plain})
    assert TEXT["read"] not in repr(settings)
    laptop = parse_entries(settings.server.api_tokens[:2])[0]
    assert (laptop.name, laptop.scopes) == ("laptop", ("inference", "read"))
    assert TokenTable([laptop]).find(TEXT["read"].encode()) == laptop


# --- over the wire -------------------------------------------------------------------------------------------------


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("scope", "method", "path", "status"),
    [
        ("inference", *ASK, 200), ("inference", "GET", "/status", 403), ("inference", "GET", SECRET_VALUE, 403),
        ("inference", "POST", SECRETS, 403),
        ("read", *ASK, 403), ("read", "GET", "/v1/models", 403), ("read", "GET", "/status", 200),
        ("read", "GET", SECRET_VALUE, 403), ("read", "POST", SECRETS, 403), ("read", "DELETE", f"{SECRETS}/ss", 403),
        ("read", "GET", TOKENS, 200), ("read", "POST", TOKENS, 403),
        ("admin", *ASK, 200), ("admin", "GET", "/status", 200), ("admin", "GET", SECRET_VALUE, 200),
        ("admin", "DELETE", f"{SECRETS}/ss", 204),
        (None, *ASK, 401), (None, "GET", "/status", 401), (None, "GET", "/", 401), (None, "GET", "/openapi.json", 401),
        (None, "GET", "/health/live", 200), (None, "GET", "/health/ready", 200),
        (None, "GET", "/apis/auth/discovery", 200), (None, "POST", TOKENS, 401), (None, "GET", "/nothing", 401),
    ],
)  # fmt: skip
async def test_a_scope_opens_what_it_is_for_and_nothing_else(
    tmp_path: Path, scope: Scope | None, method: str, path: str, status: int
) -> None:
    async with open_exposed(tmp_path) as world:
        await world("POST", SECRETS, {"name": "ss", "value": "the value"}, headers=bearer(TEXT["admin"]))
        headers = bearer(TEXT[scope]) if scope else {}
        reply = await world(method, path, headers=headers)
        assert reply.status_code == status, reply.text
        assert (reply.headers.get("www-authenticate") == "Bearer") is (status == 401)
        assert "the value" not in reply.text or (scope, path) == ("admin", SECRET_VALUE)


async def test_a_refusal_on_the_gateways_paths_has_the_form_that_its_clients_read(tmp_path: Path) -> None:
    async with open_exposed(tmp_path) as world:
        reply = await world(*ASK, {})
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "unauthorized"
        assert "An API token is needed here. Send it as" in reply.json()["error"]["message"]
        reply = await world(*ASK, {}, headers=bearer(TEXT["read"]))
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
        reply = await world("GET", "/status", headers=bearer(TEXT["inference"]))
        assert "it takes the scope 'read', and that one has inference" in reply.json()["detail"]
        assert reply.json()["hint"].endswith("nimhost tokens create NAME --scope read")


async def test_a_wrong_token_is_noticed_on_loopback_too_and_any_other_key_is_not(world: World) -> None:
    assert (await world(*ASK, {}, headers=bearer("not-needed"))).status_code == 200
    assert (await world(*ASK, {}, headers={"x-api-key": "sk-ant-whatever"})).status_code == 200
    assert (await world(*ASK, {}, headers=bearer("nimhost_wrong"))).status_code == 401
    assert (await world(*ASK, {}, headers={"x-api-key": "nimhost_wrong"})).status_code == 401


async def test_a_token_is_shown_once_works_and_is_revoked_at_once(tmp_path: Path) -> None:
    async with open_exposed(tmp_path) as world:
        admin = bearer(TEXT["admin"])
        made = await world("POST", TOKENS, {"name": "laptop", "scopes": ["inference"]}, headers=admin)
        assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
        text = made.json()["token"]
        assert text.startswith("nimhost_")
        assert (await world(*ASK, {}, headers=bearer(text))).status_code == 200

        rows = (await world("GET", TOKENS, headers=admin)).json()["data"]
        assert {row["name"]: row["source"] for row in rows} == {
            "laptop": "database", "inference-token": "settings", "read-token": "settings", "admin-token": "settings",
        }  # fmt: skip
        assert rows[0]["prefix"] == text[:12]
        assert text not in (await world("GET", TOKENS, headers=admin)).text
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or text.encode() not in file.read_bytes()

        assert (await world("DELETE", f"{TOKENS}/laptop", headers=admin)).status_code == 204
        assert (await world(*ASK, {}, headers=bearer(text))).status_code == 401
        assert (await world("DELETE", f"{TOKENS}/laptop", headers=admin)).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "tt", "scopes": []}, 422),
        ({"name": "tt"}, 422),
        ({"name": "tt", "scopes": ["root"]}, 422),
        ({"name": "t/t", "scopes": ["read"]}, 422),
        ({"name": "tt", "scopes": ["read"], "token": "mine"}, 422),
        ({"name": "read-token", "scopes": ["read"]}, 409),
        ({"name": "there", "scopes": ["read"]}, 409),
    ],
)
async def test_what_cannot_become_a_token(tmp_path: Path, body: dict[str, Any], status: int) -> None:
    async with open_exposed(tmp_path) as world:
        admin = bearer(TEXT["admin"])
        await world("POST", TOKENS, {"name": "there", "scopes": ["read"]}, headers=admin)
        assert (await world("POST", TOKENS, body, headers=admin)).status_code == status
        assert len((await world("GET", TOKENS, headers=admin)).json()["data"]) == 4


async def test_a_token_of_the_settings_is_revoked_there(tmp_path: Path) -> None:
    async with open_exposed(tmp_path) as world:
        reply = await world("DELETE", f"{TOKENS}/read-token", headers=bearer(TEXT["admin"]))
        assert (reply.status_code, "server.api_tokens" in reply.json()["hint"]) == (409, True)


async def test_nobody_on_loopback_makes_himself_an_administrator(world: World) -> None:
    assert (await world("POST", TOKENS, {"name": "mine", "scopes": ["inference", "read"]})).status_code == 201
    reply = await world("POST", TOKENS, {"name": "root", "scopes": ["admin"]})
    assert (reply.status_code, "nimhost tokens create NAME --scope admin" in reply.json()["hint"]) == (403, True)
    assert len((await world("GET", TOKENS)).json()["data"]) == 1


async def test_only_an_administrator_trusts_the_code_of_files_from_anywhere(tmp_path: Path) -> None:
    async with open_world(tmp_path, Settings(server=Server(api_tokens=ENTRIES))) as world:
        await world.make(FILESETS, name="ff")
        body = {"name": "mm", "fileset": "default/ff", "trust_remote_code": True}
        for headers, status in (({}, 403), (bearer(TEXT["admin"]), 201)):
            reply = await world("POST", f"{MODELS}/models", body, headers=headers)
            assert reply.status_code == status, reply.text


async def test_only_an_administrator_sets_a_tool_call_plugin(tmp_path: Path) -> None:
    tools = {"tool_call_parser": "pp", "tool_call_plugin": "default/pp"}
    body = {"engine": "nim", "model_spec": {"tool_call_config": tools}, "executor_config": {"gpu": 0}}
    async with open_world(tmp_path, Settings(server=Server(api_tokens=ENTRIES))) as world:
        await world.make(FILESETS, name="pp")
        for headers, status in (({}, 403), (bearer(TEXT["admin"]), 201)):
            reply = await world("POST", f"{MODELS}/deployment-configs", {"name": "cc", **body}, headers=headers)
            assert reply.status_code == status, reply.text


async def test_a_reply_under_way_ends_with_its_token_and_others_go_on(tmp_path: Path) -> None:
    async with open_exposed(tmp_path) as world:
        admin = bearer(TEXT["admin"])
        await world(
            "POST",
            f"{MODELS}/deployment-configs",
            {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}},
            headers=admin,
        )
        await world("POST", f"{MODELS}/deployments", {"name": "dd", "config": "cc"}, headers=admin)
        texts = [
            (await world("POST", TOKENS, {"name": name, "scopes": ["read"]}, headers=admin)).json()["token"]
            for name in ("first", "other")
        ]
        path = f"{MODELS}/deployments/dd/logs?follow=true"
        following = [asyncio.create_task(world("GET", path, headers=bearer(text))) for text in texts]
        await eventually(lambda: len(world.host.asked) == 2)
        assert (await world("DELETE", f"{TOKENS}/first", headers=admin)).status_code == 204
        refused = await asyncio.wait_for(following[0], 5)
        assert (refused.status_code, "revoked" in refused.text) == (401, True)
        assert not following[1].done()
        following[1].cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def test_tokens_outlive_the_daemon(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        made = (await world("POST", TOKENS, {"name": "laptop", "scopes": ["read"]})).json()
    async with open_world(tmp_path, Settings(server=Server(host="0.0.0.0"))) as world:
        assert (await world("GET", "/status", headers=bearer(made["token"]))).status_code == 200


async def test_no_token_and_no_key_reaches_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with open_exposed(tmp_path) as world:
            for key in ("nimhost_canary-1", "sk-canary-2", TEXT["inference"]):
                await world("GET", "/status", headers=bearer(key))
                await world("GET", "/status", headers={"x-api-key": key})
    assert "refused GET '/status'" in caplog.text
    assert not [key for key in ("canary-1", "canary-2", TEXT["inference"]) if key in caplog.text]


# --- pages of allowed origins --------------------------------------------------------------------------------------

CHAT = {"origin": "https://chat.lan"}
ASKING = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


async def test_a_page_of_an_allowed_origin_asks_first_and_reads_the_reply(tmp_path: Path) -> None:
    async with open_exposed(tmp_path, allowed_origins=["https://chat.lan"]) as world:
        reply = await world("OPTIONS", "/v1/chat/completions", headers={**CHAT, **ASKING})
        assert (reply.status_code, reply.content) == (204, b"")
        assert reply.headers["access-control-allow-origin"] == "https://chat.lan"
        assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in reply.headers
        for headers, status in (({}, 401), (bearer(TEXT["inference"]), 200)):
            reply = await world(*ASK, {}, headers={**CHAT, **headers})
            assert (reply.status_code, reply.headers["vary"]) == (status, "origin")
            assert reply.headers["access-control-allow-origin"] == "https://chat.lan"


@pytest.mark.fault(35)
async def test_a_page_of_another_origin_may_not_even_ask(tmp_path: Path) -> None:
    async with open_exposed(tmp_path, allowed_origins=["https://chat.lan"]) as world:
        reply = await world("OPTIONS", "/v1/chat/completions", headers={"origin": "https://evil.example", **ASKING})
        assert reply.status_code == 403
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert "server.allowed_origins" in reply.text

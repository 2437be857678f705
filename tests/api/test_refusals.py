"""Whoever may not ask is told so in the form that the clients of that path know."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from nimhost.api.access import TokenTable
from nimhost.api.app import entry
from nimhost.config import Settings
from nimhost.gateway.proxy import Gateway
from nimhost.tokens import hash_entry, parse_entries, spell

READER = spell(b"reader".ljust(32))
BY_GATEWAY = "/apis/inference-gateway/v2/workspaces/default/openai/-"
CALLS = [
    ({}, 401, "authentication_error", "unauthorized"),
    ({"x-api-key": READER}, 403, "permission_error", "forbidden"),
    ({"authorization": f"Bearer {READER}"}, 403, "permission_error", "forbidden"),
    ({"authorization": "Bearer nimhost_misspelt"}, 401, "authentication_error", "unauthorized"),
    ({"host": "evil.example"}, 403, "permission_error", "forbidden"),
    ({"origin": "https://evil.example"}, 403, "permission_error", "forbidden"),
]


async def refusal(path: str, headers: dict[str, str], gateway: Gateway | None = None) -> tuple[int, dict[str, Any]]:
    settings = Settings()
    gateway = gateway or Gateway(settings.gateway)
    tokens = TokenTable(parse_entries([hash_entry(f"reader:read:{READER}")]))

    async def control(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it is not for the control plane")

    app: Any = entry(control, gateway, settings, tokens, loopback=False, on_refused=gateway.traffic.end)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        reply = await client.post(path, json={"model": "default/m"}, headers=headers)
    await gateway.close()
    return reply.status_code, reply.json()


@pytest.mark.parametrize(("headers", "status", "type_", "_code"), CALLS)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", f"{BY_GATEWAY}/v1/messages"])
async def test_in_anthropics_form_for_messages(
    path: str, headers: dict[str, str], status: int, type_: str, _code: str
) -> None:
    found_status, body = await refusal(path, headers)
    assert (found_status, body["type"], body["error"]["type"]) == (status, "error", type_)
    assert body["error"]["message"]
    assert ("detail" in body) == path.startswith("/apis/")


@pytest.mark.parametrize(("headers", "status", "_type", "code"), CALLS)
async def test_in_openais_form_for_the_rest(headers: dict[str, str], status: int, _type: str, code: str) -> None:
    found_status, body = await refusal("/v1/chat/completions", headers)
    assert (found_status, body["error"]["code"]) == (status, code)
    assert "type" not in body


@pytest.mark.parametrize(("headers", "status", "_type", "code"), CALLS)
async def test_is_in_the_log_of_requests_without_what_it_presented(
    headers: dict[str, str], status: int, _type: str, code: str
) -> None:
    gateway = Gateway(Settings().gateway)
    await refusal("/v1/chat/completions", headers, gateway)
    (one,) = gateway.traffic.log.after(0)
    assert (one["status"], one["error"], one["path"]) == (status, code, "/v1/chat/completions")
    assert gateway.traffic.metrics.other.requests == {status: 1}
    assert "nimhost_" not in str(one)

"""The recorded exchanges of the reference platform, replayed in order against a whole daemon."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from tests.contract.described import complaints
from tests.contract.reference import Exchange, ReferenceWorld
from tests.contract.shapes import body_shape, differences
from tests.support import eventually

SETTLED_S = 3.0
"""How long what follows from a write may take to show in what is read."""
PATIENCE_S = 30.0
"""The same for all exchanges together: when very many differ, that is soon said."""


class Meant(NamedTuple):
    """A difference that is wanted: the line that says it, the exchanges that have it (`*`: at least one), and why."""

    line: str
    of: str
    why: str


MEANT = (
    # bodies have more
    Meant("+ $.hint", "*", "an error says what can be done about it, beside its detail"),
    Meant("+ $.error", "*", "errors of the gateway are OpenAI's as well, for OpenAI's clients"),
    Meant("+ $.desired", "*", "a deployment can be stopped"),
    Meant("+ $.data[].desired", "169 170", "a deployment can be stopped"),
    Meant("+ $.progress", "*", "a deployment shows how far its image and weights are"),
    Meant("+ $.update", "*", "a deployment shows whether a change of its version is under way, or has failed"),
    Meant("+ $.serving", "*", "and which version has its traffic"),
    Meant("+ $.data[].serving", "169 170", "and which version has its traffic"),
    Meant("+ $.data[].serving", "169 170", "and which version has its traffic"),
    Meant("+ $.force", "*", "a deployment can be started though it does not seem to fit"),
    Meant("+ $.data[].force", "169 170", "a deployment can be started though it does not seem to fit"),
    Meant("+ $.executor_config.gpu_memory_gib", "*", "a deployment can share a GPU"),
    Meant("+ $.served_name", "*", "an adapter shows what engines call it"),
    Meant("+ $.loaded_on", "*", "an adapter shows where it is loaded"),
    Meant("+ $.status_message", "203", "an adapter shows why it is not loaded"),
    Meant("+ $.spec_status", "*", "a model shows whether its spec is known yet"),
    Meant("+ $.spec_message", "*", "a model shows why its spec is not known"),
    Meant("$.status_history[]: items", "148 152 153 207 209", "the history ends with the current status, CREATED too"),
    Meant("$.model_provider_id: text, not null", "*", "the provider is made together with the deployment"),
    Meant("+ $.data[].model_provider_id", "169 170", "the provider is made together with the deployment"),
    # bodies have less
    Meant("- $.detail[].ctx", "*", "`ctx` of a problem is optional; `msg` says it all"),
    Meant("- $.data[].created_by", "036", "there are no users who could have made it"),
    Meant("- $.data[].updated_by", "036", "there are no users who could have made it"),
    Meant("- $.metadata.model.tool_calling.tool_call_plugin", "114", "metadata is shown as it was sent"),
    # the gateway passes on what it gets
    Meant("- $.detail", "059 061 062 084 216", "an upstream's error comes through as it is, not as a text in a text"),
    Meant("+ $.error", "059 061 062 084 216", "an upstream's error comes through as it is, not as a text in a text"),
    Meant("404, not 502", "057 063", "an upstream's 404 comes through as it is"),
    # what the reference does wrong
    Meant("400, not 500", "053", "a model that is no text is the client's mistake"),
    Meant("400, not 200", "065", "a body that is no JSON is not ignored"),
    Meant("404, not 500", "093", "an unknown workspace is the client's mistake"),
    Meant("422, not 500", "098", "there is no page 0: the client's mistake"),
    Meant("422, not 201", "077", "`not a url` is no URL"),
    Meant("422, not 201", "091", "unknown fields are refused, with the nearest known name"),
    Meant("200, not 404", "163", "what a deployment serves is a model, as the documentation of the reference says"),
    Meant("$.served_models[]: items", "211", "what a deployment serves is a model, whatever its engine"),
    Meant("409, not 204", "184 188", "a secret or model that something needs is not deleted"),
    Meant("200, not 502", "111 112", "a fileset can be made while the hub is away; its deployment says so"),
)

REPAIRS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "077": (("POST", "providers", '{"name": "p-badurl", "host_url": "http://127.0.0.1:9"}'),),
    "091": (("POST", "providers", '{"name": "p-extra", "host_url": "http://127.0.0.1:9"}'),),
    "111": (("DELETE", "filesets/qwen-2-5-1-5b", ""),),
    "112": (("DELETE", "filesets/qwen3-1-7b", ""),),
}
"""What is done after an exchange that is meant to differ, so that what follows finds what the recorded ones did."""


def meant(id: str, line: str) -> list[Meant]:
    return [m for m in MEANT if m.line == line and (m.of == "*" or id in m.of.split())]


async def test_replies_are_those_of_the_reference_but_for_what_is_meant(tmp_path: Path) -> None:
    found: dict[str, list[str]] = {}
    deadline = time.monotonic() + PATIENCE_S
    async with ReferenceWorld(tmp_path) as world:
        for id, exchange in world.exchanges():
            if exchange.of == "178_dep-wait-deleted":
                world.may_stop.set()
            found[id] = await replay(world.http, id, exchange, deadline)
            for method, path, body in REPAIRS.get(id, ()):
                service = "files" if path.startswith("filesets") else "models"
                reply = await send(world.http, method, f"/apis/{service}/v2/workspaces/default/{path}", body.encode())
                assert reply.is_success, reply.text
    same = [id for id, lines in found.items() if not lines]
    more = [id for id, lines in found.items() if lines and all(line.startswith("+ ") for line in lines)]
    print(
        f"\nof {len(found)} recorded exchanges {len(same)} get the same reply, {len(more)} the same with more fields,"
        f" and {len(found) - len(same) - len(more)} another one, as is meant"
    )
    new = {id: [line for line in lines if not meant(id, line)] for id, lines in found.items()}
    assert {id: lines for id, lines in new.items() if lines} == {}
    seen = {(line, id) for id, lines in found.items() for line in lines}
    gone = [
        (m.line, id)
        for m in MEANT
        for id in m.of.split()
        if ((m.line, id) not in seen if id != "*" else m.line not in {line for line, _ in seen})
    ]
    assert gone == []


async def test_replies_to_the_recorded_requests_are_as_openapi_says(tmp_path: Path) -> None:
    found: dict[str, list[str]] = {}
    deadline = time.monotonic() + PATIENCE_S
    async with ReferenceWorld(tmp_path) as world:
        world.may_stop.set()
        for id, exchange in world.exchanges():
            await replay(world.http, id, exchange, deadline)
            reply = await ask(world.http, exchange)
            if "gateway/v2" not in exchange.path or "virtual-models" in exchange.path:
                kind = reply.headers.get("content-type", "")
                found[id] = complaints(exchange.method, exchange.path, reply.status_code, kind, reply.content)
    assert {id: lines for id, lines in found.items() if lines} == {}


async def replay(http: httpx.AsyncClient, id: str, exchange: Exchange, deadline: float) -> list[str]:
    """How the reply differs. What is only read may take a moment to show what was written before."""
    lines = judge(exchange, await ask(http, exchange))

    async def as_meant() -> bool:
        nonlocal lines
        reply = await ask(http, exchange)
        lines = judge(exchange, reply)
        whole = {m.line for m in MEANT if id in m.of.split()} <= set(lines)
        return whole and all(meant(id, line) for line in lines) and (not exchange.waits or arrived(exchange, reply))

    if exchange.reads:
        with suppress(AssertionError):
            await eventually(as_meant, max(0.0, min(SETTLED_S, deadline - time.monotonic())))
    return lines


async def ask(http: httpx.AsyncClient, exchange: Exchange) -> httpx.Response:
    return await send(http, exchange.method, exchange.path, exchange.body)


async def send(http: httpx.AsyncClient, method: str, path: str, body: bytes) -> httpx.Response:
    kind = "application/octet-stream" if "/filesets/" in path and "/-/" in path else "application/json"
    return await http.request(method, path, content=body, headers={"content-type": kind} if body else {})


class State(msgspec.Struct):
    status: str | None = None


def arrived(exchange: Exchange, reply: httpx.Response) -> bool:
    """The last answer to a poll says the same state as the recorded one."""
    wanted = msgspec.json.decode(exchange.reply or b"{}", type=State)
    return wanted == msgspec.json.decode(reply.content or b"{}", type=State)


def judge(exchange: Exchange, reply: httpx.Response) -> list[str]:
    if reply.status_code != exchange.status:
        return [f"{reply.status_code}, not {exchange.status}"]
    kind = reply.headers.get("content-type", "").partition(";")[0]
    same = kind == exchange.type or not reply.content
    lines = [] if same else [f"{kind or 'no type'}, not {exchange.type or 'no type'}"]
    return lines + differences(body_shape(exchange.type, exchange.reply), body_shape(kind, reply.content))

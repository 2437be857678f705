"""Whatever is sent, the answer is a clear refusal: never a 5xx, never half of it accepted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from nimhost.api.http import BODY_LIMIT_BYTES
from nimhost.kinds import KINDS
from tests.api.conftest import MODELS, World

CREATE = f"{MODELS}/models"
DEEP = 100_000

ODD_BODIES = {
    "nothing": b"",
    "not JSON": b"{'name': 'x1'}",
    "cut off": b'{"name": "x1"',
    "two of them": b'{"name": "x1"} {"name": "x2"}',
    "a list": b"[]",
    "a text": b'"x1"',
    "null": b"null",
    "NaN": b'{"name": "x1", "custom_fields": {"n": NaN}}',
    "not UTF-8": b'{"name": "x1", "description": "\xff\xfe"}',
    "half a surrogate pair": b'{"name": "x1", "description": "\\ud800"}',
    "UTF-16": '{"name": "x1"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"name": "x1"}',
    "a NUL byte": b'{"name": "x1"}\x00',
    "a NUL in a name": b'{"name": "x1\\u0000"}',
    "a newline in a name": b'{"name": "x1\\n"}',
    "a key twice": b'{"name": "x1", "name": "x2"}',
    "a key twice, inside": b'{"name": "x1", "custom_fields": {"a": [{"b": 1, "b": 2}]}}',
    "deep lists": b'{"name": "x1", "custom_fields": {"a": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "deep objects": b'{"name": "x1", "custom_fields": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "a huge number": b'{"name": "x1", "spec": ' + b"9" * 100_000 + b"}",
    "a number as name": b'{"name": 1}',
    "a list as name": b'{"name": ["x1"]}',
    "null as name": b'{"name": null}',
    "no name": b"{}",
    "an unknown field": b'{"name": "x1", "nmae": "x2"}',
    "many unknown fields": b'{"name": "x1", %b}' % b", ".join(b'"f%d": 1' % n for n in range(20_000)),
    "an unknown field with a long name": b'{"name": "x1", "%b": 1}' % (b"f" * 200_000),
    "a wrong word": b'{"name": "x1", "finetuning_type": "magic"}',
    "wrong inside": b'{"name": "x1", "spec": {"family": 3}}',
    "text for a flag": b'{"name": "x1", "trust_remote_code": "yes"}',
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES)
async def test_an_odd_body_is_refused_with_the_reason_and_leaves_nothing(world: World, body: bytes) -> None:
    reply = await world.client.post(CREATE, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422, reply.text
    problems = reply.json()["detail"]
    assert all(problem["msg"] and problem["loc"][0] == "body" for problem in problems)
    assert len(reply.content) < 100_000, "what was sent is not sent back whole"
    assert (await world("GET", CREATE)).json()["data"] == []


@pytest.mark.parametrize("number", [2**53, 2**63, 2**64, 10**400, -(10**400)], ids=lambda n: f"{len(str(n))} digits")
async def test_a_number_that_is_too_large_is_refused_where_a_number_means_something(world: World, number: int) -> None:
    config = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": number}}
    for body in (
        {"name": "cfg", **config},
        {"name": "cfg", **config, "executor_config": {"gpu": 0, "run_as_user": number}},
    ):
        reply = await world("POST", f"{MODELS}/deployment-configs", body)
        assert reply.status_code == 422, reply.text


@pytest.mark.parametrize("number", [2**53, 2**64, 10**400], ids=lambda n: f"{len(str(n))} digits")
async def test_a_large_number_in_a_free_place_comes_back_as_it_was_or_is_refused(world: World, number: int) -> None:
    reply = await world("POST", CREATE, {"name": "free", "custom_fields": {"n": number}})
    if reply.status_code == 201:
        assert (await world("GET", f"{CREATE}/free")).json()["custom_fields"] == {"n": number}
    else:
        assert reply.status_code == 422


async def test_a_body_that_is_too_large_is_413_whether_its_length_is_told_or_not(world: World) -> None:
    body = b'{"name": "x1", "description": "' + b"x" * BODY_LIMIT_BYTES + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    headers = {"content-type": "application/json"}
    contents: list[Any] = [body, pieces()]
    for content in contents:
        reply = await world.client.post(CREATE, content=content, headers=headers)
        assert reply.status_code == 413
        assert "larger than" in reply.json()["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", "json"])
async def test_what_is_not_called_json_is_415(world: World, kind: str) -> None:
    reply = await world.client.post(CREATE, content=b'{"name": "x1"}', headers={"content-type": kind})
    assert reply.status_code == 415
    assert "application/json" in reply.json()["detail"]


@pytest.mark.parametrize("part", ["%00", "a%00b", "%ff", "%0a", "%2e%2e", "a%2fb", "%20", "ä", "a" * 5000, "'--"])
async def test_an_odd_name_in_the_path_is_not_found(world: World, part: str) -> None:
    for kind in KINDS.values():
        for method in ("GET", "DELETE"):
            reply = await world.client.request(method, f"{kind.path('default')}/{part}")
            assert 400 <= reply.status_code < 500, reply.text
    reply = await world.client.get(KINDS["models"].path(part))
    assert 400 <= reply.status_code < 500, reply.text


ODD_QUERIES = [
    "page=0", "page=-1", "page=x", "page=", "page=1e3", "page=99999999999999999999999", "page=%00", "page=1&page=x",
    "page_size=0", "page_size=100000", "sort=", "sort=--name", "sort=wish", "sort=name;drop", "filter=", "filter=x",
    "filter={", "filter=[]", "filter={}&filter=x", 'filter={"name":{"$like":[1]}}', 'filter={"nope":1}',
    'filter={"$and":1}', 'filter={"$not":{"$or":[]},"name":1}', 'filter={"name":{"$gt":{"a":1}}}', "filter[]=x",
    "filter[name=x", "filter[name][$nope]=x", "filter[name][a][b]=x", "filter[nope]=x",
    'filter[data.a"b]=x', "filter[data.]=x", "filter[data.a..b]=x", 'filter={"data.a[x":1}',
    "filter[data.a%00b]=x", "filter[name]=%00", "filter[name][$like]=%25_%25", "verbose=maybe",
    "filter=" + "[" * 5000, 'filter={"name":' + "9" * 5000 + "}", 'filter={"$not":' * 3000 + "{}" + "}" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("query", ODD_QUERIES, ids=lambda q: q[:40])
async def test_an_odd_question_is_refused_or_answered_but_never_breaks_anything(world: World, query: str) -> None:
    for kind in KINDS.values():
        reply = await world.client.get(f"{kind.path('default')}?{query}")
        assert reply.status_code < 500, f"{kind.key}: {reply.text}"
        assert reply.status_code in (200, 400, 422), reply.text
        assert len(reply.content) < 100_000

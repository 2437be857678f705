"""Filters in the three syntaxes of the wire, and what models are filtered by that is kept elsewhere."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nimhost.errors import BadRequest
from nimhost.filters import parse_filter
from nimhost.filters.text import text_to_json
from nimhost.kinds import KINDS
from tests.api.conftest import FILESETS, MODELS, SECRETS, World

LIST = f"{MODELS}/models"


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ('name:"x y"', {"name": {"$eq": "x y"}}),
        ("name:x", {"name": {"$eq": "x"}}),
        (r'name:"a \"b\" c"', {"name": {"$eq": 'a "b" c'}}),
        ("project:null", {"project": {"$eq": None}}),
        ("enabled:true", {"enabled": {"$eq": True}}),
        ("data.a.b:-5", {"data.a.b": {"$eq": -5}}),
        ("data.a>=1.5", {"data.a": {"$gte": 1.5}}),
        ('name~"abc"', {"name": {"$like": "abc"}}),
        ('name IN ["a", b,"c"]', {"name": {"$in": ["a", "b", "c"]}}),
        ("name NOT IN [a]", {"name": {"$nin": ["a"]}}),
        ("-name:x", {"$not": {"name": {"$eq": "x"}}}),
        ("a:1 b:2", {"$and": [{"a": {"$eq": 1}}, {"b": {"$eq": 2}}]}),
        ("a:1 AND b:2 OR c:3", {"$or": [{"$and": [{"a": {"$eq": 1}}, {"b": {"$eq": 2}}]}, {"c": {"$eq": 3}}]}),
        ("a:1 (b:2 OR -c:3)", {"$and": [{"a": {"$eq": 1}}, {"$or": [{"b": {"$eq": 2}}, {"$not": {"c": {"$eq": 3}}}]}]}),
        ("ORDER:1 AND ANDY:2", {"$and": [{"ORDER": {"$eq": 1}}, {"ANDY": {"$eq": 2}}]}),
        ('created_at < "2026-01-01"', {"created_at": {"$lt": "2026-01-01"}}),
    ],
)
def test_what_people_write_stands_for_json(text: str, node: dict[str, Any]) -> None:
    assert text_to_json(text) == node


@pytest.mark.parametrize(
    "text",
    ["name", "name:", "name:x OR", "(name:x", "name:x)", "name IN x", "name IN []", "name IN [a", "~x", 'name:"x',
     'name~"ab"', "name NOT x", "-", "(" * 500 + "a:1", "-" * 500 + "a:1", ":" * 99],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        text_to_json(text)


@pytest.mark.parametrize(
    "filter",
    [
        '{"$not":' * 200 + '{"name":"x"}' + "}" * 200,
        '{"name":{"$not":' * 1 + '{"$not":' * 100 + '"x"' + "}" * 101 + "}",
        '{"$or":[' + ",".join(['{"name":"x"}'] * 300) + "]}",
        '{"name":{"$in":[' + ",".join(['"x"'] * 300) + "]}}",
        '{"a":' * 2000 + "1" + "}" * 2000,
        '{"created_at":{"$gte":"yesterday"}}',
        '{"created_at":{"$gte":5}}',
        '{"data.":"x"}',
        '{"data.a\\".b":"x"}',
        '{"data.api_endpoint.api_key":"x"}',
        "nope:1",
    ],
)
async def test_a_filter_that_asks_too_much_is_400(world: World, filter: str) -> None:
    assert (await world("GET", LIST, params={"filter": filter})).status_code == 400


@pytest.mark.parametrize("text", ["name:b " * 9000, f"name IN [{'b,' * 30_000}b]", "name:b OR " * 6000 + "name:b"])
def test_a_filter_that_is_too_long_is_not_read_to_its_end(text: str) -> None:
    begin = time.thread_time()
    with pytest.raises(BadRequest, match="more than 200"):
        parse_filter([("filter", text)], KINDS["models"])
    assert time.thread_time() - begin < 0.02  # requests wait meanwhile


def test_what_the_daemon_keeps_to_itself_cannot_be_asked_for() -> None:
    for kind, field in (("secrets", "data.value"), ("deployments", "data.deleting"), ("deployments", "run")):
        with pytest.raises(BadRequest, match=f"Unknown filter field '{field}'. Valid fields: "):
            parse_filter([("filter", f"{field}:x")], KINDS[kind])


async def names(world: World, filter: str, path: str = LIST) -> list[str]:
    query = filter if filter.startswith("filter[") else f"filter={filter}"
    reply = await world("GET", f"{path}?{query}&sort=name")
    assert reply.status_code == 200, reply.text
    return [item["name"] for item in reply.json()["data"]]


@pytest.fixture
async def models(world: World) -> World:
    """`plain`, `tuned` (of plain, with a prompt), `adapted` (a lora and a dora), `served` (lora on in its config)."""
    await world.make(LIST, name="plain", project="pp", custom_fields={"stars": 5})
    await world.make(LIST, name="tuned", base_model="default/plain", finetuning_type="lora_merged", prompt={})
    await world.make(LIST, name="adapted", base_model="meta/llama")
    await world.make(LIST, name="served")
    await world.make(FILESETS, name="lora")
    await world("PUT", f"{FILESETS}/lora/-/f", content=b"x")
    for kind in ("lora", "dora"):
        body = {"fileset": "lora", "finetuning_type": kind, "enabled": kind == "lora"}
        await world.make(f"{LIST}/adapted/adapters", name=f"a-{kind}", **body)
    await world.make_config(model_entity_id="default/served", model_spec={"lora_enabled": True})
    return world


@pytest.mark.parametrize(
    ("filter", "found"),
    [
        ("filter[base_model]=true", ["adapted", "tuned"]),
        ("filter[base_model]=false", ["plain", "served"]),
        ("filter[base_model]=default/plain", ["tuned"]),
        ("filter[base_model][name]=meta/llama", ["adapted"]),
        ("filter[base_model][name][$like]=LLAMA", ["adapted"]),
        ('{"base_model":{"name":"default/plain"}}', ["tuned"]),
        ("filter[adapters]=true", ["adapted"]),
        ('{"adapters":false}', ["plain", "served", "tuned"]),
        ("filter[adapters][finetuning_type]=dora", ["adapted"]),
        ('{"adapters":{"finetuning_type":"qlora"}}', []),
        ("filter[finetuning_type]=lora_merged", ["tuned"]),
        ("filter[finetuning_type]=true", ["tuned"]),
        ("filter[prompt]=true", ["tuned"]),
        ("filter[lora_enabled]=true", ["served"]),
        ('{"lora_enabled":false}', ["adapted", "plain", "tuned"]),
        ("project:pp", ["plain"]),
        ("project:null AND -base_model:true", ["served"]),
        ('name~"ADAP" OR name IN [plain]', ["adapted", "plain"]),
        ("name NOT IN [plain, served]", ["adapted", "tuned"]),
        ("data.custom_fields.stars > 4", ["plain"]),
        ('data.base_model:"meta/llama"', ["adapted"]),
        ("filter[created_at][gte]=2020-01-01", ["adapted", "plain", "served", "tuned"]),
        ("created_at<2020-01-01T00:00:00Z", []),
    ],
)  # fmt: skip
async def test_models_are_found_by_what_is_true_of_them(models: World, filter: str, found: list[str]) -> None:
    assert await names(models, filter.replace("T00:00:00Z", "")) == found


async def test_lora_enabled_is_what_the_latest_config_says(models: World) -> None:
    off = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}, "model_entity_id": "default/served"}
    await models("POST", f"{MODELS}/deployment-configs/cfg", off)
    assert await names(models, "filter[lora_enabled]=true") == []
    assert (await models("GET", f"{LIST}?filter[lora_enabled][like]=x")).status_code == 400


async def test_adapters_are_found_by_flag_and_model(models: World) -> None:
    path = f"{MODELS}/adapters"
    assert await names(models, "filter[enabled]=true", path) == ["a-lora"]
    assert await names(models, '{"enabled":false}', path) == ["a-dora"]
    assert await names(models, "enabled:false model:default/adapted", path) == ["a-dora"]
    assert await names(models, "filter[model]=default/plain", path) == []


async def test_times_compare_as_times_in_any_spelling(models: World) -> None:
    at = (await models("GET", f"{LIST}/plain")).json()["created_at"]
    second = at[:19]
    for spelling in (f"{second}Z", f"{second}+00:00", second):
        found = await models("GET", LIST, params={"filter": f'{{"created_at":{{"$gte":"{spelling}"}}}}'})
        assert "plain" in [m["name"] for m in found.json()["data"]], spelling
    exact = await models("GET", LIST, params={"filter[created_at]": at})
    assert [m["name"] for m in exact.json()["data"]] == ["plain"]


async def test_an_empty_filter_is_none(world: World) -> None:
    await world.make(SECRETS, name="ss", value="x")
    assert len((await world("GET", f"{SECRETS}?filter=")).json()["data"]) == 1


@pytest.mark.parametrize("path", [LIST, FILESETS, "/apis/entities/v2/workspaces", f"{MODELS}/providers"])
async def test_every_kind_is_filtered_by_what_all_have(world: World, path: str) -> None:
    for query in ("filter[entity_type]=nothing_of_ours", "filter[project]=nowhere", 'filter=entity_type:"x"'):
        reply = await world("GET", f"{path}?{query}")
        assert (reply.status_code, reply.json()["data"]) == (200, []), reply.text


async def test_the_entity_type_is_that_of_the_ids(models: World) -> None:
    assert await names(models, "filter[entity_type]=model") == ["adapted", "plain", "served", "tuned"]
    assert await names(models, "-entity_type:model") == []
    configs = f"{MODELS}/deployment-configs"
    assert await names(models, "filter[entity_type]=model_deployment_config", configs) == ["cfg"]
    assert await names(models, "filter[project]=pp") == ["plain"]

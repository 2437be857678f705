"""Adapters: of a model and of a workspace, what they need, and that they never stand in anybody's way."""

from __future__ import annotations

import pytest

from tests.api.conftest import FILESETS, MODELS, WORKSPACES, World

MODEL = f"{MODELS}/models/base"
BELOW = f"{MODEL}/adapters"
ADAPTERS = f"{MODELS}/adapters"
LORA = {"fileset": "default/lora", "finetuning_type": "lora"}


@pytest.fixture
async def based(world: World) -> World:
    """A model `base`, and a fileset `lora` that holds a file."""
    await world.make(f"{MODELS}/models", name="base")
    await world.make(FILESETS, name="lora")
    await world("PUT", f"{FILESETS}/lora/-/adapter_config.json", content=b"{}")
    return world


async def test_an_adapter_made_below_its_model_is_shown_there_and_in_the_workspace(based: World) -> None:
    made = await based("POST", BELOW, {"name": "linear-algebra", **LORA, "enabled": True})
    assert made.status_code == 201
    assert {k: v for k, v in made.json().items() if not k.endswith("_at")} == {
        "name": "linear-algebra", "workspace": "default", "description": None, "fileset": "default/lora",
        "finetuning_type": "lora", "enabled": True, "lora_config": None, "model": "default/base",
    }  # fmt: skip
    assert (await based("GET", f"{ADAPTERS}/linear-algebra")).json() == made.json()
    assert (await based("GET", MODEL)).json()["adapters"] == [made.json()]
    listed = (await based("GET", f"{MODELS}/models")).json()["data"][0]["adapters"]
    assert listed == [{k: v for k, v in made.json().items() if v is not None}]


async def test_adapters_of_other_workspaces_are_shown_with_their_model(based: World) -> None:
    await based.make(WORKSPACES, name="other")
    path = ADAPTERS.replace("default", "other")
    made = await based("POST", path, {"name": "far", "model": "default/base", **LORA, "lora_config": {"rank": 8}})
    assert (made.status_code, made.json()["model"]) == (201, "default/base")
    assert [a["workspace"] for a in (await based("GET", MODEL)).json()["adapters"]] == ["other"]
    assert (await based("GET", ADAPTERS)).json()["data"] == []
    below = await based("DELETE", f"{BELOW}/far")
    assert below.status_code == 404


async def test_what_an_adapter_needs_is_asked_in_the_words_of_the_reference(based: World) -> None:
    missing = await based("POST", f"{MODELS}/models/nope/adapters", {"name": "ad", **LORA})
    assert (missing.status_code, missing.json()["detail"]) == (
        404, "Model with workspace 'default' and name 'nope' not found",
    )  # fmt: skip
    assert (await based("POST", ADAPTERS, {"name": "ad", "model": "nope", **LORA})).status_code == 404
    nowhere = await based("POST", BELOW, {"name": "ad", "fileset": "nope", "finetuning_type": "lora"})
    assert (nowhere.status_code, nowhere.json()["detail"]) == (400, "Fileset 'nope' not found in workspace 'default'")
    await based.make(FILESETS, name="empty")
    empty = await based("POST", BELOW, {"name": "ad", "fileset": "default/empty", "finetuning_type": "lora"})
    assert (empty.status_code, empty.json()["detail"]) == (400, "Fileset default/empty, exists but is empty")
    assert await based.store.all("adapters") == []


async def test_a_name_is_taken_in_the_workspace_not_per_model(based: World) -> None:
    await based.make(f"{MODELS}/models", name="base2")
    await based.make(BELOW, name="ad", **LORA)
    again = await based("POST", BELOW, {"name": "ad", **LORA})
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
    assert again.json()["detail"] == "Model adapter already exists: default/base/ad"
    other = await based("POST", f"{MODELS}/models/base2/adapters", {"name": "ad", **LORA})
    assert (other.status_code, other.json()["detail"]) == (409, "Model adapter already exists: default/base2/ad")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "ad"}, "fileset"),
        ({"name": "ad", **LORA, "finetuning_type": "magic"}, "finetuning_type"),
        ({"name": "ad", **LORA, "model": "default/base"}, "model"),
        ({"name": "a--b", **LORA}, "name"),
        ({"name": "ad", **LORA, "lora_config": {}}, "lora_config"),
        ({"name": "ad", **LORA, "description": "x" * 1001}, "description"),
    ],
)
async def test_a_wrong_field_below_a_model_is_422(based: World, body: dict[str, object], field: str) -> None:
    reply = await based("POST", BELOW, body)
    assert (reply.status_code, reply.json()["detail"][0]["loc"][1]) == (422, field)


async def test_an_adapter_changes_and_goes_by_both_routes(based: World) -> None:
    await based.make(BELOW, name="one", **LORA)
    await based.make(ADAPTERS, name="two", model="base", **LORA)
    off = await based("PATCH", f"{BELOW}/two", {"enabled": False})
    assert (off.status_code, off.json()["enabled"], off.json()["fileset"]) == (200, False, "default/lora")
    assert (await based("PATCH", f"{ADAPTERS}/one", {"description": "d"})).json()["description"] == "d"
    assert (await based("PATCH", f"{ADAPTERS}/one", {"finetuning_type": "dora"})).status_code == 422
    assert (await based("PATCH", f"{ADAPTERS}/one", {"fileset": "nope"})).status_code == 400
    assert (await based("DELETE", f"{BELOW}/one")).status_code == 204
    assert (await based("DELETE", f"{ADAPTERS}/two")).status_code == 204
    gone = await based("DELETE", f"{BELOW}/one")
    assert (gone.status_code, gone.json()["detail"]) == (
        404, "Adapter one with workspace 'default' and model name 'base' not found",
    )  # fmt: skip
    nobody = await based("PATCH", f"{MODELS}/models/nope/adapters/one", {})
    assert nobody.json()["detail"] == "Model with workspace 'default' and name 'nope' not found"


async def test_an_adapter_of_another_model_is_not_found_below_this_one(based: World) -> None:
    await based.make(f"{MODELS}/models", name="base2")
    await based.make(BELOW, name="ad", **LORA)
    assert (await based("PATCH", f"{MODELS}/models/base2/adapters/ad", {"enabled": False})).status_code == 404
    assert (await based("DELETE", f"{MODELS}/models/base2/adapters/ad")).status_code == 404
    assert (await based("GET", f"{ADAPTERS}/ad")).json()["enabled"] is True


async def test_adapters_never_block_and_go_with_their_model(based: World) -> None:
    await based.make(WORKSPACES, name="other")
    await based.make(BELOW, name="near", **LORA)
    await based.make(ADAPTERS.replace("default", "other"), name="far", model="default/base", **LORA)
    tried = await based("DELETE", f"{MODEL}?dry_run=true")
    assert [f"{e['kind']} {e['workspace']}/{e['name']}" for e in tried.json()["would_delete"]] == [
        "models default/base", "adapters default/near", "adapters other/far",
    ]  # fmt: skip
    assert len(await based.store.all("adapters")) == 2
    assert (await based("DELETE", MODEL)).status_code == 204
    assert await based.store.all("adapters") == []
    assert (await based("DELETE", f"{FILESETS}/lora")).status_code == 200


async def test_a_fileset_goes_though_an_adapter_uses_it(based: World) -> None:
    await based.make(BELOW, name="ad", **LORA)
    assert (await based("DELETE", f"{FILESETS}/lora")).status_code == 200
    assert (await based("GET", f"{ADAPTERS}/ad")).status_code == 200

"""Virtual models: other names for models, and the ones that are there because a model is served."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.entities import ProviderStatus, ServedModel
from tests.api.conftest import MODELS, World

VIRTUAL = "/apis/inference-gateway/v2/workspaces/default/virtual-models"


async def serve(world: World, *names: str, provider: str = "pp") -> None:
    """A provider that serves models of these names, which exist."""
    entity = await world.make(f"{MODELS}/providers", name=provider, host_url="http://x")
    for name in names:
        await world.make(f"{MODELS}/models", name=name)
    row = await world.store.get("providers", "default", entity["name"])
    served = [ServedModel(f"default/{name}", f"vendor/{name}") for name in names]
    await world.store.set_status(row, ProviderStatus(status="READY", served_models=served))


async def listed(world: World, query: str = "") -> list[tuple[str, str | None, bool]]:
    body = (await world("GET", f"{VIRTUAL}?sort=name{query}")).json()
    assert body["pagination"]["total_results"] == len(body["data"])
    return [(v["name"], v.get("default_model_entity"), v["autoprovisioned"]) for v in body["data"]]


async def test_an_alias_is_made_read_changed_and_deleted(world: World) -> None:
    made = await world.make(VIRTUAL, name="fast", default_model_entity="mm")
    assert {k: made[k] for k in ("name", "workspace", "default_model_entity", "autoprovisioned", "models")} == {
        "name": "fast", "workspace": "default", "default_model_entity": "default/mm", "autoprovisioned": False,
        "models": [],
    }  # fmt: skip
    assert made["entity_id"] == made["id"]
    assert (await world("GET", f"{VIRTUAL}/fast")).json() == made
    changed = await world("PATCH", f"{VIRTUAL}/fast", {"default_model_entity": "default/other"})
    assert (changed.status_code, changed.json()["default_model_entity"]) == (200, "default/other")
    assert (await world("POST", VIRTUAL, {"name": "fast"})).status_code == 409
    assert (await world("DELETE", f"{VIRTUAL}/fast")).status_code == 204
    assert (await world("GET", f"{VIRTUAL}/fast")).status_code == 404


@pytest.mark.parametrize("field", ["request_middleware", "response_middleware", "post_response_middleware"])
async def test_middleware_is_refused_and_an_empty_list_is_not(world: World, field: str) -> None:
    call = {"name": "router", "config_type": "x"}
    refused = await world("POST", VIRTUAL, {"name": "vv", field: [call]})
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", field])
    await world.make(VIRTUAL, name="vv", **{field: []})
    assert (await world("PATCH", f"{VIRTUAL}/vv", {field: [call]})).status_code == 422


async def test_every_served_model_is_a_virtual_model_unless_asked_for_others(world: World) -> None:
    await serve(world, "one", "two")
    await world.make(f"{MODELS}/models", name="idle")
    await world.make(VIRTUAL, name="fast", default_model_entity="one")
    assert await listed(world) == [
        ("fast", "default/one", False), ("one", "default/one", True), ("two", "default/two", True),
    ]  # fmt: skip
    assert await listed(world, "&exclude_autoprovisioned=true") == [("fast", "default/one", False)]
    assert await listed(world, "&filter[default_model_entity]=default/two") == [("two", "default/two", True)]
    one = (await world("GET", f"{VIRTUAL}/one")).json()
    assert (one["autoprovisioned"], one["entity_id"]) == (True, one["id"])
    await world("DELETE", f"{MODELS}/providers/pp")
    assert [name for name, _, _ in await listed(world)] == ["fast"]


async def test_a_virtual_model_of_a_served_model_becomes_the_users_when_changed(world: World) -> None:
    await serve(world, "one", "two")
    assert (await world("POST", VIRTUAL, {"name": "one"})).status_code == 409
    refused = await world("DELETE", f"{VIRTUAL}/one")
    assert (refused.status_code, "is served" in refused.json()["detail"]) == (409, True)
    changed = await world("PATCH", f"{VIRTUAL}/one", {"default_model_entity": "two"})
    assert (changed.status_code, changed.json()["autoprovisioned"]) == (200, False)
    assert await listed(world) == [("one", "default/two", False), ("two", "default/two", True)]
    again = await world("PATCH", f"{VIRTUAL}/one", {"models": [{"model": "x"}]})
    assert again.json()["id"] == changed.json()["id"]
    assert (await world("DELETE", f"{VIRTUAL}/one")).status_code == 204
    assert (await listed(world))[0] == ("one", "default/one", True)


async def test_pages_of_virtual_models_hold_20(world: World) -> None:
    await serve(world, *(f"m{n:02}" for n in range(25)))
    body: dict[str, Any] = (await world("GET", VIRTUAL)).json()
    assert (len(body["data"]), body["pagination"]["total_pages"], body["sort"]) == (20, 2, "-created_at")
    assert body["data"][0]["name"] == "m24"
    assert (await world("GET", f"{VIRTUAL}?page_size=201")).status_code == 422


async def test_a_model_with_an_alias_is_in_use(world: World) -> None:
    await serve(world, "one")
    await world.make(VIRTUAL, name="fast", default_model_entity="one")
    refused = await world("DELETE", f"{MODELS}/models/one")
    assert (refused.status_code, "virtual model default/fast" in refused.json()["detail"]) == (409, True)
    await world("DELETE", f"{VIRTUAL}/fast")
    assert (await world("DELETE", f"{MODELS}/models/one")).status_code == 204

"""A provider at our own address is refused when it is made, and when it is changed."""

from __future__ import annotations

import pytest

from tests.api.conftest import BASE_URL, MODELS, World

PROVIDERS = f"{MODELS}/providers"


@pytest.mark.parametrize("host_url", [BASE_URL, f"{BASE_URL}/v1", "http://localhost:8080/v1"])
async def test_a_provider_at_our_own_address_is_refused_by_field(world: World, host_url: str) -> None:
    made = await world("POST", PROVIDERS, {"name": "me", "host_url": host_url})
    put = await world("PUT", f"{PROVIDERS}/me", {"host_url": host_url})
    assert (await world("PUT", f"{PROVIDERS}/other", {"host_url": "http://localhost:9/v1"})).status_code == 200
    changed = await world("PUT", f"{PROVIDERS}/other", {"host_url": host_url})
    for reply in (made, put, changed):
        (problem,) = reply.json()["detail"]
        assert (reply.status_code, problem["loc"]) == (422, ["body", "host_url"])
        assert "where nimhost itself listens" in problem["msg"]
    assert [row.name for row in await world.store.all("providers")] == ["other"]

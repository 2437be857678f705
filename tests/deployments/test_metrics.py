"""`GET /metrics` of a whole daemon on a Docker in memory: ours and the engines', in one text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nimhost.gateway import scrape
from tests.fakes.engine import Faults
from tests.support import eventually
from tests.world import World

CHAT = "/apis/inference-gateway/v2/workspaces/default/provider/one/-/v1/chat/completions"
ASK = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path) as world:
        yield world


async def scraped(world: World) -> Samples:
    """(name, labels) -> value. Each family is described once, as scrapers insist on."""
    reply = await world.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    described = [line for line in reply.text.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len({line.split()[2] for line in described})
    found: Samples = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Of the one sample that has at least these labels."""
    found = [number for (key, has), number in samples.items() if key == name and has >= set(labels.items())]
    assert len(found) <= 1
    return found[0] if found else None


async def test_requests_tokens_deployments_gpus_and_engines_are_told(world: World) -> None:
    await world.deploy("one")
    await world.deploy("two")
    await world.wait("one", "READY")
    await world.wait("two", "READY")
    reply = await world.http.post(CHAT, json=ASK)
    usage = reply.json()["usage"]
    assert (await world.http.post(CHAT.replace("one", "nobody"), json=ASK)).status_code == 404

    found = await scraped(world)
    way = {"provider": "default/one", "model": "default/fake", "adapter": ""}
    assert value(found, "nimhost_gateway_requests_total", **way, status="200") == 1
    assert value(found, "nimhost_gateway_requests_total", model="other", status="404") == 1
    assert value(found, "nimhost_gateway_errors_total", model="other", kind="not_found") == 1
    assert value(found, "nimhost_gateway_requests_in_flight", **way) == 0
    assert value(found, "nimhost_gateway_prompt_tokens_total", **way) == usage["prompt_tokens"]
    assert value(found, "nimhost_gateway_completion_tokens_total", **way) == usage["completion_tokens"]
    for name in ("time_to_first_byte_seconds", "request_duration_seconds", "overhead_seconds"):
        assert value(found, f"nimhost_gateway_{name}_count", **way) == 1
        assert value(found, f"nimhost_gateway_{name}_bucket", **way, le="+Inf") == 1
    assert value(found, "nimhost_deployments", status="READY") == 2
    assert value(found, "nimhost_gpu_memory_bytes", gpu="1") == 24 * 2**30
    for name in ("one", "two"):
        whose = {"workspace": "default", "deployment": name}
        assert value(found, "vllm:num_requests_running", model_name="fake", **whose) == 0
        assert value(found, "nimhost_engine_metrics_up", **whose) == 1


@pytest.mark.fault(31)
@pytest.mark.parametrize("how", ["hangs", "is dead", "tells too much", "refuses"])
async def test_an_engine_that_does_not_tell_costs_only_its_own_metrics(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(scrape, "LIMIT_S", 0.2)
    await world.deploy("one")
    await world.wait("one", "READY")
    await world.deploy("two")
    await world.wait("two", "READY")
    sick = list(world.engines.values())[1]
    if how == "hangs":
        sick.faults = Faults(hang=True, paths=("/metrics",))
    elif how == "refuses":
        sick.faults = Faults(status=500, paths=("/metrics",))
    elif how == "tells too much":
        monkeypatch.setattr(scrape, "LIMIT_BYTES", 1)
    else:
        await sick.stop()
    found = await scraped(world)
    assert value(found, "nimhost_engine_metrics_up", deployment="two") == 0
    if how != "tells too much":
        assert value(found, "nimhost_engine_metrics_up", deployment="one") == 1
        assert value(found, "vllm:num_requests_running", deployment="one") == 0
    assert value(found, "vllm:num_requests_running", deployment="two") is None


async def test_requests_are_listed_and_filtered(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    for body in (ASK, ASK, {"model": "nobody"}):
        await world.http.post(CHAT if body is ASK else "/v1/chat/completions", json=body)
    await eventually(lambda: world.daemon.gateway.traffic.log.count == 3)

    async def listed(query: str) -> list[str]:
        reply = await world.http.get(f"/apis/nimhost/v1/requests?{query}")
        assert reply.status_code == 200, reply.text
        return [f"{one['status']} {one['provider']} {one['model']}" for one in reply.json()["data"]]

    fine, missing = "200 default/one default/fake", "404 None nobody"
    assert await listed("") == [fine, fine, missing]
    assert await listed("limit=1") == [missing]
    assert await listed("failed=true") == [missing]
    assert await listed("provider=one&limit=1") == [fine]
    assert await listed("provider=default/one") == [fine, fine]
    assert await listed("model=nobody") == [missing]
    assert await listed("model=else") == []
    assert (await world.http.get("/apis/nimhost/v1/requests?limit=9999")).status_code == 422

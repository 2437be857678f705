"""How providers are asked what they serve: page after page, and by the same way as requests go."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest

from nimhost.deployments import discovery as asking
from nimhost.deployments.discovery import Discovery, Question
from nimhost.deployments.model_list import ListedModel, ModelPage, read_model_page
from nimhost.entities import Entity, Provider
from nimhost.store import Store
from tests.fakes.engine import FakeEngine, Received, Reply
from tests.support import eventually


async def found_out(store: Store, url: str) -> Entity:
    """The provider at that address, as it is once it has been asked."""
    async with store.transaction() as tx:
        row = await tx.insert("providers", "default", "up", Provider(host_url=url))
    discovery = Discovery(store, lambda: None)
    discovery.watch([Question(provider=row, headers=(("x-api-key", "k"),))])

    async def asked() -> Entity | None:
        now = await store.get("providers", "default", "up")
        return now if now.status != row.status else None

    try:
        found = await eventually(asked, 20)
        assert found is not None
        return found
    finally:
        await discovery.close()


def a_few_at_a_time(ids: list[str], *, told: bool = True, broken: int = 0) -> tuple[list[str], object]:
    """The answer of a server that lists as Anthropic's does, and the queries that it got. `broken`: the status of all
    pages but the first."""
    queries: list[str] = []

    def answer(request: Received) -> Reply:
        query = request.target.partition("?")[2]
        queries.append(query)
        assert request.header("x-api-key") == "k"
        asked = parse_qs(query)
        start = ids.index(asked["after_id"][0]) + 1 if "after_id" in asked else 0
        if start and broken:
            return Reply(broken, {})
        page = ids[start : start + int(asked.get("limit", ["2"])[0])]
        more = {"has_more": start + len(page) < len(ids)} | ({"last_id": page[-1]} if told else {})
        return Reply(200, {"data": [{"id": name} for name in page], **more})

    return queries, answer


@pytest.mark.parametrize("told", [True, False], ids=["last-id", "no-last-id"])
async def test_all_pages_of_a_list_are_asked_for(store: Store, told: bool) -> None:
    ids = [f"claude-{number}" for number in range(7)]
    async with FakeEngine(served=("x",)) as engine:
        queries, engine.scripted["/v1/models"] = a_few_at_a_time(ids, told=told)  # type: ignore[assignment]
        provider = await found_out(store, engine.url)
    assert [model.served_model_name for model in provider.status.served_models] == ids
    assert queries == ["", "limit=1000&after_id=claude-1"]


@pytest.mark.parametrize("status", [404, 429, 500])
async def test_half_a_list_is_no_list(store: Store, status: int) -> None:
    """What it served before stays its own: nothing is taken off its models for a page that could not be had."""
    async with FakeEngine(served=("x",)) as engine:
        _, engine.scripted["/v1/models"] = a_few_at_a_time(["a1", "a2", "a3"], broken=status)  # type: ignore[assignment]
        provider = await found_out(store, engine.url)
    assert (provider.status.status, provider.status.served_models) == ("ERROR", [])
    assert f"HTTP {status}" in provider.status.status_message


async def test_a_list_without_end_is_asked_for_a_few_times(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MOST_PAGES", 3)
    async with FakeEngine(served=("x",)) as engine:
        endless = {"data": [{"id": "same"}], "has_more": True, "last_id": "same"}
        engine.scripted["/v1/models"] = lambda request: Reply(200, endless)
        provider = await found_out(store, engine.url)
        assert len(engine.requests) == 3
    assert [model.served_model_name for model in provider.status.served_models] == ["same"]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_providers_are_asked_directly_as_requests_are_sent(
    store: Store, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with FakeEngine(served=("direct",)) as engine:
        provider = await found_out(store, engine.url)
    assert provider.status.status == "READY", provider.status.status_message
    assert [model.served_model_name for model in provider.status.served_models] == ["direct"]


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"data": [{"id": "a"}]}', None),
        (b'{"data": [{"id": "a"}], "has_more": false, "last_id": "a"}', None),
        (b'{"data": [{"id": "a"}], "has_more": "yes"}', None),
        (b'{"data": [], "has_more": true, "last_id": "a"}', None),
        (b'{"data": [{"id": "a"}], "has_more": true, "last_id": 5}', "a"),
        (b'{"data": [{"id": "a"}], "has_more": true, "last_id": "b"}', "b"),
    ],
)
def test_there_is_a_next_page_if_it_says_so_and_has_something(body: bytes, after: str | None) -> None:
    page = read_model_page(body)
    assert isinstance(page, ModelPage)
    assert page.after == after
    assert page.models in ([], [ListedModel("a")])

"""Asking providers and engines what they serve: whatever they answer, and whatever becomes of writing it down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from nimhost.deployments import discovery as asking
from nimhost.deployments import probe as probing_module
from nimhost.deployments.discovery import Discovery, Question, judge
from nimhost.deployments.model_list import read_model_list
from nimhost.deployments.probe import Prober, Target
from nimhost.engines.spec import Probe
from nimhost.entities import Entity, Provider
from nimhost.errors import NotReady
from nimhost.store import Store, Transaction
from tests.support import eventually
from tests.world import MODELS, World

NO_LIST = [b"", b"{}", b"null", b"[]", b"\xff", b'{"data": [{"id": "\xff"}]}', b'{"data": [{"id": 1}]}',
           b'{"data": ' + b"[" * 100_000, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "data": []}']  # fmt: skip
LIST = json.dumps({"data": [{"id": "one", "object": "model"}, {"id": "w--a", "parent": "one", "root": "/l"}]}).encode()


@pytest.mark.parametrize("body", NO_LIST, ids=range(len(NO_LIST)))
def test_what_is_no_model_list_is_none_however_broken_it_is(body: bytes) -> None:
    assert read_model_list(body) is None


def test_a_model_list_is_read_with_what_vllm_says_about_adapters() -> None:
    listed = read_model_list(LIST)
    assert listed is not None
    assert [(model.id, model.parent, model.root) for model in listed] == [("one", None, None), ("w--a", "one", "/l")]


async def provider_in(store: Store) -> Entity:
    async with store.transaction() as tx:
        return await tx.insert("providers", "default", "up", Provider(host_url="http://up"))


@pytest.mark.parametrize("body", NO_LIST, ids=range(len(NO_LIST)))
async def test_a_provider_without_a_model_list_is_ready_all_the_same(store: Store, body: bytes) -> None:
    found = judge(await provider_in(store), "http://up/v1/models", 200, read_model_list(body))
    assert (found.status, found.served_models) == ("READY", [])
    assert "model entity routing disabled" in found.status_message


async def test_a_status_that_cannot_be_stored_now_is_stored_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = await provider_in(store)
    open_transaction, refusals = store.transaction, [NotReady("The database is locked by another program.")]

    @asynccontextmanager
    async def transaction(keep: bool = True) -> AsyncIterator[Transaction]:
        if refusals:
            raise refusals.pop()
        async with open_transaction(keep) as tx:
            yield tx

    monkeypatch.setattr(store, "transaction", transaction)
    monkeypatch.setattr(asking, "RETRY_S", (0.01, 0.01))
    discovery = Discovery(store, lambda: None)
    discovery.watch([Question(provider=provider, problem="No key yet: make one")])

    async def said() -> bool:
        return (await store.get("providers", "default", "up")).status.status_message == "No key yet: make one"

    await eventually(said)
    assert refusals == []
    await discovery.close()


def probing(
    answer: Callable[[httpx.Request], httpx.Response], monkeypatch: pytest.MonkeyPatch, probe: Probe | None = None
) -> Prober:
    """A prober of the engine `c1`, which answers so."""
    real = httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        return real(**options, transport=httpx.MockTransport(answer))

    monkeypatch.setattr("nimhost.deployments.probe.httpx.AsyncClient", client)
    prober = Prober(lambda: None)
    probe = probe or Probe(health_path="/health", models_path="/v1/models", served_names=("one",))
    prober.watch({"c1": Target(url="http://engine", probe=probe)})
    return prober


@pytest.mark.parametrize("body", [NO_LIST[4], NO_LIST[5], NO_LIST[8]])
async def test_an_engine_with_a_broken_model_list_is_probed_on(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [body, body, LIST]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200)
        return httpx.Response(200, content=answers.pop(0) if len(answers) > 1 else answers[0])

    prober = probing(answer, monkeypatch)
    await eventually(lambda: prober.health("c1").state == "ok", 10)
    assert prober.health("c1").models == ("one",)
    await prober.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("x"), "connection refused"),
        (httpx.ReadError("x"), "connection closed without an answer"),
        (httpx.RemoteProtocolError("x"), "connection closed without an answer"),
        (httpx.ReadTimeout("x"), "no answer within 5 s"),
    ],
)
async def test_an_engine_that_says_nothing_is_told_by_how(
    error: httpx.HTTPError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    prober = probing(answer, monkeypatch)
    await eventually(lambda: prober.health("c1").detail == said)
    await prober.close()


@asynccontextmanager
async def talking_on(piece: bytes) -> AsyncIterator[str]:
    """The address of a server whose replies never end."""

    talks = set[asyncio.Task[None] | None]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not writer.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.transport.abort()

    async with await asyncio.start_server(talk, "127.0.0.1") as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"
        await asyncio.gather(*filter(None, talks))  # all clients have left


@pytest.mark.fault(28)
async def test_an_engine_whose_health_has_no_end_has_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing_module, "TIMEOUT_S", 0.3)
    async with talking_on(b": ping\n\n") as url:
        prober = Prober(lambda: None)
        prober.watch({"c1": Target(url=url, probe=Probe(health_path="/events"))})
        await eventually(lambda: prober.health("c1").detail == "no answer within 0.3 s")
        await prober.close()


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("piece", "status", "said"),
    [(b": ping\n\n", "ERROR", "did not answer within 0.5 s"), (b"x" * 2**20, "READY", "routing disabled")],
)
async def test_a_provider_whose_list_has_no_end_is_not_listened_to_for_ever(
    store: Store, piece: bytes, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(asking, "MOST_BYTES", 2**22)
    async with talking_on(piece) as url:
        async with store.transaction() as tx:
            provider = await tx.insert("providers", "default", "up", Provider(host_url=url))
        discovery = Discovery(store, lambda: None)
        discovery.watch([Question(provider=provider)])

        async def found() -> bool:
            now = (await store.get("providers", "default", "up")).status
            return now.status == status and said in now.status_message

        await eventually(found)
        await discovery.close()


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("probe", "listing", "said"),
    [
        (Probe(health_path="/health", served_names=("mine",)), httpx.Response(200, content=LIST), "not list mine"),
        (Probe(health_path="/health", serves_any=True), httpx.Response(200, json={"data": []}), "lists no model"),
        (Probe(health_path="/health", serves_any=True), httpx.Response(200, content=LIST), ""),
        (Probe(health_path="/health", serves_any=True), httpx.Response(404), ""),  # it has no such list
        (Probe(health_path="/health"), httpx.Response(200, json={"data": []}), ""),
    ],
)
async def test_health_alone_is_not_ready_where_the_model_list_says_otherwise(
    probe: Probe, listing: httpx.Response, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200) if request.url.path == "/health" else listing

    prober = probing(answer, monkeypatch, probe)
    await eventually(lambda: prober.health("c1").state == ("starting" if said else "ok"))
    assert said in prober.health("c1").detail
    await prober.close()


async def test_who_looks_at_an_engine_that_loads_sees_the_last_probe(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.faults.ready_delay_s = 3600
        await world.deploy("one")

        async def seen() -> bool:
            found = await world.deployment("one")
            assert found is not None
            page = (await world.http.get(f"{MODELS}/deployments")).json()["data"]
            engines = [(shown["progress"] or {}).get("engine") for shown in (found, page[0])]
            return all(engine and engine["message"] == "/health answers 503" for engine in engines)

        await world.wait("one", "PENDING")
        await eventually(seen, 10)

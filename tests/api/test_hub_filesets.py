"""Filesets on a model hub: looked at when they are made, their files named and read, and a hub that is away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import nimhost.host.hub_files as hub_files
from nimhost.host.hub_files import HubFiles
from nimhost.host.weights import Repo, Weights
from tests.api.conftest import FILESETS, SECRETS, World, open_world
from tests.fakes.hub import FakeHub

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 9000, "docs/readme.md": b"hello"}
HUB = {"type": "huggingface", "repo_id": "org/tiny"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as opened:
        yield opened


@pytest.fixture
async def world(tmp_path: Path, hub: FakeHub) -> AsyncIterator[World]:
    async with open_world(tmp_path, hub=HubFiles(tmp_path / "cache", hub.url, offline=False)) as opened:
        yield opened


async def add(world: World, **storage: Any) -> Any:
    return await world("POST", FILESETS, {"name": "ff", "storage": HUB | storage})


async def test_a_revision_becomes_the_commit_it_stands_for(world: World, hub: FakeHub) -> None:
    commit = hub.add("org/tiny", FILES).commit
    storage = (await add(world)).json()["storage"]
    assert (storage["revision"], storage["original_revision"]) == (commit, "main")
    assert (await world("DELETE", f"{FILESETS}/ff")).status_code == 200
    storage = (await add(world, revision=commit)).json()["storage"]
    assert (storage["revision"], storage["original_revision"]) == (commit, None)


@pytest.mark.parametrize(
    ("storage", "repo", "detail"),
    [
        ({}, {"gated": True}, "Access denied to storage backend: org/tiny is gated: it needs a token"),
        ({}, {"private": True}, "Invalid storage configuration: there is no repository org/tiny at "),
        ({"repo_id": "org/nope"}, {}, "Invalid storage configuration: there is no repository org/nope at "),
        ({"revision": "v9"}, {}, "Invalid storage configuration: org/tiny has no revision 'v9'"),
        ({"token_secret": "bad"}, {}, "Access denied to storage backend: "),
        ({"token_secret": "nope"}, {}, "Secret not found: nope"),
    ],
)
async def test_what_can_never_be_fetched_is_refused_in_the_words_of_the_reference(
    world: World, hub: FakeHub, storage: dict[str, str], repo: dict[str, Any], detail: str
) -> None:
    hub.add("org/tiny", FILES, **repo)
    await world.make(SECRETS, name="bad", value="hf_wrong")
    reply = await add(world, **storage)
    assert (reply.status_code, reply.json()["detail"][: len(detail)]) == (400, detail)
    assert "hf_wrong" not in reply.text
    assert await world.store.all("filesets") == []


async def test_a_token_that_may_read_it_opens_a_gated_repository(world: World, hub: FakeHub) -> None:
    hub.add("org/tiny", FILES, gated=True, readers=("hf_good",))
    await world.make(SECRETS, name="tok", value="hf_good")
    assert (await add(world, token_secret="tok")).status_code == 200
    assert (await world("GET", f"{FILESETS}/ff/-/config.json")).content == FILES["config.json"]
    assert hub.leaked == []


@pytest.mark.fault(14)
@pytest.mark.parametrize("fault", ["down", "busy", "slow"])
async def test_a_hub_that_is_away_is_no_reason_to_refuse(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    hub.add("org/tiny", FILES)
    if fault == "slow":
        monkeypatch.setattr(hub_files, "ANSWER_S", 0.05)
        held = threading.Event()
        monkeypatch.setattr(hub_files, "_confirm", lambda _: held.wait(20))
    else:
        hub.faults.down, hub.faults.busy = fault == "down", 99 if fault == "busy" else 0
    reply = await asyncio.wait_for(add(world), 10)
    if fault == "slow":
        held.set()
    assert reply.status_code == 200, reply.text
    assert (reply.json()["storage"]["revision"], reply.json()["storage"]["original_revision"]) == ("main", None)


async def test_files_are_listed_and_read_in_ranges_from_the_hub(world: World, hub: FakeHub) -> None:
    hub.add("org/tiny", FILES)
    await add(world)
    listed = (await world("GET", f"{FILESETS}/ff/files")).json()["data"]
    assert [(f["path"], f["size"], f["cache_status"]) for f in listed] == [
        (path, len(FILES[path]), "not_cached") for path in sorted(FILES)
    ]
    assert [f["path"] for f in (await world("GET", f"{FILESETS}/ff/files?path=docs")).json()["data"]] == [
        "docs/readme.md"
    ]
    path, content = f"{FILESETS}/ff/-/model.safetensors", FILES["model.safetensors"]
    whole = await world("GET", path)
    assert (whole.status_code, whole.content == content) == (200, True)
    part = await world("GET", path, headers={"range": "bytes=1000000-2000000"})
    assert (part.status_code, part.content == content[1_000_000:2_000_001]) == (206, True)
    assert part.headers["content-range"] == f"bytes 1000000-2000000/{len(content)}"
    tail = await world("GET", path, headers={"range": "bytes=-7"})
    assert tail.content == content[-7:]
    assert (await world("GET", path, headers={"range": "bytes=5-99999999"})).status_code == 416
    hub.forget()
    head = await world("HEAD", path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(content)), b"")
    assert hub.sent_bytes() == 0
    missing = await world("GET", f"{FILESETS}/ff/-/nope")
    assert (missing.status_code, missing.json()["detail"]) == (404, "File 'nope' not found in fileset 'default/ff'")
    for way in ("PUT", "DELETE"):
        reply = await world(way, path, content=b"x" if way == "PUT" else None)
        assert (reply.status_code, "huggingface" in reply.json()["detail"]) == (400, True)


@pytest.mark.fault(37)
async def test_a_path_that_leads_out_of_the_repository_is_400(world: World, hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", FILES)
    await add(world)
    hub.forget()
    for path in ("..%2F..%2Fnimhost.db", "%2Fetc%2Fpasswd", "a/%2e%2e/%2e%2e/x"):
        assert (await world("GET", f"{FILESETS}/ff/-/{path}")).status_code == 400
    assert hub.requests == []


@pytest.mark.fault(14)
async def test_what_is_in_the_cache_is_read_without_the_hub(world: World, hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/tiny", FILES).commit
    await add(world)
    weights = Weights(tmp_path / "cache", hub.url, offline=False)
    await weights.fetch(Repo("org/tiny", commit), None, lambda _: None)
    await weights.close()
    listed = (await world("GET", f"{FILESETS}/ff/files")).json()["data"]
    assert {f["cache_status"] for f in listed} == {"cached"}
    hub.faults.down = True
    listed = (await world("GET", f"{FILESETS}/ff/files")).json()["data"]
    assert {f["path"]: f["size"] for f in listed} == {path: len(content) for path, content in FILES.items()}
    reply = await world("GET", f"{FILESETS}/ff/-/model.safetensors", headers={"range": "bytes=0-9"})
    assert (reply.status_code, reply.content) == (206, FILES["model.safetensors"][:10])


@pytest.mark.fault(14)
async def test_without_hub_and_cache_the_files_are_a_502_that_says_so(world: World, hub: FakeHub) -> None:
    hub.add("org/tiny", FILES)
    await add(world)
    hub.faults.down = True
    for path in ("files", "-/config.json"):
        reply = await world("GET", f"{FILESETS}/ff/{path}")
        assert (reply.status_code, hub.url in reply.json()["detail"]) == (502, True)


async def test_a_repository_that_is_closed_now_but_was_fetched_before_is_accepted(
    world: World, hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("org/tiny", FILES)
    weights = Weights(tmp_path / "cache", hub.url, offline=False)
    await weights.fetch(Repo("org/tiny"), None, lambda _: None)
    await weights.close()
    hub.add("org/tiny", FILES, gated=True)
    assert (await add(world)).status_code == 200


async def test_offline_the_hub_is_not_asked(tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/tiny", FILES)
    async with open_world(tmp_path, hub=HubFiles(tmp_path / "cache", hub.url, offline=True)) as world:
        assert (await add(world)).json()["storage"]["revision"] == "main"
        reply = await world("GET", f"{FILESETS}/ff/files")
        assert (reply.status_code, "offline" in reply.json()["detail"]) == (502, True)
    assert hub.requests == []


async def test_ngc_storage_is_stored_and_needs_its_key(world: World) -> None:
    storage = {"type": "ngc", "org": "nvidia", "team": "nemo", "target": "llama", "api_key_secret": "key"}
    storage["host"] = "http://127.0.0.1:9"  # nobody: it is stored as it is said
    body = {"name": "ngc", "storage": storage}
    missing = await world("POST", FILESETS, body)
    assert (missing.status_code, missing.json()["detail"]) == (400, "Secret not found: key")
    await world.make(SECRETS, name="key", value="nvapi-x")
    made = await world("POST", FILESETS, body)
    assert (made.status_code, made.json()["storage"]["target_type"]) == (200, "resource")
    refused = await world("PUT", f"{FILESETS}/ngc/-/x", content=b"x")
    assert (refused.status_code, "ngc" in refused.json()["detail"]) == (400, True)
    used = await world("DELETE", f"{SECRETS}/key")
    assert (used.status_code, "fileset default/ngc" in used.json()["detail"]) == (409, True)

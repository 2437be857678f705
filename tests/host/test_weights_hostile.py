"""Hubs that mean no good, or are none: listings without an end, paths that lead out, novels instead of reasons."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from nimhost.errors import HostError, HubUnavailable, NimhostError
from nimhost.host.hub_files import HubFiles, RemoteFile
from nimhost.host.weights import Limits, Repo, Weights
from nimhost.host.weights import child as weights_child
from nimhost.host.weights import hub as weights_hub
from nimhost.host.weights import locks as weights_locks
from nimhost.host.weights.cache import PARTIAL, RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.hub import Hub, Say
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.ngc import Ngc
from nimhost.host.weights.wire import Job
from tests.fakes.hub import FakeHub
from tests.fakes.ngc import KEY, FakeNgc
from tests.host.weights_world import TINY
from tests.support import eventually

FILES = {f"part-{n}.safetensors": bytes([n]) * 100 for n in range(20)} | {"config.json": b"{}"}
QUICK = Limits(stall_s=5, tries=2, backoff_s=0.01)
PUBLISHED = {"org/tiny": FILES}
PAGE_SIZE = 5


def silent(message: str) -> None:
    pass


class Endless(Hub):
    """Each page names the next one."""

    page: tuple[dict[str, Any], ...] = ()
    asked = 0

    def json(self, url: str, say: Say) -> tuple[Any, Message]:
        self.asked += 1
        headers = Message()
        headers["Link"] = f'<{self.endpoint}/more>; rel="next"'
        return list(self.page), headers


def test_a_listing_of_empty_pages_ends() -> None:
    hub = Endless("http://h", None, QUICK, TINY)
    with pytest.raises(HostError, match="does not end") as endless:
        hub.tree("a" * 40, silent)
    assert (hub.asked, endless.value.final) == (1, True)


def test_a_listing_that_goes_on_and_on_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_hub, "MOST_FILES", 1000)
    hub = Endless("http://h", None, QUICK, TINY)
    hub.page = tuple({"type": "file", "path": f"f{n}", "size": 1, "oid": "a" * 40} for n in range(100))
    with pytest.raises(HostError, match=r"does not end \(1100 of them so far\)"):
        hub.tree("a" * 40, silent)


@pytest.mark.parametrize(
    "change",
    [{"path": 5}, {"path": None}, {"size": -1}, {"size": "many"}, {"oid": "x"}, {"oid": ["a" * 40]},
     {"lfs": {"oid": "a" * 64, "size": -7}}, {"lfs": 7}],
)  # fmt: skip
def test_a_listing_of_what_are_no_files_is_none(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub("http://h", None, QUICK, TINY)
    entry = {"type": "file", "path": "config.json", "size": 1, "oid": "a" * 40}
    monkeypatch.setattr(hub, "json", lambda url, say: ([{**entry, **change}], Message()))
    with pytest.raises(HubUnavailable, match="does not answer like a model hub"):
        hub.tree("a" * 40, silent)


def test_a_listing_of_ngc_with_more_pages_than_files_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Ngc("http://h", KEY, QUICK, Repo("o/t/n", "1", registry="ngc"))
    endless = {"modelFiles": [], "paginationInfo": {"totalPages": 10**9}}
    monkeypatch.setattr(hub, "json", lambda url, say: (endless, Message()))
    with pytest.raises(HostError, match="does not end"):
        hub.tree("1", silent)


def test_a_page_without_an_end_is_not_read_to_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_hub, "LISTING_BYTES", 100)
    with pytest.raises(HubUnavailable, match="does not answer like a model hub: more than"):
        Hub(hub.url, None, QUICK, TINY).tree(hub.repos["org/tiny"].commit, silent)


def test_a_page_that_comes_too_slowly_is_asked_for_anew_and_then_given_up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_hub, "_PATIENT_S", -1.0)
    with pytest.raises(HubUnavailable, match="2 times in a row"):
        Hub(hub.url, None, QUICK, TINY).commit(silent)


def test_a_page_is_read_whole(hub: FakeHub) -> None:
    found = Hub(hub.url, None, QUICK, TINY).tree(hub.repos["org/tiny"].commit, silent)
    assert {file.path: file.size_bytes for file in found} == {path: len(bytes_) for path, bytes_ in FILES.items()}


def test_what_a_hub_says_at_length_is_cut() -> None:
    headers, novel = Message(), "x" * 60_000
    headers["X-Error-Message"] = novel
    body = json.dumps({"requestStatus": {"statusDescription": novel}}).encode()
    for hub in (Hub("http://h", None, QUICK, TINY), Ngc("http://h", KEY, QUICK, Repo("o/t/n", registry="ngc"))):
        with urllib.error.HTTPError("http://h/x", 403, "no", headers, BytesIO(body)) as said:
            assert len(hub._refused(said).message) < 1000
    assert len(weights_hub.reason(OSError("y" * 60_000), 1)) <= 500


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({"Retry-After": "12"}, 12.0), ({"Retry-After": "soon"}, None), ({}, None),
        ({"RateLimit": "limit=1;r=0;t=55"}, 55.0),
        # By the hub's clock, whatever ours says.
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT", "Date": "Fri, 31 Dec 1999 23:59:29 GMT"}, 30.0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT", "Date": "Sat, 01 Jan 2000 00:00:00 GMT"}, 0.0),
        # No calendar has a year for what these come to.
        ({"Retry-After": "9" * 15}, 86_400.0), ({"Retry-After": "9" * 400}, 86_400.0),
        ({"RateLimit": "r=0;t=" + "9" * 15}, 86_400.0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT", "Date": "Fri, 31 Dec 1999 23:59:29 GMT"}, 86_400.0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, None), ({"Retry-After": "Fri, 31 Dec", "Date": "x"}, None),
    ],
)  # fmt: skip
def test_a_hub_says_when_to_come_again(said: dict[str, str], seconds: float | None) -> None:
    headers = Message()
    for name, value in said.items():
        headers[name] = value
    assert weights_hub.retry_after(headers) == seconds


@pytest.mark.fault(37)
async def test_a_version_that_leads_out_of_the_cache_is_none(cache: Path) -> None:
    """An NGC, or what calls itself one, says which version is the newest, and that names a directory."""
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/tiny", "../../../../../../outside", {"config.json": b"{}", "m.safetensors": b"x"})
        repo = Repo("nvidia/nemo/tiny", "latest", "model", ngc.url, registry="ngc")
        with pytest.raises(HubUnavailable, match=r"does not answer like NGC: '\.\./\.\./.* is no version"):
            await Weights(cache, ngc.url, False, QUICK).fetch(repo, KEY, lambda news: None)
    assert not list(cache.parent.rglob("outside"))


@pytest.mark.fault(37)
@pytest.mark.parametrize("said", [b"../../..", b"\xff\xfe", b"", b"main"])
@pytest.mark.parametrize("repo", [TINY, Repo("o/t/n", "latest", registry="ngc")])
def test_what_a_branch_is_said_to_be_must_be_a_commit(cache: Path, repo: Repo, said: bytes) -> None:
    found = RepoCache(cache, repo)
    ref = found.dir / "refs" / repo.revision
    ref.parent.mkdir(parents=True)
    ref.write_bytes(said)
    (found.dir / "snapshots").mkdir()
    assert found.commit() == ("main" if said == b"main" and repo.registry == "ngc" else None)
    assert found.find() is None


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "x" * 5000])
def test_files_that_would_lie_elsewhere_are_refused_before_anything_is_fetched(
    hub: FakeHub, cache: Path, path: str
) -> None:
    hub.add("org/tiny", {path: b"x", "model.safetensors": b"x"})
    with pytest.raises(HostError, match="would lie outside of the cache") as refused:
        weights_child.download(Job(TINY, hub.url, str(cache), None, QUICK))
    assert hub.sent_bytes() == 0
    assert len(refused.value.message) < 500


def test_a_reply_that_is_nested_without_end_is_no_reply(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "[" * 100_000)
    with pytest.raises(NimhostError, match="does not answer like a model hub"):
        Hub(hub.url, None, QUICK, TINY).commit(silent)


@pytest.mark.parametrize("fault", ["pages", "shifted"])
async def test_a_reader_gets_the_part_it_asked_for_or_none(hub: FakeHub, cache: Path, fault: str) -> None:
    hub.add("org/tiny", {"data.bin": bytes(range(256)) * 8})
    file = await HubFiles(cache, hub.url, False).open_file(TINY, None, "data.bin")
    assert isinstance(file, RemoteFile)
    setattr(hub.faults, fault, 1)
    with pytest.raises(HubUnavailable, match="something else than the file"):
        await file.begin(1100, 1200)
    await file.begin(1100, 1200)
    assert b"".join([piece async for piece in file.read(1100, 1200)]) == (bytes(range(256)) * 8)[1100:1200]
    file.close()


async def test_who_leaves_while_a_hub_is_silent_holds_up_nobody(hub: FakeHub, cache: Path) -> None:
    hub.add("org/tiny", {"data.bin": bytes(3_000_000)})
    hub.faults.stalls, hub.faults.stall_after_bytes = 1, 500_000
    file = await HubFiles(cache, hub.url, False).open_file(TINY, None, "data.bin")
    assert isinstance(file, RemoteFile)
    await file.begin(0, 3_000_000)
    reading = asyncio.ensure_future(anext(file.read(0, 3_000_000)))
    await eventually(lambda: hub.sent_bytes() >= 500_000)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < 1


async def test_a_repository_of_many_files_is_not_looked_through_on_the_loop(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_in, is_file = set(), Path.is_file

    def noted(self: Path) -> bool:
        looked_in.add(threading.current_thread())
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", noted)
    listed = await HubFiles(cache, hub.url, False).list_files(TINY, None)
    assert {file.path: file.cached for file in listed} == dict.fromkeys(sorted(FILES), False)
    assert looked_in
    assert threading.main_thread() not in looked_in


def test_a_file_that_goes_while_it_is_looked_at_is_no_sign_of_life(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others move their files into place at any moment."""
    tiny, file = RepoCache(cache, TINY), HubFile("model.safetensors", 5, "a" * 64)
    tiny.make_dirs()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / file.digest])
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert weights_locks._last_sign_of_life(tiny, file) == 0.0


def test_a_partial_file_that_was_moved_into_place_meanwhile_is_opened_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = HubFile("model.safetensors", 5, "a" * 64)
    path, taken = cache / f"{file.digest}{PARTIAL}", weights_locks.try_lock
    cache.mkdir()

    def moved(fd: int) -> bool:
        monkeypatch.setattr(weights_locks, "try_lock", taken)
        path.rename(cache / file.digest)
        return taken(fd)

    monkeypatch.setattr(weights_locks, "try_lock", moved)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    with weights_locks.locked_partial(path, file, Meter(5)):
        assert path.is_file()

"""Pulls are wishes: they outlive the daemon, end when it is known what became of them, and wait for what may pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nimhost.deployments import pulls as pulls_module
from nimhost.deployments.pulls import KEY, Asked, Pull, Pulls
from nimhost.errors import DiskFull, HubUnavailable, NimhostError, NotFound, WeightsMissing
from nimhost.host.weights import Limits, OnProgress, Repo, Snapshot, Weights, WeightsProgress
from nimhost.host.weights.wire import Choice
from nimhost.refs import NGC_KEY, Ref
from nimhost.store import Store
from tests.fakes.hub import FakeHub
from tests.fakes.ngc import KEY as NGC
from tests.fakes.ngc import FakeNgc
from tests.support import eventually

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 300_000}
REPO = Repo("org/model")
ASKED = Asked(REPO)
GATED = Asked(Repo("org/gated"), secret=Ref("default", "tok"))
SECRETS = {Ref("default", "tok"): "hf_good", NGC_KEY: NGC}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.add("org/model", FILES)
        fake.add("org/gated", {**FILES, "config.json": b'{"a": 1}'}, gated=True, readers=("hf_good",))
        yield fake


@pytest.fixture
async def weights(hub: FakeHub, tmp_path: Path) -> AsyncIterator[Weights]:
    made = Weights(tmp_path / "hub", hub.url, False, Limits(stall_s=5, tries=1, backoff_s=0.01))
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls_module, "RETRY_S", (0.02, 0.02))


async def secret(ref: Ref) -> str:
    if ref not in SECRETS:
        raise NotFound(f"there is no secret {ref}")
    return SECRETS[ref]


async def stored(store: Store) -> str:
    async with store.transaction() as tx:
        return await tx.meta(KEY) or ""


async def outcome(pull: Pull) -> dict[str, Any]:
    return [step async for step in pull.follow()][-1]


async def is_slow(hub: FakeHub) -> None:
    """Returns when some of it has come and much has not."""
    await eventually(lambda: 50_000 < hub.sent_bytes("model.safetensors") < 200_000)


@pytest.mark.fault(20)
async def test_a_pull_that_was_under_way_is_continued_by_the_next_daemon(
    hub: FakeHub, weights: Weights, store: Store
) -> None:
    hub.faults.bytes_per_s = 2e5
    first = Pulls(weights, store, secret)
    await first.ask(ASKED)
    await is_slow(hub)
    await first.close()
    assert "org/model" in await stored(store)
    hub.faults.bytes_per_s = None
    second = Pulls(weights, store, secret)
    await second.resume()
    await eventually(lambda: weights.present(REPO))
    assert hub.sent_bytes("model.safetensors") < 300_000 + 100_000
    await eventually(lambda: not second.in_flight)
    assert await stored(store) == "[]"


@pytest.mark.parametrize("ends", ["done", "failed", "stopped"])
async def test_a_pull_that_is_over_is_not_begun_again(hub: FakeHub, weights: Weights, store: Store, ends: str) -> None:
    pulls, asked = Pulls(weights, store, secret), Asked(Repo("org/nope")) if ends == "failed" else ASKED
    if ends == "stopped":
        hub.faults.bytes_per_s = 2e5
        pull = await pulls.ask(asked)
        await is_slow(hub)
        assert await pulls.stop(REPO) is True
        assert await pulls.stop(REPO) is False
        assert (await outcome(pull))["error"] == "Stopped"
    else:
        assert (await outcome(await pulls.ask(asked)))["status"] == ends
    assert await stored(store) == "[]"
    hub.forget()
    after = Pulls(weights, store, secret)
    await after.resume()
    assert (after.in_flight, hub.requests) == ({}, [])


async def test_what_was_killed_between_the_last_byte_and_the_note_of_it_moves_nothing(
    hub: FakeHub, weights: Weights, store: Store
) -> None:
    await weights.fetch(REPO, None, lambda news: None)
    async with store.transaction() as tx:
        await tx.set_meta(KEY, '[{"repo": {"repo_id": "org/model"}}]')
    hub.forget()
    pulls = Pulls(weights, store, secret)
    await pulls.resume()
    await eventually(lambda: _is_empty(store))
    assert hub.requests == []


async def _is_empty(store: Store) -> bool:
    return await stored(store) == "[]"


async def test_a_stop_before_anything_was_continued_holds(hub: FakeHub, weights: Weights, store: Store) -> None:
    async with store.transaction() as tx:
        await tx.set_meta(KEY, '[{"repo": {"repo_id": "org/model"}}, {"repo": {"repo_id": "org/other"}}]')
    pulls = Pulls(weights, store, secret)
    assert await pulls.stop(REPO) is True
    assert "org/model" not in await stored(store)
    assert "org/other" in await stored(store)


async def test_pulls_that_cannot_be_read_again_hold_nobody_up(weights: Weights, store: Store) -> None:
    async with store.transaction() as tx:
        await tx.set_meta(KEY, '{"from": "another version"}')
    pulls = Pulls(weights, store, secret)
    await pulls.resume()
    assert (await outcome(await pulls.ask(ASKED)))["status"] == "done"


async def test_the_token_is_asked_for_anew_and_stored_nowhere(hub: FakeHub, weights: Weights, store: Store) -> None:
    hub.faults.bytes_per_s = 2e5
    first = Pulls(weights, store, secret)
    await first.ask(GATED)
    await is_slow(hub)
    await first.close()
    assert "hf_good" not in await stored(store)
    hub.faults.bytes_per_s = None
    second = Pulls(weights, store, secret)
    await second.resume()
    await eventually(lambda: weights.present(GATED.repo))
    lost = Asked(Repo("org/gated", "v2"), secret=Ref("default", "gone"))
    assert (await outcome(await second.ask(lost)))["error"] == "NotFound"


async def test_what_is_of_ngc_is_opened_with_its_key(weights: Weights, store: Store) -> None:
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/tiny", "1.0", FILES)
        repo = Repo("nvidia/nemo/tiny", "1.0", "model", ngc.url, registry="ngc")
        assert (await outcome(await Pulls(weights, store, secret).ask(Asked(repo))))["status"] == "done"


@pytest.mark.fault(2)
@pytest.mark.fault(17)
async def test_while_nobody_follows_a_hub_that_is_away_is_waited_for(
    hub: FakeHub, weights: Weights, store: Store
) -> None:
    """As after a reboot, where the daemon may be there before the network is."""
    hub.faults.down = True
    pulls = Pulls(weights, store, secret)
    await pulls.ask(ASKED)

    def waits() -> str:
        progress = pulls.in_flight.get(REPO)
        return progress.message if progress and "trying again in 0.02 s" in progress.message else ""

    assert "1 times in a row" in await eventually(waits)
    await eventually(lambda: len(hub.requests) >= 3)
    assert "org/model" in await stored(store)
    hub.faults.down = False
    await eventually(lambda: weights.present(REPO))
    await eventually(lambda: _is_empty(store))


async def test_who_follows_is_told_at_once_and_it_ends(hub: FakeHub, weights: Weights, store: Store) -> None:
    hub.faults.down = True
    pulls = Pulls(weights, store, secret)
    assert (await outcome(await pulls.ask(ASKED)))["error"] == "HubUnavailable"
    assert await stored(store) == "[]"


@pytest.mark.fault(2)
async def test_a_hub_that_sends_other_bytes_is_not_asked_for_them_all_day(
    hub: FakeHub, weights: Weights, store: Store
) -> None:
    """Nobody follows, and each try would bring all of it twice."""
    hub.faults.corrupt = 10**6
    await Pulls(weights, store, secret).ask(ASKED)
    await eventually(lambda: _is_empty(store))
    assert 300_000 < hub.sent_bytes("model.safetensors") <= 600_000


async def test_a_daemon_that_works_offline_keeps_what_is_still_to_be_fetched(
    hub: FakeHub, weights: Weights, store: Store
) -> None:
    async with store.transaction() as tx:
        await tx.set_meta(KEY, '[{"repo": {"repo_id": "org/model"}}]')
    offline = Pulls(Weights(weights.cache_dir, hub.url, offline=True), store, secret)
    await offline.resume()
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("pull ")] == []
    assert "org/model" in await stored(store)
    await Pulls(weights, store, secret).resume()
    await eventually(lambda: _is_empty(store))
    assert weights.present(REPO)


async def test_asking_again_ends_the_pause(
    hub: FakeHub, weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls_module, "RETRY_S", (600.0, 600.0))
    hub.faults.down = True
    pulls = Pulls(weights, store, secret)
    await pulls.ask(ASKED)
    await eventually(lambda: REPO in pulls.in_flight and "600 s" in pulls.in_flight[REPO].message)
    hub.faults.down = False
    assert (await outcome(await pulls.ask(ASKED)))["status"] == "done"


async def test_what_never_comes_is_given_up(
    hub: FakeHub, weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls_module, "GIVE_UP_S", 0.3)
    hub.faults.down = True
    await Pulls(weights, store, secret).ask(ASKED)
    await eventually(lambda: _is_empty(store))


async def test_two_who_ask_at_once_share_one_download(hub: FakeHub, weights: Weights, store: Store) -> None:
    pulls = Pulls(weights, store, secret)
    first, second, some = await asyncio.gather(
        pulls.ask(ASKED), pulls.ask(ASKED), pulls.ask(Asked(REPO, Choice(allow=("*.json",))))
    )
    assert first is second
    assert some is not first
    assert {(await outcome(pull))["status"] for pull in (first, some)} == {"done"}
    assert hub.sent_bytes("model.safetensors") == 300_000


@pytest.mark.parametrize("error", [RuntimeError("out of the blue"), WeightsMissing("gone"), DiskFull("full")])
async def test_whatever_ends_a_pull_is_told(
    weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def surprise(*_: object) -> None:
        raise error

    monkeypatch.setattr(weights, "fetch", surprise)
    told = [step async for step in (await Pulls(weights, store, secret).ask(ASKED)).follow()]
    assert [step["status"] for step in told] == ["failed"]
    assert str(error) in told[0]["message"]
    assert await stored(store) == "[]"


@pytest.mark.fault(17)
async def test_a_disk_that_fills_up_in_the_middle_is_waited_for_and_one_that_is_full_is_told(
    weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who follows sees what is waited for. Without a byte there is nothing to lose: then it is refused."""
    fetch, tries = weights.fetch, 0

    async def fills_up(repo: Repo, token: str | None, tell: OnProgress, choice: Choice) -> Snapshot:
        nonlocal tries
        tries += 1
        if tries == 1:
            tell(WeightsProgress(100, 300_002, 1.0, ""))
        if tries <= 2:
            raise DiskFull(f"no room, {tries}")
        return await fetch(repo, token, tell, choice)

    monkeypatch.setattr(weights, "fetch", fills_up)
    told = [step async for step in (await Pulls(weights, store, secret).ask(ASKED)).follow()]
    assert (told[-1]["status"], tries) == ("done", 3)
    tries = 1
    assert (await outcome(await Pulls(weights, store, secret).ask(ASKED)))["error"] == "DiskFull"


@pytest.mark.fault(17)
@pytest.mark.parametrize("error", [DiskFull("no room"), HubUnavailable("busy", retry_after_s=3600)])
async def test_who_waits_for_room_goes_on_as_soon_as_it_is_made(
    weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch, error: NimhostError
) -> None:
    monkeypatch.setattr(pulls_module, "RETRY_S", (3600.0, 3600.0))
    fetch, tries = weights.fetch, 0

    async def fails_once(repo: Repo, token: str | None, tell: OnProgress, choice: Choice) -> Snapshot:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise error
        return await fetch(repo, token, tell, choice)

    monkeypatch.setattr(weights, "fetch", fails_once)
    pulls = Pulls(weights, store, secret)
    pull = await pulls.ask(ASKED)
    await eventually(lambda: pull.latest is not None and "trying again" in pull.latest.message)
    pulls.room_made()
    if isinstance(error, DiskFull):
        assert (await asyncio.wait_for(pull.task, 5))["status"] == "done"
    else:  # a hub that asked for time gets it
        assert not pull.hurry.is_set()
    await pulls.close()


@pytest.mark.fault(17)
@pytest.mark.fault(38)
async def test_a_pull_ends_also_when_the_end_cannot_be_noted(
    hub: FakeHub, weights: Weights, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.bytes_per_s = 2e5
    pulls = Pulls(weights, store, secret)
    pull = await pulls.ask(ASKED)
    await is_slow(hub)

    def full() -> None:
        raise DiskFull("the database cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(store, "transaction", full)
        with pytest.raises(DiskFull):
            await pulls.stop(REPO)
    assert (await outcome(pull))["error"] == "Stopped"
    assert await pulls.stop(REPO) is True

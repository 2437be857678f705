"""Updates of running deployments, in a whole daemon on a Docker in memory: what clients and users see of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.config import Deployments
from tests.fakes.containers import FakeContainer, fake_image
from tests.fakes.engine import Faults
from tests.support import eventually
from tests.world import IMAGE, MODELS, World

GATEWAY = "/apis/inference-gateway/v2/workspaces/default"
QUICK = Deployments(restart_backoff_s=0.05, start_limit=2)
Json = dict[str, Any]


@asynccontextmanager
async def a_world(directory: Path, gpus: int = 2, **settings: float) -> AsyncIterator[World]:
    """Engines do what their arguments say: `--crash`, `--slow` (never ready), `--long` (streams of a second)."""
    async with World(directory, gpus=gpus, deployments=replace(QUICK, **settings)) as world:

        async def start(container: FakeContainer) -> int:
            args = container.spec.args
            long = "--long" in args
            world.faults = Faults(
                unhealthy="--slow" in args, chunks=20 if long else None, chunk_delay_s=0.05 if long else 0.0
            )
            port = await world._start_engine(container)
            if "--crash" in args:
                world.docker.exit(container.id, 3, log="ValueError: no such parser")
            return port

        world.docker.on_start = start
        yield world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as world:
        yield world


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[World]:
    """One GPU: never room for two."""
    async with a_world(tmp_path, gpus=1) as world:
        yield world


async def update(world: World, name: str, *args: str, **executor: Any) -> None:
    """Another version of the config that it follows."""
    shown = (await world.http.get(f"{MODELS}/deployment-configs/{name}")).json()
    wish = {key: shown[key] for key in ("engine", "model_spec", "executor_config")}
    wish["executor_config"] |= {"additional_args": list(args), **executor}
    await world.post(f"{MODELS}/deployment-configs/{name}", wish)


async def rolled(world: World, name: str, *args: str) -> Json:
    """Once these arguments are what runs, and nothing else does."""

    async def there() -> Json | None:
        found = await world.deployment(name) or {}
        done = found["status"] == "READY" and found["update"] is None and running(world, name) == [args]
        return found if done else None

    found = await eventually(there, 10)
    assert found is not None
    return found


async def settled(world: World, name: str, update: str | None) -> Json:
    async def there() -> Json | None:
        found = await world.deployment(name) or {}
        assert (found["status"], found["update"]) == ("READY", update), found
        return found

    found = await eventually(there, 10)
    assert found is not None
    return found


def running(world: World, name: str) -> list[tuple[str, ...]]:
    """The arguments of its running containers."""
    return [tuple(c.spec.args) for c in of(world, name) if c.running]


def of(world: World, name: str) -> list[FakeContainer]:
    labelled = f"default/{name}"
    return [c for c in world.docker.containers.values() if c.seen.labels["io.nimhost.deployment"] == labelled]


async def chat(world: World, name: str, stream: bool = False) -> tuple[int, str, str]:
    """Status, who answered, body."""
    body = {"model": "fake", "stream": stream, "messages": [{"role": "user", "content": "Hello"}]}
    reply = await world.http.post(f"{GATEWAY}/provider/{name}/-/v1/chat/completions", json=body, timeout=30)
    return reply.status_code, reply.headers.get("x-fake-instance", ""), reply.text


@asynccontextmanager
async def clients(world: World, name: str, at_once: int = 4) -> AsyncIterator[Counter[int]]:
    """People who ask again and again; the statuses of their replies."""
    statuses: Counter[int] = Counter()
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            status = (await chat(world, name))[0]
            statuses[status] += 1
            # Whoever is refused comes again later. At once, and in this process, it would keep the interpreter's lock
            # from the database's thread: each statement of the reconciler would wait 5 ms for it, several times.
            await asyncio.sleep(0 if status == 200 else 0.01)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(ask())
        await eventually(lambda: statuses[200] > 5, 10)
        try:
            yield statuses
            seen = statuses[200]
            await eventually(lambda: statuses[200] > seen + 5, 10)
        finally:
            over.set()


# --- beside


async def test_an_update_under_load_fails_no_request(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    before = (await chat(world, "one"))[1]
    async with clients(world, "one") as statuses:
        for version in ("a", "b", "c"):
            await update(world, "one", "--version", version)
            await rolled(world, "one", "--version", version)
    assert set(statuses) == {200}
    assert (await chat(world, "one"))[1] != before
    entries = (await world.deployment("one") or {})["status_history"]
    first = next(i for i, entry in enumerate(entries) if entry["status"] == "READY")
    assert {entry["status"] for entry in entries[first:]} == {"READY"}


async def test_it_shows_that_it_rolls_and_which_version_serves(world: World) -> None:
    await world.deploy("one")
    await world.wait("one", "READY")
    assert (await world.deployment("one") or {})["serving"] == {"entity_version": 1, "config_version": 1}
    await update(world, "one", "--slow")
    shown = await world.wait("one", "READY", "Serving the previous version while the new one starts.")
    assert (shown["update"], shown["config_version"]) == ("rolling", 2)
    assert shown["serving"] == {"entity_version": 1, "config_version": 1}

    async def probed() -> bool:
        progress = (await world.http.get(f"{MODELS}/deployments/one/progress")).json()
        engine = (progress["progress"] or {}).get("engine") or {}
        return progress["update"] == "rolling" and "503" in engine.get("message", "")

    await eventually(probed, 5)
    await update(world, "one", "--good")
    shown = await rolled(world, "one", "--good")
    assert shown["serving"] == {"entity_version": 1, "config_version": 3}


async def test_a_stream_that_began_on_the_old_version_ends_there(world: World) -> None:
    await world.deploy("one", additional_args=["--long"])
    await world.wait("one", "READY")
    (old,) = of(world, "one")
    stream = asyncio.create_task(chat(world, "one", stream=True))
    await eventually(lambda: world.engines[old.id].open_streams > 0, 5)
    await update(world, "one", "--new")
    await settled(world, "one", None)
    assert not stream.done()
    assert old.running
    assert (await chat(world, "one"))[1] != old.id
    status, instance, text = await stream
    assert (status, instance, text.rstrip().endswith("data: [DONE]")) == (200, old.id, True)
    await rolled(world, "one", "--new")
    await eventually(lambda: old.id not in world.docker.containers, 5)


async def test_a_stream_that_never_ends_holds_the_old_version_only_so_long(tmp_path: Path) -> None:
    async with a_world(tmp_path, drain_timeout_s=0.3) as world:
        await world.deploy("one", additional_args=["--long"])
        await world.wait("one", "READY")
        (old,) = of(world, "one")
        world.engines[old.id].faults.chunks = 10_000
        stream = asyncio.create_task(chat(world, "one", stream=True))
        await eventually(lambda: world.engines[old.id].open_streams > 0, 5)
        await update(world, "one", "--new")
        await rolled(world, "one", "--new")
        await asyncio.wait({stream}, timeout=5)
        assert stream.done()


async def test_an_equal_config_restarts_nothing_and_a_new_version_of_the_deployment_does(world: World) -> None:
    await world.deploy("one", additional_args=["--same"])
    await world.wait("one", "READY")
    (first,) = of(world, "one")
    await update(world, "one", "--same")
    await world.deploy("other", gpu=0)
    await world.wait("other", "READY")  # a whole round later
    assert [c.id for c in of(world, "one")] == [first.id]
    await world.post(f"{MODELS}/deployments/one", {"config": "one"})  # nimhost deploy --refresh
    await eventually(lambda: running(world, "one") == [("--same",)] and first.id not in world.docker.containers, 10)
    await settled(world, "one", None)


async def test_all_that_follow_a_config_roll_and_the_pinned_one_does_not(tmp_path: Path) -> None:
    async with a_world(tmp_path, gpus=5) as world:
        await world.deploy("shared")
        for name in ("second", "third"):
            await world.post(f"{MODELS}/deployments", {"name": name, "config": "shared"})
        await world.post(f"{MODELS}/deployments", {"name": "pinned", "config": "shared", "config_version": 1})
        everyone = ("shared", "second", "third")
        for name in (*everyone, "pinned"):
            await world.wait(name, "READY")
        (pinned,) = of(world, "pinned")
        async with clients(world, "second") as statuses:
            await update(world, "shared", "--new")
            for name in everyone:
                await rolled(world, name, "--new")
        taken = [uuid for c in world.docker.containers.values() if c.running for uuid in c.seen.gpu_ids]
        assert len(taken) == len(set(taken)) == 4
        assert [c.id for c in of(world, "pinned")] == [pinned.id]
        assert set(statuses) <= {200, 503}  # there is one GPU beside: the others wait for it, or for their own


# --- in its place


async def test_a_replaced_version_ends_its_requests_first_and_new_ones_are_asked_to_wait(small: World) -> None:
    await small.deploy("one", additional_args=["--long"])
    await small.wait("one", "READY")
    (old,) = of(small, "one")
    stream = asyncio.create_task(chat(small, "one", stream=True))
    await eventually(lambda: small.engines[old.id].open_streams > 0, 5)
    await update(small, "one", "--new")
    await small.wait("one", "PENDING", "not GPUs enough for both")
    assert old.running
    reply = await small.http.post(f"{GATEWAY}/provider/one/-/v1/chat/completions", json={"model": "fake"})
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    status, _, text = await stream
    assert (status, text.rstrip().endswith("data: [DONE]")) == (200, True)
    await rolled(small, "one", "--new")


@pytest.mark.fault(22)
async def test_a_new_version_that_crashes_in_its_place_goes_back_by_itself(small: World) -> None:
    await small.deploy("one", additional_args=["--old"])
    await small.wait("one", "READY")
    await update(small, "one", "--crash")
    shown = await settled(small, "one", "failed")
    assert running(small, "one") == [("--old",)]
    assert (await chat(small, "one"))[0] == 200
    message = shown["status_message"]
    assert message.startswith("Serving the previous version: the new one failed.")
    assert "nimhost logs one" in message
    assert "ValueError: no such parser" in message
    assert shown["serving"]["config_version"] == 1
    assert "pull" not in small.docker.calls
    await update(small, "one", "--fixed")
    await rolled(small, "one", "--fixed")


@pytest.mark.fault(22)
async def test_a_new_version_that_crashes_beside_is_given_up_without_a_gap(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    async with clients(world, "one") as statuses:
        await update(world, "one", "--crash")
        await settled(world, "one", "failed")
    assert set(statuses) == {200}
    assert running(world, "one") == [("--old",)]
    logs = (await world.http.get(f"{MODELS}/deployments/one/logs")).text
    assert "ValueError: no such parser" in logs


async def test_a_new_version_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    async with a_world(tmp_path, gpus=1, start_timeout_s=0.5) as world:
        await world.deploy("one", additional_args=["--old"])
        await world.wait("one", "READY")
        await update(world, "one", "--slow")
        shown = await settled(world, "one", "failed")
        assert "not ready 0.5 s after its start" in shown["status_message"]
        assert running(world, "one") == [("--old",)]


async def test_when_neither_version_runs_any_more_the_error_names_both_causes(small: World) -> None:
    await small.deploy("one", additional_args=["--old"])
    await small.wait("one", "READY")
    small.docker.images.pop(IMAGE)  # somebody tidied up: what runs needs it no more, until it is started again
    small.docker.images["other:1"] = small.docker.registry["other:1"] = fake_image("other:1")
    await update(small, "one", "--crash", image_name="other", image_tag="1")
    ended = await small.wait("one", "ERROR")
    assert "exited with code 3" in ended["status_message"]
    assert "The previous version failed, too:" in ended["status_message"]
    assert running(small, "one") == []


async def test_start_tries_a_failed_update_again(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    world.docker.start_error = None
    await update(world, "one", "--crash")
    await settled(world, "one", "failed")
    tried = world.docker.calls.count("create")
    assert (await world.http.post(f"{MODELS}/deployments/one/start")).status_code == 200
    await eventually(lambda: world.docker.calls.count("create") == tried + QUICK.start_limit, 10)
    await settled(world, "one", "failed")
    assert running(world, "one") == [("--old",)]


# --- what happens meanwhile


async def test_two_updates_quickly_after_one_another_end_with_the_last(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    async with clients(world, "one") as statuses:
        await update(world, "one", "--slow")
        await eventually(lambda: ("--slow",) in running(world, "one"), 5)
        await update(world, "one", "--last")
        await rolled(world, "one", "--last")
    assert set(statuses) == {200}


async def test_the_old_wish_again_in_the_middle_changes_nothing(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    (old,) = of(world, "one")
    await update(world, "one", "--slow")
    await eventually(lambda: ("--slow",) in running(world, "one"), 5)
    await update(world, "one", "--old")
    await rolled(world, "one", "--old")
    await eventually(lambda: [c.id for c in of(world, "one")] == [old.id], 5)


async def test_the_old_wish_again_while_the_new_image_is_pulled_fails_no_request(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    (old,) = of(world, "one")
    world.docker.registry["other:1"] = fake_image("other:1")
    world.docker.pull_hangs = True
    async with clients(world, "one") as statuses:
        await update(world, "one", "--new", image_name="other", image_tag="1")
        await world.wait("one", "READY", "Pulling")
        await update(world, "one", "--old", image_name="fake-engine", image_tag="1")
        await settled(world, "one", None)
    assert [c.id for c in of(world, "one")] == [old.id]
    assert set(statuses) == {200}
    entries = (await world.deployment("one") or {})["status_history"]
    first = next(i for i, entry in enumerate(entries) if entry["status"] == "READY")
    assert {entry["status"] for entry in entries[first:]} == {"READY"}


async def test_two_rolls_that_both_need_the_last_free_gpu_are_done_one_after_the_other(tmp_path: Path) -> None:
    async with a_world(tmp_path, gpus=3) as world:
        await world.deploy("one", additional_args=["--old"])
        await world.post(f"{MODELS}/deployments", {"name": "two", "config": "one"})
        for name in ("one", "two"):
            await world.wait(name, "READY")
        await update(world, "one", "--new", gpu=2)  # both at once

        async def one_is_done() -> str | None:
            found = [name for name in ("one", "two") if running(world, name) == [("--new",)]]
            return found[0] if found else None

        winner = await eventually(one_is_done, 10)
        other = "two" if winner == "one" else "one"
        shown = await world.wait(other, "READY", "Waiting for GPUs")
        assert (shown["update"], running(world, other)) == ("rolling", [("--old",)])
        seen = len(shown["status_history"])
        await asyncio.sleep(0.5)  # it would flap, twenty times a second
        assert len((await world.deployment(other) or {})["status_history"]) == seen
        await world.delete(winner or "")
        await rolled(world, other, "--new")


async def test_a_stop_in_the_middle_frees_everything_and_a_start_goes_on(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    await update(world, "one", "--slow")
    await eventually(lambda: len(running(world, "one")) == 2, 5)
    await world.http.post(f"{MODELS}/deployments/one/stop")
    await eventually(lambda: of(world, "one") == [], 10)
    await update(world, "one", "--new")
    await world.http.post(f"{MODELS}/deployments/one/start")
    await rolled(world, "one", "--new")


@pytest.mark.fault(4)
async def test_a_deletion_in_the_middle_leaves_nothing(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    await update(world, "one", "--slow")
    await eventually(lambda: len(running(world, "one")) == 2, 5)
    await world.delete("one")
    await world.gone("one")
    assert world.docker.containers == {}


@pytest.mark.fault(22)
async def test_an_old_version_that_crashes_during_a_roll_comes_back_until_the_new_one_is_ready(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    (old,) = of(world, "one")
    await update(world, "one", "--slow")
    await eventually(lambda: len(running(world, "one")) == 2, 5)
    world.docker.exit(old.id, 1, log="boom")

    async def back() -> bool:
        return (await chat(world, "one"))[0] == 200

    await eventually(back, 10)
    await settled(world, "one", "rolling")
    assert sorted(running(world, "one")) == [("--old",), ("--slow",)]


@pytest.mark.fault(21)
async def test_docker_goes_away_in_the_middle_and_the_roll_goes_on(world: World) -> None:
    await world.deploy("one", additional_args=["--old"])
    await world.wait("one", "READY")
    world.docker.start_held.clear()
    await update(world, "one", "--new")
    await world.wait("one", "READY", "Serving the previous version while the new one starts")
    world.docker.away = True
    world.docker.start_held.set()
    await world.wait("one", "UNKNOWN")
    world.docker.away = False
    await rolled(world, "one", "--new")


@pytest.mark.fault(20)
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("new", [("--new",), ("--crash",)])
@pytest.mark.parametrize("stage", ["Serving the previous", "Replacing", "Container created", "Trying again", "failed"])
async def test_a_restart_in_the_middle_of_a_roll(tmp_path: Path, gpus: int, new: Sequence[str], stage: str) -> None:
    """Whether or not that stage is seen: wherever the daemon is stopped, the next one ends as this one would have."""
    async with a_world(tmp_path, gpus=gpus) as world:
        await world.deploy("one", additional_args=["--old"])
        await world.wait("one", "READY")
        await update(world, "one", *new)
        with suppress(AssertionError):
            await eventually(lambda: _said(world, stage), 0.4)
        await world.restart()
        if "--crash" in new:
            shown = await settled(world, "one", "failed")
            assert running(world, "one") == [("--old",)]
            assert shown["serving"]["config_version"] == 1
        else:
            await rolled(world, "one", "--new")
        assert (await chat(world, "one"))[0] == 200


async def _said(world: World, words: str) -> bool:
    return words in (await world.deployment("one") or {})["status_message"]

"""What the cache holds, what of it can go, and whether it is still what was fetched."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from nimhost.errors import WeightsMissing
from nimhost.host.weights import Limits, Repo, Weights
from nimhost.host.weights import inventory as weights_inventory
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.inventory import Held, scan
from nimhost.host.weights.prune import remove
from nimhost.host.weights.verify import verify
from tests.fakes.hub import FakeHub
from tests.fakes.ngc import KEY, FakeNgc
from tests.host.weights_world import BIG, MIB, content, interrupt_at, nobody, only
from tests.support import eventually

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 16384}
NEWER = {"config.json": b'{"a": 2}', "model.safetensors": FILES["model.safetensors"]}
SIZE = sum(map(len, FILES.values()))
QUICK = Limits(stall_s=0.5, tries=4, backoff_s=0.05, part_bytes=MIB)
PUBLISHED = {"org/big": FILES}


def silent(done: int, total: int) -> None:
    pass


async def fetch(hub: FakeHub, cache: Path, repo: Repo = BIG) -> str:
    return (await Weights(cache, hub.url, False, QUICK).fetch(repo, None, nobody)).path


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


# --- what there is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
def test_a_cache_without_anything_is_empty(tmp_path: Path, make: object) -> None:
    make(tmp_path / "hub")  # type: ignore[operator]
    assert scan(tmp_path / "hub") == []


async def test_a_fetched_snapshot_is_whole_and_ours(hub: FakeHub, cache: Path) -> None:
    path = await fetch(hub, cache)
    held = only(cache)
    assert (held.repo.repo_id, held.repo.revision) == ("org/big", Path(path).name)
    assert (held.names, held.state, held.ours) == (("main",), "complete", True)
    assert held.size_bytes == held.own_bytes == SIZE


async def test_what_snapshots_share_is_counted_with_each_but_freed_with_none(hub: FakeHub, cache: Path) -> None:
    await fetch(hub, cache)
    hub.add("org/big", NEWER)
    (cache / "models--org--big" / "refs" / "main").unlink()
    await fetch(hub, cache)
    held = scan(cache)
    assert [h.size_bytes for h in held] == [SIZE, SIZE]
    assert [h.own_bytes for h in held] == [len(FILES["config.json"])] * 2


async def test_what_another_tool_fetched_is_theirs(hub: FakeHub, cache: Path) -> None:
    snapshot_download("org/big", cache_dir=cache, endpoint=hub.url, token=False)
    assert (only(cache).state, only(cache).ours) == ("complete", False)
    await fetch(hub, cache)
    assert (only(cache).state, only(cache).ours) == ("complete", False), "verified is not fetched"


async def test_half_a_download_is_partial_and_goes_on_being_ours(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), MIB)
    held = only(cache)
    assert (held.repo.revision, held.state, held.ours) == ("", "partial", True)
    assert 0 < held.size_bytes < SIZE + MIB


async def test_a_snapshot_that_lost_a_file_is_partial(hub: FakeHub, cache: Path) -> None:
    path = await fetch(hub, cache)
    (Path(path) / "model.safetensors").unlink()
    states = {(h.repo.revision != "", h.state) for h in scan(cache)}
    assert states == {(True, "partial"), (False, "partial")}


async def test_what_comes_from_ngc_is_listed_too(cache: Path) -> None:
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/tiny", "1.0", FILES)
        repo = Repo("nvidia/nemo/tiny", "latest", "model", ngc.url, registry="ngc")
        await Weights(cache, ngc.url, False, QUICK).fetch(repo, KEY, nobody)
    held = only(cache)
    assert (str(held.repo), held.names, held.state, held.ours) == (
        "ngc://nvidia/nemo/tiny:1.0", ("latest",), "complete", True
    )  # fmt: skip


def test_folders_that_cannot_be_repositories_are_left_alone(cache: Path) -> None:
    for name in ("models--a--b--c", "models--..", "version.txt", "models", "xet"):
        (cache / name / "snapshots" / "x").mkdir(parents=True)
    assert scan(cache) == []


# --- what can go ---------------------------------------------------------------------------------------------------


async def test_a_removed_snapshot_leaves_nothing(hub: FakeHub, cache: Path) -> None:
    await fetch(hub, cache)
    freed = remove(cache, only(cache))
    assert freed is not None
    assert freed >= SIZE
    assert scan(cache) == []
    assert files_in(cache) == [".nimhost/promised/.gate"]
    assert Weights(cache, hub.url, False).present(BIG) is None


async def test_what_another_snapshot_needs_stays(hub: FakeHub, cache: Path) -> None:
    old = Path(await fetch(hub, cache)).name
    hub.add("org/big", NEWER)
    (cache / "models--org--big" / "refs" / "main").unlink()
    newer = await fetch(hub, cache)
    held = next(h for h in scan(cache) if h.repo.revision == old)
    remove(cache, held)
    assert content(newer) == NEWER
    assert only(cache).repo.revision == Path(newer).name
    assert Weights(cache, hub.url, False).present(BIG) is not None


async def test_half_a_download_can_be_removed(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 1e6
    await interrupt_at(Weights(cache, hub.url, False, QUICK), MIB)
    assert (remove(cache, only(cache)) or 0) > MIB // 2
    assert files_in(cache) == [".nimhost/promised/.gate"]


async def test_files_of_other_tools_beside_ours_stay(hub: FakeHub, cache: Path) -> None:
    await fetch(hub, cache)
    theirs = cache / "models--org--big" / "blobs" / ("f" * 40)
    theirs.write_bytes(b"theirs")
    remove(cache, only(cache))
    assert files_in(cache) == [".nimhost/promised/.gate", f"models--org--big/blobs/{'f' * 40}"]
    assert scan(cache) == []


async def test_what_is_being_fetched_is_not_touched(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 3e5
    task = asyncio.create_task(fetch(hub, cache))
    await eventually(lambda: hub.sent_bytes() > MIB // 4)
    assert remove(cache, only(cache)) is None
    hub.faults.bytes_per_s = None
    assert content(await task) == FILES


@pytest.mark.fault(20)
@pytest.mark.parametrize("calls", range(6))
async def test_killed_in_the_middle_it_is_never_taken_for_whole_and_goes_next_time(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Every step that changes the disk is the last one once."""
    await fetch(hub, cache)
    held, left = only(cache), [calls]

    class Killed(BaseException):
        pass

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            step(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with pytest.raises(Killed):
            remove(cache, held)
    if calls:
        assert Weights(cache, hub.url, False).present(BIG) is None or only(cache).state == "complete"
    for again in scan(cache):
        assert again.ours
        remove(cache, again)
    assert scan(cache) == []
    assert [path for path in files_in(cache) if not path.startswith(".nimhost/")] == []


async def test_what_another_tool_brings_where_ours_was_is_theirs(hub: FakeHub, cache: Path) -> None:
    path = Path(await fetch(hub, cache))
    for blob in [p.resolve() for p in path.iterdir()]:
        same = blob.read_bytes()
        blob.with_suffix(".new").write_bytes(same)
        blob.with_suffix(".new").replace(blob)
    assert (only(cache).state, only(cache).ours) == ("complete", False)


# --- whether it is still what was fetched --------------------------------------------------------------------------


async def test_sound_weights_are_sound(hub: FakeHub, cache: Path) -> None:
    await fetch(hub, cache)
    heard: list[tuple[int, int]] = []
    found = verify(cache, BIG, lambda done, total: heard.append((done, total)))
    assert {f.verdict for f in found.files} == {"ok"}
    assert heard[-1] == (SIZE, SIZE)


@pytest.mark.fault(16)
async def test_a_changed_byte_is_found_not_served_and_healed_by_the_next_fetch(hub: FakeHub, cache: Path) -> None:
    path = await fetch(hub, cache)
    blob = (Path(path) / "model.safetensors").resolve()
    with blob.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x")
    found = verify(cache, BIG, silent)
    assert found.damaged == ["model.safetensors"]
    assert only(cache).state == "damaged"
    weights = Weights(cache, hub.url, False, QUICK)
    assert weights.present(BIG) is None
    hub.forget()
    healed = await weights.fetch(BIG, None, nobody)
    assert content(healed.path) == FILES
    assert hub.sent_bytes() == len(FILES["model.safetensors"])
    assert verify(cache, BIG, silent).damaged == []


@pytest.mark.fault(16)
async def test_what_is_healed_while_it_is_verified_stays_healed(hub: FakeHub, cache: Path) -> None:
    """Reading takes minutes, and what it read may have been replaced by then."""
    path = await fetch(hub, cache)
    (Path(path) / "model.safetensors").resolve().write_bytes(b"x" * len(FILES["model.safetensors"]))
    verify(cache, BIG, silent)
    repo, commit = RepoCache(cache, BIG), Path(path).name

    def heal(done: int, total: int) -> None:
        if done == total:
            (Path(path) / "model.safetensors").resolve().write_bytes(FILES["model.safetensors"])
            repo.write_manifest(commit, repo.files_there(commit), verified=True)

    (Path(path) / "config.json").resolve().write_bytes(b'{"b": 1}')
    assert verify(cache, BIG, heal).damaged != []
    assert Weights(cache, hub.url, False, QUICK).present(BIG) is not None


async def test_what_nimhost_fetched_stays_its_own_when_it_is_damaged_and_can_be_removed(
    hub: FakeHub, cache: Path
) -> None:
    blob = (Path(await fetch(hub, cache)) / "model.safetensors").resolve()
    with blob.open("r+b") as file:
        file.write(b"x")
    os.utime(blob, ns=(1, 1))
    assert not only(cache).ours, "changed by somebody: not known to be damaged yet"
    verify(cache, BIG, silent)
    held = only(cache)
    assert (held.state, held.ours) == ("damaged", True)
    assert remove(cache, held)
    assert not blob.exists()


async def test_a_damaged_file_that_another_tool_put_there_is_not_ours(hub: FakeHub, cache: Path) -> None:
    blob = (Path(await fetch(hub, cache)) / "model.safetensors").resolve()
    theirs = blob.with_name("theirs")
    theirs.write_bytes(b"x" * blob.stat().st_size)
    theirs.replace(blob)
    verify(cache, BIG, silent)
    held = only(cache)
    assert (held.state, held.ours, remove(cache, held)) == ("damaged", False, None)


@pytest.mark.fault(16)
async def test_lost_and_cut_files_are_named(hub: FakeHub, cache: Path) -> None:
    path = Path(await fetch(hub, cache))
    (path / "config.json").unlink()
    os.truncate((path / "model.safetensors").resolve(), 5)
    found = {f.path: f.verdict for f in verify(cache, BIG, silent).files}
    assert found == {"config.json": "missing", "model.safetensors": "size"}


@pytest.mark.fault(16)
async def test_damage_in_what_another_tool_fetched_is_found_by_its_blob_names(hub: FakeHub, cache: Path) -> None:
    path = Path(snapshot_download("org/big", cache_dir=cache, endpoint=hub.url, token=False))
    assert verify(cache, BIG, silent).damaged == []
    (path / "config.json").resolve().write_bytes(b'{"b": 1}')
    assert verify(cache, BIG, silent).damaged == ["config.json"]
    assert Weights(cache, hub.url, False, QUICK).present(BIG) is None
    assert content(await fetch(hub, cache)) == FILES


async def test_files_without_a_promised_hash_are_held_against_the_recorded_one(cache: Path) -> None:
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/tiny", "1.0", FILES).hashes = False
        repo = Repo("nvidia/nemo/tiny", "1.0", "model", ngc.url, registry="ngc")
        got = await Weights(cache, ngc.url, False, QUICK).fetch(repo, KEY, nobody)
    assert {f.verdict for f in verify(cache, repo, silent).files} == {"ok"}
    (Path(got.path) / "config.json").resolve().write_bytes(b'{"b": 1}')
    assert verify(cache, repo, silent).damaged == ["config.json"]


def test_what_is_not_there_cannot_be_verified(cache: Path) -> None:
    with pytest.raises(WeightsMissing, match="org/big is not in"):
        verify(cache, BIG, silent)


async def test_verifying_can_be_ended(hub: FakeHub, cache: Path) -> None:
    await fetch(hub, cache)

    class Enough(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        verify(cache, BIG, enough)


def test_the_gate_is_left_open(cache: Path) -> None:
    """Whoever removes holds it only for that long."""
    held = Held(repo=Repo("org/gone", "a" * 40), state="complete", size_bytes=0, own_bytes=0, ours=True, used_at=0)
    assert remove(cache, held) is None
    fd = os.open(cache / ".nimhost" / "promised" / ".gate", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    assert weights_inventory.scan(cache) == []

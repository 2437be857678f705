from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop
from huggingface_hub import scan_cache_dir, snapshot_download

from nimhost.errors import WeightsGated, WeightsMissing
from nimhost.host.weights import Limits, Repo, Weights, WeightsProgress, cache_dir_from
from nimhost.host.weights.cache import RepoCache
from tests.fakes.hub import FakeHub
from tests.host.weights_world import TINY, children, content, nobody
from tests.support import eventually

FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer.json": b"{}",
    "sub/vocab.txt": b"a\nb\n",
    "empty.txt": b"",
    "model.safetensors": bytes(range(256)) * 8000,
    "pytorch_model.bin": b"the same again",
}
KEPT = {path: content for path, content in FILES.items() if path != "pytorch_model.bin"}
SIZE = sum(map(len, KEPT.values()))
QUICK = Limits(stall_s=0.5, tries=4, backoff_s=0.05)
PUBLISHED = {"org/tiny": FILES}
PAGE_SIZE = 3


async def test_fetched_weights_are_whole_and_chosen(hub: FakeHub, cache: Path) -> None:
    news: list[WeightsProgress] = []
    weights = Weights(cache, hub.url, False, QUICK)
    assert weights.present(TINY) is None
    got = await weights.fetch(TINY, None, news.append)
    assert content(got.path) == KEPT
    assert got.commit == hub.repos["org/tiny"].commit
    assert got.size_bytes == SIZE
    assert Path(got.path).is_relative_to(got.repo_dir)
    assert Path(got.repo_dir) == cache / "models--org--tiny"
    assert weights.present(TINY) == got
    assert (news[-1].done_bytes, news[-1].total_bytes) == (SIZE, SIZE)
    assert hub.leaked == []


async def test_second_fetch_moves_no_byte_and_asks_nobody(hub: FakeHub, cache: Path) -> None:
    first = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    hub.forget()
    assert await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody) == first
    assert hub.requests == []


async def test_links_are_relative_so_that_one_mounted_folder_is_enough(hub: FakeHub, cache: Path) -> None:
    got = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    links = [path for path in Path(got.path).rglob("*") if path.is_symlink()]
    assert len(links) == len(KEPT)
    assert not any(os.path.isabs(os.readlink(link)) for link in links)
    moved = Path(got.repo_dir).rename(cache / "mounted")
    assert content(moved / "snapshots" / got.commit) == KEPT


async def test_everybody_may_read_what_was_fetched(hub: FakeHub, cache: Path) -> None:
    before = os.umask(0o077)
    try:
        got = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    finally:
        os.umask(before)
    for path in [Path(got.repo_dir), *Path(got.repo_dir).rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o555 == 0o555 if path.is_dir() else mode & 0o444 == 0o444, path


async def test_what_another_tool_kept_to_itself_is_opened(hub: FakeHub, cache: Path) -> None:
    path = Path(snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url, token=False, ignore_patterns="*.txt"))
    blob = (path / "model.safetensors").resolve()
    blob.chmod(0o600)
    path.chmod(0o700)
    await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    assert stat.S_IMODE(blob.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


async def test_other_tools_read_our_cache_offline(hub: FakeHub, cache: Path) -> None:
    got = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    assert snapshot_download("org/tiny", cache_dir=cache, local_files_only=True) == got.path
    assert [repo.repo_id for repo in scan_cache_dir(cache).repos] == ["org/tiny"]
    hub.forget()
    assert snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url, token=False) == got.path
    assert hub.sent_bytes("model.safetensors") == 0


async def test_what_another_tool_fetched_is_used_without_the_hub(hub: FakeHub, cache: Path) -> None:
    path = snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url, token=False)
    hub.faults.down = True
    got = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    assert got.path == path


async def test_what_another_tool_left_out_is_added(hub: FakeHub, cache: Path) -> None:
    snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url, token=False, ignore_patterns="*.json")
    weights = Weights(cache, hub.url, False, QUICK)
    assert weights.present(TINY) is None
    hub.forget()
    got = await weights.fetch(TINY, None, nobody)
    assert content(got.path).items() >= KEPT.items()
    assert hub.sent_bytes("model.safetensors") == 0


async def test_two_that_want_the_same_share_one_download(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 4e6
    weights = Weights(cache, hub.url, False, QUICK)
    first, second = await asyncio.gather(*(weights.fetch(TINY, None, nobody) for _ in range(2)))
    assert first == second
    assert hub.sent_bytes() == SIZE


async def test_two_daemons_fetch_each_file_once(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e6
    daemons = [Weights(cache, hub.url, False, QUICK) for _ in range(2)]
    first, second = await asyncio.gather(*(daemon.fetch(TINY, None, nobody) for daemon in daemons))
    assert first == second
    assert hub.sent_bytes() == SIZE


@pytest.mark.fault(2)
async def test_who_has_a_good_token_is_not_refused_with_who_has_none(hub: FakeHub, cache: Path) -> None:
    hub.add("org/gated", FILES, gated=True, readers=("hf_good",))
    weights, gated = Weights(cache, hub.url, False, QUICK), Repo("org/gated")
    *_, good = await asyncio.gather(
        *(weights.fetch(gated, token, nobody) for token in ("hf_wrong", "hf_good")), return_exceptions=True
    )
    assert not isinstance(good, BaseException)
    assert content(good.path) == KEPT


async def test_one_who_leaves_does_not_stop_the_others(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e6
    weights = Weights(cache, hub.url, False, QUICK)
    leaving, staying = (asyncio.create_task(weights.fetch(TINY, None, nobody)) for _ in range(2))
    await eventually(lambda: hub.sent_bytes() > 0)
    leaving.cancel()
    assert content((await staying).path) == KEPT
    assert leaving.cancelled()


async def test_when_the_last_one_leaves_the_process_is_gone_at_once(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e5
    weights = Weights(cache, hub.url, False, QUICK)
    fetch = asyncio.create_task(weights.fetch(TINY, None, nobody))
    await eventually(lambda: hub.sent_bytes() > 100_000)
    (child,) = children()
    fetch.cancel()
    await asyncio.wait([fetch], timeout=1)
    assert fetch.cancelled()
    assert not Path(f"/proc/{child}").exists()
    hub.faults.bytes_per_s = None
    assert content((await weights.fetch(TINY, None, nobody)).path) == KEPT
    assert any(start > 0 for start in hub.starts("model.safetensors"))


async def test_download_process_that_hangs_is_gone_too(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e5
    fetch = asyncio.create_task(Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody))
    await eventually(lambda: hub.sent_bytes() > 0)
    (child,) = children()
    os.kill(child, signal.SIGSTOP)
    fetch.cancel()
    await asyncio.wait([fetch], timeout=2)
    assert fetch.cancelled()
    assert not Path(f"/proc/{child}").exists()


async def test_close_stops_downloads(hub: FakeHub, cache: Path) -> None:
    hub.faults.bytes_per_s = 2e5
    weights = Weights(cache, hub.url, False, QUICK)
    fetch = asyncio.create_task(weights.fetch(TINY, None, nobody))
    await eventually(lambda: hub.sent_bytes() > 0)
    await weights.close()
    assert children() == []
    with pytest.raises(asyncio.CancelledError):
        await fetch


async def test_revisions_stand_side_by_side_and_share_blobs(hub: FakeHub, cache: Path) -> None:
    weights = Weights(cache, hub.url, False, QUICK)
    old = await weights.fetch(TINY, None, nobody)
    hub.add("org/tiny", {**FILES, "config.json": b'{"new": true}'}, branches=("main", "refs/pr/1"))
    hub.forget()
    new = await weights.fetch(Repo("org/tiny", "refs/pr/1"), None, nobody)
    assert new.commit != old.commit
    assert content(new.path)["config.json"] == b'{"new": true}'
    assert hub.sent_bytes() == len(b'{"new": true}')
    assert weights.present(Repo("org/tiny", old.commit)) == old
    assert weights.present(Repo("org/tiny", new.commit)) == new


async def test_repository_on_another_hub(hub: FakeHub, cache: Path) -> None:
    weights = Weights(cache, "http://127.0.0.1:9", False, QUICK)
    assert content((await weights.fetch(Repo("org/tiny", endpoint=hub.url), None, nobody)).path) == KEPT


async def test_gated_repository_says_how_to_get_in(hub: FakeHub, cache: Path) -> None:
    hub.add("org/gated", FILES, gated=True, readers=("hf_reader",))
    hub.tokens.add("hf_stranger")
    weights = Weights(cache, hub.url, False, QUICK)
    with pytest.raises(WeightsGated, match="needs a token") as without:
        await weights.fetch(Repo("org/gated"), None, nobody)
    assert f"{hub.url}/org/gated" in str(without.value.hint)
    assert "nimhost secrets create" in str(without.value.hint)
    with pytest.raises(WeightsGated, match="has no access"):
        await weights.fetch(Repo("org/gated"), "hf_stranger", nobody)
    with pytest.raises(WeightsGated, match="refuses the token"):
        await weights.fetch(Repo("org/gated"), "hf_invalid", nobody)
    assert content((await weights.fetch(Repo("org/gated"), "hf_reader", nobody)).path) == KEPT
    assert hub.leaked == []


async def test_renamed_repository_is_followed_with_its_token(hub: FakeHub, cache: Path) -> None:
    hub.add("org/gated", FILES, gated=True, readers=("hf_reader",))
    hub.renamed["org/old-name"] = "org/gated"
    got = await Weights(cache, hub.url, False, QUICK).fetch(Repo("org/old-name"), "hf_reader", nobody)
    assert content(got.path) == KEPT
    assert hub.leaked == []


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        (Repo("org/absent"), "there is no repository org/absent"),
        (Repo("org/private"), "or it is private"),
        (Repo("org/tiny", "v9"), "no revision 'v9'"),
        (Repo("org/quants"), "only 2 GGUF files"),
        (Repo("org/readme"), "has no weights"),
        (Repo("../../etc"), "not a repository name"),
        (Repo("org/tiny", "../../../x"), "not a revision"),
        (Repo("org/tiny", endpoint="file:///etc"), "not an address"),
    ],
)
async def test_missing_repository_says_what_is_missing(hub: FakeHub, cache: Path, repo: Repo, message: str) -> None:
    hub.add("org/private", FILES, private=True)
    hub.add("org/quants", {"a-Q4.gguf": b"4", "a-Q8.gguf": b"8"})
    hub.add("org/readme", {"README.md": b"soon"})
    with pytest.raises(WeightsMissing, match=message) as missing:
        await Weights(cache, hub.url, False, QUICK).fetch(repo, None, nobody)
    assert missing.value.final


async def test_missing_is_final_and_not_asked_for_again(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(WeightsMissing):
        await Weights(cache, hub.url, False, QUICK).fetch(Repo("org/absent"), None, nobody)
    assert hub.requests == ["GET /api/models/org/absent/revision/main"]


async def test_offline_uses_what_is_there_and_says_what_is_not(hub: FakeHub, cache: Path) -> None:
    offline = Weights(cache, hub.url, True, QUICK)
    with pytest.raises(WeightsMissing, match="work offline") as missing:
        await offline.fetch(TINY, None, nobody)
    assert "hf download org/tiny" in str(missing.value.hint)
    assert hub.requests == []
    got = await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    hub.forget()
    assert await offline.fetch(TINY, None, nobody) == got
    assert hub.requests == []


async def test_paths_that_lead_outside_are_refused(hub: FakeHub, cache: Path) -> None:
    hub.add("org/evil", {"../../../outside.safetensors": b"x"})
    with pytest.raises(Exception, match="outside of the cache"):
        await Weights(cache, hub.url, False, QUICK).fetch(Repo("org/evil"), None, nobody)
    assert not list(cache.parent.glob("**/outside*"))


def test_fetches_on_the_daemons_own_loop(hub: FakeHub, cache: Path) -> None:
    got = uvloop.run(Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody))
    assert content(got.path) == KEPT


@pytest.mark.parametrize(
    ("env", "path"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/huggingface/hub"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/x", "HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "/new"),
    ],
)
def test_cache_is_where_other_tools_look(env: dict[str, str], path: str) -> None:
    assert cache_dir_from(env) == Path(path)
    program = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == path


async def test_the_disk_is_never_looked_at_on_the_event_loop(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = threading.get_ident(), set[int]()
    find = RepoCache.find

    def noting(self: RepoCache, **how: bool) -> object:
        seen.add(threading.get_ident())
        return find(self, **how)

    monkeypatch.setattr(RepoCache, "find", noting)
    await Weights(cache, hub.url, False, QUICK).fetch(TINY, None, nobody)
    assert seen
    assert own not in seen

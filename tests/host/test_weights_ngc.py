"""Weights from NGC: the same rules as for a hub, over another API."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nimhost.errors import HostError, HubUnavailable, WeightsCorrupt, WeightsGated, WeightsMissing
from nimhost.host.weights import Limits, Repo, Weights, WeightsProgress
from nimhost.host.weights.ngc import Ngc
from tests.fakes.ngc import KEY, FakeNgc
from tests.support import eventually

MIB = 1 << 20
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "sub/tokenizer.json": b"{}",
    "a b+c.txt": b"a name that has to be quoted",
    "model-00001-of-00002.safetensors": random.Random(1).randbytes(3 * MIB),
    "model-00002-of-00002.safetensors": random.Random(2).randbytes(3 * MIB),
}
SIZE = sum(map(len, FILES.values()))
QUICK = Limits(stall_s=0.5, tries=4, backoff_s=0.05, part_bytes=MIB)
NAME = "nvidia/nemo/tiny"


@pytest.fixture
def ngc() -> Iterator[FakeNgc]:
    with FakeNgc() as fake:
        fake.publish(NAME, "1.0", {"config.json": b"{}", "model.safetensors": b"old"})
        fake.publish(NAME, "1.1+fp8", FILES)
        yield fake


def repo(ngc: FakeNgc, version: str = "1.1+fp8", name: str = NAME, kind: str = "model") -> Repo:
    return Repo(name, version, kind, ngc.url, registry="ngc")


def weights_at(cache: Path) -> Weights:
    return Weights(cache, "http://127.0.0.1:9", False, QUICK)


def nobody(_: WeightsProgress) -> None:
    pass


def content(root: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


async def test_a_version_arrives_whole_and_is_found_again_without_ngc(ngc: FakeNgc, cache: Path) -> None:
    news: list[WeightsProgress] = []
    got = await weights_at(cache).fetch(repo(ngc), KEY, news.append)
    assert content(got.path) == FILES
    assert (got.commit, got.size_bytes) == ("1.1+fp8", SIZE)
    assert Path(got.path).is_relative_to(got.repo_dir)
    assert (news[-1].done_bytes, news[-1].total_bytes) == (SIZE, SIZE)
    assert ngc.leaked == [], "the key is for NGC alone"
    ngc.faults.down = True
    assert await weights_at(cache).fetch(repo(ngc), None, nobody) == got


async def test_nothing_of_ngc_lies_where_tools_of_hugging_face_look(ngc: FakeNgc, cache: Path) -> None:
    await weights_at(cache).fetch(repo(ngc), KEY, nobody)
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []


async def test_the_newest_version_is_fetched_where_none_is_named(ngc: FakeNgc, cache: Path) -> None:
    weights = weights_at(cache)
    got = await weights.fetch(repo(ngc, "latest"), KEY, nobody)
    assert got.commit == "1.1+fp8"
    assert weights.present(repo(ngc, "latest")) == got == weights.present(repo(ngc))
    assert weights.present(repo(ngc, "1.0")) is None


async def test_an_artifact_of_no_team_has_a_path_without_one(ngc: FakeNgc, cache: Path) -> None:
    ngc.publish("nvidia/no-team/tiny", "1", FILES)
    got = await weights_at(cache).fetch(repo(ngc, "1", "nvidia/no-team/tiny"), KEY, nobody)
    assert content(got.path) == FILES
    assert "GET /v2/org/nvidia/models/tiny/versions/1/files" in ngc.requests


async def test_everything_of_a_resource_is_fetched(ngc: FakeNgc, cache: Path) -> None:
    files = {"notes.pdf": b"pdf", "weights.onnx": b"onnx"}
    ngc.publish("nvidia/nemo/data", "1", files, kind="resources")
    got = await weights_at(cache).fetch(repo(ngc, "1", "nvidia/nemo/data", "resource"), KEY, nobody)
    assert content(got.path) == files


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("key", "change", "error", "says", "helps"),
    [
        (None, {}, WeightsGated, "NGC wants an API key", "nimhost secrets create ngc-key"),
        ("nvapi-wrong", {}, WeightsGated, "NGC refuses the API key", "org.ngc.nvidia.com/setup/api-keys"),
        ("legacy", {}, WeightsGated, "has to begin with nvapi-", "nimhost secrets create ngc-key"),
        (KEY, {"readers": ("nvapi-other",)}, WeightsGated, "the API key has no access to NGC model", "Catalog"),
        (KEY, {"licence": True}, WeightsGated, "the licence of NGC model .* has not been accepted", "catalog.ngc"),
        (KEY, {"kind": "resources"}, WeightsMissing, "there is no NGC model nvidia/nemo/tiny", "target_type = res"),
        (KEY, {"versions": ["0.9"]}, WeightsMissing, "has no version '1.1.fp8'. Its newest version is 0.9", "See"),
    ],
)
async def test_each_refusal_says_what_to_do(
    ngc: FakeNgc, cache: Path, key: str | None, change: dict[str, object], error: type[HostError], says: str, helps: str
) -> None:
    for field, value in change.items():
        setattr(ngc.artifacts[NAME], field, value)
    with pytest.raises(error, match=says) as refused:
        await weights_at(cache).fetch(repo(ngc), key, nobody)
    assert helps in (refused.value.hint or "")
    assert refused.value.final
    assert ngc.sent_bytes() == 0
    assert key is None or key not in f"{refused.value.message}{refused.value.hint}"


@pytest.mark.fault(14)
async def test_a_busy_ngc_is_asked_again(ngc: FakeNgc, cache: Path) -> None:
    ngc.faults.busy, ngc.faults.retry_after_s = 3, 0.1
    assert content((await weights_at(cache).fetch(repo(ngc), KEY, nobody)).path) == FILES


@pytest.mark.fault(14)
async def test_an_ngc_that_is_down_is_named(ngc: FakeNgc, cache: Path) -> None:
    ngc.faults.down = True
    with pytest.raises(HubUnavailable, match=r"^http://127\.0\.0\.1:\d+: .*4 times in a row") as away:
        await weights_at(cache).fetch(repo(ngc), KEY, nobody)
    assert not away.value.final


@pytest.mark.fault(16)
async def test_a_damaged_file_is_fetched_again_and_refused_when_it_stays_so(ngc: FakeNgc, cache: Path) -> None:
    ngc.faults.corrupt = 1
    assert content((await weights_at(cache).fetch(repo(ngc), KEY, nobody)).path) == FILES
    ngc.faults.corrupt = 100
    with pytest.raises(WeightsCorrupt):
        await weights_at(cache / "other").fetch(repo(ngc), KEY, nobody)


@pytest.mark.fault(18)
async def test_a_broken_off_download_goes_on_where_it_was(ngc: FakeNgc, cache: Path) -> None:
    ngc.faults.bytes_per_s = 2e6
    news: list[WeightsProgress] = []
    fetch = asyncio.create_task(weights_at(cache).fetch(repo(ngc), KEY, news.append))
    await eventually(lambda: bool(news) and news[-1].done_bytes > SIZE // 2)
    fetch.cancel()
    await asyncio.wait([fetch])
    ngc.faults.bytes_per_s = None
    assert content((await weights_at(cache).fetch(repo(ngc), KEY, nobody)).path) == FILES
    assert ngc.sent_bytes() - SIZE < QUICK.parallel * MIB


async def test_without_hashes_the_sizes_are_verified_and_the_hashes_recorded(ngc: FakeNgc, cache: Path) -> None:
    ngc.artifacts[NAME].hashes = False
    weights = weights_at(cache)
    got = await weights.fetch(repo(ngc), KEY, nobody)
    assert content(got.path) == FILES
    assert weights.present(repo(ngc)) == got
    manifest = next((cache / ".nimhost").rglob("1.1+fp8.json")).read_text()
    assert manifest.count('"verified":false') == len(FILES)
    assert '"recorded":""' not in manifest


@pytest.mark.parametrize("name", ["a/b", "../b/c", "a/b/c/d", "a/b/..", "a--b/c/d"])
async def test_what_cannot_be_an_artifact_is_refused(ngc: FakeNgc, cache: Path, name: str) -> None:
    with pytest.raises(WeightsMissing, match="is not the name of an NGC artifact"):
        weights_at(cache).present(repo(ngc, "1", name))


def test_a_host_that_is_no_ngc_is_told(ngc: FakeNgc, monkeypatch: pytest.MonkeyPatch) -> None:
    ngc.page_size = 0
    hub = Ngc(ngc.url, KEY, QUICK, repo(ngc))
    monkeypatch.setattr(hub, "_artifact", lambda: f"{ngc.url}/__stats?")
    with pytest.raises(HubUnavailable, match="does not answer like NGC"):
        hub._latest(lambda text: None)

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nimhost.errors import BadRequest, WeightsMissing
from nimhost.host.weights import Repo, Weights
from nimhost.host.weights.cache import RepoCache, is_safe_path, looks_complete
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.source import Directory
from nimhost.host.weights.spec import describe_weights

COMMIT = "a" * 40
TINY = Repo("org/tiny")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8,
    "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10, "torch_dtype": "bfloat16",
}  # fmt: skip


def safetensors(**shapes: tuple[int, ...]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name.replace("__", ".")] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def foreign_snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """A snapshot as another tool leaves it."""
    repo = cache / "models--org--tiny"
    root = repo / "snapshots" / COMMIT
    for number, (name, content) in enumerate(files.items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(os.path.relpath(blob, (root / name).parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return root


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"w{n}": name for n, name in enumerate(names)}}).encode()


WHOLE = safetensors(a=(2, 3))


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"config.json": b"{}", "model.safetensors": WHOLE}, True),
        ({"config.json": b"{}", "model.safetensors": WHOLE[:-1]}, False),
        ({"config.json": b"{}", "model.safetensors": b"short"}, False),
        ({"config.json": b"{}"}, False),
        ({"model.safetensors": WHOLE}, False),
        ({"config.json": b"{}", "a.safetensors": WHOLE, "model.safetensors.index.json": index("a.safetensors")}, True),
        (
            {
                "config.json": b"{}",
                "a.safetensors": WHOLE,
                "model.safetensors.index.json": index("a.safetensors", "b.safetensors"),
            },
            False,
        ),
        ({"config.json": b"{}", "a.safetensors": WHOLE, "model.safetensors.index.json": b"{"}, False),
        ({"config.json": b"{}", "p.bin": b"1", "pytorch_model.bin.index.json": index("p.bin")}, True),
        ({"config.json": b"{}", "p.bin": b"1", "pytorch_model.bin.index.json": index("p.bin", "q.bin")}, False),
        ({"config.json": b"{}", "a.safetensors": WHOLE, "pytorch_model.bin.index.json": index("q.bin")}, True),
        ({"config.json": b"{}", "m-00001-of-00002.safetensors": WHOLE}, False),
        ({"config.json": b"{}", "m-00001-of-00002.safetensors": WHOLE, "m-00002-of-00002.safetensors": WHOLE}, True),
        ({"config.json": b"{}", "m-00001-of-99999999999999.safetensors": WHOLE}, False),
        (
            {"config.json": b"{}", "a.safetensors": WHOLE, "model.safetensors.index.json": b"[" * 100_000},
            False,
        ),
        ({"config.json": b"{}", "a.safetensors": (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995}, False),
        ({"config.json": b"{}", "m-1-of-2.safetensors": WHOLE, "n-2-of-2.safetensors": WHOLE}, False),
        (
            {
                "config.json": b"{}",
                "a.safetensors": WHOLE,
                "model.safetensors.index.json": b'{"weight_map": {"x": 5, "y": null}}',
            },
            False,
        ),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WHOLE}, True),
    ],
)
def test_snapshot_without_a_listing_is_judged_by_what_it_says_itself(
    tmp_path: Path, files: dict[str, bytes], complete: bool
) -> None:
    root = foreign_snapshot(tmp_path, files)
    assert looks_complete(root) is complete
    assert Weights(tmp_path, "http://127.0.0.1:9", offline=False).present(TINY) is None
    assert (Weights(tmp_path, "http://127.0.0.1:9", offline=True).present(TINY) is not None) is complete


def test_blobs_shared_between_repositories_are_mounted_with_the_whole_cache(tmp_path: Path) -> None:
    """Newer versions of Hugging Face's library may keep a blob outside of the repository's folder."""
    root = foreign_snapshot(tmp_path, {"config.json": b"{}", "model.safetensors": WHOLE})
    blob = Path(os.path.join(root, os.readlink(root / "model.safetensors")))
    shared = tmp_path / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    blob.resolve().rename(shared)
    Path(os.path.normpath(blob)).symlink_to(os.path.relpath(shared, os.path.dirname(os.path.normpath(blob))))
    got = RepoCache(tmp_path, TINY).find(trust_others=True)
    assert got is not None
    assert got.repo_dir == str(tmp_path)
    assert got.path == str(root)


def test_manifest_tells_when_weights_were_last_used(tmp_path: Path) -> None:
    root = foreign_snapshot(tmp_path, {"config.json": b"{}", "model.safetensors": WHOLE})
    cache = RepoCache(tmp_path, TINY)
    cache.write_manifest(COMMIT, [HubFile("config.json", 2, "0" * 40)], verified=True)
    os.utime(cache.manifest_path(COMMIT), (0, 0))
    found = Weights(tmp_path, "http://127.0.0.1:9", offline=False).present(TINY)
    assert found is not None
    assert found.path == str(root)
    assert time.time() - cache.manifest_path(COMMIT).stat().st_mtime < 60


def test_manifest_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    foreign_snapshot(tmp_path, {"config.json": b"{}", "model.safetensors": WHOLE})
    cache = RepoCache(tmp_path, TINY)
    cache.manifest_path(COMMIT).parent.mkdir(parents=True)
    cache.manifest_path(COMMIT).write_bytes(b'{"files": [')
    assert cache.find() is None


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_paths_that_lead_outside_are_not_safe(path: str) -> None:
    assert not is_safe_path(path)
    with pytest.raises(WeightsMissing):
        RepoCache(Path("/cache"), Repo("org/tiny", path))


async def test_directory_of_weights_describes_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model-1.safetensors").write_bytes(safetensors(model__embed__weight=(10, 8)))
    (tmp_path / "model-2.safetensors").write_bytes(safetensors(lm_head__weight=(10, 8), x=(3, 1)))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    spec = await describe_weights(Directory(tmp_path), "my-embedder")
    assert spec.base_num_parameters == 163
    assert (spec.tied_embeddings, spec.is_chat, spec.is_embedding_model) == (False, True, True)


async def test_directory_where_the_platform_keeps_hf_weights(tmp_path: Path) -> None:
    root = tmp_path / "alternates" / "hf"
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(LLAMA))
    (root / "model.safetensors").write_bytes(WHOLE)
    assert (await describe_weights(Directory(tmp_path))).base_num_parameters == 6


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no config.json"),
        ({"config.json": b"{}"}, "no weights"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WHOLE}, "LoRA adapter"),
        ({"config.json": b"[", "model.safetensors": WHOLE}, "not JSON"),
        ({"config.json": b"[]", "model.safetensors": WHOLE}, "not a JSON object"),
        ({"config.json": b"{}", "model.safetensors": WHOLE}, "no usable num_hidden_layers"),
        ({"config.json": json.dumps(LLAMA).encode(), "model.safetensors": b"pickle"}, "not a safetensors file"),
    ],
)
async def test_directory_that_cannot_be_deployed_says_why(
    tmp_path: Path, files: dict[str, bytes], problem: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest, match=problem):
        await describe_weights(Directory(tmp_path))


@pytest.mark.fault(20)
def test_a_kill_9_while_a_branch_is_noted_leaves_nothing_that_other_tools_take_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(fd: int) -> None:
        raise Killed

    (tmp_path / "models--org--tiny").mkdir()
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        RepoCache(tmp_path, TINY).write_ref(COMMIT)
    assert list((tmp_path / "models--org--tiny" / "refs").iterdir()) == []


def test_a_commit_is_found_by_the_branch_it_was_found_by_unless_another_tool_knows_better(tmp_path: Path) -> None:
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.parent.mkdir()
    RepoCache(tmp_path, Repo("org/tiny", COMMIT, branch="main")).write_ref(COMMIT)
    assert RepoCache(tmp_path, TINY).commit() == COMMIT
    (refs / "main").write_text("b" * 40)
    RepoCache(tmp_path, Repo("org/tiny", COMMIT, branch="main")).write_ref(COMMIT)
    assert RepoCache(tmp_path, TINY).commit() == "b" * 40
    assert [path.name for path in refs.iterdir()] == ["main"]
    with pytest.raises(WeightsMissing, match="is not a revision"):
        RepoCache(tmp_path, Repo("org/tiny", COMMIT, branch="../../x"))

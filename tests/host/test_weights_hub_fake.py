"""The fake hub passes for the real one with Hugging Face's own client; so what we test against it means something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.fakes.hub import FakeHub

FILES = {"config.json": b"{}", "sub/vocab.txt": b"a\nb\n", "model.safetensors": bytes(range(256)) * 2000}


def test_real_client_downloads_a_snapshot(tmp_path: Path) -> None:
    with FakeHub(page_size=2) as hub:
        repo = hub.add("org/tiny", FILES)
        got = Path(snapshot_download("org/tiny", cache_dir=tmp_path, endpoint=hub.url, token=False))
        assert got.name == repo.commit
        assert {str(p.relative_to(got)): p.read_bytes() for p in got.rglob("*") if p.is_file()} == FILES
        assert (got / "model.safetensors").resolve().name == repo.files["model.safetensors"].sha256
        assert hub.leaked == []


def test_real_client_resumes_a_dropped_connection(tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.add("org/tiny", FILES)
        hub.faults.drops, hub.faults.drop_after_bytes = 1, 64 * 1024
        hub.faults.busy = 0
        snapshot_download("org/tiny", cache_dir=tmp_path, endpoint=hub.url, token=False, max_workers=1)
        assert sum(start > 0 for start in hub.starts("model.safetensors")) <= 1
        assert hub.sent_bytes() >= sum(map(len, FILES.values()))


def test_real_client_tells_the_refusals_apart(tmp_path: Path) -> None:
    def download(repo_id: str, token: str | bool = False, revision: str = "main") -> str:
        return snapshot_download(repo_id, cache_dir=tmp_path, endpoint=hub.url, token=token, revision=revision)

    with FakeHub() as hub:
        hub.add("org/gated", FILES, gated=True, readers=("hf_ok",))
        hub.add("org/private", FILES, private=True, readers=("hf_ok",))
        hub.tokens.add("hf_other")
        for token in (False, "hf_other"):
            with pytest.raises(GatedRepoError):
                download("org/gated", token)
            with pytest.raises(RepositoryNotFoundError):
                download("org/private", token)
        with pytest.raises(RepositoryNotFoundError):
            download("org/absent")
        with pytest.raises(RevisionNotFoundError):
            download("org/gated", "hf_ok", "nowhere")
        with pytest.raises(HfHubHTTPError, match="401") as refused:
            download("org/gated", "hf_wrong")
        assert not isinstance(refused.value, RepositoryNotFoundError)
        assert (Path(download("org/gated", "hf_ok")) / "config.json").read_bytes() == b"{}"
        assert hub.leaked == []


def test_fake_runs_as_a_program_and_takes_faults(tmp_path: Path) -> None:
    import subprocess
    import sys
    import urllib.request

    folder = tmp_path / "org" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    program = subprocess.Popen([sys.executable, "-m", "tests.fakes.hub", str(tmp_path)], stdout=subprocess.PIPE)
    with program:
        try:
            assert program.stdout is not None
            url = program.stdout.readline().decode().strip()
            request = urllib.request.Request(f"{url}/__faults", json.dumps({"corrupt": 2}).encode())
            with urllib.request.urlopen(request) as reply:
                assert json.load(reply)["corrupt"] == 2
            got = snapshot_download("org/tiny", cache_dir=tmp_path / "cache", endpoint=url, token=False)
            assert (Path(got) / "config.json").read_text() == "{}"
            with urllib.request.urlopen(f"{url}/__stats") as reply:
                assert json.load(reply)["sent_bytes"] == 2
        finally:
            program.kill()

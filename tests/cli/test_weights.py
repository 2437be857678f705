"""`nimhost weights` against a real daemon and a stand-in of the hub; Docker is not needed for it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import snapshot_download

from nimhost.cli.weights import weights
from tests.cli.terminal import Terminal
from tests.cli.test_start import complete
from tests.e2e.daemon import DaemonProcess
from tests.fakes.hub import FakeHub, Faults
from tests.fakes.ngc import KEY, FakeNgc
from tests.support import wait_until

MIB = 1 << 20
FILES = {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": random.Random(3).randbytes(2 * MIB)}
SIZE = sum(map(len, FILES.values()))
FILESETS = "/apis/files/v2/workspaces/default/filesets"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        yield fake


@pytest.fixture
def hub(fake_hub: FakeHub) -> FakeHub:
    fake_hub.repos.clear()
    fake_hub.forget()
    fake_hub.faults = Faults()
    fake_hub.add("org/big", FILES)
    return fake_hub


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, fake_hub: FakeHub) -> Iterator[DaemonProcess]:
    env = {"NIMHOST_DOCKER__HOST": "tcp://127.0.0.1:9", "NIMHOST_WEIGHTS__ENDPOINT": fake_hub.url}
    found = DaemonProcess(tmp_path_factory.mktemp("daemon"), env)
    found.start()
    yield found
    found.close()


@pytest.fixture
def daemon(running: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> DaemonProcess:
    """Without weights, filesets and secrets."""
    for kind in ("files/v2/workspaces/default/filesets", "secrets/v2/workspaces/default/secrets"):
        for row in running.http.get(f"/apis/{kind}").json()["data"]:
            running.http.delete(f"/apis/{kind}/{row['name']}")
    shutil.rmtree(running.directory / "weights", ignore_errors=True)
    monkeypatch.setenv("NIMHOST_BASE_URL", running.url)
    return running


def rows(nimhost: Run) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(nimhost("weights", "list", "-f", "json").stdout)
    return found


def blob(daemon: DaemonProcess) -> Path:
    found = next((daemon.directory / "weights").glob("models--org--big/snapshots/*/model.safetensors"))
    return found.resolve()


def test_pulled_weights_are_listed_verified_and_pruned(daemon: DaemonProcess, hub: FakeHub, nimhost: Run) -> None:
    assert "There are no weights here yet" in nimhost("weights", "list").stdout
    pulled = nimhost("weights", "pull", "org/big")
    assert (pulled.exit_code, "org/big is here after" in pulled.stdout) == (0, True), pulled.output
    (row,) = rows(nimhost)
    assert (row["repo"], row["state"], row["size_bytes"]) == ("org/big", "complete", SIZE)
    assert (row["names"], row["fetched_by_nimhost"], row["commit"]) == (["main"], True, hub.repos["org/big"].commit)
    shown = nimhost("weights", "list").stdout
    assert f"{hub.repos['org/big'].commit[:12]} (main)" in shown
    assert "2 MB in all" in shown
    assert "all 2 files are what was promised" in nimhost("weights", "verify", "org/big").stdout
    hub.forget()
    assert nimhost("weights", "pull", "org/big").exit_code == 0
    assert hub.requests == [], "a second pull moves nothing and asks nobody"
    dry = nimhost("weights", "prune", "--dry-run")
    assert "remove      2 MB  org/big@" in dry.stdout
    assert "This would free 2 MB." in dry.stdout
    assert len(rows(nimhost)) == 1
    refused = nimhost("weights", "prune", stdin="n\n")
    assert (refused.exit_code, len(rows(nimhost))) == (1, 1)
    assert refused.stderr.endswith("[y/N]: Nothing was removed.\n") or "Nothing was removed.\n" in refused.output
    nobody = nimhost("weights", "prune", stdin="")
    assert (nobody.exit_code, "give --yes, or --dry-run" in nobody.stderr, len(rows(nimhost))) == (2, True, 1)
    unasked = nimhost("weights", "prune", "-f", "json")
    assert (unasked.exit_code, "--yes" in unasked.stderr, len(rows(nimhost))) == (2, True, 1)
    done = nimhost("weights", "prune", stdin="y\n")
    assert (done.exit_code, "Freed 2 MB." in done.stdout) == (0, True), done.output
    assert rows(nimhost) == []
    assert "There is nothing to remove." in nimhost("weights", "prune", "--yes").stdout


def test_what_is_used_new_or_of_others_stays_and_says_why(daemon: DaemonProcess, hub: FakeHub, nimhost: Run) -> None:
    hub.add("org/theirs", FILES)
    snapshot_download("org/theirs", cache_dir=daemon.directory / "weights", endpoint=hub.url, token=False)
    for name in ("org/named", "org/new"):
        hub.add(name, {"config.json": name.encode(), "model.safetensors": name.encode() * 1000})
        assert nimhost("weights", "pull", name).exit_code == 0
    daemon.post(FILESETS, {"name": "ff", "storage": {"type": "huggingface", "repo_id": "org/named"}}, 200)
    shown = nimhost("weights", "prune", "--dry-run", "--unused-for", "30d").stdout
    assert "fileset default/ff names it" in shown
    assert "another tool fetched it" in shown
    assert "org/new@" in shown
    assert "it was used 0 hours ago" in shown
    assert {row["repo"]: row["filesets"] for row in rows(nimhost)}["org/named"] == ["default/ff"]
    old = time.time() - 40 * 86_400
    for manifest in (daemon.directory / "weights" / ".nimhost").rglob("*.json"):
        os.utime(manifest, (old, old))
    assert nimhost("weights", "prune", "--unused-for", "30d", "--yes").exit_code == 0
    assert {row["repo"] for row in rows(nimhost)} == {"org/named", "org/theirs"}
    daemon.http.delete(f"{FILESETS}/ff")
    assert nimhost("weights", "prune", "--yes").exit_code == 0
    assert {row["repo"] for row in rows(nimhost)} == {"org/theirs"}


@pytest.mark.fault(16)
def test_a_damaged_file_is_named_with_the_command_that_heals_it(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    nimhost("weights", "pull", "org/big")
    with blob(daemon).open("r+b") as file:
        file.write(b"x")
    found = nimhost("weights", "verify", "org/big")
    assert found.exit_code == 1
    assert "model.safetensors: its content is not what was promised" in found.stdout
    heal = f"nimhost weights pull org/big@{hub.repos['org/big'].commit}"
    assert f"Fetch them anew: {heal}" in found.stderr
    assert "damaged" in nimhost("weights", "list").stdout
    hub.forget()
    assert nimhost(*heal.split()[1:]).exit_code == 0
    assert hub.sent_bytes() == len(FILES["model.safetensors"])
    assert nimhost("weights", "verify", "org/big").exit_code == 0


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("args", "says", "helps"),
    [
        (("org/nope",), "there is no repository org/nope", "Check the name at"),
        (("org/big@v9",), "org/big has no revision 'v9'", "/tree/main"),
        (("org/gated",), "org/gated is gated: it needs a token", "nimhost secrets create"),
        (("org/big", "--secret", "nope"), "Secret not found: nope", "nimhost secrets create nope"),
        (("../x",), "is not the id of a Hugging Face repository", "It looks like"),
        (("org/big@",), "'org/big@' is not a repository", "OWNER/NAME@REVISION"),
        (("ngc://just-one",), "is not an artifact of NGC", "ngc://org/team/name:1.0"),
        (("org/big", "--allow", "*.nope"), "no file left with --allow *.nope", "reads: config.json, model"),
        (("org/gated",), "org/gated is gated", "then: nimhost weights pull org/gated --secret hf-token"),
        (("org/data", "--type", "dataset"), "no repository org/data", "/datasets/org/data. If it is private"),
        (("org/big", "--stop"), "org/big is not being pulled", "nimhost stop NAME"),
    ],
)
def test_what_cannot_be_pulled_says_why(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run, args: tuple[str, ...], says: str, helps: str
) -> None:
    hub.add("org/gated", FILES, gated=True)
    failed = nimhost("weights", "pull", *args)
    assert (failed.exit_code, says in failed.stderr, helps in failed.stderr) == (1, True, True), failed.output
    assert "Traceback" not in failed.output
    assert list((daemon.directory / "weights").glob("*--*")) == [], "a refused pull leaves nothing behind"


def test_a_secret_opens_a_gated_repository(daemon: DaemonProcess, hub: FakeHub, nimhost: Run) -> None:
    hub.add("org/gated", FILES, gated=True, readers=("hf_good",))
    assert nimhost("secrets", "create", "tok", "--from-file", "-", stdin="hf_good").exit_code == 0
    assert nimhost("weights", "pull", "org/gated", "--secret", "tok").exit_code == 0
    assert "hf_good" not in daemon.log.read_text()


def test_a_choice_of_files_is_partial_until_the_rest_is_fetched(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    assert nimhost("weights", "pull", "org/big", "--allow", "*.json").exit_code == 0
    assert hub.sent_bytes("model.safetensors") == 0
    (row,) = rows(nimhost)
    assert (row["state"], row["size_bytes"]) == ("partial", len(FILES["config.json"]))
    assert nimhost("weights", "pull", "org/big").exit_code == 0
    assert hub.sent_bytes("config.json") == len(FILES["config.json"]), "not fetched twice"
    assert rows(nimhost)[0]["state"] == "complete"


def test_what_may_be_deployed_is_completed_to_what_is_here_and_to_directories(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    assert nimhost("weights", "pull", "org/big").exit_code == 0
    assert complete("ps", "-w", "def") == ["default"]
    for command in ("deploy", "plan"):
        assert complete(command, "or") == ["or", "org/big"], "the first stands for directories that begin so"
        assert complete(command, "./") == ["./"]


def test_of_weights_that_are_here_a_choice_of_nothing_is_refused_too(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    hub.add("org/both", {**FILES, "model-q4.gguf": b"gguf"})
    assert nimhost("weights", "pull", "org/both").exit_code == 0
    failed = nimhost("weights", "pull", "org/both", "--allow", "*.gguf")
    assert (failed.exit_code, "no file left with --allow *.gguf" in failed.stderr) == (1, True), failed.output
    some = nimhost("weights", "pull", "org/both", "--allow", "*.json")
    assert "What you chose of org/both is here" in some.stdout


def test_weights_of_ngc_need_only_the_key_that_is_there(daemon: DaemonProcess, nimhost: Run) -> None:
    with FakeNgc() as ngc:
        ngc.publish("nvidia/nemo/tiny", "1.0", FILES)
        body = {"repo_id": "nvidia/nemo/tiny", "registry": "ngc", "endpoint": ngc.url}
        refused = daemon.http.post("/apis/nimhost/v1/weights/pull", json=body)
        assert "NGC wants an API key" in refused.text
        daemon.post("/apis/secrets/v2/workspaces/system/secrets", {"name": "ngc-api-key", "value": KEY})
        assert '"status":"done"' in daemon.http.post("/apis/nimhost/v1/weights/pull", json=body).text
    assert "ngc://nvidia/nemo/tiny  1.0 (latest)" in nimhost("weights", "list").stdout
    assert KEY not in daemon.log.read_text()


def test_ctrl_c_ends_the_watching_and_stop_the_download(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run, terminal: Callable[..., Terminal]
) -> None:
    hub.faults.bytes_per_s = 2e5
    window = terminal("weights", "pull", "org/big")
    window.see("left")
    window.type("\x03")
    assert window.exit_code() == 130
    assert "The download of org/big goes on in the daemon." in window.text
    assert "nimhost weights pull org/big --stop" in window.text
    assert "Traceback" not in window.text
    before = hub.sent_bytes()
    wait_until(lambda: hub.sent_bytes() > before + 100_000, 20)
    (row,) = rows(nimhost)
    assert row["state"] == "fetching"
    assert row["progress"]["eta_s"] > 0  # type: ignore[index]
    assert re.search(r"fetching \d+%, \d+ kB/s, \d:\d\d left", nimhost("weights", "list").stdout)
    assert "it is being fetched" in nimhost("weights", "prune", "--dry-run").stdout
    assert "is not pulled any more" in nimhost("weights", "pull", "org/big", "--stop").stdout
    wait_until(lambda: rows(nimhost)[0]["state"] == "partial", 20)
    assert nimhost("weights", "prune", "--yes").exit_code == 0
    assert rows(nimhost) == []


@pytest.mark.fault(18)
@pytest.mark.fault(20)
def test_a_pull_goes_on_by_itself_after_a_kill_9_of_the_daemon(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run, terminal: Callable[..., Terminal]
) -> None:
    hub.add("org/gated", FILES, gated=True, readers=("hf_good",))
    assert nimhost("secrets", "create", "tok", "--from-file", "-", stdin="hf_good").exit_code == 0
    hub.faults.bytes_per_s = 2e6
    window = terminal("weights", "pull", "org/gated", "--secret", "tok")
    wait_until(lambda: hub.sent_bytes() > MIB, 20)
    daemon.kill()
    assert window.exit_code() == 1
    assert "Once nimhost runs again, the download goes on where it stopped" in " ".join(window.text.split())
    hub.faults.bytes_per_s = None
    daemon.start()
    wait_until(lambda: [row["state"] for row in rows(nimhost)] == ["complete"], 20)
    assert hub.sent_bytes() - SIZE < MIB // 2
    assert "is here after" in nimhost("weights", "pull", "org/gated").stdout


@pytest.mark.fault(2)
def test_a_pull_that_is_not_followed_any_more_waits_for_a_hub_that_asks_for_it(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    hub.faults.bytes_per_s = 2e5
    hub.faults.drops, hub.faults.drop_after_bytes = 100, MIB // 4
    with daemon.http.stream("POST", "/apis/nimhost/v1/weights/pull", json={"repo_id": "org/big"}) as following:
        assert "fetching" in next(following.iter_lines())
        wait_until(lambda: hub.sent_bytes() > 0, 20)
    hub.faults.busy, hub.faults.retry_after_s = 100, 3600
    wait_until(lambda: "trying again in 3600 s" in str(rows(nimhost)), 20)
    assert "429" in nimhost("weights", "list").stdout
    hub.faults = Faults()
    assert nimhost("weights", "pull", "org/big").exit_code == 0, "asked again, it does not wait"


def test_a_fileset_that_goes_takes_its_broken_off_download_along(
    daemon: DaemonProcess, hub: FakeHub, nimhost: Run
) -> None:
    daemon.post(FILESETS, {"name": "ff", "storage": {"type": "huggingface", "repo_id": "org/big"}}, 200)
    partial = daemon.directory / "weights" / "models--org--big" / "blobs" / ("a" * 64 + ".nimhost-partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(MIB))
    assert [row["filesets"] for row in rows(nimhost)] == [["default/ff"]]
    assert "fileset default/ff names it" in nimhost("weights", "prune", "--dry-run").stdout
    daemon.http.delete(f"{FILESETS}/ff")
    assert not partial.exists()
    assert rows(nimhost) == []


@pytest.mark.parametrize("text", ["30", "d", "-3d", "1y", ""])
def test_a_time_that_is_none_is_refused(nimhost: Run, text: str) -> None:
    refused = nimhost("weights", "prune", f"--unused-for={text}")
    assert (refused.exit_code, "Write it as 12h, 30d or 4w" in refused.stderr) == (2, True)


def test_every_command_says_how_it_is_used(nimhost: Run) -> None:
    for name in weights.commands:
        shown = nimhost("weights", name, "--help")
        assert (shown.exit_code, "Examples:" in shown.stdout) == (0, True)

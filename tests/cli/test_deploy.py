"""`deploy`, `ps`, `wait`, `logs`, `stop`, `start`, `rm`, as seen by who pipes them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from nimhost.cli.entities import MADE_BY
from nimhost.client.resources import Deployments
from tests.cli.wire import FakeWire, Refusal, snapshot

Run = Callable[..., Result]
QWEN = "qwen-qwen3-1-7b"
KINDS = ("filesets", "models", "deployment-configs", "deployments")


def becomes_ready(wire: FakeWire) -> None:
    wire.provider(QWEN, f"default/{QWEN}", f"default/{QWEN}", model_deployment_id=f"default/{QWEN}")
    wire.script = [
        snapshot("PENDING", "Getting ready", image={"done_bytes": 0, "total_bytes": 2_000_000_000, "message": ""}),
        *(
            snapshot("PENDING", "Getting ready", image={"done_bytes": n * 20_000_000, "total_bytes": 2_000_000_000})
            for n in range(100)
        ),
        snapshot("PENDING", "Loading", engine={"message": "loading weights"}),
        snapshot("READY"),
    ]


def test_deploy_makes_four_entities_and_tells_what_to_do_with_them(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    done = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert (done.exit_code, done.stderr) == (0, "")
    assert [wire.names(kind) for kind in KINDS] == [[QWEN]] * 4
    assert f"model     default/{QWEN}" in done.stdout
    assert f"endpoint  {wire.url}/v1" in done.stdout
    assert f'nimhost chat {QWEN} "Hello!"' in done.stdout
    assert f"curl {wire.url}/v1/chat/completions" in done.stdout


def test_progress_that_is_piped_is_a_line_per_step(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    lines = nimhost("deploy", "Qwen/Qwen3-1.7B").stdout.splitlines()
    image = [line for line in lines if line.startswith("image ")]
    assert len(image) == 11  # ten tenths, and done
    assert image[1].startswith("image     0.2 of 2.0 GB") or image[1].startswith("image     200 MB of 2.0 GB")
    assert image[-1].startswith("image     done · 2.0 GB")
    assert sum("Getting ready" in line for line in lines) == 1
    assert "\x1b" not in "".join(lines)


def test_deploying_the_same_again_changes_nothing(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.asked.clear()
    wire.script = [snapshot("READY")]
    again = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert again.exit_code == 0
    assert f"{QWEN} is READY already." in again.stdout
    assert {asked.method for asked in wire.asked} == {"GET"}


def test_something_different_under_the_name_is_left_alone(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    before = json.dumps([wire.rows[kind, "default", QWEN] for kind in KINDS])
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2")
    assert done.exit_code == 1
    assert "--gpu: 1 there, 2 wanted" in done.stderr
    assert f"nimhost rm {QWEN}" in done.stderr
    assert json.dumps([wire.rows[kind, "default", QWEN] for kind in KINDS]) == before


def test_update_changes_what_differs_and_rolls_the_deployment(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.asked.clear()
    assert nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2", "--update").exit_code == 0
    assert [body["config"]["executor_config"]["gpu"] for body in wire.sent("POST", "/plan")] == [2]  # asked first
    changed = [asked for asked in wire.asked if asked.method != "GET" and not asked.path.endswith("/plan")]
    changes = [repr(asked).rpartition("default/")[2] for asked in changed]
    assert changes == [f"deployment-configs/{QWEN}"]  # which the deployment follows: once is enough
    assert wire.rows["deployment-configs", "default", QWEN]["executor_config"]["gpu"] == 2


def test_a_deployment_pinned_to_an_older_config_is_changed_with_it(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.rows["deployments", "default", QWEN]["config_version"] = 1
    wire.rows["deployment-configs", "default", QWEN]["entity_version"] = 2
    wire.asked.clear()
    assert nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2", "--update").exit_code == 0
    assert len(wire.sent("POST", f"/deployments/{QWEN}")) == 1


def test_an_update_starts_what_is_stopped(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    nimhost("stop", QWEN)
    assert nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2", "--update").exit_code == 0
    assert wire.rows["deployments", "default", QWEN]["desired"] == "running"


def test_an_update_leaves_alone_what_no_option_says(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B", "--arg", "--enforce-eager", "--lora")
    config = wire.rows["deployment-configs", "default", QWEN]
    config["model_spec"] |= {"chat_template": "{{ x }}", "model_revision": None}
    config["executor_config"] |= {"disk_size": "90Gi", "image_name": "old/image"}
    assert nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2", "--update").exit_code == 0
    (planned,) = wire.sent("POST", "/plan")
    for body in (planned["config"], wire.sent("POST", f"/deployment-configs/{QWEN}")[-1]):
        spec = {"model_namespace": "default", "model_name": QWEN, "lora_enabled": True, "chat_template": "{{ x }}"}
        assert body["model_spec"] == spec
        assert body["executor_config"] == {
            "gpu": 2, "disk_size": "90Gi", "additional_args": [], "additional_envs": {}
        }  # fmt: skip


def test_adapters_can_be_switched_on_and_off(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    config = wire.rows["deployment-configs", "default", QWEN]
    assert "lora_enabled" not in config["model_spec"]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--lora")
    assert "--lora: nothing there, True wanted" in done.stderr
    for flag, there in (("--lora", True), ("--no-lora", False)):
        assert nimhost("deploy", "Qwen/Qwen3-1.7B", flag, "--update").exit_code == 0
        assert wire.rows["deployment-configs", "default", QWEN]["model_spec"]["lora_enabled"] is there


def test_an_update_of_what_is_not_there_says_so_and_deploys(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--update")
    assert (done.exit_code, done.stderr) == (0, f"There is no {QWEN} to update yet: deploying it.\n")


FAILED_UPDATE = (
    f"Serving the previous version: the new one failed. Fix it and update again; what it said: nimhost logs {QWEN}\n"
    "It exited with code 1.\n\nLast log lines:\nValueError: no such flag"
)


@pytest.mark.parametrize("more", [(), ("--no-wait",), ("--update",)])
def test_an_update_that_failed_is_not_tried_again_by_deploying_the_same(
    nimhost: Run, wire: FakeWire, more: tuple[str, ...]
) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    failed = {"status": "READY", "status_message": FAILED_UPDATE, "update": "failed"}
    wire.rows["deployments", "default", QWEN] |= failed
    wire.asked.clear()
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", *more)
    assert done.exit_code == 1
    assert {asked.method for asked in wire.asked} == {"GET"}
    assert f"The update of {QWEN} failed, and the previous version serves. It exited with code 1." in done.stderr
    assert done.stderr.count("ValueError") == 1
    assert f"nimhost start {QWEN} (without a GPU to spare, nothing serves meanwhile)" in done.stderr
    assert "Give it up: nimhost deploy … --update, with the options of before" in done.stderr
    assert f"nimhost logs {QWEN}" in done.stderr


def test_a_failure_is_shown_with_its_proof_once(nimhost: Run, wire: FakeWire) -> None:
    why = "It exited with code 1.\n\nLast log lines:\nValueError: no such flag"
    wire.script = [
        snapshot("PENDING", f"{why}\nTrying again at 10:00:00Z (attempt 2)."),
        snapshot("PENDING", f"{why}\nTrying again at 10:00:09Z (attempt 3)."),
        snapshot("ERROR", why),
    ]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert done.stdout.splitlines() == [
        "PENDING   It exited with code 1. Trying again at 10:00:00Z (attempt 2).",
        "PENDING   It exited with code 1. Trying again at 10:00:09Z (attempt 3).",
        "ERROR     It exited with code 1.",
    ]
    assert done.stderr.count("ValueError") == 1


def test_logs_that_never_were_are_not_pointed_at(nimhost: Run, wire: FakeWire) -> None:
    wire.script = [snapshot("ERROR", "Image x/y: there is no such image.")]
    wire.refuse["GET", "/logs"] = Refusal(409, "NotReady", "has no container yet")
    done = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert done.exit_code == 1
    assert "nimhost logs" not in done.stderr
    assert f"Try again: nimhost start {QWEN}" in done.stderr


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("--max-model-len 100", "--arg --max-model-len --arg 100"),
        ("-tp  2", "--arg -tp --arg 2"),
        ("--override {a: 1}", "--arg --override --arg '{a: 1}'"),
    ],
)
def test_a_flag_quoted_together_with_its_value_is_refused(nimhost: Run, wire: FakeWire, text: str, right: str) -> None:
    for command in ("deploy", "plan"):
        done = nimhost(command, "Qwen/Qwen3-1.7B", "--arg", text)
        assert done.exit_code == 2
        assert right in done.stderr
    assert wire.asked == []


def test_values_with_blanks_are_arguments(nimhost: Run, wire: FakeWire) -> None:
    words = ('--hf-overrides={"a": 1}', '{"b": 2}', "- x")
    nimhost("deploy", "a/bb", "--no-wait", *(part for word in words for part in ("--arg", word)))
    assert wire.rows["deployment-configs", "default", "a-bb"]["executor_config"]["additional_args"] == list(words)


def test_an_update_is_over_when_the_new_engine_serves(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    preparing = {**snapshot("READY", "Pulling image", image={"done_bytes": 1, "total_bytes": 2}), "update": "rolling"}
    wire.script = [preparing, snapshot("PENDING", "Replacing"), snapshot("READY")]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "2", "--update")
    assert done.stdout.index("Replacing") < done.stdout.index("is READY")
    wire.script = [preparing, {**snapshot("READY", "The new version failed: no such image."), "update": "failed"}]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "3", "--update")
    assert done.exit_code == 1
    assert "no such image." in done.stderr


def test_an_update_that_could_not_run_changes_nothing(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    before = json.dumps([wire.rows[kind, "default", QWEN] for kind in KINDS])
    wire.asked.clear()
    wire.plan = {"verdict": "refused", "reason": "Not enough GPUs on this system: needs 9.", "hint": "nimhost gpus"}
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "9", "--update")
    assert done.exit_code == 1
    assert done.stderr == "Error: Nothing was changed. Not enough GPUs on this system: needs 9.\nHint: nimhost gpus\n"
    assert [asked.path for asked in wire.asked if asked.method != "GET"] == ["/apis/nimhost/v1/plan"]
    assert json.dumps([wire.rows[kind, "default", QWEN] for kind in KINDS]) == before


def test_what_was_changed_is_put_back_when_a_later_part_is_refused(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B", "--arg", "--enforce-eager")
    before = {kind: dict(wire.rows[kind, "default", QWEN]) for kind in KINDS}
    wire.refuse["POST", f"/deployments/{QWEN}"] = Refusal(400, "BadRequest", "this machine has 1 GPU", "--gpu 1")
    done = nimhost("deploy", "Qwen/Qwen3-1.7B@v2", "--gpu", "9", "--update", "--force")
    assert done.exit_code == 1
    assert done.stderr == "Error: this machine has 1 GPU\nHint: --gpu 1\n"
    for kind in KINDS:
        assert wire.rows[kind, "default", QWEN].items() >= before[kind].items()


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_share_that_is_no_size_is_refused(nimhost: Run, wire: FakeWire, size: str) -> None:
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu-memory", size)
    assert done.exit_code == 2
    assert "--gpu-memory" in done.stderr
    assert wire.asked == []


def test_gpus_that_idle_are_said_once_it_is_ready(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "3")
    wire.rows["deployments", "default", QWEN]["warnings"] = ["2 of 3 GPUs stay idle. Set executor_config.gpu to 1."]
    wire.script = [snapshot("READY")]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "3")
    assert "note      2 of 3 GPUs stay idle. Set --gpu to 1." in done.stdout


def test_refresh_makes_a_new_version_of_what_is_unchanged(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.asked.clear()
    assert nimhost("deploy", "Qwen/Qwen3-1.7B", "--refresh").exit_code == 0
    assert [repr(a).rpartition("default/")[2] for a in wire.asked if a.method != "GET"] == [f"deployments/{QWEN}"]


def test_deploying_what_has_failed_tries_again(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.rows["deployments", "default", QWEN]["status"] = "ERROR"
    wire.asked.clear()
    assert nimhost("deploy", "Qwen/Qwen3-1.7B").exit_code == 0
    assert [repr(a).rpartition("/")[2] for a in wire.asked if a.method == "POST"] == ["start"]


def test_a_refused_deployment_leaves_nothing_behind(nimhost: Run, wire: FakeWire) -> None:
    hub = {"type": "huggingface", "repo_id": "Qwen/Qwen3-1.7B", "repo_type": "model"}
    wire.put("filesets", QWEN, purpose="model", storage={**hub, "revision": "c0ffee", "original_revision": "main"})
    wire.refuse["POST", "/deployments"] = Refusal(422, "InvalidRequest", "needs 8 GPUs, this machine has 1", "--gpu 1")
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--gpu", "8")
    assert done.exit_code == 1
    assert done.stderr == "Error: needs 8 GPUs, this machine has 1\nHint: --gpu 1\n"
    assert [wire.names(kind) for kind in KINDS] == [[QWEN], [], [], []]  # the fileset was there before


def test_a_failed_deployment_shows_cause_and_log_tail(nimhost: Run, wire: FakeWire) -> None:
    wire.script = [
        snapshot("PENDING", "Starting"),
        snapshot("ERROR", "Exited with code 1\n\nLast log lines:\nCUDA out of memory"),
    ]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert done.exit_code == 1
    assert "Exited with code 1\n\nLast log lines:\nCUDA out of memory" in done.stderr
    assert f"nimhost logs {QWEN}" in done.stderr
    assert wire.names("deployments") == [QWEN]


def test_no_wait_returns_at_once(nimhost: Run, wire: FakeWire) -> None:
    done = nimhost("deploy", "./", "--name", "here", "--no-wait")
    assert done.exit_code == 0
    assert "nimhost wait here" in done.stdout
    assert wire.rows["filesets", "default", "here"]["storage"] == {"type": "local", "path": str(Path.cwd())}


def test_timeout_leaves_the_deployment_going(nimhost: Run, wire: FakeWire) -> None:
    wire.script = [snapshot("PENDING", "Loading")]
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "--timeout", "0.2")
    assert done.exit_code == 1
    assert "not ready after 0.2 s" in done.stderr
    assert f"nimhost wait {QWEN}" in done.stderr
    assert wire.names("deployments") == [QWEN]


@pytest.mark.fault(20)
def test_deploy_goes_on_watching_after_a_restart_of_the_daemon(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.script = [snapshot("PENDING", "Loading"), None]
    pauses: list[float] = []

    def pause(duration_s: float) -> None:
        pauses.append(duration_s)
        if len(pauses) == 1:  # the stream is over
            wire.close()
        elif len(pauses) == 2:  # and nobody was there
            becomes_ready(wire.restart())

    monkeypatch.setattr("time.sleep", pause)
    done = nimhost("deploy", "Qwen/Qwen3-1.7B")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "is READY" in done.stdout


def test_deploy_starts_what_is_stopped(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    nimhost("stop", QWEN)
    assert nimhost("deploy", "Qwen/Qwen3-1.7B").exit_code == 0
    assert wire.rows["deployments", "default", QWEN]["desired"] == "running"


def test_json_is_the_deployment_and_nothing_else(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    done = nimhost("deploy", "Qwen/Qwen3-1.7B", "-f", "json")
    assert json.loads(done.stdout)["name"] == QWEN
    assert "image" in done.stderr


def test_what_serves_no_models_is_shown_by_its_endpoint(nimhost: Run, wire: FakeWire) -> None:
    wire.script = [snapshot("READY")]
    wire.put("providers", "guard", host_url="http://x", served_models=[])
    done = nimhost("deploy", "nvcr.io/nim/guard:1", "--name", "guard")
    assert "/provider/guard/-/" in done.stdout
    assert "nimhost chat" not in done.stdout


def test_environment_can_be_taken_over_by_name(nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "v")
    nimhost("deploy", "a/bb", "--no-wait", "--env", "TOKEN", "--env", "A=b=c")
    executor = wire.rows["deployment-configs", "default", "a-bb"]["executor_config"]
    assert executor["additional_envs"] == {"TOKEN": "v", "A": "b=c"}
    assert nimhost("deploy", "a/bb", "--env", "MISSING").exit_code == 2


# --- ps ------------------------------------------------------------------------------------------------------------


def test_ps_lists_deployments_and_providers_of_their_own_right(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.put("deployments", "q2", config="gone", desired="stopped", status="PENDING", status_message="Stopped.")
    wire.provider("openai", "gpt-4", "default/gpt-4")
    lines = nimhost("ps").stdout.splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "ENGINE", "GPUS", "STATUS", "AGE", "MESSAGE"]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["q1", "default/q1", "vllm", "1", "READY"],
        ["q2", "-", "-", "-", "STOPPED"],
        ["openai", "gpt-4", "provider", "-", "READY"],
    ]


def test_ps_shows_what_serves_while_another_version_is_wished(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1", entity_version=3)
    wire.rows["deployment-configs", "default", "q1"]["model_entity_id"] = "default/new"
    wire.versions["deployment-configs", "default", "q1", 2] = {
        **wire.rows["deployment-configs", "default", "q1"], "entity_version": 2, "model_entity_id": "default/old",
    }  # fmt: skip
    wire.rows["deployments", "default", "q1"] |= {"config_version": 3, "serving": {"config_version": 2}}
    assert "default/old" in nimhost("ps").stdout
    wire.rows["deployments", "default", "q1"]["serving"] = {"config_version": 1}  # which has been deleted since
    assert "default/new" in nimhost("ps").stdout
    wire.rows["deployments", "default", "q1"]["serving"] = {"config_version": 3}
    wire.asked.clear()
    assert "default/new" in nimhost("ps").stdout
    assert not [asked for asked in wire.asked if "versions" in asked.path]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (FAILED_UPDATE, "Serving the previous version: the new one failed."),
        (
            "Container of v0.33.0 at 127.0.0.1 (ID: ab). The engine is loading.",
            "Container of v0.33.0 at 127.0.0.1 (ID: ab).",
        ),
        ("Exited with code 1\n\nLast log lines:\nx.", "Exited with code 1"),
        ("", ""),
    ],
)
def test_ps_shows_the_first_sentence(nimhost: Run, wire: FakeWire, message: str, shown: str) -> None:
    wire.ready("q1", "default/q1")
    wire.rows["deployments", "default", "q1"] |= {"status_message": message, "created_at": "2026-01-02T03:04:05Z"}
    assert nimhost("ps").stdout.splitlines()[1].split("d  ", 1)[-1].strip().endswith(shown)
    assert "Last log" not in nimhost("ps").stdout
    assert json.loads(nimhost("ps", "-f", "json").stdout)[0]["message"] == message


def test_ps_everywhere_names_the_workspace(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.put("deployments", "q1", "team", config="q1")
    names = [row["name"] for row in json.loads(nimhost("ps", "-a", "-f", "json").stdout)]
    assert names == ["default/q1", "team/q1"]


def test_ps_of_nothing_says_how_to_begin(nimhost: Run, wire: FakeWire) -> None:
    assert "nimhost deploy" in nimhost("ps").stdout
    assert nimhost("ps", "-f", "raw").stdout == "[]\n"


# --- wait, logs ----------------------------------------------------------------------------------------------------


def test_wait_shows_how_far_it_is_and_ends_when_it_is_ready(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    wire.put("deployments", QWEN, config=QWEN, status="PENDING", status_message="Getting ready")
    done = nimhost("wait", QWEN)
    assert done.exit_code == 0
    assert "image     1.0 of 2.0 GB" in done.stdout or "image     1.00 of 2.00 GB" in done.stdout, done.stdout
    assert f"{QWEN} is READY after 0:0" in done.stdout
    assert f'nimhost chat {QWEN} "Hello!"' in done.stdout


def test_wait_for_what_is_ready_says_so(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    for more in ((), ("--timeout", "0")):
        assert nimhost("wait", "q1", *more).stdout.startswith("q1 is READY already.\n")
    done = nimhost("wait", "q1", "-f", "json")
    assert (json.loads(done.stdout)["name"], done.stderr) == ("q1", "")


def test_wait_for_what_is_stopped_fails(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.rows["deployments", "default", "q1"]["desired"] = "stopped"
    done = nimhost("wait", "q1")
    assert (done.exit_code, done.stderr) == (1, "Error: q1 was stopped.\nHint: Start it with: nimhost start q1\n")


def test_wait_until_it_is_gone_tells_what_comes_and_not_what_was(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [
        {"timestamp": f"2026-01-02T03:04:0{n}Z", "status": "DELETING", "status_message": f"step {n}"} for n in range(3)
    ]
    wire.put("deployments", "q1", config="q1", status="DELETING", status_history=history)
    monkeypatch.setattr("time.sleep", lambda _: wire.rows.clear())
    done = nimhost("wait", "q1", "--status", "DELETED")
    assert (done.exit_code, done.stdout) == (0, "03:04:02  DELETING  step 2\nq1 is gone.\n")


def test_wait_fails_at_once_where_no_daemon_is(nimhost: Run, wire: FakeWire) -> None:
    wire.close()
    done = nimhost("wait", "q1")
    assert done.exit_code == 1
    assert "nimhost serve" in done.stderr


def test_wait_says_that_an_update_failed(nimhost: Run, wire: FakeWire) -> None:
    entry = {"timestamp": "2026-01-02T03:04:05Z", "status": "READY", "status_message": FAILED_UPDATE}
    wire.put(
        "deployments", "q1", config="q1", status="READY", status_message=FAILED_UPDATE, update="failed",
        status_history=[entry],
    )  # fmt: skip
    done = nimhost("wait", "q1")
    assert done.exit_code == 1
    assert "Error: The update of q1 failed, and the previous version serves. It exited with code 1." in done.stderr
    assert (done.stdout + done.stderr).count("ValueError") == 1


def test_wait_fails_with_what_failed(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1", status="ERROR", status_message="Exited with code 1")
    done = nimhost("wait", "q1")
    assert done.exit_code == 1
    assert "Exited with code 1" in done.stderr
    assert "nimhost logs q1" in done.stderr


def test_wait_for_what_is_not_there(nimhost: Run, wire: FakeWire) -> None:
    assert nimhost("wait", "q1").exit_code == 1
    assert nimhost("wait", "q1", "--status", "DELETED").exit_code == 0


def test_logs_come_as_they_are(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    wire.logs = "größe\nlast line without an end".encode()
    assert nimhost("logs", "q1", "--tail", "2").stdout == "größe\nlast line without an end"
    assert wire.asked[-1].query == {"tail": "2"}


def test_followed_logs_end_with_their_engine(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    wire.logs, wire.said["/health/live"] = b"the last line\n", {"status": "live"}
    done = nimhost("logs", "q1", "-f")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "the last line\n", "")


def test_followed_logs_that_end_with_the_daemon_say_so(nimhost: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("NIMHOST_BASE_URL", url := f"http://127.0.0.1:{listener.getsockname()[1]}")

    def daemon() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nline\n\r\n0\r\n\r\n")

    thread = threading.Thread(target=daemon)
    thread.start()
    done = nimhost("logs", "q1", "-f")
    thread.join()
    assert (done.exit_code, done.stdout) == (1, "line\n")
    assert done.stderr == (
        f"Error: nimhost at {url} has stopped.\nHint: Engines go on without it. Start it with: nimhost serve\n"
    )


# --- rm ------------------------------------------------------------------------------------------------------------


def test_rm_takes_what_deploy_made(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    done = nimhost("rm", QWEN)
    assert done.stdout == f"Removed {QWEN} and its deployment config, model, fileset.\n"
    assert [wire.names(kind) for kind in KINDS] == [[], [], [], []]


def test_rm_tells_why_it_takes_longer(nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"timestamp": f"2026-01-02T03:04:0{n}Z", "status": "DELETING", "status_message": said}
        for n, said in enumerate(("Requested.", "Waiting for Docker."))
    ]
    wire.put("deployments", "q1", config="c1", status_history=entries[:1])
    wire.refuse["DELETE", "/deployments/q1"] = Refusal(202, "", "")
    looks = iter([lambda: wire.rows["deployments", "default", "q1"].update(status_history=entries), wire.rows.clear])
    monkeypatch.setattr("time.sleep", lambda _: next(looks)())
    done = nimhost("rm", "q1")
    assert (done.stdout, done.stderr) == ("Removed q1.\n", "03:04:01  DELETING  Waiting for Docker.\n")


def test_rm_leaves_what_others_made_or_use(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    wire.put("deployment-configs", "q1", description=f"{MADE_BY} x")
    wire.put("models", "q1", description="mine")
    wire.put("filesets", "q1", description="")
    wire.refuse["DELETE", "/deployment-configs/q1"] = Refusal(409, "InUse", "another deployment uses it")
    done = nimhost("rm", "q1")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "Removed q1.\n", "")
    assert [wire.names(kind) for kind in KINDS] == [["q1"], ["q1"], ["q1"], []]


def test_rm_keeps_the_model_of_adapters_and_says_so(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    wire.put("adapters", "math", "team", model=f"default/{QWEN}", fileset="default/lora")
    wire.put("adapters", "other", model="default/another", fileset="default/lora")
    done = nimhost("rm", QWEN)
    assert done.stdout == f"Removed {QWEN} and its deployment config.\n"
    assert "stay, for the adapters on it: team/math." in done.stderr
    assert f"nimhost models delete {QWEN} && nimhost files filesets delete {QWEN}" in done.stderr
    assert [wire.names(kind) for kind in KINDS] == [[QWEN], [QWEN], [], []]
    assert wire.names("adapters") == ["math", "other"]


def test_rm_keeps_the_config_when_asked(nimhost: Run, wire: FakeWire) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    nimhost("rm", QWEN, "--keep-config")
    assert [wire.names(kind) for kind in KINDS] == [[QWEN], [QWEN], [QWEN], []]
    assert nimhost("rm", QWEN).exit_code == 0  # what is left can still be removed
    assert [wire.names(kind) for kind in KINDS] == [[], [], [], []]


def test_rm_of_several_does_what_it_can(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    done = nimhost("rm", "nope", "q1")
    assert done.exit_code == 1
    assert "Deployment 'default/nope' not found" in done.stderr
    assert done.stdout == "Removed q1.\n"


def test_rm_of_several_asks_for_all_before_it_waits_for_one(
    nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("q1", "q2", "q3"):
        wire.put("deployments", name, config=name)
    monkeypatch.setattr(Deployments, "wait", interrupted)
    done = nimhost("rm", "q1", "nope", "q2", "q3")
    assert wire.names("deployments") == []
    assert done.exit_code == 130
    assert "q1, q2, q3 go on being removed." in done.stderr
    assert "nimhost rm q1 q2 q3" in done.stderr


def test_ctrl_c_during_rm_says_what_stays(nimhost: Run, wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    becomes_ready(wire)
    nimhost("deploy", "Qwen/Qwen3-1.7B")
    monkeypatch.setattr(Deployments, "wait", interrupted)
    done = nimhost("rm", QWEN)
    assert done.exit_code == 130
    assert f"{QWEN} goes on being removed. Its config, model and fileset stay" in done.stderr
    assert f"nimhost rm {QWEN}" in done.stderr


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_rm_without_waiting(nimhost: Run, wire: FakeWire) -> None:
    wire.put("deployments", "q1", config="q1")
    assert "nimhost wait q1 --status DELETED" in nimhost("rm", "q1", "--no-wait").stdout
    assert wire.names("deployments") == []


def test_stop_and_start(nimhost: Run, wire: FakeWire) -> None:
    wire.ready("q1", "default/q1")
    wire.script = [snapshot("READY")]
    assert nimhost("stop", "q1").exit_code == 0
    assert wire.rows["deployments", "default", "q1"]["desired"] == "stopped"
    assert "q1 is READY" in nimhost("start", "q1").stdout
    assert wire.rows["deployments", "default", "q1"]["desired"] == "running"

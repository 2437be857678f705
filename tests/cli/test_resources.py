"""The resource commands against a real daemon that has no Docker engine: what is stored, printed and refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import pytest
from click.testing import Result

from nimhost.cli.main import cli
from nimhost.cli.resources_files import local_place, uploads
from nimhost.errors import BadRequest
from nimhost.kinds import KINDS
from tests.cli.terminal import Terminal
from tests.e2e.daemon import DaemonProcess
from tests.e2e.upstreams import OPENAI_KEY, Upstreams
from tests.tiny import tiny_lora

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("daemon")
    daemon = DaemonProcess(directory, {"DOCKER_HOST": f"unix://{directory}/none.sock"})
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture
def here(daemon: DaemonProcess, nimhost: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a workspace of the test's own; fails unless it succeeds, or with the `code` that is expected."""
    workspace = f"w{uuid4().hex[:12]}"
    monkeypatch.setenv("NIMHOST_BASE_URL", daemon.url)
    assert nimhost("workspaces", "create", workspace).exit_code == 0
    monkeypatch.setenv("NIMHOST_WORKSPACE", workspace)

    def run(*args: str, code: int = 0, stdin: str | None = None) -> Result:
        done = nimhost(*args, stdin=stdin)
        assert done.exit_code == code, done.output
        return done

    return run


def data(done: Result) -> Any:
    return json.loads(done.stdout)


def command(*path: str) -> click.Command:
    """The command of that path, as typed."""
    found: click.Command = cli
    for word in path:
        assert isinstance(found, click.Group)
        child = found.get_command(click.Context(found), word)
        assert child is not None, f"nimhost {' '.join(path)} is missing"
        found = child
    return found


def options(*path: str) -> set[str]:
    return {word for param in command(*path).params for word in (*param.opts, *param.secondary_opts)}


# --- what there is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_has_its_commands(kind: Any) -> None:
    for verb in ("create", "get", "list", "update", "delete"):
        command(*kind.cli.split(), verb)
    listing = {"--page", "--page-size", "--all-pages", "-f", "-c", "--output-columns", "--no-truncate", "--workspace"}
    assert listing <= options(*kind.cli.split(), "list")
    assert {"--input-file", "--input-data", "--exist-ok", "--name"} <= options(*kind.cli.split(), "create")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("secrets create", "--from-file --value --description"),
        ("files upload", "--remote-path"),
        ("files download", "-o --output --remote-path"),
        ("files filesets create", "--storage --metadata --purpose --cache --custom-fields --description --project"),
        ("models create", "--fileset --spec --base-model --backend-format --finetuning-type --api-endpoint --prompt "
                          "--custom-fields --ownership --model-providers --trust-remote-code --description --project"),
        ("models get", "--verbose"),
        ("models list", "--verbose --filter --filter.name --filter.base-model --sort"),
        ("models adapters create", "--fileset --finetuning-type --enabled --description --lora-config"),
        ("models adapters update", "--model-name --enabled"),
        ("models adapters delete", "--model-name"),
        ("adapters create", "--model"),
        ("adapters patch", "--enabled --description --fileset"),
        ("inference get-url", "--provider --virtual-model --workspace"),
        ("inference providers create", "--host-url --api-key-secret-name --enabled-models --auth-header-format "
                                       "--default-extra-headers --default-extra-body --required-extra-headers "
                                       "--required-extra-body --model-deployment-id --status --status-message"),
        ("inference providers update-status", "--status --served-models"),
        ("inference deployment-configs create", "--engine --model-spec --executor-config --model-entity-id"),
        ("inference deployment-configs versions get", "--config"),
        ("inference deployments create", "--config --config-version --project --wait --timeout --poll-interval"),
        ("inference deployments list", "--all-versions"),
        ("inference deployments update-status", "--status"),
        ("inference deployments versions delete", "--deployment"),
        ("inference deployments list-models", "-f"),
        ("inference gateway provider post", "--name --body --input-file"),
        ("inference gateway model put", "--name --body"),
        ("inference gateway openai v1 models list", "-f"),
        ("inference models get", "-f"),
        ("inference virtual-models patch", "--default-model-entity"),
        ("secrets admin rotate-encryption-keys", "-f"),
    ],
)  # fmt: skip
def test_commands_take_the_options_of_the_reference(path: str, expected: str) -> None:
    assert set(expected.split()) <= options(*path.split())


@pytest.mark.parametrize("word", ["secrets", "inference", "files"])
def test_help_of_a_group_loads_no_http_library(word: str) -> None:
    code = (
        f"import sys; from nimhost.cli.main import cli; cli(['{word}', '--help'], standalone_mode=False); "
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'httpx'" not in done.stderr
    assert "'rich'" not in done.stderr


# --- creating ------------------------------------------------------------------------------------------------------


def test_the_name_is_taken_in_its_place_and_as_an_option(here: Run) -> None:
    assert data(here("models", "create", "one"))["name"] == "one"
    assert data(here("models", "create", "--name", "two"))["name"] == "two"
    assert data(here("models", "create", "--input-data", '{"name": "three"}'))["name"] == "three"
    assert "twice" in here("models", "create", "one", "--name", "two", code=2).stderr
    assert "Missing: NAME" in here("models", "create", code=2).stderr


def test_what_is_missing_is_named_before_anything_is_sent(here: Run) -> None:
    refused = here("inference", "deployment-configs", "create", "c1", "--engine", "nim", code=2)
    assert "Missing: --model-spec, --executor-config." in refused.stderr


@pytest.mark.parametrize("flag", ["--model-spec", "--executor-config", "--input-data"])
@pytest.mark.parametrize("text", ["{gpu: 1", "gpu", "a: b: c", '{"gpu": NaN}', "gpu: .nan", "? [1]\n: 2", "!!python/x"])
def test_a_structure_that_is_none_is_refused_with_the_flag(here: Run, flag: str, text: str) -> None:
    refused = here("inference", "deployment-configs", "create", "c1", flag, text, code=2)
    assert f"Invalid value for '{flag}': this is neither JSON nor YAML" in refused.stderr


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("engine: nim\nexecutor_config:\n\tgpu: 1\n", "line 3, column 1"),
        ("engine: nim\n a: b: c\n", "line 2, column 3"),
        ('{"engine": "nim",\n "x" 1', "line 2 column 6"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(here: Run, text: str, where: str) -> None:
    refused = here("inference", "deployment-configs", "create", "c1", "--input-file", "-", code=2, stdin=text)
    assert where in refused.stderr


def test_structures_may_be_written_as_yaml(here: Run, tmp_path: Path) -> None:
    """As the reference takes them."""
    file = tmp_path / "config.yaml"
    file.write_text("engine: nim  # or vllm\nmodel_spec: {}\nexecutor_config:\n  gpu: 1\n  additional_args: [a, '1']\n")
    made = data(here("inference", "deployment-configs", "create", "c1", "--input-file", str(file)))
    assert (made["engine"], made["executor_config"]["additional_args"]) == ("nim", ["a", "1"])
    fields = ("--engine", "vllm", "--model-spec", "model_name: qwen", "--executor-config", "{gpu: 2}")
    made = data(here("inference", "deployment-configs", "create", "c2", *fields))
    assert (made["model_spec"]["model_name"], made["executor_config"]["gpu"]) == ("qwen", 2)
    made = data(here("models", "create", "m1", "--custom-fields", "{since: 2026-01-02, 1: one}"))
    assert made["custom_fields"] == {"since": "2026-01-02", "1": "one"}


def test_flags_win_over_input_data_and_that_over_an_input_file(here: Run, tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    file.write_text('{"description": "file", "project": "file", "base_model": "file"}')
    inputs = ("--input-file", str(file), "--input-data", '{"project": "data", "base_model": "data"}')
    made = data(here("models", "create", "m1", *inputs, "--base-model", "flag"))
    assert (made["description"], made["project"], made["base_model"]) == ("file", "data", "flag")
    assert data(here("models", "create", "m2", "--input-file", "-", stdin='{"project": "p"}'))["project"] == "p"
    assert "not an object" in here("models", "create", "m3", "--input-data", "[]", code=2).stderr
    assert "--input-file" in here("models", "create", "m3", "--input-file", "-", code=2, stdin="{").stderr
    assert "Cannot read" in here("models", "create", "m3", "--input-file", str(tmp_path / "no"), code=2).stderr


def test_one_that_exists_is_an_error_unless_it_may(here: Run) -> None:
    made = data(here("models", "create", "m1", "--description", "first"))
    refused = here("models", "create", "m1", code=1)
    assert refused.stdout == ""
    assert refused.stderr.startswith("Error: ")
    assert data(here("models", "create", "m1", "--description", "second", "--exist-ok")) == made


def test_what_the_daemon_refuses_names_the_field_and_prints_nothing_else(here: Run) -> None:
    refused = here("inference", "providers", "create", "p1", "--host-url", "not a url", code=1)
    assert refused.stdout == ""
    assert "host_url" in refused.stderr


# --- secrets -------------------------------------------------------------------------------------------------------


def test_a_secret_from_standard_input_loses_the_white_space_around_it(here: Run, tmp_path: Path) -> None:
    made = here("secrets", "create", "key", "--from-file", "-", "--description", "d", stdin="  canary-1\n")
    assert "canary" not in made.output
    assert data(made)["description"] == "d"
    assert data(here("secrets", "access", "key"))["value"] == "canary-1"
    file = tmp_path / "value"
    file.write_text("canary-2\n")
    assert "canary" not in here("secrets", "update", "key", "--from-file", str(file)).output
    assert data(here("secrets", "access", "key"))["value"] == "canary-2"
    here("secrets", "update", "key", "--description", "other")
    assert data(here("secrets", "access", "key"))["value"] == "canary-2"
    assert "canary" not in here("secrets", "list").output + here("secrets", "get", "key").output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "Missing: --from-file FILE"),
        (("--value", "a", "--from-file", "-"), "given twice"),
        (("--value", "  "), "empty"),
        (("--from-file", "-"), "empty"),
    ],
)
def test_a_secret_needs_one_value(here: Run, given: tuple[str, ...], said: str) -> None:
    assert said in here("secrets", "create", "key", *given, code=2, stdin="\n").stderr


# --- looking -------------------------------------------------------------------------------------------------------


def test_a_list_is_a_page_for_programs_and_a_table_for_people(here: Run) -> None:
    for name in ("alpha", "beta", "gamma"):
        here("models", "create", name, "--project", "odd" if name == "beta" else "even")
    page = data(here("models", "list"))
    assert [row["name"] for row in page["data"]] == ["alpha", "beta", "gamma"]
    assert page["pagination"]["total_results"] == 3
    table = here("models", "list", "-f", "table").stdout.splitlines()
    assert table[0].split() == ["NAME", "AGE"]
    assert [line.split()[0] for line in table[1:]] == ["alpha", "beta", "gamma"]
    assert here("models", "list", "-f", "raw").stdout.count("\n") == 1
    assert "name: alpha\n" in here("models", "list", "-f", "yaml").stdout
    assert here("models", "list", "-f", "table", "--filter", "name=none").stdout == "Nothing.\n"


def test_a_list_can_be_cut_sorted_and_narrowed_down(here: Run) -> None:
    for name in ("alpha", "beta", "gamma"):
        here("models", "create", name, "--project", "odd" if name == "beta" else "even")

    def names(*args: str) -> list[str]:
        return [row["name"] for row in data(here("models", "list", *args))["data"]]

    assert names("--sort", "-name") == ["gamma", "beta", "alpha"]
    assert names("--page-size", "2", "--page", "2", "--sort", "name") == ["gamma"]
    assert names("--page-size", "2", "--all-pages") == ["alpha", "beta", "gamma"]
    assert names("--filter", "project=odd") == ["beta"]
    assert names("--filter", '{"name": {"$in": ["alpha", "gamma"]}}') == ["alpha", "gamma"]
    assert names("--filter.name", "beta") == ["beta"]
    assert names("--filter", "project=even", "--filter", "name=gamma") == ["gamma"]
    assert "nosuch" in here("models", "list", "--filter", "nosuch=1", code=1).stderr
    assert "--filter" in here("models", "list", "--filter", "name", code=2).stderr


def test_one_is_json_unless_something_else_was_asked_for(here: Run) -> None:
    here("models", "create", "m1")
    assert data(here("models", "get", "m1"))["name"] == "m1"
    assert "name: m1" in here("models", "get", "m1", "-f", "yaml").stdout
    missing = here("models", "get", "nope", code=1)
    assert (missing.stdout, missing.stderr.startswith("Error: Model")) == ("", True)


# --- changing ------------------------------------------------------------------------------------------------------


def test_update_changes_replaces_or_makes_a_version_as_the_kind_does(here: Run) -> None:
    here("models", "create", "m1", "--description", "d", "--project", "p")
    changed = data(here("models", "update", "m1", "--description", "e"))
    assert (changed["description"], changed["project"]) == ("e", "p")
    here("inference", "providers", "create", "p1", "--host-url", "http://127.0.0.1:1", "--description", "d")
    replaced = data(here("inference", "providers", "update", "p1", "--host-url", "http://127.0.0.1:2"))
    assert (replaced["host_url"], replaced["description"]) == ("http://127.0.0.1:2", None)
    place = ("inference", "deployment-configs")
    fields = ("--engine", "nim", "--model-spec", "{}", "--executor-config")
    here(*place, "create", "c1", *fields, '{"gpu": 0}')
    here(*place, "update", "c1", *fields, '{"gpu": 2}')
    assert [row["executor_config"]["gpu"] for row in data(here(*place, "versions", "list", "c1"))] == [2, 0]
    assert data(here(*place, "versions", "get", "1", "--config", "c1"))["executor_config"]["gpu"] == 0
    assert here(*place, "versions", "delete", "1", "--config", "c1").stdout == "✓ Deleted successfully\n"
    assert len(data(here(*place, "versions", "list", "c1"))) == 1
    assert "Nothing to change" in here("models", "update", "m1", code=2).stderr


@pytest.mark.parametrize("place", [kind.cli for kind in KINDS.values()])
def test_deleting_says_so_and_what_is_not_there_is_an_error(here: Run, place: str) -> None:
    assert here(*place.split(), "delete", "nope-nope", code=1).stderr.startswith("Error: ")
    if place in ("models", "projects", "files filesets"):
        here(*place.split(), "create", "x1")
        assert here(*place.split(), "delete", "x1").stdout == "✓ Deleted successfully\n"
        here(*place.split(), "get", "x1", code=1)


def test_adapters_are_put_on_a_model_and_found_without_it(here: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    here("files", "filesets", "create", "lora")
    here("files", "upload", str(tmp_path / "adapter_config.json"), "lora")
    here("models", "create", "base")
    make = ("models", "adapters", "create", "base", "math", "--fileset", "lora", "--finetuning-type", "lora")
    made = data(here(*make, "--enabled", "--lora-config", '{"rank": 8}'))
    assert (made["name"], made["enabled"], made["lora_config"]["rank"]) == ("math", True, 8)
    assert data(here(*make, "--exist-ok")) == made
    assert data(here("adapters", "get", "math"))["model"].endswith("/base")
    off = data(here("models", "adapters", "update", "math", "--model-name", "base", "--no-enabled"))
    assert off["enabled"] is False
    assert data(here("adapters", "patch", "math", "--enabled"))["enabled"] is True
    assert [row["name"] for row in data(here("adapters", "list"))["data"]] == ["math"]
    here("models", "adapters", "delete", "math", "--model-name", "base")
    here("adapters", "get", "math", code=1)


def test_a_deployment_is_made_waited_for_and_looked_at(here: Run) -> None:
    executor = '{"gpu": 0, "image_name": "no/such", "image_tag": "1", "health_check_path": "/health"}'
    configs, deployments = ("inference", "deployment-configs"), ("inference", "deployments")
    here(*configs, "create", "c1", "--engine", "generic", "--model-spec", "{}", "--executor-config", executor)
    late = here(*deployments, "create", "d1", "--config", "c1", "--wait", "--timeout", "0.5", code=1)
    assert "'d1' is not READY after 0.5 s" in late.stderr
    assert data(here(*deployments, "get", "d1"))["config_version"] == 1
    here(*deployments, "update", "d1", "--config", "c1", "--desired", "stopped")
    assert len(data(here(*deployments, "list", "--all-versions"))["data"]) == 2
    assert data(here(*deployments, "versions", "get", "1", "--deployment", "d1"))["desired"] == "running"
    assert data(here(*deployments, "list-models", "d1"))["models"] == []
    assert "/d1" in here(*configs, "delete", "c1", code=1).stderr  # who uses it
    stopped = data(here(*deployments, "update-status", "d1", "--status", "PENDING", "--status-message", "by hand"))
    assert stopped["status_message"] == "by hand"


def test_a_provider_s_status_can_be_set_by_hand(here: Run) -> None:
    here("inference", "providers", "create", "p1", "--host-url", "http://127.0.0.1:1")
    served = '[{"model_entity_id": "default/m", "served_model_name": "m"}]'
    done = data(here("inference", "providers", "update-status", "p1", "--status", "ERROR", "--served-models", served))
    assert (done["status"], done["served_models"][0]["served_model_name"]) == ("ERROR", "m")


def test_secrets_survive_a_rotation_of_their_keys(here: Run) -> None:
    here("secrets", "create", "key", "--value", "canary-1")
    assert data(here("secrets", "admin", "rotate-encryption-keys"))["success"] is True
    assert data(here("secrets", "access", "key"))["value"] == "canary-1"


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_go_up_and_come_down_as_they_are(here: Run, tmp_path: Path) -> None:
    source = tmp_path / "lora"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b.bin").write_bytes(bytes(range(256)) * 1000)
    here("files", "filesets", "create", "fs")
    here("files", "upload", f"{source}/", "fs", "--remote-path", "data/")
    here("files", "upload", str(source / "a.txt"), "fs", "--remote-path", "renamed.txt")
    listed = data(here("files", "list", "fs"))
    assert {f["path"]: f["size"] for f in listed} == {"data/a.txt": 1, "data/sub/b.bin": 256_000, "renamed.txt": 1}
    assert "data/sub/b.bin" in here("files", "list", "fs", "-f", "table").stdout
    here("files", "download", "fs", "-o", str(tmp_path / "all"))
    assert (tmp_path / "all/data/sub/b.bin").read_bytes() == (source / "sub/b.bin").read_bytes()
    here("files", "download", "fs", "--remote-path", "data", "--output", str(tmp_path / "part"))
    assert sorted(p.name for p in (tmp_path / "part").rglob("*") if p.is_file()) == ["a.txt", "b.bin"]
    assert (tmp_path / "part/a.txt").read_text() == "a"
    assert "Deleted" in here("files", "delete", "fs", "--remote-path", "renamed.txt").stdout
    assert len(data(here("files", "list", "fs"))) == 2
    assert "files list fs" in here("files", "download", "fs", "--remote-path", "no", "-o", "x", code=1).stderr


def test_large_files_show_how_far_they_are(here: Run, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    sizes = {"empty.txt": 0, "large.bin": 9_000_000, "small.bin": 1000}
    for name, size in sizes.items():
        (tmp_path / "up" / name).write_bytes(random.Random(size).randbytes(size))
    here("files", "filesets", "create", "fs")
    shown = terminal("files", "upload", f"{tmp_path}/up/", "fs")
    assert shown.exit_code() == 0
    fetched = terminal("files", "download", "fs", "-o", str(tmp_path / "down"))
    assert fetched.exit_code() == 0
    for said in (shown, fetched):
        assert said.text.count("100%") == 1, said.text
        assert "large.bin  [" in said.text
    for name in sizes:
        assert (tmp_path / "down" / name).read_bytes() == (tmp_path / "up" / name).read_bytes()


def test_an_upload_without_a_fileset_makes_one(here: Run, tmp_path: Path) -> None:
    (tmp_path / "My Data.csv").write_text("1")
    assert "my-data-csv" in here("files", "upload", str(tmp_path / "My Data.csv")).stdout
    assert data(here("files", "list", "my-data-csv"))[0]["path"] == "My Data.csv"


@pytest.mark.parametrize(
    ("local", "remote", "expected"),
    [
        ("one.txt", "", ["one.txt"]),
        ("one.txt", "x/", ["x/one.txt"]),
        ("one.txt", "two.txt", ["two.txt"]),
        ("folder/", "", ["a", "sub/b"]),
        ("folder/", "x", ["x/a", "x/sub/b"]),
        ("folder", "", ["folder/a", "folder/sub/b"]),
    ],
)
def test_where_uploads_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str, remote: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder/sub").mkdir(parents=True)
    for name in ("one.txt", "folder/a", "folder/sub/b"):
        Path(name).touch()
    assert [path for _, path in uploads(local, remote)] == expected


@pytest.mark.parametrize(
    ("path", "remote", "expected"),
    [("a/b", "", "out/a/b"), ("a/b", "a", "out/b"), ("a/b", "a/", "out/b"), ("a/b", "a/b", "out/b")],
)
def test_where_downloads_go(path: str, remote: str, expected: str) -> None:
    assert local_place(path, remote, "out") == Path(expected)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_download_never_leaves_its_directory(path: str) -> None:
    with pytest.raises(BadRequest, match="would not be inside"):
        local_place(path, "", "out")


# --- the gateway ---------------------------------------------------------------------------------------------------


def test_a_provider_is_made_waited_for_and_asked_by_its_name_both_ways(here: Run, daemon: DaemonProcess) -> None:
    with Upstreams() as outside:
        url = outside.addresses["https://api.openai.com/v1"]
        here("secrets", "create", "key", "--from-file", "-", stdin=f"{OPENAI_KEY}\n")
        here("inference", "providers", "create", "openai", "--host-url", url, "--api-key-secret-name", "key",
             "--enabled-models", "gpt-4", "--enabled-models", "gpt-3.5-turbo")  # fmt: skip
        assert "Gateway is ready" in here("wait", "inference", "provider", "openai").stdout
        assert data(here("inference", "gateway", "provider", "ready", "openai"))["ready"] is True
        listed = data(here("inference", "gateway", "provider", "get", "v1/models", "--name", "openai"))
        assert [model["id"] for model in listed["data"]] == ["gpt-4", "gpt-3.5-turbo", "gpt-2"]
        ask = ("inference", "gateway", "provider", "post", "v1/chat/completions")
        body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
        for name in (["openai"], ["--name", "openai"]):
            said = data(here(*ask, *name, "--body", json.dumps(body)))
            assert "Hi" in said["choices"][0]["message"]["content"]
        streamed = here(*ask, "openai", "--input-data", json.dumps(body | {"stream": True})).stdout
        assert streamed.endswith("data: [DONE]\n\n")
        served = [model["id"] for model in data(here("inference", "models", "list"))["data"]]
        assert sorted(name.partition("/")[2] for name in served) == ["gpt-3-5-turbo", "gpt-4"]
        one = data(here("inference", "models", "get", "gpt-4"))
        assert one["id"] in served
        whole = json.dumps(body | {"model": one["id"]})
        assert "Hi" in here("inference", "gateway", "openai", "post", "v1/chat/completions", "--body", whole).stdout
        assert (
            "Hi"
            in here("inference", "gateway", "model", "post", "v1/chat/completions", "gpt-4", "--body", whole).stdout
        )
        assert here("inference", "get-url").stdout.strip() == (
            f"{daemon.url}/apis/inference-gateway/v2/workspaces/{one['id'].partition('/')[0]}/openai/-/v1"
        )
        assert here("inference", "get-url", "--provider", "openai").stdout.endswith("/provider/openai/-\n")
        here("inference", "get-url", "--provider", "nope", code=1)


def test_waiting_says_what_is_there_instead(here: Run) -> None:
    assert "nope" in here("wait", "inference", "provider", "nope", "--timeout", "5", code=1).stderr
    here("inference", "providers", "create", "down", "--host-url", "http://127.0.0.1:1")
    late = here("wait", "inference", "provider", "down", "-t", "1", code=1)
    assert "Provider 'down' is not ready after 1 s" in late.stderr
    assert "nope" in here("wait", "inference", "deployment", "nope", code=1).stderr
    assert "nope" in here("wait", "nope", code=1).stderr
    assert "✓ Deployment DELETED!" in here("wait", "inference", "deployment", "nope", "--status", "DELETED").stdout


def test_the_address_of_a_provider_elsewhere_is_there(here: Run, daemon: DaemonProcess, nimhost: Run) -> None:
    other = f"w{uuid4().hex[:12]}"
    here("workspaces", "create", other)
    here("inference", "providers", "create", "up", "--host-url", "http://127.0.0.1:1", "-w", other)
    shown = here("inference", "get-url", "--provider", f"{other}/up").stdout
    assert shown == f"{daemon.url}/apis/inference-gateway/v2/workspaces/{other}/provider/up/-\n"


def test_a_deletion_can_be_tried_first(here: Run) -> None:
    name = f"w{uuid4().hex[:12]}"
    here("workspaces", "create", name)
    here("secrets", "create", "k1", "--value", "x", "-w", name)
    shown = here("workspaces", "delete", name, "--dry-run").stdout
    assert shown == f"Would delete: workspace {name}\nWould delete: secret {name}/k1\n"
    assert [one["name"] for one in data(here("workspaces", "delete", name, "--dry-run", "-f", "json"))["would_delete"]]
    here("secrets", "get", "k1", "-w", name)


# --- filesets and adapters -----------------------------------------------------------------------------------------


def test_a_path_is_no_fileset_and_the_command_that_makes_one_of_it_works(here: Run, tmp_path: Path) -> None:
    directory = tiny_lora(tmp_path / "math-lora")
    here("models", "create", "base")
    refused = here("adapters", "create", "math", "--model", "base", "--fileset", str(directory), code=2)
    made = refused.stderr.rpartition("nimhost ")[2].split()
    assert made == ["files", "upload", f"{directory}/"]
    assert here(*made).stdout.endswith("Completed upload to math-lora\n")
    assert here("adapters", "create", "math", "--model", "base", "--fileset", "math-lora").exit_code == 0
    assert data(here("adapters", "get", "math"))["finetuning_type"] == "lora"


def test_who_deletes_a_fileset_hears_which_adapters_lose_their_files(here: Run, tmp_path: Path) -> None:
    here("models", "create", "base")
    here("files", "upload", f"{tiny_lora(tmp_path / 'math-lora')}/")
    here("adapters", "create", "math", "--model", "base", "--fileset", "math-lora")
    row = data(here("adapters", "get", "math"))
    dry = here("files", "filesets", "delete", "math-lora", "--dry-run")
    assert f"would lose their files: {row['workspace']}/math." in dry.stderr
    done = here("files", "filesets", "delete", "math-lora")
    assert f"have lost their files: {row['workspace']}/math." in done.stderr
    assert done.stdout == "✓ Deleted successfully\n"


def test_the_list_of_adapters_has_the_name_to_chat_with(here: Run, tmp_path: Path) -> None:
    here("models", "create", "base")
    here("files", "upload", f"{tiny_lora(tmp_path / 'math-lora')}/")
    here("adapters", "create", "math", "--model", "base", "--fileset", "math-lora")
    row = data(here("adapters", "get", "math"))
    shown = here("adapters", "list", "-f", "table").stdout
    assert "NAME TO USE" in shown
    assert f"  {row['workspace']}--math  " in shown


def test_one_entity_as_a_table_has_a_row_for_each_field(here: Run) -> None:
    here("workspaces", "create", (name := f"t{uuid4().hex[:9]}"), "--description", "Ours")
    shown = here("workspaces", "get", name, "-f", "table").stdout.splitlines()
    assert shown[0].split() == ["FIELD", "VALUE"]
    assert ["description", "Ours"] in [line.split() for line in shown]


@pytest.mark.parametrize("path", ["adapters create", "models adapters create"])
def test_every_option_of_an_adapter_says_what_it_is(path: str) -> None:
    said = {param.name for param in command(*path.split()).params if getattr(param, "help", None)}
    assert {"fileset", "finetuning_type", "enabled", "lora_config", "description"} <= said

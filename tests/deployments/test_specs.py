"""Model specs from a hub and from directories, through a whole daemon: at once, later, again after a change."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Models, ToolCallPlugin, TrustRemoteCode
from nimhost.config import Weights as WeightsSettings
from nimhost.deployments import specs
from nimhost.host.weights import Repo
from tests.fakes.hub import FakeHub
from tests.support import eventually
from tests.tiny import HEADS, HIDDEN, tiny_lora, tiny_model
from tests.world import MODELS, World

Json = dict[str, Any]
FILESETS = "/apis/files/v2/workspaces/default/filesets"
SECRETS = "/apis/secrets/v2/workspaces/default/secrets"
REPO = "Qwen/Qwen3-tiny"
INDEX = "model.safetensors.index.json"
SHARDS = b'{"weight_map": {"x": "a-00001-of-00002.safetensors", "y": "a-00002-of-00002.safetensors"}}'
PADDING = 3_000_000
"""Bytes of weights behind the header that nobody must fetch."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def hub(tiny: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add(REPO, files_of(tiny))
        yield hub


def files_of(tiny: Path) -> dict[str, bytes]:
    """The model, with weights that are mostly air."""
    files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.suffix != ".gguf"}
    return files | {"model.safetensors": files["model.safetensors"] + bytes(PADDING)}


@asynccontextmanager
async def opened(directory: Path, hub: FakeHub, **settings: Any) -> AsyncIterator[World]:
    weights = WeightsSettings(endpoint=hub.url, cache_dir=str(directory / "weights"))
    async with World(directory, weights=weights, **settings) as world:
        yield world


@pytest.fixture
async def world(tmp_path: Path, hub: FakeHub) -> AsyncIterator[World]:
    async with opened(tmp_path, hub) as world:
        yield world


async def make_fileset(world: World, name: str = "ff", repo: str = REPO, **more: Any) -> None:
    storage = more.pop("storage", {})
    if storage.get("type") != "local":
        storage = {"type": "huggingface", "repo_id": repo} | storage
    reply = await world.http.post(FILESETS, json={"name": name, "storage": storage, **more})
    assert reply.status_code == 200, reply.text


async def make_model(world: World, name: str = "mm", status: int = 201, **more: Any) -> Json:
    reply = await world.http.post(f"{MODELS}/models", json={"name": name, "fileset": "default/ff", **more})
    assert reply.status_code == status, reply.text
    made: Json = reply.json()
    return made


async def model(world: World, name: str = "mm", query: str = "") -> Json:
    found: Json = (await world.http.get(f"{MODELS}/models/{name}{query}")).json()
    return found


async def patch(world: World, body: Json, name: str = "mm") -> Json:
    reply = await world.http.patch(f"{MODELS}/models/{name}", json=body)
    assert reply.status_code == 200, reply.text
    changed: Json = reply.json()
    return changed


async def test_a_model_has_its_spec_in_the_reply_and_no_weights_were_fetched(
    world: World, hub: FakeHub, tiny: Path
) -> None:
    await make_fileset(world)
    made = await make_model(world)
    spec = made["spec"]
    assert (spec["family"], spec["hidden_size"], spec["num_attention_heads"]) == ("qwen3", HIDDEN, HEADS)
    weights = (tiny / "model.safetensors").read_bytes()
    assert spec["base_num_parameters"] == (len(weights) - 8 - int.from_bytes(weights[:8], "little")) // 2  # exact
    assert (spec["is_chat"], spec["context_size"], spec["precision"]) == (True, 4096, "bfloat16")
    assert (made["spec_status"], made["spec_message"]) == ("ready", None)
    assert spec["linear_layers"] is None
    layers = (await model(world, query="?verbose=true"))["spec"]["linear_layers"]
    assert len(layers) == 2 * 7 + 1
    assert hub.sent_bytes("model.safetensors") <= 32 * 1024
    assert {"spec_wish", "spec_fileset"}.isdisjoint(made)


async def test_a_model_without_a_fileset_has_nothing_to_find_out(world: World) -> None:
    made = await make_model(world, fileset=None)
    assert (made["spec"], made["spec_status"], made["spec_message"]) == (None, None, None)


async def test_what_the_user_sends_wins_and_gaps_are_filled(world: World) -> None:
    await make_fileset(world)
    own = {**(await make_model(world))["spec"], "num_layers": 99, "context_size": None}
    made = await make_model(world, "other", spec=own)
    assert (made["spec"]["num_layers"], made["spec"]["context_size"]) == (99, 4096)


async def test_a_user_says_as_much_as_he_likes(world: World, hub: FakeHub) -> None:
    await make_fileset(world)
    computed = (await make_model(world))["spec"]
    made = await make_model(world, "embed-me", spec={"num_layers": 99, "is_embedding_model": False})
    assert made["spec"] == computed | {"num_layers": 99, "is_embedding_model": False}
    assert (await make_model(world, "embed-too"))["spec"]["is_embedding_model"] is True  # its name says so
    hub.faults.down = True
    waiting = await make_model(world, "mmm", spec={"num_layers": 98})
    assert (waiting["spec_status"], waiting["spec"]["num_layers"], waiting["spec"]["family"]) == ("pending", 98, None)


async def test_without_files_a_spec_has_to_be_whole_and_every_gap_is_named(world: World) -> None:
    await make_fileset(world)
    whole = (await make_model(world))["spec"]
    partial = {key: value for key, value in whole.items() if key not in ("family", "vocab_size", "context_size")}
    refused = await make_model(world, "other", status=422, fileset=None, spec=partial)
    assert [problem["loc"] for problem in refused["detail"]] == [
        ["body", "spec", "family"], ["body", "spec", "vocab_size"],
    ]  # fmt: skip
    assert (await make_model(world, "other", fileset=None, spec=whole))["spec"] == whole
    taken = await world.http.patch(f"{MODELS}/models/other", json={"spec": partial})
    assert taken.status_code == 422


@pytest.mark.fault(14)
async def test_a_hub_that_is_away_is_said_and_asked_again(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "PAUSES_S", (0.05, 0.1))
    await make_fileset(world)
    hub.faults.down = True
    made = await make_model(world)
    assert (made["spec"], made["spec_status"]) == (None, "pending")
    assert hub.url in made["spec_message"]
    hub.faults.down = False
    await eventually(spec_ready(world))
    assert (await model(world))["spec"]["hidden_size"] == HIDDEN


async def test_a_slow_hub_does_not_hold_the_request_up(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "PATIENCE_S", 0.2)
    await make_fileset(world)
    hub.faults.bytes_per_s = 1000
    made = await make_model(world)
    assert (made["spec"], made["spec_status"]) == (None, "pending")
    assert "takes longer than 0.2 s" in made["spec_message"]
    hub.faults.bytes_per_s = None
    await patch(world, {"spec": None})  # a fresh try
    await eventually(spec_ready(world))


async def test_a_restart_takes_up_what_was_not_done(world: World, hub: FakeHub) -> None:
    await make_fileset(world)
    hub.faults.down = True
    assert (await make_model(world))["spec_status"] == "pending"
    await world.stop()
    hub.faults.down = False
    await world.start()
    await eventually(spec_ready(world))


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (lambda hub: hub.repos.pop(REPO), f"there is no repository {REPO}"),
        (lambda hub: setattr(hub.repos[REPO], "gated", True), "is gated: it needs a token"),
    ],
)
async def test_a_repository_that_went_away_is_said_with_the_fix(
    world: World, hub: FakeHub, happens: Callable[[FakeHub], None], says: str
) -> None:
    await make_fileset(world)
    happens(hub)
    made = await make_model(world)
    assert (made["spec"], made["spec_status"]) == (None, "failed")
    assert says in made["spec_message"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": b"{", "model.safetensors": b""}, "not JSON"),
        ({"config.json": b"{}"}, "it has no weights"),
        ({"config.json": b"{}", "model.safetensors": b"zip"}, "not a safetensors file"),
        ({"config.json": b"{}", "model.safetensors": struct.pack("<Q", 2) + b"{}"}, "no usable num_hidden_layers"),
        ({"config.json": b"{}", "a-00001-of-00002.safetensors": b"", INDEX: SHARDS}, "a-00002-of-00002.safetensors"),
    ],
)
async def test_a_repository_that_is_no_model_says_why(
    world: World, hub: FakeHub, files: dict[str, bytes], says: str
) -> None:
    hub.add("org/broken", files)
    await make_fileset(world, repo="org/broken")
    made = await make_model(world)
    assert (made["spec"], made["spec_status"]) == (None, "failed")
    assert says in made["spec_message"]


async def test_what_nobody_foresaw_is_said_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(specs, "describe_weights", broken)
    await make_fileset(world)
    made = await make_model(world)
    assert (made["spec"], made["spec_status"]) == (None, "failed")
    assert "nobody thought of this" in made["spec_message"]


async def test_a_token_that_works_again_opens_the_repository(world: World, hub: FakeHub, tiny: Path) -> None:
    hub.add("org/gated", files_of(tiny), gated=True, readers=("hf_good",))
    hub.tokens.add("hf_bad")
    await world.http.post(SECRETS, json={"name": "hf-token", "value": "hf_good"})
    await make_fileset(world, repo="org/gated", storage={"token_secret": "hf-token"})
    await world.http.patch(f"{SECRETS}/hf-token", json={"value": "hf_bad"})
    made = await make_model(world)
    assert (made["spec_status"], "the token has no access" in made["spec_message"]) == ("failed", True)
    await world.http.patch(f"{SECRETS}/hf-token", json={"value": "hf_good"})
    await eventually(spec_ready(world))


async def test_uploaded_files_describe_a_model_that_was_made_before_them(world: World, tiny: Path) -> None:
    await world.http.post(FILESETS, json={"name": "ff"})
    made = await make_model(world)
    assert (made["spec_status"], "no config.json" in made["spec_message"]) == ("failed", True)
    for name in ("model.safetensors", "config.json"):
        await world.http.put(f"{FILESETS}/ff/-/{name}", content=(tiny / name).read_bytes())
    await eventually(spec_ready(world))


async def test_a_directory_of_this_machine_is_read_where_it_is(world: World, tiny: Path) -> None:
    await make_fileset(world, storage={"type": "local", "path": str(tiny)})
    assert (await make_model(world))["spec"]["hidden_size"] == HIDDEN


async def test_weights_in_the_cache_need_no_hub(world: World, hub: FakeHub, tiny: Path) -> None:
    await make_fileset(world)
    await world.daemon.weights.fetch(Repo(repo_id=REPO), None, lambda _: None)
    hub.faults.down = True
    assert (await make_model(world))["spec_status"] == "ready"


async def test_another_fileset_is_another_checkpoint(world: World, hub: FakeHub, tiny: Path) -> None:
    files = files_of(tiny)
    config = json.loads(files["config.json"]) | {"max_position_embeddings": 77}
    hub.add("org/other", files | {"config.json": json.dumps(config).encode()})
    await make_fileset(world)
    await make_fileset(world, "gg", "org/other")
    assert (await make_model(world))["spec"]["context_size"] == 4096
    assert (await patch(world, {"fileset": "default/gg"}))["spec"]["context_size"] == 77


TOOLS = {"chat_template": "{{ messages }}", "tool_call_parser": "hermes", "auto_tool_choice": True}


async def test_tool_calling_is_handed_down_when_the_model_is_made_and_not_later(world: World) -> None:
    await make_fileset(world, metadata={"model": {"tool_calling": TOOLS}})
    spec = (await make_model(world))["spec"]
    assert spec["chat_template"] == "{{ messages }}"
    assert spec["tool_call_config"] == {
        "tool_call_parser": "hermes", "tool_call_plugin": None, "auto_tool_choice": True,
    }  # fmt: skip
    changed = {"model": {"tool_calling": {**TOOLS, "tool_call_parser": "mistral"}}}
    assert (await world.http.patch(f"{FILESETS}/ff", json={"metadata": changed})).status_code == 200
    assert (await patch(world, {"description": "new"}))["spec"]["tool_call_config"]["tool_call_parser"] == "hermes"
    own = {**spec, "tool_call_config": {"tool_call_parser": "pythonic"}}
    assert (await patch(world, {"spec": own}))["spec"]["tool_call_config"]["tool_call_parser"] == "pythonic"
    assert (await make_model(world, "new"))["spec"]["tool_call_config"]["tool_call_parser"] == "mistral"


async def test_a_plugin_is_not_handed_down_unless_plugins_are_enabled(tmp_path: Path, hub: FakeHub) -> None:
    metadata = {"model": {"tool_calling": {"tool_call_parser": "p", "tool_call_plugin": "default/pp"}}}
    async with opened(tmp_path, hub) as world:
        await make_fileset(world, metadata=metadata)
        refused = await make_model(world, status=403)
        assert "models.tool_call_plugin.enabled=true" in refused["detail"]
        assert (await world.http.get(f"{MODELS}/models/mm")).status_code == 404
    async with opened(tmp_path, hub, models=Models(tool_call_plugin=ToolCallPlugin(enabled=True))) as world:
        spec = (await make_model(world))["spec"]
        assert spec["tool_call_config"]["tool_call_plugin"] == "default/pp"


async def test_a_plugin_that_comes_after_the_model_was_allowed_is_not_handed_down(world: World, hub: FakeHub) -> None:
    await make_fileset(world)
    hub.faults.down = True
    await make_model(world)
    metadata = {"model": {"tool_calling": {"tool_call_parser": "p", "tool_call_plugin": "default/pp"}}}
    assert (await world.http.patch(f"{FILESETS}/ff", json={"metadata": metadata})).status_code == 200
    hub.faults.down = False
    tools = (await patch(world, {"spec": None}))["spec"]["tool_call_config"]
    assert (tools["tool_call_parser"], tools["tool_call_plugin"]) == ("p", None)


@pytest.mark.parametrize("tools", [{"chat_template": "{% for %}"}, {"auto_tool_choice": "yes"}])
async def test_metadata_that_makes_no_sense_makes_no_model(world: World, tools: Json) -> None:
    await make_fileset(world, metadata={"model": {"tool_calling": tools}})
    refused = await make_model(world, status=400)
    assert "metadata.model.tool_calling" in refused["detail"]


@pytest.mark.parametrize(
    ("repo", "allow", "status"),
    [
        (REPO, ["nvidia/.*"], 403),
        (REPO, ["Qwen/Qwen3"], 403),  # the whole name has to match
        (REPO, ["nvidia/.*", "Qwen/.*"], 201),
        ("nvidia/tiny", ["nvidia/.*"], 201),
    ],
)
async def test_code_is_trusted_from_where_the_settings_allow_it(
    tmp_path: Path, hub: FakeHub, tiny: Path, repo: str, allow: list[str], status: int
) -> None:
    hub.add("nvidia/tiny", files_of(tiny))
    async with opened(tmp_path, hub, models=Models(trust_remote_code=TrustRemoteCode(allow=allow))) as world:
        await make_fileset(world, repo=repo)
        reply = await make_model(world, status=status, trust_remote_code=True)
        if status == 403:
            assert reply["detail"].startswith("Insufficient permissions to set the trust_remote_code field")


async def test_a_trusted_model_cannot_be_moved_to_code_that_is_not(world: World, hub: FakeHub, tiny: Path) -> None:
    hub.add("nvidia/tiny", files_of(tiny))
    await make_fileset(world, "nv", "nvidia/tiny")
    await make_fileset(world)
    await make_model(world, fileset="default/nv", trust_remote_code=True)
    moved = await world.http.patch(f"{MODELS}/models/mm", json={"fileset": "default/ff"})
    assert moved.status_code == 403
    assert (await model(world))["fileset"] == "default/nv"
    later = await make_model(world, "other")
    assert later["trust_remote_code"] is False
    assert (await world.http.patch(f"{MODELS}/models/other", json={"trust_remote_code": True})).status_code == 403


async def test_a_fileset_that_moves_takes_its_models_along(world: World, hub: FakeHub, tiny: Path) -> None:
    """To another checkpoint, but not to code that nobody allowed."""
    files = files_of(tiny)
    config = json.loads(files["config.json"]) | {"max_position_embeddings": 77}
    hub.add("org/other", files | {"config.json": json.dumps(config).encode()})
    hub.add("nvidia/tiny", files)
    await make_fileset(world, repo="nvidia/tiny")
    assert (await make_model(world, trust_remote_code=True))["spec"]["context_size"] == 4096
    moved = {"storage": {"type": "huggingface", "repo_id": "org/other"}}
    assert (await world.http.patch(f"{FILESETS}/ff", json=moved)).status_code == 403
    await patch(world, {"trust_remote_code": False})
    assert (await world.http.patch(f"{FILESETS}/ff", json=moved)).status_code == 200

    async def follows() -> bool:
        return bool(((await model(world))["spec"] or {}).get("context_size") == 77)

    await eventually(follows)


async def test_a_lora_is_no_model_and_says_so(world: World, hub: FakeHub, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "lora")
    hub.add("org/lora", {path.name: path.read_bytes() for path in adapter.iterdir()})
    await make_fileset(world, repo="org/lora")
    assert "register it as an adapter" in (await make_model(world))["spec_message"]


def spec_ready(world: World) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        return bool((await model(world))["spec_status"] == "ready")

    return ready

"""Create, get, list, update, delete: what goes over the wire for every kind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Files, Settings, ToolCallPlugin
from nimhost.config import Models as ModelsTable
from nimhost.entities import Entity, ProviderStatus, ServedModel
from nimhost.errors import InvalidRequest
from nimhost.kinds import KINDS
from tests.api.conftest import FILESETS, MODELS, SECRETS, WORKSPACES, World, open_world

CONFIGS, DEPLOYMENTS, PROVIDERS = (f"{MODELS}/{kind}" for kind in ("deployment-configs", "deployments", "providers"))
BODIES: dict[str, dict[str, Any]] = {
    "workspaces": {"description": "d"},
    "projects": {"description": "d"},
    "secrets": {"value": "canary-value"},
    "filesets": {},
    "models": {},
    "adapters": {"model": "base", "fileset": "lora", "finetuning_type": "lora"},
    "deployment-configs": {"engine": "vllm", "model_spec": {}, "executor_config": {"gpu": 1}},
    "deployments": {"config": "cfg"},
    "providers": {"host_url": "http://127.0.0.1:9/v1"},
    "virtual-models": {"default_model_entity": "default/base"},
}


async def make_adapter_parts(world: World) -> None:
    """A model `base`, and a fileset `lora` that is not empty."""
    await world.make(f"{MODELS}/models", name="base")
    await world.make(FILESETS, name="lora")
    await world("PUT", f"{FILESETS}/lora/-/adapter_config.json", content=b"{}")


def without_nulls(value: Any) -> Any:
    return {k: without_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


async def test_every_kind_is_created_read_listed_and_deleted_with_the_codes_of_the_wire(world: World) -> None:
    await world.make_config()
    await make_adapter_parts(world)
    for key, kind in KINDS.items():
        path = kind.path("default")
        name = f"thing-{key}"
        made = await world("POST", path, {"name": name, **BODIES[key]})
        assert (key, made.status_code) == (key, 200 if key == "filesets" else 201), made.text
        got = await world("GET", f"{path}/{name}")
        assert got.json() == made.json()
        listed = (await world("GET", path)).json()
        mine = next(item for item in listed["data"] if item["name"] == name)
        assert without_nulls(mine) == without_nulls(got.json())
        if not kind.list_nulls:
            assert None not in mine.values()
        again = await world("POST", path, {"name": name, **BODIES[key]})
        assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
        assert again.headers["x-nimhost-error"] == "AlreadyExists"
        gone = await world("DELETE", f"{path}/{name}")
        codes = {"workspaces": 200, "projects": 200, "filesets": 200, "deployments": 202}
        assert gone.status_code == codes.get(key, 204), gone.text
        if key != "deployments":
            missing = await world("GET", f"{path}/{name}")
            assert (missing.status_code, missing.json()) == (404, {"detail": str(kind.not_found("default", name))})


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        (f"{SECRETS}/nope", "Secret default/nope not found"),
        (f"{FILESETS}/nope", "Fileset 'nope' not found in workspace 'default'"),
        (f"{MODELS}/models/nope", "Model with workspace 'default' and name 'nope' not found"),
        (f"{CONFIGS}/nope", "Deployment config 'default/nope' not found"),
        (f"{DEPLOYMENTS}/nope", "Deployment 'default/nope' not found"),
        (f"{PROVIDERS}/nope", "Model provider not found: default/nope"),
        (f"{WORKSPACES}/nope", "Workspace 'nope' not found"),
        ("/apis/models/v2/workspaces/nows/providers", "Workspace 'nows' not found"),
        ("/apis/models/v2/workspaces/nows/providers/p", "Workspace 'nows' not found"),
        ("/apis/nothing", "Not Found"),
    ],
)
async def test_what_is_not_there_is_404_in_the_words_of_the_reference(world: World, path: str, detail: str) -> None:
    reply = await world("GET", path)
    assert (reply.status_code, reply.json()) == (404, {"detail": detail})


async def test_an_unknown_workspace_refuses_the_write(world: World) -> None:
    reply = await world("POST", "/apis/models/v2/workspaces/nows/models", {"name": "m1"})
    assert reply.status_code == 422
    assert reply.json() == {
        "detail": "Workspace 'nows' does not exist. Please create the workspace first.",
        "hint": "nimhost workspaces create nows",
    }
    for path in ("-", "no name"):  # of all of them, and of none that there could be
        reply = await world("POST", f"/apis/models/v2/workspaces/{path}/models", {"name": "m1"})
        assert (reply.status_code, "hint" in reply.json()) == (422, False)


async def test_of_many_creates_of_one_name_exactly_one_wins(world: World) -> None:
    await world.make_config()
    replies = await asyncio.gather(*(world("POST", DEPLOYMENTS, {"name": "dd", "config": "cfg"}) for _ in range(12)))
    assert sorted(r.status_code for r in replies) == [201] + [409] * 11
    assert len(await world.store.all("providers")) == 1


# --- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "loc", "text"),
    [
        (PROVIDERS, {"name": "pp"}, ["body", "host_url"], "Field required"),
        (PROVIDERS, {"name": "pp", "host_ulr": "http://x"}, ["body", "host_ulr"], "did you mean 'host_url'?"),
        (PROVIDERS, {"name": "p p", "host_url": "http://x"}, ["body", "name"], "'p p' is not a valid name"),
        (PROVIDERS, {"name": 7, "host_url": "http://x"}, ["body", "name"], "Expected `str`, got `int`"),
        (PROVIDERS, {"name": "pp", "host_url": "not a url"}, ["body", "host_url"], "http://"),
        (PROVIDERS, {"name": "pp", "host_url": "ftp://x"}, ["body", "host_url"], "http://"),
        (PROVIDERS, {"name": "pp", "host_url": "http://u:p@x"}, ["body", "host_url"], "without user name"),
        (PROVIDERS, {"name": "pp", "host_url": "http://x:99999"}, ["body", "host_url"], "http://"),
        (PROVIDERS, {"name": "pp", "host_url": "http://x", "enabled_models": "a"}, ["body", "enabled_models"], "array"),
        (
            PROVIDERS,
            {"name": "pp", "host_url": "http://x", "auth_header_format": "X-Api-Key: nothing"},
            ["body", "auth_header_format"],
            "exactly one Jinja2 variable named 'auth_secret' (found: none)",
        ),
        (CONFIGS, {"name": "cc", "engine": "tgi"}, ["body", "engine"], "Input should be 'nim', 'vllm' or 'generic'"),
        (
            CONFIGS,
            {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {}},
            ["body", "executor_config", "gpu"],
            "Field required",
        ),
        (
            CONFIGS,
            {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": -1}},
            ["body", "executor_config", "gpu"],
            "Input should be greater than or equal to 0",
        ),
        (
            CONFIGS,
            {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {"gpus": 1, "gpu": 1}},
            ["body", "executor_config", "gpus"],
            "did you mean 'gpu'?",
        ),
        (
            CONFIGS,
            {"name": "cc", "engine": "nim", "model_spec": {"lora_enabled": "yes"}, "executor_config": {"gpu": 1}},
            ["body", "model_spec", "lora_enabled"],
            "Expected `bool`",
        ),
        (
            PROVIDERS,
            {"name": "pp", "host_url": "http://" + "x" * 2048},
            ["body", "host_url"],
            "String should have at most 2048 characters",
        ),
        (
            CONFIGS,
            {"name": "cc", "engine": "nim", "model_spec": {"model_name": "x" * 256}, "executor_config": {"gpu": 0}},
            ["body", "model_spec", "model_name"],
            "String should have at most 255 characters",
        ),
        (SECRETS, {"name": "ss", "value": ""}, ["body", "value"], "should not be empty"),
        (SECRETS, {"name": "ss", "value": "\n"}, ["body", "value"], "should not be empty"),
        (DEPLOYMENTS, {"name": "dd", "config": "c", "deleting": True}, ["body", "deleting"], "Unknown field"),
        (DEPLOYMENTS, {"name": "dd", "config": "c", "status": "READY"}, ["body", "status"], "Unknown field"),
        (DEPLOYMENTS, {"name": "dd", "config": "c", "config_version": 2**70}, ["body", "config_version"], "less than"),
    ],
)
async def test_a_wrong_field_is_422_with_its_place_and_nothing_changes(
    world: World, path: str, body: dict[str, Any], loc: list[str], text: str
) -> None:
    reply = await world("POST", path, body)
    assert reply.status_code == 422, reply.text
    problems = {tuple(p["loc"]): p["msg"] for p in reply.json()["detail"]}
    assert text in problems.get(tuple(loc), ""), problems
    assert await world.store.all(path.rpartition("/")[2]) == []


async def test_all_wrong_fields_are_named_at_once(world: World) -> None:
    reply = await world("POST", PROVIDERS, {"zzz": 1, "project": 5})
    assert sorted(p["loc"][1] for p in reply.json()["detail"]) == ["host_url", "name", "project", "zzz"]


async def test_a_refused_secret_is_not_repeated_in_the_reply(world: World) -> None:
    for body in ({"value": "canary"}, {"name": "x!", "value": "canary"}, {"name": "ss", "values": "canary"}):
        reply = await world("POST", SECRETS, body)
        assert reply.status_code == 422
        assert "canary" not in reply.text
    reply = await world("POST", SECRETS, {"name": "ss", "value": ["canary"]})
    assert "canary" not in reply.text


@pytest.mark.parametrize(
    ("content", "place"),
    [(b'{"name": ', 9), (b"{'a'}", 1), (b"\xff", 0), (b'{"a": "\xff"}', None), (b"NaN", 0), (b"[" * 9000, 0)],
)
async def test_a_body_that_is_not_json_is_422_with_the_place(world: World, content: bytes, place: int | None) -> None:
    reply = await world("POST", PROVIDERS, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    problem = reply.json()["detail"][0]
    assert (problem["type"], problem["loc"][0]) == ("json_invalid", "body")
    assert place is None or problem["loc"][1] == place


@pytest.mark.parametrize("content", [b"[]", b"7", b"null", b'"x"', b""])
async def test_a_body_that_is_no_object_is_422(world: World, content: bytes) -> None:
    reply = await world("POST", PROVIDERS, content=content, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body"])


async def test_free_form_places_keep_what_users_put_there_nulls_included(world: World) -> None:
    free = {"a": None, "deep": [{"b": None}], "ä": 2**60}
    await world.make(f"{MODELS}/models", name="mm", custom_fields=free, ownership={"x": None})
    await world.make(FILESETS, name="ff", custom_fields=free, metadata={"model": {"tool_calling": {"x": None}}})
    listed = (await world("GET", f"{MODELS}/models")).json()["data"][0]
    assert listed["custom_fields"] == free
    assert listed["ownership"] == {"x": None}
    fileset = (await world("GET", FILESETS)).json()["data"][0]
    assert fileset["metadata"] == {"model": {"tool_calling": {"x": None}}}
    assert (await world("GET", f"{FILESETS}/ff")).json()["metadata"]["dataset"] is None


async def test_fields_that_docker_cannot_use_are_stored_and_returned(world: World) -> None:
    executor = {
        "gpu": 2, "disk_size": "99Gi", "run_as_user": 5, "k8s_nim_operator_config": {"a": 1},
        "override_config": {"b": 2},
    }  # fmt: skip
    made = await world.make_config(executor_config=executor)
    assert {k: made["executor_config"][k] for k in executor} == executor


# --- lists ---------------------------------------------------------------------------------------------------------


async def test_pages_and_envelope(world: World) -> None:
    for number in range(5):
        await world.make(SECRETS, name=f"s{number}", value="x")
        await world.make(f"{MODELS}/models", name=f"m{number}")
    body = (await world("GET", f"{MODELS}/models?page=2&page_size=2&sort=-name")).json()
    assert [item["name"] for item in body["data"]] == ["m2", "m1"]
    assert body["pagination"] == {
        "page": 2, "page_size": 2, "current_page_size": 2, "total_pages": 3, "total_results": 5,
    }  # fmt: skip
    assert body["sort"] == "-name"
    assert "filter" not in body
    assert set((await world("GET", SECRETS)).json()) == {"data", "pagination"}


async def test_an_empty_list_counts_its_pages_as_the_reference_does(world: World) -> None:
    for kind, pages in (("models", 0), ("providers", 0), ("deployments", 1), ("deployment-configs", 1)):
        body = (await world("GET", f"{MODELS}/{kind}")).json()
        assert (kind, body["pagination"]["total_pages"]) == (kind, pages)


@pytest.mark.parametrize(
    ("query", "loc"),
    [
        ("page=0", ["query", "page"]),
        ("page=x", ["query", "page"]),
        ("page=99999999999999999999999", ["query", "page"]),
        ("page_size=0", ["query", "page_size"]),
        ("page_size=1001", ["query", "page_size"]),
        ("sort=host_url", ["query", "sort"]),
    ],
)
async def test_a_wrong_query_is_422_with_its_place(world: World, query: str, loc: list[str]) -> None:
    reply = await world("GET", f"{PROVIDERS}?{query}")
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, loc)


@pytest.mark.parametrize(
    "query",
    [
        "filter[nope]=1", "filter[status][$what]=1", "filter={", "filter=[]", "filter={\"$or\":[],\"name\":\"x\"}",
        "filter[name]=x&filter[name][like]=y", "filter={\"name\":{\"$eq\":{\"a\":1}}}",
        "filter[a][b][c]=1", "filter[]=x",
    ],
)  # fmt: skip
async def test_a_filter_that_cannot_be_read_is_400(world: World, query: str) -> None:
    reply = await world("GET", f"{PROVIDERS}?{query}")
    assert reply.status_code == 400, reply.text


async def test_filters_in_both_syntaxes_and_across_workspaces(world: World) -> None:
    await world.make(WORKSPACES, name="other")
    await world.make(PROVIDERS, name="one", host_url="http://x")
    await world.make(PROVIDERS.replace("default", "other"), name="two", host_url="http://x")

    async def names(path: str) -> list[str]:
        return sorted(item["name"] for item in (await world("GET", path)).json()["data"])

    assert await names(f"{PROVIDERS}?filter%5Bname%5D=one") == ["one"]
    assert await names(f'{PROVIDERS}?filter={{"name":{{"$like":"O"}}}}') == ["one"]
    assert await names(f"{PROVIDERS}?filter[status]=READY") == []
    assert await names(PROVIDERS.replace("default", "-")) == ["one", "two"]
    assert await names(f"{PROVIDERS}?filter[workspace]=other") == ["two"]


# --- updates -------------------------------------------------------------------------------------------------------


async def test_a_patch_changes_what_it_names_and_null_clears(world: World) -> None:
    path = f"{MODELS}/models"
    await world.make(path, name="mm", description="d", backend_format="OPENAI_CHAT", custom_fields={"a": 1})
    changed = await world("PATCH", f"{path}/mm", {"backend_format": None, "project": "p"})
    assert changed.status_code == 200
    body = changed.json()
    assert (body["description"], body["backend_format"], body["project"]) == ("d", None, "p")
    assert body["custom_fields"] == {"a": 1}
    assert (await world("PATCH", f"{path}/mm", {"custom_fields": None})).json()["custom_fields"] == {}
    assert (await world("PATCH", f"{path}/mm", {"descriptoin": "x"})).status_code == 422
    assert (await world("PATCH", f"{path}/nope", {})).status_code == 404


async def test_a_fileset_keeps_what_a_patch_may_not_carry(world: World) -> None:
    await world.make(FILESETS, name="ff")
    body = (await world("PATCH", f"{FILESETS}/ff", {"description": "new", "metadata": {"dataset": {"a": 1}}})).json()
    assert (body["description"], body["metadata"]["dataset"], body["project"]) == ("new", {"a": 1}, "")
    assert (await world("PATCH", f"{FILESETS}/ff", {"cache": True})).status_code == 422


async def test_put_replaces_a_provider_and_creates_one(world: World) -> None:
    body = {"host_url": "http://a", "description": "d", "status": "READY"}
    made = await world("PUT", f"{PROVIDERS}/pp", body)
    assert (made.status_code, made.json()["status"]) == (200, "READY")
    entity = await world.store.get("providers", "default", "pp")
    served = [ServedModel(model_entity_id="default/m", served_model_name="m")]
    await world.store.set_status(entity, ProviderStatus(status="READY", served_models=served))
    replaced = (await world("PUT", f"{PROVIDERS}/pp", {"host_url": "http://b"})).json()
    assert (replaced["host_url"], replaced["description"]) == ("http://b", None)
    assert (replaced["status"], len(replaced["served_models"])) == ("READY", 1)
    assert (await world("PUT", f"{PROVIDERS}/bad name", {"host_url": "http://b"})).status_code == 422
    assert (await world("PUT", f"{WORKSPACES}/nope", {"description": "x"})).status_code == 404


async def test_a_new_version_replaces_the_config_and_keeps_the_old_one_readable(world: World) -> None:
    await world.make_config(project="proj", model_spec={"model_name": "a"})
    body = {"engine": "vllm", "model_spec": {"model_name": "b"}, "executor_config": {"gpu": 1}}
    made = await world("POST", f"{CONFIGS}/cfg", body)
    assert (made.status_code, made.json()["entity_version"], made.json()["project"]) == (201, 2, "proj")
    versions = (await world("GET", f"{CONFIGS}/cfg/versions")).json()
    assert [(v["entity_version"], v["model_spec"]["model_name"]) for v in versions] == [(2, "b"), (1, "a")]
    assert (await world("GET", f"{CONFIGS}/cfg/versions/1")).json()["engine"] == "nim"
    assert (await world("GET", f"{CONFIGS}/cfg/versions/x")).status_code == 400
    assert (await world("GET", f"{CONFIGS}/cfg/versions/9")).status_code == 404
    assert (await world("DELETE", f"{CONFIGS}/cfg/versions/2")).status_code == 409
    await world.make(DEPLOYMENTS, name="dd", config="cfg", config_version=1)
    assert (await world("DELETE", f"{CONFIGS}/cfg/versions/1")).status_code == 409
    assert (await world("GET", f"{CONFIGS}")).json()["pagination"]["total_results"] == 1


async def test_an_old_version_nobody_uses_can_be_deleted(world: World) -> None:
    await world.make_config()
    await world("POST", f"{CONFIGS}/cfg", {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 1}})
    assert (await world("DELETE", f"{CONFIGS}/cfg/versions/1")).status_code == 204
    assert (await world("GET", f"{CONFIGS}/cfg/versions/1")).status_code == 404


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(29)
async def test_a_secret_is_sealed_in_the_database_and_only_access_shows_it(world: World, tmp_path: Path) -> None:
    made = await world.make(SECRETS, name="ss", value="canary-value\n")
    assert set(made) == {"name", "workspace", "description", "created_at", "updated_at"}
    access = await world("GET", f"{SECRETS}/ss/access")
    assert access.json() == {"name": "ss", "workspace": "default", "value": "canary-value"}
    assert access.headers["cache-control"] == "no-store"
    await world.make(f"{MODELS}/models", name="mm", api_endpoint={"url": "http://x", "api_key": "canary-key"})
    shown = await world("GET", f"{MODELS}/models/mm")
    assert shown.json()["api_endpoint"] == {"url": "http://x", "model_id": None, "api_key": None, "format": None}
    await world("PATCH", f"{MODELS}/models/mm", {"description": "again"})
    entity = await world.store.get("models", "default", "mm")
    assert world.parts.vault.open(entity.wish.api_endpoint.api_key, "default/mm#api_endpoint") == "canary-key"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"canary" not in file.read_bytes(), file


async def test_a_rotated_secret_has_the_new_value_and_a_described_one_the_old(world: World) -> None:
    await world.make(SECRETS, name="ss", value="one")
    await world("PATCH", f"{SECRETS}/ss", {"description": "d", "value": None})
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == "one"
    await world("PATCH", f"{SECRETS}/ss", {"value": " two \n\n"})
    assert (await world("GET", f"{SECRETS}/ss/access")).json()["value"] == " two \n"
    assert (await world("PATCH", f"{SECRETS}/ss", {"value": "\n"})).status_code == 422


# --- filesets and models -------------------------------------------------------------------------------------------


async def test_a_directory_is_used_by_reference_and_survives_its_fileset(world: World, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    made = await world.make(FILESETS, name="ff", storage={"type": "local", "path": str(mine)})
    assert made["storage"]["path"] == str(mine)
    files = (await world("GET", f"{FILESETS}/ff/files")).json()["data"]
    assert [f["path"] for f in files] == ["config.json"]
    refused = await world("PUT", f"{FILESETS}/ff/-/x", content=b"x")
    assert refused.status_code == 400
    assert (await world("DELETE", f"{FILESETS}/ff/-/config.json")).status_code == 400
    assert (await world("DELETE", f"{FILESETS}/ff")).status_code == 200
    assert (mine / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("storage", "text"),
    [
        ({"type": "s3", "bucket": "b"}, "S3 storage is not supported by nimhost."),
        ({"type": "local", "path": "relative"}, "storage.path: 'relative' is not an absolute path"),
        ({"type": "local", "path": "/no/such/directory"}, "storage.path: '/no/such/directory' is not"),
        ({"type": "local", "path": "/etc/passwd"}, "is not an absolute path of a directory"),
        ({"type": "huggingface", "repo_id": "https://huggingface.co/a/b"}, "storage.repo_id"),
        ({"type": "huggingface", "repo_id": "a/../b"}, "storage.repo_id"),
        ({"type": "huggingface", "repo_id": "a/b", "token_secret": "nope"}, "Secret not found: nope"),
    ],
)
async def test_a_storage_that_cannot_be_used_is_400(world: World, storage: dict[str, Any], text: str) -> None:
    reply = await world("POST", FILESETS, {"name": "ff", "storage": storage})
    assert reply.status_code == 400, reply.text
    assert text in reply.json()["detail"]
    assert await world.store.all("filesets") == []


async def test_directories_can_be_forbidden(tmp_path: Path) -> None:
    settings = Settings(files=Files(allow_local_paths=False))
    async with open_world(tmp_path, settings) as world:
        reply = await world("POST", FILESETS, {"name": "ff", "storage": {"type": "local", "path": str(tmp_path)}})
        assert reply.status_code == 400
        assert "files.allow_local_paths" in reply.json()["hint"]


async def test_a_model_names_a_fileset_that_exists(world: World) -> None:
    reply = await world("POST", f"{MODELS}/models", {"name": "mm", "fileset": "default/nope"})
    assert (reply.status_code, reply.json()["detail"]) == (
        400,
        "Fileset 'default/nope' not found in workspace 'default'",
    )
    await world.make(FILESETS, name="ff")
    await world.make(f"{MODELS}/models", name="mm", fileset="ff")
    assert (await world("PATCH", f"{MODELS}/models/mm", {"fileset": "nope"})).status_code == 400


async def test_what_a_model_shows_only_when_asked(world: World) -> None:
    spec = {
        "checkpoint_model_name": "X", "family": "llama", "num_layers": 1, "hidden_size": 1, "num_attention_heads": 1,
        "num_kv_heads": 1, "ffn_hidden_size": 1, "vocab_size": 1, "tied_embeddings": True, "gated_mlp": True,
        "base_num_parameters": 1, "precision": "bf16", "minimum_gpus_lora": 4,
        "linear_layers": [{"name": "q", "in_features": 1, "out_features": 1}],
    }  # fmt: skip
    await world.make(f"{MODELS}/models", name="mm", spec=spec)
    plain = (await world("GET", f"{MODELS}/models/mm")).json()["spec"]
    verbose = (await world("GET", f"{MODELS}/models/mm?verbose=true")).json()["spec"]
    assert (plain["linear_layers"], plain["minimum_gpus_lora"]) == (None, None)
    assert (len(verbose["linear_layers"]), verbose["minimum_gpus_lora"]) == (1, None)
    listed = (await world("GET", f"{MODELS}/models")).json()["data"][0]["spec"]
    assert None not in listed.values()


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (
            {"engine": "generic", "executor_config": {"gpu": 0, "image_name": "i"}},
            400,
            "The 'generic' engine requires executor_config.health_check_path to be set",
        ),
        (
            {"engine": "generic", "executor_config": {"gpu": 0, "health_check_path": "/h"}},
            400,
            "The 'generic' engine requires executor_config.image_name to be set",
        ),
        (
            {
                "engine": "generic",
                "executor_config": {"gpu": 0, "image_name": "i", "health_check_path": "/h"},
                "model_spec": {"lora_enabled": True},
            },
            400,
            "lora_enabled",
        ),
        (
            {"engine": "generic", "executor_config": {"gpu": 0, "image_name": " i", "health_check_path": "/h"}},
            400,
            "must not begin or end with a blank",
        ),
        ({"model_spec": {"model_name": "a@main", "model_revision": "v1"}}, 400, "model_revision cannot be set"),
        ({"model_spec": {"tool_call_config": {"tool_call_plugin": "p"}}}, 403, "tool_call_plugin is disabled"),
        ({"executor_config": {"gpu": 0, "additional_envs": {"A=B": "c"}}}, 422, "environment variable"),
    ],
)
async def test_a_config_that_makes_no_sense_is_refused(
    world: World, body: dict[str, Any], status: int, text: str
) -> None:
    base = {"name": "cfg", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": 0}}
    reply = await world("POST", CONFIGS, base | body)
    assert reply.status_code == status, reply.text
    assert text in reply.text
    assert await world.store.all("deployment-configs") == []


async def test_a_plugin_is_allowed_where_the_setting_allows_it(tmp_path: Path) -> None:
    settings = Settings(models=ModelsTable(tool_call_plugin=ToolCallPlugin(enabled=True)))
    async with open_world(tmp_path, settings) as world:
        await world.make_config(model_spec={"tool_call_config": {"tool_call_plugin": "default/pp"}})


@pytest.mark.parametrize(
    ("spec", "entity"),
    [
        ({"model_name": "qwen"}, "default/qwen"),
        ({"model_name": "default/qwen@main"}, "default/qwen"),
        ({"model_namespace": "default", "model_name": "qwen"}, "default/qwen"),
        ({"model_name": "meta/llama-3.2-1b-instruct"}, None),
        ({}, None),
    ],
)
async def test_a_config_finds_the_model_entity_it_names(world: World, spec: dict[str, Any], entity: str | None) -> None:
    await world.make(f"{MODELS}/models", name="qwen")
    assert (await world.make_config(model_spec=spec))["model_entity_id"] == entity


# --- deployments ---------------------------------------------------------------------------------------------------


async def test_a_deployment_comes_with_its_provider_and_a_history_that_begins_with_created(world: World) -> None:
    await world.make_config()
    world.store.changed.clear()
    made = await world.make(DEPLOYMENTS, name="dd", config="cfg")
    assert world.store.changed.is_set()
    assert (made["status"], made["config_version"], made["desired"]) == ("CREATED", 1, "running")
    assert [(h["status"], h["status_message"]) for h in made["status_history"]] == [("CREATED", "Deployment created")]
    assert made["model_provider_id"] == "default/dd"
    assert not {"run", "deleting"} & set(made)
    provider = (await world("GET", f"{PROVIDERS}/dd")).json()
    assert provider["description"] == "Auto-created provider for deployment dd"
    assert (provider["model_deployment_id"], provider["host_url"]) == ("default/dd", "http://127.0.0.1:0")


async def test_a_deployment_without_a_version_follows_its_config(world: World) -> None:
    await world.make_config()
    await world.make(DEPLOYMENTS, name="follows", config="cfg")
    await world.make(DEPLOYMENTS, name="pinned", config="default/cfg", config_version=1)
    await world("POST", f"{CONFIGS}/cfg", {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 1}})
    listed = {d["name"]: d for d in (await world("GET", DEPLOYMENTS)).json()["data"]}
    assert {name: d["config_version"] for name, d in listed.items()} == {"follows": 2, "pinned": 1}
    assert listed["pinned"]["config"] == "cfg"


async def test_a_deployment_names_what_exists(world: World) -> None:
    reply = await world("POST", DEPLOYMENTS, {"name": "dd", "config": "nope"})
    assert (reply.status_code, reply.json()["detail"]) == (400, "Deployment config 'default/nope' does not exist")
    await world.make_config()
    reply = await world("POST", DEPLOYMENTS, {"name": "dd", "config": "cfg", "config_version": 7})
    assert (reply.status_code, reply.json()["detail"]) == (400, "Deployment config 'default/cfg' has no version 7")
    assert await world.store.all("deployments") == await world.store.all("providers") == []


async def test_a_name_is_taken_for_the_deployment_and_its_provider(world: World) -> None:
    await world.make_config()
    await world.make(PROVIDERS, name="external", host_url="http://x")
    assert (await world("POST", DEPLOYMENTS, {"name": "external", "config": "cfg"})).status_code == 409
    assert await world.store.all("deployments") == []
    await world.make(DEPLOYMENTS, name="dd", config="cfg")
    assert (await world("POST", PROVIDERS, {"name": "dd", "host_url": "http://x"})).status_code == 409
    assert (await world("PUT", f"{PROVIDERS}/dd", {"host_url": "http://evil"})).status_code == 409
    assert (await world("DELETE", f"{PROVIDERS}/dd")).status_code == 409
    assert (await world("GET", f"{PROVIDERS}/dd")).json()["host_url"] == "http://127.0.0.1:0"


async def test_deleting_a_deployment_is_202_again_and_again_and_stays_visible_until_it_is_gone(world: World) -> None:
    await world.make_config()
    await world.make(DEPLOYMENTS, name="dd", config="cfg")
    for _ in range(3):
        reply = await world("DELETE", f"{DEPLOYMENTS}/dd")
        assert (reply.status_code, reply.text) == (202, "null")
    shown = (await world("GET", f"{DEPLOYMENTS}/dd")).json()
    assert shown["status"] == "DELETING"
    assert [h["status"] for h in shown["status_history"]] == ["CREATED", "DELETING"]
    stored = await world.store.get("deployments", "default", "dd")
    assert (stored.wish.deleting, stored.generation) == (True, 2)
    for path in ("stop", "start"):
        assert (await world("POST", f"{DEPLOYMENTS}/dd/{path}")).status_code == 409
    assert (await world("POST", f"{DEPLOYMENTS}/dd", {"config": "cfg"})).status_code == 409
    assert (await world("POST", DEPLOYMENTS, {"name": "dd", "config": "cfg"})).status_code == 409
    assert (await world("DELETE", f"{CONFIGS}/cfg")).status_code == 204


async def test_an_update_makes_a_version_and_keeps_what_it_does_not_name(world: World) -> None:
    await world.make_config()
    await world.make_config("cfg2")
    await world.make(DEPLOYMENTS, name="dd", config="cfg", project="proj", desired="stopped")
    made = await world("POST", f"{DEPLOYMENTS}/dd", {"config": "cfg2"})
    body = made.json()
    assert (made.status_code, body["entity_version"], body["config"]) == (201, 2, "cfg2")
    assert (body["project"], body["desired"]) == ("proj", "stopped")
    assert (body["status"], body["status_message"]) == ("PENDING", "Deployment update pending")
    assert [h["status"] for h in body["status_history"]] == ["CREATED", "PENDING"]
    assert (await world("POST", f"{DEPLOYMENTS}/dd", {"config": "nope"})).status_code == 400
    assert (await world("POST", f"{DEPLOYMENTS}/dd", {"config": "cfg", "config_version": 3})).status_code == 400
    assert (await world.store.get("deployments", "default", "dd")).version == 2


async def test_what_the_machine_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    seen: list[Entity] = []

    async def check(config: Entity, force: bool) -> None:
        seen.append(config)
        if config.wish.executor_config.gpu > 1:
            raise InvalidRequest.field("needs 4 GPUs, this machine has 1", "executor_config", "gpu")

    async with open_world(tmp_path, check=check) as world:
        await world.make_config("small")
        await world.make_config("large", executor_config={"gpu": 4})
        reply = await world("POST", DEPLOYMENTS, {"name": "dd", "config": "large"})
        assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "executor_config", "gpu"])
        assert await world.store.all("deployments") == []
        await world.make(DEPLOYMENTS, name="dd", config="small")
        assert (await world("POST", f"{DEPLOYMENTS}/dd", {"config": "large"})).status_code == 422
        more = {"engine": "nim", "model_spec": {}, "executor_config": {"gpu": 2}}
        assert (await world("POST", f"{CONFIGS}/small", more)).status_code == 201
        await world.make(DEPLOYMENTS, name="d2", config="small", config_version=1)
        assert (seen[-1].version, seen[-1].wish.executor_config.gpu) == (1, 0)


# --- in use --------------------------------------------------------------------------------------------------------


async def test_what_is_in_use_cannot_be_deleted_and_its_users_are_named(world: World) -> None:
    await world.make(SECRETS, name="key", value="x")
    await world.make(PROVIDERS, name="prov", host_url="http://x", api_key_secret_name="key")
    storage = {"type": "huggingface", "repo_id": "a/b", "token_secret": "default/key"}
    await world.make(FILESETS, name="ff", storage=storage)
    await world.make(f"{MODELS}/models", name="mm", fileset="ff")
    await world.make_config(model_entity_id="default/mm")
    await world.make(DEPLOYMENTS, name="dd", config="cfg")
    for path, users in (
        (f"{SECRETS}/key", ["model provider default/prov", "fileset default/ff"]),
        (f"{FILESETS}/ff", ["model default/mm"]),
        (f"{MODELS}/models/mm", ["deployment config default/cfg"]),
        (f"{CONFIGS}/cfg", ["deployment default/dd"]),
        (f"{WORKSPACES}/default", []),
    ):
        reply = await world("DELETE", path)
        assert (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")
        assert all(user in reply.json()["detail"] for user in users), reply.text
    assert "1 ModelDeployment(s) still reference it" in (await world("DELETE", f"{CONFIGS}/cfg")).json()["detail"]


async def test_deleting_a_fileset_removes_its_files_and_a_new_one_of_that_name_is_empty(world: World) -> None:
    await world.make(FILESETS, name="ff")
    await world("PUT", f"{FILESETS}/ff/-/a.txt", content=b"x")
    base = world.parts.files.directory("default", "ff")
    assert (base / "a.txt").exists()
    await world("DELETE", f"{FILESETS}/ff")
    assert not base.exists()
    base.mkdir(parents=True)
    (base / "left-over").touch()
    await world.make(FILESETS, name="ff")
    assert (await world("GET", f"{FILESETS}/ff/files")).json() == {"data": []}


async def test_a_provider_that_many_put_at_once_is_there_and_nobody_is_refused(world: World) -> None:
    path = f"{MODELS}/providers/pp"
    replies = await asyncio.gather(*(world("PUT", path, {"host_url": f"http://h{n}"}) for n in range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    assert len({reply.json()["id"] for reply in replies}) == 1


@pytest.mark.parametrize("project", ["a b", "a\n", "ü", "", "#1"])
@pytest.mark.parametrize(("verb", "path"), [("POST", "models"), ("PATCH", "models/m1"), ("PUT", "providers/p1")])
async def test_a_project_is_a_path_of_plain_letters(world: World, verb: str, path: str, project: str) -> None:
    await world.make(f"{MODELS}/models", name="m1", project="team/a.b-c_1")
    body = {"project": project} | {"POST": {"name": "m2"}, "PUT": {"host_url": "http://h"}}.get(verb, {})
    reply = await world(verb, f"{MODELS}/{path}", body)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "project"]
    assert (await world("GET", f"{MODELS}/models/m1")).json()["project"] == "team/a.b-c_1"

"""What nobody should be able to store, read or lose by asking oddly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Files, Server, Settings
from nimhost.host.files import FileStorage
from nimhost.store import Store
from tests.api.conftest import FILESETS, MODELS, WORKSPACES, World, open_world

CONFIGS = f"{MODELS}/deployment-configs"
PROVIDERS = f"{MODELS}/providers"
Json = dict[str, Any]


def problem(reply: Any) -> tuple[int, Json]:
    """Status, and the first problem that the reply tells of."""
    return reply.status_code, reply.json()["detail"][0]


# --- filesets ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(29)
@pytest.mark.fault(37)
@pytest.mark.parametrize("where", ["data", "data/filesets", "", "link", "link/filesets", "data/../data"])
async def test_the_data_directory_is_no_fileset(tmp_path: Path, where: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "models").mkdir()
    settings = Settings(server=Server(data_dir=str(data)), files=Files(allow_local_paths=True))
    async with open_world(data, settings) as world:
        storage = {"type": "local", "path": f"{tmp_path}/{where}"}
        refused = await world("POST", FILESETS, {"name": "ff", "storage": storage})
        assert refused.status_code == 400
        assert "data directory are not apart" in refused.json()["detail"]
        await world.make(FILESETS, name="ff", storage={"type": "local", "path": f"{tmp_path}/models"})
        assert (await world("PATCH", f"{FILESETS}/ff", {"storage": storage})).status_code == 400
        assert (await world("GET", f"{FILESETS}/ff/-/key")).status_code == 404


@pytest.mark.parametrize("made_again", [False, True])
async def test_a_file_that_comes_while_its_fileset_is_deleted_is_not_confirmed_and_not_kept(
    world: World, made_again: bool
) -> None:
    await world.make(FILESETS, name="ff")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> Any:
        yield b"first"
        begun.set()
        await go_on.wait()
        yield b"second"

    upload = asyncio.create_task(world("PUT", f"{FILESETS}/ff/-/slow.bin", content=slowly()))
    await asyncio.wait_for(begun.wait(), 5)
    assert (await world("DELETE", f"{FILESETS}/ff")).status_code == 200
    if made_again:
        await world.make(FILESETS, name="ff")
    go_on.set()
    reply = await upload
    assert (reply.status_code, reply.json()["detail"]) == (404, "Fileset 'ff' not found in workspace 'default'")
    assert [path for path in world.parts.files.root.rglob("*") if path.is_file()] == []


async def test_files_that_go_while_a_directory_is_listed_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stays").write_text("x")
    (tmp_path / "goes").write_text("x")
    look = Path.lstat

    def late(path: Path) -> Any:
        if path.name == "goes":
            path.unlink(missing_ok=True)
        return look(path)

    monkeypatch.setattr(Path, "lstat", late)
    storage = FileStorage(tmp_path / "root")
    assert [file.path for file in await storage.list_files(tmp_path)] == ["stays"]
    storage.close()


# --- providers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Host", "transfer-encoding", "Content-Length", "Connection", "TE", "Upgrade"])
@pytest.mark.parametrize("field", ["default_extra_headers", "required_extra_headers"])
async def test_headers_that_frame_a_request_are_not_a_providers_to_set(world: World, field: str, header: str) -> None:
    body = {"host_url": "http://engine:1/v1", field: {header: "chunked"}}
    for reply in (await world("POST", PROVIDERS, {"name": "pp", **body}), await world("PUT", f"{PROVIDERS}/pp", body)):
        status, first = problem(reply)
        assert (status, first["loc"]) == (422, ["body", field, header])
    assert (await world("GET", f"{PROVIDERS}/pp")).status_code == 404


@pytest.mark.parametrize("template", ["Host: {{ auth_secret }}", "transfer-encoding: {{ auth_secret }}"])
async def test_a_key_does_not_go_into_such_a_header_either(world: World, template: str) -> None:
    body = {"name": "pp", "host_url": "http://engine:1/v1", "auth_header_format": template}
    status, first = problem(await world("POST", PROVIDERS, body))
    assert (status, first["loc"]) == (422, ["body", "auth_header_format"])


async def test_of_many_who_put_one_provider_everybody_is_heard(world: World) -> None:
    replies = await asyncio.gather(
        *(world("PUT", f"{PROVIDERS}/pp", {"host_url": f"http://engine:{n}/v1"}) for n in range(1, 41))
    )
    assert {reply.status_code for reply in replies} == {200}
    ids = {reply.json()["id"] for reply in replies}
    assert len(ids) == 1


async def test_what_is_put_and_deleted_at_once_is_never_a_fault(world: World) -> None:
    async def delete() -> int:
        return (await world("DELETE", f"{PROVIDERS}/pp")).status_code

    async def put() -> int:
        return (await world("PUT", f"{PROVIDERS}/pp", {"host_url": "http://engine:1/v1"})).status_code

    for _ in range(10):
        codes = await asyncio.gather(*(work() for _ in range(3) for work in (put, delete, put)))
        assert set(codes) <= {200, 204, 404}
        assert codes.count(404) <= 3


# --- deployment configs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executor", "place"),
    [
        ({"image_name": "a b"}, ["image_name"]),
        ({"image_name": "--privileged"}, ["image_name"]),
        ({"image_name": "a:b:c"}, ["image_name"]),
        ({"image_name": "Upper/Case"}, ["image_name"]),
        ({"image_name": ""}, ["image_name"]),
        ({"image_name": "a//b"}, ["image_name"]),
        ({"image_name": "a/b", "image_tag": "x y"}, ["image_tag"]),
        ({"image_name": "a/b", "image_tag": ""}, ["image_tag"]),
        ({"image_name": "a/b:1", "image_tag": "2"}, ["image_tag"]),
        ({"additional_envs": {"A": "x\0y"}}, ["additional_envs", "A"]),
        ({"additional_args": ["--a", "x\0y"]}, ["additional_args", 1]),
        ({"additional_envs": {"A": "x", "B": 1}}, ["additional_envs", "B"]),
        ({"additional_envs": {"A=B": "x"}}, ["additional_envs", "A=B"]),
    ],
)
async def test_what_no_container_can_have_is_refused_and_the_field_is_named(
    world: World, executor: Json, place: list[Any]
) -> None:
    body = {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": 1, **executor}}
    status, first = problem(await world("POST", CONFIGS, body))
    assert (status, first["loc"]) == (422, ["body", "executor_config", *place])


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("nvcr.io/nim/meta/llama-3.2-1b-instruct", "1.8.6"),
        ("localhost:5000/a__b/c-d.e", "v1_x-y"),
        ("vllm/vllm-openai:v0.11.0", None),
        ("ghcr.io/x/y@sha256:" + "a" * 64, None),
        ("sha256:" + "b" * 64, None),
        ("[::1]:5000/x", "1"),
    ],
)
async def test_images_are_named_as_docker_names_them(world: World, name: str, tag: str | None) -> None:
    made = await world.make_config(executor_config={"gpu": 0, "image_name": name, "image_tag": tag})
    assert made["executor_config"]["image_name"] == name


async def test_a_project_is_no_free_text(world: World) -> None:
    body = {"name": "cc", "engine": "nim", "model_spec": {}, "executor_config": {"gpu": 1}, "project": "a b"}
    status, first = problem(await world("POST", CONFIGS, body))
    assert (status, first["loc"]) == (422, ["body", "project"])


# --- models --------------------------------------------------------------------------------------------------------


async def test_inference_parameters_of_a_prompt_are_free(world: World) -> None:
    asked = {"temperature": 0.5, "custom": {"a": [1]}, "stop": None}
    made = await world.make(f"{MODELS}/models", name="mm", prompt={"inference_params": asked})
    assert made["prompt"]["inference_params"] == asked
    assert (await world("GET", f"{MODELS}/models/mm")).json()["prompt"]["inference_params"] == asked


@pytest.mark.parametrize(
    ("endpoint", "kept"),
    [
        ({"url": "http://other/v1"}, True),
        ({"url": "http://other/v1", "api_key": None}, True),
        ({"url": "http://other/v1", "api_key": "sk-new"}, "sk-new"),
        ({"url": "http://other/v1", "api_key": ""}, False),
        (None, False),
    ],
)
async def test_the_key_of_an_endpoint_stays_until_it_is_changed(world: World, endpoint: Any, kept: bool | str) -> None:
    before = {"url": "http://one/v1", "api_key": "sk-old"}
    await world.make(f"{MODELS}/models", name="mm", api_endpoint=before)
    for _ in range(2):
        assert (await world("PATCH", f"{MODELS}/models/mm", {"api_endpoint": endpoint})).status_code == 200
    row = await world.store.get("models", "default", "mm")
    sealed = row.wish.api_endpoint and row.wish.api_endpoint.api_key
    opened = world.parts.vault.open(sealed, "default/mm#api_endpoint") if sealed else False
    assert opened == ("sk-old" if kept is True else kept)


async def test_a_filter_for_what_other_rows_say_reads_them_once(world: World) -> None:
    """Not once for each model: steps of SQLite's machine, of which a busy machine makes no more."""
    await fill(world.store, 400)
    steps: dict[str, int] = {}
    for wanted in ("true", "false"):
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        await world.store._reader.set_progress_handler(step, 100)
        reply = await world("GET", f"{MODELS}/models?filter[lora_enabled]={wanted}&page_size=1000")
        steps[wanted] = count
        names = [row["name"] for row in reply.json()["data"]]
        assert names == [f"model-{n}" for n in range(400) if (n % 4 == 0) == (wanted == "true")]
    print(f"\nsteps in hundreds, of two statements over 400 models and 400 configs: {steps}")
    assert max(steps.values()) < 2_000


async def fill(store: Store, count: int) -> None:
    from nimhost.entities import DeploymentConfig, DeployModelSpec, ExecutorConfig, Model

    async with store.transaction() as tx:
        for number in range(count):
            await tx.insert("models", "default", f"model-{number}", Model())
            wish = DeploymentConfig(
                engine="vllm",
                model_spec=DeployModelSpec(lora_enabled=number % 4 == 0),
                executor_config=ExecutorConfig(gpu=0),
                model_entity_id=f"default/model-{number}" if number % 5 or number % 4 == 0 else None,
            )
            await tx.insert("deployment-configs", "default", f"config-{number}", wish)


# --- everywhere ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(35)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_what_a_web_page_may_send_without_asking_changes_nothing(world: World, kind: str) -> None:
    await world.make_config()
    await world.make(f"{MODELS}/deployments", name="dd", config="cfg")
    for method, path in (
        ("POST", f"{MODELS}/deployments/dd/stop"),
        ("POST", f"{MODELS}/deployments/dd/start"),
        ("POST", "/apis/secrets/v2/rotate-encryption-keys"),
        ("DELETE", f"{MODELS}/deployments/dd"),
        ("POST", f"{MODELS}/models"),
    ):
        reply = await world.client.request(method, path, headers={"content-type": kind}, content=b"{}")
        assert (reply.status_code, "A JSON body is needed" in reply.json()["detail"]) == (415, True), path
    assert (await world("GET", f"{MODELS}/deployments/dd")).json()["desired"] == "running"
    assert (await world("POST", f"{MODELS}/deployments/dd/stop")).status_code == 200
    assert (await world("POST", f"{MODELS}/deployments/dd/start", {})).status_code == 200


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"{WORKSPACES}/default/members", "members of workspaces"),
        (f"{WORKSPACES}/default/members/joe", "members of workspaces"),
        (f"{WORKSPACES}/default/entities/things", "entities of other kinds"),
        (f"{MODELS}/prompts", "prompts of their own"),
        (f"{MODELS}/prompts/one", "prompts of their own"),
        ("/apis/files/v2/hf/api/models/x/revision/main", "a proxy that looks like the Hugging Face hub"),
    ],
)
async def test_what_is_not_served_says_so(world: World, path: str, says: str) -> None:
    for method in ("GET", "POST"):
        reply = await world(method, path)
        assert reply.status_code == 404
        assert reply.json()["detail"].startswith(f"nimhost does not have {says}")


@pytest.mark.fault(36)
async def test_the_last_administrator_of_a_nimhost_on_a_network_cannot_be_revoked(tmp_path: Path) -> None:
    tokens = "/apis/nimhost/v1/tokens"
    first = "nimhost_" + "a" * 43
    settings = Settings(server=Server(host="0.0.0.0"))
    async with open_world(tmp_path) as local:  # the first one is made where no token is needed
        assert (await local("DELETE", f"{tokens}/nobody")).status_code == 404
    from nimhost.store.tokens import insert_token
    from nimhost.tokens import remember

    store = await Store.open(tmp_path / "nimhost.db")
    async with store.transaction() as tx:
        await insert_token(tx, remember("first", ["admin"], first, "2026-01-01T00:00:00.000000Z"))
    await store.close()
    async with open_world(tmp_path, settings) as world:
        world.client.headers["authorization"] = f"Bearer {first}"
        reply = await world("DELETE", f"{tokens}/first")
        assert (reply.status_code, "the last of an administrator" in reply.json()["detail"]) == (409, True)
        made = await world("POST", tokens, {"name": "second", "scopes": ["admin"]})
        world.client.headers["authorization"] = f"Bearer {made.json()['token']}"
        assert (await world("DELETE", f"{tokens}/first")).status_code == 204
        assert (await world("DELETE", f"{tokens}/second")).status_code == 409

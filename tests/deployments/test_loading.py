"""Adapters and engines, through the whole daemon: loaded, changed, refused, taken away, and there again."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nimhost.config import Weights as WeightsSettings
from nimhost.deployments import loading, roll
from tests.fakes.engine import Faults, Received, Reply
from tests.fakes.hub import FakeHub
from tests.loras import ADAPTERS, FILESETS, GATEWAY, LoraWorld, change_config, config_of, count_looks, said
from tests.support import eventually
from tests.tiny import tiny_lora
from tests.world import MODELS

NAME = "default--math"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[LoraWorld]:
    async with LoraWorld(tmp_path) as world:
        await world.prepare()
        yield world


async def test_an_adapter_is_served_as_soon_as_it_is_registered_by_every_route(world: LoraWorld) -> None:
    await world.serve()
    began_s = time.monotonic()
    made = await world.register()
    took_s = time.monotonic() - began_s
    assert (made["served_name"], made["loaded_on"], made["status_message"]) == (NAME, ["default/dd"], None)
    assert took_s < loading.PATIENCE_S
    for route, model in (
        ("/v1", NAME),
        ("/v1", f"default/{NAME}"),
        (f"{GATEWAY}/openai/-/v1", NAME),
        (f"{GATEWAY}/openai/-/v1", f"default/{NAME}"),
        (f"{GATEWAY}/provider/dd/-/v1", NAME),
        (f"{GATEWAY}/model/{NAME}/-/v1", "whatever"),
    ):
        assert f"as {NAME}: Hello!" in said(await world.chat(model, route)), (route, model)
    assert "as default/base: Hello!" in said(await world.chat("base"))


async def test_lists_show_it_and_no_model_entity_is_made_of_it(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    for path in ("/v1/models", f"{GATEWAY}/openai/-/v1/models"):
        assert [m["id"] for m in (await world.http.get(path)).json()["data"]] == ["default/base", f"default/{NAME}"]

    async def served() -> bool:
        provider = (await world.http.get(f"{MODELS}/providers/dd")).json()
        return {"model_entity_id": f"default/{NAME}", "served_model_name": NAME} in provider["served_models"]

    await eventually(served)
    assert [m["name"] for m in (await world.http.get(f"{MODELS}/models")).json()["data"]] == ["base"]


async def test_an_adapter_that_was_there_first_is_loaded_when_the_engine_is_ready(world: LoraWorld) -> None:
    made = await world.register()
    assert made["loaded_on"] == []
    assert "No deployment of default/base takes adapters" in made["status_message"]

    async def nobody_serves_it() -> bool:
        missing = await world.chat(NAME)
        return missing.status_code == 404 and "No providers found" in missing.text

    await eventually(nobody_serves_it)
    await world.serve()
    await world.loaded()
    assert NAME in said(await world.chat(NAME))


async def test_every_deployment_of_the_model_that_takes_adapters_gets_it(world: LoraWorld) -> None:
    for name in ("one", "two"):
        await world.serve(name)
    await world.serve("plain", lora=False)
    made = await world.register()
    assert made["loaded_on"] == ["default/one", "default/two"]
    assert sorted(NAME in engine.adapters for engine in world.engines.values()) == [False, True, True]


async def test_our_copy_names_the_engines_model_and_what_it_was_made_of_stays_as_it_is(world: LoraWorld) -> None:
    source = world.directory / "lora"
    (source / "README.md").write_text("not of the adapter")
    os.chmod(source / "adapter_model.safetensors", 0o600)
    await world.serve()
    await world.register()
    (name,) = world.copies()
    copy = world.directory / "loras" / "default--base" / name
    assert world.engine().adapters == {NAME: f"/loras/{name}"}
    assert sorted(path.name for path in copy.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in copy.iterdir()} == {0o644}
    assert copy.stat().st_mode & 0o777 == 0o755
    assert config_of(copy) == config_of(source) | {"base_model_name_or_path": "/model-store"}
    assert config_of(source)["base_model_name_or_path"] == "some/where"
    assert (source / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600


async def test_disabled_it_is_unknown_and_enabled_it_is_back(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    off = await world.change(enabled=False)
    assert (off["loaded_on"], off["status_message"]) == (
        [], "Disabled. Enable it with: nimhost adapters update math --enabled",
    )  # fmt: skip
    assert world.engine().adapters == {}
    for reply in (await world.chat(NAME), await world.chat(NAME, provider="dd")):
        assert reply.status_code == 404, reply.text
    await eventually(lambda: world.copies() == set())
    on = await world.change(enabled=True)
    assert on["loaded_on"] == ["default/dd"]
    assert NAME in said(await world.chat(NAME))


@pytest.mark.usefixtures("impatient")
async def test_deleted_it_is_unloaded_before_its_files_go(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    engine = world.engine()
    engine.faults = Faults(lora_status=503)
    assert (await world.http.delete(f"{ADAPTERS}/math")).status_code == 204
    await eventually(lambda: any("unload" in request.path for request in engine.requests))
    assert len(world.copies()) == 1, "the engine still has it loaded"
    assert (await world.chat(NAME)).status_code == 404
    engine.faults = Faults()
    await eventually(lambda: engine.adapters == {}, 15)
    await eventually(lambda: world.copies() == set())


async def test_other_files_are_loaded_in_place_from_a_copy_of_their_own(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    before = world.engine().adapters[NAME]
    await world.change(fileset="other-lora")
    after = world.engine().adapters[NAME]
    assert after != before
    paths = [r.path for r in world.engine().requests if "lora_adapter" in r.path]
    assert paths == ["/v1/load_lora_adapter"] * 2, "never unloaded in between"
    await eventually(lambda: world.copies() == {Path(after).name})
    assert NAME in said(await world.chat(NAME))


async def test_an_engine_that_cannot_load_in_place_unloads_first(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    engine = world.engine()
    real = engine.load_adapter

    def older(request: Received) -> Reply:
        plain = {key: value for key, value in request.json().items() if key != "load_inplace"}
        return real(request._replace(body=json.dumps(plain).encode()))

    engine.scripted["/v1/load_lora_adapter"] = older
    before = engine.adapters[NAME]
    await world.change(fileset="other-lora")
    assert engine.adapters[NAME] != before


async def test_files_that_are_uploaded_later_are_noticed(world: LoraWorld) -> None:
    await world.serve()
    await world.http.post(FILESETS, json={"name": "mine"})
    source = world.directory / "lora"

    async def upload(name: str) -> None:
        reply = await world.http.put(f"{FILESETS}/mine/-/{name}", content=(source / name).read_bytes())
        assert reply.status_code == 200

    await upload("adapter_config.json")
    made = await world.register(fileset="mine")
    assert "weights are missing" in made["status_message"]
    assert (await world.chat(NAME)).status_code == 503
    await upload("adapter_model.safetensors")
    await world.loaded()


# --- what waits ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_while_it_is_loaded_requests_are_asked_to_come_again(world: LoraWorld) -> None:
    await world.serve()
    world.engine().faults = Faults(lora_status=503)
    made = await world.register()
    assert made["loaded_on"] == []
    for reply in (await world.chat(NAME), await world.chat(NAME, provider="dd"),
                  await world.chat(NAME, f"{GATEWAY}/openai/-/v1")):  # fmt: skip
        assert (reply.status_code, "retry-after" in reply.headers) == (503, True), reply.text
        assert NAME in reply.text
    assert said(await world.chat("default/base", provider="dd"))
    world.engine().faults = Faults()
    await world.loaded(timeout_s=15)


async def test_while_the_deployment_starts_its_adapters_wait_with_it(world: LoraWorld) -> None:
    await world.register()
    world.faults = Faults(ready_delay_s=0.5)
    config = {"engine": "vllm", "model_spec": {"model_name": "base", "lora_enabled": True}}
    image = {"gpu": 0, "image_name": "vllm-cpu", "image_tag": "1"}
    await world.post(f"{MODELS}/deployment-configs", {"name": "dd", **config, "executor_config": image})
    await world.post(f"{MODELS}/deployments", {"name": "dd", "config": "dd"})

    async def waits() -> bool:
        reply = await world.chat(NAME)
        return reply.status_code == 503 and "retry-after" in reply.headers

    await eventually(waits)
    await world.loaded()


@pytest.mark.fault(32)
async def test_after_a_crash_of_the_engine_the_adapter_is_back_by_itself(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    first = world.engine()
    first.die(1)

    async def again() -> bool:
        reply = await world.chat(NAME)
        assert reply.status_code in (200, 502, 503), reply.text
        return reply.status_code == 200 and first.tag not in said(reply)

    await eventually(again, 10)
    await world.loaded()


@pytest.mark.fault(32)
async def test_a_daemon_that_starts_again_leaves_what_is_loaded_and_makes_up_for_what_it_missed(
    world: LoraWorld,
) -> None:
    await world.serve()
    await world.register()
    await world.register("gone", "other-lora")
    engine = world.engine()
    await world.stop()
    asked = len(engine.requests)
    draft = world.directory / "loras" / "default--base" / ".incoming-0123456789abcdef"
    draft.mkdir()
    del engine.adapters["default--gone"]
    await world.start()
    await world.loaded("gone")
    await world.loaded()
    loads = [r.json()["lora_name"] for r in list(engine.requests)[asked:] if "lora_adapter" in r.path]
    assert loads == ["default--gone"]
    await eventually(lambda: not draft.exists())
    assert len(world.copies()) == 2


async def test_an_adapter_that_was_disabled_while_no_daemon_ran_is_unloaded(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    engine = world.engine()
    await world.stop()
    engine.adapters["default--stray"] = "/loras/default--stray@0123456789ab"
    engine.adapters["user--own"] = "/somewhere/else"
    await world.start()
    await eventually(lambda: sorted(engine.adapters) == [NAME, "user--own"])


# --- what is refused -----------------------------------------------------------------------------------------------


async def test_a_rank_above_that_of_the_engine_is_refused_with_the_command_that_changes_it(world: LoraWorld) -> None:
    await world.serve(additional_args=["--max-lora-rank", "8", "--enforce-eager"])
    await world.register("fits")
    big = tiny_lora(world.directory / "big")
    await world.fileset("big", change_config(big, r=24))
    body = {"name": "big", "model": "base", "fileset": "big", "finetuning_type": "lora"}
    reply = await world.http.post(ADAPTERS, json=body)
    assert reply.status_code == 422
    (problem,) = reply.json()["detail"]
    assert problem["loc"] == ["body", "fileset"]
    assert "rank is 24, and default/dd was started for 8 at most" in problem["msg"]
    assert '"additional_args": ["--enforce-eager", "--max-lora-rank", "32"]' in problem["msg"]
    assert (await world.http.get(f"{ADAPTERS}/big")).status_code == 404
    off = await world.http.post(ADAPTERS, json={**body, "enabled": False})
    assert off.status_code == 201
    assert (await world.http.patch(f"{ADAPTERS}/big", json={"enabled": True})).status_code == 422


async def test_an_engine_that_refuses_an_adapter_says_why_and_serves_the_others(world: LoraWorld) -> None:
    """What we cannot know before: here the rank that an argument in a form of its own gave it."""
    await world.serve(additional_args=["--max-lora-rank", "64"])
    world.engine().max_lora_rank = 4
    made = await world.register()
    assert made["loaded_on"] == []
    assert "LoRA rank 8 is greater than max_lora_rank 4" in made["status_message"]
    reply = await world.chat(NAME)
    assert (reply.status_code, "greater than max_lora_rank" in reply.text) == (503, True)
    tried = len([r for r in world.engine().requests if "load_lora" in r.path])
    await asyncio.gather(*(world.adapter() for _ in range(20)))
    assert len([r for r in world.engine().requests if "load_lora" in r.path]) == tried == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"r": None}, "no 'r'"),
        ({"r": 1024}, "512 at most"),
    ],
)
async def test_what_no_engine_loads_is_refused_at_once(world: LoraWorld, changes: dict[str, object], says: str) -> None:
    await world.fileset("bad", change_config(tiny_lora(world.directory / "bad"), **changes))
    body = {"name": "bad", "fileset": "bad", "finetuning_type": "lora"}
    reply = await world.http.post(f"{MODELS}/models/base/adapters", json=body)
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "fileset"])
    assert says in reply.json()["detail"][0]["msg"]
    assert await world.daemon.store.all("adapters") == []


async def test_a_declared_rank_that_is_not_that_of_the_files_is_refused(world: LoraWorld) -> None:
    body = {"name": "ad", "model": "base", "fileset": "lora", "finetuning_type": "lora", "lora_config": {"rank": 4}}
    reply = await world.http.post(ADAPTERS, json=body)
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "lora_config", "rank"])


async def test_an_adapter_of_another_kind_is_kept_and_not_loaded(world: LoraWorld) -> None:
    await world.serve()
    made = await world.register(finetuning_type="p_tuning")
    assert made["loaded_on"] == []
    assert "finetuning_type lora" in made["status_message"]
    assert (await world.chat(NAME)).status_code == 404


async def test_an_engine_that_was_started_without_adapters_says_so(world: LoraWorld) -> None:
    await world.serve()
    world.engine().lora = False
    made = await world.register()
    assert "started without adapters" in made["status_message"]


# --- from a hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        lora = tiny_lora(tmp_path / "hub-lora", base="org/other-name")
        files = {path.name: path.read_bytes() for path in lora.iterdir()}
        hub.add("org/lora", files | {"checkpoint-10/optimizer.pt": b"x" * 1000, "README.md": b"An adapter"})
        yield hub


@pytest.fixture
async def online(tmp_path: Path, hub: FakeHub) -> AsyncIterator[LoraWorld]:
    weights = WeightsSettings(endpoint=hub.url, cache_dir=str(tmp_path / "cache"))
    async with LoraWorld(tmp_path, weights=weights) as world:
        await world.prepare()
        yield world


async def from_hub(world: LoraWorld, repo: str, **more: str) -> None:
    storage = {"type": "huggingface", "repo_id": repo, **more}
    reply = await world.http.post(FILESETS, json={"name": "hub", "storage": storage})
    assert reply.status_code == 200, reply.text


async def test_an_adapter_on_a_hub_is_fetched_checked_and_loaded(online: LoraWorld, hub: FakeHub) -> None:
    await online.serve()
    await from_hub(online, "org/lora")
    await online.register(fileset="hub")
    await online.loaded(timeout_s=20)
    assert NAME in said(await online.chat(NAME))
    (copy,) = (online.directory / "loras" / "default--base").iterdir()
    (blob,) = (online.directory / "cache").rglob("snapshots/*/adapter_model.safetensors")
    assert (copy / "adapter_model.safetensors").samefile(blob.resolve()), "no second copy of what never changes"
    assert "org/other-name" in (blob.parent / "adapter_config.json").read_text()
    assert hub.sent_bytes("checkpoint-10/optimizer.pt") == 0


@pytest.mark.usefixtures("impatient")
async def test_a_hub_that_is_down_delays_an_adapter_and_does_not_refuse_it(online: LoraWorld, hub: FakeHub) -> None:
    await online.serve()
    await from_hub(online, "org/lora")
    hub.close()
    made = await online.register(fileset="hub")
    assert made["loaded_on"] == []

    async def told() -> bool:
        reply = await online.chat(NAME)
        return reply.status_code == 503 and len((await online.adapter())["status_message"]) > 20

    await eventually(told, 15)


async def test_a_wrong_adapter_on_a_hub_is_refused_before_it_is_fetched(online: LoraWorld, hub: FakeHub) -> None:
    lora = change_config(tiny_lora(online.directory / "dora"), use_dora=True)
    hub.add("org/dora", {path.name: path.read_bytes() for path in lora.iterdir()})
    await from_hub(online, "org/dora")
    body = {"name": "math", "model": "base", "fileset": "hub", "finetuning_type": "lora"}
    reply = await online.http.post(ADAPTERS, json=body)
    assert (reply.status_code, "DoRA" in reply.text) == (422, True)
    assert not list((online.directory / "cache").rglob("adapter_model.safetensors"))


# --- NIM -----------------------------------------------------------------------------------------------------------


async def test_a_nim_finds_adapters_in_its_directory_and_loses_them(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "NIM_LOOK_S", 0.1)
    await world.serve(engine="nim")
    await world.register()
    home = world.directory / "loras" / "nim" / "default--base"
    await eventually(lambda: [path.name for path in home.iterdir()] == [NAME])
    assert config_of(home / NAME)["base_model_name_or_path"] == "/model-store"
    await world.loaded(timeout_s=15)
    assert f"as {NAME}: Hello!" in said(await world.chat(NAME))
    assert [m["name"] for m in (await world.http.get(f"{MODELS}/models")).json()["data"]] == ["base"]
    world.engine().peft_refresh_s = 60
    await world.change(enabled=False)
    for reply in (await world.chat(NAME), await world.chat(NAME, provider="dd")):
        assert reply.status_code == 404, "at once, whether the NIM has noticed or not"
    assert NAME in world.engine().adapters
    world.engine().peft_refresh_s = 0.1
    await eventually(lambda: list(home.iterdir()) == [])
    await world.loaded(on=(), timeout_s=15)


async def test_a_nim_forgets_the_former_version_before_it_finds_the_next(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "NIM_LOOK_S", 0.1)
    await world.serve(engine="nim")
    await world.register()
    await world.loaded(timeout_s=15)
    home = world.directory / "loras" / "nim" / "default--base"
    before = (home / NAME / "adapter_model.safetensors").read_bytes()
    engine = world.engine()
    looks = count_looks(engine)
    engine.peft_refresh_s = 60
    await world.change(fileset="other-lora")
    await eventually(lambda: len(looks) > 3, 20)
    assert list(home.iterdir()) == [], "it would not notice that another version is there"
    engine.peft_refresh_s = 0.1

    def changed() -> bool:
        file = home / NAME / "adapter_model.safetensors"
        return file.exists() and file.read_bytes() != before

    await eventually(changed, 20)
    await world.loaded(timeout_s=15)


async def test_what_an_engine_has_loaded_stays_while_its_deployment_takes_no_adapters_any_more(
    world: LoraWorld,
) -> None:
    """An old version that still serves would die of files that went."""
    await world.serve()
    await world.register()
    (loaded,) = world.copies()
    body = {"engine": "vllm", "model_spec": {"model_name": "base"}, "executor_config": {"gpu": 5}}
    reply = await world.http.post(f"{MODELS}/deployment-configs/dd", json=body)
    assert reply.status_code == 201, reply.text
    await eventually(lambda: not world.daemon.loader._takers)
    await world.change(enabled=False)
    never = world.directory / "loras" / "default--base" / "default--never@0123456789ab"
    never.mkdir()
    world.daemon.loader.look_again()
    await eventually(lambda: not never.exists())
    await eventually(lambda: world.copies() == {loaded})  # what is removed is put aside first
    assert world.engine().adapters == {NAME: f"/loras/{loaded}"}


async def test_a_roll_moves_traffic_when_the_new_engine_has_the_adapters_of_the_old_one(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    old, statuses, over = world.engine(), set(), asyncio.Event()
    world.faults = Faults(lora_status=503)  # of the new one: for a while it loads nothing

    async def ask() -> None:
        while not over.is_set():
            statuses.add((await world.chat(NAME)).status_code)
            await asyncio.sleep(0.01)  # a refusal takes no time, and others must get on

    asking = asyncio.create_task(ask())
    try:
        await world.post(f"{MODELS}/deployments/dd", {"config": "dd"})
        await world.wait("dd", "READY", "its adapters are being loaded")
        new = next(engine for engine in world.engines.values() if engine is not old)
        assert old.tag in said(await world.chat("base"))
        new.faults = Faults()

        async def moved() -> bool:
            return new.tag in said(await world.chat(NAME)) and old.tag not in world.engines

        await eventually(moved, 15)
    finally:
        over.set()
        await asking
    assert statuses == {200}


async def test_an_adapter_that_no_new_engine_loads_holds_up_a_roll_only_so_long(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "ADAPTERS_S", 0.5)
    await world.serve()
    await world.register()
    old = world.engine()
    world.faults = Faults(lora_status=503)
    await world.post(f"{MODELS}/deployments/dd", {"config": "dd"})

    async def moved() -> bool:
        return old.tag not in world.engines and old.tag not in said(await world.chat("base"))

    await eventually(moved, 10)

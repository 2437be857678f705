"""Adapters when what surrounds them misbehaves: nothing is tried in a hot loop, nothing is served by mistake."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nimhost.deployments import execute, loading
from nimhost.deployments.adapter_copies import AdapterCopies
from nimhost.deployments.adapters import RETRY_MAX_S, RETRY_S, retry_pause_s
from nimhost.deployments.loading import Loader
from nimhost.errors import BadRequest, DiskFull, HubUnavailable, WeightsMissing
from nimhost.host.adapter_files import AdapterFiles
from nimhost.refs import Ref
from tests.fakes.engine import Faults, Received, Reply
from tests.loras import ADAPTERS, LoraWorld, change_config, config_of, count_looks
from tests.support import eventually
from tests.tiny import tiny_lora, tiny_model
from tests.world import MODELS

NAME = "default--math"
MATH = Ref("default", "math")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[LoraWorld]:
    async with LoraWorld(tmp_path) as world:
        await world.prepare()
        yield world


@pytest.mark.parametrize(
    ("failures", "asked_s", "pause_s"),
    [(1, None, RETRY_S), (2, None, 2 * RETRY_S), (4, None, 8 * RETRY_S), (9, None, RETRY_MAX_S),
     (10_000, None, RETRY_MAX_S), (1, 0.2, RETRY_S), (1, 3600.0, 3600.0), (9, 90.0, 90.0)],
)  # fmt: skip
def test_who_fails_again_and_again_is_tried_less_often(failures: int, asked_s: float | None, pause_s: float) -> None:
    assert retry_pause_s(failures, asked_s) == pause_s


async def rounds_end(loader: Loader) -> float:
    """How long it sleeps once there is nothing to do."""
    pauses: list[float] = []
    round_ = loader._round

    async def watched() -> float:
        pauses.append(await round_())
        return pauses[-1]

    loader._round = watched  # type: ignore[method-assign]
    loader._wake.set()
    await eventually(lambda: pauses and not loader._work and not loader._wake.is_set(), 10)
    return pauses[-1]


def busy_hub(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """It wants to be left alone for an hour; grows each time it is asked for an adapter."""
    tries: list[None] = []

    async def busy(self: AdapterCopies, *_: Any) -> None:
        tries.append(None)
        raise HubUnavailable("the hub answers 429", None, 3600.0)

    monkeypatch.setattr(AdapterCopies, "bring", busy)
    return tries


@pytest.mark.usefixtures("impatient")
async def test_after_an_engine_that_failed_for_a_moment_it_rests(world: LoraWorld) -> None:
    await world.serve()
    world.engine().faults = Faults(lora_status=503)
    await world.register()
    world.engine().faults = Faults()
    await world.loaded(timeout_s=15)
    assert await rounds_end(world.daemon.loader) > RETRY_S


@pytest.mark.usefixtures("impatient")
async def test_nothing_is_left_to_wait_for_once_the_adapter_that_failed_is_gone(world: LoraWorld) -> None:
    await world.serve()
    world.engine().faults = Faults(lora_status=503)
    await world.register()
    loader = world.daemon.loader
    assert (await world.http.delete(f"{ADAPTERS}/math")).status_code == 204
    loader._retry_at[world.engine().tag] = 0.0  # long past
    assert await rounds_end(loader) > RETRY_S


@pytest.mark.usefixtures("impatient")
async def test_a_surprise_is_not_tried_again_at_once(world: LoraWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.serve()
    tries = 0
    bring = AdapterCopies.bring

    async def surprise(self: AdapterCopies, *rest: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RuntimeError("out of the blue")
        return await bring(self, *rest)

    monkeypatch.setattr(AdapterCopies, "bring", surprise)
    monkeypatch.setattr(loading, "retry_pause_s", lambda failures, asked_s: 3600.0)
    made = await world.register()
    assert (made["loaded_on"], tries) == ([], 1)
    for expected in (2, 3):
        world.daemon.loader.look_again()  # as every change of an adapter does
        await eventually(lambda n=expected: tries == n)
    await world.loaded()


@pytest.mark.fault(14)
async def test_a_hub_that_asked_for_patience_is_left_alone_when_files_are_looked_at_again(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.serve()
    tries = busy_hub(monkeypatch)
    await world.register()
    loader = world.daemon.loader
    await eventually(lambda: tries and not loader._work)
    before = len(tries)
    loader._looked_at = -1e9
    await loader._round()
    await eventually(lambda: not loader._work)
    assert len(tries) == before
    assert 3000 < loader._retry_at[MATH] - asyncio.get_running_loop().time() <= 3600


async def test_an_adapter_that_takes_the_name_of_one_of_another_model_gets_files_of_its_own(world: LoraWorld) -> None:
    """Both from the same files: their copies have the same name, below different models."""
    await world.fileset("base2", tiny_model(world.directory / "base2"))
    await world.post(f"{MODELS}/models", {"name": "base2", "fileset": "base2"})
    await world.serve()
    config = {
        "name": "ee", "engine": "vllm", "model_spec": {"model_name": "base2", "lora_enabled": True},
        "executor_config": {"gpu": 0, "image_name": "vllm-cpu", "image_tag": "1"},
    }  # fmt: skip
    await world.post(f"{MODELS}/deployment-configs", config)
    await world.post(f"{MODELS}/deployments", {"name": "ee", "config": "ee"})
    await world.wait("ee", "READY")
    await world.register()
    store = world.daemon.store
    async with store.transaction() as tx:  # nobody sees the time between
        old = await tx.get("adapters", *MATH)
        await tx.delete(old)
        await tx.insert("adapters", *MATH, old.wish.__class__(**{**_fields(old.wish), "model": "default/base2"}))
    await world.loaded(on=("default/ee",), timeout_s=10)
    assert (world.directory / "loras" / "default--base2").is_dir()


def _fields(wish: Any) -> dict[str, Any]:
    return {name: getattr(wish, name) for name in wish.__struct_fields__}


@pytest.mark.fault(20)
async def test_a_daemon_killed_before_a_nim_forgot_the_former_version_still_waits_for_that(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NIM does not notice that another version is under the name: it would serve the former one for ever."""
    monkeypatch.setattr(loading, "NIM_LOOK_S", 0.1)
    await world.serve(engine="nim")
    await world.register()
    await world.loaded(timeout_s=15)
    home = world.directory / "loras" / "nim" / "default--base"
    engine = world.engine()
    engine.peft_refresh_s = 60
    await world.change(fileset="other-lora")
    await eventually(lambda: list(home.iterdir()) == [], 15)
    await world.stop()
    looks = count_looks(engine)
    await world.start()
    await eventually(lambda: len(looks) > 5, 20)
    assert list(home.iterdir()) == []
    engine.peft_refresh_s = 0.1
    await eventually(lambda: [path.name for path in home.iterdir()] == [NAME], 20)
    await world.loaded(timeout_s=15)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_does_not_unload_is_told_again_after_a_while(world: LoraWorld) -> None:
    await world.serve()
    await world.register()
    engine = world.engine()
    told = 0

    def refuse(_: Received) -> Reply:
        nonlocal told
        told += 1
        return Reply(500, {"error": {"message": "engine busy"}})

    engine.scripted["/v1/unload_lora_adapter"] = refuse
    assert (await world.http.delete(f"{ADAPTERS}/math")).status_code == 204
    assert (0 < told <= 3, len(world.copies())) == (True, 1), "the engine still has it loaded"
    del engine.scripted["/v1/unload_lora_adapter"]
    await eventually(lambda: engine.adapters == {} and world.copies() == set(), 15)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_only_says_that_it_has_loaded_is_told_again_after_a_while(world: LoraWorld) -> None:
    await world.serve()
    told = 0

    def pretend(_: Received) -> Reply:
        nonlocal told
        told += 1
        return Reply(200, b"Success")

    world.engine().scripted["/v1/load_lora_adapter"] = pretend
    made = await world.register()
    assert (made["loaded_on"], 0 < told <= 3) == ([], True), told
    del world.engine().scripted["/v1/load_lora_adapter"]
    await world.loaded(timeout_s=15)


@pytest.mark.fault(32)
async def test_what_an_engine_loaded_and_could_not_tell_is_unloaded_all_the_same(world: LoraWorld) -> None:
    """Deleted before anybody saw that it was loaded: the files must not go while the engine has it."""
    await world.serve()
    engine = world.engine()
    models, mute = engine.models, True
    engine.scripted["/v1/models"] = lambda request: Reply(500, {}) if mute else models(request)
    registering = asyncio.create_task(world.register())
    await eventually(lambda: NAME in engine.adapters)
    assert (await world.http.delete(f"{ADAPTERS}/math")).status_code == 204
    await registering
    mute = False
    await eventually(lambda: engine.adapters == {} and world.copies() == set(), 15)


@pytest.mark.fault(14)
async def test_models_that_others_make_do_not_have_a_hub_asked_again(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.serve()
    tries = busy_hub(monkeypatch)
    await world.register()
    before = len(tries)
    for number in range(5):
        await world.post(f"{MODELS}/models", {"name": f"other-{number}"})
    await rounds_end(world.daemon.loader)
    assert len(tries) == before
    assert (await world.http.patch(f"{MODELS}/models/base", json={"description": "of the adapter"})).status_code == 200
    await eventually(lambda: len(tries) > before)


@pytest.mark.fault(17)
async def test_a_disk_that_is_full_for_nims_holds_up_no_other_engine(
    world: LoraWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("The disk that holds the adapters is full.")

    await world.serve()
    await world.serve("nim", engine="nim")
    monkeypatch.setattr(AdapterFiles, "show", full)
    await world.register()
    await eventually(lambda: any(NAME in e.adapters for e in world.engines.values() if e.lora), 10)


async def test_work_that_is_given_up_before_it_began_can_begin_again(world: LoraWorld) -> None:
    await world.serve()
    loader, began = world.daemon.loader, asyncio.Event()

    async def work() -> None:
        began.set()

    loader._begin(MATH, work())
    loader._work[MATH].cancel()
    await eventually(lambda: not loader._work)
    loader._begin(MATH, work())
    await asyncio.wait_for(began.wait(), 5)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", "{", '{"r": 8, "modules_to_save": true}'])
async def test_a_config_that_is_no_config_is_refused_in_words(world: LoraWorld, text: str) -> None:
    source = tiny_lora(world.directory / "odd")
    (source / "adapter_config.json").write_text(text)
    await world.fileset("odd", source)
    body = {"name": "odd", "model": "base", "fileset": "odd", "finetuning_type": "lora"}
    reply = await world.http.post(ADAPTERS, json=body)
    assert reply.status_code in (400, 422), reply.text


@pytest.mark.parametrize("said", [True, 5, "lm_head", {"a": 1}])
async def test_modules_that_are_no_list_are_named(world: LoraWorld, said: object) -> None:
    source = change_config(tiny_lora(world.directory / "odd"), modules_to_save=said)
    await world.fileset("odd", source)
    body = {"name": "odd", "model": "base", "fileset": "odd", "finetuning_type": "lora"}
    reply = await world.http.post(ADAPTERS, json=body)
    assert reply.status_code == 422
    assert f"modules_to_save: {said}" in reply.json()["detail"][0]["msg"]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null"])
def test_a_config_that_changed_into_something_else_is_not_copied(tmp_path: Path, text: str) -> None:
    files, source = AdapterFiles(tmp_path / "loras"), tiny_lora(tmp_path / "source")
    (source / "adapter_config.json").write_text(text)
    with pytest.raises(WeightsMissing, match="is not"):
        files.make(Ref("default", "base"), NAME, "0" * 12, source, "/model-store", link=True)
    assert list((tmp_path / "loras" / "default--base").iterdir()) == []


def test_two_adapters_may_be_the_first_of_a_model_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, source = AdapterFiles(tmp_path / "loras"), tiny_lora(tmp_path / "source")
    home, is_dir = tmp_path / "loras" / "default--base", Path.is_dir

    def then_made(self: Path) -> bool:
        there = is_dir(self)
        os.makedirs(home, exist_ok=True)  # by the other one, right after the look
        return there

    monkeypatch.setattr(Path, "is_dir", then_made)
    made = files.make(Ref("default", "base"), NAME, "0" * 12, source, "/model-store", link=True)
    assert config_of(home / made)["base_model_name_or_path"] == "/model-store"


def test_a_directory_that_got_its_first_adapter_while_an_engine_starts_is_taken_as_it_is(tmp_path: Path) -> None:
    home = tmp_path / "loras" / "default--base"
    (home / "adapter").mkdir(parents=True)
    execute._make_directory(home, 0o755)
    assert sorted(os.listdir(home.parent)) == ["default--base"]
    assert os.listdir(home) == ["adapter"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        execute._make_directory(tmp_path / "file", 0o755)


async def test_what_a_config_says_is_json(tmp_path: Path) -> None:
    from nimhost.deployments import adapter_copies
    from nimhost.host.weights.source import Directory

    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(BadRequest, match="is not a JSON object"):
        await adapter_copies._config(Directory(tmp_path))

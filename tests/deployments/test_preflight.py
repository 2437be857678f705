"""What is refused before a byte is fetched, and that a failed reading refuses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Prepare, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.driver import requirement, too_old
from nimhost.deployments.observed import GpuSlot, Observed, Room
from nimhost.deployments.preflight import blocked, check_wish
from nimhost.deployments.readings import Readings
from nimhost.deployments.storage import HubWeights
from nimhost.entities import Deployment, DeploymentStatus
from nimhost.errors import BadRequest
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.disk import reserved_space
from nimhost.host.weights.wire import Repo
from nimhost.models.memory import GIB, Ask
from nimhost.refs import Ref
from nimhost.runs import Run
from tests.deployments.make import NOW, OLD, decide, instance, machine, wanted, was_ready
from tests.deployments.test_fit import order
from tests.fakes.containers import FakeContainers
from tests.models import public
from tests.models import test_checkpoint as known

REF = Ref("default", "d")
HUB = HubWeights(repo_id="a/b", revision="main", repo_type="model", endpoint=None, token_secret=None)
CARD = GpuSlot(uuid="GPU-0", index=0, total_bytes=24 * GIB)


def vllm(config: Any = known.QWEN3_1_7B, force: bool = False, **fields: Any) -> Desired:
    d = wanted(force=force)
    values = {"order": order(config), "ask": Ask(), "image": "vllm/vllm-openai:v1", "weights": HUB, **fields}
    return replace(d, **values)


def here(**fields: Any) -> Observed:
    return machine(gpus=(CARD,), **fields)


def absent(**fields: Any) -> Observed:
    """Neither image nor weights are there; plenty of room unless a test says otherwise."""
    room = Room(weights_path="/w", weights_free_bytes=10**12, images_path="/i", images_free_bytes=10**12)
    size = 27 * GIB // 2
    return here(images={}, weights={}, rooms={REF: replace(room, **fields)}, downloads={REF: size})


@pytest.mark.fault(10)
def test_without_a_gpu_runtime_nothing_is_fetched_and_the_command_is_named() -> None:
    verdict = decide(vllm(), replace(absent(), gives_gpus=False))
    assert (verdict.status, verdict.action) == ("ERROR", None)
    assert "sudo nvidia-ctk runtime configure" in verdict.message
    assert blocked(wanted(gpus=0), replace(here(), gives_gpus=False)) is None
    assert blocked(vllm(), replace(here(), gives_gpus=None)) is None


NIM = "cuda>=12.8 brand=unknown,driver>=570,driver<571 brand=tesla,driver>=535,driver<536"


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("required", "driver", "cuda", "old"),
    [
        ("cuda>=12.8", "580.65.06", "13.0", False),
        ("cuda>=12.8", "550.90.07", "12.4", True),
        ("cuda>=12.8", "570.10", "12.8", False),
        (NIM, "535.183.01", "12.2", False),  # the compatibility that data centre cards have
        (NIM, "545.23", "12.3", True),
        ("cuda>=11.0 driver>=450", "470.82", "10.2", False),
        ("", "450", "11.0", False),
        ("brand=tesla", "450", "11.0", False),  # not ours to judge
        ("cuda>=13.0", None, None, False),  # the reading failed
        ("nonsense", "580", "13.0", False),
    ],
)
def test_a_driver_is_old_when_no_alternative_holds(
    required: str, driver: str | None, cuda: str | None, old: bool
) -> None:
    assert (too_old(required, driver, cuda) is not None) == old


def test_an_image_can_switch_its_demand_off() -> None:
    assert requirement({"NVIDIA_REQUIRE_CUDA": "cuda>=99", "NVIDIA_DISABLE_REQUIRE": "1"}) == ""
    assert requirement({"NVIDIA_REQUIRE_CUDA": "cuda>=99"}) == "cuda>=99"


@pytest.mark.fault(11)
def test_a_driver_too_old_is_found_before_the_start() -> None:
    old = here(driver="550.90.07", cuda="12.4", requires={REF: "cuda>=12.8"})
    verdict = decide(vllm(), old)
    assert (verdict.status, verdict.action) == ("ERROR", None)
    assert "Image vllm/vllm-openai:v1 needs CUDA 12.8 or newer; driver 550.90.07 of this machine has CUDA 12.4" in (
        verdict.message
    )
    assert "Update the NVIDIA driver" in verdict.message
    assert decide(vllm(), replace(old, driver="580", cuda="13.0")).action is not None


@pytest.mark.fault(23)
def test_what_cannot_fit_is_an_error_with_the_sum_and_the_fix() -> None:
    verdict = decide(vllm(public.QWEN3_14B), absent())
    assert (verdict.status, verdict.action) == ("ERROR", None)
    assert "default/m does not fit: weights 27.5" in verdict.message
    assert "It takes 2 GPUs of 24 GiB" in verdict.message


def test_a_person_can_overrule_the_sum_but_not_the_machine() -> None:
    assert blocked(vllm(public.QWEN3_14B, force=True), absent(weights_free_bytes=0)) is None
    assert blocked(vllm(force=True), replace(absent(), gives_gpus=False)) is not None
    assert blocked(vllm(force=True), machine(gpus=())) is not None


def test_an_architecture_that_vllm_does_not_serve_is_refused() -> None:
    t5 = {**known.LLAMA_8B, "architectures": ["T5ForConditionalGeneration"]}
    assert "vLLM does not serve T5ForConditionalGeneration" in (blocked(vllm(t5), absent()) or "")
    new = {**known.QWEN3_1_7B, "architectures": ["BrandNewForCausalLM"]}
    assert blocked(vllm(new), absent()) is None


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("room", "said"),
    [
        ({}, None),
        ({"weights_free_bytes": GIB}, "No room for the weights: about 3.2 GiB at /w, 1.0 are free."),
        ({"weights_free_bytes": GIB, "weights_there_bytes": 3 * GIB}, None),
        (
            {"weights_free_bytes": 60 * GIB, "promised_bytes": 59 * GIB},
            "No room for the weights: about 3.2 GiB at /w, 60.0 are free, of which 59.0 are promised to other",
        ),
        ({"images_free_bytes": GIB}, "No room for the image vllm/vllm-openai:v1: about 27.0 GiB at /i, 1.0 are free."),
        ({"weights_free_bytes": 28 * GIB, "images_free_bytes": 28 * GIB}, None),
        (
            {"weights_free_bytes": 28 * GIB, "images_free_bytes": 28 * GIB, "same": True},
            "No room for the weights and the image: about 30.2 GiB at /w, 28.0 are free.",
        ),
        ({"weights_free_bytes": None, "images_free_bytes": None}, None),
    ],
)
def test_room_on_both_disks_is_looked_at_before_anything_is_fetched(room: dict[str, Any], said: str | None) -> None:
    why = blocked(vllm(), absent(**room))
    assert (why or "None").startswith(str(said))
    assert why is None or "nimhost weights prune" in why


@pytest.mark.fault(17)
def test_a_docker_that_keeps_what_it_pulls_needs_room_for_that_too() -> None:
    kept = replace(absent(images_free_bytes=28 * GIB), keeps_packed=True)
    said = "No room for the image vllm/vllm-openai:v1: about 40.5 GiB at /i, 28.0 are free."
    assert (blocked(vllm(), kept) or "").startswith(said)
    assert "--force" in (blocked(vllm(), kept) or "")


def test_an_image_of_unknown_size_is_pulled_without_a_look_at_the_disk() -> None:
    assert blocked(vllm(), replace(absent(images_free_bytes=GIB), downloads={})) is None


@pytest.mark.fault(11)
def test_nothing_is_fetched_while_the_registry_is_asked() -> None:
    asking = replace(absent(), asking=frozenset([REF]))
    verdict = decide(vllm(), asking)
    assert (verdict.status, verdict.action) == ("PENDING", None)
    assert verdict.message == "Asking the registry of image vllm/vllm-openai:v1 what it is."
    assert decide(vllm(), absent()).action == Prepare(True, True, vllm().hash)
    assert decide(vllm(), replace(asking, images={REF: "sha256:1"})).action == Prepare(False, True, vllm().hash)


def test_what_is_here_already_needs_no_room() -> None:
    full = here(rooms={REF: Room(weights_free_bytes=0, images_free_bytes=0)})
    assert blocked(vllm(), full) is None


@pytest.mark.fault(8)
def test_memory_that_is_held_is_measured_again_soon_and_only_while_something_waits() -> None:
    held = replace(CARD, used_bytes=20 * GIB)
    waiting = decide(vllm(), machine(gpus=(held,)))
    assert (waiting.status, waiting.action, waiting.wake_at) == ("PENDING", None, NOW + 1)
    assert decide(vllm(), machine(gpus=(replace(held, holder="default/x"),))).wake_at is None
    assert decide(vllm(), here()).wake_at is None


def test_an_engine_beside_others_is_told_what_is_left() -> None:
    started = decide(vllm(), machine(gpus=(replace(CARD, used_bytes=6 * GIB),))).action
    assert started == Start(("GPU-0",), vllm().hash, 0.7395)
    assert decide(vllm(), here()).action == Start(("GPU-0",), vllm().hash)


def test_a_healthy_engine_is_left_alone_whatever_the_preflight_says() -> None:
    verdict = decide(vllm(public.QWEN3_14B), machine(instance(), gpus=(CARD,)))
    assert verdict.status == "READY"


def test_an_old_version_serves_on_when_the_new_one_cannot_fit() -> None:
    old = instance(id="old", hash=OLD)
    d = vllm(public.QWEN3_14B)
    d = replace(d, entity=replace(d.entity, status=DeploymentStatus(run=Run(spec_hash=d.hash, previous=was_ready()))))
    verdict = decide(d, machine(old, gpus=(CARD,)))
    assert (verdict.status, verdict.instance, verdict.action) == ("READY", old, None)
    assert "does not fit" in verdict.message


# --- before a row exists


def test_a_wish_that_cannot_fit_is_refused_with_the_sum_and_the_change() -> None:
    with pytest.raises(BadRequest, match=r"does not fit: weights 27\.5") as caught:
        check_wish(vllm(public.QWEN3_14B), (CARD, replace(CARD, uuid="GPU-1", index=1)), None, False)
    assert caught.value.hint is not None
    assert "--gpu 2" in caught.value.hint
    check_wish(vllm(public.QWEN3_14B), (CARD,), None, True)


def test_more_gpus_than_there_are_are_refused_forced_or_not() -> None:
    for force in (False, True):
        with pytest.raises(BadRequest, match="this machine has no GPU"):
            check_wish(vllm(), (), None, force)


def test_force_is_part_of_the_wish_and_starts_nothing_anew() -> None:
    assert Deployment(config="c", force=True).force


@pytest.mark.fault(17)
async def test_what_other_downloads_will_write_is_read_and_ones_own_is_not(tmp_path: Path) -> None:
    cache_dir = tmp_path / "weights"
    other, own = RepoCache(cache_dir, Repo("c/d")), RepoCache(cache_dir, Repo("a/b"))
    other.make_dirs()
    readings = Readings(FakeContainers(), cache_dir)
    assert (await readings.rooms([vllm()]))[REF].promised_bytes == 0
    with reserved_space(other, [HubFile("model.safetensors", 5 << 20, "0" * 64)]):
        assert (await readings.rooms([vllm()]))[REF].promised_bytes == 5 << 20
        assert not (await readings.rooms([vllm()]))[REF].fetching
    with reserved_space(own, [HubFile("model.safetensors", 5 << 20, "0" * 64)]):
        assert (await readings.rooms([vllm()]))[REF].promised_bytes == 0
        assert (await readings.rooms([vllm()]))[REF].fetching
    assert (await readings.rooms([vllm()]))[REF].promised_bytes == 0, "a promise ends with its download"

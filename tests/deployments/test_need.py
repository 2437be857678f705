"""What a deployment wants of each GPU: too small ones, measured ones, promised ones, and what helps who waits."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.actions import Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.explain import explanation
from nimhost.deployments.fit import ask_of
from nimhost.deployments.need import need_of
from nimhost.deployments.observed import GpuSlot, Share, Stranger
from nimhost.deployments.placement import choose, obstacle, utilization, waiting
from nimhost.deployments.preflight import blocked, check_wish
from nimhost.errors import BadRequest
from nimhost.models.memory import GIB
from tests.deployments.make import decide, machine, wanted
from tests.deployments.test_fit import HOST, order
from tests.models import public
from tests.models import test_checkpoint as known

XORG = Stranger(pid=900, name="Xorg", user="root", used_bytes=3 * GIB)


def cards(*gib: float, **fields: Any) -> tuple[GpuSlot, ...]:
    return tuple(
        GpuSlot(uuid=f"GPU-{i}", index=i, name=f"SIM-{size:g}", total_bytes=int(size * GIB), **fields)
        for i, size in enumerate(gib)
    )


def vllm(config: Any, *args: str, force: bool = False, **options: Any) -> Desired:
    made = order(config, *args, **options)
    return replace(wanted(force=force), order=made, ask=ask_of(made, HOST), image="vllm/vllm-openai:v1")


def started_on(d: Desired, slots: tuple[GpuSlot, ...]) -> tuple[str, ...]:
    action = decide(d, machine(gpus=slots)).action
    assert isinstance(action, Start), action
    return action.gpu_ids


# --- GPUs that are too small


def test_a_model_gets_the_gpu_it_fits_on_not_the_tightest() -> None:
    assert started_on(vllm(public.QWEN3_14B), cards(24, 80)) == ("GPU-1",)
    assert started_on(vllm(known.QWEN3_1_7B), cards(24, 80)) == ("GPU-0",)


def test_a_split_model_gets_gpus_that_each_part_fits_on() -> None:
    slots = cards(24, 24, 24, 24, 80, 80, 80, 80)
    assert started_on(vllm(public.LLAMA_70B, gpu=4), slots) == ("GPU-4", "GPU-5", "GPU-6", "GPU-7")


def test_it_waits_for_the_large_one_and_says_that_the_free_one_is_too_small() -> None:
    small, large = cards(24, 80)
    slots = (small, replace(large, holder="default/x"))
    verdict = decide(vllm(public.QWEN3_14B), machine(gpus=slots))
    assert (verdict.status, verdict.action) == ("PENDING", None)
    assert "GPU 0 has only 24 GiB, 36 are needed; GPU 1 is held by default/x" in verdict.message


def test_who_is_forced_has_the_gpus_that_none_of_it_fits_on() -> None:
    assert started_on(vllm(public.LLAMA_70B, force=True), cards(24, 24)) == ("GPU-0",)
    assert started_on(vllm(public.QWEN3_14B, force=True), cards(24, 80)) == ("GPU-1",)


def test_what_is_explained_is_on_the_gpu_it_would_get() -> None:
    found = explanation(vllm(public.QWEN3_14B), machine(gpus=cards(24, 80)))
    assert (found["verdict"], found["gpus"]["chosen"]) == ("starts", ["GPU-1"])
    assert found["memory"]["fits"]
    assert found["memory"]["gpu_bytes"] == 80 * GIB
    assert "only 24 GiB" in found["gpus"]["there"][0]["obstacle"]


def test_what_is_refused_is_explained_on_the_largest_gpu() -> None:
    found = explanation(vllm(public.LLAMA_70B), machine(gpus=cards(24, 80)))
    assert (found["verdict"], found["gpus"]["chosen"]) == ("refused", [])
    assert found["memory"]["gpu_bytes"] == 80 * GIB


def test_a_gpu_that_was_not_measured_is_not_too_small() -> None:
    unmeasured = (GpuSlot(uuid="GPU-0", index=0),)
    assert need_of(vllm(public.QWEN3_14B), unmeasured).too_small == {}
    check_wish(vllm(public.QWEN3_14B), unmeasured, None, False)


# --- wishes that can never be met


@pytest.mark.parametrize(
    ("gib", "gpus", "says"),
    [
        ((80, 80, 24, 24), 3, "79 GiB of each of 3 GPUs are asked for, only 2 of them have that much here"),
        ((24, 24), 1, "79 GiB of a GPU are asked for, the largest here has 24.0"),
    ],
)
def test_a_share_that_no_gpu_has_is_refused_and_keeps_nobody_waiting(gib: Any, gpus: int, says: str) -> None:
    d = vllm(None, gpu=gpus, share_gib=79)
    with pytest.raises(BadRequest, match=r"executor_config\.gpu_memory_gib: ") as refused:
        check_wish(d, cards(*gib), None, True)
    assert says in refused.value.message
    verdict = decide(replace(d, entity=wanted(force=True).entity), machine(gpus=cards(*gib)))
    assert (verdict.status, verdict.run.waiting_since) == ("ERROR", 0.0)
    assert says in verdict.message
    check_wish(vllm(None, gpu=2, share_gib=79), cards(80, 80, 24), None, False)


def test_a_share_is_not_had_of_a_gpu_that_is_too_small_for_it() -> None:
    d = vllm(None, share_gib=40)
    assert started_on(d, cards(24, 80)) == ("GPU-1",)
    why = obstacle(cards(24, 80)[0], need_of(d, cards(24, 80)))
    assert why == "GPU 0 has only 24 GiB, 40 are needed"


def test_what_is_wrong_with_the_driver_is_said_where_gpus_are_missing() -> None:
    problem = "NVIDIA's driver is installed but not loaded; run: sudo modprobe nvidia"
    with pytest.raises(BadRequest) as refused:
        check_wish(vllm(known.QWEN3_1_7B), (), None, False, problem)
    assert (
        "this machine has no GPU that can be used: NVIDIA's driver is installed but not loaded" in refused.value.message
    )
    assert "nimhost gpus" in str(refused.value.hint)
    with pytest.raises(BadRequest) as refused:
        check_wish(vllm(known.QWEN3_1_7B), (), None, False)
    assert refused.value.hint == "Deploy without one: --gpu 0 (in a config: executor_config.gpu = 0)"


# --- memory that somebody else holds


def desktop() -> tuple[GpuSlot, ...]:
    return cards(24, used_bytes=3 * GIB, strangers=(XORG,))


def test_who_could_do_with_less_is_told_how() -> None:
    verdict = decide(wanted(), machine(gpus=desktop()))
    assert "GPU 0 has 21 of 24 GiB free, 22 are needed: Xorg (pid 900, user root) holds 3.0 GiB." in verdict.message
    assert verdict.message.endswith("To start it beside that, give it a share: --gpu-memory 20")
    shared = replace(wanted(), order=replace(order(None, engine="generic", share_gib=20)))
    assert started_on(shared, desktop()) == ("GPU-0",)


def test_who_was_told_too_much_is_told_how_much_there_is() -> None:
    d = vllm(known.QWEN3_1_7B, "--gpu-memory-utilization", "0.95")
    verdict = decide(d, machine(gpus=desktop()))
    assert verdict.message.endswith("ask for less: --gpu-memory-utilization 0.86")
    assert started_on(vllm(known.QWEN3_1_7B, "--gpu-memory-utilization", "0.86"), desktop()) == ("GPU-0",)


def test_nothing_is_advised_where_only_another_deployment_is_in_the_way() -> None:
    slots = tuple(replace(card, holder="default/x") for card in desktop())
    assert waiting(slots, need_of(wanted(), slots), None).endswith("GPU 0 is held by default/x.")


def test_force_ignores_what_was_measured_but_not_what_was_promised() -> None:
    full = cards(24, used_bytes=22 * GIB, strangers=(replace(XORG, used_bytes=22 * GIB),))
    assert started_on(wanted(force=True), full) == ("GPU-0",)
    promised = cards(24, shares=(Share("default/a", 10 * GIB),))
    assert choose(promised, need_of(vllm(None, share_gib=20, force=True), promised)) is None
    held = tuple(replace(card, holder="default/x") for card in full)
    assert choose(held, need_of(wanted(force=True), held)) is None


@pytest.mark.parametrize("spare_mib", [0, 100, 257, 300, 340, 2000])
def test_an_engine_that_is_placed_is_told_at_least_what_it_needs(spare_mib: int) -> None:
    d = vllm(known.QWEN3_1_7B)
    (card,) = cards(80)
    needed = explanation(d, machine(gpus=(card,)))["memory"]["need_bytes"]
    tight = (replace(card, used_bytes=card.total_bytes - needed - spare_mib * 2**20),)
    need = need_of(d, tight)
    if (chosen := choose(tight, need)) is not None:
        told = utilization(chosen, need, d.ask)
        assert told is not None
        assert needed <= told * card.total_bytes <= needed + spare_mib * 2**20
    assert (chosen is None) == (spare_mib < 340)


def test_a_tiny_share_is_never_nothing() -> None:
    d = vllm(None, share_gib=0.001)
    slots = cards(80)
    assert utilization(slots, need_of(d, slots), None) == 0.0001


def test_a_share_is_no_matter_of_the_preflight_without_gpus() -> None:
    d = vllm(None, gpu=0, share_gib=10)
    assert blocked(d, machine(gpus=cards(4))) is None


# --- a context that the model was not made for


STRETCHED = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}


@pytest.mark.parametrize(
    ("config", "args", "envs", "refused"),
    [
        (known.QWEN3_1_7B, ("--max-model-len", "40961"), {}, True),
        (known.QWEN3_1_7B, ("--max-model-len", "41k"), {}, True),
        (known.QWEN3_1_7B, ("--max-model-len", "40960"), {}, False),
        (known.QWEN3_1_7B, ("--max-model-len", "auto"), {}, False),
        (known.QWEN3_1_7B, ("--max-model-len", "50000"), {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, False),
        (known.QWEN3_1_7B, ("--max-model-len", "50000", "--hf-overrides", "{}"), {}, False),
        (known.QWEN3_1_7B | STRETCHED, ("--max-model-len", "50000"), {}, False),
        (known.QWEN3_1_7B | {"rope_scaling": {"rope_type": "llama3"}}, ("--max-model-len", "50000"), {}, True),
        (known.QWEN3_1_7B | {"model_max_length": 99999}, ("--max-model-len", "50000"), {}, False),
    ],
)
def test_a_context_longer_than_the_model_was_made_for(config: Any, args: Any, envs: Any, refused: bool) -> None:
    d = vllm(config, *args, additional_envs=envs)
    if refused:
        with pytest.raises(BadRequest, match="the model was made for 40960 tokens") as caught:
            check_wish(d, cards(80), None, False)
        assert "--arg --max-model-len --arg 40960" in str(caught.value.hint)
    check_wish(d, cards(80), None, refused)

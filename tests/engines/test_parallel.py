"""GPUs and how a model is split over them: what is derived, what is refused, what is only warned of."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nimhost.engines.check import check_order, check_parallelism
from nimhost.engines.parallel import nim_split, value_of
from nimhost.engines.recipes import cook
from nimhost.engines.spec import ContainerSpec
from nimhost.entities import DeploymentConfig, ModelSpec, ToolCallConfig
from nimhost.errors import BadRequest
from tests.engines.make import HOST, WITH_WEIGHTS, model, order, spec

TP, PP = "NIM_TENSOR_PARALLEL_SIZE", "NIM_PIPELINE_PARALLEL_SIZE"


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        (0, {}, None),
        (1, {}, None),
        (1, {TP: "1", PP: "1"}, None),
        (2, {}, (2, 1)),
        (8, {}, (8, 1)),
        (4, {TP: "2"}, (2, 2)),
        (8, {PP: "4"}, (2, 4)),
        (8, {TP: "4", PP: "2"}, (4, 2)),
        (3, {PP: "3"}, (1, 3)),
    ],
)
def test_the_multi_llm_nim_gets_both_sizes(gpus: int, given: dict[str, str], expected: tuple[int, int] | None) -> None:
    found = nim_split(gpus, given)
    assert found == ({} if expected is None else {TP: str(expected[0]), PP: str(expected[1])})


@pytest.mark.parametrize(
    ("gpus", "given", "says"),
    [
        (2, {TP: "2", PP: "2"}, f"{TP}=2 x {PP}=2 does not make executor_config.gpu = 2"),
        (4, {TP: "3"}, f"{TP}=3 does not make executor_config.gpu = 4"),
        (1, {PP: "2"}, "does not make executor_config.gpu = 1"),
        (0, {TP: "2"}, "does not make executor_config.gpu = 0"),
        (2, {TP: "two"}, f"{TP} is 'two', which is not a number of GPUs"),
        (2, {TP: "0"}, "is '0'"),
        (2, {PP: "-1"}, "is '-1'"),
        (2, {PP: ""}, "is ''"),
        (2, {TP: "9" * 5000}, "not a number of GPUs"),
        (2, {TP: "000000001" + "1" * 5000}, "not a number of GPUs"),
    ],
)
def test_sizes_that_do_not_make_the_gpus_are_refused(gpus: int, given: dict[str, str], says: str) -> None:
    with pytest.raises(BadRequest, match=r"executor_config\.additional_envs") as refused:
        nim_split(gpus, given)
    assert says in refused.value.message


SIXTEEN = spec(num_attention_heads=16, num_kv_heads=8)


@pytest.mark.parametrize(
    ("gpus", "given", "field"),
    [(3, {}, "executor_config.gpu"), (6, {TP: "3"}, f"executor_config.additional_envs.{TP}")],
)
def test_a_model_that_cannot_be_split_that_way_is_refused_with_what_can(
    gpus: int, given: dict[str, str], field: str
) -> None:
    with pytest.raises(BadRequest, match="16 attention heads") as refused:
        nim_split(gpus, given, SIXTEEN)
    assert refused.value.message.startswith(f"{field}:")
    ways = {3: f"{TP} 1 with {PP} 3.", 6: f"{TP} 2 with {PP} 3, or {TP} 1 with {PP} 6."}
    assert ways[gpus] in str(refused.value.hint)


def config(engine: str, **executor: Any) -> DeploymentConfig:
    body = {"engine": engine, "model_spec": {}, "executor_config": executor}
    return msgspec.convert(body, DeploymentConfig)


@pytest.mark.parametrize(
    ("wish", "refused"),
    [
        (config("nim", gpu=2, additional_envs={TP: "3"}), True),
        (config("nim", gpu=2, image_name="my.registry/llm-nim", image_tag="1", additional_envs={TP: "3"}), True),
        (config("nim", gpu=2, image_name="nvcr.io/nim/meta/llama", image_tag="1", additional_envs={TP: "3"}), False),
        (config("generic", gpu=1, image_name="x", additional_envs={TP: "3"}), False),
        (config("vllm", gpu=1, additional_args=["-tp", "2"]), True),
        (config("vllm", gpu=2, additional_args=["-tp", "2"]), False),
        (config("vllm", gpu=0, additional_args=["-tp", "2"]), False),  # on CPUs
        (config("vllm", gpu=2, additional_args=["-tp"]), False),  # vLLM's own message is as good
    ],
)
def test_a_config_is_checked_before_there_is_a_model(wish: DeploymentConfig, refused: bool) -> None:
    if refused:
        with pytest.raises(BadRequest, match="executor_config"):
            check_parallelism(wish, "nvcr.io/nim/nvidia/llm-nim:1.13.1")
    else:
        check_parallelism(wish, "nvcr.io/nim/nvidia/llm-nim:1.13.1")


def test_a_model_specific_nim_is_left_to_its_profiles() -> None:
    made = cook(order("nim", gpu=4, image_name="nvcr.io/nim/meta/llama-3.1-70b-instruct", image_tag="1"), HOST)
    assert not {TP, PP} & set(made.env)


# --- vLLM ----------------------------------------------------------------------------------------------------------


def vllm(gpu: int, known: ModelSpec | None, *arguments: str) -> ContainerSpec:
    wish = order("vllm", gpu=gpu, with_model=model(spec=known), additional_args=list(arguments))
    return check_order(wish, WITH_WEIGHTS)


@pytest.mark.parametrize(
    ("gpus", "arguments", "tp", "warned"),
    [
        (1, (), None, ""),
        (2, (), "2", ""),
        (4, ("--pipeline-parallel-size", "2"), "2", ""),
        (4, ("-pp=4",), None, ""),
        (4, ("--data-parallel-size", "2"), "2", ""),
        (3, (), None, "2 of 3 GPUs stay idle"),
        (6, (), "2", "4 of 6 GPUs stay idle"),
        (3, ("--pipeline_parallel_size=3",), None, ""),
        (4, ("-tp", "2"), None, "2 of 4 GPUs stay idle"),
    ],
)
def test_vllm_is_split_by_heads_and_what_is_left_is_said(
    gpus: int, arguments: tuple[str, ...], tp: str | None, warned: str
) -> None:
    made = vllm(gpus, SIXTEEN, *arguments)
    given = [made.args[at + 1] for at, arg in enumerate(made.args) if arg == "--tensor-parallel-size"]
    assert given == ([tp] if tp else [])
    (said,) = made.warnings or ("",)
    assert warned in said
    assert bool(warned) == bool(said)


def test_a_warning_says_what_to_do() -> None:
    (said,) = vllm(3, SIXTEEN).warnings
    assert "16 attention heads" in said
    assert "Set executor_config.gpu to 1" in said
    assert "--pipeline-parallel-size" in said


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        (3, (), "Set executor_config.gpu to 1, or use all of them with --pipeline-parallel-size 3 in "),
        (6, (), "Set executor_config.gpu to 2, or use all of them with --pipeline-parallel-size 3 in "),
        (4, ("-tp", "2"), "Set executor_config.gpu to 2, or use all of them with --pipeline-parallel-size 2 in "),
        (3, ("-dp", "2"), "1 of 3 GPUs stay idle. Set executor_config.gpu to 2."),
        (6, ("-dp", "2"), "cannot be split over 3 GPUs. Set executor_config.gpu to 2, or use all of them with"),
    ],
)
def test_what_a_warning_advises_leaves_no_gpu_idle(gpus: int, arguments: tuple[str, ...], said: str) -> None:
    (warning,) = vllm(gpus, SIXTEEN, *arguments).warnings
    assert said in warning
    used = warning.partition("executor_config.gpu to ")[2].split()[0].strip(".,")
    assert vllm(int(used), SIXTEEN, *arguments).warnings == ()
    if advised := warning.partition("all of them with ")[2].split()[:2]:
        assert vllm(gpus, SIXTEEN, *arguments, *advised).warnings == ()


@pytest.mark.parametrize(
    ("gpus", "arguments", "says"),
    [
        (2, ("-tp", "4"), "--tensor-parallel-size 4 needs 4 GPUs, but executor_config.gpu is 2"),
        (2, ("-tp", "2", "-pp", "2"), "needs 4 GPUs"),
        (2, ("--data-parallel-size=3",), "needs 3 GPUs"),
        (4, ("-tp", "3"), "16 attention heads"),
        (4, ("-tp", "many"), "not a number of GPUs"),
        (4, ("-tp", "000000001" + "1" * 5000), "not a number of GPUs"),
    ],
)
def test_arguments_that_can_never_start_are_refused(gpus: int, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(BadRequest, match=r"executor_config\.additional_args") as refused:
        vllm(gpus, SIXTEEN, *arguments)
    assert says in refused.value.message


def test_the_last_of_an_argument_counts() -> None:
    assert value_of("--tensor-parallel-size", ["-tp", "1", "--tensor_parallel_size=2"]) == "2"
    assert value_of("--tensor-parallel-size", ["--max-model-len", "1"]) is None


def test_vllm_needs_a_parser_for_automatic_tool_choice() -> None:
    tools = {"tool_call_config": ToolCallConfig(auto_tool_choice=True)}
    with pytest.raises(BadRequest, match="tool_call_parser: vLLM needs a parser"):
        check_order(order("vllm", with_model=model(), wish=tools), WITH_WEIGHTS)
    own = order("vllm", with_model=model(), wish=tools, additional_args=["--tool-call-parser", "hermes"])
    assert "--enable-auto-tool-choice" in check_order(own, WITH_WEIGHTS).args

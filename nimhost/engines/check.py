"""What no engine can start with, found before anything is stored. Pure."""

from __future__ import annotations

from nimhost.engines.nim import is_multi_llm
from nimhost.engines.order import HostFacts, Order
from nimhost.engines.parallel import VllmSplit, given, nim_split
from nimhost.engines.recipes import cook
from nimhost.engines.spec import ContainerSpec
from nimhost.entities import DeploymentConfig
from nimhost.errors import BadRequest


def check_parallelism(config: DeploymentConfig, nim_image: str) -> None:
    """Whether a config's GPUs and its TP and PP sizes fit together, whatever model it is for. Raises BadRequest."""
    executor = config.executor_config
    if config.engine == "vllm":
        VllmSplit(executor.gpu, executor.additional_args, None)
    elif config.engine == "nim" and is_multi_llm(executor.image_name or nim_image):
        nim_split(executor.gpu, executor.additional_envs or {})


def warnings_of(order: Order) -> tuple[str, ...]:
    """What works but is hardly what somebody wanted; nothing for an order that no engine can start with."""
    if order.engine != "vllm":
        return ()
    try:
        spec = order.model.spec if order.model else None
        return VllmSplit(order.gpus, order.executor.additional_args, spec).warnings
    except BadRequest:
        return ()


def check_order(order: Order, host: HostFacts) -> ContainerSpec:
    """What the order would become as things are now. Raises BadRequest, naming the field that makes it impossible."""
    tools, own = order.chat.tools, order.executor.additional_args
    has_parser = bool(tools.tool_call_parser) or given("--tool-call-parser", own)
    if order.engine == "vllm" and tools.auto_tool_choice and not has_parser:
        raise BadRequest(
            "model_spec.tool_call_config.tool_call_parser: vLLM needs a parser when auto_tool_choice is true.",
            "Name the one of the model's family: hermes for Qwen, llama3_json for Llama, mistral for Mistral, …",
        )
    return cook(order, host)

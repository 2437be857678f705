"""NVIDIA NIM: containers from NGC that bring their model, and the Multi-LLM NIM that serves weights of ours.

Variables: https://docs.nvidia.com/nim/large-language-models/latest/configuration.html.
"""

from __future__ import annotations

from nimhost.engines.order import HostFacts, Order, cache_name, image_of, repository_name
from nimhost.engines.spec import ContainerSpec, Mount, Probe
from nimhost.engines.vllm import run_as

MULTI_LLM = "llm-nim"
CACHE_DIR = "/opt/nim/.cache"
NGC_KEY = "system/ngc-api-key"


def nim(order: Order, host: HostFacts) -> ContainerSpec:
    """The container of a NIM deployment. `additional_envs` come last and win."""
    image = image_of(order, host.nim_image)
    env = {"NIM_GUIDED_DECODING_BACKEND": "outlines"}
    served = served_name(order)
    if served:
        env["NIM_SERVED_MODEL_NAME"] = served
    if host.weights:
        env |= _custom_weights(image, host.weights_path)
    env |= _chat(order)
    if order.model and order.model.trust_remote_code:
        env["NIM_FORCE_TRUST_REMOTE_CODE"] = "1"
    env |= order.executor.additional_envs or {}
    cache = Mount(source=f"{host.nim_cache_dir}/{cache_name(image)}", target=CACHE_DIR, read_only=False)
    return ContainerSpec(
        image=image,
        args=tuple(order.executor.additional_args),
        env=env,
        secret_env={"NGC_API_KEY": NGC_KEY},
        mounts=(host.weights, cache) if host.weights else (cache,),
        probe=Probe(health_path=order.executor.health_check_path or "/v1/health/ready"),
        gpus=order.gpus,
        shm_bytes=host.shm_bytes if order.gpus else None,
        user=run_as(order),
        policy="nim",
    )


def served_name(order: Order) -> str | None:
    return str(order.model.ref) if order.model else order.label


def serves_our_weights(order: Order, host_image: str) -> bool:
    """Multi-LLM NIM always; a model-specific one when a model with a fileset stands behind it."""
    has_fileset = order.model is not None and order.model.fileset is not None
    return has_fileset or repository_name(image_of(order, host_image)) == MULTI_LLM


def _custom_weights(image: str, path: str) -> dict[str, str]:
    env = {"NIM_MODEL_NAME": path, "NIM_MODEL_PATH": path}
    if repository_name(image) != MULTI_LLM:
        env |= {"NIM_FT_MODEL": path, "NIM_CUSTOM_MODEL": path}
    return env


def _chat(order: Order) -> dict[str, str]:
    """Chat template and tool calling: the model's spec, overridden field by field by the deployment config."""
    spec = order.model.spec if order.model else None
    wish = order.model_spec
    env = {}
    if template := wish.chat_template or (spec and spec.chat_template):
        env["NIM_CHAT_TEMPLATE"] = template
    sources = [config for config in (spec and spec.tool_call_config, wish.tool_call_config) if config]
    for config in sources:
        if config.tool_call_parser is not None:
            env["NIM_TOOL_CALL_PARSER"] = config.tool_call_parser
        if config.auto_tool_choice is not None:
            env["NIM_ENABLE_AUTO_TOOL_CHOICE"] = "1" if config.auto_tool_choice else "0"
    return env

"""NVIDIA NIM: containers from NGC that bring their model, and the Multi-LLM NIM that serves weights of ours.

Variables: https://docs.nvidia.com/nim/large-language-models/1.13.0/configuration.html and .../function-calling.html;
adapters: .../peft.html. What has no field in a config (`NIM_MAX_MODEL_LEN`, `NIM_MODEL_PROFILE`, …) goes through
`additional_envs`. Classification and VLM NIMs need nothing of their own: what a NIM serves is asked of it when it runs.
"""

from __future__ import annotations

from nimhost.engines.order import HostFacts, Order, cache_name, image_of, mounts_of, repository_name
from nimhost.engines.parallel import nim_split
from nimhost.engines.spec import ADAPTERS_DIR, FILES_DIR, ContainerSpec, Mount, Probe
from nimhost.engines.vllm import run_as
from nimhost.refs import NGC_KEY

MULTI_LLM = "llm-nim"
CACHE_DIR = "/opt/nim/.cache"
PEFT_REFRESH_S = 30
MAX_LORA_RANK = 32
"""What a NIM takes unless it is told otherwise."""


def nim(order: Order, host: HostFacts) -> ContainerSpec:
    """The container of a NIM deployment. `additional_envs` come last and win. Raises BadRequest."""
    image = image_of(order, host.nim_image)
    env = {"NIM_GUIDED_DECODING_BACKEND": "outlines"}
    served = served_name(order)
    if served:
        env["NIM_SERVED_MODEL_NAME"] = served
    if host.weights:
        env |= _custom_weights(image, host.weights_path)
    env |= _parallelism(order, image) | _adapters(order)
    chat, files = _chat(order, host)
    env |= chat
    if order.model and order.model.trust_remote_code:
        env["NIM_FORCE_TRUST_REMOTE_CODE"] = "1"
    env |= order.executor.additional_envs or {}
    cache = Mount(source=f"{host.nim_cache_dir}/{cache_name(image)}", target=CACHE_DIR, read_only=False)
    return ContainerSpec(
        image=image,
        args=tuple(order.executor.additional_args),
        env=env,
        secret_env={} if "NGC_API_KEY" in env else {"NGC_API_KEY": str(NGC_KEY)},
        mounts=mounts_of(order, host, cache),
        files=files,
        probe=Probe(
            health_path=order.executor.health_check_path or "/v1/health/ready",
            served_names=_listed(env, ours=host.weights is not None),
            serves_any=True,
        ),
        gpus=order.gpus,
        shm_bytes=host.shm_bytes if order.gpus else None,
        user=run_as(order),
        policy="nim",
    )


def served_name(order: Order) -> str | None:
    return str(order.model.ref) if order.model else order.label


def _listed(env: dict[str, str], ours: bool) -> tuple[str, ...]:
    """What it will list: the names it is told, by a NIM that serves our weights. One that brings its model may know
    nothing of that variable (embedding, reranking and classification NIMs), and lists its own names, or none."""
    names = env.get("NIM_SERVED_MODEL_NAME", "") if ours else ""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def is_multi_llm(image: str) -> bool:
    """The NIM for any model. All others choose their parallelism by profile, and are left to it."""
    return repository_name(image) == MULTI_LLM


def serves_our_weights(order: Order, host_image: str) -> bool:
    """Multi-LLM NIM always; a model-specific one when a model with a fileset stands behind it."""
    has_fileset = order.model is not None and order.model.fileset is not None
    return has_fileset or is_multi_llm(image_of(order, host_image))


def _custom_weights(image: str, path: str) -> dict[str, str]:
    env = {"NIM_MODEL_NAME": path, "NIM_MODEL_PATH": path}
    if not is_multi_llm(image):
        env |= {"NIM_FT_MODEL": path, "NIM_CUSTOM_MODEL": path}
    return env


def _parallelism(order: Order, image: str) -> dict[str, str]:
    if not is_multi_llm(image):
        return {}
    return nim_split(order.gpus, order.executor.additional_envs or {}, order.model.spec if order.model else None)


def _adapters(order: Order) -> dict[str, str]:
    """NIM looks into the directory of adapters itself; nobody tells it."""
    if not order.model_spec.lora_enabled:
        return {}
    env = {"NIM_PEFT_SOURCE": ADAPTERS_DIR, "NIM_PEFT_REFRESH_INTERVAL": str(PEFT_REFRESH_S)}
    rank = max(order.model.lora_ranks if order.model else (), default=0)
    return env | ({"NIM_MAX_LORA_RANK": str(rank)} if rank > MAX_LORA_RANK else {})


def _chat(order: Order, host: HostFacts) -> tuple[dict[str, str], dict[str, str]]:
    """Environment and files of chat template and tool calling. NIM takes the text of a template, as the spec has it."""
    chat, env, files = order.chat, {}, {}
    if chat.chat_template:
        env["NIM_CHAT_TEMPLATE"] = chat.chat_template
    if chat.tools.tool_call_parser is not None:
        env["NIM_TOOL_CALL_PARSER"] = chat.tools.tool_call_parser
    if chat.tools.auto_tool_choice is not None:
        env["NIM_ENABLE_AUTO_TOOL_CHOICE"] = "1" if chat.tools.auto_tool_choice else "0"
    if host.tool_parser is not None:
        path = f"{FILES_DIR}/{host.tool_parser.name}"
        env["NIM_TOOL_PARSER_PLUGIN"], files[path] = path, host.tool_parser.content
    return env, files

"""vLLM: `vllm serve` with the arguments that a deployment asks for.

Flags and variables: https://docs.vllm.ai/en/stable/cli/serve/ and .../features/lora/.
"""

from __future__ import annotations

from nimhost.engines.order import HostFacts, Order, image_of
from nimhost.engines.spec import ContainerSpec, Probe
from nimhost.entities import ModelSpec

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
ALIASES = {
    "--tensor-parallel-size": ("-tp",),
    "--pipeline-parallel-size": ("-pp",),
}


def vllm(order: Order, host: HostFacts) -> ContainerSpec:
    """The container of a vLLM deployment. The user's arguments and variables come last and win."""
    served = served_names(order)
    renamed = given("--served-model-name", order.executor.additional_args)
    return ContainerSpec(
        image=image_of(order, host.vllm_image),
        args=(host.weights_path, *_arguments(order, served), *order.executor.additional_args),
        env=OFFLINE | _lora_env(order) | (order.executor.additional_envs or {}),
        mounts=(host.weights,) if host.weights else (),
        probe=Probe(
            health_path=order.executor.health_check_path or "/health",
            served_names=() if renamed else served,
        ),
        gpus=order.gpus,
        shm_bytes=host.shm_bytes if order.gpus else None,
        user=run_as(order),
        policy="vllm",
    )


def served_names(order: Order) -> tuple[str, ...]:
    """The public name first (replies carry it): the model entity's ref, else the name the client gave."""
    name = str(order.model.ref) if order.model else order.label
    return (name,) if name else ()


def tensor_parallel_size(gpus: int, spec: ModelSpec | None) -> int:
    """The largest divisor of `gpus` that divides hidden size, attention heads and key-value heads.

    Without a spec all GPUs are used: vLLM itself checks the heads and says so.
    """
    if gpus <= 1:
        return 1
    sizes = (spec.hidden_size, spec.num_attention_heads, spec.num_kv_heads) if spec else ()
    return next(n for n in range(gpus, 0, -1) if gpus % n == 0 and all(size % n == 0 for size in sizes))


def given(flag: str, arguments: list[str]) -> bool:
    """Whether the user set `flag` already, as `--flag`, `--flag=value`, with underscores, or by its short form."""
    forms = {flag, flag.replace("-", "_").replace("__", "--", 1), *ALIASES.get(flag, ())}
    return any(argument.partition("=")[0] in forms for argument in arguments)


def _arguments(order: Order, served: tuple[str, ...]) -> list[str]:
    """Ours, each left out when the user's own arguments carry it."""
    flags: list[tuple[str, tuple[str, ...]]] = [("--served-model-name", served)] if served else []
    size = tensor_parallel_size(order.gpus, order.model.spec if order.model else None)
    if size > 1:
        flags.append(("--tensor-parallel-size", (str(size),)))
    if order.model_spec.chat_template:
        flags.append(("--chat-template", (order.model_spec.chat_template,)))
    if order.model_spec.lora_enabled:
        flags.append(("--enable-lora", ()))
    if order.model and order.model.trust_remote_code:
        flags.append(("--trust-remote-code", ()))
    own = order.executor.additional_args
    return [word for flag, values in flags if not given(flag, own) for word in (flag, *values)]


def _lora_env(order: Order) -> dict[str, str]:
    """Adapters are loaded through the load and unload endpoints only, which vLLM serves when this is set."""
    return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if order.model_spec.lora_enabled else {}


def run_as(order: Order) -> str | None:
    """Docker's `user[:group]`, when the config sets one."""
    user, group = order.executor.run_as_user, order.executor.run_as_group
    if user is None:
        return None
    return f"{user}" if group is None else f"{user}:{group}"

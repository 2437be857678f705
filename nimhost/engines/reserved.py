"""What arguments and variables of a config may not say: what nimhost decides, what takes an administrator. Pure.

Names: https://docs.vllm.ai/en/stable/cli/serve/ and
https://docs.nvidia.com/nim/large-language-models/latest/reference/environment-variables.html.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from nimhost.engines.numbers import tokens
from nimhost.engines.parallel import given, value_of
from nimhost.engines.share import FLAG, NIM_VARIABLES
from nimhost.engines.spec import ENGINE_PORT
from nimhost.engines.vllm import RUNTIME_LORA
from nimhost.entities import DeploymentConfig, ExecutorConfig
from nimhost.errors import BadRequest

ARGS, ENVS = "executor_config.additional_args", "executor_config.additional_envs"
PASSED_ON = "NIM_PASSTHROUGH_ARGS"
"""A NIM hands this on to its vLLM."""
ADDRESS = {
    "--port": (str(ENGINE_PORT),), "--host": ("0.0.0.0",), "--uds": (), "--api-key": (), "--ssl-keyfile": (),
    "--ssl-certfile": (), "--ssl-ca-certs": (), "--ssl-cert-reqs": (), "--ssl-ciphers": (), "--enable-ssl-refresh": (),
    "--headless": (),
}  # fmt: skip
"""Flag -> values that say what is so anyway."""
ADDRESS_VARIABLES = {
    "VLLM_API_KEY": (), "NIM_SERVER_PORT": (str(ENGINE_PORT),), "NIM_HTTP_API_PORT": (str(ENGINE_PORT),),
    "NIM_HEALTH_PORT": (str(ENGINE_PORT),), "NIM_SSL_MODE": ("DISABLED", "disabled"),
}  # fmt: skip
NUMBERS = ("--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--max-lora-rank", "--max-loras")
TRUST, PLUGINS = "--trust-remote-code", ("--tool-parser-plugin", "--reasoning-parser-plugin")
TRUST_VARIABLE, PLUGIN_VARIABLE = "NIM_FORCE_TRUST_REMOTE_CODE", "NIM_TOOL_PARSER_PLUGIN"
_OFF = ("", "0", "false", "no", "off")


def check_reserved(config: DeploymentConfig) -> None:
    """Raises BadRequest, naming the field, for an engine that nobody could reach, that is told two things at once, or
    that cannot read what it is told.

    An image of the engine `generic` is not ours to know.
    """
    if config.engine != "generic":
        _check_address(config.executor_config)
        _check_share(config.executor_config)
        _check_numbers(config.executor_config)
    if config.engine == "vllm" and not config.model_spec.lora_enabled:
        _check_adapters(config.executor_config)


def asks_for_trust(executor: ExecutorConfig) -> str | None:
    """What in the config makes the engine run a checkpoint's code; None when nothing does."""
    if (executor.additional_envs or {}).get(TRUST_VARIABLE, "").strip().lower() not in _OFF:
        return f"{ENVS}.{TRUST_VARIABLE}"
    return next((f"{where}: {TRUST}" for where, words in _arguments(executor) if _has(words, TRUST)), None)


def asks_for_plugin(executor: ExecutorConfig) -> str | None:
    """What in the config makes the engine load a parser from a file; None when nothing does."""
    if (executor.additional_envs or {}).get(PLUGIN_VARIABLE):
        return f"{ENVS}.{PLUGIN_VARIABLE}"
    found = (f"{where}: {flag}" for where, words in _arguments(executor) for flag in PLUGINS if _has(words, flag))
    return next(found, None)


def _arguments(executor: ExecutorConfig) -> Iterator[tuple[str, list[str]]]:
    """(where they are said, what will be parsed): a NIM takes vLLM's arguments from a variable."""
    yield ARGS, executor.additional_args
    text = (executor.additional_envs or {}).get(PASSED_ON, "")
    try:
        yield f"{ENVS}.{PASSED_ON}", shlex.split(text)
    except ValueError:  # a quotation without an end
        yield f"{ENVS}.{PASSED_ON}", text.split()


def _has(words: list[str], flag: str) -> bool:
    """Also as an abbreviation, as Python's argparse takes one: from the letter that tells it from all other flags."""
    names = (word.partition("=")[0].replace("_", "-") for word in words)
    return any(name == flag or (len(name) > _LEAST[flag] and flag.startswith(name)) for name in names)


_LEAST = {TRUST: len("--t"), PLUGINS[0]: len("--tool-"), PLUGINS[1]: len("--reasoning-parser")}


def _check_address(executor: ExecutorConfig) -> None:
    for where, words in _arguments(executor):
        for flag, harmless in ADDRESS.items():
            given = any(word.partition("=")[0].replace("_", "-") == flag for word in words)
            if given and value_of(flag, words) not in harmless:
                raise _reserved(f"{where}: {flag}", flag == "--api-key")
    for name, harmless in ADDRESS_VARIABLES.items():
        value = (executor.additional_envs or {}).get(name)
        if value and value not in harmless:
            raise _reserved(f"{ENVS}.{name}", name == "VLLM_API_KEY")


def _reserved(what: str, is_key: bool) -> BadRequest:
    if is_key:
        return BadRequest(
            f"{what} cannot be set: nimhost chooses the address of an engine, which only this machine reaches, and"
            " talks to it without a key.",
            "Leave it out. Who may use the gateway is said with: nimhost tokens --help",
        )
    return BadRequest(
        f"{what} cannot be set: nimhost chooses the address of an engine, and asks it for its health there.",
        f"Leave it out: inside the container it is port {ENGINE_PORT}, the one outside is chosen when it starts.",
    )


def _check_numbers(executor: ExecutorConfig) -> None:
    for where, words in _arguments(executor):
        for flag in NUMBERS:
            if given(flag, words) and tokens(text := value_of(flag, words)) is None:
                said = f"is '{text[:40]}', which is not a number" if text else "has no value"
                raise BadRequest(f"{where}: {flag} {said}.", f"Write: --arg {flag} --arg 4096")


def _check_adapters(executor: ExecutorConfig) -> None:
    """vLLM takes adapters while it runs only when it is told more than that; those named from the start are fine."""
    words, env = executor.additional_args, executor.additional_envs or {}
    if given("--enable-lora", words) and not given("--lora-modules", words) and RUNTIME_LORA not in env:
        raise BadRequest(
            f"{ARGS}: --enable-lora alone lets no adapter be loaded.",
            "Leave it out, and add --lora instead (lora_enabled in the model_spec of a config).",
        )


def _check_share(executor: ExecutorConfig) -> None:
    """How much of its GPUs the engine takes: a fraction of all, said once."""
    said = [(f"{where}: {FLAG}", value_of(FLAG, words)) for where, words in _arguments(executor)]
    said += [(f"{ENVS}.{name}", (executor.additional_envs or {}).get(name)) for name in NIM_VARIABLES]
    for what, text in said:
        if text is None:
            continue
        if not 0 < _fraction(text) <= 1:
            raise BadRequest(f"{what} is '{text[:40]}', which is no part of a GPU.", "Write a number such as 0.9.")
        if executor.gpu_memory_gib is not None:
            raise BadRequest(
                f"executor_config.gpu_memory_gib says how much of a GPU the engine takes, and {what} says it again.",
                "Leave one of the two out.",
            )


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0

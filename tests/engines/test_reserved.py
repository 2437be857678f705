"""Arguments and variables that a config may not have: refused with the field, before anything is stored."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from nimhost.engines.reserved import asks_for_plugin, asks_for_trust, check_reserved
from nimhost.entities import DeploymentConfig, DeployModelSpec, ExecutorConfig
from nimhost.errors import BadRequest


def config(engine: str, *args: str, share_gib: float | None = None, **envs: str) -> DeploymentConfig:
    executor: dict[str, Any] = {"gpu": 1, "additional_args": list(args), "additional_envs": envs}
    if share_gib is not None:
        executor["gpu_memory_gib"] = share_gib
    return msgspec.convert({"engine": engine, "model_spec": {}, "executor_config": executor}, DeploymentConfig)


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (config("vllm", "--port", "9000"), "executor_config.additional_args: --port"),
        (config("vllm", "--port=9000"), "executor_config.additional_args: --port"),
        (config("vllm", "--host", "127.0.0.1"), "executor_config.additional_args: --host"),
        (config("vllm", "--api-key", "sk-1"), "executor_config.additional_args: --api-key"),
        (config("vllm", "--api_key=sk-1"), "executor_config.additional_args: --api-key"),
        (config("vllm", "--uds", "/tmp/s"), "executor_config.additional_args: --uds"),
        (config("vllm", "--ssl-keyfile", "/k"), "executor_config.additional_args: --ssl-keyfile"),
        (config("vllm", "--headless"), "executor_config.additional_args: --headless"),
        (config("vllm", VLLM_API_KEY="sk-1"), "executor_config.additional_envs.VLLM_API_KEY"),
        (config("nim", NIM_SERVER_PORT="9000"), "executor_config.additional_envs.NIM_SERVER_PORT"),
        (config("nim", NIM_SSL_MODE="TLS"), "executor_config.additional_envs.NIM_SSL_MODE"),
        (config("nim", NIM_PASSTHROUGH_ARGS="--uds s"), "executor_config.additional_envs.NIM_PASSTHROUGH_ARGS: --uds"),
    ],
)  # fmt: skip
def test_an_engine_that_listens_elsewhere_could_never_be_ready(wish: DeploymentConfig, field: str) -> None:
    with pytest.raises(BadRequest, match="nimhost chooses the address") as refused:
        check_reserved(wish)
    assert refused.value.message.startswith(f"{field} cannot be set")
    assert "sk-1" not in refused.value.in_full


@pytest.mark.parametrize(
    "wish",
    [
        config("vllm", "--port", "8000", "--host", "0.0.0.0"),
        config("vllm", "--max-model-len", "4096", "--gpu-memory-utilization", "1"),
        config("nim", NIM_SERVER_PORT="8000", NIM_SSL_MODE="DISABLED", NIM_KVCACHE_PERCENT="0.5"),
        config("generic", "--port", "9000"),
        config("vllm", share_gib=12),
    ],
)
def test_what_is_so_anyway_may_be_said(wish: DeploymentConfig) -> None:
    check_reserved(wish)


@pytest.mark.parametrize("text", ["1.5", "0", "90", "abc", "-0.5", "nan", "inf", ""])
def test_a_fraction_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match=r"executor_config\.additional_args: --gpu-memory-utilization is"):
        check_reserved(config("vllm", "--gpu-memory-utilization", text))
    with pytest.raises(BadRequest, match=r"executor_config\.additional_envs\.NIM_KVCACHE_PERCENT is"):
        check_reserved(config("nim", NIM_KVCACHE_PERCENT=text))


@pytest.mark.parametrize(
    "wish",
    [
        config("vllm", "--gpu-memory-utilization", "0.9", share_gib=12),
        config("vllm", "--gpu_memory_utilization=0.9", share_gib=12),
        config("nim", NIM_KV_CACHE_PERCENT="0.9", share_gib=12),
    ],
)
def test_how_much_of_a_gpu_an_engine_takes_is_said_once(wish: DeploymentConfig) -> None:
    with pytest.raises(BadRequest, match=r"^executor_config\.gpu_memory_gib says how much"):
        check_reserved(wish)


@pytest.mark.parametrize(
    ("args", "envs", "trusts", "plugs"),
    [
        (["--trust-remote-code"], {}, True, False),
        (["--trust_remote_code"], {}, True, False),
        (["--trust"], {}, True, False),
        (["--tr=1"], {}, True, False),
        (["--tool-parser-plugin", "/model-store/x.py"], {}, False, True),
        (["--tool-p=/model-store/x.py"], {}, False, True),
        (["--reasoning-parser-plugin", "/model-store/x.py"], {}, False, True),
        ([], {"NIM_FORCE_TRUST_REMOTE_CODE": "1"}, True, False),
        ([], {"NIM_FORCE_TRUST_REMOTE_CODE": "0"}, False, False),
        ([], {"NIM_TOOL_PARSER_PLUGIN": "/x.py"}, False, True),
        ([], {"NIM_PASSTHROUGH_ARGS": "--max-num-seqs 4 --trust-remote-code"}, True, False),
        ([], {"NIM_PASSTHROUGH_ARGS": "--trust-remote-code 'open"}, True, False),
        (["--tool-call-parser", "hermes", "--reasoning-parser", "q", "--tokenizer", "t", "-tp", "2"], {}, False, False),
    ],
)  # fmt: skip
def test_code_inside_the_engine_is_noticed_however_it_is_asked_for(
    args: list[str], envs: dict[str, str], trusts: bool, plugs: bool
) -> None:
    executor = ExecutorConfig(gpu=1, additional_args=args, additional_envs=envs)
    assert (asks_for_trust(executor) is not None, asks_for_plugin(executor) is not None) == (trusts, plugs)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (
            config("vllm", "--max-model-len=abc"),
            "executor_config.additional_args: --max-model-len is 'abc', which is not",
        ),
        (
            config("vllm", "--max_model_len", "4,096"),
            "additional_args: --max-model-len is '4,096', which is not a number",
        ),
        (config("vllm", "--max-num-seqs"), "additional_args: --max-num-seqs has no value."),
        (config("nim", NIM_PASSTHROUGH_ARGS="--max-model-len x"), "NIM_PASSTHROUGH_ARGS: --max-model-len is 'x'"),
    ],
)
def test_a_number_that_no_engine_can_read_is_refused(wish: DeploymentConfig, says: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(says)) as caught:
        check_reserved(wish)
    assert caught.value.hint is not None
    assert "Write: --arg --max-" in caught.value.hint


@pytest.mark.parametrize("text", ["4096", "16k", "1.5K", "auto", "-1"])
def test_numbers_are_read_as_vllm_reads_them(text: str) -> None:
    check_reserved(config("vllm", "--max-model-len", text))
    check_reserved(config("vllm", f"--max-model-len={text}"))


def test_adapters_are_switched_on_where_that_makes_them_loadable() -> None:
    with pytest.raises(BadRequest, match="--enable-lora alone lets no adapter be loaded") as caught:
        check_reserved(config("vllm", "--enable-lora"))
    assert caught.value.hint is not None
    assert "add --lora instead" in caught.value.hint
    wish = config("vllm", "--enable-lora", "--max-lora-rank", "32")
    check_reserved(msgspec.structs.replace(wish, model_spec=DeployModelSpec(lora_enabled=True)))
    check_reserved(config("vllm", "--enable-lora", "--lora-modules", "sql=/model-store/sql"))
    check_reserved(config("vllm", "--enable-lora", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1"))
    check_reserved(config("generic", "--enable-lora", "--max-model-len", "abc"))

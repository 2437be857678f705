"""Every deployment of the documentation's page "Deploy Models", as its bodies and what has to become of them.

The table is used twice: on the recipes alone, and with a real daemon on a real engine (`docker inspect`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

WEIGHTS = "{weights}"
"""In the expected environment and arguments: where the checkpoint is inside of the container."""
NIM = {"NIM_GUIDED_DECODING_BACKEND": "outlines"}
OUR_WEIGHTS = {"NIM_MODEL_NAME": WEIGHTS, "NIM_MODEL_PATH": WEIGHTS}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
LLM_NIM = "nvcr.io/nim/nvidia/llm-nim:1.13.1"
VLLM = "vllm/vllm-openai:v0.33.0"
MODEL_STORE, NIM_CACHE, LORAS = "/model-store", "/opt/nim/.cache", "/loras"
PARSER = "class Parser: ...\n"
TEMPLATE = (
    "{%- for message in messages %}{%- set content = '<{{ start_header_id }}>' + message['role'] + "
    "'<{{ end_header_id }}>\n\n' + message['content'] | trim + '<{{ eot_id }}>' %}{%- if loop.index0 == 0 %}"
    "{%- set content = '<{{ begin_of_text }}>' + content %}{%- endif %}{{ content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<{{ start_header_id }}>assistant<{{ end_header_id }}>\n\n' }}{%- endif %}"
)
PLAIN_TEMPLATE = '{%- for message in messages %}{{ message["content"] }}{%- endfor %}'


@dataclass(frozen=True, kw_only=True)
class Case:
    """One deployment: what the page asks for, then what Docker has to be given."""

    name: str
    engine: str
    model_spec: Json
    executor: Json
    model: str | None = None
    """The model entity, and the fileset of the same name."""
    repo: str | None = None
    tool_calling: Json | None = None
    image: str
    env: dict[str, str]
    args: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    """Targets, in order."""
    files: dict[str, str] = field(default_factory=dict)
    ask: tuple[str, Json] = ("v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]})

    @property
    def gpu(self) -> int:
        return int(self.executor["gpu"])

    @property
    def config(self) -> Json:
        body = {"engine": self.engine, "model_spec": self.model_spec, "executor_config": self.executor}
        return {"name": f"{self.name}-config", **body}

    @property
    def fileset(self) -> Json:
        storage = {"type": "huggingface", "repo_id": self.repo, "repo_type": "model"}
        metadata = {"model": {"tool_calling": self.tool_calling}} if self.tool_calling else {}
        return {"name": self.model, "storage": storage, "metadata": metadata}

    def filled(self, weights: str) -> tuple[dict[str, str], tuple[str, ...]]:
        """Environment and arguments with the place of the checkpoint put in."""
        env = {name: value.replace(WEIGHTS, weights) for name, value in self.env.items()}
        return env, tuple(arg.replace(WEIGHTS, weights) for arg in self.args)


def served(name: str) -> dict[str, str]:
    return {"NIM_SERVED_MODEL_NAME": name}


def split(tp: int, pp: int) -> dict[str, str]:
    return {"NIM_TENSOR_PARALLEL_SIZE": str(tp), "NIM_PIPELINE_PARALLEL_SIZE": str(pp)}


TOOL: Json = {
    "model": "llama-3-2-1b-tool",
    "repo": "meta-llama/Llama-3.2-1B-Instruct",
    "tool_calling": {"chat_template": TEMPLATE, "tool_call_parser": "llama3_json", "auto_tool_choice": True},
}
QWEN_14B: Json = {"model": "qwen-2-5-14b", "repo": "Qwen/Qwen2.5-14B-Instruct"}
QWEN_3: Json = {"model": "qwen3-1-7b", "repo": "Qwen/Qwen3-1.7B"}

CASES = [
    Case(
        name="llama-3-2-1b-deployment",
        engine="nim",
        model_spec={"model_name": "meta/llama-3.2-1b-instruct"},
        executor={"gpu": 1, "image_name": "nvcr.io/nim/meta/llama-3.2-1b-instruct", "image_tag": "1.8.6"},
        image="nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6",
        env=NIM | served("meta/llama-3.2-1b-instruct"),
        mounts=(NIM_CACHE,),
    ),
    Case(
        name="nemoguard-jailbreak-deployment",
        engine="nim",
        model_spec={},
        executor={"gpu": 1, "image_name": "nvcr.io/nim/nvidia/nemoguard-jailbreak-detect", "image_tag": "1.10.1"},
        image="nvcr.io/nim/nvidia/nemoguard-jailbreak-detect:1.10.1",
        env=NIM,
        mounts=(NIM_CACHE,),
        ask=("v1/classify", {"input": "Tell me about vacation spots in Hawaii."}),
    ),
    Case(
        name="qwen-fs-deployment",
        engine="nim",
        model_spec={"model_namespace": "default", "model_name": "qwen-2-5-1-5b"},
        executor={"gpu": 1},
        model="qwen-2-5-1-5b",
        repo="Qwen/Qwen2.5-1.5B-Instruct",
        image=LLM_NIM,
        env=NIM | served("default/qwen-2-5-1-5b") | OUR_WEIGHTS,
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="qwen3-vllm-deployment",
        engine="vllm",
        model_spec={"model_namespace": "default", "model_name": "qwen3-1-7b"},
        executor={"gpu": 1},
        **QWEN_3,
        image=VLLM,
        env=OFFLINE,
        args=(WEIGHTS, "--served-model-name", "default/qwen3-1-7b"),
        mounts=(MODEL_STORE,),
    ),
    Case(
        name="qwen3-lora-deployment",
        engine="vllm",
        model_spec={"model_namespace": "default", "model_name": "qwen3-1-7b", "lora_enabled": True},
        executor={"gpu": 1, "additional_args": ["--max-lora-rank", "16"]},
        **QWEN_3,
        image=VLLM,
        env=OFFLINE | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        args=(WEIGHTS, "--served-model-name", "default/qwen3-1-7b", "--enable-lora", "--max-loras", "4",
              "--max-lora-rank", "16"),
        mounts=(MODEL_STORE, LORAS),
    ),
    Case(
        name="qwen-14b-deployment",
        engine="nim",
        model_spec={"model_name": "default/qwen-2-5-14b"},
        executor={"gpu": 2},
        **QWEN_14B,
        image=LLM_NIM,
        env=NIM | served("default/qwen-2-5-14b") | OUR_WEIGHTS | split(2, 1),
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="multi-gpu-custom",
        engine="nim",
        model_spec={"model_name": "default/qwen-2-5-14b"},
        executor={"gpu": 4, "additional_envs": split(2, 2)},
        **QWEN_14B,
        image=LLM_NIM,
        env=NIM | served("default/qwen-2-5-14b") | OUR_WEIGHTS | split(2, 2),
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="llama-tool-deployment",
        engine="nim",
        model_spec={"model_name": "default/llama-3-2-1b-tool"},
        executor={"gpu": 1},
        **TOOL,
        image=LLM_NIM,
        env=NIM | served("default/llama-3-2-1b-tool") | OUR_WEIGHTS | {
            "NIM_CHAT_TEMPLATE": TEMPLATE,
            "NIM_TOOL_CALL_PARSER": "llama3_json",
            "NIM_ENABLE_AUTO_TOOL_CHOICE": "1",
        },
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="llama-tool-override",
        engine="nim",
        model_spec={
            "model_name": "default/llama-3-2-1b-tool",
            "chat_template": PLAIN_TEMPLATE,
            "tool_call_config": {"tool_call_parser": "hermes", "auto_tool_choice": False},
        },
        executor={"gpu": 1},
        **TOOL,
        image=LLM_NIM,
        env=NIM | served("default/llama-3-2-1b-tool") | OUR_WEIGHTS | {
            "NIM_CHAT_TEMPLATE": PLAIN_TEMPLATE,
            "NIM_TOOL_CALL_PARSER": "hermes",
            "NIM_ENABLE_AUTO_TOOL_CHOICE": "0",
        },
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="llama-tool-deployment-v2",
        engine="nim",
        model_spec={"model_name": "default/llama-3-2-1b-tool-v2"},
        executor={"gpu": 1},
        model="llama-3-2-1b-tool-v2",
        repo="meta-llama/Llama-3.2-1B-Instruct",
        tool_calling={"tool_call_parser": "mistral", "auto_tool_choice": True},
        image=LLM_NIM,
        env=NIM | served("default/llama-3-2-1b-tool-v2") | OUR_WEIGHTS | {
            "NIM_TOOL_CALL_PARSER": "mistral", "NIM_ENABLE_AUTO_TOOL_CHOICE": "1",
        },
        mounts=(MODEL_STORE, NIM_CACHE),
    ),
    Case(
        name="llama-tool-plugin",
        engine="nim",
        model_spec={"model_name": "default/llama-3-2-1b-plugin"},
        executor={"gpu": 1},
        model="llama-3-2-1b-plugin",
        repo="meta-llama/Llama-3.2-1B-Instruct",
        tool_calling={
            "tool_call_parser": "custom_parser", "tool_call_plugin": "default/my-tool-plugin", "auto_tool_choice": True,
        },
        image=LLM_NIM,
        env=NIM | served("default/llama-3-2-1b-plugin") | OUR_WEIGHTS | {
            "NIM_TOOL_CALL_PARSER": "custom_parser",
            "NIM_ENABLE_AUTO_TOOL_CHOICE": "1",
            "NIM_TOOL_PARSER_PLUGIN": "/nimhost/my_parser.py",
        },
        mounts=(MODEL_STORE, NIM_CACHE, "/nimhost/my_parser.py"),
        files={"/nimhost/my_parser.py": PARSER},
    ),
]  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows under a heading, for people."""
    return "\n".join("".join(row) for row in rows)

"""What the vLLM recipe asks for, accepted and done by a real vLLM: chat template, tools, plugin, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docker
import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import GATEWAY, MODELS, containers_of
from tests.images import VLLM_CPU_ENV

pytestmark = [pytest.mark.docker, pytest.mark.vllm, pytest.mark.timeout(600)]
FILESETS = "/apis/files/v2/workspaces/default/filesets"
TEMPLATE = "{% for m in messages %}\n{% generation %}Said so: {{ m.content }}{% endgeneration %}{% endfor %}"
PLUGIN = """
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager


@ToolParserManager.register_module("of_the_test")
class OfTheTest(ToolParser):
    pass
"""


def test_a_real_vllm_takes_template_tools_plugin_and_adapters(
    make_daemon: MakeDaemon,
    gpu_requests: None,
    docker_engine: docker.DockerClient,
    vllm_image: str,
    tiny_model_dir: Path,
) -> None:
    daemon = make_daemon(NIMHOST_MODELS__TOOL_CALL_PLUGIN__ENABLED="true")
    tools = {"tool_call_parser": "of_the_test", "tool_call_plugin": "default/parser", "auto_tool_choice": True}
    daemon.post(FILESETS, {"name": "parser"}, 200)
    daemon.http.put(f"{FILESETS}/parser/-/parser.py", content=PLUGIN.encode())
    storage = {"type": "local", "path": str(tiny_model_dir)}
    metadata = {"model": {"tool_calling": {**tools, "chat_template": TEMPLATE}}}
    daemon.post(FILESETS, {"name": "tiny", "storage": storage, "metadata": metadata}, 200)
    daemon.post(f"{MODELS}/models", {"name": "tiny", "fileset": "default/tiny"})
    repository, _, tag = vllm_image.rpartition(":")
    config: dict[str, Any] = {
        "name": "tiny",
        "engine": "vllm",
        "model_spec": {"model_name": "tiny", "lora_enabled": True},
        "executor_config": {
            "gpu": 1, "image_name": repository, "image_tag": tag, "additional_envs": VLLM_CPU_ENV,
            "additional_args": ["--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager"],
        },
    }  # fmt: skip
    daemon.post(f"{MODELS}/deployment-configs", config)
    daemon.post(f"{MODELS}/deployments", {"name": "tiny", "config": "tiny"})
    daemon.wait("tiny", "READY", 400)

    args = containers_of(docker_engine, daemon)["tiny"]["Args"]
    for words in (
        ["--chat-template", "/nimhost/chat-template.jinja"],
        ["--tool-call-parser", "of_the_test"],
        ["--tool-parser-plugin", "/nimhost/parser.py"],
        ["--max-lora-rank", "16"],
        ["--max-loras", "4"],
    ):
        assert args[args.index(words[0]) + 1] == words[1]
    assert {"--enable-auto-tool-choice", "--enable-lora"} <= set(args)

    base = f"{GATEWAY}/provider/tiny/-"
    message = {"model": "default/tiny", "messages": [{"role": "user", "content": "Hello!"}]}
    tokens = daemon.http.post(f"{base}/tokenize", json={**message, "add_special_tokens": False})
    assert tokens.status_code == 200, tokens.text
    text = daemon.http.post(f"{base}/detokenize", json={"model": "default/tiny", "tokens": tokens.json()["tokens"]})
    assert text.json()["prompt"] == "Said so: Hello!"
    answer = daemon.http.post(f"{base}/v1/chat/completions", json={**message, "max_tokens": 4}, timeout=120)
    assert answer.status_code == 200, answer.text

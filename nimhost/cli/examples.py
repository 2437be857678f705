"""An example for each generated command: what `nimhost … --help` ends with. A test runs all of them."""

from __future__ import annotations

from collections.abc import Iterator

import click

NAMES = {
    "models": "qwen3",
    "adapters": "math",
    "models adapters": "math --model-name qwen3",
    "files": "qwen3",
    "files filesets": "qwen3",
    "secrets": "openai-api-key",
    "workspaces": "team",
    "projects": "demo",
    "inference models": "qwen3",
    "inference gateway openai v1 models": "qwen3",
    "inference gateway provider": "openai",
    "inference deployment-configs": "llama",
    "inference deployment-configs versions": "1 --config llama",
    "inference deployments": "llama",
    "inference deployments versions": "1 --deployment llama",
    "inference providers": "openai",
    "inference virtual-models": "fast",
}
"""What a command of that group is given, where EXAMPLES says nothing of it."""
_CHAT = """'{"model": "default/qwen3", "messages": [{"role": "user", "content": "Hello!"}]}'"""
EXAMPLES = {
    "models create": "qwen3 --fileset default/qwen3",
    "models update": "qwen3 --description 'For the web site'",
    "models list": "--filter fileset=default/qwen3",
    "models adapters create": "qwen3 math --fileset default/math-lora",
    "models adapters update": "math --model-name qwen3 --no-enabled",
    "adapters create": "math --model default/qwen3 --fileset default/math-lora",
    "adapters update": "math --no-enabled",
    "adapters list": "--filter model=default/qwen3",
    "files list": "my-lora --remote-path checkpoints",
    "files download": "my-lora -o ./my-lora",
    "files delete": "my-lora --remote-path checkpoints/old.safetensors",
    "files filesets create": """qwen3 --storage '{"type": "huggingface", "repo_id": "Qwen/Qwen3-1.7B"}'""",
    "files filesets update": "qwen3 --description 'The base model'",
    "secrets create": "openai-api-key --from-file key.txt",
    "secrets update": "openai-api-key --from-file key.txt",
    "secrets list": "--all-pages",
    "secrets admin rotate-encryption-keys": "",
    "workspaces create": "team --description 'Ours'",
    "workspaces update": "team --description 'Ours'",
    "workspaces delete": "team --dry-run",
    "projects create": "demo",
    "projects update": "demo --description 'For Monday'",
    "inference get-url": "--provider openai",
    "inference providers create": "openai --host-url https://api.openai.com/v1 --api-key-secret-name openai-api-key",
    "inference providers update": "openai --host-url https://api.openai.com/v1 --enabled-models gpt-4",
    "inference providers update-status": "openai --status READY",
    "inference providers list": "--filter status=ERROR",
    "inference deployment-configs create": """llama --engine nim --model-spec '{"model_name": "meta/llama"}' """
    """--executor-config '{"gpu": 1, "image_name": "nvcr.io/nim/meta/llama-3.2-1b-instruct", "image_tag": "1.8.6"}'""",
    "inference deployment-configs update": """llama --engine nim --model-spec '{}' --executor-config '{"gpu": 2}'""",
    "inference deployment-configs versions list": "llama",
    "inference deployments create": "llama --config llama --wait",
    "inference deployments update": "llama --config llama --config-version 2",
    "inference deployments update-status": "llama --status READY",
    "inference deployments list": "--filter status=READY",
    "inference deployments versions list": "llama",
    "inference virtual-models create": "fast --default-model-entity default/qwen3",
    "inference virtual-models update": "fast --default-model-entity default/qwen3",
    "inference gateway openai get": "v1/models",
    "inference gateway openai post": f"v1/chat/completions --body {_CHAT}",
    "inference gateway model get": "v1/models qwen3",
    "inference gateway model post": f"v1/chat/completions qwen3 --body {_CHAT}",
    "inference gateway provider get": "v1/models openai",
    "inference gateway provider post": f"v1/chat/completions openai --body {_CHAT}",
}


def add_examples(group: click.Group, *path: str) -> None:
    """To every command in `group`, which is typed as `path`."""
    for words, command in leaves(group, path):
        if "Example" not in (command.help or ""):
            command.help = (
                f"{command.help}\n\n\b\nExample:\n  {' '.join(['nimhost', *words])} {example(words, command)}"
            )


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The commands at the ends, each with how it is typed."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for word, inner in command.commands.items():
        yield from leaves(inner, (*path, word))


def example(path: tuple[str, ...], command: click.Command) -> str:
    """What is typed behind the words of a command."""
    *group, verb = path
    said = EXAMPLES.get(" ".join((*group, "update" if verb == "patch" and command.hidden else verb)))
    if said is not None:
        return said
    if group[:2] == ["inference", "gateway"] and verb in ("put", "patch", "delete"):
        return "v1/things/1" + {"model": " qwen3", "provider": " openai"}.get(group[-1], "")
    takes = any(isinstance(param, click.Argument) for param in command.params)
    return NAMES[" ".join(group)] if takes else ""

"""What can be said about a model that is to run: the options that `deploy` and `plan` share."""

from __future__ import annotations

import os
from typing import Any, get_args

import click

from nimhost.cli import entities
from nimhost.cli.entities import Options
from nimhost.cli.options import F, complete_deployment
from nimhost.cli.target import Target, name_for

ENGINES = get_args(entities.Engine)


def _env(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`K=V`, or `K` alone: its value in this command's own environment."""
    env = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not (equals or name in os.environ):
            raise click.BadParameter(f"'{text}' is neither NAME=VALUE nor the name of a variable that is set here.")
        env[name] = value if equals else os.environ[name]
    return env


_OPTIONS = (
    click.option("--engine", type=click.Choice(ENGINES), help="[default: vllm; nim for an image]"),
    click.option(
        "--gpu", "gpus", type=click.IntRange(0), default=1, show_default=True, help="How many GPUs it gets."
    ),
    click.option(
        "--gpu-memory", "gpu_memory_gib", type=click.FloatRange(0, min_open=True), metavar="GIB",
        help="A share of each GPU, which others may then share.  [default: all of it]",
    ),
    click.option(
        "--name", shell_complete=complete_deployment, help="Name of the deployment.  [default: made from MODEL]"
    ),
    click.option("--image", metavar="NAME:TAG", help="Image of the engine, instead of the daemon's default."),
    click.option("--arg", "args", multiple=True, metavar="ARG", help="One more argument for the engine. Repeatable."),
    click.option("--env", multiple=True, callback=_env, metavar="K=V", help="Environment of the engine. Repeatable."),
    click.option("--health-path", metavar="PATH", help="Path that answers 200 when the engine is ready."),
    click.option(
        "--hf-token-secret", "token_secret", metavar="SECRET",
        help="Secret with the hub's token, for gated repositories.",
    ),
)  # fmt: skip


def model_options(command: F) -> F:
    """Handed to the command as keyword arguments, for `options_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def options_of(target: Target, workspace: str, asked: dict[str, Any]) -> Options:
    return Options(**{**asked, "name": asked["name"] or name_for(target), "workspace": workspace})

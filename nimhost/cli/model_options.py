"""What can be said about a model that is to run: the options that `deploy` and `plan` share."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import click

from nimhost.cli import entities
from nimhost.cli.entities import Options
from nimhost.cli.options import F, complete_deployment
from nimhost.cli.target import Target, name_for
from nimhost.errors import NimhostError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ENGINES = get_args(entities.Engine)


class _Gib(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"{value} is no size.", param, ctx)


def _env(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`K=V`, or `K` alone: its value in this command's own environment."""
    env = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not (equals or name in os.environ):
            raise click.BadParameter(f"'{text}' is neither NAME=VALUE nor the name of a variable that is set here.")
        env[name] = value if equals else os.environ[name]
    return env


def _arguments(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Raises BadParameter for a flag and its value in one: no engine takes that apart."""
    for text in values:
        if found := re.fullmatch(r"(-{1,2}[A-Za-z][^\s=]*)\s+(.*)", text, re.DOTALL):
            value = shlex.quote(found[2])
            raise click.BadParameter(
                f"'{text}' is one argument, with a blank in it. Write: --arg {found[1]} --arg {value}"
            )
    return values


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> Sequence[CompletionItem]:
    """For the shell: directories, and what is in the cache already."""
    from click.shell_completion import CompletionItem

    from nimhost.cli.weights import complete_repo

    return [CompletionItem(incomplete, type="dir"), *complete_repo(ctx, param, incomplete)]


_OPTIONS = (
    click.option("--engine", type=click.Choice(ENGINES), help="[default: vllm; nim for an image]"),
    click.option(
        "--gpu", "gpus", type=click.IntRange(0), default=1, show_default=True, help="How many GPUs it gets."
    ),
    click.option(
        "--gpu-memory", "gpu_memory_gib", type=_Gib(0, min_open=True), metavar="GIB",
        help="A share of each GPU, which others may then share.  [default: all of it]",
    ),
    click.option(
        "--name", shell_complete=complete_deployment, help="Name of the deployment.  [default: made from MODEL]"
    ),
    click.option("--image", metavar="NAME:TAG", help="Image of the engine, instead of the daemon's default."),
    click.option(
        "--arg", "args", multiple=True, metavar="ARG", callback=_arguments,
        help="One more argument for the engine. Repeatable.",
    ),
    click.option("--env", multiple=True, callback=_env, metavar="K=V", help="Environment of the engine. Repeatable."),
    click.option(
        "--lora/--no-lora", default=None,
        help="Whether adapters can be loaded while it runs.  [default: as it is; without, for a new one]",
    ),
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


FLAGS = {
    "executor_config.gpu_memory_gib": "--gpu-memory",
    "executor_config.gpu": "--gpu",
    "executor_config.image_name": "--image",
    "executor_config.image_tag": "--image",
    "executor_config.additional_args": "--arg",
    "executor_config.additional_envs": "--env",
    "executor_config.health_check_path": "--health-path",
    "model_spec.lora_enabled": "--lora",
    "storage.token_secret": "--hf-token-secret",
    "storage.repo_id": "MODEL",
    "storage.path": "MODEL",
}
"""Field of the wire -> what is typed for it."""
_FIELD = re.compile(rf"\b({'|'.join(map(re.escape, FLAGS))})\b(?:\.[^\s:]+)?(: config '[^']*' asks for)?")


_IN_FILESET = re.compile(r"and name it in the fileset: token_secret = (\S+)")
"""What the hub's refusals say to whoever makes a fileset."""


def in_flags(text: str, with_token: str = "nimhost deploy … --hf-token-secret") -> str:
    """What the daemon says about fields, in the words of the command line. Pure.

    `with_token`: the command that takes a secret with the hub's token, up to its name.
    """
    text = _IN_FILESET.sub(rf"then: {with_token} \1", text)
    return _FIELD.sub(lambda found: FLAGS[found[1]] + (" asks for" if found[2] else ""), text)


@contextmanager
def speaking_of_flags() -> Iterator[None]:
    """Errors about fields of the wire name the options instead: nobody typed those fields."""
    try:
        yield
    except NimhostError as error:
        error.message, error.hint = in_flags(error.message), error.hint and in_flags(error.hint)
        raise

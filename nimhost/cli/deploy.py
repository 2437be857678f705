"""`nimhost deploy`"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any, get_args

import click

from nimhost.cli import entities
from nimhost.cli.entities import Options, Wanted, differences, entities_for
from nimhost.cli.options import address_options, complete_deployment, format_option, open_client, output_format
from nimhost.cli.target import name_for, parse_target
from nimhost.errors import AlreadyExists, Conflict, NimhostError, NotFound

if TYPE_CHECKING:
    from nimhost.client import Client

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


@click.command()
@click.argument("model")
@click.option("--engine", type=click.Choice(ENGINES), help="[default: vllm; nim for an image]")
@click.option("--gpu", "gpus", type=click.IntRange(0), default=1, show_default=True, help="How many GPUs it gets.")
@click.option("--name", shell_complete=complete_deployment, help="Name of the deployment.  [default: made from MODEL]")
@click.option("--image", metavar="NAME:TAG", help="Image of the engine, instead of the daemon's default.")
@click.option("--arg", "args", multiple=True, metavar="ARG", help="One more argument for the engine. Repeatable.")
@click.option("--env", multiple=True, callback=_env, metavar="K=V", help="Environment of the engine. Repeatable.")
@click.option("--health-path", metavar="PATH", help="Path that answers 200 when the engine is ready.")
@click.option("--hf-token-secret", metavar="SECRET", help="Secret with the hub's token, for gated repositories.")
@click.option("--update", is_flag=True, help="Change what is already deployed under this name.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ready.")
@click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Wait no longer than this (exit 1).")
@format_option("table", "json", "yaml", "raw")
@address_options
def deploy(
    model: str,
    engine: entities.Engine | None,
    gpus: int,
    name: str | None,
    image: str | None,
    args: tuple[str, ...],
    env: dict[str, str],
    health_path: str | None,
    hf_token_secret: str | None,
    update: bool,
    no_wait: bool,
    timeout_s: float | None,
) -> None:
    """Run a model on this machine's GPUs and follow it until it is ready.

    MODEL is a repository of the model hub (Qwen/Qwen3-1.7B, or with a revision: Qwen/Qwen3-1.7B@main), a local
    directory with weights (./my-model), or an image that brings its model
    (nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6). Deploying the same again changes nothing. Ctrl-C stops the
    watching, not the deployment.

    \b
    Examples:
      nimhost deploy Qwen/Qwen3-1.7B
      nimhost deploy Qwen/Qwen3-32B --gpu 2 --arg --max-model-len --arg 16384
      nimhost deploy ./my-finetune --name mine
      nimhost deploy nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6
    """
    from nimhost.cli.progress import follow

    target = parse_target(model, os.path.isdir(os.path.expanduser(model)))
    with open_client() as client:
        options = Options(
            name=name or name_for(target), workspace=client.workspace, engine=engine, gpus=gpus, image=image, args=args,
            env=env, health_path=health_path, token_secret=hf_token_secret,
        )  # fmt: skip
        new = bring_about(client, options.name, entities_for(target, options), update)
        if no_wait:
            click.echo(f"{'Deploying' if new else 'Already deployed:'} {options.name}. "
                       f"Follow it with: nimhost wait {options.name}")  # fmt: skip
            return
        follow(
            client, options.name, timeout_s=math.inf if timeout_s is None else timeout_s, new=new,
            output_format=output_format("table", "json", "yaml", "raw"),
        )  # fmt: skip


def bring_about(client: Client, name: str, wanted: list[Wanted], update: bool) -> bool:
    """Create what is missing, accept what is equal, change the rest if `update`. Returns whether anything was done.

    What this call created goes away again if a later part is refused, so that the next attempt does not stumble over
    it. Raises AlreadyExists when something different is there and may not be changed.
    """
    created: list[Any] = []
    changed = False
    try:
        for want in wanted:
            changed = _ensure(client, name, want, update, changed, created) or changed
    except (NimhostError, KeyboardInterrupt):
        for resource in reversed(created):
            _discard(resource, name)
        raise
    return changed


def _ensure(client: Client, name: str, want: Wanted, update: bool, changed: bool, created: list[Any]) -> bool:
    resource = getattr(client, want.resource)
    found = _find(client, want, name)
    if found is None:
        resource.create(name, **want.body())
        created.append(resource)
        return True
    different = differences(want.fields, found)
    if different and not update:
        what = f"{resource.kind.label} '{name}' exists and is different: {'; '.join(different)}."
        raise AlreadyExists(what, f"Add --update to change it, --name to deploy beside it, or: nimhost rm {name}")
    if different or (changed and want.resource == "deployments"):  # a new version follows what changed beneath it
        resource.update(name, **want.body())
        return True
    if found.get("desired") == "stopped" or found.get("status") == "ERROR":
        client.deployments.start(name)
        return True
    return False


def _find(client: Client, want: Wanted, name: str) -> Any:
    """What is there under that name, or None. A deployment that is on its way out is waited for."""
    try:
        found = getattr(client, want.resource).get(name)
        if found.get("status") in ("DELETING", "DELETED"):
            return client.deployments.wait(name, "DELETED")
        return found
    except NotFound:
        return None


def _discard(resource: Any, name: str) -> None:
    # Somebody was faster, or uses it already: then it is theirs.
    with contextlib.suppress(NotFound, Conflict):
        resource.delete(name)

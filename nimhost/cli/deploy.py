"""`nimhost deploy`"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

import click

from nimhost.cli.entities import Wanted, differences, entities_for
from nimhost.cli.model_options import model_options, options_of
from nimhost.cli.options import address_options, format_option, open_client
from nimhost.cli.target import parse_target
from nimhost.errors import AlreadyExists, Conflict, NimhostError, NotFound

if TYPE_CHECKING:
    from nimhost.cli.progress import Outcome
    from nimhost.client import Client


@click.command()
@click.argument("model")
@model_options
@click.option("--update", is_flag=True, help="Change what is already deployed under this name.")
@click.option("--force", is_flag=True, help="Try it although the sum says that it does not fit.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ready.")
@click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Wait no longer than this (exit 1).")
@format_option("table", "json", "yaml", "raw")
@address_options
def deploy(model: str, update: bool, force: bool, no_wait: bool, timeout_s: float | None, **asked: Any) -> None:
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
    from nimhost.cli.progress import follow, show_result

    target = parse_target(model, os.path.isdir(os.path.expanduser(model)))
    with open_client() as client:
        options = options_of(target, client.workspace, {**asked, "force": force})
        outcome = bring_about(client, options.name, entities_for(target, options), update)
        if no_wait:
            begun = "Deploying" if outcome else "Already deployed:"
            said = f"{begun} {options.name}. Follow it with: nimhost wait {options.name}"
            show_result(client, options.name, lambda: said)
        else:
            follow(client, options.name, outcome, math.inf if timeout_s is None else timeout_s)


def bring_about(client: Client, name: str, wanted: list[Wanted], update: bool) -> Outcome:
    """Create what is missing, accept what is equal, change the rest if `update`. Returns what became of the last one.

    What this call created goes away again if a later part is refused, so that the next attempt does not stumble over
    it. Raises AlreadyExists when something different is there and may not be changed.
    """
    created: list[Any] = []
    outcome: Outcome = ""
    changed = False
    try:
        for want in wanted:
            outcome = _ensure(client, name, want, update, changed)
            changed = changed or outcome != ""
            if outcome == "created":
                created.append(getattr(client, want.resource))
    except (NimhostError, KeyboardInterrupt):
        for resource in reversed(created):
            _discard(resource, name)
        raise
    return outcome


def _ensure(client: Client, name: str, want: Wanted, update: bool, changed: bool) -> Outcome:
    """`changed`: something beneath it was created or updated just now."""
    resource = getattr(client, want.resource)
    found = _find(client, want, name)
    if found is None:
        resource.create(name, **want.body())
        return "created"
    different = differences(want.fields, found)
    if different and not update:
        what = f"{resource.kind.label} '{name}' exists and is different: {'; '.join(different)}."
        raise AlreadyExists(what, f"Add --update to change it, --name to deploy beside it, or: nimhost rm {name}")
    if different or (changed and want.resource == "deployments"):
        resource.update(name, **want.body())
        return "updated"
    return "started" if want.resource == "deployments" and revive(client, name, found) else ""


def revive(client: Client, name: str, found: Any) -> bool:
    """Start a deployment that is stopped or has failed; whether it was."""
    idle = bool(found["status"] == "ERROR" or found.get("desired") == "stopped")
    if idle:
        client.deployments.start(name)
    return idle


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

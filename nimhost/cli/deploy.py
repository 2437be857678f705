"""`nimhost deploy`"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from nimhost.cli.entities import Wanted, differences, entities_for
from nimhost.cli.model_options import complete_model, model_options, options_of, speaking_of_flags
from nimhost.cli.options import address_options, format_option, open_client, timeout_option
from nimhost.cli.target import read_target
from nimhost.errors import AlreadyExists, BadRequest, Conflict, NimhostError, NotFound

if TYPE_CHECKING:
    from nimhost.cli.progress import Outcome
    from nimhost.client import Client

BROKEN = ("ERROR", "LOST")
"""Statuses of a deployment that does not serve, and does not try to."""


@click.command()
@click.argument("model", shell_complete=complete_model)
@model_options
@click.option("--update", is_flag=True, help="Change what is already deployed under this name.")
@click.option("--refresh", is_flag=True, help="Start it anew even if nothing changed: with this nimhost's defaults.")
@click.option("--force", is_flag=True, help="Try it although the sum says that it does not fit.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ready.")
@timeout_option()
@format_option("table", "json", "yaml", "raw")
@address_options
def deploy(
    model: str, update: bool, refresh: bool, force: bool, no_wait: bool, timeout_s: float | None, **asked: Any
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
    from nimhost.cli.progress import follow, show_result

    target = read_target(model)
    with speaking_of_flags(), open_client() as client:
        options = options_of(target, client.workspace, {**asked, "force": force})
        outcome = bring_about(client, options.name, entities_for(target, options), update, refresh)
        if no_wait:
            begun = "Deploying" if outcome else "Already deployed:"
            said = f"{begun} {options.name}. Follow it with: nimhost wait {options.name}"
            show_result(client, options.name, lambda: said)
        else:
            follow(client, options.name, outcome, math.inf if timeout_s is None else timeout_s)


def bring_about(client: Client, name: str, wanted: list[Wanted], update: bool, refresh: bool = False) -> Outcome:
    """Create what is missing, accept what is equal, change the rest if `update`; then have the deployment run.

    When a later part is refused, what this call created goes away again and what it changed is as it was: the next
    attempt does not stumble over it, and what runs goes on as it is. Raises BadRequest for a change that could not
    run, AlreadyExists when something different is there and may not be changed, NotReady for an update that has
    failed before: to try that again may interrupt what serves.
    """
    undo: list[Callable[[], None]] = []
    beneath: dict[str, Any] = {}
    if update:
        _ask_first(client, name, wanted)
    try:
        for want in wanted[:-1]:
            if (row := _ensure(client, name, want, update, undo)) is not None:
                beneath[want.resource] = row
        return _ensure_deployment(client, name, wanted[-1], update, refresh, beneath, undo)
    except (NimhostError, KeyboardInterrupt):
        for step in reversed(undo):
            step()
        raise


def _ask_first(client: Client, name: str, wanted: list[Wanted]) -> None:
    """Whether what is deployed could run as it is wanted now. A config that is changed is followed at once."""
    from nimhost.client.wire import Request

    by_kind = {want.resource: want for want in wanted}
    there = {kind: _get(client, kind, name) for kind in by_kind}
    new = [kind for kind, want in by_kind.items() if there[kind] and differences(want.fields, there[kind])]
    forced = by_kind["deployments"].fields.get("force")
    if there["deployments"] is None:
        click.echo(f"There is no {name} to update yet: deploying it.", err=True)
    if forced or there["deployments"] is None or not {"filesets", "deployment_configs"} & set(new):
        return
    fileset = by_kind["filesets"].body() if "filesets" in new else None
    config = by_kind["deployment_configs"].body(there["deployment_configs"])
    body = {"workspace": client.workspace, "config": config, "fileset": fileset}
    found = client.send(Request(method="POST", path="/apis/nimhost/v1/plan", body=body))
    if found["verdict"] == "refused":
        raise BadRequest(f"Nothing was changed. {found['reason']}", found["hint"])


def _get(client: Client, kind: str, name: str) -> Any:
    try:
        return getattr(client, kind).get(name)
    except NotFound:
        return None


def _ensure(client: Client, name: str, want: Wanted, update: bool, undo: list[Callable[[], None]]) -> Any:
    """The row as it was created or changed by this; None where it was right already."""
    resource = getattr(client, want.resource)
    found = _find(client, want, name)
    if found is None:
        return _create(resource, name, want, undo)
    if _may_change(want, found, resource, name, update):
        return _change(resource, name, want, found, undo)
    return None


def _ensure_deployment(
    client: Client, name: str, want: Wanted, update: bool, refresh: bool, beneath: dict[str, Any],
    undo: list[Callable[[], None]],
) -> Outcome:  # fmt: skip
    """`beneath`: what was created or changed for it just now. A config that it follows has begun the update by itself:
    a second change would begin another one."""
    found = _find(client, want, name)
    if found is None:
        _create(client.deployments, name, want, undo)
        return "created"
    different = _may_change(want, found, client.deployments, name, update)
    if different or refresh or (beneath and not _follows(found, beneath.get("deployment_configs"))):
        _change(client.deployments, name, want, found, undo)
    if found.get("desired") == "stopped":
        client.deployments.start(name)
        return "started"
    if different or refresh or beneath:
        return "updated"
    if found.get("update") == "failed" and found["status"] not in BROKEN:
        from nimhost.cli.progress import failure

        raise failure(client, name, found)
    return "started" if revive(client, name, found) else ""


def _follows(deployment: Any, config: Any) -> bool:
    """Whether that version of the config is the one that the deployment stands for."""
    return config is not None and deployment.get("config_version") == config.get("entity_version")


def _may_change(want: Wanted, found: Any, resource: Any, name: str, update: bool) -> bool:
    """Whether it differs. Raises AlreadyExists when it may not be changed."""
    different = differences(want.fields, found)
    if different and not update:
        what = f"{resource.kind.label} '{name}' exists and is different: {'; '.join(different)}."
        raise AlreadyExists(what, f"Add --update to change it, --name to deploy beside it, or: nimhost rm {name}")
    return bool(different)


def _create(resource: Any, name: str, want: Wanted, undo: list[Callable[[], None]]) -> Any:
    row = resource.create(name, **want.body())
    undo.append(lambda: _discard(resource, name))
    return row


def _change(resource: Any, name: str, want: Wanted, found: Any, undo: list[Callable[[], None]]) -> Any:
    body = want.body(found)
    before = {field: found.get(field) for field in body}
    row = resource.update(name, **body)
    undo.append(lambda: _put_back(resource, name, before))
    return row


def revive(client: Client, name: str, found: Any) -> bool:
    """Start a deployment that is stopped or has failed; whether it was. Raises Conflict for one that is going away."""
    failed = found["status"] in (*BROKEN, "DELETING") or found.get("update") == "failed"
    idle = bool(failed or found.get("desired") == "stopped")
    if idle:
        client.deployments.start(name)
    return idle


def _find(client: Client, want: Wanted, name: str) -> Any:
    """What is there under that name, or None. A deployment that is on its way out is waited for."""
    try:
        found = getattr(client, want.resource).get(name)
        if found.get("status") in ("DELETING", "DELETED"):
            click.echo(f"{name} is being removed: waiting until it is gone.", err=True)
            return client.deployments.wait(name, "DELETED")
        return found
    except NotFound:
        return None


def _discard(resource: Any, name: str) -> None:
    # Somebody was faster, or uses it already: then it is theirs.
    with contextlib.suppress(NotFound, Conflict):
        resource.delete(name)


def _put_back(resource: Any, name: str, fields: dict[str, Any]) -> None:
    # What the person is told is why the change was refused, not what came after it.
    with contextlib.suppress(NimhostError):
        resource.update(name, **fields)

"""`nimhost stop`, `start` and `rm`"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nimhost.cli.entities import MADE_BY
from nimhost.cli.options import (
    address_options,
    complete_deployment,
    format_option,
    open_client,
    retyped,
    show_error,
)
from nimhost.cli.output import FORMATS
from nimhost.cli.wait_inference import show
from nimhost.errors import Conflict, NimhostError, NotFound

if TYPE_CHECKING:
    from nimhost.cli.progress import Outcome
    from nimhost.client import Client

T = TypeVar("T")
names_argument = click.argument("names", nargs=-1, required=True, shell_complete=complete_deployment)


@click.command()
@names_argument
@address_options
def stop(names: tuple[str, ...]) -> None:
    """Stop deployments and free their GPUs. They stay listed, with all their settings.

    \b
    Example:
      nimhost stop qwen-qwen3-1-7b
    """
    with open_client() as client:
        _check_all(names, _each(names, lambda name: _stop(client, name)))


def _stop(client: Client, name: str) -> None:
    client.deployments.stop(name)
    click.echo(retyped(f"Stopping {name}. Start it again with: nimhost start {name}"))


@click.command()
@names_argument
@click.option("--no-wait", is_flag=True, help="Do not wait until they are ready.")
@format_option(*FORMATS)
@address_options
def start(names: tuple[str, ...], no_wait: bool) -> None:
    """Start stopped deployments, or try failed ones again.

    \b
    Example:
      nimhost start qwen-qwen3-1-7b
    """
    from nimhost.cli.progress import follow

    with open_client() as client:
        outcomes = _each(names, lambda name: _start(client, name, no_wait))
        followed = outcomes if no_wait else _each(outcomes, lambda name: follow(client, name, outcomes[name]))
    _check_all(names, followed)


def _start(client: Client, name: str, no_wait: bool) -> Outcome:
    """Says what became of it where nobody waits to see."""
    from nimhost.cli.deploy import revive
    from nimhost.cli.progress import show_result

    outcome: Outcome
    before = client.deployments.get(name)
    if revive(client, name, before):
        outcome, said = "started", "Starting {}. Follow it with: nimhost wait {}"
    elif before["status"] == "READY":
        outcome, said = "", "{} is running already."
    else:
        outcome, said = "started", "{} is starting already. Follow it with: nimhost wait {}"
    if no_wait:
        show_result(client, name, lambda: said.format(name, name))
    return outcome


@click.command()
@names_argument
@click.option("--keep-config", is_flag=True, help="Keep the config, model and fileset that 'deploy' made with it.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is gone; keeps the config, model and fileset.")
@address_options
def rm(names: tuple[str, ...], keep_config: bool, no_wait: bool) -> None:
    """Remove deployments, and what 'nimhost deploy' made for them if nothing else uses it. Weights stay in the cache,
    unless they are only half fetched.

    \b
    Examples:
      nimhost rm qwen-qwen3-1-7b
      nimhost rm first second --keep-config
    """
    with open_client() as client:
        asked = _each(names, lambda name: _ask_removal(client, name))  # all before the first wait: engines take long
        _check_all(names, _each(asked, lambda name: _remove(client, name, asked, keep_config, no_wait)))


def _ask_removal(client: Client, name: str) -> NotFound | None:
    """The error for one that is gone: something may be left of it."""
    try:
        client.deployments.delete(name)
    except NotFound as error:
        return error
    return None


def _remove(client: Client, name: str, asked: Mapping[str, NotFound | None], keep_config: bool, no_wait: bool) -> None:
    missing = asked[name]
    if missing is None and no_wait:
        click.echo(retyped(f"Removing {name}. Follow it with: nimhost wait {name} --status DELETED"))
        return
    if missing is None:
        left = list(asked)[list(asked).index(name) :]
        _await_removal(client, [other for other in left if asked[other] is None], keep_config)
    leftovers, needed = ([], []) if keep_config else remove_leftovers(client, name)
    if missing is not None and not leftovers:
        raise missing
    click.echo(f"Removed {name}" + (f" and its {', '.join(leftovers)}." if leftovers else "."))
    if needed:
        said = f"Its model and fileset stay, for the adapters on it: {', '.join(needed)}. To remove all of them:"
        click.echo(retyped(f"{said} nimhost models delete {name} && nimhost files filesets delete {name}"), err=True)


def _await_removal(client: Client, names: Sequence[str], keep_config: bool) -> None:
    """Until the first of them is gone; the others are on their way."""
    told: list[Any] = []

    def tell(entry: Any) -> None:
        if told:  # the first says no more than what was typed
            show(entry, err=True)
        told.append(entry)

    try:
        client.deployments.wait(names[0], "DELETED", on_entry=tell)
    except KeyboardInterrupt:
        going = f"{names[0]} goes" if len(names) == 1 else f"{', '.join(names)} go"
        whose = "Its" if len(names) == 1 else "Their"
        rest = f" {whose} config, model and fileset stay; to remove them too: nimhost rm {' '.join(names)}"
        click.echo(retyped(f"\n{going} on being removed.{'' if keep_config else rest}"), err=True)
        raise click.exceptions.Exit(130) from None


def remove_leftovers(client: Client, name: str) -> tuple[list[str], list[str]]:
    """Remove what `deploy` made under that name, users before used: the labels of what went, and the adapters that
    still need its model. They were made by somebody else, and would go with it."""
    from nimhost.cli.resources import adapters_of

    removed: list[str] = []
    adapters: list[str] = []
    for resource in (client.deployment_configs, client.models, client.filesets):
        try:
            if not (resource.get(name).get("description") or "").startswith(MADE_BY):
                continue
            if resource is client.models and (adapters := adapters_of(client, "model", name)):
                break
            resource.delete(name)
            removed.append(resource.kind.label.lower())
        except (NotFound, Conflict):
            continue  # not there, or something else still needs it: both are fine
    return removed, adapters


def _each(names: Iterable[str], act: Callable[[str], T]) -> dict[str, T]:
    """What `act` made of each name; one that fails is shown, and does not keep the others from their turn."""
    done = {}
    for name in names:
        try:
            done[name] = act(name)
        except NimhostError as error:
            show_error(error)
    return done


def _check_all(names: Sequence[str], done: Mapping[str, object]) -> None:
    """Exit code 1 if one of them failed."""
    if set(names) - set(done):
        click.get_current_context().exit(1)

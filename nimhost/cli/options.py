"""Options that many commands share. Given before or after the command's name, they mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nimhost.client import settings as client_settings
from nimhost.errors import NimhostError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nimhost.client import Client

F = TypeVar("F", bound=Callable[..., Any])
KEY = "nimhost.flags"


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and param.name is not None:
        ctx.meta.setdefault(KEY, {})[param.name] = value
    return value


def address_options(command: F) -> F:
    """`--base-url` and `--workspace`: which daemon, and where in it."""
    base_url = click.option(
        "--base-url", metavar="URL", expose_value=False, callback=_remember, help="Where nimhost listens."
    )
    workspace = click.option(
        "-w", "--workspace", metavar="NAME", expose_value=False, callback=_remember, help="Workspace to work in."
    )
    return base_url(workspace(command))


def format_option(*formats: str) -> Callable[[F], F]:
    return click.option(
        "-f",
        "--output-format",
        "--format",
        "output_format",
        type=click.Choice(formats),
        expose_value=False,
        callback=_remember,
        help=f"How to print the result; without it: {formats[0]}.",
    )


def settings() -> client_settings.ClientSettings:
    """The client's settings in force for the running command."""
    return client_settings.load(click.get_current_context().meta.get(KEY, {}))


def output_format(*formats: str) -> str:
    """The format asked for by flag, environment or settings file, where it is one of `formats`; else the first."""
    wanted = settings().output_format
    return wanted if wanted in formats else formats[0]


def flag_given(name: str) -> bool:
    return name in click.get_current_context().meta.get(KEY, {})


def open_client(timeout_s: float = 60.0) -> Client:
    from nimhost.client import Client

    chosen = settings()
    return Client(chosen.base_url, chosen.workspace, chosen.access_token, timeout_s=timeout_s)


def complete_deployment(ctx: click.Context, param: click.Parameter, incomplete: str) -> Sequence[CompletionItem]:
    """Names of deployments for the shell; none when the daemon does not answer at once."""
    from click.shell_completion import CompletionItem

    try:
        with ctx, open_client(timeout_s=0.5) as client:
            found = client.deployments.list()
    except NimhostError:
        return []
    return [CompletionItem(d["name"], help=d["status"]) for d in found if d["name"].startswith(incomplete)]


def show_error(error: NimhostError) -> None:
    click.echo(f"{click.style('Error:', fg='red')} {error.message}", err=True)
    if error.hint:
        click.echo(f"{click.style('Hint:', fg='cyan')} {error.hint}", err=True)

"""Options that many commands share. Given before or after the command's name, they mean the same."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from nimhost.cli.output import FORMATS
from nimhost.client import settings as client_settings
from nimhost.errors import ConfigError, NimhostError, NotFound, Unreachable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nimhost.client import Client

F = TypeVar("F", bound=Callable[..., Any])
KEY = "nimhost.flags"
FLAGS = {"base_url": "--base-url", "workspace": "--workspace"}
TEXT = "text"
"""The one format that only `chat` has."""
COMPLETION_TIMEOUT_S = 0.5


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if value is not None and param.name is not None:
        ctx.meta.setdefault(KEY, {})[param.name] = value
    return value


def address_options(command: F) -> F:
    """`--base-url` and `--workspace`: which daemon, and where in it."""
    base_url = click.option(
        "--base-url", metavar="URL", expose_value=False, callback=_remember, help="Where nimhost listens."
    )
    workspace = click.option(
        "-w", "--workspace", metavar="NAME", expose_value=False, callback=_remember, help="Workspace to work in.",
        shell_complete=complete_names("workspaces"),
    )  # fmt: skip
    return base_url(workspace(command))


def timeout_option(default: float | None = None) -> Callable[[F], F]:
    """`--timeout` as `timeout_s`; without a default it is None: as long as it takes."""
    return click.option(
        "-t", "--timeout", "timeout_s", type=click.FloatRange(0), default=default, show_default=default is not None,
        metavar="SECONDS", help="Wait no longer than this (exit 1).",
    )  # fmt: skip


def format_option(*formats: str, in_pipe: str = "") -> Callable[[F], F]:
    """`formats`: the first of them by default, or `in_pipe` where nobody looks on."""
    return click.option(
        "-f",
        "--output-format",
        "--format",
        "output_format",
        type=click.Choice(formats),
        expose_value=False,
        callback=_remember,
        help=f"How to print the result; without it: {formats[0]}{f', in a pipe {in_pipe}' if in_pipe else ''}.",
    )


def table_options(command: F) -> F:
    """What a table of a list shows: `--output-columns` and `--no-truncate`, for `asked`."""
    columns = click.option(
        "-c", "--output-columns", metavar="COLUMNS", expose_value=False, callback=_remember,
        help="What a table shows: all, or fields with commas (name,status).",
    )  # fmt: skip
    return columns(whole_option(hidden=False)(command))


def whole_option(hidden: bool) -> Callable[[F], F]:
    return click.option(
        "--no-truncate", is_flag=True, default=None, expose_value=False, callback=_remember, hidden=hidden,
        help="Do not cut a table at the edge of the terminal.",
    )  # fmt: skip


def asked(name: str) -> Any:
    """What was given for an option that is remembered; None: nothing."""
    return click.get_current_context().meta.get(KEY, {}).get(name)


def settings() -> client_settings.ClientSettings:
    """The client's settings in force for the running command. Raises ConfigError, also for a format there is not."""
    chosen = client_settings.load(click.get_current_context().meta.get(KEY, {}))
    if chosen.output_format not in (None, TEXT, *FORMATS):
        raise ConfigError(
            f"'{chosen.output_format}' is not an output format: there are {', '.join(FORMATS)}.",
            "It comes from NIMHOST_OUTPUT_FORMAT, or else from: nimhost config set --output-format",
        )
    return chosen


def output_format(*formats: str) -> str:
    """The format asked for by flag, environment or settings file, where it is one of `formats`; else the first."""
    wanted = settings().output_format
    return wanted if wanted in formats else formats[0]


def flag_given(name: str) -> bool:
    return asked(name) is not None


NOT_CLIENTS = ("serve", "config", "completion", "version")
"""Commands that no daemon is asked for."""


def retyped(text: str) -> str:
    """`text` with the flags of this command in the commands that it names: typed as they stand, they reach the same
    daemon and workspace."""
    context = click.get_current_context()
    given = context.meta.get(KEY, {})
    flags = [f"{flag} {shlex.quote(given[name])}" for name, flag in FLAGS.items() if name in given]
    if not flags:
        return text
    words = set(cast(click.Group, context.find_root().command).list_commands(context)) - {*NOT_CLIENTS}
    return re.sub(rf"\bnimhost (?=(?:{'|'.join(words)})\b)", lambda _: f"nimhost {' '.join(flags)} ", text)


def read_secret(what: str) -> str:
    """What is piped into this command; at a terminal, what is typed: unseen, to the end of the line."""
    if sys.stdin.isatty():
        return str(click.prompt(what, hide_input=True, err=True))
    return read_input()


def read_input() -> str:
    """All of standard input. Raises UsageError for what is no text."""
    try:
        text = sys.stdin.read()
        text.encode()  # bytes that are no text may have been let through as surrogates
    except UnicodeError:
        raise click.UsageError("Standard input is not text in UTF-8.") from None
    return text


def open_client(timeout_s: float = 60.0) -> Client:
    from nimhost.client import Client

    chosen = settings()
    return Client(chosen.base_url, chosen.workspace, chosen.access_token, timeout_s=timeout_s)


def stopped_error(client: Client) -> NimhostError:
    """What to raise when what has no end of its own ended: the daemon did."""
    return Unreachable(
        f"nimhost at {client.base_url} has stopped.", "Engines go on without it. Start it with: nimhost serve"
    )


def complete_names(*kinds: str) -> Callable[[click.Context, click.Parameter, str], Sequence[CompletionItem]]:
    """Names of these kinds (keys of KINDS) for the shell; none when the daemon does not answer at once."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Sequence[CompletionItem]:
        from click.shell_completion import CompletionItem

        found: dict[str, str | None] = {}
        try:
            with ctx, open_client(timeout_s=COMPLETION_TIMEOUT_S) as client:
                for key in kinds:
                    resource = getattr(client, key.replace("-", "_"))
                    for row in resource.page(page_size=str(resource.kind.page_size_max))["data"]:
                        found.setdefault(row["name"], row.get("status"))
        except NimhostError:
            return []
        return [CompletionItem(name, help=status) for name, status in found.items() if name.startswith(incomplete)]

    return complete


complete_deployment = complete_names("deployments")


def show_error(error: NimhostError) -> None:
    hint = error.hint
    if hint is None and isinstance(error, NotFound):
        from nimhost.cli.missing import next_step

        hint = next_step(error.message)
    click.echo(f"{click.style('Error:', fg='red')} {retyped(error.message)}", err=True)
    if hint:
        click.echo(f"{click.style('Hint:', fg='cyan')} {retyped(hint)}", err=True)

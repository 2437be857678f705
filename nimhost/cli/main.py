"""`nimhost`: the table of commands. Each lives in a module of its own, imported when it is the one that was typed."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Any, NamedTuple

import click

from nimhost import __version__
from nimhost.cli.options import address_options, format_option, show_error, whole_option
from nimhost.errors import ConfigError, NimhostError


class Entry(NamedTuple):
    """A command: where it lives (`module:name`, of a command or of a function name -> command), and in one line."""

    place: str
    sentence: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Run models": {
        "serve": Entry("nimhost.cli.serve:serve", "Start the daemon."),
        "deploy": Entry(
            "nimhost.cli.deploy:deploy", "Run a model, a local directory or an image on this machine's GPUs."
        ),
        "plan": Entry("nimhost.cli.plan:plan", "Show what a model would take here, without deploying it."),
        "chat": Entry("nimhost.cli.chat:chat", "Talk to a model."),
    },
    "Look after them": {
        "ps": Entry("nimhost.cli.ps:ps", "List deployments and providers."),
        "logs": Entry("nimhost.cli.logs:logs", "Show what an engine printed."),
        "wait": Entry("nimhost.cli.wait:wait", "Wait until a deployment is ready or gone."),
        "stop": Entry("nimhost.cli.lifecycle:stop", "Stop deployments and free their GPUs."),
        "start": Entry("nimhost.cli.lifecycle:start", "Start stopped deployments, or try failed ones again."),
        "rm": Entry("nimhost.cli.lifecycle:rm", "Remove deployments."),
        "gpus": Entry("nimhost.cli.gpus:gpus", "Show the GPUs, and who uses them."),
        "requests": Entry("nimhost.cli.requests:requests", "Show the last requests to models."),
    },
    "What there is": {
        "models": Entry("nimhost.cli.resources:group", "Models, and their adapters."),
        "adapters": Entry("nimhost.cli.resources:group", "LoRA adapters."),
        "files": Entry("nimhost.cli.resources:group", "Filesets, and the files in them."),
        "weights": Entry("nimhost.cli.weights:weights", "Weights on this machine: fetch, verify, make room."),
        "secrets": Entry("nimhost.cli.resources:group", "Keys and tokens."),
        "inference": Entry("nimhost.cli.resources:group", "Deployments, configs, providers, and requests to them."),
        "workspaces": Entry("nimhost.cli.resources:group", "Workspaces."),
        "projects": Entry("nimhost.cli.resources:group", "Projects."),
    },
    "Set up": {
        "tokens": Entry("nimhost.cli.tokens:tokens", "Make, list and revoke API tokens."),
        "config": Entry("nimhost.cli.config:config", "Show or change where this command finds the daemon."),
        "completion": Entry("nimhost.cli.completion:completion", "Print the completion script of a shell."),
        "version": Entry("nimhost.cli.config:version", "Print the version."),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Root(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.place.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        command: click.Command = found if isinstance(found, click.Command) else found(cmd_name)
        command.short_help = entry.sentence
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """With the nearest names for one that does not exist."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command '{args[0]}'.{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.sentence) for name, entry in entries.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Errors become two lines and an exit code; Ctrl-C leaves without a traceback."""
        try:
            return super().invoke(ctx)
        except NimhostError as error:
            show_error(error)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            ctx.exit(130)


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Begin with:  nimhost serve  and, in another terminal:  nimhost deploy Qwen/Qwen3-1.7B
Tab completion:  nimhost completion --help
Output:  one thing is printed as JSON, several as a table; -f json, yaml, raw or table chooses.
         In a pipe, lists of "What there is" are JSON too, as nemo has it; weights and all others stay tables.
Exit codes:  0 done, 1 failed or refused, 2 wrong usage or settings, 130 interrupted""",
)
@click.version_option(__version__, "-V", "--version", message="nimhost %(version)s")
@format_option("table", "json", "yaml", "raw")
@address_options
@whole_option(hidden=True)
def cli() -> None:
    """Run NVIDIA NIM and vLLM on your own GPUs behind one OpenAI-compatible endpoint."""


def open_streams() -> None:
    """A stream that the caller has closed is an empty one, and what its encoding has not is shown as a question mark:
    an engine may send half a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main() -> None:
    open_streams()
    cli(prog_name="nimhost", color=False if os.environ.get("NO_COLOR") else None)

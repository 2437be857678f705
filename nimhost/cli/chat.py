"""`nimhost chat`"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from nimhost.cli.answers import Answer, Piece
from nimhost.cli.options import (
    address_options,
    complete_names,
    flag_given,
    format_option,
    open_client,
    output_format,
    read_input,
)
from nimhost.errors import BadRequest, InvalidRequest, NotFound

if TYPE_CHECKING:
    from nimhost.cli.chat_target import ChatTarget
    from nimhost.client import Client

Messages = list[dict[str, Any]]


@click.command()
@click.argument("model", required=False, shell_complete=complete_names("deployments", "models"))
@click.argument("prompt", required=False)
@click.option(
    "--provider", metavar="NAME", shell_complete=complete_names("providers"),
    help="Ask this provider; MODEL is then what it calls the model.",
)  # fmt: skip
@click.option("-s", "--system-message", metavar="TEXT", help="What the model is told before anything else.")
@click.option("--temperature", type=click.FloatRange(0), metavar="T", help="Randomness; 0 is none.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option("--thinking/--no-thinking", default=False, help="Show what a reasoning model thinks before it answers.")
@click.option("-i", "--interactive", is_flag=True, help="A conversation, with PROMPT as its first message.")
@format_option("text", "json", "raw")
@address_options
def chat(
    model: str | None,
    prompt: str | None,
    provider: str | None,
    system_message: str | None,
    temperature: float | None,
    max_tokens: int | None,
    thinking: bool,
    interactive: bool,
) -> None:
    """Talk to a model: one answer to PROMPT, or a conversation on a terminal.

    MODEL is a deployment, a model entity, or workspace/name; it may be left out when only one is ready. A single
    argument with a blank in it is a PROMPT. Without PROMPT, and where standard input is no terminal, what comes there
    is the prompt; beside a PROMPT it is not read: give what goes with it as --system-message.

    \b
    Examples:
      nimhost chat qwen-qwen3-1-7b "Why is the sky blue?"
      nimhost chat "Why is the sky blue?"           (asks the only model that is ready)
      nimhost chat                                  (a conversation with it)
      git diff | nimhost chat qwen-qwen3-1-7b -s "Write a commit message."
      nimhost chat gpt-4 "Hello!" --provider openai
    """
    if model is not None and prompt is None and any(map(str.isspace, model)):
        model, prompt = None, model
    check_names(model, provider)
    given = prompt is not None
    if prompt is None and not sys.stdin.isatty() and not interactive:
        prompt = read_prompt()
    opening: Messages = [{"role": "system", "content": system_message}] if system_message else []
    options = {"temperature": temperature, "max_tokens": max_tokens}
    with open_client() as client:
        target = find_target(client, model, provider)
        talk = Talk(client, target, {name: value for name, value in options.items() if value is not None})
        if prompt is None or interactive:
            from nimhost.cli.repl import converse

            converse(talk, opening, prompt, thinking)
        else:
            one_shot(talk, [*opening, {"role": "user", "content": prompt}], thinking)
    if given and not interactive and input_waits():
        click.echo("Note: standard input was not read, because a PROMPT was given (see nimhost chat --help).", err=True)


def check_names(model: str | None, provider: str | None) -> None:
    """Raises UsageError for a workspace that is said twice, or in the wrong place."""
    if model and "/" in model and provider is None and flag_given("workspace"):
        raise click.UsageError(f"'{model}' names its workspace already: leave out --workspace.")
    if provider and "/" in provider:
        raise click.UsageError("--provider takes a name; say its workspace with --workspace.")


def read_prompt() -> str:
    """What comes on standard input. Raises UsageError when that is nothing."""
    prompt = read_input().strip()
    if not prompt:
        raise click.UsageError("There is nothing to ask: give a PROMPT, or something on standard input.")
    return prompt


def input_waits() -> bool:
    """Somebody has written into the pipe that is our standard input. A pipe in which nothing is may never end."""
    import fcntl
    import termios

    try:
        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        return stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode) and any(waiting)
    except (OSError, ValueError):  # no standard input, or one that is no file
        return False


class Talk(NamedTuple):
    """With whom, and how."""

    client: Client
    target: ChatTarget
    options: dict[str, Any]

    def _ask(self, messages: Messages, **more: Any) -> Any:
        target = self.target
        return self.client.chat(
            target.model, messages, provider=target.provider, workspace=target.workspace, **self.options, **more
        )

    def ask(self, messages: Messages) -> Generator[Any, None, None]:
        """The chunks of the answer; the last one has the usage, for `nimhost requests` too. An engine that does not
        take the question for it goes without. Close it to stop the model."""
        begun = False
        try:
            for chunk in self._ask(messages, stream_options={"include_usage": True}):
                begun = True
                yield chunk
            return
        except (BadRequest, InvalidRequest):
            if begun:
                raise
        yield from self._ask(messages)


def find_target(client: Client, model: str | None, provider: str | None) -> ChatTarget:
    from nimhost.cli.chat_target import ChatTarget, choose

    if model is not None and provider is not None:
        return ChatTarget(model, provider, client.workspace)
    workspace, slash, _ = (model or "").partition("/")
    try:
        where = workspace if slash else client.workspace
        found = _rows(client, where)
    except (NotFound, InvalidRequest):  # `meta/llama`: not a workspace, so it may be a vendor's name for a model
        where = client.workspace
        found = _rows(client, where)
    return choose(model, provider, where, *found)


def _rows(client: Client, workspace: str) -> list[Sequence[Any]]:
    """Its deployments, providers and adapters."""
    return [kind.list(workspace=workspace) for kind in (client.deployments, client.providers, client.adapters)]


def one_shot(talk: Talk, messages: Messages, thinking: bool) -> None:
    wanted = output_format("text", "json", "raw")
    answer = Answer()
    with closing(talk.ask(messages)) as chunks:
        printer = Printer(thinking or wanted == "raw", quiet=wanted == "json")
        receive(answer, chunks, printer)
    if wanted == "json":
        click.echo(json.dumps(answer.result(talk.target.model), ensure_ascii=False))


def receive(answer: Answer, chunks: Any, printer: Printer) -> None:
    """Also an answer that ends early ends its line."""
    try:
        for chunk in chunks:
            printer.show(answer.feed(chunk))
        printer.show(answer.end())
    finally:
        printer.end()


class Printer:
    """Prints an answer as it comes; thinking is dimmed, or left out with a sign on a terminal that it goes on."""

    def __init__(self, thinking: bool, quiet: bool = False) -> None:
        self._thinking = thinking
        self._quiet = quiet
        self._terminal = sys.stdout.isatty()
        self._waiting = False
        self._last: Piece | None = None

    def show(self, pieces: Sequence[Piece]) -> None:
        if self._quiet:
            return
        for kind, text in pieces:
            if kind == "thinking" and not self._thinking:
                self._sign(True)
                continue
            self._sign(False)
            if self._last and self._last.kind == "thinking" and kind == "content":
                click.echo("" if self._last.text.endswith("\n") else "\n")
            self._print(kind, text)
            self._last = Piece(kind, text)

    def end(self) -> None:
        self._sign(False)
        if self._last:
            click.echo()

    def _print(self, kind: str, text: str) -> None:
        if self._terminal:
            from nimhost.cli.output import clean

            text = clean(text)
        click.echo(click.style(text, dim=True) if kind == "thinking" else text, nl=False)

    def _sign(self, waiting: bool) -> None:
        if self._terminal and waiting != self._waiting:
            click.echo(click.style("thinking…", dim=True) if waiting else "\r\x1b[K", nl=False)
            self._waiting = waiting

"""A conversation on the terminal."""

from __future__ import annotations

import contextlib
from contextlib import closing

import click

from nimhost.cli.answers import Answer
from nimhost.cli.chat import Messages, Printer, Talk, receive
from nimhost.cli.options import show_error
from nimhost.errors import NimhostError

HELP = """/help       this list
/clear      forget the conversation
/thinking   show or hide what the model thinks before it answers
/exit       leave (also Ctrl-D)
Ctrl-C      stop the answer"""


def converse(talk: Talk, opening: Messages, first: str | None, thinking: bool) -> None:
    """Until /exit or Ctrl-D. What an interrupted answer had said stays part of the conversation."""
    with contextlib.suppress(ImportError):  # line editing and history, where Python was built with it
        import readline  # noqa: F401
    click.secho(f"{talk.target.model}: /help lists what can be typed, Ctrl-D leaves.", dim=True)
    messages = list(opening)
    text = first
    while True:
        text = _read() if text is None else text
        if text is None or text in ("/exit", "/quit"):
            return
        if text == "/thinking":
            thinking = not thinking
            click.secho(f"Thinking is {'shown' if thinking else 'hidden'}.", dim=True)
        elif text == "/clear":
            messages = list(opening)
            click.secho("Forgotten.", dim=True)
        elif text.startswith("/"):
            click.echo(HELP if text == "/help" else f"There is no {text.split()[0]}.\n{HELP}")
        elif text:
            messages = _turn(talk, [*messages, {"role": "user", "content": text}], thinking)
        text = None


def _read() -> str | None:
    """A line; empty when Ctrl-C dropped it, None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _turn(talk: Talk, messages: Messages, thinking: bool) -> Messages:
    """The conversation after the answer, or as it was before the question if there was none."""
    answer = Answer()
    try:
        with closing(talk.ask(messages)) as chunks:
            receive(answer, chunks, Printer(thinking))
    except KeyboardInterrupt:
        click.secho("(stopped)", dim=True)
    except NimhostError as error:
        show_error(error)
    if not answer.content:
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer.content}]

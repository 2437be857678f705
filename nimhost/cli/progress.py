"""Follow a deployment until it is ready or has failed: one live line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import click

from nimhost.cli.model_options import in_flags
from nimhost.cli.options import output_format, retyped, settings
from nimhost.cli.output import FORMATS, print_value
from nimhost.cli.stages import Stage, View, clock, describe, fold, fraction, plain_lines
from nimhost.client.resources import POLL_S, gateway_path
from nimhost.errors import NimhostError, NotFound, NotReady, UpstreamError, UpstreamTimeout

if TYPE_CHECKING:
    from nimhost.client import Client

QUIET_S = 10.0
"""How long the progress may say nothing before it is asked for anew: the daemon may have gone without a word."""
PATIENCE_S = 60.0
"""How long a daemon may be away before the watching ends. The deployment does not need us."""
BAR_WIDTH = 24
Outcome = Literal["created", "updated", "started", ""]


def follow(client: Client, name: str, outcome: Outcome = "started", timeout_s: float = math.inf) -> None:
    """Returns when the version that is wished is READY. Raises NotReady with the cause, UpstreamTimeout, or Exit(130)
    on Ctrl-C. `outcome`: what was done to it before.
    """
    began = time.monotonic()
    report = sys.stdout if output_format(*FORMATS) == "table" else sys.stderr
    try:
        with live(report) if report.isatty() else plain(report) as show:
            view = _watch(client, name, began + timeout_s, show)
    except KeyboardInterrupt:
        click.echo(retyped(f"\n{name} goes on without this command.\n{_what_next(name)}"), err=True)
        raise click.exceptions.Exit(130) from None
    except UpstreamTimeout as error:
        raise UpstreamTimeout(f"{name} is not ready after {timeout_s:g} s.", _what_next(name)) from error
    if view.status != "READY" or view.update or view.desired == "stopped":
        raise _failure(client, name, view)
    show_ready(client, name, f"after {clock(time.monotonic() - began)}" if outcome else "already")


def show_ready(client: Client, name: str, when: str) -> None:
    ready = click.style(f"{name} is READY", fg="green")
    show_result(client, name, lambda: f"{ready} {when}.\n{how_to_use(client, name)}")


def show_result(client: Client, name: str, text: Callable[[], str]) -> None:
    """The text for people; the deployment itself for programs."""
    wanted = output_format(*FORMATS)
    if wanted == "table":
        click.echo(retyped(text()))
    else:
        print_value(client.deployments.get(name), wanted)


def _watch(client: Client, name: str, deadline: float, show: Callable[[View], None]) -> View:
    view = View()
    for snapshot in snapshots(client, name, deadline):
        view = fold(view, snapshot, time.monotonic())
        show(view)
        if _is_over(view):
            break
    return view


def _is_over(view: View) -> bool:
    """While an update rolls, what the status says is about the version before: not the one to wait for."""
    if view.status in ("DELETING", "DELETED") or view.desired == "stopped":
        return True
    return view.update != "rolling" and view.status in ("READY", "ERROR", "LOST")


def snapshots(client: Client, name: str, deadline: float) -> Iterator[Any]:
    """Progress as it changes. A broken connection is made anew.

    Raises UpstreamTimeout at the deadline, NotFound when the deployment is gone.
    """
    heard_at = time.monotonic()
    while (now := time.monotonic()) < deadline:
        try:
            quiet_s = min(QUIET_S, max(deadline - now, 0.01))
            with closing(client.deployments.follow_progress(name, quiet_s=quiet_s)) as stream:
                for snapshot in stream:
                    heard_at = time.monotonic()
                    yield snapshot
                    if heard_at >= deadline:
                        break
        except UpstreamTimeout:
            continue
        except (UpstreamError, NotReady):
            if time.monotonic() - heard_at > PATIENCE_S:
                raise
        time.sleep(POLL_S)
    raise UpstreamTimeout("the deadline passed")


def failure(client: Client, name: str, deployment: Any) -> NotReady:
    """Why a deployment is not READY and will not become it by waiting, or why its update failed."""
    return _failure(client, name, fold(View(), deployment, 0.0))


def _failure(client: Client, name: str, view: View) -> NotReady:
    if view.desired == "stopped":
        return NotReady(f"{name} was stopped.", f"Start it with: nimhost start {name}")
    if view.status in ("DELETING", "DELETED"):
        return NotReady(f"{name} was removed.")
    if view.status == "READY":
        return _failed_update(name, view.status_message)
    logs = f"All of its logs: nimhost logs {name}   " if _has_logs(client, name) else ""
    return NotReady(
        f"{name} failed. {view.status_message}", f"{logs}Try again: nimhost start {name}   Remove it: nimhost rm {name}"
    )


def _failed_update(name: str, message: str) -> NotReady:
    said, _, why = message.partition("\n")
    logs = f"   All of its logs: nimhost logs {name}" if "nimhost logs" in said else ""
    return NotReady(
        f"The update of {name} failed, and the previous version serves. {why or said}",
        f"Try it again: nimhost start {name} (without a GPU to spare, nothing serves meanwhile)   Give it up: "
        f"nimhost deploy … --update, with the options of before{logs}",
    )


def _has_logs(client: Client, name: str) -> bool:
    """No container, no logs: one whose image could not be fetched has never had any."""
    try:
        with closing(client.deployments.logs(name, tail=1)) as text:
            next(iter(text), None)
    except NimhostError:
        return False
    return True


def _what_next(name: str) -> str:
    return "\n".join(
        f"  {what:8} nimhost {command} {name}" for what, command in
        (("follow:", "wait"), ("logs:", "logs -f"), ("remove:", "rm"))
    )  # fmt: skip


# --- showing it ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain(file: Any) -> Iterator[Callable[[View], None]]:
    before = View()

    def show(view: View) -> None:
        nonlocal before
        for line in plain_lines(before, view, time.monotonic()):
            click.echo(line, file=file)
        before = view

    yield show


@contextlib.contextmanager
def live(file: Any) -> Iterator[Callable[[View], None]]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    view = View()

    def render() -> Group:
        now = time.monotonic()
        lines = [_line(Text, stage, now) for stage in view.stages]
        if view.status not in ("READY", "ERROR") or view.update:
            lines.append(Text(f"  {view.status_message}", style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def show(latest: View) -> None:
        nonlocal view
        view = latest

    with Live(get_renderable=render, console=Console(file=file, highlight=False), refresh_per_second=8):
        yield show


def _line(make_text: Any, stage: Stage, now: float) -> Any:
    over = stage.ended_at is not None
    line = make_text(no_wrap=True, overflow="ellipsis")
    line.append("  ✓ " if over else f"  {'⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏'[int(now * 8) % 10]} ", style="green" if over else "cyan")
    line.append(f"{stage.name:8} ", style="bold")
    share = fraction(stage)
    if share is not None and not over:
        full = int(share * BAR_WIDTH)
        line.append("━" * full, style="cyan")
        line.append("━" * (BAR_WIDTH - full), style="bright_black")
        line.append(" ")
    line.append(describe(stage, now), style="dim" if over else "")
    return line


# --- once it is ready ----------------------------------------------------------------------------------------------


def how_to_use(client: Client, name: str) -> str:
    """Endpoint, model name and the two next commands, as far as the deployment serves models."""
    deployment, provider = _provider(client, name)
    workspace = deployment["workspace"]
    warnings = "".join(f"  note      {in_flags(warning)}\n" for warning in deployment.get("warnings") or ())
    served = provider.get("served_models") or []
    gateway = f"{client.base_url}{gateway_path(workspace)}"
    token = ' -H "Authorization: Bearer $NIMHOST_ACCESS_TOKEN"' if settings().access_token else ""
    if not served:
        path = f"{gateway}/provider/{name}/-/"
        return f"{warnings}  endpoint  {path}\n\nTry it:\n  curl{token} {path}v1/models"
    model = served[0]["model_entity_id"]
    endpoint = f"{client.base_url}/v1" if workspace == "default" else f"{gateway}/openai/-/v1"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    curl = f"curl{token} {endpoint}/chat/completions -H 'content-type: application/json' -d '{body}'"
    return f'{warnings}  model     {model}\n  endpoint  {endpoint}\n\nTry it:\n  nimhost chat {name} "Hello!"\n  {curl}'


def _provider(client: Client, name: str) -> tuple[Any, Any]:
    """A READY deployment and its provider, whose models may be listed a moment after it is READY."""
    deployment = client.deployments.get(name)
    ref = deployment.get("model_provider_id") or f"{deployment['workspace']}/{name}"
    provider: Any = {}
    for _ in range(4):
        with contextlib.suppress(NotFound):
            provider = client.providers.get(ref)
        if provider.get("served_models"):
            break
        time.sleep(POLL_S)
    return deployment, provider

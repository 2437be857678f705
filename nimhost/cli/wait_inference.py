"""`nimhost wait inference deployment|provider NAME`: the spec's long form of `nimhost wait NAME`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from nimhost.cli.options import F, address_options, complete_deployment, complete_names, open_client, timeout_option
from nimhost.cli.output import clean
from nimhost.cli.stages import brief

STATUSES = ["READY", "DELETED", "PENDING", "ERROR"]


class Wait(click.Command):
    """`wait NAME`; with `inference` and something after it, the long form."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["inference"] and args[1:2] and args[1] in inference.commands:
            return inference.make_context(f"{info_name} inference", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.group()
def inference() -> None:
    """Wait for a deployment or a provider.

    \b
    Examples:
      nimhost wait inference deployment llama
      nimhost wait inference provider openai
    """


def times(timeout_s: float) -> Callable[[F], F]:
    """`--timeout`, and the `--poll-interval` of the reference, which has no effect here."""
    timeout = timeout_option(timeout_s)
    interval = click.option("--poll-interval", type=float, expose_value=False, hidden=True)
    return lambda command: timeout(interval(address_options(command)))


@inference.command()
@click.argument("name", shell_complete=complete_deployment)
@click.option(
    "-s", "--status", type=click.Choice(STATUSES), default="READY", show_default=True, help="What to wait for."
)
@click.option("--check-gateway/--no-check-gateway", default=True, help="Until requests can be sent to it, too.")
@times(1200)
def deployment(name: str, status: str, check_gateway: bool, timeout_s: float) -> None:
    """Wait until a deployment has a status, printing what happens on the way.

    \b
    Example:
      nimhost wait inference deployment llama --status DELETED
    """
    click.echo(f"Waiting for deployment '{name}' to reach status: {status}")
    end = time.monotonic() + timeout_s
    with open_client() as client:
        client.deployments.wait(name, status, timeout_s=timeout_s, on_entry=show, on_probe=show_probe)
        click.echo("✓ Deployment DELETED!" if status == "DELETED" else f"✓ Deployment reached {status} status!")
        if status == "READY" and check_gateway:
            client.providers.wait(name, timeout_s=max(1.0, end - time.monotonic()))
            click.echo("✓ Gateway is ready!")


@inference.command()
@click.argument("name", shell_complete=complete_names("providers"))
@times(60)
def provider(name: str, timeout_s: float) -> None:
    """Wait until requests can be sent to a provider.

    \b
    Example:
      nimhost wait inference provider openai
    """
    click.echo(f"Waiting for gateway to be ready for provider '{name}'")
    with open_client() as client:
        client.providers.wait(name, timeout_s=timeout_s)
    click.echo("✓ Gateway is ready!")


def show(entry: Any, err: bool = False) -> None:
    """An entry of a status history; `err`: beside what the command prints."""
    click.echo(f"{entry['timestamp'][11:19]}  {entry['status']:8}  {brief(clean(entry['status_message']))}", err=err)


def show_probe(finding: str) -> None:
    click.echo(f"{datetime.now(UTC):%H:%M:%S}  last probe: {clean(finding)}")

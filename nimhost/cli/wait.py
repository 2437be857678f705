"""`nimhost wait`"""

from __future__ import annotations

import math

import click

from nimhost.cli.options import (
    address_options,
    complete_deployment,
    format_option,
    open_client,
    output_format,
    timeout_option,
)
from nimhost.cli.output import FORMATS
from nimhost.cli.wait_inference import Wait, show


@click.command(cls=Wait)
@click.argument("name", shell_complete=complete_deployment)
@click.option(
    "-s", "--status", type=click.Choice(["READY", "DELETED"]), default="READY", show_default=True,
    help="What to wait for.",
)  # fmt: skip
@timeout_option()
@format_option(*FORMATS)
@address_options
def wait(name: str, status: str, timeout_s: float | None) -> None:
    """Wait until a deployment is ready (exit 0) or has failed (exit 1), showing how far it is.

    For a provider: nimhost wait inference provider NAME

    \b
    Examples:
      nimhost wait qwen-qwen3-1-7b --timeout 1200
      nimhost wait qwen-qwen3-1-7b --status DELETED
    """
    limit_s = math.inf if timeout_s is None else timeout_s
    with open_client() as client:
        if status == "READY":
            from nimhost.cli.progress import follow, show_ready

            found = client.deployments.get(name)
            if found["status"] == "READY" and found["desired"] == "running" and not found.get("update"):
                show_ready(client, name, "already")
            else:
                follow(client, name, timeout_s=limit_s)
            return
        client.deployments.wait(name, status, timeout_s=limit_s, on_entry=show)
    if output_format(*FORMATS) == "table":
        click.echo(f"{name} is gone.")

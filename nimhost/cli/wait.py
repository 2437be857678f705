"""`nimhost wait`"""

from __future__ import annotations

import math

import click

from nimhost.cli.options import address_options, complete_deployment, open_client
from nimhost.cli.wait_inference import Wait, show, show_probe
from nimhost.errors import NotReady


@click.command(cls=Wait)
@click.argument("name", shell_complete=complete_deployment)
@click.option("-s", "--status", type=click.Choice(["READY", "DELETED"]), default="READY", show_default=True)
@click.option("-t", "--timeout", "timeout_s", type=float, metavar="SECONDS", help="Give up after so long (exit 1).")
@address_options
def wait(name: str, status: str, timeout_s: float | None) -> None:
    """Wait until a deployment is ready (exit 0) or has failed (exit 1), printing what happens on the way.

    \b
    Examples:
      nimhost wait qwen-qwen3-1-7b --timeout 1200
      nimhost wait qwen-qwen3-1-7b --status DELETED
    """
    from nimhost.cli.progress import failure

    with open_client() as client:
        timeout_s = math.inf if timeout_s is None else timeout_s
        try:
            client.deployments.wait(name, status, timeout_s=timeout_s, on_entry=show, on_probe=show_probe)
        except NotReady as error:
            raise failure(client, name, client.deployments.get(name)) from error
    click.echo(f"{name} is {'gone' if status == 'DELETED' else status}.")

"""`nimhost logs`"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import click

from nimhost.cli.options import address_options, complete_deployment, open_client, stopped_error
from nimhost.errors import UpstreamError

if TYPE_CHECKING:
    from nimhost.client import Client


@click.command()
@click.argument("name", shell_complete=complete_deployment)
@click.option("-f", "--follow", is_flag=True, help="Keep printing what comes, until Ctrl-C.")
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines of what was printed.")
@address_options
def logs(name: str, follow: bool, tail: int | None) -> None:
    """Show what the engine of a deployment printed. A crashed engine's logs stay until it is started again or removed.

    \b
    Examples:
      nimhost logs qwen-qwen3-1-7b
      nimhost logs qwen-qwen3-1-7b --tail 50 -f
    """
    with open_client() as client:
        with closing(client.deployments.logs(name, follow=follow, tail=tail)) as pieces:
            for text in pieces:
                click.echo(text, nl=False)
        if follow and not _is_there(client):
            raise stopped_error(client)


def _is_there(client: Client) -> bool:
    """Whether the daemon is: logs end with their engine, too."""
    from nimhost.client.wire import Request

    try:
        client.send(Request(path="/health/live"))
    except UpstreamError:
        return False
    return True

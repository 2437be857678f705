"""`nimhost logs`"""

from __future__ import annotations

from contextlib import closing

import click

from nimhost.cli.options import address_options, complete_deployment, open_client


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
    with open_client() as client, closing(client.deployments.logs(name, follow=follow, tail=tail)) as pieces:
        for text in pieces:
            click.echo(text, nl=False)

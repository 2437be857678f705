"""`nimhost serve`: the one command that is not a client."""

from __future__ import annotations

import click


@click.command()
@click.option("--host", metavar="ADDRESS", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.  [default: 8080]")
@click.option("--data-dir", metavar="DIR", help="Where nimhost keeps its database, key and files.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Settings file.  [default: ./nimhost.toml, else ~/.config/nimhost/nimhost.toml]",
)
@click.pass_context
def serve(
    ctx: click.Context, host: str | None, port: int | None, data_dir: str | None, config_file: str | None
) -> None:
    """Start the daemon and keep it in the foreground. Ctrl-C stops it; running engines stay up.

    Flags win over environment variables (NIMHOST_SERVER__PORT=9000), those over nimhost.toml: the one that --config
    names, else the one in this directory, else the one in $XDG_CONFIG_HOME/nimhost (~/.config/nimhost).

    \b
    Examples:
      nimhost serve
      nimhost serve --port 9000 --data-dir /srv/nimhost
    """
    from nimhost.daemon import run

    ctx.exit(run(config_file, {"server.host": host, "server.port": port, "server.data_dir": data_dir}))

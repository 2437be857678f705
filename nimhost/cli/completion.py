"""`nimhost completion`"""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that teaches a shell to complete commands, options, and names of what there is.

    It works in the next shell that is opened: in bash (4.4 or newer) where the package bash-completion is installed,
    in zsh where ~/.zshrc has "fpath+=~/.zfunc" before "autoload -Uz compinit && compinit".

    \b
    Examples (the directory has to be there):
      nimhost completion bash > ~/.local/share/bash-completion/completions/nimhost
      nimhost completion zsh  > ~/.zfunc/_nimhost
      nimhost completion fish > ~/.config/fish/completions/nimhost.fish
    """
    from click.shell_completion import get_completion_class

    make = get_completion_class(shell)
    if make is None:
        raise click.UsageError(f"There is no completion for {shell}.")
    click.echo(make(ctx.find_root().command, {}, "nimhost", "_NIMHOST_COMPLETE").source())

"""`flanctl completion`: the script that teaches a shell our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from flanctl.commands import output
from flanctl.commands.options import output_options
from flanctl.errors import UsageError

VARIABLE = "_FLANCTL_COMPLETE"  # cli.COMPLETE; commands do not import the command line


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output_options
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      source <(flanctl completion bash)
      flanctl completion zsh > /usr/share/zsh/site-functions/_flanctl
      flanctl completion fish > ~/.config/fish/completions/flanctl.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"no completion for {shell}")
    root = click.get_current_context().find_root().command
    # The base method: bash's own asks the bash on PATH for its version, and that may be another host's business.
    output.data(ShellComplete.source(kind(root, {}, "flanctl", VARIABLE)))

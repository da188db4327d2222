"""`flanctl version`."""

from __future__ import annotations

import platform

import click

from flanctl import __version__
from flanctl.commands import output
from flanctl.commands.options import output_options, write_out


@click.command()
@output_options
def version() -> None:
    """Print the version.

    \b
    Example:
      flanctl version -w json
    """
    form = write_out()
    if form == "json":
        output.json(
            {"flanctl": __version__, "python": platform.python_version(), "machine": platform.machine()}
        )
    elif form == "simple":
        output.simple([(__version__,)])
    else:
        output.data(f"flanctl {__version__}")

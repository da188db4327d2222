"""`flanctl cleanup`: a host as if no agent had ever run on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.options import cleanup_options, output_options, settings, write_out
from flanctl.commands.reservations import change_options, refuse_if_nobody_can_be_asked
from flanctl.errors import FlanctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanctl.agent.cleanup import Step


@click.command()
@change_options
@cleanup_options
@output_options
def cleanup(dry_run: bool, yes: bool) -> None:
    """Remove what a stopped agent left on this host: device, routes, firewall rules, files.

    An agent that stops leaves all of it in place, so that packets flow through a restart; this is for a host that
    leaves the network, or goes back to flanneld. Only what bears flanctl's marks is removed. The lease stays in the
    registry and ends by itself: flanctl release frees its subnet at once. Refused while an agent or a flanneld runs.

    \b
    Examples:
      flanctl cleanup --dry-run
      systemctl stop flanctl-agent && flanctl cleanup --yes
    """
    from flanctl.agent.cleanup import Places, refuse_running, steps

    chosen = settings()
    places = Places(*(Path(chosen.text(name)).absolute() for name in ("subnet_file", "state_dir", "run_dir")))
    refuse_running(places.run_dir)
    refuse_if_nobody_can_be_asked(dry_run=dry_run, yes=yes)
    found = steps(places)
    if not found or dry_run:
        _show(found, changed=False)
        return
    if not yes:
        for step in found:
            output.note("\n".join(step.commands))
        output.confirm("remove all of this?")
        refuse_running(places.run_dir)
    for number, step in enumerate(found):
        try:
            step.do()
        except FlanctlError as error:
            error.details = (
                *error.details,
                f"{number} of {len(found)} steps are done; the rest was not touched",
            )
            error.hint = error.hint or "the same command again does the rest"
            raise
    _show(found, changed=True)


def _show(found: Sequence[Step], *, changed: bool) -> None:
    commands = [(step.kind, command) for step in found for command in step.commands]
    form = write_out()
    if form == "json":
        output.json(
            {
                "changed": changed,
                "removed" if changed else "to_remove": [
                    {"kind": kind, "command": text} for kind, text in commands
                ],
            }
        )
    elif form == "simple":
        output.simple(commands)
    else:
        for _, text in commands:
            output.data(text)
        if not found:
            output.note("nothing of an agent is on this host")
        elif not changed:
            output.note("nothing was changed")

"""`flanctl install` and `uninstall`: every step is shown, asked for once, and can be taken back."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.options import output_options, write_out
from flanctl.errors import NotPermitted, UsageError
from flanctl.install.ledger import Ledger
from flanctl.install.places import Root
from flanctl.install.plan import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from flanctl.install.places import State
    from flanctl.install.plan import Step

_root_option = click.option(
    "--root",
    "folder",
    default="/",
    metavar="DIR",
    help="The tree to work in, for an image that is being made. Default: /",
)
_dry_run_option = click.option("--dry-run", is_flag=True, help="Show the steps, change nothing.")
_yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@click.command()
@click.option(
    "--as-flanneld",
    is_flag=True,
    help="Take flanneld's place: link its three names to flanctl; units, options and files stay as they are.",
)
@_dry_run_option
@_yes_option
@_root_option
@output_options
def install(as_flanneld: bool, dry_run: bool, yes: bool, folder: str) -> None:
    """Put flanctl in its place on this host: program, unit, docker drop-in, and with --as-flanneld flannel's names.

    What it replaces is kept below /var/lib/flanctl/install; flanctl uninstall puts it back, byte for byte. Nothing is
    started, enabled or restarted. A second run changes nothing; after an interruption, run it again or uninstall.

    \b
    Examples:
      flanctl install --dry-run --as-flanneld
      flanctl install --as-flanneld && systemctl restart flanneld
    """
    root = _root(folder)
    planned = plan(root, Ledger.read(root), as_flanneld=as_flanneld)
    steps = [step for step in planned.steps if step.needed]
    _show([_row(root, step) for step in steps], changed=not dry_run)
    for sentence in planned.notes:
        output.warning(sentence)
    if not steps:
        output.note("nothing to change: everything is in its place")
        return
    if dry_run:
        return
    _ask(root, f"put these {len(steps)} in place?", yes=yes)
    with _not_lost(), Ledger.opened(root) as ledger:
        for step in steps:
            ledger.put(step.place, root.look(step.place), step.wanted)
            _relabel(root, step.place)
    _reload_systemd(root)
    for command in planned.next if root.is_host else ():
        output.note(f"next: {command}")


@click.command()
@_dry_run_option
@_yes_option
@_root_option
@output_options
def uninstall(dry_run: bool, yes: bool, folder: str) -> None:
    """Take back what flanctl install did: what was there before is there again, byte for byte.

    A file that somebody else has replaced since (an upgrade of flannel's package) stays. Nothing is stopped or started;
    device, routes, rules and lease stay.

    \b
    Example:
      flanctl uninstall && systemctl restart flanneld
    """
    root = _root(folder)
    ledger = Ledger.read(root)
    rows = [_back(root, ledger, place) for place in reversed(ledger.entries)]
    _show(rows, changed=not dry_run)
    if not rows and not ledger.made:
        output.note("nothing to take back: no install is recorded here")
        return
    if dry_run:
        return
    _ask(root, f"take these {len(rows)} back?", yes=yes)
    with _not_lost(), Ledger.opened(root) as ledger:
        for place in tuple(reversed(ledger.entries)):
            if not ledger.take_back(place):
                output.warning(f"{root.path(place)} was changed since by somebody else and stays as it is")
            _relabel(root, place)
        ledger.remove_folders()
    _reload_systemd(root)


def _root(folder: str) -> Root:
    if not folder:
        raise UsageError("--root is empty", hint="--root / means this host; without the option it is meant")
    return Root(Path(folder))


@contextmanager
def _not_lost() -> Iterator[None]:
    """Somebody who interrupts must know how it stands."""
    try:
        yield
    except KeyboardInterrupt:
        output.note("not finished: the same command goes on where it stopped, flanctl uninstall goes back")
        raise


def _row(root: Root, step: Step) -> dict[str, Any]:
    wanted = step.wanted.state
    verb = "link" if wanted.kind == "link" else "write"
    return _line(root, step.place, verb, step.state, wanted)


def _back(root: Root, ledger: Ledger, place: str) -> dict[str, Any]:
    state, before = root.look(place), ledger.entries[place].before
    if state == before or ledger.keeps(place, state):
        return _line(root, place, "leave", state, state)
    return _line(root, place, "remove" if before.kind == "absent" else "restore", state, before)


def _line(root: Root, place: str, verb: str, now: State, then: State) -> dict[str, Any]:
    return {
        "action": verb,
        "path": str(root.path(place)),
        "now": str(now),
        "then": str(then),
    }


def _show(rows: Sequence[dict[str, Any]], *, changed: bool) -> None:
    form = write_out()
    if form == "json":
        output.json({"steps": list(rows), "dry_run": not changed})
    elif form == "simple":
        output.simple([tuple(row.values()) for row in rows])
    elif rows:
        output.table(("ACTION", "PATH", "NOW", "THEN"), [tuple(row.values()) for row in rows])


def _ask(root: Root, question: str, *, yes: bool) -> None:
    """Raises UsageError where nobody can be asked, NotPermitted before anything is half done."""
    if not os.access(root.path("/usr"), os.W_OK):
        raise NotPermitted(f"no right to write in {root.path('/usr')}", hint="run it as root")
    if yes:
        return
    if not output.can_ask():
        raise UsageError(
            "there is no terminal to ask on, nothing was changed",
            hint="the same with --yes, or with --dry-run to see what it would do",
        )
    output.confirm(question)


def _relabel(root: Root, place: str) -> None:
    """SELinux's label as the policy has it for this path, where there is SELinux."""
    if root.is_host and os.path.lexists(place):
        _run(("restorecon", "-F", place), f"the SELinux label of {place} was not restored")


def _reload_systemd(root: Root) -> None:
    if root.is_host and Path("/run/systemd/system").is_dir():
        _run(("systemctl", "daemon-reload"), "systemd has not read its units again")


def _run(words: Sequence[str], otherwise: str, which: Callable[[str], str | None] = shutil.which) -> None:
    program = which(words[0])
    if program is None:
        return
    done = subprocess.run(
        [program, *words[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        output.warning(f"{otherwise}: {done.stderr.strip() or f'{words[0]} ended with {done.returncode}'}")

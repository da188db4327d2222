"""Options that several commands share, made from the settings table so that each exists once.

Every option may stand before or after the command's name, as with etcdctl. What was given is kept in
`click.Context.meta`; `settings()` joins it with the environment and the files.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flanctl.settings import (
    AGENT,
    REGISTRY,
    RUN_DIR,
    SUBNET_FILE,
    TABLE,
    WRITE_OUT,
    Setting,
    Settings,
    resolve,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

F = TypeVar("F", bound="Callable[..., Any]")

FLAGS = "flanctl.flags"
FORMATS = WRITE_OUT.choices


def flags_of(context: click.Context) -> dict[str, str]:
    """What the command line gave so far, by setting name."""
    given: dict[str, str] = context.meta.setdefault(FLAGS, {})
    return given


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    name = str(parameter.name)
    if value is None or value == ():
        return
    flags_of(context)[name] = (
        "\n".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def _option(row: Setting) -> Callable[[F], F]:
    names = [row.flag, row.name]
    if row.flanneld is not None and f"--{row.flanneld}" != row.flag:
        names.insert(1, f"--{row.flanneld}")  # whoever comes from flanneld may go on typing its flag
    help_text = f"{row.help} [{row.variable}]" + (f" Default: {row.default}" if row.default else "")
    if row.kind == "switch":
        return click.option(
            *names,
            default=None,
            is_flag=False,
            flag_value="true",
            metavar="[=true|false]",
            expose_value=False,
            callback=_keep,
            help=help_text,
        )
    return click.option(
        *names,
        default=None,
        metavar=row.shown,
        expose_value=False,
        callback=_keep,
        multiple=row.repeatable,
        shell_complete=partial(_values, row),
        help=help_text,
    )


def _values(
    row: Setting, _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What a shell's Tab key offers behind the flag: the choices, this host's interfaces, files or directories."""
    from click.shell_completion import CompletionItem

    if row.metavar in {"FILE", "DIR"}:
        return [CompletionItem(incomplete, type=row.metavar.lower())]
    words = _interfaces() if row.metavar == "IFACE" else list(row.choices)
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _interfaces() -> list[str]:
    import os

    try:
        return sorted(os.listdir("/sys/class/net"))
    except OSError:
        return []  # a Tab key shows no errors


def _from_table(rows: tuple[Setting, ...]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for row in reversed(rows):
            command = _option(row)(command)
        return command

    return decorate


registry_options = _from_table(REGISTRY)
agent_options = _from_table(AGENT)
place_options = _from_table((SUBNET_FILE, RUN_DIR))
"""Where an agent keeps its files, for commands that look at them."""
cleanup_options = _from_table((SUBNET_FILE, TABLE["state_dir"], RUN_DIR))
"""The same with what it remembers, for the one that removes them."""


def output_options(command: F) -> F:
    """`--write-out`, `--debug`: every command has them."""
    command = click.option(
        "--debug",
        is_flag=True,
        default=None,
        expose_value=False,
        callback=_keep,
        help="Say which of several ways was taken and why, and where in the program an error came from.",
    )(command)
    return click.option(
        "-w",
        "--write-out",
        type=click.Choice(FORMATS),
        default=None,
        expose_value=False,
        callback=_keep,
        help=f"{WRITE_OUT.help} Default: {WRITE_OUT.default}",
    )(command)


def write_out(context: click.Context | None = None) -> str:
    """table, simple or json."""
    import os

    given = flags_of(context or click.get_current_context()).get("write_out")
    if given is not None:
        return given
    wanted = os.environ.get(WRITE_OUT.variable, "table")
    if wanted not in FORMATS:
        raise click.UsageError(f'{WRITE_OUT.variable} "{wanted}" is not one of {", ".join(FORMATS)}')
    return wanted


def debugging() -> bool:
    """Whether --debug was given."""
    return "debug" in flags_of(click.get_current_context())


def settings() -> Settings:
    """The settings of the running command."""
    return resolve(flags_of(click.get_current_context()))

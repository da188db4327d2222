"""The command line: which command, and the only place where an error becomes text and exit code.

Commands are imported when they are called, so that `flanctl version` does not pay for the agent.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from flanctl import __version__, streams, version_line
from flanctl.commands.groups import PATH, SETTINGS, LazyGroup
from flanctl.commands.options import flags_of, output_options, registry_options, write_out
from flanctl.complaint import complain, ended

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanctl.errors import FlanctlError


COMPLETE = "_FLANCTL_COMPLETE"
"""The variable by which a completion script asks, click's name for it."""


def _group(name: str, text: str, lazy: Mapping[str, str]) -> LazyGroup:
    return LazyGroup(name=name, help=text, lazy=lazy, context_settings=SETTINGS, no_args_is_help=True)


net = _group(
    "net",
    "Write, read and check the network's config.\n\n\b\nExample:\n  flanctl net init --network 172.17.0.0/16",
    {
        "init": "flanctl.commands.net:init",
        "get": "flanctl.commands.net:get",
        "validate": "flanctl.commands.net:validate",
    },
)
subnets = _group(
    "subnets",
    "Show which host holds which subnet.\n\n\b\nExample:\n  flanctl subnets ls",
    {
        "ls": "flanctl.commands.subnets:ls",
        "get": "flanctl.commands.subnets:get",
        "watch": "flanctl.commands.watch:watch",
    },
)


migrate = _group(
    "migrate",
    "Move a network's keys.\n\n\b\nExample:\n  flanctl migrate v2-to-v3 --dry-run",
    {"v2-to-v3": "flanctl.commands.migrate:v2_to_v3"},
)


@click.command(
    cls=LazyGroup,
    lazy={
        "net": "flanctl.cli:net",
        "subnets": "flanctl.cli:subnets",
        "watch": "flanctl.commands.watch:watch",
        "release": "flanctl.commands.reservations:release",
        "reserve": "flanctl.commands.reservations:reserve",
        "unreserve": "flanctl.commands.reservations:unreserve",
        "capacity": "flanctl.commands.capacity:capacity",
        "migrate": "flanctl.cli:migrate",
        "agent": "flanctl.commands.agent:agent",
        "status": "flanctl.commands.status:status",
        "config": "flanctl.commands.config:config",
        "cleanup": "flanctl.commands.cleanup:cleanup",
        "docker-opts": "flanctl.commands.docker_opts:docker_opts",
        "install": "flanctl.commands.install:install",
        "uninstall": "flanctl.commands.install:uninstall",
        "demo": "flanctl.commands.demo:demo",
        "demo-transfer": "flanctl.commands.demo:transfer",
        "version": "flanctl.commands.version:version",
        "completion": "flanctl.commands.completion:completion",
    },
    context_settings=SETTINGS,
    no_args_is_help=True,
)
@click.version_option(__version__, message=version_line())
@registry_options
@output_options
def flanctl() -> None:
    """flannel for people who run their own hosts.

    Options may stand before or after the command. Each can be set by the variable named in brackets; on a host
    that runs flannel, /etc/sysconfig/flanneld is read too. `flanctl config` shows which one counts.

    \b
    Example:
      flanctl --endpoints http://192.168.6.2:2379 subnets ls

    \b
    Exit codes: 0 fine, 1 other, 2 usage, 3 registry unreachable, 4 not found, 5 conflict,
    6 invalid config or value, 7 not permitted, 8 lease lost, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams.speak_utf8()
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return streams.flushed(shell_complete(flanctl, {}, "flanctl", COMPLETE, instruction))
    context: click.Context | None = None

    def run() -> int:
        nonlocal context
        try:
            with flanctl.make_context("flanctl", words) as context:
                flanctl.invoke(context)
        except click.exceptions.Exit as done:
            return done.exit_code
        except click.UsageError as error:
            return _usage(error)
        except click.Abort:
            raise KeyboardInterrupt from None
        return 0

    return ended(run, lambda error: _say(context, error))


def _usage(error: click.UsageError) -> int:
    path = error.ctx.command_path if error.ctx else "flanctl"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        streams.say(error.format_message() + "\n")
        return 2
    streams.say(f"{path}: {error.format_message().rstrip('.')}\ntry: {path} --help\n")
    return 2


def _say(context: click.Context | None, error: FlanctlError) -> None:
    if context is None:
        complain("flanctl", error)
    else:
        debug = "debug" in flags_of(context)
        complain(_command_path(context), error, form=write_out_or_table(context), debug=debug)


def write_out_or_table(context: click.Context) -> str:
    """The output format, or table where the setting itself is what is wrong."""
    try:
        return write_out(context)
    except click.UsageError:
        return "table"


def _command_path(context: click.Context) -> str:
    """`flanctl subnets ls`: the innermost context is gone by the time its error arrives here."""
    return str(context.meta.get(PATH, context.command_path))

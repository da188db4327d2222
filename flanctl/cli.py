"""The command line: which command, and the only place where an error becomes text and exit code.

Commands are imported when they are called, so that `flanctl version` does not pay for the agent.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from flanctl import __version__, streams, version_line
from flanctl.commands.options import flags_of, output_options, registry_options, write_out
from flanctl.complaint import complain, ended

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanctl.errors import FlanctlError


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def __init__(self, *args: object, lazy: Mapping[str, str] | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # click's own signature, passed through
        self.lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        where = self.lazy.get(cmd_name)
        if where is None:
            return None
        module, _, attribute = where.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def _shown(self, ctx: click.Context) -> list[str]:
        """Without those only the program itself calls."""
        return [name for name in self.lazy if not getattr(self.get_command(ctx, name), "hidden", False)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is none of that name, and remember which one runs."""
        try:
            found = super().resolve_command(ctx, args)
            ctx.meta[PATH] = f"{ctx.command_path} {found[0]}"
            return found
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self._shown(ctx), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self._shown(ctx))}"
            raise click.UsageError(error.message.rstrip(".") + hint, ctx) from None


PATH = "flanctl.path"
COMPLETE = "_FLANCTL_COMPLETE"
"""The variable by which a completion script asks, click's name for it."""
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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
        "agent": "flanctl.commands.agent:agent",
        "status": "flanctl.commands.status:status",
        "docker-opts": "flanctl.commands.docker_opts:docker_opts",
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
    that runs flannel, /etc/sysconfig/flanneld is read too.

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

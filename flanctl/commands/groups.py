"""Groups of commands, each imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import click

from flanctl.text import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "flanctl.path"
"""Where in `click.Context.meta` the running command's name stands."""
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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
            near = nearest(args[0], self._shown(ctx))
            hint = f"; did you mean {near}?" if near else f"; there are {', '.join(self._shown(ctx))}"
            raise click.UsageError(error.message.rstrip(".") + hint, ctx) from None

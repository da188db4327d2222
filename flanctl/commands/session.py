"""The running command's registry: `registry/session.py` with the settings of the command line.

with session() as registry:
    table = registry.leases().table()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanctl.commands import output
from flanctl.commands.options import debugging, settings
from flanctl.registry import session as registry
from flanctl.registry.session import Session, connection, dialect_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from flanctl.settings import Settings

__all__ = ["Session", "both_apis", "connection", "dialect_of", "session"]


def session(chosen: Settings | None = None, *, create: bool = False) -> AbstractContextManager[Session]:
    """Open the registry of `chosen`, else of the running command; making it (a file) only with `create`."""
    return registry.session(chosen or settings(), create=create, say=_say)


def both_apis(to_endpoints: tuple[str, ...] = ()) -> AbstractContextManager[tuple[Session, Session]]:
    """etcd v2 and v3 of the running command's servers."""
    return registry.both_apis(settings(), to_endpoints=to_endpoints, say=_say)


def _say(sentence: str, warning: bool) -> None:
    if warning:
        output.warning(sentence)
    elif debugging():
        output.note(sentence)

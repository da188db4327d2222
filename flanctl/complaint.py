"""How a command ends: an error becomes text and an exit code here, for every way a command line is understood."""

from __future__ import annotations

import sys

from flanctl import streams
from flanctl.errors import INTERRUPTED, FlanctlError
from flanctl.text import printable

TYPE_CHECKING = False  # typing would be a third of a short program's start
if TYPE_CHECKING:
    from collections.abc import Callable


def ended(run: Callable[[], int], say: Callable[[FlanctlError], None]) -> int:
    """Run a command to its end and return its exit code; `say` tells of an error. No traceback reaches a user."""
    try:
        code = run()
    except FlanctlError as error:
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        streams.say("interrupted\n")
        code = INTERRUPTED
    except BrokenPipeError:
        return streams.quiet_end()
    except Exception as error:  # the last line of defence
        if isinstance(error, OSError) and error.errno in streams.LOST and error.filename is None:
            return streams.unwritable(error, 1)  # an unbuffered stdout says so before the end
        bug = _damaged() or FlanctlError(
            f"unexpected {type(error).__name__}: {error}",
            hint="run it again with --debug and report what it prints",
            id="bug",
        )
        bug.__cause__ = error
        say(bug)
        code = bug.exit_code
    return streams.flushed(code)


def _damaged() -> FlanctlError | None:
    """Code of an altered executable fails like a bug, and is none."""
    if not getattr(sys, "frozen", False):
        return None
    import _frozen

    if not (why := _frozen.damage()):
        return None
    return FlanctlError(
        f"this file is damaged: {why}",
        hint="copy it again and compare it with flanctl.sha256",
        id="damaged",
    )


def complain(path: str, error: FlanctlError, *, form: str = "table", debug: bool = False) -> None:
    """Say on stderr what `path` (`flanctl subnets ls`) ran into, as a document if the answer would have been one."""
    if form == "json":
        from json import dumps

        shown = {
            "exit": error.exit_code,
            "id": error.id,
            "message": error.message,
            "details": list(error.details),
            "try": error.hint,
        }
        streams.say(dumps({"schema": 1, "error": shown}, ensure_ascii=False) + "\n")
    else:
        lines = [f"{path}: {error.message}", *(f"  {line}" for line in error.details)]
        if error.hint:
            lines.append(f"try: {error.hint}")
        streams.say("\n".join(map(printable, lines)) + "\n")
    if debug:
        from traceback import format_exception

        streams.say("".join(format_exception(error)))

"""stdout and stderr at a program's beginning and end: UTF-8, closed, full, or read by nobody any more."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False  # typing would be a third of a short program's start
if TYPE_CHECKING:
    from typing import TextIO

LOST = {errno.ENOSPC, errno.EBADF}
"""What a write of the answer ends with when it goes nowhere."""


def speak_utf8() -> None:
    """Values may hold anything UTF-8 can; a C locale must not turn them into a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def out() -> TextIO:
    """stdout. Raises OSError where the parent has closed it: an answer nobody gets is no success."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sys.stdout


def say(text: str) -> None:
    """Write to stderr."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, AttributeError, ValueError):
        pass  # stderr is closed or full: nobody is left to tell


def flushed(code: int) -> int:
    """Answers sit in a buffer: a full disk shows itself only now, and must not look like success."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return quiet_end()
    except OSError as error:
        return unwritable(error, code)
    return code


def unwritable(error: OSError, code: int) -> int:
    """Say that the answer is lost."""
    say(f"flanctl: cannot write the answer to standard output: {error.strerror}\n")
    _drop_stdout()
    return code or 1


def quiet_end() -> int:
    """The reader (`| head`) has seen enough."""
    _drop_stdout()
    return 0


def _drop_stdout() -> None:
    """What is still buffered has nowhere to go; the interpreter's own flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

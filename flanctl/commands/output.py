"""How answers look. stdout carries the answer and nothing else; notes go to stderr.

`table` is for people and may change; `simple` (one item a line, tabs, no header, `-` nothing, `?` unknown) and
`json` (one document, `"schema": 1`) are promises: columns and fields are only ever added.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from flanctl import streams
from flanctl.errors import FlanctlError
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = 1


def data(text: str) -> None:
    """Write one piece of the answer to stdout; a line end is added."""
    streams.out().write(text + "\n")


def line(text: str) -> None:
    """One line for people that may hold what strangers wrote."""
    data(printable(text))


def note(text: str) -> None:
    """Say something beside the answer."""
    try:
        sys.stderr.write(printable(text) + "\n")
    except (OSError, ValueError, AttributeError):
        pass  # nobody reads stderr; a note never decides how a command ends


def warning(text: str) -> None:
    note(f"warning: {text}")


def json(document: Mapping[str, object]) -> None:
    """One JSON document on one line, the schema number first."""
    from json import dumps

    data(dumps({"schema": SCHEMA, **document}, ensure_ascii=False))


def simple(rows: Sequence[Sequence[object]]) -> None:
    """Tab-separated rows; None prints as `-`."""
    lines = []
    for row in rows:
        cells = ["-" if cell is None else str(cell) for cell in row]
        if not "".join(cells).isprintable():
            cells = list(map(printable, cells))
        lines.append("\t".join(cells) + "\n")
    # Piece by piece: a stream is flushed at each write, and twenty thousand lines are no reason for as many calls.
    for start in range(0, len(lines), 1000):
        streams.out().write("".join(lines[start : start + 1000]))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Aligned columns below upper-case titles; those named in `numbers` stand to the right."""
    from tabulate import tabulate

    text = tabulate(
        [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows],
        headers=list(headers),
        tablefmt="plain",
        disable_numparse=True,
        colalign=["right" if header in numbers else "left" for header in headers] if rows else None,
    )
    for line in text.splitlines():
        data(line.rstrip())


def pairs(items: Sequence[tuple[str, object]]) -> None:
    """Name and value, one a line."""
    width = max(len(name) for name, _ in items)
    for name, value in items:
        data(f"{name:<{width}}  {printable(str(value))}")


def flush() -> None:
    """Send on what was written: a stream is read line by line. Raises BrokenPipeError when nobody reads any more."""
    streams.out().flush()


def refuse_without_reader() -> None:
    """Raises BrokenPipeError if stdout is a pipe whose reader is gone, which a write would find out only later."""
    import select

    poll = select.poll()
    poll.register(streams.out().fileno(), 0)
    if any(state & select.POLLERR for _, state in poll.poll(0)):
        raise BrokenPipeError


class Progress:
    """How far long work is, on stderr: on a terminal one line that is rewritten, after a second; else a line after ten
    seconds and each half minute.

        with Progress("asking for TTLs") as progress:
            progress(500, 20000)
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._next = time.monotonic() + (1.0 if self._terminal else 10.0)
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown and self._terminal:
            self._write("\r\x1b[K")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.1 if self._terminal else 30.0)
        self._shown = True
        text = f"{self._what}: {done} of {total}"
        self._write(f"\r\x1b[K{text}" if self._terminal else text + "\n")

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            pass  # like a note


def confirm(question: str) -> None:
    """Ask on the terminal. Raises FlanctlError (id `declined`) for anything but yes."""
    try:
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        note("nothing was changed")
        raise
    if answer.strip().lower() not in {"y", "yes"}:
        raise FlanctlError("nothing was changed", id="declined")


def can_ask() -> bool:
    """Whether somebody sits at both ends of a question."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty())


def timestamp(ahead: float = 0.0) -> str:
    """RFC 3339 in UTC, `ahead` seconds from now."""
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(seconds=ahead)).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(seconds: float | None) -> str:
    """`12s`, `4m`, `3h10m`, `2d4h`; `never` for None."""
    if seconds is None:
        return "never"
    left = int(max(seconds, 0))
    if left < 60:
        return f"{left}s"
    minutes, hours, days = left // 60, left // 3600, left // 86400
    if minutes < 60:
        return f"{minutes}m"
    if hours < 48:
        rest = minutes % 60
        return f"{hours}h{rest:02d}m" if rest else f"{hours}h"
    rest = hours % 24
    return f"{days}d{rest}h" if rest else f"{days}d"

"""How answers look. stdout carries the answer and nothing else; notes go to stderr.

`table` is for people and may change; `simple` (one item a line, tabs, no header, `-` nothing, `?` unknown) and
`json` (one document, `"schema": 1`) are promises: columns and fields are only ever added.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = 1


def data(text: str) -> None:
    """Write one piece of the answer to stdout; a line end is added."""
    sys.stdout.write(text + "\n")


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
    for row in rows:
        data("\t".join("-" if cell is None else printable(str(cell)) for cell in row))


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

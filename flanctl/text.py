"""Text from strangers on its way to a terminal or a log, and words that were meant to be others."""

from __future__ import annotations

TYPE_CHECKING = False  # mk-docker-opts.sh's start is short
if TYPE_CHECKING:
    from collections.abc import Iterable


def printable(text: str) -> str:
    """Control characters as `\\x1b`: a value from the network must not steer a terminal or fake a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one that was probably meant; - and _, capitals and small letters are the same."""
    from difflib import get_close_matches

    plain = {each.replace("-", "_").lower(): each for each in known}
    near = get_close_matches(name.replace("-", "_").lower(), list(plain), n=1)
    return plain[near[0]] if near else None

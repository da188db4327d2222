"""Text from strangers on its way to a terminal or a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """Control characters as `\\x1b`: a value from the network must not steer a terminal or fake a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)

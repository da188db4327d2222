"""The flag grammar of Go's `flag` package, which flanneld's command line and FLANNEL_OPTIONS speak.

    words = ["-iface", "eth0", "--ip-masq", "extra"]
    [(given.name, given.text) for given in flags_in(words, switches={"ip-masq"})]
    # [("iface", "eth0"), ("ip-masq", None)]; words is now ["extra"]

One or two dashes are the same. A value stands behind `=` or in the next word, whatever that looks like; a switch takes
it behind `=` only. The first word that is no flag, `-` alone and `--` end the flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
"""strconv.ParseBool"""


class BadFlag(Exception):
    """A word of the command line that Go would refuse; the text is Go's."""


@dataclass(frozen=True, slots=True)
class Given:
    """One flag as it was written. `text` is None for a switch alone and for a flag whose value is missing."""

    name: str
    text: str | None


def flags_in(words: list[str], switches: Collection[str]) -> Iterator[Given]:
    """The flags, taken away from the front of `words`; what is left there at the end is no flag.

    A name that is not in `switches` takes a value. Raises BadFlag for a word such as `---x` or `-=x`.
    """
    while words and len(words[0]) > 1 and words[0].startswith("-"):
        word = words.pop(0)
        if word == "--":
            return
        name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise BadFlag(f"bad flag syntax: {word}")
        if equals:
            yield Given(name, text)
        elif name in switches or not words:
            yield Given(name, None)
        else:
            yield Given(name, words.pop(0))


def boolean(text: str) -> bool:
    """strconv.ParseBool. Raises ValueError."""
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ValueError("parse error")


def integer(text: str) -> int:
    """strconv.ParseInt(text, 0, 64): decimal, 0x, 0o or 0, 0b; underscores between digits. Raises ValueError."""
    if not text.isascii() or text != text.strip():
        raise ValueError("parse error")
    sign, digits = (text[0], text[1:]) if text[:1] in {"+", "-"} else ("", text)
    if len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567_":
        digits = "0o" + digits[1:]
    try:
        if not digits[:1].isdigit():
            raise ValueError("sign")
        number = int(sign + digits, 0)
    except ValueError:
        raise ValueError("parse error") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError("value out of range")
    return number

"""JSON read with positions, and written as Go's encoding/json writes it.

The standard library's parser tells neither where a value stands nor how a number was spelt, takes NaN, and keeps
the last of two equal keys without a word. A config error must name line and column, and a lease we rewrite must
keep the bytes flannel wrote; so this small scanner reads both.

    text, at, value = parse(b'{"VNI": 1}', name="net.json")
    write(plain(value), short_escapes=True)          # '{"VNI":1}'
"""

from __future__ import annotations

import re
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple, Self

from flanctl.errors import Invalid

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_BYTES = 1_000_000
"""Longest text we read. etcd refuses values above 1.5 MB; a flannel config has about 100 bytes."""

MAX_DEPTH = 64
"""Deepest nesting we read. flannel's own values have two levels; 10,000 of them are an attack, not a config."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_HEX = frozenset("0123456789abcdefABCDEF")
_WORD = re.compile(r"[A-Za-z]+")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS = {"true": True, "false": False, "null": None}


class JsonError(Invalid):
    """Where a JSON text is wrong. `line` and `column` count characters from 1; `field` is the key concerned."""

    def __init__(
        self, name: str, text: str, at: int, what: str, *, field: str | None = None, hint: str | None = None
    ) -> None:
        self.line, self.column = position(text, at)
        self.field = field
        super().__init__(f"{name} line {self.line}, column {self.column}: {what}", hint=hint)


class Number(float):
    """A number that `int` would print differently: 1e3, 0.10, -0. `text` is how it was written."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Number) else float.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


class Escaped(str):
    """A string written with escapes; `token` is how, with its quotes."""

    __slots__ = ("token",)
    token: str


class Member(NamedTuple):
    """One key of an object: where the key and where its value starts."""

    name: str
    name_at: int
    value: object
    at: int


class Object(list[Member]):
    """An object as written: every key in its order, equal ones too."""


def position(text: str, at: int) -> tuple[int, int]:
    """Line and column, from 1, of the character at offset `at`."""
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def fold(name: str) -> str:
    """Go's encoding/json matches keys without regard to case, so we compare them by this."""
    return name.casefold()


def parse(text: bytes | str, *, name: str, error: type[JsonError] = JsonError) -> tuple[str, int, object]:
    """Read one JSON value: the decoded text, the offset in it of the value, the value. Raises `error`.

    Objects come as `Object`, lists as `list`. `name` is what the text is called in errors.
    """
    decoded = _decode(text, name, error)
    scanner = _Scanner(decoded, name, error)
    at = scanner.skip(0)
    if at == len(decoded):
        raise scanner.failure(at, "the text is empty, a JSON object is expected")
    value, end = scanner.value(at, 0)
    end = scanner.skip(end)
    if end != len(decoded):
        raise scanner.failure(end, f"unexpected {_show(decoded, end)} after the end of the JSON value")
    return decoded, at, value


def _decode(text: bytes | str, name: str, error: type[JsonError]) -> str:
    """UTF-8 of at most MAX_BYTES without a byte order mark. Raises `error`."""
    if len(text) > MAX_BYTES:
        raise error(name, "", 0, f"the text has {len(text)} bytes, at most {MAX_BYTES} are read")
    if isinstance(text, str):
        decoded = text
        try:
            text.encode()
        except UnicodeEncodeError as reason:
            what = f"U+{ord(text[reason.start]):04X} is half of a surrogate pair, not a character"
            raise error(name, text, reason.start, what) from None
    elif text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise error(name, "", 0, "the text is UTF-16, UTF-8 is needed")
    else:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as reason:
            before = text[: reason.start].decode("utf-8")
            what = f"byte 0x{text[reason.start]:02x} is not UTF-8"
            raise error(name, before, len(before), what) from None
    if decoded.startswith("\ufeff"):
        what = "the text starts with a byte order mark, which flannel refuses"
        raise error(name, decoded, 0, what, hint="save it without")
    return decoded


def plain(value: object) -> object:
    """The same with dict for Object (of equal keys the last wins, as in Go)."""
    if isinstance(value, Object):
        return {member.name: plain(member.value) for member in value}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def show(text: str) -> str:
    """Foreign text for an error: in quotes, not too long, nothing in it that moves a terminal's cursor."""
    return f'"{repr(_short(text))[1:-1]}"'


def describe(value: object) -> str:
    """`value` for an error text: the number 17, null, a list."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return f"the number {_short(value.text)}"
    if isinstance(value, int):
        return f"the number {_short(str(value))}"
    if isinstance(value, str):
        return f"the string {show(value)}"
    return "an object" if isinstance(value, Object) else "a list"


def write(value: object, *, short_escapes: bool) -> str:
    """JSON as Go's json.Marshal writes it: no blanks, `<`, `>`, `&`, U+2028 and U+2029 escaped, the rest as UTF-8.

    `short_escapes`: backspace and form feed as `\\b` and `\\f` (Go ≥ 1.22), not as `\\u0008` and `\\u000c`.
    What was read with an unusual spelling (Number, Escaped) is written as it was read.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value.token if isinstance(value, Escaped) else quote(value, short_escapes=short_escapes)
    if isinstance(value, Number):
        return value.text
    if isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return repr(value)
    if isinstance(value, dict):
        pairs: Iterable[str] = (
            f"{write(name, short_escapes=short_escapes)}:{write(item, short_escapes=short_escapes)}"
            for name, item in value.items()
        )
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(write(item, short_escapes=short_escapes) for item in value) + "]"
    raise TypeError(f"{value!r} has no JSON form")


def quote(text: str, *, short_escapes: bool) -> str:
    """A JSON string as Go writes it."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # as Go: half a pair is U+FFFD
    return '"' + text.translate(_SHORT if short_escapes else _LONG) + '"'


_LONG: dict[int, str] = {code: f"\\u{code:04x}" for code in (*range(0x20), *b"<>&", 0x2028, 0x2029)}
_LONG |= {ord('"'): '\\"', ord("\\"): "\\\\", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_SHORT = _LONG | {ord("\b"): "\\b", ord("\f"): "\\f"}


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _show(text: str, at: int) -> str:
    if at >= len(text):
        return "end of text"
    word = _WORD.match(text, at)
    return show(word[0] if word else text[at])


class _Scanner:
    """RFC 8259, nothing more: methods take an offset and return what they read and the offset behind it."""

    __slots__ = ("error", "name", "text")

    def __init__(self, text: str, name: str, error: type[JsonError]) -> None:
        self.text = text
        self.name = name
        self.error = error

    def failure(self, at: int, what: str, hint: str | None = None) -> JsonError:
        return self.error(self.name, self.text, at, what, hint=hint)

    def skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        return match.end() if match else at

    def value(self, at: int, depth: int) -> tuple[object, int]:
        text = self.text
        first = text[at : at + 1]
        if first == '"':
            return self.string(at)
        if first == "{":
            return self.members(at, depth)
        if first == "[":
            return self.array(at, depth)
        if match := _NUMBER.match(text, at):
            return self.number(at, match)
        if match := _WORD.match(text, at):
            if match[0] in _LITERALS:
                return _LITERALS[match[0]], match.end()
            if match[0].lower() in _LITERALS:
                raise self.failure(at, f"{match[0]} must be written {match[0].lower()}")
            raise self.failure(at, f"{_show(text, at)} is not a JSON value", hint="text needs double quotes")
        if first == "'":
            raise self.failure(at, "text needs double quotes, not single ones")
        if first in ("/", "#"):
            raise self.failure(at, "JSON has no comments")
        raise self.failure(at, f"a value is expected, found {_show(text, at)}")

    def number(self, at: int, match: re.Match[str]) -> tuple[int | Number, int]:
        written = match[0]
        if match[1] is None and match[2] is None and written != "-0" and len(written) <= 300:
            return int(written), match.end()
        number = Number(written)
        if not isfinite(number):
            raise self.failure(at, f"the number {_short(written)} is too large")
        return number, match.end()

    def string(self, at: int) -> tuple[str, int]:
        text = self.text
        parts: list[str] = []
        here = at + 1
        while True:
            match = _PLAIN.match(text, here)
            end = match.end() if match else here
            stop = text[end : end + 1]
            if stop == '"':
                if not parts:
                    return text[here:end], end + 1
                parts.append(text[here:end])
                escaped = Escaped("".join(parts))
                escaped.token = text[at : end + 1]
                return escaped, end + 1
            if stop == "":
                raise self.failure(at, "the string is not closed")
            if stop != "\\":
                raise self.failure(
                    end,
                    f"control character U+{ord(stop):04X} in a string",
                    hint="is a closing quote missing?",
                )
            parts.append(text[here:end])
            character, here = self.escape(end)
            parts.append(character)

    def escape(self, at: int) -> tuple[str, int]:
        kind = self.text[at + 1 : at + 2]
        if kind in _ESCAPES:
            return _ESCAPES[kind], at + 2
        if kind != "u":
            raise self.failure(at, f"{show(self.text[at : at + 2])} is not a JSON escape")
        code = self.hex4(at)
        if 0xD800 <= code < 0xDC00 and self.text[at + 6 : at + 8] == "\\u":
            low = self.hex4(at + 6)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + low - 0xDC00), at + 12
        if 0xD800 <= code < 0xE000:
            raise self.failure(at, f"\\u{code:04x} is half of a surrogate pair, not a character")
        return chr(code), at + 6

    def hex4(self, at: int) -> int:
        digits = self.text[at + 2 : at + 6]
        if len(digits) < 4 or not _HEX.issuperset(digits):
            raise self.failure(at, "\\u needs four hexadecimal digits")
        return int(digits, 16)

    def deeper(self, at: int, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise self.failure(at, f"more than {MAX_DEPTH} levels of nesting")
        return depth + 1

    def members(self, at: int, depth: int) -> tuple[Object, int]:
        text = self.text
        depth = self.deeper(at, depth)
        members = Object()
        here = self.skip(at + 1)
        if text[here : here + 1] == "}":
            return members, here + 1
        while True:
            if text[here : here + 1] != '"':
                raise self.failure(here, f"a key in double quotes is expected, found {_show(text, here)}")
            name, end = self.string(here)
            colon = self.skip(end)
            if text[colon : colon + 1] != ":":
                raise self.failure(colon, f"':' is expected after the key, found {_show(text, colon)}")
            value_at = self.skip(colon + 1)
            value, end = self.value(value_at, depth)
            members.append(Member(name, here, value, value_at))
            end = self.skip(end)
            if text[end : end + 1] == "}":
                return members, end + 1
            here = self.comma(end, "}")

    def array(self, at: int, depth: int) -> tuple[list[object], int]:
        text = self.text
        depth = self.deeper(at, depth)
        items: list[object] = []
        here = self.skip(at + 1)
        if text[here : here + 1] == "]":
            return items, here + 1
        while True:
            item, end = self.value(here, depth)
            items.append(item)
            end = self.skip(end)
            if text[end : end + 1] == "]":
                return items, end + 1
            here = self.comma(end, "]")

    def comma(self, at: int, close: str) -> int:
        if self.text[at : at + 1] != ",":
            raise self.failure(at, f"',' or '{close}' is expected, found {_show(self.text, at)}")
        here = self.skip(at + 1)
        if self.text[here : here + 1] == close:
            raise self.failure(at, f"',' before '{close}' is one too many")
        return here

"""Files of `NAME=value` lines as systemd reads them for `EnvironmentFile=`, and `$NAME` as its ExecStart splits it.

    environment(b'FLANNEL_OPTIONS="--iface=eth0 \\\\\\n  --ip-masq"  \\n')   # {"FLANNEL_OPTIONS": "--iface=eth0   --ip-masq"}
    split("--iface=eth0 '--log_dir=/var/log/a b'")                       # ["--iface=eth0", "--log_dir=/var/log/a b"]

Not a shell's grammar: nothing is expanded, a quote may hold line ends, text beside a quote belongs to the value, a comment
stands on a line of its own, and a carriage return ends a line. Rules: parse_env_file_internal (src/basic/env-file.c),
env_name_is_valid (env-util.c), extract_first_word with RELAX and UNQUOTE (extract-word.c); recorded from systemd 252 and
257 in tests/vectors/environment-file.json.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False  # every command reads settings, few a file: no import that is not needed
if TYPE_CHECKING:
    from collections.abc import Iterator

BLANK = " \t\n\r"
LINE_END = "\n\r"
COMMENT = "#;"
KEEPS_NO_BACKSLASH = '"\\`$'
"""Behind a backslash inside of double quotes; every other character keeps its backslash."""


class Unreadable(Exception):
    """systemd takes nothing from such a file; the text says why, `id` in a word, `line` where (0: the whole of it)."""

    def __init__(self, id: str, why: str, line: int = 0) -> None:  # noqa: A002  the word users see is `id`
        super().__init__(why)
        self.id = id
        self.line = line


@dataclass(slots=True)
class Entry:
    """One line that is neither empty nor a comment, with the lines it goes on over.

    `text` is None where there is no `=`: systemd passes over it. `unclosed` is the line of the quote that never ends,
    `beside` says that text stands right or left of a quoted part, which a shell or a reader may take otherwise.
    """

    line: int
    name: str
    text: str | None = None
    unclosed: int = 0
    beside: bool = False

    @property
    def counts(self) -> bool:
        """Whether systemd sets it: only names of ASCII letters, digits and _ do."""
        return self.text is not None and self.name.isascii() and self.name.isidentifier()


def environment(content: bytes) -> dict[str, str]:
    """What systemd adds to the process's environment; the last of a name wins. Raises Unreadable."""
    return {entry.name: entry.text or "" for entry in parse(content) if entry.counts}


def parse(content: bytes, *, old_comments: bool = False) -> list[Entry]:
    """All lines in their order, those that set nothing too. Raises Unreadable.

    `old_comments`: as systemd did before 254, where a backslash at a comment's end made the next line one too.
    """
    if b"\0" in content:
        if _is_utf16(content):
            raise Unreadable("utf16", "it is UTF-16, not UTF-8")
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise Unreadable("nul", "it holds a NUL byte", line)
    entries = list(_entries(content.decode(errors="surrogateescape"), old_comments))
    for entry in entries:
        if entry.text is not None and not (_is_text(entry.name) and _is_text(entry.text)):
            raise Unreadable("not-utf8", "it is not UTF-8", entry.line)
    return entries


def _entries(content: str, old_comments: bool) -> Iterator[Entry]:
    entry: Entry | None = None
    name: list[str] = []
    value: list[str] = []
    kept = 0  # how much of `value` stays when blanks at its end go
    state = "before name"
    line, opened = 1, 0
    parts, bare = 0, False

    def done() -> Entry:
        assert entry is not None
        entry.name = "".join(name).rstrip(BLANK)
        entry.text = "".join(value[:kept] if state == "value" else value)
        entry.unclosed = opened if state.startswith(("'", '"')) else 0
        entry.beside = parts > 1 or (parts == 1 and bare)
        return entry

    for char in content:
        if state == "before name":
            if char in COMMENT:
                state = "comment"
            elif char not in BLANK:
                entry, name, value, kept, parts, bare = Entry(line, ""), [char], [], 0, 0, False
                state = "name"
        elif state == "name":
            if char in LINE_END:
                assert entry is not None
                entry.name = "".join(name).rstrip(BLANK)
                yield entry
                state = "before name"
            elif char == "=":
                state = "before value"
            else:
                name.append(char)
        elif state in {"before value", "value"}:
            if char in LINE_END:
                yield done()
                state = "before name"
            elif char == "\\":
                state = "escape"
            elif state == "before value" and char in "'\"":
                state, opened, parts = char, line, parts + 1
            elif state == "value" or char not in BLANK:
                value.append(char)
                bare = True
                state = "value"
                if char not in BLANK:
                    kept = len(value)
        elif state == "escape":
            state = "value"
            if char not in LINE_END:
                value.append(char)
                bare = True
            kept = len(value)
        elif state in {"'", '"'}:
            if char == state:
                state = "before value"
            elif char == "\\" and state == '"':
                state = '"escape'
            else:
                value.append(char)
        elif state == '"escape':
            state = '"'
            if char in KEEPS_NO_BACKSLASH:
                value.append(char)
            elif char != "\n":
                value += "\\", char
        elif state == "comment":
            if char == "\\":
                state = "comment escape"
            elif char in LINE_END:
                state = "before name"
        elif char in LINE_END and not old_comments:  # a comment's backslash
            state = "before name"
        else:
            state = "comment"
        line += char == "\n"
    if state in {"before value", "value", "escape", "'", '"', '"escape'}:
        yield done()
    elif state == "name" and entry is not None:
        entry.name = "".join(name).rstrip(BLANK)
        yield entry


def split(text: str) -> list[str]:
    """The words that `$NAME`, alone in an ExecStart= line, becomes. Quotes that do not end are let pass, as there."""
    return _words(text)[0]


def unbalanced(text: str) -> bool:
    """Whether `split` came to the end inside of a quote."""
    return bool(_words(text)[1])


def _words(text: str) -> tuple[list[str], str]:
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    escaped = False
    for char in text:
        if word is None:
            if char in BLANK:
                continue
            word = []
        if escaped:
            word.append(char)
            escaped = False
        elif char == "\\":
            escaped = True
        elif quote:
            if char == quote:
                quote = ""
            else:
                word.append(char)
        elif char in "'\"":
            quote = char
        elif char in BLANK:
            words.append("".join(word))
            word = None
        else:
            word.append(char)
    if word is not None:
        words.append("".join(word))
    return words, quote


def quoted(text: str) -> str:
    """`text` as the right side of a line that reads back the same."""
    escaped = "".join("\\" + char if char in KEEPS_NO_BACKSLASH else char for char in text)
    return f'"{escaped}"'


def _is_utf16(content: bytes) -> bool:
    return content.startswith((b"\xff\xfe", b"\xfe\xff")) or content[:200].count(b"\0") * 3 > len(
        content[:200]
    )


def _is_text(text: str) -> bool:
    """systemd's utf8_is_valid: no broken bytes, no surrogates, none of Unicode's noncharacters."""
    return text.isascii() or not any(
        0xD800 <= (point := ord(char)) < 0xE000 or 0xFDD0 <= point < 0xFDF0 or point & 0xFFFE == 0xFFFE
        for char in text
    )

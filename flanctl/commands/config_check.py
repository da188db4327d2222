"""What is wrong with the places settings come from, each named by file and line, with its cause and the next step.

Everything is found in one look, where reading the settings ends at the first. `fail`: flanneld or flanctl ends with an
error, reads something else than is meant, or shows a secret. `warn`: without effect, or likely a slip.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.environment_file import Entry, Unreadable, parse, split, unbalanced
from flanctl.errors import FlanctlError, NotFound, NotPermitted, UsageError
from flanctl.flanneld_flags import FLAGS
from flanctl.flanneld_line import NEVER_EMPTY, read, read_environment, remarks
from flanctl.frozen import SHOW_MODULES
from flanctl.settings import (
    MAX_BYTES,
    OPTIONS,
    TABLE,
    WRITE_OUT,
    Settings,
    Value,
    masked,
    resolve,
    toml_entries,
    toml_row,
)
from flanctl.text import nearest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from flanctl.flanneld_line import CommandLine

FAIL, WARN = "fail", "warn"
ENVIRONMENT = "environment"
NO_BLANK = {"address", "path"}
"""Kinds whose empty value ends flanneld, where the setting has a default."""
OURS = {variable: row for row in TABLE.values() for variable in row.variables()}
THEIRS = {flag.variable: flag for flag in FLAGS.values()}
KNOWN = (*OURS, *THEIRS, OPTIONS, WRITE_OUT.variable, SHOW_MODULES)
MADE_BY_FLANNEL = {"FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"}
"""subnet.env's, which scripts load into their environment."""
NEXT = {
    "bad-flag": "correct the flag in FLANNEL_OPTIONS",
    "bad-value": "correct the value; flanneld --help shows each flag with its default",
    "contradiction": "keep the one that is meant, delete the other",
    "dead-flag": "delete it; it does nothing here",
    "empty-value": "give a value, or delete the line",
    "password-seen": "put it into FLANNELD_ETCD_PASSWORD in a file that only root may read",
    "refused-flag": "delete it, or stay with flanneld on this host",
    "stray-word": "write flags as -name=value",
    "unknown-flag": "correct or delete it; flanneld --help lists all flags",
}


CONSEQUENCES = {"bad-flag", "bad-value", "contradiction", "stray-word"}
"""Not said of a line whose quoting is wrong: the next look will tell."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`id` is a promise for scripts; `line` 0 is the whole file (or the environment)."""

    severity: str
    id: str
    file: str
    line: int
    says: str
    next: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def check_file(path: str) -> list[Finding]:
    """A TOML file by its name's end, else an EnvironmentFile. Raises NotFound, NotPermitted."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise NotPermitted(f"{path} is no regular file")
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as error:
        raise NotPermitted(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        says = "it is larger than a megabyte and is not read"
        return [Finding(FAIL, "too-large", path, 0, says, "is this the right file?")]
    check = _toml if path.endswith(".toml") else _environment_file
    return sorted(check(path, content, mode), key=lambda finding: finding.line)


def check_environment(environment: Mapping[str, str]) -> list[Finding]:
    """The variables this process itself was given."""
    entries = [Entry(0, name, text) for name, text in environment.items() if name != OPTIONS]
    settings = resolve({}, environment=environment, toml_file=os.devnull, sysconfig_files=())
    return [*_unknown_names(ENVIRONMENT, entries), *_flannel(ENVIRONMENT, entries, settings)]


def check_together(settings: Settings) -> list[Finding]:
    """What only all sources in their order show: each value may be fine and both together nonsense."""
    found = []
    for one, other in (("cert", "key"), ("key", "cert"), ("password", "user"), ("password_file", "user")):
        if settings.optional(one) and not settings.optional(other):
            at = settings.values[one]
            says = f"{one} ({at.name}) means nothing without {other}"
            found.append(
                _at(at, FAIL if other != "user" else WARN, "contradiction", says, f"give {other} too")
            )
    tls = [name for name in ("cacert", "cert") if settings.optional(name)]
    endpoints = settings.items("endpoints")
    if tls and endpoints and all(each.startswith("http:") for each in endpoints):
        at = settings.values[tls[0]]
        says = f"{tls[0]} ({at.name}) is not used: every endpoint is http ({settings.source('endpoints')})"
        found.append(_at(at, WARN, "contradiction", says, "write https:// in the endpoints, or delete it"))
    for name in ("key", "password_file"):
        path = settings.optional(name)
        if path and (mode := _mode(path)) and mode & stat.S_IROTH:
            found.append(_readable(path, 0, mode, f"the {name.replace('_', ' ')}"))
    return found


def _at(value: Value, severity: str, name: str, says: str, step: str) -> Finding:
    return Finding(severity, name, value.file or ENVIRONMENT, value.line, says, step)


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:
        return None  # whoever uses it says so


def _readable(path: str, line: int, mode: int, what: str) -> Finding:
    says = f"everyone on this host may read {what} (mode {stat.S_IMODE(mode):04o})"
    return Finding(FAIL, "secret-readable", path, line, says, f"chmod 600 {path}")


# ---- TOML -----------------------------------------------------------------------------------------------------------


def _toml(path: str, content: bytes, mode: int) -> Iterator[Finding]:
    if content.startswith(b"\xef\xbb\xbf"):
        says = "the file begins with a byte order mark, which TOML does not have"
        yield Finding(FAIL, "byte-order-mark", path, 1, says, f"sed -i '1s/^\\xEF\\xBB\\xBF//' {path}")
        return
    try:
        entries = toml_entries(content, path)
    except UsageError as error:
        at = re.search(r"line (\d+)|:(\d+): ", error.message.removeprefix(path))
        number = int(at[1] or at[2]) if at else content.count(b"\n") + 1
        says = error.message.rpartition(f"{path}")[2].lstrip(":0123456789 ")
        yield Finding(FAIL, "bad-toml", path, number, says, "correct the line; TOML wants quotes around text")
        return
    for key, _, line in entries:
        try:
            row = toml_row(key, path, line)
        except UsageError as error:
            says = error.message.removeprefix(f"{path}:{line}: ")
            step = "correct or delete it; docs/reference/settings.md lists all"
            yield Finding(FAIL, "unknown-name", path, line, says, step)
            continue
        if row.secret and mode & stat.S_IROTH:
            yield _readable(path, line, mode, "the password")
    try:
        settings = resolve({}, environment={}, toml_file=path, sysconfig_files=())
    except UsageError as error:
        if not error.message.startswith(f"{path}:") or "unknown setting" in error.message:
            return
        at = re.match(r":(\d+): ", error.message.removeprefix(path))
        says = error.message.removeprefix(path).lstrip(":0123456789 ")
        yield Finding(FAIL, "bad-value", path, int(at[1]) if at else 0, says, "give one value, or a list")
    else:
        yield from _values(path, settings)


def _values(path: str, settings: Settings, said: Collection[str] = ()) -> Iterator[Finding]:
    """Values that are none of their kind, of those this place gives; not of the variables and flags in `said`."""
    from flanctl.registry.config import clean_prefix
    from flanctl.registry.stores.endpoints import parse_endpoints

    for name, value in settings.values.items():
        if (value.file or ENVIRONMENT) != path or value.name == "default":
            continue
        if (f"-{TABLE[name].flanneld}" if value.name == OPTIONS else value.name) in said:
            continue
        try:
            settings.check(name)
            if name == "prefix":
                clean_prefix(value.text)
            elif name == "endpoints" and value.text and not value.text.startswith("sqlite:"):
                parse_endpoints([value.text])
        except FlanctlError as error:
            says = error.message.replace(f" (from {value.source})", "")
            yield Finding(FAIL, "bad-value", path, value.line, f"{value.name}: {says}", "correct the value")


# ---- sysconfig ------------------------------------------------------------------------------------------------------


def _environment_file(path: str, content: bytes, mode: int) -> Iterator[Finding]:
    try:
        entries = parse(content)
    except Unreadable as error:
        says = (
            f"{error}; systemd does not start a unit with such a file, or leaves it out (EnvironmentFile=-)"
        )
        step = (
            f"iconv -f UTF-16 -t UTF-8 {path} >new && cat new >{path}"
            if error.id == "utf16"
            else "write the line anew"
        )
        yield Finding(FAIL, error.id, path, error.line, says, step)
        return
    odd = [*_bytes(path, content, entries), *(each for entry in entries for each in _line(path, entry))]
    yield from odd
    for entry in entries:
        if _holds_secret(entry) and mode & stat.S_IROTH:
            yield _readable(path, entry.line, mode, f"the password in {entry.name}")
    last = {entry.name: entry for entry in entries if entry.counts}
    for entry in entries:
        if entry.counts and last[entry.name] is not entry and last[entry.name].text != entry.text:
            says = f"{entry.name} is set again in line {last[entry.name].line}, which counts"
            yield Finding(WARN, "contradiction", path, entry.line, says, "delete one of the two")
    yield from _unknown_names(path, list(last.values()))
    unclosed = any(entry.unclosed for entry in last.values())
    if not unclosed:  # else what stands behind the quote belongs to no value that was meant
        settings = resolve({}, environment={}, toml_file=os.devnull, sysconfig_files=(path,))
        caused = {_begin(entries, each.line) for each in odd if each.severity == FAIL}
        for finding in _flannel(path, list(last.values()), settings):
            if finding.id not in CONSEQUENCES or finding.line not in caused:
                yield finding


def _begin(entries: list[Entry], line: int) -> int:
    """The first line of the entry that goes on over `line`."""
    return max((entry.line for entry in entries if entry.line <= line), default=0)


def _bytes(path: str, content: bytes, entries: list[Entry]) -> Iterator[Finding]:
    if content.startswith(b"\xef\xbb\xbf"):
        lost = bool(entries) and entries[0].line == 1 and entries[0].text is not None
        says = "the file begins with a byte order mark" + (
            f"; systemd does not know the variable {entries[0].name.lstrip(chr(0xFEFF))}" if lost else ""
        )
        step = f"sed -i '1s/^\\xEF\\xBB\\xBF//' {path}"
        yield Finding(FAIL if lost else WARN, "byte-order-mark", path, 1, says, step)
    if b"\r\n" in content:
        at = content.count(b"\n", 0, content.index(b"\r\n")) + 1
        inside = next((entry for entry in entries if "\r" in (entry.text or "")), None)
        says = (
            f"lines end in CR LF, and one of them is now part of {inside.name}"
            if inside
            else "lines end in CR LF; systemd takes them, a shell that sources the file does not"
        )
        where = inside.line if inside else at
        yield Finding(FAIL if inside else WARN, "crlf", path, where, says, f"sed -i 's/\\r$//' {path}")
    older = parse(content, old_comments=True)
    if [(each.name, each.text) for each in older] != [(each.name, each.text) for each in entries]:
        kept = {each.line for each in older}
        lost_line = next((each.line for each in entries if each.line not in kept), 0)
        says = "the comment before ends in a backslash: systemd older than 254 takes this line as comment too"
        yield Finding(WARN, "comment-continues", path, lost_line, says, "take the backslash away")
    for number, line in enumerate(content.decode(errors="replace").split("\n"), 1):
        if re.search(r"\\[ \t]+\r?$", line) and not line.lstrip().startswith(("#", ";")):
            says = "a blank stands behind the backslash at the line's end: the line does not go on"
            yield Finding(FAIL, "broken-continuation", path, number, says, "delete the blank")


def _line(path: str, entry: Entry) -> Iterator[Finding]:
    name, line, text = entry.name, entry.line, entry.text
    if text is None:
        # The first word alone: behind it may stand a password, as in `FLANNELD_ETCD_PASSWORD: …`.
        (word, *_) = re.split(r"[:;\s]", name, maxsplit=1)
        says = f'"{_short(word)}" has no "="; systemd passes over the line'
        yield Finding(WARN, "no-assignment", path, line, says, "write NAME=value, or # before a comment")
        return
    if not entry.counts:
        if not name.startswith("\ufeff"):
            says = f'"{_short(name)}" is no name of a variable; systemd passes over the line'
            step = f"write {name.split()[-1]}=…" if name.startswith("export ") else "correct the name"
            yield Finding(FAIL, "bad-name", path, line, says, step)
        return
    ours = name in KNOWN
    if entry.unclosed:
        says = f"the quote of {name} is never closed: all lines behind it are part of the value"
        yield Finding(FAIL, "unclosed-quote", path, entry.unclosed, says, "close it at the line's end")
        return
    if not ours:
        return
    shown = "" if _holds_secret(entry) else f': it is read as "{_short(text)}"'
    if entry.beside:
        says = f"text stands beside the quoted part of {name} and belongs to the value{shown}"
        yield Finding(FAIL, "quoting", path, line, says, "put the whole value into one pair of quotes")
    elif re.search(r"\s[#;]", text) and name != OPTIONS:
        says = f"a comment behind a value belongs to it{shown}"
        yield Finding(FAIL, "quoting", path, line, says, "put the comment on a line of its own")
    elif re.search("[“”‘’„]" if name == OPTIONS else "[\"'“”‘’„]", text) and (
        name == OPTIONS or not _holds_secret(entry)
    ):
        says = f"quotes are part of {name}{shown}"
        yield Finding(FAIL, "quoting", path, line, says, "one pair of \" or ' around the whole value")
    if re.search(r"\$\{?[A-Za-z_]|\$\(|`", text) and not _holds_secret(entry):
        says = f"systemd expands nothing in a file: {name} holds the $ or ` as it stands"
        yield Finding(FAIL, "no-expansion", path, line, says, "write the value itself")
    if name == OPTIONS and unbalanced(text):
        says = f"a quote inside of {name} is never closed; the words behind it are one"
        yield Finding(FAIL, "unclosed-quote", path, line, says, "close it, or leave it out")


def _short(text: str) -> str:
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= 60 else text[:57] + "…"


def _holds_secret(entry: Entry) -> bool:
    row, text = OURS.get(entry.name), entry.text or ""
    if row is not None:
        return row.secret or masked(row.name, text) != text
    if entry.name != OPTIONS:
        return False
    # As text, too: flannel stops reading at the first stray word, and what stands behind it is as secret.
    if "etcd-password" in text or re.search(r"//[^/\s]*@", text):
        return True
    given = read(split(text)).flags
    return any(
        masked(name, given.get(flag, "")) != given.get(flag, "")
        for name, flag in (("user", "etcd-username"), ("endpoints", "etcd-endpoints"))
    )


def _unknown_names(path: str, entries: list[Entry]) -> Iterator[Finding]:
    for entry in entries:
        name = entry.name
        if name in KNOWN or name in MADE_BY_FLANNEL:
            continue
        near = nearest(name, KNOWN)
        hint = f"; did you mean {near}?" if near else ""
        if name.startswith(("FLANCTL_", "FLANNELD_")) or (name.startswith("FLANNEL") and near):
            says = f"nobody reads {name}{hint}"
            yield Finding(FAIL, "unknown-name", path, entry.line, says, "correct or delete it")
        elif near and path != ENVIRONMENT and name.startswith(("FLAN", "ETCD")):
            yield Finding(
                WARN, "unknown-name", path, entry.line, f"nobody here reads {name}{hint}", "correct it"
            )


def _flannel(path: str, entries: list[Entry], settings: Settings) -> Iterator[Finding]:
    """FLANNEL_OPTIONS and FLANNELD_* by flanneld's own grammar, what flanneld-start makes of the others, and all values."""
    by_name = {entry.name: entry for entry in entries}
    options = by_name.get(OPTIONS)
    line = read(split(options.text or "") if options else [])
    read_environment(line, {entry.name: entry.text or "" for entry in entries})
    said = set()
    for remark in (*line.problems, *line.ignored, *remarks(line)):
        at = by_name.get(remark.subject, options)
        shown = "" if remark.subject in THEIRS else f"{OPTIONS}: "
        severity = FAIL if remark.fatal or remark.id in {"password-seen", "bad-value"} else WARN
        yield Finding(severity, remark.id, path, at.line if at else 0, shown + remark.says, NEXT[remark.id])
        if severity == FAIL:
            said.add(remark.subject)
    if options:
        yield from _empty_flags(path, options, line)
    yield from _flanneld_start(path, by_name, line)
    yield from _values(path, settings, said)


def _empty_flags(path: str, options: Entry, line: CommandLine) -> Iterator[Finding]:
    """Of those that may be: the others are found by `remarks` and `_values`."""
    never = {*NEVER_EMPTY, *(row.flanneld for row in TABLE.values() if row.default and row.kind in NO_BLANK)}
    for name, text in line.flags.items():
        if not text and name not in never and FLAGS[name].kind in {"string", "list"}:
            says = f"{OPTIONS}: -{name} is empty and counts as not given"
            yield Finding(WARN, "empty-value", path, options.line, says, NEXT["empty-value"])


def _flanneld_start(path: str, entries: Mapping[str, Entry], line: CommandLine) -> Iterator[Finding]:
    for name in ("endpoints", "prefix"):
        row = TABLE[name]
        newer, older = row.flannel
        flag = str(row.flanneld)
        given = [entries[each] for each in (newer, older) if each in entries]
        filled = [entry for entry in given if entry.text]
        if given and not filled and flag not in line.flags:
            says = f"{given[0].name} is empty; flanneld-start ends with an error"
            yield Finding(FAIL, "empty-value", path, given[0].line, says, NEVER_EMPTY[flag])
        if len(filled) == 2 and filled[0].text != filled[1].text:
            says = f"{older} differs from {newer} in line {filled[0].line}, which counts"
            yield Finding(WARN, "contradiction", path, filled[1].line, says, f"delete {older}")
        if filled and line.flags.get(flag) not in {None, "", filled[0].text}:
            says = f"{filled[0].name} does not count: {OPTIONS} holds another -{flag}, and flags win"
            yield Finding(WARN, "contradiction", path, filled[0].line, says, NEXT["contradiction"])
        theirs = entries.get(FLAGS[flag].variable)
        if theirs and theirs.text and not given and path != ENVIRONMENT:
            says = (
                f"{theirs.name} is flanneld's; flanneld-start, which CentOS's unit starts, looks for {newer}"
            )
            yield Finding(WARN, "other-name", path, theirs.line, says, f"with that unit: {newer}=…")

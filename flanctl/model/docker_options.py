"""What dockerd must be told about the subnet: the logic of flannel's mk-docker-opts.sh (flannel.md 4.2).

variables = read_variables(b"FLANNEL_SUBNET=172.17.41.1/24\\nFLANNEL_MTU=1472\\n")
docker_options(variables, individual=False, combined=True, key="DOCKER_NETWORK_OPTIONS")
# 'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --mtu=1472"\\n'
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flanctl.errors import Invalid, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(rf"(?:export[ \t]+)?({_NAME.pattern})=")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_UNSAFE = re.compile(r'["\\$`\x00-\x1f\x7f\ud800-\udfff]')
_BLANKS = (" ", "\t")
_MARK = "DOCKER_OPT_"
MAX_BYTES = 64 * 1024
"""Longest subnet.env we read; flannel's has about 120 bytes."""


def docker_options(
    variables: Mapping[str, str],
    *,
    individual: bool,
    combined: bool,
    key: str = "DOCKER_OPTS",
    ip_masq: bool = True,
) -> str:
    """The text of the options file: `DOCKER_OPT_X="…"` lines (`individual`), then `KEY="…"` (`combined`).

    `variables` are the environment with subnet.env's over it. Neither kind asked for means both, as in the script.
    `ip_masq=False` leaves `--ip-masq` out. The value of KEY in `variables` comes first; that, the blank in front and
    the alphabetical order are the script's. Raises Invalid for a variable, UsageError for a key that cannot be used.
    """
    if not _NAME.fullmatch(key):
        raise UsageError(f"{key!r} is not a variable name")
    if _MARK in key:  # the script would pick up its own variables (`combined_opts_key=…`) as options
        raise UsageError(f"{key!r} would be taken for an option itself: it contains {_MARK}")
    if not individual and not combined:
        individual = combined = True

    options = {name: value for name, value in variables.items() if _MARK in name and _NAME.fullmatch(name)}
    if subnet := variables.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := variables.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if (flannel_does := variables.get("FLANNEL_IPMASQ")) and ip_masq:
        if flannel_does not in ("true", "false"):
            raise Invalid(f"FLANNEL_IPMASQ is {flannel_does!r}", hint="it is true or false, nothing else")
        # Inverted: what flannel masquerades, docker must not.
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={'false' if flannel_does == 'true' else 'true'}"

    inherited = variables.get(key, "")
    for name, value in (*options.items(), (key, inherited)):
        if unsafe := _UNSAFE.search(value):
            raise Invalid(f"{name} contains {unsafe[0]!r}, which the options file cannot carry")
    ordered = sorted(options.items())
    lines: list[str] = []
    if individual:
        lines += [f'{name}="{value}"\n' for name, value in ordered]
    if combined:
        joined = (inherited and inherited + " ") + "".join(f" {value}" for _, value in ordered)
        lines.append(f'{key}="{joined}"\n')
    return "".join(lines)


def read_variables(text: bytes | str, *, name: str = "subnet.env") -> dict[str, str]:
    """The variables a shell would have after sourcing `text`, which may hold assignments and comments only.

    Quotes and backslashes are the shell's. What would need a shell (`$`, commands) is refused, and so are Windows
    line ends and a last line without newline: flannel writes one always, so the file is half-written. Raises Invalid.
    """
    if len(text) > MAX_BYTES:
        raise Invalid(f"{name} has {len(text)} bytes, the limit is {MAX_BYTES}")
    decoded = text if isinstance(text, str) else ""
    if isinstance(text, bytes):
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as reason:
            number = text.count(b"\n", 0, reason.start) + 1
            raise Invalid(f"{name} line {number}: byte 0x{text[reason.start]:02x} is not UTF-8") from None
    lines = decoded.split("\n")
    if lines[-1].strip(" \t"):
        raise Invalid(f"{name} line {len(lines)}: no newline at the end, the file is half-written")
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.endswith("\r"):
            what = f"{name} line {number}: Windows line end (CR LF)"
            raise Invalid(what, hint=f"sed -i 's/\\r$//' {name}")
        _Line(line, f"{name} line {number}").read(variables)
    return variables


class _Line:
    """One line of a file that a shell would source."""

    def __init__(self, line: str, where: str) -> None:
        self.line = line
        self.where = where

    def failure(self, what: str) -> Invalid:
        return Invalid(f"{self.where}: {what}")

    def read(self, variables: dict[str, str]) -> None:
        line, here = self.line, 0
        while True:
            while line[here : here + 1] in _BLANKS:
                here += 1
            if line[here : here + 1] in ("", "#"):
                return
            assignment = _ASSIGNMENT.match(line, here)
            if assignment is None:
                raise self.failure(f"{line[here : here + 40]!r} is not an assignment like NAME=value")
            name = assignment[1]
            variables[name], here = self.word(assignment.end(), name)

    def word(self, start: int, name: str) -> tuple[str, int]:
        """The value that starts at `start` and ends at an unquoted blank, and the offset of its end."""
        line, here = self.line, start
        value: list[str] = []
        quoted = False  # between double quotes
        while here < len(line):
            character = line[here]
            if character == "'" and not quoted:
                end = line.find("'", here + 1)
                if end < 0:
                    raise self.failure(f"the quote in {name} is not closed")
                value.append(line[here + 1 : end])
                here = end
            elif character == '"':
                quoted = not quoted
            elif character == "\\":
                here += 1
                hidden = line[here : here + 1]
                if not hidden:
                    raise self.failure(f"{name} goes on in the next line")
                # Between double quotes a backslash hides only these, else it is one (POSIX, Shell 2.2.3).
                value.append(hidden if not quoted or hidden in '$`"\\' else "\\" + hidden)
            elif character in "$`" or (character in ";&|<>()~" and not quoted):
                raise self.failure(f"{name} contains {character!r}, which only a shell can understand")
            elif character in _BLANKS and not quoted:
                break
            else:
                value.append(character)
            here += 1
        if quoted:
            raise self.failure(f"the quote in {name} is not closed")
        word = "".join(value)
        if control := _CONTROL.search(word):
            raise self.failure(f"{name} contains the control character {control[0]!r}")
        return word, here

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
_ASSIGNMENT = re.compile(rf"({_NAME.pattern})=")
_UNSAFE = re.compile(r'["\\$`\x00-\x1f\x7f]')
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

    options = {name: value for name, value in variables.items() if _MARK in name}
    if subnet := variables.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := variables.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if (flannel_does := variables.get("FLANNEL_IPMASQ")) and ip_masq:
        if flannel_does not in ("true", "false"):
            raise Invalid(f"Invalid value of FLANNEL_IPMASQ: {flannel_does}", hint="true or false")
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
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.endswith("\r"):
            raise Invalid(f"{name} line {number}: Windows line end (CR LF)", hint=f"sed -i 's/\\r$//' {name}")
        _Line(line, f"{name} line {number}").read(variables)
    if lines[-1].strip(" \t"):
        raise Invalid(f"{name} line {len(lines)}: no newline at the end, the file is half-written")
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
        exported = False
        while True:
            while line[here : here + 1] in (" ", "\t") and here < len(line):
                here += 1
            if here >= len(line) or line[here] == "#":
                return
            assignment = _ASSIGNMENT.match(line, here)
            if assignment is None:
                if not exported and line.startswith(("export ", "export\t"), here):
                    exported = True
                    here += len("export")
                    continue
                shown = line[here:].split(None, 1)[0] if line[here:].split() else line[here:]
                raise self.failure(f"{shown[:40]!a} is not an assignment like NAME=value")
            value, here = self.word(assignment.end(), assignment[1])
            variables[assignment[1]] = value

    def word(self, here: int, name: str) -> tuple[str, int]:
        """The value that starts at `here`, up to an unquoted blank, and where that is."""
        line = self.line
        value: list[str] = []
        quote = ""
        while here < len(line):
            character = line[here]
            if character == "'" and quote != '"':
                end = line.find("'", here + 1)
                if end < 0:
                    raise self.failure(f"the quote in {name} is not closed")
                value.append(line[here + 1 : end])
                here = end
            elif character == '"':
                quote = "" if quote else '"'
            elif character == "\\":
                if here + 1 == len(line):
                    raise self.failure(f"{name} goes on in the next line")
                here += 1
                # Between double quotes a backslash is one unless it hides one of these (POSIX 2.2.3).
                value.append(line[here] if not quote or line[here] in '$`"\\' else "\\" + line[here])
            elif character in "$`" or (not quote and character in ";&|<>()"):
                raise self.failure(f"{name} contains {character!r}, which only a shell can understand")
            elif character < " " and character != "\t":
                raise self.failure(f"{name} contains the control character U+{ord(character):04X}")
            elif not quote and character in " \t":
                break
            else:
                value.append(character)
            here += 1
        if quote:
            raise self.failure(f"the quote in {name} is not closed")
        return "".join(value), here

"""What dockerd must be told about the subnet: the logic of flannel's mk-docker-opts.sh (flannel.md 4.2).

variables = read_variables(b"FLANNEL_SUBNET=172.17.41.1/24\\nFLANNEL_MTU=1472\\n")
docker_options(variables, individual=False, combined=True, key="DOCKER_NETWORK_OPTIONS")
# 'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --mtu=1472"\\n'

mk-docker-opts.sh by name starts through here: no `re`, no `typing`, which would be most of its start.
"""

from __future__ import annotations

from flanctl.errors import Invalid, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MARK = "DOCKER_OPT_"
ACCEPT_MARK = "0x4000000/0x4000000"
"""Mark and mask of packets from other hosts to docker0 (`--docker-accept`). kube-proxy's 0x4000 and Tailscale's 0xff0000
are other bits; Calico's default mask 0xffff0000 is not."""
MAX_BYTES = 64 * 1024
"""Longest subnet.env we read; flannel's has about 120 bytes."""
_BLANKS = (" ", "\t")


def docker_options(
    variables: Mapping[str, str],
    *,
    individual: bool,
    combined: bool,
    key: str = "DOCKER_OPTS",
    ip_masq: bool = True,
    accept: bool = False,
) -> str:
    """The text of the options file: `DOCKER_OPT_X="…"` lines (`individual`), then `KEY="…"` (`combined`).

    `accept` adds what a dockerd with the nftables backend needs (docs/docker.md), which the script knows nothing of.

    `variables` are the environment with subnet.env's over it. Neither kind asked for means both, as in the script.
    `ip_masq=False` leaves `--ip-masq` out. The value of KEY in `variables` comes first; that, the blank in front and
    the alphabetical order are the script's. Raises Invalid for a variable, UsageError for a key that cannot be used.
    """
    if not is_name(key):
        raise UsageError(f"{key!r} is not a variable name")
    if MARK in key:  # the script would pick up its own variables (`combined_opts_key=…`) as options
        raise UsageError(f"{key!r} would be taken for an option itself: it contains {MARK}")
    if not individual and not combined:
        individual = combined = True

    options = {name: value for name, value in variables.items() if MARK in name and is_name(name)}
    options |= flannel_options(variables, ip_masq=ip_masq)
    if accept:
        options["DOCKER_OPT_ALLOW_DIRECT_ROUTING"] = "--allow-direct-routing"
        options["DOCKER_OPT_BRIDGE_ACCEPT_FWMARK"] = f"--bridge-accept-fwmark={ACCEPT_MARK}"
    inherited = variables.get(key, "")
    for name, value in (*options.items(), (key, inherited)):
        if unsafe := next(filter(_unsafe, value), None):
            raise Invalid(f"{name} contains {unsafe!r}, which the options file cannot carry")
    ordered = sorted(options.items())
    lines: list[str] = []
    if individual:
        lines += [f'{name}="{value}"\n' for name, value in ordered]
    if combined:
        joined = (inherited and inherited + " ") + "".join(f" {value}" for _, value in ordered)
        lines.append(f'{key}="{joined}"\n')
    return "".join(lines)


def flannel_options(variables: Mapping[str, str], *, ip_masq: bool = True) -> dict[str, str]:
    """The DOCKER_OPT_* variables that follow from FLANNEL_*, empty ones counting as unset.

    Raises Invalid for a FLANNEL_IPMASQ that is neither true nor false (not with `ip_masq=False`, which ignores it).
    """
    options = {}
    if subnet := variables.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := variables.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if (flannel_does := variables.get("FLANNEL_IPMASQ")) and ip_masq:
        if flannel_does not in ("true", "false"):
            raise Invalid(
                f"FLANNEL_IPMASQ is {flannel_does!r}",
                hint="it is true or false, nothing else",
                id="bad-ipmasq",
            )
        # Inverted: what flannel masquerades, docker must not.
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={'false' if flannel_does == 'true' else 'true'}"
    return options


def is_name(text: str) -> bool:
    """Whether a shell would take it for a variable's name."""
    return text.isascii() and text.isidentifier()


def _unsafe(character: str) -> bool:
    return character in '"\\$`' or _is_control(character) or "\ud800" <= character <= "\udfff"


def _is_control(character: str) -> bool:
    return character < " " or character == "\x7f"


def read_variables(text: bytes | str, *, name: str = "subnet.env", as_shell: bool = False) -> dict[str, str]:
    """The variables a shell would have after sourcing `text`, which may hold assignments and comments only.

    Quotes and backslashes are the shell's. What would need a shell (`$`, commands) is refused, and so are Windows
    line ends and a last line without newline: flannel writes one always, so the file is half-written. `as_shell` takes
    what a shell takes: any byte in a value (a CR too; undecodable ones as os.fsdecode has them), any end. Raises
    Invalid.
    """
    if len(text) > MAX_BYTES:
        raise Invalid(f"{name} has {len(text)} bytes, the limit is {MAX_BYTES}")
    decoded = text if isinstance(text, str) else ""
    if isinstance(text, bytes):
        try:
            decoded = text.decode("utf-8", "surrogateescape" if as_shell else "strict")
        except UnicodeDecodeError as reason:
            number = text.count(b"\n", 0, reason.start) + 1
            raise Invalid(f"{name} line {number}: byte 0x{text[reason.start]:02x} is not UTF-8") from None
    lines = decoded.split("\n")
    if lines[-1].strip(" \t") and not as_shell:
        raise Invalid(f"{name} line {len(lines)}: no newline at the end, the file is half-written")
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.endswith("\r") and not as_shell:
            what = f"{name} line {number}: Windows line end (CR LF)"
            raise Invalid(what, hint=f"sed -i 's/\\r$//' {name}")
        _Line(line, f"{name} line {number}", any_byte=as_shell).read(variables)
    return variables


class _Line:
    """One line of a file that a shell would source."""

    def __init__(self, line: str, where: str, *, any_byte: bool) -> None:
        self.line = line
        self.where = where
        self.any_byte = any_byte

    def failure(self, what: str) -> Invalid:
        return Invalid(f"{self.where}: {what}")

    def read(self, variables: dict[str, str]) -> None:
        line, here = self.line, 0
        while True:
            here = self.blanks(here)
            if line[here : here + 1] in ("", "#"):
                return
            start = here
            if line.startswith("export", here) and line[here + 6 : here + 7] in _BLANKS:
                start = self.blanks(here + 6)
            name, equals, _ = line[start:].partition("=")
            if not equals or not is_name(name):
                raise self.failure(f"{line[here : here + 40]!r} is not an assignment like NAME=value")
            variables[name], here = self.word(start + len(name) + 1, name)

    def blanks(self, here: int) -> int:
        """The offset of the next character that is no blank."""
        while self.line[here : here + 1] in _BLANKS:
            here += 1
        return here

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
        # A tab is the only control character a value may hold; NUL no shell keeps.
        bad = (
            char
            for char in word
            if _is_control(char) and char != "\t" and (char == "\0" or not self.any_byte)
        )
        if control := next(bad, None):
            raise self.failure(f"{name} contains the control character {control!r}")
        return word, here

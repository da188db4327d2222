"""One table of settings; where each value comes from, in what order, is decided here once.

    flag > FLANCTL_* > FLANNELD_* > FLANNEL_* > ETCDCTL_* > /etc/flanctl/flanctl.toml
         > /etc/sysconfig/flanneld, /etc/default/flanneld > default

So on a host that already runs flannel, `flanctl subnets ls` needs no flag at all. Every value remembers its
source, because "which endpoint, and who says so?" is the first question when a command fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flanctl.errors import NotPermitted, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    StrPath = str | PathLike[str]

# No pathlib in here: every command reads settings, and it costs a tenth of a short one's start.
TOML_FILE = "/etc/flanctl/flanctl.toml"
MAX_BYTES = 1 << 20
"""Nobody's settings are; a command shall not read for a minute."""
SYSCONFIG_FILES = ("/etc/sysconfig/flanneld", "/etc/default/flanneld")


OFFLOADS = ("tso", "uso", "gso", "gro")
"""What the kernel can do for the data plane in bulk (native/dataplane/src/offload.rs)."""
_CHECKED = frozenset({"address", "choice", "number", "offloads", "path", "patterns", "seconds", "switch"})
"""Kinds whose values can be told from nonsense without their user."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    `flanneld` is flannel's flag (its FLANNELD_ variable follows by flannel's rule), `flannel` the variables of the
    CentOS package's flanneld-start, `etcdctl` the variable etcdctl reads. `kind` is text, address (IPv4), path,
    choice, offloads (all, none or names with commas), number, seconds, switch, list (repeated as a flag, comma
    separated in a variable) or patterns (repeated,
    never split at a comma).
    `lowest` and `highest` bound numbers and seconds. The key in the TOML file is `name`, with - or _.
    """

    name: str
    help: str
    kind: str = "text"
    default: str | None = None
    metavar: str | None = None
    flanneld: str | None = None
    flannel: tuple[str, ...] = ()
    etcdctl: str | None = None
    secret: bool = False
    choices: tuple[str, ...] = ()
    lowest: float = 0
    highest: float = 366 * 86400

    @property
    def repeatable(self) -> bool:
        return self.kind in {"list", "patterns"}

    @property
    def shown(self) -> str | None:
        """What stands for the value in --help."""
        return "|".join(self.choices) or self.metavar

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "FLANCTL_" + self.name.upper()

    def variables(self) -> tuple[str, ...]:
        """Environment variables that set this, strongest first."""
        names = [self.variable]
        if self.flanneld is not None:
            names.append("FLANNELD_" + self.flanneld.upper().replace("-", "_"))
        names.extend(self.flannel)
        if self.etcdctl is not None:
            names.append(self.etcdctl)
        return tuple(names)


REGISTRY = (
    Setting(
        "endpoints",
        "Where the registry is: etcd URLs, comma separated, or sqlite:PATH.",
        default="http://127.0.0.1:2379",
        metavar="URL,…",
        flanneld="etcd-endpoints",
        flannel=("FLANNEL_ETCD_ENDPOINTS", "FLANNEL_ETCD"),
        etcdctl="ETCDCTL_ENDPOINTS",
    ),
    Setting(
        "discovery_srv",
        "Domain whose DNS SRV records name the etcd endpoints, instead of --endpoints.",
        metavar="DOMAIN",
        etcdctl="ETCDCTL_DISCOVERY_SRV",
    ),
    Setting(
        "prefix",
        "Key prefix of the network in the registry.",
        default="/jxdd/network",
        metavar="KEY",
        flanneld="etcd-prefix",
        flannel=("FLANNEL_ETCD_PREFIX", "FLANNEL_ETCD_KEY"),
    ),
    Setting(
        "cacert",
        "CA certificate that signed the servers'.",
        metavar="FILE",
        flanneld="etcd-cafile",
        etcdctl="ETCDCTL_CACERT",
    ),
    Setting("cert", "Client certificate.", metavar="FILE", flanneld="etcd-certfile", etcdctl="ETCDCTL_CERT"),
    Setting(
        "key",
        "Key of the client certificate.",
        metavar="FILE",
        flanneld="etcd-keyfile",
        etcdctl="ETCDCTL_KEY",
    ),
    Setting("user", "Name to log in with.", metavar="NAME", flanneld="etcd-username", etcdctl="ETCDCTL_USER"),
    Setting("password_file", "File that holds the password.", metavar="FILE"),
    Setting(
        "timeout",
        "How long one request may take, over all endpoints.",
        kind="seconds",
        default="5",
        metavar="SECONDS",
    ),
    Setting(
        "api",
        "etcd's API: v3, v2, or auto for the one that holds the config.",
        kind="choice",
        choices=("auto", "v2", "v3"),
        default="auto",
    ),
    Setting(
        "dialect",
        "flannel's bytes to speak: 0.7 or 0.28. Without it, 0.7 in etcd v2 and 0.28 elsewhere.",
        kind="choice",
        choices=("0.7", "0.28"),
    ),
)
# No flag for it on purpose: a password on the command line is seen by everyone on the host.
PASSWORD = Setting(
    "password", "Password to log in with.", flanneld="etcd-password", etcdctl="ETCDCTL_PASSWORD", secret=True
)

SUBNET_FILE = Setting(
    "subnet_file",
    "File that tells dockerd and scripts our subnet.",
    default="/run/flannel/subnet.env",
    kind="path",
    metavar="FILE",
    flanneld="subnet-file",
)
RUN_DIR = Setting(
    "run_dir",
    "Directory for the agent's socket and the lock that keeps a second agent out.",
    default="/run/flanctl",
    kind="path",
    metavar="DIR",
)

AGENT = (
    Setting(
        "iface",
        "Interface (name or address) that reaches the other hosts; repeatable, first that exists.",
        kind="list",
        metavar="IFACE",
        flanneld="iface",
    ),
    Setting(
        "iface_regex",
        "The same by regular expression, on addresses, then on names; repeatable.",
        kind="patterns",
        metavar="REGEX",
        flanneld="iface-regex",
    ),
    Setting(
        "iface_can_reach",
        "The interface that the route to this address uses.",
        kind="address",
        metavar="ADDRESS",
        flanneld="iface-can-reach",
    ),
    Setting(
        "public_ip",
        "Address that other hosts send to, if it is not the interface's.",
        kind="address",
        metavar="ADDRESS",
        flanneld="public-ip",
    ),
    SUBNET_FILE,
    Setting(
        "state_dir",
        "Directory that remembers our subnet over a reboot.",
        default="/var/lib/flanctl",
        kind="path",
        metavar="DIR",
    ),
    RUN_DIR,
    Setting(
        "ip_masq",
        "Masquerade packets that leave the network.",
        kind="switch",
        default="false",
        flanneld="ip-masq",
    ),
    Setting(
        "iptables_forward_rules",
        "Accept forwarded packets of the network.",
        kind="switch",
        default="true",
        flanneld="iptables-forward-rules",
    ),
    Setting(
        "docker_accept",
        "Let packets of other hosts reach containers on docker0, which Docker 28 and newer drops: auto (where Docker "
        "is) or off.",
        kind="choice",
        choices=("auto", "off"),
        default="auto",
    ),
    Setting(
        "iptables_resync",
        "How often rules, device and routes are compared with what they should be.",
        kind="seconds",
        default="5",
        metavar="SECONDS",
        flanneld="iptables-resync",
    ),
    Setting(
        "lease_ttl",
        "How long the registry keeps our lease without a word from us; renewed at a third of it.",
        kind="seconds",
        default="24h",
        metavar="DURATION",
        lowest=10,  # a request may take 5, and a lease that cannot be renewed in time is worse than a long one
    ),
    Setting(
        "subnet_lease_renew_margin",
        "Renew at the latest this many minutes before the lease ends.",
        kind="number",
        default="60",
        metavar="MINUTES",
        lowest=1,
        highest=1439,
        flanneld="subnet-lease-renew-margin",
    ),
    Setting(
        "healthz_port",
        "TCP port for /healthz, /readyz, /metrics and /status; 0: none.",
        kind="number",
        default="0",
        metavar="PORT",
        highest=65535,
        flanneld="healthz-port",
    ),
    Setting(
        "healthz_ip",
        "Address for that port.",
        default="0.0.0.0",  # noqa: S104  flanneld's default; nothing listens without a port
        kind="address",
        metavar="ADDRESS",
        flanneld="healthz-ip",
    ),
    Setting(
        "data_path",
        "How packets are carried: tc in the kernel, tun in user space, tun-plain there without offloads; auto: tc if it can be.",
        kind="choice",
        choices=("auto", "tc", "tun", "tun-plain"),
        default="auto",
    ),
    Setting(
        "offloads",
        "What the kernel may do in bulk in user space's path: all, none, or some of tso, uso, gso, gro.",
        kind="offloads",
        default="all",
        metavar="NAME,…",
    ),
    Setting(
        "peer_check",
        "Which senders are believed: strict, subnet or off.",
        kind="choice",
        choices=("strict", "subnet", "off"),
        default="strict",
    ),
)

WRITE_OUT = Setting(
    "write_out",
    "table for people; simple (tabs, no header) and json keep their form.",
    kind="choice",
    choices=("table", "simple", "json"),
    default="table",
)
"""Not in TABLE: how one answer looks is for its reader to say, by flag or variable, and never for a file."""

TABLE: Mapping[str, Setting] = {row.name: row for row in (*REGISTRY, PASSWORD, *AGENT)}


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's text and who said so: a flag, a variable, a name in a file's line, or `default`."""

    text: str
    name: str
    file: str | None = None
    line: int = 0

    @property
    def source(self) -> str:
        """`FLANNEL_OPTIONS in /etc/sysconfig/flanneld:8`"""
        return self.name if self.file is None else f"{self.name} in {self.file}:{self.line}"


@dataclass(slots=True)
class Settings:
    """All settings of one run: `settings.text("prefix")`, `settings.seconds("timeout")`, `settings.source("prefix")`."""

    values: dict[str, Value] = field(default_factory=dict)
    as_flanneld: bool = False
    """Errors then name flanneld's flags, and where it has none the variable."""

    def flag(self, name: str) -> str:
        """What to name in an error: a flag that the program has which was started."""
        row = TABLE[name]
        if not self.as_flanneld:
            return row.flag
        return row.variable if row.flanneld is None else f"-{row.flanneld}"

    def text(self, name: str) -> str:
        """The value; KeyError if it has none and no default (ask `optional` then)."""
        return self.values[name].text

    def optional(self, name: str) -> str | None:
        """The value, or None where nobody gave one. An empty variable counts as unset, as in flannel."""
        value = self.values.get(name)
        return value.text if value is not None and value.text else None

    def source(self, name: str) -> str:
        return self.values[name].source

    def items(self, name: str) -> tuple[str, ...]:
        """A list, blanks trimmed, empties dropped: one a line, or between commas, which a pattern may hold itself."""
        text = self.optional(name) or ""
        if TABLE[name].kind != "patterns":
            text = text.replace(",", "\n")
        return tuple(part.strip() for part in text.split("\n") if part.strip())

    def switch(self, name: str) -> bool:
        text = self.text(name).lower()
        if text in {"1", "t", "true", "yes", "on"}:
            return True
        if text in {"0", "f", "false", "no", "off"}:
            return False
        raise self._bad(name, "true or false")

    def number(self, name: str) -> int:
        row = TABLE[name]
        try:
            number = int(self.text(name))
        except ValueError:
            raise self._bad(name, "a whole number") from None
        if not row.lowest <= number <= row.highest:
            raise self._bad(name, f"from {row.lowest:g} to {row.highest:g}")
        return number

    def seconds(self, name: str) -> float:
        """A duration: `5`, `2.5`, `5s`, `500ms`, `2m`, `1h`."""
        lowest = TABLE[name].lowest
        seconds = parse_seconds(self.text(name))
        if seconds is None:
            raise self._bad(name, self._duration(name))
        if seconds < lowest:
            raise self._bad(name, f"at least {lowest:g}s")
        return seconds

    def _duration(self, name: str) -> str:
        """flanneld's own flags and variables take whole seconds only."""
        theirs = {f"-{TABLE[name].flanneld}", f"FLANNELD_{name.upper()}"}
        whole = self.as_flanneld and self.values[name].name in theirs
        return "a whole number of seconds, 1 or more" if whole else DURATION

    def choice(self, name: str) -> str:
        text, allowed = self.text(name), TABLE[name].choices
        if text not in allowed:
            raise self._bad(name, "one of " + ", ".join(allowed) if len(allowed) > 1 else allowed[0])
        return text

    def path(self, name: str) -> str:
        """Of a file or directory that must have one: an empty one would be the current directory."""
        if not (text := self.text(name)):
            raise self._bad(name, "a path")
        return text

    def offloads(self, name: str) -> str:
        text = self.text(name)
        words = text.split(",")
        if text not in {"all", "none"} and (len(set(words)) != len(words) or not {*words} <= {*OFFLOADS}):
            raise self._bad(name, f"all, none, or some of {', '.join(OFFLOADS)} with commas between them")
        return text

    def patterns(self, name: str) -> tuple[str, ...]:
        import re

        for text in (parts := self.items(name)):
            try:
                re.compile(text)
            except re.error as error:
                raise self._bad(name, f'a regular expression ("{text}": {error})') from None
        return parts

    def address(self, name: str) -> str:
        from ipaddress import AddressValueError, IPv4Address

        try:
            IPv4Address(self.text(name))
        except AddressValueError:
            raise self._bad(name, "an IPv4 address") from None
        return self.text(name)

    def check(self, name: str) -> None:
        """Raises UsageError where the value is none of its kind. What only its user can tell passes."""
        row, value = TABLE[name], self.values.get(name)
        if value is None or (not value.text and row.default is None):
            return  # nobody gave it
        if row.kind in _CHECKED:
            getattr(self, row.kind)(name)

    def shown(self, name: str) -> str | None:
        """The value for people: secrets hidden, lists with commas; None where there is none."""
        text = self.optional(name)
        if text is None:
            return None
        return "(hidden)" if TABLE[name].secret else masked(name, text).replace("\n", ",")

    def _bad(self, name: str, wanted: str) -> UsageError:
        value = self.values[name]
        shown = "(hidden)" if TABLE[name].secret else f'"{masked(name, value.text)}"'
        return UsageError(f"{self.flag(name)} {shown} (from {value.source}) is not {wanted}")


def masked(name: str, text: str) -> str:
    """A value without the password that may stand in it: `root:…`, `http://…@host`."""
    if name == "user" and ":" in text:
        return text.partition(":")[0] + ":(hidden)"
    if name == "endpoints" and "@" in text:
        import re

        return re.sub(r"(^|,|//)[^,]*@", r"\1(hidden)@", text)
    return text


DURATION = "a duration such as 5s, 500ms or 2m"


def parse_seconds(text: str) -> float | None:
    """`5`, `2.5`, `5s`, `500ms`, `2m`, `1h` as seconds, above 0 and at most a year; None for anything else."""
    text = text.strip().lower()
    for suffix, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        if text.endswith(suffix):
            try:
                amount = float(text.removesuffix(suffix)) * factor
            except ValueError:
                return None
            return amount if 0 < amount < 366 * 86400 else None
    return None


def resolve(
    flags: Mapping[str, str],
    *,
    environment: Mapping[str, str] | None = None,
    toml_file: StrPath | None = None,
    sysconfig_files: Iterable[StrPath] | None = None,
) -> Settings:
    """Every setting by the order above. `flags` holds what the command line gave, by setting name.

    Raises UsageError for a file that cannot be understood, NotPermitted for one that cannot be read.
    """
    env = os.environ if environment is None else environment
    toml = toml_values(TOML_FILE if toml_file is None else toml_file)
    sysconfig: dict[str, Value] = {}
    for path in SYSCONFIG_FILES if sysconfig_files is None else sysconfig_files:
        sysconfig = _sysconfig_values(path) | sysconfig
    settings = Settings()
    for row in TABLE.values():
        found = _first(row, flags, env, toml, sysconfig)
        if found is not None:
            settings.values[row.name] = found
    return settings


def _first(
    row: Setting,
    flags: Mapping[str, str],
    env: Mapping[str, str],
    toml: Mapping[str, Value],
    sysconfig: Mapping[str, Value],
) -> Value | None:
    if row.name in flags:
        return Value(flags[row.name], row.flag)
    for variable in row.variables():
        if env.get(variable):
            return Value(env[variable], variable)
    if row.name in toml:
        return toml[row.name]
    if row.name in sysconfig:
        return sysconfig[row.name]
    return None if row.default is None else Value(row.default, "default")


def _content(path: StrPath) -> bytes | None:
    """None where there is no such file. Raises NotPermitted, UsageError for one that is no settings file by its size.

    Going on without one that cannot be read could ask, or write to, another registry than the operator configured.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NotPermitted(f"cannot read settings from {path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"cannot read settings from {path}: it is larger than a megabyte")
    return content


# ---- the TOML file --------------------------------------------------------------------------------------------------


def toml_values(path: StrPath) -> dict[str, Value]:
    """What the file sets, by setting name. Raises UsageError with the line, NotPermitted."""
    content = _content(path)
    values: dict[str, Value] = {}
    for key, raw, line in () if content is None else toml_entries(content, str(path)):
        row = toml_row(key, path, line)
        values[row.name] = Value(_toml_text(row, raw, f"{path}:{line}"), key, str(path), line)
    return values


def toml_entries(content: bytes, path: str) -> list[tuple[str, object, int]]:
    """Key, value and line of all that stands at the document's top level. Raises UsageError."""
    import tomllib

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"cannot read settings from {path}:{line}: it is not UTF-8") from None
    try:
        return [(key, raw, _line_of(key, text)) for key, raw in tomllib.loads(text).items()]
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"cannot read settings from {path}: {error}") from None


def toml_row(key: str, path: StrPath, line: int) -> Setting:
    """The setting a key means. Raises UsageError that names the nearest."""
    row = TABLE.get(key.replace("-", "_"))
    if row is None:
        from flanctl.text import nearest

        near = nearest(key, TABLE)
        hint = f"; did you mean {near}?" if near else ""
        raise UsageError(f'{path}:{line}: unknown setting "{key}"{hint}')
    return row


def _toml_text(row: Setting, raw: object, where: str) -> str:
    """The value as a flag would have it. Raises UsageError for one that no flag could hold."""
    between = "\n" if row.repeatable else ","
    parts = raw if isinstance(raw, list) else [raw]
    if any(isinstance(part, dict | list) for part in parts):
        raise UsageError(f"{where}: {row.name} takes one value or a list of them, not a table")
    return between.join(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)


def _line_of(key: str, text: str) -> int:
    """Where a key of the document's top level stands; 1 where it is written in a way not looked for."""
    import re
    import tomllib

    lines = text.split("\n")
    written = re.compile(rf"""\s*\[*\s*(["']?){re.escape(key)}\1\s*[=.\]]""")
    found = [number for number, line in enumerate(lines, 1) if written.match(line)]
    for number in found[:-1]:
        try:
            tomllib.loads("\n".join(lines[: number - 1]))
        except tomllib.TOMLDecodeError:
            continue  # inside of a longer string or list, not at its place
        return number
    return found[-1] if found else 1


# ---- sysconfig ------------------------------------------------------------------------------------------------------

OPTIONS = "FLANNEL_OPTIONS"
"""The CentOS unit's ExecStart ends in `$FLANNEL_OPTIONS`."""


def _sysconfig_values(path: StrPath) -> dict[str, Value]:
    """What the variables of the file mean, and the flags inside FLANNEL_OPTIONS, which beat them as in flanneld-start.

    Other variables and flags are passed over: the file is another program's too. Raises UsageError for a file systemd
    takes nothing from, and where a quote that never ends swallows the lines behind it; NotPermitted.
    """
    content = _content(path)
    if content is None:
        return {}
    from flanctl.environment_file import Unreadable, parse, split

    hint = f"flanctl config check {path}"
    try:
        entries = {entry.name: entry for entry in parse(content) if entry.counts}
    except Unreadable as error:
        where = f"{path}:{error.line}" if error.line else path
        raise UsageError(f"cannot read settings from {where}: {error}", hint=hint) from None
    for entry in entries.values():
        if entry.unclosed:
            raise UsageError(f"{path}:{entry.unclosed}: the quote of {entry.name} is never closed", hint=hint)
    values: dict[str, Value] = {}
    for row in TABLE.values():
        for variable in row.variables():
            if (found := entries.get(variable)) and found.text:
                values[row.name] = Value(found.text, variable, str(path), found.line)
                break
    if options := entries.get(OPTIONS):
        for name, text in flags_of(split(options.text or "")).items():
            values[name] = Value(text, OPTIONS, str(path), options.line)
    return values


def flags_of(words: list[str]) -> dict[str, str]:
    """Flags in Go's grammar that mean a setting of ours, up to what Go would refuse; other flags are passed over."""
    from flanctl.flanneld_flags import SWITCHES
    from flanctl.go_flags import BadFlag, flags_in

    by_flag = {row.flanneld: row for row in TABLE.values() if row.flanneld is not None}
    found: dict[str, str] = {}
    try:
        for given in flags_in(words, SWITCHES):
            row = by_flag.get(given.name)
            if row is None:
                continue
            text = given.text if given.text is not None else "true" if given.name in SWITCHES else ""
            if row.repeatable and row.name in found:
                text = f"{found[row.name]}\n{text}"
            found[row.name] = text
    except BadFlag:
        pass
    return found

"""One table of settings; where each value comes from, in what order, is decided here once.

    flag > FLANCTL_* > FLANNELD_* > FLANNEL_* > ETCDCTL_* > /etc/flanctl/flanctl.toml
         > /etc/sysconfig/flanneld, /etc/default/flanneld > default

So on a host that already runs flannel, `flanctl subnets ls` needs no flag at all. Every value remembers its
source, because "which endpoint, and who says so?" is the first question when a command fails.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flanctl.errors import NotPermitted, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    StrPath = str | PathLike[str]

# No pathlib in here: every command reads settings, and it costs a tenth of a short one's start.
TOML_FILE = "/etc/flanctl/flanctl.toml"
SYSCONFIG_FILES = ("/etc/sysconfig/flanneld", "/etc/default/flanneld")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    `flanneld` is flannel's flag (its FLANNELD_ variable follows by flannel's rule), `flannel` the variables of the
    CentOS package's flanneld-start, `etcdctl` the variable etcdctl reads. `kind` is text, number, seconds, switch,
    list (repeated as a flag, comma separated in a variable) or patterns (repeated, never split at a comma).
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

    @property
    def repeatable(self) -> bool:
        return self.kind in {"list", "patterns"}

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
    Setting("dialect", "flannel's bytes to speak: 0.7 or 0.28.", default="0.28", metavar="0.7|0.28"),
)
# No flag for it on purpose: a password on the command line is seen by everyone on the host.
PASSWORD = Setting(
    "password", "Password to log in with.", flanneld="etcd-password", etcdctl="ETCDCTL_PASSWORD", secret=True
)

SUBNET_FILE = Setting(
    "subnet_file",
    "File that tells dockerd and scripts our subnet.",
    default="/run/flannel/subnet.env",
    metavar="FILE",
    flanneld="subnet-file",
)
RUN_DIR = Setting(
    "run_dir",
    "Directory for the agent's socket and the lock that keeps a second agent out.",
    default="/run/flanctl",
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
        metavar="ADDRESS",
        flanneld="iface-can-reach",
    ),
    Setting(
        "public_ip",
        "Address that other hosts send to, if it is not the interface's.",
        metavar="ADDRESS",
        flanneld="public-ip",
    ),
    SUBNET_FILE,
    Setting(
        "state_dir",
        "Directory that remembers our subnet over a reboot.",
        default="/var/lib/flanctl",
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
    ),
    Setting(
        "subnet_lease_renew_margin",
        "Renew at the latest this many minutes before the lease ends.",
        kind="number",
        default="60",
        metavar="MINUTES",
        flanneld="subnet-lease-renew-margin",
    ),
    Setting(
        "healthz_port",
        "TCP port for /healthz, /readyz, /metrics and /status; 0: none.",
        kind="number",
        default="0",
        metavar="PORT",
        flanneld="healthz-port",
    ),
    Setting(
        "healthz_ip",
        "Address for that port.",
        default="0.0.0.0",  # noqa: S104  flanneld's default; nothing listens without a port
        metavar="ADDRESS",
        flanneld="healthz-ip",
    ),
    Setting("data_path", "How packets are carried: tun (user space).", default="tun", metavar="tun"),
    Setting(
        "peer_check",
        "Which senders are believed: strict, subnet or off.",
        default="strict",
        metavar="strict|subnet|off",
    ),
)

TABLE: Mapping[str, Setting] = {row.name: row for row in (*REGISTRY, PASSWORD, *AGENT)}


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's text and who said so."""

    text: str
    source: str


@dataclass(slots=True)
class Settings:
    """All settings of one run: `settings.text("prefix")`, `settings.seconds("timeout")`, `settings.source("prefix")`."""

    values: dict[str, Value] = field(default_factory=dict)

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
        if text in {"0", "f", "false", "no", "off", ""}:
            return False
        raise self._bad(name, "true or false")

    def number(self, name: str, lowest: int, highest: int) -> int:
        try:
            number = int(self.text(name))
        except ValueError:
            raise self._bad(name, "a whole number") from None
        if not lowest <= number <= highest:
            raise self._bad(name, f"from {lowest} to {highest}")
        return number

    def seconds(self, name: str, *, lowest: float = 0.0) -> float:
        """A duration: `5`, `2.5`, `5s`, `500ms`, `2m`, `1h`; `lowest` seconds at least."""
        seconds = parse_seconds(self.text(name))
        if seconds is None:
            raise self._bad(name, DURATION)
        if seconds < lowest:
            raise self._bad(name, f"at least {lowest:g}s")
        return seconds

    def choice(self, name: str, *allowed: str) -> str:
        text = self.text(name)
        if text not in allowed:
            raise self._bad(name, "one of " + ", ".join(allowed))
        return text

    def _bad(self, name: str, wanted: str) -> UsageError:
        value = self.values[name]
        shown = "(hidden)" if TABLE[name].secret else f'"{value.text}"'
        return UsageError(f"{TABLE[name].flag} {shown} (from {value.source}) is not {wanted}")


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

    Raises UsageError for a file that cannot be understood.
    """
    env = os.environ if environment is None else environment
    toml = _toml_values(TOML_FILE if toml_file is None else toml_file)
    sysconfig: dict[str, Value] = {}
    for path in SYSCONFIG_FILES if sysconfig_files is None else sysconfig_files:
        for name, value in _sysconfig_values(path).items():
            sysconfig.setdefault(name, value)
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


def _toml_values(path: StrPath) -> dict[str, Value]:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(path, error) from None
    import tomllib

    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read settings from {path}: {error}") from None
    values = {}
    for name, raw in document.items():
        row = TABLE.get(name.replace("-", "_"))
        if row is None:
            raise UsageError(f'{path}: unknown setting "{name}"')
        text = ",".join(map(str, raw)) if isinstance(raw, list) else str(raw)
        values[row.name] = Value(text, f"{path}, {name}")
    return values


def _unreadable(path: StrPath, error: OSError) -> NotPermitted:
    """Going on without it could ask, or write to, another registry than the operator configured."""
    return NotPermitted(f"cannot read settings from {path}: {error.strerror}")


def _sysconfig_values(path: StrPath) -> dict[str, Value]:
    """KEY=VALUE lines as systemd's EnvironmentFile has them, and the flags inside FLANNEL_OPTIONS.

    Flags beat variables, as they do when flanneld-start runs. A line we cannot read is skipped: the file is the
    operator's for another program, and `flanctl subnets ls` must not fail over it.
    """
    try:
        with open(path, errors="replace") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(path, error) from None
    by_variable = {variable: row for row in TABLE.values() for variable in row.variables()}
    values: dict[str, Value] = {}
    from_flags: dict[str, Value] = {}
    for number, line in enumerate(lines, 1):
        name, equals, rest = line.strip().partition("=")
        if not equals or name.startswith(("#", ";")):
            continue
        try:
            words = shlex.split(rest, comments=False)
        except ValueError:
            continue
        text = " ".join(words)
        source = f"{path}:{number}, {name}"
        if name == "FLANNEL_OPTIONS":
            from_flags.update(_go_flags(text.split(), source))
        elif (row := by_variable.get(name)) is not None and text:
            values[row.name] = Value(text, source)
    return values | from_flags


def _go_flags(words: list[str], source: str) -> dict[str, Value]:
    """Flags in Go's grammar that mean a setting of ours, up to what Go would refuse; other flags are passed over."""
    from flanctl.flanneld_flags import SWITCHES
    from flanctl.go_flags import BadFlag, flags_in

    by_flag = {row.flanneld: row for row in TABLE.values() if row.flanneld is not None}
    found: dict[str, Value] = {}
    try:
        for given in flags_in(words, SWITCHES):
            row = by_flag.get(given.name)
            if row is None:
                continue
            text = given.text if given.text is not None else "true" if given.name in SWITCHES else ""
            if row.repeatable and row.name in found:
                text = f"{found[row.name].text}\n{text}"
            found[row.name] = Value(text, source)
    except BadFlag:
        pass
    return found

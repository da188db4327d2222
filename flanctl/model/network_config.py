"""The network config an operator writes to `<prefix>/config`, with flannel's rules and a reason for each refusal.

    config = NetworkConfig.parse('{"Network":"172.17.0.0/16"}', Dialect.V0_28)
    config.subnet_at(0)                 # 172.17.1.0/24
    config.effective()                  # flannel's field names with all defaults

Reading follows Go's encoding/json where flannel does: keys in any case, `null` for SubnetLen means default, 24.0
is no integer. Where flannel panics, guesses or fails later, we refuse now (flannel.md 2; the table in
tests/unit/model/test_network_config.py names each difference).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from flanctl.model import json_text
from flanctl.model.dialect import Dialect
from flanctl.model.json_text import Escaped, JsonError, Member, Object, describe, fold, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEFAULT_UDP_PORT = 8285

_LONGEST = 30
"""A /31 subnet has no room for a container beside its gateway; flannel 0.7 allows it (and /64 too)."""


class ConfigError(JsonError):
    """A network config cannot be understood or breaks a rule; `.line`, `.column` (from 1) and `.field` say where."""


class _Int(NamedTuple):
    default: int | None
    low: int
    high: int


class _Bool(NamedTuple):
    default: bool


class _Text(NamedTuple):
    default: str
    one_of: tuple[str, ...] = ()
    min_len: int = 0


_Option = _Int | _Bool | _Text
_MTU = _Int(None, 68, 65535)  # the external interface's unless given
_BOOL = _Bool(default=False)
_TEXT = _Text("")

_UDP: dict[str, _Option] = {"Port": _Int(DEFAULT_UDP_PORT, 1, 65535)}
_VXLAN: dict[str, _Option] = {
    "VNI": _Int(1, 0, 0xFFFFFF),  # RFC 7348: 24 bits
    "Port": _Int(0, 0, 65535),  # 0: the kernel's, 8472
    "GBP": _BOOL,
}
_BACKENDS: dict[Dialect, dict[str, dict[str, _Option]]] = {
    Dialect.V0_7: {
        "udp": _UDP,
        "vxlan": _VXLAN,
        "host-gw": {},
        "alloc": {},
        "aws-vpc": {"RouteTableID": _TEXT},
        "gce": {},
    },
    Dialect.V0_28: {
        "udp": _UDP,
        "vxlan": _VXLAN | {"DirectRouting": _BOOL, "Learning": _BOOL, "MTU": _MTU},
        "host-gw": {},
        "alloc": {},
        "ipip": {"DirectRouting": _BOOL},
        "wireguard": {
            "PSK": _TEXT,
            "ListenPort": _Int(51820, 1, 65535),
            "ListenPortV6": _Int(51821, 1, 65535),
            "PersistentKeepaliveInterval": _Int(0, 0, 65535),  # seconds; the kernel's field has 16 bits
            "Mode": _Text("separate", one_of=("separate", "auto", "ipv4", "ipv6")),
            "MTU": _MTU,
        },
        "ipsec": {
            "PSK": _Text("", min_len=96),
            "UDPEncap": _BOOL,
            "ESPProposal": _Text("aes128gcm16-sha256-prfsha256-ecp256"),
        },
        "extension": {
            "PreStartupCommand": _TEXT,
            "PostStartupCommand": _TEXT,
            "SubnetAddCommand": _TEXT,
            "SubnetRemoveCommand": _TEXT,
        },
        "tencent-vpc": {"AccessKeyID": _TEXT, "AccessKeySecret": _TEXT},
    },
}
"""The backends each dialect has, with the options flannel reads and their defaults (flannel.md 5.1)."""

_NEVER_READ = {("extension", "ShutdownCommand")}
"""In upstream's own examples, but no flannel ever read it: refusing the example would help nobody."""

_KEYS_0_7 = ("Network", "SubnetLen", "SubnetMin", "SubnetMax", "Backend")
_IPV6_KEYS = ("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax")
_SWITCHES = ("EnableIPv4", "EnableIPv6", "EnableNFTables")
_KEYS = {
    Dialect.V0_7: {fold(key): key for key in _KEYS_0_7},
    Dialect.V0_28: {fold(key): key for key in (*_KEYS_0_7, *_SWITCHES, *_IPV6_KEYS)},
}
"""The keys each dialect knows, by their folded form."""

# An overlay there is allowed by flannel and of no use: kernels and routers treat these addresses apart.
_ODD_PLACES = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One network: its addresses, how they are cut into subnets, and how packets are carried. Made by `parse`."""

    network: IPv4Network
    subnet_len: int
    subnet_min: IPv4Address
    subnet_max: IPv4Address
    backend_type: str
    backend_options: Mapping[str, object] = field(hash=False)
    """As written, under flannel's spelling, without Type and without defaults."""
    dialect: Dialect
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """Sentences about what was ignored or is odd; a warning never refuses."""

    @classmethod
    def parse(
        cls, text: bytes | str, dialect: Dialect, *, name: str = "config", strict: bool = True
    ) -> NetworkConfig:
        """Read a config; `name` is the file or key for error texts. Raises ConfigError.

        Reading is lenient, writing is strict: with `strict=False`, for what a running network lives by, a key given
        twice and an option the backend does not have are warnings, as flannel passes over both.
        """
        decoded, at, value = json_text.parse(text, name=name, error=ConfigError)
        return _Reader(decoded, dialect, name, strict=strict).config(at, value)

    def effective(self) -> dict[str, object]:
        """The config as flannel understands it: its field names, its order, every default filled in."""
        options = {
            key: option.default
            for key, option in _BACKENDS[self.dialect][self.backend_type].items()
            if option.default is not None
        }
        return {
            "Network": str(self.network),
            "SubnetLen": self.subnet_len,
            "SubnetMin": str(self.subnet_min),
            "SubnetMax": str(self.subnet_max),
            "Backend": {"Type": self.backend_type, **options, **self.backend_options},
        }

    @property
    def subnet_size(self) -> int:
        """Addresses in one subnet."""
        return 1 << (32 - self.subnet_len)

    @property
    def capacity(self) -> int:
        """Number of subnets from SubnetMin to SubnetMax, at least 1."""
        return (int(self.subnet_max) - int(self.subnet_min)) // self.subnet_size + 1

    def subnet_at(self, index: int) -> IPv4Network:
        """The subnet number `index`, from 0 to capacity - 1. Raises IndexError."""
        if not 0 <= index < self.capacity:
            raise IndexError(index)
        return IPv4Network((int(self.subnet_min) + index * self.subnet_size, self.subnet_len))

    def subnets(self) -> Iterator[IPv4Network]:
        """Every subnet from SubnetMin to SubnetMax, made as you go: a /8 of /30 has four million."""
        return map(self.subnet_at, range(self.capacity))

    def accepts(self, subnet: IPv4Network) -> bool:
        """Whether a host may hold `subnet`: our length and on a boundary from SubnetMin to SubnetMax."""
        return (
            subnet.prefixlen == self.subnet_len
            and self.subnet_min <= subnet.network_address <= self.subnet_max
        )

    @property
    def udp_port(self) -> int:
        """UDP port of the udp backend, the same on every host of the network."""
        port = self.backend_options.get("Port", DEFAULT_UDP_PORT)
        return port if isinstance(port, int) else DEFAULT_UDP_PORT


def compose_config(
    *,
    network: str | IPv4Network,
    subnet_len: int | None = None,
    subnet_min: str | IPv4Address | None = None,
    subnet_max: str | IPv4Address | None = None,
    backend: str | None = None,
    backend_options: Mapping[str, object] | None = None,
) -> str:
    """The config text `net init` writes from options. It checks nothing: give it to NetworkConfig.parse.

    Option values that are text (`Port=8285` of a command line) become what the option wants, if they can.
    """
    document: dict[str, object] = {"Network": str(network)}
    if subnet_len is not None:
        document["SubnetLen"] = subnet_len
    if subnet_min is not None:
        document["SubnetMin"] = str(subnet_min)
    if subnet_max is not None:
        document["SubnetMax"] = str(subnet_max)
    if backend is not None or backend_options:
        backends = _BACKENDS[Dialect.V0_7] | _BACKENDS[Dialect.V0_28]
        options = backends.get((backend or "").lower(), {})
        known = {fold(key): (key, option) for key, option in options.items()}
        section: dict[str, object] = {} if backend is None else {"Type": backend}
        for given, value in (backend_options or {}).items():
            key, option = known.get(fold(given), (given, None))
            section[given if key in section else key] = _typed(value, option)  # twice: parse says so
        document["Backend"] = section
    return json_text.write(document, short_escapes=True)


def _typed(value: object, option: _Option | None) -> object:
    if not isinstance(value, str):
        return value
    if isinstance(option, _Int) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    if isinstance(option, _Bool) and value in ("true", "false"):
        return value == "true"
    return value


class _Reader:
    """Turns the JSON text of one config into a NetworkConfig, or says where and why not."""

    def __init__(self, text: str, dialect: Dialect, name: str, *, strict: bool) -> None:
        self.text = text
        self.dialect = dialect
        self.name = name
        self.strict = strict
        self.warnings: list[str] = []

    def wrong(self, at: int, key: str, what: str, *, hint: str | None = None) -> ConfigError:
        """The error that `key`, whose value stands at `at`, is wrong; `what` goes on from the key's name."""
        return ConfigError(self.name, self.text, at, f"{key} {what}", field=key, hint=hint)

    def where(self, at: int) -> str:
        line, column = json_text.position(self.text, at)
        return f"line {line}, column {column}"

    def warn(self, at: int, what: str) -> None:
        self.warnings.append(f"{self.name} {self.where(at)}: {what}")

    def config(self, at: int, document: object) -> NetworkConfig:
        if not isinstance(document, Object):
            what = f"a config is a JSON object, not {describe(document)}"
            raise ConfigError(self.name, self.text, at, what)
        given, unknown = self.sort_out(document, _KEYS[self.dialect], section="")
        self.other_families(given)
        network = self.network(at, given.get("Network"))
        subnet_len = self.subnet_len(network, given.get("SubnetLen"), given["Network"].at)
        subnet_min, subnet_max = self.bounds(network, subnet_len, given)
        backend_type, options = self.backend(given.get("Backend"))
        self.warn_of_unknown(unknown)
        return NetworkConfig(
            network=network,
            subnet_len=subnet_len,
            subnet_min=subnet_min,
            subnet_max=subnet_max,
            backend_type=backend_type,
            backend_options=MappingProxyType(options),
            dialect=self.dialect,
            warnings=tuple(self.warnings),
        )

    def sort_out(
        self, section_members: Object, spelling: Mapping[str, str], *, section: str
    ) -> tuple[dict[str, Member], list[Member]]:
        """The members whose key is known, under flannel's spelling, and the others.

        A key that comes twice is refused or warned of: flannel takes the last, and people see the first.
        """
        given: dict[str, Member] = {}
        unknown: list[Member] = []
        first: dict[str, Member] = {}
        for member in section_members:
            folded = fold(member.name)
            if folded in first:
                key = section + spelling.get(folded, show(member.name))
                what = f"is given twice, first at {self.where(first[folded].name_at)}"
                if self.strict:
                    raise self.wrong(member.name_at, key, what)
                self.warn(member.name_at, f"{key} {what}; this one counts, as in flannel")
            first[folded] = member
            if folded in spelling:
                given[spelling[folded]] = member
            else:
                unknown.append(member)
        return given, unknown

    def warn_of_unknown(self, members: Sequence[Member]) -> None:
        for member in members[:10]:
            ignored = f"flannel {self.dialect} does not know {show(member.name)} and ignores it"
            close = _closest(member.name, _KEYS[self.dialect])
            self.warn(member.name_at, f"{ignored}; is {close} meant?" if close else ignored)
        if len(members) > 10:
            self.warn(members[10].name_at, f"{len(members) - 10} more keys are not known")

    def other_families(self, given: Mapping[str, Member]) -> None:
        """The IPv6 keys and EnableNFTables: checked as far as flannel does, refused where they ask for IPv6."""
        for key in _SWITCHES:
            if (member := given.get(key)) is None:
                continue
            enabled = self.flag(key, member)
            if key == "EnableIPv4" and enabled is False:
                raise self.wrong(member.at, key, "is false, but a network without IPv4 is not supported yet")
            if key == "EnableIPv6" and enabled:
                raise self.wrong(member.at, key, "is true, but IPv6 is not supported yet")
            if key == "EnableNFTables" and enabled:
                self.warn(member.name_at, f"{key} is ignored, rules are written with iptables")
        for key in _IPV6_KEYS:
            if (member := given.get(key)) is None:
                continue
            if key == "IPv6SubnetLen":
                self.unsigned(key, member)
            elif member.value is not None or key == "IPv6Network":  # Go: null unsets a pointer, not a struct
                self.ipv6(key, member)
            self.warn(member.name_at, f"{key} is ignored without EnableIPv6")

    def flag(self, key: str, member: Member) -> bool | None:
        """true or false; None for null, which leaves the default."""
        if member.value is None or isinstance(member.value, bool):
            return member.value
        raise self.wrong(member.at, key, f"must be true or false, not {describe(member.value)}")

    def integer(self, key: str, member: Member) -> int | None:
        """A whole number; None for null. Like Go we take no 24.0 and no 2e1."""
        value = member.value
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.wrong(member.at, key, f"must be a whole number, not {describe(value)}")

    def unsigned(self, key: str, member: Member | None) -> int:
        """A whole number from 0; absent and null are 0 too, and 0 means default (Go's zero value)."""
        value = 0 if member is None else self.integer(key, member) or 0
        if member is not None and value < 0:
            raise self.wrong(member.at, key, f"must not be negative, it is {value}")
        return value

    def address_text(self, key: str, member: Member, example: str) -> str:
        value = member.value
        if not isinstance(value, str):
            raise self.wrong(member.at, key, f'must be text like "{example}", not {describe(value)}')
        if isinstance(value, Escaped):
            # flannel's UnmarshalJSON looks at the bytes between the quotes and knows no escapes.
            raise self.wrong(member.at, key, "is written with escapes, which flannel does not understand")
        return value

    def ipv6(self, key: str, member: Member) -> None:
        is_network = key == "IPv6Network"
        text = self.address_text(key, member, "fc00::/48" if is_network else "fc00:0:0:1::")
        address, slash, length = text.partition("/")
        if _parse_ipv6(address) is None or (not _is_length(length, 128) if is_network else slash):
            wanted = "network" if is_network else "address"
            raise self.wrong(member.at, key, f"{show(text)} is not an IPv6 {wanted}")

    def network(self, at: int, member: Member | None) -> IPv4Network:
        key = "Network"
        if member is None:
            raise self.wrong(at, key, "is missing", hint='{"Network": "172.17.0.0/16"} is enough')
        text = self.address_text(key, member, "172.17.0.0/16")
        address_text, slash, length = text.partition("/")
        address = _parse_ipv4(address_text)
        if address is None:
            found = "is IPv6, an IPv4 network is needed" if ":" in text else "is not an IPv4 network"
            raise self.wrong(member.at, key, f"{show(text)} {found}")
        if not slash:
            raise self.wrong(member.at, key, f"{address} has no prefix length", hint=f'like "{address}/16"')
        if not _is_length(length, 32):
            raise self.wrong(member.at, key, f"{show(text)} has no prefix length from 0 to 32")
        network = IPv4Network((address, int(length)), strict=False)
        if network.prefixlen == 0:
            raise self.wrong(member.at, key, f"{text} is every address there is")
        if network.network_address != address:
            self.warn(member.at, f"Network {text} has host bits set, {network} is meant")
        for place in map(IPv4Network, _ODD_PLACES):
            if network.overlaps(place):
                self.warn(member.at, f"Network {network} overlaps {place}, which is not routed")
        return network

    def subnet_len(self, network: IPv4Network, member: Member | None, network_at: int) -> int:
        key, prefix = "SubnetLen", network.prefixlen
        length = self.unsigned(key, member)
        if member is None or not length:
            length = self.dialect.default_subnet_len(prefix)
            if length > _LONGEST:
                least = 28 if self.dialect.checks_config else 29
                raise self.wrong(network_at, "Network", f"{network} is too small, /{least} is the least")
            return length
        if length > _LONGEST:
            raise self.wrong(member.at, key, f"{_brief(length)} must be below {_LONGEST + 1}")
        if length < prefix:
            raise self.wrong(member.at, key, f"{length} is larger than Network {network}")
        if self.dialect.checks_config and length < prefix + 2:
            raise self.wrong(member.at, key, f"{length} gives Network {network} fewer than four subnets")
        return length

    def bounds(
        self, network: IPv4Network, length: int, given: Mapping[str, Member]
    ) -> tuple[IPv4Address, IPv4Address]:
        size = 1 << (32 - length)
        low = self.bound("SubnetMin", network, size, given.get("SubnetMin"))
        high = self.bound("SubnetMax", network, size, given.get("SubnetMax"))
        # The first subnet is left out unless asked for: its address is the network's own (flannel.md 2.1).
        first = int(network.network_address) + size if low is None else low
        last = int(network.broadcast_address) + 1 - size if high is None else high
        if low is None and length == network.prefixlen:  # only 0.7 lets it come this far
            what = f"{length} leaves no subnet in {network}, since the first is left out"
            hint = f"SubnetMin {network.network_address} takes the first too"
            raise self.wrong(given["SubnetLen"].at, "SubnetLen", what, hint=hint)
        if first > last:
            what = f"{IPv4Address(last)} is below SubnetMin {IPv4Address(first)}"
            raise self.wrong(given["SubnetMax"].at, "SubnetMax", what)
        return IPv4Address(first), IPv4Address(last)

    def bound(self, key: str, network: IPv4Network, size: int, member: Member | None) -> int | None:
        """SubnetMin or SubnetMax as given; None if absent or 0.0.0.0, which is flannel's "unset"."""
        if member is None:
            return None
        text = self.address_text(key, member, "172.17.10.0")
        address = _parse_ipv4(text)
        if address is None:
            raise self.wrong(member.at, key, f"{show(text)} is not an IPv4 address")
        if not int(address):
            return None
        if address not in network:
            raise self.wrong(member.at, key, f"{address} is outside Network {network}")
        if int(address) % size:
            length = 32 - (size - 1).bit_length()
            raise self.wrong(member.at, key, f"{address} is not on a boundary of /{length} subnets")
        return int(address)

    def backend(self, member: Member | None) -> tuple[str, dict[str, object]]:
        """Type, lower-cased, and the options that are given, under flannel's spelling."""
        if member is None:
            return "udp", {}
        section = Object() if member.value is None else member.value  # Go: null is an object without keys
        if not isinstance(section, Object):
            what = f'must be an object like {{"Type": "udp"}}, not {describe(section)}'
            raise self.wrong(member.at, "Backend", what)
        backend_type = self.backend_type(member, section)
        options = _BACKENDS[self.dialect][backend_type]
        spelling = {fold(key): key for key in ("Type", *options)}
        given, unknown = self.sort_out(section, spelling, section="Backend.")
        for other in unknown:
            if (backend_type, other.name) in _NEVER_READ:
                self.warn(other.name_at, f"Backend.{other.name} is never read by flannel")
                continue
            what = f"is not an option of {backend_type}"
            if not self.strict:
                self.warn(other.name_at, f"Backend.{show(other.name)[1:-1]} {what}; it is passed over")
                continue
            hint = f"its options: {', '.join(options)}" if options else "it has none"
            raise self.wrong(other.name_at, f"Backend.{show(other.name)[1:-1]}", what, hint=hint)
        values = {
            key: self.option(f"Backend.{key}", option, given[key])
            for key, option in options.items()
            if key in given and given[key].value is not None
        }
        for key, option in options.items():
            if isinstance(option, _Text) and option.min_len and key not in values:
                raise self.wrong(member.at, f"Backend.{key}", "is missing")
        return backend_type, values

    def backend_type(self, member: Member, section: Object) -> str:
        key = "Backend.Type"
        known = _BACKENDS[self.dialect]
        hint = "one of " + ", ".join(known)
        found = next((inner for inner in section if fold(inner.name) == "type"), None)
        if found is None or found.value is None or found.value == "":
            raise self.wrong(member.at if found is None else found.at, key, "is missing", hint=hint)
        if not isinstance(found.value, str):
            raise self.wrong(found.at, key, f"must be text, not {describe(found.value)}", hint=hint)
        backend_type = found.value.lower()
        if backend_type not in known:
            what = f"{show(found.value)} is not a backend of flannel {self.dialect}"
            raise self.wrong(found.at, key, what, hint=hint)
        return backend_type

    def option(self, key: str, option: _Option, member: Member) -> object:
        if isinstance(option, _Bool):
            return self.flag(key, member)
        if isinstance(option, _Int):
            value = self.integer(key, member) or 0
            if not option.low <= value <= option.high:
                what = f"{_brief(value)} is not in {option.low}..{option.high}"
                raise self.wrong(member.at, key, what)
            return value
        text = member.value
        if not isinstance(text, str):
            raise self.wrong(member.at, key, f"must be text, not {describe(text)}")
        if "\0" in text:
            raise self.wrong(member.at, key, "contains a NUL character")
        if len(text) < option.min_len:
            what = f"has {len(text)} characters, at least {option.min_len} are needed"
            raise self.wrong(member.at, key, what)
        if option.one_of and text not in option.one_of:
            what = f"{show(text)} must be one of {', '.join(option.one_of)}"
            raise self.wrong(member.at, key, what)
        return str(text)  # without the escapes it was written with


def _brief(number: int) -> str:
    return describe(number).removeprefix("the number ")


def _closest(name: str, spelling: Mapping[str, str]) -> str | None:
    if len(name) > 40:
        return None
    import difflib

    close = difflib.get_close_matches(fold(name), spelling, n=1, cutoff=0.75)
    return spelling[close[0]] if close else None


def _parse_ipv4(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text)
    except AddressValueError:
        return None


def _parse_ipv6(text: str) -> IPv6Address | None:
    try:
        return None if "%" in text else IPv6Address(text)
    except AddressValueError:
        return None


def _is_length(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and int(text) <= most

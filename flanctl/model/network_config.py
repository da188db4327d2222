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
from flanctl.model.json_text import Escaped, JsonError, Member, Number, Object, describe, fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_UDP_PORT = 8285


class ConfigError(JsonError):
    """A network config cannot be understood or breaks a rule; `.line`, `.column` (from 1) and `.field` say where."""


class _Int(NamedTuple):
    default: int
    low: int
    high: int


class _Bool(NamedTuple):
    default: bool


class _Text(NamedTuple):
    default: str
    one_of: tuple[str, ...] = ()
    min_len: int = 0


_Option = _Int | _Bool | _Text
_PORT = _Int(0, 0, 65535)
_MTU = _Int(0, 68, 65535)  # default 0: the external interface's
_BOOL = _Bool(default=False)
_TEXT = _Text("")

# flannel.md 5.1; what flannel itself reads, with its defaults.
_BACKENDS: dict[str, dict[str, _Option]] = {
    "udp": {"Port": _Int(DEFAULT_UDP_PORT, 1, 65535)},
    "vxlan": {
        "VNI": _Int(1, 0, 0xFFFFFF),  # RFC 7348: 24 bits
        "Port": _PORT,  # 0: the kernel's, 8472
        "GBP": _BOOL,
        "DirectRouting": _BOOL,
        "Learning": _BOOL,
        "MTU": _MTU,
    },
    "host-gw": {},
    "alloc": {},
    "ipip": {"DirectRouting": _BOOL},
    "wireguard": {
        "PSK": _TEXT,
        "ListenPort": _Int(51820, 1, 65535),
        "ListenPortV6": _Int(51821, 1, 65535),
        "PersistentKeepaliveInterval": _PORT,  # seconds; the kernel's field has 16 bits too
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
    "aws-vpc": {"RouteTableID": _TEXT},
    "gce": {},
}
_KNOWN_BACKENDS = {
    Dialect.V0_7: ("udp", "vxlan", "host-gw", "alloc", "aws-vpc", "gce"),
    Dialect.V0_28: (
        "udp", "vxlan", "host-gw", "alloc", "ipip", "wireguard", "ipsec", "extension", "tencent-vpc",
    ),
}  # fmt: skip
_NOT_IN_0_7 = {("vxlan", "DirectRouting"), ("vxlan", "Learning"), ("vxlan", "MTU")}
_NEVER_READ = {("extension", "ShutdownCommand")}
"""In upstream's own examples, but no flannel ever read it: refusing the example would help nobody."""

_KEYS_0_7 = ("Network", "SubnetLen", "SubnetMin", "SubnetMax", "Backend")
_KEYS = {
    Dialect.V0_7: {fold(key): key for key in _KEYS_0_7},
    Dialect.V0_28: {
        fold(key): key
        for key in (
            *_KEYS_0_7,
            "EnableIPv4",
            "EnableIPv6",
            "EnableNFTables",
            "IPv6Network",
            "IPv6SubnetLen",
            "IPv6SubnetMin",
            "IPv6SubnetMax",
        )
    },
}
_ODD_PLACES = ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")


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
    def parse(cls, text: bytes | str, dialect: Dialect, *, name: str = "config") -> NetworkConfig:
        """Read a config; `name` is the file or key for error texts. Raises ConfigError."""
        decoded = json_text.decode(text, name=name, error=ConfigError)
        at, value = json_text.parse(decoded, name=name, error=ConfigError)
        return _Reader(decoded, dialect, name).config(at, value)

    def effective(self) -> dict[str, object]:
        """The config as flannel understands it: its field names, its order, every default filled in."""
        options = {key: option.default for key, option in _options(self.backend_type, self.dialect).items()}
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
        known = {
            fold(key): (key, option) for key, option in _BACKENDS.get((backend or "").lower(), {}).items()
        }
        section: dict[str, object] = {} if backend is None else {"Type": backend}
        for given, value in (backend_options or {}).items():
            key, option = known.get(fold(given), (given, None))
            section[key] = _typed(value, option)
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


def _options(backend_type: str, dialect: Dialect) -> dict[str, _Option]:
    options = _BACKENDS[backend_type]
    if dialect is Dialect.V0_7:
        return {key: option for key, option in options.items() if (backend_type, key) not in _NOT_IN_0_7}
    return options


class _Reader:
    """Turns the JSON text of one config into a NetworkConfig, or raises where it stands."""

    def __init__(self, text: str, dialect: Dialect, name: str) -> None:
        self.text = text
        self.dialect = dialect
        self.name = name
        self.warnings: list[str] = []

    def error(self, at: int, key: str | None, what: str, hint: str | None = None) -> ConfigError:
        return ConfigError(self.name, self.text, at, what, field=key, hint=hint)

    def config(self, at: int, value: object) -> NetworkConfig:
        if not isinstance(value, Object):
            raise self.error(at, None, f"a config is a JSON object, not {describe(value)}")
        given = self.members(value, _KEYS[self.dialect], None)
        self.families(given)
        network = self.network(at, given.get("Network"))
        subnet_len = self.subnet_len(network, given)
        subnet_min, subnet_max = self.bounds(network, subnet_len, given)
        backend_type, options = self.backend(given.get("Backend"))
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

    def members(self, value: Object, known: Mapping[str, str], section: str | None) -> dict[str, Member]:
        """The members flannel knows, by its spelling. A key twice is refused: flannel would take the last."""
        seen: dict[str, Member] = {}
        given: dict[str, Member] = {}
        for member in value:
            folded = fold(member.name)
            key = known.get(folded, member.name)
            shown = f"{section}.{key}" if section else key
            if folded in seen:
                line, column = json_text.position(self.text, seen[folded].name_at)
                raise self.error(
                    member.name_at, shown, f"{shown} is given twice, first at line {line}, column {column}"
                )
            seen[folded] = member
            if section or folded in known:
                given[key] = member
            else:
                line, column = json_text.position(self.text, member.name_at)
                self.warnings.append(
                    f"{self.name} line {line}, column {column}: flannel {self.dialect} does not know "
                    f"{describe(member.name).removeprefix('the string ')} and ignores it"
                )
        return given

    def families(self, given: Mapping[str, Member]) -> None:
        """EnableIPv4, EnableIPv6, EnableNFTables and the IPv6 keys, as far as flannel 0.28 looks at them."""
        ipv4, ipv6, nft = (
            self.flag(given.get(key), key) for key in ("EnableIPv4", "EnableIPv6", "EnableNFTables")
        )
        if ipv4 is False:
            raise self.error(
                given["EnableIPv4"].at, "EnableIPv4", "a network without IPv4 is not supported yet"
            )
        if ipv6:
            raise self.error(given["EnableIPv6"].at, "EnableIPv6", "IPv6 is not supported yet")
        if nft:
            self.warnings.append(f"{self.name}: EnableNFTables is ignored, rules are written with iptables")
        for key in ("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"):
            member = given.get(key)
            if member is None:
                continue
            if key == "IPv6SubnetLen":
                self.unsigned(member, key)
            elif member.value is not None or key == "IPv6Network":
                self.ipv6(member, key)
            self.warnings.append(f"{self.name}: {key} is ignored without EnableIPv6")

    def flag(self, member: Member | None, key: str) -> bool | None:
        if member is None or member.value is None:
            return None
        if not isinstance(member.value, bool):
            raise self.error(member.at, key, f"{key} must be true or false, not {describe(member.value)}")
        return member.value

    def unsigned(self, member: Member | None, key: str) -> int:
        """An unsigned integer; absent, null and 0 are all 0, which means default (Go's zero value)."""
        if member is None or member.value is None:
            return 0
        value = member.value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(member.at, key, f"{key} must be a whole number, not {describe(value)}")
        return value

    def address_text(self, member: Member, key: str, example: str) -> str:
        value = member.value
        if not isinstance(value, str):
            raise self.error(member.at, key, f'{key} must be text like "{example}", not {describe(value)}')
        if isinstance(value, Escaped):
            # flannel looks at the bytes between the quotes (ip.IP4.UnmarshalJSON trims them, nothing else).
            raise self.error(
                member.at, key, f"{key} is written with escapes, which flannel does not understand"
            )
        return value

    def ipv6(self, member: Member, key: str) -> None:
        text = self.address_text(member, key, "fc00::/48" if key == "IPv6Network" else "fc00::")
        address, slash, length = text.partition("/")
        try:
            good = "%" not in address and IPv6Address(address) is not None
        except AddressValueError:
            good = False
        if key == "IPv6Network":
            good = good and slash == "/" and _is_length(length, 128)
        else:
            good = good and not slash
        if not good:
            raise self.error(
                member.at, key, f"{key} {describe(text).removeprefix('the string ')} is not IPv6"
            )

    def network(self, at: int, member: Member | None) -> IPv4Network:
        if member is None:
            raise self.error(
                at, "Network", "Network is missing", hint='{"Network": "172.17.0.0/16"} is enough'
            )
        text = self.address_text(member, "Network", "172.17.0.0/16")
        shown = describe(text).removeprefix("the string ")
        if ":" in text:
            raise self.error(member.at, "Network", f"Network {shown} is IPv6, an IPv4 network is needed")
        address_text, slash, length = text.partition("/")
        if not slash:
            raise self.error(
                member.at, "Network", f"Network {shown} has no prefix length", hint=f'like "{text}/16"'
            )
        try:
            address = IPv4Address(address_text)
        except AddressValueError:
            raise self.error(member.at, "Network", f"Network {shown} is not an IPv4 network") from None
        if not _is_length(length, 32):
            raise self.error(member.at, "Network", f"Network {shown} has no prefix length from 0 to 32")
        network = IPv4Network((address, int(length)), strict=False)
        if network.prefixlen == 0:
            raise self.error(member.at, "Network", f"Network {shown} is every address there is")
        if network.network_address != address:
            self.warnings.append(f"{self.name}: Network {text} has host bits set, {network} is meant")
        for place in map(IPv4Network, _ODD_PLACES):
            if network.overlaps(place):
                self.warnings.append(
                    f"{self.name}: Network {network} overlaps {place}, which routers do not carry"
                )
        return network

    def subnet_len(self, network: IPv4Network, given: Mapping[str, Member]) -> int:
        prefix = network.prefixlen
        key = "SubnetLen"
        member = given.get(key)
        length = self.unsigned(member, key)
        strict = self.dialect.checks_config
        if member is None or not length:
            length = self.dialect.default_subnet_len(prefix)
            if length > 30:
                least = 28 if strict else 29
                raise self.error(
                    given["Network"].at, "Network", f"Network {network} is too small, /{least} is the least"
                )
            return length
        if length > 30:
            raise self.error(member.at, key, f"SubnetLen {length} must be below 31")
        if length < prefix:
            raise self.error(member.at, key, f"SubnetLen {length} is larger than Network {network}")
        if strict and length < prefix + 2:
            raise self.error(
                member.at, key, f"SubnetLen {length} gives Network {network} fewer than four subnets"
            )
        return length

    def bounds(
        self, network: IPv4Network, length: int, given: Mapping[str, Member]
    ) -> tuple[IPv4Address, IPv4Address]:
        size = 1 << (32 - length)
        first = self.bound("SubnetMin", network, length, given.get("SubnetMin"))
        last = self.bound("SubnetMax", network, length, given.get("SubnetMax"))
        # The first subnet is left out unless asked for: its address is the network's own (flannel.md 2.1).
        subnet_min = network.network_address + size if first is None else first
        subnet_max = network.broadcast_address + 1 - size if last is None else last
        if subnet_min > subnet_max:
            member = (
                given.get("SubnetMin") or given.get("SubnetMax") or given.get("SubnetLen") or given["Network"]
            )
            key = json_text.fold(member.name)
            raise self.error(
                member.at,
                _KEYS[self.dialect][key],
                f"no subnet is left, SubnetMin {subnet_min} is above SubnetMax {subnet_max}",
            )
        return subnet_min, subnet_max

    def bound(self, key: str, network: IPv4Network, length: int, member: Member | None) -> IPv4Address | None:
        """SubnetMin or SubnetMax as given; None if absent or 0.0.0.0, which is flannel's "unset"."""
        if member is None:
            return None
        text = self.address_text(member, key, "172.17.10.0")
        try:
            address = IPv4Address(text)
        except AddressValueError:
            shown = describe(text).removeprefix("the string ")
            raise self.error(member.at, key, f"{key} {shown} is not an IPv4 address") from None
        if not int(address):
            return None
        if address not in network:
            raise self.error(member.at, key, f"{key} {address} is outside Network {network}")
        if int(address) % (1 << (32 - length)):
            raise self.error(member.at, key, f"{key} {address} is not on a boundary of /{length} subnets")
        return address

    def backend(self, member: Member | None) -> tuple[str, dict[str, object]]:
        if member is None:
            return "udp", {}
        known_types = _KNOWN_BACKENDS[self.dialect]
        hint = "one of " + ", ".join(known_types)
        section = Object() if member.value is None else member.value
        if not isinstance(section, Object):
            what = f'Backend must be an object like {{"Type": "udp"}}, not {describe(section)}'
            raise self.error(member.at, "Backend", what)
        type_member = next((m for m in section if fold(m.name) == "type"), None)
        type_value = None if type_member is None else type_member.value
        if type_member is None or type_value is None or type_value == "":
            at = member.at if type_member is None else type_member.at
            raise self.error(at, "Backend.Type", "Backend.Type is missing", hint=hint)
        if not isinstance(type_value, str):
            what = f"Backend.Type must be text, not {describe(type_value)}"
            raise self.error(type_member.at, "Backend.Type", what, hint=hint)
        backend_type = type_value.lower()
        if backend_type not in known_types:
            shown = describe(type_value).removeprefix("the string ")
            what = f"Backend.Type {shown} is not a backend of flannel {self.dialect}"
            raise self.error(type_member.at, "Backend.Type", what, hint=hint)
        options = _options(backend_type, self.dialect)
        known = {"type": "Type"} | {fold(key): key for key in options}
        values: dict[str, object] = {}
        for key, option_member in self.members(section, known, "Backend").items():
            if key == "Type":
                continue
            shown = f"Backend.{key}"
            if (backend_type, key) in _NEVER_READ:
                self.warnings.append(f"{self.name}: {shown} is never read by flannel")
            elif key not in options:
                what = f"{shown} is not an option of {backend_type}"
                hint = "its options: " + ", ".join(options) if options else f"{backend_type} has no options"
                raise self.error(option_member.name_at, shown, what, hint=hint)
            elif option_member.value is not None:
                values[key] = self.option(option_member, options[key], shown)
        for key, option in options.items():
            if isinstance(option, _Text) and option.min_len and key not in values:
                raise self.error(member.at, f"Backend.{key}", f"Backend.{key} is missing")
        return backend_type, values

    def option(self, member: Member, option: _Option, shown: str) -> object:
        value = member.value
        if isinstance(option, _Bool):
            return self.flag(member, shown)
        if isinstance(option, _Int):
            if isinstance(value, bool | Number) or not isinstance(value, int):
                raise self.error(member.at, shown, f"{shown} must be a whole number, not {describe(value)}")
            if not option.low <= value <= option.high:
                what = f"{shown} {describe(value).removeprefix('the number ')} is not in {option.low}..{option.high}"
                raise self.error(member.at, shown, what)
            return value
        if not isinstance(value, str):
            raise self.error(member.at, shown, f"{shown} must be text, not {describe(value)}")
        if "\0" in value:
            raise self.error(member.at, shown, f"{shown} contains a NUL character")
        if len(value) < option.min_len:
            what = f"{shown} has {len(value)} characters, at least {option.min_len} are needed"
            raise self.error(member.at, shown, what)
        if option.one_of and value not in option.one_of:
            what = f"{shown} must be one of {', '.join(option.one_of)}, not {describe(value)}"
            raise self.error(member.at, shown, what)
        return str(value)


def _is_length(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and int(text) <= most

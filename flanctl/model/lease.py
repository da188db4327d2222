"""What a host announces with its subnet, byte for byte as flannel writes it (flannel.md 3.2).

LeaseAttributes.parse(b'{"PublicIP":"192.168.6.2","PublicIPv6":null}')
LeaseAttributes(IPv4Address("192.168.6.2")).format(Dialect.V0_7)      # b'{"PublicIP":"192.168.6.2"}'
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from typing import TYPE_CHECKING

from flanctl.errors import Invalid
from flanctl.model import json_text
from flanctl.model.json_text import Escaped, JsonError, Object, describe, fold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanctl.model.dialect import Dialect

_NAME = "lease value"
_FIELDS = {
    fold(name): name for name in ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data")
}
_NOBODY = IPv4Address(0)
_OCTET = rb"(0|[1-9][0-9]{0,2})"
_UDP = re.compile(rb'\{"PublicIP":"%b\.%b\.%b\.%b"(?:,"PublicIPv6":null)?\}' % ((_OCTET,) * 4))
"""What flannel writes for the udp backend. Read without the scanner in a tenth of its time: there may be thousands."""


class _NotJsonError(JsonError):
    """A lease value is not even JSON."""

    default_id = "bad-value"


@dataclass(frozen=True, slots=True)
class LeaseAttributes:
    """The value of a lease: who holds the subnet and what peers must know to reach it.

    Backend data is JSON as Python knows it (dict, list, str, int, …). A number or string with an unusual spelling
    remembers it (json_text.Number, Escaped) and is written back the same.
    """

    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None
    backend_type: str | None = None
    backend_data: object | None = field(default=None, hash=False)
    backend_v6_data: object | None = field(default=None, hash=False)
    unknown: tuple[tuple[str, object], ...] = field(default=(), hash=False)
    """Fields of others in their order, written back behind ours."""

    @classmethod
    def parse(cls, value: bytes) -> LeaseAttributes:
        """Read what any flannel wrote. Raises Invalid.

        Like Go: keys in any case, of two equal ones the last, null is absent. Unlike flannel, a value that names no
        host at all (`{}` reads as 0.0.0.0 there) is refused.
        """
        if usual := _UDP.fullmatch(value):
            a, b, c, d = map(int, usual.groups())
            if 0 < max(a, b, c, d) < 256:
                return cls(IPv4Address(a << 24 | b << 16 | c << 8 | d))
        _, _, document = json_text.parse(value, name=_NAME, error=_NotJsonError)
        if not isinstance(document, Object):
            raise Invalid(f"{_NAME} is {describe(document)}, not an object", id="bad-value")
        known: dict[str, object] = {}
        unknown: dict[str, object] = {}
        for member in document:
            name = _FIELDS.get(fold(member.name))
            if name is None:
                unknown[member.name] = json_text.plain(member.value)
            else:
                known[name] = member.value
        public_ip = _public_ip(known)
        public_ipv6 = _public_ipv6(known)
        if public_ip == _NOBODY and public_ipv6 is None:
            raise Invalid(f"{_NAME} names no host: PublicIP is missing or 0.0.0.0", id="bad-value")
        backend_type = known.get("BackendType") or None
        if backend_type is not None and not isinstance(backend_type, str):
            raise Invalid(f"{_NAME}: BackendType is {describe(backend_type)}, not text", id="bad-value")
        return cls(
            public_ip,
            public_ipv6,
            backend_type,
            json_text.plain(known.get("BackendData")),
            json_text.plain(known.get("BackendV6Data")),
            tuple(unknown.items()),
        )

    def format(self, dialect: Dialect) -> bytes:
        """The bytes flannel of that dialect writes: Go's json.Marshal, its field order, nothing empty."""
        document: dict[str, object] = {"PublicIP": str(self.public_ip)}
        if dialect.writes_ipv6:
            document["PublicIPv6"] = None if self.public_ipv6 is None else str(self.public_ipv6)
        if self.backend_type:
            document["BackendType"] = self.backend_type
        if self.backend_data is not None:
            document["BackendData"] = self.backend_data
        if dialect.writes_ipv6 and self.backend_v6_data is not None:
            document["BackendV6Data"] = self.backend_v6_data
        document.update(self.unknown)
        return json_text.write(document, short_escapes=dialect.short_escapes).encode()


@dataclass(frozen=True, slots=True)
class Lease:
    """One subnet and who holds it, as the registry held it at `revision`."""

    subnet: IPv4Network
    attributes: LeaseAttributes
    revision: int
    reservation: bool
    """The key has no time to live: the subnet waits for its host for ever."""
    ttl: float | None = None
    """Seconds left when the lease was read; None for a reservation or if nobody asked."""
    key: str = ""
    """The full key in the store."""


def _public_ip(known: Mapping[str, object]) -> IPv4Address:
    if "PublicIP" not in known:
        return _NOBODY
    value = known["PublicIP"]
    if isinstance(value, str) and not isinstance(
        value, Escaped
    ):  # flannel takes the bytes between the quotes
        try:
            return IPv4Address(value)
        except AddressValueError:
            pass
    raise Invalid(f"{_NAME}: PublicIP is {describe(value)}, not an IPv4 address", id="bad-value")


def _public_ipv6(known: Mapping[str, object]) -> IPv6Address | None:
    value = known.get("PublicIPv6")
    if value is None:
        return None
    if isinstance(value, str) and not isinstance(value, Escaped) and "%" not in value:
        try:
            return IPv6Address(value)
        except AddressValueError:
            pass
    raise Invalid(f"{_NAME}: PublicIPv6 is {describe(value)}, not an IPv6 address", id="bad-value")

"""The name of a lease's key: `172.17.41.0-24`, with IPv6 `10.42.10.0-24&2001:cafe:42:5a::-64` (flannel.md 3.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

from flanctl.errors import Invalid

_OCTET = r"(0|[1-9][0-9]{0,2})"
_USUAL = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}-([1-9]|[12][0-9]|3[01])", re.ASCII)
"""What flannel writes without IPv6. By number, because ipaddress reads text ten times slower and there may be thousands."""


@dataclass(frozen=True, slots=True, order=True)
class SubnetKey:
    """Which subnet a key speaks of."""

    subnet: IPv4Network
    subnet6: IPv6Network | None = None

    @classmethod
    def parse(cls, name: str) -> SubnetKey:
        """Read the last component of a key, as widely as flannel does, or raise Invalid.

        flannel reads `172.17.41.5-24` and `172.17.41.0-024` too and routes them as 172.17.41.0/24; so do we, since
        an address that some host uses is not free. It reads no /32; and /0, which it reads, would be every address
        there is (an IPv6-only host of 0.28 writes `0.0.0.0-0&…`), so that is refused.
        """
        if usual := _USUAL.fullmatch(name):
            a, b, c, d, length = map(int, usual.groups())
            if max(a, b, c, d) < 256:
                return cls(IPv4Network((a << 24 | b << 16 | c << 8 | d, length), strict=False))
        ipv4, both, ipv6 = name.partition("&")
        address, length = _split(name, ipv4, 1, 31)
        try:
            subnet = IPv4Network((IPv4Address(address), length), strict=False)
        except AddressValueError:
            raise _bad(name, "has no IPv4 address") from None
        if not both:
            return cls(subnet)
        address, length = _split(name, ipv6, 0, 127)
        if not set(address) <= set("0123456789abcdef:"):  # flannel: [a-f\d:]+, so neither capitals nor dots
            raise _bad(name, "has no IPv6 address behind &")
        try:
            return cls(subnet, IPv6Network((IPv6Address(address), length), strict=False))
        except AddressValueError:
            raise _bad(name, "has no IPv6 address behind &") from None

    def format(self) -> str:
        """The name flannel gives the key."""
        name = f"{self.subnet.network_address}-{self.subnet.prefixlen}"
        if self.subnet6 is not None:
            name += f"&{self.subnet6.network_address}-{self.subnet6.prefixlen}"
        return name


def _split(name: str, part: str, low: int, high: int) -> tuple[str, int]:
    address, dash, length = part.rpartition("-")
    if not dash or not (length.isascii() and length.isdigit()) or len(length) > 9:
        raise _bad(name, "is not of the form ADDRESS-LENGTH")
    if not low <= int(length) <= high:
        raise _bad(name, f"has a prefix length outside {low}..{high}")
    return address, int(length)


def _bad(name: str, what: str) -> Invalid:
    shown = ascii(name if len(name) <= 80 else name[:77] + "...")
    return Invalid(f"key {shown} {what}", id="bad-key")

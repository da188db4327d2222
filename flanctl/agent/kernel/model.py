"""What we know of the kernel: links, addresses and routes as values, without any netlink in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Interface, IPv4Network

ROUTE_PROTOCOL = 0x66
"""The mark by which we know our routes without memory of them: `proto 102`, an `f` for flannel.

Numbers below 5 belong to the kernel and administrators. /etc/iproute2/rt_protos, include/uapi/linux/rtnetlink.h
and the programs that own routes take 8-18, 42 (babel), 80 (Calico's Felix), 84 (OVN), 99 (Open/R) and 186-197
(FRR). 102 is in none of those lists.
"""

KERNEL_PROTOCOL = 2
"""RTPROT_KERNEL: routes the kernel makes by itself for an address with a prefix."""


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface and its IPv4 addresses, in the kernel's order."""

    index: int
    name: str
    kind: str | None = None
    """`tun`, `veth`, `bridge`, …; None for a physical one."""
    mtu: int = 1500
    up: bool = False
    alias: str | None = None
    addresses: tuple[IPv4Interface, ...] = ()
    carrier: bool = True
    """False: no cable, or a TUN that no process holds."""
    loopback: bool = False
    queue_length: int = 1000
    running: bool = True
    """Its queue takes packets: up to a second after the carrier came (the kernel's linkwatch)."""
    ethernet: bool = True
    """Its frames have an Ethernet header (ARPHRD_ETHER): also a VLAN, a bond, a bridge; not a TUN or a WireGuard link."""


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast IPv4 route of the main table."""

    destination: IPv4Network
    link: int
    """Index of the outgoing link."""
    gateway: IPv4Address | None = None
    protocol: int = ROUTE_PROTOCOL
    scope: str = "global"
    """`global`, `link` or `host`; `link` when there is no gateway."""
    source: IPv4Address | None = None
    metric: int = 0
    onlink: bool = False


@dataclass(frozen=True, slots=True)
class Path:
    """Where the kernel would send a packet: the answer of `ip route get`."""

    link: int
    source: IPv4Address | None
    gateway: IPv4Address | None


@dataclass(frozen=True, slots=True)
class RouteReport:
    """What one `Routes.apply` did: sentences for the log. `failed` stays wanted and is tried again."""

    repaired: tuple[str, ...] = field(default=())
    failed: tuple[str, ...] = field(default=())
    missing: int = 0
    """How many wanted routes the kernel does not have."""

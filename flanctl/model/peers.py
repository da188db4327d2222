"""Whom this host sends packets to, and what is wrong with a set of leases.

Problem ids are promises, the same in `subnets ls`, logs and JSON:

- `duplicate-ip`     two leases name one public IP: cloned machines, or a host that announces its NAT address
- `overlap`          two leases cover one address
- `outside-network`  outside Network or SubnetMin..SubnetMax, or of another length
- `other-backend`    announced by another backend than ours, which cannot reach it (only `peers_of` tells)
- `bad-public-ip`    no packet can be sent to that address (only `peers_of` tells)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flanctl.model.subnet_key import SubnetKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.model.lease import Lease
    from flanctl.model.network_config import NetworkConfig


@dataclass(frozen=True, slots=True)
class Peer:
    """Another host of the network: packets for `subnet` go to `public_ip`."""

    subnet: IPv4Network
    public_ip: IPv4Address
    backend_type: str | None
    backend_data: object | None = field(hash=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one lease."""

    id: str
    subnet: IPv4Network
    message: str


def peers_of(
    leases: Iterable[Lease],
    *,
    own: IPv4Network | None,
    own_ip: IPv4Address,
    config: NetworkConfig,
    backend_type: str,
) -> tuple[tuple[Peer, ...], tuple[Problem, ...]]:
    """The peers this host routes to, sorted by subnet, and why a lease is no peer or a doubtful one.

    `own` is our own subnet, `own_ip` our public IP. Like flannel, udp routes to every lease whatever its type, the
    others only to their own kind, and foreign lengths are routed (longest prefix wins). Unlike flannel, what lies
    outside Network or inside our own subnet is left out: it would draw packets that are none of its business. A
    second lease with our own public IP is left out too: it is what we held before, and would send packets in a loop.
    """
    peers: dict[IPv4Network, Peer] = {}
    problems: list[Problem] = []
    for lease in _ordered(leases):
        subnet, attributes = lease.subnet, lease.attributes
        if subnet == own:
            continue
        left_out = _reason_to_leave_out(
            lease, own=own, own_ip=own_ip, config=config, backend_type=backend_type
        )
        if left_out is None and subnet in peers:
            left_out = "overlap", f"key {lease.key} names a subnet that another key names too"
        if left_out is None:
            peers[subnet] = Peer(
                subnet, attributes.public_ip, attributes.backend_type, attributes.backend_data
            )
        elif own is not None or left_out[0] != "duplicate-ip":
            problems.append(Problem(left_out[0], subnet, f"no route to {subnet}: {left_out[1]}"))

    routed = sorted(peers)
    overlapping = _overlapping(routed if own is None else [own, *routed])
    hosts = Counter(peer.public_ip for peer in peers.values())
    for subnet in routed:
        if subnet in overlapping:
            message = f"{subnet} overlaps {overlapping[subnet]}: the longer prefix wins"
            problems.append(Problem("overlap", subnet, message))
        if hosts[peers[subnet].public_ip] > 1:
            message = f"{subnet} is not the only subnet of {peers[subnet].public_ip}"
            problems.append(Problem("duplicate-ip", subnet, message))
    return tuple(peers[subnet] for subnet in routed), tuple(problems)


def _reason_to_leave_out(
    lease: Lease, *, own: IPv4Network | None, own_ip: IPv4Address, config: NetworkConfig, backend_type: str
) -> tuple[str, str] | None:
    """Problem id and words, or None for a peer."""
    public_ip, theirs = lease.attributes.public_ip, lease.attributes.backend_type
    if not lease.subnet.subnet_of(config.network):
        return "outside-network", f"it is outside Network {config.network}"
    if public_ip == own_ip:
        return "duplicate-ip", f"{own_ip} is this host"
    if unreachable_address(public_ip):
        return "bad-public-ip", f"public IP {public_ip} is no host's"
    if backend_type not in ("udp", theirs):
        return "other-backend", f"its backend is {theirs or 'not named'}, ours is {backend_type}"
    if own is not None and lease.subnet.subnet_of(own):
        return "overlap", f"it lies inside our own {own}"
    return None


def lease_problems(leases: Iterable[Lease], config: NetworkConfig) -> Mapping[IPv4Network, tuple[str, ...]]:
    """The problem ids of each lease's subnet, in a fixed order; an empty tuple where all is well."""
    ordered = _ordered(leases)
    hosts = Counter(lease.attributes.public_ip for lease in ordered)
    overlapping = _overlapping([lease.subnet for lease in ordered])
    found: dict[IPv4Network, tuple[str, ...]] = {}
    for lease in ordered:
        problems = {
            "duplicate-ip": hosts[lease.attributes.public_ip] > 1,
            "overlap": lease.subnet in overlapping,
            "outside-network": not config.accepts(lease.subnet),
        }
        found[lease.subnet] = tuple(id_ for id_, is_so in problems.items() if is_so)
    return found


def _ordered(leases: Iterable[Lease]) -> list[Lease]:
    """By subnet; of two keys that mean one subnet (`…-24`, `…-024`), the one flannel would write comes first."""
    return sorted(
        leases,
        key=lambda lease: (lease.subnet, not lease.key.endswith(SubnetKey(lease.subnet).format()), lease.key),
    )


def unreachable_address(address: IPv4Address) -> bool:
    return address.is_unspecified or address.is_loopback or address.is_multicast or int(address) == 0xFFFFFFFF


def _overlapping(subnets: Sequence[IPv4Network]) -> dict[IPv4Network, IPv4Network]:
    """Each subnet that shares addresses with another, and one such other.

    Networks nest or are apart, so those that are open around the next one fit on a stack: at most 32.
    """
    found: dict[IPv4Network, IPv4Network] = {}
    around: list[IPv4Network] = []
    for subnet in sorted(subnets):  # a network sorts before what lies inside it
        while around and around[-1].broadcast_address < subnet.network_address:
            around.pop()
        for outer in around:
            found.setdefault(outer, subnet)
        if around:
            found.setdefault(subnet, around[-1])
        around.append(subnet)
    return found

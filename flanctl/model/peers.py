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
    others = [lease for lease in _ordered(leases) if lease.subnet != own]
    for lease in others:
        subnet, attributes = lease.subnet, lease.attributes
        public_ip = attributes.public_ip

        def problem(id_: str, message: str, subnet: IPv4Network = subnet) -> None:
            problems.append(Problem(id_, subnet, f"{subnet} {message}"))

        if not subnet.subnet_of(config.network):
            problem("outside-network", f"is outside Network {config.network}, no route")
        elif public_ip == own_ip:
            problem("duplicate-ip", f"carries our own public IP {own_ip}, no route")
        elif _unreachable(public_ip):
            problem("bad-public-ip", f"has the public IP {public_ip}, which no packet can reach")
        elif backend_type not in ("udp", attributes.backend_type):
            found = attributes.backend_type or "none"
            problem("other-backend", f"has backend type {found}, not {backend_type}, no route")
        elif own is not None and subnet.subnet_of(own):
            problem("overlap", f"lies inside our own subnet {own}, no route")
        elif subnet in peers:
            problem("overlap", f"is also announced by the key {lease.key}, which is ignored")
        else:
            peers[subnet] = Peer(subnet, public_ip, attributes.backend_type, attributes.backend_data)
    mine = () if own is None else (own,)
    for subnet, other in _overlaps([*mine, *peers]):
        if subnet in peers:
            problems.append(Problem("overlap", subnet, f"{subnet} overlaps {other}, the longer prefix wins"))
    problems += [
        Problem("duplicate-ip", peer.subnet, f"{peer.subnet} shares public IP {peer.public_ip} with others")
        for peer in _sharing_ip(peers.values())
    ]
    return tuple(peers[subnet] for subnet in sorted(peers)), tuple(problems)


def lease_problems(leases: Iterable[Lease], config: NetworkConfig) -> Mapping[IPv4Network, tuple[str, ...]]:
    """The problem ids of each lease's subnet, in a fixed order; an empty tuple where all is well."""
    ordered = _ordered(leases)
    addresses = Counter(lease.attributes.public_ip for lease in ordered)
    overlapping = {subnet for pair in _overlaps([lease.subnet for lease in ordered]) for subnet in pair}
    return {
        lease.subnet: tuple(
            id_
            for id_, found in (
                ("duplicate-ip", addresses[lease.attributes.public_ip] > 1),
                ("overlap", lease.subnet in overlapping),
                ("outside-network", not config.accepts(lease.subnet)),
            )
            if found
        )
        for lease in ordered
    }


def _ordered(leases: Iterable[Lease]) -> list[Lease]:
    """By subnet; of two keys that mean one subnet (`…-24`, `…-024`), the one flannel would write comes first."""
    return sorted(
        leases,
        key=lambda lease: (lease.subnet, not lease.key.endswith(SubnetKey(lease.subnet).format()), lease.key),
    )


def _unreachable(address: IPv4Address) -> bool:
    return address.is_unspecified or address.is_loopback or address.is_multicast or int(address) == 0xFFFFFFFF


def _sharing_ip(peers: Iterable[Peer]) -> list[Peer]:
    peers = sorted(peers, key=lambda peer: peer.subnet)
    count = Counter(peer.public_ip for peer in peers)
    return [peer for peer in peers if count[peer.public_ip] > 1]


def _overlaps(subnets: Sequence[IPv4Network]) -> list[tuple[IPv4Network, IPv4Network]]:
    """Pairs that share addresses, the inner one first. Networks nest or are apart, so a stack finds all."""
    pairs: list[tuple[IPv4Network, IPv4Network]] = []
    around: list[IPv4Network] = []
    for subnet in sorted(subnets):  # a network sorts before what lies inside it
        while around and around[-1].broadcast_address < subnet.network_address:
            around.pop()
        pairs += [(subnet, outer) for outer in around]
        around.append(subnet)
    return pairs

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
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from flanctl.model.subnet_key import SubnetKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What is wrong, with one lease or (`subnet` None) with something else. The message names both parties."""

    id: str
    subnet: IPv4Network | None
    message: str


def peers_of(
    leases: Iterable[Lease],
    *,
    own: IPv4Network | None,
    own_ip: IPv4Address,
    config: NetworkConfig,
    backend_type: str,
    memo: dict[int, tuple[Lease, Peer]] | None = None,
) -> tuple[tuple[Peer, ...], tuple[Problem, ...]]:
    """The peers this host routes to, sorted by subnet, and why a lease is no peer or a doubtful one.

    `own` is our own subnet, `own_ip` our public IP. Like flannel, udp routes to every lease whatever its type, the
    others only to their own kind, and foreign lengths are routed (longest prefix wins) and told. Unlike flannel, what lies
    outside Network or inside our own subnet is left out: it would draw packets that are none of its business. A
    second lease with our own public IP is left out too: it is what we held before, and would send packets in a loop.
    With the `memo` of the call before, a lease that is the same object gives the same Peer, so that comparing thousands
    of peers costs nothing.
    """
    peers: list[Peer] = []
    problems: list[Problem] = []
    made: dict[int, tuple[Lease, Peer]] = {}
    before = memo or {}
    holders: dict[int, Lease] = {}
    """By place, for the problems' words."""
    ours = None if own is None else _place(own)
    reason = _Reasons(ours, own_ip, config, backend_type)
    fits = _fits(config)
    for place, lease in _ordered(leases):
        subnet = lease.subnet
        if place == ours:
            continue
        left_out = reason.to_leave_out(lease, place)
        if left_out is None and place in holders:
            first = holders[place]
            left_out = (
                "overlap",
                (
                    f"key {lease.key} of {lease.attributes.public_ip} names a subnet that key {first.key} of"
                    f" {first.attributes.public_ip} names too"
                ),
            )
        if left_out is None:
            attributes = lease.attributes
            holders[place] = lease
            if (one := before.get(id(lease))) is None or one[0] is not lease:
                kind, data = attributes.backend_type, attributes.backend_data
                one = lease, Peer(subnet, attributes.public_ip, kind, data)
            made[id(lease)] = one
            peers.append(one[1])
            if not fits(place):
                problems.append(
                    Problem(
                        "outside-network",
                        subnet,
                        f"{subnet} of {attributes.public_ip} does not fit the network config"
                        f" (/{config.subnet_len} from {config.subnet_min} to {config.subnet_max})",
                    )
                )
        elif own is not None or left_out[0] != "duplicate-ip":
            problems.append(Problem(left_out[0], subnet, f"no route to {subnet}: {left_out[1]}"))
    problems += _shared(peers, own, own_ip)
    if memo is not None:
        memo.clear()
        memo.update(made)
    return tuple(peers), tuple(problems)


def _shared(peers: Sequence[Peer], own: IPv4Network | None, own_ip: IPv4Address) -> list[Problem]:
    """What two hosts both cover, and what one host has twice; each with both parties."""
    problems: list[Problem] = []
    numbers = [int(peer.public_ip) for peer in peers]
    subnets = [peer.subnet for peer in peers] + ([] if own is None else [own])
    if _overlap_somewhere(subnets):
        overlapping = _overlapping(subnets)
        holder = {peer.subnet: peer.public_ip for peer in peers if peer.subnet in overlapping}
        if own is not None:
            holder[own] = own_ip
        for peer in peers:
            if (other := overlapping.get(peer.subnet)) is not None:
                words = f"{peer.subnet} of {peer.public_ip} overlaps {other} of {holder[other]}: the longer prefix wins"
                problems.append(Problem("overlap", peer.subnet, words))
    if len(set(numbers)) < len(numbers):
        hosts: dict[int, list[IPv4Network]] = {}
        for number, peer in zip(numbers, peers, strict=True):
            hosts.setdefault(number, []).append(peer.subnet)
        for number, peer in zip(numbers, peers, strict=True):
            if len(held := hosts[number]) > 1:
                other = held[1] if held[0] == peer.subnet else held[0]
                words = (
                    f"{peer.subnet} and {other} both name {peer.public_ip}: one host, or two with one address"
                )
                problems.append(Problem("duplicate-ip", peer.subnet, words))
    return problems


def _overlap_somewhere(subnets: Iterable[IPv4Network]) -> bool:
    """Whether it is worth looking for overlaps: in order, one begins before another has ended."""
    end = -1
    for place in sorted(map(_place, subnets)):
        start = place >> 6
        if start <= end:
            return True
        end = start + (1 << (32 - (place & 63))) - 1
    return False


class _Reasons:
    """Why a lease is no peer. By number, because ipaddress compares slowly and there may be thousands."""

    def __init__(
        self, own: int | None, own_ip: IPv4Address, config: NetworkConfig, backend_type: str
    ) -> None:
        self._own = own
        self._own_number = int(own_ip)
        self._network = _place(config.network)
        self._config = config
        self._backend_type = backend_type

    def to_leave_out(self, lease: Lease, place: int) -> tuple[str, str] | None:
        """Problem id and words, or None for a peer."""
        public_ip, theirs = lease.attributes.public_ip, lease.attributes.backend_type
        if not _inside(place, self._network):
            return "outside-network", f"it is {public_ip}'s and outside Network {self._config.network}"
        number = int(public_ip)
        if number == self._own_number:
            return "duplicate-ip", f"key {lease.key} names {public_ip}, which is this host"
        if unreachable_address(public_ip):
            return "bad-public-ip", f"public IP {public_ip} is no host's"
        if self._backend_type not in ("udp", theirs):
            return "other-backend", f"its backend is {theirs or 'not named'}, ours is {self._backend_type}"
        if self._own is not None and _inside(place, self._own):
            return "overlap", f"{public_ip}'s, it lies inside our own subnet"
        return None


def lease_problems(leases: Iterable[Lease], config: NetworkConfig) -> Mapping[IPv4Network, tuple[str, ...]]:
    """The problem ids of each lease's subnet, in a fixed order; an empty tuple where all is well."""
    ordered = _ordered(leases)
    hosts = Counter(int(lease.attributes.public_ip) for _, lease in ordered)
    subnets = [lease.subnet for _, lease in ordered]
    overlapping = _overlapping(subnets) if _overlap_somewhere(subnets) else {}
    fits = _fits(config)
    found: dict[IPv4Network, tuple[str, ...]] = {}
    for place, lease in ordered:
        problems = (
            ("duplicate-ip", hosts[int(lease.attributes.public_ip)] > 1),
            ("overlap", bool(overlapping) and lease.subnet in overlapping),
            ("outside-network", not fits(place)),
        )
        found[lease.subnet] = tuple([id_ for id_, is_so in problems if is_so])
    return found


def _ordered(leases: Iterable[Lease]) -> list[tuple[int, Lease]]:
    """By subnet, with its number; of two keys that mean one subnet (`…-24`, `…-024`), the one flannel would write
    comes first.
    """
    ordered = sorted(((_place(lease.subnet), lease) for lease in leases), key=itemgetter(0))
    if any(one[0] == following[0] for one, following in pairwise(ordered)):
        ordered.sort(
            key=lambda one: (
                one[0],
                not one[1].key.endswith(SubnetKey(one[1].subnet).format()),
                one[1].key,
            )
        )
    return ordered


def _fits(config: NetworkConfig) -> Callable[[int], bool]:
    """`config.accepts` of a subnet's number."""
    lowest, highest, length = int(config.subnet_min), int(config.subnet_max), config.subnet_len
    return lambda place: place & 63 == length and lowest <= place >> 6 <= highest


def _place(subnet: IPv4Network) -> int:
    """A subnet as one number, in the order of subnets: address, then length."""
    return int(subnet.network_address) << 6 | subnet.prefixlen


def _inside(place: int, outer: int) -> bool:
    """Whether a subnet, as a number, lies in another or is it."""
    length = outer & 63
    return place & 63 >= length and (place ^ outer) >> (38 - length) == 0


def unreachable_address(address: IPv4Address) -> bool:
    """Nobody's, this host's own, a group's, or everybody's: no packet for one host can go there."""
    number = int(address)
    return number in {0, 0xFFFFFFFF} or number >> 24 == 127 or number >> 28 == 14


def _overlapping(subnets: Sequence[IPv4Network]) -> dict[IPv4Network, IPv4Network]:
    """Each subnet that shares addresses with another, and one such other.

    Networks nest or are apart, so those that are open around the next one fit on a stack: at most 32.
    """
    found: dict[IPv4Network, IPv4Network] = {}
    around: list[tuple[int, IPv4Network]] = []
    for subnet in sorted(subnets, key=_place):  # a network sorts before what lies inside it
        place = _place(subnet)
        while around and not _inside(place, around[-1][0]):
            around.pop()
        for _, outer in around:
            found.setdefault(outer, subnet)
        if around:
            found.setdefault(subnet, around[-1][1])
        around.append((place, subnet))
    return found

"""In which order a host tries subnets.

First those it had before, then the one its public IP hashes to, then on from there. So a host that lost its disk
gets its subnet back, and fifty hosts that start at once rarely reach for the same one. flannel draws at random from
the first hundred free ones instead and dies when it loses the race (flannel.md 3.4).

    pool = SubnetPool(config, IPv4Address("192.168.6.2"), previous=[had])
    next(pool.candidates(taken=[lease.subnet for lease in leases]), None)
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.model.network_config import NetworkConfig

_SPREAD = 0xD1B54A32D192ED03
"""2^64 / 1.2207 (the root of x⁴ = x + 1: hard to approach by fractions), so that neighbouring addresses land far
apart (multiplicative hashing, Knuth, TAOCP 3, 6.4). Fifty hosts of one LAN do not meet at all in 255 subnets, where
a random hash would make five of them meet; tried with steps of 1, 2, 4, … 256 and 65536 between addresses. It must
never change: a host that lost its disk comes back to its subnet by it."""


class SubnetPool:
    """The subnets of one network as one host sees them. The order depends on nothing but the arguments."""

    def __init__(
        self, config: NetworkConfig, public_ip: IPv4Address, previous: Sequence[IPv4Network] = ()
    ) -> None:
        self.config = config
        self.start = ((int(public_ip) * _SPREAD) % (1 << 64)) * config.capacity >> 64
        """Index of the subnet this host's public IP hashes to."""
        self.previous = tuple(dict.fromkeys(subnet for subnet in previous if config.accepts(subnet)))
        """Subnets the host had, the best first; those the config no longer has are left out."""

    def candidates(self, taken: Collection[IPv4Network]) -> Iterator[IPv4Network]:
        """Every subnet that overlaps nothing taken, each once, the best first. Lazy: a /8 of /30 has millions."""
        gaps = self._gaps(taken)
        starts = [first for first, _ in gaps]
        seen: set[int] = set()
        for subnet in self.previous:
            index = self._index(subnet)
            if (gap := bisect_right(starts, index) - 1) >= 0 and index <= gaps[gap][1]:
                seen.add(index)
                yield subnet
        for index in self._from_start(gaps):
            if index not in seen:
                yield self.config.subnet_at(index)

    def free(self, taken: Iterable[IPv4Network]) -> int:
        """How many subnets overlap nothing taken."""
        return sum(last - first + 1 for first, last in self._gaps(taken))

    def _index(self, subnet: IPv4Network) -> int:
        return (int(subnet.network_address) - int(self.config.subnet_min)) // self.config.subnet_size

    def _from_start(self, gaps: Sequence[tuple[int, int]]) -> Iterator[int]:
        for first, last in gaps:
            yield from range(max(first, self.start), last + 1)
        for first, last in gaps:
            yield from range(first, min(last, self.start - 1) + 1)

    def _gaps(self, taken: Iterable[IPv4Network]) -> list[tuple[int, int]]:
        """Runs of free indices, first and last, in order. n log n in what is taken, whatever the pool's size."""
        base, size = int(self.config.subnet_min), self.config.subnet_size
        gaps: list[tuple[int, int]] = []
        here = 0
        for first, last in sorted(
            ((int(net.network_address) - base) // size, (int(net.broadcast_address) - base) // size)
            for net in taken
        ):
            if first >= self.config.capacity:
                break
            if first > here:
                gaps.append((here, first - 1))
            here = max(here, last + 1)
        if here < self.config.capacity:
            gaps.append((here, self.config.capacity - 1))
        return gaps

"""The order in which a host tries subnets: what it had, where its public IP hashes to, then all the others."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.model.dialect import Dialect
from flanctl.model.network_config import NetworkConfig
from flanctl.model.subnet_pool import SubnetPool

NOTE = NetworkConfig.parse('{"Network":"172.17.0.0/16"}', Dialect.V0_28)
SMALL = NetworkConfig.parse('{"Network":"10.9.0.0/24","SubnetLen":28}', Dialect.V0_28)
HUGE = NetworkConfig.parse('{"Network":"10.0.0.0/8","SubnetLen":30}', Dialect.V0_28)

ADDRESSES = st.integers(0, 2**32 - 1).map(IPv4Address)
NEARBY = st.builds(
    lambda at, length: IPv4Network((int(SMALL.network.network_address) - 512 + at, length), strict=False),
    st.integers(0, 1280),
    st.integers(20, 31),
)
"""Subnets of any length inside, across and outside SMALL."""


def free_ones(config: NetworkConfig, taken: list[IPv4Network]) -> set[IPv4Network]:
    """The same the slow way, which anyone can see is right."""
    return {subnet for subnet in config.subnets() if not any(subnet.overlaps(other) for other in taken)}


@given(
    ADDRESSES,
    st.lists(NEARBY, max_size=6),
    st.lists(NEARBY | st.sampled_from(list(SMALL.subnets())), max_size=4),
)
def test_every_free_subnet_comes_exactly_once_and_no_other(
    public_ip: IPv4Address, taken: list[IPv4Network], previous: list[IPv4Network]
) -> None:
    pool = SubnetPool(SMALL, public_ip, previous)
    candidates = list(pool.candidates(taken))
    assert len(candidates) == len(set(candidates)) == pool.free(taken)
    assert set(candidates) == free_ones(SMALL, taken)


@given(ADDRESSES, st.lists(NEARBY, max_size=3))
def test_the_same_host_gets_the_same_order(public_ip: IPv4Address, taken: list[IPv4Network]) -> None:
    first, second = (list(SubnetPool(SMALL, public_ip).candidates(taken)) for _ in range(2))
    assert first == second


def test_the_order_is_the_same_in_every_process_and_python() -> None:
    """The literal subnet is a promise: a host that lost its disk must come back to it after an upgrade too."""
    assert next(SubnetPool(NOTE, IPv4Address("192.168.6.2")).candidates([])) == IPv4Network("172.17.177.0/24")
    program = (
        "from ipaddress import IPv4Address; from flanctl.model.dialect import Dialect;"
        "from flanctl.model.network_config import NetworkConfig; from flanctl.model.subnet_pool import SubnetPool;"
        'config = NetworkConfig.parse(\'{"Network":"172.17.0.0/16"}\', Dialect.V0_28);'
        "print(*list(SubnetPool(config, IPv4Address('10.0.2.15')).candidates([]))[:3])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {
        " ".join(map(str, islice(SubnetPool(NOTE, IPv4Address("10.0.2.15")).candidates([]), 3))) + "\n"
    }


def test_what_the_host_had_comes_first_in_that_order() -> None:
    had = [IPv4Network("172.17.9.0/24"), IPv4Network("172.17.3.0/24")]
    assert list(islice(SubnetPool(NOTE, IPv4Address("1.2.3.4"), had).candidates([]), 2)) == had


@pytest.mark.parametrize("gone", ["172.18.9.0/24", "172.17.9.0/25", "172.17.0.0/24", "172.17.0.0/16"])
def test_what_the_host_had_is_forgotten_if_the_config_has_it_no_longer(gone: str) -> None:
    pool = SubnetPool(NOTE, IPv4Address("1.2.3.4"), [IPv4Network(gone)])
    assert pool.previous == ()
    assert IPv4Network(gone) not in set(pool.candidates([]))


def test_what_the_host_had_and_another_took_is_not_offered() -> None:
    had = IPv4Network("172.17.9.0/24")
    assert had not in set(SubnetPool(NOTE, IPv4Address("1.2.3.4"), [had]).candidates([had]))
    assert had not in set(
        SubnetPool(NOTE, IPv4Address("1.2.3.4"), [had]).candidates([IPv4Network("172.17.9.128/25")])
    )


def test_a_full_network_has_no_candidate() -> None:
    assert list(SubnetPool(NOTE, IPv4Address("1.2.3.4")).candidates(list(NOTE.subnets()))) == []
    assert list(SubnetPool(NOTE, IPv4Address("1.2.3.4")).candidates([IPv4Network("172.0.0.0/8")])) == []


def test_a_network_of_one_subnet_offers_it() -> None:
    one = NetworkConfig.parse('{"Network":"10.1.2.0/24"}', Dialect.V0_7)
    assert list(SubnetPool(one, IPv4Address("1.2.3.4")).candidates([])) == [IPv4Network("10.1.2.128/25")]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 5, 8, 10, 16, 32, 64, 128, 256, 65536]))
def test_fifty_neighbours_hardly_ever_reach_for_the_same_subnet(first: int, step: int) -> None:
    """Hosts of one LAN, in a row or with gaps, or one in each of fifty LANs."""
    starts = {SubnetPool(NOTE, IPv4Address((first + step * host) % 2**32)).start for host in range(50)}
    assert len(starts) >= 47


def test_fifty_random_hosts_rarely_meet() -> None:
    """No worse than chance: of fifty drawn from 255, 45.7 differ on average."""
    seeded = random.Random(4)
    distinct = [
        len({SubnetPool(NOTE, IPv4Address(seeded.randrange(2**32))).start for _ in range(50)})
        for _ in range(40)
    ]
    assert sum(distinct) / len(distinct) > 44


def test_four_million_subnets_and_ten_thousand_leases_take_no_time() -> None:
    seeded = random.Random(4)
    taken = [HUGE.subnet_at(seeded.randrange(HUGE.capacity)) for _ in range(10_000)]
    pool = SubnetPool(HUGE, IPv4Address("192.168.6.2"))
    began = time.perf_counter()
    first = list(islice(pool.candidates(taken), 100))
    assert time.perf_counter() - began < 2, "the search must not grow with the pool"
    assert len(set(first)) == 100
    assert not set(first) & set(taken)
    assert pool.free(taken) == HUGE.capacity - len(set(taken))

"""Whom a host routes to, and what is wrong with the leases of a network."""

from __future__ import annotations

import math
import time
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.model.peers import Peer, Problem, lease_problems, peers_of
from flanctl.model.subnet_pool import SubnetPool

CONFIG = NetworkConfig.parse('{"Network":"172.17.0.0/16","SubnetMin":"172.17.10.0"}', Dialect.V0_28)
OWN = IPv4Network("172.17.41.0/24")
OWN_IP = IPv4Address("192.168.6.2")


def lease(
    subnet: str,
    public_ip: str,
    backend: str | None = None,
    data: object | None = None,
    key: str | None = None,
) -> Lease:
    network = IPv4Network(subnet)
    name = f"{network.network_address}-{network.prefixlen}"
    attributes = LeaseAttributes(IPv4Address(public_ip), backend_type=backend, backend_data=data)
    return Lease(
        network, attributes, revision=1, reservation=False, key=f"/jxdd/network/subnets/{key or name}"
    )


def look(
    *leases: Lease, backend: str = "udp", own: IPv4Network | None = OWN
) -> tuple[tuple[Peer, ...], tuple[Problem, ...]]:
    return peers_of(leases, own=own, own_ip=OWN_IP, config=CONFIG, backend_type=backend)


def subnets(peers: tuple[Peer, ...]) -> list[str]:
    return [str(peer.subnet) for peer in peers]


def ids(problems: tuple[Problem, ...]) -> list[tuple[str, str]]:
    return [(problem.id, str(problem.subnet)) for problem in problems]


def test_every_other_host_is_a_peer_in_order_of_subnets() -> None:
    peers, problems = look(
        lease("172.17.90.0/24", "192.168.6.9"),
        lease("172.17.41.0/24", "192.168.6.2"),
        lease("172.17.50.0/24", "192.168.6.5"),
    )
    assert peers == (
        Peer(IPv4Network("172.17.50.0/24"), IPv4Address("192.168.6.5"), None, None),
        Peer(IPv4Network("172.17.90.0/24"), IPv4Address("192.168.6.9"), None, None),
    )
    assert problems == ()


def test_udp_routes_to_every_lease_whatever_its_type() -> None:
    peers, problems = look(
        lease("172.17.50.0/24", "192.168.6.5", "vxlan"), lease("172.17.60.0/24", "192.168.6.6")
    )
    assert subnets(peers) == ["172.17.50.0/24", "172.17.60.0/24"]
    assert problems == ()


def test_other_backends_route_only_to_their_own_kind() -> None:
    data = {"VNI": 1, "VtepMAC": "82:4b:b6:2f:54:4e"}
    peers, problems = look(
        lease("172.17.50.0/24", "192.168.6.5", "vxlan", data),
        lease("172.17.60.0/24", "192.168.6.6"),
        lease("172.17.70.0/24", "192.168.6.7", "host-gw"),
        backend="vxlan",
    )
    assert peers == (Peer(IPv4Network("172.17.50.0/24"), IPv4Address("192.168.6.5"), "vxlan", data),)
    assert ids(problems) == [("other-backend", "172.17.60.0/24"), ("other-backend", "172.17.70.0/24")]


def test_a_lease_outside_the_network_draws_no_packets() -> None:
    peers, problems = look(lease("10.0.0.0/8", "192.168.6.5"), lease("128.0.0.0/1", "192.168.6.6"))
    assert peers == ()
    assert ids(problems) == [("outside-network", "10.0.0.0/8"), ("outside-network", "128.0.0.0/1")]


def test_a_foreign_length_or_place_inside_the_network_is_routed() -> None:
    """Hosts that have not restarted since the config changed still have their old subnets."""
    peers, _ = look(lease("172.17.1.0/24", "192.168.6.5"), lease("172.17.64.0/22", "192.168.6.6"))
    assert subnets(peers) == ["172.17.1.0/24", "172.17.64.0/22"]


def test_our_former_subnet_is_no_peer_of_ours() -> None:
    peers, problems = look(lease("172.17.41.0/24", "192.168.6.2"), lease("172.17.50.0/24", "192.168.6.2"))
    assert peers == ()
    assert ids(problems) == [("duplicate-ip", "172.17.50.0/24")]


def test_before_we_hold_a_subnet_our_lease_is_neither_peer_nor_problem() -> None:
    assert look(lease("172.17.50.0/24", "192.168.6.2"), own=None) == ((), ())


def test_an_address_no_packet_can_reach_is_no_peer() -> None:
    addresses = ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"]
    peers, problems = look(*(lease(f"172.17.{50 + n}.0/24", address) for n, address in enumerate(addresses)))
    assert peers == ()
    assert [problem.id for problem in problems] == ["bad-public-ip"] * 4


def test_a_lease_inside_our_own_subnet_does_not_steal_our_containers() -> None:
    peers, problems = look(lease("172.17.41.128/25", "192.168.6.5"))
    assert peers == ()
    assert ids(problems) == [("overlap", "172.17.41.128/25")]


def test_overlapping_leases_are_routed_by_the_longer_prefix_and_told() -> None:
    leases = lease("172.17.40.0/22", "192.168.6.5"), lease("172.17.42.0/24", "192.168.6.6")
    peers, problems = look(*leases, own=IPv4Network("172.17.99.0/24"))
    assert subnets(peers) == ["172.17.40.0/22", "172.17.42.0/24"]
    assert ids(problems) == [
        ("outside-network", "172.17.40.0/22"),  # not /24
        ("overlap", "172.17.40.0/22"),
        ("overlap", "172.17.42.0/24"),
    ]
    assert problems[1].message == (
        "172.17.40.0/22 of 192.168.6.5 overlaps 172.17.42.0/24 of 192.168.6.6: the longer prefix wins"
    )


def test_of_two_keys_for_one_subnet_the_one_flannel_writes_counts() -> None:
    peers, problems = look(
        lease("172.17.50.0/24", "192.168.6.6", key="172.17.50.0-024"), lease("172.17.50.0/24", "192.168.6.5")
    )
    assert [str(peer.public_ip) for peer in peers] == ["192.168.6.5"]
    assert ids(problems) == [("overlap", "172.17.50.0/24")]
    for party in ("172.17.50.0-024", "172.17.50.0-24", "192.168.6.5", "192.168.6.6"):
        assert party in problems[0].message


def test_two_subnets_of_one_host_are_both_routed_and_told() -> None:
    peers, problems = look(lease("172.17.88.0/24", "10.0.2.15"), lease("172.17.89.0/24", "10.0.2.15"))
    assert subnets(peers) == ["172.17.88.0/24", "172.17.89.0/24"]
    assert ids(problems) == [("duplicate-ip", "172.17.88.0/24"), ("duplicate-ip", "172.17.89.0/24")]
    for problem in problems:
        assert "172.17.88.0/24" in problem.message
        assert "172.17.89.0/24" in problem.message
        assert "10.0.2.15" in problem.message


def test_what_overlaps_our_own_subnet_is_told_with_both_parties() -> None:
    """flannel.md 11, row 7: two hosts on one subnet, also with keys of different length."""
    _, problems = look(lease("172.17.40.0/22", "192.168.6.5"))
    assert problems[-1].message == (
        "172.17.40.0/22 of 192.168.6.5 overlaps 172.17.41.0/24 of 192.168.6.2: the longer prefix wins"
    )


def test_a_lease_of_another_length_is_told_and_routed() -> None:
    """flannel.md 11, row 25: what is left of an earlier config."""
    peers, problems = look(lease("172.17.1.0/24", "192.168.6.5"))
    assert subnets(peers) == ["172.17.1.0/24"]
    assert ids(problems) == [("outside-network", "172.17.1.0/24")]
    assert "172.17.1.0/24 of 192.168.6.5" in problems[0].message


def test_lease_problems_names_every_lease_and_what_is_wrong_with_it() -> None:
    leases = [
        lease("172.17.41.0/24", "192.168.6.2"),
        lease("172.17.88.0/24", "10.0.2.15"),
        lease("172.17.89.0/24", "10.0.2.15"),
        lease("172.17.1.0/24", "192.168.6.3"),
        lease("172.17.64.0/23", "192.168.6.4"),
        lease("172.17.65.0/24", "192.168.6.4"),
    ]
    found = {str(subnet): problems for subnet, problems in lease_problems(leases, CONFIG).items()}
    assert found == {
        "172.17.1.0/24": ("outside-network",),
        "172.17.41.0/24": (),
        "172.17.64.0/23": ("duplicate-ip", "overlap", "outside-network"),
        "172.17.65.0/24": ("duplicate-ip", "overlap"),
        "172.17.88.0/24": ("duplicate-ip",),
        "172.17.89.0/24": ("duplicate-ip",),
    }


def test_what_is_made_of_the_leases_grows_with_their_number_and_not_with_its_square() -> None:
    """flannel.md 11, row 32. Eight times the leases: about nine times the time, sixty-four if it were quadratic."""
    config = NetworkConfig.parse('{"Network":"10.0.0.0/8"}', Dialect.V0_28)

    def seconds(count: int) -> float:
        leases = [
            lease(str(config.subnet_at(n)), str(IPv4Address("172.16.0.0") + n % (count - count // 10)))
            for n in range(count)
        ]
        best = math.inf
        for _ in range(5):
            began = time.thread_time()
            peers_of(leases, own=None, own_ip=OWN_IP, config=config, backend_type="udp")
            lease_problems(leases, config)
            pool = SubnetPool(config, OWN_IP)
            assert next(pool.candidates([one.subnet for one in leases])) not in leases
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(4000) < 30 * seconds(500)


SUBNETS = st.builds(
    lambda at, length: IPv4Network((0xAC110000 + at, length), strict=False),
    st.integers(0, 0xFFFF),
    st.integers(14, 31),
)
LEASES = st.lists(
    st.builds(lambda subnet, host: lease(str(subnet), f"192.168.6.{host}"), SUBNETS, st.integers(1, 20)),
    max_size=12,
)


@given(LEASES)
def test_overlaps_are_exactly_those_a_slow_look_finds(leases: list[Lease]) -> None:
    found = lease_problems(leases, CONFIG)
    for one in leases:
        others = [other for other in leases if other is not one]
        overlaps = any(one.subnet.overlaps(other.subnet) for other in others)
        assert ("overlap" in found[one.subnet]) == overlaps


@given(LEASES)
def test_no_peer_is_ourselves_and_the_order_of_leases_does_not_matter(leases: list[Lease]) -> None:
    peers, _ = look(*leases)
    assert look(*reversed(leases))[0] == peers or len({x.key for x in leases}) < len(leases)
    assert list(peers) == sorted(peers, key=lambda peer: peer.subnet)
    for peer in peers:
        assert peer.public_ip != OWN_IP
        assert not peer.subnet.subnet_of(OWN)
        assert peer.subnet.subnet_of(CONFIG.network)

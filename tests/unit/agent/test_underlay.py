"""Which interface, which address, and what is said about it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from flanctl.agent.kernel.fake import FakeKernel
from flanctl.agent.kernel.model import Route
from flanctl.agent.underlay import choose_underlay, overlaps
from flanctl.errors import FlanctlError, Invalid, NotFound

EVERYTHING = IPv4Network("0.0.0.0/0")


@pytest.fixture
def kernel() -> FakeKernel:
    """lo, eth0 (default route), eth1 (NAT range), eth2 (no address), eth3 (down), docker0, our flannel0."""
    fake = FakeKernel()
    fake.add_link("lo", loopback=True, addresses=("127.0.0.1/8",))
    eth0 = fake.add_link("eth0", addresses=("169.254.7.7/16", "192.168.6.2/24", "192.168.6.100/32"))
    fake.add_link("eth1", addresses=("10.0.2.15/24",), mtu=9000)
    fake.add_link("eth2")
    fake.add_link("eth3", addresses=("192.168.9.2/24",), up=False)
    fake.add_link("docker0", kind="bridge", addresses=("172.17.41.1/24",))
    fake.add_link("flannel0", kind="tun", alias="flanctl", addresses=("172.17.41.0/32",))
    fake.add_route(Route(EVERYTHING, eth0.index, IPv4Address("192.168.6.1"), protocol=3))
    return fake


def test_without_a_word_it_is_the_default_route_and_its_first_global_address(kernel: FakeKernel) -> None:
    underlay = choose_underlay(kernel)
    assert (underlay.link.name, str(underlay.address), str(underlay.public_ip)) == (
        "eth0",
        "192.168.6.2",
        "192.168.6.2",
    )
    assert (underlay.mtu, underlay.why, underlay.warnings) == (1500, "of the default route", ())
    assert underlay.candidates == (
        "eth1 10.0.2.15 (NAT range)",
        "docker0 172.17.41.1 (a bridge for containers or guests)",
    )


@pytest.mark.parametrize(
    ("options", "name", "address", "why"),
    [
        ({"iface": ("eth1",)}, "eth1", "10.0.2.15", "chosen by --iface eth1"),
        ({"iface": ("192.168.6.100",)}, "eth0", "192.168.6.100", "chosen by --iface 192.168.6.100"),
        ({"iface": ("nosuch", "eth2", "eth3", "eth1")}, "eth1", "10.0.2.15", "chosen by --iface eth1"),
        ({"iface": ("",)}, "eth0", "192.168.6.2", "of the default route"),
        ({"iface": ("127.0.0.1",)}, "lo", "127.0.0.1", "chosen by --iface 127.0.0.1"),
        ({"iface_regex": ("^10\\.",)}, "eth1", "10.0.2.15", "chosen by --iface-regex ^10\\."),
        ({"iface_regex": ("h1$",)}, "eth1", "10.0.2.15", "chosen by --iface-regex h1$"),
        ({"iface_regex": ("0",)}, "eth0", "192.168.6.100", "chosen by --iface-regex 0"),
        ({"iface_regex": ("172.17.*0$", "eth0")}, "eth0", "192.168.6.2", "chosen by --iface-regex eth0"),
        (
            {"iface": ("nosuch",), "iface_regex": ("eth1",)},
            "eth1",
            "10.0.2.15",
            "chosen by --iface-regex eth1",
        ),
        ({"iface_can_reach": "10.0.2.2"}, "eth1", "10.0.2.15", "chosen by --iface-can-reach 10.0.2.2"),
        ({"iface_can_reach": "8.8.8.8"}, "eth0", "169.254.7.7", "chosen by --iface-can-reach 8.8.8.8"),
        (
            {"public_ip": "10.0.2.15"},
            "eth1",
            "10.0.2.15",
            "which has the address given by --public-ip 10.0.2.15",
        ),
        ({"public_ip": "203.0.113.9"}, "eth0", "192.168.6.2", "of the default route"),
        ({"iface": ("eth1",), "public_ip": "192.168.6.2"}, "eth1", "10.0.2.15", "chosen by --iface eth1"),
    ],
)
def test_options_are_tried_in_flanneld_order(
    kernel: FakeKernel, options: dict[str, object], name: str, address: str, why: str
) -> None:
    underlay = choose_underlay(kernel, **options)  # type: ignore[arg-type]
    assert (underlay.link.name, str(underlay.address), underlay.why) == (name, address, why)


def test_public_ip_is_what_peers_are_told(kernel: FakeKernel) -> None:
    underlay = choose_underlay(kernel, public_ip="203.0.113.9")
    assert underlay.public_ip == IPv4Address("203.0.113.9")
    assert underlay.warnings == (
        "public IP 203.0.113.9 is not an address of this host; peers must reach us there",
    )
    assert choose_underlay(kernel, iface=("eth0",), public_ip="192.168.6.100").warnings == ()


def test_doubtful_choices_are_warned_of(kernel: FakeKernel) -> None:
    assert choose_underlay(kernel, iface=("eth1",)).warnings == (
        "interface eth1 with 10.0.2.15 is doubtful as underlay (NAT range)",
    )
    assert "bridge" in choose_underlay(kernel, iface=("docker0",)).warnings[0]
    assert "loopback" in choose_underlay(kernel, iface=("127.0.0.1",)).warnings[0]
    assert "link-local" in choose_underlay(kernel, iface=("169.254.7.7",)).warnings[0]
    kernel.add_link("eth9", addresses=("192.0.2.9/24",), carrier=False)
    assert choose_underlay(kernel, iface=("eth9",)).warnings == ("interface eth9 has no carrier",)


def test_a_link_local_address_is_better_than_none(kernel: FakeKernel) -> None:
    kernel.add_link("eth8", addresses=("169.254.1.1/16",))
    assert str(choose_underlay(kernel, iface=("eth8",)).address) == "169.254.1.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iface": ("nosuch",)}, "--iface nosuch: there is no interface nosuch"),
        ({"iface": ("10.9.9.9",)}, "--iface 10.9.9.9: no interface has the address 10.9.9.9"),
        ({"iface": ("eth2",)}, "--iface eth2: interface eth2 has no usable IPv4 address"),
        ({"iface": ("lo",)}, "--iface lo: interface lo has no usable IPv4 address"),
        (
            {"iface_regex": ("wlan",)},
            '--iface-regex wlan: no interface has an address or a name that matches "wlan"',
        ),
        (
            {"iface_can_reach": "192.168.6.2"},
            "--iface-can-reach 192.168.6.2: 192.168.6.2 is an address of this host",
        ),
    ],
)
def test_one_option_that_fits_nothing_says_so_and_lists_what_there_is(
    kernel: FakeKernel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(NotFound) as error:
        choose_underlay(kernel, **options)  # type: ignore[arg-type]
    assert str(error.value) == message
    assert error.value.id == "no-interface"
    assert error.value.hint == "name one of these with --iface"
    assert [line.split()[0] for line in error.value.details] == ["eth0", "eth1", "eth2", "eth3", "docker0"]


def test_several_options_that_fit_nothing_each_say_why(kernel: FakeKernel) -> None:
    with pytest.raises(NotFound, match="none of the interface options fits") as error:
        choose_underlay(kernel, iface=("nosuch", "eth3"))
    assert error.value.details[:2] == (
        "--iface nosuch: there is no interface nosuch",
        "--iface eth3: interface eth3 is down",
    )


def test_a_chosen_interface_that_is_down_is_refused_with_the_cure(kernel: FakeKernel) -> None:
    with pytest.raises(FlanctlError, match="--iface eth3: interface eth3 is down") as error:
        choose_underlay(kernel, iface=("eth3",))
    assert (error.value.id, error.value.hint) == ("interface-down", "ip link set eth3 up")


def test_no_default_route_says_what_to_do() -> None:
    fake = FakeKernel()
    fake.add_link("eth0", addresses=("192.168.6.2/24",))
    with pytest.raises(NotFound, match="no interface is named and there is no default route") as error:
        choose_underlay(fake)
    assert error.value.details == ("eth0            192.168.6.2",)


def test_nothing_reaches_an_address_without_a_route() -> None:
    fake = FakeKernel()
    fake.add_link("eth0", addresses=("192.168.6.2/24",))
    with pytest.raises(NotFound, match=r"there is no route to 8\.8\.8\.8"):
        choose_underlay(fake, iface_can_reach="8.8.8.8")


def test_the_default_route_may_lead_out_of_an_interface_without_address() -> None:
    fake = FakeKernel()
    ppp0 = fake.add_link("ppp0", kind="ppp")
    fake.add_route(Route(EVERYTHING, ppp0.index, scope="link"))
    with pytest.raises(NotFound, match="interface ppp0 of the default route has no usable IPv4 address"):
        choose_underlay(fake)


@pytest.mark.parametrize(
    "options",
    [{"public_ip": "abc"}, {"public_ip": "fd00::1"}, {"iface_can_reach": "host"}, {"iface_regex": ("(",)}],
)
def test_options_that_mean_nothing_are_invalid(kernel: FakeKernel, options: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="--"):
        choose_underlay(kernel, **options)  # type: ignore[arg-type]


def test_a_network_over_our_own_addresses_is_warned_of(kernel: FakeKernel) -> None:
    assert overlaps(IPv4Network("192.168.0.0/16"), kernel) == (
        "network 192.168.0.0/16 overlaps 192.168.6.2/24 of interface eth0",
        "network 192.168.0.0/16 overlaps 192.168.6.100/32 of interface eth0",
        "network 192.168.0.0/16 overlaps 192.168.9.2/24 of interface eth3",
    )
    assert overlaps(IPv4Network("10.99.0.0/16"), kernel) == ()


def test_our_own_device_and_dockers_gateway_inside_the_network_are_no_overlap(kernel: FakeKernel) -> None:
    assert overlaps(IPv4Network("172.17.0.0/16"), kernel, ignore=("flannel0",)) == ()


def test_dockers_default_bridge_over_the_whole_network_is_one() -> None:
    fake = FakeKernel()
    fake.add_link("docker0", kind="bridge", addresses=("172.17.0.1/16",))
    assert overlaps(IPv4Network("172.17.0.0/16"), fake) == (
        "network 172.17.0.0/16 overlaps 172.17.0.1/16 of interface docker0",
    )

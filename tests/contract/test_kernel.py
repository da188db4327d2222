"""What every Kernel promises: one body over the fake and over a real network namespace."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.kernel.fake import FakeKernel
from flanctl.agent.kernel.links import Device, ensure_device, open_device, refuse_foreign
from flanctl.agent.kernel.model import KERNEL_PROTOCOL, ROUTE_PROTOCOL, Route
from flanctl.agent.kernel.routes import Routes, device_route
from flanctl.errors import Conflict, FlanctlError, NotFound
from tests.support.namespaces import new_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.kernel.model import Link

NETWORK = IPv4Network("172.17.0.0/16")
HOST = IPv4Interface("172.17.41.0/32")
WIDE = IPv4Interface("172.17.41.0/16")


@pytest.fixture(params=["fake", pytest.param("netns", marks=pytest.mark.needs("root", "netns", "tun"))])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param == "fake":
        fake = FakeKernel()
        fake.add_link("lo", loopback=True, up=False)
        yield fake
        fake.close()
        return
    from flanctl.agent.kernel.netlink import NetlinkKernel

    with new_namespace():
        real = NetlinkKernel()
        yield real
        real.close()


@pytest.fixture
def tun(kernel: Kernel) -> Iterator[int]:
    """flannel0, ours, held, and down."""
    fd = open_device(kernel, "flannel0")
    yield fd
    os.close(fd)


def look(kernel: Kernel, name: str = "flannel0") -> Link:
    link = kernel.link(name)
    assert link is not None
    return link


def device(**changes: object) -> Device:
    return Device(**{"name": "flannel0", "mtu": 1472, "address": HOST} | changes)  # type: ignore[arg-type]


def test_an_empty_machine_has_a_loopback_and_no_route(kernel: Kernel) -> None:
    assert [(link.name, link.loopback, link.up) for link in kernel.links()] == [("lo", True, False)]
    assert kernel.link("flannel0") is None
    assert kernel.routes() == ()
    assert kernel.default_route() is None
    assert kernel.route_to(IPv4Address("192.0.2.1")) is None


def test_a_new_device_bears_our_mark_and_outlives_its_descriptor(kernel: Kernel) -> None:
    fd = open_device(kernel, "flannel0")
    assert look(kernel).kind == "tun"
    assert look(kernel).alias == "flanctl"
    assert look(kernel).carrier
    os.close(fd)
    assert look(kernel).alias == "flanctl"
    assert not look(kernel).carrier


def test_a_device_that_is_not_persistent_goes_with_its_descriptor(kernel: Kernel) -> None:
    fd = kernel.open_tun("flannel0", persistent=False)
    assert look(kernel).alias is None
    os.close(fd)
    assert kernel.link("flannel0") is None


def test_the_device_of_the_last_run_is_taken_over_with_what_it_has(kernel: Kernel) -> None:
    os.close(open_device(kernel, "flannel0"))
    ensure_device(kernel, device())
    before = look(kernel)
    assert not before.carrier
    fd = open_device(kernel, "flannel0")
    after = look(kernel)
    os.close(fd)
    assert (after.index, after.addresses, after.mtu, after.carrier) == (before.index, (HOST,), 1472, True)


def test_a_tun_has_one_holder(kernel: Kernel, tun: int) -> None:
    with pytest.raises(Conflict, match="flannel0 is held by"):
        kernel.open_tun("flannel0")


def test_a_flannel0_without_our_mark_is_refused_and_left_alone(kernel: Kernel) -> None:
    os.close(kernel.open_tun("flannel0", persistent=True))
    before = look(kernel)
    with pytest.raises(Conflict, match="flannel0 exists and is not ours") as refusal:
        open_device(kernel, "flannel0")
    assert refusal.value.id == "device-foreign"
    assert refusal.value.hint == "ip link delete flannel0"
    assert look(kernel) == before


def test_somebody_elses_alias_is_named(kernel: Kernel) -> None:
    os.close(kernel.open_tun("flannel0", persistent=True))
    kernel.set_link("flannel0", alias="vpn")
    with pytest.raises(Conflict, match='has the alias "vpn"'):
        refuse_foreign(kernel, "flannel0")


def test_an_interface_that_is_no_tun_is_refused(kernel: Kernel) -> None:
    with pytest.raises(Conflict, match="lo exists and is a physical interface"):
        refuse_foreign(kernel, "lo")
    with pytest.raises(Conflict, match="lo exists and is not a TUN"):
        kernel.open_tun("lo")


def test_refuse_foreign_lets_nothing_and_ours_pass(kernel: Kernel) -> None:
    assert refuse_foreign(kernel, "flannel0") is None
    os.close(open_device(kernel, "flannel0"))
    assert refuse_foreign(kernel, "flannel0") == look(kernel)


def test_ensure_device_makes_everything_right_and_then_has_nothing_to_say(kernel: Kernel, tun: int) -> None:
    said = ensure_device(kernel, device())
    link = look(kernel)
    assert (link.up, link.mtu, link.queue_length, link.addresses) == (True, 1472, 1000, (HOST,))
    assert "mtu of flannel0 was 1500, set to 1472" in said
    assert "address 172.17.41.0/32 was missing on flannel0, added" in said
    assert "flannel0 was down, set up" in said
    assert ensure_device(kernel, device()) == ()


@pytest.mark.parametrize("harm", ["down", "mtu", "alias", "queue", "address", "stranger"])
def test_each_harm_to_the_device_is_repaired_and_said(kernel: Kernel, tun: int, harm: str) -> None:
    ensure_device(kernel, device())
    right = look(kernel)
    if harm == "down":
        kernel.set_link("flannel0", up=False)
    elif harm == "mtu":
        kernel.set_link("flannel0", mtu=1400)
    elif harm == "alias":
        kernel.set_link("flannel0", alias="mine")
    elif harm == "queue":
        kernel.set_link("flannel0", queue_length=10)
    elif harm == "address":
        kernel.delete_address("flannel0", HOST)
    else:
        kernel.add_address("flannel0", IPv4Interface("172.17.41.1/24"))
    assert len(ensure_device(kernel, device())) == 1
    assert look(kernel) == right
    assert ensure_device(kernel, device()) == ()


def test_exactly_the_one_address_stays(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device(address=IPv4Interface("172.17.9.0/32")))
    ensure_device(kernel, device())
    assert look(kernel).addresses == (HOST,)


def test_a_device_that_is_gone_is_said_to_be(kernel: Kernel) -> None:
    with pytest.raises(NotFound, match="the device flannel0 is gone") as gone:
        ensure_device(kernel, device())
    assert gone.value.id == "device-gone"


def test_an_address_with_a_prefix_makes_the_kernels_own_route(kernel: Kernel, tun: int) -> None:
    """Dialect 0.7: subnet.0 with the network's prefix length, and no route of ours."""
    ensure_device(kernel, device(address=WIDE))
    index = look(kernel).index
    assert kernel.routes() == (Route(NETWORK, index, None, KERNEL_PROTOCOL, "link", WIDE.ip),)


def test_from_one_dialect_to_the_other_and_back(kernel: Kernel, tun: int) -> None:
    routes = Routes(kernel)
    index = look(kernel).index
    for _ in range(2):
        ensure_device(kernel, device(address=WIDE))
        assert routes.apply([]).failed == ()
        assert [route.protocol for route in kernel.routes()] == [KERNEL_PROTOCOL]
        ensure_device(kernel, device())
        assert routes.apply([device_route(look(kernel), NETWORK)]).failed == ()
        assert kernel.routes() == (Route(NETWORK, index, None, ROUTE_PROTOCOL, "link"),)


def test_routes_are_added_once_and_kept(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    wanted = [device_route(look(kernel), NETWORK)]
    assert Routes(kernel).apply(wanted).repaired == ("route 172.17.0.0/16 dev flannel0 was missing, added",)
    assert Routes(kernel).apply(wanted).repaired == ()
    assert kernel.routes(protocol=ROUTE_PROTOCOL) == tuple(wanted)
    assert kernel.routes(link=look(kernel).index) == tuple(wanted)
    assert kernel.routes(protocol=99) == kernel.routes(link=look(kernel, "lo").index) == ()


def test_routes_go_when_the_device_goes_down_and_come_back_with_apply(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    wanted = [device_route(look(kernel), NETWORK)]
    Routes(kernel).apply(wanted)
    kernel.set_link("flannel0", up=False)
    assert kernel.routes() == ()
    assert Routes(kernel).apply(wanted).failed
    ensure_device(kernel, device())
    assert Routes(kernel).apply(wanted).failed == ()
    assert kernel.routes() == tuple(wanted)


def test_what_is_ours_and_not_wanted_goes_what_is_others_stays(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    index = look(kernel).index
    others = Route(IPv4Network("10.9.0.0/16"), index, protocol=4, scope="link")
    kernel.add_route(others)
    kernel.add_route(Route(IPv4Network("10.8.0.0/16"), index, scope="link"))
    assert Routes(kernel).apply([]).repaired == ("route 10.8.0.0/16 dev flannel0 is not wanted, deleted",)
    assert kernel.routes() == (others,)


def test_somebody_elses_route_for_our_destination_is_never_taken(kernel: Kernel, tun: int) -> None:
    """dockerd with its default 172.17.0.1/16, started before us, keeps its containers."""
    ensure_device(kernel, device())
    others = Route(NETWORK, look(kernel).index, protocol=4, scope="link")
    kernel.add_route(others)
    report = Routes(kernel).apply([device_route(look(kernel), NETWORK)])
    assert report.repaired == ()
    assert len(report.failed) == 1
    assert "somebody else" in report.failed[0]
    assert kernel.routes() == (others,)
    kernel.delete_route(others)
    assert Routes(kernel).apply([device_route(look(kernel), NETWORK)]).failed == ()


def test_our_own_route_with_another_next_hop_is_replaced_in_place(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device(address=WIDE))
    index = look(kernel).index
    first, second = IPv4Address("172.17.0.1"), IPv4Address("172.17.0.2")
    peer = IPv4Network("172.18.7.0/24")
    Routes(kernel).apply([Route(peer, index, first)])
    report = Routes(kernel).apply([Route(peer, index, second)])
    assert report.repaired == (
        "route 172.18.7.0/24 via 172.17.0.1 dev flannel0 became 172.18.7.0/24 via 172.17.0.2 dev flannel0",
    )
    assert [route.gateway for route in kernel.routes(protocol=ROUTE_PROTOCOL)] == [second]


def test_a_failed_route_leaves_the_others_and_is_tried_again(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device(address=WIDE))
    index = look(kernel).index
    unreachable = Route(IPv4Network("172.18.7.0/24"), index, IPv4Address("192.0.2.9"))
    good = Route(IPv4Network("172.18.8.0/24"), index, IPv4Address("172.17.0.1"))
    for _ in range(2):
        report = Routes(kernel).apply([unreachable, good])
        assert report.failed == ("cannot add the route 172.18.7.0/24: Network is unreachable",) or (
            "172.18.7.0/24" in report.failed[0] and "unreachable" in report.failed[0]
        )
        assert [route.gateway for route in kernel.routes(protocol=ROUTE_PROTOCOL)] == [good.gateway]


def test_an_onlink_gateway_needs_no_route_to_it(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    route = Route(IPv4Network("172.18.7.0/24"), look(kernel).index, IPv4Address("192.0.2.9"), onlink=True)
    kernel.add_route(route)
    assert kernel.routes() == (route,)


def test_the_kernel_says_where_a_packet_would_go(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    kernel.add_route(device_route(look(kernel), NETWORK))
    path = kernel.route_to(IPv4Address("172.17.90.2"))
    assert path is not None
    assert (path.link, path.source, path.gateway) == (look(kernel).index, HOST.ip, None)


def test_the_default_route_is_the_one_with_the_lowest_metric(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device(address=WIDE))
    index = look(kernel).index
    everything = IPv4Network("0.0.0.0/0")
    near = Route(everything, index, IPv4Address("172.17.0.1"), protocol=4, metric=100)
    far = Route(everything, index, IPv4Address("172.17.0.2"), protocol=4, metric=200)
    kernel.add_route(far)
    kernel.add_route(near)
    assert kernel.default_route() == near


def test_deleting_twice_is_fine(kernel: Kernel, tun: int) -> None:
    ensure_device(kernel, device())
    route = device_route(look(kernel), NETWORK)
    kernel.add_route(route)
    for _ in range(2):
        kernel.delete_route(route)
        kernel.delete_address("flannel0", HOST)
    for _ in range(2):
        kernel.delete_link("flannel0")
    kernel.delete_address("flannel0", HOST)
    assert kernel.link("flannel0") is None


def test_adding_an_address_twice_is_fine(kernel: Kernel, tun: int) -> None:
    kernel.add_address("flannel0", HOST)
    kernel.add_address("flannel0", HOST)
    assert look(kernel).addresses == (HOST,)


def test_errors_name_the_thing(kernel: Kernel, tun: int) -> None:
    with pytest.raises(NotFound, match="nosuch0"):
        kernel.set_link("nosuch0", mtu=1400)
    with pytest.raises(NotFound, match="nosuch0"):
        kernel.add_address("nosuch0", HOST)
    with pytest.raises(FlanctlError, match="cannot set mtu 7 on flannel0: Invalid argument"):
        kernel.set_link("flannel0", mtu=7)
    ensure_device(kernel, device())
    kernel.add_route(device_route(look(kernel), NETWORK))
    with pytest.raises(Conflict, match=r"cannot add the route 172\.17\.0\.0/16: File exists"):
        kernel.add_route(device_route(look(kernel), NETWORK))


def test_ipv6_is_silenced_once(kernel: Kernel, tun: int) -> None:
    kernel.silence_ipv6("flannel0")
    assert kernel.silence_ipv6("flannel0") is False

"""The fake kernel as a tool: it prints itself, fails on request, and its TUN carries packets."""

from __future__ import annotations

import os
import socket
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from flanctl.agent.kernel.fake import FakeKernel
from flanctl.agent.kernel.links import Device, ensure_device, open_device, refuse_foreign
from flanctl.agent.kernel.model import Route
from flanctl.agent.kernel.routes import Routes, device_route
from flanctl.errors import Conflict, NotPermitted


def test_it_prints_itself_as_ip_would() -> None:
    kernel = FakeKernel()
    kernel.add_link("lo", loopback=True, addresses=("127.0.0.1/8",))
    eth0 = kernel.add_link("eth0", addresses=("192.168.66.11/24",))
    kernel.add_link("eth1", kind="veth", up=False, carrier=False)
    kernel.add_route(
        Route(IPv4Network("0.0.0.0/0"), eth0.index, IPv4Address("192.168.66.1"), protocol=3, metric=100)
    )
    fd = open_device(kernel, "flannel0")
    ensure_device(kernel, Device("flannel0", 1472, IPv4Interface("172.17.41.0/32")))
    flannel0 = kernel.link("flannel0")
    assert flannel0 is not None
    Routes(kernel).apply([device_route(flannel0, IPv4Network("172.17.0.0/16"))])
    assert str(kernel).splitlines() == [
        "1: lo mtu 1500 qlen 1000 up",
        "    inet 127.0.0.1/8",
        "2: eth0 mtu 1500 qlen 1000 up",
        "    inet 192.168.66.11/24",
        "3: eth1 veth mtu 1500 qlen 1000 down no-carrier",
        "4: flannel0 tun mtu 1472 qlen 1000 up alias flanctl",
        "    inet 172.17.41.0/32",
        "0.0.0.0/0 via 192.168.66.1 dev eth0 proto 3 scope global metric 100",
        "172.17.0.0/16 dev flannel0 proto 102 scope link",
        "192.168.66.0/24 dev eth0 proto 2 scope link src 192.168.66.11",
    ]
    os.close(fd)
    kernel.close()


def test_it_fails_once_when_told_to_and_changes_nothing_then() -> None:
    kernel = FakeKernel()
    fd = open_device(kernel, "flannel0")
    kernel.fail_next("add_address", NotPermitted("no"))
    wanted = Device("flannel0", 1472, IPv4Interface("172.17.41.0/32"))
    with pytest.raises(NotPermitted):
        ensure_device(kernel, wanted)
    link = kernel.link("flannel0")
    assert link is not None
    assert (link.addresses, link.up) == ((), False)
    assert "flannel0 was down, set up" in ensure_device(kernel, wanted)
    os.close(fd)
    kernel.close()


def test_a_failed_mark_leaves_no_device() -> None:
    """Killed between making the TUN and marking it: nothing stays that we would not know again."""
    kernel = FakeKernel()
    kernel.fail_next("set_link", NotPermitted("no"))
    with pytest.raises(NotPermitted):
        open_device(kernel, "flannel0")
    assert kernel.link("flannel0") is None
    kernel.close()


def test_a_failed_route_is_reported_and_the_others_go_ahead() -> None:
    kernel = FakeKernel()
    eth0 = kernel.add_link("eth0", addresses=("192.168.66.11/24",))
    peers = [Route(IPv4Network(f"172.17.{n}.0/24"), eth0.index, IPv4Address("192.168.66.12")) for n in (1, 2)]
    kernel.fail_next("add_route", NotPermitted("cannot add the route 172.17.1.0/24: Operation not permitted"))
    report = Routes(kernel).apply(peers)
    assert report.failed == ("cannot add the route 172.17.1.0/24: Operation not permitted",)
    assert report.repaired == ("route 172.17.2.0/24 via 192.168.66.12 dev eth0 was missing, added",)
    assert Routes(kernel).apply(peers).repaired == (
        "route 172.17.1.0/24 via 192.168.66.12 dev eth0 was missing, added",
    )


def test_a_holder_of_the_device_is_named() -> None:
    kernel = FakeKernel()
    kernel.add_link("flannel0", kind="tun")
    kernel.holders["flannel0"] = ("flanneld (pid 4711)",)
    with pytest.raises(
        Conflict, match=r"flannel0 exists and is not ours, held by flanneld \(pid 4711\)"
    ) as error:
        refuse_foreign(kernel, "flannel0")
    assert error.value.hint == "stop flanneld (pid 4711)"
    kernel.set_link("flannel0", alias="flanctl")
    with pytest.raises(Conflict, match=r"flannel0 is held by flanneld \(pid 4711\)") as error:
        refuse_foreign(kernel, "flannel0")
    assert error.value.id == "device-busy"


def test_its_tun_carries_packets_both_ways() -> None:
    kernel = FakeKernel()
    fd = kernel.open_tun("flannel0")
    os.write(fd, b"to the kernel")
    assert kernel.tuns["flannel0"].recv(100) == b"to the kernel"
    kernel.tuns["flannel0"].send(b"from the kernel")
    assert os.read(fd, 100) == b"from the kernel"
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    os.close(fd)
    assert isinstance(kernel.tuns["flannel0"], socket.socket)
    kernel.close()

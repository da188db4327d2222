"""The real kernel, where the fake cannot follow: events, holders, several namespaces, many links.

this process ── its own namespace: lo, flannel0 (TUN), sometimes a veth pair
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.kernel.addresses import local_addresses
from flanctl.agent.kernel.links import Device, ensure_device, open_device, refuse_foreign
from flanctl.agent.kernel.netlink import LinkEvent, LinkMonitor, NetlinkKernel
from flanctl.agent.kernel.routes import Routes, device_route
from flanctl.agent.kernel.tun import open_tun
from flanctl.agent.underlay import choose_underlay
from flanctl.errors import Conflict, NotPermitted
from tests.support.deadline import until
from tests.support.namespaces import new_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("root", "netns", "tun")
WANTED = Device("flannel0", 1472, IPv4Interface("172.17.41.0/32"))
NETWORK = IPv4Network("172.17.0.0/16")


@pytest.fixture
def kernel() -> Iterator[NetlinkKernel]:
    with new_namespace():
        made = NetlinkKernel()
        yield made
        made.close()


@pytest.fixture
def monitor(kernel: NetlinkKernel) -> Iterator[LinkMonitor]:
    made = LinkMonitor({"flannel0", "under0"})
    yield made
    made.close()


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def test_what_ip_shows_is_what_was_wanted(kernel: NetlinkKernel) -> None:
    fd = open_device(kernel, "flannel0")
    ensure_device(kernel, WANTED)
    link = kernel.link("flannel0")
    assert link is not None
    Routes(kernel).apply([device_route(link, NETWORK)])
    assert ip("route", "show").split() == "172.17.0.0/16 dev flannel0 proto 102 scope link".split()
    shown = ip("-details", "link", "show", "flannel0")
    for part in (
        "UP,LOWER_UP",
        "mtu 1472",
        "qlen 1000",
        "tun type tun pi off vnet_hdr off persist on",
        "alias flanctl",
    ):
        assert part in shown
    assert ip("-brief", "address", "show", "flannel0").split()[2:] == ["172.17.41.0/32"]
    assert [str(address) for address in local_addresses()] == ["172.17.41.0"]
    os.close(fd)


def test_no_ipv6_on_the_device_in_either_way(kernel: NetlinkKernel) -> None:
    """With IPv6 on, a TUN sends listener reports and router solicitations into the packet loop."""
    for silence in (kernel.silence_ipv6, kernel._no_link_local):
        fd = open_device(kernel, "flannel0")
        assert silence("flannel0")
        kernel.set_link("flannel0", up=True)
        assert not silence("flannel0")
        assert ip("-6", "address", "show", "dev", "flannel0") == ""
        os.close(fd)
        kernel.delete_link("flannel0")


def test_vnet_headers_can_come_and_go_over_a_restart(kernel: NetlinkKernel) -> None:
    for wanted in (True, False, True):
        os.close(open_device(kernel, "flannel0", vnet_hdr=wanted))


def test_a_multi_queue_device_is_refused(kernel: NetlinkKernel) -> None:
    ip("tuntap", "add", "dev", "flannel0", "mode", "tun", "multi_queue")
    with pytest.raises(Conflict, match="flannel0 exists and is not a TUN like ours"):
        open_tun("flannel0")


def test_a_tap_is_refused(kernel: NetlinkKernel) -> None:
    ip("tuntap", "add", "dev", "flannel0", "mode", "tap")
    with pytest.raises(Conflict, match="flannel0 exists and is not a TUN like ours"):
        open_tun("flannel0")


def test_the_process_that_holds_the_device_is_named(kernel: NetlinkKernel) -> None:
    """flanneld's TUN: not persistent, no alias, held by a process."""
    code = "import sys\nfrom flanctl.agent.kernel.tun import open_tun\nopen_tun('flannel0', persistent=False)\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        comm = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        with pytest.raises(Conflict) as error:
            refuse_foreign(kernel, "flannel0")
        assert str(error.value) == f"flannel0 exists and is not ours, held by {comm} (pid {holder.pid})"
        with pytest.raises(Conflict) as error:
            open_tun("flannel0")
        assert str(error.value) == f"flannel0 is held by {comm} (pid {holder.pid})"
        holder.communicate("")
    until(lambda: kernel.link("flannel0") is None, what="flanneld's device goes with it")
    assert refuse_foreign(kernel, "flannel0") is None


def test_another_agent_that_holds_our_device_is_named(kernel: NetlinkKernel) -> None:
    os.close(open_device(kernel, "flannel0"))
    code = "import sys\nfrom flanctl.agent.kernel.tun import open_tun\nopen_tun('flannel0')\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Conflict, match=rf"flannel0 is held by .* \(pid {holder.pid}\)") as error:
            refuse_foreign(kernel, "flannel0")
        assert error.value.id == "device-busy"
        holder.communicate("")


def test_events_about_our_device_arrive_and_others_do_not(
    kernel: NetlinkKernel, monitor: LinkMonitor
) -> None:
    fd = open_device(kernel, "flannel0")
    assert monitor.wait(5) == (LinkEvent("link", "flannel0"),)
    ensure_device(kernel, WANTED)
    link = kernel.link("flannel0")
    assert link is not None
    Routes(kernel).apply([device_route(link, NETWORK)])
    assert set(monitor.wait(5)) == {LinkEvent("link", "flannel0"), LinkEvent("address", "flannel0")}
    ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
    ip("address", "add", "192.0.2.1/24", "dev", "veth0")
    assert monitor.wait(0) == ()
    ip("route", "delete", "172.17.0.0/16")
    assert monitor.wait(5) == (LinkEvent("route-gone", "flannel0"),)
    ip("address", "delete", "172.17.41.0/32", "dev", "flannel0")
    assert LinkEvent("address-gone", "flannel0") in monitor.wait(5)
    ip("link", "delete", "flannel0")
    assert monitor.wait(5)[-1] == LinkEvent("link-gone", "flannel0")
    os.close(fd)


def test_a_repair_that_has_nothing_to_do_makes_no_event(kernel: NetlinkKernel, monitor: LinkMonitor) -> None:
    """Else the agent would wake itself for ever."""
    fd = open_device(kernel, "flannel0")
    ensure_device(kernel, WANTED)
    link = kernel.link("flannel0")
    assert link is not None
    routes, wanted = Routes(kernel), [device_route(link, NETWORK)]
    routes.apply(wanted)
    assert monitor.wait(5)
    assert ensure_device(kernel, WANTED) == ()
    assert routes.apply(wanted).repaired == ()
    kernel._no_link_local("flannel0")
    monitor.wait(0)
    kernel._no_link_local("flannel0")
    assert monitor.wait(0) == ()
    os.close(fd)


def test_a_device_renamed_away_is_gone_and_one_renamed_to_ours_is_there(
    kernel: NetlinkKernel, monitor: LinkMonitor
) -> None:
    ip("link", "add", "under0", "type", "veth", "peer", "name", "veth1")
    assert set(monitor.wait(5)) == {LinkEvent("link", "under0")}
    ip("link", "set", "under0", "name", "other0")
    assert monitor.wait(5) == (LinkEvent("link-gone", "under0"),)
    ip("link", "set", "veth1", "name", "under0")
    assert monitor.wait(5) == (LinkEvent("link", "under0"),)


def test_lost_events_are_said_to_be_lost(kernel: NetlinkKernel, monitor: LinkMonitor) -> None:
    lines = "\n".join(f"address add 10.0.{n // 250}.{n % 250}/32 dev lo" for n in range(1500))
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
    assert LinkEvent("overflow", "") in monitor.wait(5)
    assert monitor.wait(0) == ()


def test_stop_from_another_thread_ends_the_wait_at_once_and_for_ever(monitor: LinkMonitor) -> None:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(monitor.wait()))
    thread.start()
    monitor.stop()
    thread.join(5)
    assert answers == [()]
    assert monitor.wait() == ()
    monitor.close()
    monitor.stop()
    monitor.close()


def test_three_hundred_links_and_addresses_fit_in_a_dump(kernel: NetlinkKernel) -> None:
    lines = [f"link add v{n} type veth peer name w{n}" for n in range(150)]
    lines += [f"address add 10.1.{n}.1/24 dev v{n}" for n in range(150)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)
    links = {link.name: link for link in kernel.links()}
    assert len(links) == 301
    assert links["v149"].addresses == (IPv4Interface("10.1.149.1/24"),)
    assert links["w149"].kind == "veth"
    assert kernel.link("v7") == links["v7"]


def test_several_next_hops_on_the_default_route_are_understood(kernel: NetlinkKernel) -> None:
    ip("link", "add", "under0", "type", "veth", "peer", "name", "under1")
    for name, address in (("under0", "192.0.2.2/24"), ("under1", "198.51.100.2/24")):
        ip("address", "add", address, "dev", name)
        ip("link", "set", name, "up")
    ip("route", "add", "default", *"nexthop via 192.0.2.1 nexthop via 198.51.100.1".split())
    ip("route", "add", "unreachable", "10.0.0.0/8")
    ip("route", "add", "10.1.0.0/16", "dev", "under0", "table", "77")
    underlay = choose_underlay(kernel)
    assert (underlay.link.name, str(underlay.address)) == ("under0", "192.0.2.2")
    assert [str(route.destination) for route in kernel.routes()] == [
        "0.0.0.0/0",
        "192.0.2.0/24",
        "198.51.100.0/24",
    ]


def test_an_unreachable_address_has_no_path(kernel: NetlinkKernel) -> None:
    ip("link", "set", "lo", "up")
    ip("route", "add", "unreachable", "10.0.0.0/8")
    ip("route", "add", "blackhole", "10.1.0.0/16")
    from ipaddress import IPv4Address

    assert kernel.route_to(IPv4Address("10.2.0.1")) is None
    assert kernel.route_to(IPv4Address("10.1.0.1")) is None


def test_a_kernel_belongs_to_the_namespace_it_was_made_in(kernel: NetlinkKernel) -> None:
    with new_namespace():
        ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        assert [link.name for link in kernel.links()] == ["lo"]


def test_without_cap_net_admin_each_change_is_not_permitted(kernel: NetlinkKernel) -> None:
    if not Path("/usr/bin/setpriv").exists():
        pytest.skip("no setpriv to drop the capability with")
    code = (
        "from flanctl.agent.kernel.netlink import NetlinkKernel\n"
        "from flanctl.agent.kernel.rules import IptablesRules\n"
        "from ipaddress import *\n"
        "k = NetlinkKernel(); k.links(); n = IPv4Network('172.17.0.0/16')\n"
        "for act in (lambda: k.set_link('lo', up=True), lambda: k.add_address('lo', IPv4Interface('10.0.0.1/32')),\n"
        "            IptablesRules(n, n).check, lambda: k.silence_ipv6('lo')):\n"
        "    try: print(act())\n"
        "    except Exception as e: print(type(e).__name__)\n"
    )
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [NotPermitted.__name__] * 3
    assert done.stdout.split()[:3] == expected


def test_a_hundred_starts_and_stops_leave_no_descriptor(kernel: NetlinkKernel) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(100):
        again, watch = NetlinkKernel(), LinkMonitor({"flannel0"})
        fd = open_device(again, "flannel0")
        ensure_device(again, WANTED)
        os.close(fd)
        watch.stop()
        watch.close()
        again.close()
    assert sorted(os.listdir("/proc/self/fd")) == before

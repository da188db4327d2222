"""The kernel path with real agents: what it carries, what it leaves to user space, and how it comes and goes.

    h1 ─ 192.168.66.11 ─┬─ under0 .1          h1 and h2 in the kernel, h3 in user space
    h2 ─ 192.168.66.12 ─┤
    h3 ─ 192.168.66.13 ─┘

What every path must carry and refuse is in test_agent_packets.py, over both. Needs BPF, and the file system for pins.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from ipaddress import IPv4Address
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.backends.kernel_path import GRACE, RX_PORTS
from flanctl.agent.kernel.tc import PREFERENCE
from flanctl.demo.hosts import Lab
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.agents import RunningAgent, environment, flanctl, program
from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Container, Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "ping", "bpf")
PORT = 8285
MTU = 1472
TC = "--data-path", "tc"
ALL = "u32 match u32 0 0"


class Net:
    """Hosts with agents over one registry file; containers behind the first two."""

    def __init__(self, lab: Lab, folder: Path, config: bytes = b'{"Network":"172.17.0.0/16"}') -> None:
        self.lab, self.folder = lab, folder
        with closing(self.store()) as store:
            store.create("/jxdd/network/config", config, ttl=None)
        self.agents: dict[str, RunningAgent] = {}
        self.boxes: dict[str, Container] = {}

    def store(self) -> SqliteStore:
        return SqliteStore(str(self.folder / "registry.db"))

    def add(self, *options: str, container: bool = True, iface: str = "eth0") -> RunningAgent:
        return self.put_agent_on(self.lab.add_host(), *options, container=container, iface=iface)

    def put_agent_on(
        self, host: Host, *options: str, container: bool = True, iface: str = "eth0"
    ) -> RunningAgent:
        agent = RunningAgent.start(
            host, self.folder / host.name, f"sqlite:{self.folder}/registry.db", "--iface", iface, *options
        ).wait()
        self.agents[host.name] = agent
        if container:
            self.boxes[host.name] = host.add_container(agent.gateway, MTU)
        return agent

    def status(self, agent: RunningAgent) -> dict[str, object]:
        socket_of = {
            "FLANCTL_RUN_DIR": str(agent.folder / "run"),
            "FLANCTL_SUBNET_FILE": str(agent.subnet_file),
        }
        env = environment(agent.endpoints) | socket_of
        done = agent.host.run([*program("flanctl"), "status", "-w", "json"], env=env, check=False)
        document: dict[str, object] = json.loads(done.stdout)
        return document


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with Lab("kernel") as lab:
        yield Net(lab, tmp_path)
    assert lab.leftovers() == ()


def kernels(agent: RunningAgent) -> tuple[int, int]:
    """Packets out and in that went through the kernel path."""
    counters = agent.counters()
    return counters.get("kernel-out-packets", 0), counters.get("kernel-in-packets", 0)


def switches(agent: RunningAgent) -> dict[str, int]:
    """How often the agent changed its path, by the path changed to."""
    with closing(socket.socket(socket.AF_UNIX)) as channel:
        channel.connect(str(agent.folder / "run" / "agent.sock"))
        channel.sendall(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")
        page = b"".join(iter(lambda: channel.recv(1 << 16), b"")).decode()
    return {to: int(n) for to, n in re.findall(r'flanctl_path_switches_total\{to="(\w+)"\} (\d+)', page)}


def direct(one: RunningAgent, two: RunningAgent, frm: Container, to: Container) -> None:
    """Wait until packets both ways go through both kernels: the hosts know that the other runs flanctl."""

    def carried() -> bool:
        before = kernels(one), kernels(two)
        assert reaches(frm, to.address)
        after = kernels(one), kernels(two)
        return all(new > old for old, new in zip(sum(before, ()), sum(after, ()), strict=True))

    until(carried, seconds=20, what="packets go through both kernels")


def reaches(frm: Container | Host, to: IPv4Address, *words: str) -> bool:
    return ping(frm, to, "-c", "1", "-W", "2", *words) == 0


def ping(frm: Container | Host, to: IPv4Address, *words: str) -> int:
    """Packets lost."""
    done = frm.run(["ping", "-n", "-q", *words, str(to)], check=False)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]) - int(found[2])


@contextmanager
def pinged(frm: Container, to: IPv4Address) -> Iterator[None]:
    """A ping every 10 ms meanwhile, of which none may be lost."""
    with TemporaryFile("w+") as said:  # a pipe that nobody reads would stop ping after some seconds
        process = frm.popen(["ping", "-n", "-i", "0.01", str(to)], stdout=said)
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
        said.seek(0)
        text = said.read()
    answered = [int(number) for number in re.findall(r"icmp_seq=(\d+) ttl=", text)]
    sent = re.search(r"(\d+) packets transmitted", text)
    assert sent, text
    assert len(answered) > 50, text
    assert answered == list(range(1, len(answered) + 1)), "one was lost, came late or twice"
    # The one in flight when ping was asked to end has no time to come back.
    assert int(sent[1]) - len(answered) <= 1


def iperf(server: Container, client: Container, seconds: int = 1) -> float:
    """Gbit/s of one TCP stream."""
    listening = server.popen(["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE, text=True)
    until(lambda: "listening" in listening.stdout.readline(), seconds=10)
    done = client.run(["iperf3", "-c", str(server.address), "-t", str(seconds), "-J"])
    listening.communicate(timeout=20)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


def filters(host: Host, link: str, direction: str) -> str:
    return host.run(["tc", "filter", "show", "dev", link, direction]).stdout


# ---- what it carries -------------------------------------------------------------------------------------------------


@pytest.mark.needs("iperf3")
def test_between_flanctl_hosts_packets_stay_in_the_kernel_and_status_counts_them(net: Net) -> None:
    one, two, three = net.add(*TC), net.add(*TC), net.add("--data-path", "tun")
    box1, box2, box3 = net.boxes.values()
    assert one.ready["data-path"] == "kernel"
    direct(one, two, box1, box2)
    before = one.counters()
    assert iperf(box2, box1) > 0.05
    after = one.counters()
    out = after["out-packets"] - before["out-packets"]
    assert out == after["kernel-out-packets"] - before["kernel-out-packets"] > 1000, "none by user space"
    status = net.status(one)
    assert (status["data_path"], status["data_path_why"]) == ("kernel", "")
    traffic = {row["public_ip"]: row for row in status["peers"]["traffic"]}[str(two.host.address)]
    assert traffic["out_packets"] >= out
    assert traffic["out_bytes"] > out * 500, "most of them are full"
    assert traffic["in_packets"] > 100
    assert traffic["heard_seconds_ago"] <= 5
    assert status["counters"]["in_packets"] >= status["counters"]["kernel_in_packets"] > 0
    # With a receiver in user space, which finishes the checksums that this kernel leaves: nothing is lost either way.
    assert iperf(box3, box1) > 0.02
    assert iperf(box1, box3) > 0.02
    drops = {name: count for name, count in three.counters().items() if name.startswith("drop")}
    assert drops == {}


def test_to_a_host_without_an_announcement_packets_go_by_user_space(net: Net) -> None:
    one, two = net.add(*TC), net.add("--data-path", "tun")
    box1, box2 = net.boxes.values()
    until(lambda: reaches(box1, box2.address) and kernels(one)[0] > 0, seconds=20)
    two.kill()  # or it would announce itself again
    with closing(net.store()) as store:
        store.delete(f"/jxdd/network/flanctl/hosts/{two.host.address}")

    def left_alone() -> bool:
        before = kernels(one)[0]
        ping(box1, box2.address, "-c", "1", "-W", "1")
        return kernels(one)[0] == before and one.counters().get("kernel-pass-not-flanctl", 0) > 0

    until(left_alone, seconds=20)
    two.again().wait()
    until(lambda: reaches(box1, box2.address), seconds=20)


# ---- what it refuses -------------------------------------------------------------------------------------------------


def inner(source: str, destination: str, length: int = 40, first: int = 0x45) -> bytes:
    """An IPv4 packet of protocol 253 (RFC 3692's, for experiments)."""
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", first, 0, length, 0, 0, 64, 253, 0) + ends
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + header[12:]
    return header.ljust(length, b"x")


def test_forged_packets_are_dropped_and_counted_by_the_kernel(net: Net) -> None:
    """Ten thousand of each while TCP runs are in test_agent_packets.py; here it is the kernel that refuses them."""
    one, two = net.add(*TC), net.add(*TC)
    stranger = net.lab.add_host("stranger")
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    mine, theirs = str(box1.address), str(box2.address)
    kinds = {
        "kernel-drop-unknown-sender": (stranger, inner(theirs, mine)),
        "kernel-drop-spoofed-source": (two.host, inner("172.17.99.9", mine)),
        "kernel-drop-foreign-destination": (two.host, inner(theirs, "10.1.2.3")),
        "kernel-drop-short": (two.host, inner(theirs, mine)[:19]),
        "kernel-drop-bad-version": (two.host, inner(theirs, mine, first=0x65)),
        "kernel-drop-bad-length": (two.host, inner(theirs, mine)[:-1]),
    }
    count = 100
    channels = {}
    for host in (stranger, two.host):
        with inside(host.path):
            channels[host] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    before = one.counters()
    with inside(box1.path):
        sink = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
    sink.setblocking(False)
    for host, packet in kinds.values():
        for _ in range(count):
            channels[host].sendto(packet, (str(one.host.address), PORT))

    def dropped() -> dict[str, int]:
        after = one.counters()
        return {name: after.get(name, 0) - before.get(name, 0) for name in kinds}

    until(lambda: dropped() == dict.fromkeys(kinds, count), what=dropped)
    with pytest.raises(BlockingIOError):
        sink.recv(100)
    channels[two.host].sendto(inner(theirs, mine), (str(one.host.address), PORT))
    sink.settimeout(5)
    assert sink.recv(100).endswith(b"x"), "and the right one arrives"
    for channel in (sink, *channels.values()):
        channel.close()


# ---- restarts and changes of path ------------------------------------------------------------------------------------


def test_no_restart_and_no_kill_loses_a_packet(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    before = kernels(one)
    with pinged(box1, box2.address):
        for number in range(20):
            if number % 2:
                one.kill()
            else:
                assert one.terminate() == 0
            one = one.again()
            one.wait()
    assert kernels(one) > before, "the counters outlive an agent"
    assert "repaired" not in one.log_text()


def test_from_the_kernel_to_user_space_no_packet_is_lost(net: Net) -> None:
    one, two = net.add(*TC), net.add("--data-path", "auto")
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    with pinged(box1, box2.address):
        # While it runs: what speaks against the kernel path appears, and goes again.
        two.host.run(
            ["ip", "xfrm", "policy", "add", "src", "198.51.100.1/32", "dst", "198.51.100.2/32", "dir", "out"]
        )
        two.wait_log("carried in user space, not in the kernel: this host has IPsec policies")
        assert "flanctl" not in filters(two.host, "eth0", "ingress")
        two.host.run(["ip", "xfrm", "policy", "flush"])
        until(lambda: "flanctl_dec" in filters(two.host, "eth0", "ingress"), seconds=20)
        until(lambda: switches(two) == {"kernel": 1, "userspace": 1})
        # By the operator's word.
        one.kill()
        one.options = (*one.options[:-1], "tun")
        one = one.again()
        one.wait()
        until(lambda: "flanctl" not in filters(one.host, "eth0", "ingress"))
    assert "flanctl" not in filters(one.host, "flannel0", "egress")
    assert "flannel0-rx" not in one.host.run(["ip", "link"]).stdout
    assert len(net.lab._pins()) == 1, "the other host's"
    assert net.status(one)["data_path"] == "userspace"


@pytest.mark.parametrize("path", ["tun", "tc"])
def test_ten_thousand_peers_come_and_are_replaced_and_no_packet_is_lost(tmp_path: Path, path: str) -> None:
    """Whole tables in few steps: the agents take together what comes in bursts."""
    many = 10_000

    def fill(store: SqliteStore, first: int, address: str) -> list[str]:
        keys = [
            f"/jxdd/network/subnets/{IPv4Address('10.128.0.0') + 256 * (first + n)}-24" for n in range(many)
        ]
        for key in keys:
            store.create(key, b'{"PublicIP":"%s"}' % address.encode(), ttl=3600)
        return keys

    def peers(agent: RunningAgent) -> object:
        counted = net.status(agent)["peers"]
        assert isinstance(counted, dict)
        return counted["count"]

    with Lab("many") as lab:
        net = Net(lab, tmp_path, b'{"Network":"10.0.0.0/8","SubnetMax":"10.100.0.0"}')
        one, two = net.add("--data-path", path), net.add("--data-path", path)
        box1, box2 = net.boxes.values()
        if path == "tc":
            direct(one, two, box1, box2)
        until(lambda: reaches(box1, box2.address))
        with pinged(box1, box2.address), closing(net.store()) as store:
            first = fill(store, 0, "198.51.100.1")
            until(lambda: peers(one) == peers(two) == many + 1, seconds=60)
            for key in first:
                store.delete(key)
            fill(store, many, "198.51.100.2")
            fill(store, 2 * many, "198.51.100.3")
            until(lambda: peers(one) == peers(two) == 2 * many + 1, seconds=60)
        if path == "tc":
            direct(one, two, box1, box2)
    assert lab.leftovers() == ()


def test_a_dead_agents_packets_flow_until_its_lease_ends(net: Net) -> None:
    one, two = net.add(*TC, "--lease-ttl", "10s"), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    one.kill()
    assert reaches(box1, box2.address)
    until(lambda: not reaches(box1, box2.address), seconds=30, what="the lease has ended")


def valid_until(pins: Path) -> float:
    """Seconds from now at which the programs of these maps give everything to user space (`struct config`, flannel.h)."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
    path, key, value = (
        ctypes.create_string_buffer(bytes(pins / "config")),
        ctypes.c_uint32(0),
        (ctypes.c_uint64 * 12)(),
    )
    get = struct.pack("=QII", ctypes.addressof(path), 0, 0)
    channel = libc.syscall(number, 7, get, len(get))  # BPF_OBJ_GET
    assert channel >= 0, os.strerror(ctypes.get_errno())
    try:
        look = struct.pack("=IxxxxQQQ", channel, ctypes.addressof(key), ctypes.addressof(value), 0)
        assert libc.syscall(number, 1, look, len(look)) == 0  # BPF_MAP_LOOKUP_ELEM
    finally:
        os.close(channel)
    return value[0] / 1e9 - time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_stopped_agents_path_ends_after_a_moment_and_a_killed_ones_with_the_lease(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    two.kill()
    pins = net.lab._pins()
    assert len(pins) == 2
    ends = {path: valid_until(path) for path in pins}
    assert all(end > 80_000 for end in ends.values()), "a lease's day"
    assert one.terminate() == 0
    left = sorted(valid_until(path) for path in pins)
    assert 60 < left[0] <= GRACE
    assert left[1] > 80_000
    assert reaches(box1, box2.address)
    one.again().wait()
    assert all(valid_until(path) > 80_000 for path in pins)


def test_what_comes_in_place_of_a_stopped_agent_gets_its_datagrams(net: Net) -> None:
    """The way back to flanneld: stop, delete flannel0, start the other. Soon peers send it nothing from their kernels."""
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    assert two.terminate() == 0
    two.host.ip_batch("link delete flannel0")
    assert "flanctl_dec" in filters(two.host, "eth0", "ingress")
    with inside(two.host.path):
        flanneld = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(flanneld):
        flanneld.bind((str(two.host.address), PORT))
        flanneld.setblocking(False)

        def heard() -> bool:
            """An echo request, which user space sent."""
            before = kernels(one)[0]
            ping(box1, box2.address, "-c", "1", "-W", "1")
            try:
                datagram = flanneld.recv(2000)
            except BlockingIOError:
                return False
            assert datagram[16:20] == box2.address.packed
            return kernels(one)[0] == before

        until(heard, seconds=20)


def test_the_path_lives_on_with_each_renewal_however_seldom_the_agent_looks(net: Net) -> None:
    options = *TC, "--lease-ttl", "10s", "--iptables-resync", "1h"
    one, two = net.add(*options), net.add(*options)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    for agent in (one, two):
        until(lambda agent=agent: agent.log_text().count(" renewed ") >= 5, seconds=40)
    before = kernels(one), kernels(two)
    assert reaches(box1, box2.address)
    assert all(
        new > old for old, new in zip(sum(before, ()), sum((kernels(one), kernels(two)), ()), strict=True)
    )


# ---- the device that receives for us --------------------------------------------------------------------------------


def received(host: Host | Container, device: str = "flannel0-rx") -> int:
    """Packets that came out of a device."""
    shown = json.loads(host.run(["ip", "-s", "-j", "link", "show", device]).stdout)
    return int(shown[0]["stats64"]["rx"]["packets"])


def transfer(
    server: Container | Host, to: IPv4Address, client: Container | Host, seconds: float = 10
) -> None:
    """A TCP connection with a megabyte from the client to the server."""
    with inside(server.path):
        listener = socket.create_server((str(to), 5001))
    with inside(client.path):
        sender = socket.create_connection((str(to), 5001), timeout=seconds)
    receiver, _ = listener.accept()
    receiver.settimeout(10)
    thread = threading.Thread(target=lambda: (sender.sendall(bytes(1 << 20)), sender.close()))
    thread.start()
    got = 0
    while data := receiver.recv(1 << 16):
        got += len(data)
    thread.join()
    receiver.close()
    listener.close()
    assert got == 1 << 20


def test_tcp_to_containers_is_unpacked_by_the_kernels_own_tunnel_and_the_rest_is_not(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    # A rule on our port sees the datagrams on their way there.
    two.host.run(["iptables", "-I", "INPUT", "-p", "udp", "--dport", str(PORT)])
    before = received(two.host)
    assert ping(box1, box2.address, "-c", "20", "-i", "0.01") == 0
    assert received(two.host) == before
    transfer(box2, box2.address, box1)
    through = received(two.host) - before
    # Over a virtual wire a packet is up to 64 KiB: a docker0 that cut them would show in the container.
    assert 16 <= through < 300
    rule = two.host.run(["iptables", "-vnxL", "INPUT"]).stdout.splitlines()[2]
    assert int(rule.split()[0]) == through, "each passed INPUT"
    whole = received(box2, "eth0")
    transfer(box2, box2.address, box1)
    assert received(box2, "eth0") - whole < 400, "super-packets arrive whole"
    # What ends on the host itself is not forwarded, so nobody would cut it.
    before = received(two.host)
    transfer(two.host, two.subnet.network_address, box1)
    assert received(two.host) == before
    drops = {name: count for name, count in two.counters().items() if "drop" in name}
    assert drops == {}


@pytest.mark.parametrize(
    "rule", ["-t nat -A POSTROUTING -j MASQUERADE", "-A INPUT -m conntrack --ctstate INVALID -j DROP"]
)
def test_nat_and_connection_tracking_leave_the_way_through_the_stack_alone(net: Net, rule: str) -> None:
    """NAT drops the socket a program has given a packet, if that socket's other end is another port than the packet's."""
    one, two = net.add(*TC, "--ip-masq"), net.add(*TC, "--ip-masq")
    box1, box2 = net.boxes.values()
    for host in (one.host, two.host):
        host.run(["iptables", *rule.split()])
    direct(one, two, box1, box2)
    before = received(two.host)
    transfer(box2, box2.address, box1)
    assert received(two.host) > before
    drops = {name: count for name, count in two.counters().items() if "drop" in name}
    assert drops == {}


def test_where_the_stack_takes_what_it_is_given_tcp_goes_on_without_it(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    two.host.run(["iptables", "-A", "INPUT", "-p", "udp", "--dport", str(PORT), "-j", "DROP"])
    transfer(box2, box2.address, box1, seconds=40)
    why = "what was given to the stack did not come out of flannel0-rx; UDP port 8285 must pass INPUT"
    assert why in net.status(two)["data_path_why"]
    two.wait_log(why)
    before = two.counters()["kernel-stack-given"]
    transfer(box2, box2.address, box1)
    assert two.counters()["kernel-stack-given"] == before


def test_who_finds_the_receiving_port_brings_nothing_in(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    with inside(box1.path):
        sink = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
    sink.setblocking(False)
    packet = inner(str(box2.address), str(box1.address))
    before = one.counters().get("kernel-drop-unknown-sender", 0)
    # Even from a peer, and as VXLAN-GPE has it.
    with inside(two.host.path), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as channel:
        for vni in range(100):
            header = struct.pack("!BxxBI", 0x0C, 1, vni << 8)
            channel.sendto(header + packet, (str(one.host.address), RX_PORTS[0]))
    until(lambda: one.counters().get("kernel-drop-unknown-sender", 0) == before + 100)
    with closing(sink), pytest.raises(BlockingIOError):
        sink.recv(100)


def test_a_taken_port_or_name_is_not_in_the_way(net: Net) -> None:
    first, second = net.lab.add_host(), net.lab.add_host()
    with inside(first.path):
        theirs = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        theirs.bind(("0.0.0.0", RX_PORTS[0]))
    second.ip_batch("link add flannel0-rx type bridge")
    one, two = net.put_agent_on(first, *TC), net.put_agent_on(second, *TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    shown = json.loads(first.run(["ip", "-d", "-j", "link", "show", "flannel0-rx"]).stdout)
    assert shown[0]["linkinfo"]["info_data"]["port"] == RX_PORTS[1]
    assert (shown[0]["ifalias"], net.status(one)["data_path_why"]) == ("flanctl", "")
    why = net.status(two)["data_path_why"]
    assert why == "TCP to containers is slower than it could be: flannel0-rx exists and is not ours"
    transfer(box1, box1.address, box2)
    transfer(box2, box2.address, box1)
    theirs.close()
    # The name is free: the next look finds it, as it does one that somebody removed or took down.
    second.ip_batch("link delete flannel0-rx")
    until(lambda: not net.status(two)["data_path_why"], seconds=20)
    for spoil in ("link set flannel0-rx down", "link delete flannel0-rx"):
        second.ip_batch(spoil)
        transfer(box2, box2.address, box1)
        until(
            lambda: "UP" in second.run(["ip", "link", "show", "flannel0-rx"], check=False).stdout, seconds=20
        )
        before = received(second)
        transfer(box2, box2.address, box1)
        assert received(second) > before
    two.terminate()
    flanctl(second, two.endpoints, "cleanup", "--yes", "--run-dir", str(two.folder / "run"))
    assert "flannel0" not in second.run(["ip", "link"]).stdout


# ---- other programs, other underlays ---------------------------------------------------------------------------------


def test_foreign_filters_stay_and_are_called(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    host = one.host
    # A program that wants nothing: the next one is asked.
    host.run(
        [
            "tc",
            "filter",
            "add",
            "dev",
            "eth0",
            "ingress",
            "pref",
            "5",
            "bpf",
            "bytecode",
            "1,6 0 0 0",
            "classid",
            ":1",
        ]
    )
    direct(one, two, box1, box2)
    # One that takes all packets, and lets them pass: ours is not asked, and user space carries them.
    host.run(
        [
            "tc",
            "filter",
            "add",
            "dev",
            "eth0",
            "ingress",
            "pref",
            "6",
            "protocol",
            "all",
            *ALL.split(),
            "classid",
            ":1",
        ]
    )
    before = kernels(one)[1]
    assert reaches(box1, box2.address)
    assert kernels(one)[1] == before
    one.terminate()
    one = one.again()
    one.wait()
    kept = filters(host, "eth0", "ingress")
    assert "pref 5 bpf" in kept
    assert "pref 6 u32" in kept
    one.terminate()
    removed = flanctl(host, one.endpoints, "cleanup", "--yes", "--run-dir", str(one.folder / "run")).stdout
    assert f"tc filter delete dev eth0 ingress pref {PREFERENCE}" in removed
    kept = filters(host, "eth0", "ingress")
    assert "flanctl" not in kept
    assert "pref 5 bpf" in kept


def test_what_stands_in_our_place_on_the_hook_keeps_it(net: Net) -> None:
    host = net.lab.add_host()
    host.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"])
    theirs = ["protocol", "all", *ALL.split(), "classid", ":1"]
    host.run(["tc", "filter", "add", "dev", "eth0", "ingress", "pref", str(PREFERENCE), *theirs])
    one, two = net.put_agent_on(host, "--data-path", "auto"), net.add(*TC)
    box1, box2 = net.boxes.values()
    assert "a foreign u32 filter (" in one.log_text()
    assert one.ready["data-path"] == "userspace"
    until(lambda: reaches(box1, box2.address), seconds=20, what="the agents know each other")
    assert two.ready["data-path"] == "kernel"
    assert "u32" in filters(host, "eth0", "ingress")


def test_a_bridge_is_an_underlay_too_and_its_changes_are_followed(net: Net) -> None:
    host = net.lab.add_host()
    host.ip_batch(
        "link add br0 type bridge",
        "link set br0 up",
        "addr flush dev eth0",
        "link set eth0 master br0",
        f"addr add {host.interface} dev br0",
    )
    one, two = net.put_agent_on(host, *TC, iface="br0"), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    assert "flanctl_dec" in filters(host, "br0", "ingress")
    # A smaller MTU: what does not fit any more is cut by user space's socket, the rest stays in the kernel.
    host.ip_batch("link set br0 mtu 1300")
    assert ping(box1, box2.address, "-c", "3", "-i", "0.1", "-W", "2", "-s", "1400") == 0
    assert one.counters()["kernel-pass-too-big"] >= 3
    direct(one, two, box1, box2)
    # Another name.
    host.ip_batch("link set br0 down", "link set br0 name br1", "link set br1 up")
    direct(one, two, box1, box2)
    assert net.status(one)["data_path"] == "kernel"
    # Gone, and there again.
    host.ip_batch("link delete br1")
    one.wait_log(f"user space, not in the kernel: no interface has the address {host.address}")
    host.ip_batch(
        "link add br0 type bridge",
        "link set br0 up",
        "link set eth0 master br0",
        f"addr add {host.interface} dev br0",
    )
    direct(one, two, box1, box2)


def test_our_device_made_anew_is_carried_again(net: Net) -> None:
    one, two = net.add(*TC), net.add(*TC)
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)
    one.host.ip_batch("link delete flannel0")
    direct(one, two, box1, box2)


def test_a_firewall_rule_on_the_port_is_said_to_be_inert(net: Net) -> None:
    host = net.lab.add_host()
    host.run(["iptables", "-A", "INPUT", "-p", "udp", "--dport", "8000:9000", "-j", "ACCEPT"])
    one = net.put_agent_on(host, *TC, container=False)
    line = one.wait_log(r"packets are carried in the kernel; firewall rules on UDP port 8285 do not see .*")[
        0
    ]
    assert "8000:9000" in line
    assert "8000:9000" in str(net.status(one)["data_path_why"])


# ---- where it cannot be ----------------------------------------------------------------------------------------------


NO_BPF = f"""
import ctypes, os, struct, sys
number = {{"x86_64": 321, "aarch64": 280}}[os.uname().machine]
steps = (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | {errno.EPERM}), (0x06, 0, 0, 0x7FFF0000)
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(filter))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.create_string_buffer(program)) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a program that may not call bpf(2), as under a container's seccomp profile."""
CAPABILITIES = "-sys_admin,-bpf"


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (["setpriv", "--bounding-set", CAPABILITIES, "--inh-caps", CAPABILITIES], "CAP_BPF"),
        ([sys.executable, "-c", NO_BPF], "Operation not permitted"),
        (
            ["unshare", "-m", "sh", "-c", 'mount --bind {empty} /sys/fs && exec "$@"', "sh"],
            "there is no /sys/fs/bpf",
        ),
        (
            ["unshare", "-m", "sh", "-c", 'mount -o remount,bind,ro /sys/fs/bpf && exec "$@"', "sh"],
            "is not writable",
        ),
    ],
    ids=["no right to bpf", "no system call bpf", "no bpf file system", "read-only"],
)
def test_without_what_it_needs_auto_takes_user_space_and_says_why(
    net: Net, tmp_path: Path, before: list[str], why: str
) -> None:
    host, folder, empty = net.lab.add_host(), tmp_path / "agent", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    command = [word.replace("{empty}", str(empty)) for word in before]
    command += [*program("flanctl"), "agent", "--iface", "eth0", "--data-path", "auto"]
    command += ["--subnet-file", str(folder / "subnet.env")]
    env = environment(f"sqlite:{net.folder}/registry.db")
    env |= {"FLANCTL_STATE_DIR": str(folder / "state"), "FLANCTL_RUN_DIR": str(folder / "run")}
    process = host.popen(command, env=env, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " ready " in line:
            break
    said = [line for line in lines if "not in the kernel" in line]
    assert len(said) == 1, lines
    assert why in said[0], said
    assert "data-path=userspace" in lines[-1]


def test_what_refused_it_at_boot_is_tried_again(net: Net) -> None:
    host = net.lab.add_host()
    forwarding = "echo {} > /proc/sys/net/ipv4/ip_forward"
    host.run(["sh", "-c", forwarding.format(0)])
    one, two = net.put_agent_on(host, "--data-path", "auto"), net.add(*TC)
    assert one.wait_log(r"packets are carried in user space, not in the kernel: .*")
    host.run(["sh", "-c", forwarding.format(1)])
    one.wait_log(r"packets are carried in the kernel")
    box1, box2 = net.boxes.values()
    direct(one, two, box1, box2)


def test_tc_at_any_price_does_not_start_where_it_cannot_be(net: Net) -> None:
    host = net.lab.add_host()
    host.run(
        ["ip", "xfrm", "policy", "add", "src", "198.51.100.1/32", "dst", "198.51.100.2/32", "dir", "out"]
    )
    agent = RunningAgent.start(
        host, net.folder / "refused", f"sqlite:{net.folder}/registry.db", "--iface", "eth0", *TC
    )
    assert agent.wait_end() == 1
    assert "--data-path tc: packets cannot be carried in the kernel: this host has IPsec" in agent.log_text()
    assert "Traceback" not in agent.log_text()

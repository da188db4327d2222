"""Packets through real agents: what must arrive does, what must not does not and is counted.

    h1 ─ 192.168.66.11 ─┐                 each with an agent (own process), docker0 and a container .2
    h2 ─ 192.168.66.12 ─┼─ under0 .1
    h3 ─ 192.168.66.13 ─┤
    stranger ─ .14 ─────┘                 no agent, no lease

Sockets are opened by this process inside the namespaces, so that no helper program is needed. A datagram that must
not arrive is always followed by one that must, on the same way: when that is there, the other is not coming.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.agents import RunningAgent
from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Container, Host, Namespace

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables")
NETWORK = b'{"Network":"172.17.0.0/16"}'
PORT = 8285
SECONDS = 5.0
MTU = 1472
IP_RECVOPTS, IP_OPTIONS, IP_MTU_DISCOVER, IP_RECVERR, SO_NO_CHECK = 6, 4, 10, 11, 11
PMTUDISC_DONT, PMTUDISC_DO = 0, 2


@dataclass
class Member:
    host: Host
    agent: RunningAgent
    container: Container

    @property
    def network(self):
        return self.agent.subnet


def join(lab: Lab, folder: Path, *options: str, name: str | None = None) -> Member:
    """A host with a ready agent and a container behind docker0."""
    host = lab.add_host(name)
    agent = RunningAgent.start(
        host, folder / host.name, f"sqlite:{folder / 'registry.db'}", "--iface", "eth0", *options
    ).wait()
    return Member(host, agent, host.add_container(agent.gateway, MTU))


def registry(folder: Path) -> SqliteStore:
    return SqliteStore(str(folder / "registry.db"))


def configured(folder: Path) -> Path:
    with closing(registry(folder)) as store:
        store.create("/jxdd/network/config", NETWORK, ttl=None)
    return folder


@dataclass
class Net:
    one: Member
    two: Member
    three: Member
    stranger: Host
    wide: Container
    """On the first host, with the MTU of the underlay."""


@pytest.fixture(scope="module", params=["tun", "tc"])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Three hosts; with the kernel path the first two, while the third stays in user space."""
    folder = configured(tmp_path_factory.mktemp("net"))
    path = "--data-path", str(request.param)
    with Lab("packets") as lab:
        one, two = join(lab, folder, "--ip-masq", *path), join(lab, folder, *path)
        three = join(lab, folder, "--data-path", "tun")
        for member in (one, two, three):
            # As Docker does it: only what flannel's forward rules accept may pass.
            member.host.run(["iptables", "-P", "FORWARD", "DROP"])
            member.host.run(["iptables", "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT"])
        known(one, 2)
        known(two, 2)
        wide = one.host.add_container(one.agent.gateway, 1500)
        yield Net(one, two, three, lab.add_host("stranger"), wide)
    assert lab.leftovers() == ()


def known(member: Member, peers: int) -> None:
    """Wait until an agent has heard of so many others, before it was ready or after."""
    member.agent.wait_log(rf"(?m) peers={peers}$")


def udp(where: Namespace, address: IPv4Address | str = "0.0.0.0", port: int = 0) -> socket.socket:
    with inside(where.path):
        channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    channel.bind((str(address), port))
    channel.settimeout(SECONDS)
    return channel


def ping(where: Namespace, to: IPv4Address, *words: str) -> str:
    done = where.run(["ping", "-n", "-c", "1", "-W", "3", *words, str(to)], check=False)
    return done.stdout + done.stderr


def arrives(where: Namespace, to: IPv4Address, *words: str) -> bool:
    return " 0% packet loss" in ping(where, to, *words)


# ---- packets that must arrive ---------------------------------------------------------------------------------------


def test_containers_hosts_and_bridges_reach_each_other(net: Net) -> None:
    """container ↔ container, host → container, container → the other host's bridge, device and public address."""
    one, two = net.one, net.two
    base = two.network.network_address
    assert arrives(one.container, two.container.address)
    assert arrives(two.container, one.container.address)
    assert arrives(one.host, two.container.address)
    assert arrives(one.container, base + 1)
    assert arrives(one.container, base)
    assert arrives(one.container, two.host.address)
    assert arrives(net.three.host, base + 1)


def test_a_process_bound_to_its_hosts_public_address_reaches_containers(net: Net) -> None:
    """Without --ip-masq the inner source is the public IP itself; with it, the device's address."""
    two, three = net.two, net.three
    assert arrives(two.host, three.container.address, "-I", str(two.host.address))
    assert arrives(net.one.host, three.container.address, "-I", str(net.one.host.address))


def test_inside_the_network_containers_are_seen_with_their_own_address(net: Net) -> None:
    with (
        closing(udp(net.two.container, net.two.container.address)) as sink,
        closing(udp(net.one.container)) as source,
    ):
        source.sendto(b"who am I", sink.getsockname())
        assert sink.recvfrom(100)[1][0] == str(net.one.container.address)


def test_with_ip_masq_the_world_sees_the_host(net: Net) -> None:
    with (
        closing(udp(net.stranger, net.stranger.address)) as sink,
        closing(udp(net.one.container)) as source,
    ):
        source.sendto(b"who am I", sink.getsockname())
        assert sink.recvfrom(100)[1][0] == str(net.one.host.address)


def test_df_at_the_mtu_passes_and_one_byte_more_gets_frag_needed_from_the_kernel(net: Net) -> None:
    one, two = net.one, net.two
    assert arrives(one.container, two.container.address, "-M", "do", "-s", str(MTU - 28))
    # A container whose own MTU is larger hears it from the host's forwarding.
    wide = net.wide
    assert f"mtu = {MTU}" in ping(wide, two.container.address, "-M", "do", "-s", str(MTU - 27))
    assert arrives(wide, two.container.address, "-M", "do", "-s", str(MTU - 28))


@pytest.mark.parametrize("size", [0, 1, 512, 1232, MTU - 29, MTU - 28, MTU - 27, 4000, 65507])
def test_udp_of_every_size_arrives_whole_larger_ones_as_inner_fragments(net: Net, size: int) -> None:
    content = os.urandom(size)
    with (
        closing(udp(net.two.container, net.two.container.address)) as sink,
        closing(udp(net.one.container)) as source,
    ):
        source.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        source.sendto(content, sink.getsockname())
        assert sink.recv(70000) == content


def test_options_tos_and_ecn_bits_survive_the_way(net: Net) -> None:
    """Record Route (RFC 791): the hosts' kernels write themselves into it, we leave it alone."""
    record_route = bytes([7, 15, 4]) + bytes(12) + b"\0"
    with (
        closing(udp(net.two.container, net.two.container.address)) as sink,
        closing(udp(net.one.container)) as source,
    ):
        sink.setsockopt(socket.IPPROTO_IP, IP_RECVOPTS, 1)
        sink.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        source.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, record_route)
        source.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2A)  # DSCP 10, ECN ECT(0)
        source.sendto(b"with options", sink.getsockname())
        content, extra, _, _ = sink.recvmsg(100, 200)
    assert content == b"with options"
    found = {kind: data for _, kind, data in extra}
    assert found[socket.IP_TOS] == b"\x2a"
    assert found[IP_RECVOPTS].startswith(bytes([7, 15]))
    assert net.one.network.network_address.packed[:3] in found[IP_RECVOPTS]


def test_udp_without_a_checksum_arrives_without_one(net: Net) -> None:
    with (
        closing(udp(net.two.container, net.two.container.address)) as sink,
        closing(udp(net.one.container)) as source,
        inside(net.two.container.path),
        closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)) as raw,
    ):
        raw.settimeout(SECONDS)
        source.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        source.sendto(b"zero checksum", sink.getsockname())
        assert sink.recv(100) == b"zero checksum"
        packet = raw.recv(1000)
    assert packet[26:28] == b"\0\0"


@pytest.mark.parametrize("forth", [True, False])
def test_tcp_carries_the_same_bytes_both_ways(net: Net, forth: bool) -> None:
    near, far = (net.one, net.two) if forth else (net.two, net.one)
    content = os.urandom(1 << 16) * 64
    with inside(far.container.path):
        listener = socket.create_server((str(far.container.address), 0))
    listener.settimeout(SECONDS)
    with closing(listener):
        with inside(near.container.path):
            sender = socket.create_connection(listener.getsockname(), timeout=SECONDS)
        receiver, peer = listener.accept()
        receiver.settimeout(SECONDS)
        assert peer[0] == str(near.container.address)

        def pour() -> None:
            with closing(sender):
                sender.sendall(content)

        pouring = threading.Thread(target=pour)
        pouring.start()
        digest = hashlib.sha256()
        with closing(receiver):
            while data := receiver.recv(1 << 16):
                digest.update(data)
        pouring.join()
    assert digest.digest() == hashlib.sha256(content).digest()


# ---- datagrams that must not ----------------------------------------------------------------------------------------


def inner(
    source: IPv4Address | str, destination: IPv4Address | str, port: int, content: bytes = b"forged"
) -> bytes:
    """An IPv4 packet (RFC 791) with a UDP datagram without checksum (RFC 768)."""
    payload = struct.pack("!HHHH", 4242, port, 8 + len(content), 0) + content
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45, 0, 20 + len(payload), 0, 0, 64, 17, 0, IPv4Address(source).packed, IPv4Address(destination).packed,
    )  # fmt: skip
    return _summed(header) + payload


def _summed(header: bytes) -> bytes:
    """With its checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack("!H", 0xFFFF - total) + header[12:]


def lengthened(packet: bytes, by: int) -> bytes:
    """Its total length field off by so many bytes, its checksum right."""
    total = struct.unpack("!H", packet[2:4])[0] + by
    return (
        _summed(packet[:2] + struct.pack("!H", total) + packet[4:10] + b"\0\0" + packet[12:20]) + packet[20:]
    )


Forge = tuple[str, "Callable[[Net, int], bytes]", str]
FORGED: dict[str, Forge] = {
    "a perfect packet from an unknown host": (
        "stranger",
        lambda net, port: inner(net.two.container.address, net.one.container.address, port),
        "unknown-sender",
    ),
    "garbage from an unknown host": ("stranger", lambda net, port: b"\xff" * 60, "unknown-sender"),
    "inner source of another peer": (
        "three",
        lambda net, port: inner(net.two.container.address, net.one.container.address, port),
        "spoofed-source",
    ),
    "inner source in our own subnet": (
        "three",
        lambda net, port: inner(net.one.container.address + 1, net.one.container.address, port),
        "spoofed-source",
    ),
    "inner source outside the network": (
        "three",
        lambda net, port: inner("8.8.8.8", net.one.container.address, port),
        "spoofed-source",
    ),
    "inner source a public address of another peer": (
        "three",
        lambda net, port: inner(net.two.host.address, net.one.container.address, port),
        "spoofed-source",
    ),
    "inner destination at another peer": (
        "three",
        lambda net, port: inner(net.three.container.address, net.two.container.address, port),
        "foreign-destination",
    ),
    "inner destination on the underlay": (
        "three",
        lambda net, port: inner(net.three.container.address, net.two.host.address, port),
        "foreign-destination",
    ),
    "inner destination on our own underlay address": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.host.address, port),
        "foreign-destination",
    ),
    "inner destination our loopback": (
        "three",
        lambda net, port: inner(net.three.container.address, "127.0.0.1", port),
        "foreign-destination",
    ),
    "multicast": (
        "three",
        lambda net, port: inner(net.three.container.address, "224.0.0.1", port),
        "foreign-destination",
    ),
    "broadcast of our subnet": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.network.broadcast_address, port),
        "foreign-destination",
    ),
    "broadcast": (
        "three",
        lambda net, port: inner(net.three.container.address, "255.255.255.255", port),
        "foreign-destination",
    ),
    "an empty datagram": ("three", lambda net, port: b"", "short"),
    "a header cut short": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.container.address, port)[:19],
        "short",
    ),
    "garbage": ("three", lambda net, port: bytes(range(60)), "bad-version"),
    "IPv6": ("three", lambda net, port: b"\x60" + bytes(59), "bad-version"),
    "a packet cut short": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.container.address, port)[:-1],
        "bad-length",
    ),
    "a total length beyond the end": (
        "three",
        lambda net, port: lengthened(
            inner(net.three.container.address, net.one.container.address, port), 1
        ),
        "bad-length",
    ),
    "bytes behind the end": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.container.address, port) + b"\0",
        "bad-length",
    ),
    "a header length below five words": (
        "three",
        lambda net, port: b"\x44" + inner(net.three.container.address, net.one.container.address, port)[1:],
        "bad-length",
    ),
    "a header length beyond the end": (
        "three",
        lambda net, port: b"\x4f" + inner(net.three.container.address, net.one.container.address, port)[1:],
        "bad-length",
    ),
    "larger than the device takes": (
        "three",
        lambda net, port: inner(net.three.container.address, net.one.container.address, port, bytes(MTU)),
        "too-big",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_datagram_does_not_arrive_and_is_counted_under_its_reason(net: Net, name: str) -> None:
    sender, make, reason = FORGED[name]
    where = net.stranger if sender == "stranger" else net.three.host
    one, three = net.one, net.three
    before = one.agent.counters()
    with (
        closing(udp(one.container)) as sink,
        closing(udp(one.host, port=sink.getsockname()[1])) as host_sink,
        closing(udp(net.two.container, port=sink.getsockname()[1])) as other_sink,
        closing(udp(where)) as forger,
        closing(udp(three.host)) as honest,
    ):
        port = sink.getsockname()[1]
        forger.sendto(make(net, port), (str(one.host.address), PORT))
        good = inner(three.container.address, one.container.address, port, b"honest")
        honest.sendto(good, (str(one.host.address), PORT))
        assert sink.recv(2000) == b"honest"
        waiting = select.select([sink, host_sink, other_sink], [], [], 0)[0]
        assert waiting == []

    def moved() -> dict[str, int]:
        return {
            key: n - before.get(key, 0)
            for key, n in one.agent.counters().items()
            if key.startswith("drop-") and n != before.get(key, 0)
        }

    # The counters are published after the packets of a burst are on their way.
    assert until(moved, what=f"drop-{reason}") == {f"drop-{reason}": 1}


FLOOD = 10_000


def tcp_rate(net: Net, seconds: int) -> float:
    """Gbit/s from the second host's container to the first's."""
    one, two = net.one.container, net.two.container
    server = one.popen(["iperf3", "-s", "-1", "-B", str(one.address), "--forceflush"], stdout=subprocess.PIPE)
    while b"listening" not in server.stdout.readline():
        assert server.poll() is None, "iperf3 -s ended"
    done = two.run(["iperf3", "-c", str(one.address), "-J", "-t", str(seconds)], timeout=60)
    server.communicate()
    return json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e9


def overflown(host: Host) -> int:
    """Datagrams that our socket had no room for: the last field of its line (proc_net_udp)."""
    lines = host.run(["cat", "/proc/net/udp"]).stdout.splitlines()[1:]
    return sum(int(line.split()[-1]) for line in lines if line.split()[1].endswith(f":{PORT:04X}"))


@pytest.mark.needs("iperf3")
def test_ten_thousand_of_each_forged_kind_at_full_rate_while_tcp_runs_are_counted_and_none_arrives(
    net: Net,
) -> None:
    """What of its rate TCP keeps is measured by the row `forged` of `make bench`."""
    one = net.one
    before, lost = one.agent.counters(), overflown(one.host)
    with (
        closing(udp(one.container)) as sink,
        closing(udp(one.host, port=sink.getsockname()[1])) as host_sink,
        closing(udp(net.two.container, port=sink.getsockname()[1])) as other_sink,
        closing(udp(net.stranger)) as far,
        closing(udp(net.three.host)) as near,
    ):
        port = sink.getsockname()[1]
        for channel in (far, near):
            channel.connect((str(one.host.address), PORT))
        kinds = [
            (far if sender == "stranger" else near, make(net, port)) for sender, make, _ in FORGED.values()
        ]

        def forge() -> None:
            for channel, packet in kinds:
                for _ in range(FLOOD):
                    channel.send(packet)

        forger = threading.Thread(target=forge)
        forger.start()
        assert tcp_rate(net, 3) > 0
        forger.join()
        assert select.select([sink, host_sink, other_sink], [], [], 0)[0] == [], "one of them arrived"

    wanted: Counter[str] = Counter()
    for _, _, reason in FORGED.values():
        wanted[f"drop-{reason}"] += FLOOD

    def counted() -> dict[str, int]:
        now = one.agent.counters()
        return {name: now.get(name, 0) - before.get(name, 0) for name in wanted}

    until(lambda: sum(counted().values()) + overflown(one.host) - lost == sum(wanted.values()), seconds=20)
    found = counted()
    assert all(found[name] <= wanted[name] for name in wanted)
    assert sum(found.values()) > 0.8 * sum(wanted.values()), "most of them were looked at"


# ---- nobody has it --------------------------------------------------------------------------------------------------


def refused_after(where: Namespace, to: IPv4Address) -> tuple[int, float]:
    """The error a UDP socket with IP_RECVERR gets for a datagram, and after how many seconds."""
    with closing(udp(where)) as channel:
        channel.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        channel.connect((str(to), 9))
        began = time.monotonic()
        channel.send(b"is there anybody")
        try:
            channel.recv(100)
        except OSError as error:
            return error.errno or 0, time.monotonic() - began
    raise AssertionError(f"{to} answered")


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_without_a_route_the_sender_hears_it_at_once(net: Net, rp_filter: int) -> None:
    taken = {member.network for member in (net.one, net.two, net.three)}
    nobody = next(
        address
        for third in range(256)
        if not any((address := IPv4Address(f"172.17.{third}.7")) in subnet for subnet in taken)
    )
    files = [f"/proc/sys/net/ipv4/conf/{name}/rp_filter" for name in ("all", "flannel0", "docker0")]
    for file in files:
        net.two.host.run(["sh", "-c", f"echo {rp_filter} > {file}"])
    try:
        for where in (net.two.container, net.two.host):
            number, seconds = refused_after(where, nobody)
            assert number == errno.ENETUNREACH
            assert seconds < 2
        with inside(net.two.container.path), pytest.raises(OSError, match="unreachable"):
            socket.create_connection((str(nobody), 80), timeout=SECONDS)
    finally:
        for file in files:
            net.two.host.run(["sh", "-c", f"echo 0 > {file}"])


# ---- hosts that join, leave and move --------------------------------------------------------------------------------


def test_a_host_joins_leaves_and_its_subnet_moves_to_another(tmp_path: Path) -> None:
    """Nobody restarts: the others follow the registry."""
    folder = configured(tmp_path)
    with Lab("join") as lab:
        one, two = join(lab, folder), join(lab, folder)
        until(lambda: arrives(one.container, two.container.address), what="one reaches two")
        # joins
        three = join(lab, folder)
        until(lambda: arrives(one.container, three.container.address), what="one reaches three")
        address, network = three.container.address, three.network
        # The host `two` hears of it by a watch of its own, perhaps later than `one`.
        until(lambda: arrives(three.container, two.container.address), what="three reaches two")
        # leaves: its lease is deleted by the operator, because stopping keeps it
        assert three.agent.terminate() == 0
        with closing(registry(folder)) as store:
            key = f"/jxdd/network/subnets/{network.network_address}-24"
            entry = store.get(key)
            assert entry is not None
            store.delete(key)
            one.agent.wait_log(f"peer removed subnet={network}")
            until(lambda: refused_after(one.container, address)[0] == errno.ENETUNREACH)
            # moves: another host gets that subnet, and a container with the same address
            host = lab.add_host()
            value = entry.value.replace(str(three.host.address).encode(), str(host.address).encode())
            store.create(key, value, ttl=86400)
        agent = RunningAgent.start(
            host, folder / host.name, f"sqlite:{folder / 'registry.db'}", "--iface", "eth0"
        ).wait()
        assert agent.subnet == network
        moved = host.add_container(IPv4Interface(f"{network.network_address + 1}/24"), MTU)
        assert moved.address == address
        until(lambda: arrives(one.container, address), what="one reaches the moved container")
        assert arrives(moved, two.container.address)

"""Every packet over every path, to flanctl and to a flanneld, on every underlay.

    container, wide ─ docker0 ─ h1 ─ 192.168.66.11 ─┐            h1: flanctl on the path under test, --ip-masq,
              container ─ docker0 ─ h2 ─ …….12 ─────┼─ under0        FORWARD DROP as Docker sets it
                          stranger ─ …….13 ─────────┘            h2: flanctl on the same path, or the stand-in for flanneld

One field of hosts per path, peer and underlay; the packets are the tests. Each asserts that what was sent arrived byte for
byte, or was refused by the right words. A new path is one word in PATHS, a new underlay one function in UNDERLAYS.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
import struct
from contextlib import closing
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from flanctl.registry.stores.sqlite import SqliteStore
from tests.e2e.reachability import assert_tcp
from tests.support.agents import RunningAgent
from tests.support.deadline import until
from tests.support.flanneld_stand_in import StandIn
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Address

    from flanctl.demo.hosts import Container, Host, Namespace

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "ping")
PATHS = ("tun", "tun-plain", "tc")
OVERHEAD = 28
"""Bytes of the outer IPv4 and UDP headers."""
STAND_IN = IPv4Network("172.17.77.0/24")
SECONDS = 20.0
"""A try is lost after a part of it; a busy machine needs long for the last of many fragments."""
TRY_SECONDS = 2.0
LOSSY_ROUNDS = 20
IP_RECVOPTS, IP_OPTIONS, IP_MTU_DISCOVER, SO_NO_CHECK, UDP_SEGMENT = 6, 4, 10, 11, 103
PMTUDISC_DONT = 0
NO_OFFLOADS = ("tx", "off", "tso", "off", "gso", "off", "gro", "off", "sg", "off")


# ---- underlays -------------------------------------------------------------------------------------------------------


def _cables(lab: Lab, *options: str) -> None:
    """`ethtool -K` on both ends of every cable."""
    ends: list[tuple[Namespace, str]] = [(host, "eth0") for host in lab.hosts]
    ends += [(lab.underlay, f"port{n + 1}") for n in range(len(lab.hosts))]
    for where, device in ends:
        where.run(["ethtool", "-K", device, *options])


def _as_it_is(lab: Lab) -> None:
    """veth with its defaults: transmit offloads on, GRO off."""


def _without_offloads(lab: Lab) -> None:
    """Nor between containers and bridges, below."""
    _cables(lab, *NO_OFFLOADS)


def _with_gro(lab: Lab) -> None:
    """The receiving card puts packets together, tunnelled ones and plain datagrams too."""
    _cables(lab, "gro", "on", "rx-udp-gro-forwarding", "on")


def _lossy(lab: Lab) -> None:
    """One datagram in fifty is lost; one in four waits in a queue of its own, and others overtake it.

    Not by netem, which the kernels at hand lack.
    """
    for n in range(2):
        port, queue, to = f"port{n + 1}", f"queue{n + 1}", "action mirred egress redirect dev"
        lab.underlay.ip_batch(f"link add {queue} type ifb", f"link set {queue} up")
        for words in (
            f"qdisc add dev {queue} root tbf rate 400mbit burst 70k latency 50ms",
            f"qdisc add dev {port} clsact",
            # By the last two bits of the inner packet's id (RFC 791), behind 28 bytes of outer headers.
            f"filter add dev {port} ingress protocol ip u32 match ip protocol 17 0xff match u16 1 3 at 32 {to} {queue}",
        ):
            lab.underlay.run(["tc", *words.split()])
        for words in (
            "add table netdev loss",
            f"add chain netdev loss {port} {{ type filter hook ingress device {port} priority 0; }}",
            f"add rule netdev loss {port} ip protocol udp numgen random mod 50 == 0 counter drop",
        ):
            lab.underlay.run(["nft", words])


def _harmed(lab: Lab) -> bool:
    """Whether datagrams from either host have been lost, and have waited."""
    lost = re.findall(
        r"counter packets (\d+)", lab.underlay.run(["nft", "list", "table", "netdev", "loss"]).stdout
    )
    waited = [
        re.search(
            r"Sent \d+ bytes (\d+) pkt", lab.underlay.run(["tc", "-s", "qdisc", "show", "dev", queue]).stdout
        )
        for queue in ("queue1", "queue2")
    ]
    return len(lost) == 2 and all(map(int, lost)) and all(found and int(found[1]) for found in waited)


def _moved_to(link: str, *commands: str) -> Callable[[Lab], None]:
    """Each host's address on a link `link` over its eth0."""

    def make(lab: Lab) -> None:
        for host in lab.hosts:
            host.ip_batch(
                "addr flush dev eth0",
                *commands,
                f"link set {link} up",
                f"addr add {host.interface} dev {link} brd +",
            )

    return make


UNDERLAYS: dict[str, tuple[int, str, Callable[[Lab], None]]] = {
    "veth": (1500, "eth0", _as_it_is),
    "jumbo": (9000, "eth0", _with_gro),
    "narrow": (576, "eth0", _as_it_is),
    "no offloads": (1500, "eth0", _without_offloads),
    "lossy": (1500, "eth0", _lossy),
    "macvlan": (1500, "up0", _moved_to("up0", "link add link eth0 name up0 type macvlan mode bridge")),
    "vlan": (1500, "up0", _moved_to("up0", "link add link eth0 name up0 type vlan id 66")),
    "bond": (
        1500,
        "up0",
        _moved_to(
            "up0",
            "link add up0 type bond mode active-backup",
            "link set eth0 down",
            "link set eth0 master up0",
        ),
    ),
}
"""MTU in bytes, the interface agents are told, and what is done to the lab's hosts."""
NEEDS = {
    "jumbo": ("ethtool",),
    "no offloads": ("ethtool",),
    "lossy": ("nft", "ifb"),
    "macvlan": ("macvlan",),
    "vlan": ("vlan",),
    "bond": ("bond",),
}


# ---- the field -------------------------------------------------------------------------------------------------------


@dataclass
class Field:
    path: str
    peer: str
    underlay: str
    mtu: int
    """Of the tunnel."""
    agent: RunningAgent
    other: RunningAgent | StandIn
    near: Container
    wide: Container
    """Beside `near`, with an MTU larger than the tunnel's."""
    far: Container
    stranger: Host
    finished: bool
    """Whether the wire finishes checksums, as cards do."""
    loses: bool
    """Whether a packet may get lost on the way: then a test says it again, as an application would."""

    @property
    def patience(self) -> float:
        """Seconds until what was sent counts as lost."""
        return TRY_SECONDS if self.loses else SECONDS


def _fields() -> Iterator[object]:
    for path, peer, underlay in itertools.product(PATHS, ("flanctl", "flanneld"), UNDERLAYS):
        needs = (*NEEDS.get(underlay, ()), *(("bpf",) if path == "tc" else ()))
        yield pytest.param(
            (path, peer, underlay), marks=pytest.mark.needs(*needs), id=f"{path}, {peer}, {underlay}"
        )


@pytest.fixture(scope="module", params=_fields())
def field(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    path, peer, underlay = request.param
    mtu, iface, make = UNDERLAYS[underlay]
    folder = tmp_path_factory.mktemp("field")
    url = f"sqlite:{folder / 'registry.db'}"
    with Lab("matrix", mtu=mtu) as lab:
        one, two, stranger = lab.add_host(), lab.add_host(), lab.add_host("stranger")
        make(lab)
        with closing(SqliteStore(str(folder / "registry.db"))) as store:
            store.create("/jxdd/network/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
            if peer == "flanneld":
                value = f'{{"PublicIP":"{two.address}"}}'.encode()
                store.create(f"/jxdd/network/subnets/{STAND_IN.network_address}-24", value, ttl=86400)
        options = ("--iface", iface, "--data-path", path)
        agent = RunningAgent.start(one, folder / "one", url, *options, "--ip-masq").wait()
        one.run(["iptables", "-P", "FORWARD", "DROP"])
        one.run(["iptables", "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT"])
        other: RunningAgent | StandIn
        if peer == "flanneld":
            peers = {str(agent.subnet): str(one.address)}
            other = StandIn.static(two, folder / "two", str(STAND_IN), peers, f"-iface={iface}").wait()
        else:
            other = RunningAgent.start(two, folder / "two", url, *options).wait()
        inner = int(agent.ready["mtu"])
        assert inner == mtu - OVERHEAD
        near = one.add_container(agent.gateway, inner)
        wide = one.add_container(agent.gateway, mtu)
        far = two.add_container(other.gateway, inner)
        finished = underlay == "no offloads"
        if finished:
            for host in (one, two):
                for n, box in enumerate(host.containers):
                    for where, device in ((host, f"veth{n + 1}"), (box, "eth0")):
                        where.run(["ethtool", "-K", device, *NO_OFFLOADS])
        loses = underlay == "lossy" or peer == "flanneld"
        made = Field(path, peer, underlay, inner, agent, other, near, wide, far, stranger, finished, loses)
        until(lambda: _pings(near, far.address) and _on_its_path(made), seconds=30, what="the path is up")
        yield made
    assert lab.leftovers() == ()


def _on_its_path(field: Field) -> bool:
    """Whether both hosts know by now that the other runs flanctl, where that decides."""
    if field.path != "tc" or isinstance(field.other, StandIn):
        return True
    return all(agent.counters().get("kernel-out-packets", 0) > 0 for agent in (field.agent, field.other))


def _pings(where: Namespace, to: IPv4Address, *words: str) -> bool:
    return where.run(["ping", "-n", "-c", "1", "-W", "1", *words, str(to)], check=False).returncode == 0


def _udp(where: Namespace, address: IPv4Address | str = "0.0.0.0") -> socket.socket:
    with inside(where.path):
        channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    channel.bind((str(address), 0))
    return channel


def _arrives(field: Field, say: Callable[[], object], hear: Callable[[], bool], what: str = "it") -> None:
    """What `say` sends makes `hear` true; once is enough where nothing gets lost."""
    for attempt in itertools.count(1):
        say()
        if hear():
            return
        assert field.loses, f"{what} did not arrive"
        assert attempt < SECONDS / TRY_SECONDS, f"{what} did not arrive in {attempt} times"


def _received(channel: socket.socket, wanted: bytes, *, seconds: float) -> bool:
    """Whether what comes next, in time, is `wanted`, byte for byte."""
    channel.settimeout(seconds)
    try:
        return channel.recv(70_000) == wanted
    except TimeoutError:
        return False


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_tcp_arrives_whole_both_ways_by_the_path_that_was_asked_for(field: Field) -> None:
    if field.underlay == "lossy":
        for _ in range(LOSSY_ROUNDS):
            assert_tcp(field.near, field.far, field.far.address, megabytes=1)
            if _harmed(field.near.lab):
                break
        else:
            pytest.fail(f"nothing was lost in {LOSSY_ROUNDS} rounds")
    before = field.agent.counters()
    assert_tcp(field.near, field.far, field.far.address, megabytes=1)
    after = field.agent.counters()
    moved = {name: count - before.get(name, 0) for name, count in after.items()}
    assert moved["out-packets"] > 100
    assert moved["in-packets"] > 100
    kernel = moved.get("kernel-out-packets", 0), moved.get("kernel-in-packets", 0)
    if field.path != "tc":
        assert kernel == (0, 0)
    elif field.peer == "flanctl":
        assert kernel == (moved["out-packets"], moved["in-packets"])
    else:
        assert kernel[0] == 0, "a flanneld cannot finish what a kernel leaves to the card"
        assert moved["kernel-pass-not-flanctl"] > 0
        # Over a wire that leaves outer checksums unfinished, user space takes what a socket has sent.
        assert kernel[1] == (moved["in-packets"] if field.finished else 0)
    assert {name: count for name, count in moved.items() if "drop" in name and count} == {}


def test_datagrams_of_every_size_come_back_the_same_larger_ones_in_fragments(field: Field) -> None:
    largest = 2 * field.mtu if field.loses else 65_507
    with closing(_udp(field.far, field.far.address)) as there, closing(_udp(field.near)) as here:
        here.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        there.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        for size in (1, 512, field.mtu - 29, field.mtu - 28, field.mtu - 27, largest):
            content = random.randbytes(size)

            def echoed(content: bytes = content) -> bool:
                if not _received(there, content, seconds=field.patience):
                    return False
                there.sendto(content, (str(field.near.address), here.getsockname()[1]))
                return _received(here, content, seconds=field.patience)

            def ask(content: bytes = content) -> None:
                here.sendto(content, there.getsockname())

            _arrives(field, ask, echoed, f"{size} bytes")


def test_datagrams_that_a_sender_leaves_to_be_cut_arrive_as_the_datagrams_they_are(field: Field) -> None:
    """UDP_SEGMENT (udp(7)), as QUIC sends: one write, many datagrams, the last one shorter."""
    size = min(1200, field.mtu - 28)
    content = random.randbytes(size * 20 + 7)
    parts = {content[at : at + size] for at in range(0, len(content), size)}
    got: set[bytes] = set()
    with closing(_udp(field.far, field.far.address)) as there, closing(_udp(field.near)) as here:
        here.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)

        def heard() -> bool:
            there.settimeout(field.patience)
            try:
                while got < parts:
                    got.add(there.recv(70_000))
            except TimeoutError:
                return False
            return got == parts

        _arrives(field, lambda: here.sendto(content, there.getsockname()), heard)


def test_ip_options_tos_and_ecn_bits_survive_the_way(field: Field) -> None:
    """Record Route (RFC 791): kernels on the way write themselves into it, nobody else."""
    with closing(_udp(field.far, field.far.address)) as there, closing(_udp(field.near)) as here:
        there.settimeout(field.patience)
        there.setsockopt(socket.IPPROTO_IP, IP_RECVOPTS, 1)
        there.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        here.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, bytes([7, 15, 4]) + bytes(12) + b"\0")
        here.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2A)  # DSCP 10, ECN ECT(0)
        found: dict[int, bytes] = {}

        def heard() -> bool:
            try:
                content, extra, _, _ = there.recvmsg(100, 200)
            except TimeoutError:
                return False
            found.update({kind: data for _, kind, data in extra})
            return content == b"with options"

        _arrives(field, lambda: here.sendto(b"with options", there.getsockname()), heard)
    assert found[socket.IP_TOS] == b"\x2a"
    assert found[IP_RECVOPTS].startswith(bytes([7, 15]))
    assert field.agent.subnet.network_address.packed[:3] in found[IP_RECVOPTS]


def test_a_datagram_without_a_checksum_arrives_without_one(field: Field) -> None:
    with (
        closing(_udp(field.far, field.far.address)) as there,
        closing(_udp(field.near)) as here,
        inside(field.far.path),
        closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)) as raw,
    ):
        here.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)

        def heard() -> bool:
            return _received(there, b"zero checksum", seconds=field.patience)

        _arrives(field, lambda: here.sendto(b"zero checksum", there.getsockname()), heard)
        raw.settimeout(SECONDS)
        packet = raw.recv(1000)
    assert packet[28:] == b"zero checksum"
    assert struct.unpack("!H", packet[26:28]) == (0,)


# ---- what is refused, and what is rewritten --------------------------------------------------------------------------


def test_df_at_the_mtu_passes_and_one_byte_more_is_answered_with_the_mtu(field: Field) -> None:
    """By the host of the sender, whose interface is as wide as the underlay and knows no better."""
    where, to = field.wide, field.far.address
    words = ["ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", str(field.mtu + 1 - 28), str(to)]
    said = where.run(words, check=False)
    assert said.returncode != 0
    assert re.search(rf"mtu ?= ?{field.mtu}\b", said.stdout + said.stderr), said.stdout + said.stderr
    until(
        lambda: _pings(where, to, "-W", "5", "-M", "do", "-s", str(field.mtu - 28)),
        seconds=SECONDS if field.loses else 0,
    )


def test_peers_see_containers_as_they_are_and_the_world_sees_the_host(field: Field) -> None:
    for where, address, seen in (
        (field.far, field.far.address, field.near.address),
        (field.stranger, field.stranger.address, field.agent.host.address),
    ):
        with closing(_udp(where, address)) as there, closing(_udp(field.near)) as here:
            there.settimeout(field.patience)

            def ask(here: socket.socket = here, there: socket.socket = there) -> None:
                here.sendto(b"who am I", there.getsockname())

            def heard(there: socket.socket = there, seen: IPv4Address = seen) -> bool:
                try:
                    return bool(there.recvfrom(100)[1][0] == str(seen))
                except TimeoutError:
                    return False

            _arrives(field, ask, heard)

"""The stand-in for flanneld is what it stands for: the recorded bytes of the real packet loop, the real one's keys."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import MTU, assert_mtu, assert_pings, assert_tcp, wait_until_reachable
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.etcd_keys import Keys
from tests.support.flanneld_stand_in import PREFIX, StandIn, proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

VECTORS = json.loads(Path("tests/vectors/udp-proxy.json").read_text())
TUN_ADDRESS = "172.17.41.0"
MARK = bytes.fromhex("450000150000000009110000ac110709ac11290501")


class Loop:
    """proxy.c with sockets for everything: its TUN, its two peers, its control."""

    def __init__(self, stack: ExitStack) -> None:
        def udp() -> socket.socket:
            one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            one.bind(("127.0.0.1", 0))
            return one

        self.tun, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer1, self.peer2, self.sock = udp(), udp(), udp()
        for one in (self.tun, tun, self.control, control):
            stack.enter_context(one)
        fds = (tun.fileno(), self.sock.fileno(), control.fileno())
        words = [str(proxy()), *map(str, fds), TUN_ADDRESS, str(MTU)]
        self.process = subprocess.Popen(words, pass_fds=fds)
        stack.callback(self.process.wait, 10)
        stack.callback(self.process.kill)
        self.ends = {"udp_to_peer1": self.peer1, "udp_to_peer2": self.peer2, "written_to_tun": self.tun}

    def tell(self, what: int, subnet: str = "0.0.0.0/0", peer: socket.socket | None = None) -> None:
        address, _, length = subnet.partition("/")
        hop, port = peer.getsockname() if peer else ("0.0.0.0", 0)
        net, gate = IPv4Address(address).packed, IPv4Address(hop).packed
        self.control.send(
            struct.pack("=i", what) + net + struct.pack("=i", int(length)) + gate + struct.pack("=Hxx", port)
        )
        # It has read the message when the other end of the socket is empty, and then acts before the next packet.
        until(lambda: _unread(self.control) == 0)

    def put(self, direction: str, packet: bytes) -> dict[str, str | None]:
        """What comes out where.

        Behind it go two packets that are known to pass: when the second has, the loop has looked everywhere once more,
        and what has not come out by then does not.
        """
        if direction == "from TUN":
            self.tun.send(packet)
        else:
            self.peer1.sendto(packet, self.sock.getsockname())
        out: dict[str, str | None] = dict.fromkeys(self.ends)
        self.tun.settimeout(10)
        for _ in range(2):
            self.peer1.sendto(MARK, self.sock.getsockname())
            while (got := self.tun.recv(65536))[20:] != MARK[20:]:
                out["written_to_tun"] = got.hex()
        for name in ("udp_to_peer1", "udp_to_peer2"):
            self.ends[name].setblocking(False)
            try:
                out[name] = self.ends[name].recv(65536).hex()
            except BlockingIOError:
                pass
        return out


def _unread(end: socket.socket) -> int:
    import fcntl
    import termios

    return struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, b"\0" * 4))[0]


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ExitStack() as stack:
        yield Loop(stack)


def test_the_packet_loop_gives_the_recorded_bytes_of_the_real_one(loop: Loop) -> None:
    narrow, wide = "172.17.7.0/24", "172.17.0.0/16"
    before = {
        "checksum field ffff before": lambda: loop.tell(1, narrow, loop.peer1),
        "dst only in /16": lambda: loop.tell(1, wide, loop.peer2),
        "after delete": lambda: loop.tell(2, wide),
        "replaced next hop": lambda: loop.tell(1, "172.17.7.77/24", loop.peer2),
    }
    compared = 0
    for vector in VECTORS["vectors"]:
        case, direction = vector["case"], vector.get("direction")
        if direction is None:
            continue  # stop, below
        before.pop(case, lambda: None)()
        wanted = {name: vector.get(name) for name in loop.ends}
        assert loop.put(direction, bytes.fromhex(vector["in"])) == wanted, (direction, case)
        compared += 1
    assert compared == len(VECTORS["vectors"]) - 1
    assert not before
    loop.tell(3)
    assert loop.process.wait(10) == 0


@pytest.mark.needs("root", "netns", "tun")
@pytest.mark.parametrize("like", ["0.7.1", "0.28.9"])
def test_without_a_registry_it_is_a_device_and_a_packet_loop(tmp_path: Path, like) -> None:
    subnets = "172.17.41.0/24", "172.17.42.0/24"
    with Lab("plain") as lab:
        hosts = lab.add_host(), lab.add_host()
        ends = []
        for mine, other in ((0, 1), (1, 0)):
            peers = {subnets[other]: str(hosts[other].address)}
            host = hosts[mine]
            flanneld = StandIn.static(host, tmp_path / host.name, subnets[mine], peers, like=like).wait()
            ends.append(host.add_container(flanneld.gateway, MTU))
            shown = host.run(["ip", "-4", "-o", "addr", "show", "flannel0"]).stdout
            assert f" {subnets[mine][:-3]}/{16 if like == '0.7.1' else 32} " in shown
        one, two = ends
        wait_until_reachable(one, two.address)
        assert_pings(one, two.address)
        assert "ttl=60" in one.run(["ping", "-c1", str(two.address)]).stdout  # two kernels, two loops
        assert_mtu(one, two.address)
        assert_tcp(one, two, two.address, megabytes=1)
        assert flanneld.terminate() == 0
        assert hosts[1].run(["ip", "link", "show", "flannel0"], check=False).returncode != 0
    assert lab.leftovers() == ()


@pytest.mark.needs("root", "netns", "tun", "etcd34")
@pytest.mark.parametrize(
    ("like", "value"),
    [("0.7.1", '{"PublicIP":"%s"}'), ("0.28.9", '{"PublicIP":"%s","PublicIPv6":null}')],
)
def test_it_takes_renews_and_loses_a_lease_as_flanneld_does(tmp_path: Path, like, value) -> None:
    """Sections 3.4 to 3.8 of flannel's facts: own lease, previous subnet, renewal, peers, revocation."""
    old = like == "0.7.1"
    with Lab("steps") as lab:
        one, two = lab.add_host(), lab.add_host()
        with Cluster(
            "3.4",
            folder=tmp_path / "etcd",
            v2=True,
            host=str(lab.network.network_address + 1),
            prefix=lab.underlay.command([]),
        ) as cluster:
            endpoints = cluster.endpoints[0]
            keys = Keys(lab.underlay.path, endpoints, v2=old)
            keys.put(f"{PREFIX}/config", '{"Network":"172.17.0.0/16"}')
            # A lease of 63 s with a margin of a minute is renewed every 3 s.
            short = ("--ttl=63", "-subnet-lease-renew-margin=1")
            first = StandIn.start(one, tmp_path / "one", endpoints, *short, like=like).wait()
            second = StandIn.start(two, tmp_path / "two", endpoints, like=like).wait()
            assert keys.leases() == {
                str(first.subnet): value % one.address,
                str(second.subnet): value % two.address,
            }
            assert first.subnet != second.subnet
            assert first.subnet.subnet_of(IPv4Network("172.17.0.0/17"))  # of the first 100 free ones
            first.wait_log(f"Subnet added: {second.subnet}")
            second.wait_log(f"Subnet added: {first.subnet}")
            first.wait_log("Lease renewed")
            subnet = first.subnet
            first.terminate()
            first = first.again().wait()
            assert first.subnet == subnet
            first.wait_log("for current IP .* reusing")

            keys.delete(f"{PREFIX}/subnets/{str(subnet).replace('/', '-')}")
            first.wait_log("Lease has been revoked")
            second.wait_log(f"Subnet removed: {subnet}")
            if old:
                first.wait_log(r"(?s)revoked.* ready \S+ on ")
            else:
                assert first.process.wait(10) == 0
                first = first.again().wait()
                first.wait_log("Found previously leased subnet")
                assert first.subnet == subnet
    assert lab.leftovers() == ()

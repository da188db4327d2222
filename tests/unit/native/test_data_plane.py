"""The built extension over a socketpair (as the TUN) and loopback UDP sockets (as the underlay). No root.

kernel ──┐ socketpair                      ┌── peer, 127.0.0.2, holds 172.17.7.0/24
         DataPlane, 172.17.41.1/24, 127.0.0.1 ── other, 127.0.0.3, holds 172.17.8.0/24
                                           └── stranger, 127.0.0.9
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl import _native
from flanctl._native import DataPlane
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROUTES = [("172.17.7.0", 24, "127.0.0.2"), ("172.17.8.0", 24, "127.0.0.3")]
REASONS = (
    "no_route short bad_version bad_length unknown_sender spoofed_source "
    "foreign_destination too_big send_error tun_error queue_full"
).split()


def ipv4(source: str, destination: str, payload: bytes = b"payload!", protocol: int = 17) -> bytes:
    """A packet whose header is good enough for the data plane, which never looks at the checksum."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0)
    return head + IPv4Address(source).packed + IPv4Address(destination).packed + payload


@dataclass
class Bench:
    """Both ends of everything a data plane touches."""

    kernel: socket.socket
    tun: socket.socket
    udp: socket.socket
    peers: dict[str, socket.socket]
    port: int
    plane: DataPlane

    def send(self, sender: str, packet: bytes) -> None:
        self.peers[sender].sendto(packet, self.udp.getsockname())

    def drops(self) -> dict[str, int]:
        counted = self.plane.counters().items()
        return {name.removeprefix("drop_"): n for name, n in counted if name.startswith("drop_") and n}


def udp_socket(address: str, port: int = 0) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(5)
    return made


def make(
    kind: int = socket.SOCK_SEQPACKET, *, start: bool = True, options: Mapping[str, object] | None = None
) -> Bench:
    kernel, tun = socket.socketpair(socket.AF_UNIX, kind)
    kernel.settimeout(5)
    peer = udp_socket("127.0.0.2")
    port = peer.getsockname()[1]
    peers = {"127.0.0.2": peer}
    for address in ("127.0.0.3", "127.0.0.9"):
        peers[address] = udp_socket(address, port)
    udp = udp_socket("127.0.0.1", port)
    arguments = {"mtu": 1472, "gateway": "172.17.41.1/24", "port": port, **(options or {})}
    try:
        plane = DataPlane(tun.fileno(), udp.fileno(), **arguments)
    except ValueError:
        for one in (kernel, tun, udp, *peers.values()):
            one.close()
        raise
    bench = Bench(kernel, tun, udp, peers, port, plane)
    plane.replace_routes(ROUTES)
    if start:
        plane.start()
    return bench


def close(bench: Bench) -> None:
    assert bench.plane.stop()
    for one in (bench.kernel, bench.tun, bench.udp, *bench.peers.values()):
        one.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = make()
    yield made
    close(made)


class TestForwarding:
    @pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
    def test_a_packet_from_the_tun_reaches_the_peer_that_holds_its_subnet_unchanged(self, kind: int) -> None:
        bench = make(kind)
        for address, subnet in (("127.0.0.2", "172.17.7"), ("127.0.0.3", "172.17.8")):
            packet = ipv4("172.17.41.5", f"{subnet}.9")
            bench.kernel.send(packet)
            data, sender = bench.peers[address].recvfrom(65535)
            assert data == packet
            assert sender == ("127.0.0.1", bench.port)
        until(lambda: bench.plane.counters()["out_packets"] == 2)
        assert bench.plane.counters()["out_bytes"] == 2 * len(packet)
        close(bench)

    def test_a_packet_from_its_peer_reaches_the_tun_unchanged(self, bench: Bench) -> None:
        packet = ipv4("172.17.7.9", "172.17.41.5")
        bench.send("127.0.0.2", packet)
        assert bench.kernel.recv(65535) == packet
        until(lambda: bench.plane.counters()["in_packets"] == 1)
        assert bench.plane.counters()["in_bytes"] == len(packet)
        assert bench.drops() == {}

    def test_traffic_is_counted_by_peer_and_strangers_are_not_remembered(self, bench: Bench) -> None:
        assert bench.plane.peers() == {}
        packet = ipv4("172.17.7.9", "172.17.41.5")
        for _ in range(3):
            bench.send("127.0.0.2", packet)
            bench.kernel.recv(65535)
        bench.send("127.0.0.2", ipv4("172.17.8.9", "172.17.41.5"))  # another peer's
        bench.send("127.0.0.9", packet)  # nobody's
        bench.kernel.send(ipv4("172.17.41.5", "172.17.8.9"))
        bench.peers["127.0.0.3"].recv(65535)
        until(lambda: sum(bench.drops().values()) == 2 and "127.0.0.3" in bench.plane.peers())
        found = bench.plane.peers()
        assert set(found) == {"127.0.0.2", "127.0.0.3"}
        *counts, heard = found["127.0.0.2"]
        assert counts == [0, 0, 3, 3 * len(packet), 1]
        assert heard is not None and 0 <= heard < 60
        assert found["127.0.0.3"] == (1, len(packet), 0, 0, 0, None)

    def test_a_peer_that_left_the_table_is_forgotten(self, bench: Bench) -> None:
        bench.send("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5"))
        bench.kernel.recv(65535)
        until(lambda: "127.0.0.2" in bench.plane.peers())
        bench.plane.replace_routes([])
        assert bench.plane.peers() == {}

    def test_what_is_not_allowed_is_off_and_says_so(self) -> None:
        for allowed, on in (("all", {"gso", "gro"}), ("gso", {"gso"}), ("none", set())):
            bench = make(options={"offloads": allowed})
            levels = bench.plane.offloads()
            assert {name for name, (used, _) in levels.items() if used} == on  # a socketpair has no headers
            assert all(bool(why) != used for used, why in levels.values())
            close(bench)

    def test_any_source_port_is_accepted(self, bench: Bench) -> None:
        with udp_socket("127.0.0.2") as elsewhere:
            elsewhere.sendto(ipv4("172.17.7.9", "172.17.41.5"), bench.udp.getsockname())
        assert bench.kernel.recv(65535)

    def test_a_thousand_packets_each_way_arrive_in_order(self, bench: Bench) -> None:
        out = [ipv4("172.17.41.5", "172.17.7.9", b"%d" % n) for n in range(1000)]
        back = [ipv4("172.17.7.9", "172.17.41.5", b"%d" % n) for n in range(1000)]
        for start in range(0, 1000, 50):  # in pieces that fit the socket buffers of a small machine
            for packet, answer in zip(out[start : start + 50], back[start : start + 50], strict=True):
                bench.kernel.send(packet)
                bench.send("127.0.0.2", answer)
            for packet, answer in zip(out[start : start + 50], back[start : start + 50], strict=True):
                assert bench.peers["127.0.0.2"].recv(65535) == packet
                assert bench.kernel.recv(65535) == answer
        assert bench.drops() == {}

    def test_the_sender_is_told_when_nobody_has_the_destination(self, bench: Bench) -> None:
        lost = ipv4("172.17.41.5", "172.17.99.1")
        bench.kernel.send(lost)
        answer = bench.kernel.recv(65535)
        assert answer[12:20] == IPv4Address("172.17.99.0").packed + IPv4Address("172.17.41.5").packed
        assert answer[20:22] == bytes([3, 0]), "net unreachable"
        assert answer[28:] == lost
        until(lambda: bench.plane.counters()["icmp_sent"] == 1)
        assert bench.drops() == {"no_route": 1}

    def test_answers_are_limited_to_a_hundred_at_once(self, bench: Bench) -> None:
        began = time.monotonic()
        for _ in range(400):
            bench.kernel.send(ipv4("172.17.41.5", "172.17.99.1"))
        until(lambda: bench.drops().get("no_route") == 400)
        allowed = 100 + 100 * (time.monotonic() - began) + 1
        assert 100 <= bench.plane.counters()["icmp_sent"] <= allowed


class TestRefusals:
    @pytest.mark.parametrize(
        ("sender", "packet", "reason"),
        [
            ("127.0.0.9", ipv4("172.17.7.9", "172.17.41.5"), "unknown_sender"),
            ("127.0.0.3", ipv4("172.17.7.9", "172.17.41.5"), "spoofed_source"),
            ("127.0.0.2", ipv4("172.17.41.9", "172.17.41.5"), "spoofed_source"),
            ("127.0.0.2", ipv4("172.17.7.9", "172.17.8.5"), "foreign_destination"),
            ("127.0.0.2", ipv4("172.17.7.9", "224.0.0.1"), "foreign_destination"),
            ("127.0.0.2", ipv4("172.17.7.9", "255.255.255.255"), "foreign_destination"),
            ("127.0.0.2", b"", "short"),
            ("127.0.0.2", b"E" * 19, "short"),
            ("127.0.0.2", b"\x60" + bytes(47), "bad_version"),
            ("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5") + b"x", "bad_length"),
            ("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5")[:-1], "bad_length"),
            ("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5", bytes(1453)), "too_big"),
            ("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5", bytes(9000)), "too_big"),
        ],
    )
    def test_a_datagram_that_must_not_arrive_is_counted_by_its_reason(
        self, bench: Bench, sender: str, packet: bytes, reason: str
    ) -> None:
        bench.send(sender, packet)
        until(lambda: bench.drops() == {reason: 1}, what=f"{reason}: {bench.drops()}")
        good = ipv4("172.17.7.9", "172.17.41.5", b"good")
        bench.send("127.0.0.2", good)
        assert bench.kernel.recv(65535) == good, "nothing else was written to the TUN before"

    @pytest.mark.parametrize(
        ("packet", "reason"),
        [
            (ipv4("172.17.41.5", "224.0.0.251"), "no_route"),
            (ipv4("172.17.41.5", "172.17.99.1", b"\x03\x00......", protocol=1), "no_route"),
            (b"E" * 19, "short"),
            (b"\x60" + bytes(47), "bad_version"),
            (ipv4("172.17.41.5", "172.17.7.9")[:-1], "bad_length"),
            (ipv4("172.17.41.5", "172.17.7.9", bytes(1453)), "too_big"),
        ],
    )
    def test_a_packet_from_the_tun_that_cannot_go_is_counted_by_its_reason(
        self, bench: Bench, packet: bytes, reason: str
    ) -> None:
        bench.kernel.send(packet)
        until(lambda: bench.drops() == {reason: 1}, what=f"{reason}: {bench.drops()}")
        assert bench.plane.counters()["icmp_sent"] == 0

    def test_every_reason_is_there_from_the_start(self, bench: Bench) -> None:
        names = "out_packets out_bytes in_packets in_bytes icmp_sent".split()
        wanted = dict.fromkeys([*names, *(f"drop_{reason}" for reason in REASONS)], 0)
        assert bench.plane.counters() == wanted

    def test_one_peer_that_cannot_be_reached_does_not_hold_up_another(self, bench: Bench) -> None:
        # From a socket bound to loopback, the documentation network is unreachable: EINVAL or ENETUNREACH.
        bench.plane.replace_routes([*ROUTES, ("172.17.9.0", 24, "192.0.2.1")])
        packet = ipv4("172.17.41.5", "172.17.7.9")
        for _ in range(10):
            bench.kernel.send(ipv4("172.17.41.5", "172.17.9.9"))
            bench.kernel.send(packet)
        for _ in range(10):
            assert bench.peers["127.0.0.2"].recv(65535) == packet
        until(lambda: bench.drops() == {"send_error": 10})
        assert bench.plane.failure() is None

    def test_a_tun_that_takes_nothing_costs_packets_and_nothing_else(self) -> None:
        bench = make(socket.SOCK_DGRAM)
        sent = 0
        while not bench.drops().get("queue_full"):
            bench.send("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5", bytes(1000)))
            sent += 1
            assert sent < 20_000
        assert bench.plane.failure() is None
        close(bench)

    @pytest.mark.parametrize(
        ("check", "arriving"),
        [("strict", ["good"]), ("subnet", ["good", "nat"]), ("off", ["good", "nat", "foreign"])],
    )
    def test_the_peer_check_decides_who_is_believed(self, check: str, arriving: list[str]) -> None:
        bench = make(options={"peer_check": check})
        bench.send("127.0.0.9", ipv4("10.9.9.9", "172.17.41.5", b"foreign"))
        bench.send("127.0.0.9", ipv4("172.17.7.9", "172.17.41.5", b"nat"))
        bench.send("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5", b"good"))
        got = {bench.kernel.recv(65535)[20:].decode() for _ in arriving}
        assert got == set(arriving)
        until(lambda: sum(bench.drops().values()) == 3 - len(arriving))
        close(bench)


class TestRoutes:
    def test_the_same_table_in_another_order_changes_nothing(self, bench: Bench) -> None:
        assert bench.plane.replace_routes(ROUTES[::-1]) is False
        assert bench.plane.replace_routes(ROUTES[:1]) is True
        assert bench.plane.replace_routes(ROUTES[:1]) is False
        assert bench.plane.replace_routes([]) is True

    @pytest.mark.parametrize(
        ("bad", "text"),
        [
            (("172.17.9.9", 24, "127.0.0.3"), "172.17.9.9/24: host bits are set"),
            (("172.17.9.0", 33, "127.0.0.3"), "prefix length"),
            (("172.17.9.0", -1, "127.0.0.3"), "prefix length"),
            (("172.17.9.0", 300, "127.0.0.3"), "prefix length"),
            (("172.17.9", 24, "127.0.0.3"), "'172.17.9' is not an IPv4 address|\"172.17.9\" is not"),
            (("172.17.9.0", 24, "::1"), "is not an IPv4 address"),
            (("172.17.9.0", 24, "0.0.0.0"), "not a host's"),
            (("172.17.7.0", 24, "127.0.0.3"), "listed twice"),
        ],
    )
    def test_a_bad_route_is_named_and_leaves_the_table_as_it_was(
        self, bench: Bench, bad: tuple[str, int, str], text: str
    ) -> None:
        with pytest.raises(ValueError, match=text):
            bench.plane.replace_routes([("172.17.7.0", 24, "127.0.0.3"), bad])
        packet = ipv4("172.17.41.5", "172.17.7.9")
        bench.kernel.send(packet)
        assert bench.peers["127.0.0.2"].recv(65535) == packet

    def test_traffic_never_misses_a_route_that_is_in_every_table(self, bench: Bench) -> None:
        """Ten thousand other routes come and go meanwhile; no drop counter moves."""
        many = [(f"10.{n // 256}.{n % 256}.0", 24, "127.0.0.3") for n in range(10_000)]
        done = threading.Event()
        replaced = 0

        def replace() -> None:
            nonlocal replaced
            while not done.is_set():
                bench.plane.replace_routes([*ROUTES, *many])
                bench.plane.replace_routes(ROUTES)
                replaced += 2

        worker = threading.Thread(target=replace)
        worker.start()
        try:
            sent = 0
            while sent < 200 or replaced < 10:
                bench.kernel.send(ipv4("172.17.41.5", "172.17.7.9"))
                bench.peers["127.0.0.2"].recv(65535)
                sent += 1
        finally:
            done.set()
            worker.join()
        assert bench.drops() == {}


class TestLife:
    def test_a_tun_that_goes_away_is_a_failure(self) -> None:
        bench = make()
        assert bench.plane.failure() is None
        assert not bench.plane.wait(0)
        bench.kernel.close()
        assert bench.plane.wait(5)
        assert "TUN" in str(bench.plane.failure())
        assert bench.plane.stop()
        close(bench)

    def test_stopping_is_no_failure_and_may_be_repeated(self, bench: Bench) -> None:
        assert bench.plane.stop()
        assert bench.plane.stop(0)
        assert bench.plane.wait(0)
        assert bench.plane.failure() is None

    def test_stop_ends_a_worker_that_is_busy(self, bench: Bench) -> None:
        done = threading.Event()

        def flood() -> None:
            while not done.is_set():
                bench.send("127.0.0.2", ipv4("172.17.7.9", "172.17.41.5"))

        worker = threading.Thread(target=flood)
        worker.start()
        try:
            until(lambda: bench.plane.counters()["in_packets"] > 100)
            assert bench.plane.stop(5)
        finally:
            done.set()
            worker.join()

    def test_starting_twice_or_after_stop_is_refused(self) -> None:
        bench = make()
        with pytest.raises(RuntimeError, match="started before"):
            bench.plane.start()
        bench.plane.stop()
        with pytest.raises(RuntimeError, match="ended"):
            bench.plane.start()
        close(bench)

    def test_stop_before_start_is_fine_and_final(self) -> None:
        bench = make(start=False)
        assert not bench.plane.wait(0)
        assert bench.plane.stop()
        with pytest.raises(RuntimeError, match="ended"):
            bench.plane.start()
        close(bench)

    def test_wait_releases_the_gil_and_wakes_when_the_worker_ends(self, bench: Bench) -> None:
        answers: list[bool] = []
        waiter = threading.Thread(target=lambda: answers.append(bench.plane.wait(30)))
        waiter.start()
        assert bench.plane.stop()
        waiter.join(5)
        assert answers == [True]

    def test_the_worker_takes_no_signals(self, bench: Bench) -> None:
        def workers() -> list[str]:
            statuses = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
            return [status for status in statuses if "flanctl-data" in status]

        for status in until(workers):
            line = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
            assert int(line.split()[1], 16) & (1 << (signal.SIGTERM - 1))

    def test_the_callers_descriptors_stay_open_and_ours_are_closed(self) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(20):
            bench = make()
            assert bench.plane.stop()
            del bench.plane
            os.fstat(bench.tun.fileno())
            os.fstat(bench.udp.fileno())
            for one in (bench.kernel, bench.tun, bench.udp, *bench.peers.values()):
                one.close()
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_a_data_plane_that_is_dropped_ends_its_worker(self) -> None:
        bench = make()
        del bench.plane

        def workers() -> list[str]:
            names = []
            for task in Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError):  # a thread that ended meanwhile
                    names.append((task / "comm").read_text())
            return [name for name in names if "flanctl-data" in name]

        until(lambda: not workers())
        for one in (bench.kernel, bench.tun, bench.udp, *bench.peers.values()):
            one.close()


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"mtu": 0},
            {"mtu": 67},
            {"mtu": 65_508},
            {"mtu": -1},
            {"port": 0},
            {"port": 65_536},
            {"port": -1},
            {"gateway": "172.17.41.1"},
            {"gateway": "172.17.41.1/33"},
            {"gateway": "fe80::1/64"},
            {"gateway": ""},
            {"peer_check": "loose"},
        ],
    )
    def test_nonsense_is_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r".+"):
            make(options=options)

    def test_descriptors_are_looked_at(self) -> None:
        tun, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stream, stream_other = socket.socketpair()
        udp, unbound, tcp = udp_socket("127.0.0.1"), socket.socket(type=socket.SOCK_DGRAM), socket.socket()
        udp6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        null = Path(os.devnull).open("rb")
        good = {"mtu": 1472, "gateway": "172.17.41.1/24", "port": 8285}
        for tun_fd, udp_fd in [
            (stream.fileno(), udp.fileno()),
            (null.fileno(), udp.fileno()),
            (udp.fileno(), udp.fileno()),
            (tun.fileno(), unbound.fileno()),
            (tun.fileno(), tcp.fileno()),
            (tun.fileno(), udp6.fileno()),
            (tun.fileno(), tun.fileno()),
            (tun.fileno(), null.fileno()),
        ]:
            with pytest.raises(OSError, match="_fd") as caught:
                DataPlane(tun_fd, udp_fd, **good)  # type: ignore[arg-type]
            assert caught.value.errno
        with pytest.raises(OSError, match="duplicated") as caught:
            DataPlane(1 << 20, udp.fileno(), **good)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="negative"):
            DataPlane(-1, udp.fileno(), **good)  # type: ignore[arg-type]
        for one in (tun, other, stream, stream_other, udp, unbound, tcp, udp6, null):
            one.close()

    @pytest.mark.parametrize("timeout", [-1.0, float("nan")])
    def test_a_timeout_is_a_time(self, bench: Bench, timeout: float) -> None:
        with pytest.raises(ValueError, match="timeout"):
            bench.plane.wait(timeout)


def test_the_stub_says_what_the_module_is() -> None:
    """mypy's stubtest: every name, parameter and default of _native.pyi is the built module's."""
    command = [sys.executable, "-m", "mypy.stubtest", "flanctl._native"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_version_is_the_packages() -> None:
    assert _native.version.count(".") == 2

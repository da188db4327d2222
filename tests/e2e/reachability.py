"""What "two containers reach each other" means: the same sentences for docker's containers and for the lab's.

An end is a network namespace with an address: a container, or a host by one of its addresses.
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
import subprocess
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from ipaddress import IPv4Address
    from pathlib import Path

    from flanctl.demo.hosts import Namespace

MTU = 1472
"""On an underlay of 1500: 20 bytes of IP and 8 of UDP go to the tunnel."""
_IP_ICMP = 28
"""Bytes of an echo request that `ping -s` does not count."""
_IO_SECONDS = 10.0


class End(Protocol):
    """Where packets come from or go to."""

    @property
    def path(self) -> Path: ...


def ping(where: Namespace, to: IPv4Address, *options: str) -> subprocess.CompletedProcess[str]:
    """iputils' ping, once unless `options` say else; not checked."""
    return where.run(["ping", "-n", "-c", "1", "-W", "2", *options, str(to)], check=False)


def wait_until_reachable(where: Namespace, to: IPv4Address) -> None:
    """Until the first answer: a peer's routes follow its lease by a watch, a moment after its READY."""
    until(lambda: ping(where, to, "-W", "1").returncode == 0, seconds=15, what=f"{where.name} reaches {to}")


def assert_pings(where: Namespace, to: IPv4Address) -> None:
    """Every one of five is answered.

    Not by `ping -c 5`: it gives the last ones twice the longest round trip so far (whatever -W says), and a busy machine
    takes longer than that.
    """
    pings = RunningPing(where, to)
    pings.wait_answers(5)
    assert pings.lost() == 0, f"{where.name} → {to}"


def assert_mtu(where: Namespace, to: IPv4Address, mtu: int = MTU) -> None:
    """A packet of exactly `mtu` bytes that must not be fragmented passes, one byte more does not."""
    whole = ping(where, to, "-M", "do", "-s", str(mtu - _IP_ICMP))
    assert whole.returncode == 0, f"{where.name} → {to}, {mtu} bytes:\n{whole.stdout}{whole.stderr}"
    larger = ping(where, to, "-M", "do", "-s", str(mtu + 1 - _IP_ICMP))
    said = larger.stdout + larger.stderr
    assert larger.returncode != 0, f"{where.name} → {to}, {mtu + 1} bytes unfragmented:\n{said}"
    assert re.search(rf"mtu ?= ?{mtu}\b", said), f"nobody told the sender the MTU:\n{said}"


def assert_udp(
    client: End, server: End, to: IPv4Address, *, sizes: tuple[int, ...] = (512, 1400, 4000)
) -> None:
    """A question of each size, as large an answer: DNS's classic limit, EDNS's, and one that needs fragments."""
    with inside(server.path):
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(client.path):
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with there, here:
        there.bind((str(to), 5353))
        for end in (there, here):
            end.settimeout(_IO_SECONDS)
        for size in sizes:
            question = random.Random(size).randbytes(size)
            here.sendto(question, (str(to), 5353))
            got, sender = there.recvfrom(65_535)
            assert got == question, f"a question of {size} bytes arrived otherwise"
            there.sendto(question[::-1], sender)
            assert here.recv(65_535) == question[::-1], f"an answer of {size} bytes arrived otherwise"


def assert_tcp(client: End, server: End, to: IPv4Address, *, megabytes: int = 8) -> None:
    """A stream from client to server and back through it arrives whole, by hash, both ways at once."""
    with inside(server.path):
        listener = socket.create_server((str(to), 5001))
    with inside(client.path):
        here = socket.socket()
    sent = random.Random(megabytes).randbytes(megabytes << 20)
    with listener, here:
        listener.settimeout(_IO_SECONDS)
        here.settimeout(_IO_SECONDS)
        here.connect((str(to), 5001))
        there, _ = listener.accept()
        with there:
            there.settimeout(_IO_SECONDS)
            back = sent[::-1]
            writers = [
                threading.Thread(target=_send_all, args=(here, sent)),
                threading.Thread(target=_send_all, args=(there, back)),
            ]
            digests: dict[str, str] = {}
            readers = [
                threading.Thread(target=_read_all, args=(there, digests, "there")),
                threading.Thread(target=_read_all, args=(here, digests, "back")),
            ]
            for thread in (*writers, *readers):
                thread.start()
            for thread in (*writers, *readers):
                thread.join(60)
    assert digests == {"there": hashlib.sha256(sent).hexdigest(), "back": hashlib.sha256(back).hexdigest()}


def _send_all(to: socket.socket, data: bytes) -> None:
    try:
        to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the hash says it


def _read_all(source: socket.socket, digests: dict[str, str], name: str) -> None:
    digest = hashlib.sha256()
    try:
        while data := source.recv(1 << 18):
            digest.update(data)
    except OSError:
        pass
    digests[name] = digest.hexdigest()


class RunningPing:
    """A ping that goes on while something happens; `lost` ends it."""

    def __init__(self, where: Namespace, to: IPv4Address, *, interval: float = 0.05) -> None:
        self._process: subprocess.Popen[str] = where.popen(
            ["ping", "-n", "-i", str(interval), "-W", "5", str(to)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.answered = 0
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            self.answered += "bytes from" in line

    def wait_answers(self, more: int = 1, *, seconds: float = 15.0) -> None:
        """Until so many more have come: what happened since is behind us."""
        aim = self.answered + more
        until(
            lambda: self.answered >= aim, seconds=seconds, what=f"{more} more answers\n{''.join(self._said)}"
        )

    def lost(self) -> int:
        """End it as Ctrl-C would. How many went unanswered, by sequence number; one in flight does not count."""
        came = self._end()
        return max(came) - len(set(came)) if came else -1

    def longest_gap(self) -> int:
        """End it. How many in a row went unanswered, at most."""
        came = sorted(set(self._end()))
        return max((after - before - 1 for before, after in pairwise([0, *came])), default=-1)

    def _end(self) -> list[int]:
        """The sequence numbers that were answered."""
        self._process.send_signal(2)
        self._process.wait(15)
        self._reader.join(15)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return [int(found[1]) for line in self._said if (found := re.search(r"icmp_seq=(\d+) ttl", line))]

"""The user-space path at each of its levels, forced by --offloads and --data-path, and through restarts.

h1 ─ 192.168.66.11 ─┐      h1's level changes, h2's is the best this kernel has
h2 ─ 192.168.66.12 ─┴─ under0
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.netns.test_agent_packets import MTU, Member, arrives, configured, join, known
from tests.support.agents import FLANCTL, environment
from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables")
ALL = {"tso", "uso", "gso", "gro"}
LEVELS = {
    "all": ((), ALL),
    "as before Linux 6.2": (("--offloads", "tso,gso,gro"), ALL - {"uso"}),
    "as before Linux 5.0": (("--offloads", "tso,gso"), {"tso", "gso"}),
    "as before Linux 4.18": (("--offloads", "tso"), {"tso"}),
    "nothing to the TUN": (("--offloads", "gso,gro"), {"gso", "gro"}),
    "none": (("--offloads", "none"), set()),
    "plain": (("--data-path", "tun-plain"), set()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configured(tmp_path_factory.mktemp("levels"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Member, Member]]:
    with Lab("levels") as lab:
        one, two = join(lab, folder), join(lab, folder)
        known(one, 1)
        known(two, 1)
        yield one, two
    assert lab.leftovers() == ()


def restarted(member: Member, *options: str) -> None:
    """The same host's agent, with other options from now on."""
    if member.agent.process.poll() is None:
        member.agent.terminate()
    member.agent = type(member.agent).start(
        member.host,
        member.agent.folder,
        member.agent.endpoints,
        "--iface",
        "eth0",
        *options,
    )
    member.agent.wait_ready()
    known(member, 1)


def status(member: Member) -> dict:
    env = environment() | {
        "FLANCTL_RUN_DIR": str(member.agent.folder / "run"),
        "FLANCTL_STATE_DIR": str(member.agent.folder / "state"),
    }
    words = ["status", "-w", "json", "--subnet-file", str(member.agent.subnet_file)]
    return json.loads(member.host.run([*FLANCTL, *words], env=env, check=False).stdout)


@pytest.fixture
def ended(pair: tuple[Member, Member]) -> Iterator[None]:
    """Agents that a test started end with it."""
    yield
    for member in pair:
        member.agent.terminate()


class Stream:
    """TCP from one container to another: what is sent comes from a seed, what arrives is compared."""

    def __init__(self, source: Member, target: Member) -> None:
        with inside(target.container.path):
            listener = socket.create_server((str(target.container.address), 0))
        listener.settimeout(20)
        with closing(listener):
            with inside(source.container.path):
                self.sender = socket.create_connection(listener.getsockname(), timeout=20)
            self.receiver, _ = listener.accept()
        self.receiver.settimeout(20)
        self.sent, self.got = hashlib.sha256(), hashlib.sha256()
        self.arrived: list[float] = []
        """When anything arrived."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        block = random.randbytes(1 << 16)
        with self.sender:
            while not self._stop.is_set():
                self.sender.sendall(block)
                self.sent.update(block)

    def _receive(self) -> None:
        with self.receiver:
            while data := self.receiver.recv(1 << 20):
                self.arrived.append(time.monotonic())
                self.got.update(data)

    def end(self) -> None:
        """Both ends closed; every byte sent has arrived."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.arrived
        assert self.got.digest() == self.sent.digest()

    def gap(self) -> float:
        """The longest time, in seconds, in which nothing arrived."""
        return max(later - earlier for earlier, later in zip(self.arrived, self.arrived[1:], strict=False))


def flow(source: Member, target: Member, count: int = 30) -> None:
    stream = Stream(source, target)
    until(lambda: len(stream.arrived) > count, seconds=20)
    stream.end()


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_carries_the_same_packets_and_status_names_it(
    pair: tuple[Member, Member], level: str
) -> None:
    one, two = pair
    options, on = LEVELS[level]
    restarted(two)
    restarted(one, *options)
    until(lambda: arrives(one.container, two.container.address), seconds=10)
    flow(one, two)
    flow(two, one)
    assert arrives(one.container, two.container.address, "-M", "do", "-s", str(MTU - 28))
    assert arrives(two.container, one.container.address, "-s", "4000")
    shown = status(one)
    offloads = shown["offloads"]
    assert {name for name, found in offloads.items() if found["on"]} == on
    assert all(found["why"] for found in offloads.values() if not found["on"])
    traffic = {peer["public_ip"]: peer for peer in shown["peers"]["traffic"]}[str(two.host.address)]
    assert traffic["out_bytes"] > 1 << 20
    assert traffic["in_bytes"] > 1 << 20
    assert traffic["heard_seconds_ago"] < 60


@pytest.mark.usefixtures("ended")
def test_a_stream_outlives_restarts_of_the_agent_and_every_byte_arrives(pair: tuple[Member, Member]) -> None:
    one, two = pair
    restarted(two)
    restarted(one)
    stream = Stream(one, two)
    until(lambda: len(stream.arrived) > 30, seconds=20)
    for member in (one, two):
        before = len(stream.arrived)
        restarted(member)
        until(lambda before=before: len(stream.arrived) > before + 30, seconds=30)
    stream.end()


def test_an_unknown_offload_is_a_usage_error_that_names_them(pair: tuple[Member, Member]) -> None:
    answer = pair[0].host.run([*FLANCTL, "agent", "--offloads", "tso,lro"], env=environment(), check=False)
    assert answer.returncode == 2
    assert '"tso,lro"' in answer.stderr
    assert "tso, uso, gso, gro" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1

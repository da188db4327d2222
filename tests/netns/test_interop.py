"""flanneld and flanctl are one network, and a host changes from one to the other while it carries traffic.

The flanneld is the stand-in (tests/support/flanneld_stand_in), the registry a real etcd, flanctl the file `flanneld`
that an operator links: same flags, same keys, same values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import (
    MTU,
    RunningPing,
    assert_mtu,
    assert_pings,
    assert_tcp,
    assert_udp,
    wait_until_reachable,
)
from tests.support.agents import RunningAgent
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.etcd_keys import Keys
from tests.support.flanneld_stand_in import PREFIX, StandIn
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.demo.hosts import Container, Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34")
SUBNETS = f"{PREFIX}/subnets/"
PING_SECONDS = 0.02
GAP_SECONDS = 1.0
"""What a swap may cost. Other load on the machine adds to it, so the best of some swaps must keep it."""
ROUNDS = 5


class Network:
    """One etcd, and hosts that run this or that, each with a container."""

    def __init__(self, folder: Path, stack: ExitStack, like: Any) -> None:
        self.folder = folder
        self.like = like
        self.v2 = like == "0.7.1"
        self.lab = stack.enter_context(Lab("interop"))
        cluster = Cluster(
            "3.4",
            folder=folder / "etcd",
            v2=True,
            host=str(self.lab.network.network_address + 1),
            prefix=self.lab.underlay.command([]),
        )
        self.endpoints = stack.enter_context(cluster).endpoints[0]
        self.keys = Keys(self.lab.underlay.path, self.endpoints, v2=self.v2)
        self.keys.put(f"{PREFIX}/config", '{"Network":"172.17.0.0/16"}')

    def flanneld(self, host: Host, *options: str) -> StandIn:
        folder = self.folder / host.name
        return StandIn.start(host, folder, self.endpoints, *options, like=self.like).wait()

    def flanctl(self, host: Host, *more: str, prefix: str = PREFIX) -> RunningAgent:
        """By flannel's name and flags, with the same subnet.env."""
        flags = (f"-etcd-endpoints={self.endpoints}", f"-etcd-prefix={prefix}", "-iface=eth0", *more)
        return RunningAgent.start(host, self.folder / host.name, "", *flags, name="flanneld").wait()

    def container(self, daemon: StandIn | RunningAgent) -> Container:
        return daemon.host.add_container(daemon.gateway, MTU)

    def value(self, host: Host) -> str:
        """The bytes that every flannel of this dialect writes for a host of the udp backend."""
        more = "" if self.v2 else ',"PublicIPv6":null'
        return f'{{"PublicIP":"{host.address}"{more}}}'


@pytest.fixture(params=["0.7.1", "0.28.9"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    with ExitStack() as stack:
        yield (made := Network(tmp_path, stack, request.param))
    assert made.lab.leftovers() == ()


class Stream:
    """A TCP connection between two containers with bytes under way in both directions until `finish`."""

    def __init__(self, client: Container, server: Container) -> None:
        with inside(server.path):
            listener = socket.create_server((str(server.address), 5001))
        with listener:
            listener.settimeout(10)
            with inside(client.path):
                here = socket.create_connection((str(server.address), 5001), timeout=10)
            there, _ = listener.accept()
        self._ends = here, there
        self._over = threading.Event()
        self._sent: dict[int, Any] = {}
        self._got: dict[int, Any] = {}
        self._errors: list[OSError] = []
        self._threads = [
            threading.Thread(target=work, args=(end,))
            for end in self._ends
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, end: socket.socket) -> None:
        digest, source = hashlib.sha256(), random.Random(end.fileno())
        end.settimeout(60)
        try:
            while not self._over.wait(0.005):
                end.sendall(data := source.randbytes(4096))
                digest.update(data)
            end.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._errors.append(error)
        self._sent[end.fileno()] = digest.hexdigest()

    def _receive(self, end: socket.socket) -> None:
        digest = hashlib.sha256()
        try:
            while data := end.recv(1 << 16):
                digest.update(data)
        except OSError as error:
            self._errors.append(error)
        self._got[end.fileno()] = digest.hexdigest()

    def finish(self) -> None:
        """End it. Fails if it was reset, or if one byte is missing or another."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        here, there = (end.fileno() for end in self._ends)
        for end in self._ends:
            end.close()
        assert self._errors == []
        assert (self._got[here], self._got[there]) == (self._sent[there], self._sent[here])


class Gap:
    """Both directions of ping while a host is swapped; `seconds` ends it and tells the longest silence of either."""

    def __init__(self, one: Container, two: Container) -> None:
        self._pings = [
            RunningPing(one, two.address, interval=PING_SECONDS),
            RunningPing(two, one.address, interval=PING_SECONDS),
        ]
        for ping in self._pings:
            ping.wait_answers(5)

    def seconds(self) -> float:
        for ping in self._pings:
            ping.wait_answers(10, seconds=30)
        return max(ping.longest_gap() for ping in self._pings) * PING_SECONDS


def test_a_host_changes_its_daemon_each_way_under_traffic(network: Network) -> None:
    one, two = network.lab.add_host(), network.lab.add_host()
    daemon: StandIn | RunningAgent = network.flanneld(one)
    other = network.flanneld(two)
    here, there = network.container(daemon), network.container(other)
    wait_until_reachable(here, there.address)
    subnet, bytes_before = daemon.subnet, network.keys.leases()
    assert bytes_before == {
        str(subnet): network.value(one),
        str(other.subnet): network.value(two),
    }
    env = daemon.subnet_file.read_bytes()
    stream = Stream(here, there)
    gaps: dict[str, list[float]] = {"to flanctl": [], "to flanneld": []}

    def swap(way: str) -> None:
        nonlocal daemon
        gap = Gap(here, there)
        daemon.terminate()
        if way == "to flanneld":
            one.run(["ip", "link", "delete", "flannel0"])  # it makes its own, and would call it flannel1
        daemon = (network.flanctl if way == "to flanctl" else network.flanneld)(one)
        gaps[way].append(gap.seconds())
        assert (daemon.subnet, daemon.subnet_file.read_bytes()) == (subnet, env)
        assert network.keys.leases() == bytes_before
        assert_mtu(here, there.address)

    for _ in range(ROUNDS):
        for way in gaps:
            swap(way)
        if all(min(found) <= GAP_SECONDS for found in gaps.values()):
            break
    stream.finish()
    print(gaps)
    assert all(min(found) <= GAP_SECONDS for found in gaps.values()), gaps


def test_in_a_mixed_network_every_pair_talks(network: Network) -> None:
    """Two of each kind: small and large packets, fragments, streams, and each kind hears of who comes and goes."""
    hosts = [network.lab.add_host() for _ in range(4)]
    daemons = [
        (network.flanneld if number % 2 else network.flanctl)(host) for number, host in enumerate(hosts)
    ]
    ends = [network.container(daemon) for daemon in daemons]
    assert network.keys.leases() == {str(daemon.subnet): network.value(daemon.host) for daemon in daemons}
    for one, two in itertools.permutations(ends, 2):
        wait_until_reachable(one, two.address)
    streams = [Stream(one, two) for one, two in itertools.pairwise(ends)]
    for one, two in itertools.combinations(ends, 2):
        assert_pings(one, two.address)
        assert_pings(two, one.address)
        assert_mtu(one, two.address)
        assert_udp(one, two, two.address)
        assert_tcp(one, two, two.address, megabytes=1)
        assert_pings(one.host, two.address)  # from the host's own address in the network, its flannel0's
        assert_pings(two.host, one.address)
    for stream in streams:
        stream.finish()
    # A host that comes later.
    late = network.flanneld(network.lab.add_host())
    newcomer = network.container(late)
    for end in ends:
        wait_until_reachable(end, newcomer.address)
        wait_until_reachable(newcomer, end.address)


def test_fields_of_others_stay_in_a_lease_and_flanneld_reads_what_we_write(network: Network) -> None:
    """A key another program wrote, with fields no flannel knows, in an order of its own."""
    one, two = network.lab.add_host(), network.lab.add_host()
    name = "172.17.99.0-24"
    more = '"Rack":{"row":7,"b":[1,2.50]},"Z":"\\u003cx\\u003e"'
    network.keys.put(SUBNETS + name, network.value(one)[:-1] + f",{more}}}", ttl=600)
    ours = network.flanctl(one)
    wanted = network.value(one)[:-1] + f",{more}}}"
    assert str(ours.subnet) == "172.17.99.0/24"
    assert network.keys.get(SUBNETS + name) == wanted
    assert (network.keys.ttl(SUBNETS + name) or 0) > 86_000
    flanneld = network.flanneld(two)
    flanneld.wait_log("Subnet added: 172.17.99.0/24")
    wait_until_reachable(network.container(flanneld), network.container(ours).address)
    network.keys.delete(SUBNETS + name)
    until(lambda: network.keys.get(SUBNETS + name), what="our lease again")
    assert network.keys.get(SUBNETS + name) == wanted
    ours.terminate()
    ours = ours.again().wait()
    assert network.keys.get(SUBNETS + name) == wanted
    assert json.loads(wanted)["Rack"] == {"row": 7, "b": [1, 2.5]}
    # flanneld itself knows only its own fields: what it reuses, it writes anew.
    ours.terminate()
    one.run(["ip", "link", "delete", "flannel0"])
    assert str(network.flanneld(one).subnet) == "172.17.99.0/24"
    assert network.keys.get(SUBNETS + name) == network.value(one)


def test_a_reservation_stays_one_through_flanctl(network: Network) -> None:
    """0.7.1 keeps a key without TTL so; 0.28.9 gives it a day by mistake. flanctl keeps it, in both dialects."""
    host = network.lab.add_host()
    key = f"{SUBNETS}172.17.60.0-24"
    network.keys.put(key, network.value(host))
    daemon: StandIn | RunningAgent = network.flanctl(host)
    assert str(daemon.subnet) == "172.17.60.0/24"
    assert network.keys.ttl(key) is None
    daemon.terminate()
    host.run(["ip", "link", "delete", "flannel0"])
    daemon = network.flanneld(host)
    assert str(daemon.subnet) == "172.17.60.0/24"
    assert (network.keys.ttl(key) is None) == network.v2
    assert network.keys.get(key) == network.value(host)


@pytest.mark.parametrize("prefix", ["jxdd/other", "//jxdd///other/"])
def test_a_prefix_names_the_same_keys_to_both(network: Network, prefix: str) -> None:
    """flannel joins with Go's path.Join. To etcd v3 `jxdd/other` and `/jxdd/other` are two prefixes, to v2 they are one."""
    host = network.lab.add_host()
    root = "jxdd/other" if prefix == "jxdd/other" and not network.v2 else "/jxdd/other"
    network.keys.put(f"{root}/config", '{"Network":"172.18.0.0/16"}')
    flanneld = network.flanneld(host, f"-etcd-prefix={prefix}")
    subnet = flanneld.subnet
    flanneld.terminate()
    keys = network.keys.all(f"{root}/")
    ours = network.flanctl(host, prefix=prefix)
    assert ours.subnet == subnet
    now = {key: text for key, text in network.keys.all(f"{root}/").items() if "/flanctl/" not in key}
    assert now == keys
    assert keys.keys() == {f"{root}/config", f"{root}/subnets/{str(subnet).replace('/', '-')}"}


def test_a_second_agent_on_a_host_ends_and_the_first_carries_on(network: Network) -> None:
    """Somebody starts the one and forgot to stop the other: one line, nothing half-changed, no packet lost."""
    one, two = network.lab.add_host(), network.lab.add_host()
    for first, second in ((network.flanneld, network.flanctl), (network.flanctl, network.flanneld)):
        daemon, other = first(one), network.flanneld(two)
        if not one.containers:
            here, there = network.container(daemon), network.container(other)
        wait_until_reachable(here, there.address)
        machine = [one.run(["ip", "-4", "-o", *words]).stdout for words in (["addr"], ["route"])]
        leases = network.keys.leases()
        ping = RunningPing(here, there.address, interval=PING_SECONDS)
        ping.wait_answers(5)
        folder = network.folder
        network.folder = folder / "second"
        with pytest.raises(AssertionError, match=r"ended with [1-9]"):
            second(one)
        network.folder = folder
        ping.wait_answers(5)
        assert ping.lost() == 0
        assert [one.run(["ip", "-4", "-o", *words]).stdout for words in (["addr"], ["route"])] == machine
        assert network.keys.leases() == leases
        if second == network.flanctl:
            said = (network.folder / "second" / one.name / "agent.log").read_text().splitlines()
            assert re.search(r"flannel0 exists and is not ours, held by .*try=\"stop ", said[-1])
        daemon.terminate()
        other.terminate()


@pytest.mark.parametrize("name", ["docs/from-flannel.md", "docs/from-flannel.zh-CN.md"])
def test_the_commands_of_back_to_flannel_leave_nothing_of_ours(tmp_path: Path, name: str) -> None:
    """The block as it stands in the docs, its files moved here."""
    (block,) = re.findall(r"```sh\n(iptables -D FORWARD.*?)```", Path(name).read_text(), re.DOTALL)
    with ExitStack() as stack:
        network = Network(tmp_path, stack, "0.7.1")
        host = network.lab.add_host()
        network.flanctl(host, "-ip-masq").terminate()
        assert host.run(["iptables-save"]).stdout.count("FLANNEL") > 8
        folder = tmp_path / host.name
        for place, ours in (("/var/lib/flanctl", "state"), ("/run/flanctl", "run")):
            assert place in block
            block = block.replace(place, str(folder / ours))
        host.run(["sh", "-ec", block])
        host.run(["ip", "link", "delete", "flannel0"])
        assert {path.name for path in folder.iterdir()} == {"agent.log", "subnet.env"}
        assert "FLANNEL" not in host.run(["iptables-save"]).stdout

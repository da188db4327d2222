"""Old and new Docker on a network of flanctl: what each drops without our rules, and what they open.

h1 ─ eth0 192.168.66.11 ─┐                       ┌─ eth0 192.168.66.12 ─ h2
│    flannel0 A.0/32     │ under0 192.168.66.1   │     flannel0 B.0/32  │
└─ docker0 A.1/24        └───────────────────────┘        docker0 B.1/24┘
   dockerd ─ busybox A.2                                  dockerd ─ busybox B.2, and one on a network of its own

Three daemons: Debian's 20.10; the newest (dockerd_build.py) with its iptables and with its nftables backend. The
registry is sqlite: etcd has no part in this. docs/docker.md tells operators what is shown here.
"""

from __future__ import annotations

import json
import re
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Self

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import assert_pings, assert_tcp, ping, wait_until_reachable
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.dockerd import DockerContainer, Dockerd
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Host, Namespace

pytestmark = [
    pytest.mark.needs("root", "netns", "tun", "iptables", "nft", "dockerd"),
    pytest.mark.timeout(300),
]
RESYNC = "1"
"""Seconds, in place of 5: how soon a lost rule is found."""
WEB = "mkdir /www && echo it is $(hostname) > /www/index.html && exec httpd -f -p 80 -h /www"
OURS = "flanctl docker-accept"


@dataclass
class Site:
    """Two hosts, each with an agent, a dockerd and a container."""

    lab: Lab
    folder: Path
    stack: ExitStack
    newest: bool
    options: tuple[str, ...] = ()
    """dockerd's, beside those of docker-opts."""
    firewalld: bool = False
    agents: list[RunningAgent] = field(default_factory=list)
    dockers: list[Dockerd] = field(default_factory=list)
    containers: list[DockerContainer] = field(default_factory=list)

    @property
    def endpoints(self) -> str:
        return f"sqlite:{self.folder / 'registry.db'}"

    @classmethod
    def begin(cls, stack: ExitStack, folder: Path, *, newest: bool, options: tuple[str, ...] = ()) -> Self:
        """Two hosts and a network, no agent yet. The kernel does not forward: dockerd turns that on, and FORWARD off."""
        site = cls(stack.enter_context(Lab("accept")), folder, stack, newest, options)
        for _ in range(2):
            host = site.lab.add_host()
            host.run(["sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"])
        flanctl(site.lab.hosts[0], site.endpoints, "net", "init", "--network", "172.17.0.0/16")
        return site

    def start_agents(self, *options: str) -> None:
        """Or others in the place of those that run."""
        for agent in self.agents:
            assert agent.terminate() == 0, str(agent)
        words = ("--iface", "eth0", "--iptables-resync", RESYNC, *options)
        self.agents = [
            RunningAgent.start(host, self.folder / host.name, self.endpoints, *words)
            for host in self.lab.hosts
        ]
        for agent in self.agents:
            agent.wait_ready()

    def start_dockers(self, *words: str) -> None:
        """dockerd on each host as `docker-opts WORDS` tells it, and a container with a published port."""
        for agent in self.agents:
            options = agent.folder / "docker"
            flanctl(agent.host, "", "docker-opts", "-f", str(agent.subnet_file), "-d", str(options), *words)
            docker = self.stack.enter_context(
                Dockerd(agent.host, options, *self.options, newest=self.newest, firewalld=self.firewalld)
            )
            self.dockers.append(docker)
        self.containers = [docker.run(WEB, "--publish", "8080:80") for docker in self.dockers]

    def assert_reachable(self, *, published: int = 8080) -> None:
        """Container to container, host to container, container to host, published ports, and the world outside."""
        (a, b), (one, two) = self.containers, self.agents
        assert a.address in one.subnet
        assert b.address in two.subnet
        wait_until_reachable(a, b.address)
        for here, there, host, agent in ((a, b, one.host, two), (b, a, two.host, one)):
            assert_pings(here, there.address)
            assert_tcp(here, there, there.address, megabytes=1)
            assert_pings(here, agent.gateway.ip)
            assert_pings(host, there.address)
            assert fetched(host, there.address, 80).startswith("it is")
            assert fetched(host, agent.host.address, published).startswith("it is")
            assert fetched(here, agent.host.address, published).startswith("it is")
            assert_pings(here, IPv4Address(self.lab.network.network_address + 1))

    def assert_unreachable(self) -> None:
        """0 of 3 pings, container to container and host to container."""
        (a, b), host = self.containers, self.lab.hosts[0]
        assert answers(a, b.address) == 0
        assert answers(host, b.address) == 0


def answers(where: Namespace, to: IPv4Address, *options: str) -> int:
    """How many of three pings are answered."""
    done = ping(where, to, "-c", "3", "-i", "0.1", "-W", "1", *options)
    found = re.search(r"(\d+) received", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1])


def fetched(where: Namespace, address: IPv4Address, port: int) -> str:
    """What an httpd answers: its body."""
    with inside(where.path):
        here = socket.socket()
    with here:
        here.settimeout(10)
        here.connect((str(address), port))
        here.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: here.recv(4096), b""))
    return answer.partition(b"\r\n\r\n")[2].decode()


def saved(host: Host, table: str) -> list[str]:
    """The rules iptables-save shows of a table."""
    done = host.run(["iptables-save", "-t", table])
    return [line for line in done.stdout.splitlines() if line.startswith("-A")]


def ours_first(host: Host) -> bool:
    """Whether our rules stand first where they must."""
    raw = [rule for rule in saved(host, "raw") if rule.startswith("-A PREROUTING")]
    users = [rule for rule in saved(host, "filter") if rule.startswith("-A DOCKER-USER")]
    return OURS in " ".join(raw[:1]) and OURS in " ".join(users[:1])


def status(agent: RunningAgent) -> dict[str, object]:
    words = ("status", "--run-dir", str(agent.folder / "run"), "--subnet-file", str(agent.subnet_file))
    found: dict[str, object] = json.loads(flanctl(agent.host, "", *words, "-w", "json", check=False).stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[ExitStack, Path]]:
    with ExitStack() as stack:
        yield stack, tmp_path


def assert_survives(site: Site) -> None:
    """On the second host the tables are restored without ours, the ruleset is flushed, dockerd restarted."""
    a, two, docker = site.containers[0], site.agents[1], site.dockers[1]
    host = two.host
    host.run(["sh", "-c", f"iptables-save | grep -v '{OURS}' | iptables-restore"])
    until(lambda: ours_first(host), what=f"ours first again; {two}")
    two.wait_log("repaired: the rule for Docker in chain PREROUTING of table raw was missing, written")
    # What `firewall-cmd --reload` comes to: everything is gone, and dockerd writes its own again.
    host.run(["nft", "flush", "ruleset"])
    docker.stop()
    docker.start()
    until(lambda: ours_first(host), what=f"ours first after the flush; {two}")
    # And now the agent has nothing to repair: no packet waits for it.
    docker.stop()
    docker.start()
    assert ours_first(host)
    assert answers(a, docker.run(WEB).address) == 3
    kernel = status(two)["kernel"]
    assert kernel["accept"] == {"wanted": 3, "missing": 0}  # type: ignore[index]


def assert_apart(site: Site) -> None:
    """A network of its own stays as Docker wants it: no way in from other networks and hosts, a way out.

    And docker0 of the newest is open for nothing but what comes by the tunnel from an address of the network.
    """
    b, two = site.dockers[1].run(WEB), site.agents[1]
    site.dockers[1].client("network", "create", "apart")
    c = site.dockers[1].run(WEB, "--network", "apart")
    one = site.lab.hosts[0]
    assert_pings(c, IPv4Address(site.lab.network.network_address + 1))
    assert answers(b, c.address) == 0
    one.ip_batch(f"route add {c.address}/32 via {two.host.address}")
    assert answers(one, c.address) == 0
    one.ip_batch(f"route replace {c.address}/32 dev flannel0")
    assert answers(one, c.address) == 0
    if not site.newest:
        return  # before 28 a packet for docker0's containers may come from anywhere
    assert answers(one, b.address) == 3
    assert answers(one, b.address, "-I", str(one.address)) == 0, "a source outside the network"
    one.ip_batch(f"route add {b.address}/32 via {two.host.address}")
    assert answers(one, b.address) == 0, "not by the tunnel"
    one.ip_batch(f"route delete {b.address}/32")


def test_debians_docker_drops_what_is_forwarded_unless_we_accept_it(folder: tuple[ExitStack, Path]) -> None:
    """20.10 as 1.13 to 27: the policy of FORWARD is DROP. flannel's forward rules are enough, ours are too."""
    site = Site.begin(*folder, newest=False)
    site.start_agents("--ip-masq", "--docker-accept", "off", "--iptables-forward-rules=false")
    site.start_dockers()
    site.assert_unreachable()
    site.start_agents("--ip-masq", "--docker-accept", "off")
    until(lambda: answers(site.containers[0], site.containers[1].address) == 3)
    site.start_agents("--ip-masq", "--iptables-forward-rules=false")
    site.assert_reachable()
    site.start_agents("--ip-masq")
    # Before the flush: a dockerd that finds forwarding on leaves the policy of FORWARD alone, ACCEPT from then on.
    assert_apart(site)
    assert_survives(site)


@pytest.mark.needs("dockerd-newest")
def test_newest_docker_drops_all_unless_we_accept_it(folder: tuple[ExitStack, Path]) -> None:
    """With flannel's forward rules alone, which is all the newest flanneld has, no packet crosses."""
    site = Site.begin(*folder, newest=True, options=("--userland-proxy=false", "--live-restore"))
    site.start_agents("--docker-accept", "off")
    site.start_dockers()
    site.assert_unreachable()
    assert status(site.agents[0])["docker_accept"]["mode"] == "off"  # type: ignore[index]
    # The agent after dockerd.
    site.start_agents()
    site.assert_reachable()
    # Containers that outlive their daemon stay reachable without it and with the next.
    a, b = site.containers
    site.dockers[1].stop()
    assert answers(a, b.address) == 3
    site.dockers[1].start()
    assert answers(a, b.address) == 3
    assert_survives(site)
    assert_apart(site)
    _assert_network_of_its_own(site)
    _assert_cleanup(site)


def _assert_network_of_its_own(site: Site) -> None:
    """The lease as a user-defined network, by what `docker-opts --format network` prints."""
    docker, two = site.dockers[1], site.agents[1]
    for identity in docker.client("ps", "--quiet").split():
        docker.client("rm", "--force", identity)
    docker.stop()
    docker.options_file.write_text('DOCKER_NETWORK_OPTIONS="--bip=10.99.0.1/24"\n')
    docker.start()
    words = ("docker-opts", "-f", str(two.subnet_file), "--format", "network", "--accept")
    docker.client("network", "create", *flanctl(two.host, "", *words).stdout.split(), "overlay")
    c = docker.run(WEB, "--network", "overlay")
    assert c.address in two.subnet
    assert answers(site.containers[0], c.address) == 3
    assert_tcp(site.containers[0], c, c.address, megabytes=1)


def _assert_cleanup(site: Site) -> None:
    two = site.agents[1]
    tables = ("raw", "mangle", "nat", "filter")
    theirs = [
        [rule for rule in saved(two.host, table) if OURS not in rule and "FLANNEL" not in rule]
        for table in tables
    ]
    assert two.terminate() == 0
    words = ("--subnet-file", str(two.subnet_file), "--state-dir", str(two.folder / "state"))
    flanctl(two.host, "", "cleanup", *words, "--run-dir", str(two.folder / "run"), "--yes")
    assert [saved(two.host, table) for table in tables] == theirs


@pytest.mark.needs("dockerd-newest")
def test_dockers_nftables_backend_is_opened_by_the_mark_and_two_options(
    folder: tuple[ExitStack, Path],
) -> None:
    """No accept of another table is final there; the agent says what is missing, and docker-opts --accept is it."""
    site = Site.begin(*folder, newest=True, options=("--userland-proxy=false", "--firewall-backend=nftables"))
    for host in site.lab.hosts:  # with this backend dockerd leaves forwarding to the operator
        host.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
    site.start_agents(
        "--data-path", "auto"
    )  # in the kernel, where that can be: packets come by flannel0 then, too
    site.start_dockers()
    site.assert_unreachable()
    two = site.agents[1]
    until(lambda: "docker-closed" in str(status(two)["problems"]), what=f"docker-closed of {two}")
    for agent, docker in zip(site.agents, site.dockers, strict=True):
        docker.stop()
        words = ("docker-opts", "-f", str(agent.subnet_file), "-d", str(docker.options_file), "--accept")
        flanctl(agent.host, "", *words)
        docker.start()
    site.containers = [docker.run(WEB, "--publish", "8081:80") for docker in site.dockers]
    site.assert_reachable(published=8081)
    until(lambda: status(two)["problems"] == [], what=f"no problem of {two}")
    two.host.run(["nft", "flush", "ruleset"])
    site.dockers[1].stop()
    site.dockers[1].start()
    b = site.dockers[1].run(WEB)
    until(lambda: answers(site.containers[0], b.address) == 3, what=f"packets after the flush; {two}")
    assert_apart(site)


@pytest.mark.needs("dockerd-newest", "firewalld")
def test_a_reload_of_firewalld_is_mended_at_the_next_look(folder: tuple[ExitStack, Path]) -> None:
    """The real one: it flushes all, Docker writes its rules again when it hears of that, the agent when it looks."""
    site = Site.begin(*folder, newest=True, options=("--userland-proxy=false",))
    site.firewalld = True
    site.start_agents()
    site.start_dockers()
    site.assert_reachable()
    (a, b), two = site.containers, site.agents[1]
    for _ in range(2):
        site.dockers[1].reload_firewalld()
        # Docker and the agent write at the same time, in whatever order.
        until(
            lambda: any(f"-d {b.address}/32 ! -i docker0" in rule for rule in saved(two.host, "raw")),
            seconds=20,
        )
        until(lambda: ours_first(two.host), seconds=20, what=f"ours after the reload; {two}")
        until(lambda: answers(a, b.address) == 3, seconds=20, what=f"packets after the reload; {two}")
        assert answers(b, a.address) == 3
    two.wait_log("repaired: the rule for Docker in chain PREROUTING of table raw was missing, written")

"""The deployment note's case on real parts: etcd, an agent per host, dockerd started as docker-opts says, busybox.

                          etcd 3.4 or 3.7, one member or three
                    └──────────── in the switch's namespace, 192.168.66.1 ───────────┘
h1 ─ eth0 192.168.66.11 ─┐                                ┌─ eth0 192.168.66.12 ─ h2
│    flannel0 A.0/32     │      under0 192.168.66.1       │     flannel0 B.0/32  │
└─ docker0 A.1/24        └────────────────────────────────┘        docker0 B.1/24┘
   dockerd ─ busybox A.2                                           dockerd ─ busybox B.2
                                                             A, B: subnets of 172.17.0.0/16

With one member docker masquerades (the default; flannel0's address is what the other side sees), with three the agent
does (--ip-masq) and containers see each other's own addresses.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import (
    MTU,
    RunningPing,
    assert_mtu,
    assert_pings,
    assert_udp,
    wait_until_reachable,
)
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.dockerd import DockerContainer, Dockerd
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Literal

    from _pytest.mark.structures import ParameterSet

    Version = Literal["3.4", "3.7"]

pytestmark = [
    pytest.mark.needs("root", "netns", "tun", "iptables", "dockerd"),
    pytest.mark.timeout(240),
]
PREFIX = "/jxdd/network"
# 8 MB nobody can guess, its hash, and a server for it: TCP that busybox itself speaks.
_WEB = (
    "mkdir /www && dd if=/dev/urandom of=/www/data bs=1M count=8 2>/dev/null && exec httpd -f -p 80 -h /www"
)


@dataclass
class Topology:
    """An etcd, and hosts each with an agent, a dockerd and a container; hosts that join later have no dockerd."""

    lab: Lab
    cluster: Cluster
    endpoints: str
    agents: list[RunningAgent] = field(default_factory=list)
    dockers: list[Dockerd] = field(default_factory=list)
    containers: list[DockerContainer] = field(default_factory=list)

    def join(self, folder: Path, *options: str) -> RunningAgent:
        """One more host with an agent, not waited for."""
        words = ("--prefix", PREFIX, "--iface", "eth0", *options)
        agent = RunningAgent.start(self.lab.add_host(), folder, self.endpoints, *words)
        self.agents.append(agent)
        return agent

    def subnets(self) -> dict[str, dict[str, object]]:
        """`flanctl subnets ls -w json` on the first host, by public IP."""
        words = ("--prefix", PREFIX, "subnets", "ls", "-w", "json")
        rows = json.loads(flanctl(self.lab.hosts[0], self.endpoints, *words).stdout)["subnets"]
        return {row["public_ip"]: row for row in rows}


@pytest.fixture
def topology(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Topology]:
    version, members, options = request.param
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("docker"))
        cluster = stack.enter_context(_cluster(lab, version, members, tmp_path / "etcd"))
        endpoints = ",".join(cluster.endpoints)
        flanctl(lab.underlay, endpoints, "--prefix", PREFIX, "net", "init", "--network", "172.17.0.0/16")
        topology = Topology(lab, cluster, endpoints)
        for name in ("h1", "h2"):
            topology.join(tmp_path / name, *options)
        topology.dockers += [stack.enter_context(_dockerd(agent)) for agent in topology.agents]
        topology.containers += [docker.run(_WEB) for docker in topology.dockers]
        wait_until_reachable(topology.containers[0], topology.containers[1].address)
        yield topology
    assert [left for docker in topology.dockers for left in docker.leftovers()] == []


def _cluster(lab: Lab, version: Version, members: int, folder: Path) -> Cluster:
    return Cluster(
        version,
        members,
        folder=folder,
        host=str(lab.network.network_address + 1),
        prefix=lab.underlay.command([]),
    )


def _dockerd(agent: RunningAgent) -> Dockerd:
    """As systemd would: docker.service after the agent is ready, with what ExecStartPre=flanctl docker-opts wrote."""
    agent.wait_ready()
    options = agent.folder / "docker"
    flanctl(agent.host, "", "docker-opts", "-f", str(agent.subnet_file), "-d", str(options))
    return Dockerd(agent.host, options)


def _assert_reachable(topology: Topology) -> None:
    """Both ways: ping, the MTU, UDP of DNS's sizes, TCP by hash, container to host and host to container."""
    (a, b), (one, two) = topology.containers, topology.agents[:2]
    for here, there, host, agent in ((a, b, two.host, two), (b, a, one.host, one)):
        assert there.address in agent.subnet, "dockerd took the subnet of docker-opts"
        assert_pings(here, there.address)
        assert_mtu(here, there.address)
        assert_udp(here, there, there.address)
        assert _fetched(here, there) == _served(there)
        # The other host by docker0's address, and from that host back to the container.
        assert_pings(here, agent.gateway.ip)
        assert_udp(here, host, agent.gateway.ip)
        assert_pings(host, here.address)
        assert_udp(host, here, here.address)


def _served(container: DockerContainer) -> str:
    """SHA-256 of what its httpd serves, once it is written."""
    until(lambda: "httpd" in container.exec("ps"), what="httpd runs")
    return container.exec("sha256sum < /www/data")


def _fetched(client: DockerContainer, server: DockerContainer) -> str:
    _served(server)
    return client.exec(f"wget -q -O - http://{server.address}/data | sha256sum")


def _assert_listed(topology: Topology) -> None:
    rows = topology.subnets()
    for agent in topology.agents:
        row = rows.pop(str(agent.host.address))
        assert (row["subnet"], row["runs"], row["problems"]) == (str(agent.subnet), "flanctl", [])
    assert not rows


def _versions(members: int, *options: str) -> list[ParameterSet]:
    """Both etcds, each with what it needs."""
    return [
        pytest.param((version, members, options), id=f"etcd {version}", marks=pytest.mark.needs(capability))
        for version, capability in (("3.4", "etcd34"), ("3.7", "etcd37"))
    ]


@pytest.mark.parametrize("topology", _versions(1), indirect=True)
def test_containers_reach_each_other_with_one_member_of_etcd(topology: Topology) -> None:
    """Everything of the deployment note, docker masquerading."""
    _assert_reachable(topology)
    _assert_listed(topology)


@pytest.mark.parametrize("topology", _versions(3, "--ip-masq"), indirect=True)
def test_containers_reach_each_other_while_the_etcd_leader_is_killed(
    topology: Topology, tmp_path: Path
) -> None:
    """With three members: no packet is lost when the leader goes; a host joins without it, and all hear of it."""
    a, b = topology.containers
    _assert_reachable(topology)
    _assert_listed(topology)
    running = RunningPing(a, b.address)
    running.wait_answers()
    leader = topology.cluster.leader()
    topology.cluster.kill(leader)
    assert topology.cluster.leader() != leader
    _assert_listed(topology)
    three = topology.join(tmp_path / "h3", "--ip-masq").wait()
    c = three.host.add_container(three.gateway, MTU)
    wait_until_reachable(a, c.address)
    wait_until_reachable(b, c.address)
    topology.cluster.restart(leader)
    _assert_listed(topology)
    running.wait_answers(5)
    assert running.lost() == 0
    assert [agent.process.poll() for agent in topology.agents] == [None] * 3

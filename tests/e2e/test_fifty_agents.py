"""Fifty real agents started at once: each gets a subnet of its own, none fails, none has another one later.

flannel.md 11, row 8: there, one of six that start at once dies on a small network.
"""

from __future__ import annotations

import time
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.status_client import ask
from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Host

pytestmark = [pytest.mark.needs("root", "netns", "tun", "iptables"), pytest.mark.timeout(300)]

HOSTS = 50
SECONDS = 120.0
"""Generous: fifty interpreters on two cores that have other work. `make bench` measures what it takes."""
SHORT_LEASE = ("--lease-ttl", "15s")
"""Renewed after 5 s, so that a test sees every agent's renewal."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("fifty") as lab:
        for _ in range(HOSTS + 1):
            lab.add_host()
        yield lab
    assert lab.leftovers() == ()


@pytest.fixture(autouse=True)
def no_agent_outlives_its_test(lab: Lab) -> Iterator[None]:
    yield
    for process in lab.processes:
        if process.poll() is None:
            process.kill()
    for process in lab.processes:
        process.wait()
    lab.processes.clear()
    for host in lab.hosts:
        host.run(["ip", "link", "delete", "flannel0"], check=False)


def start_all(hosts: list[Host], folder: Path, cluster: Cluster, *options: str) -> list[RunningAgent]:
    endpoints = ",".join(cluster.endpoints)
    return [
        RunningAgent.start(host, folder / host.name, endpoints, "--iface", "eth0", *options) for host in hosts
    ]


def subnets(agents: list[RunningAgent]) -> dict[str, IPv4Network]:
    """Of each host, as its ready line has it; fails with the log of the first agent that ended or is late."""
    deadline = time.monotonic() + SECONDS
    found = {
        agent.host.name: IPv4Network(
            agent.wait_ready(seconds=max(0.1, deadline - time.monotonic()))["subnet"]
        )
        for agent in agents
    }
    assert len(set(found.values())) == len(found) == len(agents)
    return found


def settled(agents: list[RunningAgent], expected: dict[str, IPv4Network]) -> None:
    """Every agent renewed its lease, runs, and has in subnet.env and the registry what it had."""
    for agent in agents:
        agent.wait_log(r"lease \S+ renewed", seconds=SECONDS)
        assert agent.log_text().count(" ready ") == 1, str(agent)
        subnet = expected[agent.host.name]
        assert (
            f"FLANNEL_SUBNET={subnet.network_address + 1}/{subnet.prefixlen}" in agent.subnet_file.read_text()
        )
    assert held(agents[0]) == {
        str(subnet): str(agent.host.address) for agent in agents for subnet in [expected[agent.host.name]]
    }


def peers(agent: RunningAgent) -> int:
    """To how many other hosts it routes."""
    return int(ask(agent.folder / "run" / "agent.sock")["peers"]["count"])


def held(agent: RunningAgent) -> dict[str, str]:
    """The registry's leases: subnet and public IP."""
    listed = flanctl(agent.host, agent.endpoints, "subnets", "ls", "-w", "simple").stdout
    return dict(line.split("\t")[:2] for line in listed.splitlines())


@pytest.mark.needs("etcd34")
def test_fifty_agents_at_once_get_fifty_subnets_and_keep_them(lab: Lab, tmp_path: Path) -> None:
    hosts = lab.hosts[:HOSTS]
    with Cluster(
        "3.4", folder=tmp_path / "etcd", host="192.168.66.1", prefix=lab.underlay.command([])
    ) as cluster:
        flanctl(lab.underlay, cluster.endpoints[0], "net", "init", "--network", "172.17.0.0/16")
        agents = start_all(hosts, tmp_path, cluster, *SHORT_LEASE)
        got = subnets(agents)
        settled(agents, got)
        for agent in agents:
            until(
                lambda agent=agent: peers(agent) == HOSTS - 1,
                seconds=SECONDS,
                what="everybody knows everybody",
            )
        first, last = agents[0], agents[-1]
        first.host.run(
            ["ping", "-c1", "-W5", str(got[last.host.name].network_address)]
        )  # its flannel0's address


@pytest.mark.needs("etcd37")
def test_fifty_agents_at_once_share_a_network_of_fifty_while_the_leader_dies(
    lab: Lab, tmp_path: Path
) -> None:
    *hosts, one_more = lab.hosts
    with Cluster(
        "3.7", 3, folder=tmp_path / "etcd", host="192.168.66.1", prefix=lab.underlay.command([])
    ) as cluster:
        leader = cluster.leader()
        every = ",".join(cluster.endpoints)
        network = ["--network", "10.9.0.0/22", "--subnet-len", "28"]
        bounds = ["--subnet-min", "10.9.0.16", "--subnet-max", "10.9.3.32"]
        flanctl(lab.underlay, every, "net", "init", *network, *bounds)

        agents = start_all(hosts, tmp_path, cluster)
        until(lambda: any("lease " in agent.log_text() for agent in agents), seconds=SECONDS)
        cluster.kill(leader)
        without = sum(not agent.subnet_file.exists() for agent in agents)
        assert without, "the leader died too late to matter"
        got = subnets(agents)
        cluster.restart(leader)

        full = RunningAgent.start(one_more, tmp_path / one_more.name, every, "--iface", "eth0")
        assert full.wait_end() == 5, str(full)
        assert "50 of 50 subnets taken in 10.9.0.0/22" in full.log_text()
        for agent in agents:
            assert agent.process.poll() is None, str(agent)
        expected = {str(got[agent.host.name]): str(agent.host.address) for agent in agents}
        assert held(agents[0]) == expected

        # All at once once more: each comes to hold what it held.
        for agent in agents:
            agent.process.terminate()
        for agent in agents:
            assert agent.wait_end() == 0, str(agent)
        again = [agent.again() for agent in agents]
        assert subnets(again) == got
        assert held(again[0]) == expected

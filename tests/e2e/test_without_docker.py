"""Packets end to end where there is no dockerd and no etcd: sqlite, and containers made as dockerd would make them.

h1 ─ eth0 192.168.66.11 ─┐                       ┌─ eth0 192.168.66.12 ─ h2
│    flannel0 A.0/32     │ under0 192.168.66.1   │     flannel0 B.0/32  │
└─ docker0 A.1/24        └───────────────────────┘        docker0 B.1/24┘
   └─ h1c1 A.2                                            └─ h2c1 B.2         A, B: subnets of 172.17.0.0/16
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import (
    MTU,
    RunningPing,
    assert_mtu,
    assert_pings,
    assert_tcp,
    assert_udp,
    ping,
    wait_until_reachable,
)
from tests.support.agents import RunningAgent, flanctl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Container

pytestmark = [pytest.mark.needs("root", "netns", "tun", "iptables"), pytest.mark.timeout(120)]


@dataclass
class Network:
    """Two hosts that are up, each with a container."""

    lab: Lab
    endpoints: str
    agents: list[RunningAgent]
    containers: list[Container]

    def listed(self) -> list[dict[str, object]]:
        """`flanctl subnets ls -w json` on the first host, its subnets."""
        out = flanctl(self.lab.hosts[0], self.endpoints, "subnets", "ls", "-w", "json").stdout
        subnets: list[dict[str, object]] = json.loads(out)["subnets"]
        return subnets


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Lab("e2e") as lab:
        hosts = [lab.add_host(), lab.add_host()]
        endpoints = f"sqlite:{tmp_path / 'registry.db'}"
        flanctl(hosts[0], endpoints, "net", "init", "--network", "172.17.0.0/16")
        agents = [
            RunningAgent.start(host, tmp_path / host.name, endpoints, "--iface", "eth0") for host in hosts
        ]
        containers = [_container(agent) for agent in agents]
        wait_until_reachable(containers[0], containers[1].address)
        yield Network(lab, endpoints, agents, containers)


def _container(agent: RunningAgent, *, mtu: int | None = None) -> Container:
    """On the docker0 that dockerd would make of what docker-opts prints."""
    agent.wait_ready()
    told = flanctl(agent.host, "", "docker-opts", "-c", "-f", str(agent.subnet_file), "-d", "-").stdout
    bip, said = re.search(r"--bip=(\S+)", told), re.search(r"--mtu=(\d+)", told)
    assert bip
    assert said
    return agent.host.add_container(IPv4Interface(bip[1]), mtu or int(said[1]))


def test_containers_and_hosts_reach_each_other(network: Network) -> None:
    """Ping at the MTU and not above, TCP by hash both ways at once, UDP of DNS's sizes, container ↔ host."""
    (one, two), (a, b) = network.agents, network.containers
    assert [agent.ready["mtu"] for agent in (one, two)] == [str(MTU)] * 2
    for here, there in ((a, b), (b, a)):
        assert_pings(here, there.address)
        assert_mtu(here, there.address)
        assert_udp(here, there, there.address)
        assert_tcp(here, there, there.address)
    for agent, host, container in ((one, two.host, b), (two, one.host, a)):
        assert_pings(container, agent.gateway.ip)
        assert_udp(container, agent.host, agent.gateway.ip)
        assert_pings(agent.host, container.address)
        assert_tcp(agent.host, container, container.address, megabytes=1)
        assert_tcp(container, agent.host, agent.gateway.ip, megabytes=1)
        assert host.address != agent.host.address


def test_both_hosts_are_listed_as_running_flanctl(network: Network) -> None:
    listed = {row["subnet"]: row for row in network.listed()}
    assert {row["subnet"] for row in listed.values()} == {str(agent.subnet) for agent in network.agents}
    for agent in network.agents:
        row = listed[str(agent.subnet)]
        assert (row["public_ip"], row["runs"], row["backend"]) == (str(agent.host.address), "flanctl", "udp")
        assert row["problems"] == []


def test_a_container_with_a_larger_mtu_is_told_the_tunnels(network: Network) -> None:
    """Path MTU discovery works across us: the host answers with ICMP, and large fragmentable packets pass."""
    (one, two), (_, b) = network.agents, network.containers
    large = _container(one, mtu=1500)
    wait_until_reachable(large, b.address)
    assert_mtu(large, b.address)
    assert ping(large, b.address, "-M", "dont", "-s", "3000").returncode == 0
    assert_tcp(large, b, b.address, megabytes=1)
    assert two.process.poll() is None


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_restart_takes_the_same_subnet_and_loses_no_packet_of_others(
    network: Network, how: str, tmp_path: Path
) -> None:
    """h3 joins and pings h1 while the agent of h2 goes and comes back."""
    (one, two), (a, b) = network.agents, network.containers
    three = RunningAgent.start(network.lab.add_host(), tmp_path / "h3", network.endpoints, "--iface", "eth0")
    c = _container(three)
    wait_until_reachable(c, a.address)
    subnet, subnet_env = two.subnet, two.subnet_file.read_bytes()
    running = RunningPing(c, a.address)
    running.wait_answers()
    if how == "stop":
        assert two.terminate() == 0, str(two)
    else:
        two.kill()
    again = two.again().wait()
    wait_until_reachable(a, b.address)
    running.wait_answers(5)
    assert running.lost() == 0
    assert again.subnet == subnet
    assert again.subnet_file.read_bytes() == subnet_env
    assert_pings(b, a.address)
    assert_pings(b, c.address)
    assert len(network.listed()) == 3
    assert one.process.poll() is None


@pytest.mark.parametrize("keep_state", [True, False], ids=["run is empty", "run and state are empty"])
def test_a_reboot_takes_the_same_subnet(network: Network, keep_state: bool) -> None:
    """Device, subnet.env and even the state directory are gone: the registry still knows this public IP."""
    (_, two), (a, b) = network.agents, network.containers
    subnet = two.subnet
    again = two.reboot(keep_state=keep_state).wait()
    assert again.subnet == subnet
    wait_until_reachable(a, b.address)
    assert_pings(b, a.address)
    assert len(network.listed()) == 2


def test_what_is_counted_is_what_was_sent(network: Network) -> None:
    """Five echo requests of 84 bytes and their answers, on both hosts, and nothing dropped; by whichever path."""
    (one, two), (a, b) = network.agents, network.containers
    before = [agent.counters() for agent in (one, two)]
    assert_pings(a, b.address)
    for agent, was in zip((one, two), before, strict=True):
        grown = {name: grew for name, count in agent.counters().items() if (grew := count - was.get(name, 0))}
        # The kernel's own IPv6 solicitations on a new device are none of ours.
        grown.pop("drop-bad-version", None)
        grown = {name: grew for name, grew in grown.items() if not name.startswith("kernel-")}
        assert grown == {"out-packets": 5, "out-bytes": 420, "in-packets": 5, "in-bytes": 420}

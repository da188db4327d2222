"""etcd is away while agents are killed and started again: packets flow, subnets stay (two hosts, real etcd)."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import MTU, RunningPing, wait_until_reachable
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import VERSIONS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.etcd import Version

pytestmark = [pytest.mark.needs("root", "netns", "tun", "iptables"), pytest.mark.timeout(180)]


def _remembered(agent: RunningAgent) -> int:
    """Peers in what the agent leaves to its successor; none before it has written that down, soon after READY."""
    known = agent.folder / "state" / "known.json"
    return len(json.loads(known.read_text())["peers"]) if known.exists() else 0


@pytest.mark.parametrize("version", VERSIONS)
def test_agents_started_while_etcd_is_down_carry_packets_and_keep_their_subnets(
    version: Version, tmp_path: Path
) -> None:
    """flannel.md 11, row 3."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab("out"))
        hosts = [lab.add_host(), lab.add_host()]
        cluster = stack.enter_context(
            Cluster(
                version,
                folder=tmp_path / "etcd",
                host=str(hosts[0].address),
                prefix=hosts[0].command([]),
            )
        )
        endpoints = ",".join(cluster.endpoints)
        flanctl(hosts[0], endpoints, "net", "init", "--network", "172.17.0.0/16")
        agents = [
            RunningAgent.start(host, tmp_path / host.name, endpoints, "--iface", "eth0") for host in hosts
        ]
        containers = [agent.host.add_container(agent.gateway, MTU) for agent in agents]
        wait_until_reachable(containers[0], containers[1].address)
        subnets = [agent.subnet for agent in agents]
        for agent in agents:  # within five seconds of a change
            until(lambda agent=agent: _remembered(agent) == 1, seconds=30, what="the peer is remembered")

        cluster.kill(0)
        for agent in agents:
            agent.kill()
        agents = [agent.again() for agent in agents]
        for agent in agents:
            agent.wait_log("going on with what we knew last")
        wait_until_reachable(containers[0], containers[1].address)
        assert [agent.subnet for agent in agents] == subnets
        assert all(agent.ready["peers"] == "1" for agent in agents)

        pinging = RunningPing(containers[0], containers[1].address)
        cluster.restart(0)
        for agent in agents:
            agent.wait_log(r"registry answers again")
            agent.wait_log(r"lease \S+ renewed")
        pinging.wait_answers(20)
        assert pinging.lost() == 0
        listed = flanctl(hosts[0], endpoints, "subnets", "ls", "-w", "simple").stdout
        assert {line.split("\t")[0] for line in listed.splitlines()} == {str(subnet) for subnet in subnets}
        for agent in agents:
            assert not re.search(r"peer (added|removed)", agent.log_text())
            assert agent.terminate() == 0

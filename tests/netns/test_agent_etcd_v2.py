"""The agent on flannel 0.7.1's etcd: v2 found by itself, 0.7's bytes, the subnet kept when its key is lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34")

PREFIX = "/jxdd/network"


def test_it_waits_for_a_config_in_either_api_and_lives_on_v2(tmp_path: Path) -> None:
    """flannel.md 11, row 19: there, an empty v3 beside a full v2 looks like "no config", for ever."""
    with Lab("v2") as lab:
        host = lab.add_host()
        with Cluster("3.4", folder=tmp_path / "etcd", v2=True, prefix=host.command([])) as cluster:
            endpoints = cluster.endpoints[0]

            def keys() -> dict[str, str]:
                """What `etcdctl` of v2's time shows below subnets/."""
                listed = flanctl(host, endpoints, "subnets", "ls", "-w", "json")
                assert json.loads(listed.stdout)["dialect"] == "0.7"
                folder = f"{endpoints}/v2/keys{PREFIX}/subnets"
                said = json.loads(host.run(["curl", "-s", folder]).stdout)
                return {node["key"]: node["value"] for node in said.get("node", {}).get("nodes", [])}

            agent = RunningAgent.start(host, tmp_path / "agent", endpoints, "--iface", "eth0")
            agent.wait_log("no network config")
            flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16", "--api", "v2")
            subnet = agent.wait_ready()["subnet"]
            agent.wait_log("etcd v2 over HTTP is taken: the config is there and not in v3")
            key = f"{PREFIX}/subnets/{subnet.replace('/', '-')}"
            assert keys() == {key: f'{{"PublicIP":"{host.address}"}}'}

            host.run(["curl", "-s", "-X", "DELETE", f"{endpoints}/v2/keys{key}"])
            until(lambda: keys() == {key: f'{{"PublicIP":"{host.address}"}}'}, what="the same subnet again")
            agent.terminate()
            agent = agent.again()
            assert agent.wait_ready()["subnet"] == subnet
            run_dir = str(agent.folder / "run")
            told = flanctl(host, endpoints, "status", "--run-dir", run_dir, "-w", "json", check=False)
            assert json.loads(told.stdout)["registry"]["store"].endswith(
                "(the config is there and not in v3)"
            )

            # Nobody tells whether this is v2 while etcd is away: what was known last does.
            cluster.kill(0)
            agent.kill()
            agent = agent.again()
            assert agent.wait_ready()["subnet"] == subnet
            agent.wait_log("going on with what we knew last")
            assert json.loads((agent.folder / "state" / "known.json").read_text())["dialect"] == "0.7"
            cluster.restart(0)
            agent.wait_log(r"lease \S+ renewed")
            assert keys() == {key: f'{{"PublicIP":"{host.address}"}}'}
            agent.terminate()
    assert lab.leftovers() == ()

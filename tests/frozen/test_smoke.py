"""The first minute with a new build: what must hold before anything else is worth a look."""

from __future__ import annotations

import json

import pytest

from tests.support.etcd import Cluster
from tests.support.frozen import ok

pytestmark = [pytest.mark.needs("frozen"), pytest.mark.smoke]


def test_version():
    assert ok("version").startswith("flanctl 0.")
    shown = json.loads(ok("version", "-w", "json"))
    assert shown["frozen"] is True


def test_docker_opts(tmp_path):
    (tmp_path / "subnet.env").write_text(
        "FLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    said = ok("docker-opts", "-f", tmp_path / "subnet.env", "-d", "-")
    assert "--bip=172.17.41.1/24" in said
    assert "--mtu=1472" in said


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize("gateway", ["true", "false"])
def test_net_init_and_subnets_ls_on_a_real_etcd(gateway, tmp_path):
    """Over the gateway, and over gRPC: cygrpc out of the file."""
    with Cluster("3.4", folder=tmp_path, extra=[f"--enable-grpc-gateway={gateway}"]) as cluster:
        env = {"FLANCTL_ENDPOINTS": cluster.endpoints[0]}
        ok("net", "init", "--network", "172.17.0.0/16", env=env)
        ok("reserve", "172.17.7.0/24", "192.168.6.7", "--yes", env=env)
        assert "172.17.7.0/24" in ok("subnets", "ls", env=env)
        assert "172.17.0.0/16" in cluster.etcdctl("get", "/jxdd/network/config")


@pytest.mark.needs("root", "netns", "tun", "iptables", "ping")
def test_the_demo(tmp_path):
    """Two agents, packets between two containers, the packet path that is linked in."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(tmp_path)}
    assert ok("demo", env=env, timeout=90).rstrip().endswith("All 8 steps hold.")

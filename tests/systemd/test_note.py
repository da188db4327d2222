"""The deployment note, its commands in its order, on three hosts under systemd with three etcd members and dockerd.

Two of the leases are there before, as the note's network has them; the third host takes a free subnet. What the note prints is
compared word for word; its one line that cannot be the same (ps shows flanneld-start and the options it was given, where the
script's exec showed what it made of them) is compared with what docs/from-flannel.md says.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from flanctl.demo.hosts import Lab
from tests.support.deadline import until
from tests.support.systemd_machine import Machine
from tests.systemd.conftest import CONFIG, NEEDS, NETWORK, NOTE, PREFIX, UNITS, etcd, etcdctl, note
from tests.systemd.test_note_units import DOCKER, OPTIONS, SUBNET_ENV

pytestmark = [pytest.mark.needs(*NEEDS), pytest.mark.timeout(400)]

ADDRESSES = ("192.168.6.2", "192.168.6.15", "192.168.6.5")
SUBNETS = f"{PREFIX}/subnets"
_IMAGE = """
set -e
mkdir -p /image/bin
cp /bin/busybox /image/bin
for applet in sh sleep ping ip; do ln -s busybox /image/bin/$applet; done
tar -C /image -c . | docker import - busybox:test
"""


@pytest.fixture(scope="module")
def hosts(tree, tmp_path_factory):
    """k8s-node2 and the two others, by address: flannel's package and units on them, etcd running, nothing of flanctl yet."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("three", network=NETWORK))
        machines = {}
        for number, address in zip((2, 1, 3), ADDRESSES, strict=True):
            name = f"k8s-node{number}"
            machine = Machine(
                lab.add_host(address=IPv4Address(address)),
                tree,
                tmp_path_factory.mktemp("note") / name,
                hostname=name,
            )
            machines[address] = stack.enter_context(machine)
            etcd(machine, *ADDRESSES)
            machine.write(f"{UNITS}/flanneld.service", note("flanneld.service"))
            for file in (
                "usr/bin/flanneld",
                "usr/bin/flanneld-start",
                "usr/libexec/flannel/mk-docker-opts.sh",
            ):
                machine.write(file, "#!/bin/sh\nexit 9  # flannel's own\n", mode=0o755)
            machine.link("usr/bin/dockerd", "/usr/sbin/dockerd")  # where the note's unit looks for it
        for machine in machines.values():
            machine.boot()
            machine.ok("systemctl", "enable", "etcd")
            machine.ok("systemctl", "start", "--no-block", "etcd")
        for machine in machines.values():
            until(lambda machine=machine: machine.show("etcd", "ActiveState") == "active", seconds=60)
        yield machines


def test_the_note(hosts):
    node = hosts["192.168.6.2"]
    # The network as the operator has it: two of its hosts hold a lease.
    for address, subnet in (("192.168.6.2", "172.17.41.0-24"), ("192.168.6.15", "172.17.7.0-24")):
        etcdctl(
            node,
            "set",
            "--ttl",
            "86400",
            f"{SUBNETS}/{subnet}",
            json.dumps({"PublicIP": address}, separators=(",", ":")),
        )

    # yum install flannel; the names become links
    for host in hosts.values():
        host.ok("flanctl", "install", "--as-flanneld", "--yes")
        assert host.ok("readlink", "/usr/bin/flanneld") == "/usr/bin/flanctl\n"

    # cat /etc/sysconfig/flanneld; mkdir /var/log/flannel
    for host in hosts.values():
        host.write("etc/sysconfig/flanneld", note("flanneld.sysconfig"))
        host.ok("mkdir", "/var/log/flannel")
        assert host.run("flanctl", "config", "check").code == 0

    # etcdctl set and get of the config
    etcdctl(node, "set", f"{PREFIX}/config", CONFIG)
    assert etcdctl(node, "get", f"{PREFIX}/config") == CONFIG + "\n"

    # systemctl enable flanneld; systemctl start flanneld
    for host in hosts.values():
        host.ok("systemctl", "enable", "flanneld")
        host.ok("systemctl", "start", "flanneld")

    # ps -ef | grep flanneld
    (pid,) = node.ok("pgrep", "-x", "flanneld").split()
    assert node.show("flanneld", "MainPID") == pid
    assert node.ok("ps", "-o", "ppid=,args=", "-p", pid).split() == [
        "1", "/usr/bin/flanneld-start", "--logtostderr=false", "--log_dir=/var/log/flannel/", "--iface=eth0",
    ]  # fmt: skip

    # cat /run/flannel/subnet.env; cat /run/flannel/docker
    assert node.ok("cat", "/run/flannel/subnet.env") == SUBNET_ENV
    assert node.ok("cat", "/run/flannel/docker") == DOCKER

    # docker.service as the note edits it; systemctl daemon-reload; systemctl restart docker
    for host in hosts.values():
        host.write(f"{UNITS}/docker.service", (NOTE / "docker.service").read_text())
        host.ok("systemctl", "daemon-reload")
        host.ok("systemctl", "restart", "docker", timeout=120)

    # ps -ef | grep docker
    docker = node.show("docker", "MainPID")
    assert node.ok("ps", "-o", "ppid=,args=", "-p", docker).split(maxsplit=1) == [
        "1",
        f"/usr/bin/dockerd {OPTIONS}\n",
    ]
    child = node.ok("ps", "-o", "args=", "--ppid", docker)
    assert "containerd --config /var/run/docker/containerd/containerd.toml" in child

    # etcdctl ls and get of the subnets
    listed = etcdctl(node, "ls", SUBNETS).splitlines()
    assert {f"{SUBNETS}/172.17.41.0-24", f"{SUBNETS}/172.17.7.0-24"} < set(listed)
    assert len(listed) == 3
    assert etcdctl(node, "get", f"{SUBNETS}/172.17.41.0-24") == '{"PublicIP":"192.168.6.2"}\n'

    # flannel0, the routes and docker0, which the note tells of in words
    assert "inet 172.17.41.0/16 scope global flannel0" in node.ok("ip", "address", "show", "flannel0")
    routes = node.ok("ip", "route")
    assert "172.17.0.0/16 dev flannel0 proto kernel scope link src 172.17.41.0" in routes
    assert "172.17.41.0/24 dev docker0 proto kernel scope link src 172.17.41.1" in routes
    assert "inet 172.17.41.1/24" in node.ok("ip", "address", "show", "docker0")
    assert json.loads(node.ok("flanctl", "status", "-w", "json"))["state"] == "ready"


def test_every_container_reaches_every_other_and_is_seen_by_its_own_address(hosts):
    addresses = {}
    for address, host in hosts.items():
        host.ok("sh", "-c", _IMAGE, timeout=120)
        host.ok("docker", "run", "--detach", "--name", "box", "busybox:test", "sleep", "3600")
        shown = host.ok("docker", "exec", "box", "ip", "-4", "-o", "address", "show", "eth0")
        addresses[address] = re.search(r"inet (172\.17\.\d+\.\d+)/24", shown)[1]
    assert len({each.rpartition(".")[0] for each in addresses.values()}) == 3
    for address, host in hosts.items():
        for other, target in addresses.items():
            if other != address:
                said = host.run("docker", "exec", "box", "ping", "-c", "2", "-W", "5", target)
                assert said.code == 0, f"{address} to {other}: {said.out}{said.err}"
                assert ", 0% packet loss" in said.out


def test_a_host_that_is_turned_off_and_on_has_its_subnet_and_its_containers_reach_the_others(hosts):
    node, other = hosts["192.168.6.2"], hosts["192.168.6.15"]
    target = other.ok("docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "box").strip()
    node.ok("systemctl", "enable", "docker")
    began = node.show("docker", "ActiveEnterTimestampMonotonic")
    node.ok("systemctl", "stop", "docker", "flanneld")
    node.ok("rm", "-rf", "/run/flannel")
    node.ok("ip", "link", "delete", "flannel0")
    node.ok("systemctl", "start", "docker")
    assert node.show("docker", "ActiveEnterTimestampMonotonic") != began
    assert node.ok("cat", "/run/flannel/subnet.env") == SUBNET_ENV
    node.ok("docker", "start", "box")
    assert node.run("docker", "exec", "box", "ping", "-c", "2", "-W", "5", target).code == 0


def test_and_back_the_three_names_are_flannel_s_own_again(hosts):
    for host in hosts.values():
        host.ok("flanctl", "uninstall", "--yes")
        assert host.ok("cat", "/usr/bin/flanneld-start").endswith("exit 9  # flannel's own\n")
        assert host.show("flanneld", "ActiveState") == "active"

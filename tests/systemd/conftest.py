"""The deployment note's host under a systemd of its own; `note/` holds its files as it shows them.

In docker.service the note's author has marked what he added with `###…` at the ends of two lines; the marks are left out,
systemd would take them for words of the command.
"""

from __future__ import annotations

from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from flanctl.demo.hosts import Lab
from tests.support.capabilities import missing
from tests.support.systemd_machine import Machine, systemd_tree

NEEDS = ("frozen", "nspawn", "tun", "iptables")
NOTE = Path(__file__).parent / "note"
UNITS = "usr/lib/systemd/system"
NETWORK = IPv4Network("192.168.6.0/24")
PREFIX = "/jxdd/network"
CONFIG = '{"Network":"172.17.0.0/16"}'
LEASE = '{"PublicIP":"192.168.6.2"}'


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    for name in NEEDS:
        assert missing(name) is None, f"mark the test with needs({name!r})"
    return systemd_tree(tmp_path_factory.mktemp("systemd"))


def note(name):
    return (NOTE / name).read_text()


def etcd(machine, *members):
    """Debian's etcd 3.4 with the v2 API, at the machine's own address; its unit is not enabled."""
    address = machine.host.address
    everyone = members or (address,)
    machine.write(
        "etc/default/etcd",
        f"""ETCD_NAME={address}
ETCD_ENABLE_V2=true
ETCD_UNSAFE_NO_FSYNC=true
ETCD_LISTEN_CLIENT_URLS=http://{address}:2379,http://127.0.0.1:2379
ETCD_ADVERTISE_CLIENT_URLS=http://{address}:2379
ETCD_LISTEN_PEER_URLS=http://{address}:2380
ETCD_INITIAL_ADVERTISE_PEER_URLS=http://{address}:2380
ETCD_INITIAL_CLUSTER={",".join(f"{each}=http://{each}:2380" for each in everyone)}
""",
    )


def as_the_note_has_it(machine):
    """flannel's package and the note's edits; the three programs are links, as its ten-minute walk makes them."""
    machine.write("etc/sysconfig/flanneld", note("flanneld.sysconfig"))
    machine.write(f"{UNITS}/flanneld.service", note("flanneld.service"))
    machine.write(f"{UNITS}/docker.service", note("docker.service"))
    machine.link("usr/bin/flanneld", "flanctl")
    machine.link("usr/bin/flanneld-start", "flanctl")
    machine.link("usr/libexec/flannel/mk-docker-opts.sh", "/usr/bin/flanctl")
    # The note's dockerd is in /usr/bin, Debian's in /usr/sbin.
    machine.link("usr/bin/dockerd", "/usr/sbin/dockerd")
    (machine / "var/log/flannel").mkdir(parents=True)


def etcdctl(machine, *words):
    """The note's etcdctl, which speaks v2."""
    where = f"--endpoints=http://{machine.host.address}:2379"
    return machine.ok("etcdctl", where, *words, env={"ETCDCTL_API": "2"})


@contextmanager
def new_node(tree, folder):
    """The note's k8s-node2, its etcd on the same machine and running, the network's config and the lease in it."""
    with (
        Lab("note", network=NETWORK) as lab,
        Machine(
            lab.add_host(address=IPv4Address("192.168.6.2")), tree, folder / "k8s-node2", hostname="k8s-node2"
        ) as machine,
    ):
        # The note's other two members are down, their hosts are not.
        lab.underlay.ip_batch(
            *(f"addr add {other}/24 dev under0" for other in ("192.168.6.5", "192.168.6.15"))
        )
        etcd(machine)
        as_the_note_has_it(machine)
        machine.boot()
        machine.ok("systemctl", "enable", "--now", "etcd")
        etcdctl(machine, "set", f"{PREFIX}/config", CONFIG)
        etcdctl(machine, "set", "--ttl", "86400", f"{PREFIX}/subnets/172.17.41.0-24", LEASE)
        yield machine


@pytest.fixture(scope="module")
def node(tree, tmp_path_factory):
    with new_node(tree, tmp_path_factory.mktemp("node")) as machine:
        yield machine

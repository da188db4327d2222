"""The deployment note's own units, unchanged, with flanctl behind flannel's three names."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.support.deadline import until
from tests.systemd.conftest import LEASE, NEEDS, PREFIX, etcdctl, new_node

pytestmark = [pytest.mark.needs(*NEEDS), pytest.mark.timeout(300)]

SUBNET_ENV = """FLANNEL_NETWORK=172.17.0.0/16
FLANNEL_SUBNET=172.17.41.1/24
FLANNEL_MTU=1472
FLANNEL_IPMASQ=false
"""
DOCKER = """DOCKER_OPT_BIP="--bip=172.17.41.1/24"
DOCKER_OPT_IPMASQ="--ip-masq=true"
DOCKER_OPT_MTU="--mtu=1472"
DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"
"""
OPTIONS = "--bip=172.17.41.1/24 --ip-masq=true --mtu=1472"


@pytest.fixture
def unit(node):
    """The node with flanneld and docker stopped and not enabled, whatever the test before did."""
    node.run("systemctl", "stop", "docker", "docker.socket", "flanneld")
    node.run("systemctl", "disable", "flanneld")
    node.run("systemctl", "reset-failed", "flanneld", "docker")
    return node


def _state(machine, unit="flanneld"):
    return machine.show(unit, "ActiveState")


def _pid(machine, unit="flanneld"):
    return machine.show(unit, "MainPID")


def _log(machine):
    return machine.ok("cat", "/var/log/flannel/flanneld.INFO")


def test_enable_makes_the_links_its_install_section_asks_for(unit):
    unit.ok("systemctl", "enable", "flanneld")
    assert unit.ok("systemctl", "is-enabled", "flanneld") == "enabled\n"
    for link in ("multi-user.target.wants", "docker.service.requires"):
        target = unit.ok("readlink", f"/etc/systemd/system/{link}/flanneld.service")
        assert target.endswith("/systemd/system/flanneld.service\n")


def test_start_returns_with_the_files_the_note_shows_and_status_tells_the_network(unit):
    unit.ok("rm", "-rf", "/run/flannel")
    unit.ok("systemctl", "start", "flanneld")
    assert unit.text("run/flannel/subnet.env") == SUBNET_ENV
    assert unit.text("run/flannel/docker") == DOCKER
    status = unit.ok("systemctl", "status", "--no-pager", "flanneld")
    assert "Active: active (running)" in status
    assert 'Status: "network=172.17.0.0/16 subnet=172.17.41.0/24 backend=udp' in status
    # The log is where the note's options want it; the journal has what systemd says.
    assert re.search(
        r"^I\d{4} .*\] ready +network=172.17.0.0/16 subnet=172.17.41.0/24", _log(unit), re.MULTILINE
    )
    assert "Started flanneld.service" in unit.journal("flanneld")
    assert json.loads(etcdctl(unit, "get", f"{PREFIX}/subnets/172.17.41.0-24")) == json.loads(LEASE)


def test_it_is_not_ready_while_subnet_env_cannot_be_written(unit):
    unit.ok("rm", "-rf", "/run/flannel")
    unit.ok("mkdir", "/run/flannel")
    # Not a byte and not a name more.
    unit.ok("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs", "/run/flannel")
    try:
        unit.ok("dd", "if=/dev/zero", "of=/run/flannel/full", "bs=4k", "count=1")
        since = unit.show("flanneld", "ActiveEnterTimestampMonotonic")
        assert unit.run("systemctl", "start", "flanneld").code != 0
        until(lambda: int(unit.show("flanneld", "NRestarts")) >= 1, seconds=60)
        assert unit.show("flanneld", "ActiveEnterTimestampMonotonic") == since
        assert "cannot write /run/flannel/subnet.env: No space left on device" in unit.journal("flanneld")
    finally:
        unit.ok("umount", "/run/flannel")
    until(lambda: _state(unit) == "active", seconds=60)
    assert unit.text("run/flannel/subnet.env") == SUBNET_ENV


def test_stop_is_quick_and_leaves_device_files_and_lease_and_a_start_goes_on_with_them(unit):
    unit.ok("systemctl", "start", "flanneld")
    began = time.monotonic()
    unit.ok("systemctl", "stop", "flanneld")
    assert time.monotonic() - began < 5
    assert _state(unit) == "inactive"
    assert unit.show("flanneld", "Result") == "success"
    assert unit.show("flanneld", "ExecMainStatus") == "0"
    assert unit.text("run/flannel/subnet.env") == SUBNET_ENV
    link = unit.ok("cat", "/sys/class/net/flannel0/ifindex")
    assert etcdctl(unit, "ls", f"{PREFIX}/subnets") == f"{PREFIX}/subnets/172.17.41.0-24\n"
    unit.ok("systemctl", "start", "flanneld")
    assert unit.ok("cat", "/sys/class/net/flannel0/ifindex") == link
    assert "lease 172.17.41.0/24 kept" in _log(unit)


def test_docker_takes_the_note_s_options(unit):
    unit.ok("systemctl", "start", "flanneld")
    unit.ok("systemctl", "restart", "docker")
    words = unit.ok("ps", "-o", "args=", "-p", _pid(unit, "docker"))
    assert words == f"/usr/bin/dockerd {OPTIONS}\n"
    assert "inet 172.17.41.1/24" in unit.ok("ip", "address", "show", "docker0")


def test_not_enabled_a_crash_is_mended_by_systemd_and_docker_hears_nothing(unit):
    unit.ok("systemctl", "start", "flanneld", "docker")
    before, docker = _pid(unit), _pid(unit, "docker")
    link = unit.ok("cat", "/sys/class/net/flannel0/ifindex")
    unit.ok("kill", "-9", before)
    until(lambda: unit.show("flanneld", "NRestarts") == "1" and _state(unit) == "active", seconds=60)
    assert _pid(unit) not in {before, "0"}
    assert unit.ok("cat", "/sys/class/net/flannel0/ifindex") == link
    assert unit.text("run/flannel/subnet.env") == SUBNET_ENV
    assert "status=9/KILL" in unit.journal("flanneld")
    unit.ok("systemctl", "restart", "flanneld")
    assert _pid(unit, "docker") == docker


def test_enabled_as_the_note_has_it_each_restart_and_crash_restarts_docker(unit):
    """RequiredBy=docker.service, its cost: docs/from-flannel.md names it."""
    unit.ok("systemctl", "enable", "flanneld")
    unit.ok("systemctl", "start", "docker")
    assert _state(unit) == "active", "docker.service requires it"
    docker = _pid(unit, "docker")
    unit.ok("systemctl", "restart", "flanneld")
    until(
        lambda: _pid(unit, "docker") not in {docker, "0"} and _state(unit, "docker") == "active", seconds=60
    )
    docker = _pid(unit, "docker")
    unit.ok("kill", "-9", _pid(unit))
    until(
        lambda: _pid(unit, "docker") not in {docker, "0"} and _state(unit, "docker") == "active", seconds=60
    )
    assert _state(unit) == "active"


def test_reload_is_not_in_the_note_s_unit_but_hup_has_the_kernel_compared_at_once(unit):
    unit.ok("systemctl", "start", "flanneld")
    assert "not applicable" in unit.run("systemctl", "reload", "flanneld").err
    pid = _pid(unit)
    unit.ok("systemctl", "kill", "-s", "HUP", "flanneld")
    unit.ok("systemctl", "kill", "-s", "HUP", "flanneld")
    unit.ok("systemctl", "is-active", "flanneld")
    assert _pid(unit) == pid


def test_while_another_program_has_the_port_it_waits_says_so_and_changes_nothing(unit):
    """As a flanneld that was started by hand would; its own device apart: tests/netns/test_interop.py."""
    unit.ok("rm", "-rf", "/run/flannel")
    unit.run("ip", "link", "delete", "flannel0")
    holder = ("systemd-socket-activate", "--datagram", "--listen=192.168.6.2:8285", "cat")
    unit.ok("systemd-run", "--unit=other", *holder)
    try:
        until(lambda: ":205D " in unit.ok("cat", "/proc/net/udp"), seconds=20)  # 8285 as the kernel writes it
        unit.ok("systemctl", "start", "--no-block", "flanneld")
        until(lambda: "8285" in unit.show("flanneld", "StatusText"), seconds=60)
        assert _state(unit) == "activating"
        assert not (unit / "run/flannel/subnet.env").exists()
        assert unit.run("ip", "link", "show", "flannel0").code != 0
    finally:
        unit.ok("systemctl", "stop", "other")
    until(lambda: _state(unit) == "active", seconds=60)
    assert unit.text("run/flannel/subnet.env") == SUBNET_ENV


@pytest.fixture
def fresh(tree, tmp_path):
    """A node of a test's own, to be booted again; flanneld and docker enabled, etcd not, starts may take 6 s."""
    with new_node(tree, tmp_path) as machine:
        machine.ok("systemctl", "enable", "flanneld", "docker")
        machine.ok("systemctl", "disable", "etcd")
        machine.write("etc/systemd/system.conf.d/quick.conf", "[Manager]\nDefaultTimeoutStartSec=6s\n")
        yield machine


def test_at_boot_docker_waits_for_flanneld_and_flanneld_for_etcd_longer_than_a_start_may_take(fresh):
    fresh.power_off()
    fresh.boot()
    until(lambda: fresh.show("flanneld", "StatusText").startswith("waiting for"), seconds=60)
    assert "/jxdd/network/config" in fresh.show("flanneld", "StatusText")

    def age():
        now = float(fresh.text("proc/uptime").split()[0])
        return now - int(fresh.show("flanneld", "ExecMainStartTimestampMonotonic")) / 1e6

    until(lambda: age() > 12, seconds=60)
    assert _state(fresh) == "activating"
    assert fresh.show("flanneld", "NRestarts") == "0"
    assert _state(fresh, "docker") == "inactive"
    assert not (fresh / "run/flannel/subnet.env").exists()
    assert _log(fresh).count(" waiting: ") == 1
    fresh.ok("systemctl", "start", "etcd")
    until(lambda: _state(fresh, "docker") == "active", seconds=60)
    assert _state(fresh) == "active"
    assert fresh.ok("ps", "-o", "args=", "-p", _pid(fresh, "docker")) == f"/usr/bin/dockerd {OPTIONS}\n"
    ready = int(fresh.show("flanneld", "ActiveEnterTimestampMonotonic"))
    assert ready <= int(fresh.show("docker", "ExecMainStartTimestampMonotonic"))


def test_a_host_that_was_up_before_boots_without_etcd(fresh):
    """Where flanneld keeps docker waiting, what the agent knew last carries the packets."""
    fresh.ok("systemctl", "start", "flanneld")
    fresh.power_off()
    fresh.boot()
    until(lambda: _state(fresh, "docker") == "active", seconds=60)
    assert fresh.text("run/flannel/subnet.env") == SUBNET_ENV
    assert _state(fresh, "etcd") == "inactive"

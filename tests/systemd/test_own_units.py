"""flanctl's own units, installed by `flanctl install` on a host that never had flannel, under a systemd that runs."""

from __future__ import annotations

import json
import re
import shlex
from ipaddress import IPv4Address, ip_interface
from pathlib import Path

import pytest

from flanctl.demo.hosts import Lab
from tests.support.deadline import until
from tests.support.systemd_machine import Machine
from tests.systemd.conftest import CONFIG, NEEDS, NETWORK, PREFIX, etcd, etcdctl

pytestmark = [pytest.mark.needs(*NEEDS), pytest.mark.timeout(300)]

PACKAGED = Path("packaging/systemd")
AGENT, FLANNELD = "flanctl-agent.service", "flanneld.service"
LEDGER = "/var/lib/flanctl/install/ledger.json"
SYSCONFIG = f"""FLANNEL_ETCD_ENDPOINTS="http://192.168.6.2:2379"
FLANNEL_ETCD_PREFIX="{PREFIX}"
FLANNEL_OPTIONS="--iface=eth0"
"""
# What both units have in the same words (tests/unit/test_packaging.py) one of them shows.
ONE = pytest.mark.parametrize("unit", [AGENT], indirect=True)


@pytest.fixture(scope="module")
def host(tree, tmp_path_factory):
    """Debian's docker.service, an etcd, /etc/sysconfig/flanneld; a restorecon that writes down what it is asked."""
    with (
        Lab("own", network=NETWORK) as lab,
        Machine(
            lab.add_host(address=IPv4Address("192.168.6.2")), tree, tmp_path_factory.mktemp("own") / "m"
        ) as machine,
    ):
        etcd(machine)
        machine.write("etc/sysconfig/flanneld", SYSCONFIG)
        machine.write("usr/sbin/restorecon", '#!/bin/sh\necho "$*" >>/relabelled\n', mode=0o755)
        machine.boot()
        machine.ok("systemctl", "enable", "--now", "etcd")
        etcdctl(machine, "set", f"{PREFIX}/config", CONFIG)
        yield machine


@pytest.fixture(scope="module", params=[AGENT, FLANNELD])
def unit(host, request):
    """Installed, enabled and started; taken back after its tests."""
    host.ok("flanctl", "install", "--yes", *(["--as-flanneld"] if request.param == FLANNELD else []))
    host.ok("systemctl", "enable", "--now", request.param)
    yield request.param
    host.run("systemctl", "disable", "--now", request.param, "docker", "docker.socket")
    host.ok("flanctl", "uninstall", "--yes")


def _pid(machine, unit):
    return machine.show(unit, "MainPID")


def _active(machine, unit):
    return machine.show(unit, "ActiveState") == "active"


def test_install_and_uninstall_on_a_running_host_leave_it_as_it_was(host):
    listing = (
        "find /etc /usr/bin /usr/libexec /usr/lib/systemd /var/lib/flanctl -printf '%p %y %m %l\\n' | sort"
    )
    before = host.run("sh", "-c", listing).out
    shown = json.loads(host.ok("flanctl", "install", "--as-flanneld", "--dry-run", "-w", "json"))
    assert [step["path"] for step in shown["steps"]] == [
        "/usr/bin/flanneld",
        "/usr/bin/flanneld-start",
        "/usr/libexec/flannel/mk-docker-opts.sh",
        "/etc/systemd/system/flanneld.service",
        "/etc/systemd/system/docker.service.d/flanctl.conf",
    ]
    host.run("rm", "/relabelled")
    host.ok("flanctl", "install", "--as-flanneld", "--yes")
    assert host.text("relabelled").splitlines() == [f"-F {step['path']}" for step in shown["steps"]]
    # systemd has read them: daemon-reload was part of it.
    assert host.show(FLANNELD, "LoadState") == "loaded"
    assert host.show(FLANNELD, "NeedDaemonReload") == "no"
    assert "flanneld.service" in host.show("docker", "Wants")
    assert host.ok("flanneld", "--version") == ""
    again = host.run("flanctl", "install", "--as-flanneld", "--yes")
    assert (again.code, again.err) == (0, "nothing to change: everything is in its place\n")
    host.ok("flanctl", "uninstall", "--yes")
    assert host.run("sh", "-c", listing).out == before
    assert host.show(FLANNELD, "LoadState") == "not-found"


def test_the_one_file_from_a_home_folder_copies_itself_and_uninstall_takes_even_that_away(host):
    host.ok("mv", "/usr/bin/flanctl", "/root/flanctl")
    try:
        host.ok("/root/flanctl", "install", "--as-flanneld", "--yes")
        host.ok("cmp", "/root/flanctl", "/usr/bin/flanctl")
        # As the program it is about to remove.
        host.ok("flanctl", "uninstall", "--yes")
        assert host.run("ls", "/usr/bin/flanctl", "/usr/bin/flanneld", "/var/lib/flanctl/install").out == ""
    finally:
        host.ok("mv", "/root/flanctl", "/usr/bin/flanctl")


def test_who_is_not_root_is_told_before_anything_changes(host):
    before = host.ok("find", "/etc", "/usr/bin", "/var/lib")
    for command in ("install", "uninstall"):
        done = host.run(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "flanctl", command, "--yes"
        )
        said = "no right to write in /usr" if command == "install" else "no install is recorded here"
        assert said in done.err
        assert done.code == (7 if command == "install" else 0)
    assert host.ok("find", "/etc", "/usr/bin", "/var/lib") == before


def test_killed_install_goes_on_and_killed_uninstall_goes_back(host):
    """The whole program, ended by SIGKILL while it works; the moments one by one: tests/unit/install."""
    host.write("usr/bin/flanneld", "flannel's own", mode=0o755)
    for command, moment in (
        ("flanctl install --as-flanneld --yes", f"-e {LEDGER}"),
        ("flanctl uninstall --yes", f"! -e /etc/systemd/system/{FLANNELD}"),
    ):
        script = f"{command} & p=$!; while ! [ {moment} ] && kill -0 $p; do :; done; kill -9 $p; wait $p"
        host.run("sh", "-c", script)
        host.ok("flanctl", "install", "--as-flanneld", "--yes")
        assert host.ok("readlink", "/usr/bin/flanneld") == "/usr/bin/flanctl\n"
    host.ok("flanctl", "uninstall", "--yes")
    assert host.text("usr/bin/flanneld") == "flannel's own"
    assert host.run("ls", LEDGER).code != 0
    host.ok("rm", "/usr/bin/flanneld")


def test_the_hardened_agent_is_ready_carries_docker_and_says_so(host, unit):
    assert _active(host, unit)
    assert "subnet=172.17." in host.show(unit, "StatusText")
    status = host.ok("cat", f"/proc/{_pid(host, unit)}/status")
    assert int(re.search(r"CapBnd:\s*(\w+)", status)[1], 16).bit_count() == 7
    assert re.search(r"NoNewPrivs:\s*1", status)
    assert re.search(r"Seccomp:\s*2", status)
    assert "FLANNEL-FWD" in host.ok("iptables-save")
    assert re.search(r"^\S+ .* ready +network=", host.journal(unit), re.MULTILINE)
    # What it must not: see others' folders, write the system, open a device, load code it has written.
    inside = host.ok("cat", f"/proc/{_pid(host, unit)}/mountinfo")
    assert re.search(r" / / ro[, ]", inside) or re.search(r" / ro,", inside)
    host.ok("systemctl", "start", "docker")
    assert f"inet {_bip(host)}" in host.ok("ip", "address", "show", "docker0")
    assert f"--bip={_bip(host)}" in host.ok("ps", "-o", "args=", "-p", _pid(host, "docker"))


def test_a_restart_and_a_crash_of_the_agent_leave_docker_alone(host, unit):
    host.ok("systemctl", "start", "docker")
    docker = _pid(host, "docker")
    host.ok("systemctl", "restart", unit)
    host.ok("kill", "-9", _pid(host, unit))
    until(lambda: host.show(unit, "NRestarts") == "1" and _active(host, unit), seconds=60)
    assert _pid(host, "docker") == docker
    assert _active(host, "docker")


def test_other_options_restart_docker_once(host, unit):
    host.ok("systemctl", "start", "docker")
    docker = _pid(host, "docker")
    host.host.set_mtu(1400)
    try:
        host.ok("systemctl", "restart", unit)
        until(lambda: _pid(host, "docker") not in {docker, "0"} and _active(host, "docker"), seconds=60)
        assert "--mtu=1372" in host.ok("ps", "-o", "args=", "-p", _pid(host, "docker"))
        docker = _pid(host, "docker")
        host.ok("systemctl", "restart", unit)
        assert _pid(host, "docker") == docker
        assert "docker.service is restarted" in host.journal(unit)
    finally:
        host.host.set_mtu(1500)


@ONE
def test_when_another_host_takes_the_subnet_the_agent_takes_a_new_one_and_docker_moves_along(host, unit):
    host.ok("systemctl", "start", "docker")
    docker, lost = _pid(host, "docker"), _bip(host)
    key = str(ip_interface(lost).network).replace("/", "-")
    etcdctl(host, "set", "--ttl", "86400", f"{PREFIX}/subnets/{key}", '{"PublicIP":"192.168.6.77"}')
    until(lambda: _pid(host, "docker") not in {docker, "0"} and _active(host, "docker"), seconds=60)
    assert "status=8" in host.journal(unit)
    assert _active(host, unit)
    assert _bip(host) != lost
    assert f"--bip={_bip(host)}" in host.ok("ps", "-o", "args=", "-p", _pid(host, "docker"))
    assert f"inet {_bip(host)}" in host.ok("ip", "address", "show", "docker0")


def _bip(machine):
    """docker0's address as docker is told it."""
    return re.search(r'BIP="--bip=(\S+)"', machine.text("run/flannel/docker"))[1]


@ONE
@pytest.mark.parametrize("path", ["tc", "tun-plain"])
def test_the_hardened_agent_has_what_every_data_path_needs(host, unit, path):
    if path == "tc":
        # systemd mounts it on a host; in a container there is no folder for it.
        host.ok(
            "sh", "-c", "mount -o remount,rw /sys && mkdir -p /sys/fs/bpf && mount -t bpf bpf /sys/fs/bpf"
        )
    host.write(f"run/systemd/system/{unit}.d/path.conf", f"[Service]\nEnvironment=FLANCTL_DATA_PATH={path}\n")
    host.ok("systemctl", "daemon-reload")
    try:
        host.ok("systemctl", "restart", unit)
        shown = host.show(unit, "StatusText")
        assert f"data-path={'kernel' if path == 'tc' else 'userspace'}" in shown, host.journal(unit)
    finally:
        host.ok("rm", "-r", f"/run/systemd/system/{unit}.d")
        host.ok("systemctl", "daemon-reload")


@ONE
def test_reload_has_the_kernel_compared_at_once(host, unit):
    host.write(
        f"run/systemd/system/{unit}.d/slow.conf", "[Service]\nEnvironment=FLANCTL_IPTABLES_RESYNC=1h\n"
    )
    host.ok("systemctl", "daemon-reload")
    try:
        host.ok("systemctl", "restart", unit)
        pid = _pid(host, unit)
        host.ok("iptables", "-D", "FORWARD", *_jump(host))
        assert not _jump(host)
        host.ok("systemctl", "reload", unit)
        until(lambda: _jump(host), seconds=20)
        assert _pid(host, unit) == pid
    finally:
        host.ok("rm", "-r", f"/run/systemd/system/{unit}.d")
        host.ok("systemctl", "daemon-reload")


def _jump(machine):
    """The words of the rule that leads from FORWARD to flannel's chain, none if it is not there."""
    rules = machine.ok("iptables", "-S", "FORWARD").splitlines()
    return next((shlex.split(line)[2:] for line in rules if "FLANNEL-FWD" in line), [])


@ONE
def test_an_agent_that_hangs_is_ended_by_the_watchdog_and_started_again(host, unit):
    host.write(f"run/systemd/system/{unit}.d/watch.conf", "[Service]\nWatchdogSec=3\n")
    host.ok("systemctl", "daemon-reload")
    try:
        host.ok("systemctl", "restart", unit)
        pid = _pid(host, unit)
        subnet = host.text("run/flannel/subnet.env")
        host.ok("kill", "-STOP", pid)
        until(lambda: _pid(host, unit) not in {pid, "0"} and _active(host, unit), seconds=60)
        assert "Watchdog timeout" in host.journal(unit)
        assert host.text("run/flannel/subnet.env") == subnet
    finally:
        host.ok("rm", "-r", f"/run/systemd/system/{unit}.d")
        host.ok("systemctl", "daemon-reload")


@ONE
def test_a_wrong_option_is_not_tried_again(host, unit):
    host.write(f"run/systemd/system/{unit}.d/wrong.conf", "[Service]\nEnvironment=FLANCTL_PEER_CHECK=maybe\n")
    host.ok("systemctl", "daemon-reload")
    try:
        assert host.run("systemctl", "restart", unit).code != 0
        until(lambda: host.show(unit, "ActiveState") == "failed", seconds=20)
        assert host.show(unit, "ExecMainStatus") == "2"
        assert host.show(unit, "NRestarts") == "0"
        assert "maybe" in host.journal(unit)
    finally:
        host.ok("rm", "-r", f"/run/systemd/system/{unit}.d")
        host.ok("systemctl", "daemon-reload")
        host.ok("systemctl", "reset-failed", unit)


def test_starting_one_unit_ends_the_other(host):
    """A package has brought the one, an install the other. Docker, whose drop-in wants the other, is not there."""
    host.run("systemctl", "stop", "docker", "docker.socket")
    host.write(f"usr/lib/systemd/system/{AGENT}", (PACKAGED / AGENT).read_text())
    host.ok("flanctl", "install", "--as-flanneld", "--yes")
    try:
        for starts, ends in ((AGENT, FLANNELD), (FLANNELD, AGENT), (AGENT, FLANNELD)):
            host.ok("systemctl", "start", starts)
            assert (_active(host, starts), _active(host, ends)) == (True, False)
        host.ok("systemctl", "enable", AGENT)
        assert f"{AGENT} is enabled" in host.run("flanctl", "install", "--as-flanneld", "--yes").err
    finally:
        host.run("systemctl", "disable", "--now", AGENT, FLANNELD)
        host.ok("flanctl", "uninstall", "--yes")
        host.ok("rm", f"/usr/lib/systemd/system/{AGENT}")


def test_systemd_judges_the_exposure_as_the_docs_say(host):
    host.ok("flanctl", "install", "--yes")
    try:
        judged = host.ok("systemd-analyze", "security", "--no-pager", AGENT)
        assert "Overall exposure level for flanctl-agent.service: 3.6 OK" in judged
    finally:
        host.ok("flanctl", "uninstall", "--yes")

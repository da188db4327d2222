"""The agent seen from outside, on real hosts with a real etcd: what it says while things break and mend.

h1 ─ 192.168.66.11 ─┐          each with an agent (own process), docker0 and a container
h2 ─ 192.168.66.12 ─┼─ under0
etcd ─ .13 ─────────┘
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import FLANCTL, RunningAgent, environment, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.demo.hosts import Container, Host

pytestmark = [
    pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34", "ping"),
    pytest.mark.timeout(240),
]
PORT = 8086
MTU = 1472
SUBNETS = "/jxdd/network/subnets/"


@dataclass
class Member:
    host: Host
    agent: RunningAgent
    container: Container

    def get(self, path: str) -> tuple[int, str]:
        """What the health port answers, asked on the host itself."""
        with inside(self.host.path):
            channel = socket.create_connection(("127.0.0.1", PORT), 10)
        with closing(channel):
            channel.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            reply = b"".join(iter(lambda: channel.recv(65536), b""))
        head, _, body = reply.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    def metric(self, name: str) -> float:
        found = re.search(rf"(?m)^{re.escape(name)} (\S+)$", self.get("/metrics")[1])
        assert found, name
        return float(found[1])

    def status(self, *words: str) -> tuple[int, str]:
        folder = self.agent.folder
        done = flanctl(
            self.host, self.agent.endpoints, "status", "--run-dir", f"{folder}/run",
            "--subnet-file", f"{folder}/subnet.env", *words, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout


@dataclass
class Net:
    one: Member
    two: Member
    etcd: Cluster


def start(host: Host, folder: Path, endpoints: str, **more: str) -> RunningAgent:
    return RunningAgent.start(
        host, folder / host.name, endpoints, "--iface", "eth0", "--healthz-port", str(PORT), "--timeout", "2", **more
    )  # fmt: skip


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with Lab("status") as lab:
        one, two, registry = lab.add_host(), lab.add_host(), lab.add_host("etcd")
        with Cluster(
            "3.4", folder=tmp_path / "etcd", host=str(registry.address), prefix=registry.command([])
        ) as etcd:
            endpoints = ",".join(etcd.endpoints)
            flanctl(one, endpoints, "net", "init", "--network", "172.17.0.0/16")
            members = []
            for host in (one, two):
                agent = start(host, tmp_path, endpoints).wait()
                members.append(Member(host, agent, host.add_container(agent.gateway, MTU)))
            members[0].agent.wait_log(r"(?m) peers=1$")
            yield Net(*members, etcd)
    assert lab.leftovers() == ()


def pings(net: Net, seconds: float) -> subprocess.Popen[Any]:
    """Container to container every 50 ms; to be waited for."""
    return net.one.container.popen(
        ["ping", "-n", "-i", "0.05", "-w", f"{seconds:.0f}", str(net.two.container.address)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_waiting_for_the_config_is_alive_and_not_ready_until_it_is_there(tmp_path: Path) -> None:
    """flannel.md 11, row 23: there, health is always 200."""
    with Lab("waits") as lab:
        host = lab.add_host()
        endpoints = f"sqlite:{tmp_path / 'registry.db'}"
        agent = start(host, tmp_path, endpoints)
        agent.wait_log("waiting: no network config")
        member = Member(host, agent, None)  # type: ignore[arg-type]
        assert member.get("/healthz") == (200, "ok\n")
        code, body = member.get("/readyz")
        assert code == 503
        assert body.startswith("no-lease: no network config at /jxdd/network/config\n")
        code, text = member.status()
        assert code == 1
        assert "[no-config]" in text
        flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16")
        agent.wait()
        until(lambda: member.get("/readyz") == (200, "ready\n"), what=member.get("/readyz"))
        assert member.status()[0] == 0
        assert agent.terminate() == 0


def test_packets_move_the_counters_and_strangers_are_counted(net: Net) -> None:
    """flannel.md 11, row 23: drops have reasons and numbers."""

    def packets() -> list[float]:
        """Out and in, whichever path they took."""
        return [
            sum(
                net.one.metric(f'flanctl_packets_total{{direction="{way}",path="{path}"}}')
                for path in ("userspace", "kernel")
            )
            for way in ("out", "in")
        ]

    before = packets()
    assert pings(net, 1).wait() == 0
    until(lambda: all(now >= was + 10 for now, was in zip(packets(), before, strict=True)))
    dropped = 'flanctl_dropped_packets_total{reason="unknown_sender",path="kernel"}'
    with inside(net.one.host.lab.hosts[2].path):
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(stranger):
        stranger.sendto(b"\x45" + b"\0" * 40, (str(net.one.host.address), 8285))
        until(lambda: net.one.metric(dropped) == 1)
    until(lambda: net.one.metric('flanctl_peers{runs="flanctl"}') == 1)
    assert "1 known, all flanctl" in net.one.status()[1]
    until(lambda: "1 dropped in the last" in net.one.status()[1], seconds=30)


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_without_etcd_status_ends_with_3_and_every_packet_arrives(net: Net, how: str) -> None:
    assert net.one.status()[0] == 0
    flow = pings(net, 40)
    net.etcd.freeze(0) if how == "frozen" else net.etcd.kill(0)
    until(lambda: net.one.status("--brief") == (3, "fail registry-unreachable\n"), seconds=40)
    code, text = net.one.status()
    assert code == 3
    assert " degraded " in text.splitlines()[0]
    assert "packets flow until peers see it expire" in text
    assert net.one.get("/readyz") == (200, "ready\n")
    assert net.one.get("/healthz") == (200, "ok\n")
    assert net.one.metric('flanctl_problem{id="registry-unreachable",severity="fail"}') == 1
    net.etcd.thaw(0) if how == "frozen" else net.etcd.restart(0)
    until(lambda: net.one.status()[0] == 0, seconds=60, what=net.one.status)
    flow.send_signal(signal.SIGINT)
    out, _ = flow.communicate(timeout=60)
    assert " 0% packet loss" in out, out


def test_a_killed_agent_is_said_to_be_gone_and_what_is_still_known(net: Net) -> None:
    subnet = net.one.agent.subnet
    net.one.agent.kill()
    code, text = net.one.status()
    assert code == 4
    assert "[agent-missing]" in text
    assert f"lease      {subnet} of {net.one.host.address} is in etcd" in text
    assert "no process holds it: no packet passes" in text
    shown = json.loads(net.one.status("-w", "json")[1])
    assert shown["local"]["registry_lease"]["subnet"] == str(subnet)
    net.one.agent = net.one.agent.again().wait()
    until(lambda: net.one.status()[0] == 0)


def test_a_frozen_agent_is_silent_not_missing(net: Net) -> None:
    net.one.agent.process.send_signal(signal.SIGSTOP)
    try:
        code, text = net.one.status()
        assert code == 1
        assert f"(pid {net.one.agent.pid})   [agent-silent]" in text
    finally:
        net.one.agent.process.send_signal(signal.SIGCONT)
    until(lambda: net.one.status()[0] == 0)


def test_a_lease_that_another_host_took_ends_with_8_and_status_says_so(net: Net) -> None:
    name = str(net.one.agent.subnet).replace("/", "-")
    net.etcd.etcdctl("put", SUBNETS + name, '{"PublicIP":"192.168.66.77"}')
    assert net.one.agent.wait_end() == 8
    code, text = net.one.status()
    assert code == 8
    assert f"lease {net.one.agent.subnet} belongs to 192.168.66.77" in text
    assert net.one.status("--brief")[1] == "fail lease-foreign\n"


def test_a_deleted_device_is_repaired_and_counted(net: Net) -> None:
    repairs = 'flanctl_kernel_repairs_total{kind="link"}'
    before = net.one.metric(repairs)
    net.one.host.run(["ip", "link", "delete", "flannel0"])
    until(lambda: net.one.metric(repairs) > before, seconds=20)
    until(lambda: net.one.status()[0] == 0, seconds=20)


def test_docker0_with_another_address_is_a_warning(net: Net) -> None:
    assert net.one.metric("flanctl_docker_bridge_matches") == 1
    net.one.host.run(["ip", "addr", "flush", "dev", "docker0"])
    net.one.host.run(["ip", "addr", "add", "172.18.0.1/16", "dev", "docker0"])
    until(lambda: net.one.metric("flanctl_docker_bridge_matches") == 0, seconds=20)
    code, text = net.one.status()
    assert code == 0
    assert "docker0 is 172.18.0.1/16, the lease wants" in text
    assert net.one.status("--strict")[0] == 1


def test_who_harasses_the_health_port_costs_no_packet_and_locks_nobody_out(net: Net) -> None:
    flow = pings(net, 4)
    channels = []
    with inside(net.two.host.path):
        for number in range(300):
            channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            channel.setblocking(False)
            channel.connect_ex((str(net.one.host.address), PORT))
            channels.append((number, channel))
    try:
        until(lambda: len([c for _, c in channels if sent(c)]) > 200, seconds=10, fail=False)
        assert net.one.status()[0] == 0, "over the unix socket"
        assert net.one.get("/healthz") == (200, "ok\n")
        assert net.one.get("/readyz") == (200, "ready\n")
    finally:
        for _, channel in channels:
            channel.close()
    out, _ = flow.communicate(timeout=60)
    assert " 0% packet loss" in out, out


def sent(channel: socket.socket) -> bool:
    try:
        return channel.send(b"G") == 1
    except OSError:
        return False


def test_systemd_hears_that_the_loop_turns_and_nothing_from_a_frozen_process(tmp_path: Path) -> None:
    with Lab("watchdog") as lab, closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        path = tmp_path / "notify"
        systemd.bind(str(path))
        systemd.settimeout(20)
        host = lab.add_host()
        endpoints = f"sqlite:{tmp_path / 'registry.db'}"
        agent = start(host, tmp_path, endpoints, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="600000")
        assert systemd.recv(4096).startswith(b"STATUS=asking the registry at sqlite:")
        waiting = systemd.recv(4096).decode()
        assert waiting.startswith("STATUS=waiting for /jxdd/network/config (0m): no network config")
        assert "\nEXTEND_TIMEOUT_USEC=65000000" in waiting
        flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16")
        while not systemd.recv(4096).startswith(b"READY=1\n"):
            pass
        began = time.monotonic()
        for _ in range(5):
            assert systemd.recv(4096) == b"WATCHDOG=1"
        assert time.monotonic() - began < 5 * 0.6
        agent.process.send_signal(signal.SIGSTOP)
        systemd.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                systemd.recv(4096)
        with pytest.raises(TimeoutError):
            systemd.recv(4096)
        agent.process.send_signal(signal.SIGCONT)
        systemd.settimeout(20)
        assert systemd.recv(4096) == b"WATCHDOG=1"
        assert agent.terminate() == 0


def test_a_port_that_is_taken_is_refused_by_check_and_named(net: Net) -> None:
    done = net.one.host.run(
        [*FLANCTL, "agent", "--check", "--healthz-port", str(PORT), "--run-dir", str(net.one.agent.folder / "other")],
        env=environment(net.one.agent.endpoints),
        check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert f"cannot listen on 0.0.0.0:{PORT}: Address already in use" in done.stderr

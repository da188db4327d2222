"""What an agent is told in confidence shows nowhere: log, process list, status, metrics, files, errors."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.etcd import Cluster
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.demo.hosts import Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34")

SECRET = "hunter2hunter2"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Lab("secret") as lab:
        yield lab.add_host()
    assert lab.leftovers() == ()


def ask_for_logins(cluster: Cluster) -> None:
    for words in (
        "user add root:r00t",
        "user grant-role root root",
        "role add flannel",
        "role grant-permission flannel --prefix=true readwrite /jxdd/network/",
        f"user add flanctl:{SECRET}",
        "user grant-role flanctl flannel",
        "auth enable",
    ):
        cluster.etcdctl(*words.split())
    cluster.user = "root:r00t"


@pytest.mark.parametrize("name", ["flanctl", "flanneld"])
def test_no_secret_is_seen_from_outside(host: Host, tmp_path: Path, name: str) -> None:
    """flannel.md 11, row 30: there, the log's first line has the password, and files are everybody's to read."""
    password_file = tmp_path / "password"
    password_file.write_text(f"{SECRET}\n")
    password_file.chmod(0o600)
    with Cluster("3.4", folder=tmp_path / "etcd", prefix=host.command([])) as cluster:
        endpoints = cluster.endpoints[0]
        flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16")
        ask_for_logins(cluster)
        told = {"FLANCTL_USER": "flanctl", "FLANCTL_PASSWORD_FILE": str(password_file)}
        options = ["--iface", "eth0", "--healthz-port", "8900", "--healthz-ip", "127.0.0.1"]
        if name == "flanneld":
            options += ["--etcd-endpoints", endpoints, "--etcd-prefix", "/jxdd/network", "-v", "10"]
        agent = RunningAgent.start(host, tmp_path / "agent", endpoints, *options, name=name, **told)
        agent.wait_ready()

        seen = {
            "log": agent.log_text(),
            "process list": Path(f"/proc/{agent.pid}/cmdline").read_text(),
            "status": flanctl(
                host, endpoints, "status", "--run-dir", str(agent.folder / "run"), "-w", "json", check=False
            ).stdout,
        }
        with inside(host.path):
            for path in ("status", "metrics", "readyz"):
                with urllib.request.urlopen(f"http://127.0.0.1:8900/{path}", timeout=10) as answer:
                    seen[path] = answer.read().decode()
        for file in (agent.folder / "state").iterdir():
            seen[str(file)] = file.read_text()
            assert os.stat(file).st_mode & 0o077 == 0, f"{file} is not its owner's alone"
        wrong = flanctl(
            host, endpoints, "subnets", "ls", "--user", f"flanctl:{SECRET}x", "--debug", check=False
        )
        assert wrong.returncode == 7, wrong.stderr
        seen["an error"] = wrong.stdout + wrong.stderr
        assert agent.terminate() == 0
        seen["log at the end"] = agent.log_text()
    for place, text in seen.items():
        assert text
        assert SECRET not in text, place

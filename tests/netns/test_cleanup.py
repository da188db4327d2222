"""`flanctl cleanup`: after an agent's life the host is as it was before, and what is somebody else's stays.

host of a lab ── agent, flannel0, rules; docker0, so that the accept rules are there too
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import CompletedProcess

    from flanctl.demo.hosts import Host

pytestmark = [pytest.mark.needs("root", "netns", "tun", "iptables"), pytest.mark.timeout(120)]


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab("cleanup") as lab:
        made = lab.add_host()
        made.ip_batch("link add docker0 type bridge")
        # Somebody else's: a rule among ours, a chain Docker jumps to, a route.
        made.run(["sh", "-c", "iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER"])
        made.run(["sh", "-c", "iptables -A DOCKER-USER -s 10.9.0.0/16 -j RETURN"])
        made.ip_batch("route add 10.8.0.0/16 via 192.168.66.1")
        yield made


def machine(host: Host) -> dict[str, str]:
    """Links, routes and rules."""
    rules = host.run(["sh", "-c", "for t in raw mangle nat filter; do iptables -t $t -S; done"]).stdout
    links = [link["ifname"] for link in json.loads(host.run(["ip", "-j", "link"]).stdout)]
    routes = host.run(["ip", "route"]).stdout.replace(" linkdown", "")
    return {"links": str(sorted(links)), "routes": routes, "rules": rules}


def start(host: Host, folder: Path) -> RunningAgent:
    endpoints = f"sqlite:{folder / 'registry.db'}"
    flanctl(host, endpoints, "net", "init", "--network", "172.17.0.0/16")
    agent = RunningAgent.start(host, folder / "agent", endpoints, "--ip-masq", "--iface", "eth0").wait()
    flanctl(host, "", "docker-opts", "-f", str(agent.subnet_file), "-d", str(agent.folder / "docker"))
    return agent


def cleanup(agent: RunningAgent, *words: str) -> CompletedProcess[str]:
    folder = agent.folder
    places = ("--subnet-file", str(agent.subnet_file), "--run-dir", str(folder / "run"))
    return flanctl(
        agent.host, "", "cleanup", *places, "--state-dir", str(folder / "state"), *words, check=False
    )


def test_the_host_is_as_before_the_agent(host: Host, tmp_path: Path) -> None:
    before = machine(host)
    agent = start(host, tmp_path)
    assert agent.terminate() == 0
    left = machine(host)
    assert left != before
    shown = cleanup(agent, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert {
        "ip link delete flannel0",
        f"rm {agent.subnet_file}",
        "iptables -t nat -X FLANNEL-POSTRTG",
    } <= set(shown.stdout.splitlines())
    assert machine(host) == left
    done = cleanup(agent, "--yes", "-w", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["changed"], [one["command"] for one in report["removed"]]) == (
        True,
        shown.stdout.splitlines(),
    )
    assert machine(host) == before
    # What is not the agent's (its log, here) keeps its folder.
    assert [path.name for path in agent.folder.iterdir()] == ["agent.log"]
    again = cleanup(agent, "--yes")
    assert (again.returncode, again.stdout) == (0, "")
    assert "nothing of an agent is on this host" in again.stderr


def test_a_host_with_a_running_agent_is_left_alone(host: Host, tmp_path: Path) -> None:
    agent = start(host, tmp_path)
    before = machine(host)
    for words in (["--yes"], ["--dry-run"]):
        done = cleanup(agent, *words)
        assert done.returncode == 5
        assert f"pid {agent.pid}" in done.stderr
    assert machine(host) == before
    assert agent.subnet_file.exists()


def test_another_run_directory_does_not_hide_a_running_agent(host: Host, tmp_path: Path) -> None:
    agent = start(host, tmp_path)
    done = cleanup(agent, "--run-dir", str(tmp_path), "--yes")
    assert (done.returncode, f"pid {agent.pid}" in done.stderr) == (5, True)


def test_without_a_terminal_it_wants_to_be_told(host: Host, tmp_path: Path) -> None:
    agent = start(host, tmp_path)
    agent.kill()
    before = machine(host)
    done = cleanup(agent)
    assert (done.returncode, "--yes" in done.stderr) == (2, True)
    assert machine(host) == before


def test_a_device_of_that_name_without_our_mark_stays(host: Host, tmp_path: Path) -> None:
    agent = start(host, tmp_path)
    agent.kill()
    host.ip_batch("link delete flannel0", "link add flannel0 type bridge")
    done = cleanup(agent, "--yes")
    assert done.returncode == 0, done.stderr
    assert "'flannel0'" in machine(host)["links"]


def test_a_step_that_fails_says_how_far_it_came_and_the_next_run_does_the_rest(
    host: Host, tmp_path: Path
) -> None:
    agent = start(host, tmp_path)
    agent.kill()
    stuck = agent.folder / "state" / "known.json"
    stuck.unlink()
    stuck.mkdir()
    done = cleanup(agent, "--yes")
    assert done.returncode != 0
    assert "steps are done" in done.stderr
    assert "Traceback" not in done.stderr
    stuck.rmdir()
    assert cleanup(agent, "--yes").returncode == 0
    assert not (agent.folder / "state").exists()

"""An hour under traffic: `make soak`. Memory, descriptors and threads of the frozen agents stay what they are.

Two hosts in user space and two in the kernel. Traffic is a UDP and a TCP stream between two containers of each, pings, and a registry that changes all the time: leases of other
hosts come and go, so that watches tell, routes change and the peer table is rebuilt. etcd restarts once.

Memory goes up and down by some MB with garbage and buffers: the high points of two stretches are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import wait_until_reachable
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster

SECONDS = float(os.environ.get("FLANCTL_SOAK_SECONDS", "3600"))
SETTLED = 0.2
"""The part of the time after which nothing may grow any more."""

PATHS = ("tun", "tun", "tc", "tc")
LEASES = 20
"""Of 172.17.200.0/24 and up, where the agents take none."""
CONFIG = '{"Network": "172.17.0.0/16", "SubnetMin": "172.17.100.0", "SubnetMax": "172.17.199.0"}'

pytestmark = [
    pytest.mark.soak,
    pytest.mark.needs("frozen", "root", "netns", "tun", "bpf", "iptables", "etcd34", "iperf3", "ping"),
    pytest.mark.timeout(SECONDS + 180),
]


def measure(pid):
    """Proportional memory in kB, descriptors, threads."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    status = Path(f"/proc/{pid}/status").read_text()
    threads = int(next(line.split()[1] for line in status.splitlines() if line.startswith("Threads:")))
    return {
        "rss": sizes["Rss"],
        "anonymous": sizes["Anonymous"],
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": threads,
    }


def high(series):
    """As high as it goes, but for one look in fifty: a program that is run just then has pipes."""
    return sorted(series)[(len(series) - 1) * 49 // 50]


def test_agents_under_traffic_stay_as_they_are(tmp_path):
    samples = []
    with contextlib.ExitStack() as stack, Lab("soak") as lab:
        registry, *hosts = (lab.add_host() for _ in range(1 + len(PATHS)))
        with Cluster(
            "3.4", folder=tmp_path / "etcd", host=str(registry.address), prefix=registry.command([])
        ) as cluster:
            endpoint = cluster.endpoints[0]
            flanctl(hosts[0], endpoint, "net", "init", "-", stdin=CONFIG)
            agents = [
                RunningAgent.start(host, tmp_path / host.name, endpoint, "--data-path", path).wait()
                for host, path in zip(hosts, PATHS, strict=True)
            ]
            boxes = [
                host.add_container(agent.gateway, 1472) for host, agent in zip(hosts, agents, strict=True)
            ]
            pairs = list(zip(boxes[::2], boxes[1::2], strict=True))
            length = str(int(SECONDS))
            streams = []
            for number, ((near, far), (port, options)) in enumerate(
                itertools.product(
                    pairs,
                    (
                        ("5201", ["-u", "-b", "20M", "-l", "1200"]),
                        ("5202", ["-b", "40M", "--bidir"]),
                    ),
                )
            ):
                address = far.address
                wait_until_reachable(near, address)
                server = tmp_path / f"server-{number}"
                far.popen(
                    ["iperf3", "-s", "-1", "-p", port, "--forceflush"],
                    stdout=stack.enter_context(server.open("wb")),
                )
                until(lambda server=server: "listening" in server.read_text())
                streams.append(
                    near.popen(
                        [
                            "iperf3",
                            "-c",
                            str(address),
                            "-p",
                            port,
                            "-t",
                            length,
                            "--connect-timeout",
                            "5000",
                            "-J",
                            *options,
                        ],
                        stdout=stack.enter_context((tmp_path / f"iperf-{number}").open("wb")),
                        stderr=subprocess.STDOUT,
                    )
                )
            began = time.monotonic()
            broken = False
            for number in itertools.count():
                passed = time.monotonic() - began
                if passed > SECONDS:
                    break
                if not broken and passed > SECONDS / 10:
                    cluster.restart(0)
                    broken = True
                for subnet in range(200, 200 + LEASES):
                    lease = json.dumps({"PublicIP": f"192.168.66.{50 + (subnet + number) % 100}"})
                    cluster.etcdctl("put", f"/jxdd/network/subnets/172.17.{subnet}.0-24", lease)
                # In user space, in the kernel, and from the one to the other.
                for near, far in (*pairs, (boxes[0], boxes[-1])):
                    ping = near.run(
                        ["ping", "-n", "-c", "5", "-i", "0.2", "-W", "5", str(far.address)], check=False
                    )
                    assert ping.returncode == 0, ping.stdout
                cluster.etcdctl("del", "--prefix", "/jxdd/network/subnets/172.17.2")
                samples.append((round(passed), [measure(agent.pid) for agent in agents]))
            for stream in streams:
                assert stream.wait(60) == 0
            for path in tmp_path.glob("iperf-*"):
                said = json.loads(path.read_text())
                assert "error" not in said, said["error"]
            assert all(agent.process.poll() is None for agent in agents)
            counters = [agent.counters() for agent in agents]
            for agent in agents:
                assert agent.terminate() == 0
    report = Path(".cache/soak.json")
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps({"seconds": SECONDS, "samples": samples, "counters": counters}, indent=1))
    assert counters[0].get("kernel-in-packets", 0) == 0
    assert counters[2]["kernel-in-packets"] > counters[2]["in-packets"] / 2, "in the kernel, as told"
    assert len(samples) >= 10
    settled = [sample for at, sample in samples if at >= SETTLED * SECONDS]
    half = len(settled) // 2
    for index in range(len(agents)):
        for what, slack in (("rss", 2048), ("anonymous", 2048), ("descriptors", 0), ("threads", 0)):
            series = [sample[index][what] for sample in settled]
            assert high(series[half:]) <= high(series[:half]) + slack, (f"agent {index}", what, series)

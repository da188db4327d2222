"""`python -m bench [--rounds N] [--seconds S]`: run all, write bench/results/, renew the table in docs/performance.md.

    h1 ─ eth0 ─┐                 raw      eth0 to eth0
               ├─ bridge         vxlan    a kernel VXLAN device on each, one peer
    h2 ─ eth0 ─┘                 flanctl  flannel0 of two agents (etcd as their registry)

All three are up at once; each round measures each of them once, in turn, so that a change of the machine's speed
meets all. Medians are quoted.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.report import renew_table
from bench.startup import FROZEN
from flanctl.demo.hosts import Host, Lab
from tests.support.agents import RunningAgent
from tests.support.etcd import Cluster

RESULTS = Path("bench/results")
NETWORK = "172.17.0.0/16"
FLANCTL = [sys.executable, "-m", "flanctl"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=2, help="of each iperf3 run, after 1 s of warm-up")
    chosen = parser.parse_args()
    # The agents are the frozen file's where there is one (`make freeze`), as operators run them.
    if FROZEN.exists():
        os.environ.setdefault("FLANCTL_EXE", str(FROZEN.absolute()))
    # As an installed program has it; an environment may keep Python from writing its bytecode.
    compileall.compile_dir("flanctl", quiet=1)
    folder = Path(tempfile.mkdtemp(prefix="flanctl-bench-"))
    try:
        result = measure(folder, chosen.rounds, chosen.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{result['when'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    table = renew_table(result)
    sys.stdout.write(table)
    sys.stderr.write(f"wrote {path} and docs/performance.md\n")
    return 0


def measure(folder: Path, rounds: int, seconds: int) -> dict[str, object]:
    with Lab("bench") as lab:
        one, two = lab.add_host(), lab.add_host()
        switch = str(lab.network.network_address + 1)
        with Cluster("3.4", folder=folder / "etcd", host=switch, prefix=lab.underlay.command([])) as etcd:
            url = ",".join(etcd.endpoints)
            one.run([*FLANCTL, "net", "init", "--network", NETWORK, "--endpoints", url])
            agents, ready = [], []
            for host in (one, two):
                agent, seconds_to_ready = started(host, folder / host.name, url)
                agents.append(agent)
                ready.append(seconds_to_ready)
            agents[0].wait_log("peer added")  # it was READY before the second host existed
            vxlan(one, two)
            paths = {
                "raw": (one.address, two.address),
                "vxlan": ("10.90.0.1", "10.90.0.2"),
                "flanctl": tuple(agent.ready["subnet"].partition("/")[0] for agent in agents),
            }
            samples: dict[str, dict[str, list[float]]] = {}
            for _ in range(rounds):
                for name, (source, target) in paths.items():
                    keep(samples, "tcp_gbit_per_second", name, tcp(one, two, source, target, seconds))
                    keep(
                        samples,
                        "packets_per_second_64_bytes",
                        name,
                        packets(one, two, source, target, seconds),
                    )
                    keep(samples, "round_trip_ms", name, round_trip(one, source, target))
            processes = start_up(one, url, rounds)
            idle = idle_cost(agents[0], 20.0)
            for _ in range(rounds):
                agents[1].terminate()
                agents[1], seconds_to_ready = started(two, folder / two.name, url)
                ready.append(seconds_to_ready)
            for agent in agents:
                agent.terminate()
    return {
        "schema": 1,
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "conditions": {
            "kernel": platform.release(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "agents": "frozen" if "FLANCTL_EXE" in os.environ else "venv",
            "rounds": rounds,
            "seconds": seconds,
            "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
            "underlay": "veth pairs on a bridge, MTU 1500, offloads as the kernel sets them",
            "etcd": "3.4, one member",
        },
        "samples": {what: dict(by.items()) for what, by in samples.items()},
        "processes": processes,
        "agent": {"ready_seconds": ready, **idle},
    }


def keep(samples: dict[str, dict[str, list[float]]], what: str, name: str, value: float) -> None:
    samples.setdefault(what, {}).setdefault(name, []).append(value)


def vxlan(one: Host, two: Host) -> None:
    for host, peer, address in ((one, two, "10.90.0.1/24"), (two, one, "10.90.0.2/24")):
        host.ip_batch(
            f"link add vx0 type vxlan id 7 remote {peer.address} dstport 4789 dev eth0",
            f"addr add {address} dev vx0",
            "link set vx0 up",
        )


def iperf(one: Host, two: Host, source: object, target: object, *options: str) -> dict[str, object]:
    """One client run against a fresh server, both bound to the path's addresses."""
    server = two.popen(
        ["iperf3", "-s", "-1", "-B", str(target), "--forceflush"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert server.stdout is not None
    while b"listening" not in server.stdout.readline():
        assert server.poll() is None, "iperf3 -s ended"
    done = one.run(["iperf3", "-c", str(target), "-B", str(source), "-J", *options], timeout=60)
    server.stdout.read()
    server.wait()
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def tcp(one: Host, two: Host, source: object, target: object, seconds: int) -> float:
    answer = iperf(one, two, source, target, "-t", str(seconds), "-O", "1")
    return answer["end"]["sum_received"]["bits_per_second"] / 1e9  # type: ignore[index,no-any-return]


def packets(one: Host, two: Host, source: object, target: object, seconds: int) -> float:
    """IPv4 packets of 64 bytes: 36 of payload; received per second at full offer."""
    answer = iperf(one, two, source, target, "-u", "-b", "0", "-l", "36", "-t", str(seconds))
    total = answer["end"]["sum"]  # type: ignore[index]
    return (total["packets"] - total["lost_packets"]) / total["seconds"]


def round_trip(one: Host, source: object, target: object) -> float:
    said = one.run(["ping", "-q", "-i", "0.01", "-c", "200", "-I", str(source), str(target)]).stdout
    return float(re.search(r"= [\d.]+/([\d.]+)/", said)[1])  # type: ignore[index]


def start_up(host: Host, url: str, rounds: int) -> dict[str, Any]:
    """Whole processes: bench/startup.py on the host."""
    answer = host.run([sys.executable, "-m", "bench.startup", url, str(max(rounds, 15))], timeout=600)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def started(host: Host, folder: Path, url: str) -> tuple[RunningAgent, float]:
    """An agent, and the seconds from exec to READY (the log line that goes with systemd's)."""
    began = time.monotonic()
    agent = RunningAgent.start(host, folder, url, "--iface", "eth0")
    agent.wait_ready()
    return agent, time.monotonic() - began


def idle_cost(agent: RunningAgent, seconds: float) -> dict[str, float]:
    """CPU of an agent with one peer and nothing to do, in percent of a core, and its memory."""
    pid = agent.pid
    tick = os.sysconf("SC_CLK_TCK")

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # utime, stime and those of ended children: iptables-save is ours too
        return sum(map(int, fields[11:15])) / tick

    began, before = time.monotonic(), used()
    time.sleep(seconds)
    busy = (used() - before) / (time.monotonic() - began) * 100
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "idle_cpu_percent": round(busy, 3),
        "resident_mb": round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1),  # type: ignore[index]
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
    }


if __name__ == "__main__":
    sys.exit(main())

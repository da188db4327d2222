"""`python -m bench`: measure side by side, write bench/results/, renew docs/performance.md and its plot.

All paths are up at once (bench/paths.py); each round measures every row (bench/rows.py) on each path once, in turn, so
that a change of the machine's speed meets all. Medians are quoted.
"""

from __future__ import annotations

import argparse
import compileall
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import paths as ways
from bench.compare import compared, last_committed
from bench.plots import PLOT, draw
from bench.report import render, renew_table
from bench.rows import OFFLOADS, ROWS
from bench.startup import FROZEN
from flanctl.demo.hosts import Host, Lab
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agents import RunningAgent

RESULTS = Path("bench/results")
FLANCTL = [sys.executable, "-m", "flanctl"]
KERNELS = ("raw", "hostgw", "vxlan", "plain")


def look_up() -> dict[str, Any]:
    """ns per look-up by number of peers: native/dataplane/examples/lookup.rs."""
    command = ["cargo", "run", "--release", "--quiet", "--locked", "--example", "lookup"]
    done = subprocess.run(command, cwd="native/dataplane", check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {"lookup": look_up}
"""Rows without paths: a name in the result, and what to put there. bench/report.py shows those it knows."""
OWN = ("processes", "agent", "restart")
"""What needs agents: whole commands and the agent's own figures on the path tun, restarts on every path of flanctl's."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    names = [row.name for row in ROWS] + list(EXTRAS) + list(OWN)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run, after 1 s of warm-up")
    parser.add_argument("--only", default="", metavar="ROWS", help=f"with commas, of {', '.join(names)}")
    parser.add_argument(
        "--paths", default=",".join((*KERNELS, *ways.FLANCTL)), help="with commas; %(default)s"
    )
    parser.add_argument(
        "--keep", default="", metavar="ROWS", help="not measured, but taken from the last result"
    )
    parser.add_argument(
        "--compare", action="store_true", help="with the last committed result; writes nothing"
    )
    chosen = parser.parse_args()
    kept = _words(chosen.keep)
    rows, wanted = _words(chosen.only) or [name for name in names if name not in kept], _words(chosen.paths)
    if unknown := {*rows, *kept} - set(names) | set(wanted) - {*KERNELS, *ways.FLANCTL}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    # The agents are the frozen file's where there is one (`make freeze`), as operators run them.
    if FROZEN.exists():
        os.environ.setdefault("FLANCTL_EXE", str(FROZEN.absolute()))
    # As an installed program has it; an environment may keep Python from writing its bytecode.
    compileall.compile_dir("flanctl", quiet=1)
    folder = Path(tempfile.mkdtemp(prefix="flanctl-bench-"))
    try:
        result = measure(folder, rows, wanted, chosen.rounds, chosen.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.compare:
        sys.stdout.write(compared(result, *last_committed()))
        return 0
    _, last = last_committed()
    of_row = {row.name: row.metrics for row in ROWS}
    for name in kept:
        if name in of_row:
            result["samples"] |= {one.name: last["samples"].get(one.name, {}) for one in of_row[name]}
        else:
            result[name] = last[name]
        result["conditions"].setdefault("kept", {})[name] = (
            last["conditions"].get("kept", {}).get(name, last["when"])
        )
    if chosen.only or wanted != [*KERNELS, *ways.FLANCTL]:
        sys.stdout.write(render(result))
        sys.stderr.write("a part of the rows: nothing was written\n")
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{result['when'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    PLOT.write_text(draw(result))
    sys.stdout.write(renew_table(result))
    sys.stderr.write(f"wrote {path}, {PLOT} and docs/performance.md\n")
    return 0


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def measure(folder: Path, rows: list[str], wanted: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """One whole run; see docs/performance.md for what its keys mean."""
    result: dict[str, Any] = {
        "schema": 2,
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "conditions": conditions(rounds, seconds),
        "samples": {},
    }
    stolen = processor_time()[1]
    began = time.monotonic()
    if {*rows} - {*EXTRAS}:
        with Lab("bench") as lab:
            switch = str(lab.network.network_address + 1)
            with Cluster("3.4", folder=folder / "etcd", host=switch, prefix=lab.underlay.command([])) as etcd:
                url = ",".join(etcd.endpoints)
                lab.underlay.run([*FLANCTL, "net", "init", "--network", ways.NETWORK, "--endpoints", url])
                paths, agents = ways.build(lab, wanted, folder, url)
                result["samples"] = in_turn(lab, paths, rows, rounds, seconds)
                result |= own(agents, rows, url, rounds)
                if "restart" in rows:
                    result["restart"] = restarts(paths, agents, rounds)
    lasted = (time.monotonic() - began) * (os.cpu_count() or 1)
    stolen = processor_time()[1] - stolen
    result["conditions"]["steal_percent"] = round(stolen / lasted * 100, 1)
    return result | {name: extra() for name, extra in EXTRAS.items() if name in rows}


def conditions(rounds: int, seconds: float) -> dict[str, Any]:
    before = processor_time()[0]
    time.sleep(1.0)
    busy = 1.0 - (processor_time()[0] - before) / (os.cpu_count() or 1)
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "agents": "frozen" if "FLANCTL_EXE" in os.environ else "venv",
        "rounds": rounds,
        "seconds": seconds,
        "underlay": "veth pairs on a bridge, MTU 1500",
        "offloads": OFFLOADS,
        "etcd": "3.4, one member",
        "busy_before_percent": round(max(busy, 0.0) * 100),
    }


def processor_time() -> tuple[float, float]:
    """Seconds of all processors together: idle, and taken by the machine's own host (steal)."""
    fields = [
        int(text) / os.sysconf("SC_CLK_TCK")
        for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    ]
    return fields[3] + fields[4], fields[7]


def in_turn(
    lab: Lab, paths: list[ways.Path], rows: list[str], rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """The samples, by metric and path."""
    samples: dict[str, dict[str, list[float]]] = {}
    chosen = [row for row in ROWS if row.name in rows]
    for number in range(rounds):
        for offloads, options in OFFLOADS.items():
            mine = [row for row in chosen if row.offloads == offloads]
            if mine:
                ways.set_offloads(lab, paths, *options.split())
            for row in mine:
                for path in paths:
                    if row.boxes and path.boxes is None:
                        continue
                    for metric, value in row.measure(path, seconds).items():
                        samples.setdefault(metric, {}).setdefault(path.name, []).append(value)
        sys.stderr.write(f"round {number + 1} of {rounds}\n")
    return samples


def own(agents: dict[str, RunningAgent], rows: list[str], url: str, rounds: int) -> dict[str, Any]:
    """Whole commands and the agent itself, on the hosts of the path tun."""
    found: dict[str, Any] = {}
    if not agents:
        return found
    first, second = list(agents.values())[:2]
    if "processes" in rows:
        found["processes"] = start_up(first.host, url, rounds)
    if "agent" in rows:
        idle = idle_cost(first, 20.0)
        ready = []
        for _ in range(rounds):
            second.terminate()
            began = time.monotonic()
            second = second.again().wait()
            ready.append(time.monotonic() - began)
        found["agent"] = {"ready_seconds": ready, **idle}
    return found


def restarts(
    paths: list[ways.Path], agents: dict[str, RunningAgent], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds between two answered pings, one sent every 5 ms, while one of the path's agents is started again."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for path in paths:
            one, boxes = path.hosts[0].name, path.boxes
            if one not in agents or boxes is None:
                continue
            for how in ("SIGTERM", "SIGKILL"):
                command = ["ping", "-D", "-n", "-i", "0.005", "-W", "1", str(boxes[0].address)]
                ping = boxes[1].popen(command, stdout=subprocess.PIPE, text=True)
                time.sleep(0.5)
                agents[one].terminate() if how == "SIGTERM" else agents[one].kill()
                agents[one] = agents[one].again().wait()
                time.sleep(0.5)
                ping.send_signal(signal.SIGINT)
                answered = re.findall(r"(?m)^\[([\d.]+)\] \d+ bytes", ping.communicate()[0])
                longest = max(float(after) - float(before) for before, after in itertools.pairwise(answered))
                found.setdefault(path.name, {}).setdefault(how, []).append(longest * 1000)
    return found


def start_up(host: Host, url: str, rounds: int) -> dict[str, Any]:
    """Whole processes: bench/startup.py on the host."""
    answer = host.run([sys.executable, "-m", "bench.startup", url, str(max(rounds, 15))], timeout=600)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def idle_cost(agent: RunningAgent, seconds: float) -> dict[str, float]:
    """CPU of an agent with nothing to do, in percent of a core, and its memory."""
    began, before = time.monotonic(), ways.stat_seconds(agent.pid)
    time.sleep(seconds)
    busy = (ways.stat_seconds(agent.pid) - before) / (time.monotonic() - began) * 100
    status = Path(f"/proc/{agent.pid}/status").read_text()
    return {
        "idle_cpu_percent": round(busy, 3),
        "resident_mb": round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1),  # type: ignore[index]
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
    }


if __name__ == "__main__":
    sys.exit(main())

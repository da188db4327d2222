"""`python -m bench.registry`: what many leases and many agents cost; renews its block of docs/performance.md.

    under ─ etcd 3.4 ─┐             h1       an agent (its processes, its CPU, its packets)
                      ├─ bridge     h2       takes the packets h1 sends to new peers
    h1 … h50 ─ eth0 ──┘             h1 … 50  fifty agents started at once

The agent is the frozen file where there is one, else the source tree's; the block says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.startup import FROZEN
from flanctl.demo.hosts import Host, Lab, Namespace
from flanctl.registry.stores.open import Connection
from tests.drills.events import RATE, Writer
from tests.support.agents import FLANCTL, RunningAgent, environment
from tests.support.etcd import Cluster
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path("bench/results")
DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- made by bench/registry.py: begin -->", "<!-- made by bench/registry.py: end -->"
NETWORK = IPv4Network("10.0.0.0/8")
LENGTH = 24
MANY, LISTED, AGENTS = 5_000, 20_000, 50
PREFIX = "/jxdd/network"
TTL = 86_400


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.registry", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=60, help="over which CPU is counted")
    parser.add_argument("--seed", nargs=3, metavar=("URL", "FROM", "TO"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.seed:
        seed(chosen.seed[0], int(chosen.seed[1]), int(chosen.seed[2]))
        return 0
    if FROZEN.exists():
        os.environ.setdefault("FLANCTL_EXE", str(FROZEN.absolute()))
    folder = Path(tempfile.mkdtemp(prefix="flanctl-bench-"))
    try:
        result = measure(folder, chosen.rounds, chosen.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"registry-{result['when'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(renew_block(result))
    sys.stderr.write(f"wrote {path} and {DOCUMENT}\n")
    return 0


def measure(folder: Path, rounds: int, seconds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    load = os.getloadavg()[0]  # before we are the load
    with Lab("scale") as lab:
        one, two = lab.add_host(), lab.add_host()
        with registry(lab, folder / "etcd") as etcd:
            url = ",".join(etcd.endpoints)
            net_init(lab.underlay, url)
            plant(lab.underlay, url, 0, MANY)
            found["ready_seconds"] = [exec_to_routes(one, folder, url) for _ in range(rounds)]
            agent = RunningAgent.start(one, folder / "agent", url, "--iface", "eth0").wait()
            found["event_ms"] = events(lab, one, two, agent, etcd, 4 * rounds)
            found["idle_percent"] = cpu_percent(agent, seconds)
            found["resident_mb"] = resident_mb(agent)
            etcd.kill(0)
            agent.wait_log("packets go on flowing")
            found["etcd_down_percent"] = cpu_percent(agent, seconds)
            agent.terminate()
        with registry(lab, folder / "etcd") as etcd:
            found["storm_percent"] = storm(one, two, folder, etcd, seconds)
        with registry(lab, folder / "etcd") as etcd:
            url = ",".join(etcd.endpoints)
            net_init(lab.underlay, url)
            plant(lab.underlay, url, 0, LISTED)
            found["list_seconds"] = lists(lab.underlay, url, rounds)
        while len(lab.hosts) < AGENTS:
            lab.add_host()
        found["fifty_seconds"] = []
        for number in range(3):
            with registry(lab, folder / "etcd") as etcd:
                url = ",".join(etcd.endpoints)
                net_init(lab.underlay, url)
                found["fifty_seconds"].append(fifty(lab, folder / f"fifty{number}", url))
    return {
        "schema": 1,
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "conditions": {
            "kernel": platform.release(),
            "cores": os.cpu_count(),
            "load_average": load,
            "agents": "frozen" if "FLANCTL_EXE" in os.environ else "venv",
            "etcd": "3.4, one member",
            "seconds": seconds,
        },
        **found,
    }


@contextlib.contextmanager
def registry(lab: Lab, folder: Path) -> Any:
    switch = str(lab.network.network_address + 1)
    with Cluster("3.4", folder=folder, host=switch, prefix=lab.underlay.command([])) as etcd:
        yield etcd


def net_init(where: Namespace, url: str) -> None:
    words = ["net", "init", "--network", str(NETWORK), "--subnet-len", str(LENGTH)]
    where.run([*FLANCTL, *words], env=environment(url))


def plant(where: Namespace, url: str, first: int, last: int) -> None:
    """Leases of hosts that do not exist, each with a TTL of its own, as flannel leaves them."""
    words = ["-m", "bench.registry", "--seed", url, str(first), str(last)]
    where.run([sys.executable, *words], env=environment(url), timeout=600)


def seed(url: str, first: int, last: int) -> None:
    from flanctl.registry.stores.endpoints import parse_endpoints
    from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore

    with contextlib.closing(EtcdGrpcStore(parse_endpoints([url]), timeout=60)) as store:

        def put(number: int) -> None:
            subnet, public_ip = lease(number)
            store.create(key(subnet), value(public_ip), ttl=TTL)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(first, last)))


def lease(number: int) -> tuple[IPv4Network, IPv4Address]:
    """Away from where agents look first, for they take the subnet their address hashes to."""
    return IPv4Network((int(NETWORK.network_address) + ((number + 256) << 8), LENGTH)), IPv4Address(
        "172.20.0.1"
    ) + number


def key(subnet: IPv4Network) -> str:
    return f"{PREFIX}/subnets/{subnet.network_address}-{subnet.prefixlen}"


def value(public_ip: IPv4Address) -> bytes:
    return f'{{"PublicIP":"{public_ip}","PublicIPv6":null}}'.encode()


def exec_to_routes(host: Host, folder: Path, url: str) -> float:
    """Seconds from exec to READY: at that moment every route is applied and subnet.env written."""
    shutil.rmtree(folder / "start", ignore_errors=True)
    began = time.monotonic()
    agent = RunningAgent.start(host, folder / "start", url, "--iface", "eth0")
    ready = agent.wait_ready(seconds=120)
    took = time.monotonic() - began
    assert int(ready["peers"]) >= MANY, ready
    agent.terminate()
    return took


def events(lab: Lab, one: Host, two: Host, agent: RunningAgent, etcd: Cluster, count: int) -> list[float]:
    """Milliseconds from the request that writes a lease until a packet to its subnet arrives at its host.

    Packets are sent every half millisecond meanwhile; etcd's own time is in it.
    """
    ip = [two.address + 50 + number for number in range(count)]
    two.ip_batch(*(f"addr add {address}/{lab.network.prefixlen} dev eth0" for address in ip))
    with inside(two.path):
        arrivals = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        arrivals.bind(("0.0.0.0", 8285))
    with inside(one.path):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    took = []
    with contextlib.closing(arrivals), contextlib.closing(sender):
        arrivals.settimeout(10)
        for number, address in enumerate(ip):
            subnet, _ = lease(MANY + 100 + number)
            target = (str(subnet.network_address + 2), 9)
            with Sending(sender, target), inside(lab.underlay.path):
                began = put_over_http(etcd.endpoints[0], key(subnet), value(address))
                arrivals.recv(2048)
                took.append((time.monotonic() - began) * 1000)
            drain(arrivals)
    assert agent.process.poll() is None
    return took


class Sending:
    """A thread that sends a small datagram every half millisecond."""

    def __init__(self, link: socket.socket, target: tuple[str, int]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(link, target))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self, link: socket.socket, target: tuple[str, int]) -> None:
        while not self._over.wait(0.0005):
            with contextlib.suppress(OSError):  # the data plane's "no route" comes back as ICMP
                link.sendto(b"x", target)


def drain(link: socket.socket) -> None:
    """What is still under way to the last new peer."""
    link.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            link.recv(2048)
    link.settimeout(10)


def put_over_http(endpoint: str, name: str, content: bytes) -> float:
    """Write a key; the moment at which the request went out (time.monotonic)."""
    import base64
    import http.client

    body = {"key": base64.b64encode(name.encode()).decode(), "value": base64.b64encode(content).decode()}
    link = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=10)
    link.connect()
    began = time.monotonic()
    link.request("POST", "/v3/kv/put", json.dumps(body))
    assert link.getresponse().status == 200
    link.close()
    return began


def cpu_percent(agent: RunningAgent, seconds: int) -> float:
    """Of a core, with those of ended children: iptables-save is the agent's too."""

    def used() -> float:
        fields = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    began, before = time.monotonic(), used()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - began) * 100


def storm(one: Host, two: Host, folder: Path, etcd: Cluster, seconds: int) -> float:
    """An agent's CPU while fifty changes a second come: subnets added, moved to another host, removed. No packets flow."""
    url = ",".join(etcd.endpoints)
    net_init(one, url)
    agent = RunningAgent.start(one, folder / "storm", url, "--iface", "eth0").wait()
    names = [key(lease(number)[0]) for number in range(AGENTS)]
    with Writer(two, Connection((url,)), names) as writer:
        writer.go_on(10 * RATE)  # the agent acts upon the first fifty at once
        before = writer.written
        used = cpu_percent(agent, seconds)
        assert writer.written - before >= 0.9 * RATE * seconds
    agent.terminate()
    return used


def resident_mb(agent: RunningAgent) -> float:
    status = Path(f"/proc/{agent.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


def lists(where: Namespace, url: str, rounds: int) -> dict[str, list[float]]:
    """Whole commands that list 20,000 leases, in turn."""
    endpoints = f"--endpoints={url}"
    compared = {
        "subnets ls, TTLs asked": [*FLANCTL, "subnets", "ls", "-w", "simple", endpoints],
        "etcdctl get --prefix": ["etcdctl", endpoints, "get", "--prefix", f"{PREFIX}/subnets/"],
        "subnets ls --no-ttl": [*FLANCTL, "subnets", "ls", "--no-ttl", "-w", "simple", endpoints],
    }
    took: dict[str, list[float]] = {name: [] for name in compared}
    for round_ in range(rounds + 1):
        for name, command in compared.items():
            if round_ > 1 and "TTLs" in name:
                continue  # a request for each lease; twice is enough
            began = time.monotonic()
            said = where.run(command, env=environment(ETCDCTL_API="3"), timeout=300).stdout
            if round_:
                took[name].append(time.monotonic() - began)
            assert said.count("\n") >= LISTED
    return took


def fifty(lab: Lab, folder: Path, url: str) -> float:
    """Seconds from the first exec to the last READY."""
    began = time.monotonic()
    agents = [
        RunningAgent.start(host, folder / host.name, url, "--iface", "eth0") for host in lab.hosts[:AGENTS]
    ]
    for agent in agents:
        agent.wait_ready(seconds=120)
    took = time.monotonic() - began
    assert len({agent.subnet for agent in agents}) == AGENTS
    for agent in agents:
        agent.process.terminate()
    for agent in agents:
        agent.wait_end()
    return took


def renew_block(result: dict[str, Any]) -> str:
    """Put the block between its marks in the document and return it."""
    block = render(result)
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}")
    return block


def render(result: dict[str, Any]) -> str:
    conditions, listed = result["conditions"], result["list_seconds"]
    mine, theirs = listed["subnets ls --no-ttl"], listed["etcdctl get --prefix"]
    ratio = statistics.median(mine) / statistics.median(theirs)
    rows = [
        (f"{MANY:,} leases: exec to all routes applied, s", _spread(result["ready_seconds"], 2), "2"),
        (f"one event at {MANY:,} leases: write to first packet, ms", _spread(result["event_ms"], 1), "50"),
        (f"idle CPU at {MANY:,} leases, % of a core", f"{result['idle_percent']:.2f}", "0.5"),
        ("the same, etcd down", f"{result['etcd_down_percent']:.2f}", "1"),
        ("CPU following fifty changes a second, % of a core", f"{result['storm_percent']:.2f}", "2"),
        (f"resident memory at {MANY:,} leases, MB", f"{result['resident_mb']:.0f}", ""),
        (f"{AGENTS} agents at once: exec to the last READY, s", _spread(result["fifty_seconds"], 1), "15"),
        (f"`subnets ls --no-ttl` of {LISTED:,}, s", _spread(mine, 2), ""),
        (f"`etcdctl get --prefix` of {LISTED:,}, s", _spread(theirs, 2), ""),
        ("the one / the other", f"**{ratio:.1f}**", "3"),
        (f"`subnets ls` of {LISTED:,}, TTLs asked, s", _spread(listed["subnets ls, TTLs asked"], 1), ""),
    ]
    lines = [
        (
            f"Measured {result['when']} on Linux {conditions['kernel']}, {conditions['cores']} cores shared by all hosts and "
            f"etcd ({conditions['etcd']}); flanctl from {conditions['agents']}; load average before {conditions['load_average']:.1f}; "
            f"CPU over {conditions['seconds']} s. Medians (lowest to highest)."
        ),
        "",
        "| what | measured | goal, at most |",
        "| --- | --- | --- |",
        *(f"| {what} | {measured} | {goal} |" for what, measured, goal in rows),
        "",
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    low, mid, high = (
        f"{number:.{digits}f}" for number in (min(values), statistics.median(values), max(values))
    )
    return f"{mid} ({low}–{high})"


if __name__ == "__main__":
    sys.exit(main())

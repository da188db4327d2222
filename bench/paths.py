"""What is measured side by side: each path on two hosts of its own, all of them up at once on one underlay.

    NAME1 ─ eth0 ─┐                each host: a docker0 with one container behind it
                  ├─ bridge        raw, hostgw, vxlan: the kernel's; plain: bench/plain_loop.c
    NAME2 ─ eth0 ─┘                tun, tun-plain, …: `flanctl agent` with the options in FLANCTL

A new path of flanctl is one line in FLANCTL; of anything else a function that returns a Path, and a line in `build`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path as File
from typing import TYPE_CHECKING

from flanctl.agent.kernel.rules import forward_chain
from tests.support.agents import RunningAgent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanctl.demo.hosts import Container, Host, Lab

# The rules that Docker 28 asks for, which no other path's hosts have here, would cost containers' packets two chains more.
_ALIKE = ("--docker-accept", "off")
FLANCTL: dict[str, tuple[str, ...]] = {
    "tun": ("--data-path", "tun", *_ALIKE),
    "tun-plain": ("--data-path", "tun-plain", *_ALIKE),
    "tc": ("--data-path", "tc", *_ALIKE),
}
"""Options of `flanctl agent` by path."""
NETWORK = "172.17.0.0/16"
PROGRAMS = File(".cache/bench")
PLAIN_PORT = 8286
OVERHEAD = {"raw": 0, "hostgw": 0, "vxlan": 50, "plain": 28}
"""Bytes of outer headers."""


@dataclass
class Path:
    """Two hosts and the addresses that traffic between them has on this path."""

    name: str
    hosts: tuple[Host, Host]
    addresses: tuple[str, str]
    boxes: tuple[Container, Container] | None = None
    daemons: list[int] = field(default_factory=list)
    """Process ids of the tunnel itself."""


def program(name: str) -> str:
    """bench/NAME.c, compiled."""
    source, target = File(f"bench/{name}.c"), PROGRAMS / name
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-o", str(target), str(source)], check=True)
    return str(target.absolute())


def build(
    lab: Lab, names: Sequence[str], folder: File, url: str
) -> tuple[list[Path], dict[str, RunningAgent]]:
    """The paths asked for, up, and the agents among them by their host's name."""
    kernels: dict[str, Callable[[Host, Host], Path]] = {
        "raw": _raw,
        "hostgw": _hostgw,
        "vxlan": _vxlan,
        "plain": _plain,
    }
    paths, agents = [], {}
    for name in names:
        one, two = lab.add_host(f"{name}1"), lab.add_host(f"{name}2")
        if name in kernels:
            paths.append(kernels[name](one, two))
            continue
        for host in (one, two):
            agents[host.name] = RunningAgent.start(
                host, folder / host.name, url, "--iface", "eth0", *FLANCTL[name]
            )
            agents[host.name].wait_ready()
        paths.append(_flanctl(name, one, two, agents))
    for path in paths:
        _settle(path)
    return paths, agents


def _boxes(one: Host, two: Host, third: int, name: str) -> tuple[Container, Container]:
    """With the rules that let forwarded packets pass on an agent's hosts: they cost every packet something."""
    mtu = 1500 - OVERHEAD[name]
    chain = forward_chain(IPv4Network(f"10.{third}.0.0/16"))
    script = f"*{chain.table}\n:{chain.name} - [0:0]\n" + "".join(
        f"{rule}\n" for rule in (*chain.rules, chain.jump)
    )
    for host in (one, two):
        host.run(["iptables-restore", "--noflush"], stdin=f"{script}COMMIT\n")
    first, second = (IPv4Interface(f"10.{third}.{n}.1/24") for n in (1, 2))
    return one.add_container(first, mtu), two.add_container(second, mtu)


def _raw(one: Host, two: Host) -> Path:
    return Path("raw", (one, two), (str(one.address), str(two.address)))


def _hostgw(one: Host, two: Host) -> Path:
    for host, n, peer, other in ((one, 1, two, 2), (two, 2, one, 1)):
        host.ip_batch(
            f"addr add 10.91.0.{n}/32 dev lo",
            f"route add 10.91.0.{other} via {peer.address} src 10.91.0.{n}",
            f"route add 10.91.{other}.0/24 via {peer.address}",
        )
    return Path("hostgw", (one, two), ("10.91.0.1", "10.91.0.2"), _boxes(one, two, 91, "hostgw"))


def _vxlan(one: Host, two: Host) -> Path:
    for host, n, peer, other in ((one, 1, two, 2), (two, 2, one, 1)):
        host.ip_batch(
            f"link add vx0 type vxlan id 7 remote {peer.address} dstport 4789 dev eth0",
            f"addr add 10.90.0.{n}/30 dev vx0",
            "link set vx0 up",
            f"route add 10.90.{other}.0/24 via 10.90.0.{other}",
        )
    return Path("vxlan", (one, two), ("10.90.0.1", "10.90.0.2"), _boxes(one, two, 90, "vxlan"))


def _plain(one: Host, two: Host) -> Path:
    daemons = []
    for host, n, peer, other in ((one, 1, two, 2), (two, 2, one, 1)):
        routes = [f"10.92.{other}.0/24={peer.address}", f"10.92.0.{other}/32={peer.address}"]
        loop = host.popen(
            [program("plain_loop"), "plain0", str(host.address), str(PLAIN_PORT), "1472", *routes],
            stdout=subprocess.PIPE,
        )
        assert loop.stdout is not None
        assert loop.stdout.readline() == b"ready\n", "the plain loop did not start"
        daemons.append(loop.pid)
        host.ip_batch(
            f"addr add 10.92.0.{n}/32 dev plain0",
            "link set plain0 mtu 1472 up",
            f"route add 10.92.0.{other} dev plain0 src 10.92.0.{n}",
            f"route add 10.92.{other}.0/24 dev plain0 src 10.92.0.{n}",
        )
    return Path("plain", (one, two), ("10.92.0.1", "10.92.0.2"), _boxes(one, two, 92, "plain"), daemons)


def _flanctl(name: str, one: Host, two: Host, agents: dict[str, RunningAgent]) -> Path:
    mine = [agents[host.name] for host in (one, two)]
    first, second = (str(agent.subnet.network_address) for agent in mine)
    boxes = tuple(
        host.add_container(agent.gateway, int(agent.ready["mtu"]))
        for host, agent in zip((one, two), mine, strict=True)
    )
    return Path(name, (one, two), (first, second), (boxes[0], boxes[1]), [agent.pid for agent in mine])


def _settle(path: Path, seconds: float = 20.0) -> None:
    """Until packets pass both ways: agents hear of each other a moment after they are ready."""
    ends = [(path.hosts[0], path.addresses)]
    if path.boxes:
        one, two = path.boxes
        ends.append((one, (str(one.address), str(two.address))))
    deadline = time.monotonic() + seconds
    for host, (source, target) in ends:
        while host.run(["ping", "-c1", "-W1", "-I", source, target], check=False).returncode != 0:
            if time.monotonic() > deadline:
                sys.exit(f"bench: no packet passes on the path {path.name} from {source} to {target}")


def set_offloads(lab: Lab, paths: Sequence[Path], *options: str) -> None:
    """`ethtool -K` on both ends of every cable. What a kernel does not know it says; the others count."""
    ends = [(host, "eth0") for path in paths for host in path.hosts]
    ends += [(lab.underlay, f"port{n + 1}") for n in range(len(lab.hosts))]
    for where, device in ends:
        where.run(["ethtool", "-K", device, *options])


def stat_seconds(pid: int) -> float:
    """CPU seconds of a process, its threads and its ended children."""
    fields = File(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

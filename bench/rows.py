"""The rows: what is measured on each path in each round. A row is one function; docs/performance.md explains each."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.paths import FLANCTL, PLAIN_PORT, program, stat_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.paths import Path
    from flanctl.demo.hosts import Namespace


@dataclass(frozen=True)
class Metric:
    """One number a row gives for each path."""

    name: str
    title: str
    digits: int
    more_is_better: bool = True
    against: str = "vxlan"
    """The path that flanctl's paths are compared with."""


@dataclass(frozen=True)
class Row:
    name: str
    metrics: tuple[Metric, ...]
    measure: Callable[[Path, float], dict[str, float]]
    """Given a path and seconds, the value of each metric."""
    offloads: str = "as made"
    """A key of OFFLOADS."""
    boxes: bool = False
    """Between containers: paths without them are left out."""


_TUNNEL_OFF = (
    "tx-udp-segmentation off tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off "
    "gso on rx-gro-list off"
)
OFFLOADS = {
    "as made": "tso on gso on gro off tx-udp-segmentation on tx-udp_tnl-segmentation on tx-udp_tnl-csum-segmentation on",
    "NIC-like": f"tso on gro on {_TUNNEL_OFF}",
    "NIC-like, TSO off": f"tso off gro on {_TUNNEL_OFF}",
    "NIC-like, GRO off": f"tso on gro off {_TUNNEL_OFF}",
}
"""Options of `ethtool -K` on both ends of every cable. A network card has no offload for our outer header."""


def iperf(server: Namespace, client: Namespace, source: str, target: str, *options: str) -> dict[str, Any]:
    """One client run against a fresh server, both bound to the path's addresses."""
    process = server.popen(
        ["iperf3", "-s", "-1", "-B", target, "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    while b"listening" not in process.stdout.readline():
        assert process.poll() is None, "iperf3 -s ended"
    done = client.run(["iperf3", "-c", target, "-B", source, "-J", *options], timeout=120)
    process.stdout.read()
    process.wait()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _tcp(
    name: str, streams: int, control: str, *, boxes: bool = False
) -> Callable[[Path, float], dict[str, float]]:
    def measure(path: Path, seconds: float) -> dict[str, float]:
        one, two = path.hosts
        ends: tuple[Namespace, Namespace] = (two, one)
        source, target = path.addresses
        if boxes and path.boxes:
            ends = (path.boxes[1], path.boxes[0])
            source, target = (str(box.address) for box in path.boxes)
        before = sum(map(stat_seconds, path.daemons))
        options = ("-t", f"{seconds:g}", "-O", "1", "-P", str(streams), "-C", control)
        end = iperf(*ends, source, target, *options)["end"]
        loop = sum(map(stat_seconds, path.daemons)) - before
        spent = end["cpu_utilization_percent"]
        # iperf3 counts from its start, the second of warm-up included, and so do the tunnel's processes.
        whole = seconds + 1.0
        cpu = (spent["host_total"] + spent["remote_total"]) / 100 * whole + loop
        rate = end["sum_received"]["bits_per_second"] / 1e9
        return {name: rate, f"{name}_cpu": cpu / (rate * whole)}

    return measure


def _tcp_row(
    name: str,
    streams: int,
    control: str,
    *,
    offloads: str = "as made",
    boxes: bool = False,
    cpu: bool = False,
) -> Row:
    words = f"TCP, {streams} stream{'s' * (streams > 1)}, {control}"
    where = ", container to container" if boxes else "" if offloads == "as made" else f", {offloads}"
    metrics = [Metric(name, f"{words}{where}, Gbit/s", 2)]
    if cpu:
        metrics.append(
            Metric(f"{name}_cpu", f"CPU seconds per Gbit of {words}{where}", 3, more_is_better=False)
        )
    return Row(name, tuple(metrics), _tcp(name, streams, control, boxes=boxes), offloads, boxes)


def _packets(name: str, flows: int, smallest: int, largest: int) -> Callable[[Path, float], dict[str, float]]:
    """Offered at rising rates; the best that arrived. Beyond it the sender takes the machine from the receiver."""

    def once(path: Path, rate: int, seconds: float) -> float:
        one, two = path.hosts
        source, target = path.addresses
        receiver = two.popen([program("packets"), "receive", target, "5300"], stdout=subprocess.PIPE)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"listening\n", "the receiver did not start"
        sizes = [str(flows), str(smallest - 28), str(largest - 28)]
        one.run([program("packets"), "send", source, target, "5300", *sizes, str(rate), f"{seconds:g}"])
        words = receiver.stdout.read().split()
        receiver.wait()
        return int(words[1]) / max(float(words[2]), seconds) / 1000

    def measure(path: Path, seconds: float) -> dict[str, float]:
        return {name: max(once(path, rate, seconds / 2) for rate in RATES)}

    return measure


RATES = (100_000, 200_000, 400_000, 0)
"""Packets a second offered; 0 is as fast as it goes."""


def _round_trip(path: Path, _: float) -> dict[str, float]:
    source, target = path.addresses
    said = path.hosts[0].run(["ping", "-i", "0.01", "-c", "200", "-I", source, target]).stdout
    times = sorted(float(text) for text in re.findall(r"time=([\d.]+)", said))
    return {"rtt": statistics.median(times), "rtt_p95": times[int(len(times) * 0.95)]}


PORTS = {"vxlan": 4789, "plain": PLAIN_PORT, **dict.fromkeys(FLANCTL, 8285)}
"""Where a tunnel listens."""


def _forged(path: Path, seconds: float) -> dict[str, float]:
    """TCP with and without datagrams that the receiver's tunnel must refuse, from a host that is no peer.

    Other tunnels' share says what is the forger's doing alone, which runs on the same processors.
    """
    if path.name not in PORTS:
        return {}
    one, two = path.hosts
    lab, (source, target) = two.lab, path.addresses
    options = ("-t", f"{seconds:g}", "-O", "1", "-C", "bbr")

    def rate() -> float:
        end = iperf(two, one, source, target, *options)["end"]
        return float(end["sum_received"]["bits_per_second"])

    quiet = rate()
    words = [str(lab.network.network_address + 1), str(two.address), str(PORTS[path.name])]
    # Longer than TCP takes, connection and warm-up included; ended after it.
    forger = lab.underlay.popen(
        [program("packets"), "send", *words, "1", "36", "36", "0", f"{seconds + 30:g}"],
        stdout=subprocess.DEVNULL,
    )
    try:
        flooded = rate()
        assert forger.poll() is None, "the forger ended before TCP"
    finally:
        forger.terminate()
        forger.wait()
    return {"forged": flooded / quiet}


ROWS = (
    _tcp_row("tcp1_bbr", 1, "bbr", cpu=True),
    _tcp_row("tcp1_cubic", 1, "cubic"),
    _tcp_row("tcp4_bbr", 4, "bbr"),
    _tcp_row("tcp4_cubic", 4, "cubic"),
    _tcp_row("box1_bbr", 1, "bbr", boxes=True),
    _tcp_row("box4_cubic", 4, "cubic", boxes=True),
    Row(
        "pps_same",
        (Metric("pps_same", "packets of 64 bytes, one flow, thousands a second", 0, against="plain"),),
        _packets("pps_same", 1, 64, 64),
    ),
    Row(
        "pps_mixed",
        (
            Metric(
                "pps_mixed", "packets of 64 to 512 bytes, 16 flows, thousands a second", 0, against="plain"
            ),
        ),
        _packets("pps_mixed", 16, 64, 512),
    ),
    Row(
        "rtt",
        (
            Metric("rtt", "round trip, median, ms", 3, more_is_better=False),
            Metric("rtt_p95", "round trip, 95 of 100, ms", 3, more_is_better=False),
        ),
        _round_trip,
    ),
    Row(
        "forged",
        (
            Metric(
                "forged", "TCP, 1 stream, bbr, under a flood of a stranger's datagrams, share of its rate", 2
            ),
        ),
        _forged,
    ),
    _tcp_row("nic1_bbr", 1, "bbr", offloads="NIC-like"),
    _tcp_row("nic1_cubic", 1, "cubic", offloads="NIC-like"),
    _tcp_row("nic1_bbr_tso_off", 1, "bbr", offloads="NIC-like, TSO off"),
    _tcp_row("nic1_bbr_gro_off", 1, "bbr", offloads="NIC-like, GRO off"),
)
METRICS = tuple(metric for row in ROWS for metric in row.metrics)

"""The table of docs/performance.md, made from a result; the words around it stay."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- made by make bench: begin -->", "<!-- made by make bench: end -->"


def renew_table(result: dict[str, Any]) -> str:
    """Put the table between its marks in the document and return it."""
    table = render(result)
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}")
    return table


def render(result: dict[str, Any]) -> str:
    samples, agent, times = result["samples"], result["agent"], result["processes_ms"]
    conditions = result["conditions"]
    measured = (
        f"Measured {result['when']} on Linux {conditions['kernel']}, {conditions['cores']} cores shared by both hosts; "
        f"{conditions['rounds']} interleaved rounds of {conditions['seconds']} s, {conditions['congestion_control']}; "
        f"{conditions['underlay']}. Medians (lowest to highest)."
    )
    lines = [
        measured,
        "",
        "| what | raw veth | kernel VXLAN | flanctl | flanctl / VXLAN |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, words, digits, scale in (
        ("tcp_gbit_per_second", "TCP, one stream, Gbit/s", 2, 1.0),
        ("packets_per_second_64_bytes", "64-byte packets received, thousands a second", 0, 1000.0),
        ("round_trip_ms", "round trip, ms", 3, 1.0),
    ):
        by = samples[what]
        cells = [_spread(by[name], digits, scale) for name in ("raw", "vxlan", "flanctl")]
        ratio = statistics.median(by["flanctl"]) / statistics.median(by["vxlan"])
        lines.append(f"| {words} | {' | '.join(cells)} | **{ratio:.2f}** |")
    lines += ["", "| whole process, ms | flanctl (venv) | etcdctl | ratio |", "| --- | --- | --- | --- |"]
    for ours, theirs, words in (
        ("flanctl subnets ls (venv)", "etcdctl get --prefix", "list the leases"),
        ("flanctl version (venv)", "etcdctl version", "version"),
    ):
        ratio = statistics.median(times[ours]) / statistics.median(times[theirs])
        lines.append(
            f"| {words} | {_spread(times[ours], 0, 1)} | {_spread(times[theirs], 0, 1)} | **{ratio:.1f}** |"
        )
    lines += [
        "",
        "| agent | |",
        "| --- | --- |",
        f"| exec to READY, seconds | {_spread(agent['ready_seconds'], 2, 1)} |",
        f"| idle CPU, percent of a core | {agent['idle_cpu_percent']:.2f} |",
        f"| resident memory, MB (gRPC, venv) | {agent['resident_mb']:.0f} |",
        f"| threads | {agent['threads']} |",
        "",
    ]
    return "\n".join(lines)


def _spread(values: list[float], digits: int, scale: float) -> str:
    low, mid, high = (
        f"{number / scale:.{digits}f}" for number in (min(values), statistics.median(values), max(values))
    )
    return f"{mid} ({low}–{high})"

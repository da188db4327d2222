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
    samples, agent = result["samples"], result["agent"]
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
    lines += ["", *_commands(result["processes"])]
    lines += [
        "",
        "| agent | |",
        "| --- | --- |",
        f"| exec to READY, seconds | {_spread(agent['ready_seconds'], 2, 1)} |",
        f"| idle CPU, percent of a core | {agent['idle_cpu_percent']:.2f} |",
        f"| resident memory, MB (gRPC, {conditions['agents']}) | {agent['resident_mb']:.0f} |",
        f"| threads | {agent['threads']} |",
        "",
    ]
    return "\n".join(lines)


def _commands(processes: dict[str, Any]) -> list[str]:
    """Whole commands beside what they are compared with."""
    wall, resident = processes["wall_ms"], processes["resident_mib"]
    lines = [
        "| whole process, ms | frozen | from the source tree | compared with | frozen / that | peak MiB, frozen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for words, frozen, venv, other in (
        ("version", "frozen version", "venv version", "etcdctl version"),
        ("subnets ls", "frozen subnets ls", "venv subnets ls", "etcdctl get --prefix"),
        ("docker-opts", "frozen docker-opts", "venv docker-opts", "shell script (dash)"),
        ("mk-docker-opts.sh", "frozen mk-docker-opts.sh", "", "shell script (dash)"),
        ("version -w simple (click alone)", "frozen version -w simple", "", "etcdctl version"),
        ("nothing", "nothing (/bin/true)", "", ""),
    ):
        cells = [_spread(wall[name], 0, 1) if name in wall else "-" for name in (frozen, venv)]
        against = f"{other} {_spread(wall[other], 0, 1)}" if other else "-"
        both = frozen in wall and other in wall
        ratio = f"**{statistics.median(wall[frozen]) / statistics.median(wall[other]):.1f}**" if both else "-"
        memory = f"{resident[frozen]:.0f}" if frozen in resident else "-"
        lines.append(f"| {words} | {cells[0]} | {cells[1]} | {against} | {ratio} | {memory} |")
    if processes["frozen_megabytes"]:
        lines += ["", f"The frozen file has {processes['frozen_megabytes']:.1f} MB."]
    return lines


def _spread(values: list[float], digits: int, scale: float) -> str:
    low, mid, high = (
        f"{number / scale:.{digits}f}" for number in (min(values), statistics.median(values), max(values))
    )
    return f"{mid} ({low}–{high})"

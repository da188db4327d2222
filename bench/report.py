"""The table of docs/performance.md, made from a result; the words around it stay."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.compare import ratio
from bench.paths import FLANCTL
from bench.rows import METRICS

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
    """Tables of what this result has."""
    conditions = result["conditions"]
    measured = (
        f"Measured {result['when']} on Linux {conditions['kernel']}, {conditions['cores']} cores shared by both hosts and "
        f"all tunnels; {conditions['rounds']} interleaved rounds of {conditions['seconds']:g} s; "
        f"{conditions['underlay']}; agents: {conditions['agents']}. The machine was {conditions['busy_before_percent']} % busy before, "
        f"{conditions.get('steal_percent', 0)} % of its time was taken by its host. Medians (lowest to highest)."
    )
    for name, when in conditions.get("kept", {}).items():
        measured += f" The row `{name}` was measured {when}."
    lines = [measured, "", *_paths(result["samples"])]
    if "lookup" in result:
        lines += _lookup(result["lookup"])
    if "processes" in result:
        lines += [*_commands(result["processes"]), ""]
    if "restart" in result:
        ways = list(result["restart"])
        lines += [
            f"| agent started again: longest pause of a ping every 5 ms, ms | {' | '.join(ways)} |",
            f"| {' | '.join(['---'] * (len(ways) + 1))} |",
            *(
                f"| after {how} | {' | '.join(_spread(result['restart'][way][how], 0, 1) for way in ways)} |"
                for how in ("SIGTERM", "SIGKILL")
            ),
            "",
        ]
    if "agent" in result:
        agent = result["agent"]
        lines += [
            "| agent | |",
            "| --- | --- |",
            f"| exec to READY, seconds | {_spread(agent['ready_seconds'], 2, 1)} |",
            f"| idle CPU, percent of a core | {agent['idle_cpu_percent']:.2f} |",
            f"| resident memory, MB | {agent['resident_mb']:.0f} |",
            f"| threads | {agent['threads']} |",
            "",
        ]
    return "\n".join(lines)


def _paths(samples: dict[str, dict[str, list[float]]]) -> list[str]:
    """A column for each path, and how flanctl's stand to the one the row is measured against."""
    paths = list(dict.fromkeys(path for by in samples.values() for path in by))
    if not paths:
        return []
    ours = [path for path in paths if path in FLANCTL]
    lines = [
        f"| what | {' | '.join([*paths, *(f'{path} /' for path in ours)])} |",
        f"| --- | {' | '.join(['---'] * (len(paths) + len(ours)))} |",
    ]
    for metric in METRICS:
        by = samples.get(metric.name)
        if not by:
            continue
        cells = [_spread(by[path], metric.digits, 1) if path in by else "-" for path in paths]
        for path in ours:
            found = ratio(samples, metric.name, path, metric.against)
            cells.append("-" if found is None else f"**{found:.2f}** {metric.against}")
        lines.append(f"| {metric.title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _lookup(found: dict[str, dict[str, float]]) -> list[str]:
    """ns by number of peers."""
    sizes = list(next(iter(found.values())))
    lines = [
        f"| look-up, ns, peers: | {' | '.join(sizes)} |",
        f"| --- | {' | '.join(['---'] * len(sizes))} |",
    ]
    lines += [f"| {name} | {' | '.join(f'{by[size]:.0f}' for size in sizes)} |" for name, by in found.items()]
    return [*lines, ""]


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

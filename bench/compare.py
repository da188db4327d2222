"""A run beside the last committed one. Ratios to what stood beside flanctl in the same run, so that two machines, or one
machine on two days, may be compared at all.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from typing import Any

from bench.rows import METRICS

NOISE = 0.15
"""A change of a ratio by less than this is said to be none."""


def last_committed() -> tuple[str, dict[str, Any]]:
    """Name and content of the newest result in git's HEAD."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout

    names = git("ls-tree", "--name-only", "HEAD", "bench/results/").split()
    name = max(one for one in names if re.fullmatch(r"bench/results/[0-9-]+\.json", one))
    found: dict[str, Any] = json.loads(git("show", f"HEAD:{name}"))
    return name, found


def ratio(samples: dict[str, dict[str, list[float]]], metric: str, path: str, against: str) -> float | None:
    """Of medians; None where one of them was not measured."""
    by = samples.get(metric, {})
    if path == against or not by.get(path) or not by.get(against):
        return None
    return statistics.median(by[path]) / statistics.median(by[against])


def compared(now: dict[str, Any], name: str, then: dict[str, Any]) -> str:
    """A table in text: ratio now, ratio then, and what became of it."""
    lines = [f"beside {name} ({then['when']})", f"{'':54}{'now':>8}{'then':>8}"]
    for metric in METRICS:
        for path in now["samples"].get(metric.name, {}):
            new, old = (ratio(one["samples"], metric.name, path, metric.against) for one in (now, then))
            if new is None:
                continue
            what = f"{path}: {metric.title} / {metric.against}"
            lines.append(f"{what:54.54}{new:8.2f}{_cell(old):>8}  {verdict(new, old, metric.more_is_better)}")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def verdict(new: float, old: float | None, more_is_better: bool) -> str:
    """`worse`, `better`, or nothing: both runs are noisy."""
    if old is None or abs(new / old - 1) < NOISE:
        return ""
    return "better" if (new > old) == more_is_better else "WORSE"

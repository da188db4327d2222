"""The plot of docs/performance.md: for each metric the paths as bars, median and range, drawn as SVG by hand."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.rows import METRICS

PLOT = Path("docs/performance.svg")
COLOURS = {
    "raw": "#9e9e9e",
    "hostgw": "#78909c",
    "vxlan": "#3f51b5",
    "plain": "#bdbdbd",
    "tun": "#e65100",
    "tun-plain": "#ffb74d",
    "tc": "#2e7d32",
}
LEFT, BAR, WIDTH, STEP = 90, 420, 620, 16  # pixels


def draw(result: dict[str, Any]) -> str:
    """The whole picture as text."""
    parts, y = [], 10
    for metric in METRICS:
        by = result["samples"].get(metric.name)
        if not by:
            continue
        y += 18
        better = "" if metric.more_is_better else " (less is better)"
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(metric.title + better)}</text>')
        y += 6
        longest = max(max(values) for values in by.values())
        for path, values in by.items():
            parts += _bar(path, values, longest, y, metric.digits)
            y += STEP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" '
    head += 'font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y + 10}" fill="#fff"/>', *parts, "</svg>", ""])


def _bar(path: str, values: list[float], longest: float, y: int, digits: int) -> list[str]:
    low, mid, high = (
        BAR * number / longest for number in (min(values), statistics.median(values), max(values))
    )
    middle = y + STEP // 2
    colour = COLOURS.get(path, "#6a1b9a")
    return [
        f'<text x="{LEFT - 6}" y="{middle + 4}" text-anchor="end">{escape(path)}</text>',
        f'<rect x="{LEFT}" y="{y + 2}" width="{mid:.1f}" height="{STEP - 4}" fill="{colour}"/>',
        f'<line x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{middle}" y2="{middle}" stroke="#000"/>',
        f'<text x="{LEFT + high + 6:.1f}" y="{middle + 4}">{statistics.median(values):.{digits}f}</text>',
    ]

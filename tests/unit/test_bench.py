"""What `make bench` writes: tables, plot and comparison, from samples; the measuring itself needs root and minutes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from bench.compare import compared, last_committed, ratio, verdict
from bench.plots import draw
from bench.report import render
from bench.rows import METRICS, OFFLOADS, ROWS


def result(tun: float) -> dict[str, Any]:
    """Every metric on two paths; flanctl's as told."""
    samples = {
        metric.name: {metric.against: [1.0, 2.0, 3.0], "tun": [tun, tun, tun + 1]} for metric in METRICS
    }
    conditions = {
        "kernel": "6.18",
        "cores": 2,
        "rounds": 3,
        "seconds": 2.0,
        "underlay": "veth",
        "busy_before_percent": 4,
        "agents": "venv",
    }
    lookup = {"flanctl": {"10": 3.0, "10000": 3.1}}
    restart = {"tun": {"SIGTERM": [180.0, 190.0, 200.0], "SIGKILL": [170.0]}}
    return {
        "when": "2026-01-01T00:00:00Z",
        "conditions": conditions,
        "samples": samples,
        "lookup": lookup,
        "restart": restart,
    }


def test_the_table_has_a_line_for_each_metric_and_the_ratio_of_medians() -> None:
    table = render(result(3.0))
    for metric in METRICS:
        line = next(line for line in table.splitlines() if line.startswith(f"| {metric.title} |"))
        assert f"**1.50** {metric.against}" in line
    assert "| flanctl | 3 | 3 |" in table
    assert "| after SIGTERM | 190 (180–200) |" in table


def test_a_path_that_was_not_measured_in_a_row_leaves_its_cell_empty() -> None:
    partial = result(3.0)
    del partial["samples"]["rtt"]["tun"]
    assert "| - | - |" in next(line for line in render(partial).splitlines() if "round trip, median" in line)
    assert ratio(partial["samples"], "rtt", "tun", "vxlan") is None


def test_the_plot_is_xml_with_a_bar_for_each_path_of_each_metric() -> None:
    root = ET.fromstring(draw(result(3.0)))
    bars = [
        shape for shape in root.iter("{http://www.w3.org/2000/svg}rect") if shape.get("fill") == "#e65100"
    ]
    assert len(bars) == len(METRICS)


@pytest.mark.parametrize(
    ("new", "old", "more", "said"),
    [
        (0.5, 0.7, True, "WORSE"),
        (0.5, 0.7, False, "better"),
        (0.9, 0.7, True, "better"),
        (0.71, 0.7, True, ""),
        (0.7, None, True, ""),
    ],
)
def test_a_regression_is_said_and_noise_is_not(new: float, old: float | None, more: bool, said: str) -> None:
    assert verdict(new, old, more) == said


def test_a_comparison_names_every_metric_that_both_runs_have() -> None:
    text = compared(result(1.0), "old.json", result(3.0))
    assert text.count("WORSE") == sum(metric.more_is_better for metric in METRICS)
    assert text.count("better") == sum(not metric.more_is_better for metric in METRICS)


def test_the_last_committed_result_is_read_from_git() -> None:
    name, found = last_committed()
    assert name.startswith("bench/results/")
    assert found["samples"]


def test_every_rows_offloads_are_defined_and_no_name_is_given_twice() -> None:
    assert {row.offloads for row in ROWS} == set(OFFLOADS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)

"""docs/drills.md says what docs/drills.json holds, in both languages."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.drills import rows
from tests.drills.field import CPU_PERCENT, MEMORY_MB, Case

ROOT = Path(__file__).parents[2]
CASES: list[Case] = [
    parameter.values[0]
    for file in sorted((ROOT / "tests" / "drills").glob("test_*.py"))
    for test in vars(importlib.import_module(f"tests.drills.{file.stem}")).values()
    for mark in getattr(test, "pytestmark", ())
    if mark.name == "parametrize"
    for parameter in mark.args[1]
]


def test_every_drill_has_a_title_and_every_title_a_drill() -> None:
    assert rows.TITLES.keys() == {case.name for case in CASES}


def test_every_drill_was_measured_on_every_etcd_it_is_for_and_kept_its_promises() -> None:
    kept = json.loads((ROOT / rows.FILE).read_text())["rows"]
    full = {(case.name, case.etcd) for case in CASES if case.full}
    order = list(rows.TITLES)
    assert [(row["drill"], row["etcd"]) for row in kept] == sorted(
        full, key=lambda one: (order.index(one[0]), one[1])
    )
    for row in kept:
        assert (row["full"], row["packets"]["lost"], row["events"]["lost"]) == (True, 0, 0), row
        assert row["packets"]["sent"] > 0, row
        assert row["packets"]["doubled"] == row["events"]["doubled"] == 0, row
        assert row["events"]["seen"] == row["events"]["written"] > 0, row
        agent = row["agent"]
        assert agent["cpu_percent"] <= agent["cpu_percent_before"] + CPU_PERCENT, row
        assert agent["rss_after_mb"] <= agent["rss_before_mb"] + MEMORY_MB, row


@pytest.mark.parametrize(("document", "language"), rows.DOCUMENTS.items(), ids=str)
def test_the_tables_are_those_of_the_file(document: Path, language: str) -> None:
    kept = json.loads((ROOT / rows.FILE).read_text())["rows"]
    table = rows.render(kept, language)
    assert f"{rows.BEGIN}\n{table}{rows.END}" in (ROOT / document).read_text()

"""docs/drills.md says what docs/drills.json holds, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.drills import rows

ROOT = Path(__file__).parents[2]
NAMES = {
    name
    for file in (ROOT / "tests" / "drills").glob("test_*.py")
    for name in re.findall(r'^@drill\(\s*"([^"]+)"', file.read_text(), re.MULTILINE)
}


def test_every_drill_has_a_title_and_every_title_a_drill():
    assert rows.TITLES.keys() == NAMES


def test_every_drill_was_measured_on_every_version_it_is_for_and_kept_its_promises() -> None:
    kept = json.loads((ROOT / rows.FILE).read_text())["rows"]
    versions = {name: ["3.4"] if name == "v2-and-v3" else ["3.4", "3.7"] for name in rows.TITLES}
    assert [(row["drill"], row["etcd"]) for row in kept] == [
        (name, version) for name in rows.TITLES for version in versions[name]
    ]
    for row in kept:
        assert (row["full"], row["packets"]["lost"], row["events"]["lost"]) == (True, 0, 0), row
        assert row["packets"]["sent"] > 0, row
        assert row["packets"]["doubled"] == row["events"]["doubled"] == 0, row
        assert row["events"]["seen"] == row["events"]["written"] > 0, row


@pytest.mark.parametrize(("document", "language"), rows.DOCUMENTS.items(), ids=str)
def test_the_tables_are_those_of_the_file(document: Path, language: str) -> None:
    kept = json.loads((ROOT / rows.FILE).read_text())["rows"]
    table = rows.render(kept, language)
    assert f"{rows.BEGIN}\n{table}{rows.END}" in (ROOT / document).read_text()

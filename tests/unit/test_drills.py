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


@pytest.mark.parametrize(("document", "language"), rows.DOCUMENTS.items(), ids=str)
def test_the_tables_are_those_of_the_file(document: Path, language: str) -> None:
    kept = json.loads((ROOT / rows.FILE).read_text())["rows"]
    table = rows.render(kept, language)
    assert f"{rows.BEGIN}\n{table}{rows.END}" in (ROOT / document).read_text()

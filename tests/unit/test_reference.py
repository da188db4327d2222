"""docs/reference says what the program says of itself today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flanctl.settings import TABLE

ROOT = Path(__file__).parents[2]


def written(name):
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["commands", "settings"])
def test_the_reference_is_what_the_program_says(name):
    done = subprocess.run(
        [sys.executable, "scripts/reference", "--print", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == written(name), "stale: run `make reference`"


def test_every_command_and_every_setting_with_all_its_names_is_in_it():
    assert written("commands").count("\n## flanctl ") >= 18
    text = written("settings")
    for row in TABLE.values():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{row.name}` |"))
        assert row.secret or f"`{row.flag}`" in line
        assert all(f"`{variable}`" in line for variable in row.variables())
        assert row.default is None or f"| `{row.default}` |" in line
        assert all(choice in line for choice in row.choices)

"""docs/reference/commands.md says what the commands say of themselves today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_commands_say():
    done = subprocess.run(
        [sys.executable, "scripts/reference", "--print"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    written = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert done.stdout == written, "stale: run `make reference`"
    assert written.count("\n## flanctl ") >= 18

"""The frozen file's semaphores (packaging/executable/src/waits.rs), apart from the program: counted, timed, under many threads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

EXECUTABLE = Path("packaging/executable").absolute()


@pytest.mark.timeout(300)
def test_semaphores_count_end_in_time_and_lose_nothing(tmp_path):
    locked = re.search(r'name = "libc"\nversion = "([^"]+)"', (EXECUTABLE / "Cargo.lock").read_text())
    (tmp_path / "Cargo.toml").write_text(
        '[package]\nname = "waits"\nversion = "0.0.0"\nedition = "2021"\n\n[workspace]\n\n'
        f'[dependencies]\nlibc = "={locked[1]}"\n'
    )
    (tmp_path / "src").mkdir()
    (tmp_path / "src/lib.rs").write_text(
        f'#[path = "{EXECUTABLE}/src/waits.rs"]\nmod waits;\ninclude!("{Path(__file__).with_name("waits.rs")}");\n'
    )
    done = subprocess.run(
        ["cargo", "test", "--release", "--lib"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout

"""Imports go right or down, never back: the contracts of pyproject.toml, and one door per library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def test_the_layers_are_kept():
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "5 kept, 0 broken" in done.stdout


def test_each_library_has_one_door():
    done = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "--select", "TID251", "flanctl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_door_rule_would_notice():
    """A module that is no door and imports grpc is refused."""
    done = subprocess.run(
        [
            BIN / "ruff",
            "check",
            "--no-cache",
            "--select",
            "TID251",
            "--stdin-filename",
            "flanctl/agent/x.py",
            "-",
        ],
        input="import grpc\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "etcd_grpc.py is its door" in done.stdout

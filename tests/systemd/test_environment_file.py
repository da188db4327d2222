"""EnvironmentFile= and $FLANNEL_OPTIONS asked of a running systemd: our reading is its own, and the recorded one still is."""

from __future__ import annotations

import random

import pytest

from flanctl.environment_file import Unreadable, parse, split
from tests.support.systemd_machine import bare_tree
from tests.support.systemd_reading import Reading, read_with_version
from tests.unit.test_environment_file import CASES, content

pytestmark = [pytest.mark.needs("root", "nspawn"), pytest.mark.timeout(600)]
PIECES = (
    "A", "B1", "=", "=", " ", "\t", "\n", "\n", "\r", "\\", "\\", '"', "'", "#", ";", "$", "`", "é", "--x",
    "FLANNEL_OPTIONS=", "\n FLANNEL_OPTIONS=", "\\\n",
)  # fmt: skip
RANDOM_FILES = 100


def ours(file: bytes, version: int) -> Reading:
    try:
        entries = parse(file, old_comments=version < 254)
    except Unreadable:
        return Reading(None, [])
    found = {entry.name: entry.text or "" for entry in entries if entry.counts}
    return Reading(found, split(found.get("FLANNEL_OPTIONS", "")))


def test_every_recorded_file_and_a_hundred_random_ones_are_read_as_systemd_reads_them():
    pick = random.Random()  # another hundred each time; a failure shows the file
    files = [content(case) for case in CASES.values()]
    files += ["".join(pick.choices(PIECES, k=pick.randint(1, 40))).encode() for _ in range(RANDOM_FILES)]
    version, readings = read_with_version(bare_tree(), files)
    for file, reading in zip(files, readings, strict=True):
        assert ours(file, version) == reading, file
    if version == 252:
        for case, reading in zip(CASES.values(), readings, strict=False):
            recorded = case.get("but", {}).get("252", case)
            assert (recorded["variables"], recorded["words"]) == (reading.variables, reading.words), case[
                "name"
            ]

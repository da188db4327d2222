"""The kernel's count of changed rules, from whatever bytes it answers with."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.kernel import ruleset


def answer(attributes: bytes, kind: int = 0x0A0F) -> bytes:
    body = struct.pack("!BBH", 0, 0, 0) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


GENERATION = struct.pack("=HH", 8, 1) + struct.pack("!I", 41)
PROCESS = struct.pack("=HH", 8, 2) + struct.pack("!I", 4711)
NAME = struct.pack("=HH", 7, 3) + b"nft\0"


def test_the_generation_is_found_among_the_attributes():
    for attributes in (GENERATION, PROCESS + GENERATION, NAME + GENERATION + PROCESS):
        assert ruleset._parse(answer(attributes)) == 41


def test_an_error_or_an_answer_without_it_tells_nothing():
    assert ruleset._parse(answer(GENERATION, kind=2)) is None
    assert ruleset._parse(answer(PROCESS)) is None
    assert ruleset._parse(answer(GENERATION)[:-1]) is None
    assert ruleset._parse(b"") is None


@given(st.binary(max_size=64) | st.binary(max_size=40).map(answer))
def test_any_bytes_are_a_number_or_nothing(content):
    assert ruleset._parse(content) is None or 0 <= ruleset._parse(content) < 1 << 32


def test_where_legacy_tables_are_nothing_can_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ruleset, "_LEGACY_TABLES", tmp_path / "names")
    assert not ruleset.legacy_tables()
    (tmp_path / "names").write_text("filter\n")
    assert ruleset.legacy_tables()
    assert ruleset.generation() is None

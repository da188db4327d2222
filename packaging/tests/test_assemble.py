"""What assemble.py writes behind the program: the shape that packaging/executable/src/parts.rs reads."""

from __future__ import annotations

import hashlib
import struct

import pytest
from assemble import ALIGNMENT, MAGIC, assemble
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def read(content: bytes):
    """The program's reader in Python, from the description in parts.rs: name → bytes."""
    digest, size, entries, magic = struct.unpack("<32sQQ16s", content[-64:])
    assert magic == MAGIC
    assert size == len(content)
    assert digest == hashlib.sha256(content[:-64]).digest()
    table = content[-64 - 56 * entries : -64]
    parts = {}
    for name, offset, length in struct.iter_unpack("<40sQQ", table):
        assert offset % ALIGNMENT == 0
        assert offset + length <= len(content) - 64 - len(table)
        parts[name.rstrip(b"\0").decode()] = content[offset : offset + length]
    return parts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.binary(max_size=9000),
    st.dictionaries(st.from_regex(r"\A[a-z_.]{1,40}\Z"), st.binary(max_size=9000), max_size=4),
)
def test_round_trip(tmp_path, program, parts):
    (tmp_path / "program").write_bytes(program)
    files = {}
    for number, (name, content) in enumerate(parts.items()):
        files[name] = tmp_path / str(number)
        files[name].write_bytes(content)
    assemble(tmp_path / "program", files, tmp_path / "out")
    content = (tmp_path / "out").read_bytes()
    assert content.startswith(program)
    assert read(content) == parts
    assert list(read(content)) == list(parts)


def test_executable_for_all(tmp_path):
    (tmp_path / "program").write_bytes(b"x")
    assemble(tmp_path / "program", {}, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_name_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "program").write_bytes(b"x")
    with pytest.raises(ValueError, match="too long"):
        assemble(tmp_path / "program", {"x" * 41: tmp_path / "program"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()

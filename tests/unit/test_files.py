"""Files are whole or absent."""

from __future__ import annotations

import os
import stat

import pytest

from flanctl.errors import FlanctlError, NotFound
from flanctl.files import sweep, write_atomically


def test_the_last_directory_is_made_but_not_a_longer_path(tmp_path):
    write_atomically(tmp_path / "flannel" / "subnet.env", b"x\n")
    assert (tmp_path / "flannel" / "subnet.env").read_bytes() == b"x\n"
    with pytest.raises(NotFound, match="there is no directory"):
        write_atomically(tmp_path / "a" / "b" / "c", b"x\n")
    assert not (tmp_path / "a").exists()


def test_the_mode_does_not_depend_on_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path):
    target = tmp_path / "f"
    target.mkdir()
    with pytest.raises(FlanctlError, match="cannot write"):
        write_atomically(target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.needs("root")
def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(FlanctlError, match="cannot write"):
        write_atomically(__import__("pathlib").Path("/dev/full/x"), b"x")


def test_sweeping_removes_our_unfinished_files_and_nobody_elses(tmp_path):
    write_atomically(tmp_path / "subnet.env", b"x")
    (tmp_path / ".subnet.env.flanctl-k3j2h1").write_bytes(b"hal")
    (tmp_path / ".subnet.env.bak").write_bytes(b"an operator's")
    sweep(tmp_path / "subnet.env")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".subnet.env.bak", "subnet.env"]

"""Files are whole or absent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flanctl.errors import FlanctlError, Invalid, NotFound
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


def test_what_power_loss_could_take_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    """Written, the file synced, renamed, the directory synced: in any other order a name may show an empty file."""
    done = []
    fsync, rename = os.fsync, os.rename

    def synced(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(("fsync", path, path.read_bytes() if path.is_file() else None))
        fsync(handle)

    def renamed(old, new):
        done.append(("rename", Path(old), Path(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    folder = tmp_path / "flannel"
    write_atomically(folder / "subnet.env", b"whole\n")
    temporary = done[1][1]
    assert done == [
        ("fsync", tmp_path, None),  # the name of the directory that was made
        ("fsync", temporary, b"whole\n"),
        ("rename", temporary, folder / "subnet.env"),
        ("fsync", folder, None),
    ]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path):
    target = tmp_path / "f"
    target.mkdir()
    with pytest.raises(FlanctlError, match="cannot write"):
        write_atomically(target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_pipe_or_device_is_refused_and_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(Invalid, match="device or pipe"):
            write_atomically(tmp_path / name, b"x")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(Invalid):
        write_atomically(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()


def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_sweeping_removes_our_unfinished_files_and_nobody_elses(tmp_path):
    write_atomically(tmp_path / "subnet.env", b"x")
    (tmp_path / ".subnet.env.flanctl-k3j2h1").write_bytes(b"hal")
    (tmp_path / ".subnet.env.bak").write_bytes(b"an operator's")
    sweep(tmp_path / "subnet.env")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".subnet.env.bak", "subnet.env"]

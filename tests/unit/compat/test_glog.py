"""The log as glog writes it: lines, files, links, severities, and what happens when they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import threading
from io import StringIO
from typing import TYPE_CHECKING

import pytest

from flanctl.compat import glog
from flanctl.compat.glog import Glog
from flanctl.flanneld_line import threshold

if TYPE_CHECKING:
    from pathlib import Path

LINE = re.compile(r"([IWEF])(\d{4}) \d\d:\d\d:\d\d\.\d{6} ( *\d+) test_glog\.py:\d+\] (.*)")


def body(path: Path) -> list[str]:
    return path.read_text().splitlines()[4:]


def test_a_line_has_glogs_form_and_names_its_caller() -> None:
    out = StringIO()
    Glog(out).warn("peer gone", subnet="172.17.1.0/24")
    found = LINE.fullmatch(out.getvalue().rstrip("\n"))
    assert found
    assert found[1] == "W"
    assert int(found[3]) == os.getpid()
    assert len(found[3]) >= 7
    assert found[4] == "peer gone subnet=172.17.1.0/24"


def test_the_ready_line_is_an_info_line() -> None:
    out = StringIO()
    assert Glog(out).ready(network="172.17.0.0/16", mtu=1472) == "network=172.17.0.0/16 mtu=1472"
    assert out.getvalue().startswith("I")
    assert out.getvalue().endswith("] ready network=172.17.0.0/16 mtu=1472\n")


def test_each_file_holds_its_severity_and_those_above(tmp_path: Path) -> None:
    out = StringIO()
    to = Glog(out, directory=str(tmp_path))
    to.info("one")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_symlink()) == ["flanneld.INFO"]
    to.error("three")
    to.warn("two")
    to.close()
    said = {
        tag: [line.rpartition("] ")[2] for line in body(tmp_path / f"flanneld.{tag}")]
        for tag in ("INFO", "WARNING", "ERROR")
    }
    assert said == {"INFO": ["one", "three", "two"], "WARNING": ["three", "two"], "ERROR": ["three"]}
    assert not (tmp_path / "flanneld.FATAL").exists()
    assert [line.rpartition("] ")[2] for line in out.getvalue().splitlines()] == ["three"]


def test_names_links_and_header_are_glogs(tmp_path: Path) -> None:
    to = Glog(StringIO(), directory=str(tmp_path))
    to.info("x")
    link = tmp_path / "flanneld.INFO"
    host = os.uname().nodename.partition(".")[0]
    name = os.readlink(link)
    assert re.fullmatch(rf"flanneld\.{re.escape(host)}\.\w+\.log\.INFO\.\d{{8}}-\d{{6}}\.{os.getpid()}", name)
    header = link.read_text().splitlines()[:4]
    assert re.fullmatch(r"Log file created at: \d{4}/\d\d/\d\d \d\d:\d\d:\d\d", header[0])
    assert header[1] == f"Running on machine: {host}"
    assert header[2].startswith("Binary: flanctl ")
    assert header[3] == "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg"
    assert link.stat().st_mode & 0o777 == 0o644 & ~_umask()
    to.close()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_line_is_in_the_file_when_it_is_logged(tmp_path: Path) -> None:
    to = Glog(StringIO(), directory=str(tmp_path))
    to.info("at once")
    assert "at once" in (tmp_path / "flanneld.INFO").read_text()
    to.close()


def test_the_link_goes_to_the_newest_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "flanneld.INFO").symlink_to("older")
    (tmp_path / "flanneld.WARNING").write_text("somebody's\n")
    to = Glog(StringIO(), directory=str(tmp_path))
    to.warn("x")
    assert os.readlink(tmp_path / "flanneld.INFO").startswith("flanneld.")
    assert (tmp_path / "flanneld.WARNING").read_text() == "somebody's\n"
    to.close()


@pytest.mark.parametrize(("at_least", "words"), [(0, ["a", "b", "c"]), (1, ["b", "c"]), (2, ["c"]), (3, [])])
def test_stderrthreshold(at_least: int, words: list[str], tmp_path: Path) -> None:
    out = StringIO()
    to = Glog(out, directory=str(tmp_path), at_least=at_least)
    to.info("a")
    to.warn("b")
    to.error("c")
    to.close()
    assert [line.rpartition("] ")[2] for line in out.getvalue().splitlines()] == words


def test_alsologtostderr(tmp_path: Path) -> None:
    out = StringIO()
    to = Glog(out, directory=str(tmp_path), also_stderr=True)
    to.info("both")
    to.close()
    assert "both" in out.getvalue()
    assert "both" in (tmp_path / "flanneld.INFO").read_text()


def test_thresholds_by_name_and_number() -> None:
    assert [threshold(text) for text in ("INFO", "warning", "2", "FATAL")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="invalid literal"):
        threshold("LOUD")


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_directory_that_is_none_is_said_and_stderr_is_used(kind: str, tmp_path: Path) -> None:
    """0.7.1 goes to /tmp without a word."""
    target = tmp_path / "log"
    if kind == "file":
        target.write_text("")
    out = StringIO()
    to = Glog(out, directory=str(target))
    to.info("still here")
    first, second = out.getvalue().splitlines()
    assert first.startswith("W")
    assert f"no log files: {target} " in first
    assert f'try="mkdir -p {target}"' in first
    assert second.endswith("still here")


def test_a_full_disk_is_said_once_ends_nothing_and_is_left_as_soon_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = StringIO()
    to = Glog(out, directory=str(tmp_path))
    to.info("before")
    real, room = os.write, 10

    def full(handle: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(handle, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr(glog.os, "write", full)
    to.info("lost one")
    to.info("lost two")
    monkeypatch.undo()
    to.info("after")
    to.close()
    said = [line.rpartition("] ")[2] for line in out.getvalue().splitlines()]
    assert said == [
        f"cannot write a log file in {tmp_path}: No space left on device; its lines come here",
        "lost one",
        "lost two",
    ]
    lines = body(tmp_path / "flanneld.INFO")
    assert len(lines) == 3
    assert len(lines[1]) == 10
    assert lines[2].endswith("] after")


def test_a_file_that_is_large_enough_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = iter(["20260101-000001", "20260101-000002"])
    real = glog.time.strftime
    monkeypatch.setattr(
        glog.time,
        "strftime",
        lambda form, *now: next(stamps) if form == "%Y%m%d-%H%M%S" else real(form, *now),
    )
    monkeypatch.setattr(glog, "MAX_BYTES", 400)
    to = Glog(StringIO(), directory=str(tmp_path))
    to.info("x" * 100)
    to.info("y" * 100)
    to.close()
    files = sorted(path for path in tmp_path.iterdir() if not path.is_symlink())
    assert [path.name.split(".")[-2] for path in files] == ["20260101-000001", "20260101-000002"]
    assert "xxx" in files[0].read_text()
    assert "yyy" in files[1].read_text()
    assert os.readlink(tmp_path / "flanneld.INFO") == files[1].name


def test_a_stranger_cannot_make_us_write_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log_dir may be /tmp."""
    victim = tmp_path / "victim"
    victim.write_text("")
    monkeypatch.setattr(glog.time, "strftime", lambda form, *now: "0")
    host = os.uname().nodename.partition(".")[0]
    (tmp_path / f"flanneld.{host}.{glog._user()}.log.INFO.0.{os.getpid()}").symlink_to(victim)
    out = StringIO()
    to = Glog(out, directory=str(tmp_path))
    to.info("x")
    assert victim.read_text() == ""
    assert "x" in out.getvalue()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    to = Glog(StringIO(), directory=str(tmp_path))

    def work(number: int) -> None:
        for turn in range(50):
            to.info(f"{number} {turn} end")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    to.close()
    lines = body(tmp_path / "flanneld.INFO")
    assert len(lines) == 200
    assert all(LINE.fullmatch(line) and line.endswith(" end") for line in lines)

"""Called by another name it is that program; every other name is flanctl."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flanctl import __version__
from tests.support.cli import Answer, flanctl, program

ENV = {"PATH": os.environ["PATH"]}


def said(*words: str) -> tuple[int, str]:
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def link(kind: str, folder: Path, name: str) -> str:
    """Another name for the program under test. Its file may be on another file system: then a copy, hard-linked."""
    target = Path(program()[0])
    path = folder / name
    if kind == "symlink":
        path.symlink_to(target)
    else:
        copy = folder / "the-file"
        shutil.copy2(target, copy)
        os.link(copy, path)
    return str(path)


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_a_link_decides_by_its_name(kind: str, tmp_path: Path) -> None:
    assert said(link(kind, tmp_path, "flanneld"), "--version")[1].endswith(" as flanneld\n")


@pytest.mark.parametrize(
    ("name", "word", "code", "says"),
    [
        ("flanneld", "--nosuch", 2, "flanneld: flag provided but not defined: -nosuch"),
        ("flanneld-start", "--iface=x", 2, "flanneld-start: FLANNEL_ETCD_ENDPOINTS is empty"),
        ("mk-docker-opts.sh", "-z", 1, "Illegal option -z"),
        ("flanctl", "--nosuch", 2, "flanctl: No such option"),
        ("flanneld2", "--nosuch", 2, "flanctl: No such option"),
        ("Flanneld", "--nosuch", 2, "flanctl: No such option"),
        ("mk-docker-opts", "--nosuch", 2, "flanctl: No such option"),
    ],
)
def test_each_name(name: str, word: str, code: int, says: str, tmp_path: Path) -> None:
    ended, text = said(link("symlink", tmp_path, name), word)
    assert ended == code
    assert text.startswith(says)


def test_a_link_to_a_link_goes_by_the_name_that_was_called(tmp_path: Path) -> None:
    first = link("symlink", tmp_path, "mk-docker-opts.sh")
    second = tmp_path / "flanneld"
    second.symlink_to(first)
    assert said(str(second), "--version")[1].endswith(" as flanneld\n")


@pytest.mark.skipif("FLANCTL_EXE" not in os.environ, reason="a script has no argv[0] of its own: FLANCTL_EXE")
def test_exec_a(tmp_path: Path) -> None:
    command = f"exec -a flanneld {program()[0]} --version"
    assert said("bash", "-c", command)[1].endswith(" as flanneld\n")


@pytest.mark.parametrize(
    "words", [["version"], ["--version"], ["--prefix", "/p", "--version"], ["version", "-w", "table"]]
)
def test_the_version_is_the_same_by_every_way(words):
    assert flanctl(*words) == Answer(0, f"flanctl {__version__}\n", "")

"""Called by another name it is that program."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.support.capabilities import frozen_executable
from tests.support.frozen import run

pytestmark = [pytest.mark.needs("frozen"), pytest.mark.smoke]

PROGRAMS = {
    "flanneld": (["--version"], 0, "as flanneld"),
    "flanneld-start": (["--iface=x"], 2, "flanneld-start: FLANNEL_ETCD_ENDPOINTS is empty"),
    "mk-docker-opts.sh": (["-z"], 1, "Illegal option -z"),
    "flanctl": (["version"], 0, "flanctl 0."),
    "flannel": (["version"], 0, "flanctl 0."),
    "flanctl-0.1.0": (["version"], 0, "flanctl 0."),
    "FLANNELD": (["version"], 0, "flanctl 0."),
    "flanneld.bak": (["version"], 0, "flanctl 0."),
    "ф 岡": (["version"], 0, "flanctl 0."),
}


def _symlink(name, folder):
    (folder / name).symlink_to(frozen_executable())
    return [], folder / name


def _relative_symlink(name, folder):
    shutil.copy2(frozen_executable(), folder / "it")
    (folder / name).symlink_to("it")
    return [], folder / name


def _hard_link(name, folder):
    shutil.copy2(frozen_executable(), folder / "it")
    os.link(folder / "it", folder / name)
    return [], folder / name


def _exec_a(name, _folder):
    return ["bash", "-c", f'exec -a "{name}" "$0" "$@"'], frozen_executable()


@pytest.mark.parametrize("kind", [_symlink, _relative_symlink, _hard_link, _exec_a])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_name_chooses_the_program(kind, name, tmp_path):
    words, code, says = PROGRAMS[name]
    prefix, path = kind(name, tmp_path)
    answer = run(*words, prefix=prefix, exe=path)
    assert (answer.code, says in answer.out + answer.err) == (code, True), answer


def test_an_empty_name_is_flanctl():
    answer = run("version", prefix=_exec_a("", None)[0])
    assert answer.out.startswith("flanctl 0."), answer


def test_found_by_path(tmp_path):
    (tmp_path / "flanneld").symlink_to(frozen_executable())
    answer = run("--version", prefix=["env", f"PATH={tmp_path}"], exe="flanneld")
    assert "as flanneld" in answer.out + answer.err

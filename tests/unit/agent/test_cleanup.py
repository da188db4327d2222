"""What keeps a folder from going is no reason to stop cleaning up, unless it is a refusal."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flanctl.agent.cleanup import _rmdir
from flanctl.errors import FlanctlError, NotPermitted


def refusing(monkeypatch, number):
    def rmdir(_self):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "rmdir", rmdir)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY])
def test_a_folder_that_is_in_use_or_gone_stays_as_it_is(monkeypatch, number):
    refusing(monkeypatch, number)
    _rmdir(Path("/run/flannel"))


def test_a_refusal_is_told(monkeypatch):
    refusing(monkeypatch, errno.EACCES)
    with pytest.raises(NotPermitted, match="cannot remove /run/flannel"):
        _rmdir(Path("/run/flannel"))
    refusing(monkeypatch, errno.EROFS)
    with pytest.raises(FlanctlError):
        _rmdir(Path("/run/flannel"))


def test_an_empty_one_goes(tmp_path):
    folder = tmp_path / "flannel"
    folder.mkdir()
    _rmdir(folder)
    assert not folder.exists()

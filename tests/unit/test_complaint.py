"""How a command ends that met something nobody foresaw."""

from __future__ import annotations

import sys
import types

import pytest

from flanctl.complaint import ended


def broken():
    raise ZeroDivisionError("impossible")


@pytest.fixture
def frozen_with(monkeypatch):
    """As if frozen into a file of which `_frozen.damage()` says this."""

    def freeze(damage):
        module = types.ModuleType("_frozen")
        module.damage = lambda: damage
        monkeypatch.setitem(sys.modules, "_frozen", module)
        monkeypatch.setattr(sys, "frozen", True, raising=False)

    return freeze


def test_a_bug_is_told_as_one():
    said = []
    assert ended(broken, said.append) != 0
    assert (said[0].id, said[0].message) == ("bug", "unexpected ZeroDivisionError: impossible")


def test_a_bug_in_a_whole_file_is_a_bug(frozen_with):
    frozen_with(None)
    said = []
    assert ended(broken, said.append) != 0
    assert said[0].id == "bug"


def test_what_fails_like_a_bug_in_a_damaged_file_is_the_damage(frozen_with):
    frozen_with("its content was altered")
    said = []
    assert ended(broken, said.append) != 0
    assert (said[0].id, said[0].message) == ("damaged", "this file is damaged: its content was altered")
    assert "flanctl.sha256" in said[0].hint
    assert isinstance(said[0].__cause__, ZeroDivisionError)

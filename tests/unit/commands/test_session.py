"""From settings to a connection."""

from __future__ import annotations

import pytest

from flanctl.commands.session import connection, dialect_of
from flanctl.errors import NotFound, UsageError
from flanctl.settings import resolve


def settings(**flags):
    return resolve(flags, environment={}, sysconfig_files=[])


def test_etcdctls_user_with_password_is_two_things_and_the_password_is_never_shown():
    found = connection(settings(user="root:geheim:x"))
    assert (found.user, found.password) == ("root", "geheim:x")
    assert "geheim" not in repr(found)


def test_a_password_file_beats_what_stands_behind_the_name(tmp_path):
    file = tmp_path / "password"
    file.write_text("sesam\n")
    found = connection(settings(user="root:geheim", password_file=str(file)))
    assert (found.user, found.password) == ("root", "sesam")


def test_a_missing_password_file_is_named():
    with pytest.raises(NotFound, match="no password file /nonexistent"):
        connection(settings(user="root", password_file="/nonexistent"))


def test_an_unknown_dialect_is_a_usage_error():
    with pytest.raises(UsageError, match=r"--dialect .* one of 0\.7, 0\.28"):
        dialect_of(settings(dialect="9"))

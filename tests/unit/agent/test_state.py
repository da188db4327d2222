"""What a host remembers."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.state import FILE, State, load, save
from flanctl.errors import Invalid


def test_what_was_saved_is_loaded(tmp_path):
    state = State("abc", "/jxdd/network", IPv4Network("172.17.41.0/24"))
    save(tmp_path / "state", state)
    assert load(tmp_path / "state") == state


def test_no_file_is_no_state(tmp_path):
    assert load(tmp_path) is None


def test_instances_differ():
    assert State.new().instance != State.new().instance


@given(st.binary(max_size=200))
def test_any_bytes_are_a_state_or_invalid(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("s")
    (folder / FILE).write_bytes(content)
    with pytest.raises(Invalid):
        load(folder)


def test_deep_json_is_invalid_not_a_crash(tmp_path):
    (tmp_path / FILE).write_bytes(b"[" * 100_000)
    with pytest.raises(Invalid):
        load(tmp_path)

"""What an agent leaves to its successor, for a start without a registry."""

from __future__ import annotations

import json
import os
import time
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flanctl.agent.known import FILE, Known, forget, load, save
from flanctl.errors import Invalid
from flanctl.model.dialect import Dialect
from flanctl.model.peers import Peer
from flanctl.registry.stores.store import Entry

KNOWN = Known(
    "/jxdd/network",
    Dialect.V0_7,
    b'{"Network":"172.17.0.0/16"}',
    Entry("/jxdd/network/subnets/172.17.41.0-24", b'{"PublicIP":"192.168.6.2"}', 48211, "7587848"),
    1.8e9,
    (
        Peer(IPv4Network("172.17.7.0/24"), IPv4Address("192.168.6.15"), None, None),
        Peer(
            IPv4Network("172.17.9.0/24"),
            IPv4Address("192.168.6.9"),
            "vxlan",
            {"VtepMAC": "82:4b:b6:2f:54:4e"},
        ),
    ),
    "v2",
)


def test_what_was_saved_is_loaded_and_nobody_else_may_read_it(tmp_path):
    save(tmp_path, KNOWN)
    assert load(tmp_path) == KNOWN
    assert os.stat(tmp_path / FILE).st_mode & 0o777 == 0o600
    assert 0 < KNOWN.left < 1.8e9 - time.time() + 1


def test_a_file_of_before_the_api_was_written_is_read(tmp_path):
    save(tmp_path, KNOWN)
    document = json.loads((tmp_path / FILE).read_text())
    assert document.pop("api") == "v2"
    (tmp_path / FILE).write_text(json.dumps(document))
    assert load(tmp_path).api == ""
    (tmp_path / FILE).write_text(json.dumps({**document, "api": "v9"}))
    with pytest.raises(Invalid, match="cannot be understood"):
        load(tmp_path)


def test_a_reservation_has_no_end(tmp_path):
    known = Known(KNOWN.prefix, KNOWN.dialect, KNOWN.config, KNOWN.entry, None, ())
    save(tmp_path, known)
    assert load(tmp_path) == known
    assert known.left is None


def test_what_was_forgotten_is_not_there_and_forgetting_twice_is_fine(tmp_path):
    assert load(tmp_path) is None
    save(tmp_path, KNOWN)
    forget(tmp_path)
    forget(tmp_path)
    assert load(tmp_path) is None


def test_a_directory_in_its_place_is_said(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(Invalid, match="cannot read"):
        load(tmp_path)
    forget(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(["format", "prefix", "dialect", "config", "lease", "ends", "peers"]), JSON)
def test_whatever_stands_in_a_field_is_understood_or_invalid(tmp_path, field, value):
    save(tmp_path, KNOWN)
    path = tmp_path / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    try:
        found = load(tmp_path)
    except Invalid as error:
        assert str(path) in error.message
    else:
        assert found is not None
        assert found.ends is None or found.ends == found.ends, "not a number is no time"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_invalid_and_no_crash(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(Invalid):
        load(tmp_path)


def test_five_thousand_peers_are_written_and_read_in_no_time(tmp_path):
    peers = tuple(
        Peer(IPv4Network((0x0A000000 + n * 256, 24)), IPv4Address(0xAC100000 + n), None, None)
        for n in range(5000)
    )
    known = Known(KNOWN.prefix, KNOWN.dialect, KNOWN.config, KNOWN.entry, 1.8e9, peers)
    began = time.thread_time()
    save(tmp_path, known)
    assert load(tmp_path) == known
    assert time.thread_time() - began < 2

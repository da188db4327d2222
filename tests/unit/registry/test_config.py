"""Where the config is, and that two operators cannot overwrite each other unseen."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotFound, UsageError
from flanctl.model.dialect import Dialect
from flanctl.registry.config import clean_prefix, config_key, read_config, write_config
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import Changed, KeyExists


@pytest.mark.parametrize(
    ("given_", "joined"),
    [
        ("/jxdd/network", "/jxdd/network"),
        ("/jxdd//network/", "/jxdd/network"),
        ("jxdd/network", "jxdd/network"),
        ("//a", "/a"),
    ],
)
def test_prefixes_are_joined_as_flannel_joins_them(given_, joined):
    assert clean_prefix(given_) == joined


@pytest.mark.parametrize("text", ["", "/", "//", "/a b", "/a\tb", "/a\x00", "/a/../b", "/./a", "/ä\u2028"])
def test_prefixes_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UsageError):
        clean_prefix(text)


@given(
    st.lists(st.sampled_from(["/", "//", "a", "jxdd", "net-1", "172.17.0.0-16", "a.b", "..x"]), min_size=1)
)
def test_any_prefix_is_joined_as_path_join_does(parts):
    """POSIX keeps two slashes at the front, Go's path.Clean does not; else they clean alike."""
    text = "".join(parts)
    if not text.strip("/"):
        return
    joined = posixpath.normpath(posixpath.join(text, "config"))
    assert config_key(clean_prefix(text)) == ("/" + joined.lstrip("/") if text.startswith("/") else joined)


@given(st.text(max_size=40))
def test_cleaning_is_idempotent_or_refuses(text):
    try:
        once = clean_prefix(text)
    except FlanctlError:
        return
    assert clean_prefix(once) == once


def test_no_config_says_where_it_looked_and_what_to_do():
    with pytest.raises(NotFound, match="/jxdd/network/config") as missing:
        read_config(MemoryStore(), "/jxdd/network", Dialect.V0_28)
    assert missing.value.id == "no-config"
    assert "flanctl net init" in missing.value.hint


def test_a_broken_config_names_its_key_and_position():
    store = MemoryStore()
    store.create(config_key("/p"), b'{"Network":\n 17}', ttl=None)
    with pytest.raises(Invalid, match=r"/p/config line 2, column 2"):
        read_config(store, "/p", Dialect.V0_28)


def test_two_operators_at_once_cannot_overwrite_each_other_unseen():
    store = MemoryStore()
    first = write_config(store, "/p", b'{"Network":"10.0.0.0/8"}', expected=None)
    with pytest.raises(KeyExists):
        write_config(store, "/p", b'{"Network":"10.1.0.0/16"}', expected=None)
    write_config(store, "/p", b'{"Network":"10.2.0.0/16"}', expected=first)
    with pytest.raises(Changed):
        write_config(store, "/p", b'{"Network":"10.3.0.0/16"}', expected=first)
    assert store.get("/p/config").value == b'{"Network":"10.2.0.0/16"}'


def test_a_huge_config_is_refused():
    with pytest.raises(Invalid, match="larger"):
        write_config(MemoryStore(), "/p", b" " * 1_000_001, expected=None)


def test_what_a_running_network_lives_by_is_read_as_flannel_reads_it():
    """An operator's misspelt option or doubled key must not keep an agent from starting; `net validate` refuses it."""
    store = MemoryStore()
    text = b'{"Network":"10.0.0.0/8","Network":"10.1.0.0/16","Backend":{"Type":"udp","Prot":9}}'
    store.create(config_key("/p"), text, ttl=None)
    config = read_config(store, "/p", Dialect.V0_28).config
    assert str(config.network) == "10.1.0.0/16"
    assert config.udp_port == 8285
    assert len(config.warnings) == 2

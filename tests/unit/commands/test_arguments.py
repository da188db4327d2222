"""Subnets and addresses as arguments, and how a shell completes them."""

from __future__ import annotations

import time
from ipaddress import IPv4Address, IPv4Network

import pytest

from flanctl.commands.arguments import exact_subnet, exact_subnet_or_address, subnet_or_address
from flanctl.errors import UsageError
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import flanctl

PREFIX = "/jxdd/network"


def test_who_only_looks_may_be_sloppy_and_who_changes_may_not():
    assert subnet_or_address("172.17.41.7/24") == IPv4Network("172.17.41.0/24")
    assert exact_subnet("172.17.41.0/24") == IPv4Network("172.17.41.0/24")
    assert exact_subnet_or_address("172.17.41.7") == IPv4Address("172.17.41.7")
    with pytest.raises(UsageError) as refused:
        exact_subnet_or_address("172.17.41.7/24")
    assert refused.value.hint == "172.17.41.0/24 holds it"


@pytest.mark.parametrize(
    "text", ["", "/", "x", "172.17.41", "172.17.41.0/", "172.17.41.0/33", "::1", "::/0", "172.17.41.0/24/2"]
)
def test_nonsense_is_a_usage_error(text):
    for read in (subnet_or_address, exact_subnet, exact_subnet_or_address):
        with pytest.raises(UsageError):
            read(text)


@pytest.fixture
def registry(tmp_path):
    path = f"sqlite:{tmp_path / 'registry.db'}"
    store = SqliteStore(path.removeprefix("sqlite:"))
    for third, ip in ((7, b"192.168.6.15"), (41, b"192.168.6.2"), (42, b"192.168.6.2")):
        key = f"{PREFIX}/subnets/172.17.{third}.0-24"
        store.create(key, b'{"PublicIP":"' + ip + b'"}', ttl=60)
    store.close()
    return path


def complete(*words, **env):
    ask = {
        "_FLANCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("flanctl", *words)),
        "COMP_CWORD": str(len(words)),
    }
    answer = flanctl(env=ask | env)
    assert (answer.code, answer.err) == (0, "")
    return [line.removeprefix("plain,") for line in answer.out.splitlines() if line]


@pytest.mark.parametrize("command", [("subnets", "get"), ("release",), ("unreserve",)])
def test_a_shell_completes_subnets_and_public_ips(registry, command):
    words = ("--endpoints", registry, *command)
    assert complete(*words, "172.17.4") == ["172.17.41.0/24", "172.17.42.0/24"]
    assert complete(*words, "192.") == ["192.168.6.15", "192.168.6.2"]
    assert complete(*command, "172.17.7", FLANCTL_ENDPOINTS=registry) == ["172.17.7.0/24"]


def test_completion_is_silent_and_soon_over_when_the_registry_is_not_there(tmp_path):
    began = time.monotonic()
    assert complete("--endpoints", "http://192.0.2.1:2379", "release", "1") == []
    assert complete("--endpoints", f"sqlite:{tmp_path / 'none.db'}", "release", "1") == []
    assert time.monotonic() - began < 10
    assert not (tmp_path / "none.db").exists()

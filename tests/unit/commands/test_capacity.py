"""`flanctl capacity`: counted from what stands there."""

from __future__ import annotations

import json
import re

import pytest

from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import flanctl

PREFIX = "/jxdd/network"


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(str(tmp_path / "registry.db"))
    store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
    yield store
    store.close()


@pytest.fixture
def run(tmp_path, store):
    env = {
        "FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'registry.db'}",
        "FLANCTL_SUBNET_FILE": str(tmp_path / "subnet.env"),
        "FLANCTL_STATE_DIR": str(tmp_path),
        "FLANCTL_IFACE": "127.0.0.1",
        "FLANCTL_PUBLIC_IP": "192.168.6.2",
    }
    return lambda *words: flanctl("capacity", *words, env=env)


@pytest.fixture
def full(store):
    """A lease of 4 subnets and one outside, a reservation, an unreadable key, two plain leases."""
    for name, ip, ttl in (
        ("172.17.7.0-24", 15, 7800.5),
        ("172.17.8.0-24", 16, 86400),
        ("172.17.60.0-24", 60, None),
        ("172.17.64.0-22", 64, 86400),
        ("10.9.9.0-24", 99, 86400),
    ):
        store.create(f"{PREFIX}/subnets/{name}", b'{"PublicIP":"192.168.6.%d"}' % ip, ttl=ttl)
    store.create(f"{PREFIX}/subnets/172.17.70.0-24", b"{", ttl=None)


def test_the_table(run, full):
    answer = run()
    assert (answer.code, answer.err) == (0, "")
    lines = [re.sub(r" +", " ", line) for line in answer.out.splitlines()]
    assert lines[:5] == [
        "network 172.17.0.0/16, subnets /24 from 172.17.1.0 to 172.17.255.0",
        "STATE SUBNETS SHARE",
        "leased 6 2.4% oldest expiry in 2h10m (172.17.7.0/24, 192.168.6.15)",
        "reserved 1 0.4%",
        "unreadable 1 0.4% counted as taken",
    ]
    assert re.fullmatch(r"free 247 96\.9% next for this host: 172\.17\.\d+\.0/24", lines[5])
    assert lines[6] == "total 255"
    assert max(map(len, answer.out.splitlines())) <= 100


def test_simple_and_json_are_promises(run, full):
    assert run("-w", "simple").out == (
        "leased\t6\t2.4\nreserved\t1\t0.4\nunreadable\t1\t0.4\nfree\t247\t96.9\ntotal\t255\t100.0\n"
    )
    document = json.loads(run("-w", "json").out)
    assert [document[name] for name in ("leased", "reserved", "unreadable", "free", "total")] == [
        6,
        1,
        1,
        247,
        255,
    ]
    oldest = document["oldest_expiry"]
    assert (oldest["subnet"], oldest["public_ip"]) == ("172.17.7.0/24", "192.168.6.15")
    assert 7700 < oldest["ttl_seconds"] <= 7800
    assert document["this_host"]["held"] is False
    assert document["this_host"]["public_ip"] == "192.168.6.2"
    assert set(document) == {
        "schema", "network", "subnet_len", "subnet_min", "subnet_max", "revision", "stale", "as_of", "leased",
        "reserved", "unreadable", "free", "total", "oldest_expiry", "this_host",
    }  # fmt: skip


def test_next_is_what_an_agent_here_would_take(run, store, tmp_path):
    (tmp_path / "subnet.env").write_text(
        "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    assert "next for this host: 172.17.41.0/24" in run().out
    store.create(f"{PREFIX}/subnets/172.17.5.0-24", b'{"PublicIP":"192.168.6.2"}', ttl=60)
    assert "this host has 172.17.5.0/24" in run().out
    assert json.loads(run("-w", "json").out)["this_host"] == {
        "public_ip": "192.168.6.2",
        "subnet": "172.17.5.0/24",
        "held": True,
    }


@pytest.mark.parametrize(
    ("least", "code"), [("247", 0), ("248", 1), ("96.8%", 0), ("96.9%", 1), ("0", 0), ("100%", 1)]
)
def test_min_free_is_for_cron(run, full, least, code):
    answer = run("--min-free", least, "-w", "simple")
    assert answer.code == code
    assert answer.out.startswith("leased\t6")
    assert bool(answer.err) == (code == 1)
    if code:
        assert f"247 of 255 subnets free (96.9%), fewer than {least}" in answer.err


@pytest.mark.parametrize("least", ["-1", "x", "101%", "%", "1.5", "nan%", "inf", "1e400%"])
def test_nonsense_is_a_usage_error(run, least):
    answer = run("--min-free", least)
    assert (answer.code, answer.out) == (2, "")


def test_a_full_network_says_so(run, store):
    for half in ("172.17.0.0-17", "172.17.128.0-17"):
        store.create(f"{PREFIX}/subnets/{half}", b'{"PublicIP":"192.168.6.2"}', ttl=60)
    answer = run("--min-free", "1", "-w", "json")
    document = json.loads(answer.out)
    assert (document["free"], document["leased"], document["this_host"]["subnet"]) == (0, 255, None)
    assert (answer.code, json.loads(answer.err)["error"]["id"]) == (1, "pool-full")


def test_without_a_config_it_is_4(tmp_path):
    SqliteStore(str(tmp_path / "r.db")).close()
    answer = flanctl("capacity", env={"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'r.db'}"})
    assert (answer.code, answer.out) == (4, "")

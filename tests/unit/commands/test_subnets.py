"""`flanctl subnets`: golden output over a registry with everything in it."""

from __future__ import annotations

import json
import re

import pytest

from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import flanctl

PREFIX = "/jxdd/network"


@pytest.fixture
def registry(tmp_path):
    path = tmp_path / "registry.db"
    store = SqliteStore(str(path))

    def put(key, value, ttl):
        store.create(f"{PREFIX}/{key}", value, ttl=ttl)

    put("config", b'{"Network":"172.17.0.0/16"}', None)
    put("subnets/172.17.7.0-24", b'{"PublicIP":"192.168.6.15"}', 81699.5)
    put("subnets/172.17.41.0-24", b'{"PublicIP":"127.0.0.1","PublicIPv6":null}', 69159.5)
    put("subnets/172.17.60.0-24", b'{"PublicIP":"192.168.6.60"}', None)
    put("subnets/172.17.88.0-24", b'{"PublicIP":"10.0.2.15"}', 86399.5)
    put(
        "subnets/172.17.89.0-24",
        b'{"PublicIP":"10.0.2.15","BackendType":"vxlan","BackendData":{"VNI":1}}',
        86399.5,
    )
    put("subnets/172.17.x.0-24", b"{}", 86399.5)
    put(
        "flanctl/hosts/127.0.0.1",
        b'{"host":"node1","version":"0.4.0","data_path":"userspace","instance":"abc"}',
        86399.5,
    )
    store.close()
    return {"FLANCTL_ENDPOINTS": f"sqlite:{path}"}


def test_the_table(registry):
    answer = flanctl("subnets", "ls", env=registry)
    assert answer.code == 0
    lines = [re.sub(r" +", " ", line) for line in answer.out.splitlines()]
    assert lines == [
        " SUBNET PUBLIC-IP BACKEND TTL KIND RUNS HOST PROBLEM",
        " 172.17.7.0/24 192.168.6.15 udp 22h41m lease flanneld - -",
        "* 172.17.41.0/24 127.0.0.1 udp 19h12m lease flanctl node1 -",
        " 172.17.60.0/24 192.168.6.60 - never reservation - - -",
        " 172.17.88.0/24 10.0.2.15 udp 23h59m lease ? - duplicate-ip",
        " 172.17.89.0/24 10.0.2.15 vxlan 23h59m lease ? - duplicate-ip",
    ]
    assert answer.err == ("5 of 255 subnets, * this host\n1 key cannot be read: 172.17.x.0-24 (bad-key)\n")
    assert max(map(len, answer.out.splitlines())) <= 100


def test_without_ttls_the_columns_are_the_same_and_nobody_is_asked_for_them(registry):
    lines = flanctl("subnets", "ls", "--no-ttl", "-w", "simple", env=registry).out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "172.17.7.0/24\t192.168.6.15\tlease\t-\tudp\tflanneld\t-\t-"
    assert {line.split("\t")[3] for line in lines} == {"-"}
    table = flanctl("subnets", "ls", "--no-ttl", env=registry).out.splitlines()
    assert [line.split()[-5] for line in table[2:4]] == ["?", "never"]
    first = json.loads(flanctl("subnets", "ls", "--no-ttl", "-w", "json", env=registry).out)["subnets"][0]
    assert (first["ttl_seconds"], first["expires"]) == (None, None)


def test_simple_is_a_promise(registry):
    assert flanctl("subnets", "ls", "-w", "simple", env=registry).out == (
        "172.17.7.0/24\t192.168.6.15\tlease\t81699\tudp\tflanneld\t-\t-\n"
        "172.17.41.0/24\t127.0.0.1\tlease\t69159\tudp\tflanctl\tnode1\t-\n"
        "172.17.60.0/24\t192.168.6.60\treservation\t-\t-\t-\t-\t-\n"
        "172.17.88.0/24\t10.0.2.15\tlease\t86399\tudp\t?\t-\tduplicate-ip\n"
        "172.17.89.0/24\t10.0.2.15\tlease\t86399\tvxlan\t?\t-\tduplicate-ip\n"
    ) or _only_seconds_passed(registry)


def _only_seconds_passed(registry):
    """On a slow machine the TTLs may be a few seconds less; everything else is the same."""
    rows = [
        line.split("\t") for line in flanctl("subnets", "ls", "-w", "simple", env=registry).out.splitlines()
    ]
    ttls = [row[3] for row in rows]
    return [None if ttl == "-" else int(ttl) > 69000 for ttl in ttls] == [True, True, None, True, True]


def test_json_is_a_promise(registry):
    answer = json.loads(flanctl("subnets", "ls", "-w", "json", env=registry).out)
    assert list(answer) == [
        "schema",
        "network",
        "dialect",
        "revision",
        "stale",
        "as_of",
        "subnets",
        "unreadable",
    ]
    assert (answer["schema"], answer["network"], answer["dialect"], answer["stale"]) == (
        1,
        "172.17.0.0/16",
        "0.28",
        False,
    )
    own = answer["subnets"][1]
    assert own | {"ttl_seconds": 0, "expires": "", "revision": 0} == {
        "subnet": "172.17.41.0/24",
        "public_ip": "127.0.0.1",
        "kind": "lease",
        "ttl_seconds": 0,
        "expires": "",
        "backend": "udp",
        "backend_data": None,
        "self": True,
        "host": "node1",
        "runs": "flanctl",
        "version": "0.4.0",
        "data_path": "userspace",
        "revision": 0,
        "problems": [],
    }
    reservation = answer["subnets"][2]
    assert (reservation["ttl_seconds"], reservation["expires"], reservation["runs"]) == (None, None, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", own["expires"])
    assert answer["unreadable"] == [{"key": f"{PREFIX}/subnets/172.17.x.0-24", "problem": "bad-key"}]


@pytest.mark.parametrize("what", ["172.17.41.0/24", "127.0.0.1", "172.17.41.7"])
def test_get_finds_by_subnet_by_public_ip_and_by_a_containers_address(registry, what):
    answer = flanctl("subnets", "get", what, "-w", "simple", env=registry)
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    assert answer.out.startswith("172.17.41.0/24\t127.0.0.1\tlease\t")


def test_get_shows_both_of_a_duplicated_address(registry):
    answer = flanctl("subnets", "get", "10.0.2.15", env=registry)
    assert answer.out.count("SUBNET ") == 2


def test_get_of_what_is_not_there_is_4(registry):
    answer = flanctl("subnets", "get", "172.17.99.0/24", env=registry)
    assert (answer.code, answer.out) == (4, "")
    assert "no lease of 172.17.99.0/24 among 5 in 172.17.0.0/16" in answer.err


def test_an_empty_list_is_fine_and_says_what_to_do(tmp_path):
    registry = {"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'r.db'}"}
    assert flanctl("subnets", "ls", env=registry).code == 4
    flanctl("net", "init", "--network", "10.0.0.0/16", env=registry)
    table = flanctl("subnets", "ls", env=registry)
    assert (table.code, table.out) == (0, "")
    assert "start flanctl agent" in table.err
    assert json.loads(flanctl("subnets", "ls", "-w", "json", env=registry).out)["subnets"] == []
    assert flanctl("subnets", "ls", "-w", "simple", env=registry).out == ""


def test_hostile_values_stay_on_their_line(tmp_path):
    path = tmp_path / "r.db"
    store = SqliteStore(str(path))
    store.create(f"{PREFIX}/config", b'{"Network":"10.0.0.0/16"}', ttl=None)
    store.create(
        f"{PREFIX}/subnets/10.0.1.0-24",
        b'{"PublicIP":"127.0.0.1","BackendType":"x\\n\\u001b[31m\\ty"}',
        ttl=60,
    )
    store.create(
        f"{PREFIX}/flanctl/hosts/127.0.0.1",
        b'{"host":"a\\nb\\tc\\u001b","version":"","data_path":"","instance":""}',
        ttl=60,
    )
    store.create(f"{PREFIX}/subnets/evil\x1b[2J\n", b"", ttl=60)
    store.close()
    for form in ("table", "simple"):
        answer = flanctl("subnets", "ls", "-w", form, "--endpoints", f"sqlite:{path}")
        assert answer.code == 0
        assert "\x1b" not in answer.out + answer.err
    assert answer.out.count("\n") == 1

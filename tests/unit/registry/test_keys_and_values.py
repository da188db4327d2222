"""Keys and values nobody should write: each is one clear line about itself and harms nobody else.

flannel.md 11, row 4: one bad key or value takes all of flannel's nodes down.
"""

from __future__ import annotations

import queue
from io import StringIO
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.log import Log
from flanctl.agent.problems import unreadable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.model.peers import lease_problems, peers_of
from flanctl.registry.leases import Leases, UnreadableLease
from flanctl.registry.peers import Follower, PeersChanged
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import Delete, Entry, Put
from tests.support.clock import FakeClock
from tests.support.fuzz import fuzzed

PREFIX = "/jxdd/network"
FOLDER = f"{PREFIX}/subnets/"
CONFIG = NetworkConfig.parse('{"Network":"172.17.0.0/16"}', Dialect.V0_28)
OWN = IPv4Network("172.17.41.0/24")
GOOD = b'{"PublicIP":"192.168.6.9","PublicIPv6":null}'

BAD_KEYS = {
    "a parent": "../172.17.41.0-24",
    "a parent behind": "172.17.41.0-24/..",
    "two slashes": "/172.17.41.0-24",
    "a slash behind": "172.17.41.0-24/",
    "NUL": "172.17.41.0-24\0",
    "NUL in front": "\x00172.17.41.0-24",
    "a line break": "172.17.41.0-24\nready",
    "an escape sequence": "\x1b[31m172.17.41.0-24",
    "length 0": "172.17.41.0-0",
    "length 32": "172.17.41.0-32",
    "length 33": "172.17.41.0-33",
    "length 999": "172.17.41.0-999",
    "length of a thousand digits": "172.17.41.0-" + "9" * 1000,
    "a negative length": "172.17.41.0--24",
    "no length": "172.17.41.0",
    "CIDR": "172.17.41.0/24",
    "no address": "-24",
    "an address too long": "172.17.41.0.0-24",
    "an octet too large": "172.17.256.0-24",
    "other digits": "172.17.٤١.0-24",
    "only IPv6": "2001:cafe:42:5a::-64",
    "IPv6 without IPv4 as 0.28 writes it": "0.0.0.0-0&2001:cafe:42:5a::-64",
    "IPv6 in capitals": "172.17.41.0-24&2001:CAFE::-64",
    "IPv6 of length 128": "172.17.41.0-24&2001:cafe::-128",
    "two IPv6": "172.17.41.0-24&2001::-64&2002::-64",
    "nothing": "",
    "a megabyte": "9" * 1_000_000,
}
BAD_VALUES = {
    "nothing": b"",
    "no text": b"\xff\xfe",
    "no JSON": b"{",
    "the key's text": FOLDER.encode() + b"172.17.41.0-24",
    "a list": b"[]",
    "null": b"null",
    "no host": b"{}",
    "a host that is a number": b'{"PublicIP":3232237064}',
    "a host that is an object": b'{"PublicIP":{"v4":"192.168.6.9"}}',
    "a name": b'{"PublicIP":"node1"}',
    "an IPv6 host": b'{"PublicIP":"::1"}',
    "a NUL": b'{"PublicIP":"192.168.6.9\\u0000"}',
    "a backend that is no text": b'{"PublicIP":"192.168.6.9","BackendType":7}',
    "ten thousand levels": b'{"PublicIP":' + b"[" * 10_000,
    "trailing text": GOOD + b"x",
    "a megabyte": b'{"PublicIP":"' + b"9" * 1_000_000 + b'"}',
    "more than we read": b" " * 1_400_000,
}
FUTURE = {
    "fields we do not know": b'{"PublicIP":"192.168.6.9","Version":3,"Hosts":["a","b"]}',
    "backend data of another shape": b'{"PublicIP":"192.168.6.9","BackendType":"quic","BackendData":[1,{"a":null}]}',
    "another spelling": b'{"publicip":"192.168.6.9","PUBLICIPV6":"fc00::1"}',
}


@pytest.fixture
def store():
    return MemoryStore(FakeClock())


@pytest.fixture
def leases(store):
    for third in (6, 7):
        store.create(f"{FOLDER}172.17.{third}.0-24", GOOD.replace(b"9", b"%d" % third), ttl=60)
    return Leases(store, PREFIX, Dialect.V0_28, FakeClock())


def others(leases):
    return [
        str(lease.subnet)
        for lease in leases.table().leases
        if str(lease.subnet) in {"172.17.6.0/24", "172.17.7.0/24"}
    ]


def one_clear_line(bad: UnreadableLease) -> str:
    """What the agent's log makes of it."""
    problem = unreadable(bad)
    stream = StringIO()
    Log(stream, journal=False).warn(problem.message, id=problem.id)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert len(line) < 700
    assert line.endswith((" id=bad-key", " id=bad-value"))
    return line


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_bad_key_is_one_line_that_names_it_and_hides_nobody(store, leases, name):
    key = FOLDER + BAD_KEYS[name]
    store.create(key, GOOD, ttl=60)
    table = leases.table()
    assert others(leases) == ["172.17.6.0/24", "172.17.7.0/24"]
    (bad,) = table.unreadable
    assert (bad.key, bad.problem) == (key, "bad-key")
    assert FOLDER in one_clear_line(bad)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_its_key_and_hides_nobody(store, leases, name):
    store.create(f"{FOLDER}172.17.8.0-24", BAD_VALUES[name], ttl=60)
    table = leases.table()
    assert others(leases) == ["172.17.6.0/24", "172.17.7.0/24"]
    (bad,) = table.unreadable
    assert bad.problem == "bad-value"
    assert f"{FOLDER}172.17.8.0-24" in one_clear_line(bad)
    held = leases.acquire(
        CONFIG, LeaseAttributes(IPv4Address("192.168.6.2")), previous=[IPv4Network("172.17.8.0/24")]
    )
    assert held.lease.subnet != IPv4Network("172.17.8.0/24"), "somebody may read what we cannot"


@pytest.mark.parametrize("name", FUTURE)
def test_a_value_of_a_version_to_come_is_a_lease(store, leases, name):
    store.create(f"{FOLDER}172.17.8.0-24", FUTURE[name], ttl=60)
    table = leases.table()
    assert table.unreadable == ()
    assert table.leases[-1].attributes.public_ip == IPv4Address("192.168.6.9")


def test_a_key_that_is_not_utf8_is_one_line_and_hides_nobody(store, leases):
    store.put_unreadable(FOLDER.encode() + b"172.17.41.0-24\xff\x1b\n")
    (bad,) = leases.table().unreadable
    assert others(leases) == ["172.17.6.0/24", "172.17.7.0/24"]
    one_clear_line(bad)


def test_one_lease_as_large_as_the_network_does_not_fill_it(store, leases):
    """Whoever wrote it, new hosts must get in; that the two overlap is told."""
    store.create(f"{FOLDER}172.0.0.0-8", GOOD, ttl=60)
    store.create(f"{FOLDER}172.17.0.0-16", GOOD, ttl=60)
    held = leases.acquire(CONFIG, LeaseAttributes(IPv4Address("192.168.6.2")))
    _, problems = peers_of(
        leases.table().leases,
        own=held.lease.subnet,
        own_ip=IPv4Address("192.168.6.2"),
        config=CONFIG,
        backend_type="udp",
    )
    assert {problem.id for problem in problems if str(problem.subnet) == "172.17.0.0/16"} >= {"overlap"}
    assert {problem.id for problem in problems if str(problem.subnet) == "172.0.0.0/8"} == {"outside-network"}


# Near to what flannel writes, so that more than the first character is looked at.
KEYS = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A[0-9./&:a-f-]{0,40}\Z"),
    st.builds(
        "{}.{}.{}.{}{}{}{}".format,
        *[st.integers(-1, 300)] * 4,
        st.sampled_from("-/_&"),
        st.one_of(st.integers(-1, 34), st.just(999)),
        st.sampled_from(["", "&fc00::-64", "&::-0", "x", "/", "\0", " "]),
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.ip_addresses().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _json(value: object) -> bytes:
    import json

    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


VALUES = st.one_of(
    st.binary(max_size=80),
    JSON.map(_json),
    st.dictionaries(
        st.sampled_from(
            ["PublicIP", "publicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "X"]
        ),
        JSON,
        max_size=5,
    ).map(_json),
    st.ip_addresses(v=4).map(lambda address: _json({"PublicIP": str(address), "PublicIPv6": None})),
)


@fuzzed
@given(KEYS, VALUES)
def test_any_key_and_value_is_a_lease_or_one_clear_line(name: str, value: bytes) -> None:
    leases = Leases(MemoryStore(FakeClock()), PREFIX, Dialect.V0_28, FakeClock())
    found = leases.read(Entry(FOLDER + name, value, 5, "1"))
    if isinstance(found, Lease):
        again = LeaseAttributes.parse(found.attributes.format(Dialect.V0_28))
        assert again.public_ip == found.attributes.public_ip
        assert 1 <= found.subnet.prefixlen <= 31
    else:
        one_clear_line(found)


@fuzzed
@given(st.lists(st.tuples(KEYS, VALUES), max_size=8))
def test_no_set_of_keys_hides_a_good_one_or_breaks_what_is_made_of_it(pairs: list[tuple[str, bytes]]) -> None:
    store = MemoryStore(FakeClock())
    store.create(f"{FOLDER}172.17.6.0-24", GOOD, ttl=60)
    for name, value in dict(pairs).items():
        key = FOLDER + name
        if store.get(key) is None:
            store.create(key, value, ttl=60)
    leases = Leases(store, PREFIX, Dialect.V0_28, FakeClock())
    table = leases.table()
    assert any(lease.key == f"{FOLDER}172.17.6.0-24" for lease in table.leases)
    assert len(table.leases) + len(table.unreadable) == len(store.list(FOLDER).entries)
    peers, problems = peers_of(
        table.leases, own=OWN, own_ip=IPv4Address("192.168.6.2"), config=CONFIG, backend_type="udp"
    )
    assert len({peer.subnet for peer in peers}) == len(peers)
    for problem in problems:
        assert "\n" not in problem.message
    lease_problems(table.leases, CONFIG)
    held = leases.acquire(CONFIG, LeaseAttributes(IPv4Address("192.168.6.2")))
    for lease in table.leases:
        if lease.attributes.public_ip != IPv4Address("192.168.6.2") and not CONFIG.network.subnet_of(
            lease.subnet
        ):
            assert not held.lease.subnet.overlaps(lease.subnet)


EVENTS = st.one_of(st.tuples(st.just("put"), KEYS, VALUES), st.tuples(st.just("delete"), KEYS, st.just(b"")))


@fuzzed
@given(st.lists(EVENTS, max_size=12))
def test_no_stream_of_events_breaks_the_follower_or_hides_a_good_lease(
    events: list[tuple[str, str, bytes]],
) -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    good = store.create(f"{FOLDER}172.17.6.0-24", GOOD, ttl=60)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    follower = Follower(Leases(store, PREFIX, Dialect.V0_28, clock), inbox.put, own=good.key)
    follower._list()
    known = {good.key}
    for revision, (what, name, value) in enumerate(events, start=10):
        key = FOLDER + name
        if key == good.key:
            continue
        if what == "put":
            known.add(key)
            follower._take(Put(Entry(key, value, revision, "1")))
        else:
            known.discard(key)
            follower._take(Delete(key, revision))
    table = follower.table()
    assert any(lease.key == good.key for lease in table.leases)
    kept = {lease.key for lease in table.kept}
    assert {one.key for one in (*table.leases, *table.unreadable)} - kept == known
    assert isinstance(inbox.get(), PeersChanged)

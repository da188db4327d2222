"""Every host's lease is followed; half a picture is never shown."""

from __future__ import annotations

import queue
import threading
from ipaddress import IPv4Network

import pytest

from flanctl.errors import RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.registry.leases import Leases, RegistryBack, RegistryTrouble
from flanctl.registry.peers import Follower, PeersChanged
from flanctl.registry.stores import memory
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.deadline import until

PREFIX = "/jxdd/network"
AWAY = RegistryUnreachable("no answer")


class Followed:
    """A follower in a thread."""

    def __init__(self, store, clock):
        self.inbox = queue.SimpleQueue()
        self.follower = Follower(
            Leases(store, PREFIX, Dialect.V0_28, clock), self.inbox.put, relist_seconds=600
        )
        self.thread = threading.Thread(target=self.follower.run)
        self.thread.start()

    def subnets(self):
        return [str(lease.subnet) for lease in self.follower.table().leases]

    def next(self, kind):
        while True:
            message = self.inbox.get(timeout=10)
            if isinstance(message, kind):
                return message

    def stop(self):
        self.follower.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock)


@pytest.fixture
def follow(store, clock):
    made = []

    def start():
        made.append(Followed(store.another(), clock))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def put(store, third, address=1, ttl=86400):
    return store.create(
        f"{PREFIX}/subnets/172.17.{third}.0-24", b'{"PublicIP":"192.168.6.%d"}' % address, ttl=ttl
    )


def test_the_first_table_is_complete(store, follow):
    for third in range(100):
        put(store, third)
    one = follow()
    one.next(PeersChanged)
    assert len(one.subnets()) == 100


def test_an_empty_network_is_reported_too_so_that_a_first_host_gets_ready(follow):
    one = follow()
    one.next(PeersChanged)
    assert one.subnets() == []


def test_new_moved_and_removed_hosts_are_seen(store, follow, clock):
    entry = put(store, 1)
    one = follow()
    one.next(PeersChanged)
    assert one.subnets() == ["172.17.1.0/24"]
    put(store, 2, ttl=60)
    one.next(PeersChanged)
    assert one.subnets() == ["172.17.1.0/24", "172.17.2.0/24"]
    store.replace(entry.key, b'{"PublicIP":"192.168.6.9"}', ttl=60, expected=entry.revision)
    one.next(PeersChanged)
    assert str(one.follower.table().leases[0].attributes.public_ip) == "192.168.6.9"
    clock.advance(61)
    until(lambda: one.subnets() == [])


def test_a_renewal_is_no_change(store, follow):
    entry = put(store, 1)
    one = follow()
    one.next(PeersChanged)
    one.follower.table()
    store.replace(entry.key, entry.value, ttl=86400, expected=entry.revision)
    put(store, 2)
    one.next(PeersChanged)
    assert len(one.subnets()) == 2
    assert one.inbox.empty()


def test_a_burst_is_one_mark_until_the_table_is_fetched(store, follow):
    one = follow()
    one.next(PeersChanged)
    for third in range(200):
        put(store, third)
    one.follower.table()
    until(lambda: len(one.subnets()) == 200)
    marks = 0
    while not one.inbox.empty():
        one.inbox.get()
        marks += 1
    assert marks <= 200


def test_bad_keys_and_values_never_hide_the_others(store, follow):
    put(store, 1)
    one = follow()
    one.next(PeersChanged)
    one.follower.table()
    store.create(f"{PREFIX}/subnets/garbage", b"\xff", ttl=None)
    store.create(f"{PREFIX}/subnets/172.17.9.0-24", b"{", ttl=None)
    put(store, 2)
    until(lambda: one.subnets() == ["172.17.1.0/24", "172.17.2.0/24"])
    assert [bad.problem for bad in one.follower.table().unreadable] == ["bad-value", "bad-key"]


def test_after_compaction_the_difference_is_found_by_listing(store, follow):
    put(store, 1)
    one = follow()
    one.next(PeersChanged)
    one.follower.table()
    put(store, 2)
    store.compact()
    until(lambda: len(one.subnets()) == 2)
    put(store, 3)
    until(lambda: len(one.subnets()) == 3)


def test_an_outage_is_told_and_what_was_missed_is_found(store, clock):
    client = store.another()
    client.fail("list", RegistryUnreachable("no answer"), times=3)
    one = Followed(client, clock)
    try:
        one.next(RegistryTrouble)
        put(store, 1)
        until(lambda: (clock.advance(5.0), client.calls.count("list") >= 4)[1])
        assert one.next(RegistryBack).tries == 3
        assert one.subnets() == ["172.17.1.0/24"]
    finally:
        one.stop()


def test_the_list_is_read_again_after_ten_minutes(store, follow, clock):
    one = follow()
    one.next(PeersChanged)
    until(lambda: (clock.advance(700.0), one.follower._leases.store.calls.count("list") >= 2)[1], seconds=15)


def test_everybody_gone_at_once_is_asked_twice(store, clock):
    """A server that lost its data answers with an empty list once; believing it would withdraw every route."""

    class Forgetful:
        def __init__(self, real):
            self._real, self.lists = real, 0

        def __getattr__(self, name):
            return getattr(self._real, name)

        def list(self, prefix, *, at=None):
            self.lists += 1
            return self._real.list("nowhere" if self.lists == 2 else prefix, at=at)

    put(store, 1)
    forgetful = Forgetful(store.another())
    one = Followed(forgetful, clock)
    try:
        one.next(PeersChanged)
        store.compact()
        put(store, 2)
        store.compact()
        until(lambda: forgetful.lists >= 3)
        until(lambda: "172.17.1.0/24" in one.subnets())
        assert one.follower.table().leases[0].subnet == IPv4Network("172.17.1.0/24")
    finally:
        one.stop()


def test_the_list_is_read_again_even_behind_a_watch_that_never_says_a_word(store, follow, clock, monkeypatch):
    """flannel.md 11, row 28: a load balancer drops the connection and nobody is told."""
    monkeypatch.setattr(memory, "PROGRESS_SECONDS", 1e9)
    one = follow()
    one.next(PeersChanged)
    until(lambda: clock.waiting == 1)
    clock.advance(700.0)
    until(lambda: one.follower._leases.store.calls.count("list") >= 2)


def test_a_watch_that_breaks_is_told_and_what_was_missed_is_found(store, clock):
    client = store.another()
    one = Followed(client, clock)
    try:
        one.next(PeersChanged)
        one.follower.table()
        client.fail("event", AWAY)
        one.next(RegistryTrouble)
        put(store, 1)
        until(lambda: (clock.advance(5.0), one.subnets() == ["172.17.1.0/24"])[1])
        assert one.next(RegistryBack).tries == 1
    finally:
        one.stop()


class NotesPauses(FakeClock):
    """A clock that remembers how long it was asked to wait."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, stop, seconds):
        self.pauses.append(seconds)
        return super().wait(stop, seconds)


def test_a_server_that_lists_but_cannot_watch_is_asked_ever_less_and_is_not_back(store):
    clock, client = NotesPauses(), store.another()
    client.fail("watch", AWAY, times=1000)
    one = Followed(client, clock)
    try:
        for tries in range(1, 11):
            until(lambda tries=tries: len(clock.pauses) == tries and clock.waiting == 1)
            clock.advance(clock.pauses[-1])
    finally:
        one.stop()
    for number, pause in enumerate(clock.pauses[:10]):
        wanted = min(5.0, 0.1 * 2**number)
        assert 0.8 * wanted <= pause <= 1.2 * wanted
    reports = []
    while not one.inbox.empty():
        reports.append(type(one.inbox.get()))
    assert set(reports) == {PeersChanged, RegistryTrouble}


def test_a_stop_between_opening_the_watch_and_waiting_for_it_is_not_missed(store, clock, monkeypatch):
    monkeypatch.setattr(memory, "PROGRESS_SECONDS", 1e9)
    client = store.another()
    follower = Follower(Leases(client, PREFIX, Dialect.V0_28, clock), lambda _: None)
    open_watch = client.watch

    def opened_while_stopping(prefix, *, after):
        watch = open_watch(prefix, after=after)
        follower.stop()
        return watch

    client.watch = opened_while_stopping
    thread = threading.Thread(target=follower.run, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_stopping_is_prompt_and_twice_is_fine(follow):
    one = follow()
    one.next(PeersChanged)
    one.stop()
    one.stop()

"""Every host's lease is followed; half a picture is never shown."""

from __future__ import annotations

import queue
import re
import threading

import pytest

from flanctl.errors import RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.registry.leases import Leases, RegistryBack, RegistryTrouble
from flanctl.registry.peers import ConfigSeen, Follower, PeersChanged, RegistryDoubted
from flanctl.registry.stores import memory
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import Progress
from tests.support.clock import FakeClock
from tests.support.deadline import until

PREFIX = "/jxdd/network"
AWAY = RegistryUnreachable("no answer")


class Followed:
    """A follower in a thread."""

    def __init__(self, store, clock, **more):
        self.inbox = queue.SimpleQueue()
        self.follower = Follower(Leases(store, PREFIX, Dialect.V0_28, clock), self.inbox.put, **more)
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
    until(lambda: (clock.advance(1.0), one.subnets() == [])[1])


def test_a_renewal_is_no_change(store, follow):
    entry = put(store, 1)
    one = follow()
    one.next(ConfigSeen)  # the last word of the first list
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


def garbled(third):
    """What `etcdctl put KEY $(etcdctl get KEY)` leaves there: the key, then the value."""
    return f'{PREFIX}/subnets/172.17.{third}.0-24\n{{"PublicIP":"192.168.6.{third}"}}'.encode()


@pytest.mark.parametrize("how", ["watched", "listed"])
def test_hosts_whose_values_become_unreadable_keep_their_routes_until_their_keys_go(
    store, follow, clock, how
):
    """flannel.md 11, row 4: there, one such value takes the routes of all."""
    entries = [put(store, third, address=third, ttl=None) for third in range(1, 12)]
    one = follow()
    one.next(ConfigSeen)
    all_of_them = one.subnets()

    def change(number, value):
        before = store.get(entries[number].key)
        store.replace(before.key, value, ttl=None, expected=before.revision)

    def bad():
        if how == "listed":
            store.compact()
        return [bad.subnet for bad in one.follower.table().unreadable]

    for number in range(10):
        change(number, garbled(number + 1))
    until(lambda: len(bad()) == 10)
    change(0, b"{")  # unreadable in another way
    one.follower.table()
    lists = one.follower._leases.store.calls.count("list")
    until(
        lambda: (clock.advance(30.0), one.follower._leases.store.calls.count("list") > lists + 2)[1],
        seconds=15,
    )
    table = one.follower.table()
    assert [str(lease.subnet) for lease in table.leases] == all_of_them
    assert len(table.kept) == len(table.unreadable) == 10
    assert one.follower._doubt is None

    change(0, b'{"PublicIP":"192.168.6.77"}')  # its host put it right, with another address
    store.delete(entries[1].key)  # its host left
    until(lambda: (clock.advance(0.5), one.subnets() == [all_of_them[0], *all_of_them[2:]])[1])
    table = one.follower.table()
    assert str(table.leases[0].attributes.public_ip) == "192.168.6.77"
    assert len(table.kept) == len(table.unreadable) == 8


def test_a_garbled_lease_gives_way_to_its_host_in_another_subnet(store, follow):
    first, second = put(store, 1, address=1), put(store, 2, address=2)
    one = follow()
    one.next(ConfigSeen)
    store.replace(first.key, garbled(1), ttl=86400, expected=first.revision)
    store.replace(second.key, garbled(2), ttl=86400, expected=second.revision)
    put(store, 7, address=1)
    until(lambda: one.subnets() == ["172.17.2.0/24", "172.17.7.0/24"])


def test_a_garbled_lease_that_is_gone_from_a_list_is_kept_as_long_as_a_readable_one(store, clock):
    store.create(f"{PREFIX}/config", b"{}", ttl=None)
    entry = put(store, 1, address=1)
    client = store.another()
    one = Followed(client, clock)
    try:
        one.next(ConfigSeen)
        store.replace(entry.key, garbled(1), ttl=86400, expected=entry.revision)
        until(lambda: one.follower.table().unreadable)
        client.fail("event", AWAY)
        one.next(RegistryTrouble)
        store.delete(entry.key)
        until(lambda: (clock.advance(0.05), not one.follower.table().unreadable)[1])
        assert one.subnets() == ["172.17.1.0/24"]
        until(lambda: (clock.advance(0.5), one.subnets() == [])[1])
    finally:
        one.stop()


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


def test_an_event_the_watch_never_told_is_found_by_the_next_list(store, clock):
    """flannel.md 11, row 2: there, a route that was missed once is missing until somebody looks."""
    client = store.another()
    one = Followed(client, clock)
    try:
        one.next(ConfigSeen)
        one.follower.table()
        hidden = put(store, 1)
        one.next(PeersChanged)
        with one.follower._lock:
            del one.follower._known[hidden.key]  # as if it had not been told
        assert one.subnets() == []
        until(lambda: (clock.advance(60.0), one.subnets() == ["172.17.1.0/24"])[1])
    finally:
        one.stop()


def test_the_list_is_read_again_after_ten_minutes_a_tenth_more_or_less_and_no_sooner(store):
    clock, client = NotesPauses(), store.another()
    one = Followed(client, clock)
    try:
        for times in (1, 2, 3):
            until(lambda times=times: len(clock.pauses) == times and clock.waiting == 1)
            assert client.calls.count("list") == times
            assert 540 <= clock.pauses[-1] <= 660
            clock.advance(clock.pauses[-1])
        until(lambda: client.calls.count("list") == 4)
    finally:
        one.stop()


class Swapped:
    """A client whose server is exchanged under its hands for another one, with other data."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)


def emptied(store, clock, *, own="172.17.1.0-24", revision=1, config=False):
    """A follower that knows three leases and a config, and now gets an empty list, of a server at `revision`."""
    store.create(f"{PREFIX}/config", b"{}", ttl=None)
    for third in (1, 2, 3):
        put(store, third, address=third)
    swapped = Swapped(store.another())
    one = Followed(swapped, clock, own=f"{PREFIX}/subnets/{own}")
    one.next(ConfigSeen)
    other = MemoryStore(clock)
    if config:
        other.create(f"{PREFIX}/config", b"{}", ttl=None)
    while other._data.revision < revision:
        other.delete(other.create("/elsewhere", b"", ttl=None).key)
    swapped.real = other
    store.compact()
    put(store, 4, address=4)  # its old watch ends with Compacted, and it lists again
    store.compact()
    return one, other


ALL = ["172.17.1.0/24", "172.17.2.0/24", "172.17.3.0/24"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"config": True}, r"its revision went back from \d+ to \d"),
        ({"revision": 50}, "/jxdd/network/config is gone too"),
        ({"revision": 50, "config": True}, "our own lease is missing too"),
    ],
)
def test_an_empty_answer_after_a_full_one_is_doubted_and_routes_stay(store, clock, given, why):
    """flannel.md 11, row 3: the registry may be the one that forgot, not the hosts that left."""
    one, _ = emptied(store, clock, **given)
    try:
        doubted = one.next(RegistryDoubted)
        assert re.match(why, doubted.why)
        assert doubted.missing >= 3
        assert one.subnets()[:3] == ALL
        assert [str(lease.subnet) for lease in one.follower.table().kept][:3] == ALL
        lists = one.follower._leases.store.calls.count("list")

        def listed_for_a_quarter_of_an_hour() -> bool:
            clock.advance(30.0)
            assert one.subnets()[:3] == ALL
            return one.follower._leases.store.calls.count("list") >= lists + 30

        until(listed_for_a_quarter_of_an_hour, seconds=20)  # each list as empty as the first
    finally:
        one.stop()


@pytest.mark.parametrize(
    ("revision", "config", "why"),
    [
        (5, True, "its revision went back from 900 to "),
        (1000, False, "/jxdd/network/config is gone too"),
        (1000, True, "our own lease is missing too"),
    ],
)
def test_the_first_list_is_doubted_too_where_it_lacks_what_an_agent_before_knew(
    store, clock, revision, config, why
):
    leases = Leases(store, PREFIX, Dialect.V0_28, clock)
    for third in (1, 2, 3):
        put(store, third, address=third)
    known = leases.table().leases
    empty = MemoryStore(clock)
    if config:
        empty.create(f"{PREFIX}/config", b"{}", ttl=None)
    empty._data.revision = revision
    one = Followed(empty, clock, own=known[0].key, known=known, revision=900)
    try:
        one.next(PeersChanged)
        assert one.subnets() == ALL
        assert one.follower._doubt.startswith(why)
    finally:
        one.stop()


def test_a_first_list_that_lacks_a_host_an_agent_before_knew_is_believed_where_the_registry_is_whole(
    store, clock
):
    store.create(f"{PREFIX}/config", b"{}", ttl=None)
    own, other = put(store, 1, address=1), put(store, 2, address=2)
    known = Leases(store, PREFIX, Dialect.V0_28, clock).table().leases
    store.delete(other.key)
    one = Followed(store.another(), clock, own=own.key, known=known, revision=own.revision)
    try:
        one.next(PeersChanged)
        until(lambda: (clock.advance(0.5), one.subnets() == ["172.17.1.0/24"])[1])
        assert one.follower._doubt is None
    finally:
        one.stop()


def test_an_empty_answer_of_a_registry_that_is_whole_is_believed(store, clock):
    """Revision not lower, config there, our own lease none of it: the others did leave while we were not watching."""
    one, _ = emptied(store, clock, own="172.17.99.0-24", revision=50, config=True)
    try:
        until(lambda: (clock.advance(0.5), one.subnets() == [])[1])
        assert one.inbox.empty() or not isinstance(one.inbox.get(), RegistryDoubted)
    finally:
        one.stop()


def test_doubt_ends_when_hosts_have_written_their_keys_again_and_the_rest_is_forgotten(store, clock):
    one, other = emptied(store, clock)
    try:
        one.next(RegistryDoubted)
        put(other, 1, address=1)
        put(other, 9, address=2)  # the second host came back with another subnet
        until(
            lambda: (
                clock.advance(30.0),
                one.subnets()[:3] == ["172.17.1.0/24", "172.17.3.0/24", "172.17.9.0/24"],
            )[1]
        )
        lists = one.follower._leases.store.calls.count("list")
        until(
            lambda: (clock.advance(30.0), one.follower._leases.store.calls.count("list") > lists + 25)[1],
            seconds=20,
        )
        assert "172.17.3.0/24" in one.subnets(), "a registry without a config is not whole yet"
        other.create(f"{PREFIX}/config", b"{}", ttl=None)
        until(
            lambda: (clock.advance(30.0), one.subnets() == ["172.17.1.0/24", "172.17.9.0/24"])[1], seconds=20
        )
        assert one.next(RegistryDoubted).why is None
    finally:
        one.stop()


def test_a_deleted_lease_is_routed_to_for_two_seconds_unless_another_host_has_its_subnet(
    store, follow, clock
):
    entry = put(store, 1, address=1)
    second = put(store, 2, address=2)
    one = follow()
    one.next(ConfigSeen)
    one.follower.table()
    store.delete(entry.key)
    one.next(PeersChanged)
    table = one.follower.table()
    assert [str(lease.subnet) for lease in table.kept] == ["172.17.1.0/24"]
    assert len(table.leases) == 2
    put(store, 1, address=9)
    one.next(PeersChanged)
    table = one.follower.table()
    assert (table.kept, str(table.leases[0].attributes.public_ip)) == ((), "192.168.6.9")
    store.delete(second.key)
    one.next(PeersChanged)
    assert len(one.subnets()) == 2
    clock.advance(1.9)
    assert len(one.subnets()) == 2
    clock.advance(0.2)
    one.next(PeersChanged)
    assert one.subnets() == ["172.17.1.0/24"]


def test_a_host_that_moves_to_another_subnet_is_not_kept_in_the_old_one(store, follow):
    entry = put(store, 1, address=1)
    one = follow()
    one.next(ConfigSeen)
    store.delete(entry.key)
    put(store, 7, address=1)
    until(lambda: one.subnets() == ["172.17.7.0/24"])


def test_the_config_and_announcements_are_told(store, clock):
    heard = []
    one = Followed(store.another(), clock, also=heard.append)
    try:
        assert one.next(ConfigSeen).entry is None
        entry = store.create(f"{PREFIX}/config", b"{}", ttl=None)
        assert one.next(ConfigSeen).entry == entry
        store.create(f"{PREFIX}/flanctl/hosts/192.168.6.9", b"{}", ttl=60)
        until(lambda: [event.entry.key for event in heard] == [f"{PREFIX}/flanctl/hosts/192.168.6.9"])
        store.delete(entry.key)
        assert one.next(ConfigSeen).entry is None
    finally:
        one.stop()


def test_a_watch_that_speaks_of_an_older_revision_is_left_for_a_new_list(store, clock):
    """A server that lost its data would otherwise have us wait for a revision it reaches in a year."""
    client = store.another()
    put(store, 1)
    asked = []
    watch = client.watch

    def behind(prefix, *, after):
        asked.append(after)
        return watch(prefix, after=after) if len(asked) > 1 else Behind()

    client.watch = behind
    one = Followed(client, clock)
    try:
        until(lambda: len(asked) == 2)
    finally:
        one.stop()


class Behind:
    """A watch of a server whose history has just begun."""

    def __enter__(self):
        return iter([Progress(1)])

    def __exit__(self, *_):
        pass


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
    assert set(reports) == {PeersChanged, ConfigSeen, RegistryTrouble}


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

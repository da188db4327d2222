"""What a host says of itself beside its lease, and how another machine with its address is found out."""

from __future__ import annotations

import threading
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import RegistryUnreachable
from flanctl.registry.announcements import (
    STOPPED_SECONDS,
    AnnounceFailed,
    Announcement,
    Announcer,
    CloneSeen,
    Hosts,
    announcements,
)
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import Delete, Put
from tests.support.clock import FakeClock
from tests.support.deadline import until
from tests.support.fuzz import fuzzed

PREFIX = "/jxdd/network"
IP = IPv4Address("192.168.6.2")
KEY = f"{PREFIX}/flanctl/hosts/{IP}"
OURS = Announcement("node1", "0.1.0", "userspace", "aaaa", "run-a")
THEIRS = Announcement("node2", "0.1.0", "userspace", "bbbb", "run-b")


class Machine:
    """One machine that announces `words`."""

    def __init__(self, store, clock, words=OURS, *, first=False, ttl=86400):
        self.store = store
        self.reports = []
        self.announcer = Announcer(
            store, PREFIX, IP, words, self.reports.append, ttl=ttl, clock=clock, first=first
        )
        self.thread = threading.Thread(target=self.announcer.run)
        self.thread.start()

    def clones(self):
        return [report.other for report in self.reports if isinstance(report, CloneSeen)]

    def stop(self):
        self.announcer.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock)


@pytest.fixture
def machine(store, clock):
    made = []

    def start(words=OURS, **more):
        made.append(Machine(store.another(), clock, words, **more))
        until(lambda: clock.waiting == len(made))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def test_it_is_written_at_once_and_kept_alive(store, clock, machine):
    one = machine()
    assert announcements(store, PREFIX) == {IP: OURS}
    revision = store.get(KEY).revision
    for looks in range(1, 6):
        until(lambda looks=looks: (clock.advance(60), one.store.calls.count("refresh") >= looks)[1])
    assert store.get(KEY).revision == revision, "kept alive without an event for anybody"
    assert set(one.clones()) == {None}


def test_new_words_of_the_same_run_are_written_at_once_and_no_clone(store, machine):
    one = machine()
    words = replace(OURS, data_path="kernel")
    one.announcer.says(words)
    until(lambda: announcements(store, PREFIX) == {IP: words})
    assert set(one.clones()) == {None}


def test_an_agent_that_stops_says_so_and_no_more(store, machine):
    one = machine()
    one.stop()
    assert announcements(store, PREFIX) == {IP: replace(OURS, data_path="stopped")}


def test_an_agent_that_stops_leaves_another_machines_words(store, machine):
    one = machine()
    store.replace(KEY, THEIRS.format(), ttl=60, expected=store.get(KEY).revision)
    one.stop()
    assert announcements(store, PREFIX) == {IP: THEIRS}


def test_a_host_that_stopped_counts_for_the_time_of_a_restart(store, clock):
    hosts = Hosts(store, PREFIX, lambda: None, clock)
    store.create(KEY, OURS.format(), ttl=3600)
    hosts.listed()
    entry = store.get(KEY)
    stopped = Put(replace(entry, value=replace(OURS, data_path="stopped").format()))
    hosts.saw(stopped)
    clock.advance(STOPPED_SECONDS - 1)
    hosts.saw(stopped)
    assert hosts.addresses == {IP}
    assert hosts.addresses is hosts.addresses, "thousands are not gathered at each look"
    clock.advance(2)
    assert hosts.addresses == frozenset()
    hosts.saw(Put(entry))
    assert hosts.addresses == {IP}
    store.replace(KEY, stopped.entry.value, ttl=3600, expected=entry.revision)
    late = Hosts(store, PREFIX, lambda: None, clock)
    late.listed()
    assert late.addresses == frozenset(), "who had stopped before we came"


def test_hosts_are_those_that_announce_themselves(store, clock):
    other, changes = IPv4Address("192.168.6.3"), []
    hosts = Hosts(store, PREFIX, lambda: changes.append(hosts.addresses), clock)
    store.create(KEY, OURS.format(), ttl=60)
    created = Put(store.get(KEY))
    hosts.saw(created)
    assert hosts.addresses is None, "half of a list is none"
    hosts.listed()
    assert hosts.addresses == {IP}
    store.create(f"{PREFIX}/flanctl/hosts/{other}", THEIRS.format(), ttl=60)
    event = Put(store.get(f"{PREFIX}/flanctl/hosts/{other}"))
    hosts.saw(event)
    hosts.saw(event)
    hosts.saw(Put(replace(event.entry, key=f"{PREFIX}/flanctl/hosts/nobody")))
    hosts.saw(Put(replace(event.entry, key=f"{PREFIX}/elsewhere/{other}")))
    assert hosts.addresses == {IP, other}
    hosts.saw(Put(replace(created.entry, value=b"{}")))
    assert hosts.addresses == {other}, "words that mean nothing are nobody's"
    hosts.saw(Delete(event.entry.key, event.entry.revision + 1))
    assert changes == [{IP}, {IP, other}, {other}, frozenset()]
    store.fail("list", RegistryUnreachable("away"))
    hosts.listed()
    assert hosts.addresses == frozenset(), "a registry that does not tell leaves what is known"
    hosts.listed()
    assert hosts.addresses == {IP, other}


def test_two_machines_with_one_address_learn_of_each_other(clock, machine):
    """flannel.md 11, row 10. The second sees the first at once, the first sees the second at its next look."""
    first = machine(OURS)
    second = machine(THEIRS)
    assert second.clones() == [OURS]
    until(lambda: (clock.advance(300), THEIRS in first.clones())[1])
    until(lambda: (clock.advance(300), second.clones()[-1] == OURS)[1])


def test_a_watch_tells_sooner(store, machine):
    first = machine(OURS)
    machine(THEIRS)
    first.announcer.saw(store.get(KEY).value)
    assert first.clones() == [None, THEIRS]


def test_a_cloned_disk_has_the_same_instance_and_is_found_out_all_the_same(clock, machine):
    first = machine(OURS)
    machine(replace(OURS, run="run-of-the-clone"))
    until(lambda: (clock.advance(300), first.clones()[-1] is not None)[1])
    assert first.clones()[-1].run == "run-of-the-clone"


@pytest.mark.parametrize(
    ("before", "first", "suspicious"),
    [
        (replace(OURS, run="before the restart"), False, False),
        (replace(OURS, run="x", instance="before the disk was lost"), True, False),
        (replace(OURS, run="x", instance="other"), False, True),
        (replace(THEIRS, host="node2"), True, True),
    ],
)
def test_what_stood_there_at_the_start_is_our_past_or_another_machine(
    store, machine, before, first, suspicious
):
    store.create(KEY, before.format(), ttl=60)
    one = machine(OURS, first=first)
    assert one.clones() == ([before] if suspicious else [None])
    assert announcements(store, PREFIX) == {IP: OURS}


def test_what_was_withdrawn_is_not_written_again(store, clock, machine):
    one = machine()
    one.announcer.withdraw()
    assert store.get(KEY) is None
    for _ in range(5):
        clock.advance(700)
        until(lambda: clock.waiting == 1)
    assert store.get(KEY) is None


def test_another_machines_words_are_not_withdrawn(store, machine):
    one = machine()
    store.replace(KEY, THEIRS.format(), ttl=60, expected=store.get(KEY).revision)
    one.announcer.withdraw()
    assert announcements(store, PREFIX) == {IP: THEIRS}


def test_a_registry_that_is_away_is_told_and_tried_again(store, clock):
    client = store.another()
    client.fail("get", RegistryUnreachable("no answer"))
    one = Machine(client, clock)
    try:
        until(lambda: one.reports)
        assert isinstance(one.reports[0], AnnounceFailed)
        until(lambda: (clock.advance(300), store.get(KEY))[1])
    finally:
        one.stop()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"host":1}',
        b"\xff",
        b"[" * 4000,
        b'{"host":"' + b"x" * 5000 + b'"}',
        b"9" * 4000,
    ],
)
def test_words_that_cannot_be_understood_are_left_out_and_replaced_by_ours(store, machine, value):
    store.create(KEY, value, ttl=60)
    store.create(f"{PREFIX}/flanctl/hosts/not-an-address", OURS.format(), ttl=60)
    assert announcements(store, PREFIX) == {}
    one = machine()
    assert one.clones() == [None]
    assert announcements(store, PREFIX) == {IP: OURS}


def test_what_the_first_agents_wrote_is_read_too():
    value = b'{"data_path":"userspace","host":"h1","instance":"00ff","version":"0.1.0"}'
    assert Announcement.parse(value) == Announcement("h1", "0.1.0", "userspace", "00ff", "")


@fuzzed
@given(st.binary(max_size=300))
def test_any_bytes_are_an_announcement_or_none(value: bytes) -> None:
    found = Announcement.parse(value)
    assert found is None or Announcement.parse(found.format()) == found

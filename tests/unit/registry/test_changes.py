"""What happens to leases is told in order, each change once, through outages and compactions."""

from __future__ import annotations

import queue
import threading

import pytest

from flanctl.errors import NotPermitted, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.registry.changes import Back, Change, Changes, Listed, Lost
from flanctl.registry.leases import LEASE_TTL, Leases
from flanctl.registry.stores import memory
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.deadline import until

PREFIX = "/jxdd/network"
AWAY = RegistryUnreachable("no answer")


class Told:
    """Changes in a thread; what it reports is in an inbox."""

    def __init__(self, store, clock, *, after=None, **options):
        self.inbox = queue.SimpleQueue()
        self.error = None
        self.idle = 0
        self.changes = Changes(
            Leases(store, PREFIX, Dialect.V0_28, clock), self.inbox.put, idle=self._idle, **options
        )
        self.thread = threading.Thread(target=self._run, args=(after,))
        self.thread.start()

    def _idle(self):
        self.idle += 1

    def _run(self, after):
        try:
            self.changes.run(after=after)
        except Exception as error:
            self.error = error

    def next(self, kind=Change):
        report = self.inbox.get(timeout=10)
        assert isinstance(report, kind), report
        return report

    def nothing(self):
        """Until the registry has said twice that nothing happened."""
        seen = self.idle
        until(lambda: self.idle >= seen + 2, what="the watch is idle")
        assert self.inbox.empty(), self.inbox.get()

    def stop(self):
        self.changes.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "PROGRESS_SECONDS", 0.05)
    monkeypatch.setattr(memory, "LOOK_SECONDS", 0.01)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock)


@pytest.fixture
def client(store):
    """The one that watches: failures asked of it concern nobody else."""
    return store.another()


@pytest.fixture
def tell(client, clock):
    made = []

    def start(**options):
        made.append(Told(client, clock, **options))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def key(third):
    return f"{PREFIX}/subnets/172.17.{third}.0-24"


def value(address, more=b""):
    return b'{"PublicIP":"192.168.6.%d"%s}' % (address, more)


def put(store, third, address=1, ttl=LEASE_TTL):
    return store.create(key(third), value(address), ttl=ttl)


def change(told):
    """What, which subnet, from whom, to whom."""
    one = told.next()
    ips = [
        None if side is None else str(side.attributes.public_ip).rpartition(".")[2]
        for side in (one.before, one.after)
    ]
    return (one.what, one.key.rpartition("/")[2].split(".")[2], *ips)


def test_first_what_there_is_then_every_change_with_its_revision(store, tell):
    first = put(store, 7)
    told = tell()
    listed = told.next(Listed)
    assert [str(lease.subnet) for lease in listed.table.leases] == ["172.17.7.0/24"]
    assert (listed.table.leases[0].ttl, listed.table.revision, listed.resync) == (
        LEASE_TTL,
        first.revision,
        False,
    )

    added = put(store, 90, 9)
    one = told.next()
    assert (one.what, one.key, one.revision, one.ttl) == ("added", key(90), added.revision, LEASE_TTL)
    moved = store.replace(key(90), value(10), ttl=LEASE_TTL, expected=added.revision)
    assert change(told) == ("moved", "90", "9", "10")
    data = b',"BackendType":"vxlan"'
    other = store.replace(key(90), value(10, data), ttl=LEASE_TTL, expected=moved.revision)
    assert change(told) == ("changed", "90", "10", "10")
    again = store.replace(key(90), value(10, data), ttl=LEASE_TTL, expected=other.revision)
    assert change(told) == ("renewed", "90", "10", "10")
    store.replace(key(90), value(10, data), ttl=None, expected=again.revision)
    assert change(told) == ("changed", "90", "10", "10")
    store.delete(key(90))
    gone = told.next()
    assert (gone.what, gone.after, gone.expired) == ("removed", None, False)
    assert gone.revision == store.list("/").revision == told.changes.revision
    told.nothing()


def test_expired_is_said_only_of_a_lease_whose_last_known_end_had_passed(store, clock, tell):
    put(store, 1)
    put(store, 2)
    told = tell()
    told.next(Listed)
    clock.advance(LEASE_TTL - 10)
    store.delete(key(2))
    assert told.next().expired is False
    clock.advance(11)
    gone = told.next()
    assert (gone.what, gone.key, gone.expired) == ("removed", key(1), True)


def test_a_host_that_renews_without_writing_moves_the_end_we_know(store, clock, tell):
    entry = put(store, 1)
    told = tell()
    told.next(Listed)
    clock.advance(LEASE_TTL - 10)
    store.refresh(entry, ttl=LEASE_TTL)
    clock.advance(20)
    told.nothing()  # and meanwhile asks how long the lease lasts now
    store.delete(key(1))
    assert told.next().expired is False


@pytest.mark.parametrize("bad", [b"{", b"", b'{"PublicIP":"nobody"}', b"[" * 10_000])
def test_what_cannot_be_read_is_told_as_such_and_hides_nothing(store, tell, bad):
    put(store, 1)
    store.put_unreadable(f"{PREFIX}/subnets/".encode() + b"\xff")
    told = tell()
    assert [one.problem for one in told.next(Listed).table.unreadable] == ["bad-key"]
    store.create(f"{PREFIX}/subnets/172.17.x.0-24", bad, ttl=60)
    one = told.next()
    assert (one.what, one.after.problem) == ("unreadable", "bad-key")
    store.replace(key(1), bad, ttl=60, expected=store.get(key(1)).revision)
    one = told.next()
    assert (one.what, one.after.problem, str(one.before.subnet)) == (
        "unreadable",
        "bad-value",
        "172.17.1.0/24",
    )
    put(store, 2)
    assert change(told) == ("added", "2", None, "1")


def test_resuming_tells_what_came_after_that_revision_as_if_nobody_had_stopped(store, tell):
    put(store, 1)
    two = put(store, 2, 2)
    put(store, 3, 3)
    last = store.list("/").revision
    store.delete(key(1))
    store.replace(key(2), value(22), ttl=LEASE_TTL, expected=two.revision)
    put(store, 4, 4)
    told = tell(after=last)
    assert change(told) == ("removed", "1", "1", None)
    assert change(told) == ("moved", "2", "2", "22")
    assert change(told) == ("added", "4", None, "4")
    told.nothing()


def test_nobody_can_say_whether_a_lease_that_went_before_we_looked_had_expired(store, tell):
    put(store, 1)
    last = store.list("/").revision
    store.delete(key(1))
    assert tell(after=last).next().expired is None


def test_a_ttl_that_nobody_can_say_any_more_is_unknown_not_zero(store, tell):
    first = put(store, 1)
    store.replace(key(1), value(2), ttl=60, expected=first.revision)
    told = tell(after=first.revision - 1)
    assert [told.next().ttl for _ in range(2)] == [None, 60]


@pytest.mark.parametrize("where", ["past", "future"])
def test_resuming_at_a_revision_nobody_knows_lists_and_says_so(store, tell, where):
    first = put(store, 1)
    put(store, 2)
    store.compact()
    listed = tell(after=first.revision if where == "past" else 1000).next(Listed)
    assert listed.resync
    assert len(listed.table.leases) == 2


def test_an_outage_is_told_and_no_change_is_lost_or_told_twice(store, client, clock, tell):
    put(store, 1)
    told = tell()
    told.next(Listed)
    clock.advance(30)
    client.fail("*", AWAY, times=3)
    client.fail("event", AWAY)
    lost = told.next(Lost)
    assert (lost.error.exit_code, lost.silent) == (3, 30)
    put(store, 2)
    store.delete(key(1))
    put(store, 1, 11)
    until(lambda: clock.waiting == 1)
    while told.inbox.empty():
        clock.advance(1)
        until(lambda: clock.waiting == 1 or not told.inbox.empty())
    back = told.next(Back)
    assert back.missed == 2
    assert back.after > 30
    assert [change(told) for _ in range(3)] == [
        ("added", "2", None, "1"),
        ("removed", "1", "1", None),
        ("added", "1", None, "11"),
    ]
    told.nothing()


def outage(told, client, clock, meanwhile):
    """From Lost to Back."""
    client.fail("event", AWAY)
    told.next(Lost)
    until(lambda: clock.waiting == 1)
    meanwhile()
    clock.advance(10)
    return told.next(Back)


def test_what_was_compacted_meanwhile_is_told_as_differences(store, client, clock, tell):
    one = put(store, 1)
    put(store, 2)
    put(store, 5)
    told = tell()
    told.next(Listed)

    def meanwhile():
        store.delete(key(2))
        put(store, 3)
        store.delete(key(3))
        put(store, 4)
        store.replace(key(1), value(9), ttl=LEASE_TTL, expected=one.revision)
        store.replace(key(5), value(1), ttl=LEASE_TTL, expected=store.get(key(5)).revision)
        store.compact()

    assert outage(told, client, clock, meanwhile).missed == 3
    reports = [told.next() for _ in range(3)]
    assert [(report.what, report.key, report.resync) for report in reports] == [
        ("moved", key(1), True),
        ("removed", key(2), True),
        ("added", key(4), True),
    ]
    told.nothing()
    put(store, 6)
    assert told.next().resync is False


def test_a_registry_that_came_back_with_older_data_is_believed_and_watched_from_there(clock):
    store = MemoryStore(clock)
    for third in (1, 2, 3):
        put(store, third)
    emptied = MemoryStore(clock)
    put(emptied, 2, 1)

    class Replaced:
        """A client whose server loses its data."""

        def __init__(self):
            self.now = store.another()

        def __getattr__(self, name):
            return getattr(self.now, name)

    client = Replaced()
    told = Told(client, clock)
    try:
        told.next(Listed)
        store_client = client.now

        def meanwhile():
            client.now = emptied.another()

        assert outage(told, store_client, clock, meanwhile).missed == 2
        assert [(report.what, report.key, report.resync) for report in (told.next(), told.next())] == [
            ("removed", key(1), True),
            ("removed", key(3), True),
        ]
        put(emptied, 9)
        assert change(told) == ("added", "9", None, "1")
    finally:
        told.stop()


def test_an_empty_answer_after_a_full_one_is_doubted(clock):
    """A server that lost its data, or answers from nowhere, looks like everybody leaving at once."""
    store = MemoryStore(clock)
    put(store, 1)

    class Forgetful:
        def __init__(self, real):
            self._real, self.lists = real, 0

        def __getattr__(self, name):
            return getattr(self._real, name)

        def list(self, prefix, *, at=None):
            self.lists += 1
            return self._real.list("nowhere" if self.lists == 2 else prefix, at=at)

    real = store.another()
    told = Told(Forgetful(real), clock)
    try:
        told.next(Listed)
        assert outage(told, real, clock, lambda: None).missed == 0
        told.nothing()
    finally:
        told.stop()


def test_a_registry_that_is_away_at_the_start_is_an_error(client, tell):
    client.fail("list", AWAY)
    told = tell()
    told.thread.join(5)
    assert told.error is AWAY


@pytest.mark.parametrize("refused", [False, True])
def test_fail_on_loss_and_a_refusal_end_it(client, tell, refused):
    told = tell(fail_on_loss=not refused)
    told.next(Listed)
    error = NotPermitted("not for you") if refused else AWAY
    client.fail("event", error)
    told.thread.join(5)
    assert told.error is error
    assert told.inbox.empty()


def test_a_ttl_nobody_answers_does_not_hold_the_event_back(store, client, tell):
    told = tell()
    told.next(Listed)
    client.fail("with_ttl", AWAY, times=1)
    put(store, 1)
    one = told.next()
    assert (one.what, one.ttl) == ("added", None)
    until(lambda: told.changes._known[key(1)].ends is not None, what="the end is asked for later")


def test_a_member_that_answers_slowly_does_not_keep_the_reader_behind_the_changes(clock):
    """Found by the drill "slow member": 300 ms for each TTL, 33 leases a second, and the last was told minutes late."""

    class Slow:
        def __init__(self, real):
            self.real, self.asked = real, 0

        def __getattr__(self, name):
            return getattr(self.real, name)

        def with_ttl(self, entries):
            self.asked += len(entries)
            clock.advance(0.3 * len(entries))
            return self.real.with_ttl(entries)

    store = MemoryStore(clock)
    client = Slow(store.another())
    told = Told(client, clock)
    try:
        told.next(Listed)
        began = clock.now()
        for third in range(1, 101):
            put(store, third)
        changes = [told.next() for _ in range(100)]
        assert clock.now() - began < 3.0, "the reader's clock went on only by what it asked"
        assert changes[0].ttl is not None
        assert changes[-1].ttl is None
        asked = client.asked
        assert asked < 10
        for _ in range(20):  # calm: the ends are learned bit by bit
            clock.advance(10.0)
            told.nothing()
        assert client.asked > asked
    finally:
        told.stop()


@pytest.mark.parametrize("when", ["watching", "away"])
def test_stop_ends_it_soon_whatever_it_does(client, clock, tell, when):
    told = tell()
    told.next(Listed)
    if when == "away":
        client.fail("event", AWAY)
        told.next(Lost)
        until(lambda: clock.waiting == 1)
    told.stop()
    told.stop()
    assert told.error is None

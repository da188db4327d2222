"""Both key spaces in step while hosts move: what is written on one side is on the other, and no host loses its lease."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flanctl.errors import Invalid, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease
from flanctl.registry.leases import LEASE_TTL, Leases
from flanctl.registry.migration import SLACK
from flanctl.registry.mirror import Answers, Clash, Copied, Mirror, Silent, Where
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.deadline import until

PREFIX = "/jxdd/network"
CONFIG = f"{PREFIX}/config"
FOLDER = f"{PREFIX}/subnets/"
NETWORK = b'{"Network":"172.17.0.0/16"}'
DIALECTS = Dialect.V0_7, Dialect.V0_28
V2, V3 = 0, 1


class Place:
    def __init__(self):
        self.clock = FakeClock()
        self.stores = MemoryStore(self.clock), MemoryStore(self.clock)
        for store in self.stores:
            store.create(CONFIG, NETWORK, ttl=None)
        self.reports = []
        self.restart()

    def restart(self):
        self.sides = [
            Leases(store, PREFIX, dialect, self.clock)
            for store, dialect in zip(self.stores, DIALECTS, strict=True)
        ]
        self.mirror = Mirror(*self.sides, self.reports.append)

    def write(self, side, number, *, host=None, ttl=LEASE_TTL):
        """As a host does: its own value, whatever stood there."""
        key = f"{FOLDER}172.17.{number}.0-24"
        value = _value(side, host or number)
        store, now = self.stores[side], self.stores[side].get(key)
        if now is None:
            store.create(key, value, ttl=ttl)
        else:
            store.replace(key, value, ttl=ttl, expected=now.revision)

    def delete(self, side, number):
        self.stores[side].delete(f"{FOLDER}172.17.{number}.0-24")

    def look(self, *, timed=False):
        """As often as it asks for by itself."""
        for _ in range(20):
            self.mirror._bell.clear()
            self.mirror.look(timed=timed)
            if not self.mirror._bell.is_set():
                return
        raise AssertionError("it never comes to rest")

    def held(self, side):
        """Number of the subnet → its value and the seconds it has left."""
        store = self.stores[side]
        found = store.with_ttl(store.list(FOLDER).entries)
        return {int(entry.key.split(".")[2]): (entry.value, entry.ttl) for entry in found}

    def assert_in_step(self):
        one, two = self.held(V2), self.held(V3)
        assert one.keys() == two.keys()
        for number in one:
            host = int(one[number][0].split(b".6.")[1].split(b'"')[0])
            assert (one[number][0], two[number][0]) == (_value(V2, host), _value(V3, host))
            ends = one[number][1], two[number][1]
            assert ends == (None, None) or abs(ends[0] - ends[1]) <= SLACK


def _value(side, host):
    more = "" if side == V2 else ',"PublicIPv6":null'
    return f'{{"PublicIP":"192.168.6.{host}"{more}}}'.encode()


@pytest.fixture
def place():
    return Place()


@pytest.mark.parametrize("side", [V2, V3])
def test_a_new_lease_a_renewal_and_a_release_go_to_the_other_side(place, side):
    place.write(side, 41, ttl=5000)
    place.look()
    place.assert_in_step()
    assert place.held(1 - side)[41] == (_value(1 - side, 41), 5000)
    place.write(side, 41)
    place.look()
    assert place.held(1 - side)[41][1] == LEASE_TTL
    place.delete(side, 41)
    place.look()
    assert place.held(V2) == place.held(V3) == {}
    names = [report.what for report in place.reports if isinstance(report, Copied)]
    assert names == ["copied", "renewed", "deleted"]
    assert {report.to for report in place.reports if isinstance(report, Copied)} == {("v3", "v2")[side]}


@pytest.mark.parametrize("side", [V2, V3])
def test_a_renewal_without_a_word_is_found_by_asking_how_long_leases_last(place, side):
    """etcd's keep-alive changes no key."""
    place.write(side, 41)
    place.look()
    place.clock.advance(30_000)
    store = place.stores[side]
    store.refresh(store.get(f"{FOLDER}172.17.41.0-24"), ttl=LEASE_TTL)
    place.look()
    assert place.held(1 - side)[41][1] == LEASE_TTL - 30_000
    place.look(timed=True)
    place.assert_in_step()


@pytest.mark.parametrize("side", [V2, V3])
def test_reservations_stay_without_an_end_and_can_be_ended(place, side):
    place.write(side, 60, ttl=None)
    place.look(timed=True)
    place.assert_in_step()
    place.look(timed=True)
    assert len([one for one in place.reports if isinstance(one, Copied)]) == 1
    place.write(side, 60, ttl=LEASE_TTL)
    place.look(timed=True)
    place.assert_in_step()
    place.write(side, 60, ttl=None)
    place.look(timed=True)
    place.assert_in_step()


def test_a_copy_that_ended_by_itself_is_written_again_not_carried_over(place):
    """Nobody looked for a day; the host has renewed in v3."""
    place.write(V2, 41)
    place.look()
    place.clock.advance(80_000)
    place.write(V3, 41)
    place.clock.advance(10_000)
    place.look()
    place.assert_in_step()
    assert place.held(V2)[41][1] == LEASE_TTL - 10_000


@pytest.mark.parametrize("side", [V2, V3])
def test_a_side_that_lost_its_memory_takes_no_lease_from_anybody(place, side):
    for number in range(40, 50):
        place.write(number % 2, number)
    place.look()
    before = place.held(1 - side)
    for entry in place.stores[side].list(PREFIX).entries:
        place.stores[side].delete(entry.key)
    place.look(timed=True)
    assert place.held(1 - side) == before
    assert "is not in" in place.mirror.clashes[CONFIG]
    place.stores[side].create(CONFIG, NETWORK, ttl=None)
    place.restart()
    place.look()
    place.assert_in_step()
    assert place.held(1 - side) == before


def test_two_hosts_with_one_subnet_are_named_and_left_alone(place):
    place.write(V2, 41, host=2)
    place.write(V3, 41, host=3)
    place.look(timed=True)
    assert place.held(V2)[41][0] == _value(V2, 2)
    assert place.held(V3)[41][0] == _value(V3, 3)
    why = "172.17.41.0/24 is 192.168.6.2's in v2 and 192.168.6.3's in v3"
    assert place.reports[0] == Clash(f"{FOLDER}172.17.41.0-24", why)
    place.look(timed=True)
    assert len([one for one in place.reports if isinstance(one, Clash)]) == 1
    place.delete(V2, 41)
    place.look()
    place.assert_in_step()
    assert place.mirror.clashes == {}


def test_a_config_is_carried_over_when_it_means_the_same_there(place):
    place.look()
    larger = b'{"Network":"172.16.0.0/12"}'
    place.stores[V2].replace(CONFIG, larger, ttl=None, expected=place.stores[V2].get(CONFIG).revision)
    place.look()
    assert place.stores[V3].get(CONFIG).value == larger
    alien = b'{"Network":"172.16.0.0/12","Backend":{"Type":"ipip"}}'
    place.stores[V3].replace(CONFIG, alien, ttl=None, expected=place.stores[V3].get(CONFIG).revision)
    place.look()
    assert place.stores[V2].get(CONFIG).value == larger
    assert "ipip" in place.mirror.clashes[CONFIG]


def test_it_counts_the_hosts_that_write_in_v3(place):
    for number in (41, 42):
        place.write(V2, number)
    place.look()
    place.write(V3, 41)
    place.look()
    place.write(V3, 42)
    place.look()
    told = [one.kept_in[1][1] for one in place.reports if isinstance(one, Where)]
    assert told == [0, 1, 2]


def test_an_agent_that_announces_itself_in_v3_lives_there(place):
    """Its renewal of a lease of full length is a keep-alive, which nobody sees."""
    place.write(V2, 41)
    place.look()
    words = b'{"host":"h","version":"1","data_path":"u","instance":"i","run":"r"}'
    place.stores[V3].create(f"{PREFIX}/flanctl/hosts/192.168.6.41", words, ttl=60)
    place.look()
    told = [one.kept_in for one in place.reports if isinstance(one, Where)]
    assert told == [(("v2", 1), ("v3", 0)), (("v2", 0), ("v3", 1))]


def test_it_follows_both_sides_and_survives_an_outage():
    place = Place()
    links = [store.another() for store in place.stores]
    sides = [
        Leases(link, PREFIX, dialect, place.clock) for link, dialect in zip(links, DIALECTS, strict=True)
    ]
    mirror = Mirror(*sides, place.reports.append)
    thread = threading.Thread(target=mirror.run)
    thread.start()
    try:
        place.write(V2, 41)
        until(lambda: 41 in place.held(V3))
        place.write(V3, 42)
        until(lambda: 42 in place.held(V2))
        for link in links:
            link.fail("get", RegistryUnreachable("no answer"), times=3)
            link.fail("event", RegistryUnreachable("no answer"))
        place.write(V3, 43)

        def passed():
            place.clock.advance(1)
            return 43 in place.held(V2) and any(isinstance(one, Answers) for one in place.reports)

        until(passed)
        assert any(isinstance(one, Silent) for one in place.reports)
    finally:
        mirror.stop()
        thread.join(10)
    assert not thread.is_alive()
    place.assert_in_step()


def test_what_one_side_cannot_hold_is_named_and_hides_no_other(place):
    place.write(V2, 41)
    place.write(V2, 42)
    place.stores[V3].fail("create", Invalid("the store refuses a value of 2 MB"))
    place.look()
    assert place.held(V3).keys() == {42}
    place.stores[V3].fail("create", Invalid("the store refuses a value of 2 MB"))
    place.look()
    assert len([one for one in place.reports if isinstance(one, Clash)]) == 1
    assert place.mirror.clashes == {f"{FOLDER}172.17.41.0-24": "the store refuses a value of 2 MB"}
    place.look()
    place.assert_in_step()
    assert place.mirror.clashes == {}


NAMES = st.one_of(st.text(max_size=20), st.from_regex(r"172\.17\.[0-9]{1,3}\.0-2[0-9]", fullmatch=True))
VALUES = st.one_of(st.binary(max_size=30), st.sampled_from([_value(V2, 9), _value(V3, 9), b"{}", b"[]"]))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([V2, V3]), NAMES, VALUES, st.sampled_from([None, 5000])), max_size=8)
)
def test_no_key_or_value_breaks_a_look_or_hides_a_good_lease(writes):
    place = Place()
    for side, name, value, ttl in writes:
        if place.stores[side].get(FOLDER + name) is None:
            place.stores[side].create(FOLDER + name, value, ttl=ttl)
    place.write(V2, 250)
    place.look(timed=True)
    place.look(timed=True)
    assert place.stores[V3].get(f"{FOLDER}172.17.250.0-24") is not None
    # What is on both sides afterwards is a lease on both, of one host, or was there before.
    before = [{FOLDER + name for where, name, _, _ in writes if where == side} for side in (V2, V3)]
    for side in (V2, V3):
        for entry in place.stores[side].list(FOLDER).entries:
            lease = place.sides[side].read(entry)
            assert entry.key in before[side] or isinstance(lease, Lease)


NUMBERS = st.integers(1, 4)
SIDES = st.sampled_from([V2, V3])


class Moves(RuleBasedStateMachine):
    """Hosts that take, renew, move and leave, an operator who releases, a mirror that looks or is started again.

    Each host writes on one side at a time. At rest both sides are the same, and a host that renewed in time has its
    subnet. A subnet is its host's own here: who of two gets one is for `Leases`.
    """

    def __init__(self):
        super().__init__()
        self.place = Place()
        self.ends = {}
        """When the lease of a host ends that took it and was not released: it must be there until then."""

    @rule(number=NUMBERS, side=SIDES)
    def writes(self, number, side):
        self.place.write(side, number)
        self.ends[number] = self.place.clock.now() + LEASE_TTL

    @rule(number=NUMBERS, side=SIDES)
    def renews_without_a_word(self, number, side):
        store = self.place.stores[side]
        entry = store.get(f"{FOLDER}172.17.{number}.0-24")
        if entry is not None:
            store.refresh(entry, ttl=LEASE_TTL)
            self.ends[number] = self.place.clock.now() + LEASE_TTL

    @rule(number=NUMBERS, side=SIDES)
    def is_released(self, number, side):
        self.place.delete(side, number)
        self.ends.pop(number, None)

    @rule(seconds=st.sampled_from([1, 59, 600, 30_000, 90_000]))
    def time_passes(self, seconds):
        self.place.clock.advance(seconds)

    @rule()
    def is_started_again(self):
        self.place.restart()

    @rule()
    def looks(self):
        self.place.look(timed=True)
        self.place.assert_in_step()
        now = self.place.clock.now()
        for number, ends in self.ends.items():
            if ends > now + SLACK:
                assert number in self.place.held(V2)

    @invariant()
    def nothing_clashes(self):
        assert self.place.mirror.clashes == {}


Moves.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMoves = Moves.TestCase

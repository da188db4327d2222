"""Who holds which subnet is the one thing that must never be wrong."""

from __future__ import annotations

import threading
from dataclasses import asdict
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flanctl.errors import Conflict, FlanctlError, LeaseLost, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.registry.leases import (
    LEASE_TTL,
    Keeper,
    LeaseRenewed,
    LeaseRestored,
    Leases,
    RegistryBack,
    RegistryTrouble,
    renew_after,
    usage,
)
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.deadline import until

PREFIX = "/jxdd/network"
ONE, TWO = IPv4Address("192.168.6.2"), IPv4Address("192.168.6.15")
AWAY = RegistryUnreachable("no answer")


def config(text='{"Network":"172.17.0.0/16"}'):
    return NetworkConfig.parse(text, Dialect.V0_28)


TINY = config('{"Network":"10.0.0.0/28","SubnetLen":30}')  # three subnets: .4, .8, .12
PAIR = config('{"Network":"10.0.0.0/28","SubnetLen":30,"SubnetMin":"10.0.0.4","SubnetMax":"10.0.0.8"}')


def host(address):
    return LeaseAttributes(public_ip=address)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock)


@pytest.fixture
def leases(store, clock):
    return Leases(store, PREFIX, Dialect.V0_28, clock)


def put(store, subnet, value, ttl=LEASE_TTL):
    return store.create(f"{PREFIX}/subnets/{subnet}", value, ttl=ttl)


def test_a_new_host_gets_a_subnet_in_flannels_bytes(store, leases):
    held = leases.acquire(config(), host(ONE))
    entry = store.get(held.lease.key)
    assert held.how == "new"
    assert entry.key == f"{PREFIX}/subnets/{held.lease.subnet.network_address}-24"
    assert entry.value == b'{"PublicIP":"192.168.6.2","PublicIPv6":null}'
    assert entry.ttl == LEASE_TTL


def test_dialect_0_7_writes_0_7s_bytes(store, clock):
    held = Leases(store, PREFIX, Dialect.V0_7, clock).acquire(
        NetworkConfig.parse('{"Network":"172.17.0.0/16"}', Dialect.V0_7), host(ONE)
    )
    assert store.get(held.lease.key).value == b'{"PublicIP":"192.168.6.2"}'


def test_the_lease_that_names_us_is_kept_and_gets_its_full_time_again(store, leases, clock):
    first = leases.acquire(config(), host(ONE))
    clock.advance(10 * 3600)
    second = leases.acquire(config(), host(ONE))
    assert (second.lease.subnet, second.how) == (first.lease.subnet, "kept")
    assert store.get(second.lease.key).ttl == LEASE_TTL


def test_what_flanneld_0_7_wrote_for_us_is_taken_over_with_fields_of_others(store, leases):
    put(store, "172.17.41.0-24", b'{"PublicIP":"192.168.6.2","Note":"rack 7"}', ttl=3600)
    held = leases.acquire(config(), host(ONE))
    assert held.lease.subnet == IPv4Network("172.17.41.0/24")
    assert store.get(held.lease.key).value == b'{"PublicIP":"192.168.6.2","PublicIPv6":null,"Note":"rack 7"}'


def test_a_reservation_is_taken_and_stays_without_ttl_through_start_and_renewal(store, leases, clock):
    put(store, "172.17.60.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}', ttl=None)
    held = leases.acquire(config(), host(ONE))
    assert held.lease.subnet == IPv4Network("172.17.60.0/24")
    assert held.lease.reservation
    clock.advance(30 * 86400)
    assert leases.renew(held).lease.reservation
    assert leases.acquire(config(), host(ONE)).lease.reservation
    assert store.get(held.lease.key).lease is None


def test_the_subnet_we_had_is_taken_again_after_the_lease_ended(leases, clock):
    had = IPv4Network("172.17.99.0/24")
    held = leases.acquire(config(), host(ONE), previous=[had])
    assert (held.lease.subnet, held.how) == (had, "again")


def test_a_subnet_we_had_that_somebody_else_holds_now_is_not_touched(store, leases):
    had = IPv4Network("172.17.99.0/24")
    put(store, "172.17.99.0-24", b'{"PublicIP":"192.168.6.15"}')
    held = leases.acquire(config(), host(ONE), previous=[had])
    assert held.lease.subnet != had
    assert b"192.168.6.15" in store.get(f"{PREFIX}/subnets/172.17.99.0-24").value


def test_of_two_leases_that_name_us_the_one_we_had_wins(store, leases):
    for third in (10, 20):
        put(store, f"172.17.{third}.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}')
    again = leases.acquire(config(), host(ONE), previous=[IPv4Network("172.17.20.0/24")])
    assert again.lease.subnet == IPv4Network("172.17.20.0/24")
    assert leases.acquire(config(), host(ONE)).lease.subnet == IPv4Network("172.17.10.0/24")


def test_a_lease_outside_a_changed_config_is_left_and_noted(store, leases):
    put(store, "172.18.1.0-24", b'{"PublicIP":"192.168.6.2"}')
    held = leases.acquire(config(), host(ONE))
    assert held.lease.subnet.subnet_of(IPv4Network("172.17.0.0/16"))
    assert "172.18.1.0/24 does not fit" in held.notes[0]
    assert store.get(f"{PREFIX}/subnets/172.18.1.0-24") is not None


def test_bad_keys_and_values_hide_nobody_and_a_bad_value_keeps_its_subnet_taken(store, leases):
    put(store, "172.17.x.0-24", b"{}")
    put(store, "172.17.5.0-24", b"not json")
    put(store, "172.17.6.0-24", b'{"PublicIP":"192.168.6.15"}')
    put(store, "deeper/172.17.7.0-24", b'{"PublicIP":"192.168.6.16"}')
    table = leases.table()
    assert [str(lease.subnet) for lease in table.leases] == ["172.17.6.0/24"]
    assert {bad.key.removeprefix(PREFIX + "/subnets/"): bad.problem for bad in table.unreadable} == {
        "172.17.x.0-24": "bad-key",
        "172.17.5.0-24": "bad-value",
        "deeper/172.17.7.0-24": "bad-key",
    }
    held = leases.acquire(config(), host(ONE), previous=[IPv4Network("172.17.5.0/24")])
    assert held.lease.subnet != IPv4Network("172.17.5.0/24")


def test_a_full_network_is_told_in_numbers(store, leases, clock):
    """flannel.md 11, row 6: `out of subnets` tells nobody anything."""
    for last, address in ((4, 1), (8, 2)):
        put(store, f"10.0.0.{last}-30", b'{"PublicIP":"192.168.6.1%d"}' % address, ttl=7200)
    put(store, "10.0.0.12-30", b'{"PublicIP":"192.168.6.60"}', ttl=None)
    clock.advance(60)
    with pytest.raises(Conflict) as full:
        leases.acquire(TINY, host(ONE))
    assert full.value.id == "pool-full"
    assert str(full.value) == "3 of 3 subnets taken in 10.0.0.0/28 (1 reserved, oldest expiry in 1h59m)"


def test_two_hosts_race_for_the_last_subnet_and_exactly_one_gets_it(store, clock):
    put(store, "10.0.0.4-30", b'{"PublicIP":"192.168.6.11"}')
    put(store, "10.0.0.8-30", b'{"PublicIP":"192.168.6.12"}')
    outcomes = race(store, clock, TINY, [ONE, TWO])
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Acquired", "Conflict"]


def test_fifty_hosts_at_once_get_fifty_subnets_even_where_there_are_exactly_fifty(store, clock):
    exact = config('{"Network":"10.0.0.0/22","SubnetLen":28,"SubnetMin":"10.0.0.16","SubnetMax":"10.0.3.32"}')
    assert exact.capacity == 50
    outcomes = race(store, clock, exact, [IPv4Address("192.168.6.1") + n for n in range(50)])
    assert len({outcome.lease.subnet for outcome in outcomes}) == 50


def race(store, clock, network, addresses):
    """All at once, each host with a client of its own."""
    barrier, outcomes = threading.Barrier(len(addresses)), []

    def run(address):
        barrier.wait()
        try:
            outcomes.append(
                Leases(store.another(), PREFIX, Dialect.V0_28, clock).acquire(network, host(address))
            )
        except FlanctlError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("after_effect", [False, True])
@pytest.mark.parametrize("step", range(1, 4))
@pytest.mark.parametrize("had_lease", [False, True])
def test_a_store_that_fails_at_any_step_of_acquire_leaves_one_lease_that_the_next_try_finds(
    store, clock, step, after_effect, had_lease
):
    """Whatever was written before the failure names us, so trying again ends in one lease and no other."""
    if had_lease:
        Leases(store, PREFIX, Dialect.V0_28, clock).acquire(config(), host(ONE))
    agent = FailAtStep(store.another(), step, after_effect)
    leases = Leases(agent, PREFIX, Dialect.V0_28, clock)
    got = []
    for _ in range(3):
        try:
            got.append(leases.acquire(config(), host(ONE)))
        except RegistryUnreachable:
            continue
    first, second = got[0], got[-1]
    table = Leases(store, PREFIX, Dialect.V0_28, clock).table()
    assert [lease.subnet for lease in table.leases] == [second.lease.subnet]
    assert len(got) == 2
    assert first.lease.subnet == second.lease.subnet


@pytest.mark.parametrize("after_effect", [False, True])
@pytest.mark.parametrize("step", range(1, 4))
@pytest.mark.parametrize("harm", ["none", "deleted", "rewritten"])
def test_a_store_that_fails_at_any_step_of_renew_keeps_our_subnet(store, clock, step, after_effect, harm):
    healthy = Leases(store, PREFIX, Dialect.V0_28, clock)
    held = healthy.acquire(config(), host(ONE))
    if harm == "deleted":
        store.delete(held.lease.key)
    elif harm == "rewritten":
        store.replace(held.lease.key, b'{"PublicIP":"192.168.6.2"}', ttl=60, expected=held.entry.revision)
    agent = FailAtStep(store.another(), step, after_effect)
    leases = Leases(agent, PREFIX, Dialect.V0_28, clock)
    try:
        held = leases.renew(held)
    except RegistryUnreachable:
        held = leases.renew(held)
    assert [lease.subnet for lease in healthy.table().leases] == [held.lease.subnet]
    assert store.get(held.lease.key).ttl == LEASE_TTL


class FailAtStep:
    """A client whose n-th call fails, once; before the work or after it."""

    def __init__(self, store, step, after_effect):
        self._store, self._step, self._after = store, step, after_effect

    def __getattr__(self, name):
        call = getattr(self._store, name)
        if not callable(call):
            return call

        def counted(*args, **kwargs):
            self._step -= 1
            if self._step == 0:
                if self._after:
                    call(*args, **kwargs)
                raise AWAY
            return call(*args, **kwargs)

        return counted


def test_a_deleted_reservation_comes_back_as_one(store, leases):
    """flannel.md 11, row 9. Who wants an ordinary lease gives the key a TTL."""
    put(store, "172.17.60.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}', ttl=None)
    held = leases.acquire(config(), host(ONE))
    store.delete(held.lease.key)
    again = leases.renew(held)
    assert (again.lease.subnet, again.how, again.lease.reservation) == (held.lease.subnet, "again", True)
    assert store.get(held.lease.key).lease is None
    store.replace(held.lease.key, held.entry.value, ttl=60, expected=again.entry.revision)
    lease = leases.renew(again)
    assert not lease.lease.reservation
    assert store.get(held.lease.key).ttl == LEASE_TTL


def test_a_reservation_overwritten_with_garbage_is_put_right_as_one(store, leases):
    put(store, "172.17.60.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}', ttl=None)
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, b"nonsense", ttl=60, expected=held.entry.revision)
    assert leases.renew(held).lease.reservation


def test_a_lease_is_believed_in_from_before_it_was_asked_for(store, clock):
    """The answer may come late; the server's time began earlier."""

    class Slow:
        def __getattr__(self, name):
            call = getattr(store, name)
            return (
                call
                if name not in {"create", "refresh"}
                else lambda *a, **k: (call(*a, **k), clock.advance(7))[0]
            )

    leases = Leases(Slow(), PREFIX, Dialect.V0_28, clock)
    began = clock.now()
    held = leases.acquire(config(), host(ONE), ttl=60)
    assert held.ends == began + 60
    began = clock.now()
    assert leases.renew(held, ttl=60).ends == began + 60


def test_a_short_lease_is_tried_again_more_often_than_each_minute(store, leases, clock):
    reports = []
    keeper = Keeper(leases, leases.acquire(config(), host(ONE), ttl=12), reports.append, ttl=12)
    thread = threading.Thread(target=keeper.run)
    store.fail("refresh", AWAY, times=6)
    thread.start()
    try:
        until(lambda: clock.waiting)
        clock.advance(4.5)
        for tries in range(1, 6):
            until(lambda tries=tries: len(reports) >= tries and clock.waiting)
            clock.advance(1.3)
        until(lambda: len(reports) >= 6)
        assert reports[5].lease_left > 0, "six tries before it ended"
    finally:
        keeper.stop()
        thread.join(5)


def test_a_deleted_key_comes_back_as_the_same_subnet(store, leases):
    held = leases.acquire(config(), host(ONE))
    store.delete(held.lease.key)
    again = leases.renew(held)
    assert (again.lease.subnet, again.how) == (held.lease.subnet, "again")


def test_a_foreign_value_under_our_key_is_a_lost_lease_and_is_never_overwritten(store, leases):
    """flannel.md 11, row 7: a renewal there is a write without a look."""
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, b'{"PublicIP":"192.168.6.77"}', ttl=60, expected=held.entry.revision)
    with pytest.raises(LeaseLost, match=r"taken by 192\.168\.6\.77 at revision") as lost:
        leases.renew(held)
    assert lost.value.exit_code == 8
    assert b"192.168.6.77" in store.get(held.lease.key).value


class TakenMeanwhile:
    """Between our look at the key and our write somebody else is faster, once."""

    def __init__(self, store, value):
        self._store, self._value = store, value

    def __getattr__(self, name):
        return getattr(self._store, name)

    def _be_faster(self, key):
        value, self._value = self._value, None
        if value is not None:
            self._store.delete(key)
            self._store.create(key, value, ttl=60)

    def create(self, key, value, *, ttl):
        self._be_faster(key)
        return self._store.create(key, value, ttl=ttl)

    def replace(self, key, value, *, ttl, expected):
        self._be_faster(key)
        return self._store.replace(key, value, ttl=ttl, expected=expected)


@pytest.mark.parametrize("harm", ["deleted", "garbage"])
def test_another_host_that_is_faster_while_we_write_our_key_again_has_it(store, leases, clock, harm):
    held = leases.acquire(config(), host(ONE))
    _do_harm(store, held, harm)
    racing = Leases(TakenMeanwhile(store, host(TWO).format(Dialect.V0_28)), PREFIX, Dialect.V0_28, clock)
    with pytest.raises(LeaseLost, match=str(TWO)):
        racing.renew(held)
    assert store.get(held.lease.key).value == host(TWO).format(Dialect.V0_28)


@pytest.mark.parametrize("harm", ["deleted", "garbage"])
def test_a_value_of_ours_that_appears_while_we_write_our_key_again_is_ours(store, leases, clock, harm):
    held = leases.acquire(config(), host(ONE))
    _do_harm(store, held, harm)
    racing = Leases(TakenMeanwhile(store, b'{"PublicIP":"192.168.6.2"}'), PREFIX, Dialect.V0_28, clock)
    assert racing.renew(held).lease.subnet == held.lease.subnet
    assert store.get(held.lease.key).value == held.entry.value


def _do_harm(store, held, harm):
    if harm == "deleted":
        store.delete(held.lease.key)
    else:
        store.replace(held.lease.key, b"", ttl=60, expected=held.entry.revision)


def test_garbage_under_our_key_claims_nothing_and_is_put_right(store, leases):
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, b"", ttl=None, expected=held.entry.revision)
    again = leases.renew(held)
    assert again.how == "again"
    assert store.get(held.lease.key).value == held.entry.value


def test_our_lease_made_a_reservation_by_the_operator_stays_one(store, leases):
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, held.entry.value, ttl=None, expected=held.entry.revision)
    again = leases.renew(held)
    assert again.lease.reservation
    assert store.get(held.lease.key).lease is None


def test_renewal_comes_at_a_third_and_at_the_latest_a_margin_before_the_end():
    """flannel.md 11, row 29: a margin beyond the TTL is a busy loop there."""
    for _ in range(200):
        assert 0.9 * 28800 <= renew_after(86400, 3600) <= 1.1 * 28800
        assert 0.9 * 600 <= renew_after(3600, 3000) <= 1.1 * 600
        assert 0.9 * 20 <= renew_after(60, 3600) <= 1.1 * 20
        assert 0.9 * 20 <= renew_after(60, 60) <= 1.1 * 20
        assert renew_after(60, 59) >= 5.0


class Kept:
    """A keeper in a thread, with what it reported."""

    def __init__(self, leases, held):
        self.reports, self.error = [], None
        self.keeper = Keeper(leases, held, self.reports.append)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.keeper.run()
        except FlanctlError as error:
            self.error = error

    def stop(self):
        self.keeper.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def kept(leases, clock):
    one = Kept(leases, leases.acquire(config(), host(ONE)))
    until(lambda: clock.waiting == 1)
    yield one
    one.stop()


def test_the_keeper_renews_at_a_third_of_the_ttl(kept, clock, store):
    clock.advance(0.89 * LEASE_TTL / 3)
    assert kept.reports == []
    clock.advance(0.22 * LEASE_TTL / 3)
    until(lambda: kept.reports)
    assert isinstance(kept.reports[0], LeaseRenewed)
    assert store.get(kept.keeper.held.lease.key).ttl == LEASE_TTL


def test_the_keeper_woken_by_a_deleted_key_writes_it_again(kept, store):
    store.delete(kept.keeper.held.lease.key)
    kept.keeper.wake()
    until(lambda: kept.reports)
    assert isinstance(kept.reports[0], LeaseRestored)


def test_the_keeper_tries_through_an_outage_and_tells_both_ends(kept, clock, store):
    store.fail("refresh", AWAY, times=3)
    clock.advance(LEASE_TTL / 2)
    until(lambda: (clock.advance(1.0), any(isinstance(r, LeaseRenewed) for r in kept.reports))[1])
    kinds = [type(report) for report in kept.reports]
    assert kinds == [RegistryTrouble] * 3 + [RegistryBack, LeaseRenewed]
    assert kept.reports[3].tries == 3


def test_the_keeper_ends_when_the_lease_is_lost(kept, store):
    held = kept.keeper.held
    store.replace(held.lease.key, b'{"PublicIP":"192.168.6.77"}', ttl=60, expected=held.entry.revision)
    kept.keeper.wake()
    kept.thread.join(5)
    assert isinstance(kept.error, LeaseLost)


def test_a_restart_that_cannot_have_its_subnet_again_says_who_has_it(store, leases):
    """flannel.md 11, row 1: the new subnet comes in silence there, and docker keeps the old bridge."""
    had = IPv4Network("172.17.99.0/24")
    put(store, "172.17.99.0-24", b'{"PublicIP":"192.168.6.15"}')
    held = leases.acquire(config(), host(ONE), previous=[had])
    assert f"had 172.17.99.0/24 and has {held.lease.subnet} now" in held.notes[0]
    assert "172.17.99.0/24 belongs to 192.168.6.15" in held.notes[0]


def test_a_restart_in_its_own_subnet_has_nothing_to_say(leases):
    had = leases.acquire(config(), host(ONE)).lease.subnet
    assert leases.acquire(config(), host(ONE), previous=[had]).notes == ()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("172.17.99.0-24", b"", "key '/jxdd/network/subnets/172.17.99.0-24' cannot be read"),
        ("172.17.60.0-24", b'{"PublicIP":"192.168.6.2"}', "the registry names 172.17.60.0/24"),
    ],
)
def test_each_reason_for_another_subnet_is_told(store, leases, key, value, reason):
    put(store, key, value, ttl=None)
    held = leases.acquire(config(), host(ONE), previous=[IPv4Network("172.17.99.0/24")])
    assert reason in held.notes[-1]


def test_a_second_lease_that_names_us_is_noted_and_left_alone(store, leases):
    for third in (10, 20):
        put(store, f"172.17.{third}.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}')
    assert leases.acquire(config(), host(ONE)).notes == (
        "192.168.6.2 holds 172.17.20.0/24 too, which is left alone",
    )


@pytest.mark.parametrize("name", ["172.17.99.0-24x", "x/172.17.99.0-24", "172.17.99.0-24&FC00::-64"])
def test_a_key_some_flannel_may_read_keeps_its_subnet_taken(store, leases, name):
    put(store, name, b'{"PublicIP":"192.168.6.15"}')
    held = leases.acquire(config(), host(ONE), previous=[IPv4Network("172.17.99.0/24")])
    assert held.lease.subnet != IPv4Network("172.17.99.0/24")
    assert leases.table().unreadable[0].problem == "bad-key"


def test_a_key_that_is_not_utf8_is_shown_and_keeps_its_subnet_taken(store, leases):
    store.put_unreadable(f"{PREFIX}/subnets/172.17.99.0-24".encode() + b"\xff")
    put(store, "172.17.6.0-24", b'{"PublicIP":"192.168.6.15"}')
    table = leases.table()
    assert len(table.leases) == 1
    assert table.unreadable[0].key == f"{PREFIX}/subnets/172.17.99.0-24\\xff"
    held = leases.acquire(config(), host(ONE), previous=[IPv4Network("172.17.99.0/24")])
    assert held.lease.subnet != IPv4Network("172.17.99.0/24")


def test_one_unreadable_key_cannot_fill_the_whole_network(store, leases):
    put(store, "172.17.0.0-16", b"nonsense")
    put(store, "0.0.0.0-1x", b"nonsense")
    assert leases.acquire(config(), host(ONE)).how == "new"


def test_a_key_of_ours_in_another_spelling_gives_way_to_another_hosts(store, leases):
    """flannel reads 172.17.41.5-24 as 172.17.41.0/24 too; keeping it would make two holders."""
    put(store, "172.17.41.5-24", b'{"PublicIP":"192.168.6.2"}')
    assert leases.acquire(config(), host(ONE)).lease.subnet == IPv4Network("172.17.41.0/24")
    put(store, "172.17.41.0-24", b'{"PublicIP":"192.168.6.15"}')
    assert leases.acquire(config(), host(ONE)).lease.subnet != IPv4Network("172.17.41.0/24")


def test_a_lease_that_ends_while_we_take_it_over_is_taken_again_as_the_same_subnet(store, clock):
    """Nobody remembers it but the list we just read."""
    put(store, "172.17.41.0-24", b'{"PublicIP":"192.168.6.2","PublicIPv6":null}', ttl=60)
    ends = EndsBeforeRefresh(store, clock)
    held = Leases(ends, PREFIX, Dialect.V0_28, clock).acquire(config(), host(ONE))
    assert (held.lease.subnet, held.how) == (IPv4Network("172.17.41.0/24"), "again")


class EndsBeforeRefresh:
    """A store whose leases end just before they are refreshed."""

    def __init__(self, store, clock):
        self._store, self._clock = store, clock

    def __getattr__(self, name):
        return getattr(self._store, name)

    def refresh(self, entry, *, ttl):
        self._clock.advance(3600)
        return self._store.refresh(entry, ttl=ttl)


def test_a_full_network_is_told_even_if_nobody_knows_when_a_place_comes_free(store, leases):
    for last in (4, 8):
        put(store, f"10.0.0.{last}-30", b'{"PublicIP":"192.168.6.11"}')
    put(store, "10.0.0.12-30", b"nonsense")
    store.fail("with_ttl", AWAY)
    with pytest.raises(Conflict) as full:
        leases.acquire(TINY, host(ONE))
    assert str(full.value) == "3 of 3 subnets taken in 10.0.0.0/28 (0 reserved, 1 unreadable)"


def test_the_value_that_flannels_own_way_to_reserve_destroys_is_put_right_and_stays_reserved(store, leases):
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, held.lease.key.encode(), ttl=None, expected=held.entry.revision)
    again = leases.renew(held)
    assert (again.how, again.lease.reservation) == ("again", True)
    assert store.get(held.lease.key).value == held.entry.value
    assert leases.renew(again).how == "kept"


def test_our_own_value_written_by_somebody_else_is_adopted_without_alarm(store, leases):
    """A flanneld on this host, or an answer of ours that was lost."""
    held = leases.acquire(config(), host(ONE))
    store.replace(held.lease.key, held.entry.value, ttl=60, expected=held.entry.revision)
    again = leases.renew(held)
    assert again.how == "kept"
    assert store.get(held.lease.key).ttl == LEASE_TTL


def test_leases_are_found_by_subnet_by_host_and_by_a_containers_address(store, leases):
    put(store, "172.17.10.0-24", b'{"PublicIP":"192.168.6.2"}', ttl=60)
    put(store, "172.17.20.0-24", b'{"PublicIP":"192.168.6.15"}', ttl=60)
    assert [lease.ttl for lease in leases.find(IPv4Network("172.17.10.0/24"))] == [60]
    assert [str(lease.subnet) for lease in leases.find(ONE)] == ["172.17.10.0/24"]
    assert [str(lease.subnet) for lease in leases.find(IPv4Address("172.17.20.7"))] == ["172.17.20.0/24"]
    assert leases.find(IPv4Network("172.17.0.0/16")) == ()


def test_ttls_are_asked_only_by_who_shows_them(store, leases):
    leases.acquire(config(), host(ONE))
    leases.table()
    assert "with_ttl" not in store.calls
    assert leases.table(with_ttl=True).leases[0].ttl == LEASE_TTL


def test_the_keeper_goes_by_the_time_the_server_gave(store, leases, clock):
    """etcd may give less than was asked; a third of our own wish would come too late."""
    held = leases.acquire(config(), host(ONE), ttl=60)
    one = Kept(leases, held)
    try:
        until(lambda: clock.waiting == 1)
        clock.advance(23)
        until(lambda: one.reports)
    finally:
        one.stop()


def test_trouble_says_since_when_and_how_long_the_lease_still_runs(kept, clock, store):
    store.fail("refresh", AWAY, times=2)
    clock.advance(LEASE_TTL / 2)
    until(lambda: kept.reports)
    assert kept.reports[0].lease_left == pytest.approx(LEASE_TTL / 2)
    assert kept.reports[0].since == 0
    until(lambda: clock.waiting == 1)
    clock.advance(LEASE_TTL)
    until(lambda: len(kept.reports) >= 2)
    assert kept.reports[1].since == LEASE_TTL
    assert kept.reports[1].lease_left == 0


@given(st.binary(max_size=60), st.text(max_size=20))
@settings(max_examples=150)
def test_no_key_or_value_makes_the_table_fail(value, name):
    store = MemoryStore(FakeClock())
    store.create(f"{PREFIX}/subnets/{name}", value, ttl=60)
    store.create(f"{PREFIX}/subnets/172.17.1.0-24", b'{"PublicIP":"1.2.3.4"}', ttl=60)
    table = Leases(store, PREFIX, Dialect.V0_28, FakeClock()).table()
    assert any(lease.attributes.public_ip == IPv4Address("1.2.3.4") for lease in table.leases)


class Hosts(RuleBasedStateMachine):
    """Three hosts acquire, renew, restart, lose answers and sleep past their TTL, in any order.

    Two subnets for the three, or nobody would ever want another's: each hashes to its own.
    """

    def __init__(self):
        super().__init__()
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.clients = [self.store.another() for _ in range(3)]
        self.leases = [Leases(client, PREFIX, Dialect.V0_28, self.clock) for client in self.clients]
        self.held = [None] * 3
        self.valid_until = [0.0] * 3
        self.last = [None] * 3

    @rule(
        host_=st.integers(0, 2),
        fail_at=st.sampled_from([None] * 4 + ["list", "create", "refresh", "replace"]),
        after=st.booleans(),
    )
    def acquire(self, host_, fail_at, after):
        if fail_at:
            self.clients[host_].fail(fail_at, AWAY, after_effect=after)
        previous = [self.last[host_]] if self.last[host_] else []
        before = self.clock.now()
        try:
            held = self.leases[host_].acquire(PAIR, host(IPv4Address("10.9.9.1") + host_), previous=previous)
        except (RegistryUnreachable, Conflict):
            self.held[host_] = None
        else:
            assert previous in ([], [held.lease.subnet]) or held.notes, (
                "a restart changed the subnet in silence"
            )
            self.held[host_] = held
            self.last[host_] = held.lease.subnet
            self.valid_until[host_] = before + LEASE_TTL
        self.clients[host_]._failures.clear()

    @precondition(lambda self: any(self.held))
    @rule(
        host_=st.integers(0, 2),
        fail_at=st.sampled_from([None] * 3 + ["create", "refresh", "replace"]),
        after=st.booleans(),
    )
    def renew(self, host_, fail_at, after):
        host_ = self._a_holder(host_)
        held = self.held[host_]
        if fail_at:
            self.clients[host_].fail(fail_at, AWAY, after_effect=after)
        before = self.clock.now()
        try:
            renewed = self.leases[host_].renew(held)
        except RegistryUnreachable:
            pass
        except LeaseLost:
            self.held[host_] = None
        else:
            assert renewed.lease.subnet == held.lease.subnet, "a renewal changed the subnet in silence"
            self.held[host_] = renewed
            self.valid_until[host_] = before + LEASE_TTL
        self.clients[host_]._failures.clear()

    @rule(seconds=st.sampled_from([60.0, LEASE_TTL / 3, LEASE_TTL + 1]))
    def sleep(self, seconds):
        self.clock.advance(seconds)

    def _a_holder(self, host_):
        """That host, or the next that holds a lease: a step that does nothing finds nothing."""
        return next(at % 3 for at in range(host_, host_ + 3) if self.held[at % 3] is not None)

    @precondition(lambda self: any(self.held))
    @rule(host_=st.integers(0, 2))
    def operator_deletes(self, host_):
        """Taking a live host's key away is the one thing that may let another host in; belief in it ends."""
        host_ = self._a_holder(host_)
        subnet = self.held[host_].lease.subnet
        self.store.delete(self.held[host_].lease.key)
        for at, held in enumerate(self.held):
            if held is not None and held.lease.subnet == subnet:
                self.valid_until[at] = 0.0

    @invariant()
    def never_two_who_may_both_believe(self):
        """Hosts whose last confirmed lease has not run out hold different subnets."""
        now = self.clock.now()
        holders = [
            held.lease.subnet
            for held, end in zip(self.held, self.valid_until, strict=True)
            if held is not None and now < end
        ]
        assert len(holders) == len(set(holders))

    @invariant()
    def the_registry_has_one_value_per_subnet_and_none_outside(self):
        for entry in self.store.list(f"{PREFIX}/subnets/").entries:
            lease = self.leases[0].read(entry)
            assert isinstance(lease, Lease)
            assert PAIR.accepts(lease.subnet)


Hosts.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestHosts = Hosts.TestCase


def nets(low, high):
    return st.builds(
        lambda address, length: IPv4Network((address, length), strict=False),
        st.integers(int(IPv4Address("10.0.0.0")) - 64, int(IPv4Address("10.0.1.0")) + 64),
        st.integers(low, high),
    )


@given(
    st.lists(st.tuples(nets(22, 31), st.booleans(), st.booleans()), max_size=12, unique_by=lambda one: one[0])
)
def test_usage_counts_each_subnet_once_whatever_covers_it(keys):
    """Against counting one by one: a lease wins over a reservation, that over a key that cannot be read."""
    small = config('{"Network":"10.0.0.0/24","SubnetLen":28}')
    store = MemoryStore()
    leases = Leases(store, PREFIX, Dialect.V0_28)
    for subnet, reserved, bad in keys:
        value = b"{" if bad else b'{"PublicIP":"192.168.6.2"}'
        store.create(leases.key(subnet), value, ttl=None if reserved else 60)
    table = leases.table()
    leased = [lease for lease in table.leases if not small.network.subnet_of(lease.subnet)]
    taken = {
        "leased": [lease.subnet for lease in leased if not lease.reservation],
        "reserved": [lease.subnet for lease in leased if lease.reservation],
        "unreadable": [one.subnet for one in table.unreadable if not small.network.subnet_of(one.subnet)],
    }
    counted = dict.fromkeys((*taken, "free"), 0)
    for subnet in small.subnets():
        by = (name for name, nets in taken.items() if any(subnet.overlaps(one) for one in nets))
        counted[next(by, "free")] += 1
    assert asdict(usage(table, small)) == counted


def test_next_for_is_what_acquire_takes(leases, store):
    put(store, "10.0.0.4-30", b'{"PublicIP":"192.168.6.15"}')
    for previous in ([], [IPv4Network("10.0.0.12/30")], [IPv4Network("10.0.0.4/30")]):
        expected = leases.next_for(TINY, leases.table(), ONE, previous)
        held = leases.acquire(TINY, host(ONE), previous=previous)
        assert held.lease.subnet == expected == leases.next_for(TINY, leases.table(), ONE)
        leases.release(held.lease)
    put(store, "10.0.0.8-29", b'{"PublicIP":"192.168.6.15"}')
    assert leases.next_for(TINY, leases.table(), ONE) is None


def test_ttls_are_asked_in_pieces_that_tell_how_far_they_are(leases, store, monkeypatch):
    monkeypatch.setattr("flanctl.registry.leases.TTL_CHUNK", 2)
    for third in range(5):
        put(store, f"172.17.{third}.0-24", b'{"PublicIP":"192.168.6.2"}', ttl=60 + third)
    said = []
    table = leases.table(with_ttl=True, progress=lambda *numbers: said.append(numbers))
    assert [lease.ttl for lease in table.leases] == [60, 61, 62, 63, 64]
    assert said == [(2, 5), (4, 5), (5, 5)]

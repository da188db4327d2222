"""Lease races and failures over every store: one host per subnet, whatever the order and whatever is lost."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.errors import Conflict, FlanctlError, LeaseLost, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.registry.config import clean_prefix
from flanctl.registry.leases import LEASE_TTL, Acquired, Keeper, LeaseRestored, Leases
from flanctl.registry.peers import Follower, PeersChanged
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flanctl.registry.stores.store import Store
    from tests.contract.conftest import Backend

DIALECT = Dialect.V0_28
ONE, TWO = IPv4Address("192.168.6.2"), IPv4Address("192.168.6.15")
SHORT = 2.0
"""Seconds: the shortest TTL etcd grants."""


def network(text: str) -> NetworkConfig:
    return NetworkConfig.parse(text, DIALECT)


TINY = network('{"Network":"10.0.0.0/28","SubnetLen":30}')  # three subnets: .4, .8, .12
TWELVE = network('{"Network":"10.0.0.0/24","SubnetLen":28,"SubnetMin":"10.0.0.16","SubnetMax":"10.0.0.192"}')


def host(address: IPv4Address) -> LeaseAttributes:
    return LeaseAttributes(public_ip=address)


@pytest.fixture
def leases(store: Store, prefix: str) -> Leases:
    return Leases(store, clean_prefix(prefix), DIALECT)


def subnets(leases: Leases) -> list[str]:
    return [str(lease.subnet) for lease in leases.table().leases]


class Proxy:
    """A client through which a test can reach into single calls."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class ListsTogether(Proxy):
    """Nobody writes before everybody has read: the race as it is at its worst, and each time."""

    def __init__(self, store: Store, barrier: threading.Barrier) -> None:
        super().__init__(store)
        self._barrier: threading.Barrier | None = barrier
        self.lists = 0

    def list(self, prefix: str, *, at: int | None = None) -> Any:
        snapshot = self.store.list(prefix, at=at)
        self.lists += 1
        if self._barrier is not None:
            barrier, self._barrier = self._barrier, None
            barrier.wait(30)
        return snapshot


class FailsAt(Proxy):
    """The n-th call fails, before its work or after it."""

    def __init__(self, store: Store, step: int, *, after_effect: bool) -> None:
        super().__init__(store)
        self.left = step
        self._after_effect = after_effect

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.store, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if self._after_effect:
                    with contextlib.suppress(Conflict):
                        call(*arguments, **options)
                raise RegistryUnreachable("the answer is lost")
            return call(*arguments, **options)

        return counted


def race(
    backend: Backend, prefix: str, config: NetworkConfig, count: int, previous: Sequence[IPv4Network] = ()
) -> tuple[list[Acquired], list[FlanctlError], int]:
    """`count` hosts that all have read the same list before one of them writes. Who won, who lost, lists in all."""
    barrier = threading.Barrier(count)

    def start(number: int) -> tuple[Acquired | FlanctlError, int]:
        with contextlib.closing(backend.open()) as store:
            client = ListsTogether(store, barrier)
            leases = Leases(client, clean_prefix(prefix), DIALECT)
            try:
                return leases.acquire(config, host(ONE + number), previous=previous), client.lists
            except FlanctlError as error:
                return error, client.lists

    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(start, range(count)))
    won = [outcome for outcome, _ in outcomes if isinstance(outcome, Acquired)]
    lost = [outcome for outcome, _ in outcomes if isinstance(outcome, FlanctlError)]
    return won, lost, sum(lists for _, lists in outcomes)


def test_two_hosts_race_for_the_last_subnet_and_exactly_one_gets_it(
    backend: Backend, leases: Leases, prefix: str
) -> None:
    for last in (4, 8):
        leases.store.create(f"{leases.folder}10.0.0.{last}-30", b'{"PublicIP":"192.168.9.9"}', ttl=None)
    won, lost, lists = race(backend, prefix, TINY, 2)
    assert [str(held.lease.subnet) for held in won] == ["10.0.0.12/30"]
    assert [error.id for error in lost] == ["pool-full"]
    assert "3 of 3 subnets taken in 10.0.0.0/28 (2 reserved" in lost[0].message
    assert lists == 3, "the loser looked again"


def test_twelve_hosts_that_all_want_the_same_of_twelve_subnets_get_twelve(
    backend: Backend, leases: Leases, prefix: str
) -> None:
    """flannel.md 11, row 8: there, three of eight that start at once die."""
    wanted = IPv4Network("10.0.0.64/28")
    won, lost, lists = race(backend, prefix, TWELVE, 12, previous=[wanted])
    assert lost == []
    assert {held.lease.subnet for held in won} == set(TWELVE.subnets())
    assert lists >= 12 + 11, "eleven of them lost the race for the first at least"
    assert [held.how for held in won if held.lease.subnet == wanted] == ["again"]
    assert all(held.notes for held in won if held.lease.subnet != wanted), "nobody changes in silence"
    assert len(subnets(leases)) == 12


@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("state", ["empty", "ours", "ours, other bytes", "reserved"])
def test_whatever_step_of_acquire_fails_the_next_try_ends_in_one_lease(
    store: Store, other: Store, prefix: str, state: str, after_effect: bool
) -> None:
    """The steps are counted, not named: all of them until acquire needs no more."""
    for step in range(1, 10):
        healthy = Leases(store, clean_prefix(f"{prefix}{step}"), DIALECT)
        expected = None
        if state != "empty":
            value = b'{"PublicIP":"192.168.6.2"}' if "other" in state else host(ONE).format(DIALECT)
            expected = IPv4Network("10.0.0.8/30")
            store.create(healthy.key(expected), value, ttl=None if state == "reserved" else LEASE_TTL)
        failing = FailsAt(other, step, after_effect=after_effect)
        leases = Leases(failing, clean_prefix(f"{prefix}{step}"), DIALECT)
        try:
            held = leases.acquire(TINY, host(ONE))
        except RegistryUnreachable:
            held = leases.acquire(TINY, host(ONE))
        assert subnets(healthy) == [str(held.lease.subnet)]
        assert expected in (None, held.lease.subnet)
        assert held.lease.reservation == (state == "reserved")
        if failing.left > 0:
            return
    pytest.fail("acquire takes more steps than anybody expects")


@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("harm", ["none", "deleted", "rewritten", "garbage", "reserved"])
def test_whatever_step_of_renew_fails_the_next_try_keeps_our_subnet(
    store: Store, other: Store, prefix: str, harm: str, after_effect: bool
) -> None:
    for step in range(1, 10):
        healthy = Leases(store, clean_prefix(f"{prefix}{step}"), DIALECT)
        held = healthy.acquire(TINY, host(ONE))
        _do_harm(store, held, harm)
        failing = FailsAt(other, step, after_effect=after_effect)
        leases = Leases(failing, clean_prefix(f"{prefix}{step}"), DIALECT)
        try:
            renewed = leases.renew(held)
        except RegistryUnreachable:
            renewed = leases.renew(held)
        assert subnets(healthy) == [str(held.lease.subnet)] == [str(renewed.lease.subnet)]
        entry = store.get(held.lease.key)
        assert entry is not None
        assert entry.value == held.entry.value
        assert (entry.lease is None) == (harm == "reserved")
        if failing.left > 0:
            return
    pytest.fail("renew takes more steps than anybody expects")


def _do_harm(store: Store, held: Acquired, harm: str) -> None:
    key, revision = held.entry.key, held.entry.revision
    if harm == "deleted":
        store.delete(key)
    elif harm == "rewritten":
        store.replace(key, b'{"PublicIP":"192.168.6.2"}', ttl=LEASE_TTL, expected=revision)
    elif harm == "garbage":
        store.replace(key, b"", ttl=LEASE_TTL, expected=revision)
    elif harm == "reserved":
        store.replace(key, held.entry.value, ttl=None, expected=revision)


def test_a_lease_that_ended_and_was_taken_by_another_host_is_lost_and_left_alone(
    leases: Leases, other: Store, prefix: str
) -> None:
    held = leases.acquire(TINY, host(ONE), ttl=SHORT)
    until(lambda: leases.store.get(held.lease.key) is None, seconds=20)
    others = Leases(other, clean_prefix(prefix), DIALECT)
    taken = others.acquire(TINY, host(TWO), previous=[held.lease.subnet])
    assert taken.lease.subnet == held.lease.subnet
    with pytest.raises(LeaseLost, match=rf"taken by {TWO} at revision {taken.entry.revision}"):
        leases.renew(held)
    entry = other.get(held.lease.key)
    assert entry is not None
    assert entry.value == taken.entry.value
    assert leases.acquire(TINY, host(ONE), previous=[held.lease.subnet]).notes


def test_a_renewal_gives_the_full_time_again_and_ttls_are_the_servers(leases: Leases) -> None:
    held = leases.acquire(TINY, host(ONE), ttl=60)
    renewed = leases.renew(held, ttl=LEASE_TTL)
    (lease,) = leases.find(ONE)
    assert lease.ttl is not None
    assert LEASE_TTL - 60 < lease.ttl <= LEASE_TTL
    assert renewed.lease.subnet == held.lease.subnet


@pytest.fixture
def run() -> Iterator[Callable[[Callable[[], None], Callable[[], None]], None]]:
    """Start a worker by its `run` and `stop`; all are stopped and joined in the end."""
    started: list[tuple[threading.Thread, Callable[[], None]]] = []

    def start(work: Callable[[], None], stop: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        started.append((thread, stop))

    yield start
    for thread, stop in started:
        stop()
        thread.join(10)
        assert not thread.is_alive(), "a stopped worker ends"


def test_our_deleted_key_is_seen_and_written_again_at_once(
    store: Store,
    other: Store,
    backend: Backend,
    prefix: str,
    run: Callable[[Callable[[], None], Callable[[], None]], None],
) -> None:
    """The follower sees it, as the agent does it wakes the keeper, and the same subnet is back (flannel.md 11, row 5)."""
    leases = Leases(store, clean_prefix(prefix), DIALECT)
    held = leases.acquire(TINY, host(ONE))
    reports: list[object] = []
    keeper = Keeper(leases, held, reports.append)

    def look(message: object) -> None:
        if isinstance(message, PeersChanged) and not follower.table().leases:
            keeper.wake()

    with contextlib.closing(backend.open()) as watching:
        follower = Follower(Leases(watching, clean_prefix(prefix), DIALECT), look)
        run(follower.run, follower.stop)
        run(keeper.run, keeper.stop)
        until(lambda: follower.table().leases)
        other.delete(held.lease.key)
        until(lambda: any(isinstance(report, LeaseRestored) for report in reports))
        until(lambda: [lease.subnet for lease in follower.table().leases] == [held.lease.subnet])
        follower.stop()


def test_what_an_operator_reserves_has_flannels_bytes_and_no_end(leases: Leases, store: Store) -> None:
    """flannel 0.7's AddReservation and RemoveReservation (flannel.md 3.6)."""
    subnet = IPv4Network("10.0.0.8/30")
    reserved = leases.reserve(subnet, ONE)
    entry = store.get(leases.key(subnet))
    assert entry is not None
    assert (entry.value, entry.lease, entry.ttl) == (
        b'{"PublicIP":"192.168.6.2","PublicIPv6":null}',
        None,
        None,
    )
    assert leases.acquire(TINY, host(ONE)).lease == reserved

    lease = leases.unreserve(reserved, ttl=LEASE_TTL)
    entry = store.get(leases.key(subnet))
    assert lease is not None
    assert entry is not None
    assert (lease.reservation, entry.value) == (False, b'{"PublicIP":"192.168.6.2","PublicIPv6":null}')
    assert entry.ttl is not None
    assert LEASE_TTL - 60 < entry.ttl <= LEASE_TTL


def test_a_held_lease_becomes_a_reservation_and_back_without_a_change_of_its_bytes(
    leases: Leases, store: Store
) -> None:
    """Its agent goes on in both directions: what stands under its key names it."""
    subnet = IPv4Network("10.0.0.8/30")
    value = b'{"PublicIP":"192.168.6.2","PublicIPv6":null,"Later":[1e3]}'
    store.create(leases.key(subnet), value, ttl=LEASE_TTL)
    held = leases.acquire(TINY, host(ONE))
    (lease,) = leases.find(subnet)
    reserved = leases.reserve(subnet, ONE, held=lease)
    entry = store.get(held.lease.key)
    assert entry is not None
    assert (entry.value, entry.lease) == (held.entry.value, None)
    held = leases.renew(held)
    assert (held.how, held.lease.reservation) == ("kept", True)

    (reserved,) = leases.find(subnet)
    leases.unreserve(reserved, ttl=LEASE_TTL)
    held = leases.renew(held)
    assert (held.how, held.lease.reservation) == ("kept", False)
    entry = store.get(held.lease.key)
    assert entry is not None
    assert b'"Later":[1e3]' in entry.value
    assert entry.lease is not None


def test_what_was_changed_since_it_was_shown_is_left_alone(leases: Leases, store: Store) -> None:
    subnet = IPv4Network("10.0.0.8/30")
    entry = store.create(leases.key(subnet), b'{"PublicIP":"192.168.6.2"}', ttl=LEASE_TTL)
    (shown,) = leases.find(subnet)
    now = store.replace(entry.key, b'{"PublicIP":"192.168.6.15"}', ttl=LEASE_TTL, expected=entry.revision)
    for change in (
        lambda: leases.release(shown),
        lambda: leases.reserve(subnet, ONE, held=shown),
        lambda: leases.reserve(subnet, ONE),
        lambda: leases.unreserve(shown, ttl=None),
        lambda: leases.unreserve(shown, ttl=60),
    ):
        with pytest.raises(Conflict):
            change()
    assert store.get(entry.key) is not None
    assert store.get(entry.key).value == now.value  # type: ignore[union-attr]
    store.delete(entry.key)
    for change in (
        lambda: leases.release(shown),
        lambda: leases.reserve(subnet, ONE, held=shown),
        lambda: leases.unreserve(shown, ttl=None),
        lambda: leases.unreserve(shown, ttl=60),
    ):
        with pytest.raises(Conflict):
            change()
    assert store.get(entry.key) is None

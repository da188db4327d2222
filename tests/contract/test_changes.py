"""Whoever watches leases hears of each change once, over every store, however often they stop and go on."""

from __future__ import annotations

import contextlib
import threading
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanctl.model.dialect import Dialect
from flanctl.registry.changes import Change, Changes, Listed
from flanctl.registry.config import clean_prefix
from flanctl.registry.leases import Leases
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.registry.changes import Report
    from flanctl.registry.stores.store import Store
    from tests.contract.conftest import Backend

DIALECT = Dialect.V0_28
ROUNDS = 12


@contextlib.contextmanager
def told(store: Store, prefix: str, after: int | None = None) -> Iterator[tuple[Changes, list[Report]]]:
    reports: list[Report] = []
    changes = Changes(Leases(store, clean_prefix(prefix), DIALECT), reports.append)
    thread = threading.Thread(target=lambda: changes.run(after=after))
    thread.start()
    try:
        yield changes, reports
    finally:
        changes.stop()
        thread.join(10)
        assert not thread.is_alive()


def value(number: int) -> bytes:
    return b'{"PublicIP":"192.168.6.%d"}' % (number + 1)


class Writer:
    """One subnet that comes, moves and goes; `revisions` of each write in order."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._key = Leases(store, clean_prefix(prefix), DIALECT).key(IPv4Network("10.0.1.0/24"))
        self.wrote: list[tuple[str, str | None]] = []

    def round(self, number: int) -> None:
        entry = self._store.create(self._key, value(number), ttl=60)
        entry = self._store.replace(self._key, value(number + 100), ttl=60, expected=entry.revision)
        self._store.delete(self._key, expected=entry.revision)
        self.wrote += [
            ("added", f"192.168.6.{number + 1}"),
            ("moved", f"192.168.6.{number + 101}"),
            ("removed", f"192.168.6.{number + 101}"),
        ]


def wait_for(count: int, *parts: list[Report]) -> None:
    """Until so many reports have come in all."""
    until(lambda: sum(map(len, parts)) >= count, seconds=20, what=f"{count} reports")


def shown(reports: list[Report]) -> list[tuple[str, str | None]]:
    return [
        (one.what, str((one.after or one.before).attributes.public_ip))  # type: ignore[union-attr]
        for one in reports
        if isinstance(one, Change)
    ]


def hears_a_list_anew(store: Store, prefix: str) -> bool:
    """Where no values of the past are kept (etcd v2), who goes on is told everything, and that it is everything."""
    with told(store, prefix, store.list(prefix).revision) as (_, reports):
        wait_for(1, reports)
    return isinstance(reports[0], Listed) and reports[0].resync


def test_a_reader_that_stops_and_goes_on_hears_everything_once(
    backend: Backend, store: Store, other: Store, prefix: str
) -> None:
    if backend.paths:
        assert hears_a_list_anew(store, prefix)
        return
    writer = Writer(other, prefix)
    heard: list[Report] = []
    revision = None
    for number in range(ROUNDS):
        with told(store, prefix, revision) as (changes, reports):
            if revision is None:
                wait_for(1, reports)
                assert isinstance(reports[0], Listed)
            writer.round(number)
            wait_for(1 + len(writer.wrote) - number % 2, heard, reports)
        # Every other time it stops before the last one; where it stopped is all it has to remember.
        heard += reports
        revision = changes.revision
    with told(store, prefix, revision) as (_, reports):
        wait_for(1 + len(writer.wrote), heard, reports)
    assert shown([*heard, *reports]) == writer.wrote
    revisions = [one.revision for one in [*heard, *reports] if isinstance(one, Change)]
    assert revisions == sorted(set(revisions))


def test_a_reader_is_told_what_a_lease_was_before_it_went_on(
    store: Store, other: Store, prefix: str, backend: Backend
) -> None:
    if backend.paths:
        assert hears_a_list_anew(store, prefix)
        return
    writer = Leases(other, clean_prefix(prefix), DIALECT)
    kept = writer.reserve(IPv4Network("10.0.1.0/24"), IPv4Address("192.168.6.1"))
    writer.reserve(IPv4Network("10.0.2.0/24"), IPv4Address("192.168.6.2"))
    revision = other.list(prefix).revision
    writer.unreserve(kept, ttl=60)
    (gone,) = writer.find(IPv4Network("10.0.2.0/24"))
    writer.release(gone)
    with told(store, prefix, revision) as (_, reports):
        wait_for(2, reports)
    first, second = reports
    assert isinstance(first, Change)
    assert isinstance(second, Change)
    assert (first.what, first.key, first.before.reservation, first.after.reservation) == (  # type: ignore[union-attr]
        "changed",
        kept.key,
        True,
        False,
    )
    assert first.ttl is not None
    assert 0 < first.ttl <= 60
    assert (second.what, str(second.before.attributes.public_ip)) == ("removed", "192.168.6.2")  # type: ignore[union-attr]


def test_an_expired_lease_is_told_as_expired(store: Store, other: Store, prefix: str, short: float) -> None:
    with told(store, prefix) as (_, reports):
        wait_for(1, reports)
        leases = Leases(other, clean_prefix(prefix), DIALECT)
        other.create(leases.key(IPv4Network("10.0.1.0/24")), value(1), ttl=short)
        wait_for(3, reports)
    assert [(one.what, one.expired) for one in reports if isinstance(one, Change)] == [
        ("added", False),
        ("removed", True),
    ]

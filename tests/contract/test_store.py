"""What store.py promises, held against every store: one set of bodies, real etcd servers of two ages included."""

from __future__ import annotations

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import pytest

from flanctl.errors import Conflict, FlanctlError, Invalid, RegistryUnreachable
from flanctl.registry.stores.open import Connection, open_store
from flanctl.registry.stores.store import (
    Changed,
    Compacted,
    Delete,
    Entry,
    Forgotten,
    KeyExists,
    Progress,
    Put,
)
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import SERVED, VERSIONS, opened

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flanctl.registry.stores.store import Event, Store, Watch
    from tests.contract.conftest import Backend
    from tests.support.etcd import Version

LONG = 300.0


class Reader:
    """A thread that iterates a watch, as the agent's does."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()
        self.thread.join(5)
        assert not self.thread.is_alive(), "closing a watch ends its iteration"
        assert self.error is None, repr(self.error)

    @property
    def changes(self) -> list[Put | Delete]:
        return [event for event in tuple(self.events) if isinstance(event, (Put, Delete))]

    def wait_for(self, count: int) -> list[Put | Delete]:
        until(lambda: len(self.changes) >= count or self.error, seconds=60, what=f"{count} events")
        assert self.error is None, repr(self.error)
        return self.changes

    def _run(self) -> None:
        try:
            self.events.extend(self.watch)
        except BaseException as error:
            self.error = error


class PatientReader(Reader):
    """Iterates on when nobody can be reached, as store.py leaves it to the caller."""

    def _run(self) -> None:
        while True:
            try:
                self.events.extend(self.watch)
            except RegistryUnreachable:
                continue
            except BaseException as error:
                self.error = error
            return


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def timeless(entry: Entry | None) -> Entry:
    """An entry without the seconds left, which are never the same twice."""
    assert entry is not None
    return replace(entry, ttl=None)


def revision_of(event: Put | Delete) -> int:
    return event.entry.revision if isinstance(event, Put) else event.revision


def race(count: int, act: Callable[[int], Entry]) -> tuple[list[Entry], list[Conflict]]:
    """`count` threads let go at once: what the winners wrote, what the losers were told."""
    ready = threading.Barrier(count)

    def run(number: int) -> Entry | Conflict:
        ready.wait()
        try:
            return act(number)
        except Conflict as lost:
            return lost

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(run, range(count)))
    return [a for a in answers if isinstance(a, Entry)], [a for a in answers if isinstance(a, Conflict)]


class TestReading:
    def test_a_key_that_is_not_there_is_none(self, store: Store, prefix: str) -> None:
        assert store.get(prefix + "a") is None

    def test_an_empty_prefix_lists_nothing_at_a_revision(self, store: Store, prefix: str) -> None:
        snapshot = store.list(prefix)
        assert (snapshot.entries, snapshot.unreadable) == ((), ())
        assert snapshot.revision >= 1

    def test_get_and_list_give_what_create_returned(self, store: Store, other: Store, prefix: str) -> None:
        created = store.create(prefix + "a", b"1", ttl=LONG)
        assert (created.key, created.value) == (prefix + "a", b"1")
        assert timeless(other.get(prefix + "a")) == timeless(created)
        snapshot = other.list(prefix)
        assert snapshot.entries == (timeless(created),)
        assert snapshot.revision >= created.revision

    def test_a_list_of_the_past_is_what_a_list_was_then(
        self, backend: Backend, store: Store, other: Store, prefix: str
    ) -> None:
        if backend.paths:  # etcd v2 keeps no values of the past
            with pytest.raises(Forgotten):
                store.list(prefix, at=store.list(prefix).revision)
            return
        a = store.create(prefix + "a", b"1", ttl=LONG)
        store.create(prefix + "b", b"2", ttl=None)
        store.create(prefix + "c", b"3", ttl=None)
        before = store.list(prefix)
        assert store.delete(prefix + "b")
        store.replace(prefix + "a", b"4", ttl=None, expected=a.revision)
        store.create(prefix + "d", b"5", ttl=None)
        assert other.list(prefix, at=before.revision) == before
        now = store.list(prefix)
        assert other.list(prefix, at=now.revision) == now

    def test_a_list_of_the_future_or_of_what_was_compacted_is_forgotten(
        self, store: Store, prefix: str, backend: Backend
    ) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        last = store.replace(prefix + "a", b"2", ttl=None, expected=first.revision)
        store.create(prefix + "b", b"3", ttl=None)
        backend.compact()
        for revision in (first.revision, last.revision + 1000):
            with pytest.raises(Forgotten):
                store.list(prefix, at=revision)

    def test_list_is_by_key_and_holds_only_the_prefix(
        self, backend: Backend, store: Store, prefix: str
    ) -> None:
        both = [] if backend.paths else ["a"]  # where keys are paths, a/x makes `a` a directory
        for name in ("b", "a/x", *both, "ü", "c"):
            store.create(prefix + name, name.encode(), ttl=None)
        store.create(prefix[:-1] + "0", b"a neighbour, one after the slash", ttl=None)
        store.create(prefix[:-1] + ".", b"a neighbour, one before", ttl=None)
        names = [entry.key.removeprefix(prefix) for entry in store.list(prefix).entries]
        assert names == [*both, "a/x", "b", "c", "ü"]

    def test_an_entry_keeps_the_revision_of_its_last_change(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        second = store.create(prefix + "b", b"2", ttl=None)
        assert first.revision < second.revision
        snapshot = store.list(prefix)
        assert [entry.revision for entry in snapshot.entries] == [first.revision, second.revision]
        assert snapshot.revision >= second.revision

    @pytest.mark.parametrize(
        "value",
        [b"", bytes(range(256)), b"\0", b"x" * 200_000, b"y" * 1_000_000],
        ids=["empty", "all bytes", "zero", "200 kB", "1 MB"],
    )
    def test_values_are_bytes(self, backend: Backend, store: Store, prefix: str, value: bytes) -> None:
        if backend.paths and not _is_text(value):
            with pytest.raises(Invalid, match=f"value of {prefix}a is not UTF-8"):
                store.create(prefix + "a", value, ttl=None)
            return
        created = store.create(prefix + "a", value, ttl=None)
        with Reader(store.watch(prefix, after=created.revision - 1)) as reader:
            assert reader.wait_for(1) == [Put(timeless(created))]
        assert created.value == value
        assert timeless(store.get(prefix + "a")).value == value
        assert store.list(prefix).entries[0].value == value
        assert store.replace(prefix + "a", b"z" + value[1:], ttl=None, expected=created.revision)

    @pytest.mark.parametrize(
        "name", ["a b", "ü/ß/日本", "//a//", "%2f?&#", "'\"`$", "a\nb\tc", "-x", "\U0001f600"]
    )
    def test_keys_are_any_text(self, backend: Backend, store: Store, prefix: str, name: str) -> None:
        if backend.paths and "//" in name:
            with pytest.raises(Invalid, match=f"{prefix}{name}"):
                store.create(prefix + name, b"1", ttl=None)
            return
        created = store.create(prefix + name, b"1", ttl=None)
        with Reader(store.watch(prefix, after=created.revision - 1)) as reader:
            assert reader.wait_for(1) == [Put(timeless(created))]
        assert timeless(store.get(prefix + name)) == timeless(created)
        assert [entry.key for entry in store.list(prefix).entries] == [prefix + name]
        assert store.delete(prefix + name)

    def test_a_key_that_is_not_utf8_is_counted_and_hides_no_other(
        self, backend: Backend, store: Store, prefix: str
    ) -> None:
        before = store.create(prefix + "a", b"1", ttl=None)
        raw = prefix.encode() + b"b\xff\xfe"
        backend.put_raw(raw)
        after = store.create(prefix + "c", b"3", ttl=None)
        snapshot = store.list(prefix)
        assert [entry.key for entry in snapshot.entries] == [prefix + "a", prefix + "c"]
        shown = raw.decode(errors="replace").encode() if backend.paths else raw
        assert [one.key for one in snapshot.unreadable] == [shown]
        with Reader(store.watch(prefix, after=before.revision)) as reader:
            assert reader.wait_for(1) == [Put(timeless(after))]

    def test_1500_keys_are_all_listed(self, store: Store, prefix: str) -> None:
        names = [f"{prefix}{number:05}" for number in range(1500)]
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda name: store.create(name, name.encode(), ttl=None), names))
        assert list(store.list(prefix).entries) == [timeless(entry) for entry in made]


class TestCreate:
    def test_a_key_that_exists_is_left_alone_and_shown(self, store: Store, other: Store, prefix: str) -> None:
        mine = store.create(prefix + "a", b"mine", ttl=None)
        with pytest.raises(KeyExists) as caught:
            other.create(prefix + "a", b"theirs", ttl=LONG)
        assert caught.value.key == prefix + "a"
        assert timeless(caught.value.current) == mine
        assert store.get(prefix + "a") == mine

    def test_the_same_value_of_somebody_else_is_a_conflict_too(
        self, store: Store, other: Store, prefix: str
    ) -> None:
        """Two hosts with a copied machine must not both believe they made the key."""
        store.create(prefix + "a", b"same", ttl=LONG)
        with pytest.raises(KeyExists):
            other.create(prefix + "a", b"same", ttl=LONG)

    def test_a_deleted_key_can_be_created_again(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        store.delete(prefix + "a")
        assert store.create(prefix + "a", b"2", ttl=None).revision > first.revision

    def test_exactly_one_of_many_clients_wins(self, backend: Backend, prefix: str) -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(contextlib.closing(backend.open())) for _ in range(6)]
            won, lost = race(
                6, lambda number: clients[number].create(prefix + "a", str(number).encode(), ttl=LONG)
            )
            assert len(won) == 1
            assert [timeless(e.current) for e in lost if isinstance(e, KeyExists)] == [timeless(won[0])] * 5

    def test_exactly_one_of_many_threads_of_a_client_wins(self, store: Store, prefix: str) -> None:
        won, lost = race(6, lambda number: store.create(prefix + "a", b"same", ttl=LONG))
        assert (len(won), len(lost)) == (1, 5)


class TestReplace:
    def test_at_the_expected_revision_it_writes(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        second = store.replace(prefix + "a", b"2", ttl=LONG, expected=first.revision)
        assert (second.key, second.value) == (prefix + "a", b"2")
        assert second.revision > first.revision
        assert second.lease is not None
        assert timeless(store.get(prefix + "a")) == timeless(second)

    def test_at_another_revision_it_shows_what_is_there(
        self, store: Store, other: Store, prefix: str
    ) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        theirs = other.replace(prefix + "a", b"theirs", ttl=None, expected=first.revision)
        with pytest.raises(Changed) as caught:
            store.replace(prefix + "a", b"mine", ttl=None, expected=first.revision)
        assert caught.value.key == prefix + "a"
        assert timeless(caught.value.current) == theirs
        assert store.get(prefix + "a") == theirs

    def test_a_key_that_is_gone_is_not_made_again(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        store.delete(prefix + "a")
        with pytest.raises(Changed) as caught:
            store.replace(prefix + "a", b"2", ttl=None, expected=first.revision)
        assert caught.value.current is None
        assert store.get(prefix + "a") is None

    def test_the_same_value_is_a_new_revision(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        assert store.replace(prefix + "a", b"1", ttl=None, expected=first.revision).revision > first.revision

    def test_exactly_one_of_many_wins(self, store: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"0", ttl=None)
        won, lost = race(
            6,
            lambda number: store.replace(
                prefix + "a", b"%d" % (number + 1), ttl=None, expected=first.revision
            ),
        )
        assert len(won) == 1
        assert [timeless(e.current) for e in lost if isinstance(e, Changed)] == won * 5

    def test_ttl_comes_and_goes_with_it(self, store: Store, prefix: str, short: float) -> None:
        entry = store.create(prefix + "a", b"1", ttl=short)
        entry = store.replace(prefix + "a", b"1", ttl=None, expected=entry.revision)
        assert entry.lease is None
        store.create(prefix + "control", b"", ttl=short)
        until(lambda: store.get(prefix + "control") is None, seconds=20)
        assert store.get(prefix + "a") == entry


class TestDelete:
    def test_it_says_whether_the_key_was_there(self, store: Store, prefix: str) -> None:
        store.create(prefix + "a", b"1", ttl=LONG)
        assert store.delete(prefix + "a") is True
        assert store.delete(prefix + "a") is False
        assert store.get(prefix + "a") is None
        assert store.list(prefix).entries == ()

    def test_only_at_the_expected_revision(self, store: Store, other: Store, prefix: str) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        theirs = other.replace(prefix + "a", b"theirs", ttl=None, expected=first.revision)
        with pytest.raises(Changed) as caught:
            store.delete(prefix + "a", expected=first.revision)
        assert timeless(caught.value.current) == theirs
        assert store.get(prefix + "a") == theirs
        assert store.delete(prefix + "a", expected=theirs.revision) is True
        assert store.delete(prefix + "a", expected=theirs.revision) is False

    def test_only_that_key(self, store: Store, prefix: str) -> None:
        kept = store.create(prefix + "ab", b"1", ttl=None)
        store.create(prefix + "a", b"1", ttl=None)
        store.delete(prefix + "a")
        assert store.list(prefix).entries == (kept,)


class TestTtl:
    def test_a_key_with_ttl_has_a_lease_and_seconds_left(self, store: Store, prefix: str) -> None:
        created = store.create(prefix + "a", b"1", ttl=LONG)
        assert created.lease is not None
        got = store.get(prefix + "a")
        assert got is not None
        assert got.ttl is not None
        assert LONG - 60 < got.ttl <= LONG

    def test_a_key_without_ttl_has_neither(self, store: Store, prefix: str) -> None:
        created = store.create(prefix + "a", b"1", ttl=None)
        assert (created.lease, created.ttl) == (None, None)
        assert store.get(prefix + "a") == created

    def test_list_asks_for_no_ttls_and_with_ttl_fills_them_in(self, store: Store, prefix: str) -> None:
        store.create(prefix + "a", b"1", ttl=LONG)
        store.create(prefix + "b", b"2", ttl=None)
        store.create(prefix + "c", b"3", ttl=10 * LONG)
        entries = store.list(prefix).entries
        assert [entry.ttl for entry in entries] == [None, None, None]
        assert entries[1].lease is None
        timed = store.with_ttl(entries)
        assert tuple(timeless(entry) for entry in timed) == entries
        a, b, c = (entry.ttl for entry in timed)
        assert b is None
        assert a is not None
        assert c is not None
        assert LONG - 60 < a <= LONG < c <= 10 * LONG
        assert store.with_ttl(()) == ()

    def test_many_ttls_are_each_its_own(self, store: Store, prefix: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda number: store.create(f"{prefix}{number:03}", b"", ttl=1000.0 * (number + 1)),
                    range(120),
                )
            )
        timed = store.with_ttl(store.list(prefix).entries)
        assert [round((entry.ttl or 0) / 1000) for entry in timed] == list(range(1, 121))

    def test_after_its_ttl_a_key_is_gone_and_with_ttl_says_0(
        self, store: Store, prefix: str, short: float
    ) -> None:
        store.create(prefix + "a", b"1", ttl=short)
        stays = store.create(prefix + "b", b"2", ttl=LONG)
        entries = store.list(prefix).entries
        until(lambda: store.get(prefix + "a") is None, seconds=20)
        assert store.list(prefix).entries == (timeless(stays),)
        ended, alive = store.with_ttl(entries)
        assert ended.ttl == 0
        assert alive.ttl
        assert store.create(prefix + "a", b"again", ttl=None)

    def test_replace_starts_the_ttl_anew(self, store: Store, prefix: str, short: float) -> None:
        entry = store.create(prefix + "a", b"1", ttl=short)
        store.replace(prefix + "a", b"2", ttl=LONG, expected=entry.revision)
        store.create(prefix + "control", b"", ttl=short)
        until(lambda: store.get(prefix + "control") is None, seconds=20)
        got = store.get(prefix + "a")
        assert got is not None
        assert (got.ttl or 0) > LONG - 60


class TestRefresh:
    def test_it_gives_the_full_ttl_again_and_changes_no_value(
        self, store: Store, prefix: str, short: float
    ) -> None:
        full = 2.5 * short  # etcd counts whole seconds
        entry = store.create(prefix + "a", b"1", ttl=full)

        def left() -> float:
            got = store.get(prefix + "a")
            assert got is not None
            assert got.ttl is not None
            return got.ttl

        until(lambda: left() <= 0.6 * full)
        renewed = store.refresh(entry, ttl=full)
        assert left() > 0.6 * full
        assert (renewed.key, renewed.value) == (entry.key, b"1")
        assert renewed.revision >= entry.revision
        assert timeless(renewed) == timeless(store.get(prefix + "a"))

    def test_refreshed_in_time_a_key_lives_on(self, store: Store, prefix: str, short: float) -> None:
        """By the entry each refresh returns, also with a client that did not write the key."""
        entry = store.create(prefix + "a", b"1", ttl=short)
        store.create(prefix + "control", b"", ttl=short)

        def control_is_gone() -> bool:
            nonlocal entry
            entry = store.refresh(entry, ttl=short)
            return store.get(prefix + "control") is None

        until(control_is_gone, seconds=20)
        assert timeless(store.get(prefix + "a")) == timeless(entry)

    def test_an_entry_that_was_listed_can_be_refreshed(self, store: Store, other: Store, prefix: str) -> None:
        """An agent that restarts finds its key and did not write it."""
        other.create(prefix + "a", b"1", ttl=LONG)
        (listed,) = store.list(prefix).entries
        renewed = store.refresh(listed, ttl=LONG)
        assert timeless(store.get(prefix + "a")) == timeless(renewed)

    def test_another_ttl_counts_from_then_on(self, store: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"1", ttl=LONG)
        renewed = store.refresh(entry, ttl=10 * LONG)
        got = store.get(prefix + "a")
        assert timeless(got) == timeless(renewed)
        assert got is not None
        assert (got.ttl or 0) > 9 * LONG

    def test_a_key_that_is_gone_is_changed_to_none(self, store: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"1", ttl=LONG)
        store.delete(prefix + "a")
        with pytest.raises(Changed) as caught:
            store.refresh(entry, ttl=LONG)
        assert caught.value.current is None
        assert store.get(prefix + "a") is None

    def test_a_key_that_expired_is_changed_to_none(self, store: Store, prefix: str, short: float) -> None:
        entry = store.create(prefix + "a", b"1", ttl=short)
        until(lambda: store.get(prefix + "a") is None, seconds=20)
        with pytest.raises(Changed) as caught:
            store.refresh(entry, ttl=short)
        assert caught.value.current is None

    def test_a_key_somebody_else_wrote_is_changed(self, store: Store, other: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"1", ttl=LONG)
        theirs = other.replace(prefix + "a", b"theirs", ttl=LONG, expected=entry.revision)
        with pytest.raises(Changed) as caught:
            store.refresh(entry, ttl=LONG)
        assert timeless(caught.value.current) == timeless(theirs)
        assert timeless(store.get(prefix + "a")) == timeless(theirs)

    def test_a_key_somebody_else_made_again_is_changed(self, store: Store, other: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"same", ttl=LONG)
        other.delete(prefix + "a")
        theirs = other.create(prefix + "a", b"same", ttl=LONG)
        with pytest.raises(Changed) as caught:
            store.refresh(entry, ttl=LONG)
        assert timeless(caught.value.current) == timeless(theirs)


class TestWatch:
    def test_each_change_later_than_the_revision_once(self, store: Store, other: Store, prefix: str) -> None:
        a = store.create(prefix + "a", b"1", ttl=None)
        b = store.create(prefix + "b", b"2", ttl=LONG)
        with Reader(other.watch(prefix, after=a.revision)) as reader:
            assert reader.wait_for(1) == [Put(timeless(b))]
            c = store.replace(prefix + "a", b"3", ttl=LONG, expected=a.revision)
            store.create(prefix[:-1] + "0", b"a neighbour", ttl=None)
            store.delete(prefix + "b")
            d = store.create(prefix + "b", b"4", ttl=None)
            changes = reader.wait_for(4)
        gone = changes[2]
        assert changes == [Put(timeless(b)), Put(timeless(c)), gone, Put(d)]
        assert isinstance(gone, Delete)
        assert gone.key == prefix + "b"
        assert c.revision < gone.revision < d.revision

    def test_a_put_shows_its_lease_and_no_seconds(self, store: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"1", ttl=LONG)
        with Reader(store.watch(prefix, after=entry.revision - 1)) as reader:
            (put,) = reader.wait_for(1)
        assert isinstance(put, Put)
        assert put.entry.lease == entry.lease is not None
        assert put.entry.ttl is None

    def test_expiry_is_a_delete(self, store: Store, other: Store, prefix: str, short: float) -> None:
        """Nobody but the watch looks."""
        entry = store.create(prefix + "a", b"1", ttl=short)
        with Reader(other.watch(prefix, after=entry.revision)) as reader:
            until(lambda: reader.changes, seconds=20)
            (gone,) = reader.changes
        assert isinstance(gone, Delete)
        assert gone.key == prefix + "a"
        assert entry.revision < gone.revision <= store.list(prefix).revision

    def test_a_refresh_keeps_the_watched_key(self, store: Store, prefix: str) -> None:
        """Seen as nothing at all, or as the same value written anew; never as a delete."""
        entry = store.create(prefix + "a", b"1", ttl=LONG)
        with Reader(store.watch(prefix, after=entry.revision)) as reader:
            store.refresh(entry, ttl=LONG)
            end = store.create(prefix + "end", b"", ttl=None)
            until(lambda: Put(end) in reader.changes)
            *between, _ = reader.changes
        assert all(isinstance(event, Put) and event.entry.value == b"1" for event in between)

    def test_no_gap_and_no_double_while_others_write(self, store: Store, other: Store, prefix: str) -> None:
        """The events replayed over the first list give every later list, at exactly its revision."""
        for number in range(20):
            store.create(f"{prefix}{number}", b"", ttl=None)
        start = store.list(prefix)
        enough = threading.Event()
        failed: list[BaseException] = []

        def write() -> None:
            try:
                for turn in itertools.count():
                    if enough.is_set():
                        break
                    key = f"{prefix}{turn % 23}"
                    if turn % 3 == 2:
                        other.delete(key)
                    elif (current := other.get(key)) is None:
                        other.create(key, b"%d" % turn, ttl=None)
                    else:
                        other.replace(key, b"%d" % turn, ttl=None, expected=current.revision)
            except BaseException as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        with Reader(store.watch(prefix, after=start.revision)) as reader:
            writer.start()
            snapshots = []
            for count in (30, 100, 200, 300):
                reader.wait_for(count)
                snapshots.append(store.list(prefix))
            enough.set()
            writer.join(10)
            assert not failed
            end = other.create(prefix + "end", b"", ttl=None)
            until(lambda: reader.error or reader.changes[-1] == Put(end))
            changes = reader.changes
        revisions = [revision_of(event) for event in changes]
        assert revisions == sorted(set(revisions))
        for snapshot in snapshots:
            keys = {entry.key: entry for entry in start.entries}
            for event in changes:
                if revision_of(event) > snapshot.revision:
                    break
                if isinstance(event, Put):
                    keys[event.entry.key] = event.entry
                else:
                    del keys[event.key]
            assert tuple(keys[key] for key in sorted(keys)) == snapshot.entries

    def test_a_quiet_watch_says_that_it_lives(self, store: Store, prefix: str) -> None:
        entry = store.create(prefix + "a", b"1", ttl=None)
        with Reader(store.watch(prefix, after=entry.revision)) as reader:
            # etcd leaves a request for progress unanswered now and then; the next one comes 20 s later.
            until(lambda: reader.events, seconds=45)
            (progress, *_) = reader.events
        assert isinstance(progress, Progress)
        assert progress.revision >= entry.revision

    def test_forgotten_events_are_said_and_end_the_watch(
        self, backend: Backend, store: Store, prefix: str
    ) -> None:
        first = store.create(prefix + "a", b"1", ttl=None)
        last = store.replace(prefix + "a", b"2", ttl=None, expected=first.revision)
        last = store.replace(prefix + "a", b"3", ttl=None, expected=last.revision)
        backend.compact()
        with Reader(store.watch(prefix, after=first.revision)) as reader:
            reader.thread.join(10)
            assert not reader.thread.is_alive()
            (compacted,) = reader.events
        assert isinstance(compacted, Compacted)
        assert compacted.at >= last.revision
        snapshot = store.list(prefix)
        with Reader(store.watch(prefix, after=snapshot.revision)) as reader:
            again = store.replace(prefix + "a", b"4", ttl=None, expected=last.revision)
            assert reader.wait_for(1) == [Put(again)]

    def test_close_from_another_thread_ends_the_iteration_soon(self, store: Store, prefix: str) -> None:
        watch = store.watch(prefix, after=store.list(prefix).revision)
        with Reader(watch) as reader:
            watch.close()
            reader.thread.join(2)
            assert not reader.thread.is_alive()
            watch.close()
        assert next(iter(watch), None) is None

    def test_leaving_the_with_closes_it(self, store: Store, prefix: str) -> None:
        with store.watch(prefix, after=store.list(prefix).revision) as watch:
            pass
        assert list(watch) == []

    def test_two_watches_see_the_same(self, store: Store, prefix: str) -> None:
        revision = store.list(prefix).revision
        with (
            Reader(store.watch(prefix, after=revision)) as one,
            Reader(store.watch(prefix + "a", after=revision)) as two,
        ):
            a = store.create(prefix + "a", b"1", ttl=None)
            b = store.create(prefix + "b", b"2", ttl=None)
            assert one.wait_for(2) == [Put(a), Put(b)]
            assert two.wait_for(1) == [Put(a)]


class TestStore:
    def test_many_threads_share_one(self, store: Store, prefix: str) -> None:
        def work(number: int) -> int:
            entry = store.create(f"{prefix}{number}", b"0", ttl=LONG)
            for turn in range(5):
                entry = store.replace(entry.key, b"%d" % turn, ttl=LONG, expected=entry.revision)
                assert timeless(store.get(entry.key)) == timeless(entry)
            assert store.delete(entry.key, expected=entry.revision)
            return number

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(16))) == list(range(16))
        assert store.list(prefix).entries == ()

    def test_it_has_a_name_and_a_description(self, store: Store, prefix: str) -> None:
        store.get(prefix + "a")
        assert store.name
        assert store.name.split()[0] in store.describe()

    def test_closing_twice_is_fine(self, backend: Backend) -> None:
        store = backend.open()
        store.get("/a")
        store.close()
        store.close()

    def test_a_store_that_was_never_asked_closes(self, backend: Backend) -> None:
        backend.open().close()

    def test_every_refusal_is_ours_and_says_the_key(self, store: Store, prefix: str) -> None:
        store.create(prefix + "a", b"1", ttl=None)
        for act in (
            lambda: store.create(prefix + "a", b"2", ttl=None),
            lambda: store.replace(prefix + "a", b"2", ttl=None, expected=1),
            lambda: store.delete(prefix + "a", expected=1),
        ):
            with pytest.raises(FlanctlError) as caught:
                act()
            assert prefix + "a" in str(caught.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_etcd_without_its_gateway_is_served_by_grpc(tmp_path: Path, prefix: str, version: Version) -> None:
    """Both ways into it: a call that finds the gateway off, and a watch that does."""
    with Cluster(version, folder=tmp_path, extra=["--enable-grpc-gateway=false"]) as cluster:
        connection = Connection(cluster.endpoints)
        with contextlib.closing(open_store(connection)) as store:
            assert "HTTP" in store.name
            created = store.create(prefix + "a", b"1", ttl=LONG)
            assert "gRPC" in store.name
            assert timeless(store.get(prefix + "a")) == timeless(created)
        with (
            contextlib.closing(open_store(connection)) as store,
            Reader(store.watch(prefix, after=created.revision - 1)) as reader,
        ):
            assert reader.wait_for(1) == [Put(timeless(created))]
            changed = store.replace(prefix + "a", b"2", ttl=None, expected=created.revision)
            assert reader.wait_for(2)[1:] == [Put(changed)]


@pytest.mark.parametrize(("kind", "version"), SERVED)
def test_a_server_killed_and_back_costs_a_watch_nothing(
    tmp_path: Path, prefix: str, kind: str, version: Version
) -> None:
    with (
        Cluster(version, folder=tmp_path, v2=kind == "v2") as cluster,
        opened(kind, cluster.endpoints) as store,
        opened(kind, cluster.endpoints) as other,
    ):
        first = store.create(prefix + "a", b"1", ttl=LONG)

        def write() -> Entry | None:
            """A client may say for a moment that a server is away which has just come back."""
            try:
                return other.create(prefix + "c", b"3", ttl=None)
            except RegistryUnreachable:
                return None

        with PatientReader(store.watch(prefix, after=first.revision)) as reader:
            before = other.create(prefix + "b", b"2", ttl=None)
            reader.wait_for(1)
            cluster.restart(0)
            after = until(write)
            assert reader.wait_for(2) == [Put(before), Put(timeless(after))]
        renewed = store.refresh(first, ttl=LONG)
        assert (renewed.key, renewed.value, renewed.lease) == (first.key, first.value, first.lease)

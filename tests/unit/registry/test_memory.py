"""What the memory store does beyond the contract of all stores: it fails when told to."""

from __future__ import annotations

import threading

import pytest

from flanctl.errors import Invalid, RegistryUnreachable
from flanctl.registry.stores import memory
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import (
    Changed,
    Compacted,
    Delete,
    Event,
    KeyExists,
    Progress,
    Put,
    Unreadable,
)
from tests.support.clock import FakeClock
from tests.support.deadline import until

NO_ANSWER = RegistryUnreachable("no answer")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock)


def test_a_failure_before_the_effect_writes_nothing(store: MemoryStore) -> None:
    store.fail("create", NO_ANSWER)
    with pytest.raises(RegistryUnreachable):
        store.create("k", b"v", ttl=None)
    assert store.get("k") is None


def test_a_failure_after_the_effect_loses_only_the_answer(store: MemoryStore) -> None:
    store.fail("create", NO_ANSWER, after_effect=True)
    with pytest.raises(RegistryUnreachable):
        store.create("k", b"v", ttl=None)
    found = store.get("k")
    assert found is not None
    assert found.value == b"v"


def test_a_lost_answer_hides_a_conflict_too(store: MemoryStore) -> None:
    """Whoever hears nothing cannot know that the key existed."""
    store.create("k", b"theirs", ttl=None)
    store.fail("create", NO_ANSWER, after_effect=True)
    with pytest.raises(RegistryUnreachable):
        store.create("k", b"ours", ttl=None)


def test_the_kth_call_fails_whichever_it_is(store: MemoryStore) -> None:
    store.fail("*", NO_ANSWER, skip=2)
    store.create("k", b"v", ttl=None)
    store.list("")
    with pytest.raises(RegistryUnreachable):
        store.get("k")
    assert store.get("k") is not None


def test_one_clients_failures_are_not_anothers(store: MemoryStore) -> None:
    other = store.another()
    other.fail("*", NO_ANSWER)
    entry = store.create("k", b"v", ttl=None)
    with pytest.raises(RegistryUnreachable):
        other.get("k")
    assert other.get("k") == entry


def test_a_key_is_gone_when_its_time_is_over(store: MemoryStore, clock: FakeClock) -> None:
    entry = store.create("k", b"v", ttl=10)
    clock.advance(9)
    assert store.with_ttl([entry])[0].ttl == 1
    clock.advance(1)
    assert store.get("k") is None
    assert store.with_ttl([entry])[0].ttl == 0
    assert store.list("").revision == entry.revision + 1


def test_refresh_keeps_the_revision_unless_the_ttl_is_another(store: MemoryStore, clock: FakeClock) -> None:
    """etcd's keep-alive gives the time that was granted; another time is another lease and a write."""
    entry = store.create("k", b"v", ttl=10)
    clock.advance(9)
    assert store.refresh(entry, ttl=10) == entry
    clock.advance(9)
    longer = store.refresh(entry, ttl=20)
    assert longer.revision > entry.revision
    with pytest.raises(Changed) as changed:
        store.refresh(entry, ttl=10)
    assert changed.value.current == longer


def test_a_watch_tells_each_event_once_and_an_expiry_without_any_call(
    store: MemoryStore, clock: FakeClock
) -> None:
    start = store.list("a/").revision
    first = store.create("a/1", b"v", ttl=5)
    store.create("b/1", b"v", ttl=None)
    with store.watch("a/", after=start) as watch:
        put = next(watch)
        assert isinstance(put, Put)
        assert (put.entry.key, put.entry.revision, put.entry.ttl) == ("a/1", first.revision, None)
        clock.advance(5)
        assert next(watch) == Delete("a/1", first.revision + 2)


def test_a_watch_that_has_nothing_to_tell_says_how_far_it_is(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROGRESS_SECONDS", 0.0)
    with store.watch("a/", after=store.list("").revision) as watch:
        assert next(watch) == Progress(store.list("").revision)


def test_a_compacted_watch_says_so_and_ends(store: MemoryStore) -> None:
    store.create("k", b"v", ttl=None)
    store.create("l", b"v", ttl=None)
    store.compact()
    assert list(store.watch("", after=1)) == [Compacted(3)]


def test_history_is_bounded(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HISTORY", 10)
    for number in range(25):
        store.create(f"k{number}", b"v", ttl=None)
    assert isinstance(next(store.watch("", after=1)), Compacted)
    last = store.list("").revision
    assert isinstance(next(store.watch("", after=last - 1)), Put)


@pytest.mark.parametrize("how", ["close watch", "close store", "fail"])
def test_a_watch_that_waits_is_ended_from_another_thread(store: MemoryStore, how: str) -> None:
    watch = store.watch("", after=store.list("").revision)
    ended: list[Event | Exception] = []

    def wait() -> None:
        try:
            ended.extend(event for event in watch if not isinstance(event, Progress))
        except RegistryUnreachable as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    if how == "close watch":
        watch.close()
        watch.close()
    elif how == "close store":
        store.close()
    else:
        store.fail("event", NO_ANSWER)
    until(lambda: not thread.is_alive())
    assert ended == ([NO_ANSWER] if how == "fail" else [])


def test_what_etcd_refuses_is_refused(store: MemoryStore) -> None:
    with pytest.raises(Invalid):
        store.create("k", b"v" * (memory.MAX_VALUE + 1), ttl=None)
    with pytest.raises(Invalid):
        store.create("", b"v", ttl=None)


def test_a_key_that_is_not_utf8_is_listed_apart(store: MemoryStore) -> None:
    store.put_unreadable(b"p/\xff")
    store.put_unreadable(b"q/\xff")
    assert store.list("p/").unreadable == (Unreadable(b"p/\xff"),)


def test_of_many_threads_that_create_one_key_one_wins(store: MemoryStore) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        try:
            store.another().create("k", str(number).encode(), ttl=None)
            won.append(number)
        except KeyExists:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = store.get("k")
    assert entry is not None
    assert won == [int(entry.value)]

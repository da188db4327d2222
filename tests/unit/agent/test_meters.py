"""The store that counts: it changes nothing, and every question is counted once under the right result."""

from __future__ import annotations

import pytest

from flanctl.agent.meters import MeteredStore, Meters, result_of
from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.store import Changed, Compacted, KeyExists, Put
from tests.support.clock import FakeClock


@pytest.fixture
def metered():
    clock = FakeClock()
    meters = Meters()
    inner = MemoryStore(clock)
    return MeteredStore(inner, meters, clock), inner, meters, clock


def counts(meters):
    return {labels: count for labels, count in meters.requests.items() if count}


def test_every_question_is_passed_on_and_counted(metered):
    store, _, meters, _ = metered
    entry = store.create("/a", b"1", ttl=60)
    assert store.get("/a").value == b"1"
    assert [one.key for one in store.list("/").entries] == ["/a"]
    assert store.with_ttl([entry])[0].ttl is not None
    entry = store.refresh(entry, ttl=60)
    entry = store.replace("/a", b"2", ttl=60, expected=entry.revision)
    assert store.delete("/a", expected=entry.revision)
    assert counts(meters) == {
        (operation, "ok"): 1 for operation in ("create", "get", "list", "ttl", "refresh", "replace", "delete")
    }
    assert meters.request_seconds["get"].read()[2] == 1


def test_a_lost_race_is_an_answer(metered):
    store, _, meters, _ = metered
    store.create("/a", b"1", ttl=None)
    with pytest.raises(KeyExists):
        store.create("/a", b"2", ttl=None)
    with pytest.raises(Changed):
        store.delete("/a", expected=99)
    assert counts(meters) == {("create", "ok"): 2, ("delete", "ok"): 1}


def test_when_the_registry_last_answered_does_not_move_by_failures(metered):
    store, inner, meters, clock = metered
    store.get("/a")
    first = meters.answered
    clock.advance(7)
    inner.fail("get", RegistryUnreachable("no answer"))
    with pytest.raises(RegistryUnreachable):
        store.get("/a")
    assert meters.answered == first
    assert counts(meters) == {("get", "ok"): 1, ("get", "timeout"): 1}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RegistryUnreachable("none of 2 endpoints answered", details=("http://a   connection refused",)), "refused"),
        (RegistryUnreachable("x", details=("http://a   connection refused", "http://b   no answer in 1.7s")), "timeout"),
        (RegistryUnreachable("x", details=("https://a   its certificate has expired",)), "other"),
        (NotPermitted("no"), "denied"),
        (Invalid("odd"), "other"),
        (FlanctlError("odd"), "other"),
    ],
)  # fmt: skip
def test_results(error, expected):
    assert result_of(error) == expected


def test_a_watch_tells_when_it_last_brought_something_and_how_it_ended(metered):
    store, inner, meters, clock = metered
    with store.watch("/", after=0) as watch:
        opened = meters.watched
        clock.advance(5)
        inner.another().create("/a", b"1", ttl=None)
        assert isinstance(next(watch), Put)
        assert meters.watched == opened + 5
        inner.fail("event", RegistryUnreachable("gone"))
        with pytest.raises(RegistryUnreachable):
            next(watch)
    inner.another().create("/b", b"1", ttl=None)
    inner.compact()
    with store.watch("/", after=1) as watch:
        assert isinstance(next(watch), Compacted)
    assert dict(meters.restarts.items()) == {("error",): 1, ("compacted",): 1}

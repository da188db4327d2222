"""Endpoints that DNS names, and names anew: who waits for the registry waits for DNS too."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import NotFound, RegistryUnreachable, UsageError
from flanctl.registry.session import session
from flanctl.registry.stores import discovered
from flanctl.registry.stores.discovered import DiscoveredStore
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.switching import AutoStore
from flanctl.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

AWAY = RegistryUnreachable("no endpoint answered")


class Dns:
    """What it names, or raises; and the etcd of each name."""

    def __init__(self) -> None:
        self.says: tuple[str, ...] | Exception = ("one",)
        self.asked = 0
        self.etcd = {name: MemoryStore() for name in ("one", "two", "three")}
        self.opened: list[MemoryStore] = []

    def find(self) -> tuple[str, ...]:
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def open(self, endpoints: tuple[str, ...]) -> MemoryStore:
        self.opened.append(self.etcd[endpoints[0]].another())
        return self.opened[-1]


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Dns:
    monkeypatch.setattr(discovered, "AGAIN_SECONDS", 0.0)
    return Dns()


@pytest.fixture
def store(dns: Dns) -> Iterator[DiscoveredStore]:
    with contextlib.closing(DiscoveredStore(dns.find, dns.open, lambda *_: None)) as store:
        yield store


@pytest.mark.parametrize("says", [RegistryUnreachable("no name server answered"), NotFound("names no etcd")])
def test_a_dns_that_says_nothing_is_asked_with_each_call_until_it_does(
    dns: Dns, store: DiscoveredStore, says: Exception
) -> None:
    dns.says = says
    for _ in range(3):
        with pytest.raises(type(says)):
            store.get("/a")
    assert (dns.asked, store.name, store.api) == (3, "etcd", "")
    assert store.describe() == "etcd, as soon as DNS names it"
    dns.says = ("one",)
    assert store.get("/a") is None
    assert store.list("/").entries == ()
    assert (dns.asked, store.name) == (4, "memory")


def test_others_are_taken_when_nobody_answers_and_a_failed_call_is_not_made_twice(
    dns: Dns, store: DiscoveredStore
) -> None:
    store.create("/a", b"1", ttl=None)
    dns.says = ("two",)
    assert store.get("/a") is not None, "whoever answers is kept"
    dns.opened[0].fail("*", AWAY, times=9)
    with pytest.raises(RegistryUnreachable, match="no endpoint answered"):
        store.create("/b", b"2", ttl=None)
    assert dns.etcd["two"].get("/b") is None
    store.create("/b", b"2", ttl=None)
    assert dns.etcd["two"].get("/b") is not None
    assert not dns.opened[0].closed, "another thread's call may still be under way"
    dns.says = ("three",)
    dns.opened[1].fail("*", AWAY)
    with pytest.raises(RegistryUnreachable):
        store.get("/b")
    assert [one.closed for one in dns.opened] == [True, False, False]
    store.close()
    assert [one.closed for one in dns.opened] == [True, True, True]


def test_the_same_names_or_no_names_change_nothing(dns: Dns, store: DiscoveredStore) -> None:
    store.get("/a")
    dns.opened[0].fail("*", AWAY, times=2)
    for dns.says in (("one",), RegistryUnreachable("no name server answered")):
        with pytest.raises(RegistryUnreachable, match="no endpoint answered"):
            store.get("/a")
    assert store.get("/a") is None
    assert (dns.asked, len(dns.opened)) == (3, 1)


def test_dns_is_not_asked_by_every_call_of_an_outage(
    dns: Dns, store: DiscoveredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovered, "AGAIN_SECONDS", 3600.0)
    store.get("/a")
    dns.opened[0].fail("*", AWAY, times=100)
    for _ in range(100):
        with pytest.raises(RegistryUnreachable):
            store.get("/a")
    assert dns.asked == 1


def test_the_api_of_our_lease_is_kept_on_endpoints_found_later(dns: Dns) -> None:
    """An etcd behind new names that has no config yet must not be asked by the other API."""
    v2 = {name: MemoryStore() for name in dns.etcd}

    def open_auto(endpoints: tuple[str, ...]) -> AutoStore:
        def open_v2(_: float | None) -> MemoryStore:
            found = v2[endpoints[0]].another()
            found.api = "v2"
            return found

        return AutoStore(dns.open(endpoints), open_v2, "/config", lambda *_: None)  # type: ignore[arg-type]

    v2["one"].create("/config", b"{}", ttl=None)
    with contextlib.closing(DiscoveredStore(dns.find, open_auto, lambda *_: None)) as store:
        assert store.get("/config") is not None
        assert store.api == "v2"
        dns.says = ("two",)
        v2["one"].fail("*", AWAY, times=99)
        auto = store._store
        assert isinstance(auto, AutoStore)
        auto._taken.fail("*", AWAY)  # type: ignore[union-attr]
        with pytest.raises(RegistryUnreachable):
            store.get("/config")
        store.create("/subnets/a", b"ours", ttl=None)
        assert v2["two"].get("/subnets/a") is not None
        assert dns.etcd["two"].get("/subnets/a") is None

    for api, where in (("v3", dns.etcd), ("v2", v2)):
        with contextlib.closing(DiscoveredStore(dns.find, open_auto, lambda *_: None)) as store:
            store.stay(api)  # before DNS has named anybody
            assert store.api == api
            dns.says = ("three",)
            store.create(f"/subnets/{api}", b"ours", ttl=None)
            assert where["three"].get(f"/subnets/{api}") is not None


def test_what_is_no_domain_is_said_at_once() -> None:
    settings = resolve({"discovery_srv": "a..b"})
    with pytest.raises(UsageError, match="is not a domain"), session(settings, patient=True):
        pass

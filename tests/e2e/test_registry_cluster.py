"""A registry of three members that lose their leader and hang: who reads, writes and watches hardly notices.

Also what only a real etcd does: logins, and tokens that a restart forgets.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import NotPermitted, RegistryUnreachable
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.store import KeyExists, Put
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import SERVED, STORES, VERSIONS, WITH_V2, kinds, opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.registry.stores.store import Entry, Store, Watch
    from tests.support.etcd import Version

TIMEOUT = 8.0
"""Longer than an election (2 s) that follows a frozen member's share."""


def open_store(kind: str, cluster: Cluster, *, user: str | None = None, password: str | None = None) -> Store:
    endpoints = parse_endpoints(cluster.endpoints)
    return WITH_V2[kind](endpoints, timeout=TIMEOUT, user=user, password=password)


class Writer:
    """Creates a key and replaces it from then on, 50 times a second; keeps what was acknowledged."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.acknowledged: list[Entry] = []
        self.error: BaseException | None = None
        self.longest = 0.0
        """Seconds of the slowest write."""

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def go_on(self, count: int) -> None:
        """Until `count` more writes were acknowledged."""
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal or self.error, seconds=20, what="the writer goes on")
        assert self.error is None, repr(self.error)

    def _run(self) -> None:
        number = 0
        try:
            while not self._stop.wait(0.02):
                started = time.monotonic()
                value = str(number).encode()
                if number == 0:
                    entry = self._store.create(self._key, value, ttl=60)
                else:
                    expected = self.acknowledged[-1].revision
                    entry = self._store.replace(self._key, value, ttl=None, expected=expected)
                self.longest = max(self.longest, time.monotonic() - started)
                self.acknowledged.append(entry)
                number += 1
        except BaseException as error:
            self.error = error


class Reader:
    """Collects a watch's events in a thread."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._thread = threading.Thread(target=self._run)
        self.puts: list[Put] = []
        self.error: BaseException | None = None

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.puts.extend(event for event in self._watch if isinstance(event, Put))
        except BaseException as error:
            self.error = error


@pytest.mark.parametrize("version", VERSIONS)
def test_a_leader_killed_and_a_member_frozen_lose_and_double_no_event(
    tmp_path: Path, version: Version
) -> None:
    with (
        Cluster(version, 3, folder=tmp_path, v2=version == "3.4") as cluster,
        contextlib.ExitStack() as stack,
    ):
        writers: list[Writer] = []
        readers: list[Reader] = []
        stores: list[Store] = []
        for kind in kinds(version):
            prefix = f"/cluster/{kind}/"
            store = stack.enter_context(contextlib.closing(open_store(kind, cluster)))
            start = store.list(prefix).revision
            stores.append(store)
            readers.append(stack.enter_context(Reader(store.watch(prefix, after=start))))
            writers.append(stack.enter_context(Writer(store, prefix + "key")))

        def everybody_goes_on() -> None:
            for writer, reader, store in zip(writers, readers, stores, strict=True):
                writer.go_on(20)
                seen = len(writer.acknowledged)
                until(
                    lambda r=reader, n=seen: len(r.puts) >= n or r.error,  # type: ignore[misc]
                    seconds=20,
                    what="the watch goes on",
                )
                assert reader.error is None, repr(reader.error)
                assert store.list("/cluster/").entries

        everybody_goes_on()
        leader = cluster.leader()
        cluster.kill(leader)
        everybody_goes_on()
        cluster.restart(leader)
        cluster.freeze(0)  # the endpoint everybody asks first
        everybody_goes_on()
        cluster.thaw(0)

        for kind, writer, reader in zip(kinds(version), writers, readers, strict=True):
            writer.__exit__()
            assert writer.error is None
            until(
                lambda r=reader, w=writer: len(r.puts) >= len(w.acknowledged),  # type: ignore[misc]
                what="every write is seen",
            )
            seen = [(put.entry.value, put.entry.revision) for put in reader.puts]
            written = [(entry.value, entry.revision) for entry in writer.acknowledged]
            assert seen == written, kind
            assert writer.longest < TIMEOUT


@pytest.mark.parametrize(("kind", "version"), SERVED)
def test_a_lost_quorum_is_noticed_by_calls_and_by_a_watch(
    tmp_path: Path, kind: str, version: Version
) -> None:
    """The member that is left answers, and knows nothing."""
    with (
        Cluster(version, 3, v2=kind == "v2", folder=tmp_path) as cluster,
        opened(kind, cluster.endpoints, timeout=3.0) as store,
    ):
        entry = store.create("/quorum/a", b"1", ttl=None)
        with store.watch("/quorum/", after=entry.revision) as watch:
            cluster.kill(1)
            cluster.kill(2)
            begin = time.monotonic()
            with pytest.raises(RegistryUnreachable):
                for _ in watch:
                    assert time.monotonic() - begin < 40, "a watch without quorum goes on as if nothing were"
            with pytest.raises(RegistryUnreachable):
                store.get("/quorum/a")
            cluster.restart(1, 2)
            changed = store.replace("/quorum/a", b"2", ttl=None, expected=entry.revision)

            def told() -> Put | None:
                """A watch that gives up may be asked on; a busy machine's members take longer than it has patience."""
                try:
                    return next(event for event in watch if isinstance(event, Put))
                except RegistryUnreachable:
                    return None

            assert until(told, seconds=30) == Put(changed)


@pytest.mark.parametrize("version", VERSIONS)
def test_two_clients_that_create_during_a_failover_have_one_winner(tmp_path: Path, version: Version) -> None:
    """A create whose answer was lost finds its own value and does not take itself for somebody else."""
    with Cluster(version, 3, folder=tmp_path) as cluster, contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(open_store(kind, cluster))) for kind in STORES]
        winners: dict[int, list[int]] = {}
        ready = threading.Barrier(2)
        failed: list[BaseException] = []

        def race(who: int) -> None:
            for number in range(60):
                ready.wait()
                try:
                    stores[who].create(f"/race/{number}", f"{who}".encode(), ttl=60)
                except KeyExists:
                    continue
                except BaseException as error:
                    failed.append(error)
                    ready.abort()
                    return
                winners.setdefault(number, []).append(who)

        threads = [threading.Thread(target=race, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: len(winners) > 10 or failed)
        cluster.kill(cluster.leader())
        for thread in threads:
            thread.join()
        assert not failed
        there = {entry.key: entry.value for entry in stores[0].list("/race/").entries}
        assert {f"/race/{n}": f"{who}".encode() for n, (who,) in winners.items()} == there
        assert len(there) == 60


def want_login(cluster: Cluster) -> None:
    """From now on: root/secret, and ro/secret who may read /open/ only."""
    for command in (
        "user add root:secret",
        "user add ro:secret",
        "role add reader",
        "role grant-permission --prefix=true reader read /open/",
        "user grant-role ro reader",
        "role add root",
        "user grant-role root root",
        "auth enable",
    ):
        cluster.etcdctl(*command.split())
    cluster.user = "root:secret"


@pytest.fixture(scope="module", params=VERSIONS)
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(request.param, folder=tmp_path_factory.mktemp("guarded")) as cluster:
        want_login(cluster)
        yield cluster


@pytest.mark.parametrize("kind", STORES)
class TestLogin:
    def test_without_a_user_nothing_is_read(self, guarded: Cluster, kind: str) -> None:
        with contextlib.closing(open_store(kind, guarded)) as store:
            with pytest.raises(NotPermitted, match="wants a login"):
                store.list("/open/")
            with pytest.raises(NotPermitted, match="wants a login"):
                next(store.watch("/open/", after=1))

    def test_a_wrong_password_is_refused_and_not_shown(self, guarded: Cluster, kind: str) -> None:
        with contextlib.closing(open_store(kind, guarded, user="root", password="wr0ng")) as store:
            with pytest.raises(NotPermitted) as refused:
                store.list("/open/")
            assert "authentication failed" in refused.value.message
            assert "wr0ng" not in f"{refused.value!r} {refused.value.details} {store!r} {store.describe()}"

    def test_a_user_reads_what_he_may(self, guarded: Cluster, kind: str) -> None:
        with contextlib.closing(open_store(kind, guarded, user="ro", password="secret")) as store:
            revision = store.list("/open/").revision
            with pytest.raises(NotPermitted, match='user "ro" may not list /other/'):
                store.list("/other/")
            with pytest.raises(NotPermitted, match="permission denied"):
                store.create("/open/a", b"", ttl=None)
            with pytest.raises(NotPermitted, match="may not watch /other/"):
                next(store.watch("/other/", after=revision))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_forgotten_token_costs_one_more_login(tmp_path: Path, version: Version) -> None:
    """etcd keeps its tokens in memory: a restart forgets them, and reads, writes and watches go on all the same."""
    with Cluster(version, folder=tmp_path) as cluster, contextlib.ExitStack() as stack:
        want_login(cluster)
        stores = [
            stack.enter_context(contextlib.closing(open_store(kind, cluster, user="root", password="secret")))
            for kind in STORES
        ]
        expected: list[list[Entry]] = []
        readers: list[Reader] = []
        for number, store in enumerate(stores):
            key = f"/open/{number}"
            first = store.create(key, b"1", ttl=None)
            readers.append(stack.enter_context(Reader(store.watch(key, after=first.revision))))
            expected.append([store.replace(key, b"2", ttl=None, expected=first.revision)])
        for reader in readers:
            until(lambda r=reader: len(r.puts) == 1)  # type: ignore[misc]
        cluster.restart(0)
        for store, reader, entries in zip(stores, readers, expected, strict=True):
            (second,) = entries
            until(lambda s=store, e=second: read(s, e.key) == e, seconds=20)  # type: ignore[misc]
            entries.append(store.replace(second.key, b"3", ttl=None, expected=second.revision))
            until(lambda r=reader: len(r.puts) == 2 or r.error, seconds=20)  # type: ignore[misc]
            assert [put.entry for put in reader.puts] == entries


def read(store: Store, key: str) -> Entry | None:
    try:
        return store.get(key)
    except RegistryUnreachable:
        return None

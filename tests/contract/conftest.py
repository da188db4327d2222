"""The stores the contract holds for, each with its own data, and what only the server behind it can do."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from flanctl.registry.stores.memory import MemoryStore
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flanctl.registry.stores.store import Store
    from tests.support.etcd import Version


@dataclass(frozen=True)
class Backend:
    """One registry. `open` makes a client of it; `prefix` is new in every test."""

    open: Callable[[], Store]
    compact: Callable[[], None]
    """Make the registry forget all events up to now."""
    short: float
    """Seconds: the shortest TTL a test can use. etcd grants at least one and a half election timeouts."""
    put_raw: Callable[[bytes], None]
    """Write a key that need not be UTF-8."""
    paths: bool = False
    """Keys are paths and values are text, as in etcd v2: what is neither is refused."""


@contextlib.contextmanager
def _memory(_folder: Path) -> Iterator[Backend]:
    data = MemoryStore()
    yield Backend(data.another, data.compact, 0.5, data.put_unreadable)


@contextlib.contextmanager
def _sqlite(folder: Path) -> Iterator[Backend]:
    from flanctl.registry.stores.sqlite import SqliteStore

    path = str(folder / "registry.db")

    def sql(statement: str, *arguments: object) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement, arguments)

    def compact() -> None:
        sql("UPDATE meta SET compacted = revision")
        sql("DELETE FROM events")

    def put_raw(key: bytes) -> None:
        sql("UPDATE meta SET revision = revision + 1")
        sql("INSERT INTO keys SELECT ?, x'', revision, NULL, NULL, NULL FROM meta", key)
        sql("INSERT INTO events SELECT revision, ?, x'', NULL FROM meta", key)

    yield Backend(lambda: SqliteStore(path), compact, 0.5, put_raw)


def _etcd(store: str, version: Version) -> Callable[[Path], contextlib.AbstractContextManager[Backend]]:
    @contextlib.contextmanager
    def start(folder: Path) -> Iterator[Backend]:
        with Cluster(version, folder=folder, v2=store == "v2") as cluster:
            yield Backend(
                lambda: _client(store, cluster),
                lambda: _forget(cluster) if store == "v2" else _compact(cluster),
                2.0,
                lambda key: _put_path(cluster, key) if store == "v2" else _put_raw(cluster, key),
                paths=store == "v2",
            )

    return start


def _client(store: str, cluster: Cluster) -> Store:
    from flanctl.registry.stores.endpoints import parse_endpoints

    endpoints = parse_endpoints(cluster.endpoints)
    if store == "gateway":
        from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore

        return EtcdGatewayStore(endpoints)
    if store == "v2":
        from flanctl.registry.stores.etcd_v2 import EtcdV2Store

        return EtcdV2Store(endpoints)
    from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore

    return EtcdGrpcStore(endpoints)


def _compact(cluster: Cluster) -> None:
    with contextlib.closing(_client("gateway", cluster)) as store:
        cluster.etcdctl("compact", str(store.list("/").revision))


def _put_raw(cluster: Cluster, key: bytes) -> None:
    cluster.etcdctl("put", "--", key.decode("utf-8", "surrogateescape"), "")


def _v2(cluster: Cluster) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(cluster.endpoints[0].removeprefix("http://"), timeout=10)


def _put_path(cluster: Cluster, key: bytes) -> None:
    with contextlib.closing(_v2(cluster)) as link:
        link.request("PUT", "/v2/keys" + quote(key), b"value=", {"Content-Type": FORM})
        answer = link.getresponse()
        assert answer.read()
        assert answer.status in {200, 201}


def _forget(cluster: Cluster) -> None:
    """etcd v2 keeps the last 1000 events."""
    with contextlib.closing(_v2(cluster)) as link:
        for _ in range(1001):
            link.request("PUT", "/v2/keys/elsewhere", b"value=", {"Content-Type": FORM})
            link.getresponse().read()


FORM = "application/x-www-form-urlencoded"

_VERSIONS: tuple[tuple[Version, str], ...] = (("3.4", "34"), ("3.7", "37"))
BACKENDS = [
    pytest.param(_memory, id="memory"),
    pytest.param(_sqlite, id="sqlite"),
    *(
        pytest.param(
            _etcd(store, version), id=f"{store}-etcd{short}", marks=pytest.mark.needs(f"etcd{short}")
        )
        for store in ("gateway", "grpc")
        for version, short in _VERSIONS
    ),
    pytest.param(_etcd("v2", "3.4"), id="v2-etcd34", marks=pytest.mark.needs("etcd34")),
]

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with request.param(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    with contextlib.closing(backend.open()) as store:
        yield store


@pytest.fixture
def other(backend: Backend) -> Iterator[Store]:
    """A second client of the same registry: another host."""
    with contextlib.closing(backend.open()) as store:
        yield store


@pytest.fixture
def short(backend: Backend) -> float:
    return backend.short


@pytest.fixture
def prefix() -> str:
    """A place in the registry no other test uses."""
    return f"/contract/{next(_numbers):04}/"  # so that no neighbour of one is the folder of another

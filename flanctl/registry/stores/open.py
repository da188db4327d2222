"""From settings to an open store: the one place that knows which stores there are.

    store = open_store(Connection(("http://192.168.6.15:2379",)), prefer="gateway")

Nothing heavy is imported before it is known to be needed: a command on a file loads no HTTP, one over HTTP no gRPC.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from flanctl.errors import FlanctlError, NotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from flanctl.registry.stores.endpoints import Endpoint
    from flanctl.registry.stores.store import Entry, Event, Snapshot, Store, Watch

T = TypeVar("T")

_SQLITE = "sqlite:"


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a registry. `timeout` in seconds bounds every call; files are PEM; the password is never shown."""

    endpoints: tuple[str, ...]
    timeout: float = 5.0
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def open_store(connection: Connection, *, prefer: Literal["gateway", "grpc"], create: bool = True) -> Store:
    """The store the endpoints name. For etcd no connection is made yet; a file is opened at once.

    `sqlite:PATH` alone is a file. Anything else is etcd v3: by its JSON gateway (quick to start, falls back to
    gRPC where the gateway is off) or by gRPC (for who stays; the gateway if the libraries are missing).
    `create=False` is for who only asks: a file that is not there is NotFound then, and a slip of the pen makes none.
    Raises UsageError for endpoints that cannot mean anything, and what SqliteStore raises.
    """
    schemes = [endpoint.strip().partition(":")[0].lower() for endpoint in connection.endpoints]
    if "memory" in schemes:
        raise UsageError("endpoint memory: is for tests only", hint="sqlite:PATH needs no server either")
    if "sqlite" in schemes:
        return _open_file(connection, create=create)

    from flanctl.registry.stores.endpoints import parse_endpoints

    endpoints = parse_endpoints(connection.endpoints)
    if prefer == "grpc":
        try:
            return _open_grpc(endpoints, connection)
        except _GrpcMissing:
            return _open_gateway(endpoints, connection)
    return FallbackStore(_open_gateway(endpoints, connection), lambda: _open_grpc(endpoints, connection))


def _open_file(connection: Connection, *, create: bool) -> Store:
    (first, *others) = (endpoint.strip() for endpoint in connection.endpoints)
    if others:
        raise UsageError(
            f"a file is a registry by itself, but {len(connection.endpoints)} endpoints are given:"
            f" {', '.join(connection.endpoints)}",
            hint="either sqlite:PATH or etcd endpoints",
        )
    if not (path := first[len(_SQLITE) :]):
        raise UsageError(f"endpoint {first} names no file", hint="sqlite:PATH")

    from flanctl.registry.stores.sqlite import SqliteStore

    if not create and not os.path.lexists(path) and os.path.isdir(os.path.dirname(path) or "."):
        raise NotFound(f"there is no registry {path}", hint="flanctl net init makes it", id="no-registry")
    return SqliteStore(path, timeout=connection.timeout)


def _open_gateway(endpoints: Sequence[Endpoint], connection: Connection) -> Store:
    from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore

    return EtcdGatewayStore(
        endpoints,
        timeout=connection.timeout,
        cacert=connection.cacert,
        cert=connection.cert,
        key=connection.key,
        user=connection.user,
        password=connection.password,
    )


class _GrpcMissing(FlanctlError):
    """etcd3 or grpc is not installed, or not in versions that go together."""


def _open_grpc(endpoints: Sequence[Endpoint], connection: Connection) -> Store:
    try:
        from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
    except (ImportError, TypeError) as error:  # TypeError: etcd3 0.12.0's messages under protobuf 4 and newer
        raise _GrpcMissing(f"gRPC cannot be loaded: {error}", hint="pip install flanctl") from error
    return EtcdGrpcStore(
        endpoints,
        timeout=connection.timeout,
        cacert=connection.cacert,
        cert=connection.cert,
        key=connection.key,
        user=connection.user,
        password=connection.password,
    )


class FallbackStore:
    """The gateway until it says that it is off, gRPC from then on.

    GatewayOff means that nothing was done, so the call that met it is simply made again.
    """

    def __init__(self, gateway: Store, open_grpc: Callable[[], Store]) -> None:
        self._gateway = gateway
        self._open_grpc = open_grpc
        self._grpc: Store | None = None
        self._closed = False
        self._switching = threading.Lock()

    @property
    def name(self) -> str:
        return self._current().name

    def describe(self) -> str:
        return self._current().describe()

    def get(self, key: str) -> Entry | None:
        return self.ask(lambda store: store.get(key))

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        return self.ask(lambda store: store.list(prefix, at=at))

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return self.ask(lambda store: store.with_ttl(entries))

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        return self.ask(lambda store: store.create(key, value, ttl=ttl))

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        return self.ask(lambda store: store.replace(key, value, ttl=ttl, expected=expected))

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        return self.ask(lambda store: store.delete(key, expected=expected))

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        return self.ask(lambda store: store.refresh(entry, ttl=ttl))

    def watch(self, prefix: str, *, after: int) -> FallbackWatch:
        return FallbackWatch(self, prefix, after)

    def close(self) -> None:
        with self._switching:
            self._closed = True
            self._gateway.close()
            if self._grpc is not None:
                self._grpc.close()

    def ask(self, call: Callable[[Store], T]) -> T:
        from flanctl.registry.stores.etcd_gateway import GatewayOff

        try:
            return call(self._current())
        except GatewayOff as off:
            return call(self._switch(off))

    def _current(self) -> Store:
        return self._grpc or self._gateway

    def _switch(self, off: FlanctlError) -> Store:
        """Whoever comes first opens the other store. Without it, and when closed, the gateway's error stands."""
        with self._switching:
            if self._grpc is None:
                if self._closed:
                    raise off
                try:
                    self._grpc = self._open_grpc()
                except _GrpcMissing as missing:
                    off.details = (*off.details, missing.message)
                    off.hint = off.hint or missing.hint
                    raise off from missing
            return self._grpc


class FallbackWatch:
    """A watch that goes on by gRPC after the last revision seen."""

    def __init__(self, store: FallbackStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._seen = after
        self._closed = False
        self._opening = threading.Lock()
        self._watch = store.ask(self._open)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = self._store.ask(self._next)
        self._seen = max(self._seen, _revision(event))
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._opening:
            self._closed = True
            self._watch.close()

    def _open(self, store: Store) -> Watch:
        self._of = store
        return store.watch(self._prefix, after=self._seen)

    def _next(self, store: Store) -> Event:
        if store is not self._of:
            with self._opening:
                if self._closed:
                    raise StopIteration
                self._watch.close()
                self._watch = self._open(store)
        return next(self._watch)


def _revision(event: Event) -> int:
    from flanctl.registry.stores.store import Compacted, Put

    match event:
        case Put(entry):
            return entry.revision
        case Compacted():
            return 0  # the end of the watch, not an event of it
        case _:
            return event.revision

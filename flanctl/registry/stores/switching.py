"""Stores that hand their calls to others: the gateway until it is off, v3 or v2 by where the config is."""

from __future__ import annotations

import abc
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Self, TypeVar

from flanctl.errors import FlanctlError, NotPermitted, RegistryUnreachable
from flanctl.registry.stores.open import LOOK_SECONDS, GrpcMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from flanctl.registry.stores.etcd_v2 import EtcdV2Store
    from flanctl.registry.stores.store import Entry, Event, Snapshot, Store, Watch

T = TypeVar("T")


class SwitchingStore(abc.ABC):
    """Hands every call to one of several stores."""

    @abc.abstractmethod
    def ask(self, call: Callable[[Store], T]) -> T:
        """Make the call of the store that serves now."""

    @abc.abstractmethod
    def _current(self) -> Store:
        """The store that serves as far as known, without asking anybody."""

    @property
    def name(self) -> str:
        return self._current().name

    @property
    def api(self) -> str:
        return self._current().api

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


class FallbackStore(SwitchingStore):
    """The gateway until it says that it is off, gRPC from then on.

    GatewayOff means that nothing was done, so the call that met it is simply made again.
    """

    def __init__(
        self,
        gateway: Store,
        open_grpc: Callable[[], Store],
        say: Callable[[str, bool], None] = lambda _sentence, _warning: None,
    ) -> None:
        self._gateway = gateway
        self._open_grpc = open_grpc
        self._say = say
        self._grpc: Store | None = None
        self._closed = False
        self._switching = threading.Lock()

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
                except GrpcMissing as missing:
                    off.details = (*off.details, missing.message)
                    raise off from missing
                self._say(f"gRPC is taken: {off.message}", False)
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


class AutoStore(SwitchingStore):
    """v3 or v2 of one etcd, by which holds the network's config: v3 where both do, or neither.

    Until one of them does, every call asks again, so an agent that waits for a config finds it in either.
    """

    def __init__(
        self,
        v3: Store,
        open_v2: Callable[[float | None], EtcdV2Store],
        key: str,
        say: Callable[[str, bool], None],
    ) -> None:
        self._v3 = v3
        self._open_v2 = open_v2
        self._key = key
        self._say = say
        self._taken: Store | None = None
        self._closed = False
        self._deciding = threading.Lock()
        self.why = ""

    def describe(self) -> str:
        return super().describe() + (f" ({self.why})" if self.why else "")

    def watch(self, prefix: str, *, after: int) -> Watch:
        return self.ask(lambda store: store.watch(prefix, after=after))

    def close(self) -> None:
        with self._deciding:
            self._closed = True
            self._v3.close()
            if self._taken is not None:
                self._taken.close()

    def stay(self, api: str) -> None:
        """For who goes on with a lease it has in one of them while nobody answers: that one it is, whatever comes back.

        An etcd that lost its data has no config in either, and a lease written to the other would be one in another
        network.
        """
        with self._deciding:
            if self._taken is None and api in {"v2", "v3"}:
                self._take(self._v3 if api == "v3" else self._open_v2(None), "this host's lease is there")

    def ask(self, call: Callable[[Store], T]) -> T:
        return call(self._taken or self._decide())

    def _current(self) -> Store:
        return self._taken or self._v3

    def _decide(self) -> Store:
        with self._deciding:
            if self._taken is not None or self._closed:
                return self._current()
            try:
                found = self._v3.get(self._key) is not None
            except NotPermitted:
                return self._v3  # it is served; the call itself says what we may not
            except RegistryUnreachable:
                if not self._only_v2():
                    raise
                return self._take(self._open_v2(None), "this etcd is older than 3.0")
            try:
                also = self._v2_holds()
            except NotPermitted as error:
                if not found:  # it may be there, and nobody should found a second network beside it
                    error.hint = (
                        f"{error.hint or 'a user who may read it'}; or --api v3, which does not ask v2"
                    )
                    raise
                also = False
            if found:
                if also:
                    self._say(
                        f"{self._key} is in etcd v3 and in v2: v3 is taken; --api v2 for the other", True
                    )
                return self._take(self._v3, "the config is there")
            if also:
                return self._take(self._open_v2(None), "the config is there and not in v3")
            return self._v3

    def move(self, objection: Callable[[Store], str | None]) -> str | None:
        """Go on with v3 in the place of v2, if v3 holds the config now. Why not, or None if it was done.

        `objection(v3)` may speak against it. Calls of others are answered by v3 from then on, and watches on v2 end.
        """
        with self._deciding:
            before = self._taken
            if before is None or before is self._v3 or self._closed:
                return f"{self._current().name} is in use"
            try:
                held = self._v3.get(self._key)
                why = f"{self._key} is not in v3" if held is None else objection(self._v3)
            except FlanctlError as error:
                why = error.message
            if why is None:
                self._take(self._v3, "the config is there now")
        if why is None:
            before.close()
        return why

    def _take(self, store: Store, why: str) -> Store:
        self._taken, self.why = store, why
        self._say(f"{store.name} is taken: {why}", False)
        return store

    def _v2_holds(self) -> bool:
        try:
            with closing(self._open_v2(LOOK_SECONDS)) as store:
                return store.get(self._key) is not None
        except NotPermitted:
            raise
        except FlanctlError:
            return False

    def _only_v2(self) -> bool:
        """By its version: a v3 that is in trouble must never be exchanged for what an old migration left in v2."""
        try:
            with closing(self._open_v2(LOOK_SECONDS)) as store:
                return store.version().startswith("2.")
        except FlanctlError:
            return False


def _revision(event: Event) -> int:
    from flanctl.registry.stores.store import Compacted, Put

    match event:
        case Put(entry):
            return entry.revision
        case Compacted():
            return 0  # the end of the watch, not an event of it
        case _:
            return event.revision

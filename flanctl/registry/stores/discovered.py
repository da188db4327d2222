"""A store whose endpoints DNS names: asked for with the first call, and again when none of them answers.

    store = DiscoveredStore(find, open_endpoints, say)
    store.get("/jxdd/network/config")          # RegistryUnreachable while DNS is silent, too

For who stays. A command asks DNS once, before everything else.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

from flanctl.errors import FlanctlError, RegistryUnreachable
from flanctl.registry.stores.switching import AutoStore, SwitchingStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanctl.registry.stores.store import Store, Watch

T = TypeVar("T")

AGAIN_SECONDS = 10.0
"""Between two questions to DNS while no endpoint answers; its answers live longer than that in any cache."""


class DiscoveredStore(SwitchingStore):
    """Hands every call to a store on the endpoints DNS named last.

    A call that nobody answers stays a failure, for nothing is known of what became of it; the next one goes to whom DNS
    names by then. Watches on endpoints that are gone end by themselves in the same way.
    """

    def __init__(
        self,
        find: Callable[[], tuple[str, ...]],
        open_endpoints: Callable[[tuple[str, ...]], Store],
        say: Callable[[str, bool], None],
    ) -> None:
        """`find` raises RegistryUnreachable while no name server answers, NotFound when none names an endpoint."""
        self._find = find
        self._open = open_endpoints
        self._say = say
        self._store: Store | None = None
        self._before: Store | None = None
        """The one before, whose last calls may still be under way."""
        self._endpoints: tuple[str, ...] = ()
        self._asked = 0.0
        self._failed: tuple[float, FlanctlError] | None = None
        """When DNS named nobody, and what was wrong: whoever waited for that answer has it too."""
        self._api = ""
        """Where `stay` said we stay."""
        self._closed = False
        self._looking = threading.Lock()

    @property
    def name(self) -> str:
        return "etcd" if self._store is None else self._store.name

    @property
    def api(self) -> str:
        return self._api if self._store is None else self._store.api

    def describe(self) -> str:
        return "etcd, as soon as DNS names it" if self._store is None else self._store.describe()

    def watch(self, prefix: str, *, after: int) -> Watch:
        return self.ask(lambda store: store.watch(prefix, after=after))

    def close(self) -> None:
        self._closed = True  # without the lock: a question to DNS may take as long as --timeout
        for store in (self._before, self._store):
            if store is not None:
                store.close()

    def stay(self, api: str) -> None:
        """As AutoStore.stay, also for endpoints that are found later."""
        with self._looking:
            self._api = api
            if isinstance(self._store, AutoStore):
                self._store.stay(api)

    def move(self, objection: Callable[[Store], str | None]) -> str | None:
        """As AutoStore.move."""
        if not isinstance(self._store, AutoStore):
            return "DNS has named no endpoint yet" if self._store is None else f"{self._store.name} is in use"
        why = self._store.move(objection)
        if why is None:
            self._api = "v3"
        return why

    def ask(self, call: Callable[[Store], T]) -> T:
        store = self._current()
        try:
            return call(store)
        except RegistryUnreachable:
            self._look_again(store)
            raise

    def _current(self) -> Store:
        if self._store is not None:
            return self._store
        began = time.monotonic()
        with self._looking:
            if self._store is None:
                if self._failed is not None and (self._failed[0] >= began or self._closed):
                    raise self._failed[1]
                try:
                    self._take(self._find())
                except FlanctlError as error:
                    self._failed = time.monotonic(), error
                    raise
            assert self._store is not None
            return self._store

    def _look_again(self, store: Store) -> None:
        """Nobody answered `store`: whom does DNS name by now?"""
        with self._looking:
            if self._closed or store is not self._store or time.monotonic() < self._asked + AGAIN_SECONDS:
                return
            try:
                found = self._find()
            except FlanctlError:
                return  # those we have are the best we know
            finally:
                self._asked = time.monotonic()
            if set(found) != set(self._endpoints):
                self._take(found)

    def _take(self, endpoints: tuple[str, ...]) -> None:
        store = self._open(endpoints)
        if isinstance(store, AutoStore):
            if isinstance(self._store, AutoStore) and self._store.why:
                self._api = self._store.api  # decided by the config there; elsewhere it may not be back yet
            store.stay(self._api)
        if self._before is not None:
            self._before.close()
        self._before, self._store, self._endpoints = self._store, store, endpoints
        self._asked = time.monotonic()
        if self._closed:
            store.close()

"""What the agent counts about itself, and the store that counts what is asked of it.

    meters = Meters()
    store = MeteredStore(store, meters, clock)      # everything asked through it is counted

Every label value exists from the start, so that a rate can be taken of the first failure. Numbers are added under a
lock and read without one: each is right by itself, all together are not one instant.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import TYPE_CHECKING, Self, TypeVar

from flanctl.errors import Conflict, FlanctlError, NotPermitted, RegistryUnreachable
from flanctl.registry.stores.store import Compacted, Forgotten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from flanctl.clock import Clock
    from flanctl.registry.stores.store import Entry, Event, Snapshot, Store, Watch

T = TypeVar("T")

OPERATIONS = ("get", "list", "ttl", "create", "replace", "delete", "refresh")
RESULTS = ("ok", "timeout", "refused", "denied", "other")
RENEWALS = ("ok", "error", "conflict")
RESTARTS = ("error", "compacted")
KINDS = ("link", "route", "neighbour", "fdb", "rule", "accept")
SECONDS = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the duration buckets; a request's own deadline is 5 s unless --timeout says otherwise."""


class Tally:
    """A counter with one label whose values, or two whose pairs, are known beforehand."""

    def __init__(self, *labels: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(labels, 0)

    def add(self, *labels: str, count: int = 1) -> None:
        """KeyError for labels nobody announced: they would be a series without bound."""
        with self._lock:
            self._counts[labels] += count

    def items(self) -> list[tuple[tuple[str, ...], int]]:
        return list(self._counts.items())


class Histogram:
    """Durations in seconds, as Prometheus counts them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(SECONDS, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[list[tuple[str, int]], float, int]:
        """Bounds with the counts up to them, the sum, and the count of all."""
        buckets, total = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), list(self._counts), strict=True):
            total += count
            buckets.append((bound, total))
        return buckets, self._sum, total


class Meters:
    """All of one agent's counts. Moments are the agent's clock's, None for what has not happened yet."""

    def __init__(self) -> None:
        self.requests = Tally(*((operation, result) for operation in OPERATIONS for result in RESULTS))
        self.request_seconds = {operation: Histogram() for operation in OPERATIONS}
        self.renewals = Tally(*((result,) for result in RENEWALS))
        self.restarts = Tally(*((reason,) for reason in RESTARTS))
        self.repairs = Tally(*((kind,) for kind in KINDS))
        self.failures = Tally(*((kind,) for kind in KINDS))
        self.path_switches = Tally(("kernel",), ("userspace",))
        self.apply_seconds = Histogram()
        self.answered: float | None = None
        """When the registry last said anything."""
        self.watched: float | None = None
        """When the watch last brought anything, a sign of life included."""


class MeteredStore:
    """A Store (see store.py) that counts and otherwise does what `store` does."""

    def __init__(self, store: Store, meters: Meters, clock: Clock) -> None:
        self._store = store
        self._meters = meters
        self._clock = clock

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def api(self) -> str:
        return self._store.api

    def describe(self) -> str:
        return self._store.describe()

    def get(self, key: str) -> Entry | None:
        return self._ask("get", lambda: self._store.get(key))

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        return self._ask("list", lambda: self._store.list(prefix, at=at))

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return self._ask("ttl", lambda: self._store.with_ttl(entries))

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        return self._ask("create", lambda: self._store.create(key, value, ttl=ttl))

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        return self._ask("replace", lambda: self._store.replace(key, value, ttl=ttl, expected=expected))

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        return self._ask("delete", lambda: self._store.delete(key, expected=expected))

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        return self._ask("refresh", lambda: self._store.refresh(entry, ttl=ttl))

    def watch(self, prefix: str, *, after: int) -> MeteredWatch:
        if self._meters.watched is None:
            self._meters.watched = self._clock.now()  # whoever watches has just listed: what is known is new
        return MeteredWatch(self._store.watch(prefix, after=after), self._meters, self._clock)

    def close(self) -> None:
        self._store.close()

    def _ask(self, operation: str, call: Callable[[], T]) -> T:
        began = self._clock.now()
        result = "ok"
        try:
            return call()
        except FlanctlError as error:
            result = result_of(error)
            raise
        except BaseException:
            result = "other"  # a stop that ends the wait, or a bug
            raise
        finally:
            now = self._clock.now()
            self._meters.requests.add(operation, result)
            self._meters.request_seconds[operation].observe(now - began)
            if result in {"ok", "denied"}:
                self._meters.answered = now


class MeteredWatch:
    """A Watch (see store.py) that remembers when it last brought something."""

    def __init__(self, watch: Watch, meters: Meters, clock: Clock) -> None:
        self._watch = watch
        self._meters = meters
        self._clock = clock

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            event = next(self._watch)
        except FlanctlError:
            self._meters.restarts.add("error")
            raise
        self._meters.answered = self._meters.watched = self._clock.now()
        if isinstance(event, Compacted):
            self._meters.restarts.add("compacted")
        return event

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)

    def close(self) -> None:
        self._watch.close()


def result_of(error: FlanctlError) -> str:
    """How a request ended, as its metric says it. A lost compare-and-swap is an answer like another."""
    if isinstance(error, Conflict | Forgotten):
        return "ok"
    if isinstance(error, NotPermitted):
        return "denied"
    if isinstance(error, RegistryUnreachable):
        # The stores' own words, one line for each endpoint: who hung cost the time, so it is named first.
        words = "\n".join((error.message, *error.details))
        for sign, result in (("no answer", "timeout"), ("refused", "refused")):
            if sign in words:
                return result
    return "other"

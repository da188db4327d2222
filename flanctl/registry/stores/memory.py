"""The store in memory: a fake that passes the same contract tests as etcd, and can fail on request.

store = MemoryStore(clock)
other = store.another()                                  # a second client of the same data
other.fail("create", RegistryUnreachable("no answer"), after_effect=True)   # written, but the answer is lost
other.fail("*", RegistryUnreachable("no answer"), skip=3)                   # the fourth call, whichever it is
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

from flanctl.clock import BootClock
from flanctl.errors import Conflict, Invalid
from flanctl.registry.stores.store import (
    Changed,
    Compacted,
    Delete,
    Entry,
    Event,
    Forgotten,
    KeyExists,
    Progress,
    Put,
    Snapshot,
    Unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from flanctl.clock import Clock

T = TypeVar("T")

LOOK_SECONDS = 0.05
"""Real time between two looks of a waiting watch: a fake clock's expiry rings no bell."""
PROGRESS_SECONDS = 1.0
"""Real time after which a watch that has nothing to tell says how far it is."""
HISTORY = 10_000
"""Events remembered; older ones are compacted away."""
MAX_VALUE = 3 * 512 * 1024
"""etcd's default --max-request-bytes, 1.5 MiB."""


@dataclass(slots=True)
class _Data:
    """What all clients of one store share. Everything happens under `changed`."""

    clock: Clock
    entries: dict[str, Entry] = field(default_factory=dict)
    unreadable: set[bytes] = field(default_factory=set)
    expiry: dict[str, float] = field(default_factory=dict)
    revision: int = 1
    history: list[Put | Delete] = field(default_factory=list)
    compacted: int = 0
    leases: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, key: str, value: bytes, ttl: float | None) -> Entry:
        self.revision += 1
        lease = None if ttl is None else str(next(self.leases))
        entry = Entry(key, value, self.revision, lease, ttl)
        self.entries[key] = entry
        self.expiry.pop(key, None)
        if ttl is not None:
            self.expiry[key] = self.clock.now() + ttl
        self.tell(Put(replace(entry, ttl=None)))
        return entry

    def remove(self, key: str) -> None:
        self.revision += 1
        del self.entries[key]
        self.expiry.pop(key, None)
        self.tell(Delete(key, self.revision))

    def tell(self, event: Put | Delete) -> None:
        self.history.append(event)
        if len(self.history) > HISTORY:
            forgotten = self.history[: HISTORY // 2]
            del self.history[: HISTORY // 2]
            self.compacted = _revision(forgotten[-1])
        self.changed.notify_all()

    def past(self, prefix: str, at: int) -> Snapshot:
        """What was below `prefix` at revision `at`: what has not changed since, and what the history says of the rest."""
        if not self.compacted <= at <= self.revision:
            raise Forgotten(at)
        found = {key: entry for key, entry in self.entries.items() if entry.revision <= at}
        later: set[str] = set()
        for event in self.history:
            key = _key(event)
            if _revision(event) > at:
                later.add(key)
            elif isinstance(event, Put):
                found[key] = event.entry
            else:
                found.pop(key, None)
        if self.compacted and any(key.startswith(prefix) for key in later - found.keys()):
            raise Forgotten(at)  # it may be new, or its old value may have been compacted away
        entries = tuple(replace(found[key], ttl=None) for key in sorted(found) if key.startswith(prefix))
        return Snapshot(entries, at)

    def expire(self) -> None:
        now = self.clock.now()
        for key in sorted(key for key, end in self.expiry.items() if end <= now):
            self.remove(key)


class MemoryStore:
    """See stores/store.py for what each call promises."""

    name = "memory"
    api = ""

    def __init__(self, clock: Clock | None = None, *, _data: _Data | None = None) -> None:
        self._data = _data or _Data(clock or BootClock())
        self._failures: dict[str, deque[tuple[Exception, bool] | None]] = {}
        self.closed = False
        self.calls: list[str] = []
        """Every operation asked of this client, for tests that count."""

    def another(self) -> MemoryStore:
        """A second client of the same data, with failures of its own."""
        return MemoryStore(_data=self._data)

    def fail(
        self, operation: str, error: Exception, *, times: int = 1, skip: int = 0, after_effect: bool = False
    ) -> None:
        """Let `times` calls of `operation` raise, after `skip` that go well.

        With `after_effect` the work is done all the same and only the answer is lost. `*` stands for any operation,
        `event` for a watch of this client that waits or will wait. Failures of one operation are used up in the
        order they were asked for.
        """
        with self._data.changed:
            plan = self._failures.setdefault(operation, deque())
            plan.extend([None] * skip)
            plan.extend([(error, after_effect)] * times)
            self._data.changed.notify_all()

    def put_unreadable(self, key: bytes) -> None:
        """A key that is not UTF-8, as any client of etcd can write."""
        with self._data.changed:
            self._data.unreadable.add(key)

    def compact(self) -> None:
        """Forget all events up to now, as etcd's compaction does."""
        with self._data.changed:
            self._data.compacted = self._data.revision
            self._data.history.clear()
            self._data.changed.notify_all()

    def describe(self) -> str:
        return "memory"

    def get(self, key: str) -> Entry | None:
        return self._do("get", lambda: self._with_ttl(self._data.entries.get(key)))

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        def act() -> Snapshot:
            if at is not None:
                return self._data.past(prefix, at)
            found = sorted(key for key in self._data.entries if key.startswith(prefix))
            entries = tuple(replace(self._data.entries[key], ttl=None) for key in found)
            unreadable = sorted(key for key in self._data.unreadable if key.startswith(prefix.encode()))
            return Snapshot(entries, self._data.revision, tuple(map(Unreadable, unreadable)))

        return self._do("list", act)

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        def act() -> tuple[Entry, ...]:
            return tuple(self._timed(entry) for entry in entries)

        return self._do("with_ttl", act)

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        def act() -> Entry:
            _check(key, value)
            if key in self._data.entries:
                raise KeyExists(key, self._with_ttl(self._data.entries[key]))
            return self._data.put(key, value, ttl)

        return self._do("create", act)

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        def act() -> Entry:
            _check(key, value)
            self._expect(key, expected)
            return self._data.put(key, value, ttl)

        return self._do("replace", act)

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        def act() -> bool:
            if key not in self._data.entries:
                return False
            if expected is not None:
                self._expect(key, expected)
            self._data.remove(key)
            return True

        return self._do("delete", act)

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        def act() -> Entry:
            self._expect(entry.key, entry.revision)
            current = self._data.entries[entry.key]
            if current.ttl != ttl:  # like etcd's keep-alive, which can only give what was granted
                return self._data.put(entry.key, current.value, ttl)
            self._data.expiry[entry.key] = self._data.clock.now() + ttl
            return current

        return self._do("refresh", act)

    def watch(self, prefix: str, *, after: int) -> MemoryWatch:
        return self._do("watch", lambda: MemoryWatch(self, self._data, prefix, after))

    def close(self) -> None:
        """End the watches of this client; the data stays for others."""
        with self._data.changed:
            self.closed = True
            self._data.changed.notify_all()

    def raise_if_told(self, operation: str) -> None:
        """Raise what `fail` asked for. For the watch, which shares its client's failures."""
        if failure := self._failure(operation):
            raise failure[0]

    def _expect(self, key: str, revision: int) -> None:
        current = self._data.entries.get(key)
        if current is None or current.revision != revision:
            raise Changed(key, self._with_ttl(current))

    def _with_ttl(self, entry: Entry | None) -> Entry | None:
        return None if entry is None else self._timed(entry)

    def _timed(self, entry: Entry) -> Entry:
        """Filled in by the lease, not by the key: an entry read earlier may have been replaced meanwhile."""
        if entry.lease is None:
            return replace(entry, ttl=None)
        current = self._data.entries.get(entry.key)
        alive = current is not None and current.lease == entry.lease
        return replace(entry, ttl=self._data.expiry[entry.key] - self._data.clock.now() if alive else 0.0)

    def _failure(self, operation: str) -> tuple[Exception, bool] | None:
        names = (operation,) if operation == "event" else (operation, "*")
        for name in names:
            if plan := self._failures.get(name):
                return plan.popleft()
        return None

    def _do(self, operation: str, act: Callable[[], T]) -> T:
        with self._data.changed:
            self.calls.append(operation)
            self._data.expire()
            failure = self._failure(operation)
            if failure is None:
                return act()
            error, after_effect = failure
            if after_effect:
                try:
                    act()
                except Conflict:
                    pass  # this answer is lost too
            raise error


class MemoryWatch:
    """Events after a revision, from the shared history."""

    def __init__(self, client: MemoryStore, data: _Data, prefix: str, after: int) -> None:
        self._client = client
        self._data = data
        self._prefix = prefix
        self._seen = after
        self._ended = False

    def __iter__(self) -> MemoryWatch:
        return self

    def __next__(self) -> Event:
        with self._data.changed:
            waited = 0.0
            while not (self._ended or self._client.closed):
                self._client.raise_if_told("event")
                self._data.expire()
                if self._seen < self._data.compacted:
                    self._ended = True
                    return Compacted(self._data.compacted)
                history = self._data.history
                for event in history[bisect_right(history, self._seen, key=_revision) :]:
                    self._seen = _revision(event)
                    if _key(event).startswith(self._prefix):
                        return event
                if waited >= PROGRESS_SECONDS:
                    return Progress(self._data.revision)
                self._data.changed.wait(LOOK_SECONDS)
                waited += LOOK_SECONDS
            raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._data.changed:
            self._ended = True
            self._data.changed.notify_all()


def _check(key: str, value: bytes) -> None:
    if not key:
        raise Invalid("the store refuses an empty key")
    if len(value) > MAX_VALUE:
        raise Invalid(f"the store refuses a value of {len(value)} bytes for {key}, at most {MAX_VALUE}")


def _key(event: Put | Delete) -> str:
    return event.entry.key if isinstance(event, Put) else event.key


def _revision(event: Put | Delete) -> int:
    return event.entry.revision if isinstance(event, Put) else event.revision

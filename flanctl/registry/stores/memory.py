"""The store in memory: a fake that passes the same contract tests as etcd, and can fail on request.

store = MemoryStore(clock)
other = store.another()                                  # a second client of the same data
other.fail("create", RegistryUnreachable("no answer"), after_effect=True)   # written, but the answer is lost
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

from flanctl.clock import BootClock
from flanctl.registry.stores.store import (
    Changed,
    Compacted,
    Delete,
    Entry,
    Event,
    KeyExists,
    Progress,
    Put,
    Snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from flanctl.clock import Clock

T = TypeVar("T")

LOOK_SECONDS = 0.05
"""Real time between two looks of a waiting watch: a fake clock's expiry rings no bell."""
PROGRESS_SECONDS = 1.0


@dataclass(slots=True)
class _Data:
    """What all clients of one store share. Everything happens under `changed`."""

    clock: Clock
    entries: dict[str, Entry] = field(default_factory=dict)
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
        self.history.append(Put(replace(entry, ttl=None)))
        self.changed.notify_all()
        return entry

    def remove(self, key: str) -> None:
        self.revision += 1
        del self.entries[key]
        self.expiry.pop(key, None)
        self.history.append(Delete(key, self.revision))
        self.changed.notify_all()

    def expire(self) -> None:
        now = self.clock.now()
        for key in sorted(key for key, end in self.expiry.items() if end <= now):
            self.remove(key)


class MemoryStore:
    """See stores/store.py for what each call promises."""

    name = "memory"

    def __init__(self, clock: Clock | None = None, *, _data: _Data | None = None) -> None:
        self._data = _data or _Data(clock or BootClock())
        self._failures: dict[str, deque[tuple[Exception, bool]]] = {}
        self.calls: list[str] = []
        """Every operation asked of this client, for tests that count."""

    def another(self) -> MemoryStore:
        """A second client of the same data, with failures of its own."""
        return MemoryStore(_data=self._data)

    def fail(self, operation: str, error: Exception, *, times: int = 1, after_effect: bool = False) -> None:
        """Let the next `times` calls of `operation` raise; with `after_effect` the work is done all the same.

        `*` stands for any operation. Failures of one operation are used up in the order they were asked for.
        """
        self._failures.setdefault(operation, deque()).extend([(error, after_effect)] * times)

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

    def list(self, prefix: str) -> Snapshot:
        def act() -> Snapshot:
            found = sorted(key for key in self._data.entries if key.startswith(prefix))
            entries = tuple(replace(self._data.entries[key], ttl=None) for key in found)
            return Snapshot(entries, self._data.revision)

        return self._do("list", act)

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        def act() -> tuple[Entry, ...]:
            return tuple(self._timed(entry) for entry in entries)

        return self._do("with_ttl", act)

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        def act() -> Entry:
            if key in self._data.entries:
                raise KeyExists(key, self._with_ttl(self._data.entries[key]))
            return self._data.put(key, value, ttl)

        return self._do("create", act)

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        def act() -> Entry:
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
            if current.lease is None:
                return self._data.put(entry.key, current.value, ttl)
            self._data.expiry[entry.key] = self._data.clock.now() + ttl
            renewed = replace(current, ttl=ttl)
            self._data.entries[entry.key] = renewed
            return renewed

        return self._do("refresh", act)

    def watch(self, prefix: str, *, after: int) -> MemoryWatch:
        return self._do("watch", lambda: MemoryWatch(self._data, prefix, after))

    def close(self) -> None:
        """Nothing to let go of: watches end by themselves when they are closed."""

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

    def _do(self, operation: str, act: Callable[[], T]) -> T:
        with self._data.changed:
            self.calls.append(operation)
            self._data.expire()
            waiting = self._failures.get(operation) or self._failures.get("*")
            if not waiting:
                return act()
            error, after_effect = waiting.popleft()
            if after_effect:
                act()
            raise error


class MemoryWatch:
    """Events after a revision, from the shared history."""

    def __init__(self, data: _Data, prefix: str, after: int) -> None:
        self._data = data
        self._prefix = prefix
        self._seen = after
        self._closed = False
        self._ended = False

    def __iter__(self) -> MemoryWatch:
        return self

    def __next__(self) -> Event:
        with self._data.changed:
            waited = 0.0
            while not (self._closed or self._ended):
                self._data.expire()
                if self._seen < self._data.compacted:
                    self._ended = True
                    return Compacted(self._data.compacted)
                for event in self._data.history:
                    key, revision = _of(event)
                    if revision <= self._seen:
                        continue
                    self._seen = revision
                    if key.startswith(self._prefix):
                        return event
                self._seen = max(self._seen, self._data.revision)
                if waited >= PROGRESS_SECONDS:
                    return Progress(self._seen)
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
            self._closed = True
            self._data.changed.notify_all()


def _of(event: Put | Delete) -> tuple[str, int]:
    """Key and revision."""
    return (event.entry.key, event.entry.revision) if isinstance(event, Put) else (event.key, event.revision)

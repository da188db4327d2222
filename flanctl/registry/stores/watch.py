"""What every watch on an etcd does alike: resume after the last revision, find a member, doubt one that only says yes.

A watch of one store says how a stream is opened and read; here is what an answer means and what follows a failure.
"""

from __future__ import annotations

import abc
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from flanctl.registry.stores import http
from flanctl.registry.stores.store import Compacted, Delete, Entry, Event, Progress, Put, Unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from flanctl.errors import FlanctlError
    from flanctl.registry.stores.endpoints import Endpoint


class Owner(Protocol):
    """What a watch needs of its store."""

    @property
    def timeout(self) -> float: ...
    @property
    def endpoints(self) -> tuple[Endpoint, ...]: ...
    def first(self) -> int: ...
    def forget(self, watch: ResumingWatch) -> None: ...
    def unreachable(
        self, what: str, refusals: Mapping[Endpoint, http.Refusal], seconds: float
    ) -> FlanctlError: ...


_BACK_OFF = (0.1, 2.0)
"""Seconds between two tries to open a watch, first and longest."""

PROVEN = 2.0
"""Seconds a watch must live before its mere existence counts. One that is accepted and ended again and again is none."""


@dataclass(frozen=True, slots=True)
class Change:
    """One event. `item` holds the key; for a deleted one nothing else of it counts."""

    item: Entry | Unreadable
    revision: int
    deleted: bool


class ResumingWatch(abc.ABC):
    """Iterate in one thread; `close` from any. See store.py for what a Watch promises."""

    def __init__(self, store: Owner, prefix: str, after: int) -> None:
        self._owner = store
        self._prefix = prefix
        self._what = f"watch {prefix}"
        self._last = after
        """The highest revision of which everything was taken in."""
        self._ready: deque[Event] = deque()
        self._over = False
        self._turn = store.first()
        self._lost: float | None = time.monotonic()
        """Since when no member serves us (time.monotonic); None while one does."""
        self._opened: float | None = None
        """Since when a member has said that we have a watch."""
        self._back_off = 0.0
        self._refusals: dict[Endpoint, http.Refusal] = {}

    def __iter__(self) -> Self:
        return self

    @abc.abstractmethod
    def __next__(self) -> Event: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None: ...

    @abc.abstractmethod
    def _drop(self) -> None:
        """Let go of the stream."""

    @abc.abstractmethod
    def _pause(self, seconds: float) -> None:
        """Wait, or less when somebody closes the watch."""

    # a member to ask

    @property
    def _endpoint(self) -> Endpoint:
        return self._owner.endpoints[self._turn % len(self._owner.endpoints)]

    def _begin(self) -> float:
        """The seconds the next member may take to give us a watch."""
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
        left = self._lost + self._owner.timeout - now
        count = len(self._owner.endpoints)
        return max(0.1, min(left, http.patience(self._owner.timeout, count)))

    def _fail(self, endpoint: Endpoint, refusal: http.Refusal) -> None:
        """A member does not serve us now: try the next, more and more slowly, and give up after `timeout`.

        Raises what the store says then; who iterates on has us try again.
        """
        self._drop()
        now = time.monotonic()
        if self._opened is not None and now - self._opened >= PROVEN:
            self._heard()
        self._opened = None
        http.note(self._refusals, endpoint, refusal)
        self._turn += 1
        if self._lost is None:
            self._lost = now
        endpoints = self._owner.endpoints
        gone = now - self._lost
        only_grpc = all(at in self._refusals and self._refusals[at].kind == "grpc" for at in endpoints)
        if gone >= self._owner.timeout or only_grpc:
            self._lost = now
            raise self._owner.unreachable(self._what, self._refusals, gone) from None
        if self._back_off == 0.0 or self._turn % len(endpoints) == 0:
            self._back_off = min(max(_BACK_OFF[0], self._back_off * 2), _BACK_OFF[1])
        self._pause(min(self._back_off, self._owner.timeout - gone))

    def _heard(self) -> None:
        """Proof that the member serves us: it told something new, or stayed for a while."""
        self._lost = None
        self._back_off = 0.0
        self._refusals.clear()

    # what it says

    def _take(self, changes: Sequence[Change], revision: int = 0) -> None:
        """Hand out what is new; `revision` is one up to which everything has been told."""
        if self._opened is None:
            self._opened = time.monotonic()
        seen = last = self._last
        for change in changes:
            if change.revision <= seen:
                continue  # handed out before the stream was opened again
            last = max(last, change.revision)
            if isinstance(change.item, Unreadable):
                continue
            self._ready.append(
                Delete(change.item.key, change.revision) if change.deleted else Put(change.item)
            )
        self._last = max(last, revision)
        if self._last > seen:
            self._heard()

    def _alive(self) -> None:
        """A sign of life without news."""
        self._ready.append(Progress(self._last))

    def _forgotten(self, at: int) -> None:
        """The member cannot tell all that happened: the reader lists again."""
        self._ready.append(Compacted(at))
        self._over = True
        self._drop()

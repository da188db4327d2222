"""A watch read from one member's HTTP answer, in the thread that iterates; there is no other thread."""

from __future__ import annotations

import abc
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

from flanctl.registry.stores import http
from flanctl.registry.stores.watch import Owner, ResumingWatch

if TYPE_CHECKING:
    from flanctl.registry.stores.endpoints import Endpoint
    from flanctl.registry.stores.store import Event

PROBE_EVERY, PROBE_WAIT = 3.0, 2.0
"""Seconds between two looks at the member a watch hangs on, and how long it may take to answer one."""

GATHER = 0.1
"""Seconds in which what follows upon an event is let come together and then read at once: at fifty changes a second to be
woken for each costs several times what the change itself does. An event that comes alone is not kept waiting."""
_MOMENT = 0.001
"""Seconds that what is there may take to be read."""

_CLOSE_WAIT = 0.5
"""Seconds `close` waits for the thread that iterates to be out (a signal handler closes inside that very thread)."""


class Prober(Owner, Protocol):
    """A store that can ask a member whether it serves."""

    @property
    def lock(self) -> threading.Lock: ...
    def probe(self, endpoint: Endpoint, cancel: int) -> None: ...


class HttpWatch(ResumingWatch):
    """The answer is silent while nothing happens, so its member is asked for its health every 3 s on a connection of its own.

    A member that does not answer is left for the next one. An eventfd ends every wait when somebody closes the watch.
    """

    def __init__(self, store: Prober, prefix: str, after: int) -> None:
        super().__init__(store, prefix, after)
        self._store = store
        self._stream: http.Connection | None = None
        self._text = bytearray()
        self._scanned = 0
        self._next_probe = 0.0
        self._read_at = -math.inf
        """When an event was waited for and came."""
        self._gather = GATHER
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._busy = threading.Lock()

    def close(self) -> None:
        self._closed = True
        with self._store.lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        # Whoever iterates wakes up and frees everything; if nobody does, it is for us to do.
        if self._busy.acquire(timeout=_CLOSE_WAIT):
            try:
                self._free()
            finally:
                self._busy.release()

    def __next__(self) -> Event:
        with self._busy:
            try:
                while not self._closed:
                    if self._ready:
                        return self._ready.popleft()
                    if self._over:
                        break
                    if self._stream is None:
                        self._open()
                    else:
                        self._step(self._stream)
            except http.Cancelled:
                pass
            finally:
                if self._closed or (self._over and not self._ready):
                    self._free()
            raise StopIteration

    @abc.abstractmethod
    def _connect(self, endpoint: Endpoint, deadline: float) -> http.Connection | None:
        """The stream of a new watch; None if what came instead was understood. Raises http.Refusal, TimeoutError."""

    @abc.abstractmethod
    def _line(self, line: bytes) -> None:
        """One message of the stream. Raises http.Refusal for one that no etcd sends."""

    @abc.abstractmethod
    def _ended(self, stream: http.Connection) -> None:
        """The answer is complete."""

    # inside; `_busy` is held

    def _free(self) -> None:
        self._drop()
        self._ready.clear()
        with self._store.lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
        self._closed = True
        self._store.forget(self)

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._text.clear()
        self._scanned = 0

    def _pause(self, seconds: float) -> None:
        http.sleep(seconds, self._wake)

    def _open(self) -> None:
        endpoint, patience = self._endpoint, self._begin()
        deadline = time.monotonic() + patience
        try:
            self._stream = self._connect(endpoint, deadline)
            self._next_probe = time.monotonic() + PROBE_EVERY
            while self._opened is None and self._stream is not None and not self._ready and not self._over:
                self._read(self._stream, deadline)
        except TimeoutError:
            self._fail(endpoint, http.Refusal(f"no answer in {patience:.1f}s", kind="silent"))
        except http.Refusal as refusal:
            self._fail(endpoint, refusal)
        except http.Unreachable as error:  # from logging in
            self._fail(endpoint, http.Refusal(error.message))

    def _step(self, stream: http.Connection) -> None:
        """Read until an event or the time of the next probe."""
        now = time.monotonic()
        rest = self._read_at + self._gather - now
        try:
            if rest > 0:
                try:
                    self._read(stream, now + _MOMENT)
                    return
                except TimeoutError:  # nothing more is there yet
                    http.sleep(rest, self._wake)
            self._read(stream, self._next_probe)
            self._read_at = time.monotonic()
            return
        except http.Refusal as refusal:
            self._fail(stream.endpoint, refusal)
            return
        except TimeoutError:
            pass
        try:
            self._store.probe(stream.endpoint, self._wake)
        except http.Refusal as refusal:
            self._fail(stream.endpoint, refusal)
            return
        self._next_probe = time.monotonic() + PROBE_EVERY
        self._alive()

    def _read(self, stream: http.Connection, deadline: float) -> None:
        """One piece of the stream and what is complete with it: one JSON document a line."""
        piece = stream.piece(deadline)
        if not piece:
            self._ended(stream)
            return
        self._text += piece
        if len(self._text) > http.MAX_BODY:
            raise http.Refusal("sends an endless message")
        while (end := self._text.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._text[:end])
            del self._text[: end + 1]
            self._scanned = 0
            if line.strip():
                self._line(line)
                if self._stream is None or self._over:
                    return
        self._scanned = len(self._text)

"""A clock that moves by hand."""

from __future__ import annotations

import threading


class FakeClock:
    """`flanctl.clock.Clock` for tests: `advance` moves time and wakes whoever's wait is over."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._changed = threading.Condition()
        self.waiting = 0
        """How many threads wait now."""

    def now(self) -> float:
        with self._changed:
            return self._now

    def advance(self, seconds: float) -> None:
        with self._changed:
            self._now += seconds
            self._changed.notify_all()

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Looks at `stop` every few real milliseconds: an Event cannot ring our condition."""
        with self._changed:
            end = self._now + seconds
            self.waiting += 1
            try:
                while not stop.is_set() and self._now < end:
                    self._changed.wait(0.005)
            finally:
                self.waiting -= 1
        return stop.is_set()

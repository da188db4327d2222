"""Signals as messages: SIGTERM and SIGINT stop, SIGUSR1 shows counters, SIGHUP has us look at the machine."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flanctl.agent.messages import Reload, ShowCounters, Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(Exception):
    """Raised by the handler while the start waits for the registry."""


class Signals:
    """`post` takes the messages; it must be safe in a signal handler, as SimpleQueue.put is."""

    def __init__(self, post: Callable[[Stop | ShowCounters | Reload], None]) -> None:
        self._post = post
        self._interruptible = False
        self.stop_reason: str | None = None
        """The name of the signal that wants us to end."""

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Ours for a while; the former handlers come back."""
        before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for the registry during the start: a stop ends it at once, by StopRequested."""
        self._interruptible = True
        try:
            if self.stop_reason is not None:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number in {signal.SIGUSR1, signal.SIGHUP}:
            self._post(ShowCounters() if number == signal.SIGUSR1 else Reload())
            return
        self.stop_reason = signal.Signals(number).name
        self._post(Stop(self.stop_reason))
        if self._interruptible:
            self._interruptible = False  # a second signal must not break into the stop
            raise StopRequested

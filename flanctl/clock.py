"""Time as the agent sees it: seconds since boot, suspend included, and waits that a stop ends.

Leases run on the registry's clock, so what we keep is an amount of time, never a date. CLOCK_MONOTONIC stands
still while the machine sleeps and would let a lease lapse unseen; CLOCK_BOOTTIME does not (flannel issue 29).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import threading


class Clock(Protocol):
    """What the code that waits needs to know. `FakeClock` in tests/support moves by hand."""

    def now(self) -> float:
        """Seconds since boot, including time asleep."""
        ...

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Wait until `stop` is set (True) or `seconds` have passed (False)."""
        ...


class BootClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Event.wait counts CLOCK_MONOTONIC; looking again every 5 s notices a suspend that soon after it."""
        deadline = self.now() + seconds
        while (left := deadline - self.now()) > 0:
            if stop.wait(min(left, 5.0)):
                return True
        return stop.is_set()

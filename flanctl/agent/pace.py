"""So many at once, and after that one every so often: a registry that changes all the time must not own the CPU.

pace = Pace(clock, burst=20, seconds=0.5)
if pace.due() <= clock.now():
    pace.take()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flanctl.clock import Clock


class Pace:
    """A token bucket: full at first with `burst`, one more every `seconds`. For one thread."""

    def __init__(self, clock: Clock, *, burst: int, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._room = (burst - 1) * seconds
        self._due = clock.now() - self._room

    def due(self) -> float:
        """When the next may be taken; a moment of the clock, past or future."""
        return self._due

    def take(self) -> None:
        self._due = max(self._due, self._clock.now() - self._room) + self._seconds

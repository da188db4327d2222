"""Named workers: each one blocking call, one way to be stopped, and an end that is never silent.

crew = Crew(inbox.put)
crew.start("peer watch", follower.run, follower.stop)
...
late = crew.stop(seconds=3)
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker ended by an exception, or ended though nobody asked it to (error None)."""

    name: str
    error: BaseException | None


class Crew:
    """Threads that report how they end. Start them from one thread; stopping twice is fine."""

    def __init__(self, post: Callable[[WorkerFailed], None]) -> None:
        self._post = post
        self._members: list[tuple[threading.Thread, Callable[[], None]]] = []
        self._stopping = threading.Event()

    def start(self, name: str, run: Callable[[], None], stop: Callable[[], None]) -> None:
        """Run `run` in a thread of that name; `stop` must make it return soon, from any thread."""

        def watched() -> None:
            error: BaseException | None = None
            try:
                run()
            except BaseException as failure:  # whatever it was, the daemon must hear of it
                error = failure
            if error is not None or not self._stopping.is_set():
                self._post(WorkerFailed(name, error))

        thread = threading.Thread(target=watched, name=name, daemon=True)
        self._members.append((thread, stop))
        thread.start()

    def stop(self, *, seconds: float) -> tuple[str, ...]:
        """Ask all to end and wait, `seconds` in total. The names of those that did not."""
        self._stopping.set()
        for _, stop in self._members:
            stop()
        deadline = time.monotonic() + seconds
        for thread, _ in self._members:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = tuple(thread.name for thread, _ in self._members if thread.is_alive())
        self._members.clear()
        return late

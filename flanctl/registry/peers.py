"""Following every host's lease: list at revision R, watch from R, list again now and then, never half a picture.

    follower = Follower(leases, inbox.put)      # posts PeersChanged; then ask follower.table()
    follower.run()                              # until stop()

Events only update what is known here and post one mark, until the table has been fetched: a burst of five thousand
events is one mark and one table. A key that cannot be read is kept aside and hides no other (flannel drops every
route for it). Listing again every ten minutes finds what a silent watch missed.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError
from flanctl.model.lease import Lease
from flanctl.registry.leases import LeaseTable, RegistryBack, RegistryTrouble, table_of
from flanctl.registry.stores.store import Compacted, Delete, Put

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanctl.registry.leases import Leases, UnreadableLease
    from flanctl.registry.stores.store import Event, Watch

RELIST_SECONDS = 600.0
FIRST_RETRY, LAST_RETRY = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class PeersChanged:
    """Fetch the follower's table: it is complete and differs from the one fetched before."""


FollowerReport = PeersChanged | RegistryTrouble | RegistryBack


class Follower:
    """One worker that knows all leases. `run` in its own thread; `table` and `stop` from any."""

    def __init__(
        self,
        leases: Leases,
        post: Callable[[FollowerReport], None],
        *,
        relist_seconds: float = RELIST_SECONDS,
    ) -> None:
        self._leases = leases
        self._clock = leases.clock
        self._post = post
        self._relist_seconds = relist_seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._known: dict[str, Lease | UnreadableLease] = {}
        self._revision = 0
        self._listed = False
        self._marked = False
        self._watch: Watch | None = None

    def table(self) -> LeaseTable:
        """Everything known now. Only after the first PeersChanged; it is never half a list."""
        with self._lock:
            self._marked = False
            return table_of(self._known.values(), self._revision)

    def run(self) -> None:
        pause, tries, since, watch_failed = FIRST_RETRY, 0, 0.0, False

        def answers() -> None:
            nonlocal tries
            if tries:
                self._post(RegistryBack(self._clock.now() - since, tries))
                tries = 0

        while not self._stop.is_set():
            began, listed = self._clock.now(), False
            try:
                self._list()
                listed = True
                if not watch_failed:
                    answers()
                self._follow(answers)
                watch_failed = False
            except FlanctlError as error:
                if self._stop.is_set():
                    return
                # A server that lists but cannot watch is not back because it listed once more; and only a watch that
                # lived a while makes the next pause a short one again.
                watch_failed = listed
                now = self._clock.now()
                since = since if tries else now
                tries += 1
                self._post(RegistryTrouble(error, now - since))
                pause = FIRST_RETRY if now - began > LAST_RETRY else pause
                self._clock.wait(self._stop, pause * random.uniform(0.8, 1.2))  # noqa: S311
                pause = min(LAST_RETRY, pause * 2)

    def stop(self) -> None:
        """`run` returns soon; twice is fine."""
        self._stop.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()

    def _list(self) -> None:
        table = self._leases.table()
        if not table.leases and self._known:
            # A server that lost its data, or answers from nowhere, looks like everybody leaving at once: ask again.
            table = self._leases.table()
        known: dict[str, Lease | UnreadableLease] = {lease.key: lease for lease in table.leases}
        known.update({bad.key: bad for bad in table.unreadable})
        with self._lock:
            first = not self._listed
            changed = known.keys() != self._known.keys() or any(
                not _same(self._known[key], one) for key, one in known.items()
            )
            self._known = known
            self._revision = table.revision
            self._listed = True
        if first or changed:
            self._mark()

    def _follow(self, answers: Callable[[], None]) -> None:
        """Watch until it is time to list again, the store forgot our revision, or something breaks."""
        with self._leases.store.watch(self._leases.folder, after=self._revision) as watch:
            with self._lock:
                self._watch = watch
            if self._stop.is_set():  # it came before there was a watch it could close
                return
            over = threading.Event()
            alarm = threading.Thread(
                target=self._relist_later, args=(watch, over), name="peer relist", daemon=True
            )
            alarm.start()
            try:
                for event in watch:
                    answers()
                    if isinstance(event, Compacted) or self._stop.is_set():
                        return
                    if self._take(event):
                        self._mark()
            finally:
                with self._lock:
                    self._watch = None
                over.set()
                alarm.join()

    def _relist_later(self, watch: Watch, over: threading.Event) -> None:
        """End the watch when it is time to list again: a watch that died without a word wakes nobody."""
        seconds = self._relist_seconds * random.uniform(0.9, 1.1)  # noqa: S311
        if not self._clock.wait(over, seconds):
            watch.close()

    def _take(self, event: Event) -> bool:
        """True if what is known changed. A renewal that writes the same value anew changes nothing for us."""
        with self._lock:
            if isinstance(event, Put):
                found = self._leases.read(event.entry)
                before = self._known.get(event.entry.key)
                self._known[event.entry.key] = found
                self._revision = event.entry.revision
                return not _same(before, found)
            if isinstance(event, Delete):
                self._revision = event.revision
                return self._known.pop(event.key, None) is not None
            return False

    def _mark(self) -> None:
        with self._lock:
            if self._marked:
                return
            self._marked = True
        self._post(PeersChanged())


def _same(before: Lease | UnreadableLease | None, after: Lease | UnreadableLease) -> bool:
    """Equal by what peers care about: not by revision, which every renewal moves."""
    if isinstance(before, Lease) and isinstance(after, Lease):
        return before.attributes == after.attributes
    return before == after

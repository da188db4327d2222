"""What happens to leases, told in order, each change once: what `flanctl subnets watch` prints.

    changes = Changes(leases, print)
    changes.run()                # Listed, then Change after Change, until stop()
    changes.run(after=48211)     # goes on where somebody stopped reading; nothing is told twice

An outage is told (Lost, Back) and survived: the watch goes on after the last revision that was told. Where the registry
has forgotten what came after it, everything is listed again and the differences are told as changes with `resync`.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError, RegistryUnreachable
from flanctl.model.lease import Lease
from flanctl.registry.stores.store import Compacted, Delete, Forgotten, Put

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanctl.registry.leases import Leases, LeaseTable, UnreadableLease
    from flanctl.registry.stores.store import Entry, Snapshot, Watch

FIRST_RETRY, LAST_RETRY = 0.1, 5.0
"""Seconds between two tries to reach the registry again."""
LATE = 1.0
"""Seconds by which what we know of a lease's end may be late: the answer with its TTL was under way."""
ASK_SHARE, ASK_BURST, ASK_FEW = 0.5, 2.0, 10
"""Of the reader's time, at most so much goes into questions for TTLs, averaged over so many seconds, so many questions at once.
Else who reads from a slow member falls ever further behind the changes."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Everything there is, with TTLs. `resync`: what came before it was forgotten, so no differences are known."""

    table: LeaseTable
    resync: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one key below `subnets/`.

    `what`: added; moved (another public IP); changed (other backend data, or a lease became a reservation or ceased
    to be one); renewed (written anew with the same value); removed; unreadable (the key or its value is no lease's).
    `after` is None once it is removed. `ttl` is in seconds, None for a reservation and where nobody could say.
    `expired`: the last end we knew of had passed when the key went; None if we knew of none.
    """

    what: str
    key: str
    revision: int
    before: Lease | UnreadableLease | None
    after: Lease | UnreadableLease | None
    ttl: float | None = None
    expired: bool | None = False
    resync: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """The registry does not answer; its last word came `silent` seconds ago."""

    error: FlanctlError
    silent: float


@dataclass(frozen=True, slots=True)
class Back:
    """It answers again, `after` seconds from its last word. At least `missed` subnets differ; the changes follow."""

    after: float
    missed: int


Report = Listed | Change | Lost | Back


@dataclass(frozen=True, slots=True)
class _Known:
    """One key as it was told last. `ends` is on our clock; None for a reservation and where it is not known."""

    entry: Entry
    found: Lease | UnreadableLease
    ends: float | None


class Changes:
    """One reader of one network's leases. `run` blocks; `stop` may be called from any thread.

    `idle` is called whenever the registry says that nothing happened. With `fail_on_loss` an outage ends `run` with
    its RegistryUnreachable.
    """

    def __init__(
        self,
        leases: Leases,
        report: Callable[[Report], None],
        *,
        idle: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
        fail_on_loss: bool = False,
    ) -> None:
        self.revision = 0
        """Everything up to here was told."""
        self._leases = leases
        self._clock = leases.clock
        self._report = report
        self._idle = idle
        self._progress = progress
        self._fail_on_loss = fail_on_loss
        self._known: dict[str, _Known] = {}
        self._heard = 0.0
        self._ask_at = 0.0
        """Before this moment no TTL is asked for."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._watch: Watch | None = None

    def run(self, *, after: int | None = None) -> None:
        """Tell until `stop`. Raises what the first list raises, and later NotPermitted and Invalid."""
        self._start(after)
        while not self._stop.is_set():
            try:
                self._follow()
                if not self._stop.is_set():  # compacted
                    for change in self._resync(self._list()):
                        self._report(change)
            except RegistryUnreachable as error:
                if self._stop.is_set():
                    return
                if self._fail_on_loss:
                    raise
                self._report(Lost(error, self._clock.now() - self._heard))
                self._come_back()

    def stop(self) -> None:
        """`run` returns soon; twice is fine."""
        self._stop.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()

    def _start(self, after: int | None) -> None:
        store, folder = self._leases.store, self._leases.folder
        if after is not None:
            try:
                self._know(store.list(folder, at=after))
            except Forgotten:
                pass
            else:
                return
        snapshot = self._list()
        self._know(snapshot)
        self._report(Listed(self._leases.read_all(snapshot), resync=after is not None))

    def _list(self) -> Snapshot:
        snapshot = self._leases.store.list(self._leases.folder)
        timed = self._leases.timed(snapshot.entries, self._progress)
        self._heard = self._clock.now()
        return replace(snapshot, entries=timed)

    def _know(self, snapshot: Snapshot) -> None:
        self._known = {entry.key: self._look_at(entry) for entry in snapshot.entries}
        self.revision = snapshot.revision
        self._heard = self._clock.now()

    def _look_at(self, entry: Entry) -> _Known:
        ends = None if entry.ttl is None else self._clock.now() + entry.ttl
        return _Known(entry, self._leases.read(entry), ends)

    def _follow(self) -> None:
        """Tell what the watch tells, until it is stopped or compacted, or breaks."""
        with self._leases.store.watch(self._leases.folder, after=self.revision) as watch:
            with self._lock:
                self._watch = watch
            if self._stop.is_set():  # it came before there was a watch it could close
                return
            try:
                for event in watch:
                    if self._stop.is_set() or isinstance(event, Compacted):
                        return
                    self._heard = self._clock.now()
                    if isinstance(event, Put):
                        self.revision = event.entry.revision
                        self._report(self._put(event.entry))
                    elif isinstance(event, Delete):
                        self.revision = event.revision
                        self._report(self._gone(event.key, event.revision))
                    else:
                        self.revision = max(self.revision, event.revision)
                        self._learn_ends()
                        self._idle()
            finally:
                with self._lock:
                    self._watch = None

    def _put(self, entry: Entry, *, resync: bool = False) -> Change:
        """A watch tells no TTL, so it is asked for; an event is told without it rather than late."""
        if entry.ttl is None and entry.lease is not None:
            for timed in self._ask([entry]):
                # 0: ended or replaced since; how long it was granted for, nobody can say any more.
                entry = replace(entry, ttl=timed.ttl or None)
        before, now = self._known.get(entry.key), self._look_at(entry)
        self._known[entry.key] = now
        was = None if before is None else before.found
        return Change(
            _what(was, now.found), entry.key, entry.revision, was, now.found, entry.ttl, resync=resync
        )

    def _gone(self, key: str, revision: int, *, resync: bool = False) -> Change:
        known = self._known.pop(key, None)
        if known is None:
            return Change("removed", key, revision, None, None, expired=None, resync=resync)
        expired: bool | None = False
        if known.entry.lease is not None:
            expired = None if known.ends is None else known.ends <= self._clock.now() + LATE
        return Change("removed", key, revision, known.found, None, expired=expired, resync=resync)

    def _learn_ends(self) -> None:
        """Ask when the leases end whose end we do not know, or knew: hosts renew without writing to the key."""
        now = self._clock.now()
        asked = [
            known.entry
            for known in self._known.values()
            if known.entry.lease is not None and (known.ends is None or known.ends <= now)
        ]
        for entry in self._ask(asked):
            self._known[entry.key] = self._look_at(entry)

    def _ask(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Those of them whose TTLs there is time to ask for; the next idle moment asks for the others."""
        timed: list[Entry] = []
        for start in range(0, len(entries), ASK_FEW):
            began = self._clock.now()
            if began < self._ask_at:
                break
            try:
                timed += self._leases.timed(entries[start : start + ASK_FEW])
            except FlanctlError:
                break  # an outage shows itself in the watch
            finally:
                took = self._clock.now() - began
                self._ask_at = max(self._ask_at, began - ASK_BURST) + took / ASK_SHARE
        return timed

    def _come_back(self) -> None:
        """Wait until the registry lists again; whether it still has what it had shows there."""
        pause = FIRST_RETRY
        while not self._clock.wait(self._stop, pause * random.uniform(0.8, 1.2)):  # noqa: S311
            silent_since = self._heard
            try:
                snapshot = self._leases.store.list(self._leases.folder)
                if self._known and not snapshot.entries:
                    # A server that lost its data, or answers from nowhere, looks like everybody leaving: ask again.
                    snapshot = self._leases.store.list(self._leases.folder)
                if lost_data := snapshot.revision < self.revision:
                    snapshot = replace(snapshot, entries=self._leases.timed(snapshot.entries))
            except RegistryUnreachable:
                pause = min(LAST_RETRY, pause * 2)
                continue
            self._heard = self._clock.now()
            missed = self._differences(snapshot)
            self._report(Back(self._heard - silent_since, missed))
            if lost_data:
                # It will never tell us of revisions after ours: what it holds now is all there is to know.
                for change in self._resync(snapshot):
                    self._report(change)
            return

    def _differences(self, snapshot: Snapshot) -> int:
        """How many keys are not what was told last, renewals left aside."""
        there = {entry.key: self._leases.read(entry) for entry in snapshot.entries}
        told = {key: known.found for key, known in self._known.items()}
        changed = sum(_what(told.get(key), found) != "renewed" for key, found in there.items())
        return changed + len(told.keys() - there.keys())

    def _resync(self, snapshot: Snapshot) -> Sequence[Change]:
        """From what was told last to `snapshot`, in the order of keys; renewals are no difference."""
        there = {entry.key: entry for entry in snapshot.entries}
        changes = []
        for key in sorted(self._known.keys() | there.keys()):
            if (entry := there.get(key)) is None:
                changes.append(self._gone(key, snapshot.revision, resync=True))
            else:
                changes.append(self._put(entry, resync=True))
        self.revision = snapshot.revision
        return [change for change in changes if change.what != "renewed"]


def _what(before: Lease | UnreadableLease | None, after: Lease | UnreadableLease) -> str:
    if not isinstance(after, Lease):
        return "renewed" if before == after else "unreadable"
    if not isinstance(before, Lease):
        return "added"
    if before.attributes.public_ip != after.attributes.public_ip:
        return "moved"
    same = before.attributes == after.attributes and before.reservation == after.reservation
    return "renewed" if same else "changed"

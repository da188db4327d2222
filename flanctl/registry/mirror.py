"""Two key spaces kept in step while hosts move from one to the other: `flanctl migrate v2-to-v3 --both` (decision 16).

    mirror = Mirror(v2, v3, report)            # two Leases of one prefix
    mirror.run()                               # until stop()

Each host writes to one side, and this copies what it writes to the other, in that side's bytes, with the time left. It is
driven by levels, not by events: a watch on each side only says when to look, and a look compares both sides with what was
the same at the last one. So a missed event, a lost race or an outage is made up for at the next look, at the latest a
minute later, which also lengthens the end of the copy of what its host renewed without a word.

Never taken from a host: a lease whose copy ended or was lost while nobody looked is copied back, not deleted.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError, Invalid
from flanctl.model.lease import Lease
from flanctl.registry.announcements import announcements
from flanctl.registry.config import config_key
from flanctl.registry.migration import SLACK, convert_config
from flanctl.registry.stores.store import Changed, KeyExists, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from ipaddress import IPv4Address

    from flanctl.registry.announcements import Announcement
    from flanctl.registry.leases import Leases
    from flanctl.registry.stores.store import Entry, Watch

LOOK_SECONDS = 60.0
"""Between two looks at how long leases last: v3 is asked once for each."""
NAMES = "v2", "v3"
FIRST_RETRY, LAST_RETRY = 0.2, 5.0
"""Seconds between two tries while a side does not answer."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A key was written, given a later end, or deleted on the side called `to`, as the other side has it.

    `what`: copied, renewed, deleted. `lease` is what is told of it; None for the config.
    """

    what: str
    to: str
    key: str
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class Clash:
    """The two sides say what cannot both be true; neither is touched."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Silent:
    """A side does not answer, or refuses us."""

    error: FlanctlError


@dataclass(frozen=True, slots=True)
class Answers:
    """Both sides answer again."""


@dataclass(frozen=True, slots=True)
class Where:
    """How many leases are kept by their hosts on which side, as far as that was seen; told when it changes."""

    kept_in: tuple[tuple[str, int], tuple[str, int]]
    leases: int


MirrorReport = Copied | Clash | Silent | Answers | Where


@dataclass(frozen=True, slots=True)
class _InStep:
    """One key when both sides were the same: their revisions, and when it ends (our clock; None: never)."""

    revisions: tuple[int, int]
    ends: float | None


class Mirror:
    """`run` blocks; `stop` may be called from any thread. `report` is called from the thread that runs it."""

    def __init__(self, one: Leases, two: Leases, report: Callable[[MirrorReport], None]) -> None:
        self._sides = one, two
        self._clock = one.clock
        self._report = report
        self._config_key = config_key(one.prefix)
        self._in_step: dict[str, _InStep] = {}
        self._revisions = [0, 0]
        self._announced: list[dict[IPv4Address, Announcement]] = [{}, {}]
        self._config: tuple[bytes, bytes] | None = None
        self._home: dict[str, int] = {}
        """The side on which a lease's host was last seen to do something."""
        self._told: Where | None = None
        self._clashes: dict[str, str] = {}
        self._bell = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._watches: list[Watch] = []

    @property
    def clashes(self) -> Mapping[str, str]:
        """What cannot be brought together, by key."""
        return self._clashes

    def run(self) -> None:
        watchers = [
            threading.Thread(target=self._follow, args=(side,), name=f"mirror {name}", daemon=True)
            for side, name in zip(self._sides, NAMES, strict=True)
        ]
        for watcher in watchers:
            watcher.start()
        try:
            self._run()
        finally:
            self.stop()
            for watcher in watchers:
                watcher.join()

    def stop(self) -> None:
        """`run` returns soon; twice is fine."""
        self._stop.set()
        self._bell.set()
        with self._lock:
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()

    def _run(self) -> None:
        next_look, pause = 0.0, FIRST_RETRY
        while not self._stop.is_set():
            self._bell.clear()
            began = self._clock.now()
            timed = began >= next_look
            try:
                self.look(timed=timed)
            except FlanctlError as error:
                if self._stop.is_set():
                    return
                self._report(Silent(error))
                self._clock.wait(self._stop, pause * random.uniform(0.8, 1.2))  # noqa: S311  spread, not secret
                pause, next_look = min(LAST_RETRY, pause * 2), 0.0
                continue
            if pause > FIRST_RETRY:
                self._report(Answers())
                pause = FIRST_RETRY
            now = self._clock.now()
            if timed:
                next_look = now + LOOK_SECONDS
            # A look at thousands of leases takes a while (2000: 0.3 s), and a storm of changes asks for many: at most
            # half of the time is spent on them.
            self._clock.wait(self._stop, now - began)
            self._clock.wait(self._bell, max(0.0, next_look - self._clock.now()))

    def _follow(self, side: Leases) -> None:
        """Ring for every change on one side. An outage is told by the looks, which meet it too."""
        pause = FIRST_RETRY
        while not self._stop.is_set():
            try:
                after = side.store.list(side.folder).revision
                self._bell.set()
                with side.store.watch(f"{side.prefix}/", after=after) as watch:
                    with self._lock:
                        self._watches.append(watch)
                    try:
                        for event in () if self._stop.is_set() else watch:
                            pause = FIRST_RETRY
                            if not isinstance(event, Progress):
                                self._bell.set()
                            if self._stop.is_set():
                                return
                    finally:
                        with self._lock:
                            self._watches.remove(watch)
            except FlanctlError:
                self._clock.wait(self._stop, pause)
                pause = min(LAST_RETRY, pause * 2)

    # ---- one look -------------------------------------------------------------------------------------------------

    def look(self, *, timed: bool) -> None:
        """Compare both sides and bring them in step. `timed`: also by how long leases last. Raises what stores raise."""
        if not self._look_at_config():
            return  # a side without the network's config has lost its memory: what is missing there was not deleted
        found = []
        for number, side in enumerate(self._sides):
            snapshot = side.store.list(side.folder)
            if snapshot.revision < self._revisions[number]:
                self._in_step.clear()  # restored from a backup: likewise
            self._revisions[number] = snapshot.revision
            entries = side.timed(snapshot.entries) if timed else snapshot.entries
            found.append({entry.key: entry for entry in entries})
        one, two = found
        for key in sorted(one.keys() | two.keys() | self._in_step.keys()):
            try:
                self._bring_together(key, (one.get(key), two.get(key)), timed=timed)
            except (KeyExists, Changed):
                self._bell.set()  # somebody wrote at the same moment: look again at once
            except Invalid as error:  # the other side cannot hold it; that hides no other key
                self._clash(key, error.message)
        self._look_at_announcements(one | two)
        self._count({key for key, entry in (one | two).items() if entry.lease is not None})

    def _bring_together(self, key: str, now: tuple[Entry | None, Entry | None], *, timed: bool) -> None:
        before = self._in_step.get(key)
        one, two = now
        if one is None and two is None:
            self._in_step.pop(key, None)
            self._home.pop(key, None)
            self._clashes.pop(key, None)
            return
        if one is not None and two is not None:
            if before is not None and before.revisions == (one.revision, two.revision):
                if timed:
                    self._same_end(key, one, two)
                return
            self._compare(key, one, two)
            return
        # One side alone has it: the other never had, lost it, or had it deleted.
        side = 0 if one is not None else 1
        entry = one or two
        assert entry is not None
        if before is not None and before.revisions[side] == entry.revision and self._was_deleted(before):
            self._delete(key, side, entry)
        else:
            self._home[key] = side
            self._copy(key, side, entry, None)

    def _was_deleted(self, before: _InStep) -> bool:
        """Whether what is gone was taken away before its time: that is meant. What ended by itself is not."""
        return before.ends is None or self._clock.now() < before.ends - SLACK

    def _compare(self, key: str, one: Entry, two: Entry) -> None:
        """Both sides have the key and something is new: the host's word is the one that lasts longer, or changed."""
        leases = [side.read(entry) for side, entry in zip(self._sides, (one, two), strict=True)]
        if not (isinstance(leases[0], Lease) and isinstance(leases[1], Lease)):
            self._clash(
                key, f"{key} cannot be read in {self._name(0 if isinstance(leases[1], Lease) else 1)}"
            )
            return
        holders = [lease.attributes.public_ip for lease in leases if isinstance(lease, Lease)]
        if holders[0] != holders[1]:
            self._clash(
                key,
                f"{leases[0].subnet} is {holders[0]}'s in {self._name(0)} and {holders[1]}'s in {self._name(1)}",
            )
            return
        before = self._in_step.get(key)
        changed = (
            (before is None or before.revisions[0] != one.revision),
            (before is None or before.revisions[1] != two.revision),
        )
        one, two = self._with_ttl(0, one), self._with_ttl(1, two)
        if changed[0] != changed[1]:
            newer = self._home[key] = changed.index(True)
        else:
            newer = 1 if _ends(two) > _ends(one) + SLACK else 0
        self._copy(key, newer, (one, two)[newer], (one, two)[1 - newer])

    def _same_end(self, key: str, one: Entry, two: Entry) -> None:
        """Hosts renew without a word: the copy gets the later end too."""
        if _end_together(one, two) or one.ttl == 0 or two.ttl == 0:
            return
        newer = self._home[key] = 0 if _ends(one) > _ends(two) else 1
        self._copy(key, newer, (one, two)[newer], (one, two)[1 - newer])

    def _copy(self, key: str, side: int, entry: Entry, there: Entry | None) -> None:
        """What stands on `side` to the other, where `there` stands now."""
        lease = self._sides[side].read(entry)
        if not isinstance(lease, Lease):
            self._clash(key, f"{key} in {self._name(side)} cannot be read: {lease.message}")
            return
        other = self._sides[1 - side]
        value = lease.attributes.format(other.dialect)
        entry = self._with_ttl(side, entry)
        if entry.ttl == 0:
            return  # it ended just now
        if there is not None and there.value == value and _end_together(entry, there):
            self._remember(key, side, entry, there)
            return
        if there is None:
            written = other.store.create(key, value, ttl=entry.ttl)
        else:
            written = other.store.replace(key, value, ttl=entry.ttl, expected=there.revision)
        self._remember(key, side, entry, written)
        same = there is not None and there.value == value
        self._report(Copied("renewed" if same else "copied", self._name(1 - side), key, lease))

    def _delete(self, key: str, side: int, entry: Entry) -> None:
        """It was taken away on the other side, so it goes here too."""
        self._sides[side].store.delete(key, expected=entry.revision)
        self._in_step.pop(key, None)
        self._home.pop(key, None)
        found = self._sides[side].read(entry)
        self._report(Copied("deleted", self._name(side), key, found if isinstance(found, Lease) else None))

    def _remember(self, key: str, side: int, entry: Entry, other: Entry) -> None:
        ends = None if entry.lease is None else self._clock.now() + (entry.ttl or 0.0)
        pair = (entry.revision, other.revision)
        self._in_step[key] = _InStep(pair if side == 0 else (pair[1], pair[0]), ends)
        self._clashes.pop(key, None)

    def _with_ttl(self, side: int, entry: Entry) -> Entry:
        if entry.lease is None or entry.ttl is not None:
            return entry
        (timed,) = self._sides[side].store.with_ttl([entry])
        return timed

    def _look_at_config(self) -> bool:
        """A changed config goes to the other side. False if a side has none, which is never carried over."""
        key = self._config_key
        one, two = (side.store.get(key) for side in self._sides)
        if one is None or two is None:
            self._clash(
                key, f"{key} is not in {self._name(0 if one is None else 1)}, so nothing is carried over"
            )
            return False
        values = one.value, two.value
        before = self._config or values
        self._config = before
        changed = values[0] != before[0], values[1] != before[1]
        if all(changed):
            self._clash(key, f"{key} was changed on both sides")
        elif any(changed):
            side = changed.index(True)
            self._carry_config(side, values[side], (one, two)[1 - side])
        else:
            self._clashes.pop(key, None)
        return True

    def _carry_config(self, side: int, value: bytes, there: Entry) -> None:
        source, other = self._sides[side], self._sides[1 - side]
        try:
            said = convert_config(value, source.dialect, other.dialect, self._config_key)
            other.store.replace(self._config_key, said, ttl=None, expected=there.revision)
        except Changed:
            self._bell.set()
            return
        except Invalid as error:
            self._clash(self._config_key, error.message)
            return
        self._config = (value, said) if side == 0 else (said, value)
        self._clashes.pop(self._config_key, None)
        self._report(Copied("copied", self._name(1 - side), self._config_key, None))

    def _look_at_announcements(self, entries: Mapping[str, Entry]) -> None:
        """Where a flanctl agent announced itself last, its lease is kept: by keep-alives, which change no key."""
        for number, side in enumerate(self._sides):
            before, now = self._announced[number], announcements(side.store, side.prefix)
            new = {public_ip for public_ip, words in now.items() if before.get(public_ip) != words}
            self._announced[number] = now
            for key, entry in entries.items() if new else ():
                lease = self._sides[number].read(entry)
                if isinstance(lease, Lease) and lease.attributes.public_ip in new:
                    self._home[key] = number

    def _clash(self, key: str, why: str) -> None:
        if self._clashes.get(key) != why:
            self._clashes[key] = why
            self._report(Clash(key, why))

    def _count(self, keys: set[str]) -> None:
        homes = [side for key, side in self._home.items() if key in keys]
        names = self._name(0), self._name(1)
        where = Where(((names[0], homes.count(0)), (names[1], homes.count(1))), len(keys))
        if where != self._told:
            self._told = where
            self._report(where)

    @staticmethod
    def _name(side: int) -> str:
        return NAMES[side]


def _ends(entry: Entry) -> float:
    """Seconds left, for comparing: a reservation lasts longest."""
    if entry.lease is None:
        return float("inf")
    return entry.ttl or 0.0


def _end_together(one: Entry, two: Entry) -> bool:
    if one.lease is None or two.lease is None:
        return one.lease is two.lease
    return abs(_ends(one) - _ends(two)) <= SLACK

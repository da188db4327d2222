"""What flanctl hosts tell each other beside flannel's keys: `<prefix>/flanctl/hosts/<public-ip>`.

flannel never looks there, so its own keys stay byte-equal. The announcement lives as long as the lease and says
which program, version and data path a host runs, its name, and two random words that unmask another machine with our
address: `instance`, kept in the state directory, and `run`, this process's (a cloned disk has a cloned state directory).
"""

from __future__ import annotations

import json
import random
import threading
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Address
from math import inf
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError
from flanctl.registry.stores.store import Changed, KeyExists, Put

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanctl.clock import Clock
    from flanctl.registry.stores.store import Delete, Store

LOOK_SECONDS = 600.0
"""Between two looks at our own announcement; a third of its time if that is shorter."""
STOPPED = "stopped"
"""A data path for one who has none for the time being."""
STOPPED_SECONDS = 10.0
"""How long one who has stopped still counts: a restart or an upgrade is over by then, and its kernel path goes on meanwhile. Over
a virtual wire that takes only what other kernels send (flannel.bpf.c, unfinished)."""
MAX_BYTES = 4096
"""Of an announcement we read; ours have about 200."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """One host's own words. Texts are as the host wrote them: hostile until printed with care."""

    host: str
    version: str
    data_path: str
    instance: str
    run: str = ""

    @classmethod
    def parse(cls, value: bytes) -> Announcement | None:
        """None for what cannot be understood: nothing depends on it."""
        try:
            if len(value) > MAX_BYTES:
                return None
            said = json.loads(value)
            words = {name: said[name] for name in ("host", "version", "data_path", "instance")}
            words["run"] = said.get("run", "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return cls(**words) if all(isinstance(word, str) for word in words.values()) else None

    def format(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class CloneSeen:
    """Another machine announces our public IP, in these words; None: not any more."""

    other: Announcement | None


@dataclass(frozen=True, slots=True)
class AnnounceFailed:
    """Our announcement could not be written; a network without it works just the same."""

    error: FlanctlError


class Announcer:
    """Keeps our announcement there and current, and notices another machine's in its place.

    `run` blocks until `stop`. `saw` may be told, from any thread, what a watch showed under our key. `report` is called
    from either thread. Of two machines with one address each writes its own words every ten minutes, so each learns of
    the other.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        public_ip: IPv4Address,
        words: Announcement,
        report: Callable[[CloneSeen | AnnounceFailed], None],
        *,
        ttl: float,
        clock: Clock,
        first: bool = False,
    ) -> None:
        """`first`: there was no state directory, so what this host announced before cannot be told from another's."""
        self.key = f"{_folder(prefix)}{public_ip}"
        self._store = store
        self._words = words
        self._value = words.format()
        self._report = report
        self._ttl = ttl
        self._clock = clock
        self._first = first
        self._written = False
        self._withdrawn = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._bell = threading.Event()

    def run(self) -> None:
        while not self._stop.is_set():
            self._bell.clear()
            try:
                with self._lock:
                    if not self._withdrawn:
                        self._announce()
            except FlanctlError as error:
                if self._stop.is_set():
                    return
                self._report(AnnounceFailed(error))
            every = min(LOOK_SECONDS, self._ttl / 3)
            self._clock.wait(self._bell, every * random.uniform(0.9, 1.1))  # noqa: S311  spread, not secret
        self._say_stopped()

    def _say_stopped(self) -> None:
        """Who sends to us from its kernel must not go on if a flanneld comes in our place. The rest stays as it was said.

        Only a word: where the registry does not answer, the agent ends all the same.
        """
        with self._lock:
            if not self._written or self._withdrawn:
                return
            try:
                current = self._store.get(self.key)
                if current is not None and current.value == self._value:
                    last = replace(self._words, data_path=STOPPED).format()
                    self._store.replace(self.key, last, ttl=self._ttl, expected=current.revision)
            except FlanctlError:
                return

    def look(self) -> None:
        """Announce now: the store is another one."""
        self._bell.set()

    def stop(self) -> None:
        self._stop.set()
        self._bell.set()

    def says(self, words: Announcement) -> None:
        """From now on these words, of the same run."""
        with self._lock:
            self._words, self._value = words, words.format()
        self._bell.set()

    def saw(self, value: bytes) -> None:
        """What stands under our key now, as a watch tells."""
        other = Announcement.parse(value)
        if self._written and other is not None and other.run != self._words.run:
            self._report(CloneSeen(other))

    def withdraw(self) -> None:
        """Our subnet is another host's: nobody shall take us for its holder. Raises what the store raises."""
        with self._lock:
            self._withdrawn = True
            current = self._store.get(self.key)
            if current is not None and current.value == self._value:
                try:
                    self._store.delete(self.key, expected=current.revision)
                except Changed:
                    pass  # somebody else's words by now

    def _announce(self) -> None:
        current = self._store.get(self.key)
        other = None
        try:
            if current is None:
                self._store.create(self.key, self._value, ttl=self._ttl)
            elif current.value == self._value:
                self._store.refresh(current, ttl=self._ttl)
            else:
                other = Announcement.parse(current.value)
                if other is not None and other.run == self._words.run:
                    other = None  # what we said before
                self._store.replace(self.key, self._value, ttl=self._ttl, expected=current.revision)
        except (KeyExists, Changed):
            return  # another machine's, just now: the next look tells
        if other is not None and not self._written and self._is_our_past(other):
            other = None
        self._written = True
        self._report(CloneSeen(other))

    def _is_our_past(self, other: Announcement) -> bool:
        """What stood there at our start: our own from before a restart, or from before the state directory was lost."""
        return other.instance == self._words.instance or (self._first and other.host == self._words.host)


class Hosts:
    """Which hosts run flanctl now, by their announcements: all of them at a list, then by what a watch tells.

    `listed` and `saw` belong to the follower's thread, `addresses` may be asked from any.
    """

    def __init__(self, store: Store, prefix: str, changed: Callable[[], None], clock: Clock) -> None:
        self._store = store
        self._prefix = prefix
        self._folder = _folder(prefix)
        self._changed = changed
        self._clock = clock
        self._ends: dict[IPv4Address, float] | None = None
        """Until when each counts: for ever, or a while after it said that it stopped. Replaced whole."""
        self._counting: tuple[dict[IPv4Address, float], float, frozenset[IPv4Address]] | None = None
        """Those of `_ends` that count, and until when these are they."""

    @property
    def addresses(self) -> frozenset[IPv4Address] | None:
        """None until they were listed once. The same object while nothing changes."""
        ends, counting = self._ends, self._counting
        if ends is None:
            return None
        now = self._clock.now()
        if counting is None or counting[0] is not ends or now >= counting[1]:
            there = frozenset(address for address, end in ends.items() if now < end)
            counting = ends, min((ends[address] for address in there), default=inf), there
            self._counting = counting
        return counting[2]

    def listed(self) -> None:
        """Ask for all. A registry that does not tell, or does not let us look there, leaves what is known."""
        try:
            found = announcements(self._store, self._prefix)
        except FlanctlError:
            return
        self._take({address: self._end(address, words) for address, words in found.items()})

    def saw(self, event: Put | Delete) -> None:
        key = event.entry.key if isinstance(event, Put) else event.key
        if self._ends is None or not key.startswith(self._folder):
            return
        try:
            address = IPv4Address(key.removeprefix(self._folder))
        except ValueError:
            return
        ends = dict(self._ends)
        words = Announcement.parse(event.entry.value) if isinstance(event, Put) else None
        if words is None:
            ends.pop(address, None)
        else:
            ends[address] = self._end(address, words)
        self._take(ends)

    def _end(self, address: IPv4Address, words: Announcement) -> float:
        if words.data_path != STOPPED:
            return inf
        if self._ends is None or address not in self._ends:
            return 0.0  # it stopped before we knew it
        return min(self._ends[address], self._clock.now() + STOPPED_SECONDS)

    def _take(self, ends: dict[IPv4Address, float]) -> None:
        before = self.addresses
        self._ends = ends
        if self.addresses != before:
            self._changed()


def announcements(store: Store, prefix: str) -> dict[IPv4Address, Announcement]:
    """Who announced what, by public IP. What cannot be read is left out: nothing depends on it."""
    folder = _folder(prefix)
    found = {}
    for entry in store.list(folder).entries:
        try:
            address = IPv4Address(entry.key.removeprefix(folder))
        except ValueError:
            continue
        if (words := Announcement.parse(entry.value)) is not None:
            found[address] = words
    return found


def _folder(prefix: str) -> str:
    return f"{prefix}/flanctl/hosts/"

"""Following every host's lease: list at revision R, watch from R, list again now and then, never half a picture.

    follower = Follower(leases, inbox.put)      # posts PeersChanged; then ask follower.table()
    follower.run()                              # until stop()

Events only update what is known here and post one mark, until the table has been fetched: a burst of five thousand
events is one mark and one table. A key that cannot be read is kept aside and hides no other (flannel drops every
route for it). Listing again every ten minutes finds what a silent watch missed.

Traffic that flows keeps flowing, so a lease that goes is routed to a little longer (`LeaseTable.kept`), until somebody
else has its subnet or its host another one:

- while its key is there with a value that cannot be read: the host has not left, somebody garbled its key (flannel's own
  advice `etcdctl put KEY $(etcdctl get KEY)` writes the key into the value), and only its end or its deletion says more
- after a delete, `GRACE_SECONDS`: a live host whose key was deleted or ended has written it again by then
- after a list in which leases are missing *and* the registry does not look like the one we knew, `DOUBT_SECONDS`: its
  revision went back, or the network's config is gone from it, or our own lease is among the missing. So looks a server
  that answers from an empty disk, and an etcd that lost its data, in which every host writes its key again at once.
  Nothing is waited for when the registry looks as ever: revision not lower, config there, our own lease there. Until it
  does, each further list, however empty, is doubted like the first one.

A follower may begin with what an agent before it knew (`known`): then its first list is compared like any other.
"""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError
from flanctl.model.lease import Lease
from flanctl.registry.config import config_key
from flanctl.registry.leases import LeaseTable, RegistryBack, RegistryTrouble, table_of
from flanctl.registry.stores.store import Compacted, Delete, Progress, Put

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flanctl.registry.leases import Leases, UnreadableLease
    from flanctl.registry.stores.store import Entry, Event, Watch

RELIST_SECONDS = 600.0
FIRST_RETRY, LAST_RETRY = 0.1, 5.0
GRACE_SECONDS = 2.0
TEND_SECONDS = 0.25
"""Kept leases whose time is over are forgotten at most so often: many together where many end."""
DOUBT_SECONDS = 600.0
DOUBT_RELIST = 30.0
"""Seconds to the next list while we doubt the last."""


@dataclass(frozen=True, slots=True)
class PeersChanged:
    """Fetch the follower's table: it is complete and differs from the one fetched before."""


@dataclass(frozen=True, slots=True)
class ConfigSeen:
    """The network's config as it stands now, at first and whenever it changes; None when there is none."""

    entry: Entry | None


@dataclass(frozen=True, slots=True)
class RegistryDoubted:
    """A list lacks leases that we knew and does not look like our registry's. `why` is None once it does again."""

    why: str | None
    missing: int = 0


FollowerReport = PeersChanged | ConfigSeen | RegistryDoubted | RegistryTrouble | RegistryBack


class Follower:
    """One worker that knows all leases. `run` in its own thread; `table` and `stop` from any.

    `own` is our own lease's key. `also` is called, in the worker's thread, with each event below the prefix that is
    neither a lease nor the config (announcements), and `listed` after each list, before the watch from there.
    """

    def __init__(
        self,
        leases: Leases,
        post: Callable[[FollowerReport], None],
        *,
        own: str | None = None,
        also: Callable[[Put | Delete], None] | None = None,
        listed: Callable[[], None] | None = None,
        relist_seconds: float = RELIST_SECONDS,
        known: Sequence[Lease] = (),
        revision: int = 0,
    ) -> None:
        """`known` are the leases of a time when the registry was at `revision` or later and had a config."""
        self._leases = leases
        self._clock = leases.clock
        self._post = post
        self._own = own
        self._also = also
        self._after_list = listed
        self._relist_seconds = relist_seconds
        self._config_key = config_key(leases.prefix)
        self._stop = threading.Event()
        self._stir = threading.Event()
        self._lock = threading.Lock()
        self._known: dict[str, Lease | UnreadableLease] = {lease.key: lease for lease in known}
        self._kept: dict[str, tuple[Lease, float]] = {}
        """What leases that are gone or unreadable said last, and until when they are kept all the same."""
        self._revision = revision
        self._config: Entry | None = None
        self._had_config = bool(known)
        self._doubt: str | None = None
        self._listed = False
        self._marked = False
        self._tends_at = math.inf
        """When kept leases are looked at next, unless something stirs."""
        self._watch: Watch | None = None

    def table(self) -> LeaseTable:
        """Everything known now. Only after the first PeersChanged; it is never half a list."""
        with self._lock:
            self._marked = False
            known, revision = tuple(self._known.values()), self._revision
            kept = [lease for lease, _ in self._kept.values()]
        if kept:
            leases = [one for one in known if isinstance(one, Lease)]
            hosts = {lease.attributes.public_ip for lease in leases}
            subnets = {lease.subnet for lease in leases}
            kept = [
                lease
                for lease in kept
                if lease.subnet not in subnets and lease.attributes.public_ip not in hosts
            ]
        return table_of(known, revision, kept=kept)

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

    # ---- lists --------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        # The config first: whatever changes in it after the list, the watch tells.
        config = self._leases.store.get(self._config_key)
        table = self._leases.table()
        known: dict[str, Lease | UnreadableLease] = {lease.key: lease for lease in table.leases}
        known.update({bad.key: bad for bad in table.unreadable})
        now = self._clock.now()
        with self._lock:
            first, before = not self._listed, self._known
            changed = known.keys() != before.keys() or any(
                not _same(before[key], one) for key, one in known.items()
            )
            last_said = {key: self._last_said(key) for key in (*before, *self._kept)}
            missing = {
                key: lease
                for key, lease in last_said.items()
                if lease is not None and key in before and key not in known
            }
            why = self._why_doubt(missing, table.revision, config)
            if why is None and self._doubt is not None and self._is_not_whole(known, config):
                why = self._doubt
            if why is not None:  # what an earlier list lacked is no more gone than what this one lacks
                self._kept = {key: (lease, now + DOUBT_SECONDS) for key, (lease, _) in self._kept.items()}
            until = now + (GRACE_SECONDS if why is None else DOUBT_SECONDS)
            for key, lease in missing.items():
                self._kept[key] = lease, until
            told, missed = why != self._doubt, len(self._kept.keys() - known.keys())
            for key, one in known.items():
                self._keep_unless_readable(key, one, last_said.get(key))
            self._doubt = why
            self._known = known
            self._revision = table.revision
            self._listed = True
        if told:
            self._post(RegistryDoubted(why, missed))
        if first or changed:
            self._mark()
        self._take_config(config, first=first)
        if self._after_list is not None:
            self._after_list()

    def _why_doubt(self, missing: dict[str, Lease], revision: int, config: Entry | None) -> str | None:
        """What makes us think that not the hosts are gone but the registry's memory of them."""
        if not missing:
            return None
        if revision < self._revision:
            return f"its revision went back from {self._revision} to {revision}"
        if config is None and self._had_config:
            return f"{self._config_key} is gone too"
        if self._own in missing and len(missing) > 1:
            return "our own lease is missing too"
        return None

    def _is_not_whole(self, known: Mapping[str, Lease | UnreadableLease], config: Entry | None) -> bool:
        """Without the network's config, or without our own lease, which its keeper writes again within a second."""
        return config is None or (self._own is not None and self._own not in known)

    def _take_config(self, entry: Entry | None, *, first: bool = False) -> None:
        if first or entry != self._config:
            self._config = entry
            self._had_config |= entry is not None
            self._post(ConfigSeen(entry))

    # ---- the watch ----------------------------------------------------------------------------------------------

    def _follow(self, answers: Callable[[], None]) -> None:
        """Watch until it is time to list again, the store forgot our revision, or something breaks."""
        # The whole prefix: one watch for leases, config and announcements.
        with self._leases.store.watch(f"{self._leases.prefix}/", after=self._revision) as watch:
            with self._lock:
                self._watch = watch
            if self._stop.is_set():  # it came before there was a watch it could close
                return
            over = threading.Event()
            alarm = threading.Thread(target=self._tend, args=(watch, over), name="peer relist", daemon=True)
            alarm.start()
            try:
                for event in watch:
                    answers()
                    if isinstance(event, Compacted) or self._stop.is_set():
                        return
                    if isinstance(event, Progress):
                        if event.revision < self._revision:
                            return  # not the history we know: list again
                    elif self._take(event):
                        self._mark()
            finally:
                with self._lock:
                    self._watch = None
                over.set()
                self._stir.set()
                alarm.join()

    def _tend(self, watch: Watch, over: threading.Event) -> None:
        """Forget kept leases when their time is over, and end the watch when it is time to list again.

        A watch that died without a word wakes nobody.
        """
        every = self._relist_seconds if self._doubt is None else min(DOUBT_RELIST, self._relist_seconds)
        relist = self._clock.now() + every * random.uniform(0.9, 1.1)  # noqa: S311
        while not over.is_set():
            self._stir.clear()
            now = self._clock.now()
            with self._lock:
                ended = [key for key, (_, until) in self._kept.items() if until <= now]
                for key in ended:
                    del self._kept[key]
                next_end = min((until for _, until in self._kept.values()), default=relist)
                self._tends_at = max(min(relist, next_end), now + TEND_SECONDS)
            if ended:
                self._mark()
            if now >= relist:
                watch.close()
                return
            if not over.is_set():
                self._clock.wait(self._stir, max(0.0, self._tends_at - now))

    def _take(self, event: Event) -> bool:
        """True if what is known changed. A renewal that writes the same value anew changes nothing for us."""
        if isinstance(event, Put):
            key, revision = event.entry.key, event.entry.revision
        elif isinstance(event, Delete):
            key, revision = event.key, event.revision
        else:
            return False
        if not key.startswith(self._leases.folder):
            with self._lock:
                self._revision = revision
            if key == self._config_key:
                self._take_config(event.entry if isinstance(event, Put) else None)
            elif self._also is not None:
                self._also(event)
            return False
        with self._lock:
            self._revision = revision
            if isinstance(event, Put):
                found = self._leases.read(event.entry)
                before, last_said = self._known.get(key), self._last_said(key)
                self._known[key] = found
                self._keep_unless_readable(key, found, last_said)
                return not _same(before, found)
            last_said = self._last_said(key)
            gone = self._known.pop(key, None)
            if gone is not None and last_said is not None:
                until = self._clock.now() + GRACE_SECONDS
                self._kept[key] = last_said, until
                if until < self._tends_at:
                    self._stir.set()
            return gone is not None

    def _last_said(self, key: str) -> Lease | None:
        """The lease under this key, or the one that was there before it went or became unreadable, while that is kept."""
        known = self._known.get(key)
        if isinstance(known, Lease):
            return known
        return self._kept[key][0] if key in self._kept else None

    def _keep_unless_readable(
        self, key: str, found: Lease | UnreadableLease, last_said: Lease | None
    ) -> None:
        """Under a key that is there, a lease counts, or else what one said last."""
        self._kept.pop(key, None)
        if not isinstance(found, Lease) and last_said is not None:
            self._kept[key] = last_said, math.inf

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

"""Leases with flannel's semantics, once for every store, and always by compare-and-swap.

    held = leases.acquire(config, attributes, previous=[had])
    keeper = Keeper(leases, held, report)
    keeper.run()                       # until stop(), or LeaseLost

What flannel gets wrong and this must not (flannel.md section 11): a lost lease is never exchanged for another subnet
in silence (rows 1 and 5), a renewal never overwrites somebody else's key (row 7), a lost race is tried again (row 8),
a key without TTL stays one (row 9), one bad key hides no other (row 4).
"""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanctl.clock import BootClock
from flanctl.errors import Conflict, FlanctlError, Invalid, LeaseLost
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.subnet_key import SubnetKey
from flanctl.model.subnet_pool import SubnetPool
from flanctl.registry.config import dialect_of, subnets_prefix
from flanctl.registry.stores.store import Changed, KeyExists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from flanctl.clock import Clock
    from flanctl.model.dialect import Dialect
    from flanctl.model.network_config import NetworkConfig
    from flanctl.registry.stores.store import Entry, Snapshot, Store

TTL_CHUNK = 500
"""Leases whose TTL is asked between two words of progress; each chunk has the store's whole timeout for itself."""
LEASE_TTL = 86_400.0
"""Seconds; flannel's constant `subnetTTL` in every version."""
ROUNDS = 200
"""Lost races before we give up. In lock step, each writing only after all have read, fifty hosts on fifty subnets lose
8 at worst, a thousand on a thousand 28 (simulated, addresses at random; hosts of one LAN lose 3)."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds between tries to renew while the registry is away: doubling from the first to the last, which is a twelfth
of a short lease's time at most."""
CALM = 0.25, 5.0, 60.0
"""Seconds between two looks at our key that somebody asks for: the first is at once, the next wait a little, doubling
from the first of these to the second until nobody has asked for the third. Who deletes our key in a loop owns no CPU."""


@dataclass(frozen=True, slots=True)
class UnreadableLease:
    """A key below `subnets/` that no flannel wrote, or whose value cannot be understood.

    `problem` is `bad-key` or `bad-value`. `subnet` is what the key speaks of, for a bad key as far as one can guess;
    it counts as taken, because some flannel may read the key and use it.
    """

    key: str
    problem: str
    message: str
    subnet: IPv4Network | None = None


@dataclass(frozen=True, slots=True)
class LeaseTable:
    """All leases at one revision, by subnet, and the keys that hide none of them."""

    leases: tuple[Lease, ...]
    unreadable: tuple[UnreadableLease, ...]
    revision: int
    kept: tuple[Lease, ...] = ()
    """Those of `leases` that are gone from the registry or unreadable there, but still routed to (peers.py says why)."""


@dataclass(frozen=True, slots=True)
class Acquired:
    """Our lease and the entry it stands in. `how`: kept (it was ours), again (we had it before), new.

    `ends` is when it ends at the earliest, on our own clock (seconds since boot): counted from before we asked, so that
    the registry never ends it sooner. None for a reservation. Until then nobody else can hold the subnet, unless
    somebody deletes our key by hand; after that only asking tells.
    """

    lease: Lease
    entry: Entry
    how: str
    notes: tuple[str, ...] = ()
    ends: float | None = None


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """Our lease has its full time again."""

    held: Acquired


@dataclass(frozen=True, slots=True)
class LeaseRestored:
    """Our key was gone, or somebody had rewritten it in our name; it is as it should be again."""

    held: Acquired


@dataclass(frozen=True, slots=True)
class RegistryTrouble:
    """The registry does not answer, or refuses us. Reported at each try; whoever prints it decides how often.

    `since` is how many seconds ago the first of these tries failed; `lease_left` how many our lease still has, as far
    as we know (None: for ever, or who reports holds no lease). At 0 another host may have taken the subnet.
    """

    error: FlanctlError
    since: float = 0.0
    lease_left: float | None = None


@dataclass(frozen=True, slots=True)
class RegistryBack:
    """It answers again, `after` seconds and `tries` failures."""

    after: float
    tries: int


KeeperReport = LeaseRenewed | LeaseRestored | RegistryTrouble | RegistryBack


class Leases:
    """The leases of one network."""

    def __init__(
        self, store: Store, prefix: str, dialect: Dialect | None, clock: Clock | None = None
    ) -> None:
        self.store = store
        self.clock = clock or BootClock()
        self.prefix = prefix
        self.folder = subnets_prefix(prefix)
        self._wanted = dialect
        self._read: dict[str, tuple[Entry, Lease | UnreadableLease]] = {}
        """What the last list held, replaced whole (several threads list): an entry that is still the same is not
        understood anew."""

    @property
    def dialect(self) -> Dialect:
        return dialect_of(self.store, self._wanted)

    def key(self, subnet: IPv4Network) -> str:
        return self.folder + SubnetKey(subnet).format()

    def read(self, entry: Entry) -> Lease | UnreadableLease:
        """One key below `subnets/`, understood or not."""
        try:
            subnet = SubnetKey.parse(entry.key.removeprefix(self.folder)).subnet
        except Invalid as error:
            return UnreadableLease(
                entry.key, "bad-key", error.message, _guess(entry.key.removeprefix(self.folder))
            )
        try:
            attributes = LeaseAttributes.parse(entry.value)
        except Invalid as error:
            return UnreadableLease(entry.key, "bad-value", error.message, subnet)
        return Lease(
            subnet, attributes, entry.revision, reservation=entry.lease is None, ttl=entry.ttl, key=entry.key
        )

    def table(
        self, *, with_ttl: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> LeaseTable:
        """Everything there is. TTLs cost a request per lease in etcd v3, so only those who show them ask."""
        snapshot = self.store.list(self.folder)
        entries = self.timed(snapshot.entries, progress) if with_ttl else snapshot.entries
        return self._table(snapshot, entries)

    def timed(
        self, entries: Sequence[Entry], progress: Callable[[int, int], None] | None = None
    ) -> tuple[Entry, ...]:
        """The entries with their TTLs; `progress` hears how many of how many are known."""
        timed: list[Entry] = []
        for start in range(0, len(entries), TTL_CHUNK):
            timed.extend(self.store.with_ttl(entries[start : start + TTL_CHUNK]))
            if progress is not None:
                progress(len(timed), len(entries))
        return tuple(timed)

    def find(self, what: IPv4Network | IPv4Address) -> tuple[Lease, ...]:
        """The leases of a subnet, or of a host: those it holds and the one an address of its containers lies in.

        Their TTLs are asked, those of the others are not.
        """
        snapshot = self.store.list(self.folder)
        by_key = {entry.key: entry for entry in snapshot.entries}
        found = [
            by_key[lease.key] for lease in self._table(snapshot, snapshot.entries).leases if _is(lease, what)
        ]
        return self._table(snapshot, self.store.with_ttl(found)).leases

    def _table(self, snapshot: Snapshot, entries: Iterable[Entry]) -> LeaseTable:
        unreadable = [bad.key.decode(errors="backslashreplace") for bad in snapshot.unreadable]
        before, now = self._read, {}
        for entry in entries:
            known = before.get(entry.key)
            now[entry.key] = known if known is not None and known[0] == entry else (entry, self.read(entry))
        self._read = now
        return table_of(
            [found for _, found in now.values()],
            snapshot.revision,
            [
                UnreadableLease(key, "bad-key", "the key is not UTF-8", _guess(key.removeprefix(self.folder)))
                for key in unreadable
            ],
        )

    def acquire(
        self,
        config: NetworkConfig,
        attributes: LeaseAttributes,
        *,
        previous: Sequence[IPv4Network] = (),
        ttl: float = LEASE_TTL,
    ) -> Acquired:
        """A subnet for this host: the lease or reservation that names our public IP, else one we had, else a new one.

        A reservation keeps having no TTL. A lease of ours that the config no longer has a place for is left to
        expire and noted. Raises Conflict (id `pool-full`), and what the store raises; whatever was written before
        that is found again by the next call, because it names us.
        """
        ours_was: list[IPv4Network] = []
        for _ in range(ROUNDS):
            pool = SubnetPool(config, attributes.public_ip, [*ours_was, *previous])
            snapshot = self.store.list(self.folder)
            entries = {entry.key: entry for entry in snapshot.entries}
            table = self._table(snapshot, snapshot.entries)
            fitting = self._fitting(config, table, attributes.public_ip)
            began = self.clock.now()
            try:
                if fitting:
                    lease = _preferred(fitting, pool.previous)
                    # It may end between this list and our write; then the same subnet is wanted again, not another.
                    ours_was = [lease.subnet]
                    entry = self._take_over(entries[lease.key], lease, attributes, ttl)
                    how = "kept"
                else:
                    subnet = next(pool.candidates(_taken(table, config)), None)
                    if subnet is None:
                        raise self._full(config, table, snapshot)
                    entry = self.store.create(self.key(subnet), attributes.format(self.dialect), ttl=ttl)
                    how = "again" if subnet in pool.previous else "new"
            except (KeyExists, Changed):
                continue  # somebody was faster: look again
            held = self._acquired(entry, how, began)
            return replace(held, notes=_notes(held.lease, config, table, [*previous, *ours_was]))
        raise Conflict(
            f"lost {ROUNDS} races for a subnet in {config.network} in a row",
            hint="start it again",
            id="too-many-races",
        )

    def _fitting(self, config: NetworkConfig, table: LeaseTable, public_ip: IPv4Address) -> list[Lease]:
        """The leases that name us and that we may keep.

        A key in another spelling (`172.17.41.5-24`, which flannel reads too) gives way to another host's.
        """
        others = {lease.subnet for lease in table.leases if lease.attributes.public_ip != public_ip}
        return [
            lease
            for lease in table.leases
            if lease.attributes.public_ip == public_ip
            and config.accepts(lease.subnet)
            and (lease.key == self.key(lease.subnet) or lease.subnet not in others)
        ]

    def resume(
        self, entry: Entry, left: float | None, config: NetworkConfig, public_ip: IPv4Address
    ) -> Acquired | None:
        """The lease of an agent that ended, without asking: for a start that meets no registry.

        `left` are the seconds until it may end, None for a reservation. Until then nobody else can hold the subnet. None
        where it has ended, or is not this host's, or does not fit the config.
        """
        lease = self.read(entry)
        if (
            not isinstance(lease, Lease)
            or lease.attributes.public_ip != public_ip
            or not config.accepts(lease.subnet)
            or (left is not None and left <= 0)
        ):
            return None
        return Acquired(lease, entry, "kept", ends=None if left is None else self.clock.now() + left)

    def renew(self, held: Acquired, *, ttl: float = LEASE_TTL) -> Acquired:
        """Our lease with its full time; the same subnet again if the key was gone.

        The result's `how` is kept, or again when our value had to be written anew. A reservation that was deleted comes
        back as one; who wants it to be a lease gives the key a TTL (decision 10). Raises LeaseLost when another host's
        value is under our key, and what the store raises.
        """
        reserved = held.entry.lease is None
        for _ in range(ROUNDS):
            began = self.clock.now()
            try:
                if reserved:
                    return self._still_reserved(held)
                return self._acquired(self.store.refresh(held.entry, ttl=ttl), "kept", began)
            except Changed as changed:
                current = changed.current
            began = self.clock.now()
            try:
                if current is None:
                    again = None if reserved else ttl
                    entry = self.store.create(held.entry.key, held.entry.value, ttl=again)
                else:
                    entry = self._claim(held, current, ttl)
            except (KeyExists, Changed):
                continue  # it changed once more: look again
            untouched = current is not None and entry.value == current.value
            return self._acquired(entry, "kept" if untouched else "again", began)
        raise Conflict(f"{held.entry.key} changes too often to be renewed", id="too-many-races")

    def _still_reserved(self, held: Acquired) -> Acquired:
        """A reservation needs no renewal, only a look. Raises Changed like a refresh would."""
        current = self.store.get(held.entry.key)
        if current is None or current.revision != held.entry.revision:
            raise Changed(held.entry.key, current)
        return replace(held, how="kept", notes=())

    def _claim(self, held: Acquired, current: Entry, ttl: float) -> Entry:
        """The key under which something new stands: ours again if that names us or nobody, else LeaseLost."""
        found = self.read(current)
        ours = held.lease.attributes
        if isinstance(found, Lease) and found.attributes.public_ip != ours.public_ip:
            raise LeaseLost(
                f"lease {held.lease.subnet} taken by {found.attributes.public_ip} at revision {current.revision}",
                hint="stop one of the two hosts; then start this agent again, it will take a free subnet",
            )
        if isinstance(found, Lease):
            return self._take_over(current, found, ours, ttl)
        # flannel's documented way to reserve (`etcdctl put KEY $(etcdctl get KEY)`) stores the key's text as the value
        # and takes its TTL off (flannel.md 3.6): the value is put right, the wish for a reservation is kept.
        wanted_ttl = None if current.lease is None or held.entry.lease is None else ttl
        return self.store.replace(current.key, held.entry.value, ttl=wanted_ttl, expected=current.revision)

    def _take_over(self, entry: Entry, lease: Lease, wanted: LeaseAttributes, ttl: float) -> Entry:
        """Our values into a key that names us; fields of others and the lack of a TTL stay."""
        value = replace(wanted, unknown=lease.attributes.unknown).format(self.dialect)
        if lease.reservation:
            return (
                entry
                if value == entry.value
                else self.store.replace(entry.key, value, ttl=None, expected=entry.revision)
            )
        if value == entry.value:
            return self.store.refresh(entry, ttl=ttl)
        return self.store.replace(entry.key, value, ttl=ttl, expected=entry.revision)

    def _acquired(self, entry: Entry, how: str, began: float | None = None) -> Acquired:
        """`began`: our clock before the request that was answered by `entry`."""
        lease = self.read(entry)
        if not isinstance(lease, Lease):
            raise Invalid(f"{entry.key}: {lease.message}")
        ends = None if began is None or lease.ttl is None else began + lease.ttl
        return Acquired(lease, entry, how, ends=ends)

    def _full(self, config: NetworkConfig, table: LeaseTable, snapshot: Snapshot) -> Conflict:
        try:
            ends = [entry.ttl for entry in self.store.with_ttl(snapshot.entries) if entry.ttl is not None]
        except FlanctlError:
            ends = []  # that it is full is the news; when a place comes free is an extra
        counts = [f"{sum(lease.reservation for lease in table.leases)} reserved"]
        if table.unreadable:
            counts.append(f"{len(table.unreadable)} unreadable")
        if ends:
            counts.append(f"oldest expiry in {_span(min(ends))}")
        return Conflict(
            f"{config.capacity} of {config.capacity} subnets taken in {config.network} ({', '.join(counts)})",
            hint="flanctl subnets ls   shows who holds them; a dead host's lease ends by itself",
            id="pool-full",
        )

    def read_all(self, snapshot: Snapshot) -> LeaseTable:
        """What a list of our folder holds, understood or not."""
        return self._table(snapshot, snapshot.entries)

    # what an operator changes by hand

    def release(self, lease: Lease) -> None:
        """Delete a lease exactly as it was shown. Raises Changed, also for one that is gone."""
        if not self.store.delete(lease.key, expected=lease.revision):
            raise Changed(lease.key, None)

    def reserve(self, subnet: IPv4Network, public_ip: IPv4Address, *, held: Lease | None = None) -> Lease:
        """Keep `subnet` for one host for ever: a key without TTL (flannel.md 3.6).

        `held` is the lease of that host as it was shown: its bytes stay, only its end goes. Without it the value is
        what flannel's AddReservation writes. Raises KeyExists, Changed.
        """
        if held is None:
            value = LeaseAttributes(public_ip).format(self.dialect)
            entry = self.store.create(self.key(subnet), value, ttl=None)
        else:
            entry = self._rewrite(held, ttl=None)
        return self._acquired(entry, "new").lease

    def unreserve(self, reservation: Lease, *, ttl: float | None) -> Lease | None:
        """Give a reservation, as it was shown, an end again, or delete it (`ttl` None). Raises Changed.

        A host that uses the subnet renews it from then on, as after 0.7.1's RemoveReservation.
        """
        if ttl is None:
            self.release(reservation)
            return None
        return self._acquired(self._rewrite(reservation, ttl=ttl), "kept").lease

    def _rewrite(self, lease: Lease, *, ttl: float | None) -> Entry:
        """The same bytes with another time to live. Raises Changed."""
        current = self.store.get(lease.key)
        if current is None or current.revision != lease.revision:
            raise Changed(lease.key, current)
        return self.store.replace(lease.key, current.value, ttl=ttl, expected=lease.revision)

    def next_for(
        self,
        config: NetworkConfig,
        table: LeaseTable,
        public_ip: IPv4Address,
        previous: Sequence[IPv4Network] = (),
    ) -> IPv4Network | None:
        """The subnet `acquire` would come to hold now; None where every one is taken."""
        pool = SubnetPool(config, public_ip, previous)
        if fitting := self._fitting(config, table, public_ip):
            return _preferred(fitting, pool.previous).subnet
        return next(pool.candidates(_taken(table, config)), None)


@dataclass(frozen=True, slots=True)
class Usage:
    """How many subnets of a network are taken by what. The four add up to the network's capacity.

    A lease of another length counts as the subnets it covers; what lies outside, or is as large as the whole network,
    counts as none.
    """

    leased: int
    reserved: int
    unreadable: int
    free: int


def usage(table: LeaseTable, config: NetworkConfig) -> Usage:
    """Counted from what really stands in the registry, not subtracted: keys may overlap."""
    pool = SubnetPool(config, IPv4Address(0))
    counting = [lease for lease in table.leases if not _covers_all(lease.subnet, config)]
    leased = [lease.subnet for lease in counting if not lease.reservation]
    held = [lease.subnet for lease in counting]
    without_leases = pool.free(leased)
    without_reservations = pool.free(held)
    free = pool.free(_taken(table, config))
    return Usage(
        leased=config.capacity - without_leases,
        reserved=without_leases - without_reservations,
        unreadable=without_reservations - free,
        free=free,
    )


class Keeper:
    """Keeps one lease: renews it at a third of its time, writes it again when it vanishes, tells when it is lost.

    `run` blocks until `stop`; it raises LeaseLost. `wake` makes it look at once. `report` is called from the thread
    that runs it.
    """

    def __init__(
        self,
        leases: Leases,
        held: Acquired,
        report: Callable[[KeeperReport], None],
        *,
        margin: float = 3600.0,
        ttl: float = LEASE_TTL,
    ) -> None:
        self.held = held
        self._leases = leases
        self._clock = leases.clock
        self._report = report
        self._margin = margin
        self._ttl = ttl
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self._tries = 0
        self._calm = 0.0
        self._looked = -CALM[2]

    def run(self) -> None:
        delay, since = self._pause(), 0.0
        while True:
            self._clock.wait(self._bell, delay)
            if self._bell.is_set():
                self._calm_down()
            self._bell.clear()
            if self._stopping.is_set():
                return
            try:
                renewed = self._leases.renew(self.held, ttl=self._ttl)
            except LeaseLost:
                raise
            except FlanctlError as error:
                now = self._clock.now()
                since = since if self._tries else now
                self._tries += 1
                ends = self.held.ends
                self._report(
                    RegistryTrouble(error, now - since, None if ends is None else max(0.0, ends - now))
                )
                last = min(LAST_RETRY, max(FIRST_RETRY, self._ttl / 12))
                delay = min(last, FIRST_RETRY * 2 ** min(self._tries - 1, 10)) * random.uniform(0.8, 1.2)  # noqa: S311
                continue
            if self._tries:
                self._report(RegistryBack(self._clock.now() - since, self._tries))
                self._tries = 0
            self.held = renewed
            self._report(LeaseRestored(renewed) if renewed.how == "again" else LeaseRenewed(renewed))
            delay = self._pause()

    def _calm_down(self) -> None:
        """Before a look that was asked for: no pause the first time, ever longer ones when asked again and again."""
        first, last, forgotten = CALM
        now = self._clock.now()
        if now - self._looked >= forgotten:
            self._calm = 0.0
        self._clock.wait(self._stopping, self._looked + self._calm - now)
        self._calm = min(last, self._calm * 2 or first)
        self._looked = self._clock.now()

    def _pause(self) -> float:
        """Seconds to the next renewal, by the time the server gave us, which may not be what we asked for."""
        return renew_after(self.held.lease.ttl or self._ttl, self._margin)

    def wake(self) -> None:
        """Look at the key now: somebody saw it missing or changed."""
        self._bell.set()

    def retry(self) -> None:
        """The registry answers somebody else again: no need to wait until our next try."""
        if self._tries:
            self._bell.set()

    def moved(self, held: Acquired) -> None:
        """Our lease stands in another store now, as `held` says; it is renewed there at once."""
        self.held = held
        self.wake()

    def stop(self) -> None:
        self._stopping.set()
        self._bell.set()


def renew_after(ttl: float, margin: float) -> float:
    """Seconds from a renewal to the next: a third of the TTL, at the latest `margin` before its end, 10 % jitter.

    The jitter keeps hosts that started together from renewing together. flannel waits for ttl - margin, so that one
    outage of an hour at the wrong moment loses the lease, and renews without a pause where the margin is no smaller
    than the TTL (flannel.md 11, row 29); such a margin means nothing here.
    """
    at = ttl / 3 if margin >= ttl else min(ttl / 3, max(ttl - margin, ttl / 10))
    return at * random.uniform(0.9, 1.1)  # noqa: S311  not a secret


def table_of(
    found: Iterable[Lease | UnreadableLease],
    revision: int,
    unreadable: Sequence[UnreadableLease] = (),
    kept: Sequence[Lease] = (),
) -> LeaseTable:
    """Sorted and told apart. `kept` are not among `found`; they are put there."""
    leases = list(kept)
    bad = list(unreadable)
    for one in found:
        if isinstance(one, Lease):
            leases.append(one)
        else:
            bad.append(one)
    # By number: IPv4Network compares five times slower, and this runs at each event of a network of thousands.
    leases.sort(key=lambda lease: (int(lease.subnet.network_address), lease.subnet.prefixlen, lease.key))
    bad.sort(key=lambda one: one.key)
    return LeaseTable(tuple(leases), tuple(bad), revision, tuple(kept))


_LOOKS_LIKE_A_SUBNET = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3})-(\d{1,2})", re.ASCII)


def _guess(name: str) -> IPv4Network | None:
    """The subnet some flannel may see in a key we refuse: 0.7 takes the first place that looks like one (flannel.md 3.1)."""
    for match in _LOOKS_LIKE_A_SUBNET.finditer(name):
        if 1 <= int(match[2]) <= 32:
            try:
                return IPv4Network((IPv4Address(match[1]), int(match[2])), strict=False)
            except AddressValueError:
                continue
    return None


def _is(lease: Lease, what: IPv4Network | IPv4Address) -> bool:
    if isinstance(what, IPv4Network):
        return lease.subnet == what
    return lease.attributes.public_ip == what or what in lease.subnet


def _taken(table: LeaseTable, config: NetworkConfig) -> list[IPv4Network]:
    """What no new lease may overlap. One key may block its subnet, never the whole network."""
    found = [*(lease.subnet for lease in table.leases), *(bad.subnet for bad in table.unreadable)]
    return [subnet for subnet in found if subnet is not None and not _covers_all(subnet, config)]


def _covers_all(subnet: IPv4Network, config: NetworkConfig) -> bool:
    """Whether it is no host's subnet but as large as the whole network."""
    return subnet.prefixlen < config.subnet_len and config.network.subnet_of(subnet)


def _notes(
    lease: Lease, config: NetworkConfig, table: LeaseTable, previous: Sequence[IPv4Network]
) -> tuple[str, ...]:
    """What the operator must hear about the subnet we got: above all that it is not the one we had."""
    notes = []
    for other in table.leases:
        if other.attributes.public_ip != lease.attributes.public_ip or other.key == lease.key:
            continue
        if config.accepts(other.subnet):
            notes.append(f"{lease.attributes.public_ip} holds {other.subnet} too, which is left alone")
        else:
            notes.append(
                f"our lease {other.subnet} does not fit the network config any more, it is left to expire"
            )
    if previous and previous[0] != lease.subnet:
        had = previous[0]
        notes.append(
            f"this host had {had} and has {lease.subnet} now: {_why_not(had, lease, config, table)}; "
            "containers that run keep addresses nobody routes to them"
        )
    return tuple(notes)


def _why_not(had: IPv4Network, lease: Lease, config: NetworkConfig, table: LeaseTable) -> str:
    if not config.accepts(had):
        return "it does not fit the network config any more"
    for other in table.leases:
        if other.subnet.overlaps(had) and other.attributes.public_ip != lease.attributes.public_ip:
            return f"{other.subnet} belongs to {other.attributes.public_ip}"
    for bad in table.unreadable:
        if bad.subnet is not None and bad.subnet.overlaps(had):
            return f"key {bad.key!a} cannot be read"
    return f"the registry names {lease.subnet} for {lease.attributes.public_ip}"


def _preferred(ours: Sequence[Lease], previous: Sequence[IPv4Network]) -> Lease:
    """Of several leases that name us: the one we had last, else the lowest."""
    for subnet in previous:
        for lease in ours:
            if lease.subnet == subnet:
                return lease
    return ours[0]


def _span(seconds: float) -> str:
    minutes = max(0, int(seconds)) // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"

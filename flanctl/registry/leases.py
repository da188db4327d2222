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
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flanctl.clock import BootClock
from flanctl.errors import Conflict, FlanctlError, Invalid, LeaseLost
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.subnet_key import SubnetKey
from flanctl.model.subnet_pool import SubnetPool
from flanctl.registry.config import subnets_prefix
from flanctl.registry.stores.store import Changed, KeyExists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from ipaddress import IPv4Network

    from flanctl.clock import Clock
    from flanctl.model.dialect import Dialect
    from flanctl.model.network_config import NetworkConfig
    from flanctl.registry.stores.store import Entry, Snapshot, Store

LEASE_TTL = 86_400.0
"""Seconds; flannel's constant `subnetTTL` in every version."""
ROUNDS = 50
"""Lost races before we give up; with the pool's order even fifty hosts at once lose one or two."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds between tries to renew while the registry is away: doubling from the first to the last."""


@dataclass(frozen=True, slots=True)
class UnreadableLease:
    """A key below `subnets/` that no flannel wrote, or whose value cannot be understood.

    `problem` is `bad-key` or `bad-value`. `subnet` is known for the latter: it counts as taken.
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


@dataclass(frozen=True, slots=True)
class Acquired:
    """Our lease and the entry it stands in. `how`: kept (it was ours), again (we had it before), new."""

    lease: Lease
    entry: Entry
    how: str
    notes: tuple[str, ...] = ()


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
    """The registry does not answer, or refuses us. Reported at each try; whoever prints it decides how often."""

    error: FlanctlError


@dataclass(frozen=True, slots=True)
class RegistryBack:
    """It answers again, `after` seconds and `tries` failures."""

    after: float
    tries: int


KeeperReport = LeaseRenewed | LeaseRestored | RegistryTrouble | RegistryBack


class Leases:
    """The leases of one network."""

    def __init__(self, store: Store, prefix: str, dialect: Dialect, clock: Clock | None = None) -> None:
        self.store = store
        self.clock = clock or BootClock()
        self.folder = subnets_prefix(prefix)
        self._dialect = dialect

    def key(self, subnet: IPv4Network) -> str:
        return self.folder + SubnetKey(subnet).format()

    def read(self, entry: Entry) -> Lease | UnreadableLease:
        """One key below `subnets/`, understood or not."""
        try:
            subnet = SubnetKey.parse(entry.key.removeprefix(self.folder)).subnet
        except Invalid as error:
            return UnreadableLease(entry.key, "bad-key", error.message)
        try:
            attributes = LeaseAttributes.parse(entry.value)
        except Invalid as error:
            return UnreadableLease(entry.key, "bad-value", error.message, subnet)
        return Lease(
            subnet, attributes, entry.revision, reservation=entry.lease is None, ttl=entry.ttl, key=entry.key
        )

    def table(self, *, with_ttl: bool = False) -> LeaseTable:
        """Everything there is. TTLs cost a request per lease in etcd v3, so only those who show them ask."""
        snapshot = self.store.list(self.folder)
        entries = self.store.with_ttl(snapshot.entries) if with_ttl else snapshot.entries
        return self._table(snapshot, entries)

    def _table(self, snapshot: Snapshot, entries: Iterable[Entry]) -> LeaseTable:
        return table_of(
            (self.read(entry) for entry in entries),
            snapshot.revision,
            [
                UnreadableLease(bad.key.decode(errors="backslashreplace"), "bad-key", "the key is not UTF-8")
                for bad in snapshot.unreadable
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
        pool = SubnetPool(config, attributes.public_ip, previous)
        for _ in range(ROUNDS):
            snapshot = self.store.list(self.folder)
            entries = {entry.key: entry for entry in snapshot.entries}
            table = self._table(snapshot, snapshot.entries)
            ours = [lease for lease in table.leases if lease.attributes.public_ip == attributes.public_ip]
            notes = tuple(
                f"our lease {lease.subnet} does not fit the network config any more, it is left to expire"
                for lease in ours
                if not config.accepts(lease.subnet)
            )
            fitting = [lease for lease in ours if config.accepts(lease.subnet)]
            try:
                if fitting:
                    lease = _preferred(fitting, pool.previous)
                    entry = self._take_over(entries[lease.key], lease, attributes, ttl)
                    return self._acquired(entry, "kept", notes)
                subnet = next(pool.candidates(_taken(table)), None)
                if subnet is None:
                    raise self._full(config, table, snapshot)
                entry = self.store.create(self.key(subnet), attributes.format(self._dialect), ttl=ttl)
                return self._acquired(entry, "again" if subnet in pool.previous else "new", notes)
            except (KeyExists, Changed):
                continue  # somebody was faster: look again
        raise Conflict(
            f"lost {ROUNDS} races for a subnet in {config.network} in a row",
            hint="start it again",
            id="too-many-races",
        )

    def renew(self, held: Acquired, *, ttl: float = LEASE_TTL) -> Acquired:
        """Our lease with its full time; the same subnet again if the key was gone.

        The result's `how` is kept, or again when the key had to be written anew. Raises LeaseLost when another host's
        value is under our key, and what the store raises.
        """
        for _ in range(ROUNDS):
            try:
                if held.entry.lease is None:
                    return self._still_reserved(held)
                return self._acquired(self.store.refresh(held.entry, ttl=ttl), "kept")
            except Changed as changed:
                current = changed.current
            try:
                if current is None:
                    entry = self.store.create(held.entry.key, held.entry.value, ttl=ttl)
                else:
                    entry = self._claim(held, current, ttl)
                return self._acquired(entry, "again")
            except KeyExists:
                continue
            except Changed:
                continue
        raise Conflict(f"{held.entry.key} changes too often to be renewed", id="too-many-races")

    def _still_reserved(self, held: Acquired) -> Acquired:
        """A reservation needs no renewal, only a look. Raises Changed like a refresh would."""
        current = self.store.get(held.entry.key)
        if current is None or current.revision != held.entry.revision:
            raise Changed(held.entry.key, current)
        return held

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
        return self.store.replace(current.key, held.entry.value, ttl=ttl, expected=current.revision)

    def _take_over(self, entry: Entry, lease: Lease, wanted: LeaseAttributes, ttl: float) -> Entry:
        """Our values into a key that names us; fields of others and the lack of a TTL stay."""
        value = replace(wanted, unknown=lease.attributes.unknown).format(self._dialect)
        if lease.reservation:
            return (
                entry
                if value == entry.value
                else self.store.replace(entry.key, value, ttl=None, expected=entry.revision)
            )
        if value == entry.value:
            return self.store.refresh(entry, ttl=ttl)
        return self.store.replace(entry.key, value, ttl=ttl, expected=entry.revision)

    def _acquired(self, entry: Entry, how: str, notes: tuple[str, ...] = ()) -> Acquired:
        lease = self.read(entry)
        if not isinstance(lease, Lease):
            raise Invalid(f"{entry.key}: {lease.message}")
        return Acquired(lease, entry, how, notes)

    def _full(self, config: NetworkConfig, table: LeaseTable, snapshot: Snapshot) -> Conflict:
        timed = self.store.with_ttl(snapshot.entries)
        ends = [entry.ttl for entry in timed if entry.ttl is not None]
        reserved = sum(lease.reservation for lease in table.leases)
        oldest = f", oldest expiry in {_span(min(ends))}" if ends else ""
        return Conflict(
            f"{config.capacity} of {config.capacity} subnets taken in {config.network} ({reserved} reserved{oldest})",
            hint="flanctl subnets ls   shows who holds them; a dead host's lease ends by itself",
            id="pool-full",
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
        self._stopping = False

    def run(self) -> None:
        delay, tries, since = renew_after(self._ttl, self._margin), 0, 0.0
        while True:
            self._clock.wait(self._bell, delay)
            self._bell.clear()
            if self._stopping:
                return
            try:
                renewed = self._leases.renew(self.held, ttl=self._ttl)
            except LeaseLost:
                raise
            except FlanctlError as error:
                since = since if tries else self._clock.now()
                tries += 1
                self._report(RegistryTrouble(error))
                delay = min(LAST_RETRY, FIRST_RETRY * 2 ** min(tries - 1, 10)) * random.uniform(0.8, 1.2)  # noqa: S311
                continue
            if tries:
                self._report(RegistryBack(self._clock.now() - since, tries))
                tries = 0
            self.held = renewed
            self._report(LeaseRestored(renewed) if renewed.how == "again" else LeaseRenewed(renewed))
            delay = renew_after(self._ttl, self._margin)

    def wake(self) -> None:
        """Look at the key now: somebody saw it missing or changed."""
        self._bell.set()

    def stop(self) -> None:
        self._stopping = True
        self._bell.set()


def renew_after(ttl: float, margin: float) -> float:
    """Seconds from a renewal to the next: a third of the TTL, at the latest `margin` before its end, 10 % jitter.

    The jitter keeps hosts that started together from renewing together. flannel waits for ttl - margin, so that one
    outage of an hour at the wrong moment loses the lease.
    """
    at = min(ttl / 3, max(ttl - margin, ttl / 10))
    return at * random.uniform(0.9, 1.1)  # noqa: S311  not a secret


def table_of(
    found: Iterable[Lease | UnreadableLease], revision: int, unreadable: Sequence[UnreadableLease] = ()
) -> LeaseTable:
    """Sorted and told apart."""
    leases: list[Lease] = []
    bad = list(unreadable)
    for one in found:
        if isinstance(one, Lease):
            leases.append(one)
        else:
            bad.append(one)
    leases.sort(key=lambda lease: (lease.subnet, lease.key))
    bad.sort(key=lambda one: one.key)
    return LeaseTable(tuple(leases), tuple(bad), revision)


def _taken(table: LeaseTable) -> list[IPv4Network]:
    taken = [lease.subnet for lease in table.leases]
    taken.extend(bad.subnet for bad in table.unreadable if bad.subnet is not None)
    return taken


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

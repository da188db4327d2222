"""From etcd v2 to v3: the config, the leases with the time they have left, the reservations (decision 16).

    migration = Migration(v2, v3)                  # two Leases of one prefix
    plan = migration.plan()                        # Conflict where v3 holds something else
    migration.carry_out(plan)                      # leases first, the config last; verified by planning again

The config comes last because hosts look for it: one that starts meanwhile finds v2 alone, or everything. So an
interrupted run is simply run again: what is there already is seen to be there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flanctl.errors import Conflict, Invalid, NotFound
from flanctl.model.network_config import NetworkConfig, compose_config
from flanctl.registry.config import config_key
from flanctl.registry.stores.store import Changed, KeyExists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ipaddress import IPv4Network

    from flanctl.model.dialect import Dialect
    from flanctl.model.lease import Lease
    from flanctl.registry.leases import Leases, LeaseTable, UnreadableLease
    from flanctl.registry.stores.store import Entry

SLACK = 60.0
"""Seconds by which two ends of one lease may differ and still be the same: both stores count whole seconds, and the
answers come one after the other."""
ROUNDS = 10
"""Plans and writes until v3 stands still beside v2. Each round writes only what changed during the one before."""
SHOWN = 20
"""Conflicts that are named; how many there are is always said."""


@dataclass(frozen=True, slots=True)
class Item:
    """One key of v2 and what is to be done about it.

    `what`: copy (v3 lacks it), renew (v3 has it with another value or an earlier end), there (nothing). `value` is what
    v3 shall hold; `ttl` is seconds, None for a reservation and the config.
    """

    what: str
    kind: str
    """config, lease, reservation"""
    source: Entry
    value: bytes
    target: Entry | None
    lease: Lease | None = None

    @property
    def ttl(self) -> float | None:
        return self.source.ttl


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything v2 holds, the config at the end, and what else was met on the way."""

    items: tuple[Item, ...]
    unreadable: tuple[UnreadableLease, ...]
    """Keys of v2 that no flannel wrote: they stay where they are."""
    beyond: tuple[Lease, ...]
    """Leases that only v3 has, of hosts that live there already."""

    def todo(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.what != "there")


class Migration:
    """One network's way from `source` to `target`."""

    def __init__(self, source: Leases, target: Leases) -> None:
        self.source = source
        self.target = target
        self.config_key = config_key(source.prefix)

    def plan(self, progress: Callable[[int, int], None] | None = None) -> Plan:
        """What is where. Raises NotFound (id `no-config`), Invalid, Conflict (id `target-differs`), and what stores raise."""
        config = self.source.store.get(self.config_key)
        if config is None:
            raise NotFound(
                f"no network config at {self.config_key} in {self.source.store.name}",
                hint="another --prefix, or nothing to migrate",
                id="no-config",
            )
        config_there = self.target.store.get(self.config_key)
        conflicts: list[str] = []
        config_item = self._config_item(config, config_there, conflicts)
        table, entries = read(self.source, progress)
        there, entries_there = read(self.target, progress)
        by_subnet = {lease.subnet: lease for lease in there.leases}
        leases = [
            self._lease_item(lease, entries[lease.key], by_subnet, entries_there, conflicts)
            for lease in table.leases
            if lease.ttl != 0  # it ended between the list and the question
        ]
        keys = {lease.key for lease in table.leases}
        beyond = tuple(lease for lease in there.leases if lease.key not in keys)
        conflicts += _beyond_conflicts(beyond, table.leases, founded=config_there is not None)
        conflicts += [f"{bad.key} in v3 cannot be read: {bad.message}" for bad in there.unreadable]
        if conflicts:
            more = [f"and {len(conflicts) - SHOWN} more"] if len(conflicts) > SHOWN else []
            raise Conflict(
                f"etcd v3 holds something else below {self.source.prefix}, nothing written",
                details=(*conflicts[:SHOWN], *more),
                hint="flanctl subnets ls --api v3   and --api v2; remove what is not this network's",
                id="target-differs",
            )
        return Plan((*leases, config_item), table.unreadable, beyond)

    def carry_out(self, plan: Plan, progress: Callable[[int, int], None] = lambda _done, _all: None) -> int:
        """Write what the plan says, then plan again until nothing is left to do; returns how many keys were written.

        What v2's hosts renew, take or lose meanwhile is taken along. Raises what `plan` and the stores raise, and
        Conflict (id `never-still`) if v2 changes faster than it can be copied. Whatever was written stays and is
        found by the next run.
        """
        written = 0
        for _ in range(ROUNDS):
            todo = plan.todo()
            if not todo:
                return written
            for number, item in enumerate(todo, 1):
                # The config only beside a complete set of leases: a later round brings it if others come first.
                if item.kind != "config" or len(todo) == 1:
                    written += self._write(item)
                progress(number, len(todo))
            plan = self.plan()
        if not plan.todo():
            return written
        raise Conflict(
            f"{self.source.prefix} in etcd v2 changes faster than it can be copied",
            hint="the same again when fewer hosts start",
            id="never-still",
        )

    def _write(self, item: Item) -> bool:
        """True if it was written. What somebody changed at the same moment is for the next plan to see."""
        try:
            if item.target is None:
                self.target.store.create(item.source.key, item.value, ttl=item.ttl)
            else:
                self.target.store.replace(
                    item.source.key, item.value, ttl=item.ttl, expected=item.target.revision
                )
        except (KeyExists, Changed):
            return False
        return True

    def _config_item(self, config: Entry, there: Entry | None, conflicts: list[str]) -> Item:
        value = convert_config(config.value, self.source.dialect, self.target.dialect, self.config_key)
        if there is not None and not _same_config(there.value, value, self.target.dialect):
            text = there.value.decode(errors="backslashreplace")
            conflicts.append(f"{self.config_key} in v3 is {text[:200]}")
        return Item("copy" if there is None else "there", "config", config, value, there)

    def _lease_item(
        self,
        lease: Lease,
        entry: Entry,
        by_subnet: dict[IPv4Network, Lease],
        entries_there: dict[str, Entry],
        conflicts: list[str],
    ) -> Item:
        kind = "reservation" if lease.reservation else "lease"
        value = lease.attributes.format(self.target.dialect)
        found = by_subnet.get(lease.subnet)
        if found is None:
            return Item("copy", kind, entry, value, None, lease)
        ip, other = lease.attributes.public_ip, found.attributes.public_ip
        if other != ip:
            conflicts.append(f"{lease.subnet} is {other}'s in v3 and {ip}'s in v2")
        there = entries_there.get(lease.key)
        what = "there" if there is None else _difference(entry, value, there)
        return Item(what, kind, entry, value, there, lease)


def convert_config(text: bytes, spoken: Dialect, wanted: Dialect, name: str) -> bytes:
    """The same bytes where they mean the same to both flannels, else with every default said (a /23's SubnetLen).

    Raises Invalid where the other flannel cannot have this network at all.
    """
    meant = NetworkConfig.parse(text, spoken, name=name, strict=False)
    if _means(text, meant, wanted, name):
        return text
    said = compose_config(
        network=meant.network,
        subnet_len=meant.subnet_len,
        subnet_min=meant.subnet_min,
        subnet_max=meant.subnet_max,
        backend=meant.backend_type,
        backend_options=meant.backend_options,
    ).encode()
    try:
        again = NetworkConfig.parse(said, wanted, name=name, strict=False)
    except Invalid as error:
        raise Invalid(
            f"flannel {wanted} refuses this network's config: {error.message}",
            details=error.details,
            hint="found the network anew in v3, with its own --prefix",
            id="config-not-portable",
        ) from None
    if _meaning(again) != _meaning(meant):
        raise Invalid(
            f"flannel {wanted} would understand another network from {name}",
            hint="found the network anew in v3, with its own --prefix",
            id="config-not-portable",
        )
    return said


def _means(text: bytes, meant: NetworkConfig, dialect: Dialect, name: str) -> bool:
    try:
        return _meaning(NetworkConfig.parse(text, dialect, name=name, strict=False)) == _meaning(meant)
    except Invalid:
        return False


def _same_config(there: bytes, wanted: bytes, dialect: Dialect) -> bool:
    """Equal, or another spelling of the same network."""
    try:
        meant = NetworkConfig.parse(wanted, dialect, strict=False)
    except Invalid:
        return there == wanted
    return _means(there, meant, dialect, "config")


def _meaning(config: NetworkConfig) -> tuple[object, ...]:
    return (
        config.network,
        config.subnet_len,
        config.subnet_min,
        config.subnet_max,
        config.backend_type,
        dict(config.backend_options),
    )


def _difference(entry: Entry, value: bytes, there: Entry) -> str:
    """Whether v2's word is newer than what v3 holds of the same host's lease."""
    if there.lease is None and entry.lease is not None:
        return "there"  # kept for the host in v3, where an operator has said so
    if entry.lease is None or there.lease is None:
        same = entry.lease is there.lease and there.value == value
        return "there" if same else "renew"
    ahead = (entry.ttl or 0.0) - (there.ttl or 0.0)
    if ahead > SLACK:
        return "renew"
    # Where v3's end is the later one its host renews there, and its value is the newer.
    return "renew" if there.value != value and ahead >= -SLACK else "there"


def _beyond_conflicts(beyond: Iterable[Lease], leases: Iterable[Lease], *, founded: bool) -> list[str]:
    """Why leases that v3 alone has cannot stand beside v2's."""
    leases = tuple(leases)
    hosts: dict[object, Lease] = {lease.attributes.public_ip: lease for lease in leases}
    found = []
    for one in beyond:
        ip = one.attributes.public_ip
        if not founded:
            found.append(f"{one.subnet} of {ip} is in v3, which has no config, and not in v2")
        elif ip in hosts and hosts[ip].subnet != one.subnet:
            found.append(f"{ip} has {one.subnet} in v3 and {hosts[ip].subnet} in v2")
        else:
            found += [
                f"{one.subnet} of {ip} in v3 overlaps {lease.subnet} of {lease.attributes.public_ip} in v2"
                for lease in leases
                if lease.subnet.overlaps(one.subnet) and lease.attributes.public_ip != ip
            ]
    return found


def read(
    leases: Leases, progress: Callable[[int, int], None] | None = None
) -> tuple[LeaseTable, dict[str, Entry]]:
    """Everything below `subnets/` with its TTL: understood, and as it is stored."""
    snapshot = leases.store.list(leases.folder)
    timed = leases.timed(snapshot.entries, progress)
    return leases.read_all(replace(snapshot, entries=timed)), {entry.key: entry for entry in timed}

"""The leases as people and scripts see them: rows, and the forms they are printed in. No click in here: quick.py uses it too."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.commands import output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.model.lease import Lease
    from flanctl.model.network_config import NetworkConfig
    from flanctl.registry.announcements import Announcement
    from flanctl.registry.leases import LeaseTable
    from flanctl.registry.session import Session


@dataclass(frozen=True, slots=True)
class Row:
    """One lease as people and scripts see it."""

    lease: Lease
    backend: str | None
    own: bool
    problems: tuple[str, ...]
    announced: Announcement | None

    @property
    def kind(self) -> str:
        return "reservation" if self.lease.reservation else "lease"

    @property
    def runs(self) -> str | None:
        """Hosts that run flanctl say so; a lease nobody announced is a flanneld's. Reservations run nothing.

        Of several leases with one public IP nobody can tell which the announcement speaks of.
        """
        if "duplicate-ip" in self.problems:
            return "?"
        if self.announced is not None:
            return "flanctl"
        return None if self.lease.reservation else "flanneld"

    @property
    def host(self) -> str | None:
        return self.announced.host if self.announced is not None and self.runs == "flanctl" else None

    @property
    def ttl(self) -> int | None:
        return None if self.lease.ttl is None else int(self.lease.ttl)


@dataclass(frozen=True, slots=True)
class View:
    """What one look at the registry showed."""

    config: NetworkConfig
    table: LeaseTable
    rows: tuple[Row, ...]


def show(view: View, form: str) -> None:
    """All rows, as `subnets ls` prints them."""
    if form == "json":
        output.json(document(view))
    elif form == "simple":
        output.simple([simple(row) for row in view.rows])
    else:
        _table(view)


def look(
    registry: Session, wanted: IPv4Network | IPv4Address | None = None, *, with_ttl: bool = True
) -> View:
    """Config and leases, then everything that follows from the two; rows for all leases, or for what is wanted.

    What is wrong with a lease shows only beside all others; TTLs, which cost a request each, are asked for the rows, or
    for none.
    """
    collecting = gc.isenabled()
    gc.disable()  # all that is made here stays; to look through tens of thousands of rows again and again is a fifth of the time
    try:
        return _look(registry, wanted, with_ttl=with_ttl)
    finally:
        if collecting:
            gc.enable()


def _look(registry: Session, wanted: IPv4Network | IPv4Address | None, *, with_ttl: bool) -> View:
    from flanctl.agent.kernel.addresses import local_addresses
    from flanctl.model.peers import lease_problems
    from flanctl.registry.announcements import announcements
    from flanctl.registry.config import read_config

    config = read_config(registry.store, registry.prefix, registry.wanted_dialect).config
    leases = registry.leases()
    with output.Progress("asking how long leases last") as progress:
        table = leases.table(with_ttl=with_ttl and wanted is None, progress=progress)
    shown = table.leases if wanted is None else leases.find(wanted)
    problems = lease_problems(table.leases, config)
    announced = announcements(registry.store, registry.prefix)
    own = local_addresses()
    rows = tuple(
        Row(
            lease=lease,
            # udp leases carry no BackendType: the network's own says what they speak.
            backend=None
            if lease.reservation and lease.attributes.backend_type is None
            else lease.attributes.backend_type or config.backend_type,
            own=lease.attributes.public_ip in own,
            problems=problems.get(lease.subnet, ()),
            announced=announced.get(lease.attributes.public_ip),
        )
        for lease in shown
    )
    return View(config, table, rows)


def simple(row: Row) -> Sequence[object]:
    attributes = row.lease.attributes
    return (
        row.lease.subnet,
        attributes.public_ip,
        row.kind,
        row.ttl,
        row.backend,
        row.runs,
        row.host,
        ",".join(row.problems) or None,
    )


def _table(view: View) -> None:
    if not view.rows:
        output.note(f"no subnets leased in {view.config.network} yet: start flanctl agent on a host")
    else:
        output.table(
            ["", "SUBNET", "PUBLIC-IP", "BACKEND", "TTL", "KIND", "RUNS", "HOST", "PROBLEM"],
            [
                (
                    "*" if row.own else "",
                    row.lease.subnet,
                    row.lease.attributes.public_ip,
                    row.backend,
                    _left(row),
                    row.kind,
                    row.runs,
                    row.host,
                    ",".join(row.problems) or None,
                )
                for row in view.rows
            ],
            numbers=["TTL"],
        )
        own = ", * this host" if any(row.own for row in view.rows) else ""
        output.note(f"{len(view.rows)} of {view.config.capacity} subnets{own}")
    if unreadable := view.table.unreadable:
        shown = ", ".join(f"{bad.key.rsplit('/', 1)[-1]} ({bad.problem})" for bad in unreadable[:5])
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        noun = "key" if len(unreadable) == 1 else "keys"
        output.note(f"{len(unreadable)} {noun} cannot be read: {shown}{more}")


def _left(row: Row) -> str:
    if row.lease.reservation:
        return "never"
    return "?" if row.ttl is None else output.age(row.ttl)


def details(row: Row) -> list[tuple[str, object]]:
    attributes = row.lease.attributes
    return [
        ("SUBNET", row.lease.subnet),
        ("PUBLIC-IP", attributes.public_ip),
        ("BACKEND", row.backend or "-"),
        (
            "DATA",
            "-" if attributes.backend_data is None else json.dumps(attributes.backend_data, default=str),
        ),
        ("TTL", _left(row)),
        ("KIND", row.kind),
        ("KEY", row.lease.key),
        ("REVISION", row.lease.revision),
        ("RUNS", row.runs or "-"),
        ("HOST", row.host or "-"),
        ("PROBLEM", ",".join(row.problems) or "-"),
    ]


def fields(row: Row) -> dict[str, object]:
    attributes = row.lease.attributes
    expires = None
    if row.ttl is not None and not row.lease.reservation:
        expires = output.timestamp(row.ttl)
    return {
        "subnet": str(row.lease.subnet),
        "public_ip": str(attributes.public_ip),
        "kind": row.kind,
        "ttl_seconds": row.ttl,
        "expires": expires,
        "backend": row.backend,
        "backend_data": attributes.backend_data,
        "self": row.own,
        "host": row.host,
        "runs": row.runs,
        "version": row.announced.version if row.announced else None,
        "data_path": row.announced.data_path if row.announced else None,
        "revision": row.lease.revision,
        "problems": list(row.problems),
    }


def document(view: View) -> dict[str, object]:
    return {
        "network": str(view.config.network),
        "dialect": str(view.config.dialect),
        "revision": view.table.revision,
        "stale": False,
        "as_of": output.timestamp(),
        "subnets": [fields(row) for row in view.rows],
        "unreadable": [{"key": bad.key, "problem": bad.problem} for bad in view.table.unreadable],
    }

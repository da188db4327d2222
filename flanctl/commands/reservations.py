"""`flanctl release`, `reserve`, `unreserve`: what an operator changes about who holds which subnet.

All three show what they would do before they do it, and write only if the registry still holds what was shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, TypeVar

import click

from flanctl.commands import output
from flanctl.commands.arguments import exact_subnet, exact_subnet_or_address, leased
from flanctl.commands.options import output_options, registry_options, write_out
from flanctl.errors import Conflict, Invalid, NotFound, RegistryUnreachable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanctl.commands.session import Session
    from flanctl.model.lease import Lease
    from flanctl.model.network_config import NetworkConfig
    from flanctl.registry.announcements import Announcement
    from flanctl.registry.leases import LeaseTable, UnreadableLease

F = TypeVar("F", bound="Callable[..., object]")


def change_options(command: F) -> F:
    """`--dry-run` and `--yes`."""
    command = click.option("--yes", "-y", is_flag=True, help="Do not ask; a script must say so.")(command)
    return click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing.")(command)


@dataclass(frozen=True, slots=True)
class Plan:
    """One change as it is shown and asked about. `after` is lease, reservation or None (the key is deleted)."""

    verb: str
    done: str
    subnet: IPv4Network
    public_ip: IPv4Address
    before: Lease | None
    after: str | None
    what: str
    warnings: tuple[str, ...] = ()


@click.command()
@click.argument("what", metavar="SUBNET|PUBLIC-IP", shell_complete=leased)
@change_options
@registry_options
@output_options
def release(what: str, dry_run: bool, yes: bool) -> None:
    """Delete a lease, so that its subnet is free at once.

    For a host that is gone for good; a dead host's lease also ends by itself within a day. A host that still runs
    takes the subnet again (flanctl), takes another one (flannel 0.7) or stops (newer ones): stop it first.

    \b
    Examples:
      flanctl release 172.17.41.0/24
      flanctl release 192.168.6.2 --yes
    """
    from flanctl.commands.session import session

    wanted = exact_subnet_or_address(what)
    refuse_if_nobody_can_be_asked(dry_run=dry_run, yes=yes)
    with session() as registry:
        lease = _only(registry, wanted, reserved=False)
        ip = lease.attributes.public_ip
        plan = Plan(
            "release",
            "released",
            lease.subnet,
            ip,
            lease,
            None,
            f"release {lease.subnet}, leased to {ip}{_left(lease)}",
            tuple(_who_suffers(lease, _announced(registry, ip))),
        )
        _carry_out(plan, lambda: registry.leases().release(lease), dry_run=dry_run, yes=yes)


@click.command()
@click.argument("subnet", metavar="SUBNET")
@click.argument("public_ip", metavar="PUBLIC-IP")
@change_options
@registry_options
@output_options
def reserve(subnet: str, public_ip: str, dry_run: bool, yes: bool) -> None:
    """Keep a subnet for one host for ever: a key without time to live, as flannel has it.

    A free subnet waits for that host, which takes it when its agent starts next without a lease; the subnet the host
    holds already becomes a reservation as it is. What is reserved so already is fine.

    \b
    Examples:
      flanctl reserve 172.17.60.0/24 192.168.6.60
      flanctl reserve 172.17.60.0/24 192.168.6.60 --dry-run
    """
    from flanctl.commands.session import session
    from flanctl.registry.config import read_config

    wanted, host = exact_subnet(subnet), _host(public_ip)
    refuse_if_nobody_can_be_asked(dry_run=dry_run, yes=yes)
    with session() as registry:
        config = read_config(registry.store, registry.prefix, registry.wanted_dialect).config
        _refuse_if_it_does_not_fit(config, wanted)
        leases = registry.leases()
        table = leases.table()
        held = _held_by(registry, table, wanted, host)
        done = held is not None and held.reservation
        plan = Plan(
            "reserve",
            "reserved",
            wanted,
            host,
            held,
            "reservation",
            f"reserve {wanted} for {host}" + ("" if held is None else ", which holds it now"),
            tuple(_remarks(config, table, wanted, host)),
        )
        if done:
            _show(plan, changed=False)
            output.note(f"{wanted} is reserved for {host} already, nothing written")
            return
        _carry_out(plan, lambda: leases.reserve(wanted, host, held=held), dry_run=dry_run, yes=yes)


@click.command()
@click.argument("what", metavar="SUBNET|PUBLIC-IP", shell_complete=leased)
@change_options
@registry_options
@output_options
def unreserve(what: str, dry_run: bool, yes: bool) -> None:
    """End a reservation.

    If a host may be using the subnet, its key gets the time to live of a lease: the host renews it, or it ends within
    a day. A host may be using it if it announced itself (flanctl does), if its backend left data in the key, and
    always with --dialect 0.7, whose hosts leave no trace. Otherwise the key is deleted and the subnet free at once.

    \b
    Examples:
      flanctl unreserve 172.17.60.0/24
      flanctl unreserve 192.168.6.60 --dry-run
    """
    from flanctl.commands.session import session
    from flanctl.model.dialect import Dialect
    from flanctl.registry.leases import LEASE_TTL

    wanted = exact_subnet_or_address(what)
    refuse_if_nobody_can_be_asked(dry_run=dry_run, yes=yes)
    with session() as registry:
        lease = _only(registry, wanted, reserved=True)
        attributes = lease.attributes
        used = (
            _announced(registry, attributes.public_ip) is not None
            or attributes.backend_type is not None
            or attributes.backend_data is not None
            # flanneld of etcd v3 gives a reservation it uses a lease by itself; 0.7 leaves it as it was (flannel.md 3.6)
            or registry.dialect is Dialect.V0_7
        )
        ttl = LEASE_TTL if used else None
        how = (
            f"it becomes a lease of {output.age(LEASE_TTL)}"
            if used
            else "no host says that it uses it, so it is free at once"
        )
        would_lose = (
            f"a flanneld on {attributes.public_ip} that held {lease.subnet} when it was reserved, less than a day ago,"
            " would lose it"
        )
        plan = Plan(
            "unreserve",
            "unreserved",
            lease.subnet,
            attributes.public_ip,
            lease,
            "lease" if used else None,
            f"unreserve {lease.subnet} of {attributes.public_ip}: {how}",
            () if used else (would_lose,),
        )
        _carry_out(plan, lambda: registry.leases().unreserve(lease, ttl=ttl), dry_run=dry_run, yes=yes)


def refuse_if_nobody_can_be_asked(*, dry_run: bool, yes: bool) -> None:
    if not (dry_run or yes or output.can_ask()):
        raise UsageError(
            "there is no terminal to ask on, nothing was changed",
            hint="the same with --yes, or with --dry-run to see what it would do",
        )


def _carry_out(plan: Plan, act: Callable[[], object], *, dry_run: bool, yes: bool) -> None:
    from flanctl.registry.stores.store import Changed, KeyExists

    for sentence in plan.warnings:
        output.warning(sentence)
    if dry_run:
        if write_out() == "table":
            output.line(f"would {plan.what}")
        _show(plan, changed=False)
        return
    if not yes:
        output.confirm(f"{plan.what}?")
    try:
        act()
    except (Changed, KeyExists) as error:
        raise Conflict(
            f"{plan.subnet} was changed by somebody else just now, it was not {plan.done}",
            details=(_now(error.current),),
            hint=f"look at it with flanctl subnets get {plan.subnet}, then repeat",
            id="subnet-changed",
        ) from None
    except RegistryUnreachable as error:
        error.details = (f"whether {plan.subnet} was {plan.done} is not known", *error.details)
        raise
    except KeyboardInterrupt:
        output.note(f"whether {plan.subnet} was {plan.done} is not known: flanctl subnets get {plan.subnet}")
        raise
    _show(plan, changed=True)


def _now(current: object) -> str:
    value = getattr(current, "value", None)
    return f"it holds {value.decode(errors='backslashreplace')}" if isinstance(value, bytes) else "it is gone"


def _show(plan: Plan, *, changed: bool) -> None:
    before = None if plan.before is None else "reservation" if plan.before.reservation else "lease"
    form = write_out()
    if form == "json":
        output.json(
            {
                "action": plan.verb,
                "changed": changed,
                "subnet": str(plan.subnet),
                "public_ip": str(plan.public_ip),
                "before": before,
                "after": plan.after,
                "warnings": list(plan.warnings),
            }
        )
    elif form == "simple":
        output.simple(
            [(plan.subnet, plan.public_ip, before, plan.after, "changed" if changed else "unchanged")]
        )
    elif changed:
        end = (
            " as a lease that ends unless renewed"
            if (plan.verb, plan.after) == ("unreserve", "lease")
            else ""
        )
        output.line(f"{plan.done} {plan.subnet} ({plan.public_ip}){end}")


def _only(registry: Session, wanted: IPv4Network | IPv4Address, *, reserved: bool) -> Lease:
    """The one lease, or reservation, that `wanted` names, with its TTL."""
    leases = registry.leases()
    found = leases.find(wanted)
    named = [lease for lease in found if wanted in (lease.subnet, lease.attributes.public_ip)]
    fitting = [lease for lease in named if lease.reservation == reserved]
    if len(fitting) > 1:
        same = len({lease.subnet for lease in fitting}) < len(fitting)
        raise Conflict(
            f"{wanted} names {len(fitting)} {'keys' if same else 'subnets'}, nothing was changed",
            details=tuple(
                f"{lease.key if same else lease.subnet} of {lease.attributes.public_ip}" for lease in fitting
            ),
            hint="etcdctl del KEY   for the one that is wrong"
            if same
            else "the same with one of these subnets",
            id="ambiguous",
        )
    if fitting:
        return fitting[0]
    if named:
        other = named[0]
        if reserved:
            text = f"{other.subnet} is leased to {other.attributes.public_ip}{_left(other)}, not reserved"
        else:
            text = f"{other.subnet} is reserved for {other.attributes.public_ip}, not leased"
        verb = "release" if reserved else "unreserve"
        raise Conflict(
            text, hint=f"flanctl {verb} {other.subnet}", id="not-reserved" if reserved else "reserved"
        )
    table = leases.table()
    for bad in table.unreadable:
        if isinstance(wanted, IPv4Network) and bad.subnet == wanted:
            raise Invalid(
                f"key {bad.key} cannot be read: {bad.message}", hint=f"etcdctl del {bad.key}", id=bad.problem
            )
    kind = "reservation" if reserved else "lease"
    near = "".join(f"; {lease.subnet} of {lease.attributes.public_ip} holds that address" for lease in found)
    raise NotFound(f"no {kind} of {wanted} among {len(table.leases)}{near}", hint="flanctl subnets ls")


def _held_by(registry: Session, table: LeaseTable, wanted: IPv4Network, host: IPv4Address) -> Lease | None:
    """The host's own lease of exactly this subnet, or None where it is free. Raises Conflict for anything else."""
    own = None
    for lease in table.leases:
        ip = lease.attributes.public_ip
        if lease.reservation and ip == host and lease.subnet != wanted:
            raise Conflict(
                f"{host} has {lease.subnet} reserved already",
                hint=f"flanctl unreserve {lease.subnet}",
                id="reserved",
            )
        if not lease.subnet.overlaps(wanted):
            continue
        if lease.subnet == wanted and ip == host:
            own = own or lease
            continue
        (timed, *_) = registry.leases().find(lease.subnet) or (lease,)
        state = f"reserved for {ip}" if lease.reservation else f"leased to {ip}{_left(timed)}"
        covers = "" if lease.subnet == wanted else f", which overlaps {wanted}"
        raise Conflict(
            f"{lease.subnet} is {state}{covers}",
            hint=f"flanctl {'unreserve' if lease.reservation else 'release'} {lease.subnet}",
            id="reserved" if lease.reservation else "leased",
        )
    for bad in table.unreadable:
        if bad.subnet is not None and bad.subnet.overlaps(wanted):
            raise _in_the_way(bad, wanted)
    return own


def _in_the_way(bad: UnreadableLease, wanted: IPv4Network) -> Conflict:
    return Conflict(
        f"{wanted} may be taken: key {bad.key} cannot be read",
        details=(bad.message,),
        hint=f"etcdctl del {bad.key}",
        id=bad.problem,
    )


def _refuse_if_it_does_not_fit(config: NetworkConfig, subnet: IPv4Network) -> None:
    if config.accepts(subnet):
        return
    if not subnet.subnet_of(config.network):
        why = f"is outside the network {config.network}"
    elif subnet.prefixlen != config.subnet_len:
        why = f"has length /{subnet.prefixlen}, the network's subnets have /{config.subnet_len}"
    else:
        why = f"is not from {config.subnet_min} to {config.subnet_max}, where the network's subnets are"
    raise Invalid(f"{subnet} {why}", hint="flanctl net get --effective", id="outside-network")


def _host(text: str) -> IPv4Address:
    from flanctl.model.peers import unreachable_address

    try:
        address = IPv4Address(text)
    except ValueError:
        raise UsageError(f'"{text}" is not a public IP like 192.168.6.2') from None
    if unreachable_address(address):
        raise Invalid(f"{address} is no host's address", id="bad-public-ip")
    return address


def _remarks(config: NetworkConfig, table: LeaseTable, wanted: IPv4Network, host: IPv4Address) -> list[str]:
    remarks = [
        f"{host} holds {lease.subnet} now and keeps it until that lease ends or is released while its agent is stopped"
        for lease in table.leases
        if lease.attributes.public_ip == host and lease.subnet != wanted
    ]
    if host in config.network:
        remarks.append(
            f"{host} is an address of the network {config.network} itself, other hosts cannot send to it"
        )
    return remarks


def _announced(registry: Session, public_ip: IPv4Address) -> Announcement | None:
    from flanctl.registry.announcements import announcements

    return announcements(registry.store, registry.prefix).get(public_ip)


def _who_suffers(lease: Lease, announced: Announcement | None) -> list[str]:
    from flanctl.agent.kernel.addresses import local_addresses

    ip = lease.attributes.public_ip
    warnings = []
    if ip in local_addresses():
        warnings.append(f"{lease.subnet} is this host's own lease")
    if announced is not None:
        warnings.append(
            f"{ip} ({announced.host}) announced a flanctl agent; if it runs, it takes {lease.subnet} again at once"
        )
    else:
        warnings.append(
            f"a flanneld that still runs on {ip} loses its subnet: 0.7 takes another one, newer ones end"
        )
    return warnings


def _left(lease: Lease) -> str:
    return "" if lease.ttl is None else f" ({output.age(lease.ttl)} left)"

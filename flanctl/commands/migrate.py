"""`flanctl migrate v2-to-v3`: a network's keys from etcd v2 to etcd v3, and both in step while hosts move."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.options import flags_of, output_options, registry_options, write_out
from flanctl.errors import Conflict, UsageError

if TYPE_CHECKING:
    from flanctl.model.lease import Lease
    from flanctl.registry.migration import Item, Migration, Plan
    from flanctl.registry.mirror import MirrorReport

_DONE = {"copy": "copied", "renew": "renewed", "there": "there"}


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what would be written, write nothing.")
@click.option(
    "--both", is_flag=True, help="Then keep v2 and v3 in step until interrupted, while hosts move one by one."
)
@click.option("--for", "duration", metavar="DURATION", help="With --both: end after this time: 30s, 8h.")
@click.option(
    "--to-endpoints",
    metavar="URL,…",
    help="Another etcd that serves v3, with the same login and certificates. Default: the one that serves v2.",
)
@registry_options
@output_options
def v2_to_v3(dry_run: bool, both: bool, duration: str | None, to_endpoints: str | None) -> None:
    """Copy the network from etcd v2 to v3: leases with the time they have left, reservations, at the end the config.

    etcd keeps the two apart, so nothing of v2 is touched. What v3 holds already is recognised, so an interrupted run is
    run again; what is not this network's is named and refused. All is read back before the command says so.

    Agents look for v3 first: each moves when it is started again. With --both what hosts write on either side goes to
    the other, in that side's form, so that hosts of both kinds reach each other until the last has moved.

    \b
    Examples:
      flanctl migrate v2-to-v3 --dry-run
      flanctl migrate v2-to-v3 --both
      flanctl migrate v2-to-v3 --to-endpoints http://192.168.6.2:2379
    """
    from flanctl.commands.session import both_apis
    from flanctl.registry.migration import Migration
    from flanctl.settings import DURATION, parse_seconds

    seconds = None if duration is None else parse_seconds(duration)
    if duration is not None and seconds is None:
        raise UsageError(f'--for "{duration}" is not {DURATION}')
    if duration is not None and not both:
        raise UsageError("--for needs --both", hint="without --both it ends by itself")
    if both and dry_run:
        raise UsageError(
            "--both and --dry-run exclude each other", hint="--dry-run alone shows the first step"
        )
    given = flags_of(click.get_current_context())
    for name in ("api", "dialect"):
        if given.get(name, "auto") != "auto":
            raise UsageError(f"--{name} means nothing here: it reads v2 and writes v3")
    places = tuple(filter(None, (to_endpoints or "").split(",")))
    if to_endpoints is not None and not places:
        raise UsageError("--to-endpoints names no endpoint")
    with both_apis(places) as (v2, v3):
        migration = Migration(v2.leases(), v3.leases())
        with output.Progress("asking how long leases last") as progress:
            plan = migration.plan(progress)
        written = 0
        if not dry_run:
            try:
                with output.Progress("keys copied") as progress:
                    written = migration.carry_out(plan, progress)
            except KeyboardInterrupt:
                output.note("v2 is as it was; what v3 has so far is recognised when you run it again")
                raise
        _show(plan, written, dry_run=dry_run, stores=(v2.store.describe(), v3.store.describe()))
        if not (both or dry_run):
            output.note("a host takes v3 when its agent starts again; --both keeps v2 in step until all have")
        if both:
            output.flush()
            _keep_in_step(migration, seconds)


def _show(plan: Plan, written: int, *, dry_run: bool, stores: tuple[str, str]) -> None:
    form = write_out()
    for bad in plan.unreadable:
        output.warning(f"{bad.key} stays behind: {bad.message}")
    rows = [_row(item, dry_run=dry_run) for item in plan.items]
    if form == "json":
        output.json(
            {
                "from": stores[0],
                "to": stores[1],
                "dry_run": dry_run,
                "written": written,
                "verified": not dry_run,
                "keys": [
                    {
                        "key": item.source.key,
                        "kind": item.kind,
                        "subnet": None if item.lease is None else str(item.lease.subnet),
                        "public_ip": None if item.lease is None else str(item.lease.attributes.public_ip),
                        "ttl_seconds": None if item.ttl is None else int(item.ttl),
                        "action": item.what if dry_run else _DONE[item.what],
                        "value": item.value.decode(errors="replace"),
                    }
                    for item in plan.items
                ],
                "only_in_v3": [str(lease.subnet) for lease in plan.beyond],
                "unreadable": [{"key": bad.key, "problem": bad.problem} for bad in plan.unreadable],
            }
        )
        return
    if form == "simple":
        output.simple(rows)
        return
    output.table(["SUBNET", "PUBLIC-IP", "KIND", "LEFT", "ACTION"], [_for_people(row) for row in rows])
    todo = len(plan.todo())
    total = f"{len(plan.items)} keys" if len(plan.items) != 1 else "1 key"
    if dry_run:
        output.note(f"{todo} of {total} would be written to {stores[1]} (--dry-run)")
    else:
        output.note(f"{stores[1]} holds {total}, read back and compared; {written} written now")
    if plan.beyond:
        output.note(f"{len(plan.beyond)} more leases are in v3 only, of hosts that live there")


def _row(item: Item, *, dry_run: bool) -> tuple[object, ...]:
    subnet, ip = (None, None) if item.lease is None else (item.lease.subnet, item.lease.attributes.public_ip)
    ttl = None if item.ttl is None else int(item.ttl)
    return subnet, ip, item.kind, ttl, item.what if dry_run else _DONE[item.what]


def _for_people(row: tuple[object, ...]) -> tuple[object, ...]:
    subnet, ip, kind, ttl, action = row
    return subnet, ip, kind, output.age(ttl) if isinstance(ttl, int) else None, action


def _keep_in_step(migration: Migration, seconds: float | None) -> None:
    """Mirror until interrupted or `seconds` have passed. Raises Conflict for what could not be brought together."""
    from flanctl.registry.mirror import Mirror

    teller = _Teller(write_out())
    mirror = Mirror(migration.source, migration.target, teller.tell)
    timer = None
    if seconds is not None:
        timer = threading.Timer(seconds, mirror.stop)
        timer.daemon = True
        timer.start()
    if write_out() == "table":
        output.note("v2 and v3 are kept in step; Ctrl-C ends it")
    try:
        mirror.run()
    except KeyboardInterrupt:
        output.note("v2 and v3 are no longer kept in step; run it again if hosts are still on v2")
        raise
    finally:
        if timer is not None:
            timer.cancel()
    if mirror.clashes:
        raise Conflict(
            f"{len(mirror.clashes)} keys are not the same in v2 and v3",
            details=tuple(mirror.clashes.values())[:20],
            hint="flanctl subnets ls --api v2   and --api v3",
            id="not-in-step",
        )


class _Teller:
    """What the mirror does, a line each, flushed; an outage goes to stderr, once until it is over."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._silent = False

    def tell(self, report: MirrorReport) -> None:
        from flanctl.registry.mirror import Answers, Clash, Copied, Silent, Where

        match report:
            case Copied(what, to, key, lease):
                self._say(what, to, key, lease, "")
            case Clash(key, why):
                self._say("clash", None, key, None, why)
            case Where(((_, v2), (_, v3)), leases):
                self._where(v2, v3, leases)
            case Silent(error):
                if not self._silent:
                    output.warning(f"{error.message}; tried again until it answers")
                self._silent = True
            case Answers():
                self._silent = False
                output.note("the registry answers again")
        output.flush()

    def _say(self, what: str, to: str | None, key: str, lease: Lease | None, why: str) -> None:
        subnet, ip = (None, None) if lease is None else (lease.subnet, lease.attributes.public_ip)
        if self._form == "json":
            output.json(
                {
                    "time": output.timestamp(),
                    "event": what,
                    "to": to,
                    "key": key,
                    "subnet": None if subnet is None else str(subnet),
                    "public_ip": None if ip is None else str(ip),
                    "why": why or None,
                }
            )
        elif self._form == "simple":
            output.simple([(int(time.time()), what, to, key, ip, why or None)])
        else:
            name = str(subnet or key.rsplit("/", 1)[-1])
            rest = why or f"{ip or ''!s:<15}  {'v2 -> v3' if to == 'v3' else 'v3 -> v2'}"
            output.line(f"{time.strftime('%H:%M:%S')}  {what:<8}  {name:<18}  {rest}")

    def _where(self, v2: int, v3: int, leases: int) -> None:
        """Tells the operator when the last host has moved."""
        if self._form == "json":
            output.json(
                {
                    "time": output.timestamp(),
                    "event": "where",
                    "leases": leases,
                    "kept_in_v2": v2,
                    "kept_in_v3": v3,
                }
            )
        elif self._form == "simple":
            output.simple([(int(time.time()), "where", None, f"{v2} {v3} {leases}", None, None)])
        else:
            output.line(f"{time.strftime('%H:%M:%S')}  {'hosts':<8}  {v3} of {leases} leases are kept in v3")

"""`flanctl subnets watch`: what happens to subnets, while it happens."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.options import output_options, registry_options, write_out
from flanctl.errors import UsageError
from flanctl.model.lease import Lease
from flanctl.registry.changes import Back, Change, Changes, Listed, Lost

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from flanctl.registry.changes import Report


@click.command()
@click.option(
    "--from-revision",
    type=click.IntRange(min=1),
    metavar="N",
    help="Go on after this revision, the last one that was printed. Default: list what there is, then follow.",
)
@click.option("--all", "everything", is_flag=True, help="Renewals too, where a host writes them.")
@click.option("--for", "duration", metavar="DURATION", help="End after this time, with 0: 30s, 5m, 1h.")
@click.option("--fail-on-loss", is_flag=True, help="End with 3 when the registry stops answering.")
@registry_options
@output_options
def watch(from_revision: int | None, everything: bool, duration: str | None, fail_on_loss: bool) -> None:
    """Follow which host gets, moves and loses which subnet, a line each.

    An outage of the registry is told on stderr and survived; no change is lost and none is told twice. What the
    registry has forgotten meanwhile (compaction) is made up by listing again, marked "resync". A removed lease is
    called expired only if the last end that was known had passed. Ends when interrupted.

    \b
    Examples:
      flanctl subnets watch
      flanctl subnets watch -w json --from-revision 48211 --fail-on-loss
    """
    from flanctl.commands.session import session
    from flanctl.registry.config import read_config
    from flanctl.settings import DURATION, parse_seconds

    seconds = None if duration is None else parse_seconds(duration)
    if duration is not None and seconds is None:
        raise UsageError(f'--for "{duration}" is not {DURATION}')
    form = write_out()
    with session() as registry, output.Progress("asking how long leases last") as progress:
        printer = _Printer(
            form, read_config(registry.store, registry.prefix, registry.wanted_dialect).config.backend_type
        )

        def report(one: Report) -> None:
            if everything or not (isinstance(one, Change) and one.what == "renewed"):
                printer.print(one)

        changes = Changes(
            registry.leases(),
            report,
            idle=output.refuse_without_reader,
            progress=progress,
            fail_on_loss=fail_on_loss,
        )
        timer = None
        if seconds is not None:
            timer = threading.Timer(seconds, changes.stop)
            timer.daemon = True
            timer.start()
        try:
            changes.run(after=from_revision)
        except KeyboardInterrupt:
            if changes.revision:
                output.note(
                    f"everything up to revision {changes.revision} was told; --from-revision goes on there"
                )
            raise
        finally:
            if timer is not None:
                timer.cancel()


class _Printer:
    """Reports as lines, each flushed: a pipe is read while we run. Lost and Back go to stderr, they are no change."""

    def __init__(self, form: str, backend: str) -> None:
        self._form = form
        self._backend = backend

    def print(self, report: Report) -> None:
        match report:
            case Listed():
                self._listed(report)
            case Change():
                self._change(report)
            case Lost(error, silent):
                since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent))
                text = f"the registry does not answer; nothing new since {since} ({error.message})"
                self._aside("lost", text, {"silent_seconds": round(silent, 3), "message": error.message})
            case Back(after, missed):
                what = "no subnet changed" if not missed else f"{missed} changed, which follows"
                self._aside(
                    "back",
                    f"after {output.age(after)}; {what}",
                    {"after_seconds": round(after, 3), "missed": missed},
                )
        output.flush()

    def _aside(self, event: str, text: str, fields: dict[str, object]) -> None:
        if self._form == "json":
            from json import dumps

            document = {"schema": output.SCHEMA, "time": output.timestamp(), "event": event, **fields}
            output.note(dumps(document))
        else:
            output.note(f"{time.strftime('%H:%M:%S')}  {event:<10}  {text}")

    def _listed(self, listed: Listed) -> None:
        table = listed.table
        if self._form == "json":
            output.json(
                {
                    "time": output.timestamp(),
                    "event": "listed",
                    "revision": table.revision,
                    "resync": listed.resync,
                    "subnets": [self._fields(lease, lease.ttl) for lease in table.leases],
                    "unreadable": [{"key": bad.key, "problem": bad.problem} for bad in table.unreadable],
                }
            )
        elif self._form == "simple":
            output.simple([(int(time.time()), "listed", None, None, None, None, table.revision)])
        else:
            noun = "subnet" if len(table.leases) == 1 else "subnets"
            text = f"{len(table.leases)} {noun} at revision {table.revision}"
            if listed.resync:
                text += "; what happened before is forgotten"
            if table.unreadable:
                text += f", {len(table.unreadable)} more cannot be read"
            output.data(f"{time.strftime('%H:%M:%S')}  {'listed':<10}  {text}")

    def _change(self, change: Change) -> None:
        one = change.after or change.before
        subnet = None if one is None else one.subnet
        public_ip, old = _public_ip(change.after), _public_ip(change.before)
        if change.what == "removed":
            public_ip, old = old, None
        elif public_ip == old:
            old = None
        if self._form == "json":
            fields = self._fields(change.after or change.before, change.ttl)
            output.json(
                {
                    "time": output.timestamp(),
                    "event": change.what,
                    **fields,
                    "old_public_ip": None if old is None else str(old),
                    "expired": change.expired,
                    "resync": change.resync,
                    "key": change.key,
                    "revision": change.revision,
                }
            )
        elif self._form == "simple":
            ttl = None if change.ttl is None else int(change.ttl)
            output.simple(
                [(int(time.time()), change.what, subnet, public_ip or "?", old, ttl, change.revision)]
            )
        else:
            self._line(change, subnet, public_ip, old)

    def _line(
        self, change: Change, subnet: object, public_ip: IPv4Address | None, old: IPv4Address | None
    ) -> None:
        if change.what == "removed":
            detail = "(expired)" if change.expired else ""
        elif not isinstance(change.after, Lease):
            detail = "" if change.after is None else f"({change.after.problem})"
        elif change.after.reservation:
            detail = "reserved"
        else:
            # Servers round what is left down; a fresh lease of a day should read so.
            detail = "ttl ?" if change.ttl is None else f"ttl {output.age(change.ttl + 1)}"
        name = subnet or change.key.rsplit("/", 1)[-1]
        hosts = str(public_ip or "?") if old is None else f"{old} -> {public_ip or '?'}"
        resync = "  resync" if change.resync else ""
        output.line(
            f"{time.strftime('%H:%M:%S')}  {change.what:<10}  {name!s:<18}  {hosts:<15}  {detail:<9}"
            f"  revision {change.revision}{resync}"
        )

    def _fields(self, one: Lease | object, ttl: float | None) -> dict[str, object]:
        """One lease, or what is left of one, as JSON."""
        if isinstance(one, Lease):
            reserved = one.reservation
            own = one.attributes.backend_type
            return {
                "subnet": str(one.subnet),
                "public_ip": str(one.attributes.public_ip),
                "kind": "reservation" if reserved else "lease",
                "ttl_seconds": None if ttl is None else int(ttl),
                "backend": own if reserved and own is None else own or self._backend,
                "backend_data": one.attributes.backend_data,
                "problem": None,
            }
        subnet = getattr(one, "subnet", None)
        return {
            "subnet": None if subnet is None else str(subnet),
            "public_ip": None,
            "kind": None,
            "ttl_seconds": None,
            "backend": None,
            "backend_data": None,
            "problem": getattr(one, "problem", None),
        }


def _public_ip(one: object) -> IPv4Address | None:
    return one.attributes.public_ip if isinstance(one, Lease) else None

"""`flanctl capacity`: how full the network is, and what comes free next."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.options import output_options, registry_options, settings, write_out
from flanctl.errors import FlanctlError, Invalid, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.model.lease import Lease
    from flanctl.registry.leases import Usage
    from flanctl.settings import Settings


@click.command()
@click.option(
    "--min-free",
    metavar="N|P%",
    help="End with 1 if fewer subnets are free, as a number or as a share: 10, 5%. For cron.",
)
@registry_options
@output_options
def capacity(min_free: str | None) -> None:
    """Count the network's subnets: leased, reserved, unreadable, free.

    Says which lease ends first and which subnet this host would get, or has. A lease of another length counts as the
    subnets it covers.

    \b
    Examples:
      flanctl capacity
      flanctl capacity --min-free 10% >/dev/null || mail -s "subnets run out" ops </dev/null
    """
    from flanctl.commands.session import session
    from flanctl.registry.config import read_config
    from flanctl.registry.leases import usage

    least = None if min_free is None else _least(min_free)
    chosen = settings()
    with session(chosen) as registry:
        config = read_config(registry.store, registry.prefix, registry.wanted_dialect).config
        leases = registry.leases()
        with output.Progress("asking how long leases last") as progress:
            table = leases.table(with_ttl=True, progress=progress)
        used = usage(table, config)
        host = _this_host(chosen)
        own = None
        if host is not None:
            own = leases.next_for(config, table, host, _previous(chosen, registry.prefix))
    held = own is not None and any(
        lease.subnet == own and lease.attributes.public_ip == host for lease in table.leases
    )
    oldest = min(
        (lease for lease in table.leases if lease.ttl is not None),
        key=lambda lease: lease.ttl or 0.0,
        default=None,
    )
    total = config.capacity
    form = write_out()
    if form == "json":
        output.json(
            {
                "network": str(config.network),
                "subnet_len": config.subnet_len,
                "subnet_min": str(config.subnet_min),
                "subnet_max": str(config.subnet_max),
                "revision": table.revision,
                "stale": False,
                "as_of": output.timestamp(),
                **asdict(used),
                "total": total,
                "oldest_expiry": _oldest_fields(oldest),
                "this_host": {
                    "public_ip": None if host is None else str(host),
                    "subnet": None if own is None else str(own),
                    "held": held,
                },
            }
        )
    elif form == "simple":
        output.simple([(*row[:2], f"{row[1] / total * 100:.1f}") for row in _rows(used, total)])
    else:
        output.data(
            f"network {config.network}, subnets /{config.subnet_len} from {config.subnet_min} to {config.subnet_max}"
        )
        _table(used, total, oldest, own, held=held)
    if least is not None and used.free < least[0] * (total / 100 if least[1] else 1):
        raise FlanctlError(
            f"{used.free} of {total} subnets free ({_share(used.free, total)}), fewer than {min_free}",
            hint="flanctl subnets ls   shows who holds them",
            id="pool-low" if used.free else "pool-full",
        )


def _least(text: str) -> tuple[float, bool]:
    """A number of subnets, or a share of them in percent (True)."""
    percent = text.endswith("%")
    number = text.removesuffix("%")
    try:
        value = float(number) if percent else int(number)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if percent else 1 << 32):
        raise UsageError(f'--min-free "{text}" is neither a number of subnets nor a share such as 5%')
    return value, percent


def _rows(used: Usage, total: int) -> list[tuple[str, int]]:
    return [*asdict(used).items(), ("total", total)]


def _share(count: int, total: int) -> str:
    return f"{count / total * 100:.1f}%"


def _table(used: Usage, total: int, oldest: Lease | None, own: IPv4Network | None, *, held: bool) -> None:
    remarks = {"unreadable": "counted as taken"}
    if oldest is not None:
        remarks["leased"] = (
            f"oldest expiry in {output.age(oldest.ttl)} ({oldest.subnet}, {oldest.attributes.public_ip})"
        )
    if own is not None:
        remarks["free"] = f"this host has {own}" if held else f"next for this host: {own}"
    output.table(
        ["STATE", "SUBNETS", "SHARE", ""],
        [
            (
                state,
                count,
                "" if state == "total" else _share(count, total),
                remarks.get(state, "") if count or state == "free" else "",
            )
            for state, count in _rows(used, total)
            if count or state != "unreadable"
        ],
        numbers=["SUBNETS", "SHARE"],
    )


def _oldest_fields(oldest: Lease | None) -> dict[str, object] | None:
    if oldest is None or oldest.ttl is None:
        return None
    return {
        "subnet": str(oldest.subnet),
        "public_ip": str(oldest.attributes.public_ip),
        "ttl_seconds": int(oldest.ttl),
        "expires": output.timestamp(oldest.ttl),
    }


def _this_host(chosen: Settings) -> IPv4Address | None:
    """The public IP an agent started here would announce; None where it would not start."""
    from flanctl.agent.kernel.netlink import NetlinkKernel
    from flanctl.agent.underlay import choose_underlay

    try:
        kernel = NetlinkKernel()
    except FlanctlError:
        return None
    try:
        return choose_underlay(
            kernel,
            iface=chosen.items("iface"),
            iface_regex=chosen.items("iface_regex"),
            iface_can_reach=chosen.optional("iface_can_reach"),
            public_ip=chosen.optional("public_ip"),
        ).public_ip
    except FlanctlError:
        return None
    finally:
        kernel.close()


def _previous(chosen: Settings, prefix: str) -> Sequence[IPv4Network]:
    """Subnets this host had, as far as we may read of them."""
    from pathlib import Path

    from flanctl.agent import state
    from flanctl.model.subnet_file import SubnetFile

    previous = []
    try:
        remembered = state.load(Path(chosen.path("state_dir")))
        if remembered is not None and remembered.prefix == prefix and remembered.subnet is not None:
            previous.append(remembered.subnet)
    except FlanctlError:
        pass
    try:
        previous.append(SubnetFile.parse(Path(chosen.path("subnet_file")).read_bytes()).subnet)
    except (OSError, Invalid):
        pass
    return previous

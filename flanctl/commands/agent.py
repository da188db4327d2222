"""`flanctl agent`: the daemon that takes flanneld's place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanctl.commands.options import agent_options, output_options, registry_options, settings
from flanctl.errors import UsageError

SHORTEST_TTL = 10.0
"""Seconds: a request may take 5, and a lease that cannot be renewed in time is worse than a long one."""

if TYPE_CHECKING:
    from flanctl.agent.daemon import Options
    from flanctl.settings import Settings


@click.command()
@click.option(
    "--check", is_flag=True, help="Look at everything, change nothing, say whether the agent could start."
)
@agent_options
@registry_options
@output_options
def agent(check: bool) -> None:
    """Lease a subnet, carry this host's packets, follow every other host.

    Writes subnet.env once packets can flow and tells systemd (Type=notify). SIGTERM stops it and leaves device, rules
    and lease in place, so that a restart keeps the subnet; SIGUSR1 logs packet counters. Ends with 8 when another
    host took our subnet.

    \b
    Examples:
      flanctl agent --iface eth0
      flanctl agent --check --endpoints http://192.168.6.2:2379
    """
    from functools import partial

    from flanctl.agent.daemon import Agent
    from flanctl.agent.log import Log
    from flanctl.agent.machine import Choice, look, refuse_without_rights
    from flanctl.agent.notify import Notify
    from flanctl.clock import BootClock
    from flanctl.commands.session import session
    from flanctl.registry.config import clean_prefix

    refuse_without_rights()
    chosen = settings()
    options = _options(chosen, clean_prefix(chosen.text("prefix")))
    choice = Choice(
        iface=chosen.items("iface"),
        iface_regex=chosen.items("iface_regex"),
        iface_can_reach=chosen.optional("iface_can_reach"),
        public_ip=chosen.optional("public_ip"),
        peer_check=chosen.choice("peer_check", "strict", "subnet", "off"),
    )
    chosen.choice("data_path", "tun")
    with session(chosen, prefer="grpc", create=not check) as registry:
        log = Log()
        daemon = Agent(
            options,
            store=registry.store,
            dialect=registry.dialect,
            look=partial(look, choice=choice),
            log=log,
            notify=Notify(),
            clock=BootClock(),
        )
        if check:
            daemon.check()
            log.info("nothing stands in the way")
        else:
            log.info(
                "settings",
                endpoints=f"{chosen.text('endpoints')} ({chosen.source('endpoints')})",
                prefix=registry.prefix,
                iface=chosen.optional("iface") or "default-route",
            )
            daemon.run()


def _options(chosen: Settings, prefix: str) -> Options:
    from flanctl.agent.daemon import Options

    subnet_file = Path(chosen.text("subnet_file"))
    if subnet_file.is_dir():
        raise UsageError(f"--subnet-file {subnet_file} is a directory")
    return Options(
        prefix=prefix,
        subnet_file=subnet_file.absolute(),
        state_dir=Path(chosen.text("state_dir")).absolute(),
        run_dir=Path(chosen.text("run_dir")).absolute(),
        ip_masq=chosen.switch("ip_masq"),
        forward_rules=chosen.switch("iptables_forward_rules"),
        resync_seconds=chosen.seconds("iptables_resync"),
        # flanneld 0.28 takes 1 to 1439 minutes of its fixed 24 h.
        renew_margin=chosen.number("subnet_lease_renew_margin", 1, 1439) * 60.0,
        lease_ttl=chosen.seconds("lease_ttl", lowest=SHORTEST_TTL),
    )

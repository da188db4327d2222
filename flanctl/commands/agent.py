"""`flanctl agent`: the daemon that takes flanneld's place."""

from __future__ import annotations

import click

from flanctl.commands.options import agent_options, output_options, registry_options, settings


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
    and lease in place, so that a restart keeps the subnet; SIGUSR1 logs packet counters, SIGHUP has it compare
    the machine at once. Ends with 8 when another host took our subnet. flanctl status and --healthz-port tell how
    it is.

    \b
    Examples:
      flanctl agent --iface eth0
      flanctl agent --check --endpoints http://192.168.6.2:2379
    """
    from flanctl.agent.log import Log
    from flanctl.agent.start import start

    start(settings(), log=Log(), check=check)

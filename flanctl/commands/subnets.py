"""`flanctl subnets`: which host holds which subnet, how long still, and what is wrong with it."""

from __future__ import annotations

import click

from flanctl.commands import lease_view, output
from flanctl.commands.arguments import leased, subnet_or_address
from flanctl.commands.options import output_options, registry_options, write_out
from flanctl.errors import NotFound


@click.command()
@click.option(
    "--no-ttl",
    is_flag=True,
    help="Do not ask how long leases last: etcd v3 wants a request for each of them.",
)
@registry_options
@output_options
def ls(no_ttl: bool) -> None:
    """List all subnets with their hosts.

    \b
    Examples:
      flanctl subnets ls
      flanctl subnets ls -w simple | cut -f1,2
      flanctl subnets ls --no-ttl          # quick also with thousands of hosts
    """
    from flanctl.commands.session import session

    with session() as registry:
        view = lease_view.look(registry, with_ttl=not no_ttl)
    lease_view.show(view, write_out())


@click.command()
@click.argument("what", metavar="SUBNET|ADDRESS", shell_complete=leased)
@registry_options
@output_options
def get(what: str) -> None:
    """Show the lease of one subnet, one host, or the host of one container's address.

    \b
    Examples:
      flanctl subnets get 172.17.41.0/24
      flanctl subnets get 172.17.41.7
      flanctl subnets get 192.168.6.2 -w json
    """
    from flanctl.commands.session import session

    wanted = subnet_or_address(what)
    with session() as registry:
        view = lease_view.look(registry, wanted)
    rows = view.rows
    if not rows:
        raise NotFound(
            f"no lease of {wanted} among {len(view.table.leases)} in {view.config.network}",
            hint="flanctl subnets ls",
        )
    form = write_out()
    if form == "json":
        output.json({**lease_view.document(view), "subnets": [lease_view.fields(row) for row in rows]})
    elif form == "simple":
        output.simple([lease_view.simple(row) for row in rows])
    else:
        for row in rows:
            output.pairs(lease_view.details(row))

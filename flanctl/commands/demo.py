"""`flanctl demo`: the whole story on this machine, in a minute."""

from __future__ import annotations

import click

from flanctl import streams
from flanctl.commands import output
from flanctl.commands.options import output_options, write_out


@click.command()
@click.option(
    "--hosts",
    type=click.IntRange(2, 20),
    default=2,
    show_default=True,
    metavar="N",
    help="Hosts to begin with; one more joins.",
)
@click.option("--etcd", is_flag=True, help="With a real etcd (the program on PATH) as the registry.")
@click.option(
    "--data-path",
    type=click.Choice(["auto", "tc", "tun", "tun-plain"]),
    help="How the agents carry packets; unsaid, as an agent does by itself.",
)
@click.option("--keep", is_flag=True, help="Leave it standing; print how to enter and how to remove it.")
@output_options
def demo(hosts: int, etcd: bool, data_path: str | None, keep: bool) -> None:
    """Two hosts on this machine, from an empty registry to packets between containers.

    Needs root and /dev/net/tun. Everything happens in network namespaces of its own and is removed at the end, also
    after Ctrl-C. Ends with 1 at the first step that does not hold.

    \b
    Examples:
      flanctl demo
      flanctl demo --data-path tun
      flanctl demo --etcd --hosts 3 --keep
    """
    from flanctl.demo.story import run_demo

    as_json = write_out() == "json"

    def tell(line: str) -> None:
        if not as_json:
            output.data(line)
            output.flush()

    steps = run_demo(
        tell,
        hosts=hosts,
        etcd=etcd,
        data_path=data_path,
        keep=keep,
        colour=streams.out().isatty() and not as_json,
    )
    if as_json:
        output.json({"steps": steps})
    else:
        tell("")
        tell(f"All {len(steps)} steps hold.")


@click.command(name="demo-transfer", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1)
def transfer(words: tuple[str, ...]) -> None:
    """Send or receive inside a namespace of the demo."""
    from flanctl.demo.transfer import main

    click.get_current_context().exit(main(list(words)))

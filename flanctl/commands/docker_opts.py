"""`flanctl docker-opts`: dockerd's options from subnet.env. Needs no registry and no agent."""

from __future__ import annotations

import os
from pathlib import Path

import click

from flanctl.commands import output
from flanctl.commands.docker_restart import differs, restart
from flanctl.commands.options import output_options
from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, UsageError
from flanctl.files import write_atomically
from flanctl.model.docker_options import docker_options, read_variables

NEEDED = ("FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ")


@click.command()
@click.option(
    "-f",
    "subnet_file",
    default="/run/flannel/subnet.env",
    show_default=True,
    metavar="FILE",
    help="What the agent wrote.",
)
@click.option(
    "-d",
    "target",
    default="/run/flannel/docker",
    show_default=True,
    metavar="FILE|-",
    help="Where to write; - prints.",
)
@click.option(
    "-i", "individual", is_flag=True, help="Write DOCKER_OPT_* lines (with neither -i nor -c: both)."
)
@click.option("-c", "combined", is_flag=True, help="Write one line with all options.")
@click.option("-m", "no_ip_masq", is_flag=True, help="Leave --ip-masq out.")
@click.option(
    "-k",
    "key",
    default="DOCKER_NETWORK_OPTIONS",
    show_default=True,
    metavar="NAME",
    help="Variable of the combined line.",
)
@click.option(
    "--restart",
    "service",
    metavar="UNIT",
    help="Restart this unit if it runs and FILE is another than before: dockerd reads its options at its start only.",
)
@output_options
def docker_opts(
    subnet_file: str,
    target: str,
    individual: bool,
    combined: bool,
    no_ip_masq: bool,
    key: str,
    service: str | None,
) -> None:
    """Render dockerd's --bip, --ip-masq and --mtu from subnet.env, for an EnvironmentFile= line.

    \b
    Examples:
      flanctl docker-opts
      flanctl docker-opts -d - -c
    """
    variables = _inherited(key) | _variables(subnet_file)
    content = docker_options(
        variables, individual=individual, combined=combined, key=key, ip_masq=not no_ip_masq
    )
    if target == "-":
        if service is not None:
            raise UsageError("--restart is for a file that changed; -d - writes none")
        output.data(content.rstrip("\n"))
        return
    if target == "/dev/stdout":
        raise UsageError(
            "-d /dev/stdout would have to be replaced by a file", hint="flanctl docker-opts -d -   prints"
        )
    changed = service is not None and differs(target, content)
    write_atomically(Path(target), content.encode())
    output.note(
        f"wrote {target}: --bip={variables['FLANNEL_SUBNET']} --mtu={variables['FLANNEL_MTU']} (from {subnet_file})"
    )
    if service is not None and changed:
        restart(service)


def _inherited(key: str) -> dict[str, str]:
    """What the unit's other EnvironmentFile= gave comes first in the line, as with mk-docker-opts.sh."""
    return {name: text for name, text in os.environ.items() if name == key or name.startswith("DOCKER_OPT_")}


def _variables(path: str) -> dict[str, str]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(65_537)
    except FileNotFoundError:
        raise NotFound(
            f"no subnet file {path}", hint="start flanctl agent first; it writes the file once it is ready"
        ) from None
    except PermissionError:
        raise NotPermitted(f"no right to read {path}") from None
    except OSError as error:
        raise Invalid(f"cannot read {path}: {error.strerror}") from None
    if len(content) > 65_536:
        raise Invalid(f"{path} is larger than 64 KiB: not a subnet file")
    if not content.strip():
        raise Invalid(f"{path} is empty", hint="restart flanctl agent; it writes the file anew")
    try:
        variables = read_variables(content, name=path)
    except FlanctlError as error:
        error.hint = error.hint or "restart flanctl agent; it writes the file anew"
        raise
    if missing := [name for name in NEEDED if name not in variables]:
        raise Invalid(
            f"{path} is incomplete: {', '.join(missing)} missing",
            hint="restart flanctl agent; it writes the file anew",
        )
    return variables

"""`flanctl docker-opts`: what Docker must know, from subnet.env. Needs no registry and no agent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanctl.commands import output
from flanctl.commands.docker_restart import differs, restart
from flanctl.commands.options import output_options
from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, UsageError
from flanctl.files import write_atomically
from flanctl.model.docker_options import docker_options, read_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

NEEDED = ("FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ")
_TARGETS = {"env": "/run/flannel/docker", "json": "/etc/docker/daemon.json", "network": "-"}
_MAX_JSON = 1_000_000
"""Bytes of a daemon.json we touch; an operator's has a few hundred."""
DAEMON_JSON = Path(_TARGETS["json"])
"""Where dockerd is told which firewall backend to use."""


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
    metavar="FILE|-",
    help="Where to write; - prints. Default: /run/flannel/docker, with --format json /etc/docker/daemon.json, with "
    "--format network -.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(tuple(_TARGETS)),
    default="env",
    show_default=True,
    help="env: a file for EnvironmentFile=. json: into daemon.json, other keys kept. network: arguments of docker "
    "network create.",
)
@click.option(
    "--accept/--no-accept",
    default=None,
    help="Add what lets packets of other hosts in where the agent's rules cannot: Docker 29's nftables backend, or a "
    "network of its own. Older daemons refuse the options. Without either, where daemon.json says "
    '"firewall-backend": "nftables".',
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
    target: str | None,
    form: str,
    accept: bool | None,
    individual: bool,
    combined: bool,
    no_ip_masq: bool,
    key: str,
    service: str | None,
) -> None:
    """Render what Docker must know of subnet.env: --bip, --ip-masq and --mtu.

    \b
    Examples:
      flanctl docker-opts
      flanctl docker-opts -d - -c
      flanctl docker-opts --format json --restart docker.service
      docker network create $(flanctl docker-opts --format network) overlay
    """
    where = _TARGETS[form] if target is None else target
    if where == "-" and service is not None:
        raise UsageError("--restart is for a file that changed; -d - writes none")
    if where == "/dev/stdout":
        raise UsageError(
            "-d /dev/stdout would have to be replaced by a file", hint="flanctl docker-opts -d -   prints"
        )
    if form != "env" and (individual or combined):
        raise UsageError(f"-i and -c are about the lines of --format env, not {form}")
    variables = _variables(subnet_file)
    if accept is None:
        accept = form != "network" and _has_nftables_backend(
            Path(where) if form == "json" and where != "-" else DAEMON_JSON
        )
    mode, ip_masq = 0o644, not no_ip_masq
    if form == "json":
        from flanctl.model.docker_formats import daemon_settings

        settings = daemon_settings(variables, ip_masq=ip_masq, accept=accept)
        content, mode = _daemon_json(where, settings)
    elif form == "network":
        from flanctl.model.docker_formats import network_arguments

        content = " ".join(network_arguments(variables, ip_masq=ip_masq, accept=accept)) + "\n"
    else:
        content = docker_options(
            _inherited(key) | variables,
            individual=individual,
            combined=combined,
            key=key,
            ip_masq=ip_masq,
            accept=accept,
        )
    if where == "-":
        output.data(content.rstrip("\n"))
        return
    told = (
        f"{where}: --bip={variables['FLANNEL_SUBNET']} --mtu={variables['FLANNEL_MTU']} (from {subnet_file})"
    )
    changed = differs(where, content)
    if form == "json" and not changed:  # an operator's file keeps its date, too
        output.note(f"nothing to change in {told}")
        return
    write_atomically(Path(where), content.encode(), mode=mode)
    output.note(f"wrote {told}")
    if service is not None and changed:
        restart(service)


def _has_nftables_backend(path: Path) -> bool:
    """Whether dockerd's settings name that backend. A file it would not start with either is not ours to judge."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON)
        if b"nftables" not in content:
            return False
        import json

        settings = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.get("firewall-backend") == "nftables"


def _daemon_json(where: str, settings: Mapping[str, str | int | bool]) -> tuple[str, int]:
    """The text of a daemon.json with our settings among those it has, and its mode."""
    from flanctl.model.docker_formats import merge

    before, mode = b"", 0o644
    if where != "-":
        try:
            with open(where, "rb") as file:
                before, mode = file.read(_MAX_JSON + 1), os.fstat(file.fileno()).st_mode & 0o777
        except FileNotFoundError:
            pass
        except PermissionError:
            raise NotPermitted(f"no right to read {where}") from None
        except OSError as error:
            raise Invalid(f"cannot read {where}: {error.strerror}") from None
    if len(before) > _MAX_JSON:
        raise Invalid(f"{where} is larger than {_MAX_JSON // 1_000_000} MB: not a daemon.json")
    try:
        return merge(before, settings, name=where).decode(), mode
    except Invalid as error:
        error.hint = error.hint or "correct it, dockerd does not start with it either; it was not touched"
        raise


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

"""What an agent that has stopped left on its host, and taking it away: TC programs, rules, devices, files.

    with nobody_runs(run_dir):
        for step in steps(places):
            step.do()

Everything is known by its mark (docs/decisions/0002); what lacks it is somebody else's and stays. The lease stays in the
registry, where it ends by itself.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from flanctl.agent import known, state
from flanctl.agent.backends import kernel_path
from flanctl.agent.host import daemons
from flanctl.agent.kernel.docker_accept import DockerAccept
from flanctl.agent.kernel.iptables import Iptables
from flanctl.agent.kernel.links import ALIAS
from flanctl.agent.kernel.netlink import NetlinkKernel
from flanctl.agent.kernel.rules import IptablesRules
from flanctl.agent.kernel.tc import PREFERENCE
from flanctl.agent.lock import refuse_locked
from flanctl.errors import Conflict, FlanctlError, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_ANY = IPv4Network("0.0.0.0/0")
"""Ours are found by name and comment, whatever network they were for."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the agent kept its files."""

    subnet_file: Path
    state_dir: Path
    run_dir: Path


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to take away: `program`, `rules`, `device` or `file`, and how an administrator would type it, a line each."""

    kind: str
    commands: tuple[str, ...]
    do: Callable[[], None]


def refuse_running(run_dir: Path) -> None:
    """Raise Conflict while an agent or a flanneld runs on this host: what is here is in use."""
    refuse_locked(run_dir)
    for name, pid in daemons():
        raise Conflict(
            f"{name} runs on this host (pid {pid})", hint=f"stop it first: kill {pid}", id="already-running"
        )


def steps(places: Places) -> list[Step]:
    """Everything there is to take away, in order. Only looks. Raises NotPermitted without CAP_NET_ADMIN."""
    return [*_programs(), *_devices(), *_rules(), *_files(places)]


def _programs() -> list[Step]:
    """The kernel path: TC programs, encapsulation first, then the maps of this network namespace."""
    kernel = NetlinkKernel()
    try:
        commands = [
            f"tc filter delete dev {link} {direction} pref {PREFERENCE}"
            for link, direction in kernel_path.attached(kernel)
        ]
    finally:
        kernel.close()
    steps = [Step("program", tuple(commands), _detach)] if commands else []
    pins = kernel_path.pinned()
    return [*steps, *(Step("program", (f"rm -r {path}",), partial(kernel_path.unpin, path)) for path in pins)]


def _detach() -> None:
    kernel = NetlinkKernel()
    try:
        kernel_path.detach(kernel, tidy=True)
    finally:
        kernel.close()


def _devices() -> list[Step]:
    """Routes go with their device."""
    kernel = NetlinkKernel()
    try:
        names = [link.name for link in kernel.links() if link.alias == ALIAS]
    finally:
        kernel.close()
    return [Step("device", (f"ip link delete {name}",), partial(_delete_link, name)) for name in names]


def _delete_link(name: str) -> None:
    kernel = NetlinkKernel()
    try:
        kernel.delete_link(name)
    finally:
        kernel.close()


def _rules() -> list[Step]:
    plans: list[tuple[Iptables, list[str]]] = [(Iptables(), IptablesRules(_ANY, _ANY).removal())]
    plans += DockerAccept(_ANY, _ANY, "flannel0").removal()
    return [
        Step("rules", tuple(_typed(iptables, script)), partial(iptables.restore, "\n".join(script) + "\n"))
        for iptables, script in plans
        if script
    ]


def _typed(iptables: Iptables, script: Sequence[str]) -> list[str]:
    """`iptables -t nat -X FLANNEL-POSTRTG` for each line of a script for iptables-restore."""
    commands, table = [], ""
    for line in script:
        if line.startswith("*"):
            table = line[1:]
        elif line != "COMMIT":
            commands.append(f"{iptables.name} -t {table} {line}")
    return commands


def _files(places: Places) -> list[Step]:
    """The agent's and docker-opts' files, then folders that are empty without them."""
    files = [
        places.subnet_file,
        places.subnet_file.parent / "docker",
        places.state_dir / state.FILE,
        places.state_dir / known.FILE,
        places.run_dir / "agent.sock",
        places.run_dir / "agent.lock",
    ]
    there = [path for path in files if os.path.lexists(path)]
    found = [Step("file", (f"rm {path}",), partial(_unlink, path)) for path in there]
    for folder in dict.fromkeys((places.subnet_file.parent, places.state_dir, places.run_dir)):
        try:
            left = {folder / name for name in os.listdir(folder)} - set(there)
        except OSError:
            continue
        if not left:
            found.append(Step("file", (f"rmdir {folder}",), partial(_rmdir, folder)))
    return found


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot("remove", path, error) from None


def _rmdir(folder: Path) -> None:
    """Somebody may have put a file there meanwhile, or something may be mounted there; then it stays."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY}:
            return
        raise _cannot("remove", folder, error) from None


def _cannot(what: str, path: Path, error: OSError) -> FlanctlError:
    kind = NotPermitted if isinstance(error, PermissionError) else FlanctlError
    return kind(f"cannot {what} {path}: {error.strerror}")

"""What an install puts where, seen from what is on the host. Nothing is changed here.

/usr/bin/flanctl                              the program, unless it is there
/etc/systemd/system/flanctl-agent.service     unless a package brought it
…/docker.service.d/flanctl.conf               unless docker.service reads /run/flannel/docker already
as flanneld, instead of the first unit:
/usr/bin/flanneld, flanneld-start, /usr/libexec/flannel/mk-docker-opts.sh      links to the program
/etc/systemd/system/flanneld.service          unless there is one
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.errors import Conflict, NotFound
from flanctl.install.places import File, Link
from flanctl.install.units import unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.install.ledger import Ledger
    from flanctl.install.places import Root, State, Wanted

PROGRAM = "/usr/bin/flanctl"
NAMES = ("/usr/bin/flanneld", "/usr/bin/flanneld-start", "/usr/libexec/flannel/mk-docker-opts.sh")
OWN_UNITS = "/etc/systemd/system"
DROP_IN = f"{OWN_UNITS}/docker.service.d/flanctl.conf"
_UNITS = (
    OWN_UNITS,
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
"""Where systemd looks for units, strongest first (systemd.unit(5))."""
_OPTIONS_FILE = "/run/flannel/docker"


@dataclass(frozen=True, slots=True)
class Step:
    """One place and what is to stand there; `state` is what stands there now."""

    place: str
    wanted: Wanted
    state: State

    @property
    def needed(self) -> bool:
        now, then = self.state, self.wanted.state
        return (now.kind, now.text, now.mode) != (then.kind, then.text, then.mode)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in their order, what else is worth knowing, and what to type afterwards."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    next: tuple[str, ...]


def plan(root: Root, ledger: Ledger, *, as_flanneld: bool) -> Plan:
    """Raises Invalid or NotPermitted for a place that cannot be used, Conflict where the other unit was installed,
    NotFound for a unit this flanctl lacks.
    """
    service = "flanneld.service" if as_flanneld else "flanctl-agent.service"
    other = "flanctl-agent.service" if as_flanneld else "flanneld.service"
    if f"{OWN_UNITS}/{other}" in ledger.entries:
        raise Conflict(
            f"an earlier install has put {other} here, and one host has one agent",
            hint="flanctl uninstall, then this again",
            id="other-install",
        )
    notes: list[str] = []
    wanted: dict[str, Wanted] = {}
    if (program := _program(root)) is not None:
        wanted[PROGRAM] = program
    if as_flanneld:
        wanted |= {name: Link(PROGRAM) for name in NAMES}
    ours = f"{OWN_UNITS}/{service}"
    found = _found(root, service)
    is_ours = found is None or (found == ours and ours in ledger.entries)
    if is_ours:
        wanted[ours] = File(unit(service).encode())
    docker = _docker(root, service, notes)
    if docker is not None and as_flanneld and not is_ours:
        # Who has flannel's unit has a way of giving docker its options, or is about to: ours would come between.
        docker = None
        notes.append(
            f"docker.service does not read {_OPTIONS_FILE} yet: its containers have no subnet of the network"
        )
    if docker is not None:
        wanted[DROP_IN] = File(docker.encode())
    elif _found(root, "docker.service") is None:
        notes.append("there is no docker.service yet: once Docker is there, run this again for its drop-in")
    if any(root.path(f"{OWN_UNITS}/multi-user.target.wants/{other}").parent.glob(other)):
        notes.append(f"{other} is enabled: one host has one agent; systemctl disable --now {other}")
    steps = tuple(Step(place, what, root.look(place)) for place, what in wanted.items())
    restart = () if docker is None else ("systemctl restart docker",)
    return Plan(
        steps, tuple(notes), (f"systemctl enable {service}", f"systemctl restart {service}", *restart)
    )


def _program(root: Root) -> Wanted | None:
    """What has to be put at /usr/bin/flanctl: the running program, unless it is that, or what is there leads to it.

    A program that is called /usr/bin/flanneld, with /usr/bin/flanctl a link to it, is copied first: the link that comes
    to stand at its place must not lead to itself.
    """
    me = _running()
    place = root.path(PROGRAM)
    there = Path(os.path.realpath(place))
    names = {root.path(name) for name in NAMES}
    if there.is_file() and there not in names and not _passes(place, names):
        if os.path.samefile(there, me):
            return None
        if (
            getattr(sys, "frozen", False)
            and there.stat().st_size == me.stat().st_size
            and there.read_bytes() == me.read_bytes()
        ):
            return None
    if getattr(sys, "frozen", False):
        return File(me.read_bytes(), 0o755)
    return Link(str(me))  # a checkout's program is a script that belongs to its environment


def _passes(link: Path, names: set[Path]) -> bool:
    """Whether a chain of links goes over one of the places that will lead back to it."""
    for _ in range(40):  # the kernel's own limit
        if link in names:
            return True
        if not link.is_symlink():
            return False
        target = link.parent / os.readlink(link)
        link = Path(os.path.normpath(target))
    return True


def _running() -> Path:
    """The file this program is."""
    if getattr(sys, "frozen", False):
        return Path(os.path.realpath("/proc/self/exe"))
    script = Path(sys.executable).with_name("flanctl")
    if not script.exists():
        raise NotFound(f"there is no {script} to link to", hint="make setup")
    return script


def _found(root: Root, name: str) -> str | None:
    """The unit file that counts."""
    for folder in _UNITS:
        place = f"{folder}/{name}"
        if os.path.lexists(root.path(place)):
            return place
    return None


def _docker(root: Root, service: str, notes: list[str]) -> str | None:
    """The drop-in docker.service needs, or None if it has what it needs, or is not there."""
    place = _found(root, "docker.service")
    if place is None:
        return None
    text = "\n".join(_texts(root, place))
    if re.search(rf"^[ \t]*EnvironmentFile[ \t]*=[ \t]*-?{_OPTIONS_FILE}[ \t]*$", text, re.MULTILINE):
        return None
    _look_at_daemon_json(root, notes)
    commands = _commands(text)
    lines = [
        "# Written by flanctl install: dockerd takes its subnet and MTU from the agent.",
        "[Unit]",
        "# Wants, not Requires: a restart of the agent must not restart every container.",
        f"Wants={service}",
        f"After={service}",
        "",
        "[Service]",
        "# No - before the path: without a subnet docker0 would get an address of its own choice, and keep it.",
        f"EnvironmentFile={_OPTIONS_FILE}",
    ]
    if commands and not any("DOCKER_NETWORK_OPTIONS" in command for command in commands):
        lines.append("ExecStart=")
        lines += [f"ExecStart={command} $DOCKER_NETWORK_OPTIONS" for command in commands]
    return "\n".join([*lines, ""])


def _texts(root: Root, place: str) -> Iterator[str]:
    """docker.service and its drop-ins but ours, in systemd's order."""
    drop_ins: dict[str, Path] = {}
    for folder in reversed(_UNITS):
        for path in root.path(f"{folder}/docker.service.d/x").parent.glob("*.conf"):
            drop_ins[path.name] = path
    drop_ins.pop(Path(DROP_IN).name, None)
    for path in (root.path(place), *(drop_ins[name] for name in sorted(drop_ins))):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue  # a masked or dangling one says nothing


def _commands(text: str) -> list[str]:
    """The ExecStart= that count: an empty one forgets those before it; a backslash joins lines."""
    commands: list[str] = []
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    for match in re.finditer(r"^[ \t]*ExecStart[ \t]*=[ \t]*(.*?)[ \t]*$", joined, re.MULTILINE):
        if match[1]:
            commands.append(match[1])
        else:
            commands.clear()
    return commands


def _look_at_daemon_json(root: Root, notes: list[str]) -> None:
    import json

    try:
        settings = json.loads(root.path("/etc/docker/daemon.json").read_bytes())
    except (OSError, ValueError):
        return
    twice = [name for name in ("bip", "mtu", "ip-masq") if isinstance(settings, dict) and name in settings]
    if twice:
        notes.append(
            f"/etc/docker/daemon.json has {', '.join(twice)}: dockerd refuses to start with that on its command line"
            " too; take it out"
        )

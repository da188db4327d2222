"""What anybody can see of this host without asking the agent: files, links, routes, processes. Only looks.

    facts = look_around(Path("/run/flannel/subnet.env"))

It is what `flanctl status` knows when nobody answers, and what it compares the agent's words with.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError, Invalid
from flanctl.model.docker_options import MAX_BYTES
from flanctl.model.subnet_file import SubnetFile

if TYPE_CHECKING:
    from flanctl.agent.kernel.model import Link

DEVICES = ("flannel0", "flannel.1")
_BIP = re.compile(r"--bip=([0-9./]+)")


@dataclass(frozen=True, slots=True)
class Facts:
    """One look. A sentence in `*_trouble` says why the fact beside it is not known."""

    subnet_path: Path
    subnet_file: SubnetFile | None
    subnet_trouble: str | None
    docker_path: Path
    docker_bip: str | None
    """`--bip` in the options file for dockerd, None without the file or without one in it."""
    device: Link | None
    """flannel0, or flannel.1 where there is only that."""
    docker0: Link | None
    routes: tuple[str, ...]
    """Destinations that the device is the way to, in the main table."""
    kernel_trouble: str | None
    processes: tuple[tuple[str, int], ...]
    """Daemons of this network namespace that may carry packets: `flanneld` or `flanctl agent`, and pid."""


def look_around(subnet_path: Path, *, proc: Path = Path("/proc")) -> Facts:
    """Never raises; what cannot be seen is said."""
    content, trouble = _read(subnet_path)
    subnet_file = None
    if content is not None:
        try:
            subnet_file = SubnetFile.parse(content, name=str(subnet_path))
        except Invalid as error:
            trouble = error.message
    docker_path = subnet_path.parent / "docker"
    options, _ = _read(docker_path)
    bip = None if options is None else _BIP.search(options.decode(errors="replace"))
    device, docker0, routes, kernel_trouble = _kernel()
    return Facts(
        subnet_path,
        subnet_file,
        trouble,
        docker_path,
        None if bip is None else bip[1],
        device,
        docker0,
        routes,
        kernel_trouble,
        daemons(proc),
    )


def _read(path: Path) -> tuple[bytes | None, str | None]:
    """The content, or why there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not hold us up
        with os.fdopen(handle, "rb") as file:
            return file.read(MAX_BYTES + 1), None
    except FileNotFoundError:
        return None, f"there is no {path}"
    except OSError as error:
        return None, f"cannot read {path}: {error.strerror}"


def _kernel() -> tuple[Link | None, Link | None, tuple[str, ...], str | None]:
    from flanctl.agent.kernel.netlink import NetlinkKernel

    try:
        kernel = NetlinkKernel()
    except FlanctlError as error:
        return None, None, (), error.message
    try:
        links = {link.name: link for link in kernel.links()}
        device = next((links[name] for name in DEVICES if name in links), None)
        found = () if device is None else kernel.routes(link=device.index)
        return device, links.get("docker0"), tuple(str(route.destination) for route in found), None
    except FlanctlError as error:
        return None, None, (), error.message
    finally:
        kernel.close()


def daemons(proc: Path = Path("/proc")) -> tuple[tuple[str, int], ...]:
    """flanneld and flanctl agents in our network namespace, by pid.

    Whose namespace we may not see (other users' processes, without root) is listed too: better one too many.
    """
    found = []
    try:
        ours = os.readlink(proc / "self/ns/net")
        numbers = sorted(int(name) for name in os.listdir(proc) if name.isdigit())
    except OSError:
        return ()
    for pid in numbers:
        try:
            words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        name = _daemon(words)
        if name is None or pid == os.getpid():
            continue
        try:
            if os.readlink(proc / str(pid) / "ns/net") != ours:
                continue
        except OSError:
            pass
        found.append((name, pid))
    return tuple(found)


def _daemon(words: list[str]) -> str | None:
    """`/usr/bin/flanneld …`, `/usr/bin/flanctl … agent …`, `python3 -m flanctl agent`, `python3 …/flanctl agent`."""
    names = [os.path.basename(word) for word in words[:3]]
    if names[:1] == ["flanneld"]:
        return "flanneld"
    if "agent" not in words:
        return None
    if names[:1] == ["flanctl"]:
        return "flanctl agent"
    return "flanctl agent" if names[0].startswith("python") and "flanctl" in names[1:] else None

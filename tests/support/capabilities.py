"""What this machine can do for a test. Each probe answers None (yes) or why not."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


CGROUP_ROOTS = tuple(Path("/sys/fs/cgroup", name) for name in ("systemd", "unified", "."))
"""Where systemd's own hierarchy may be: beside version 1's controllers, or alone."""


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _netns() -> str | None:
    if why := _root() or _program("ip")() or _program("nsenter")():
        return why
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"unshare --net: {probe.stderr.strip()}"


def _tun() -> str | None:
    if why := _root():
        return why
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    return None


def _bpf() -> str | None:
    """Whether this kernel takes TC programs from us, and has a file system to pin their maps in."""
    if why := _root():
        return why
    return None if Path("/sys/fs/bpf").is_dir() else "no /sys/fs/bpf"


def _program(*names: str) -> Callable[[], str | None]:
    def look() -> str | None:
        missing = [name for name in names if shutil.which(name) is None]
        return f"no {', '.join(missing)} on PATH" if missing else None

    return look


def _etcd34() -> str | None:
    if why := _program("etcd", "etcdctl")():
        return why
    version = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=False).stdout
    return None if "etcd Version: 3.4." in version else "etcd on PATH is not 3.4"


def _etcd37() -> str | None:
    if why := _program("etcdctl")():  # readiness is asked with it
        return why
    if os.environ.get("FLANCTL_ETCD37") and Path(os.environ["FLANCTL_ETCD37"]).exists():
        return None
    return _program("go")()


def _dockerd() -> str | None:
    return _root() or _program("dockerd", "containerd", "runc", "docker", "busybox")()


def _dockerd_newest() -> str | None:
    from tests.support import dockerd_build

    return _dockerd() or dockerd_build.missing()


def _kernel_link(kind: str) -> Callable[[], str | None]:
    """Whether this kernel makes a link of a kind, tried in a namespace that goes at once."""

    def look() -> str | None:
        if why := _netns():
            return why
        make = f"ip link add probe0 type {kind}"
        if kind == "vxlan":
            make += " id 7 dstport 8472"
        if kind in {"macvlan", "vlan"}:  # on another link
            make = f"ip link add up0 type veth && ip link add link up0 name probe0 type {kind}"
        if kind == "vlan":
            make += " id 7"
        probe = subprocess.run(
            ["unshare", "--net", "sh", "-c", make], capture_output=True, text=True, check=False
        )
        return None if probe.returncode == 0 else f"this kernel makes no {kind} link"

    return look


def frozen_executable() -> Path:
    """The one-file build under test: $FLANCTL_EXE, or what `make freeze` made."""
    return Path(os.environ.get("FLANCTL_EXE") or "dist/flanctl").absolute()


def _frozen() -> str | None:
    path = frozen_executable()
    if not path.exists():
        return f"no {path}: make freeze"
    try:
        probe = subprocess.run([path, "version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    return None if probe.returncode == 0 else f"{path} does not run: {probe.stderr.strip()}"


def _debian_tree() -> str | None:
    return _netns() or _program("mmdebstrap", "dpkg-deb", "chroot")()


def _nspawn() -> str | None:
    """Whether a Debian tree can be booted: its systemd needs a control group of its own, its root an overlay."""
    if why := _debian_tree() or _program("systemd-nspawn")():
        return why
    if not any(os.access(folder / "cgroup.procs", os.W_OK) for folder in CGROUP_ROOTS):
        return "no control groups that systemd can be given one of"
    return None if "\toverlay" in Path("/proc/filesystems").read_text() else "no overlay file system"


_PROBES: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "netns": _netns,
    "tun": _tun,
    "vxlan": _kernel_link("vxlan"),
    "bpf": _bpf,
    "ifb": _kernel_link("ifb"),
    "macvlan": _kernel_link("macvlan"),
    "vlan": _kernel_link("vlan"),
    "bond": _kernel_link("bond"),
    "ethtool": _program("ethtool"),
    "iptables": _program("iptables", "iptables-save", "iptables-restore"),
    "nft": _program("nft"),
    "firewalld": _program("firewalld", "firewall-cmd", "dbus-daemon"),
    "iperf3": _program("iperf3"),
    "tcpdump": _program("tcpdump"),
    "ping": _program("ping"),
    "etcd34": _etcd34,
    "etcd37": _etcd37,
    "dockerd": _dockerd,
    "dockerd-newest": _dockerd_newest,
    "frozen": _frozen,
    "debian-tree": _debian_tree,
    "go": _program("go"),
    "rpm": _program("rpm"),
    "systemd": _program("systemd-analyze"),
    "nspawn": _nspawn,
    "mandoc": _program("mandoc"),
    "shells": _program("bash", "zsh", "fish"),
    "qemu-user": _program("qemu-x86_64"),
    "openssl": _program("openssl"),
    "prlimit": _program("prlimit"),
    "cc": _program("cc"),
    "apt": _program("apt-get", "apt-cache", "dpkg-source"),
    "binutils": _program("objdump", "readelf"),
}
NAMES = tuple(_PROBES)
OPTIONAL = frozenset({"vlan", "bond"})
"""What the kernels of many machines lack, CI's among them: `--require all` does not ask
for these, their tests skip loudly; by name they can be required."""


@functools.cache
def missing(name: str) -> str | None:
    """None if the machine can, else the reason. KeyError for a capability nobody defined."""
    return _PROBES[name]()


def summary() -> list[str]:
    return [name if (why := missing(name)) is None else f"NOT {name} ({why})" for name in NAMES]

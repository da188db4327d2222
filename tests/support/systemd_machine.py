"""A Debian under its own systemd on a host of a lab: systemd-nspawn in the host's network, on an overlay over one tree.

    tree = systemd_tree(tmp_path / "layer")                    # once a session
    with Machine(host, tree, tmp_path / "m1", hostname="k8s-node2") as machine:
        machine.write("etc/sysconfig/flanneld", text)          # before boot() or while it runs
        machine.boot()
        machine.ok("systemctl", "start", "flanneld")
        (machine / "run/flannel/subnet.env").read_text()

    lab host's network namespace ── systemd (process 1 of a namespace of its own) ── units, dockerd, containers
      root: overlay, upper folder in `folder`, lower the tree with flanctl laid over it
      control group: one of our own in systemd's hierarchy, version 2 inside, so that dockerd's are below it too

--network-namespace-path and not --private-network: the lab has the cables. Files written before a boot are there after
it; /run is not. Nothing is seen outside: mounts are made in a mount namespace that ends with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support.capabilities import CGROUP_ROOTS, frozen_executable
from tests.support.deadline import until
from tests.support.debian_tree import ENVIRONMENT, Answer, debian_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.demo.hosts import Host

BOOT_SECONDS = 60.0
"""Two seconds on an idle machine."""
_PACKAGES = (
    "systemd-sysv", "dbus", "iptables", "iproute2", "iputils-ping", "procps", "kmod",
    "docker.io", "busybox-static", "etcd-server", "etcd-client",
)  # fmt: skip
_ARGUMENTS = (
    "--variant=minbase",
    f"--include={','.join(_PACKAGES)}",
    *(f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in ("doc", "locale", "man")),
)
_BOOT = """
set -e
folder=$1 tree=$2 groups=$3
shift 3
for group in $groups; do
    mkdir -p "$group"
    echo $$ >"$group/cgroup.procs"
done
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
mount -t overlay -o "lowerdir=$tree,upperdir=$folder/upper,workdir=$folder/work" overlay "$folder/root"
exec systemd-nspawn --directory="$folder/root" "$@"
"""
_NSPAWN = (
    "--boot", "--register=no", "--keep-unit", "--console=pipe", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
    # What dockerd needs beyond nspawn's default: containers' keyrings, and device rules of control groups version 2.
    "--capability=all", "--system-call-filter=@keyring bpf",
)  # fmt: skip

_SWITCHES = {
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # The network is the machine's own: its sysctls are, too, which nspawn cannot know of a namespace it is given.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}


def bare_tree() -> Path:
    """The tree in the cache, made by the first who asks."""
    return debian_folder("systemd", "bookworm", _ARGUMENTS)


def systemd_tree(layer: Path) -> str:
    """The folders under every machine's root, as overlayfs wants them: the frozen flanctl in `layer`, which is made, over
    the tree, which lies unpacked in the cache and is written to by nobody.
    """
    tree = bare_tree()
    (layer / "usr/bin").mkdir(parents=True)
    shutil.copy2(frozen_executable(), layer / "usr/bin/flanctl")
    return f"{layer}:{tree}"


@dataclass
class _Running:
    nspawn: subprocess.Popen[Any]
    leader: int = 0
    """systemd's process id, as the machine outside sees it."""


class Machine:
    """A context manager; its end is a power cut."""

    def __init__(self, host: Host, tree: str, folder: Path, *, hostname: str = "") -> None:
        """Nothing runs before `boot`."""
        self.host = host
        self.folder = folder
        self.hostname = hostname or host.name
        self.console = folder / "console"
        self._tree = tree
        self._running: _Running | None = None
        self._groups = [group / host.namespace for group in CGROUP_ROOTS if (group / "cgroup.procs").exists()]
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True)
        self.write("etc/hostname", self.hostname + "\n")
        # What Debian's packages enable, a test starts where it wants it.
        for service in ("docker.service", "containerd.service", "etcd.service"):
            self.hide(f"etc/systemd/system/multi-user.target.wants/{service}")
        self.hide("etc/systemd/system/sockets.target.wants/docker.socket")
        # A tree without one would be taken for a first boot, which enables whatever Debian enables.
        self.write("etc/machine-id", hashlib.md5(host.namespace.encode()).hexdigest() + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()
        shutil.rmtree(self.folder / "upper", ignore_errors=True)
        shutil.rmtree(self.folder / "work", ignore_errors=True)

    # ---- files --------------------------------------------------------------------------------------------------

    def __truediv__(self, path: str) -> Path:
        """A file of the running machine; before boot, of what is laid over the tree. No absolute link on the way."""
        base = Path(f"/proc/{self._leader}/root") if self._running else self.folder / "upper"
        return base / path

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Folders are made."""
        target = self / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def link(self, path: str, target: str) -> None:
        link = self / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)

    def hide(self, path: str) -> None:
        """Take a file of the tree away, in overlayfs' way: a device 0/0 stands for it."""
        hidden = self / path
        hidden.parent.mkdir(parents=True, exist_ok=True)
        os.mknod(hidden, 0o600 | stat.S_IFCHR)

    def text(self, path: str) -> str:
        return (self / path).read_text()

    # ---- life ---------------------------------------------------------------------------------------------------

    def boot(self) -> Self:
        """Returns once systemd has done basic.target and takes orders; services may still be on their way."""
        assert self._running is None, f"{self.hostname} runs"
        words = [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOT, "sh"),
            *(str(self.folder), self._tree, " ".join(map(str, self._groups))),
            *(*_NSPAWN, f"--machine={self.host.namespace}"),
            f"--network-namespace-path={self.host.path}",
        ]
        environment = ENVIRONMENT | _SWITCHES
        with self.console.open("ab") as console:
            nspawn = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._running = _Running(nspawn)
        until(self._up, seconds=BOOT_SECONDS, what=f"{self.hostname} is up")
        return self

    def power_off(self) -> None:
        """In order, every unit stopped; then the devices, which a machine without power has not, go too."""
        assert self._running is not None
        self._running.nspawn.terminate()
        self._running.nspawn.wait(BOOT_SECONDS)
        self.cut_power()

    def cut_power(self) -> None:
        """At once and whatever happens in it. Nothing of it is left but its files; safe to call twice."""
        running, self._running = self._running, None
        if running is None:
            return
        # With its process 1 a process namespace ends, and with that nspawn.
        for pid in (running.leader, *self._children(running.nspawn)):
            _kill(pid)
        try:
            running.nspawn.wait(10.0)
        except subprocess.TimeoutExpired:
            running.nspawn.kill()
            running.nspawn.wait()
        for group in self._groups:
            until(lambda group=group: _removed(group), seconds=10.0, what=f"{group} is empty")  # type: ignore[misc]
        self.host.run(
            ["sh", "-c", "for link in flannel0 docker0; do ip link delete $link; done"], check=False
        )
        for table in ("filter", "nat", "mangle", "raw"):
            self.host.run(["iptables-restore"], stdin=f"*{table}\nCOMMIT\n", check=False)

    def _up(self) -> bool:
        running = self._running
        assert running is not None
        assert running.nspawn.poll() is None, f"{self.hostname} went down:\n{self.console.read_text()}"
        if not running.leader:
            running.leader = next(self._systemds(running.nspawn), 0)
        return bool(running.leader) and self.run("systemctl", "is-active", "basic.target").code == 0

    def _systemds(self, nspawn: subprocess.Popen[Any]) -> Iterator[int]:
        for pid in self._children(nspawn):
            try:
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    yield pid
            except OSError:
                continue

    @staticmethod
    def _children(nspawn: subprocess.Popen[Any]) -> list[int]:
        try:
            return [
                int(pid) for pid in Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    @property
    def _leader(self) -> int:
        assert self._running is not None, f"{self.hostname} does not run"
        return self._running.leader

    # ---- words --------------------------------------------------------------------------------------------------

    def command(self, *words: str) -> list[str]:
        """The words that run a command in it; give it ENVIRONMENT, the tester's may not fit."""
        return ["nsenter", f"--target={self._leader}", "--all", "--root", "--wd", "--", *words]

    def run(
        self, *words: str, timeout: float = 60.0, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> Answer:
        """To its end, as root, with PATH and `env` for an environment."""
        done = subprocess.run(
            self.command(*words),
            env=ENVIRONMENT | (env or {}),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def ok(
        self, *words: str, timeout: float = 60.0, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Run; fails, with the unit's last lines if it was systemctl, unless it ends with 0. Its stdout."""
        answer = self.run(*words, timeout=timeout, stdin=stdin, env=env)
        if answer.code != 0:
            more = self.run("journalctl", "--no-pager", "-n", "40").out if words[0] == "systemctl" else ""
            raise AssertionError(f"{words} ended with {answer.code}:\n{answer.out}{answer.err}{more}")
        return answer.out

    def show(self, unit: str, what: str) -> str:
        """`systemctl show -P`: a property of a unit."""
        return self.ok("systemctl", "show", "--property", what, "--value", unit).strip()

    def journal(self, unit: str) -> str:
        """What a unit and systemd about it wrote."""
        return self.ok("journalctl", "--no-pager", "--output=short-monotonic", "--unit", unit)


def _kill(pid: int) -> None:
    if pid:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _removed(group: Path) -> bool:
    """The group and all below it, which are empty once their processes are gone."""
    for folder, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            return False
    return not group.exists()

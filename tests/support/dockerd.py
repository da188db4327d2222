"""dockerd per host of a lab, and busybox containers behind it, with nothing of it on the machine outside.

    with Dockerd(host, agent.folder / "docker") as docker:       # the file `flanctl docker-opts` wrote
        web = docker.run("/bin/busybox httpd -f -p 80 -h /www")
        docker.stop(); docker.start()                            # over the same data
        web.exec("/bin/busybox ip route")                        # docker exec
        web.run(["ping", "-c1", "172.17.7.2"])                   # the machine's programs, the container's network

    host's network namespace ── dockerd ── containerd ── shim ── container (a network namespace of its own)
      └ a mount namespace of its own: /run/docker and /run/containerd, otherwise shared by every dockerd

Debian's docker.io 20.10 with --storage-driver vfs, or with `newest` today's daemon (dockerd_build.py). Control groups go under a parent named after the lab's host, and
are removed with it. The image is /bin/busybox and links to it, imported; no registry is asked for anything.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanctl.demo.hosts import Namespace
from tests.support.agents import environment
from tests.support.deadline import until
from tests.support.dockerd_build import built

if TYPE_CHECKING:
    from types import TracebackType

    from flanctl.demo.hosts import Host

IMAGE = "busybox:test"
START_SECONDS = 30.0
_CGROUPS = Path("/sys/fs/cgroup")
# `exec` all along: the process we start is dockerd in the end. The options file is an EnvironmentFile of systemd's
# docker.service, where $DOCKER_NETWORK_OPTIONS is split into words just as the shell does.
_START = """
set -e
if ! [ "$AGAIN" ]; then
    mkdir -p /run/docker /run/containerd
    mount -t tmpfs tmpfs /run/docker
    mount -t tmpfs tmpfs /run/containerd
    if [ "$FIREWALLD" ]; then
        mkdir -p /run/dbus /run/firewalld
        for folder in /run/dbus /run/firewalld /etc/firewalld; do mount -t tmpfs tmpfs $folder; done
        (cd /etc/firewalld && mkdir helpers icmptypes ipsets policies services zones && echo DefaultZone=public >firewalld.conf)
        dbus-daemon --system --fork --nopidfile
        firewalld --nofork --nopid &
        timeout 20 sh -c 'until firewall-cmd -q --state; do :; done'
        firewall-cmd -q --permanent --zone=public --add-port=8285/udp
        firewall-cmd -q --reload
    fi
fi
. "$OPTIONS_FILE"
exec dockerd $DOCKER_NETWORK_OPTIONS "$@"
"""


class DockerContainer(Namespace):
    """A running container. `run` and `popen` use the machine's programs in its network; `exec` is docker exec."""

    def __init__(self, docker: Dockerd, identity: str, pid: int, address: IPv4Address, number: int) -> None:
        super().__init__(docker.host.lab, f"{docker.host.name}d{number}")
        self.docker = docker
        self.id = identity
        self.pid = pid
        self.address = address

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    def exec(self, shell: str, *, timeout: float = 30.0) -> str:
        """Run a line of the container's own shell to its end; its stdout. Fails with its stderr."""
        return self.docker.client("exec", self.id, "/bin/sh", "-c", shell, timeout=timeout)


class Dockerd:
    """A daemon and its containers; a context manager that ends both."""

    def __init__(
        self, host: Host, options_file: Path, *more: str, newest: bool = False, firewalld: bool = False
    ) -> None:
        """Start with the options of `options_file` and `more`, wait until it answers, import the image.

        With `firewalld` one of the host's own runs beside it, on a bus of theirs; the tunnel's port is open.
        """
        self.host = host
        self.options_file = options_file
        self._newest = newest
        # Not pytest's tmp_path: a unix socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="dockerd-"))
        self.log = self.folder / "dockerd.log"
        self.cgroup = f"{host.lab.prefix}-{host.name}"
        self._socket = self.folder / "docker.sock"
        self._pids: list[int] = []
        arguments = {
            "--data-root": self.folder / "data",
            "--exec-root": self.folder / "exec",
            "-p": self.folder / "pid",
            "-H": f"unix://{self._socket}",
            "--storage-driver": "vfs",
            "--exec-opt": "native.cgroupdriver=cgroupfs",
            "--cgroup-parent": f"/{self.cgroup}",
        }
        self._words = [str(word) for pair in arguments.items() for word in pair] + list(more)
        self._process: subprocess.Popen[Any] | None = None
        self._mounts = -1
        """The daemon's mount namespace: its successor must find the containers' where they are."""
        try:
            beside = {"FIREWALLD": "yes"} if firewalld else {}
            self._start("unshare", "--mount", "--propagation", "private", **beside)
            self._mounts = os.open(f"/proc/{self._process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            self._import_image()
        except BaseException:
            self.close()
            raise

    def _start(self, *entered: str, **more: str) -> None:
        env = environment(OPTIONS_FILE=str(self.options_file), **more)
        if self._newest:
            env["PATH"] = f"{built()}:{env['PATH']}"
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as stream:
            self._process = self.host.popen(
                [*entered, "sh", "-c", _START, "sh", *self._words], env=env, stdout=stream, stderr=stream
            )
        self._wait_ready()

    def reload_firewalld(self) -> None:
        """`firewall-cmd --reload`: every rule goes, its own and Docker's come back."""
        mounts = f"--mount=/proc/{os.getpid()}/fd/{self._mounts}"
        self.host.run(["nsenter", mounts, "firewall-cmd", "--reload"])

    def stop(self) -> None:
        """End the daemon, and with it the containers, if it was not started with --live-restore."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30.0)

    def start(self, *more: str) -> None:
        """A new daemon over the same data, after `stop`, with `more` options than the last."""
        self._words += more
        self._start("nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._mounts}", AGAIN="yes")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def client(self, *words: str, stdin: bytes | None = None, timeout: float = 30.0) -> str:
        """`docker WORDS`; its stdout. Fails with its stderr and the daemon's last lines."""
        done = subprocess.run(
            ["docker", "-H", f"unix://{self._socket}", *words],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env=environment(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, (
            f"docker {shlex.join(words)} on {self.host.name} ended with {done.returncode}: "
            f"{done.stderr.decode(errors='replace')}\n{self._last_lines()}"
        )
        return done.stdout.decode(errors="replace")

    def run(self, shell: str, *options: str) -> DockerContainer:
        """A container that runs a line of shell until the daemon's end; `options` are those of `docker run`."""
        # KILL, because process 1 of a container has no default action for TERM and docker would wait 10 s.
        words = ["run", "--detach", "--stop-signal", "KILL", *options]
        if self._newest:  # its runc is built without libseccomp
            words += ["--security-opt", "seccomp=unconfined"]
        identity = self.client(*words, IMAGE, "/bin/sh", "-c", shell).strip()
        (about,) = json.loads(self.client("inspect", identity))
        pid = int(about["State"]["Pid"])
        assert pid, f"the container ended at once: {self.client('logs', identity)}"
        self._pids.append(pid)
        (network,) = about["NetworkSettings"]["Networks"].values()
        return DockerContainer(self, about["Id"], pid, IPv4Address(network["IPAddress"]), len(self._pids))

    def close(self) -> None:
        """End containers and daemon, by pid where asking does not help; remove control groups and files."""
        process = self._process
        try:
            if process is not None and process.poll() is None:
                for pid in self._pids:
                    _kill(pid)
                process.terminate()
                try:
                    process.wait(15.0)
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            # A daemon that died leaves containerd, shims and containers: all of them are in our control groups or
            # in the host's network, where the lab's close finds them.
            for pid in self._members():
                _kill(pid)
            until(lambda: not self._members(), seconds=5.0, fail=False)
            for group in self._groups():
                until(lambda group=group: _removed(group), seconds=3.0, fail=False)  # type: ignore[misc]
            if self._mounts >= 0:
                os.close(self._mounts)
                self._mounts = -1
            shutil.rmtree(self.folder, ignore_errors=True)

    def leftovers(self) -> tuple[str, ...]:
        """What is still there of us. Empty once the lab is closed, which ends the shims of a crashed daemon."""
        folder = str(self.folder)
        commands = {pid: _command_of(pid) for pid in os.listdir("/proc") if pid.isdigit()}
        return (
            *(f"control group {group}" for group in self._groups()),
            *(f"process {pid} {command}" for pid, command in commands.items() if folder in command),
            *([f"folder {folder}"] if self.folder.exists() else []),
        )

    def _wait_ready(self) -> None:
        def up() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (
                f"dockerd of {self.host.name} ended with {self._process.returncode}:\n{self._last_lines()}"
            )
            return b"API listen on" in self.log.read_bytes()[self._log_from :]

        ready = until(up, seconds=START_SECONDS, fail=False)
        assert ready, f"dockerd of {self.host.name} not up in {START_SECONDS:g} s:\n{self._last_lines()}"

    def _import_image(self) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(os.path.realpath(shutil.which("busybox") or "/bin/busybox"), "bin/busybox")
            for applet in ("sh", "dd", "httpd", "ip", "mkdir", "ps", "sha256sum", "sleep", "wget"):
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        self.client("import", "-", IMAGE, stdin=archive.getvalue())

    def _groups(self) -> list[Path]:
        """Our control groups in every hierarchy, the deepest first."""
        roots = (*_CGROUPS.glob(self.cgroup), *_CGROUPS.glob(f"*/{self.cgroup}"))
        return [Path(folder) for root in roots for folder, _, _ in os.walk(root, topdown=False)]

    def _members(self) -> set[int]:
        """The processes in our control groups."""
        found: set[int] = set()
        for group in self._groups():
            try:
                found |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
            except OSError:
                continue
        return found

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def _command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _removed(group: Path) -> bool:
    """A group is busy for a moment after its last process ended."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True

"""Hosts on one machine: network namespaces on a private underlay, for the demo, tests and benchmarks.

    with Lab("try") as lab:
        one, two = lab.add_host(), lab.add_host()
        one.run(["ping", "-c1", str(two.address)])
        box = one.add_container(IPv4Interface("172.17.41.1/24"), mtu=1472)
        box.run(["ip", "route"])

        h1 ─ eth0 192.168.66.11 ─┐                    each host: ip_forward on, its own loopback, routes and rules
        h2 ─ eth0 192.168.66.12 ─┼─ bridge under0     containers: behind the host's docker0, as dockerd makes it
        h3 ─ eth0 192.168.66.13 ─┘  192.168.66.1

The underlay's bridge lives in a namespace of its own, so nothing of a lab is visible among the machine's interfaces
and no name can clash. Hosts share the machine's files and clock: give each agent its own --run-dir, --state-dir
and --subnet-file. `close` ends every process inside the lab's namespaces, then removes these; it is safe to call it
at any moment, twice, and with a Ctrl-C in the middle.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanctl.errors import FlanctlError, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

UNDERLAY = IPv4Network("192.168.66.0/24")
_NAMESPACES = Path("/run/netns")
_PINS = Path("/sys/fs/bpf/flanctl")
_numbers = itertools.count(1)


def refuse_unable() -> None:
    """Raise NotPermitted or FlanctlError, in one line, when this machine cannot hold a lab. Leaves nothing."""
    if os.geteuid() != 0:
        raise NotPermitted("hosts in network namespaces need root", hint="sudo flanctl demo")
    for program in ("ip", "nsenter"):
        if shutil.which(program) is None:
            raise FlanctlError(
                f"hosts in network namespaces need the program {program}",
                hint="apt install iproute2 util-linux",
            )
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise FlanctlError(
            f"hosts in network namespaces need /dev/net/tun: {error.strerror}",
            hint="modprobe tun; in a container, pass --device /dev/net/tun",
        ) from None
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise NotPermitted(
            f"this machine makes no network namespace: {probe.stderr.strip()}", hint="CAP_SYS_ADMIN"
        )


class Namespace:
    """A place to run programs in. `run` waits and checks; `popen` leaves the program to the lab's `close`."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.namespace = f"{lab.prefix}-{name}"

    @property
    def path(self) -> Path:
        """For setns(2), or `nsenter --net=PATH`."""
        return _NAMESPACES / self.namespace

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` here, for a shell or a subprocess.

        nsenter and not `ip netns exec`: that mounts a fresh /sys and so hides the cgroups dockerd needs.
        """
        return ["nsenter", f"--net={self.path}", "--", *arguments]

    def run(
        self,
        arguments: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to its end, output captured as text.

        Raises FlanctlError with the program's own words when it fails (unless `check` is false) or has not ended
        after `timeout` seconds.
        """
        said = f"{self.name}: {' '.join(arguments)}"
        try:
            done = subprocess.run(
                self.command(arguments),
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=env,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FlanctlError(f"{said} did not end in {timeout:g} s", details=_lines(error.output)) from None
        if check and done.returncode != 0:
            raise FlanctlError(
                f"{said} ended with {done.returncode}", details=_lines(done.stderr or done.stdout)
            )
        return done

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start and leave running; options as of subprocess.Popen.

        In a session of its own: Ctrl-C at the terminal reaches us, and we end the others in order.
        """
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("start_new_session", True)
        with _uninterrupted():  # between start and note it would be lost
            process = subprocess.Popen(self.command(arguments), **options)
            self.lab.processes.append(process)
        return process

    def ip_batch(self, *lines: str) -> None:
        """Several commands of ip(8) here, each without the word `ip`, in one process."""
        _batch(lines, self.namespace)


class Container(Namespace):
    """A namespace behind a host's docker0, with one interface and a default route, as dockerd makes it."""

    def __init__(self, host: Host, name: str, address: IPv4Interface) -> None:
        super().__init__(host.lab, name)
        self.host = host
        self.interface = address
        self.address: IPv4Address = address.ip


class Host(Namespace):
    """A machine of the lab: `eth0` on the underlay, forwarding on."""

    def __init__(self, lab: Lab, name: str, interface: IPv4Interface) -> None:
        super().__init__(lab, name)
        self.interface = interface
        self.address: IPv4Address = interface.ip
        self.containers: list[Container] = []

    def set_mtu(self, mtu: int) -> None:
        """MTU of eth0, in bytes; the switch's end of the cable keeps the lab's."""
        self.ip_batch(f"link set eth0 mtu {mtu}")

    def add_container(self, bip: IPv4Interface, mtu: int) -> Container:
        """A container on docker0, which is made, or moved to another address, as dockerd would for --bip and --mtu."""
        number = len(self.containers) + 2
        address = IPv4Interface((bip.network.network_address + number, bip.network.prefixlen))
        container = Container(self, f"{self.name}c{number - 1}", address)
        self.lab.make_namespace(container)
        if not (self.containers and self.containers[-1].interface.network == bip.network):
            if not self.containers:
                self.ip_batch("link add docker0 type bridge")
            self.ip_batch("addr flush dev docker0", f"addr add {bip} dev docker0 brd +")
        port = f"veth{number - 1}"
        self.ip_batch(
            f"link set docker0 mtu {mtu} up",
            f"link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {container.namespace}",
            f"link set {port} master docker0 up",
        )
        container.ip_batch(
            "link set lo up",
            f"addr add {address} dev eth0 brd +",
            "link set eth0 up",
            f"route add default via {bip.ip}",
        )
        self.containers.append(container)
        return container


class Lab:
    """A private underlay and the hosts on it. A context manager; `close` removes everything."""

    def __init__(self, name: str = "lab", *, network: IPv4Network = UNDERLAY, mtu: int = 1500) -> None:
        """Make the underlay: a bridge with the network's first address. `mtu` in bytes.

        Raises FlanctlError when this machine cannot hold a lab; nothing is left then.
        """
        refuse_unable()
        self.prefix = f"flan-{os.getpid()}-{next(_numbers)}-{name}"
        self.network = network
        self.mtu = mtu
        self.hosts: list[Host] = []
        self.processes: list[subprocess.Popen[Any]] = []
        self._namespaces: dict[str, int] = {}
        self._inodes: set[int] = set()
        self.underlay = Namespace(self, "under")
        self._gateway = network.network_address + 1
        # A second Ctrl-C may hit between the end of a `with` block and its close; the interpreter's end may not.
        atexit.register(self.close)
        try:
            self.make_namespace(self.underlay)
            self.underlay.ip_batch(
                f"link add under0 mtu {mtu} type bridge",
                f"addr add {self._gateway}/{network.prefixlen} dev under0",
                "link set lo up",
                "link set under0 up",
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_host(
        self,
        name: str | None = None,
        *,
        address: IPv4Address | None = None,
        default_route: bool = True,
        mtu: int | None = None,
    ) -> Host:
        """The next host: h1 with .11, h2 with .12, … The default route is the switch, which forwards nowhere."""
        number = len(self.hosts) + 1
        address = address or self.network.network_address + 10 + number
        host = Host(self, name or f"h{number}", IPv4Interface((address, self.network.prefixlen)))
        self.make_namespace(host)
        port = f"port{number}"
        mtu = mtu or self.mtu
        self.underlay.ip_batch(
            f"link add {port} mtu {self.mtu} type veth peer name eth0 mtu {mtu} netns {host.namespace}",
            f"link set {port} master under0 up",
        )
        host.ip_batch(
            "link set lo up",
            f"addr add {host.interface} dev eth0 brd +",
            "link set eth0 up",
            *([f"route add default via {self._gateway}"] if default_route else []),
        )
        host.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        self.hosts.append(host)
        return host

    def make_namespace(self, namespace: Namespace) -> None:
        """For Lab and Host: the name is remembered before the thing exists, so that close finds it at any moment."""
        self._namespaces[namespace.namespace] = 0
        _batch([f"netns add {namespace.namespace}"])
        self._namespaces[namespace.namespace] = namespace.path.stat().st_ino
        self._inodes.add(namespace.path.stat().st_ino)

    def removal(self) -> str:
        """What to type to remove a lab that was kept: ends its processes, deletes its namespaces."""
        return (
            f"for n in $(ip netns list | grep -o '^{self.prefix}-[^ ]*'); do "
            'ip netns pids "$n" | xargs -r kill; '
            f'rm -rf {_PINS}/$(stat -L -c %i {_NAMESPACES}/"$n")-*; ip netns delete "$n"; done'
        )

    def keep(self) -> str:
        """Let everything stand, processes included; `close` does nothing from now on. Returns `removal()`."""
        self._namespaces.clear()
        self.processes.clear()
        return self.removal()

    def close(self, *, grace: float = 3.0) -> None:
        """End all processes (SIGTERM, after `grace` seconds SIGKILL) and remove all namespaces."""
        with _uninterrupted():
            self._end_processes(grace)
            for pins in self._pins():
                shutil.rmtree(pins, ignore_errors=True)
            present = [f"netns delete {name}" for name in self._namespaces if (_NAMESPACES / name).exists()]
            if present:
                _batch(present)
            self._namespaces.clear()
            self.hosts.clear()
            atexit.unregister(self.close)

    def leftovers(self) -> tuple[str, ...]:
        """What of this lab is still there: `namespace …`, `process …`. Empty after `close`."""
        names = sorted(path.name for path in _NAMESPACES.glob(f"{self.prefix}-*"))
        return (
            *(f"namespace {name}" for name in names),
            *(f"process {pid} {_command_of(pid)}" for pid in self._pids()),
            *(f"pins {path}" for path in self._pins()),
        )

    def _pins(self) -> list[Path]:
        """Maps that the agents of this lab have pinned (agent/backends/kernel_path.py): a namespace does not take them along."""
        return [path for inode in self._inodes for path in _PINS.glob(f"{inode}-*")]

    def _end_processes(self, grace: float) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            pids = self._pids()
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + grace
            while self._pids() and time.monotonic() < deadline:
                time.sleep(0.01)
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.processes.clear()

    def _pids(self) -> list[int]:
        """Every process inside our namespaces, also grandchildren that left their session (containerd's shims).

        These namespaces are ours alone, so whatever runs in them descends from what we started.
        """
        for process in self.processes:
            process.poll()  # reaps, so that a zombie does not count
        inodes = {inode for inode in self._namespaces.values() if inode}
        ours = {process.pid for process in self.processes if process.returncode is None}
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            pid = int(entry)
            try:
                if pid in ours or os.stat(f"/proc/{pid}/ns/net").st_ino in inodes:
                    found.append(pid)
            except OSError:
                continue
        return [pid for pid in found if pid != os.getpid()]


def _batch(lines: Sequence[str], namespace: str | None = None) -> None:
    """One `ip -batch`, in a namespace, to its end: with -force a line that fails does not stop the others.

    Raises FlanctlError with the lines and the kernel's words.
    """
    command = ["ip", *(["-n", namespace] if namespace else []), "-force", "-batch", "-"]
    done = subprocess.run(
        command,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        start_new_session=True,  # a Ctrl-C at the terminal must not end the cleaning half-way
    )
    if done.returncode != 0:
        where = f" in {namespace}" if namespace else ""
        raise FlanctlError(f"ip{where} failed: {'; '.join(lines)}", details=_lines(done.stderr))


def _lines(text: str | bytes | None) -> tuple[str, ...]:
    """The last lines of what a program said."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return tuple((text or "").strip().splitlines()[-10:])


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return "?"


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A Ctrl-C, a kill or a closed terminal waits until the block is done. Signals belong to the main thread, others are never
    interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {one: signal.signal(one, lambda number, _: came.append(number)) for one in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])

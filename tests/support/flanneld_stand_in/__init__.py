"""A host that runs flanneld, as far as the others can tell: for interop tests, and as a peer to measure against.

    old = StandIn.start(host, tmp_path / "h1", cluster.endpoints[0], like="0.7.1").wait()     # etcd v2
    new = StandIn.start(host, tmp_path / "h2", cluster.endpoints[0], like="0.28.9").wait()    # etcd v3
    peer = StandIn.static(host, tmp_path / "h3", "172.17.41.0/24", {"172.17.42.0/24": "192.168.66.12"}).wait()
    old.subnet, old.gateway                 # as flanctl's RunningAgent has them
    old.terminate(); old.kill()             # flannel0 goes with it

With FLANNELD_0_7_1=FILE or FLANNELD_0_28_9=FILE `start` runs that file, a real flanneld, in the stand-in's place (but not
where options ask for what a real one has not: `--ttl`).

`static` needs no registry: flanneld's device and its plain packet loop, for benchmarks. flanneld.py is the daemon,
proxy.c the loop (compiled with cc into .cache once). Neither holds anything of flanctl, so that they cannot share its
misunderstandings; tests/netns/test_flanneld_stand_in.py compares the loop with the recorded bytes of the real one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
from functools import cache
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanctl.demo.hosts import Host

HERE = Path(__file__).parent
READY = r"(?m) ready (\S+) on \S+$"
PREFIX = "/jxdd/network"


def _identity(path: Path) -> tuple[int, int] | None:
    """A file that is renamed into place is another one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@cache
def proxy() -> Path:
    """proxy.c, compiled once per state of its source; several runs at once compile it once."""
    source = HERE / "proxy.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = HERE.parents[2] / ".cache" / "flanneld-stand-in"
    binary = folder / f"proxy-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            new = folder / "proxy.new"
            subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", new, source], check=True)
            new.rename(binary)
    return binary


class StandIn:
    """One process. `start` takes flanneld's own flags as `options`."""

    def __init__(self, host: Host, folder: Path, words: tuple[str, ...], *, real: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host = host
        self.folder = folder
        self.words = words
        self.real = real
        self.log = folder / "flanneld.log"
        self.subnet_file = folder / "subnet.env"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        ours = [sys.executable, str(HERE / "flanneld.py"), "--proxy", str(proxy())]
        command = [real] if real else ours
        command += ["-iface=eth0", f"-subnet-file={self.subnet_file}", *words]
        if real:
            self._old_file = _identity(self.subnet_file)
        with self.log.open("ab") as stream:
            self.process: subprocess.Popen[Any] = host.popen(command, stdout=stream, stderr=stream)

    @classmethod
    def start(
        cls,
        host: Host,
        folder: Path,
        endpoints: str,
        *options: str,
        like: Literal["0.7.1", "0.28.9"],
        prefix: str = PREFIX,
    ) -> Self:
        """A flanneld on a registry; returns at once."""
        known = (f"-etcd-endpoints={endpoints}", f"-etcd-prefix={prefix}")
        real = os.environ.get(f"FLANNELD_{like.replace('.', '_')}")
        if real and not any(option.startswith("--ttl") for option in options):
            return cls(host, folder, (*known, *options), real=real)
        return cls(host, folder, (f"--like={like}", *known, *options))

    @classmethod
    def static(
        cls,
        host: Host,
        folder: Path,
        subnet: str,
        peers: Mapping[str, str],
        *options: str,
        like: Literal["0.7.1", "0.28.9"] = "0.28.9",
    ) -> Self:
        """Device and packet loop only; `peers` are subnets and the public IPs that have them."""
        routes = [f"--peer={net}={address}" for net, address in peers.items()]
        return cls(host, folder, (f"--like={like}", f"--static={subnet}", *routes, *options))

    def again(self) -> Self:
        """A new process in place of this one, which has ended."""
        assert self.process.poll() is not None, f"still running: {self}"
        return type(self)(self.host, self.folder, self.words, real=self.real)

    def log_text(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def wait_log(self, pattern: str, *, seconds: float = 30.0) -> re.Match[str]:
        """The first match of a regular expression in the log; fails when it ends before."""

        def look() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.log_text())
            assert found or not ended, f"{self} ended with {self.process.returncode}"
            return found

        found = until(look, seconds=seconds, fail=False)
        assert found, f"no {pattern!r} within {seconds:g} s: {self}"
        return found

    def wait(self) -> Self:
        """Itself, once it carries packets and has written subnet.env."""
        if self.real:
            until(self._is_ready, seconds=30, what=str(self))
        else:
            self.wait_log(READY)
        return self

    def _is_ready(self) -> bool:
        """For a real one: 0.7.1 says nothing, but subnet.env is written when device and address are there."""
        assert self.process.poll() is None, f"{self} ended with {self.process.returncode}"
        return _identity(self.subnet_file) not in {None, self._old_file}

    @property
    def subnet(self) -> IPv4Network:
        self.wait()
        if not self.real:
            return IPv4Network(self.wait_log(READY)[1])
        found = re.search(r"(?m)^FLANNEL_SUBNET=(\S+)$", self.subnet_file.read_text())
        assert found, self.subnet_file
        return IPv4Network(found[1], strict=False)

    @property
    def gateway(self) -> IPv4Interface:
        """docker0's address on this host."""
        return IPv4Interface((self.subnet.network_address + 1, self.subnet.prefixlen))

    def terminate(self) -> int:
        """SIGTERM, and its exit code; device, address and route are gone then."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __str__(self) -> str:
        return f"the flanneld of {self.host.name} ({self.log}):\n{self.log_text()}"

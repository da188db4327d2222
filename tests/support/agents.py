"""`flanctl agent` as a process on a lab's host, and `flanctl` commands beside it.

    agent = RunningAgent.start(host, tmp_path / host.name, f"sqlite:{tmp_path}/registry.db", "--iface", "eth0")
    agent.wait_ready()["subnet"]        # "172.17.41.0/24", from the agent's ready line
    agent.counters()["in-packets"]      # what SIGUSR1 makes it log
    agent.kill()
    agent = agent.again().wait()        # same folder, same options, a new process

The lab's `close` ends whatever a failing test leaves running.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from typing import TYPE_CHECKING, Self

from tests.support.cli import program
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from flanctl.demo.hosts import Host, Namespace

READY_SECONDS = 30.0
"""A start is well under a second; two busy cores with a whole test suite on them take longer."""
STOP_SECONDS = 5.0
"""What the agent promises after SIGTERM."""
FLANCTL = program()
READY = r"(?m)^(?:\S+|[IWE]\d{4} .*\]) ready +(network=.*)$"
"""The ready line in flanctl's form and in glog's."""


def environment(endpoints: str = "", **more: str) -> dict[str, str]:
    """A process environment in which only `endpoints` and `more` tell flanctl anything."""
    inherited = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(
            ("FLANCTL_", "FLANNEL", "ETCDCTL_", "DOCKER_", "JOURNAL_STREAM", "NOTIFY_SOCKET")
        )
    }
    told = {"FLANCTL_ENDPOINTS": endpoints} if endpoints else {}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **told, **more}


def flanctl(
    where: Namespace, endpoints: str, *words: str, check: bool = True, stdin: str | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """`flanctl WORDS` on a host, to its end, as an operator would run it there; `more` are environment variables."""
    return where.run([*FLANCTL, *words], env=environment(endpoints, **more), check=check, stdin=stdin)


def fields_of(line: str) -> dict[str, str]:
    """The `key=value` words of a log line."""
    return dict(word.partition("=")[::2] for word in shlex.split(line) if "=" in word)


@dataclass
class RunningAgent:
    """One process. `start` makes it; `again` makes its successor on the same host and folder."""

    host: Host
    folder: Path
    endpoints: str
    options: tuple[str, ...]
    process: subprocess.Popen[Any]
    more: Mapping[str, str] = field(default_factory=dict)
    name: str = "flanctl"
    """The program it was started as: flanctl, flanneld or flanneld-start."""
    prefix: tuple[str, ...] = ()
    """Put before the command; it must exec, so that the pid stays the agent's."""
    _from: int = 0
    """Where in the log file this process began."""

    @classmethod
    def start(
        cls,
        host: Host,
        folder: Path,
        endpoints: str,
        *options: str,
        name: str = "flanctl",
        prefix: tuple[str, ...] = (),
        **more: str,
    ) -> Self:
        """Start and return at once. `folder` is made; `more` are environment variables.

        The folder holds `agent.log`, `subnet.env`, `state/` and `run/`; options given later win over these. As
        `flanneld` or `flanneld-start` it gets no endpoints but those in `options` and `more`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "agent.log"
        begin = log.stat().st_size if log.exists() else 0
        command = [*prefix, *program(name), *(["agent"] if name == "flanctl" else [])]
        command += ["--subnet-file", str(folder / "subnet.env"), *options]
        env = environment(endpoints if name == "flanctl" else "", **more)
        env |= {"FLANCTL_STATE_DIR": str(folder / "state"), "FLANCTL_RUN_DIR": str(folder / "run")}
        with log.open("ab") as stream:
            process = host.popen(command, env=env, stdout=stream, stderr=stream)
        return cls(host, folder, endpoints, options, process, more, name, prefix, begin)

    def again(self) -> Self:
        """A new process in place of this one, which has ended."""
        assert self.process.poll() is not None, f"still running: {self}"
        return type(self).start(
            self.host,
            self.folder,
            self.endpoints,
            *self.options,
            name=self.name,
            prefix=self.prefix,
            **self.more,
        )

    # ---- what it says -------------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"

    def log_text(self) -> str:
        """What this process has written so far."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def wait_log(self, pattern: str, *, seconds: float = READY_SECONDS) -> re.Match[str]:
        """The first match of a regular expression in the log; fails with the log when the agent ends first."""

        def look() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.log_text())
            assert found or not ended, f"{self} ended with {self.process.returncode}"
            return found

        found = until(look, seconds=seconds, fail=False)
        assert found, f"no {pattern!r} within {seconds:g} s in the log of {self}"
        return found

    def wait_ready(self, *, seconds: float = READY_SECONDS) -> dict[str, str]:
        """The fields of the ready line: network, subnet, backend, data-path, mtu, public-ip, peers."""
        return fields_of(self.wait_log(READY, seconds=seconds)[1])

    def wait(self, *, seconds: float = READY_SECONDS) -> Self:
        """Itself, once it is ready: `agent = RunningAgent.start(...).wait()`."""
        self.wait_ready(seconds=seconds)
        return self

    @property
    def ready(self) -> dict[str, str]:
        return self.wait_ready()

    @property
    def subnet(self) -> IPv4Network:
        return IPv4Network(self.ready["subnet"])

    @property
    def gateway(self) -> IPv4Interface:
        """docker0's address on this host: the subnet's first, as subnet.env has it."""
        return IPv4Interface((self.subnet.network_address + 1, self.subnet.prefixlen))

    @property
    def subnet_file(self) -> Path:
        return self.folder / "subnet.env"

    def counters(self) -> dict[str, int]:
        """The packet counters now, without those that are 0."""
        before = self.log_text().count(" counters")
        self.process.send_signal(signal.SIGUSR1)

        def newer() -> str | None:
            lines = [line for line in self.log_text().splitlines(keepends=True) if " counters" in line]
            return lines[-1] if len(lines) > before and lines[-1].endswith("\n") else None

        line = until(newer, seconds=10, fail=False)
        assert line, f"no counters after SIGUSR1 from {self}"
        return {name: int(text) for name, text in fields_of(line).items()}

    # ---- its end ------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self, number: int = signal.SIGTERM, *, seconds: float = STOP_SECONDS) -> int:
        """Ask it to end and wait; its exit code. Fails if it takes longer than it promises."""
        self.process.send_signal(number)
        return self.wait_end(seconds=seconds)

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self.process.kill()
        self.process.wait()

    def wait_end(self, *, seconds: float = READY_SECONDS) -> int:
        """Its exit code once it has ended, by itself or because it was asked to."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds:g} s: {self}") from None

    def reboot(self, *, keep_state: bool = False) -> Self:
        """As after a power cut: killed, its device gone, /run empty; the state directory too, unless kept.

        Returns the new process, not waited for.
        """
        if self.process.poll() is None:
            self.kill()
        self.host.run(["ip", "link", "delete", "flannel0"], check=False)
        self.subnet_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        if not keep_state:
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        return self.again()

    def __str__(self) -> str:
        """For a failure: who it is and everything it said."""
        return f"the agent of {self.host.name} ({self.log}):\n{self.log_text()}"

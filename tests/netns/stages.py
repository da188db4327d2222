"""Starts of an agent that are ended at their k-th step, each in a process of its own; run inside a host's namespace.

    python -m tests.netns.stages FOLDER SIGNAL STRIDE   one line of JSON per trial, for test_agent_stages.py

A step is the moment before a call that reads or changes something outside: registry, kernel, files, iptables, data
plane, systemd; the moment after it is no other state than that before the next. A trial is one start that gets SIGNAL at step k, in a fresh folder and with a fresh registry,
and then a start that nobody disturbs and that is stopped once it is ready. k grows by STRIDE until a start is
through.

Everything is imported once and each start is a fork: a hundred of them take seconds.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flanctl._native as native
from flanctl import files
from flanctl.agent.daemon import Agent, Options
from flanctl.agent.kernel.netlink import LinkMonitor, NetlinkKernel
from flanctl.agent.log import Log
from flanctl.agent.machine import Choice, look
from flanctl.agent.notify import Notify
from flanctl.clock import BootClock
from flanctl.errors import FlanctlError
from flanctl.model.dialect import Dialect
from flanctl.registry.stores.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "/jxdd/network"
TRIAL_SECONDS = 20
NOT_REACHED = 77
"""Exit code of a start that was ready before its k-th step."""


class Ready(Notify):
    """Ends the process's own start once it is through."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__("")
        self._act = act

    def ready(self, status: str) -> None:
        self._act()


class Steps:
    """Counts the calls of the starting thread; at the k-th it sends `number` to this process."""

    def __init__(self, k: int, number: int) -> None:
        self.k = k
        self.number = number
        self.count = 0
        self.hit = False

    def passed(self, name: str) -> None:
        if threading.current_thread() is not threading.main_thread() or self.hit:
            return
        self.count += 1
        if self.count == self.k:
            self.hit = True
            os.write(2, f"step {name}\n".encode())
            os.kill(os.getpid(), self.number)

    def wrap(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def stepping(*words: Any, **named: Any) -> Any:
            self.passed(name)
            return real(*words, **named)

        setattr(owner, name, stepping)

    def install(self) -> None:
        for name in ("get", "list", "create", "replace", "refresh"):
            self.wrap(SqliteStore, name)
        for name in (
            "link", "links", "open_tun", "keep_tun", "set_link", "silence_ipv6", "add_address", "delete_address",
            "routes", "add_route", "replace_route",
        ):  # fmt: skip
            self.wrap(NetlinkKernel, name)
        self.wrap(native, "DataPlane")
        self.wrap(LinkMonitor, "__init__")
        for owner, name in (
            (files, "replace_file"), (os, "fsync"), (os, "rename"), (fcntl, "flock"), (subprocess, "run"),
        ):  # fmt: skip
            self.wrap(owner, name)


def start(folder: Path, steps: Steps | None) -> int:
    """One agent's life in this process; its exit code."""
    through = threading.Event()

    def ready() -> None:
        """The last step; without a signal on its way by now, there was no k-th."""
        if steps is not None:
            steps.passed("ready")
            if not steps.hit:
                through.set()
                steps.hit = True
        os.kill(os.getpid(), signal.SIGTERM)

    if steps is not None:
        steps.install()
    with closing(SqliteStore(str(folder / "registry.db"))) as store:
        agent = Agent(
            Options(PREFIX, folder / "subnet.env", folder / "state", folder / "run", True, True, 5.0, 3600.0),
            store=store,
            dialect=Dialect.V0_28,
            look=functools.partial(look, choice=Choice(iface=("eth0",))),
            log=Log(),
            notify=Ready(ready),
            clock=BootClock(),
        )  # fmt: skip
        try:
            agent.run()
        except FlanctlError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    return NOT_REACHED if through.is_set() else 0


def forked(folder: Path, steps: Steps | None) -> tuple[int, str]:
    """`start` in a child: its exit code, or minus the signal that ended it, and its stderr."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(said.fileno(), 2)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                signal.alarm(TRIAL_SECONDS)
                code = start(folder, steps)
                sys.stderr.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read().decode(errors="replace")


def look_at(folder: Path) -> dict[str, Any]:
    with closing(SqliteStore(str(folder / "registry.db"))) as store:
        leases = [
            entry.key.rpartition("/")[2]
            for entry in store.list(f"{PREFIX}/subnets/").entries
            if b'"192.168.66.11"' in entry.value
        ]
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return {
        "leases": leases,
        "files": sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if "registry" not in path.name
        ),
        "devices": sorted(link["ifname"] for link in links),
    }


def trial(folder: Path, k: int, number: int) -> bool:
    """One start ended at step k and the next one; False when the start was ready before."""
    folder.mkdir()
    with closing(SqliteStore(str(folder / "registry.db"))) as store:
        store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
    first, said = forked(folder, Steps(k, number))
    between = look_at(folder)
    # A started agent that is not ended holds the device: nobody may.
    second, said_then = forked(folder, None)
    report = {
        "k": k,
        "step": next((line[5:] for line in said.splitlines() if line.startswith("step ")), None),
        "first": first,
        "said": said,
        "between": between,
        "second": second,
        "said_then": said_then,
        "after": look_at(folder),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    subprocess.run(["ip", "link", "delete", "flannel0"], check=True)
    for table in ("nat", "filter", "raw", "mangle"):
        subprocess.run(["iptables", "-t", table, "-F"], check=True)
        subprocess.run(["iptables", "-t", table, "-X"], check=True)
    return first != NOT_REACHED


def main() -> None:
    folder, number, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    k = 1
    while trial(folder / str(k), k, number):
        k += stride


if __name__ == "__main__":
    main()

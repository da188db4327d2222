"""The iptables programs of the system: reading a table, changing several in one commit.

iptables = Iptables()                       # or Iptables("iptables-legacy")
saved = iptables.save("filter")             # what iptables-save prints
iptables.restore("*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n")
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
from typing import TYPE_CHECKING, Protocol

from flanctl.errors import FlanctlError, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATH_OF_ROOT = "/usr/local/sbin:/usr/sbin:/sbin"
_SECONDS, _LOCK_SECONDS = 3.0, 1
"""For one program, and for the xtables lock: the daemon has one thread, and promises to stop within five seconds."""


class Run(Protocol):
    """How programs are run, so that a test may stand between."""

    def __call__(
        self, command: Sequence[str], stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]: ...


class Iptables:
    """One variant of them: `iptables`, which the system has chosen, or `iptables-nft`, `iptables-legacy` by name."""

    def __init__(self, name: str = "iptables", run: Run | None = None) -> None:
        """`run` is for tests."""
        self.name = name
        self._run = run or _run
        self._wait = True

    def save(self, table: str) -> str:
        """The table as iptables-save prints it. Raises FlanctlError (id `no-iptables`), NotPermitted; so do the others."""
        saved = self.call(f"read the table {table}", f"{self.name}-save", "-t", table)
        if "is incompatible" in saved:
            raise FlanctlError(
                f"cannot read the table {table}: iptables-save says it holds rules only nft understands",
                hint=f"nft list table ip {table}",
            )
        return saved

    def restore(self, script: str) -> None:
        """Change what the script says and nothing else, each table in one commit."""
        command = [f"{self.name}-restore", "--noflush"]
        if self._wait:
            done = self._run([*command, f"--wait={_LOCK_SECONDS}"], script)
            if done.returncode == 0:
                return
            if "unrecognized option" not in done.stderr:
                raise _failed("write the firewall rules", done)
            self._wait = False  # iptables before 1.6.2: no lock to wait for
        done = self._run(command, script)
        if done.returncode != 0:
            raise _failed("write the firewall rules", done)

    def call(self, what: str, *command: str) -> str:
        """What the program prints; `what` it was to do is for the error."""
        done = self._run(command)
        if done.returncode != 0:
            raise _failed(what, done)
        return done.stdout


def search_path() -> str:
    """Where programs are looked for: a user's own PATH lacks root's directories."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_PATH_OF_ROOT}"


def words_of(line: str) -> list[str]:
    """A line of iptables-save without its quoting."""
    try:
        return shlex.split(line)
    except ValueError:  # a foreign comment with an odd quote
        return line.split()


def target_of(words: list[str]) -> str | None:
    """Where the rule leads: a chain, or a verdict such as DROP."""
    for before, word in itertools.pairwise(words):
        if before in {"-j", "-g"}:
            return word
    return None


def _run(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C", "PATH": search_path()}
    try:
        return subprocess.run(
            command,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env=env,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise FlanctlError(
            f"the program {command[0]} is not installed",
            hint="apt install iptables (or yum), or turn the rules off: --ip-masq=false --iptables-forward-rules=false "
            "--docker-accept=off",
            id="no-iptables",
        ) from None
    except subprocess.TimeoutExpired:
        raise FlanctlError(
            f"{command[0]} did not end in {_SECONDS:g} s; somebody may hold the xtables lock",
            hint="fuser /run/xtables.lock",
        ) from None
    except OSError as error:
        raise FlanctlError(f"cannot run {command[0]}: {error.strerror}") from None


def _failed(what: str, done: subprocess.CompletedProcess[str]) -> FlanctlError:
    words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    text = f"cannot {what}: {done.args[0]}: {words[0]}"
    if (
        "ermission denied" in done.stderr
        or "Operation not permitted" in done.stderr
        or "must be root" in done.stderr
    ):
        return NotPermitted(text, details=tuple(words[1:]), hint="run as root, or with CAP_NET_ADMIN")
    return FlanctlError(text, details=tuple(words[1:]))

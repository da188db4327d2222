"""flannel's iptables rules: masquerading for traffic that leaves the network, accepts for traffic inside it.

    rules = IptablesRules(network, subnet)
    repaired = rules.ensure(masq=True, forward=True)      # as often as you like

The lists are flannel 0.28.9's, to the letter (tests/vectors/iptables-rules.json), so a host that changes between
flanneld and us finds nothing to repair. What flanneld lacks (flannel issues 933, 950, 1337, 1834): one
iptables-save per table looks, order and count are compared, and one iptables-restore changes everything at once.
Ours are two chains by name and one jump to each; rules of others are never touched or moved.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flanctl.errors import FlanctlError, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Network

_PATH_OF_ROOT = "/usr/local/sbin:/usr/sbin:/sbin"
_SECONDS, _LOCK_SECONDS = 3.0, 1
"""For one program, and for the xtables lock: the daemon has one thread, and promises to stop within five seconds."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours and the jump to it, in iptables-save's words."""

    table: str
    name: str
    parent: str
    comment: str
    rules: tuple[str, ...]

    @property
    def jump(self) -> str:
        return f'-A {self.parent} -m comment --comment "{self.comment}" -j {self.name}'

    def listing(self) -> list[str]:
        """What `iptables -t TABLE -S` shows of it."""
        return [f"-N {self.name}", self.jump, *self.rules]


def masquerade_chain(network: IPv4Network, subnet: IPv4Network, *, random_fully: bool) -> Chain:
    """Traffic from containers to the world takes the host's address; inside the network everybody keeps theirs.

    Mark 0x4000/0x4000 is kube-proxy's, which masquerades by itself. `--random-fully` spares two containers that
    connect to one server at the same time the same source port (a lost packet and a second's delay each time).
    """
    name, comment = "FLANNEL-POSTRTG", '-m comment --comment "flanneld masq"'
    masquerade = "MASQUERADE --random-fully" if random_fully else "MASQUERADE"
    rules = (
        f"-m mark --mark 0x4000/0x4000 {comment} -j RETURN",
        f"-s {subnet} -d {network} {comment} -j RETURN",
        f"-s {network} -d {subnet} {comment} -j RETURN",
        f"! -s {network} -d {subnet} {comment} -j RETURN",
        f"-s {network} ! -d 224.0.0.0/4 {comment} -j {masquerade}",
        f"! -s {network} -d {network} {comment} -j {masquerade}",
    )
    return Chain("nat", name, "POSTROUTING", "flanneld masq", tuple(f"-A {name} {rule}" for rule in rules))


def forward_chain(network: IPv4Network) -> Chain:
    """Docker 1.13 and newer set the policy of FORWARD to DROP (flannel issue 609); the network may pass."""
    name, comment = "FLANNEL-FWD", '-m comment --comment "flanneld forward"'
    rules = (f"-s {network} {comment} -j ACCEPT", f"-d {network} {comment} -j ACCEPT")
    return Chain("filter", name, "FORWARD", "flanneld forward", tuple(f"-A {name} {rule}" for rule in rules))


def repair(saved: str, chain: Chain, *, wanted: bool) -> tuple[list[str], list[str]]:
    """Lines for `iptables-restore --noflush`, and a sentence for each thing that was wrong; both empty when all is well.

    `saved` is what iptables-save printed of the chain's table. A rule counts as equal when its words are, so
    quoting may differ. A single right jump is left where it stands; a new one goes last, as flannel's does.
    """
    exists, rules, jumps = False, [], []
    for line in saved.splitlines():
        words = _words(line)
        if words[:1] == [f":{chain.name}"]:
            exists = True
        elif words[:2] == ["-A", chain.name]:
            rules.append(words)
        elif words[:1] == ["-A"] and _target(words) == chain.name:
            jumps.append((words, line))
    where = f"chain {chain.name} of table {chain.table}"
    if not wanted:
        lines = [f"-D{line[2:]}" for _, line in jumps]
        lines += [f"-F {chain.name}", f"-X {chain.name}"] if exists else []
        return lines, [f"{where} is not wanted, deleted"] if lines else []
    lines, sentences = [], []
    if not exists or rules != [_words(rule) for rule in chain.rules]:
        # With --noflush, naming a chain of our own empties it; the whole table changes in one commit.
        lines += [f":{chain.name} - [0:0]", *chain.rules]
        how = "was missing" if not exists else f"had {len(rules)} rules, not the {len(chain.rules)} it should"
        if len(rules) == len(chain.rules):
            how = "had other rules or another order"
        sentences.append(f"{where} {how}, written")
    right = [line for words, line in jumps if words == _words(chain.jump)]
    if surplus := right[1:]:
        lines += [f"-D{line[2:]}" for line in surplus]
        sentences.append(f"{len(surplus)} of {len(right)} jumps to {where} were too many, deleted")
    if not right:
        lines.append(chain.jump)
        sentences.append(f"the jump from {chain.parent} to {where} was missing, appended")
    return lines, sentences


class Run(Protocol):
    """How programs are run, so that a test may stand between."""

    def __call__(
        self, command: Sequence[str], stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]: ...


class IptablesRules:
    """flannel's rules on this host, kept by the iptables programs of the system (nf_tables or legacy)."""

    def __init__(
        self,
        network: IPv4Network,
        subnet: IPv4Network,
        *,
        random_fully: bool | None = None,
        run: Run | None = None,
    ) -> None:
        """`random_fully` None: when this iptables can. `run` is for tests."""
        self._network = network
        self._subnet = subnet
        self._random_fully = random_fully
        self._run = run or _run
        self._wait = True

    def ensure(self, *, masq: bool, forward: bool) -> tuple[str, ...]:
        """Make the kernel have exactly the wanted rules, in one restore; a sentence for each thing repaired.

        What is not wanted is removed, if a former run left it. Raises FlanctlError (id `no-iptables` when the
        programs are missing and something is wanted), NotPermitted without CAP_NET_ADMIN.
        """
        script, sentences = [], []
        for chain, wanted in self._chains(masq=masq, forward=forward):
            try:
                saved = self._save(chain.table)
            except FlanctlError as error:
                if error.id == "no-iptables" and not (masq or forward):
                    return ()
                raise
            lines, found = repair(saved, chain, wanted=wanted)
            if lines:
                script += [f"*{chain.table}", *lines, "COMMIT"]
                sentences += found
        if script:
            self._restore("\n".join(script) + "\n")
        return tuple(sentences)

    def remove(self) -> tuple[str, ...]:
        """Delete our chains and the jumps to them. Nothing there, or no iptables, is fine."""
        return self.ensure(masq=False, forward=False)

    def check(self) -> None:
        """Raise what `ensure` would for a missing program or missing rights; changes nothing."""
        for table in ("nat", "filter"):
            self._save(table)

    def _chains(self, *, masq: bool, forward: bool) -> tuple[tuple[Chain, bool], ...]:
        if self._random_fully is None and masq:
            self._random_fully = "random-fully" in self._call(
                "look at iptables", "iptables", "-j", "MASQUERADE", "-h"
            )
        random_fully = bool(self._random_fully)
        return (
            (masquerade_chain(self._network, self._subnet, random_fully=random_fully), masq),
            (forward_chain(self._network), forward),
        )

    def _save(self, table: str) -> str:
        saved = self._call(f"read the table {table}", "iptables-save", "-t", table)
        if "is incompatible" in saved:
            raise FlanctlError(
                f"cannot read the table {table}: iptables-save says it holds rules only nft understands",
                hint=f"nft list table ip {table}",
            )
        return saved

    def _restore(self, script: str) -> None:
        command = ["iptables-restore", "--noflush"]
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

    def _call(self, what: str, *command: str) -> str:
        done = self._run(command)
        if done.returncode != 0:
            raise _failed(what, done)
        return done.stdout


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a foreign comment with an odd quote
        return line.split()


def _target(words: list[str]) -> str | None:
    for before, word in itertools.pairwise(words):
        if before in {"-j", "-g"}:
            return word
    return None


def _run(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_PATH_OF_ROOT}"}
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
            hint="apt install iptables (or yum), or turn the rules off: --ip-masq=false --iptables-forward-rules=false",
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

"""The rules without which Docker 28 and newer drop every packet of another host before it reaches a container.

    accept = DockerAccept(network, subnet, "flannel0")
    report = accept.ensure()                      # as often as you like

Docker refuses in two places, and the newest flanneld has an answer to neither (docs/docker.md):

    raw     PREROUTING    -d CONTAINER ! -i docker0 -j DROP      one for each container; kills replies too
    filter  DOCKER        ! -i docker0 -o docker0 -j DROP        what is not published

Ours stand before both, and open no more than this: from the tunnel's device, from an address of the network, to an
address of our lease, on docker0. The third is a mark that opens nothing by itself: a daemon with Docker's nftables
backend, where no accept of another table is final, can be told to take marked packets (`docker-opts --accept`).

Ours stand first in their chains. What somebody else refuses (DROP, REJECT) at a chain's very beginning stays before
them: that is an operator's word. Docker's own refusals never do.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.agent.kernel.iptables import Iptables, search_path, target_of, words_of
from flanctl.agent.kernel.ruleset import legacy_tables
from flanctl.errors import FlanctlError
from flanctl.model.docker_options import ACCEPT_MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Network

    from flanctl.agent.kernel.iptables import Run

BRIDGE = "docker0"
COMMENT = "flanctl docker-accept"
"""By this we know our rules without memory of them."""
USER_CHAIN = "DOCKER-USER"
"""The one chain Docker (17.06 and newer) jumps to first and leaves alone, restarts included."""
NFT_TABLE = "docker-bridges"
"""Of family ip: where Docker's nftables backend has its rules; they name themselves by comments."""
_TABLES = ("raw", "mangle", "filter")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of ours, in iptables-save's words."""

    table: str
    chain: str
    words: str

    @property
    def place(self) -> str:
        return f"chain {self.chain} of table {self.table}"


@dataclass(frozen=True, slots=True)
class AcceptReport:
    """What one look found and did."""

    mode: str = "auto"
    """What --docker-accept says: auto or off."""
    wanted: int = 0
    """Rules; 0 on a host without Docker."""
    repaired: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Refusals of others that stand before ours, as iptables-save prints them."""
    programs: str = "iptables"
    """The variant Docker's rules are in."""
    error: str | None = None
    """Why they could not be kept."""
    closed: str | None = None
    """Why no packet of another host reaches a container all the same."""

    @property
    def missing(self) -> int:
        return self.wanted if self.error is not None else 0


def accept_rules(network: IPv4Network, subnet: IPv4Network, device: str) -> tuple[Rule, ...]:
    """The three, for packets out of the tunnel's `device`."""
    what = f"-s {network} -d {subnet} -i {device}"
    comment = f'-m comment --comment "{COMMENT}"'
    return (
        Rule("raw", "PREROUTING", f"{what} {comment} -j ACCEPT"),
        Rule("mangle", "PREROUTING", f"{what} {comment} -j MARK --set-xmark {ACCEPT_MARK}"),
        Rule("filter", USER_CHAIN, f"{what} -o {BRIDGE} {comment} -j ACCEPT"),
    )


def repair(saved: str, rule: Rule) -> tuple[list[str], list[str], list[str]]:
    """Lines for `iptables-restore --noflush`, a sentence for each thing that was wrong, the refusals before ours.

    `saved` is what iptables-save printed of the rule's table. No lines and no sentences when all is well.
    """
    exists, there = _chain(saved, rule.chain)
    ours = [place for place, (words, _) in enumerate(there) if COMMENT in words]
    right = words_of(f"-A {rule.chain} {rule.words}")
    others = [(words, line) for words, line in there if COMMENT not in words]
    front = next((place for place, (words, _) in enumerate(others) if not _is_refusal(words)), len(others))
    before = [line for _, line in others[:front]]
    if len(ours) == 1 and there[ours[0]][0] == right:
        if ours[0] <= front:
            return [], [], before[: ours[0]]
        why = f"stood behind `{others[ours[0] - 1][1]}`, moved to the front"
    elif not ours:
        why = "was missing, written"
    else:
        why = "had other words or stood there twice, written anew"
    lines = [] if exists or rule.chain != USER_CHAIN else [f":{USER_CHAIN} - [0:0]"]
    lines += [f"-D{there[place][1][2:]}" for place in ours]
    lines.append(f"-I {rule.chain} {front + 1} {rule.words}")
    return lines, [f"the rule for Docker in {rule.place} {why}"], before


def removal(saved: str, chain: str) -> list[str]:
    """Lines that take ours out of a chain, and the chain with it where nobody else uses DOCKER-USER."""
    _, there = _chain(saved, chain)
    lines = [f"-D{line[2:]}" for words, line in there if COMMENT in words]
    if lines and len(lines) == len(there) and chain == USER_CHAIN and not _jumps(saved, chain):
        lines.append(f"-X {chain}")
    return lines


class DockerAccept:
    """The accept rules of this host, in the variant of iptables that Docker uses."""

    def __init__(
        self,
        network: IPv4Network,
        subnet: IPv4Network,
        device: str,
        *,
        wanted: bool = True,
        run: Run | None = None,
        has_docker: Callable[[], bool] | None = None,
    ) -> None:
        """Not `wanted` (`--docker-accept=off`): what a former run left is removed. The rest is for tests."""
        self._rules = accept_rules(network, subnet, device)
        self._wanted = wanted
        self._mode = "auto" if wanted else "off"
        self._run = run
        self._has_docker = has_docker or docker_is_here
        self._clean = False

    def ensure(self) -> AcceptReport:
        """Have the rules where Docker is, and none elsewhere. Never raises: packets of others must not suffer."""
        here = self._wanted and self._has_docker()
        try:
            if here:
                self._clean = False
                return self._ensure()
            if not self._clean:
                self.remove()
                self._clean = True
        except FlanctlError as error:
            return AcceptReport(self._mode, len(self._rules) if here else 0, error=error.message)
        return AcceptReport(self._mode)

    def check(self) -> None:
        """Raise what keeps `ensure` from working; changes nothing."""
        if self._wanted and self._has_docker():
            self._where_docker_is()

    def _ensure(self) -> AcceptReport:
        iptables, saved, has_chains = self._where_docker_is()
        script, sentences, before = [], [], []
        for rule in self._rules:
            lines, found, refusals = repair(saved[rule.table], rule)
            before += refusals
            if lines:
                script += [f"*{rule.table}", *lines, "COMMIT"]
                sentences += found
        if has_chains and not _jumps(saved["filter"], USER_CHAIN):
            # dockerd makes chain and jump at each reload of firewalld, and gives up before the jump if we were faster
            # with the chain. It puts its own in this one's place.
            script += ["*filter", f"-I FORWARD 1 -j {USER_CHAIN}", "COMMIT"]
            sentences.append(f"Docker's jump from FORWARD to {USER_CHAIN} was missing, written")
        if script:
            iptables.restore("\n".join(script) + "\n")
        closed = None if has_chains else self._closed()
        return AcceptReport(
            self._mode,
            len(self._rules),
            tuple(sentences),
            tuple(before),
            programs=iptables.name,
            closed=closed,
        )

    def remove(self) -> None:
        """Delete our rules wherever they are. Nothing there, or no iptables, is fine."""
        for iptables, script in self.removal():
            iptables.restore("\n".join(script) + "\n")

    def removal(self) -> list[tuple[Iptables, list[str]]]:
        """What `remove` would do: for each variant that has rules of ours the script of iptables-restore."""
        plan = []
        for iptables in self._variants():
            script = []
            try:
                for rule in self._rules:
                    if lines := removal(iptables.save(rule.table), rule.chain):
                        script += [f"*{rule.table}", *lines, "COMMIT"]
            except FlanctlError as error:
                if error.id != "no-iptables":
                    raise
            if script:
                plan.append((iptables, script))
        return plan

    def _where_docker_is(self) -> tuple[Iptables, dict[str, str], bool]:
        """The variant that has Docker's chains, its tables, and True; the system's own and False if none has."""
        variants = self._variants()
        filters = [iptables.save("filter") for iptables in variants]
        found = next((place for place, saved in enumerate(filters) if "\n:DOCKER " in saved), None)
        iptables = variants[found or 0]
        saved = {table: iptables.save(table) for table in _TABLES if table != "filter"}
        return iptables, saved | {"filter": filters[found or 0]}, found is not None

    def _closed(self) -> str | None:
        """What is wrong with a daemon that has the nftables backend: it must be told to take our mark."""
        try:
            table = Iptables(run=self._run).call(
                "read Docker's table", "nft", "list", "table", "ip", NFT_TABLE
            )
        except FlanctlError:
            return None  # no such table, or no nft and so no nftables backend
        if "DROP DIRECT ACCESS" not in table and any(
            "ALLOW FW MARK" in line and f"{int(ACCEPT_MARK.partition('/')[0], 16):#010x}" in line
            for line in table.splitlines()
        ):
            return None
        return "dockerd has the nftables backend and drops packets of other hosts: it was not given the options of docker-opts --accept"

    def _variants(self) -> Sequence[Iptables]:
        """The system's choice, then what else may hold rules: `iptables-save` shows only its own variant's.

        Asking iptables-legacy for a table makes the kernel load it, for good; where no table of it is in use it is
        not asked.
        """
        found = [Iptables(run=self._run)]
        if self._run is not None:
            return found
        own = os.path.basename(os.path.realpath(shutil.which("iptables", path=search_path()) or ""))
        other = "iptables-nft" if "legacy" in own else "iptables-legacy"
        if (other == "iptables-nft" or legacy_tables()) and shutil.which(other, path=search_path()):
            found.append(Iptables(other))
        return found


def docker_is_here() -> bool:
    """Docker may drop packets on this host: docker0 is there, or a dockerd that may make it later."""
    try:
        socket.if_nametoindex(BRIDGE)
    except OSError:
        return shutil.which("dockerd", path=search_path()) is not None
    return True


def _chain(saved: str, name: str) -> tuple[bool, list[tuple[list[str], str]]]:
    """Whether the chain is there, and its rules in order: words and line."""
    exists, rules = False, []
    for line in saved.splitlines():
        words = words_of(line)
        if words[:1] == [f":{name}"]:
            exists = True
        elif words[:2] == ["-A", name]:
            rules.append((words, line))
    return exists, rules


def _jumps(saved: str, chain: str) -> bool:
    """Whether any rule leads to the chain."""
    return any(target_of(words_of(line)) == chain for line in saved.splitlines() if line.startswith("-A"))


def _is_refusal(words: list[str]) -> bool:
    """Whether it refuses packets by somebody's decision. In PREROUTING, what spares one interface only is Docker's."""
    dockers = words[1] != USER_CHAIN and ("!", "-i") in itertools.pairwise(words)
    return target_of(words) in {"DROP", "REJECT"} and not dockers

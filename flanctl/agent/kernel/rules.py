"""flannel's iptables rules: masquerading for traffic that leaves the network, accepts for traffic inside it.

    rules = IptablesRules(network, subnet)
    repaired = rules.ensure(masq=True, forward=True)      # as often as you like

The lists are flannel 0.28.9's, to the letter (tests/vectors/iptables-rules.json), so a host that changes between
flanneld and us finds nothing to repair. What flanneld lacks (flannel issues 933, 950, 1337, 1834): one
iptables-save per table looks, order and count are compared, and one iptables-restore changes everything at once.
Ours are two chains by name and one jump to each; rules of others are never touched or moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.agent.kernel.iptables import Iptables, target_of, words_of
from flanctl.errors import FlanctlError

if TYPE_CHECKING:
    from ipaddress import IPv4Network

    from flanctl.agent.kernel.iptables import Run


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
        words = words_of(line)
        if words[:1] == [f":{chain.name}"]:
            exists = True
        elif words[:2] == ["-A", chain.name]:
            rules.append(words)
        elif words[:1] == ["-A"] and target_of(words) == chain.name:
            jumps.append((words, line))
    where = f"chain {chain.name} of table {chain.table}"
    if not wanted:
        lines = [f"-D{line[2:]}" for _, line in jumps]
        lines += [f"-F {chain.name}", f"-X {chain.name}"] if exists else []
        return lines, [f"{where} is not wanted, deleted"] if lines else []
    lines, sentences = [], []
    if not exists or rules != [words_of(rule) for rule in chain.rules]:
        # With --noflush, naming a chain of our own empties it; the whole table changes in one commit.
        lines += [f":{chain.name} - [0:0]", *chain.rules]
        how = "was missing" if not exists else f"had {len(rules)} rules, not the {len(chain.rules)} it should"
        if len(rules) == len(chain.rules):
            how = "had other rules or another order"
        sentences.append(f"{where} {how}, written")
    right = [line for words, line in jumps if words == words_of(chain.jump)]
    if surplus := right[1:]:
        lines += [f"-D{line[2:]}" for line in surplus]
        sentences.append(f"{len(surplus)} of {len(right)} jumps to {where} were too many, deleted")
    if not right:
        lines.append(chain.jump)
        sentences.append(f"the jump from {chain.parent} to {where} was missing, appended")
    return lines, sentences


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
        self._iptables = Iptables(run=run)

    def ensure(self, *, masq: bool, forward: bool) -> tuple[str, ...]:
        """Make the kernel have exactly the wanted rules, in one restore; a sentence for each thing repaired.

        What is not wanted is removed, if a former run left it. Raises FlanctlError (id `no-iptables` when the
        programs are missing and something is wanted), NotPermitted without CAP_NET_ADMIN.
        """
        script, sentences = self._look(masq=masq, forward=forward)
        if script:
            self._iptables.restore("\n".join(script) + "\n")
        return tuple(sentences)

    def removal(self) -> list[str]:
        """The script of iptables-restore that deletes our chains and the jumps to them; empty where none are."""
        return self._look(masq=False, forward=False)[0]

    def _look(self, *, masq: bool, forward: bool) -> tuple[list[str], list[str]]:
        script, sentences = [], []
        for chain, wanted in self._chains(masq=masq, forward=forward):
            try:
                saved = self._iptables.save(chain.table)
            except FlanctlError as error:
                if error.id == "no-iptables" and not (masq or forward):
                    return [], []
                raise
            lines, found = repair(saved, chain, wanted=wanted)
            if lines:
                script += [f"*{chain.table}", *lines, "COMMIT"]
                sentences += found
        return script, sentences

    def remove(self) -> tuple[str, ...]:
        """Delete our chains and the jumps to them. Nothing there, or no iptables, is fine."""
        return self.ensure(masq=False, forward=False)

    def check(self) -> None:
        """Raise what `ensure` would for a missing program or missing rights; changes nothing."""
        for table in ("nat", "filter"):
            self._iptables.save(table)

    def _chains(self, *, masq: bool, forward: bool) -> tuple[tuple[Chain, bool], ...]:
        if self._random_fully is None and masq:
            self._random_fully = "random-fully" in self._iptables.call(
                "look at iptables", "iptables", "-j", "MASQUERADE", "-h"
            )
        random_fully = bool(self._random_fully)
        return (
            (masquerade_chain(self._network, self._subnet, random_fully=random_fully), masq),
            (forward_chain(self._network), forward),
        )

"""The accept rules for Docker among whatever else stands in their chains: what is written, and where."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.kernel.docker_accept import COMMENT, DockerAccept, accept_rules, removal, repair

if TYPE_CHECKING:
    from collections.abc import Sequence

NETWORK, SUBNET = IPv4Network("172.17.0.0/16"), IPv4Network("172.17.81.0/24")
RAW, MANGLE, FILTER = accept_rules(NETWORK, SUBNET, "flannel0")
DOCKERS = "-d 172.17.81.2/32 ! -i docker0 -j DROP"


def saved(table: str, rules: Sequence[str], chain: str, *more: str) -> str:
    """As iptables-save prints it."""
    return "\n".join(
        [f"*{table}", f":{chain} - [0:0]", *(f"-A {chain} {rule}" for rule in rules), *more, "COMMIT"]
    )


def after(rules: Sequence[str], script: Sequence[str], chain: str) -> list[str]:
    """What iptables-restore --noflush makes of a chain."""
    now = list(rules)
    for line in script:
        command, name, rest = line.split(" ", 2)
        assert name == chain
        if command == "-D":
            now.remove(rest)
        else:
            place, _, rule = rest.partition(" ")
            assert command == "-I"
            now.insert(int(place) - 1, rule)
    return now


_FOREIGN = st.sampled_from(
    [
        "-s 172.17.9.0/24 -j DROP",
        '-i eth0 -m comment --comment "it\'s ours" -j REJECT',
        DOCKERS,
        "-d 172.17.81.3/32 ! -i docker0 -j DROP",
        "-j RETURN",
        "-i eth0 -j ACCEPT",
        "-j f2b-sshd",
        "-j LOG",
    ]
)
_OURS = st.sampled_from([RAW.words, f'-s 10.0.0.0/8 -m comment --comment "{COMMENT}" -j ACCEPT'])


@given(st.lists(st.one_of(_FOREIGN, _OURS), max_size=8))
def test_ours_stand_once_behind_nothing_but_refusals_of_others(there: list[str]) -> None:
    script, sentences, before = repair(saved("raw", there, "PREROUTING"), RAW)
    now = after(there, script, "PREROUTING")
    assert now.count(RAW.words) == sum(COMMENT in rule for rule in now) == 1
    front = now[: now.index(RAW.words)]
    assert all(rule.endswith(("-j DROP", "-j REJECT")) and "! -i" not in rule for rule in front)
    assert [rule for rule in now if COMMENT not in rule] == [rule for rule in there if COMMENT not in rule]
    assert bool(script) == bool(sentences)
    assert [line.removeprefix("-A PREROUTING ") for line in before] == front
    assert repair(saved("raw", now, "PREROUTING"), RAW)[:2] == ([], [])


def test_in_dockers_own_chain_for_operators_every_refusal_is_an_operators() -> None:
    script, _, before = repair(saved("filter", ["! -i lo -j DROP", "-j RETURN"], "DOCKER-USER"), FILTER)
    assert script == [f"-I DOCKER-USER 2 {FILTER.words}"]
    assert before == ["-A DOCKER-USER ! -i lo -j DROP"]


def test_a_chain_that_is_missing_is_made_and_one_that_is_there_is_not_emptied() -> None:
    assert repair("*filter\n:FORWARD DROP [0:0]\nCOMMIT", FILTER)[0][0] == ":DOCKER-USER - [0:0]"
    assert repair(saved("filter", [], "DOCKER-USER"), FILTER)[0] == [f"-I DOCKER-USER 1 {FILTER.words}"]


def test_docker_user_goes_with_our_rule_only_where_nobody_uses_it() -> None:
    delete = f"-D DOCKER-USER {FILTER.words}"
    alone = [FILTER.words]
    assert removal(saved("filter", alone, "DOCKER-USER"), "DOCKER-USER") == [delete, "-X DOCKER-USER"]
    assert removal(saved("filter", alone, "DOCKER-USER", "-A FORWARD -j DOCKER-USER"), "DOCKER-USER") == [
        delete
    ]
    assert removal(saved("filter", [*alone, "-j RETURN"], "DOCKER-USER"), "DOCKER-USER") == [delete]
    assert removal(saved("filter", [], "DOCKER-USER"), "DOCKER-USER") == []


class Programs:
    """Stands for iptables-save, iptables-restore and nft."""

    def __init__(self, tables: dict[str, str], nft: str | None = None) -> None:
        self.tables = tables
        self.nft = nft
        self.restored: list[str] = []

    def __call__(self, command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        code, out = 0, ""
        if command[0] == "nft":
            code, out = (1, "") if self.nft is None else (0, self.nft)
        elif command[0].endswith("-save"):
            out = self.tables[command[-1]]
        else:
            self.restored.append(stdin or "")
        return subprocess.CompletedProcess(list(command), code, out, "")


def tables(*docker: str) -> dict[str, str]:
    """All is well, and Docker's chains of the iptables backend are there or not."""
    return {
        "raw": saved("raw", [RAW.words], "PREROUTING"),
        "mangle": saved("mangle", [MANGLE.words], "PREROUTING"),
        "filter": "\n".join(["*filter", *docker, saved("filter", [FILTER.words], "DOCKER-USER")]),
    }


def accept(programs: Programs) -> DockerAccept:
    return DockerAccept(NETWORK, SUBNET, "flannel0", run=programs, has_docker=lambda: True)


_NFT_OPEN = 'meta mark & 0x04000000 == 0x04000000 counter accept comment "ALLOW FW MARK"'
_NFT_CLOSED = 'ip daddr 172.17.81.2 iifname != "docker0" counter drop comment "DROP DIRECT ACCESS"'


@pytest.mark.parametrize(
    ("docker", "nft", "closed"),
    [
        ((), None, False),
        ((), _NFT_OPEN, False),
        ((), _NFT_CLOSED, True),
        ((), f"{_NFT_CLOSED}\n{_NFT_OPEN}", True),
        ((), 'counter drop comment "UNPUBLISHED PORT DROP"', True),
        ((), _NFT_OPEN.replace("0x04000000", "0x00000001"), True),
        ((":DOCKER - [0:0]", "-A FORWARD -j DOCKER-USER"), _NFT_CLOSED, False),
    ],
    ids=["no nft", "open", "no options", "one of two", "the other", "another mark", "iptables backend"],
)
def test_a_daemon_of_nftables_without_its_options_is_found(
    docker: tuple[str, ...], nft: str | None, closed: bool
) -> None:
    report = accept(Programs(tables(*docker), nft)).ensure()
    assert (report.closed is not None) == closed
    assert (report.missing, report.repaired, report.error) == (0, (), None)


def test_all_is_changed_in_one_restore_that_names_no_chain_of_others() -> None:
    programs = Programs(
        {"raw": "*raw\nCOMMIT", "mangle": "*mangle\nCOMMIT", "filter": saved("filter", [], "DOCKER-USER")}
    )
    assert len(accept(programs).ensure().repaired) == 3
    (script,) = programs.restored
    assert script == (
        f"*raw\n-I PREROUTING 1 {RAW.words}\nCOMMIT\n"
        f"*mangle\n-I PREROUTING 1 {MANGLE.words}\nCOMMIT\n"
        f"*filter\n-I DOCKER-USER 1 {FILTER.words}\nCOMMIT\n"
    )


def test_dockers_jump_to_our_rule_is_written_where_dockerd_gave_up_on_it() -> None:
    """Its `iptables -N DOCKER-USER` failed because ours was faster: it stops there, before the jump."""
    programs = Programs(tables(":DOCKER - [0:0]", "-A FORWARD -j DOCKER-FORWARD"))
    assert accept(programs).ensure().repaired == (
        "Docker's jump from FORWARD to DOCKER-USER was missing, written",
    )
    assert programs.restored == ["*filter\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n"]


def test_without_iptables_it_is_said_and_nothing_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("flanctl.agent.kernel.iptables._PATH_OF_ROOT", str(tmp_path))
    ours = DockerAccept(NETWORK, SUBNET, "flannel0", has_docker=lambda: True)
    report = ours.ensure()
    assert (report.wanted, report.missing) == (3, 3)
    assert report.error == "the program iptables-save is not installed"
    off = DockerAccept(NETWORK, SUBNET, "flannel0", wanted=False)
    assert off.ensure().error is None
    off.remove()

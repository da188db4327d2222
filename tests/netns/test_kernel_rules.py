"""Firewall rules through the real iptables, as `iptables -S` shows them.

this process ── its own namespace: empty tables
"""

from __future__ import annotations

import json
import subprocess
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.kernel.rules import IptablesRules
from flanctl.agent.kernel.ruleset import generation
from tests.support.namespaces import new_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("root", "netns", "iptables")
VECTORS = json.loads(Path("tests/vectors/iptables-rules.json").read_text())["v0.28.9"]
NAT = VECTORS["--ip-masq"]["nat"]
FILTER = VECTORS["--iptables-forward-rules (default true)"]["filter"]


@pytest.fixture
def rules() -> Iterator[IptablesRules]:
    with new_namespace():
        yield IptablesRules(IPv4Network("172.17.0.0/16"), IPv4Network("172.17.81.0/24"))


def iptables(words: str) -> None:
    subprocess.run(["sh", "-c", f"iptables {words}"], check=True)


def listing(table: str) -> list[str]:
    done = subprocess.run(["iptables", "-t", table, "-S"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("-P")]


def test_the_tables_are_flannels_to_the_letter(rules: IptablesRules) -> None:
    assert len(rules.ensure(masq=True, forward=True)) == 4
    assert (listing("nat"), listing("filter")) == (NAT, FILTER)
    assert rules.ensure(masq=True, forward=True) == ()


def test_what_flanneld_wrote_needs_no_repair(rules: IptablesRules) -> None:
    for rule in NAT:
        iptables(f"-t nat {rule}")
    for rule in FILTER:
        iptables(rule)
    assert rules.ensure(masq=True, forward=True) == ()


@pytest.mark.parametrize(
    "harm",
    [
        "-t nat -D FLANNEL-POSTRTG 2",
        "-t nat -F FLANNEL-POSTRTG",
        "-t nat -F",
        "-t nat -F POSTROUTING",
        "-t nat -I FLANNEL-POSTRTG -j RETURN",
        "-t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
        "-F FORWARD",
        "-F FLANNEL-FWD; iptables -F FORWARD; iptables -X FLANNEL-FWD",
        "-A FLANNEL-FWD -s 172.17.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT; iptables -D FLANNEL-FWD 1",
    ],
)
def test_each_harm_is_repaired_and_said(rules: IptablesRules, harm: str) -> None:
    rules.ensure(masq=True, forward=True)
    iptables(harm)
    assert rules.ensure(masq=True, forward=True)
    assert (listing("nat"), listing("filter")) == (NAT, FILTER)
    assert rules.ensure(masq=True, forward=True) == ()


def test_rules_of_others_stay_and_ours_come_after_them(rules: IptablesRules) -> None:
    iptables('-A FORWARD -o docker0 -m comment --comment "it\'s Docker" -j DROP')
    iptables("-t nat -A POSTROUTING -s 172.17.81.0/24 ! -o docker0 -j MASQUERADE")
    others = listing("nat"), listing("filter")
    rules.ensure(masq=True, forward=True)
    assert [rule for rule in listing("filter") if rule.startswith("-A FORWARD")] == [others[1][0], FILTER[1]]
    assert [rule for rule in listing("nat") if rule.startswith("-A POSTROUTING")] == [others[0][0], NAT[1]]
    rules.remove()
    assert (listing("nat"), listing("filter")) == others


def test_what_is_not_wanted_any_more_goes(rules: IptablesRules) -> None:
    rules.ensure(masq=True, forward=True)
    assert rules.ensure(masq=False, forward=True) == (
        "chain FLANNEL-POSTRTG of table nat is not wanted, deleted",
    )
    assert (listing("nat"), listing("filter")) == ([], FILTER)
    rules.remove()
    assert (listing("nat"), listing("filter")) == ([], [])
    assert rules.remove() == ()


def test_another_subnet_replaces_the_rules_of_the_old_one(rules: IptablesRules) -> None:
    IptablesRules(IPv4Network("172.17.0.0/16"), IPv4Network("172.17.9.0/24")).ensure(masq=True, forward=True)
    assert rules.ensure(masq=True, forward=True) == (
        "chain FLANNEL-POSTRTG of table nat had other rules or another order, written",
    )
    assert listing("nat") == NAT


def test_looking_changes_nothing(rules: IptablesRules) -> None:
    rules.check()
    assert (listing("nat"), listing("filter")) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        "iptables -A FORWARD -j ACCEPT",
        "iptables -t nat -F",
        "iptables -P FORWARD DROP",
        "nft add table ip somebody",
        "nft flush ruleset",
        "printf '*mangle\\n-A PREROUTING -j ACCEPT\\nCOMMIT\\n' | iptables-restore",
    ],
)
def test_every_change_is_a_new_generation_and_a_look_is_none(rules: IptablesRules, change: str) -> None:
    rules.ensure(masq=True, forward=True)
    before = generation()
    assert before is not None
    assert rules.ensure(masq=True, forward=True) == ()
    assert generation() == before
    subprocess.run(["sh", "-c", change], check=True)
    assert generation() not in {before, None}


def test_legacy_tables_keep_the_agent_looking(rules: IptablesRules) -> None:
    rules.ensure(masq=True, forward=True)
    assert generation() is not None
    subprocess.run(["iptables-legacy", "-A", "FORWARD", "-j", "ACCEPT"], check=True)
    assert generation() is None

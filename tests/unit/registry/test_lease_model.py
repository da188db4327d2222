"""The real leases.py in every order of events, and proof that the explorer would notice if it were wrong.

`FLANCTL_MODEL_STATES` (default 6000 for each scenario, `make fuzz` sets more) says how far it goes; docs/leases.md
says what that covers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from flanctl.model.subnet_pool import SubnetPool
from flanctl.registry import leases as real
from tests.support.lease_model import FOLDER, HOSTS, TWO_SUBNETS, VALUES, Explorer, Key, Scenario

STATES = int(os.environ.get("FLANCTL_MODEL_STATES", "6000"))
FOUR = IPv4Network("10.0.0.4/30")
KEY_FOUR = f"{FOLDER}10.0.0.4-30"
OTHER = f"{FOLDER}10.0.0.{(8, 4)[SubnetPool(TWO_SUBNETS, HOSTS[0]).start]}-30"
"""The subnet that agent 0 does not hash to."""
ENDING = "a lease that ends just when its host starts again"

BOTH = (FOUR, FOUR, None)
"""Two hosts that both remember the same subnet, as after a long outage of one: they want each other's."""
#                                                  ticks, failures, losses, delays, crashes, deletions
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("three agents want one subnet", (0, 0, 0, 0, 0, 0), memories=(FOUR, FOUR, FOUR)),
        Scenario("three agents and time", (1, 0, 0, 0, 0, 0), memories=(FOUR, FOUR, FOUR)),
        Scenario("two agents and time", (2, 0, 0, 0, 0, 0), 2, memories=BOTH),
        Scenario("two agents and more time", (3, 0, 0, 0, 0, 0), 2, memories=BOTH),
        Scenario("answers are lost", (2, 0, 1, 0, 0, 0), 2, memories=BOTH),
        Scenario("requests fail", (2, 1, 0, 0, 0, 0), 2, memories=BOTH),
        Scenario("requests land late", (2, 0, 0, 1, 0, 0), 2, memories=BOTH),
        Scenario("agents crash and start again", (2, 0, 0, 0, 1, 0), 2, memories=BOTH),
        Scenario("an operator deletes keys", (2, 0, 0, 0, 0, 1), 2, memories=BOTH),
        Scenario("everything at once", (4, 1, 1, 1, 1, 1)),
        Scenario(
            "a reservation and who wants it", (2, 0, 0, 0, 1, 1), 2,
            keys=((KEY_FOUR, Key(VALUES[0], 5, None)),), memories=(None, FOUR, None),
        ),
        Scenario(
            ENDING, (2, 0, 0, 0, 0, 0), 2,
            keys=((OTHER, Key(VALUES[0], 5, 1)),),
        ),
    )
}  # fmt: skip
SMALL = {"three agents want one subnet", "two agents and time"}
"""So small that every run looks at all there is of them."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_never_two_holders_never_a_silent_change(name):
    """flannel.md 11, rows 1, 5, 7, 8 and 9, for every order of what may happen."""
    found = Explorer(real.Leases, SCENARIOS[name]).explore(states=STATES)
    assert found.violation is None, found.violation
    assert found.complete or (found.states >= STATES and name not in SMALL)


MUTANTS = {
    "a foreign value under our key is written over (flannel: row 7)": (
        "if isinstance(found, Lease) and found.attributes.public_ip != ours.public_ip:",
        "if False:",
        "writes over",
    ),
    "a foreign value under our key is believed to be ours": (
        'raise LeaseLost(\n                f"lease',
        'return held.entry\n            raise LeaseLost(\n                f"lease',
        "two holders",
    ),
    "a lost lease is exchanged for another subnet (flannel 0.7: row 1)": (
        "            except Changed as changed:\n                current = changed.current\n",
        (
            "            except Changed as changed:\n                current = changed.current\n"
            "                held = replace(held, entry=replace(held.entry, key=self.folder + '10.0.0.4-30'))\n"
            "                current = self.store.get(held.entry.key)\n"
        ),
        "",
    ),
    "a key that vanished is believed to be there": (
        "                if current is None:\n                    again",
        (
            "                if current is None:\n                    return replace(held, ends=began + ttl)\n"
            "                if current is None:\n                    again"
        ),
        "two holders",
    ),
    "a lost race counts as won": (
        "            except (KeyExists, Changed):\n                continue  # somebody was faster: look again\n",
        (
            "            except (KeyExists, Changed):\n"
            "                there = entries[lease.key] if fitting else self.store.get(self.key(subnet))\n"
            "                if there is None:\n"
            "                    continue\n"
            "                value = attributes.format(self.dialect)\n"
            "                entry, how = replace(there, value=value, ttl=ttl), 'new'\n"
        ),
        "two holders",
    ),
    "somebody else's lease is taken over": (
        "            if lease.attributes.public_ip == public_ip\n            and config.accepts",
        "            if config.accepts",
        "writes over",
    ),
    "the time of a lease is counted from the answer, not from the question": (
        "        ends = None if began is None or lease.ttl is None else began + lease.ttl",
        "        ends = None if began is None or lease.ttl is None else self.clock.now() + lease.ttl",
        "two holders",
    ),
    "a lease is believed in for twice its time": (
        "        ends = None if began is None or lease.ttl is None else began + lease.ttl",
        "        ends = None if began is None or lease.ttl is None else began + 2 * lease.ttl",
        "two holders",
    ),
    "a lease that is gone on with is believed in for its whole time again": (
        "ends=None if left is None else self.clock.now() + left)",
        "ends=None if left is None else self.clock.now() + 2)",
        "two holders",
    ),
    "a reservation gets an end when it is renewed (flannel 0.28: row 9)": (
        "                if reserved:\n                    return self._still_reserved(held)\n",
        "",
        "gives the reservation",
    ),
    "a deleted reservation comes back as a lease": (
        "again = None if reserved else ttl",
        "again = ttl",
        "makes a lease of the reservation",
    ),
    "a reservation gets an end at the start (flannel 0.28: row 9)": (
        "        if lease.reservation:\n            return (",
        "        if False:\n            return (",
        "gives the reservation",
    ),
    "a subnet that could not be had again is exchanged in silence": (
        "            return replace(held, notes=_notes(held.lease, config, table, [*previous, *ours_was]))",
        "            return held",
        "without a word",
    ),
    "a lease that ends under our hands is exchanged in silence": (
        "[*ours_was, *previous])\n",
        "list(previous))\n",
        "nobody took",
    ),
    "the write of a lease does not look at what stands there": (
        "entry = self.store.create(self.key(subnet), attributes.format(self.dialect), ttl=ttl)",
        (
            "there = self.store.get(self.key(subnet))\n"
            "                    entry = (self.store.create(self.key(subnet), attributes.format(self.dialect), ttl=ttl)\n"
            "                        if there is None else self.store.replace(self.key(subnet),\n"
            "                        attributes.format(self.dialect), ttl=ttl, expected=there.revision))"
        ),
        "writes over",
    ),
    "a lost race is no reason to look again": (
        "            except (KeyExists, Changed):\n                continue  # somebody was faster: look again\n",
        "            except (KeyExists, Changed):\n                raise\n",
        "acquire ends with",
    ),
}
"""What is changed in the source of leases.py, into what, and how the explorer complains."""


@contextlib.contextmanager
def mutated(name):
    """leases.py with that bug in it."""
    before, after, _ = MUTANTS[name]
    source = Path(real.__file__).read_text()
    assert source.count(before) == 1, f"leases.py has changed; seed this bug anew: {name}"
    mutant = types.ModuleType("flanctl.registry.mutant")
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    try:
        exec(compile(source.replace(before, after), f"leases.py with: {name}", "exec"), mutant.__dict__)
        yield mutant.Leases
    finally:
        del sys.modules[mutant.__name__]


@pytest.mark.parametrize("name", MUTANTS)
def test_the_explorer_finds_a_seeded_bug(name):
    """A proof that cannot fail proves nothing."""
    where = "a reservation and who wants it" if "reservation" in name else ENDING
    if "gone on with" in name:
        where = "agents crash and start again"
    with mutated(name) as leases:
        found = Explorer(leases, SCENARIOS[where]).explore(states=20_000)
    assert found.violation is not None, f"not found: {name}"
    assert MUTANTS[name][2] in found.violation


def test_a_trace_tells_how_it_comes_to_that():
    with mutated("a foreign value under our key is written over (flannel: row 7)") as leases:
        found = Explorer(leases, SCENARIOS[ENDING]).explore(states=20_000)
    assert found.violation is not None
    lines = found.violation.splitlines()
    assert "writes over /n/subnets/10.0.0." in lines[0]
    assert "  a tick" in lines
    assert any("starts to renew" in line for line in lines)

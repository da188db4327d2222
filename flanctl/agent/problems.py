"""What is wrong in the registry as this host sees it: said when it comes and when it goes, kept for status and metrics.

Ids: duplicate-ip, overlap, outside-network, other-backend, bad-public-ip (model/peers.py), bad-key, bad-value, clone,
config-changed, config-invalid, no-config, registry-doubted, bad-state. How bad each is: snapshot.py.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from flanctl.errors import Invalid
from flanctl.model.network_config import NetworkConfig
from flanctl.model.peers import Problem
from flanctl.registry.config import no_config
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from flanctl.agent.log import Log
    from flanctl.registry.announcements import Announcement
    from flanctl.registry.leases import UnreadableLease
    from flanctl.registry.stores.store import Entry

MANY_CHANGES = 10
"""More of a kind than this at once make one log line."""
_NOWHERE = IPv4Network("0.0.0.0/32")


class Problems:
    """All problems there are, by who found them. `changed` hears every new whole."""

    def __init__(self, log: Log, changed: Callable[[tuple[Problem, ...]], None]) -> None:
        self._log = log
        self._changed = changed
        self._by_source: dict[str, tuple[Problem, ...]] = {}
        self.all: tuple[Problem, ...] = ()
        """By id and subnet; replaced whole, read from any thread."""

    def note(self, source: str, found: tuple[Problem, ...]) -> None:
        """What is wrong by one source's word. Said when it comes and when it goes, and counted, not repeated."""
        before = self._by_source.get(source, ())
        if found == before:
            return
        self._by_source[source] = found
        self.all = tuple(
            sorted(
                (problem for some in self._by_source.values() for problem in some),
                key=lambda problem: (problem.id, problem.subnet or _NOWHERE, problem.message),
            )
        )
        self._changed(self.all)
        known = {(problem.id, problem.message) for problem in before}
        there = {(problem.id, problem.message) for problem in found}
        new = [problem for problem in found if (problem.id, problem.message) not in known]
        over = [problem for problem in before if (problem.id, problem.message) not in there]
        for problem in new[:MANY_CHANGES]:
            self._log.warn(problem.message, id=problem.id)
        if len(new) > MANY_CHANGES:
            self._log.warn(f"{len(new) - MANY_CHANGES} more of the kind", id=new[-1].id, in_all=len(self.all))
        for problem in over[:MANY_CHANGES]:
            self._log.info(f"over: {problem.message}", id=problem.id)
        if len(over) > MANY_CHANGES:
            self._log.info(f"over: {len(over) - MANY_CHANGES} more", id=over[-1].id, in_all=len(self.all))


def config_problems(
    prefix: str, config: NetworkConfig, subnet: IPv4Network, entry: Entry | None
) -> tuple[Problem, ...]:
    """How the config in the registry differs from the one we run with, which counts until the next start."""
    stay = "this agent goes on with the one it started with"
    if entry is None:
        return (Problem("no-config", None, f"{no_config(prefix).message} any more; {stay}"),)
    try:
        now = NetworkConfig.parse(entry.value, config.dialect, name=entry.key, strict=False)
    except Invalid as error:
        words = f"{error.message} (revision {entry.revision}); {stay}"
        return (Problem("config-invalid", None, words),)
    if now == config:
        return ()
    before, after = config.effective(), now.effective()
    changes = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    words = f"{entry.key} was changed at revision {entry.revision}: {', '.join(changes)}; {stay}"
    if not now.accepts(subnet):
        words += f", and our subnet {subnet} has no place in the new one"
    return (Problem("config-changed", None, words),)


def unreadable(bad: UnreadableLease) -> Problem:
    """The key's own words in it are cut: it may be a megabyte of hostility."""
    words = f"skipped unreadable key {_short(bad.key, 200)}: {_short(bad.message, 200)}"
    return Problem(bad.problem, bad.subnet, words)


def clone(ours: Announcement, other: Announcement) -> Problem:
    """Two machines under one public IP, both named."""
    return Problem(
        "clone",
        None,
        f"another machine announces our address: host {_short(other.host)} (instance {_short(other.instance, 8)}, "
        f"flanctl {_short(other.version, 20)}) beside this one, {_short(ours.host)} (instance "
        f"{_short(ours.instance, 8)}); both use one lease",
    )


def _short(text: str, most: int = 64) -> str:
    return printable(text if len(text) <= most else text[:most] + "…")

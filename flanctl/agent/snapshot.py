"""What the agent knows of itself at one moment, and what follows from it: health, readiness, the `/status` document.

The loop makes a `Snapshot` each time it turns (observer.py); whoever answers questions reads the newest one and needs
no lock. Moments in it are the agent's clock's (seconds since boot); `Now` turns them into ages and dates.

Problem ids are promises, the same in log, status, metrics and later in `doctor`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.agent.backends.base import PeerTraffic
    from flanctl.agent.kernel.docker_accept import AcceptReport

FAIL, WARN = "fail", "warn"

PROBLEMS: Mapping[str, str] = {
    "lease-foreign": FAIL,
    "lease-missing": FAIL,
    "loop-stalled": FAIL,
    "registry-unreachable": FAIL,
    "registry-denied": FAIL,
    "no-config": FAIL,
    "config-invalid": FAIL,
    "backend-unsupported": FAIL,
    "pool-full": FAIL,
    "clone": FAIL,
    "data-path": FAIL,
    "device-gone": FAIL,
    "routes-missing": FAIL,
    "kernel-error": FAIL,
    "address-gone": FAIL,
    "docker-closed": FAIL,
    "rules-missing": WARN,
    "docker-accept": WARN,
    "lease-short": WARN,
    "watch-old": WARN,
    "docker0-old": WARN,
    "healthz-port": WARN,
    "duplicate-ip": WARN,
    "overlap": WARN,
    "outside-network": WARN,
    "other-backend": WARN,
    "bad-public-ip": WARN,
    "bad-key": WARN,
    "bad-value": WARN,
    "config-changed": WARN,
    "registry-doubted": WARN,
    "bad-state": WARN,
}
"""Every id and how bad it is, in the order in which they are shown."""

BLOCKING = frozenset(
    {
        "lease-foreign", "lease-missing", "loop-stalled", "data-path", "device-gone", "routes-missing",
        "kernel-error", "address-gone",
    }
)  # fmt: skip
"""With one of these packets do not flow. A registry that is away is none of them: packets go on."""

REGISTRY = frozenset({"registry-unreachable", "registry-denied", "no-config"})
"""The registry's fault, not this host's."""

STALLED, STALLED_STARTING = 60.0, 600.0
"""Seconds without a turn of the loop after which the agent counts as hung. It turns at least every `TURN` seconds
(observer.py), and iptables, the slowest thing it waits for, takes 3 at most; the start waits for the registry as long
as --timeout says, several times over."""
WATCH_OLD = 120.0
"""Seconds without a word from the watch: over HTTP its member is asked every 3, gRPC asks every 20."""
SHOWN = 100
"""Problems in a document: a registry with 5,000 bad keys must not make an answer of megabytes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something an operator should know. `since` is a moment, None where nobody noted it.

    `details` are lines for below it: what each endpoint said.
    """

    id: str
    message: str
    since: float | None = None
    details: tuple[str, ...] = ()

    @property
    def severity(self) -> str:
        return PROBLEMS.get(self.id, WARN)


@dataclass(frozen=True, slots=True)
class Place:
    """Which network, on which interface: known once the agent has looked at its host."""

    network: IPv4Network
    capacity: int
    backend: str
    data_path: str
    data_path_why: str
    """Why not another, or what to know about this one."""
    device: str
    interface: str
    public_ip: IPv4Address
    underlay_mtu: int
    mtu: int


@dataclass(frozen=True, slots=True)
class HeldLease:
    """Our subnet. `ends` is None for a reservation; `ttl` and `renewed` too while we only go on with what the agent
    before us knew.
    """

    subnet: IPv4Network
    ends: float | None
    ttl: float | None
    renewed: float | None
    revision: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What the registry holds, by kind."""

    leases: int
    reservations: int
    bad_keys: int
    bad_values: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything, at the moment `turned`."""

    state: str
    """starting, leased, ready, stopping or stopped."""
    since: float
    started: float
    turned: float
    host: str
    version: str
    pid: int
    prefix: str
    subnet_file: str
    waiting: str | None = None
    place: Place | None = None
    lease: HeldLease | None = None
    registry: str = ""
    answered: float | None = None
    watched: float | None = None
    revision: int | None = None
    peers: int | None = None
    """None until the first complete list has been applied."""
    flanctl_peers: int | None = None
    """Those of them that announce that they run flanctl; None until the announcements were listed."""
    taken: Taken | None = None
    objects: tuple[tuple[str, int, int], ...] = ()
    """Kernel objects: kind, how many are wanted, how many of them are missing."""
    docker_matches: bool | None = None
    """Whether docker0 has the lease's first address; None without a docker0."""
    accept: AcceptReport | None = None
    """What the last look at the accept rules for Docker found; None before the first."""
    drops_before: tuple[float, int] | None = None
    """An earlier moment, about a minute ago, and the sum of all drops at it."""
    found: tuple[Problem, ...] = ()
    """What the loop noted; `problems` adds what follows from the time."""


@dataclass(frozen=True, slots=True)
class Now:
    """One moment on both clocks: the agent's (seconds since boot) and the wall's (seconds since 1970)."""

    boot: float
    wall: float

    def age(self, moment: float | None) -> float | None:
        return None if moment is None else max(0.0, self.boot - moment)

    def date(self, moment: float | None) -> str | None:
        """RFC 3339, UTC, whole seconds."""
        if moment is None:
            return None
        when = datetime.fromtimestamp(self.wall + moment - self.boot, UTC)
        return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def problems(snapshot: Snapshot, now: Now) -> tuple[Problem, ...]:
    """All there are, the worst kinds first."""
    found = list(snapshot.found)
    lease = snapshot.lease
    if (silent := stalled(snapshot, now)) is not None:
        words = f"the agent's loop has not turned for {silent:.0f}s"
        found.append(Problem("loop-stalled", words, snapshot.turned))
    if lease is not None and lease.ends is not None:
        left = lease.ends - now.boot
        if left <= 0:
            words = f"our lease {lease.subnet} ran out {-left:.0f}s ago: peers drop their route to us"
            found.append(Problem("lease-missing", words, lease.ends))
        elif lease.ttl is not None and left < lease.ttl / 3:
            words = f"our lease {lease.subnet} ends in {left:.0f}s and has not been renewed"
            found.append(Problem("lease-short", words, lease.renewed))
    heard = now.age(snapshot.watched)
    registry_away = any(problem.id in REGISTRY - {"no-config"} for problem in found)
    if heard is not None and heard > WATCH_OLD and not registry_away:
        found.append(
            Problem(
                "watch-old", f"no word from the watch for {heard:.0f}s: peers may be old", snapshot.watched
            )
        )
    order = {id_: place for place, id_ in enumerate(PROBLEMS)}
    return tuple(sorted(found, key=lambda problem: order.get(problem.id, len(order))))


def stalled(snapshot: Snapshot, now: Now) -> float | None:
    """For how many seconds the loop has not turned, if that is too long."""
    silent = now.boot - snapshot.turned
    return silent if silent > (STALLED_STARTING if snapshot.state == "starting" else STALLED) else None


def not_ready(snapshot: Snapshot, now: Now) -> tuple[str, ...]:
    """Why packets do not flow yet, or no more; empty when they do."""
    reasons = []
    if snapshot.lease is None:
        reasons.append(f"no-lease: {snapshot.waiting or 'the agent starts'}")
    if snapshot.peers is None:
        reasons.append("peers-incomplete: the first complete list of peers is not there yet")
    if snapshot.state in {"stopping", "stopped"}:
        reasons.append(f"{snapshot.state}: the agent ends")
    reasons += [
        f"{problem.id}: {problem.message}" for problem in problems(snapshot, now) if problem.id in BLOCKING
    ]
    if not reasons and snapshot.state != "ready":
        reasons.append(f"{snapshot.state}: subnet.env is not written yet")
    return tuple(reasons)


def drops(counters: Mapping[str, int]) -> int:
    return sum(count for name, count in counters.items() if name.startswith("drop_"))


MOST_PEERS = 1000
"""With traffic, shown one by one; of more the busiest, so that the answer stays one that can be read."""


def busiest(peers: Mapping[str, PeerTraffic]) -> list[tuple[str, PeerTraffic]]:
    """By bytes, the most first, `MOST_PEERS` at most."""
    return heapq.nlargest(MOST_PEERS, peers.items(), key=lambda one: one[1].out_bytes + one[1].in_bytes)


def document(
    snapshot: Snapshot,
    counters: Mapping[str, int],
    now: Now,
    *,
    peers: Mapping[str, PeerTraffic] | None = None,
    offloads: Mapping[str, tuple[bool, str]] | None = None,
) -> dict[str, object]:
    """What `/status` serves: names and units as `operator-ux` 2.1 wants them, unknown is null."""
    found = problems(snapshot, now)
    place, lease = snapshot.place, snapshot.lease
    bad = any(problem.severity == FAIL for problem in found)
    verdict = "degraded" if snapshot.state == "ready" and bad else snapshot.state
    before = snapshot.drops_before
    # A data plane that was made anew counts from 0 again.
    recent = None if before is None else max(0, drops(counters) - before[1])
    trouble = next((problem for problem in found if problem.id in REGISTRY), None)
    return {
        "schema": 1,
        "host": snapshot.host,
        "version": snapshot.version,
        "pid": snapshot.pid,
        "verdict": verdict,
        "state": snapshot.state,
        "state_since": now.date(snapshot.since),
        "state_seconds": _whole(now.age(snapshot.since)),
        "started": now.date(snapshot.started),
        "as_of": now.date(now.boot),
        "waiting_for": snapshot.waiting,
        "network": None if place is None else str(place.network),
        "prefix": snapshot.prefix,
        "subnet_file": snapshot.subnet_file,
        "backend": None if place is None else place.backend,
        "data_path": None if place is None else place.data_path,
        "data_path_why": None if place is None else place.data_path_why,
        "device": None if place is None else place.device,
        "mtu": None if place is None else place.mtu,
        "interface": None if place is None else place.interface,
        "public_ip": None if place is None else str(place.public_ip),
        "lease": None
        if lease is None
        else {
            "subnet": str(lease.subnet),
            "kind": "reservation" if lease.ends is None else "lease",
            "seconds_left": None if lease.ends is None else _whole(max(0.0, lease.ends - now.boot)),
            "expires": now.date(lease.ends),
            "renewed": now.date(lease.renewed),
            "renewed_seconds_ago": _whole(now.age(lease.renewed)),
            "revision": lease.revision,
        },
        "registry": {
            "store": snapshot.registry,
            "answers": None
            if snapshot.answered is None and trouble is None
            else trouble is None or trouble.id == "no-config",
            "trouble": None
            if trouble is None
            else {
                "id": trouble.id,
                "message": trouble.message,
                "seconds": _whole(now.age(trouble.since)),
            },
            "last_word_seconds_ago": _whole(now.age(snapshot.answered)),
            "watch_revision": snapshot.revision,
            "watch_seconds_ago": _whole(now.age(snapshot.watched)),
        },
        "peers": {
            "count": snapshot.peers,
            "flanctl": None if snapshot.peers is None else snapshot.flanctl_peers,
            "revision": snapshot.revision,
            "traffic": [
                {
                    "public_ip": peer,
                    **traffic._asdict(),
                    "heard_seconds_ago": _whole(traffic.heard_seconds_ago),
                }
                for peer, traffic in busiest(peers or {})
            ],
        },
        "kernel": {
            kind: {"wanted": wanted, "missing": missing} for kind, wanted, missing in snapshot.objects
        },
        "docker_bridge_matches": snapshot.docker_matches,
        "docker_accept": None
        if snapshot.accept is None
        else {
            "mode": snapshot.accept.mode,
            "rules": snapshot.accept.wanted,
            "missing": snapshot.accept.missing,
            "behind": list(snapshot.accept.before),
            "programs": snapshot.accept.programs,
        },
        "counters": dict(counters),
        "offloads": {name: {"on": on, "why": why or None} for name, (on, why) in (offloads or {}).items()},
        "dropped_recently": recent,
        "dropped_recently_seconds": None if before is None else _whole(now.age(before[0])),
        "problems": [
            {
                "id": problem.id,
                "severity": problem.severity,
                "message": problem.message,
                "details": list(problem.details),
                "since": now.date(problem.since),
            }
            for problem in found[:SHOWN]
        ],
        "problems_left_out": max(0, len(found) - SHOWN),
    }


FIELDS = (
    "schema", "host", "version", "pid", "verdict", "state", "state_since", "state_seconds", "started", "as_of",
    "waiting_for", "network", "prefix", "subnet_file", "backend", "data_path", "data_path_why", "device", "mtu", "interface",
    "public_ip", "lease", "registry", "peers", "kernel", "docker_bridge_matches", "docker_accept", "counters",
    "offloads", "dropped_recently", "dropped_recently_seconds", "problems", "problems_left_out",
)  # fmt: skip
"""The names in a document; without an agent all are null (`flanctl status -w json`)."""


def counted(found: tuple[Problem, ...]) -> Counter[str]:
    """How often each id is there."""
    return Counter(problem.id for problem in found)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)

"""The loop's note-taker: hears what happens, and publishes a `Snapshot` each time the loop turns.

    observer.waiting(error); observer.leased(held, mtu); observer.learned(...); observer.applied(...)
    observer.turn("ready")
    observer.snapshot           # any thread, no lock: a new value is put in place of the old one

Only the loop's thread calls the methods; `heard` and `renewed` are the exception and say so.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from flanctl import __version__
from flanctl.agent.certificates import Certificates
from flanctl.agent.meters import Meters
from flanctl.agent.snapshot import PROBLEMS, HeldLease, Place, Problem, Snapshot, Taken, drops
from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted
from flanctl.registry.leases import LeaseRenewed, LeaseRestored, RegistryBack, RegistryTrouble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flanctl.agent.backends.base import ApplyReport, PeerTraffic
    from flanctl.agent.kernel.docker_accept import AcceptReport
    from flanctl.agent.machine import Machine
    from flanctl.clock import Clock
    from flanctl.model.network_config import NetworkConfig
    from flanctl.model.peers import Problem as NotedProblem
    from flanctl.registry.leases import Acquired, KeeperReport, LeaseTable
    from flanctl.registry.peers import FollowerReport
    from flanctl.registry.stores.store import Store

TURN = 5.0
"""Seconds between two turns of the loop at the longest, so that a silence means that it hangs."""
_SAMPLE, _SAMPLES = 10.0, 7
"""Seconds between two looks at the drop counters and how many are kept: together the last minute."""


class Observer:
    """One agent's. See above."""

    def __init__(self, clock: Clock, *, prefix: str, subnet_file: Path) -> None:
        self._clock = clock
        self.meters = Meters()
        now = clock.now()
        self.snapshot = self._draft = Snapshot(
            state="starting",
            since=now,
            started=now,
            turned=now,
            host=os.uname().nodename,
            version=__version__,
            pid=os.getpid(),
            prefix=prefix,
            subnet_file=str(subnet_file),
        )
        self._machine: Machine | None = None
        self._store: Store | None = None
        self._lease: HeldLease | None = None
        self._trouble: dict[str, Problem] = {}
        self._registry_problems: tuple[Problem, ...] = ()
        self._kernel_problems: tuple[Problem, ...] = ()
        self._since: dict[str, float] = {}
        self._objects: dict[str, tuple[int, int]] = {}
        self._rules_error: str | None = None
        self._accept: AcceptReport | None = None
        self._address_trouble: str | None = None
        self._lost: Problem | None = None
        self._path: Problem | None = None
        self._waits: Problem | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self.certificates = Certificates({})
        self.port_trouble: str | None = None
        """Why nobody can be answered over TCP; the status API's thread sets it."""

    # ---- what happens ---------------------------------------------------------------------------------------------

    def uses(self, store: Store) -> None:
        """Whose `describe` tells about the registry."""
        self._store = store

    def waiting(self, error: FlanctlError) -> float:
        """The start waits because of this. For how many seconds already."""
        now = self._clock.now()
        since = now if self._waits is None else self._waits.since or now
        kinds = {NotFound: "no-config", NotPermitted: "registry-denied", Invalid: "config-invalid"}
        kind = next((kind for of, kind in kinds.items() if isinstance(error, of)), "registry-unreachable")
        kind = error.id if error.id in PROBLEMS else kind
        self._waits = Problem(kind, error.message, since, error.details)
        self._draft = replace(self._draft, waiting=error.message)
        return now - since

    def introduced(self, config: NetworkConfig, machine: Machine) -> None:
        self._machine = machine
        backend, underlay = machine.backend, machine.underlay
        place = Place(
            network=config.network,
            capacity=config.capacity,
            backend=config.backend_type,
            data_path=backend.data_path,
            data_path_why=backend.data_path_why,
            device=backend.device,
            interface=underlay.link.name,
            public_ip=underlay.public_ip,
            underlay_mtu=underlay.mtu,
            mtu=backend.mtu,
        )
        self._draft = replace(self._draft, place=place)

    def leased(self, held: Acquired) -> None:
        """Our lease: new, with its full time again, or (without a TTL) as the agent before us knew it. Any thread."""
        lease = held.lease
        now = None if lease.ttl is None and not lease.reservation else self._clock.now()
        self._lease = HeldLease(lease.subnet, held.ends, lease.ttl, now, held.entry.revision)

    def renewed(self, report: KeeperReport) -> None:
        """What the keeper reports. From its own thread."""
        match report:
            case LeaseRenewed(held):
                self.meters.renewals.add("ok")
                self.leased(held)
            case LeaseRestored(held):
                self.meters.renewals.add("conflict")
                self.leased(held)
            case RegistryTrouble():
                self.meters.renewals.add("error")
                self.heard("keeper", report)
            case RegistryBack():
                self.heard("keeper", report)

    def heard(self, worker: str, report: FollowerReport | KeeperReport) -> None:
        """A worker's trouble with the registry, or the end of it. From its own thread."""
        if isinstance(report, RegistryTrouble):
            kind = "registry-denied" if isinstance(report.error, NotPermitted) else "registry-unreachable"
            since = self._clock.now() - report.since
            self._trouble[worker] = Problem(kind, report.error.message, since, report.error.details)
        elif isinstance(report, RegistryBack):
            self._trouble.pop(worker, None)

    def learned(self, table: LeaseTable) -> None:
        """A complete picture of all leases. Those only still routed to take no subnet, or count as unreadable."""
        reserved = sum(lease.reservation for lease in table.leases)
        reserved -= sum(lease.reservation for lease in table.kept)
        bad_keys = sum(one.problem == "bad-key" for one in table.unreadable)
        taken = Taken(
            len(table.leases) - len(table.kept) - reserved,
            reserved,
            bad_keys=bad_keys,
            bad_values=len(table.unreadable) - bad_keys,
        )
        self._draft = replace(self._draft, taken=taken, revision=table.revision)

    def noted(self, problems: Sequence[NotedProblem]) -> None:
        """All that is wrong in the registry now (`Agent.problems`); each has been there since it was first noted."""
        now = self._clock.now()
        before = {(one.id, one.message): one.since for one in self._registry_problems}
        self._registry_problems = tuple(
            Problem(one.id, one.message, before.get((one.id, one.message), now)) for one in problems
        )

    def applied(
        self,
        report: ApplyReport,
        *,
        seconds: float,
        rules: int | None,
        rules_repaired: int,
        rules_error: str | None,
        accept: AcceptReport | None,
        address_trouble: str | None,
        peers: int,
        flanctl_peers: int | None = None,
    ) -> None:
        """What one look at the kernel found and did, for so many peers, of which so many run flanctl (None: not known).

        `rules`: how many chains are wanted, `accept`: what became of Docker's accept rules; None if nobody looked.
        `address_trouble`: what is wrong with the underlay's address, as far as is known.
        """
        self.meters.apply_seconds.observe(seconds)
        self._path, self._address_trouble = None, address_trouble
        found: list[Problem] = []
        objects = {one.kind: (one.wanted, one.missing) for one in report.objects}
        before_ready = self.snapshot.state != "ready"  # what is made for the first time is no repair
        for one in report.objects:
            self.meters.repairs.add(one.kind, count=0 if before_ready else one.repaired)
            self.meters.failures.add(one.kind, count=one.missing)
        if rules is not None:
            missing = rules if rules_error is not None else 0
            objects["rule"] = rules, missing
            self.meters.repairs.add("rule", count=0 if before_ready else rules_repaired)
            self.meters.failures.add("rule", count=missing)
            self._rules_error = rules_error
        elif (before := self._objects.get("rule")) is not None:
            objects["rule"] = before
        if accept is not None:
            self._accept = accept
            self.meters.repairs.add("accept", count=0 if before_ready else len(accept.repaired))
            self.meters.failures.add("accept", count=accept.missing)
        if self._accept is not None and self._accept.wanted:
            objects["accept"] = self._accept.wanted, self._accept.missing
        self._objects = objects
        words = "; ".join(report.failed)
        if objects.get("link", (0, 0))[1]:
            found.append(self._lasting("device-gone", words or "the device is gone"))
        elif objects.get("route", (0, 0))[1]:
            found.append(self._lasting("routes-missing", words))
        if self._rules_error is not None:
            found.append(self._lasting("rules-missing", self._rules_error))
        if self._accept is not None and self._accept.error is not None:
            found.append(self._lasting("docker-accept", self._accept.error))
        if self._accept is not None and self._accept.closed is not None:
            found.append(self._lasting("docker-closed", self._accept.closed))
        if self._address_trouble is not None:
            found.append(self._lasting("address-gone", self._address_trouble))
        matches = self._look_at_docker(found)
        self._kernel_problems = tuple(found)
        self._since = {problem.id: self._since[problem.id] for problem in found}
        place = self._draft.place
        if place is not None and self._machine is not None:
            backend = self._machine.backend
            if backend.data_path != place.data_path and not before_ready:
                self.meters.path_switches.add(backend.data_path)
            place = replace(
                place, mtu=backend.mtu, data_path=backend.data_path, data_path_why=backend.data_path_why
            )
        self._draft = replace(
            self._draft,
            place=place,
            objects=tuple((kind, *numbers) for kind, numbers in sorted(objects.items())),
            peers=peers,
            flanctl_peers=flanctl_peers,
            docker_matches=matches,
            accept=self._accept,
        )

    def unseen(self, error: FlanctlError) -> None:
        """The kernel did not let us look."""
        self._kernel_problems = (self._lasting("kernel-error", error.message),)

    def path_failed(self, why: str) -> None:
        self._path = Problem("data-path", f"the data plane ended by itself: {why}", self._clock.now())

    def lost(self, error: FlanctlError) -> None:
        """Another host has our subnet."""
        self._lost = Problem("lease-foreign", error.message, self._clock.now())

    # ---- what is published ----------------------------------------------------------------------------------------

    def turn(self, state: str) -> Snapshot:
        """The loop is alive: everything known now becomes the snapshot."""
        now = self._clock.now()
        was = self.snapshot
        if self._lease is not None and self._waits is not None:
            self._waits, self._draft = None, replace(self._draft, waiting=None)
        counters = self.counters()
        if counters and (not self._samples or now - self._samples[-1][0] >= _SAMPLE):
            self._samples.append((now, drops(counters)))
        port = self.port_trouble
        found = (
            self._lost,
            self._waits,
            self._path,
            *self._one_trouble(),
            *self._kernel_problems,
            None if port is None else Problem("healthz-port", port),
            *self._registry_problems,
        )
        self.snapshot = replace(
            self._draft,
            state=state,
            since=was.since if state == was.state else now,
            turned=now,
            registry="" if self._store is None else self._store.describe(),
            answered=self.meters.answered,
            watched=self.meters.watched,
            drops_before=self._samples[0] if self._samples else None,
            lease=self._lease,
            found=tuple(problem for problem in found if problem is not None),
        )
        return self.snapshot

    def counters(self) -> Mapping[str, int]:
        """The data plane's, as they are now. Any thread."""
        return {} if self._machine is None else self._machine.backend.counters()

    def peer_traffic(self) -> Mapping[str, PeerTraffic]:
        """By public IP, now. Any thread."""
        return {} if self._machine is None else self._machine.backend.peers()

    def offloads(self) -> Mapping[str, tuple[bool, str]]:
        """As the data plane uses them now. Any thread."""
        return {} if self._machine is None else self._machine.backend.offloads()

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _one_trouble(self) -> list[Problem]:
        """Two workers that meet the same dead registry are one problem, the older one."""
        found = tuple(self._trouble.values())  # one step: the workers change it meanwhile
        return sorted(found, key=lambda problem: problem.since or 0.0)[:1]

    def _lasting(self, kind: str, message: str) -> Problem:
        """The problem with the moment at which it was first seen in a row."""
        return Problem(kind, message, self._since.setdefault(kind, self._clock.now()))

    def _look_at_docker(self, found: list[Problem]) -> bool | None:
        """Whether docker0 has our first address; None without a docker0 or a lease."""
        if self._machine is None or self._lease is None:
            return None
        bridge = self._machine.docker_bridge()
        if bridge is None:
            return None
        subnet = self._lease.subnet
        wanted = f"{subnet.network_address + 1}/{subnet.prefixlen}"
        if wanted in bridge:
            return True
        has = ", ".join(bridge) or "no address"
        found.append(self._lasting("docker0-old", f"docker0 has {has}, the lease wants {wanted}"))
        return False

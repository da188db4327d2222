"""The agent: looks, then acts, then keeps the machine as the registry says.

        STARTING ──lease──▶ LEASED ──peers applied, subnet.env written──▶ READY
            │                  │                                            │
            └──────────────────┴────── Stop, LeaseLost, failure ────────────┴──▶ STOPPING ──▶ STOPPED

One thread (the one that calls `run`) owns all domain state. Workers post typed messages to one inbox; a signal is a
message too. Messages only mark work as due; the work is one idempotent `apply` of everything wanted. Stopping leaves
device, routes, rules and lease in place, so that traffic flows through a restart.
"""

from __future__ import annotations

import enum
import gc
import os
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flanctl import __version__
from flanctl.agent.answers import Answers
from flanctl.agent.certificates import Certificates
from flanctl.agent.known import Known
from flanctl.agent.lock import lock, refuse_locked
from flanctl.agent.log import MINUTE, Repeated
from flanctl.agent.memory import Memory
from flanctl.agent.messages import HostsChanged, LinkChanged, Message, PathFailed, Reload, ShowCounters, Stop
from flanctl.agent.meters import MeteredStore
from flanctl.agent.observer import TURN, Observer
from flanctl.agent.pace import Pace
from flanctl.agent.problems import Problems, clone, config_problems, unreadable
from flanctl.agent.signals import Signals, StopRequested
from flanctl.agent.snapshot import FAIL
from flanctl.agent.state import State
from flanctl.agent.status_api import StatusApi, bound
from flanctl.agent.supervisor import Crew, WorkerFailed
from flanctl.agent.telling import hint, hours, tell_changes
from flanctl.errors import (
    Conflict,
    FlanctlError,
    Invalid,
    LeaseLost,
    NotFound,
    NotPermitted,
    RegistryUnreachable,
)
from flanctl.files import sweep, write_atomically
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.model.peers import Problem, peers_of
from flanctl.model.subnet_file import SubnetFile
from flanctl.registry.announcements import AnnounceFailed, Announcement, Announcer, CloneSeen, Hosts
from flanctl.registry.config import config_key, read_config
from flanctl.registry.leases import (
    LEASE_TTL,
    Acquired,
    Keeper,
    KeeperReport,
    LeaseRenewed,
    LeaseRestored,
    Leases,
    RegistryBack,
    RegistryTrouble,
)
from flanctl.registry.peers import ConfigSeen, Follower, FollowerReport, PeersChanged, RegistryDoubted
from flanctl.registry.stores.store import Put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from ipaddress import IPv4Address
    from pathlib import Path

    from flanctl.agent.backends.base import Backend
    from flanctl.agent.kernel.docker_accept import DockerAccept
    from flanctl.agent.kernel.rules import IptablesRules
    from flanctl.agent.log import Log
    from flanctl.agent.machine import Machine
    from flanctl.agent.notify import Notify
    from flanctl.clock import Clock
    from flanctl.model.dialect import Dialect
    from flanctl.model.peers import Peer
    from flanctl.registry.stores.store import Delete, Store

STOP_SECONDS = 2.5
"""For all workers together; with the backend's 2 s the agent keeps its promise of 5 s."""
FAILURES, FAILURE_WINDOW = 5, 60.0
"""So many failures of the data plane, or of looking at the kernel, within so many seconds, and we give up, for
systemd to start us afresh. One alone must not end an agent whose packets flow."""
LINK_PAUSE = 0.5
"""Seconds between two looks for the sake of link events: somebody who fights us over flannel0 must not own the CPU."""
PEERS_BURST, PEERS_PAUSE = 50, 0.5
"""So many changes of peers are each acted upon at once, after that all that came within so many seconds together: to learn
and apply one costs 10 ms of CPU, and a registry may change fifty times a second."""
FATAL = frozenset({"device-foreign", "device-busy"})
"""What trying again does not mend: flannel0 is somebody else's now."""
REMEMBER_BURST, REMEMBER_SECONDS = 5, 5.0
"""What we know is written at once when it changes, so many times in a row, then every so many seconds; and when the agent
stops. An agent may be killed a second after it has met its peers."""
RETRY_SECONDS = 5.0
"""Between two tries while etcd or the config is not there at start."""


class Phase(enum.Enum):
    """Where the agent is in its life. STOPPED is final."""

    STARTING = "starting"
    LEASED = "leased"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator decided about this agent, parsed and checked."""

    prefix: str
    subnet_file: Path
    state_dir: Path
    run_dir: Path
    ip_masq: bool
    forward_rules: bool
    resync_seconds: float
    renew_margin: float
    """Seconds before the end of the lease at which it is renewed at the latest."""
    patient: bool = False
    """Start as flanneld 0.7.1 does: a config that is wrong, a backend we lack, no free subnet are waited out too, and
    said once a minute."""
    lease_ttl: float = LEASE_TTL
    """Seconds the registry keeps our lease without a word from us."""
    healthz: tuple[str, int] | None = None
    """Address and port for HTTP; None: only the unix socket."""
    docker_accept: bool = True
    """Keep the rules without which Docker 28 and newer drops packets of other hosts."""
    certificates: Mapping[str, str] = field(default_factory=dict)
    """The PEM files of our client certificate and CA, by role (metrics.py): when they end is shown."""


class _StartOver(Exception):
    """What we knew last is of no use here after all: wait for the registry."""


def _settle() -> None:
    """What the start has made stays and is never looked at again; garbage from here on is found as early as usual.

    The frozen executable starts with a collector that hardly runs; left so, an agent grows by megabytes before it does.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 10)


class Agent:
    """One agent's life. Make it, `run` it, once.

    `store` is closed by whoever opened it. Every collaborator comes in, so that tests can put a fake in its place.
    """

    def __init__(
        self,
        options: Options,
        *,
        store: Store,
        dialect: Dialect | None,
        look: Callable[[NetworkConfig], Machine],
        log: Log,
        notify: Notify,
        clock: Clock,
        stay: Callable[[str], None] = lambda _api: None,
        move: Callable[[Callable[[Store], str | None]], str | None] = lambda _objection: "there is no other",
    ) -> None:
        """`stay` is told to which API of an etcd we hold while the registry is silent; `move` is the way from v2 to v3
        (AutoStore.move).
        """
        self._options = options
        self._stay, self._move_store = stay, move
        self._observer = Observer(clock, prefix=options.prefix, subnet_file=options.subnet_file)
        store = MeteredStore(store, self._observer.meters, clock)
        self._observer.uses(store)
        self._observer.certificates = Certificates(options.certificates)
        self._store = store
        self._dialect = dialect
        self._look = look
        self._log = log
        self._notify = notify
        self._clock = clock
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._crew = Crew(self._inbox.put)
        self._leases = Leases(store, options.prefix, dialect, clock)
        self._repeated = Repeated(clock)
        self._waits = Repeated(clock, every=MINUTE if options.patient else None)
        self._signals = Signals(self._inbox.put)
        self._peers: tuple[Peer, ...] | None = None
        self._words: Announcement
        self._config_text = b""
        self._spoken: Dialect
        """What the config was read in: `dialect`, or what goes with the store that had it."""
        self._known: Known | None = None
        """What we go on with, started while the registry is silent."""
        self._known_is_of_use = True
        self._unsaved = False
        self._saves = Pace(clock, burst=REMEMBER_BURST, seconds=REMEMBER_SECONDS)
        self._counted: tuple[tuple[Peer, ...] | None, frozenset[IPv4Address] | None, int | None]
        self._counted = None, None, None
        """Peers, who announced flanctl, and how many of the peers are among those."""
        self._memo: dict[int, tuple[Lease, Peer]] = {}
        self._keeper: Keeper
        self._accept: DockerAccept
        self._settled: int | None = None
        """The generation of the firewall's rules in which ours were found as wanted; looked at all the same once a
        minute, for what no generation tells: another iptables, a Docker that came."""
        self._look_again = 0.0
        self._trouble: str | None = None
        self._follower: Follower
        self._announcer: Announcer
        self.problems = Problems(log, self._observer.noted)
        self._memory = Memory(options.state_dir, options.subnet_file, log, self.problems)
        self._drops: dict[str, int] = {}
        self._failures: dict[str, list[float]] = {}
        self._looked = 0.0
        self._config_revision = 0
        self._link_changed = False
        self._peers_changed = False
        self._pace = Pace(clock, burst=PEERS_BURST, seconds=PEERS_PAUSE)
        self._reload = False
        self._ready_line = ""
        self._said_alive = 0.0
        self._said_status = ""
        self.phase = Phase.STARTING

    # ---- looking: nothing on this machine or in the registry changes --------------------------------------------

    def check(self) -> None:
        """Everything `run` looks at before it acts. Raises the error that would end it; says what was found."""
        refuse_locked(self._options.run_dir)
        self._refuse_taken_port()
        self._refuse_unwritable()
        config = read_config(self._store, self._options.prefix, self._dialect).config
        machine = self._look(config)
        try:
            self._introduce(config, machine)
            machine.backend.check()
            if self._options.ip_masq or self._options.forward_rules:
                machine.rules(config.subnet_at(0)).check()
            machine.docker_accept(config.subnet_at(0), wanted=self._options.docker_accept).check()
        finally:
            machine.backend.stop()
            machine.close()

    def _refuse_unwritable(self) -> None:
        """Now, and not when lease and device are there: files that could never be written."""
        for path in self._memory.files:
            folder = path.parent if path.parent.exists() else path.parent.parent
            if not folder.is_dir():
                raise NotFound(
                    f"cannot write {path}: there is no directory {folder}", hint=f"mkdir -p {path.parent}"
                )
            if not os.access(folder, os.W_OK | os.X_OK):
                raise NotPermitted(f"cannot write {path}: no right to write in {folder}")

    def _refuse_taken_port(self) -> None:
        """Only `check` does: an agent that carries packets without a health port beats one that does not start."""
        if self._options.healthz is None:
            return
        host, port = self._options.healthz
        try:
            bound(host, port).close()
        except OSError as error:
            raise Conflict(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint="another --healthz-port or --healthz-ip",
                id="healthz-port",
            ) from None

    def _introduce(self, config: NetworkConfig, machine: Machine) -> None:
        for sentence in (*config.warnings, *machine.underlay.warnings, *machine.warnings):
            self._log.warn(sentence)
        underlay = machine.underlay
        others = f"; other candidates: {', '.join(underlay.candidates)}" if underlay.candidates else ""
        self._log.info(
            f"interface {underlay.link.name} {underlay.address} mtu={underlay.mtu}, {underlay.why}{others}"
        )

    # ---- the life -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start, serve until told to stop, stop. Raises LeaseLost, or the error that ended it."""
        began = self._clock.now()
        with self._signals.handled(), lock(self._options.run_dir):
            machine: Machine | None = None
            lease = ""
            try:
                self._open_api()
                self._refuse_unwritable()
                introduced: NetworkConfig | None = None
                while True:
                    config = self._wait_for_config()
                    try:
                        machine = self._look(config)
                        if config != introduced:
                            self._introduce(config, machine)
                            introduced = config
                        self._observer.introduced(config, machine)
                        machine.backend.check()
                        # ---------------------------------------------------------- from here on we act
                        for path in self._memory.files:
                            sweep(path)
                        self._live(config, machine)
                        break
                    except _StartOver:
                        if machine is not None:
                            machine.backend.stop()
                            machine.close()
                            machine = None
                    except FlanctlError as error:
                        if not self._worth_waiting(error):
                            raise
                        if machine is not None:
                            machine.backend.stop()
                            machine.close()
                            machine = None
                        self._wait_on(error)
            except StopRequested:
                pass
            except LeaseLost as error:
                lease = "lost"
                self._observer.lost(error)
                self._memory.forget_known()
                if machine is not None:
                    machine.backend.lost()
                self._log.error(
                    f"lease lost: {error.message}; stopping with {error.exit_code}, kernel state stays",
                    id=error.id,
                )
                raise
            finally:
                if self.phase is not Phase.STARTING:
                    lease = lease or "kept"
                self.phase = Phase.STOPPING
                self._turn()
                self._notify.stopping()
                asked = self._clock.now()
                # The backend first: its end is what the worker that watches it waits for.
                if machine is not None:
                    machine.backend.stop()
                late = self._crew.stop(seconds=STOP_SECONDS)
                if machine is not None:
                    machine.close()
                for name in late:
                    self._log.warn(f"{name} did not stop in {STOP_SECONDS:g} s")
                self.phase = Phase.STOPPED
                self._log.info(
                    "stopped",
                    after=f"{self._clock.now() - asked:.1f}s",
                    reason=self._signals.stop_reason or "failure",
                    lease=lease or "none",
                    ran=f"{asked - began:.0f}s",
                )

    def _open_api(self) -> None:
        """Questions are answered from here on. Without the API packets flow all the same, so it ends nothing."""
        observer = self._observer

        def tell(why: str | None) -> None:
            if why is not None and observer.port_trouble is None:
                self._log.warn(f"{why}; trying again", id="healthz-port")
            observer.port_trouble = why

        api = StatusApi(
            Answers(observer, self._clock),
            socket_path=self._options.run_dir / "agent.sock",
            address=self._options.healthz,
            trouble=tell,
        )
        try:
            api.open()
        except OSError as error:
            api.close()
            self._log.warn(
                f"flanctl status cannot ask this agent: no {self._options.run_dir}/agent.sock: {error.strerror}"
            )
            return
        self._crew.start("status api", api.run, api.stop)

    def _turn(self) -> None:
        """The loop is alive: publish what is known, and tell systemd."""
        snapshot = self._observer.turn(self.phase.value)
        worst = next((problem for problem in snapshot.found if problem.severity == FAIL), None)
        if self.phase is Phase.LEASED and worst is not None:
            text = f"waiting for the first complete list of peers: {worst.message}"
            self._notify.waiting(text, seconds=RETRY_SECONDS + 60)
        if self.phase is not Phase.READY:
            return
        now = self._clock.now()
        if now - self._said_alive >= self._notify.watchdog / 3:
            self._said_alive = now
            self._notify.alive()
        status = self._ready_line if worst is None else f"degraded: {worst.message} [{worst.id}]"
        if status != self._said_status:
            self._said_status = status
            self._notify.status(status)

    def _live(self, config: NetworkConfig, machine: Machine) -> None:
        found = self._memory.state()
        remembered = found or State.new()
        held = self._acquire(config, machine, remembered) if self._known is None else self._resume(machine)
        self._observer.leased(held)
        self.phase = Phase.LEASED
        self._turn()
        subnet = held.lease.subnet
        self._memory.save_state(replace(remembered, prefix=self._options.prefix, subnet=subnet))
        machine.backend.start(subnet)
        rules = machine.rules(subnet)
        self._accept = machine.docker_accept(subnet, wanted=self._options.docker_accept)
        self._start_workers(held, machine, remembered, first=found is None)
        if self._known is not None:
            self._keeper.wake()  # the first answer says whether the subnet is still ours
            self._peers = self._known.peers
            self._apply(config, machine, held, rules, with_rules=True)
        try:
            self._serve(config, machine, held, rules)
        finally:
            self._write_down()

    def _serve(self, config: NetworkConfig, machine: Machine, held: Acquired, rules: IptablesRules) -> None:
        """The loop: take every message there is, then do what they made due, once."""
        due = self._clock.now() + self._options.resync_seconds
        while True:
            self._turn()
            dirty = False
            soon = min(due, self._looked + LINK_PAUSE) if self._link_changed else due
            soon = min(soon, self._pace.due()) if self._peers_changed else soon
            if self._unsaved and self._peers is not None:
                soon = min(soon, self._saves.due())
            turn = min(TURN, self._notify.watchdog / 3 or TURN)
            wait = min(turn, max(0.0, soon - self._clock.now()))
            for message in self._messages(wait):
                dirty |= self._take(message, config, machine, held)
                if self._signals.stop_reason is not None:
                    return
            if self._peers_changed and self._clock.now() >= self._pace.due():
                self._pace.take()
                dirty |= self._learn(config, machine, held)
            tick = self._clock.now() >= due or self._reload
            self._reload = False
            look = tick or (self._link_changed and self._clock.now() >= self._looked + LINK_PAUSE)
            if tick:
                due = self._clock.now() + self._options.resync_seconds
            if (dirty or look) and self._peers is not None:
                first = self.phase is not Phase.READY
                self._apply(config, machine, held, rules, with_rules=tick or first, look=look or first)
            if tick:
                self._tell_drops(machine)
            if self._clock.now() >= self._saves.due():
                self._write_down()

    def _messages(self, seconds: float) -> Iterator[Message]:
        """The next message, waited for, and all that are there with it."""
        try:
            yield self._inbox.get(timeout=seconds)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, message: Message, config: NetworkConfig, machine: Machine, held: Acquired) -> bool:
        """One message. True if it makes an `apply` due."""
        match message:
            case Stop(reason):
                self._signals.stop_reason = reason
            case ShowCounters():
                self._log.info("counters", **{name: n for name, n in machine.backend.counters().items() if n})
            case PeersChanged():
                self._peers_changed = True
            case ConfigSeen(entry):
                self.problems.note(
                    "config", config_problems(self._options.prefix, config, held.lease.subnet, entry)
                )
            case LinkChanged():
                self._link_changed = True
            case HostsChanged():
                return True
            case LeaseRenewed():
                self._tell(message)
                return True  # a kernel path goes on until the lease's end, which is later now
            case Reload():
                self._log.info(
                    "SIGHUP: device, routes and rules are compared now; settings are read at the start only"
                )
                self._reload, self._settled = True, None
                self._move(config, held)
            case PathFailed(why):
                self._observer.path_failed(why)
                self._log.warn("data plane ended by itself", error=why)
                self._count_failure(FlanctlError(f"the data plane ended by itself: {why}", id="data-path"))
                return True
            case WorkerFailed(name, error):
                raise error or FlanctlError(f"the worker {name} ended though nobody asked it to", id="worker")
            case _:
                self._tell(message)
        return False

    # ---- the steps ----------------------------------------------------------------------------------------------

    def _move(self, config: NetworkConfig, held: Acquired) -> None:
        """From etcd v2 to v3 while packets flow, if v3 has all of the network by now (decision 16)."""
        if self._store.api != "v2":
            return
        there: list[Acquired] = []

        def objection(v3: Store) -> str | None:
            found = self._there(v3, config, held)
            if isinstance(found, str):
                return found
            there.append(found)
            return None

        if (why := self._move_store(objection)) is not None:
            self._log.info(
                f"etcd v2 stays in use, not v3: {why}", **{"try": "flanctl migrate v2-to-v3 --both"}
            )
            return
        self._keeper.moved(there[0])
        self._announcer.look()
        self._unsaved = True
        self._log.info(f"moved to {self._store.describe()}", lease=held.lease.subnet)

    def _there(self, v3: Store, config: NetworkConfig, held: Acquired) -> Acquired | str:
        """Our lease as v3 holds it, or why we cannot go there: who is missing there would lose its route."""
        wanted = read_config(v3, self._options.prefix, None).config
        if (wanted.network, wanted.subnet_len) != (config.network, config.subnet_len):
            return f"the network is {wanted.network} with /{wanted.subnet_len} there"
        leases = Leases(v3, self._options.prefix, None).table().leases
        ours = next((lease for lease in leases if lease.key == held.entry.key), None)
        if ours is None:
            return f"our lease {held.lease.subnet} is not there"
        if ours.attributes.public_ip != held.lease.attributes.public_ip:
            return f"{held.lease.subnet} is {ours.attributes.public_ip}'s there"
        here = self._leases.table().leases
        missing = {lease.subnet for lease in here} - {lease.subnet for lease in leases}
        if missing:
            return f"{len(missing)} of {len(here)} leases are not there, such as {min(missing)}"
        entry = v3.get(ours.key)
        if entry is None or entry.revision != ours.revision:
            return "our lease changes there just now"
        ends = None if entry.ttl is None else self._clock.now() + entry.ttl
        return replace(self._keeper.held, lease=replace(ours, ttl=entry.ttl), entry=entry, ends=ends)

    def _wait_for_config(self) -> NetworkConfig:
        """The network's config; waits for etcd and for the key, as flanneld does, but says what for."""
        while True:
            try:
                with self._signals.waiting():
                    stored = read_config(self._store, self._options.prefix, self._dialect)
            except (RegistryUnreachable, NotFound) as error:
                # An etcd that lost its data is empty: as running agents do, put the lease back and let packets flow.
                if (config := self._known_config()) is not None:
                    self._log.warn(f"registry: {error.message}", **hint(error))
                    return config
                self._wait_on(error)
                continue
            except Invalid as error:
                if not self._options.patient:
                    raise
                self._wait_on(error)
                continue
            self._config_text, self._spoken = stored.entry.value, stored.config.dialect
            if stored.entry.revision != self._config_revision:  # a patient start comes here again and again
                self._config_revision = stored.entry.revision
                self._log.info(
                    f"registry {self._store.describe()}",
                    prefix=self._options.prefix,
                    revision=stored.entry.revision,
                )
            return stored.config

    def _known_config(self) -> NetworkConfig | None:
        """The config we knew last, if with it we can go on; a start that has to wait for the registry stops packets."""
        if not self._known_is_of_use:
            return None
        try:
            known = self._memory.known()
            if known is None or known.prefix != self._options.prefix:
                return None
            dialect = self._dialect or known.dialect
            config = NetworkConfig.parse(known.config, dialect, name="the config known last", strict=False)
        except Invalid as error:
            if self._repeated.worth_saying("known"):
                self._log.warn(error.message, id="bad-state")
            return None
        if known.left is not None and known.left <= 0:
            return None
        self._known, self._config_text, self._spoken = known, known.config, dialect
        return config

    def _resume(self, machine: Machine) -> Acquired:
        """Our lease as we knew it last. Raises _StartOver when this host cannot go on with it."""
        known = self._known
        assert known is not None
        left = known.left
        held = self._leases.resume(known.entry, left, machine.config, machine.underlay.public_ip)
        if held is None:
            self._known, self._known_is_of_use = None, False
            raise _StartOver
        machine.backend.prepare()
        self._stay(known.api)
        self._log.warn(
            f"going on with what we knew last: {held.lease.subnet}, {len(known.peers)} peers; packets flow",
            lease_left=hours(left),
        )
        return held

    def _write_down(self) -> None:
        """For whoever is started after us while the registry is silent."""
        if not self._unsaved or self._peers is None:
            return
        held = self._keeper.held
        ends = None if held.ends is None else time.time() + held.ends - self._clock.now()
        known = Known(
            self._options.prefix,
            self._spoken,
            self._config_text,
            held.entry,
            ends,
            self._peers,
            self._store.api,
        )
        self._unsaved = False
        self._saves.take()
        self._memory.save_known(known)

    def _acquire(self, config: NetworkConfig, machine: Machine, remembered: State) -> Acquired:
        """Our lease. An outage in the middle is waited out; what was written meanwhile is found again."""
        prepared = machine.backend.prepare()
        attributes = LeaseAttributes(
            public_ip=machine.underlay.public_ip,
            backend_type=prepared.backend_type,
            backend_data=prepared.backend_data,
        )
        previous = self._memory.subnets(remembered, self._options.prefix)
        while True:
            try:
                with self._signals.waiting():
                    held = self._leases.acquire(
                        config, attributes, previous=previous, ttl=self._options.lease_ttl
                    )
            except RegistryUnreachable as error:
                self._wait_on(error)
                continue
            for sentence in held.notes:
                self._log.warn(sentence)
            self._log.info(f"lease {held.lease.subnet} {held.how}", ttl=hours(held.lease.ttl))
            return held

    def _wait_on(self, error: FlanctlError) -> None:
        """Tell what we wait for, now and then, and wait a little."""
        key = config_key(self._options.prefix)
        if count := self._waits.worth_saying(error.id):
            self._log.warn(
                "; ".join([f"waiting: {error.message}", *error.details]), tries=count, **hint(error)
            )
        waited = self._observer.waiting(error)
        self._turn()
        self._notify.waiting(
            f"waiting for {key} ({waited / 60:.0f}m): {error.message}", seconds=RETRY_SECONDS + 60
        )
        with self._signals.waiting():
            self._clock.wait(threading.Event(), RETRY_SECONDS)

    def _worth_waiting(self, error: FlanctlError) -> bool:
        """What another hand may mend in the registry: a backend we lack, no free subnet. Before we hold a lease only."""
        conflict = isinstance(error, Conflict) and error.id not in FATAL
        mendable = conflict or error.id == "backend-unsupported"
        return self._options.patient and self.phase is Phase.STARTING and mendable

    def _start_workers(self, held: Acquired, machine: Machine, remembered: State, *, first: bool) -> None:
        public_ip = machine.underlay.public_ip
        words = Announcement(
            host=os.uname().nodename,
            version=__version__,
            data_path=machine.backend.data_path,
            instance=remembered.instance,
            run=secrets.token_hex(8),
        )
        self._words = words
        announcer = Announcer(
            self._store,
            self._options.prefix,
            public_ip,
            words,
            self._inbox.put,
            ttl=self._options.lease_ttl,
            clock=self._clock,
            first=first,
        )

        def heard(report: KeeperReport) -> None:
            self._observer.renewed(report)
            self._inbox.put(report)

        def followed(report: FollowerReport) -> None:
            self._observer.heard("follower", report)
            self._inbox.put(report)

        keeper = Keeper(
            self._leases,
            held,
            heard,
            margin=self._options.renew_margin,
            ttl=self._options.lease_ttl,
        )

        self._hosts = Hosts(
            self._store, self._options.prefix, lambda: self._inbox.put(HostsChanged()), self._clock
        )

        def beside_leases(event: Put | Delete) -> None:
            self._hosts.saw(event)
            if isinstance(event, Put) and event.entry.key == announcer.key:
                announcer.saw(event.entry.value)

        def keep() -> None:
            try:
                keeper.run()
            except LeaseLost:
                try:
                    announcer.withdraw()
                except FlanctlError:
                    pass  # it ends with its time; what matters is that we end now
                raise

        self._keeper, self._announcer = keeper, announcer
        known = () if self._known is None else (held.lease, *self._known.leases(self._leases.key))
        self._follower = Follower(
            self._leases,
            followed,
            own=held.entry.key,
            also=beside_leases,
            listed=self._hosts.listed,
            known=known,
            revision=held.entry.revision if known else 0,
        )
        self._crew.start("lease keeper", keep, keeper.stop)
        self._crew.start("announcer", announcer.run, announcer.stop)
        self._crew.start("peer watch", self._follower.run, self._follower.stop)
        self._crew.start("data plane watch", *self._path_watch(machine.backend))
        self._crew.start("link monitor", *machine.link_watch(lambda: self._inbox.put(LinkChanged())))

    def _path_watch(self, backend: Backend) -> tuple[Callable[[], None], Callable[[], None]]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                why = backend.wait(60.0)
                if why is not None and not stop.is_set():
                    self._inbox.put(PathFailed(why))
                    # The daemon rebuilds it; looking again sooner would only count the same failure twice.
                    stop.wait(1.0)

        return watch, stop.set

    def _learn(self, config: NetworkConfig, machine: Machine, held: Acquired) -> bool:
        """A new complete picture of all leases: who is new, who left, what is wrong with ours."""
        self._peers_changed = False
        table, own, own_ip = self._follower.table(), held.lease.subnet, machine.underlay.public_ip
        kept = {lease.key for lease in table.kept}
        if not any(
            lease.subnet == own and lease.attributes.public_ip == own_ip and lease.key not in kept
            for lease in table.leases
        ):
            # Gone, or somebody else's: the keeper writes it again or finds that it is lost.
            self._keeper.wake()
        peers, problems = peers_of(
            table.leases,
            own=own,
            own_ip=own_ip,
            config=config,
            backend_type=config.backend_type,
            memo=self._memo,
        )
        self._observer.learned(table)
        self.problems.note("keys", tuple(map(unreadable, table.unreadable)))
        self.problems.note("leases", problems)
        if self._peers is not None and peers != self._peers:
            tell_changes(self._log, self._peers, peers, table.revision)
        changed = peers != self._peers
        self._peers = peers
        self._unsaved |= changed
        return changed

    def _apply(
        self,
        config: NetworkConfig,
        machine: Machine,
        held: Acquired,
        rules: IptablesRules,
        *,
        with_rules: bool,
        look: bool = True,
    ) -> None:
        """Make the machine what everything known says it should be; without `look` where only other hosts have changed."""
        began = self._clock.now()
        if look:
            self._looked, self._link_changed = began, False
        try:
            machine.backend.told(lease_ends=self._keeper.held.ends, flanctl=self._hosts.addresses)
            report = machine.backend.apply(self._peers or (), look=look)
        except FlanctlError as error:
            if error.id in FATAL or self.phase is not Phase.READY:
                raise
            self._observer.unseen(error)
            self._log.warn(f"could not look at the kernel, trying again: {error.message}")
            self._count_failure(error)
            return
        repaired, failed = list(report.repaired), list(report.failed)
        rules_error: str | None = None
        before = machine.ruleset_generation() if with_rules else None
        look_at_rules = with_rules and (
            before is None or before != self._settled or self._looked >= self._look_again
        )
        if look_at_rules:
            try:
                repaired += rules.ensure(masq=self._options.ip_masq, forward=self._options.forward_rules)
            except FlanctlError as error:
                rules_error = error.message
                failed.append(error.message)
        rules_repaired = len(repaired) - len(report.repaired)
        accept = self._accept.ensure() if look_at_rules else None
        if accept is not None:
            repaired += accept.repaired
            failed += [words for words in (accept.error, accept.closed) if words is not None]
            # As it was before the look: what somebody changes meanwhile is looked at the next time.
            self._settled = (
                None if rules_repaired or accept.repaired or rules_error or accept.error else before
            )
            self._look_again = self._looked + MINUTE
        if with_rules:
            self._trouble = machine.underlay_trouble()
        self._observer.applied(
            report,
            seconds=self._clock.now() - began,
            rules=self._options.ip_masq + self._options.forward_rules if look_at_rules else None,
            rules_repaired=rules_repaired,
            rules_error=rules_error,
            accept=accept,
            address_trouble=self._trouble,
            peers=len(self._peers or ()),
            flanctl_peers=self._count_flanctl(),
        )
        if self.phase is Phase.READY:
            for sentence in repaired:
                if count := self._repeated.worth_saying(sentence):
                    self._log.info(f"repaired: {sentence}", **({"times": count} if count > 1 else {}))
        for sentence in report.notes:
            self._log.info(sentence)
        if machine.backend.data_path != self._words.data_path:
            self._words = replace(self._words, data_path=machine.backend.data_path)
            self._announcer.says(self._words)
        for sentence in failed:
            if count := self._repeated.worth_saying(sentence):
                self._log.warn(sentence, times=count)
        if with_rules and self._trouble and (count := self._repeated.worth_saying(self._trouble)):
            self._log.warn(self._trouble, times=count, id="address-gone")
        if self.phase is Phase.LEASED:
            self._get_ready(config, machine, held)

    def _count_flanctl(self) -> int | None:
        """How many peers run flanctl, by their announcements; None until these were listed. Hashing thousands of
        addresses takes milliseconds, so they are counted where something changed only.
        """
        peers, announced = self._peers, self._hosts.addresses
        if peers is not self._counted[0] or announced is not self._counted[1]:
            count = None if announced is None else sum(peer.public_ip in announced for peer in peers or ())
            self._counted = peers, announced, count
        return self._counted[2]

    def _count_failure(self, error: FlanctlError) -> None:
        """Raise it if its kind has come too often lately."""
        now = self._clock.now()
        recent = [when for when in self._failures.get(error.id, []) if now - when < FAILURE_WINDOW]
        self._failures[error.id] = [*recent, now]
        if len(recent) + 1 >= FAILURES:
            raise error

    def _get_ready(self, config: NetworkConfig, machine: Machine, held: Acquired) -> None:
        """Now the subnet works: tell dockerd (subnet.env), systemd and the operator."""
        mtu = machine.backend.mtu
        written = SubnetFile.for_lease(config.network, held.lease.subnet, mtu, self._options.ip_masq)
        write_atomically(self._options.subnet_file, written.format().encode())
        self.phase = Phase.READY
        line = self._log.ready(
            network=config.network,
            subnet=held.lease.subnet,
            backend=config.backend_type,
            data_path=machine.backend.data_path,
            mtu=mtu,
            public_ip=machine.underlay.public_ip,
            peers=len(self._peers or ()),
        )
        self._ready_line = self._said_status = line
        self._notify.ready(line)
        _settle()
        self._unsaved = True
        self._write_down()

    # ---- what the log says --------------------------------------------------------------------------------------

    def _tell(self, message: Message) -> None:
        match message:
            case LeaseRenewed(held):
                self._unsaved = True
                self._log.info(f"lease {held.lease.subnet} renewed", ttl=hours(held.lease.ttl))
            case LeaseRestored(held):
                self._unsaved = True
                self._log.warn(
                    f"our lease {held.lease.subnet} was gone or rewritten, it stands again",
                    ttl=hours(held.lease.ttl),
                )
            case RegistryTrouble(error, _, left):
                if count := self._repeated.worth_saying("registry"):
                    known = {} if left is None else {"lease_left": hours(left)}
                    self._log.warn(f"registry: {error.message}; packets go on flowing", tries=count, **known)
                if left == 0 and (count := self._repeated.worth_saying("lease ended")):
                    self._log.warn(
                        "our lease has ended, as far as we know: packets go on flowing until the registry says whose "
                        "the subnet is",
                        tries=count,
                        id="lease-missing",
                    )
            case RegistryBack(after, tries):
                self._repeated.over("registry")
                self._repeated.over("lease ended")
                self._keeper.retry()
                self._log.info("registry answers again", after=f"{after:.1f}s", tries=tries)
            case RegistryDoubted(why, missing):
                words = (
                    f"{missing} leases are missing from the registry, and {why}: their routes stay for now"
                )
                self.problems.note(
                    "doubt", () if why is None else (Problem("registry-doubted", None, words),)
                )
            case CloneSeen(other):
                self.problems.note("clone", () if other is None else (clone(self._words, other),))
            case AnnounceFailed(error):
                if count := self._repeated.worth_saying("announce"):
                    self._log.warn(f"cannot announce this host: {error.message}", tries=count)
            case _:
                pass

    def _tell_drops(self, machine: Machine) -> None:
        """Refused packets, summed since the last line, so that a flood makes one line and not a million."""
        for name, total in machine.backend.counters().items():
            new = total - self._drops.get(name, 0)
            if name.startswith("drop_") and new and self._repeated.worth_saying(name):
                self._log.warn("packets dropped", reason=name.removeprefix("drop_"), count=new, total=total)
                self._drops[name] = total

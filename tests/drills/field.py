"""The field of a drill: three etcd members and hosts with agents, each in a namespace of its own; and what is measured.

    e1 ─ etcd0 ─┐                ┌─ h1 ─ flanctl agent ─ container ─┐  numbered packets from each host to each other,
    e2 ─ etcd1 ─┼─ the underlay ─┤                                  │  50/s each way
    e3 ─ etcd2 ─┘                └─ h2 ─ flanctl agent ─ container ─┘  h1: flanctl subnets watch; h2: 50 changes/s

How to add a drill:

    @drill("leader-killed", short=["3.7"])                 # full on both versions, short (in `make test`) on these;
                                                           # v2=True: and on 3.4 with agents that live on etcd v2
    def test_what_is_true_then(field: Field) -> None:
        field.start()                                      # tls=…, user=…, disks=… where the drill wants them
        with field.measuring() as measured:                # everything is up and goes on
            leader = field.cluster.leader()
            measured.hurt()                                # from here on the time to recover runs
            field.cluster.kill(leader)
            field.lasting(full=60, short=3)                # an outage has a length, all else has a condition
            measured.recovered()                           # writer, follower and every agent are well again
            field.cluster.restart(leader)
            measured.recovered()
                                                           # the end of the block counts, judges, prints, keeps the row

and a line in `TITLES` of rows.py, without which the row has no name. The block's end compares what the follower was told
and what the agents hold with etcd's own history; it fails when a packet or an event is lost or comes twice, or a host's
route is dropped. CPU and memory are judged in full drills only; short ones are too short for that.

- An agent ends and starts inside `measured.end_agent(i)` and `measured.start_agent(i)`: its packets are not counted meanwhile.
- Where history is lost (compaction, lost data): `measured.seal()` before, `measured.reopened()` once the follower is back.
  Where it is while everybody watches: `measured.seal(marked=False)` before, and MARKER is gone.
- What else was measured: `measured.note(ready_seconds=0.9)`; it stands in the row.

`make drills` runs all at full length and renews docs/drills.json and the tables in docs/drills.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.agent.status_client import ask
from flanctl.demo.hosts import Lab
from flanctl.registry.stores.open import Connection
from tests.drills import rows
from tests.drills.events import Follower, Writer, count
from tests.drills.traffic import Traffic
from tests.drills.truth import FOLDER, MARK, MARKER, V2Truth, V3Truth
from tests.e2e.reachability import MTU, wait_until_reachable
from tests.support.agents import RunningAgent, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from ipaddress import IPv4Address
    from typing import Self

    from flanctl.demo.hosts import Container, Host
    from tests.drills.truth import Happened, Truth
    from tests.support.etcd import Tls, Version

NETWORK = IPv4Network("172.17.0.0/16")
CHURN = range(200, 250)
"""The third numbers of the subnets that come and go."""

CPU_PERCENT = 2.0
"""Of one core: the most that an agent may take, following 50 changes a second among it. Where it follows by v2 or gRPC that alone
may take more; then it is measured before the drill begins, and this is what trouble may add."""
MEMORY_MB = 4.0
"""Growth of an agent's resident memory from the first minute to the last that counts as flat: allocators keep what they had."""
RECOVER_SECONDS = 60.0
"""A drill whose cluster is well again and whose agents are not fails after this."""


@dataclass(frozen=True, slots=True)
class Case:
    """One drill on one version, at full length or in the form of seconds."""

    name: str
    version: Version
    full: bool
    v2: bool = False
    """The agents live on etcd v2."""

    @property
    def etcd(self) -> str:
        """As a row has it: "3.4", "3.4 v2", "3.7"."""
        return f"{self.version} v2" if self.v2 else self.version

    @property
    def over_http(self) -> bool:
        """Agents follow by one stream of etcd v3's gateway; v2 takes a request for each change, gRPC several threads."""
        return not self.v2 and not self.name.endswith("-grpc")

    def __str__(self) -> str:
        return f"{self.etcd.replace(' ', '-')}-{'full' if self.full else 'short'}"


def drill(
    name: str,
    *,
    short: Sequence[str] = ("3.7",),
    on: Sequence[Version] = ("3.4", "3.7"),
    v2: bool = False,
) -> Any:
    """Mark a test as a drill: see above. With `v2` it has a short form there too."""
    cases = [Case(name, version, full=True) for version in on]
    cases += [Case(name, version, full=False) for version in on if version in short]
    if v2:
        cases += [Case(name, "3.4", full=full, v2=True) for full in (True, False)]
    parameters = []
    for case in cases:
        needs = pytest.mark.needs("root", "netns", "tun", "iptables", f"etcd{case.version.replace('.', '')}")
        length = [pytest.mark.drill, pytest.mark.timeout(1200)] if case.full else [pytest.mark.timeout(240)]
        parameters.append(pytest.param(case, id=str(case), marks=[needs, *length]))
    return pytest.mark.parametrize("field", parameters, indirect=True)


class Field:
    """Everything a drill plays with. `start` builds it, the fixture closes it."""

    cluster: Cluster
    truth: Truth
    newcomer: RunningAgent

    def __init__(self, case: Case, folder: Path, say: Callable[[str], None]) -> None:
        self.case = case
        self.folder = folder
        self.say = say
        self.members: list[Host] = []
        self.hosts: list[Host] = []
        self.agents: list[RunningAgent] = []
        self.containers: list[Container] = []
        self.connect: dict[str, Any] = {}
        self.endpoints = ""
        self.prefix: tuple[str, ...] = ()
        """What stands before a process that knows members by their names."""
        self._stack = contextlib.ExitStack()

    def start(
        self,
        *options: str,
        hosts: int = 2,
        v2: bool = False,
        tls: Tls | None = None,
        extra: Sequence[str] = (),
        names: bool = False,
        disks: int = 0,
        **connect: str,
    ) -> Self:
        """Members, hosts and agents, up and reaching each other.

        `options` are the agents'; `extra` every member's; `connect` how flanctl reaches etcd (user, password, cacert, …,
        as in Connection). `v2` has etcd serve that too. With `names` agents and follower know the members by name, from a
        hosts file that `move_member` changes. With `disks` each member's data have a file system of so many MB.
        """
        self.connect = {"api": "v2", **connect} if self.case.v2 else dict(connect)
        self.lab = self._stack.enter_context(Lab("drill"))
        self.members = [self.lab.add_host(f"e{number}") for number in (1, 2, 3)]
        self.hosts = [self.lab.add_host() for _ in range(hosts)]
        self.desk = self.lab.add_host("desk")
        for index in range(len(self.members) if disks else 0):
            self._mount(self.disk(index), disks)
        self.cluster = self._stack.enter_context(
            Cluster(
                self.case.version,
                3,
                folder=self.folder / "etcd",
                host=[str(host.address) for host in self.members],
                prefix=[host.command([]) for host in self.members],
                v2=v2 or self.case.v2,
                tls=tls,
                extra=extra,
            )
        )
        self.truth = V2Truth(self.cluster, self.desk) if self.case.v2 else V3Truth(self.cluster)
        self.endpoints = ",".join(self.cluster.endpoints)
        self.init_network()
        if names:
            self._name_members()
        self.agents = [
            RunningAgent.start(
                host,
                self.folder / host.name,
                self.endpoints,
                "--iface",
                "eth0",
                *options,
                prefix=self.prefix,
                **self.environment,
            )
            for host in self.hosts
        ]
        for agent in self.agents:
            agent.wait()
        self.containers = [agent.host.add_container(agent.gateway, MTU) for agent in self.agents]
        for source, target in self.pairs:
            wait_until_reachable(source, target.address)
        return self

    def start_newcomer(self, *options: str) -> None:
        """An agent on the writer's host, in a subnet that the writer does not take. Not waited for."""
        held = {agent.subnet for agent in self.agents}
        subnets = (IPv4Network(f"172.17.{third}.0/24") for third in range(100, CHURN.start))
        subnet = next(one for one in subnets if one not in held)
        folder = self.folder / "newcomer"
        folder.mkdir()
        (folder / "subnet.env").write_text(
            f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={subnet.network_address + 1}/24\n"
            "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        )
        words = ("--iface", "eth0", *options)
        self.newcomer = RunningAgent.start(self.desk, folder, self.endpoints, *words, **self.environment)

    def close(self) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """How flanctl's processes are told `connect`."""
        return {f"FLANCTL_{name.upper()}": text for name, text in self.connect.items()}

    @property
    def connection(self) -> Connection:
        """The writer's: members by their addresses, those they may yet move to among them."""
        here = self.cluster.endpoints
        moved = tuple(
            one.replace(str(self.members[index].address), str(self._new_address(index)))
            for index, one in enumerate(here)
        )
        return Connection(here + moved if self.prefix else here, timeout=5.0, **self.connect)

    @property
    def pairs(self) -> list[tuple[Container, Container]]:
        return [(one, two) for one in self.containers for two in self.containers if one is not two]

    @property
    def keys(self) -> list[str]:
        """Subnets for the writer: those that no agent holds."""
        held = {str(agent.subnet.network_address) for agent in self.agents}
        names = (f"172.17.{third}.0" for third in CHURN)
        return [f"{FOLDER}{name}-24" for name in names if name not in held]

    def init_network(self) -> None:
        """Put the network's config, as an operator would."""
        flanctl(self.hosts[0], self.endpoints, "net", "init", "--network", str(NETWORK), **self.environment)

    def disk(self, index: int) -> Path:
        """Where a member's data are."""
        return self.folder / "etcd" / f"etcd{index}"

    def _mount(self, place: Path, size: int) -> None:
        place.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "flanctl-drill", place], check=True)
        self._stack.callback(subprocess.run, ["umount", place], check=True)

    def _name_members(self) -> None:
        self._hosts_file = self.folder / "hosts"
        self._write_names([str(member.address) for member in self.members])
        # A mount namespace of its own, in which this is /etc/hosts.
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        self.prefix = ("unshare", "--mount", "sh", "-c", script, str(self._hosts_file))
        ports = [one.rpartition(":")[2] for one in self.cluster.endpoints]
        self.endpoints = ",".join(f"http://etcd{index}.drill:{port}" for index, port in enumerate(ports))

    def _write_names(self, addresses: Sequence[str]) -> None:
        """In place: it is mounted."""
        self._addresses = list(addresses)
        lines = [f"{address} etcd{index}.drill" for index, address in enumerate(addresses)]
        self._hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def _new_address(self, index: int) -> IPv4Address:
        return self.lab.network.network_address + 101 + index

    def move_member(self, index: int) -> None:
        """An empty member on another address takes this one's place and name; nothing answers at the old one."""
        host, new = self.members[index], self._new_address(index)
        self.cluster.remove(index)
        host.ip_batch(
            f"addr del {host.interface} dev eth0",
            f"addr add {new}/{host.interface.network.prefixlen} dev eth0 brd +",
        )
        self.cluster.add(index, str(new))
        self._write_names([*self._addresses[:index], str(new), *self._addresses[index + 1 :]])

    def length(self, *, full: float, short: float) -> float:
        return full if self.case.full else short

    def lasting(self, *, full: float, short: float) -> None:
        """Let so many seconds of an outage pass. That is no wait for something: the length is what is tested."""
        end = time.monotonic() + self.length(full=full, short=short)
        until(lambda: time.monotonic() >= end, seconds=1e6)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """No host reaches a member, and what was connected is cut; packets between hosts flow."""
        members = [str(member.interface.ip) for member in self.members]
        for host in self.hosts:
            host.ip_batch(*(f"route add unreachable {address}/32" for address in members))
            for address in members:
                # ss says "Invalid argument" of sockets that ended meanwhile, and has killed the others.
                host.run(["ss", "-K", "dst", address], check=False)
        try:
            yield
        finally:
            for host in self.hosts:
                host.ip_batch(*(f"route del unreachable {address}/32" for address in members))

    def measuring(self) -> Measured:
        if self.case.full:
            rows.drop(self.case.name, self.case.etcd)
        return Measured(self)


@dataclass(slots=True)
class _Usage:
    """CPU seconds and memory of one agent's process between two moments. Its children's count: iptables is ours too."""

    agent: RunningAgent
    began: float
    busy: float
    before: float
    seconds: float = 0.0
    after: float = 0.0

    @classmethod
    def of(cls, agent: RunningAgent) -> _Usage:
        return cls(agent, time.monotonic(), _cpu_seconds(agent.pid), _resident_mb(agent.pid))

    def end(self) -> None:
        self.seconds = time.monotonic() - self.began
        self.busy = _cpu_seconds(self.agent.pid) - self.busy
        self.after = _resident_mb(self.agent.pid)

    @property
    def percent(self) -> float:
        return 100 * self.busy / self.seconds


class Measured:
    """What is counted while something bad happens: packets, events, CPU, memory, time to recover."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self._stack = contextlib.ExitStack()
        self._truth: list[Happened] = []
        self._after = 0
        self._running: dict[int, _Usage] = {}
        self._ended: list[_Usage] = []
        self._notes: dict[str, float | int] = {}
        self._recoveries: list[float] = []
        self._hurt = 0.0

    def __enter__(self) -> Measured:
        field = self.field
        with contextlib.ExitStack() as stack:
            self.traffic = stack.enter_context(Traffic(field.pairs))
            self.follower = stack.enter_context(
                Follower(field.hosts[0], field.endpoints, field.prefix, **field.environment)
            )
            self.follower.wait_listed()
            self._after = int(str(self.follower.listed[0].fields["revision"]))
            stack.callback(field.truth.close)
            field.truth.follow(self._after)
            self.writer = stack.enter_context(Writer(field.desk, field.connection, field.keys))
            self._stack = stack.pop_all()
        try:
            self.writer.go_on(50)
            self._everybody_is_well()
            calm = [_Usage.of(agent) for agent in field.agents]
            self.writer.go_on(int(field.length(full=500, short=25)))
            for usage in calm:
                usage.end()
            self._calm = max(usage.percent for usage in calm)
        except BaseException:
            self._stack.close()
            raise
        for number, agent in enumerate(field.agents):
            self._running[number] = _Usage.of(agent)
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None:
                return
            self.writer.go_on(int(self.field.length(full=500, short=25)))
            for number in list(self._running):
                self._end_usage(number)
            seconds = time.monotonic() - self._began
            self.seal()
            self._same_leases_everywhere()
        for agent in self.field.agents:
            assert agent.terminate() == 0, agent
        self._agents_hold_what_etcd_holds()
        self._no_host_was_dropped()
        self._judge(seconds)

    # ---- what a drill says ---------------------------------------------------------------------------------------

    def hurt(self) -> None:
        """The time to recover runs from now: something breaks, or is whole again after an outage."""
        self._hurt = time.monotonic()

    def recovered(self, *, seconds: float = RECOVER_SECONDS) -> float:
        """Until a new change is written, told to the follower, and known to every agent. The seconds since `hurt`."""
        self._everybody_is_well(seconds=seconds)
        took = self.since_hurt()
        self._recoveries.append(took)
        return took

    def since_hurt(self) -> float:
        return time.monotonic() - self._hurt

    def note(self, **facts: float) -> None:
        """More that was measured; rows.py has words for it (`NOTES`)."""
        assert facts.keys() <= rows.NOTES.keys()
        self._notes.update(facts)

    def end_agent(self, number: int) -> None:
        """SIGKILL, with nobody's packets under way to or from its containers."""
        self.traffic.pause(self.field.containers[number])
        self._end_usage(number)
        self.field.agents[number].kill()

    def start_agent(self, number: int) -> float:
        """A new process in its place; packets flow and count again when this returns. The seconds from exec to ready."""
        field, container = self.field, self.field.containers[number]
        began = time.monotonic()
        field.agents[number] = agent = field.agents[number].again().wait()
        took = time.monotonic() - began
        alive = [other for index, other in enumerate(field.containers) if index in self._running]
        for other in alive:
            wait_until_reachable(container, other.address)
            wait_until_reachable(other, container.address)
        self._running[number] = _Usage.of(agent)
        if len(alive) + 1 == len(field.containers):
            for one in field.containers:
                self.traffic.go_on(one)
        return took

    def seal(self, *, marked: bool = True) -> None:
        """Stop the writer's count here: what was written so far is read from etcd's history and told to the follower.

        The last of it is MARKER's coming, or its going if it was there and is not to be (`marked`).
        """
        self.writer.pause()
        truth = self.field.truth
        last = truth.mark() if marked else truth.unmark()
        self.follower.wait_told(lambda told: told.happened == (last, MARKER, MARK))
        self._truth += truth.happened(self._after, last)
        self._after = last

    def reopened(self) -> None:
        """History begins anew: the follower has listed again after `seal`, and MARKER is gone since."""
        gone = self.follower.wait_told(
            lambda told: (
                told.event == "removed" and told.happened[1] == MARKER and bool(told.fields["resync"])
            )
        )
        self._after = gone.happened[0]
        self.field.truth.follow(self._after)

    # ---- looks ---------------------------------------------------------------------------------------------------

    def _everybody_is_well(self, *, seconds: float = RECOVER_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        self.writer.go_on(2, seconds=seconds)  # the first may have begun before
        last = self.writer.last
        self.follower.wait_told(
            lambda told: told.happened == last, seconds=max(1.0, deadline - time.monotonic())
        )
        for number in self._running or range(len(self.field.agents)):
            agent = self.field.agents[number]
            while not self._is_well(agent, last[0]):
                assert time.monotonic() < deadline, f"not well within {seconds:g} s: {status(agent)} {agent}"
                time.sleep(0.1)  # each question costs the agent CPU, which is measured

    @staticmethod
    def _is_well(agent: RunningAgent, revision: int) -> bool:
        document = status(agent)
        return bool(
            document["registry"]["answers"]
            and (document["peers"]["revision"] or 0) >= revision
            and document["state"] == "ready"
        )

    def _same_leases_everywhere(self) -> None:
        """The follower's words, taken together, say what etcd holds; and the agents have heard of it."""
        self._final = self.field.truth.state()
        listed = self.follower.listed[-1].fields["subnets"]
        state = {_key(str(one["subnet"])): str(one["public_ip"]) for one in listed}  # type: ignore[attr-defined]
        for told in self.follower.told:
            _, key, public_ip = told.happened
            if told.event == "removed":
                state.pop(key, None)
            else:
                state[key] = public_ip
        assert state == self._final, "what the follower was told does not add up to what etcd holds"
        for agent in self.field.agents:
            until(
                lambda agent=agent: (
                    self._is_well(agent, self._after)  # type: ignore[misc]
                    and (not self.field.case.full or status(agent)["peers"]["count"] == len(self._final) - 1)
                ),
                what=f"{len(self._final) - 1} peers known to {agent.host.name}",
                seconds=20,
            )

    def _agents_hold_what_etcd_holds(self) -> None:
        """By what each has left to its successor."""
        churn = set(self.field.keys)
        for agent in self.field.agents:
            own = key_of(agent)
            known = json.loads((agent.folder / "state" / "known.json").read_text())
            peers = {_key(subnet): public_ip for subnet, public_ip, *_ in known["peers"]}
            if (
                not self.field.case.full
            ):  # nobody waited until what was removed is routed to no more, which is 2 s
                peers = {key: ip for key, ip in peers.items() if key in self._final or key not in churn}
            assert peers == {key: ip for key, ip in self._final.items() if key != own}, agent.host.name
            assert self._final[own] == str(agent.host.address), f"{agent.host.name} lost its lease"

    def _no_host_was_dropped(self) -> None:
        """No agent ever gave up the route to a host that was there all the time."""
        hosts = "|".join(re.escape(str(agent.subnet)) for agent in self.field.agents)
        for agent in self.field.agents:
            text = agent.log.read_text(errors="replace")
            assert not re.search(rf"peer removed .*subnet=({hosts})\b", text), agent
            assert "Traceback" not in text, agent

    # ---- the row -------------------------------------------------------------------------------------------------

    def _end_usage(self, number: int) -> None:
        usage = self._running.pop(number)
        usage.end()
        self._ended.append(usage)

    def _judge(self, seconds: float) -> None:
        case = self.field.case
        events = count(self._truth, [told for told in self.follower.told if not told.fields["resync"]])
        busiest = max(self._percent(agent.host.name) for agent in self.field.agents)
        grown = max(self._ended, key=lambda usage: usage.after - usage.before)
        row = {
            "drill": case.name,
            "etcd": case.etcd,
            "full": case.full,
            "seconds": round(seconds, 1),
            "packets": {
                "sent": self.traffic.sent,
                "lost": self.traffic.lost,
                "doubled": self.traffic.doubled,
            },
            "events": {
                "written": events.written,
                "seen": events.seen,
                "lost": events.lost,
                "doubled": events.doubled,
            },
            "agent": {
                "cpu_percent": round(busiest, 2),
                "cpu_percent_before": round(self._calm, 2),
                "rss_before_mb": round(grown.before, 1),
                "rss_after_mb": round(grown.after, 1),
            },
            "recover_seconds": round(max(self._recoveries), 1) if self._recoveries else None,
            "writer_longest_pause_seconds": round(self.writer.longest, 1),
            **{name: round(value, 2) for name, value in self._notes.items()},
        }
        self.field.say(json.dumps(row))
        assert (self.traffic.lost, self.traffic.doubled) == (0, 0), row
        assert (events.lost, events.doubled) == (0, 0), row
        if case.full:
            assert busiest <= (CPU_PERCENT if case.over_http else self._calm + CPU_PERCENT), row
            assert grown.after - grown.before <= MEMORY_MB, row
            rows.keep(row)

    def _percent(self, name: str) -> float:
        mine = [usage for usage in self._ended if usage.agent.host.name == name]
        return 100 * sum(usage.busy for usage in mine) / sum(usage.seconds for usage in mine)


def status(agent: RunningAgent) -> dict[str, Any]:
    """What the agent says of itself, over its socket."""
    return ask(agent.folder / "run" / "agent.sock")


def problems(agent: RunningAgent) -> set[str]:
    """The ids of what it complains of."""
    return {problem["id"] for problem in status(agent)["problems"]}


def key_of(agent: RunningAgent) -> str:
    return _key(str(agent.subnet))


def _key(subnet: str) -> str:
    return FOLDER + subnet.replace("/", "-")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

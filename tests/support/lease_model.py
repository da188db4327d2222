"""Model checking of the real registry/leases.py: every order of what three agents, a store and bad luck may do.

    found = Explorer(Leases).explore(states=20_000)
    assert found.violation is None, found.violation

The code under test runs unmodified. A call of the store ends a run (`_Pause`); its answer is noted, and the next run of
the same operation gets all noted answers again and comes one call further. So an agent in the middle of `acquire` is the
tuple of answers it has had, and a state of the whole system is a value that can be compared, stored and gone on from in
every possible way:

    start      an agent begins to acquire or to renew
    serve      the store carries its request out; the answer is under way
    hear       the agent gets the answer (later, perhaps: time may pass in between)
    fail       nobody carried the request out and the agent hears so             ┐
    lose       carried out, but the answer is lost                               │ each of these only as often
    delay      the agent gives up; the request is still on its way, and lands    │ as the scenario's budget says
    crash      the agent ends; its state file stays, and perhaps what it knew    │
    delete     an operator deletes a key                                         ┘
    resume     an agent that ended goes on with the lease it knew, asking nobody (known.py)
    tick       time passes for everybody; the store removes what has expired

What must hold (`_Wrong` says which did not, and the trace that leads there is printed):

- two agents whose leases have not ended on their own clocks hold different subnets; the time until they notice that an
  operator deleted a live host's key is the one exception
- no agent changes its subnet without a note that names the one it had, nor while that is free; a renewal never does
- no agent writes over a value that names another host, nor gives a reservation an end
- every operation ends, with a lease or with one of the errors it may end with
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, NamedTuple

from flanctl.errors import Conflict, LeaseLost, RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.registry.stores.store import Changed, Entry, KeyExists, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Network

PREFIX = "/n"
FOLDER = f"{PREFIX}/subnets/"
TTL = 2
"""Ticks."""
MANY_CALLS = 80
"""Of the store in one operation: more is an operation that never ends."""
HOSTS = tuple(IPv4Address("10.9.9.1") + n for n in range(3))
VALUES = tuple(LeaseAttributes(ip).format(Dialect.V0_28) for ip in HOSTS)
TWO_SUBNETS = NetworkConfig.parse(
    '{"Network":"10.0.0.0/28","SubnetLen":30,"SubnetMin":"10.0.0.4","SubnetMax":"10.0.0.8"}', Dialect.V0_28
)


class Key(NamedTuple):
    value: bytes
    revision: int
    end: int | None
    """Tick at which the store removes it; None for a reservation."""


class Op(NamedTuple):
    """An operation under way."""

    kind: str
    answers: tuple[Any, ...]
    request: tuple[Any, ...]
    transit: Any = None
    """What the store answered and the agent has not heard."""


class AgentState(NamedTuple):
    memory: IPv4Network | None = None
    """What the state file says."""
    held: Any = None
    op: Op | None = None
    void: int = 0
    """1: an operator deleted its key since it last asked; 2: while an operation was under way."""
    known: Any = None
    """What it held when it ended, where it had written that down."""


class World(NamedTuple):
    now: int
    revision: int
    keys: tuple[tuple[str, Key], ...]
    agents: tuple[AgentState, ...]
    flight: tuple[tuple[int, tuple[Any, ...]], ...]
    """Delayed writes: who sent what."""
    budget: tuple[int, ...]
    """Of ticks, failures, losses, delays, crashes and deletions."""


TICKS, FAIL, LOSE, DELAY, CRASH, DELETE = range(6)


@dataclass(frozen=True)
class Scenario:
    """How much bad luck there may be, and what stands in the registry at first."""

    name: str
    budget: tuple[int, ...]
    agents: int = 3
    keys: tuple[tuple[str, Key], ...] = ()
    memories: tuple[IPv4Network | None, ...] = (None, None, None)


@dataclass
class Found:
    """How far an exploration came and what it found."""

    states: int = 0
    steps: int = 0
    complete: bool = False
    """Every state that can be reached was looked at."""
    violation: str | None = None


class _Pause(BaseException):
    """The operation wants something of the store that has no answer yet."""

    def __init__(self, request: tuple[Any, ...]) -> None:
        super().__init__()
        self.request = request


class _Wrong(Exception):
    """A property does not hold."""


class _Answers:
    """Store and clock of one run: noted answers first, then a pause."""

    def __init__(self, answers: tuple[Any, ...]) -> None:
        self._left = iter(answers)

    def _ask(self, *request: Any) -> Any:
        for answer in self._left:
            match answer:
                case ("exists", key, current):
                    raise KeyExists(key, current)
                case ("changed", key, current):
                    raise Changed(key, current)
                case ("away",):
                    raise RegistryUnreachable("no answer")
                case ("ok", value):
                    return value
        raise _Pause(request)

    def now(self) -> float:
        return float(self._ask("now"))

    def get(self, key: str) -> Entry | None:
        return self._ask("get", key)

    def list(self, prefix: str) -> Snapshot:
        return self._ask("list")

    def with_ttl(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(entries)

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        return self._ask("create", key, value, ttl)

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        return self._ask("replace", key, value, ttl, expected)

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        return self._ask("refresh", entry.key, entry.revision, ttl)


class Explorer:
    """Breadth first over all states of one scenario. `leases` is the class under test."""

    def __init__(self, leases: Callable[..., Any], scenario: Scenario) -> None:
        self._leases = leases
        self._scenario = scenario
        self._config = TWO_SUBNETS
        self._runs: dict[tuple[Any, ...], tuple[str, Any]] = {}

    def explore(self, *, states: int) -> Found:
        found = Found()
        first = World(
            0,
            10,
            self._scenario.keys,
            tuple(AgentState(memory) for memory in self._scenario.memories[: self._scenario.agents]),
            (),
            self._scenario.budget,
        )
        came: dict[World, tuple[World, str] | None] = {first: None}
        todo = deque([first])
        while todo:
            world = todo.popleft()
            try:
                for action, after in self._steps(world):
                    found.steps += 1
                    if after not in came:
                        came[after] = (world, action)
                        self._check(after)
                        todo.append(after)
            except _Wrong as wrong:
                last = next(reversed(came)) if str(wrong).startswith("two holders") else world
                found.violation = f"{wrong}\n" + "\n".join(self._trace(came, last))
                break
            if len(came) >= states:
                break
        else:
            found.complete = True
        found.states = len(came)
        return found

    def _trace(self, came: dict[World, tuple[World, str] | None], world: World) -> list[str]:
        lines: list[str] = []
        while (before := came[world]) is not None:
            world, action = before
            lines.append(f"  {action}")
        return lines[::-1]

    # ---- what can happen next -----------------------------------------------------------------------------------

    def _steps(self, world: World) -> Iterator[tuple[str, World]]:
        for at, agent in enumerate(world.agents):
            op = agent.op
            if op is None:
                if agent.known is not None:
                    yield f"agent {at} goes on with what it knew", self._resume(world, at)
                yield f"agent {at} starts to {'renew' if agent.held else 'acquire'}", self._start(world, at)
                continue
            if op.transit is None:
                served, answer = self._carry_out(world, at, op.request)
                if world.budget[TICKS]:
                    yield f"agent {at}: {_words(op.request)} is carried out", self._await(served, at, answer)
                else:  # whether it hears now or later makes no difference
                    yield (
                        f"agent {at}: {_words(op.request)} is carried out and heard",
                        self._hear(served, at, answer),
                    )
                if world.budget[LOSE] and op.request[0] in {"create", "replace", "refresh"}:
                    lost = self._hear(_pay(served, LOSE), at, ("away",))
                    yield f"agent {at}: {_words(op.request)} is carried out, the answer is lost", lost
                if world.budget[FAIL]:
                    yield f"agent {at}: {op.request[0]} fails", self._hear(_pay(world, FAIL), at, ("away",))
                if world.budget[DELAY] and op.request[0] in {"create", "replace", "refresh"}:
                    later = _pay(world, DELAY)._replace(flight=(*world.flight, (at, op.request)))
                    yield f"agent {at}: {_words(op.request)} is delayed", self._hear(later, at, ("away",))
            else:
                yield f"agent {at} hears", self._hear(world, at, op.transit)
        for at, agent in enumerate(world.agents):
            if world.budget[CRASH] and (agent.held or agent.op):
                ended = AgentState(agent.memory, void=1 if agent.void else 0)
                yield f"agent {at} crashes", _pay(_with(world, at, ended._replace(void=0)), CRASH)
                if agent.held:
                    after = _with(world, at, ended._replace(known=agent.held))
                    yield f"agent {at} crashes, and wrote down what it knew", _pay(after, CRASH)
        for number, (at, request) in enumerate(world.flight):
            landed = world._replace(flight=world.flight[:number] + world.flight[number + 1 :])
            yield (
                f"the delayed {_words(request)} of agent {at} lands",
                self._carry_out(landed, at, request)[0],
            )
        if world.budget[DELETE]:
            for key, _ in world.keys:
                yield f"an operator deletes {key}", _delete(_pay(world, DELETE), key)
        if world.budget[TICKS]:
            yield "a tick", _tick(_pay(world, TICKS))

    def _start(self, world: World, at: int) -> World:
        agent = world.agents[at]
        void = 1 if agent.void else 0
        op = Op("renew" if agent.held else "acquire", (), ())
        return self._advance(world, at, agent._replace(op=op, void=void, known=None))

    def _resume(self, world: World, at: int) -> World:
        agent = world.agents[at]
        answers = _Answers((("ok", world.now),))
        leases = self._leases(answers, PREFIX, Dialect.V0_28, answers)
        left = None if agent.known.ends is None else agent.known.ends - world.now
        held = leases.resume(agent.known.entry, left, self._config, HOSTS[at])
        if held is not None:
            held = replace(held, how="", notes=())
        return _with(world, at, agent._replace(held=held, known=None))

    def _await(self, world: World, at: int, answer: Any) -> World:
        op = world.agents[at].op
        assert op is not None
        return _with(world, at, world.agents[at]._replace(op=op._replace(transit=answer)))

    def _hear(self, world: World, at: int, answer: Any) -> World:
        agent = world.agents[at]
        assert agent.op is not None
        op = agent.op._replace(answers=(*agent.op.answers, answer), transit=None)
        return self._advance(world, at, agent._replace(op=op))

    def _advance(self, world: World, at: int, agent: AgentState) -> World:
        """Run the operation to its next request, or to its end."""
        op = agent.op
        assert op is not None
        while True:
            kind, result = self._run(at, agent, op)
            if kind != "wants" or result != ("now",):
                break
            op = op._replace(answers=(*op.answers, ("ok", world.now)))
        if kind == "wants":
            if len(op.answers) > MANY_CALLS:
                raise _Wrong(f"{op.kind} of agent {at} asks the store for ever")
            return _with(world, at, agent._replace(op=op._replace(request=result)))
        return _with(world, at, self._end(world, at, agent._replace(op=op), kind, result))

    def _run(self, at: int, agent: AgentState, op: Op) -> tuple[str, Any]:
        """The code under test, from its beginning, with the answers so far. Pure, so each run is done once."""
        key = (at, op.kind, agent.held if op.kind == "renew" else agent.memory, op.answers)
        if (known := self._runs.get(key)) is not None:
            return known
        answers = _Answers(op.answers)
        leases = self._leases(answers, PREFIX, Dialect.V0_28, answers)
        outcome: tuple[str, Any]
        try:
            if op.kind == "renew":
                outcome = "has", leases.renew(agent.held, ttl=TTL)
            else:
                previous = [agent.memory] if agent.memory else []
                outcome = (
                    "has",
                    leases.acquire(self._config, LeaseAttributes(HOSTS[at]), previous=previous, ttl=TTL),
                )
        except _Pause as pause:
            outcome = "wants", pause.request
        except RegistryUnreachable:
            outcome = "away", None
        except LeaseLost:
            outcome = "lost", None
        except Conflict as error:
            outcome = error.id, None
        except Exception as error:  # what it was is told with the trace
            outcome = repr(error), None
        self._runs[key] = outcome
        return outcome

    def _end(self, world: World, at: int, agent: AgentState, kind: str, result: Any) -> AgentState:
        op = agent.op
        assert op is not None
        void = 1 if agent.void == 2 else 0
        if kind == "away":
            return agent._replace(op=None, void=1 if agent.void else 0)
        if op.kind == "renew":
            if kind == "lost":
                return AgentState(agent.memory)
            if kind != "has":
                raise _Wrong(f"a renewal of agent {at} ends with {kind}")
            if result.lease.subnet != agent.held.lease.subnet:
                raise _Wrong(
                    f"agent {at} renewed {agent.held.lease.subnet} and has {result.lease.subnet} now"
                )
        else:
            if kind == "pool-full":
                return AgentState(agent.memory)
            if kind != "has":
                raise _Wrong(f"agent {at}: acquire ends with {kind}")
            self._check_change(at, agent, op, result)
        result = replace(result, how="", notes=())  # what was said is of no matter from here on
        return AgentState(result.lease.subnet, result, None, void)

    def _check_change(self, at: int, agent: AgentState, op: Op, result: Any) -> None:
        """A host that had a subnet, by its own memory or by the registry's word, has it again or says what happened."""
        subnet = result.lease.subnet
        named = {
            entry.key
            for answer in op.answers
            if answer[0] == "ok" and isinstance(answer[1], Snapshot)
            for entry in answer[1].entries
            if entry.value == VALUES[at]
        }
        if agent.memory is not None:
            silent = subnet != agent.memory and not any(str(agent.memory) in note for note in result.notes)
        else:
            silent = bool(named) and result.entry.key not in named and not result.notes
        if silent:
            raise _Wrong(f"agent {at} had {agent.memory or named} and has {subnet} now, without a word")
        had = {f"{FOLDER}{agent.memory.network_address}-{agent.memory.prefixlen}"} if agent.memory else named
        last = [a[1] for a in op.answers if a[0] == "ok" and isinstance(a[1], Snapshot)][-1]
        free = had - {entry.key for entry in last.entries}
        if free and result.entry.key not in had | named:
            raise _Wrong(f"agent {at} had {had} and has {subnet} now, though nobody took what it had")

    # ---- the store ----------------------------------------------------------------------------------------------

    def _carry_out(self, world: World, at: int, request: tuple[Any, ...]) -> tuple[World, Any]:
        keys = dict(world.keys)
        match request:
            case ("list",):
                entries = tuple(_entry(key, one, None) for key, one in world.keys)
                return world, ("ok", Snapshot(entries, world.revision))
            case ("get", key):
                one = keys.get(key)
                return world, ("ok", None if one is None else _entry(key, one, world.now))
            case ("create", key, value, ttl):
                if key in keys:
                    return world, ("exists", key, _entry(key, keys[key], world.now))
                self._check_write(world, at, key, value, ttl, keys)
                return _put(world, key, value, ttl)
            case ("replace", key, value, ttl, expected):
                if (one := keys.get(key)) is None or one.revision != expected:
                    return world, ("changed", key, None if one is None else _entry(key, one, world.now))
                self._check_write(world, at, key, value, ttl, keys)
                return _put(world, key, value, ttl)
            case ("refresh", key, expected, ttl):
                if (one := keys.get(key)) is None or one.revision != expected:
                    return world, ("changed", key, None if one is None else _entry(key, one, world.now))
                if one.end is None:
                    raise _Wrong(f"agent {at} gives the reservation {key} an end")
                keys[key] = one._replace(end=world.now + int(ttl))
                after = world._replace(keys=tuple(sorted(keys.items())))
                return after, ("ok", _entry(key, keys[key], world.now))
        raise AssertionError(request)

    def _check_write(
        self, world: World, at: int, key: str, value: bytes, ttl: float | None, keys: dict[str, Key]
    ) -> None:
        before = keys.get(key)
        if before is not None and before.value != VALUES[at] and before.value in VALUES:
            raise _Wrong(f"agent {at} writes over {key} of agent {VALUES.index(before.value)}")
        held = world.agents[at].held
        reserved = held is not None and held.entry.lease is None and held.entry.key == key
        was_reserved = before is not None and before.end is None and before.value == VALUES[at]
        if ttl is not None and (was_reserved or (before is None and reserved)):
            raise _Wrong(f"agent {at} makes a lease of the reservation {key}")

    def _check(self, world: World) -> None:
        believers = [
            (at, agent.held)
            for at, agent in enumerate(world.agents)
            if agent.held and not agent.void and (agent.held.ends is None or world.now < agent.held.ends)
        ]
        for (one, mine), (other, theirs) in itertools.combinations(believers, 2):
            if mine.lease.subnet.overlaps(theirs.lease.subnet):
                raise _Wrong(f"two holders of {mine.lease.subnet}: agents {one} and {other}")


def _entry(key: str, one: Key, now: int | None) -> Entry:
    ttl = None if one.end is None or now is None else float(one.end - now)
    return Entry(key, one.value, one.revision, None if one.end is None else "lease", ttl)


def _put(world: World, key: str, value: bytes, ttl: float | None) -> tuple[World, Any]:
    one = Key(value, world.revision + 1, None if ttl is None else world.now + int(ttl))
    keys = tuple(sorted({**dict(world.keys), key: one}.items()))
    return world._replace(keys=keys, revision=one.revision), ("ok", _entry(key, one, world.now))


def _tick(world: World) -> World:
    now = world.now + 1
    alive = tuple((key, one) for key, one in world.keys if one.end is None or one.end > now)
    return world._replace(now=now, keys=alive, revision=world.revision + len(world.keys) - len(alive))


def _delete(world: World, key: str) -> World:
    """Whom the key names, or who holds it, cannot know yet."""
    keys = dict(world.keys)
    value = keys.pop(key).value
    agents = tuple(
        agent._replace(void=2 if agent.op else 1)
        if VALUES[at] == value or (agent.held and agent.held.entry.key == key)
        else agent
        for at, agent in enumerate(world.agents)
    )
    return world._replace(keys=tuple(sorted(keys.items())), revision=world.revision + 1, agents=agents)


def _with(world: World, at: int, agent: AgentState) -> World:
    return world._replace(agents=(*world.agents[:at], agent, *world.agents[at + 1 :]))


def _pay(world: World, what: int) -> World:
    budget = list(world.budget)
    budget[what] -= 1
    return world._replace(budget=tuple(budget))


def _words(request: tuple[Any, ...]) -> str:
    return " ".join(str(word) for word in request if not isinstance(word, bytes))

"""The agent's life, with a backend, a machine and a registry of this process: no root, no namespace, no sleep.

main thread: agent.run()          script thread: changes the registry, waits for what must follow, SIGTERM
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import threading
import time
from base64 import b64encode
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.agent import state as state_file
from flanctl.agent.backends.base import ApplyReport, BackendAttributes, Objects, PeerTraffic
from flanctl.agent.daemon import FAILURES, PEERS_BURST, PEERS_PAUSE, Agent, Options, Phase
from flanctl.agent.kernel.docker_accept import AcceptReport
from flanctl.agent.kernel.fake import FakeKernel
from flanctl.agent.lock import lock
from flanctl.agent.log import Log
from flanctl.agent.messages import LinkChanged, PathFailed, Reload, ShowCounters
from flanctl.agent.notify import Notify
from flanctl.agent.state import State
from flanctl.agent.underlay import Underlay
from flanctl.errors import (
    Conflict,
    FlanctlError,
    Invalid,
    LeaseLost,
    NotFound,
    NotPermitted,
    RegistryUnreachable,
)
from flanctl.model.dialect import Dialect
from flanctl.registry.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PREFIX = "/jxdd/network"
SUBNETS = f"{PREFIX}/subnets/"
OWN_IP = IPv4Address("192.168.66.11")
AWAY = RegistryUnreachable("no answer")


class FakeBackend:
    """Does what the daemon tells it and writes it down."""

    data_path = "userspace"
    data_path_why = "--data-path tun"
    device = "flannel0"
    mtu = 1472

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.applied: list[tuple[str, ...]] = []
        self.looks = 0
        self.reports: list[ApplyReport] = []
        self.failing: list[FlanctlError] = []
        self.totals: dict[str, int] = {}
        self.ends: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.pause = threading.Event()
        self.pause.set()

    def check(self) -> None:
        self._note("check")

    def prepare(self) -> BackendAttributes:
        self._note("prepare")
        return BackendAttributes()

    def start(self, subnet: IPv4Network) -> None:
        self._note("start")

    def told(self, *, lease_ends, flanctl) -> None:
        self.told_last = lease_ends, flanctl

    def lost(self) -> None:
        self._note("lost")

    def apply(self, peers, *, look=True):
        self._note("apply")
        self.looks += look
        self.applied.append(tuple(str(peer.subnet) for peer in peers))
        assert self.pause.wait(10)
        if self.failing:
            raise self.failing.pop(0)
        return self.reports.pop(0) if self.reports else ApplyReport(len(peers))

    def counters(self) -> dict[str, int]:
        return dict(self.totals)

    def peers(self) -> dict[str, PeerTraffic]:
        return {}

    def offloads(self) -> dict[str, tuple[bool, str]]:
        return {}

    def wait(self, seconds: float) -> str | None:
        try:
            return self.ends.get(timeout=seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        self._note("stop")
        self.ends.put(None)


@dataclass
class FakeRules:
    note: Callable[[str], None]
    asked: list[dict[str, bool]] = field(default_factory=list)
    answers: list[tuple[str, ...] | FlanctlError] = field(default_factory=list)

    def check(self) -> None:
        self.note("look at rules")

    def ensure(self, *, masq: bool, forward: bool) -> tuple[str, ...]:
        self.note("rules")
        self.asked.append({"masq": masq, "forward": forward})
        answer = self.answers.pop(0) if self.answers else ()
        if isinstance(answer, FlanctlError):
            raise answer
        return answer


@dataclass
class FakeAccept:
    note: Callable[[str], None]
    reports: list[AcceptReport] = field(default_factory=list)

    def check(self) -> None:
        self.note("look at accept rules")

    def ensure(self) -> AcceptReport:
        self.note("accept")
        return self.reports.pop(0) if self.reports else AcceptReport()


class FakeMachine:
    def __init__(self, house: House, config) -> None:
        kernel = FakeKernel()
        link = kernel.add_link("eth0", addresses=("192.168.66.11/24",))
        kernel.close()
        self._house = house
        self.config = config
        self.warnings = ("forwarding is off",)
        self.underlay = Underlay(link, OWN_IP, OWN_IP, 1500, "chosen by the test", (), ())
        self.backend = house.backend

    def rules(self, subnet: IPv4Network) -> FakeRules:
        return self._house.rules

    def docker_accept(self, subnet: IPv4Network, *, wanted: bool) -> FakeAccept:
        return self._house.accept

    def ruleset_generation(self) -> int | None:
        return self._house.generation

    def underlay_trouble(self) -> str | None:
        return self._house.trouble

    def docker_bridge(self) -> tuple[str, ...] | None:
        return self._house.bridge

    def link_watch(self, changed):
        return self._house.monitor, self._house.monitor_stopped.set

    def close(self) -> None:
        self._house.note("close")


class House:
    """One host's agent and all that is around it. `fail_at` lets the n-th step of the machine raise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.trouble: str | None = None
        self.generation: int | None = None
        self.bridge: tuple[str, ...] | None = None
        self.registry = MemoryStore(self.clock)
        self.subnet_file = folder / "run" / "subnet.env"
        self.agents = 0
        self.renew()

    def renew(
        self, *, patient: bool = False, watchdog: float = 0.0, healthz: tuple[str, int] | None = None
    ) -> None:
        """The same host after its agent ended: files and registry stay."""
        self.agents += 1
        self.steps: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.text = StringIO()
        self.backend = FakeBackend(self.note)
        self.rules = FakeRules(self.note)
        self.accept = FakeAccept(self.note)
        self.monitor_stopped = threading.Event()
        self.monitor: Callable[[], object] = self.monitor_stopped.wait
        self.store = self.registry.another()
        self.options(watchdog=watchdog, patient=patient, healthz=healthz)

    def options(
        self, *, watchdog: float = 0.0, dialect: Dialect | None = Dialect.V0_28, stay=lambda api: None, **more
    ) -> None:
        self.agent = Agent(
            Options(
                PREFIX, self.subnet_file, self.folder / "state", self.folder / "lock", True, True, 5.0, 3600.0, **more
            ),
            store=self.store,
            dialect=dialect,
            look=self.look,  # type: ignore[arg-type]
            log=Log(self.text, journal=False),
            notify=Notify(f"@flanctl-test-{os.getpid()}", watchdog=watchdog),
            clock=self.clock,
            stay=stay,
        )  # fmt: skip

    def look(self, config) -> FakeMachine:
        if config.backend_type != "udp":
            raise Invalid(f'no backend "{config.backend_type}"', id="backend-unsupported")
        return FakeMachine(self, config)

    def reconfigure(self, text: bytes) -> None:
        entry = self.registry.get(f"{PREFIX}/config")
        self.registry.replace(entry.key, text, ttl=None, expected=entry.revision)

    def note(self, step: str) -> None:
        self.steps.append(step)
        if (error := self.failures.pop(step, None)) is not None:
            raise error

    def configure(self, text: bytes = b'{"Network":"172.17.0.0/16"}') -> None:
        self.registry.create(f"{PREFIX}/config", text, ttl=None)

    def peer(self, number: int, value: bytes | None = None) -> str:
        """A lease of another host for 172.17.<number>.0/24; its key."""
        key = f"{SUBNETS}172.17.{number}.0-24"
        self.registry.create(key, value or b'{"PublicIP":"192.168.66.%d"}' % (100 + number % 100), ttl=86400)
        return key

    def ours(self) -> list[str]:
        """Keys of the leases that name us."""
        return [e.key for e in self.registry.list(SUBNETS).entries if b'"192.168.66.11"' in e.value]

    def log(self) -> str:
        return self.text.getvalue()

    def said(self, words: str) -> None:
        until(lambda: words in self.log(), what=f"{words!r} in\n{self.log()}")

    def ready(self) -> None:
        until(lambda: self.agent.phase is Phase.READY, what="ready")

    def live(self, script: Callable[[], None]) -> None:
        """Run the agent here while `script` runs beside it; then SIGTERM. Raises what either raised."""
        trouble: list[BaseException] = []

        def play() -> None:
            try:
                script()
            except BaseException as error:
                trouble.append(error)
            finally:
                self.backend.pause.set()
                if self.agent.phase is not Phase.STOPPED:
                    os.kill(os.getpid(), signal.SIGTERM)

        beside = threading.Thread(target=play)
        former = signal.signal(signal.SIGTERM, lambda *_: None)  # the script may end before the agent listens
        try:
            beside.start()
            self.agent.run()
        finally:
            until(lambda: not beside.is_alive(), what="the script's end")
            signal.signal(signal.SIGTERM, former)
        if trouble:
            raise trouble[0]

    def live_until_ready(self) -> None:
        self.live(self.ready)


@pytest.fixture
def house(tmp_path: Path) -> House:
    built = House(tmp_path)
    built.configure()
    return built


@pytest.fixture
def empty_house(tmp_path: Path) -> House:
    """No config in its registry."""
    return House(tmp_path)


@contextmanager
def systemd() -> Iterator[Callable[[], list[str]]]:
    """What systemd hears: a function that answers every datagram so far."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0flanctl-test-{os.getpid()}")
        channel.setblocking(False)
        heard: list[str] = []

        def read() -> list[str]:
            try:
                while True:
                    heard.append(channel.recv(4096).decode())
            except BlockingIOError:
                return heard

        yield read


# ---- start ----------------------------------------------------------------------------------------------------------


def test_a_start_looks_then_acts_and_stopping_ends_the_backend_before_all_else(house):
    house.live_until_ready()
    assert house.steps == ["check", "prepare", "start", "apply", "rules", "accept", "stop", "close"]
    assert house.rules.asked == [{"masq": True, "forward": True}]
    assert house.agent.phase is Phase.STOPPED


def test_subnet_env_is_written_after_the_first_peer_list_is_applied_and_READY_after_that(house):
    house.peer(9)
    house.backend.pause.clear()
    with systemd() as heard:

        def script():
            until(lambda: house.backend.applied)
            assert house.ours()
            assert not house.subnet_file.exists()
            assert not any("READY=1" in text for text in heard())
            house.backend.pause.set()
            until(lambda: any(text.startswith("READY=1\nSTATUS=network=") for text in heard()))
            assert house.subnet_file.exists()

        house.live(script)
        assert heard()[-1].startswith("STOPPING=1")
    assert house.backend.applied == [("172.17.9.0/24",)]


def test_subnet_env_is_flannels_four_lines(house):
    house.peer(9)
    house.live_until_ready()
    subnet = house.ours()[0].removeprefix(SUBNETS).removesuffix(".0-24")
    assert house.subnet_file.read_bytes() == (
        b"FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=%b.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
        % subnet.encode()
    )


def test_what_is_doubtful_is_said_before_anything_is_done(house):
    house.live_until_ready()
    lines = house.log().splitlines()
    assert next(i for i, line in enumerate(lines) if "forwarding is off" in line) < next(
        i for i, line in enumerate(lines) if "lease 172.17." in line
    )


def test_a_stop_keeps_the_lease_and_says_so(house):
    house.live_until_ready()
    assert len(house.ours()) == 1
    assert "reason=SIGTERM lease=kept" in house.log()


@pytest.mark.parametrize("step", ["check", "prepare", "start", "apply"])
def test_a_step_that_fails_is_the_error_and_the_next_start_takes_the_same_subnet(house, step):
    house.failures[step] = NotPermitted(f"{step} is not for you")
    with pytest.raises(NotPermitted, match=f"{step} is not for you"):
        house.live(lambda: until(lambda: house.agent.phase is Phase.STOPPED))
    assert house.steps[-2:] == ["stop", "close"]
    assert "reason=failure" in house.log()
    written = house.ours()
    assert bool(written) == (step in {"start", "apply"})
    house.renew()
    house.live_until_ready()
    assert len(house.ours()) == 1
    assert not written or house.ours() == written


def test_a_check_writes_nothing_anywhere_and_lets_go_of_everything(house, tmp_path):
    house.agent.check()
    assert house.steps == ["check", "look at rules", "look at accept rules", "stop", "close"]
    assert set(house.store.calls) == {"get"}
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_lets_go_as_well(house):
    house.failures["check"] = Conflict("taken")
    with pytest.raises(Conflict, match="taken"):
        house.agent.check()
    assert house.steps == ["check", "stop", "close"]


# ---- which subnet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["lease", "lease and subnet.env", "lease and state", "files"])
def test_a_restart_takes_the_same_subnet_from_whatever_memory_is_left(house, forgotten):
    house.live_until_ready()
    (had,) = house.ours()
    if "lease" in forgotten:
        house.registry.delete(had)
    if "subnet.env" in forgotten or forgotten == "files":
        house.subnet_file.unlink()
    if "state" in forgotten or forgotten == "files":
        (house.folder / "state" / "state.json").unlink()
    house.renew()
    house.live_until_ready()
    assert house.ours() == [had]
    assert (" again " if "lease" in forgotten else " kept ") in house.log()


def test_the_state_of_another_network_is_no_memory_of_this_one(house):
    state_file.save(house.folder / "state", State("x" * 32, "/other/network", IPv4Network("172.17.200.0/24")))
    house.live_until_ready()
    assert house.ours() != [f"{SUBNETS}172.17.200.0-24"]
    remembered = state_file.load(house.folder / "state")
    assert remembered is not None
    assert (remembered.prefix, remembered.instance) == (PREFIX, "x" * 32)


@pytest.mark.parametrize(
    ("place", "content", "words"),
    [
        ("state/state.json", b"{", "starting a new one"),
        ("state/state.json", b"", "starting a new one"),
        ("run/subnet.env", b"FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUB", "is not used"),
        ("run/subnet.env", b"\0\xff", "is not used"),
    ],
)
def test_a_memory_that_cannot_be_read_is_said_and_the_agent_starts(house, place, content, words):
    """flannel.md 11, row 1: what a power cut may leave."""
    path = house.folder / place
    path.parent.mkdir()
    path.write_bytes(content)
    house.live_until_ready()
    assert words in house.log()
    assert len(house.ours()) == 1


def test_a_state_file_that_cannot_be_read_is_made_anew_from_subnet_env_and_the_registry(house):
    house.live_until_ready()
    (had,) = house.ours()
    path = house.folder / "state" / "state.json"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"\0" * len(whole), b""):
        path.write_bytes(damage)
        house.registry.delete(had)  # subnet.env alone remembers it
        house.renew()
        house.live_until_ready()
        assert house.ours() == [had]
        assert "cannot be understood" in house.log()
        remembered = state_file.load(house.folder / "state")
        assert remembered is not None
        assert f"{SUBNETS}{remembered.subnet}".replace("/24", "-24") == had


# ---- waiting for the registry ---------------------------------------------------------------------------------------


def test_without_a_config_it_waits_says_for_what_and_a_stop_ends_that_at_once(empty_house):
    """flannel.md 11, row 20: `Key not found` each second, until systemd loses patience."""
    house = empty_house
    with systemd() as heard:
        house.live(lambda: house.said("waiting: "))
        assert any(
            f"waiting for {PREFIX}/config" in text and "EXTEND_TIMEOUT_USEC=" in text for text in heard()
        )
    assert "try=" in house.log()
    assert house.steps == []
    assert not house.subnet_file.exists()
    assert "reason=SIGTERM lease=none" in house.log()


def test_a_config_that_comes_later_is_found(empty_house):
    house = empty_house

    def script():
        house.said("waiting: ")
        house.configure()
        until(lambda: house.clock.waiting)
        house.clock.advance(5)
        house.ready()

    house.live(script)


def test_a_registry_that_does_not_answer_is_waited_for_and_said_once_a_minute(house):
    house.store.fail("get", AWAY, times=3)

    def script():
        for tries in range(3):
            until(lambda tries=tries: house.clock.waiting and house.store.calls.count("get") == tries + 1)
            house.clock.advance(5)
        house.ready()

    house.live(script)
    assert house.log().count("waiting: no answer") == 1


@pytest.mark.parametrize("operation", ["list", "create"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_an_outage_while_leasing_is_waited_out_and_leaves_one_lease(house, operation, after_effect):
    house.store.fail(operation, AWAY, after_effect=after_effect)

    def script():
        house.said("waiting: no answer")
        until(lambda: house.clock.waiting)
        house.clock.advance(5)
        house.ready()

    house.live(script)
    assert len(house.ours()) == 1


def test_a_config_that_cannot_be_understood_ends_it_at_once(empty_house):
    empty_house.configure(b'{"Network":"172.17.0.0/33"}')
    with pytest.raises(FlanctlError) as caught:
        empty_house.live(lambda: until(lambda: empty_house.agent.phase is Phase.STOPPED))
    assert caught.value.exit_code == 6
    assert empty_house.steps == []


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_a_burst_of_events_is_one_apply(house):
    """flannel.md 11, row 32."""
    house.backend.pause.clear()

    def script():
        until(lambda: house.backend.applied)
        for number in range(1, 61):
            if f"{SUBNETS}172.17.{number}.0-24" not in house.ours():
                house.peer(number)
        # The follower has seen the last: all are in its table, one mark waits in the inbox.
        until(lambda: len(house.agent._follower._known) >= 60)
        house.backend.pause.set()
        until(lambda: len(house.backend.applied) > 1)
        house.ready()

    house.live(script)
    assert [len(peers) for peers in house.backend.applied][:2] in ([0, 60], [0, 59])
    assert len(house.backend.applied) == 2
    assert "peers changed added=" in house.log()


def test_a_registry_that_changes_all_the_time_owns_no_cpu_and_is_caught_up_with(house):
    """flannel.md 11, row 32: fifty changes a second cost an agent a fifth of a core, applied one by one."""

    def script():
        house.ready()
        (own,) = house.ours()
        numbers = [number for number in range(1, 101) if own != f"{SUBNETS}172.17.{number}.0-24"]
        before = len(house.backend.applied)
        house.peer(numbers[0])
        until(lambda: len(house.backend.applied) == before + 1, what="the first change is applied at once")
        for number in numbers[1:]:
            key = house.peer(number)
            until(lambda key=key: key in house.agent._follower._known)
        assert len(house.backend.applied) <= before + PEERS_BURST
        house.clock.advance(PEERS_PAUSE)
        until(lambda: len(house.backend.applied[-1]) == len(numbers), what="the rest is applied together")
        assert len(house.backend.applied) <= before + PEERS_BURST + 1

    house.live(script)


def test_a_renewal_by_rewriting_the_same_value_moves_nothing(house):
    first = house.peer(9)

    def script():
        house.ready()
        entry = house.registry.get(first)
        house.registry.replace(first, entry.value, ttl=86400, expected=entry.revision)
        house.peer(10)
        until(lambda: "172.17.10.0/24" in house.backend.applied[-1])

    house.live(script)
    assert house.backend.applied == [("172.17.9.0/24",), ("172.17.9.0/24", "172.17.10.0/24")]
    assert house.backend.looks == 1, "a peer that comes is no reason to look at the device"


def test_peers_that_come_go_and_move_are_said_and_applied(house):
    def script():
        house.ready()
        key = house.peer(9)
        house.said("peer added subnet=172.17.9.0/24 public-ip=192.168.66.109")
        entry = house.registry.get(key)
        house.registry.replace(key, b'{"PublicIP":"192.168.66.77"}', ttl=86400, expected=entry.revision)
        house.said("peer added subnet=172.17.9.0/24 public-ip=192.168.66.77")
        house.said("peer removed subnet=172.17.9.0/24 public-ip=192.168.66.109")
        house.registry.delete(key)
        until(lambda: (house.clock.advance(1), house.backend.applied[-1] == ())[1])

    house.live(script)


def test_an_expired_peer_goes_without_a_word_from_it(house):
    house.registry.create(f"{SUBNETS}172.17.9.0-24", b'{"PublicIP":"192.168.66.99"}', ttl=30)

    def script():
        house.ready()
        house.clock.advance(31)
        until(lambda: (house.clock.advance(1), house.backend.applied[-1] == ())[1])

    house.live(script)


def test_a_key_that_cannot_be_read_is_said_once_and_hides_no_peer(house):
    house.registry.create(f"{SUBNETS}not-a-subnet", b"{}", ttl=None)
    house.registry.create(f"{SUBNETS}172.17.8.0-24", b"{nonsense", ttl=None)

    def script():
        house.ready()
        for number in (20, 21, 22):
            house.peer(number)
            until(lambda number=number: f"172.17.{number}.0/24" in house.backend.applied[-1])

    house.live(script)
    assert house.log().count("skipped unreadable key") == 2
    assert house.log().count("not-a-subnet") >= 1
    assert house.backend.applied[-1] == ("172.17.20.0/24", "172.17.21.0/24", "172.17.22.0/24")


# ---- our lease ------------------------------------------------------------------------------------------------------


def test_a_lease_taken_by_another_host_ends_the_agent_loudly(house):
    def script():
        house.ready()
        (key,) = house.ours()
        entry = house.registry.get(key)
        house.registry.replace(key, b'{"PublicIP":"192.168.66.99"}', ttl=86400, expected=entry.revision)
        until(lambda: house.agent.phase is Phase.STOPPED)

    with pytest.raises(LeaseLost, match=r"taken by 192\.168\.66\.99 at revision \d+") as lost:
        house.live(script)
    assert lost.value.exit_code == 8
    assert "reason=failure lease=lost" in house.log()
    assert house.steps[-3:] == ["lost", "stop", "close"]


def test_a_deleted_lease_is_written_again_with_the_same_subnet(house):
    def script():
        house.ready()
        (key,) = house.ours()
        house.registry.delete(key)
        house.said("was gone or rewritten, it stands again")
        assert house.ours() == [key]

    house.live(script)


def test_a_lease_is_renewed_well_before_its_end(house):
    def script():
        house.ready()
        until(lambda: house.clock.waiting)
        house.clock.advance(86400 / 3 * 1.2)
        house.said(" renewed ttl=24.0h")

    house.live(script)


def test_an_outage_later_is_said_and_its_end_too(house):
    def script():
        house.ready()
        until(lambda: house.clock.waiting)
        house.store.fail("refresh", AWAY, times=2)  # the keeper's and the announcer's
        house.clock.advance(86400 / 3 * 1.2)
        house.said("registry: no answer; packets go on flowing")
        house.said("cannot announce this host: no answer")
        until(lambda: house.clock.waiting)
        house.clock.advance(5)
        house.said("registry answers again")

    house.live(script)


ANNOUNCED = f"{PREFIX}/flanctl/hosts/{OWN_IP}"


def test_a_lost_lease_takes_our_announcement_with_it(house):
    """flannel.md 11, row 7: there, both hosts keep the subnet and the key flips between them."""

    def script():
        house.ready()
        until(lambda: house.registry.get(ANNOUNCED))
        (key,) = house.ours()
        entry = house.registry.get(key)
        house.registry.replace(key, b'{"PublicIP":"192.168.66.99"}', ttl=86400, expected=entry.revision)
        until(lambda: house.agent.phase is Phase.STOPPED)

    with pytest.raises(LeaseLost):
        house.live(script)
    assert house.registry.get(ANNOUNCED) is None
    loud = [line for line in house.log().splitlines() if " error " in line]
    assert len(loud) == 1
    assert "lease lost: lease 172.17." in loud[0]
    assert "192.168.66.99" in loud[0]
    assert "stopping with 8" in loud[0]


def test_a_lost_lease_leaves_another_machines_announcement_alone(house):
    def script():
        house.ready()
        entry = until(lambda: house.registry.get(ANNOUNCED))
        house.registry.replace(ANNOUNCED, WORDS, ttl=86400, expected=entry.revision)
        (key,) = house.ours()
        entry = house.registry.get(key)
        house.registry.replace(key, b'{"PublicIP":"192.168.66.99"}', ttl=86400, expected=entry.revision)
        until(lambda: house.agent.phase is Phase.STOPPED)

    with pytest.raises(LeaseLost):
        house.live(script)
    assert house.registry.get(ANNOUNCED).value == WORDS


def test_a_deleted_key_is_the_same_subnet_again_within_a_second_of_the_real_clock(house):
    """flannel.md 11, row 5: the watch sees it, nobody waits for the next renewal."""
    took = []

    def script():
        house.ready()
        until(lambda: house.agent._follower._known)
        (key,) = house.ours()
        began = time.monotonic()
        house.registry.delete(key)
        until(lambda: house.ours() == [key])
        took.append(time.monotonic() - began)

    house.live(script)
    assert took[0] < 1.0
    assert house.backend.applied == [()], "and no peer has lost a route"


def test_who_deletes_our_key_in_a_loop_owns_no_cpu(house):
    def script():
        house.ready()
        (key,) = house.ours()
        writes = len(house.store.calls)
        for _ in range(20):
            until(lambda: house.ours() or (house.clock.advance(5.1), None)[1])
            house.registry.delete(key)
        assert house.store.calls[writes:].count("create") <= 21

    house.live(script)


def test_the_lease_lives_as_long_as_the_operator_wants(house):
    house.options(lease_ttl=600.0)

    def script():
        house.ready()
        (key,) = house.ours()
        until(lambda: house.registry.get(ANNOUNCED))
        assert house.registry.get(key).ttl == 600
        assert house.registry.get(ANNOUNCED).ttl == 600
        house.clock.advance(0.89 * 200)
        assert "renewed" not in house.log()
        house.clock.advance(0.22 * 200)
        house.said("renewed")

    house.live(script)


def test_a_reservation_stays_one_through_start_restart_renewal_and_deletion(house):
    """flannel.md 11, row 9."""
    key = f"{SUBNETS}172.17.60.0-24"
    house.registry.create(key, b'{"PublicIP":"192.168.66.11","PublicIPv6":null}', ttl=None)
    house.live_until_ready()
    house.renew()

    def script():
        house.ready()
        assert house.ours() == [key]
        house.clock.advance(86400)
        house.said("renewed ttl=never-ends")
        house.registry.delete(key)
        until(lambda: house.ours() == [key])
        assert house.registry.get(key).ttl is None

    house.live(script)


def test_an_outage_longer_than_the_lease_stops_no_packet_and_is_said(house):
    """flannel.md 11, row 3. Decision 10: the registry alone says whose the subnet is, and it is silent."""

    house.peer(9)

    def script():
        house.ready()
        (key,) = house.ours()
        until(lambda: house.registry.get(ANNOUNCED))
        until(lambda: house.clock.waiting >= 3)
        house.store.fail("*", AWAY, times=100_000)
        house.store.fail("event", AWAY, times=100_000)
        until(lambda: (house.clock.advance(3600), "our lease has ended, as far as we know" in house.log())[1])
        assert house.agent.phase is Phase.READY
        assert set(house.backend.applied) == {("172.17.9.0/24",)}
        assert house.ours() == []
        house.store._failures.clear()
        until(lambda: (house.clock.advance(5), house.ours() == [key])[1])

    house.live(script)
    assert house.log().count("our lease has ended") <= 30


def test_a_subnet_taken_during_an_outage_is_a_lost_lease_once_the_registry_answers(house):
    """flannel.md 11, row 29: a machine asleep for longer than its lease; nobody ends up with its subnet too."""

    def script():
        house.ready()
        (key,) = house.ours()
        until(lambda: house.registry.get(ANNOUNCED))
        house.store.fail("*", AWAY, times=100_000)
        house.store.fail("event", AWAY, times=100_000)
        house.clock.advance(86401)
        until(lambda: house.ours() == [])
        house.registry.create(key, b'{"PublicIP":"192.168.66.99"}', ttl=86400)
        house.store._failures.clear()
        until(lambda: (house.clock.advance(5), house.agent.phase is Phase.STOPPED)[1])

    with pytest.raises(LeaseLost, match=r"192\.168\.66\.99"):
        house.live(script)


# ---- started while the registry is silent ---------------------------------------------------------------------------


def ran_with_a_peer(house) -> str:
    """An agent has run and known one peer; its successor finds no registry. The key of our lease."""
    house.peer(9)

    def script():
        house.ready()
        until(lambda: house.backend.applied[-1] == ("172.17.9.0/24",))

    house.live(script)
    house.renew()
    house.store.fail("*", AWAY, times=100_000)
    (key,) = house.ours()
    return key


def test_a_restart_during_an_outage_carries_packets_at_once_in_the_same_subnet(house):
    """flannel.md 11, row 3: an agent started while etcd is down does not wait for it."""
    key = ran_with_a_peer(house)

    def script():
        house.ready()
        assert set(house.backend.applied) == {("172.17.9.0/24",)}
        assert house.subnet_file.exists()
        until(lambda: problem_ids(house) == ["registry-unreachable"])
        until(lambda: told(house)["state"] == "ready")
        shown = told(house)
        assert (shown["peers"]["count"], shown["lease"]["renewed"]) == (1, None)
        assert 86000 <= shown["lease"]["seconds_left"] <= 86400
        assert answers(house, "/readyz") == (200, "ready\n")
        house.peer(10)
        house.store._failures.clear()
        until(lambda: (house.clock.advance(5), "172.17.10.0/24" in house.backend.applied[-1])[1])
        until(lambda: (house.clock.advance(5), "renewed" in house.log())[1])
        until(lambda: told(house)["lease"]["renewed"] is not None)

    house.live(script)
    assert "going on with what we knew last: 172.17." in house.log()
    assert house.ours() == [key]
    assert house.registry.get(key).lease is not None


def test_an_agent_killed_right_after_it_met_a_peer_has_left_it_to_its_successor(house):
    """Found by the drill "all down": the first list was written, the peer that came a moment later only after 5 s."""

    def script():
        house.ready()
        house.peer(9)
        known = house.folder / "state" / "known.json"
        until(lambda: known.exists() and "172.17.9.0/24" in known.read_text())

    house.live(script)  # on a clock that stands still


def test_a_restart_during_an_outage_speaks_as_the_registry_did_that_is_silent_now(house):
    """A silent etcd does not tell whether the network is in v2."""
    known = house.folder / "state" / "known.json"
    house.options(dialect=None)
    house.store.api = "v2"
    ran_with_a_peer(house)
    assert json.loads(known.read_text())["dialect"] == "0.7"
    held_to: list[str] = []
    house.store.api = ""  # as long as nobody answers
    house.options(dialect=None, stay=held_to.append)
    house.live_until_ready()
    assert json.loads(known.read_text())["dialect"] == "0.7"
    assert "going on with what we knew last" in house.log()
    assert held_to == ["v2"]


def test_a_restart_during_an_outage_gives_way_when_the_registry_names_another_host(house):
    key = ran_with_a_peer(house)

    def script():
        house.ready()
        entry = house.registry.get(key)
        house.registry.replace(key, b'{"PublicIP":"192.168.66.99"}', ttl=86400, expected=entry.revision)
        house.store._failures.clear()
        until(lambda: (house.clock.advance(5), house.agent.phase is Phase.STOPPED)[1])

    with pytest.raises(LeaseLost):
        house.live(script)
    assert not (house.folder / "state" / "known.json").exists(), "its successor shall not go on with it"


def test_a_restart_after_data_loss_puts_the_lease_back_and_says_that_the_config_is_gone(house):
    key = ran_with_a_peer(house)
    for entry in house.registry.list(PREFIX).entries:
        house.registry.delete(entry.key)

    def script():
        house.ready()
        house.store._failures.clear()
        until(lambda: (house.clock.advance(5), house.ours() == [key])[1])
        until(lambda: {"no-config", "registry-doubted"} <= set(problem_ids(house)))
        assert set(house.backend.applied) == {("172.17.9.0/24",)}, "the first list it sees is an empty one"

    house.live(script)


def test_an_agent_started_on_a_registry_that_came_back_empty_carries_packets_and_puts_its_lease_back(house):
    key = ran_with_a_peer(house)
    for entry in house.registry.list(PREFIX).entries:
        house.registry.delete(entry.key)
    house.store._failures.clear()  # it answers from the start on

    def script():
        house.ready()
        until(lambda: (house.clock.advance(5), house.ours() == [key])[1])
        until(lambda: {"no-config", "registry-doubted"} <= set(problem_ids(house)))
        assert set(house.backend.applied) == {("172.17.9.0/24",)}

    house.live(script)
    assert "going on with what we knew last: 172.17." in house.log()


def test_an_agent_whose_known_lease_has_ended_waits_for_the_config_of_an_empty_registry(house):
    ran_with_a_peer(house)
    for entry in house.registry.list(PREFIX).entries:
        house.registry.delete(entry.key)
    house.store._failures.clear()
    path = house.folder / "state" / "known.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ends": 1.0}))

    def script():
        house.said("waiting: ")
        assert house.backend.applied == []

    house.live(script)
    assert house.ours() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda known: known | {"ends": 1.0}, "waiting: no answer"),
        (lambda known: known | {"prefix": "/other"}, "waiting: no answer"),
        (lambda known: known | {"format": 2}, "known.json cannot be understood"),
        (lambda known: known | {"peers": [["172.17.1.0/24"]]}, "known.json cannot be understood"),
        (lambda known: known | {"lease": [known["lease"][0], "e30=", 1, "1"]}, "waiting: no answer"),
        (
            lambda known: (
                known | {"lease": [known["lease"][0], b64encode(b'{"PublicIP":"1.2.3.4"}').decode(), 1, "1"]}
            ),
            "waiting: no answer",  # this host has another address now
        ),
        (lambda known: known | {"config": "e30="}, "Network"),
        (lambda known: [], "known.json cannot be understood"),
    ],
)
def test_what_was_known_and_does_not_hold_is_not_gone_on_with(house, change, said):
    ran_with_a_peer(house)
    path = house.folder / "state" / "known.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))

    def script():
        house.said(said)
        house.said("waiting: no answer")
        assert house.backend.applied == []
        assert "start" not in house.steps

    house.live(script)


def test_what_was_known_is_not_used_when_the_registry_answers(house):
    ran_with_a_peer(house)
    house.store._failures.clear()
    house.live_until_ready()
    assert "going on with" not in house.log()


# ---- what is wrong in the registry ----------------------------------------------------------------------------------

WORDS = b'{"data_path":"userspace","host":"node7","instance":"7777777777","run":"another","version":"0.1.0"}'


def noted(house) -> list[str]:
    return [problem.id for problem in house.agent.problems.all]


def test_another_machine_with_our_address_is_named_beside_us(house):
    """flannel.md 11, row 10: cloned machines. Both parties, in log and status, and its end too."""

    def script():
        house.ready()
        entry = until(lambda: house.registry.get(ANNOUNCED))
        until(lambda: house.agent._follower._listed)
        until(lambda: house.clock.waiting >= 2)
        house.registry.replace(ANNOUNCED, WORDS, ttl=86400, expected=entry.revision)
        house.said("another machine announces our address: host node7 (instance 77777777")
        assert f"beside this one, {os.uname().nodename} (instance" in house.log()
        assert noted(house) == ["clone"]
        until(lambda: problem_ids(house) == ["clone"])
        assert "host node7 (instance 77777777" in told(house)["problems"][0]["message"]
        assert told(house)["verdict"] == "degraded"
        # Ten minutes later we write our words again; the other is heard of once more only if it is still there.
        until(lambda: (house.clock.advance(600), house.registry.get(ANNOUNCED).value != WORDS)[1])
        until(lambda: (house.clock.advance(600), noted(house) == [])[1])

    house.live(script)
    assert "over: another machine" in house.log()


def test_what_this_host_announced_before_a_restart_is_no_other_machine(house):
    house.live_until_ready()
    house.renew()

    def script():
        house.ready()
        until(lambda: house.agent._peers is not None and house.registry.get(ANNOUNCED))
        until(lambda: house.store.calls.count("replace") or house.store.calls.count("refresh") >= 2)

    house.live(script)
    assert "another machine" not in house.log()


def test_a_changed_config_is_told_with_what_changed_and_what_it_means_for_us(house):
    """flannel.md 11, row 25."""

    def script():
        house.ready()
        until(lambda: house.agent._follower._listed)
        entry = house.registry.get(f"{PREFIX}/config")
        entry = house.registry.replace(
            entry.key, b'{"Network":"172.17.0.0/16" }', ttl=None, expected=entry.revision
        )
        entry = house.registry.replace(
            entry.key, b'{"Network":"10.0.0.0/8"}', ttl=None, expected=entry.revision
        )
        house.said(f"was changed at revision {entry.revision}: Network 172.17.0.0/16 -> 10.0.0.0/8")
        house.said("has no place in the new one")
        assert noted(house) == ["config-changed"]
        entry = house.registry.replace(entry.key, b'{"Network":', ttl=None, expected=entry.revision)
        until(lambda: noted(house) == ["config-invalid"])
        house.registry.delete(entry.key)
        until(lambda: problem_ids(house) == ["no-config"])
        assert told(house)["registry"]["answers"] is True
        assert answers(house, "/readyz")[0] == 200
        house.configure()
        until(lambda: noted(house) == [])

    house.live(script)
    assert house.log().count("id=config-changed") == 2, "once when it came, once when it went"
    assert house.agent.phase is Phase.STOPPED


def test_leases_that_cannot_be_right_are_named_with_both_parties_and_again_when_they_come_again(house):
    def script():
        house.ready()
        first = house.peer(88, b'{"PublicIP":"10.0.2.15"}')
        house.peer(89, b'{"PublicIP":"10.0.2.15"}')
        house.said("172.17.88.0/24 and 172.17.89.0/24 both name 10.0.2.15")
        assert noted(house) == ["duplicate-ip"] * 2
        house.registry.delete(first)
        until(lambda: (house.clock.advance(1), noted(house) == [])[1])
        house.peer(88, b'{"PublicIP":"10.0.2.15"}')
        until(lambda: house.log().count("warn  172.17.88.0/24 and 172.17.89.0/24 both name") == 2)

    house.live(script)


def test_a_thousand_bad_keys_are_a_few_lines_and_a_count(house):
    """flannel.md 11, row 4: one of them takes flannel's whole cluster down."""
    for number in range(1000):
        house.registry.create(f"{SUBNETS}nonsense-{number}" + "x" * 5000, b"{}", ttl=None)

    def script():
        house.peer(20)
        house.ready()
        until(lambda: house.backend.applied[-1] == ("172.17.20.0/24",))

    house.live(script)
    assert len(house.agent.problems.all) == 1000
    assert house.log().count("skipped unreadable key") == 10
    assert "990 more of the kind" in house.log()
    assert max(map(len, house.log().splitlines())) < 1000


def test_a_state_directory_that_cannot_be_written_stops_no_packet(house):
    """A full disk: etcd and subnet.env remember our subnet too."""
    (house.folder / "state" / "state.json").mkdir(parents=True)  # a file cannot be put in its place

    def script():
        house.ready()
        until(lambda: problem_ids(house) == ["bad-state"])
        until(lambda: told(house)["verdict"] == "ready", what="ready: it is a warning")

    house.live(script)
    assert "is not remembered over a reboot" in house.log()


# ---- what else may happen -------------------------------------------------------------------------------------------


def test_a_worker_that_breaks_is_the_error_that_ends_the_agent(house):
    def broken():
        raise ZeroDivisionError("in the link monitor")

    house.monitor = broken
    with pytest.raises(ZeroDivisionError, match="in the link monitor"):
        house.live(lambda: until(lambda: house.agent.phase is Phase.STOPPED))
    assert house.steps[-2:] == ["stop", "close"]


def test_a_worker_that_ends_by_itself_is_an_error_with_its_name(house):
    house.monitor = lambda: None
    with pytest.raises(FlanctlError, match="link monitor ended though nobody asked it to"):
        house.live(lambda: until(lambda: house.agent.phase is Phase.STOPPED))


def test_a_change_of_the_device_makes_an_apply_and_repairs_are_said(house):
    def script():
        house.ready()
        house.backend.reports.append(ApplyReport(0, ("mtu of flannel0 was 9, set to 1472",)))
        house.clock.advance(1)
        house.agent._inbox.put(LinkChanged())
        house.said("repaired: mtu of flannel0 was 9, set to 1472")

    house.live(script)


def test_every_resync_compares_device_and_rules_anew(house):
    def script():
        house.ready()
        house.rules.answers = [("rules were gone",)]
        house.clock.advance(5)
        house.agent._inbox.put(LinkChanged())
        house.said("repaired: rules were gone")

    house.live(script)


def test_rules_are_looked_at_when_somebody_changed_one_and_once_a_minute(house):
    house.generation = 7

    def looks(turns: int, seconds: float = 5) -> int:
        """Looks at the kernel, so many seconds apart, that were looks at the rules, too."""
        before = house.steps.count("rules")
        for _ in range(turns):
            applied = len(house.backend.applied)
            house.clock.advance(seconds)
            house.agent._inbox.put(LinkChanged())
            until(lambda applied=applied: len(house.backend.applied) > applied)
        # What is behind the last apply is done when the loop takes the next message.
        house.agent._inbox.put(ShowCounters())
        counters = house.log().count("counters")
        until(lambda: house.log().count("counters") > counters)
        return house.steps.count("rules") - before

    def script():
        house.ready()
        assert looks(3) == 0
        house.generation = 8
        assert looks(3) == 1
        house.rules.answers = [("rules were gone",)]  # found and mended at one look, confirmed at the next
        house.generation = 9
        assert looks(4) == 2
        house.said("repaired: rules were gone")
        house.rules.answers = [FlanctlError("iptables: no")] * 2
        house.generation = 10
        assert looks(5) == 3
        assert looks(1, seconds=60) == 1
        assert looks(1) == 0
        house.agent._inbox.put(Reload())
        assert looks(1) >= 1
        house.generation = None
        assert looks(3) == 3

    house.live(script)


def test_rules_that_cannot_be_written_are_said_once_and_packets_flow_anyway(house):
    house.rules.answers = [FlanctlError("the program iptables is not installed")] * 3

    def script():
        house.ready()
        for count in (2, 3):
            house.clock.advance(5)
            house.agent._inbox.put(LinkChanged())
            until(lambda count=count: len(house.rules.asked) >= count)

    house.live(script)
    assert house.log().count("the program iptables is not installed") == 1


def test_a_data_plane_that_fails_is_built_again_and_given_up_after_five_times_in_a_minute(house):
    def script():
        house.ready()
        house.backend.reports = [ApplyReport(0, ("started anew",))] * 9
        for count in range(1, FAILURES + 1):
            house.agent._inbox.put(PathFailed("EIO"))
            until(lambda count=count: house.log().count("ended by itself error=EIO") >= count)

    with pytest.raises(FlanctlError, match="the data plane ended by itself: EIO") as ended:
        house.live(script)
    assert ended.value.id == "data-path"


def test_a_data_plane_that_fails_now_and_then_is_built_again_each_time(house):
    """Seven failures in two minutes are no reason to end; five in one are."""

    def script():
        house.ready()
        for count in range(1, FAILURES + 3):
            house.agent._inbox.put(PathFailed("EIO"))
            until(lambda count=count: house.log().count("ended by itself error=EIO") >= count)
            house.clock.advance(20)

    house.live(script)


def test_one_look_at_the_kernel_that_fails_ends_nothing_and_five_in_a_minute_do(house):
    trouble = FlanctlError("the kernel did not answer in 3 s", id="netlink")

    def script():
        house.ready()
        for count in range(1, FAILURES + 1):
            house.backend.failing.append(trouble)
            house.clock.advance(1)
            house.agent._inbox.put(LinkChanged())
            until(
                lambda count=count: house.log().count("could not look at the kernel, trying again") >= count
            )

    with pytest.raises(FlanctlError, match="did not answer"):
        house.live(script)


def test_a_device_that_is_somebody_elses_now_ends_it_at_once(house):
    def script():
        house.ready()
        house.backend.failing.append(FlanctlError("flannel0 is not ours", id="device-foreign"))
        house.clock.advance(1)
        house.agent._inbox.put(LinkChanged())
        until(lambda: house.agent.phase.value == "stopped")

    with pytest.raises(FlanctlError, match="not ours"):
        house.live(script)


def test_a_storm_of_link_events_is_one_look_in_half_a_second(house):
    def script():
        house.ready()
        looks = len(house.backend.applied)
        house.clock.advance(1)
        for _ in range(200):
            house.agent._inbox.put(LinkChanged())
        until(lambda: len(house.backend.applied) > looks)
        house.agent._inbox.put(ShowCounters())
        house.said("counters")
        assert len(house.backend.applied) <= looks + 2

    house.live(script)


def test_the_underlays_lost_address_is_said(house):
    def script():
        house.ready()
        house.trouble = "the address 192.168.66.11 is gone from eth0; restart the agent to use another"
        house.clock.advance(6)
        house.agent._inbox.put(LinkChanged())
        house.said("the address 192.168.66.11 is gone from eth0")

    house.live(script)


def test_a_data_plane_that_ends_is_noticed_without_a_question(house):
    def script():
        house.ready()
        house.backend.ends.put("the worker panicked")
        house.said('ended by itself error="the worker panicked"')
        until(lambda: len(house.backend.applied) == 2)

    house.live(script)


def test_a_flood_of_refused_packets_is_one_line_with_their_sum(house):
    def script():
        house.ready()
        house.backend.totals = {"in_packets": 7, "drop_unknown_sender": 1000}
        house.clock.advance(5)
        house.agent._inbox.put(LinkChanged())
        house.said("packets dropped reason=unknown_sender count=1000 total=1000")
        house.backend.totals = {"in_packets": 7, "drop_unknown_sender": 5000}
        house.clock.advance(5)
        house.agent._inbox.put(LinkChanged())
        until(lambda: len(house.backend.applied) == 3)
        house.clock.advance(60)
        house.agent._inbox.put(LinkChanged())
        house.said("packets dropped reason=unknown_sender count=4000 total=5000")

    house.live(script)
    assert house.log().count("packets dropped") == 2


def test_sigusr1_logs_the_counters(house):
    house.backend.totals = {"in_packets": 7, "out_packets": 0, "drop_short": 2}

    def script():
        house.ready()
        os.kill(os.getpid(), signal.SIGUSR1)
        house.said("counters in-packets=7 drop-short=2")

    house.live(script)


def test_a_second_stop_while_stopping_is_no_error(house):
    stopping = threading.Event()
    stop = house.backend.stop

    def slow() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.set()
        stop()

    house.backend.stop = slow
    house.live_until_ready()
    assert stopping.is_set()
    assert house.steps[-2:] == ["stop", "close"]


# ---- one agent per run directory ------------------------------------------------------------------------------------


def test_a_second_agent_is_refused_by_pid_before_it_looks(house):
    with lock(house.folder / "lock"), pytest.raises(Conflict, match=rf"pid {os.getpid()}") as refused:
        house.agent.run()
    assert refused.value.exit_code == 5
    assert (house.steps, house.store.calls) == ([], [])


def test_a_run_directory_without_a_parent_is_not_made(house):
    with pytest.raises(NotFound, match="there is no directory"), lock(house.folder / "no" / "such"):
        pass
    assert not (house.folder / "no").exists()


def test_the_lock_of_a_dead_agent_holds_nobody_up(house):
    (house.folder / "lock").mkdir()
    (house.folder / "lock" / "agent.lock").write_text("4711\n")
    house.live_until_ready()


# ---- as patient as flanneld -----------------------------------------------------------------------------------------

TINY = b'{"Network":"172.17.0.0/22","SubnetLen":24,"SubnetMin":"172.17.1.0","SubnetMax":"172.17.1.0"}'


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b'{"Network":"172.17.0.0/16",', "waiting: /jxdd/network/config"),
        (b'{"Network":"fc00::/16"}', "waiting: /jxdd/network/config"),
        (b'{"Network":"172.17.0.0/16","Backend":{"Type":"vxlan"}}', 'waiting: no backend "vxlan"'),
        (TINY, "waiting: 1 of 1 subnets taken"),
    ],
    ids=["broken", "wrong", "another backend", "full"],
)
def test_flanneld_waits_until_the_config_lets_it_start(empty_house, config, says):
    """0.7.1 tries for ever; what another hand mends is taken at the next look, and said about once a minute."""
    house = empty_house
    house.configure(config)
    house.peer(1)
    house.renew(patient=True)

    with systemd() as heard:

        def script():
            house.said(says)
            for _ in range(25):  # two minutes
                until(lambda: house.clock.waiting)
                before = house.agent._waits._since.copy()
                house.clock.advance(5.0)
                until(lambda before=before: house.agent._waits._since != before)
                heard()  # the kernel keeps ten for a systemd that does not listen
            assert house.log().count("waiting: ") == 3
            assert house.log().count("registry ") <= 1
            assert house.log().count("forwarding is off") <= 1
            house.reconfigure(b'{"Network":"172.17.0.0/16"}')
            until(lambda: house.clock.waiting)
            house.clock.advance(5.0)
            house.ready()

        house.live(script)
        waited = [text for text in heard() if text.startswith("STATUS=waiting for /jxdd/network/config (")]
    assert len(waited) > 20
    assert "/config (2m): " in waited[-1]
    assert all(re.search(r"\nEXTEND_TIMEOUT_USEC=\d+$", text) for text in waited)
    assert len(house.ours()) == 1
    assert house.steps.count("close") == house.steps.count("check")


def test_a_stop_ends_the_patience(empty_house):
    empty_house.configure(TINY)
    empty_house.peer(1)
    empty_house.renew(patient=True)
    empty_house.live(lambda: empty_house.said("waiting: "))
    assert empty_house.ours() == []
    assert "reason=SIGTERM lease=none" in empty_house.log()


@pytest.mark.parametrize("config", [b"{", TINY], ids=["broken", "full"])
def test_flanctl_agent_has_no_such_patience(empty_house, config):
    empty_house.configure(config)
    empty_house.peer(1)
    with pytest.raises((Invalid, Conflict)):
        empty_house.live(lambda: until(lambda: empty_house.agent.phase is Phase.STOPPED))


def test_a_device_somebody_holds_is_not_waited_for(house):
    """Two agents on one host: the second ends with one line."""
    house.renew(patient=True)
    house.failures["check"] = Conflict("flannel0 is held by flanneld (pid 7)", id="device-busy")
    with pytest.raises(Conflict):
        house.live(lambda: until(lambda: house.agent.phase is Phase.STOPPED))


# ---- seen from outside ------------------------------------------------------------------------------------------------


def answers(house, path):
    """Status and body of a question to the running agent."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as channel:
        channel.settimeout(10)
        channel.connect(str(house.folder / "lock" / "agent.sock"))
        channel.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        reply = b"".join(iter(lambda: channel.recv(65536), b""))
    head, _, body = reply.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def told(house):
    return json.loads(answers(house, "/status")[1])


def problem_ids(house):
    return [problem["id"] for problem in told(house)["problems"]]


def test_an_agent_that_waits_is_alive_not_ready_and_says_for_what(empty_house):
    house = empty_house

    def script():
        house.said("waiting: ")
        assert answers(house, "/healthz") == (200, "ok\n")
        code, body = answers(house, "/readyz")
        assert code == 503
        assert body.startswith("no-lease: no network config at /jxdd/network/config")
        assert told(house)["verdict"] == "starting"
        assert problem_ids(house) == ["no-config"]
        house.configure()
        house.clock.advance(10)
        house.ready()
        until(lambda: answers(house, "/readyz") == (200, "ready\n"))
        assert problem_ids(house) == []

    house.live(script)
    assert not (house.folder / "lock" / "agent.sock").exists()


def test_status_has_lease_network_peers_and_what_the_registry_holds(house):
    house.peer(7)
    house.peer(9, b"{}")

    def script():
        house.ready()
        until(lambda: told(house)["state"] == "ready")
        shown = told(house)
        assert shown["lease"]["subnet"] in {
            str(IPv4Network(key.rpartition("/")[2].replace("-", "/"))) for key in house.ours()
        }
        assert 86390 <= shown["lease"]["seconds_left"] <= 86400
        assert (shown["network"], shown["public_ip"], shown["mtu"]) == (
            "172.17.0.0/16",
            "192.168.66.11",
            1472,
        )
        assert shown["peers"]["count"] == 1
        assert shown["kernel"]["rule"] == {"wanted": 2, "missing": 0}
        assert problem_ids(house) == ["bad-value"]
        assert 'flanctl_subnets_taken{kind="unreadable"} 1\n' in answers(house, "/metrics")[1]

    house.live(script)


def test_a_registry_that_goes_away_degrades_and_coming_back_heals(house):
    with systemd() as heard:

        def script():
            house.ready()
            house.store.fail("event", AWAY)
            house.store.fail("list", AWAY, times=10_000)
            until(lambda: problem_ids(house) == ["registry-unreachable"], what=house.log)
            shown = told(house)
            assert (shown["verdict"], shown["registry"]["answers"]) == ("degraded", False)
            assert answers(house, "/readyz") == (200, "ready\n"), "packets go on"
            until(lambda: "STATUS=degraded: no answer [registry-unreachable]" in heard())
            timeouts = 'flanctl_registry_requests_total{operation="list",result="timeout"} '
            until(lambda: (house.clock.advance(6), f"{timeouts}0\n" not in answers(house, "/metrics")[1])[1])
            house.store._failures.clear()
            until(lambda: (house.clock.advance(6), problem_ids(house) == [])[1])
            until(lambda: heard()[-1].startswith("STATUS=network=172.17.0.0/16 subnet="))
            text = answers(house, "/metrics")[1]
            assert 'flanctl_watch_restarts_total{reason="error"} 1\n' in text

        house.live(script)


def test_systemd_waits_on_while_the_first_list_of_peers_does_not_come(house):
    with systemd() as heard:

        def script():
            house.store.fail("list", AWAY, skip=1, times=10_000)  # the lease is had, the peers are not
            until(lambda: house.agent.phase is Phase.LEASED)
            wanted = "STATUS=waiting for the first complete list of peers: no answer\nEXTEND_TIMEOUT_USEC="
            until(lambda: (house.clock.advance(6), any(text.startswith(wanted) for text in heard()))[1])
            assert answers(house, "/readyz")[0] == 503
            house.store._failures.clear()
            until(lambda: (house.clock.advance(6), house.agent.phase is Phase.READY)[1])

        house.live(script)


def test_what_the_kernel_refuses_and_docker_missed_is_in_status_until_it_is_mended(house):
    house.backend.reports = [
        ApplyReport(0, objects=(Objects("link", 1), Objects("route", 1))),
        ApplyReport(0, (), ("route 172.17.0.0/16: there is another",), (Objects("link", 1), Objects("route", 1, missing=1))),
        ApplyReport(0, ("route was missing",), (), (Objects("link", 1), Objects("route", 1, repaired=1))),
    ]  # fmt: skip

    def script():
        house.ready()
        until(lambda: told(house)["state"] == "ready")
        house.bridge = ("172.17.0.1/16",)
        house.rules.answers = [FlanctlError("iptables: no")]
        house.agent._inbox.put(Reload())
        until(lambda: problem_ids(house) == ["routes-missing", "rules-missing", "docker0-old"])
        code, body = answers(house, "/readyz")
        assert (code, body) == (503, "routes-missing: route 172.17.0.0/16: there is another\n")
        house.bridge = None
        house.agent._inbox.put(Reload())
        until(lambda: problem_ids(house) == [])
        text = answers(house, "/metrics")[1]
        assert 'flanctl_kernel_repairs_total{kind="route"} 1\n' in text
        assert 'flanctl_kernel_failures_total{kind="rule"} 2\n' in text

    house.live(script)


def test_the_accept_rules_for_docker_are_in_status_counted_and_said_once(house):
    """A repair is said and counted; what keeps them from working is a problem until it is over, and never the end."""
    closed = "dockerd drops packets"
    house.accept.reports = [
        AcceptReport(wanted=3, repaired=("written at the start",)),
        AcceptReport(
            wanted=3, repaired=("the rule for Docker was missing",), before=("-A DOCKER-USER -j DROP",)
        ),
        AcceptReport(wanted=3, error="no iptables-save"),
        AcceptReport(wanted=3, error="no iptables-save", closed=closed),
        AcceptReport(wanted=3),
    ]

    def again(condition):
        house.agent._inbox.put(Reload())
        until(condition)

    def script():
        house.ready()
        until(lambda: told(house)["state"] == "ready")
        again(lambda: told(house)["docker_accept"]["behind"] == ["-A DOCKER-USER -j DROP"])
        assert told(house)["kernel"]["accept"] == {"wanted": 3, "missing": 0}
        again(lambda: problem_ids(house) == ["docker-accept"])
        assert told(house)["kernel"]["accept"] == {"wanted": 3, "missing": 3}
        again(lambda: problem_ids(house) == ["docker-closed", "docker-accept"])
        assert told(house)["verdict"] == "degraded"
        assert answers(house, "/readyz")[0] == 200
        again(lambda: problem_ids(house) == [])
        text = answers(house, "/metrics")[1]
        assert 'flanctl_kernel_repairs_total{kind="accept"} 1\n' in text
        assert 'flanctl_kernel_failures_total{kind="accept"} 6\n' in text

    house.live(script)
    assert house.log().count("repaired: the rule for Docker was missing") == 1
    assert "written at the start" not in house.log(), "what is made for the first time is no repair"
    assert (house.log().count("no iptables-save"), house.log().count(closed)) == (1, 1)


def test_a_lost_lease_is_in_the_last_snapshot(house):
    def script():
        house.ready()
        (key,) = house.ours()
        house.registry.delete(key)
        house.registry.create(key, b'{"PublicIP":"192.168.66.77"}', ttl=86400)
        until(lambda: house.agent.phase is Phase.STOPPED)

    with pytest.raises(LeaseLost):
        house.live(script)
    last = house.agent._observer.snapshot
    assert (last.state, last.found[0].id) == ("stopping", "lease-foreign")


def test_the_watchdog_hears_a_loop_that_turns_and_not_one_that_hangs(house):
    with systemd() as heard:
        house.renew(watchdog=0.3)

        def signs():
            return heard().count("WATCHDOG=1")

        def script():
            house.ready()
            for _ in range(3):
                before = signs()
                house.clock.advance(1)
                until(lambda before=before: signs() > before)
            applied = len(house.backend.applied)
            house.backend.pause.clear()
            house.agent._inbox.put(Reload())
            until(lambda: len(house.backend.applied) > applied)
            hung = signs()
            house.clock.advance(300)
            code, body = answers(house, "/healthz")
            assert (code, body) == (503, "loop-stalled: the loop has not turned for 300s\n")
            assert "loop-stalled" in problem_ids(house)
            assert signs() == hung
            house.backend.pause.set()
            until(lambda: signs() > hung)
            assert answers(house, "/healthz")[0] == 200

        house.live(script)
        assert heard()[-1].startswith("STOPPING=1")


def test_SIGHUP_ends_nothing_and_has_the_machine_compared(house):
    def script():
        house.ready()
        before = len(house.backend.applied)
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: len(house.backend.applied) > before)
        house.said("SIGHUP")

    house.live(script)


def test_without_a_place_for_the_socket_the_agent_runs_all_the_same(house, monkeypatch):
    monkeypatch.setattr("flanctl.agent.daemon.StatusApi.open", no_socket)
    house.live_until_ready()
    assert "flanctl status cannot ask this agent" in house.log()


def no_socket(self):
    raise PermissionError(13, "Permission denied")


def test_a_taken_health_port_is_refused_by_check_and_survived_by_run(house):
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        house.renew(healthz=holder.getsockname())
        with pytest.raises(Conflict) as caught:
            house.agent.check()
        assert caught.value.id == "healthz-port"
        house.renew(healthz=holder.getsockname())

        def script():
            house.ready()
            until(lambda: problem_ids(house) == ["healthz-port"])

        house.live(script)


def test_it_counts_which_peers_run_flanctl(house):
    for number in (9, 10):
        house.peer(number)
    hosts = f"{PREFIX}/flanctl/hosts/"
    words = b'{"data_path":"userspace","host":"h9","instance":"00ff","version":"0.1.0"}'
    house.registry.create(f"{hosts}192.168.66.109", words, ttl=None)
    house.registry.create(f"{hosts}192.168.66.200", words, ttl=None)  # no peer of ours

    def script():
        house.ready()
        until(lambda: [told(house)["peers"][name] for name in ("count", "flanctl")] == [2, 1])
        house.registry.create(f"{hosts}192.168.66.110", words, ttl=None)
        until(lambda: told(house)["peers"]["flanctl"] == 2)
        house.registry.delete(f"{hosts}192.168.66.109")
        until(lambda: (house.clock.advance(5), told(house)["peers"]["flanctl"] == 1)[1])

    house.live(script)

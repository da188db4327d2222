"""`flanctl subnets watch` on a real etcd that is killed, frozen and compacted under it: no change lost, none twice."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import RegistryUnreachable
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore
from flanctl.registry.stores.store import Changed
from tests.support.cli import Running, flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.registry.stores.store import Entry, Store
    from tests.support.etcd import Version

PREFIX = "/jxdd/network"
KEY = f"{PREFIX}/subnets/172.17.90.0-24"


@pytest.fixture(params=VERSIONS)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(request.param, folder=tmp_path / "etcd") as cluster:
        yield cluster


@pytest.fixture
def store(cluster: Cluster) -> Iterator[Store]:
    with contextlib.closing(EtcdGatewayStore(parse_endpoints(cluster.endpoints))) as store:
        store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
        yield store


@pytest.fixture
def env(cluster: Cluster) -> dict[str, str]:
    return {"FLANCTL_ENDPOINTS": ",".join(cluster.endpoints)}


class Writer:
    """Moves one subnet from host to host, 50 times a second, for as long as etcd takes it.

    `wrote` is what etcd's history must hold: an answer that was lost is found by reading the key again, and no write
    is made twice, since each names the revision it follows.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.wrote: list[tuple[int, str]] = []
        self.error: BaseException | None = None

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def go_on(self, count: int) -> None:
        goal = len(self.wrote) + count
        until(lambda: len(self.wrote) >= goal or self.error, seconds=60, what="the writer goes on")
        assert self.error is None, repr(self.error)

    def _run(self) -> None:
        try:
            number, entry = 0, self._store.get(KEY)
            while not self._stop.wait(0.02):
                number += 1
                address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
                entry = self._write(entry, address)
                self.wrote.append((entry.revision, address))
        except BaseException as error:
            self.error = error

    def _write(self, entry: Entry | None, address: str) -> Entry:
        value = b'{"PublicIP":"' + address.encode() + b'"}'
        while True:
            try:
                if entry is None:
                    return self._store.create(KEY, value, ttl=600)
                return self._store.replace(KEY, value, ttl=600, expected=entry.revision)
            except RegistryUnreachable:
                assert not self._stop.is_set(), "the registry stayed away"
            except Changed as changed:
                assert changed.current is not None
                assert changed.current.value == value, "somebody else writes here"
                return changed.current


def events(lines: list[str]) -> list[tuple[int, str]]:
    """What was told of the subnet, in order."""
    documents = map(json.loads, lines)
    return [(one["revision"], one["public_ip"]) for one in documents if one["event"] != "listed"]


def wait_for_words(watch: Running, count: int) -> None:
    until(lambda: len(outages(watch.errors())) >= count, seconds=60, what=f"lost and back, {count} in all")


def outages(errors: str) -> list[str]:
    return [json.loads(line)["event"] for line in errors.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_killed_server_costs_no_change_and_tells_none_twice(version: Version, tmp_path: Path) -> None:
    """The member that is watched is killed three times; the other two go on taking 50 writes a second."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(version, members=3, folder=tmp_path / "etcd"))
        store = stack.enter_context(
            contextlib.closing(EtcdGatewayStore(parse_endpoints(cluster.endpoints[1:]), timeout=10))
        )
        store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
        watched = {"FLANCTL_ENDPOINTS": cluster.endpoints[0]}
        words = ("watch", "--all", "-w", "json", "--timeout", "1")
        watch = stack.enter_context(Running(tmp_path / "watch", *words, env=watched))
        watch.wait_for(1)
        with Writer(store) as writer:
            writer.go_on(50)
            for number in range(1, 4):
                cluster.kill(0)
                wait_for_words(watch, 2 * number - 1)
                before = len(events(watch.lines()))
                writer.go_on(50)
                assert len(events(watch.lines())) == before, "the watch has another way to etcd"
                cluster.restart(0)
                wait_for_words(watch, 2 * number)
                writer.go_on(20)
        until(lambda: len(events(watch.lines())) >= len(writer.wrote), seconds=30, what="all is told")
        assert watch.end(signal.SIGINT) == 130
        assert events(watch.lines()) == writer.wrote
        assert outages(watch.errors()) == ["lost", "back"] * 3
        assert f"everything up to revision {writer.wrote[-1][0]} was told" in watch.errors()


def test_a_short_hang_is_not_even_told(
    cluster: Cluster, store: Store, env: dict[str, str], tmp_path: Path
) -> None:
    with Running(tmp_path / "watch", "watch", "--all", "-w", "json", "--timeout", "20", env=env) as watch:
        watch.wait_for(1)
        with Writer(store) as writer:
            writer.go_on(20)
            cluster.kill(0)
            cluster.restart(0)
            writer.go_on(20)
        until(lambda: len(events(watch.lines())) >= len(writer.wrote), seconds=30, what="all is told")
        assert events(watch.lines()) == writer.wrote
        assert watch.errors() == ""


def test_readers_that_are_killed_and_resumed_hear_everything_once(
    store: Store, env: dict[str, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    with Writer(store) as writer:
        resume: list[object] = []
        for number in range(5):
            with Running(tmp_path / str(number), "watch", "--all", "-w", "json", *resume, env=env) as watch:
                watch.wait_for(20)
                watch.end(signal.SIGKILL)
                lines += watch.lines()
            resume = ["--from-revision", json.loads(lines[-1])["revision"]]
    with Running(tmp_path / "last", "watch", "--all", "-w", "json", *resume, env=env) as watch:
        until(lambda: len(events([*lines, *watch.lines()])) >= len(writer.wrote) - skipped(lines, writer))
        lines += watch.lines()
    assert events(lines) == writer.wrote[skipped(lines, writer) :]


def skipped(lines: list[str], writer: Writer) -> int:
    """How many writes came before the first list."""
    first = json.loads(lines[0])["revision"]
    return sum(revision <= first for revision, _ in writer.wrote)


def test_what_was_compacted_is_told_as_differences(
    cluster: Cluster, store: Store, env: dict[str, str], tmp_path: Path
) -> None:
    entry = store.create(KEY, b'{"PublicIP":"192.168.6.9"}', ttl=600)
    with Running(tmp_path / "watch", "watch", "-w", "json", "--timeout", "1", env=env) as watch:
        watch.wait_for(1)
        watch.process.send_signal(signal.SIGSTOP)
        cluster.kill(0)  # so that nothing waits in the stopped process's socket
        cluster.restart(0)
        for number in range(5):
            value = b'{"PublicIP":"192.168.6.%d"}' % (10 + number)
            entry = store.replace(KEY, value, ttl=600, expected=entry.revision)
        cluster.etcdctl("compact", str(entry.revision))
        watch.process.send_signal(signal.SIGCONT)
        (_, moved) = map(json.loads, watch.wait_for(2))
    assert moved | {"time": "", "ttl_seconds": 0} == {
        "schema": 1,
        "time": "",
        "event": "moved",
        "subnet": "172.17.90.0/24",
        "public_ip": "192.168.6.14",
        "kind": "lease",
        "ttl_seconds": 0,
        "backend": "udp",
        "backend_data": None,
        "problem": None,
        "old_public_ip": "192.168.6.9",
        "expired": False,
        "resync": True,
        "key": KEY,
        "revision": entry.revision,
    }
    answer = flanctl("watch", "--from-revision", "2", "--for", "2s", "-w", "json", env=env)
    (listed,) = map(json.loads, answer.out.splitlines())
    assert (listed["event"], listed["resync"], len(listed["subnets"])) == ("listed", True, 1)


def test_a_frozen_server_is_told_and_an_interrupt_ends_the_waiting(
    cluster: Cluster, store: Store, env: dict[str, str], tmp_path: Path
) -> None:
    with Running(tmp_path / "watch", "watch", "-w", "json", "--timeout", "1", env=env) as watch:
        watch.wait_for(1)
        cluster.freeze(0)
        wait_for_words(watch, 1)
        cluster.thaw(0)
        wait_for_words(watch, 2)
        revision = store.create(KEY, b'{"PublicIP":"192.168.6.9"}', ttl=600).revision
        watch.wait_for(2)
        cluster.freeze(0)
        wait_for_words(watch, 3)
        assert watch.end(signal.SIGINT, seconds=5) == 130
        assert f"everything up to revision {revision} was told" in watch.errors()
        assert outages(watch.errors()) == ["lost", "back", "lost"]


def test_fail_on_loss_ends_with_3(
    cluster: Cluster, store: Store, env: dict[str, str], tmp_path: Path
) -> None:
    words = ("watch", "--fail-on-loss", "--timeout", "1")
    with Running(tmp_path / "watch", *words, env=env) as watch:
        watch.wait_for(1)
        cluster.kill(0)
        assert watch.end() == 3
        assert "cannot watch" in watch.errors()

"""What a member that hangs costs, by every store: three seconds for a call, ten for a watch, seconds to come back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import RegistryUnreachable
from flanctl.registry.stores.store import Put
from tests.support import stores
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import SERVED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.registry.stores.store import Event, Store
    from tests.support.etcd import Version

CALL, WATCH = 3.0, 10.0
SLACK = 1.0
"""Seconds a loaded machine may add."""

TIMEOUT = 15.0
"""A long one: patience with one endpoint must not grow with it."""


@pytest.fixture(scope="module")
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(request.param, v2=request.param == "3.4", folder=tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(
        request.param, 3, v2=request.param == "3.4", folder=tmp_path_factory.mktemp("etcd")
    ) as cluster:
        yield cluster


def opened(kind: str, *endpoints: str) -> contextlib.closing[Store]:
    return stores.opened(kind, endpoints, timeout=TIMEOUT)


@pytest.fixture(params=["half-open", "SYN dropped"])
def hung(request: pytest.FixtureRequest) -> Iterator[str]:
    """A host that takes a connection and says nothing, or does not even take it."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        place = server.getsockname()
        if request.param == "SYN dropped":
            # A full accept queue: Linux then drops the first packet of whoever comes next (tcp(7), backlog of listen(2)).
            for _ in range(4):
                link = stack.enter_context(socket.socket())
                link.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    link.connect(place)
        yield f"http://127.0.0.1:{place[1]}"


@pytest.mark.parametrize(("kind", "single"), SERVED, indirect=["single"], scope="module")
def test_a_host_that_hangs_costs_a_call_its_share_and_a_watch_too(
    single: Cluster, hung: str, kind: str
) -> None:
    with opened(kind, hung, *single.endpoints) as store:
        begin = time.monotonic()
        assert store.get("/nothing") is None
        assert time.monotonic() - begin < CALL + SLACK
        begin = time.monotonic()
        store.get("/nothing")
        assert time.monotonic() - begin < 1, "the next call begins with the one that answered"
    with opened(kind, hung, *single.endpoints) as store, opened(kind, *single.endpoints) as other:
        entry = other.create(f"/hung/{kind}/{hung[-5:]}", b"v", ttl=None)
        begin = time.monotonic()
        with store.watch(f"/hung/{kind}/", after=entry.revision - 1) as watch:
            assert isinstance(next(event for event in watch if isinstance(event, Put)), Put)
        assert time.monotonic() - begin < WATCH + SLACK


@pytest.mark.parametrize(("kind", "three"), SERVED, indirect=["three"], scope="module")
def test_a_member_that_stops_under_a_watch_is_left_within_ten_seconds(three: Cluster, kind: str) -> None:
    with opened(kind, *three.endpoints) as store, opened(kind, *three.endpoints[1:]) as other:
        start = other.create(f"/stop/{kind}/a", b"1", ttl=None)
        store.get("/stop")
        assert three.endpoints[0] in store.describe()
        if three.leader() == 0:
            three.etcdctl("move-leader", three.id(1))
        events: list[Event] = []
        with store.watch(f"/stop/{kind}/", after=start.revision - 1) as watch:
            reader = threading.Thread(target=lambda: events.extend(watch))
            reader.start()
            until(lambda: any(isinstance(event, Put) for event in events))
            three.freeze(0)
            try:
                begin = time.monotonic()
                changed = other.replace(start.key, b"2", ttl=None, expected=start.revision)
                until(lambda: Put(changed) in events, seconds=30)
                took = time.monotonic() - begin
                assert took < WATCH + SLACK, f"{took:.1f} s"
                begin = time.monotonic()
                assert store.get(start.key) is not None
                assert time.monotonic() - begin < CALL + SLACK
            finally:
                three.thaw(0)
                three.wait()
        reader.join(5)
        assert not reader.is_alive()


class LoadBalancer:
    """Forwards connections to one place, until it forgets them: they stay open, and nobody hears anything any more."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self.forgotten = threading.Event()
        self.carried = 0
        self._links: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            member = socket.create_connection(self._to)
            self._links += [client, member]
            for frm, to in ((client, member), (member, client)):
                threading.Thread(target=self._carry, args=(frm, to), daemon=True).start()

    def _carry(self, frm: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := frm.recv(65536):
                if not self.forgotten.is_set():
                    self.carried += len(data)
                    to.sendall(data)

    def close(self) -> None:
        for link in (self._server, *self._links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()


@pytest.mark.parametrize(("kind", "single"), SERVED, indirect=["single"], scope="module")
def test_a_watch_whose_connection_a_load_balancer_forgot_goes_on_elsewhere(
    single: Cluster, kind: str
) -> None:
    """flannel.md 11, row 28: there it stays silent for ever."""
    host, _, port = single.endpoints[0].removeprefix("http://").rpartition(":")
    with (
        contextlib.closing(LoadBalancer((host, int(port)))) as balancer,
        opened(kind, balancer.endpoint, *single.endpoints) as store,
        opened(kind, *single.endpoints) as other,
    ):
        start = other.create(f"/forgot/{kind}/a", b"1", ttl=None)
        events: list[Event] = []
        with store.watch(f"/forgot/{kind}/", after=start.revision - 1) as watch:
            reader = threading.Thread(target=lambda: events.extend(watch))
            reader.start()
            until(lambda: Put(start) in events)
            assert balancer.carried > 0, "the watch goes by way of it"
            balancer.forgotten.set()
            begin = time.monotonic()
            changed = other.replace(start.key, b"2", ttl=None, expected=start.revision)
            until(lambda: Put(changed) in events, seconds=30)
            took = time.monotonic() - begin
            assert took < WATCH + SLACK, f"{took:.1f} s"
        reader.join(5)
        assert not reader.is_alive()


@pytest.mark.parametrize(("kind", "version"), SERVED)
def test_an_endpoint_that_comes_back_is_used_within_seconds(
    tmp_path: Path, kind: str, version: Version
) -> None:
    with Cluster(version, v2=kind == "v2", folder=tmp_path) as cluster:
        with opened(kind, *cluster.endpoints) as store:
            store.create("/back/a", b"v", ttl=None)
            cluster.kill(0)
            until(lambda: _away(store), what="the outage is noticed")
            cluster.restart(0)
            begin = time.monotonic()
            until(lambda: not _away(store), what="it is used again")
            assert time.monotonic() - begin < 3 + SLACK


def _away(store: Store) -> bool:
    try:
        store.get("/back/a")
    except RegistryUnreachable:
        return True
    return False

"""Endpoints from SRV records, asked of a name server of our own on loopback, and of liars."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotFound, RegistryUnreachable, UsageError
from flanctl.registry.stores import srv
from tests.support.cli import flanctl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class NameServer:
    """Answers each question with `answer(request, over TCP)`; None says nothing."""

    def __init__(self, answer: Callable[[bytes, bool], bytes | None]) -> None:
        self.answer = answer
        self.questions: list[tuple[bytes, bool]] = []
        self.udp, self.tcp = _one_port()
        self.port = self.udp.getsockname()[1]
        self._threads = [threading.Thread(target=work) for work in (self._datagrams, self._streams)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self.tcp.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        self.udp.close()
        self.tcp.close()

    def _datagrams(self) -> None:
        while True:
            request, where = self.udp.recvfrom(65535)
            if not request:
                return
            self.questions.append((request, False))
            if (said := self.answer(request, False)) is not None:
                self.udp.sendto(said, where)

    def _streams(self) -> None:
        while True:
            try:
                link, _ = self.tcp.accept()
            except OSError:
                return
            with link:
                request = link.recv(65535)[2:]
                self.questions.append((request, True))
                if (said := self.answer(request, True)) is not None:
                    link.sendall(struct.pack("!H", len(said)) + said)


def _one_port() -> tuple[socket.socket, socket.socket]:
    """A port that is free in UDP may be taken in TCP: then another."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        try:
            return udp, socket.create_server(udp.getsockname())
        except OSError:
            udp.close()


def wire(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def record(
    *, priority: int = 0, weight: int = 0, port: int = 2379, host: str, owner: bytes = b"\xc0\x0c"
) -> bytes:
    data = struct.pack("!HHH", priority, weight, port) + (wire(host) if host else b"\0")
    return owner + struct.pack("!HHIH", 33, 1, 60, len(data)) + data


def reply(request: bytes, *records: bytes, code: int = 0, cut: bool = False) -> bytes:
    flags = 0x8180 | code | (0x0200 if cut else 0)
    return (
        request[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0) + request[12:] + b"".join(records)
    )


def only(service: str, *records: bytes) -> Callable[[bytes, bool], bytes]:
    """Those records for one service, and no such name for the other."""

    def answer(request: bytes, _: bool) -> bytes:
        if wire(service)[:-1] in request:
            return reply(request, *records)
        return reply(request, code=3)

    return answer


@pytest.fixture
def resolv(tmp_path: Path) -> str:
    path = tmp_path / "resolv.conf"
    path.write_text("# ours\nnameserver nonsense\nnameserver 127.0.0.1\noptions edns0\n")
    return str(path)


PLAIN, SECURE = "_etcd-client._tcp", "_etcd-client-ssl._tcp"


def test_records_become_endpoints_by_priority(resolv: str) -> None:
    records = (record(priority=20, host="c.lan"), record(priority=10, port=4001, host="a.lan"))
    with NameServer(only(PLAIN, *records)) as server:
        found = srv.discover("lan.example.", timeout=5, resolv_conf=resolv, port=server.port)
    assert found == ["http://a.lan:4001", "http://c.lan:2379"]


def test_those_with_tls_come_first_and_equals_are_spread(resolv: str) -> None:
    hosts = {f"https://{name}.lan:2379" for name in "abc"}

    def answer(request: bytes, _: bool) -> bytes:
        if wire(SECURE)[:-1] in request:
            return reply(request, *(record(host=f"{name}.lan") for name in "abc"))
        return reply(request, record(host="plain.lan"))

    with NameServer(answer) as server:
        orders = {
            tuple(srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port)) for _ in range(60)
        }
    assert all(set(order[:3]) == hosts and order[3] == "http://plain.lan:2379" for order in orders)
    assert len(orders) > 1


def test_an_answer_that_is_cut_is_asked_for_by_tcp(resolv: str) -> None:
    records = [record(host=f"etcd-{number}.lan") for number in range(40)]

    def answer(request: bytes, tcp: bool) -> bytes:
        if wire(PLAIN)[:-1] not in request:
            return reply(request)
        return reply(request, *records) if tcp else reply(request, cut=True)

    with NameServer(answer) as server:
        found = srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port)
        assert len(found) == 40
        assert [tcp for _, tcp in server.questions] == [False, False, True]


def test_a_lost_datagram_is_sent_again_and_a_strangers_answer_passed_over(
    resolv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(srv, "TRY_SECONDS", 0.2)
    said = [0]

    def answer(request: bytes, _: bool) -> bytes | None:
        said[0] += 1
        if said[0] == 1:
            return b"\0\0" + reply(request, record(host="evil.lan"))[2:] if request[:2] != b"\0\0" else None
        return reply(request, record(host="a.lan"))

    with NameServer(answer) as server:
        found = srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port)
    assert found == ["https://a.lan:2379", "http://a.lan:2379"]


def test_a_domain_without_them_is_said(resolv: str) -> None:
    with NameServer(lambda request, _: reply(request, code=3)) as server:
        with pytest.raises(NotFound, match=r"DNS names no etcd in x\.lan") as caught:
            srv.discover("x.lan", timeout=5, resolv_conf=resolv, port=server.port)
    assert caught.value.hint is not None


def test_a_record_that_says_there_is_none_is_none(resolv: str) -> None:
    with NameServer(only(PLAIN, record(host=""), record(port=0, host="a.lan"))) as server:
        with pytest.raises(NotFound):
            srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port)


def test_a_silent_name_server_costs_no_more_than_the_timeout(resolv: str) -> None:
    begin = time.monotonic()
    with NameServer(lambda *_: None) as server:
        with pytest.raises(RegistryUnreachable, match="no name server answered") as caught:
            srv.discover("x", timeout=0.5, resolv_conf=resolv, port=server.port)
    assert time.monotonic() - begin < 2
    assert caught.value.details == ("127.0.0.1   no answer",)


CIRCLE = b"\xc0\x0c"


@pytest.mark.parametrize(
    "broken",
    [
        lambda request: request,
        lambda request: request[:2],
        lambda request: reply(request, code=2),
        lambda request: reply(request)[:-3],
        lambda request: reply(request, record(host="a.lan")[:-2]),
        lambda request: reply(request, record(host="a.lan", owner=b"\xc0\xff")),
        lambda request: request[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + b"\xc0\x0c" + request[-4:],
        lambda request: request[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + wire("other.lan") + request[-4:],
        lambda request: reply(request, record(host="a b.lan")),
        lambda request: reply(request, record(host="a\nb.lan")),
    ],
)
def test_nonsense_is_no_answer(resolv: str, broken: Callable[[bytes], bytes]) -> None:
    with NameServer(lambda request, _: broken(request)) as server:
        with pytest.raises(Invalid, match="no name server gives a good answer"):
            srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port)


def test_somebody_elses_records_in_the_answer_are_not_believed(resolv: str) -> None:
    stray = record(host="evil.lan", owner=wire("elsewhere.lan"))
    with NameServer(only(PLAIN, stray, record(host="a.lan"))) as server:
        assert srv.discover("x", timeout=5, resolv_conf=resolv, port=server.port) == ["http://a.lan:2379"]


@given(st.binary(max_size=200), st.integers(0, 11))
def test_any_bytes_are_an_answer_or_an_error_soon(noise: bytes, kept: int) -> None:
    request = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + wire("_etcd-client._tcp.x") + b"\0\x21\0\1"
    good = reply(request, record(host="a.lan"))
    for answer in (noise, good[: 12 + kept] + noise, good + noise):
        try:
            assert len(srv.parse_answer(answer, request)) <= srv.MAX_TARGETS
        except ValueError:
            pass


@pytest.mark.parametrize("domain", ["", ".", "a..b", "ü.lan", "x" * 64, ".".join(["abcdefgh"] * 40)])
def test_what_is_no_domain_is_a_usage_error(domain: str) -> None:
    with pytest.raises(UsageError, match="is not a domain"):
        srv.discover(domain, timeout=1)


def test_commands_take_it_and_not_together_with_endpoints() -> None:
    both = flanctl("subnets", "ls", "--discovery-srv", "lan", "--endpoints", "http://127.0.0.1:1")
    assert (both.code, "exclude each other" in both.err) == (2, True)
    bad = flanctl("subnets", "ls", "--discovery-srv", "a..b")
    assert (bad.code, "is not a domain" in bad.err) == (2, True)


def test_every_error_is_ours(resolv: str) -> None:
    """Also where nobody listens at all."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with pytest.raises(FlanctlError) as caught:
        srv.discover("x", timeout=1, resolv_conf=resolv, port=port)
    assert caught.value.exit_code == 3

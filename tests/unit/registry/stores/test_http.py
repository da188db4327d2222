"""The transport against servers that answer well, badly, late, or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import http, http_connection, tls
from flanctl.registry.stores.endpoints import Endpoint
from tests.unit.registry.stores.pki import make_pki, needs_openssl, server_context
from tests.unit.registry.stores.scripted import Request, Scripted, closed_port, ok

if TYPE_CHECKING:
    from pathlib import Path


def at(*ports: int, scheme: str = "http") -> tuple[Endpoint, ...]:
    return tuple(Endpoint(scheme, "127.0.0.1", port) for port in ports)


def ask(*ports: int, timeout: float = 5.0, scheme: str = "http", **files: str) -> http.Answer:
    transport = http.Transport(at(*ports, scheme=scheme), timeout=timeout, **files)
    try:
        return transport.request("POST", "/x", b"{}")
    finally:
        transport.close()


def fails(*ports: int, timeout: float = 5.0, scheme: str = "http", **files: str) -> FlanctlError:
    with pytest.raises(FlanctlError) as caught:
        ask(*ports, timeout=timeout, scheme=scheme, **files)
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\n0\nTrailer: x\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
    ],
)
def test_each_way_a_body_may_be_framed(raw: bytes) -> None:
    with Scripted(lambda _: raw, close=True) as server:
        answer = ask(server.port)
    assert (answer.status, answer.body) == (200, b"hello")


def test_connections_are_kept_and_used_again() -> None:
    with Scripted(lambda request: ok(request.body)) as server:
        transport = http.Transport(at(server.port), timeout=5)
        for _ in range(5):
            assert transport.request("POST", "/x", b"{}").body == b"{}"
        transport.close()
        assert server.connections == 1


def test_a_connection_the_server_closed_while_idle_is_replaced_and_the_answer_is_unsure() -> None:
    with Scripted(lambda _: ok(b"1"), close=True) as server:
        transport = http.Transport(at(server.port), timeout=5)
        assert not transport.request("POST", "/x").unsure
        assert transport.request("POST", "/x").unsure
        transport.close()
        assert server.connections == 2


def test_several_threads_each_have_a_connection() -> None:
    together = threading.Barrier(3)

    def answer(request: Request) -> bytes:
        together.wait(5)
        return ok(request.path.encode())

    with Scripted(answer) as server:
        transport = http.Transport(at(server.port), timeout=5)
        bodies: list[bytes] = []
        threads = [
            threading.Thread(target=lambda i=i: bodies.append(transport.request("GET", f"/{i}").body))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        transport.close()
    assert sorted(bodies) == [b"/0", b"/1", b"/2"]


def test_the_endpoint_that_answered_last_is_asked_first() -> None:
    with Scripted(lambda _: ok(b"up")) as server:
        endpoints = at(closed_port(), server.port)
        transport = http.Transport(endpoints, timeout=5)
        assert transport.request("GET", "/x").endpoint == endpoints[1]
        assert transport.good == endpoints[1]
        transport.close()


def test_a_hung_member_takes_its_share_of_the_time_and_no_more() -> None:
    with Scripted(lambda _: (hung.ended.wait(10), None)[1]) as hung, Scripted(lambda _: ok(b"up")) as server:
        begin = time.monotonic()
        answer = ask(hung.port, server.port, timeout=1.0)
        assert 0.4 < time.monotonic() - begin < 0.95
    assert answer.unsure


def test_nobody_listening_is_said_at_once_for_each_endpoint() -> None:
    ports = closed_port(), closed_port()
    begin = time.monotonic()
    error = fails(*ports)
    assert time.monotonic() - begin < 1
    assert isinstance(error, http.Unreachable)
    assert (error.exit_code, error.unsure) == (3, False)
    assert error.message == "none of 2 endpoints answered"
    assert error.details == tuple(f"http://127.0.0.1:{port}   connection refused" for port in ports)


def test_when_all_are_silent_the_error_comes_at_the_deadline() -> None:
    with Scripted(lambda _: (server.ended.wait(10), None)[1]) as server:
        begin = time.monotonic()
        error = fails(server.port, server.port, timeout=0.5)
        assert 0.4 < time.monotonic() - begin < 1.0
    assert error.message == "none of 2 endpoints answered in 0.5s"
    assert isinstance(error, http.Unreachable)
    assert error.unsure


def test_a_server_that_drips_cannot_hold_a_request_beyond_the_deadline() -> None:
    stop = threading.Event()

    def answer(_: Request) -> None:
        link = server._links[-1]
        link.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not stop.wait(0.05):
            link.sendall(b"x")

    with Scripted(answer) as server:
        begin = time.monotonic()
        error = fails(server.port, timeout=0.4)
        assert time.monotonic() - begin < 0.8
        stop.set()
    assert "no answer in 0.4s" in error.details[0]


def test_a_last_short_try_does_not_hide_what_was_said_before() -> None:
    """Later rounds have less and less time: "no answer in 0.0s" would tell nobody anything."""

    def hang(_: Request) -> None:
        server.ended.wait(5)

    with Scripted(hang) as server:
        silent, refused = fails(server.port, closed_port(), timeout=0.8).details
    assert "no answer in 0.4s" in silent
    assert "connection refused" in refused


def test_a_refusal_of_the_judge_goes_to_the_next_endpoint_and_round_again_while_it_may_pass() -> None:
    asked = 0

    def judge(_: http.Answer) -> None:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise http.Refusal("no leader", again=True, unsure=True)

    with Scripted(lambda _: ok()) as one, Scripted(lambda _: ok()) as two:
        transport = http.Transport(at(one.port, two.port), timeout=5)
        answer = transport.request("POST", "/x", judge=judge)
        transport.close()
        assert (len(one.requests), len(two.requests), answer.unsure) == (2, 2, True)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"220 mail ESMTP\r\n\r\n", "answers, but not in HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "speaks TLS: write https://"),
        (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00@\x00", "speaks only HTTP/2 (gRPC)"),
        (b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n", "speaks TLS"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "answers, but not in HTTP"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "answers, but not in HTTP"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "answers, but not in HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broken chunks"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n", "broken chunks"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "breaks off its answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "answers, but not in HTTP"),
        (b"", "closed the connection without an answer"),
    ],
)
def test_what_is_not_our_http_is_said(raw: bytes, reason: str) -> None:
    with Scripted(lambda _: raw, close=True) as server:
        assert reason in fails(server.port).details[0]


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail))
)
def test_any_bytes_are_an_answer_or_our_error(raw: bytes) -> None:
    with Scripted(lambda _: raw, close=True) as server:
        try:
            ask(server.port, timeout=1)
        except FlanctlError:
            pass


def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY", 1000)
    with Scripted(lambda _: ok(b"x" * 1001)) as server:
        assert "answers with more than" in fails(server.port).details[0]


def test_a_name_that_does_not_resolve_is_said() -> None:
    transport = http.Transport([Endpoint("http", "no-such-host.invalid", 1)], timeout=5)
    with pytest.raises(http.Unreachable) as caught:
        transport.request("GET", "/")
    assert "does not resolve" in caught.value.details[0] or "in time" in caught.value.details[0]


def test_a_proxy_in_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    with Scripted(lambda _: ok(b"direct")) as server:
        assert ask(server.port).body == b"direct"


def test_a_stream_is_read_piece_by_piece_goes_on_after_a_timeout_and_ends_when_cancelled() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\none\n\r\n4\r\ntw"
    wake = os.eventfd(0)
    with Scripted(lambda _: head) as server:
        transport = http.Transport(at(server.port), timeout=5)
        stream = transport.stream(
            at(server.port)[0], "POST", "/w", b"{}", {}, deadline=time.monotonic() + 5, cancel=wake
        )
        try:
            text = b""
            while text != b"one\ntw":
                text += stream.piece(time.monotonic() + 5)
            with pytest.raises(TimeoutError):
                stream.piece(time.monotonic() + 0.05)
            server._links[-1].sendall(b"o\n\r\n")
            assert stream.piece(time.monotonic() + 5) == b"o\n"
            timer = threading.Timer(0.1, os.eventfd_write, (wake, 1))
            timer.start()
            begin = time.monotonic()
            with pytest.raises(http.Cancelled):
                stream.piece(time.monotonic() + 5)
            assert time.monotonic() - begin < 1
            timer.join()
        finally:
            stream.close()
            transport.close()
            os.close(wake)


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


@needs_openssl
def test_tls_with_the_users_ca_and_a_client_certificate(pki: Path) -> None:
    with Scripted(lambda _: ok(b"x" * 100_000), tls=server_context(pki, ask_client=True)) as server:
        ca, cert, key = (str(pki / name) for name in ("ca.pem", "good.pem", "good.key"))
        answer = ask(server.port, scheme="https", cacert=ca, cert=cert, key=key)
    assert len(answer.body) == 100_000


@needs_openssl
def test_a_missing_client_certificate_is_not_permitted(pki: Path) -> None:
    with Scripted(lambda _: ok(), tls=server_context(pki, ask_client=True)) as server:
        error = fails(server.port, scheme="https", cacert=str(pki / "ca.pem"))
    assert isinstance(error, NotPermitted)
    assert "certificate required" in error.details[0]


@needs_openssl
def test_a_server_we_do_not_trust_is_said(pki: Path) -> None:
    with Scripted(lambda _: ok(), tls=server_context(pki)) as server:
        assert "not trusted" in fails(server.port, scheme="https").details[0]
    with Scripted(lambda _: ok(), tls=server_context(pki, "old")) as server:
        error = fails(server.port, scheme="https", cacert=str(pki / "ca.pem"))
        yesterday = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 86400))
        assert f"its certificate expired {yesterday}" in error.details[0]
    with Scripted(lambda _: ok(), tls=server_context(pki)) as server:
        transport = http.Transport(
            [Endpoint("https", "localhost", server.port)], timeout=2, cacert=str(pki / "ca.pem")
        )
        with contextlib.closing(transport), pytest.raises(RegistryUnreachable) as caught:
            transport.request("GET", "/")
        assert "its certificate is for 127.0.0.1, not for localhost" in caught.value.details[0]


@needs_openssl
def test_plain_and_tls_mixed_up_are_said(pki: Path) -> None:
    with Scripted(lambda _: ok(), tls=server_context(pki)) as server:
        assert f"speaks TLS: write https://127.0.0.1:{server.port}" in fails(server.port).details[0]
    with Scripted(lambda _: ok()) as server:
        begin = time.monotonic()
        error = fails(server.port, scheme="https", timeout=0.5)
        assert time.monotonic() - begin < 1
        assert "TLS" in error.details[0]


@needs_openssl
def test_files_that_are_no_good_are_named(pki: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    good, key = str(pki / "good.pem"), str(pki / "good.key")
    cases: list[tuple[type[FlanctlError], str, tuple[str | None, str | None, str | None]]] = [
        (NotFound, "no such file: /nonexistent/ca", ("/nonexistent/ca", None, None)),
        (Invalid, f"{empty} holds no CA", (str(empty), None, None)),
        (Invalid, f"{tmp_path} is a directory", (str(tmp_path), None, None)),
        (Invalid, "a key without its certificate", (None, None, key)),
        (Invalid, "are not a certificate and its key", (None, str(empty), key)),
        (Invalid, "is not the key of", (None, good, str(pki / "ca.key"))),
        (Invalid, "is encrypted", (None, good, str(pki / "locked.key"))),
    ]
    for kind, words, files in cases:
        with pytest.raises(kind) as caught:
            tls.tls_context(*files)
        assert words in caught.value.message


def test_nothing_heavy_is_imported_without_https() -> None:
    code = (
        "import sys, flanctl.registry.stores.etcd_gateway as g, flanctl.registry.stores.endpoints as e\n"
        "try: g.EtcdGatewayStore(e.parse_endpoints(['[::1]:1', '127.0.0.1:1'])).get('/a')\n"
        "except Exception as error: print(error)\n"
        "print([m for m in ('ssl', 'grpc', 'etcd3', 'asyncio', 'logging', 'http.client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["cannot read /a: none of 2 endpoints answered", "[]"], done.stderr


def test_a_name_with_several_addresses_is_served_by_one_that_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes connections and hangs, as a stopped process does; calls after that go straight to the other."""
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.2", 0)) as hung:
        port = hung.getsockname()[1]
        with Scripted(lambda _: ok(b"fine"), port=port) as server:
            assert server.port == port
            found = [
                (int(socket.AF_INET), ("127.0.0.2", port)),
                (int(socket.AF_INET), ("127.0.0.1", port)),
            ]
            monkeypatch.setattr(http_connection, "_look_up", lambda *_: found)
            transport = http.Transport([Endpoint("http", "etcd.lan", port)], timeout=5)
            with contextlib.closing(transport):
                begin = time.monotonic()
                assert transport.request("GET", "/").body == b"fine"
                assert time.monotonic() - begin < 2
                begin = time.monotonic()
                assert transport.request("GET", "/").body == b"fine"
                assert time.monotonic() - begin < 0.25


def test_an_answer_without_end_that_never_lets_one_wait_ends_at_the_deadline() -> None:
    """Chunks of four bytes, faster than they are read: the time-out must not need a pause of the server's."""
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = itertools.repeat(b"4\r\n    \r\n" * 500)
    with Scripted(lambda _: itertools.chain([start], pieces)) as server:
        began = time.monotonic()
        assert "no answer in" in "".join(fails(server.port, timeout=0.2).details)
        assert time.monotonic() - began < 20

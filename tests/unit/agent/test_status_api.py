"""The status API over real sockets: it answers, and whoever wants to harm it harms only himself."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import threading
import time
from contextlib import closing, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flanctl.agent.status_api as module
from flanctl.agent.status_api import CONNECTIONS, HEAD, Answer, StatusApi, bound, parse
from tests.support.deadline import until

BODIES = {"/healthz": Answer(200, "ok\n"), "/large": Answer(200, "x" * 4_000_000)}


def answer(path):
    if path == "/bug":
        raise ZeroDivisionError("seven")
    return BODIES.get(path, Answer(404, "no\n"))


@contextmanager
def serving(folder, *, port=None, trouble=lambda _: None, **more):
    api = StatusApi(
        answer,
        socket_path=folder / "agent.sock",
        address=None if port is None else ("127.0.0.1", port),
        trouble=trouble,
        **more,
    )
    api.open()
    thread = threading.Thread(target=api.run, name="status api")
    thread.start()
    try:
        yield api
    finally:
        api.stop()
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    with serving(folder):
        yield folder / "agent.sock"


def connect(path):
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.settimeout(10)

    def taken():
        try:
            channel.connect(str(path))
        except BlockingIOError:  # the kernel's queue is full for a moment
            return False
        return True

    try:
        until(taken)
    except BaseException:
        channel.close()
        raise
    return channel


def ask(path, request=b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
    """Everything that comes until the server closes."""
    with closing(connect(path)) as channel:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.sendall(request)
        return read(channel)


def read(channel):
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := channel.recv(65536):
            parts.append(part)
    return b"".join(parts)


def code(reply):
    return int(reply.split()[1])


def free_port():
    with closing(bound("127.0.0.1", 0)) as channel:
        return channel.getsockname()[1]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_and_the_connection_ends(socket_path):
    assert ask(socket_path) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 3\r\n"
        b"Cache-Control: no-store\r\nConnection: close\r\n\r\nok\n"
    )


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        (b"GET /healthz HTTP/1.0", 200),
        (b"GET /healthz?verbose=1 HTTP/1.1", 200),
        (b"GET http://node1:8080/healthz HTTP/1.1", 200),
        (b"GET /nothing HTTP/1.1", 404),
        (b"GET /../etc/passwd HTTP/1.1", 404),
        (b"POST /healthz HTTP/1.1", 405),
        (b"get /healthz HTTP/1.1", 400),
        (b"GET /healthz", 400),
        (b"GET /healthz HTTP/2.0", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"", 400),
        (b"GET /bug HTTP/1.1", 500),
    ],
)
def test_request_lines(socket_path, request_line, expected):
    assert code(ask(socket_path, request_line + b"\r\n\r\n")) == expected


def test_line_ends_without_a_carriage_return_do(socket_path):
    assert code(ask(socket_path, b"GET /healthz HTTP/1.1\nHost: x\n\n")) == 200


def test_HEAD_has_the_lengths_and_no_body(socket_path):
    reply = ask(socket_path, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert b"Content-Length: 3\r\n" in reply
    assert reply.endswith(b"\r\n\r\n")


def test_a_refused_method_says_which_are_not(socket_path):
    assert b"\r\nAllow: GET, HEAD\r\n" in ask(socket_path, b"DELETE / HTTP/1.1\r\n\r\n")


def test_a_body_is_not_read_and_does_not_cost_the_answer(socket_path):
    reply = ask(socket_path, b"GET /healthz HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000)
    assert code(reply) == 200


def test_a_request_may_come_in_single_bytes(socket_path):
    with closing(connect(socket_path)) as channel:
        for byte in b"GET /healthz HTTP/1.1\r\n\r\n":
            channel.sendall(bytes([byte]))
        assert code(read(channel)) == 200


def test_who_closes_his_side_early_still_gets_his_answer(socket_path):
    with closing(connect(socket_path)) as channel:
        channel.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        channel.shutdown(socket.SHUT_WR)
        assert code(read(channel)) == 200


def test_an_answer_larger_than_any_buffer_arrives_whole(socket_path):
    assert len(ask(socket_path, b"GET /large HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2]) == 4_000_000


# ---- hostile --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300), st.binary(max_size=64).map(lambda b: b"GET /" + b + b" HTTP/1.1\r\n\r\n")
    )
)
def test_garbage_is_answered_or_dropped_and_the_next_one_is_served(socket_path, garbage):
    with closing(connect(socket_path)) as channel:
        channel.sendall(garbage)
        channel.shutdown(socket.SHUT_WR)
        reply = read(channel)
    assert reply == b"" or code(reply) in {200, 400, 404, 405, 500, 505}
    assert code(ask(socket_path)) == 200


@given(st.binary(max_size=400))
def test_parse_answers_every_bytes_with_a_path_or_a_refusal(head):
    found = parse(head)
    if isinstance(found, Answer):
        assert 400 <= found.status <= 505
    else:
        method, path = found
        assert method.isascii()
        assert "?" not in path
        assert "\n" not in path


@pytest.mark.parametrize("size", [HEAD + 1, 50 * HEAD])
def test_headers_without_end_are_refused_at_a_bound(socket_path, size):
    reply = ask(socket_path, b"GET /healthz HTTP/1.1\r\nX: " + b"a" * size)
    assert code(reply) == 431


def test_a_slow_request_ends_after_its_time_and_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIFE", 0.6)
    with serving(tmp_path), closing(connect(tmp_path / "agent.sock")) as slow:
        began = time.monotonic()
        slow.sendall(b"GET /healthz HT")
        assert code(ask(tmp_path / "agent.sock")) == 200
        assert code(read(slow)) == 408
        assert 0.4 < time.monotonic() - began < 5


def test_a_drip_does_not_lengthen_a_connections_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIFE", 0.6)
    with serving(tmp_path), closing(connect(tmp_path / "agent.sock")) as slow:
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() - began < 10:
                slow.sendall(b"X")
                time.sleep(0.02)
        assert time.monotonic() - began < 5


def test_who_does_not_read_his_answer_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIFE", 0.6)
    with serving(tmp_path) as api, closing(connect(tmp_path / "agent.sock")) as deaf:
        deaf.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        until(lambda: len(api._clients) == 1)
        until(lambda: len(api._clients) == 0, seconds=5)
        assert len(read(deaf)) < 4_000_000


def test_idle_connections_lock_nobody_out_and_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RATE", 10_000)
    with serving(tmp_path) as api:
        idle = []
        try:
            idle += [connect(tmp_path / "agent.sock") for _ in range(3 * CONNECTIONS)]
            for _ in range(5):
                assert code(ask(tmp_path / "agent.sock")) == 200
            assert len(api._clients) <= CONNECTIONS
            assert read(idle[0]) == b"", "the oldest gave way"
        finally:
            for channel in idle:
                channel.close()


def test_a_flood_is_served_at_a_bounded_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RATE", 5)
    with serving(tmp_path):
        began = time.monotonic()
        for _ in range(21):
            assert code(ask(tmp_path / "agent.sock")) == 200
        assert time.monotonic() - began > 2.5


def test_without_descriptors_it_waits_and_goes_on(tmp_path):
    """accept fails with EMFILE; the loop must not spin, and serve again once there are some."""
    with serving(tmp_path):
        channels = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
        was = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(channel.fileno() for channel in channels)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, was[1]))
        fillers = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            channels[0].settimeout(10)
            channels[0].connect(str(tmp_path / "agent.sock"))
            channels[0].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            before = time.thread_time(), time.process_time()
            time.sleep(0.3)
            assert time.process_time() - before[1] < 0.25, "it spins"
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, was)
        assert code(read(channels[0])) == 200
        for channel in channels:
            channel.close()


# ---- sockets --------------------------------------------------------------------------------------------------------


def test_the_socket_is_its_owners_alone_and_goes_at_the_end(tmp_path):
    with serving(tmp_path):
        assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_a_dead_agents_socket_is_replaced(tmp_path):
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "agent.sock"))
    with serving(tmp_path):
        assert code(ask(tmp_path / "agent.sock")) == 200


def test_a_successors_socket_is_left_alone(tmp_path):
    with serving(tmp_path):
        (tmp_path / "agent.sock").unlink()
        (tmp_path / "agent.sock").write_text("another's")
    assert (tmp_path / "agent.sock").read_text() == "another's"


def test_a_run_directory_may_have_any_length(tmp_path):
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    with serving(folder):
        assert (folder / "agent.sock").is_socket()


def test_without_the_directory_opening_fails_and_leaves_nothing_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    api = StatusApi(answer, socket_path=tmp_path / "no" / "agent.sock")
    with pytest.raises(FileNotFoundError):
        api.open()
    api.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_port_answers_too(tmp_path):
    port = free_port()
    with serving(tmp_path, port=port), closing(socket.create_connection(("127.0.0.1", port), 5)) as channel:
        channel.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert code(read(channel)) == 200


def test_a_taken_port_is_said_waited_for_and_then_served(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY", 0.1)
    said = []
    holder = bound("127.0.0.1", 0)
    holder.listen(1)
    port = holder.getsockname()[1]
    with closing(holder), serving(tmp_path, port=port, trouble=said.append):
        assert said == [f"cannot listen on 127.0.0.1:{port}: Address already in use"]
        assert code(ask(tmp_path / "agent.sock")) == 200
        holder.close()
        until(lambda: said[-1] is None)
        with closing(socket.create_connection(("127.0.0.1", port), 5)) as channel:
            channel.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert code(read(channel)) == 200


def test_stopping_ends_open_connections_at_once_and_twice_is_fine(tmp_path):
    with serving(tmp_path) as api:
        channel = connect(tmp_path / "agent.sock")
        channel.sendall(b"GET")
        until(lambda: len(api._clients) == 1)
        api.stop()
        assert read(channel) == b""
        channel.close()
    api.stop()

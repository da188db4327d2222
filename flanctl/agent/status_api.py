"""Answers about the agent: HTTP/1.1 on a unix socket (root only) and, if asked for, on a TCP port.

    api = StatusApi(answer, socket_path=run_dir / "agent.sock", address=("0.0.0.0", 8080))
    api.open()                                  # unix socket; Conflict and the like never: what fails is said
    crew.start("status api", api.run, api.stop)

One thread, non-blocking sockets, nothing kept of a request but its first lines. Whoever talks to it can cost no more
than a bounded share of it: HEAD bytes of request, LIFE seconds of a connection's life, CONNECTIONS at once (a new
one takes the oldest one's place, so that slow clients cannot lock a quick one out), RATE answers a second and
listener. Each answer ends its connection: a scraper comes every 15 s and keep-alive would only be one more state.
Why not http.server: docs/decisions/0009-own-status-server.md.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD = 8192
"""Bytes of request line and headers; a scraper sends 300."""
LIFE = 5.0
"""Seconds from accepting to closing a connection, whatever the client does."""
LINGER = 1.0
"""Seconds in which a client may take its answer in and close; closing first with unread bytes would reset it."""
CONNECTIONS = 64
RATE = 50
"""Connections a second that one listener takes; the rest wait in the kernel's queue."""
RETRY = 5.0
"""Seconds between two tries to get a TCP port that somebody else has."""

_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (\S{1,4096}) HTTP/1\.[0-9]", re.ASCII)
_END = re.compile(rb"\r?\n\r?\n")
_STATUS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What to send. `kind` is the content type."""

    status: int
    body: str
    kind: str = "text/plain; charset=utf-8"


def parse(head: bytes) -> tuple[str, str] | Answer:
    """Method and path (without query) of a request's first lines, or the refusal."""
    line = re.split(rb"\r?\n", head, maxsplit=1)[0]
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        if re.fullmatch(rb"\S+ \S+ HTTP/(?!1\.)\d+\.\d+", line):
            return Answer(505, "HTTP/1.1, please\n")
        return Answer(400, "this is not HTTP/1.1\n")
    target = found[2].decode("ascii", "replace")
    if "://" in target.partition("?")[0]:  # absolute form, which RFC 9112 3.2.2 wants taken
        target = "/" + target.partition("://")[2].partition("/")[2]
    return found[1].decode(), target.partition("?")[0]


def format_answer(answer: Answer, *, with_body: bool = True) -> bytes:
    body = answer.body.encode("utf-8", "backslashreplace")
    allow = "Allow: GET, HEAD\r\n" if answer.status == 405 else ""
    head = (
        f"HTTP/1.1 {answer.status} {_STATUS[answer.status]}\r\nContent-Type: {answer.kind}\r\n"
        f"Content-Length: {len(body)}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")


class _Client:
    """One connection: it reads its request, writes its answer, waits for the other side to close."""

    def __init__(self, channel: socket.socket, now: float) -> None:
        self.channel = channel
        self.ends = now + LIFE
        self.head = b""
        self.out = memoryview(b"")
        self.answered = False


class _Listener:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.second = 0
        self.taken = 0


class StatusApi:
    """See above. `answer` maps a path to an Answer; it is called from the API's thread and must not block."""

    def __init__(
        self,
        answer: Callable[[str], Answer],
        *,
        socket_path: Path,
        address: tuple[str, int] | None = None,
        trouble: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self._answer = answer
        self._path = socket_path
        self._address = address
        self._trouble = trouble
        """Told why the TCP port cannot be had, and None once it can."""
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._clients: deque[_Client] = deque()
        self._listeners: list[_Listener] = []
        self._resting: dict[_Listener, float] = {}
        self._retry_at: float | None = None
        self._inode: int | None = None

    # ---- opening: in the caller's thread, so that the answer to "is it there?" is known -----------------------------

    def open(self) -> None:
        """Listen. Raises OSError if the unix socket cannot be made; a TCP port that is taken is tried again later.

        Call it while the run directory's lock is held: a socket that lies there is then a dead agent's.
        """
        channel = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            # Linux gives the file the mode the socket has when it is bound (af_unix.c, unix_bind_bsd): never, not
            # even for an instant, can others connect.
            os.fchmod(channel.fileno(), 0o600)
            folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # By way of the descriptor, because an address holds 107 bytes and a run directory may be longer.
                short = f"/proc/self/fd/{folder}/{self._path.name}"
                try:
                    os.unlink(self._path.name, dir_fd=folder)
                except FileNotFoundError:
                    pass
                channel.bind(short)
                self._inode = os.stat(self._path.name, dir_fd=folder).st_ino
            finally:
                os.close(folder)
            channel.listen(64)
        except BaseException:
            channel.close()
            raise
        self._listen(channel)
        if self._address is not None:
            self._open_port()

    def _open_port(self) -> None:
        host, port = self._address or ("", 0)
        try:
            channel = bound(host, port)
        except OSError as error:
            self._trouble(f"cannot listen on {host}:{port}: {error.strerror}")
            self._retry_at = time.monotonic() + RETRY
            return
        channel.listen(64)
        self._trouble(None)
        self._retry_at = None
        self._listen(channel)

    def _listen(self, channel: socket.socket) -> None:
        listener = _Listener(channel)
        self._listeners.append(listener)
        self._selector.register(channel, selectors.EVENT_READ, listener)

    # ---- the worker -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`. One client's trouble is that client's end."""
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._patience()):
                    if isinstance(key.data, _Listener):
                        self._accept(key.data)
                    elif isinstance(key.data, _Client):
                        self._serve(key.data)
                self._look_at_the_clock()
        finally:
            self.close()

    def stop(self) -> None:
        """`run` returns soon; any thread, twice is fine."""
        self._stopping = True
        try:
            os.eventfd_write(self._bell, 1)
        except (OSError, ValueError):
            pass  # it has ended already

    def _patience(self) -> float | None:
        times = [*self._resting.values(), *([self._retry_at] if self._retry_at is not None else [])]
        if self._clients:
            times.append(min(client.ends for client in self._clients))
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for client in [client for client in self._clients if client.ends <= now]:
            if not client.answered:
                self._send(client, Answer(408, "the request took too long\n"))
            self._drop(client)
        for listener in [listener for listener, until in self._resting.items() if until <= now]:
            del self._resting[listener]
            self._selector.register(listener.channel, selectors.EVENT_READ, listener)
        if self._retry_at is not None and self._retry_at <= now:
            self._open_port()

    def _rest(self, listener: _Listener, seconds: float) -> None:
        self._selector.unregister(listener.channel)
        self._resting[listener] = time.monotonic() + seconds

    def _accept(self, listener: _Listener) -> None:
        now = time.monotonic()
        if int(now) != listener.second:
            listener.second, listener.taken = int(now), 0
        if listener.taken >= RATE:
            self._rest(listener, 1.0 - now % 1.0)
            return
        try:
            channel, _ = listener.channel.accept()
        except OSError as error:
            # Out of descriptors or memory: looking again at once would spin. The rest is the client's own change of
            # mind (accept(2)).
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                self._rest(listener, 1.0)
            return
        listener.taken += 1
        client = _Client(channel, now)
        try:
            channel.setblocking(False)
            self._selector.register(channel, selectors.EVENT_READ, client)
        except OSError:  # the kernel has no memory for it
            channel.close()
            self._rest(listener, 1.0)
            return
        if len(self._clients) >= CONNECTIONS:
            self._drop(self._clients[0])
        self._clients.append(client)
        self._serve(client)

    def _serve(self, client: _Client) -> None:
        if client.channel.fileno() < 0:
            return  # dropped by an earlier event of the same round
        try:
            if client.out:
                self._write(client)
            elif client.answered:
                if client.channel.recv(65536) == b"":
                    self._drop(client)
            else:
                self._read(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _read(self, client: _Client) -> None:
        more = client.channel.recv(HEAD + 1 - len(client.head))
        client.head += more
        end = _END.search(client.head)
        if end is not None and end.start() <= HEAD:
            self._reply(client, client.head[: end.start()])
        elif len(client.head) > HEAD:
            self._send(client, Answer(431, f"a request has at most {HEAD} bytes here\n"))
        elif not more:
            self._drop(client)

    def _reply(self, client: _Client, head: bytes) -> None:
        asked = parse(head)
        if isinstance(asked, Answer):
            self._send(client, asked)
            return
        method, path = asked
        if method not in {"GET", "HEAD"}:
            self._send(client, Answer(405, "GET or HEAD\n"))
            return
        try:
            answer = self._answer(path)
        except Exception as error:  # a bug in an answer must end neither this thread nor the agent
            answer = Answer(500, f"unexpected {type(error).__name__}: {error}\n")
        self._send(client, answer, with_body=method == "GET")

    def _send(self, client: _Client, answer: Answer, *, with_body: bool = True) -> None:
        client.answered = True
        client.head = b""
        client.out = memoryview(format_answer(answer, with_body=with_body))
        try:
            self._write(client)
        except BlockingIOError:
            self._selector.modify(client.channel, selectors.EVENT_WRITE, client)
        except OSError:
            self._drop(client)

    def _write(self, client: _Client) -> None:
        """BlockingIOError while the client's buffer is full."""
        while client.out:
            client.out = client.out[client.channel.send(client.out) :]
        client.channel.shutdown(socket.SHUT_WR)
        client.ends = min(client.ends, time.monotonic() + LINGER)
        self._selector.modify(client.channel, selectors.EVENT_READ, client)

    def _drop(self, client: _Client) -> None:
        if client.channel.fileno() < 0:
            return
        self._selector.unregister(client.channel)
        self._clients.remove(client)
        client.channel.close()

    def close(self) -> None:
        """Let go of everything; `run` does it at its end, whoever could not `open` does it himself."""
        for client in tuple(self._clients):
            self._drop(client)
        for listener in self._listeners:
            listener.channel.close()
        self._selector.close()
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)
        try:
            if self._inode is not None and os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except OSError:
            pass


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket at this address, not listening yet. Raises OSError."""
    channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart may come within TIME_WAIT
        channel.bind((host, port))
    except BaseException:
        channel.close()
        raise
    return channel

"""Numbered UDP packets between containers, counted one by one: what a drill may not cost.

with Traffic([(one, two), (two, one)]) as traffic:       # both directions at once, 50 packets/s each
    traffic.pause(two)                                   # its agent is about to end: nobody promises anything
    traffic.go_on(two)
traffic.sent, traffic.lost, traffic.doubled
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Self

from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flanctl.demo.hosts import Container

RATE = 50
"""Packets a second, each way."""
PORT = 4100
ON_THE_WAY = 2.0
"""Seconds a packet may take on a machine with more to do than it can."""
BUFFER = 4 << 20
"""Bytes: whoever counts may be late, but a full buffer would look like a loss."""
SO_RCVBUFFORCE = 33
"""include/uapi/asm-generic/socket.h; Python does not name it. Beyond net.core.rmem_max, as root may."""
_NUMBER = struct.Struct("!Q")


class _Stream:
    """One direction between two containers."""

    def __init__(self, source: Container, target: Container, port: int) -> None:
        self.source, self.target = source, target
        with contextlib.ExitStack() as stack:
            with inside(target.path):
                self.receiver = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with inside(source.path):
                self.sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            self.receiver.bind((str(target.address), port))
            self.receiver.setblocking(False)
            self.sender.connect((str(target.address), port))
            self._stack = stack.pop_all()
        self.paused = False
        self.sent = 0
        self.came: set[int] = set()
        self.doubled = 0

    def send(self) -> None:
        self.sender.send(_NUMBER.pack(self.sent))
        self.sent += 1

    def receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                (number,) = _NUMBER.unpack(self.receiver.recv(64))
                self.doubled += number in self.came
                self.came.add(number)

    @property
    def lost(self) -> int:
        return self.sent - len(self.came)

    def close(self) -> None:
        self._stack.close()


class Traffic:
    """Streams between pairs of containers that reach each other already."""

    def __init__(self, pairs: Sequence[tuple[Container, Container]]) -> None:
        self._streams: list[_Stream] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        self._error: BaseException | None = None
        try:
            for number, (source, target) in enumerate(pairs):
                self._streams.append(_Stream(source, target, PORT + number))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.paused = True
        self._settle(self._streams)
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._close()
        assert self._error is None, repr(self._error)

    @property
    def sent(self) -> int:
        return sum(stream.sent for stream in self._streams)

    @property
    def lost(self) -> int:
        return sum(stream.lost for stream in self._streams)

    @property
    def doubled(self) -> int:
        return sum(stream.doubled for stream in self._streams)

    def pause(self, end: Container) -> None:
        """Send nothing from and to it; returns when what is under way has arrived, or is lost."""
        with self._lock:
            mine = self._of(end)
            for stream in mine:
                stream.paused = True
        self._settle(mine)

    def go_on(self, end: Container) -> None:
        with self._lock:
            for stream in self._of(end):
                stream.paused = False

    def _of(self, end: Container) -> list[_Stream]:
        return [stream for stream in self._streams if end in (stream.source, stream.target)]

    @staticmethod
    def _settle(streams: Sequence[_Stream]) -> None:
        until(lambda: not any(stream.lost for stream in streams), seconds=ON_THE_WAY, fail=False)

    def _send(self) -> None:
        try:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                with self._lock:
                    for stream in self._streams:
                        if not stream.paused:
                            stream.send()
                due = max(due + 1 / RATE, time.monotonic() - 1 / RATE)  # late, but never a burst
        except BaseException as error:
            self._error = error

    def _receive(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for stream in self._streams:
                    selector.register(stream.receiver, selectors.EVENT_READ, stream)
                while not self._stop.is_set():
                    for key, _ in selector.select(0.1):
                        key.data.receive()
        except BaseException as error:
            self._error = error

    def _close(self) -> None:
        for stream in self._streams:
            stream.close()

"""A server that says exactly what a test wants, byte for byte, and a wire that loses answers."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    head: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Scripted:
    """Calls `answer` for each request; bytes are sent and the connection kept, None closes it unanswered.

    An iterator is sent piece by piece, for as long as the client listens.

    `answer` may also wait for `ended`, which is set when the server closes: a member that hangs.
    """

    def __init__(
        self,
        answer: Callable[[Request], bytes | Iterator[bytes] | None],
        *,
        tls: ssl.SSLContext | None = None,
        close: bool = False,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        self.ended = threading.Event()
        self._tls = tls
        self._close = close
        self._links: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._links.append(link)
            self._start(self._serve, link)

    def _serve(self, link: socket.socket) -> None:
        try:
            if self._tls is not None:
                link.settimeout(5)
                link = self._tls.wrap_socket(link, server_side=True, do_handshake_on_connect=False)
                self._links.append(link)
                try:
                    link.do_handshake()
                except OSError:
                    os.read(link.fileno(), 65536)  # a close with bytes unread would overtake our alert
                    raise
            while (request := _request(link)) is not None:
                self.requests.append(request)
                said = self.answer(request)
                if said is None:
                    return
                for piece in (said,) if isinstance(said, bytes) else said:
                    link.sendall(piece)
                if self._close:
                    return
        except OSError:
            pass
        finally:
            link.close()


def _request(link: socket.socket) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = link.recv(65536)
        if not more:
            return None
        data += more
        if data.startswith(b"\x16"):
            return None  # a TLS greeting: as etcd, hang up without a word
    head, _, body = data.partition(b"\r\n\r\n")
    text = head.decode("latin-1")
    length = next(
        (
            int(line.partition(":")[2])
            for line in text.split("\r\n")
            if line.lower().startswith("content-length")
        ),
        0,
    )
    while len(body) < length:
        more = link.recv(65536)
        if not more:
            return None
        body += more
    method, path, _ = text.split("\r\n")[0].split(" ")
    return Request(method, path, text, body)


def ok(body: bytes = b"", *, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def etcd(message: object, *, status: str = "200 OK") -> bytes:
    return ok(json.dumps(message).encode(), status=status)


def closed_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

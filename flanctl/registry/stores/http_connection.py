"""One HTTP/1.1 connection: dialling, TLS, the head and the body of an answer, each wait bounded (RFC 9112).

Every wait is one `poll` that ends at the deadline or when another thread cancels.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

    from flanctl.registry.stores.endpoints import Endpoint

    _T = TypeVar("_T")

_MAX_HEAD = 64 << 10
_AT_ONCE = 1 << 20
"""Bytes of an answer that are taken though its deadline has passed: those that had come while we were stopped."""


class Refusal(Exception):
    """One endpoint did not serve this request, for `reason`; another one may.

    `again`: a later try at the same endpoint may succeed (an election, a time-out). `unsure`: the request was sent
    and may have been carried out. `kind` tells apart what callers act on: "closed" (no answer to a request that
    was sent), "denied" (the server wants another client certificate), "grpc" (HTTP/2 only),
    "untrusted" (its certificate), "silent" (nothing came in the time it had), "" for the rest.
    """

    def __init__(self, reason: str, *, again: bool = False, unsure: bool = False, kind: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.unsure = unsure
        self.kind = kind


class Cancelled(Exception):
    """Another thread asked a wait to end."""


class Connection:
    """One TCP connection, TLS or not, and the answer being read from it.

    Nothing blocks longer than the deadline given (TimeoutError); what was received by then is kept, so reading
    can go on later. Errors of the network are Refusal.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        context: ssl.SSLContext | None,
        deadline: float,
        cancel: int = -1,
        skip: int = 0,
    ) -> None:
        """`skip` addresses of the endpoint's, which are tried last."""
        self.endpoint = endpoint
        self._skip = skip
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reusable = False
        self.cancel = cancel
        self._buffer = bytearray()
        self._received = 0
        """Bytes of this answer."""
        self._left = 0
        """Bytes to come of the body (of the chunk when chunked); -1 when it lasts until the server closes."""
        self._chunked = False
        self._inside = False
        """Inside a chunk: its end is still to be read."""
        self._ended = True
        begin = time.monotonic()
        try:
            self._socket = self._dial(deadline)
        except TimeoutError:
            waited = time.monotonic() - begin
            raise Refusal(f"no connection in {waited:.1f}s", again=True, kind="silent") from None
        if context is not None:
            try:
                self._greet(context, deadline)
            except BaseException:
                self._socket.close()
                raise

    def close(self) -> None:
        self._socket.close()

    def certificate(self) -> object:
        """The server's, as `SSLSocket.getpeercert` shows it."""
        getpeercert = getattr(self._socket, "getpeercert", None)
        return None if getpeercert is None else getpeercert()

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        try:
            while view:
                sent = self._do(lambda view=view: self._socket.send(view), select.POLLOUT, deadline)  # type: ignore[misc]
                view = view[sent:]
        except OSError as error:
            raise self._broken(error) from None

    def begin(self, deadline: float) -> None:
        """Read the head of an answer; `status` and `headers` are known then."""
        self.status = self._received = 0
        while True:
            try:
                self._head(deadline)
            except ValueError:
                raise self._garbage() from None
            if self.status >= 200:  # 1xx are only a foreword (RFC 9110 15.2)
                return

    def piece(self, deadline: float) -> bytes:
        """The next bytes of the body, b"" at its end."""
        if self._ended:
            return b""
        if self._chunked and self._left == 0:
            try:
                self._next_chunk(deadline)
            except ValueError:
                raise Refusal("answers with broken chunks", unsure=True) from None
            if self._ended:
                return b""
        if not self._buffer:
            try:
                self._fill(deadline)
            except Refusal:
                if self._left >= 0:
                    raise
                self._ended = True
                self.reusable = False
                return b""
        count = len(self._buffer) if self._left < 0 else min(len(self._buffer), self._left)
        piece = bytes(self._buffer[:count])
        del self._buffer[:count]
        if self._left > 0:
            self._left -= count
            if self._left == 0 and not self._chunked:
                self._ended = True
        return piece

    def _head(self, deadline: float) -> None:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _MAX_HEAD or not self._buffer.startswith(b"HTTP/1."[: len(self._buffer)]):
                raise ValueError
            self._fill(deadline)
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        code = rest[:3]
        if (
            version not in {"HTTP/1.1", "HTTP/1.0"}
            or not (code.isascii() and code.isdigit())
            or len(code) < 3
        ):
            raise ValueError
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError
            headers[name.lower()] = value.strip()
        del self._buffer[: end + 4]
        self.status, self.headers = int(code), headers
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._inside = False
        length = headers.get("content-length")
        if self._chunked or self.status in {204, 304}:
            self._left = 0
        elif length is None:
            self._left = -1
        elif length.isascii() and length.isdigit() and len(length) < 16:
            self._left = int(length)
        else:
            raise ValueError
        self._ended = self._left == 0 and not self._chunked
        self.reusable = (
            version == "HTTP/1.1" and headers.get("connection", "").lower() != "close" and self._left >= 0
        )

    def _next_chunk(self, deadline: float) -> None:
        if self._inside:
            if self._line(deadline):
                raise ValueError
            self._inside = False
        digits = self._line(deadline).partition(b";")[0].strip()
        if not digits or len(digits) > 15 or not digits.isalnum():
            raise ValueError
        self._left = int(digits, 16)
        self._inside = True
        if self._left == 0:
            while self._line(deadline):
                pass  # trailers
            self._ended = True

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise ValueError
            self._fill(deadline)
        line = bytes(self._buffer[:end]).removesuffix(b"\r")
        del self._buffer[: end + 1]
        return line

    def _fill(self, deadline: float) -> None:
        # Who never has to wait never meets the deadline: an answer without end, faster than it is read.
        if self._received > _AT_ONCE and time.monotonic() >= deadline:
            raise TimeoutError
        try:
            data = self._do(lambda: self._socket.recv(256 << 10), select.POLLIN, deadline)
        except OSError as error:
            raise self._broken(error) from None
        if not data and (self._buffer or self.status):
            raise Refusal("breaks off its answer", unsure=True)
        if not data:
            raise Refusal("closed the connection without an answer", unsure=True, kind="closed")
        self._buffer += data
        self._received += len(data)

    def _garbage(self) -> Refusal:
        """The first bytes tell who is there instead."""
        if self._buffer.startswith((b"\x15\x03", b"\x16\x03")):
            return Refusal(f"speaks TLS: write https://{self.endpoint.address}")
        if self._buffer[3:5] == b"\x04\x00":  # the first frame of an HTTP/2 server (RFC 9113 3.4)
            return Refusal("speaks only HTTP/2 (gRPC)", kind="grpc")
        return Refusal(f"answers, but not in HTTP ({bytes(self._buffer[:16])!r})")

    def _dial(self, deadline: float) -> socket.socket:
        last: Refusal | None = None
        addresses = _resolve(self.endpoint, deadline, self.cancel)
        turn = self._skip % len(addresses)
        addresses = addresses[turn:] + addresses[:turn]
        for index, (family, address) in enumerate(addresses):
            now = time.monotonic()
            until = now + max(0.0, deadline - now) / (len(addresses) - index)
            link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    link.connect(address)
                except BlockingIOError:
                    _wait(link.fileno(), select.POLLOUT, until, self.cancel)
                    if code := link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        raise OSError(code, os.strerror(code)) from None
            except TimeoutError:
                link.close()
                if index == len(addresses) - 1:
                    raise
            except OSError as error:
                link.close()
                last = Refusal(_words(error))
            except BaseException:
                link.close()
                raise
            else:
                return link
        raise last or Refusal("no connection", again=True)

    def _greet(self, context: ssl.SSLContext, deadline: float) -> None:
        wrapped = context.wrap_socket(
            self._socket, server_hostname=self.endpoint.host, do_handshake_on_connect=False
        )
        self._socket = wrapped
        try:
            self._do(wrapped.do_handshake, select.POLLIN, deadline)
        except TimeoutError:
            raise Refusal("no answer to the TLS greeting", again=True, kind="silent") from None
        except OSError as error:
            refusal = self._broken(error)
            if isinstance(refusal, Refusal):
                refusal.unsure, refusal.kind = (
                    False,
                    refusal.kind.removeprefix("closed"),
                )  # nothing was asked yet
            raise refusal from None

    def _do(self, call: Callable[[], _T], events: int, deadline: float) -> _T:
        """`call`, again and again until it need not wait any more."""
        while True:
            try:
                return call()
            except BlockingIOError:
                wanted = events
            except OSError as error:
                wanted = {"SSLWantReadError": select.POLLIN, "SSLWantWriteError": select.POLLOUT}.get(
                    type(error).__name__, 0
                )
                if not wanted:
                    raise
            _wait(self._socket.fileno(), wanted, deadline, self.cancel)

    def _broken(self, error: OSError) -> Exception:
        """What a failing socket means. TimeoutError stays what it is."""
        if isinstance(error, TimeoutError):
            return error
        if hasattr(error, "library"):  # an ssl.SSLError, without importing ssl to say so
            return self._tls_refusal(error)
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):
            return Refusal("closed the connection without an answer", unsure=True, kind="closed")
        return Refusal(_words(error), unsure=True)

    def _tls_refusal(self, error: OSError) -> Refusal:
        reason = str(getattr(error, "reason", None) or "")
        if check := getattr(error, "verify_message", None):
            return Refusal(f"its certificate is not trusted: {check}", kind="untrusted")
        if "ALERT" in reason and any(
            word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED")
        ):
            words = reason.partition("ALERT_")[2].replace("_", " ").lower()
            return Refusal(f"refuses our client certificate: {words}", kind="denied")
        plain = f"write http://{self.endpoint.address}"
        if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
            return Refusal(f"does not speak TLS: {plain}")
        if "EOF" in reason or type(error).__name__ in {"SSLEOFError", "SSLZeroReturnError"}:
            return Refusal(
                f"ends the TLS greeting (a plain HTTP port? then {plain})", kind="closed", unsure=True
            )
        return Refusal(f"TLS: {reason.replace('_', ' ').lower() or error}")


def _wait(descriptor: int, events: int, deadline: float, cancel: int) -> None:
    """Until the descriptor is ready. Raises TimeoutError at the deadline, Cancelled when `cancel` is readable."""
    poll = select.poll()
    if descriptor >= 0:
        poll.register(descriptor, events)
    if cancel >= 0:
        poll.register(cancel, select.POLLIN)
    ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    if cancel in ready:
        raise Cancelled
    if not ready:
        raise TimeoutError


def sleep(seconds: float, cancel: int) -> None:
    """Sleep, or raise Cancelled."""
    try:
        _wait(-1, 0, time.monotonic() + seconds, cancel)
    except TimeoutError:
        return


def _resolve(endpoint: Endpoint, deadline: float, cancel: int) -> list[tuple[int, Any]]:
    """Addresses to try. A name is looked up in a thread, for getaddrinfo knows no deadline."""
    if not endpoint.named:
        return _look_up(endpoint, socket.AI_NUMERICHOST)
    found: list[list[tuple[int, Any]] | Refusal] = []
    done = os.eventfd(0, os.EFD_CLOEXEC)
    lock = threading.Lock()
    state = {"open": True}

    def look() -> None:
        try:
            found.append(_look_up(endpoint, 0))
        except Refusal as refusal:
            found.append(refusal)
        with lock:
            if state["open"]:
                os.eventfd_write(done, 1)

    thread = threading.Thread(target=look, name="flanctl-resolve", daemon=True)
    try:
        thread.start()
        _wait(done, select.POLLIN, deadline, cancel)
        thread.join()
    except TimeoutError:
        raise Refusal("its name was not resolved in time", again=True) from None
    finally:
        with lock:
            state["open"] = False
            os.close(done)
    if isinstance(found[0], Refusal):
        raise found[0]
    return found[0]


def _look_up(endpoint: Endpoint, flags: int) -> list[tuple[int, Any]]:
    # As bytes: for a text Python loads its codec for international names, stringprep's tables and all.
    host = endpoint.host.encode() if endpoint.host.isascii() else endpoint.host
    try:
        found = socket.getaddrinfo(
            host, endpoint.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags
        )
    except (socket.gaierror, UnicodeError) as error:
        code = error.errno if isinstance(error, socket.gaierror) else None
        why = error.strerror.lower() if isinstance(error, socket.gaierror) and error.strerror else str(error)
        raise Refusal(f"its name does not resolve: {why}", again=code == socket.EAI_AGAIN) from None
    return [(int(family), address) for family, _, _, _, address in found]


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

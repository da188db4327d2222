"""HTTP/1.1 to a list of equal servers: keep-alive, failover, deadlines, TLS. Knows nothing of etcd.

    transport = Transport(endpoints, timeout=5.0, cacert=None, cert=None, key=None)
    answer = transport.request("POST", "/v3/kv/range", body)

A reader of our own over a socket, not `http.client`: that one costs a command 30 ms of imports, has no deadline for
a whole answer and cannot be interrupted. Every wait here is one `poll` that ends at the deadline or when another
thread cancels. RFC 9112 is the source. Proxies of the environment are ignored: etcd is never behind one.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, RegistryUnreachable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from flanctl.registry.stores.endpoints import Endpoint

    _T = TypeVar("_T")

MAX_BODY = 64 << 20
"""Bytes of one answer; 10 000 leases are 6 MB."""

_MAX_HEAD = 64 << 10
_PAUSES = (0.05, 0.5)
"""Seconds between two rounds over all endpoints, first and longest."""


class Refusal(Exception):
    """One endpoint did not serve this request, for `reason`; another one may.

    `again`: a later try at the same endpoint may succeed (an election, a time-out). `unsure`: the request was sent
    and may have been carried out. `kind` tells apart what callers act on: "closed" (no answer to a request that
    was sent), "denied" (the server wants another client certificate), "grpc" (HTTP/2 only),
    "silent" (nothing came in the time it had), "" for the rest.
    """

    def __init__(self, reason: str, *, again: bool = False, unsure: bool = False, kind: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.unsure = unsure
        self.kind = kind


class Cancelled(Exception):
    """Another thread asked a wait to end."""


class Unreachable(RegistryUnreachable):
    """Nobody served the request. `kinds` are those of the refusals, `unsure` as there."""

    def __init__(
        self, message: str, *, details: tuple[str, ...], kinds: frozenset[str], unsure: bool
    ) -> None:
        super().__init__(message, details=details)
        self.kinds = kinds
        self.unsure = unsure


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. `unsure`: an earlier try at this request may have been carried out too."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    endpoint: Endpoint
    unsure: bool = False


class Transport:
    """The requests of one store. Safe to use from several threads: each borrows a connection of its own."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        timeout: float,
        cacert: str | None = None,
        cert: str | None = None,
        key: str | None = None,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.timeout = timeout
        self.good: Endpoint | None = None
        """The endpoint that answered last; the next request begins with it."""
        self._files = (cacert, cert, key)
        self._lock = threading.Lock()
        self._idle: dict[Endpoint, list[Connection]] = {}
        self._context: ssl.SSLContext | None = None
        self._closed = False

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        deadline: float | None = None,
        judge: Callable[[Answer], None] | None = None,
        cancel: int = -1,
    ) -> Answer:
        """The first good answer of any endpoint before `deadline` (time.monotonic, default `timeout` from now).

        `judge` looks at each answer and raises Refusal to go on with the next endpoint. Each try gets an equal
        share of the time left, so a hung member does not eat it. Rounds go on while some endpoint may yet
        serve; when all refuse for good the error comes at once. Raises Unreachable, and NotPermitted when every
        endpoint wants another client certificate.
        """
        begin = time.monotonic()
        deadline = begin + self.timeout if deadline is None else deadline
        refusals: dict[Endpoint, Refusal] = {}
        unsure = False
        lost = False
        pause = _PAUSES[0]
        while True:
            order = self._order()
            again = False
            for index, endpoint in enumerate(order):
                left = deadline - time.monotonic()
                if left <= 0 and refusals:
                    break
                try:
                    answer = self.ask(
                        endpoint, method, path, body, headers,
                        deadline=deadline, patience=max(0.0, left) / (len(order) - index), cancel=cancel,
                    )  # fmt: skip
                    if judge is not None:
                        judge(answer)
                except Refusal as refusal:
                    if refusal.kind != "silent" or endpoint not in refusals:
                        refusals[endpoint] = (
                            refusal  # else it said more before, or had more time to say nothing
                        )
                    again |= refusal.again
                    if refusal.kind == "closed" and not lost:
                        lost = again = True  # asking once more tells what became of the request
                    unsure |= refusal.unsure
                    continue
                self.good = endpoint
                return Answer(answer.status, answer.headers, answer.body, endpoint, unsure or answer.unsure)
            if not again or time.monotonic() + pause >= deadline:
                raise self.nobody(refusals, time.monotonic() - begin, unsure=unsure)
            sleep(pause, cancel)
            pause = min(pause * 2, _PAUSES[1])

    def ask(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        deadline: float,
        patience: float,
        cancel: int = -1,
    ) -> Answer:
        """One endpoint, one try. `patience` is how many seconds it may stay silent. Raises Refusal."""
        request = _request(method, path, endpoint, body, headers)
        with self._lock:
            idle = self._idle.get(endpoint)
            connection = idle.pop() if idle else None
        stale = False
        if connection is not None:
            connection.cancel = cancel
            # A server may close an idle connection at any time: that says nothing about the server.
            try:
                return self._exchange(connection, request, deadline, patience)
            except Refusal as refusal:
                if refusal.kind != "closed":
                    raise
                stale = True
        until = min(deadline, time.monotonic() + patience)
        connection = self.connect(endpoint, until, cancel)
        try:
            answer = self._exchange(connection, request, deadline, patience)
        except Refusal as refusal:
            if refusal.kind == "closed" and endpoint.scheme == "http" and self._speaks_tls(endpoint, until):
                raise Refusal(f"speaks TLS: write https://{endpoint.address}") from None
            refusal.unsure |= stale
            raise
        if answer.status == 400 and b"HTTP" in answer.body and b"HTTPS" in answer.body:
            raise Refusal(f"speaks TLS: write https://{endpoint.address}")
        return Answer(answer.status, answer.headers, answer.body, endpoint, unsure=stale)

    def connect(self, endpoint: Endpoint, deadline: float, cancel: int = -1) -> Connection:
        """A new connection, TLS included. A readable descriptor `cancel` ends every wait on it with Cancelled."""
        context = self._tls() if endpoint.scheme == "https" else None
        return Connection(endpoint, context, deadline, cancel)

    def stream(
        self,
        endpoint: Endpoint,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        deadline: float,
        cancel: int,
    ) -> Connection:
        """POST to one endpoint and hand over the connection, the head of the answer read, its body still to come."""
        connection = self.connect(endpoint, deadline, cancel)
        try:
            connection.send(_request("POST", path, endpoint, body, headers), deadline)
            connection.begin(deadline)
        except TimeoutError:
            connection.close()
            raise Refusal("no answer", again=True, kind="silent") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close what is idle; what is on loan is closed when it comes back."""
        with self._lock:
            self._closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _order(self) -> list[Endpoint]:
        good = self.good
        return sorted(self.endpoints, key=lambda endpoint: endpoint != good)

    def _exchange(self, connection: Connection, request: bytes, deadline: float, patience: float) -> Answer:
        begin = time.monotonic()
        until = min(deadline, begin + patience)
        pieces: list[bytes] = []
        size = 0
        try:
            connection.send(request, until)
            connection.begin(until)
            while piece := connection.piece(min(deadline, time.monotonic() + patience)):
                size += len(piece)
                if size > MAX_BODY:
                    raise Refusal(f"answers with more than {MAX_BODY >> 20} MB", unsure=True)
                pieces.append(piece)
        except TimeoutError:
            connection.close()
            waited = time.monotonic() - begin
            raise Refusal(f"no answer in {waited:.1f}s", again=True, unsure=True, kind="silent") from None
        except BaseException:
            connection.close()
            raise
        answer = Answer(connection.status, connection.headers, b"".join(pieces), connection.endpoint)
        with self._lock:
            if connection.reusable and not self._closed:
                self._idle.setdefault(connection.endpoint, []).append(connection)
                return answer
        connection.close()
        return answer

    def nobody(
        self,
        refusals: Mapping[Endpoint, Refusal],
        seconds: float,
        *,
        unsure: bool = False,
        waited: bool = False,
    ) -> FlanctlError:
        """The error for people; `in 5s` only if we did wait that long."""
        count = len(self.endpoints)
        waited = waited or any(refusal.again for refusal in refusals.values())
        message = "the only endpoint did not answer" if count == 1 else f"none of {count} endpoints answered"
        if waited:
            message += f" in {seconds:.1f}".removesuffix(".0") + "s"
        width = max(len(str(endpoint)) for endpoint in self.endpoints)
        details = tuple(
            f"{endpoint!s:{width}}   {refusals[endpoint].reason if endpoint in refusals else 'not tried, no time left'}"
            for endpoint in self.endpoints
        )
        kinds = frozenset(refusal.kind for refusal in refusals.values())
        if kinds == {"denied"}:
            return NotPermitted(
                "etcd refused our client certificate", details=details, hint="--cert and --key"
            )
        return Unreachable(message, details=details, kinds=kinds, unsure=unsure)

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = tls_context(*self._files)
            return self._context

    def _speaks_tls(self, endpoint: Endpoint, deadline: float) -> bool:
        """Whether a port that hangs up on plain HTTP takes a TLS greeting (etcd closes without a word)."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            Connection(endpoint, context, min(deadline, time.monotonic() + 1.0)).close()
        except Refusal as refusal:
            return refusal.kind == "denied"
        return True


class Connection:
    """One TCP connection, TLS or not, and the answer being read from it.

    Nothing blocks longer than the deadline given (TimeoutError); what was received by then is kept, so reading
    can go on later. Errors of the network are Refusal.
    """

    def __init__(
        self, endpoint: Endpoint, context: ssl.SSLContext | None, deadline: float, cancel: int = -1
    ) -> None:
        self.endpoint = endpoint
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reusable = False
        self.cancel = cancel
        self._buffer = bytearray()
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
        self.status = 0
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
        try:
            data = self._do(lambda: self._socket.recv(256 << 10), select.POLLIN, deadline)
        except OSError as error:
            raise self._broken(error) from None
        if not data and (self._buffer or self.status):
            raise Refusal("breaks off its answer", unsure=True)
        if not data:
            raise Refusal("closed the connection without an answer", unsure=True, kind="closed")
        self._buffer += data

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
            return Refusal(f"its certificate is not trusted: {check}")
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


def tls_context(cacert: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Verify the server by `cacert` (else the system's CAs) and show `cert` with `key` if given.

    Raises NotFound, NotPermitted or Invalid naming the file.
    """
    import ssl

    for path in (cacert, cert, key):
        if path is not None:
            _readable(path)
    if key is not None and cert is None:
        raise Invalid(f"{key} is a key without its certificate", hint="--cert FILE")
    try:
        context = ssl.create_default_context(cafile=cacert)
    except ssl.SSLError:
        raise Invalid(f"{cacert} holds no CA certificate in PEM form") from None
    if cacert is not None:
        # Python 3.13 refuses private CAs without keyUsage, which most openssl recipes make; etcdctl takes them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if cert is not None:

        def ask() -> str:
            raise Invalid(
                f"{key or cert} is encrypted and we ask no passphrase", hint="openssl rsa -in KEY -out PLAIN"
            )

        try:
            context.load_cert_chain(cert, key, password=ask)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise Invalid(f"{key or cert} is not the key of {cert}") from None
            raise Invalid(f"{cert} and {key or cert} are not a certificate and its key in PEM form") from None
    return context


def _readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if os.path.isdir(path):
            raise Invalid(f"{path} is a directory, not a PEM file")
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except PermissionError:
        raise NotPermitted(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {_words(error)}") from None


def _request(
    method: str, path: str, endpoint: Endpoint, body: bytes, headers: Mapping[str, str] | None
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.address}", "User-Agent: flanctl"]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


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
    host = endpoint.host
    if ":" in host or host.replace(".", "").isdigit():
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
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags
        )
    except (socket.gaierror, UnicodeError) as error:
        code = error.errno if isinstance(error, socket.gaierror) else None
        why = error.strerror.lower() if isinstance(error, socket.gaierror) and error.strerror else str(error)
        raise Refusal(f"its name does not resolve: {why}", again=code == socket.EAI_AGAIN) from None
    return [(int(family), address) for family, _, _, _, address in found]


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

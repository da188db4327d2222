"""HTTP/1.1 to a list of equal servers: keep-alive, failover, deadlines, TLS. Knows nothing of etcd.

    transport = Transport(endpoints, timeout=5.0, cacert=None, cert=None, key=None)
    answer = transport.request("POST", "/v3/kv/range", body)

A reader of our own over a socket, not `http.client`: that one costs a command 30 ms of imports, has no deadline for
a whole answer and cannot be interrupted. Proxies of the environment are ignored: etcd is never behind one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError, NotPermitted, RegistryUnreachable
from flanctl.registry.stores.http_connection import Cancelled, Connection, Refusal, sleep
from flanctl.registry.stores.tls import TlsFiles, complaint, lenient

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from flanctl.registry.stores.endpoints import Endpoint

__all__ = [
    "Answer",
    "Cancelled",
    "Connection",
    "Refusal",
    "Transport",
    "Unreachable",
    "document",
    "note",
    "sleep",
]

MAX_BODY = 64 << 20
"""Bytes of one answer; 10 000 leases are 6 MB."""

PATIENCE = 3.0
"""Seconds an endpoint may stay silent while there are others to ask."""

_PAUSES = (0.05, 0.5)
"""Seconds between two rounds over all endpoints, first and longest."""


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
    """The requests of one store. Safe to use from several threads: each borrows a connection of its own.

    With an https endpoint the PEM files are read at once, and it raises NotFound, NotPermitted or Invalid for one that cannot be
    used: that is no trouble of the registry's, which an agent would wait out.
    """

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
        self.tls = TlsFiles(cacert, cert, key)
        self._lock = threading.Lock()
        self._idle: dict[Endpoint, list[Connection]] = {}
        self._silent: dict[Endpoint, int] = {}
        """How often a named endpoint was silent: the next connection is made to the next of its addresses."""
        self._generation = 0
        """The TLS files' that the idle connections were made with."""
        self._closed = False
        if any(endpoint.scheme == "https" for endpoint in self.endpoints):
            self.tls.look()

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
                        deadline=deadline, patience=patience(left, len(order), index, endpoint), cancel=cancel,
                    )  # fmt: skip
                    answer = replace(answer, unsure=unsure or answer.unsure)
                    if judge is not None:
                        self._judge(judge, answer)
                except Refusal as refusal:
                    note(refusals, endpoint, refusal)
                    if refusal.kind == "silent" and endpoint.named:
                        self._silent[endpoint] = self._silent.get(endpoint, 0) + 1
                    again |= refusal.again
                    if refusal.kind == "closed" and not lost:
                        lost = again = True  # asking once more tells what became of the request
                    unsure |= refusal.unsure
                    continue
                self.good = endpoint
                return answer
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
        if endpoint.scheme == "https" and self.tls.look() != self._generation:
            self._drop_idle()  # they were made with a certificate that is out of use
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
        skip = self._silent.get(endpoint, 0)
        if endpoint.scheme != "https":
            return Connection(endpoint, None, deadline, cancel, skip)
        context = self.tls.context()
        try:
            return Connection(endpoint, context, deadline, cancel, skip)
        except Refusal as refusal:
            if refusal.kind == "untrusted":
                refusal.reason = self._why_untrusted(endpoint, context, refusal.reason, deadline, cancel)
            raise

    def stream(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        deadline: float,
        cancel: int,
        on: Connection | None = None,
    ) -> Connection:
        """Ask one endpoint and hand over the connection, the head of the answer read, its body still to come.

        `on` is a connection to it whose last answer was read to the end.
        """
        connection = on or self.connect(endpoint, deadline, cancel)
        try:
            connection.send(_request(method, path, endpoint, body, headers), deadline)
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
        self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        with self._lock:
            self._generation = self.tls.generation
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _judge(self, judge: Callable[[Answer], None], answer: Answer) -> None:
        """A "no" is an answer too: who gave it serves, and is asked first the next time."""
        try:
            judge(answer)
        except Refusal:
            raise
        except Exception:
            self.good = answer.endpoint
            raise

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

    def _why_untrusted(
        self, endpoint: Endpoint, context: ssl.SSLContext, reason: str, deadline: float, cancel: int
    ) -> str:
        """The date or the names in a certificate that was refused for them. Nothing is sent to its owner."""
        if not any(word in reason for word in ("expired", "not yet valid", "mismatch", "is not valid for")):
            return reason
        try:
            connection = Connection(endpoint, lenient(context, self.tls.cacert), deadline, cancel)
        except Refusal:
            return reason
        try:
            return complaint(connection.certificate(), endpoint.host, reason) or reason
        finally:
            connection.close()

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


def _request(
    method: str, path: str, endpoint: Endpoint, body: bytes, headers: Mapping[str, str] | None
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.address}", "User-Agent: flanctl"]
    if method in {"POST", "PUT"}:
        kind = "application/json" if method == "POST" else "application/x-www-form-urlencoded"
        lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def patience(left: float, count: int, index: int = 0, endpoint: Endpoint | None = None) -> float:
    """Seconds the endpoint at `index` of `count` may stay silent when there are `left` for all that are still to come.

    The only one has all the time there is, unless it is a name, which may have other addresses than a silent one.
    """
    share = max(0.0, left) / (count - index)
    alone = count == 1 and not (endpoint is not None and endpoint.named)
    return share if alone else min(share, PATIENCE)


def document(body: bytes) -> dict[str, Any] | None:
    """The JSON object in an answer, None for anything else, however deep or broken."""
    import json

    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def note(refusals: dict[Endpoint, Refusal], endpoint: Endpoint, refusal: Refusal) -> None:
    """Keep what an endpoint said before rather than its silence now, and a first silence, which was the longest."""
    if refusal.kind != "silent" or endpoint not in refusals:
        refusals[endpoint] = refusal

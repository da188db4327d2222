"""etcd v3 through its JSON gateway: no native code and little to import, so it is what commands use.

    store = EtcdGatewayStore(parse_endpoints(["http://192.168.6.15:2379"]))
    store.list("/jxdd/network/subnets/")

etcd's api_reference_v3 names the messages: bytes are base64, 64-bit numbers are strings, zero values are left out.
Three ways to run etcd leave the gateway useless while gRPC works: those raise GatewayOff.
"""

from __future__ import annotations

import binascii
import json
import math
import os
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import http
from flanctl.registry.stores.store import (
    Changed,
    Compacted,
    Delete,
    Entry,
    Event,
    Forgotten,
    KeyExists,
    Progress,
    Put,
    Snapshot,
    Unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from flanctl.registry.stores.endpoints import Endpoint

_PAGE = 1000
"""Keys asked for at once."""

_TTL_THREADS = 4
_TTL_ALONE = 50
"""Up to this many leases are asked about by one thread."""

_PROBE_EVERY, _PROBE_WAIT = 3.0, 2.0
"""Seconds between two looks at the member a watch hangs on, and how long it may take to answer one."""

_BACK_OFF = (0.1, 2.0)
"""Seconds between two tries to open a watch, first and longest."""

_CLOSE_WAIT = 0.5
"""Seconds `close` waits for the thread that iterates to be out (a signal handler closes inside that very thread)."""

_INVALID_ARGUMENT, _DEADLINE, _PERMISSION_DENIED, _EXHAUSTED = 3, 4, 7, 8
_PRECONDITION, _OUT_OF_RANGE, _UNAVAILABLE, _UNAUTHENTICATED = 9, 11, 14, 16
"""gRPC status codes (grpc/doc/statuscodes.md)."""


class GatewayOff(FlanctlError):
    """etcd is there but its JSON gateway does not serve us; gRPC will."""

    exit_code = RegistryUnreachable.exit_code
    default_id = "gateway-off"


class _Refused(Exception):
    """A gRPC status code and words: etcd's own, which it marks, or its gateway's (`own` is False)."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.own = "etcdserver:" in words
        self.words = words.removeprefix("etcdserver: ")


class EtcdGatewayStore:
    """A Store (see store.py) over etcd ≥ 3.3. `timeout` in seconds bounds every call, all endpoints included."""

    name = "etcd v3 over HTTP"

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        timeout: float = 5.0,
        cacert: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        self.timeout = timeout
        self.endpoints = tuple(endpoints)
        self._http = http.Transport(endpoints, timeout=timeout, cacert=cacert, cert=cert, key=key)
        self._user = user
        self._password = password or ""
        self.token: str | None = None
        self._login = threading.Lock()
        self._base = "/v3"
        self.lock = threading.Lock()
        self._watches: set[GatewayWatch] = set()

    def describe(self) -> str:
        good = self._http.good
        return self.name if good is None else f"{self.name} at {good}"

    def close(self) -> None:
        with self.lock:
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        self._http.close()

    # reading

    def get(self, key: str) -> Entry | None:
        deadline = self._deadline()
        entry = self._get(key, deadline)
        if entry is None or entry.lease is None:
            return entry
        left, _ = self._time_to_live(entry.lease, deadline)
        return replace(entry, ttl=left)

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        deadline = self._deadline()
        start, end = _range(prefix.encode())
        entries: list[Entry] = []
        unreadable: list[Unreadable] = []
        revision = at or 0
        while True:
            question: dict[str, Any] = {"key": _b64(start), "range_end": _b64(end), "limit": str(_PAGE)}
            if revision:
                question["revision"] = str(revision)
            try:
                answer, _ = self._call("kv/range", question, deadline, what=f"list {prefix}")
            except _Refused as refused:
                if refused.code != _OUT_OF_RANGE or not revision:
                    raise self.explain(refused, f"list {prefix}") from None
                if at is not None:
                    raise Forgotten(at) from None
                # Compacted between two pages: what we have is of a revision nobody knows any more.
                start, revision = _range(prefix.encode())[0], 0
                entries.clear()
                unreadable.clear()
                continue
            revision = revision or _revision(answer)
            kvs = _items(answer, "kvs")
            for kv in kvs:
                item = _entry(kv)
                if isinstance(item, Entry):
                    entries.append(item)
                else:
                    unreadable.append(item)
            if not answer.get("more") or not kvs:
                return Snapshot(tuple(entries), revision, tuple(unreadable))
            start = _bytes(kvs[-1], "key") + b"\0"

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        deadline = self._deadline()
        leases = deque(dict.fromkeys(entry.lease for entry in entries if entry.lease is not None))
        left: dict[str, float] = {}
        errors: list[Exception] = []

        def work() -> None:
            try:
                while not errors:
                    lease = leases.popleft()
                    left[lease] = self._time_to_live(lease, deadline)[0]
            except IndexError:
                return
            except Exception as error:  # raised in the calling thread below
                errors.append(error)
            finally:
                leases.clear()  # all asked, or no more to be asked: an error or Ctrl-C ends every thread

        helpers = _TTL_THREADS - 1 if len(leases) > _TTL_ALONE else 0
        threads = [threading.Thread(target=work, name="flanctl-ttl") for _ in range(helpers)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return tuple(
            entry if entry.lease is None else replace(entry, ttl=left[entry.lease]) for entry in entries
        )

    # writing

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        guard = {"key": _b64(key.encode()), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        entry, current = self._put_if(guard, key, value, ttl, "create")
        if entry is None:
            raise KeyExists(key, current)
        return entry

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        entry, current = self._put_if(_unchanged(key, expected), key, value, ttl, "write")
        if entry is None:
            raise Changed(key, current)
        return entry

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        deadline = self._deadline()
        what = f"delete {key}"
        name = {"key": _b64(key.encode())}
        if expected is None:
            answer, unsure = self._ask("kv/deleterange", name, deadline, what)
            return _int(answer, "deleted") > 0 or unsure
        answer, unsure = self._ask(
            "kv/txn",
            {
                "compare": [_unchanged(key, expected)],
                "success": [{"request_delete_range": name}],
                "failure": [{"request_range": name}],
            },
            deadline,
            what,
        )
        if answer.get("succeeded"):
            return True
        current = _current(answer)
        if current is None and unsure:
            return True  # an earlier try of ours whose answer was lost
        if current is None:
            return False
        raise Changed(key, current)

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        deadline = self._deadline()
        if entry.lease is not None:
            left, granted = self._time_to_live(entry.lease, deadline)
            if left > 0 and granted == _seconds(ttl) and (alive := self._keep_alive(entry.lease, deadline)):
                current = self._get(entry.key, deadline)
                if current is None or current.revision != entry.revision:
                    raise Changed(entry.key, current)
                return replace(current, ttl=float(alive))
        return self.replace(entry.key, entry.value, ttl=ttl, expected=entry.revision)

    def watch(self, prefix: str, *, after: int) -> GatewayWatch:
        watch = GatewayWatch(self, prefix, after)
        with self.lock:
            self._watches.add(watch)
        return watch

    # for GatewayWatch

    def first(self) -> int:
        """The index of the endpoint that answered last."""
        good = self._http.good
        return 0 if good is None else self.endpoints.index(good)

    def forget(self, watch: GatewayWatch) -> None:
        with self.lock:
            self._watches.discard(watch)

    def open_watch(
        self,
        endpoint: Endpoint,
        create: Mapping[str, Any],
        stale: str | None,
        deadline: float,
        cancel: int,
        what: str,
    ) -> http.Connection:
        """The stream of a new watch on one member. Raises http.Refusal, GatewayOff and what login raises."""
        headers = {"Grpc-Metadata-hasleader": "true"}  # else a member without quorum stays silent for ever
        if token := self._session(deadline, stale, cancel):
            headers["Authorization"] = token
        body = json.dumps({"create_request": create}).encode()
        stream = self._http.stream(
            endpoint, f"{self._base}/watch", body, headers, deadline=deadline, cancel=cancel
        )
        if stream.status == 200:
            return stream
        status = stream.status
        try:
            text = stream.piece(deadline)
        finally:
            stream.close()
        document = _document(text)
        if document is not None and ("error" in document or "code" in document):
            refused = _refused(document)
            _raise_if_transient(refused, endpoint, served=self._http.good is not None)
            raise self.explain(refused, what)
        if status == 404 and self._is_etcd_at(endpoint):
            if self._base == "/v3beta":
                raise GatewayOff(f"cannot {what}: etcd's JSON gateway is off")
            self._base = "/v3beta"  # etcd 3.3
        raise http.Refusal(f"answers HTTP but is not etcd (status {status})")

    def probe(self, endpoint: Endpoint, cancel: int) -> None:
        """Whether a member answers at all: what it says of its health is not asked, a full disk watches well."""
        self._http.ask(
            endpoint, "GET", "/health?serializable=true",
            deadline=time.monotonic() + _PROBE_WAIT, patience=_PROBE_WAIT, cancel=cancel,
        )  # fmt: skip

    def unreachable(
        self, what: str, refusals: Mapping[Endpoint, http.Refusal], seconds: float
    ) -> FlanctlError:
        error = self._http.nobody(refusals, seconds, waited=True)
        if isinstance(error, http.Unreachable) and "grpc" in error.kinds:
            return GatewayOff(f"cannot {what}: etcd serves only gRPC here", details=error.details)
        error.message = f"cannot {what}: {error.message}"
        return error

    # inside

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    def _get(self, key: str, deadline: float) -> Entry | None:
        answer, _ = self._ask("kv/range", {"key": _b64(key.encode())}, deadline, f"read {key}")
        kvs = _items(answer, "kvs")
        entry = _entry(kvs[0]) if kvs else None
        return entry if isinstance(entry, Entry) else None

    def _time_to_live(self, lease: str, deadline: float) -> tuple[float, int]:
        """Seconds left (0 when the lease has ended) and seconds granted."""
        answer, _ = self._ask("lease/timetolive", {"ID": lease}, deadline, f"read lease {lease}")
        return float(max(0, _int(answer, "TTL"))), _int(answer, "grantedTTL")

    def _keep_alive(self, lease: str, deadline: float) -> int:
        """The lease's new TTL in seconds, 0 when it has ended."""
        answer, _ = self._ask("lease/keepalive", {"ID": lease}, deadline, f"renew lease {lease}")
        result = answer.get("result")
        return max(0, _int(result, "TTL")) if isinstance(result, dict) else 0

    def _grant(self, ttl: float, deadline: float, what: str) -> str:
        """A new lease. We choose its id, so that asking again after a lost answer makes no second one."""
        lease = str(int.from_bytes(os.urandom(8), "big") >> 2 or 1)
        question = {"ID": lease, "TTL": str(_seconds(ttl))}
        try:
            self._call("lease/grant", question, deadline, what=what)
        except _Refused as refused:
            if "lease already exists" not in refused.words:
                raise self.explain(refused, what) from None
        return lease

    def _revoke(self, lease: str) -> None:
        """A lease nobody uses ends by itself too, so failing to revoke it is no error."""
        try:
            self._ask("lease/revoke", {"ID": lease}, time.monotonic() + 1.0, f"revoke lease {lease}")
        except FlanctlError:
            pass

    def _put_if(
        self, guard: Mapping[str, str], key: str, value: bytes, ttl: float | None, verb: str
    ) -> tuple[Entry | None, Entry | None]:
        """Put under a fresh lease if `guard` holds: (what was written, what is there instead).

        When an answer was lost the transaction is sent again; then the guard fails on our own value, which the
        lease's id tells from anybody else's.
        """
        deadline = self._deadline()
        what = f"{verb} {key}"
        lease = None if ttl is None else self._grant(ttl, deadline, what)
        put = {"key": _b64(key.encode()), "value": _b64(value)}
        if lease is not None:
            put["lease"] = lease
        question = {
            "compare": [guard],
            "success": [{"request_put": put}],
            "failure": [{"request_range": {"key": put["key"]}}],
        }
        try:
            answer, unsure = self._ask("kv/txn", question, deadline, what)
        except RegistryUnreachable as error:
            # Unsure: the key may hang on the lease, so it must live.
            if lease is not None and isinstance(error, http.Unreachable) and not error.unsure:
                self._revoke(lease)
            raise
        except FlanctlError:
            if lease is not None:
                self._revoke(lease)
            raise
        if answer.get("succeeded"):
            return Entry(key, value, _revision(answer), lease, ttl if lease else None), None
        current = _current(answer)
        if unsure and current is not None and current.value == value and current.lease == lease:
            return replace(current, ttl=ttl), None
        if lease is not None:
            self._revoke(lease)
        return None, current

    def _ask(
        self, path: str, question: Mapping[str, Any], deadline: float, what: str
    ) -> tuple[dict[str, Any], bool]:
        """As `_call`, with etcd's refusals as our errors."""
        try:
            return self._call(path, question, deadline, what=what)
        except _Refused as refused:
            raise self.explain(refused, what) from None

    def _call(
        self, path: str, question: Mapping[str, Any], deadline: float, *, what: str
    ) -> tuple[dict[str, Any], bool]:
        """One request with its answer, and whether an earlier try of it may have been carried out.

        Logs in when a user is set, and once more when the token has ended. Raises _Refused, GatewayOff and
        RegistryUnreachable.
        """
        body = json.dumps(question).encode()
        stale: str | None = None
        while True:
            token = self._session(deadline, stale)
            try:
                return self._post(path, body, token, deadline, what)
            except _Refused as refused:
                if token is None or stale is not None or not _token_ended(refused):
                    raise
            except http.Unreachable as error:
                # Some 3.4 builds hang up on a token they do not know (etcd issue 15256).
                if token is None or stale is not None or "closed" not in error.kinds:
                    raise
            stale = token

    def _session(self, deadline: float, stale: str | None = None, cancel: int = -1) -> str | None:
        """The token to send, None without login. `stale` is one that is no good any more."""
        if self._user is None:
            return None
        with self._login:
            if self.token is None or self.token == stale:
                self.token = self._log_in(deadline, cancel)
            return self.token or None

    def _log_in(self, deadline: float, cancel: int) -> str:
        question = json.dumps({"name": self._user, "password": self._password}).encode()
        what = f'log in as "{self._user}"'
        try:
            answer, _ = self._post("auth/authenticate", question, None, deadline, what, cancel)
        except _Refused as refused:
            if refused.code == _PRECONDITION:  # "authentication is not enabled": as etcdctl, go on without
                return ""
            raise self.explain(refused, what) from None
        token = answer.get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise _Garbage(f"cannot {what}: etcd sent no token")
        return token

    def _post(
        self, path: str, body: bytes, token: str | None, deadline: float, what: str, cancel: int = -1
    ) -> tuple[dict[str, Any], bool]:
        headers = {} if token is None else {"Authorization": token}
        answers: list[dict[str, Any]] = []
        base = self._base

        def judge(answer: http.Answer) -> None:
            answers.append(self._read(answer))

        while True:
            try:
                answer = self._http.request(
                    "POST", f"{base}/{path}", body, headers, deadline=deadline, judge=judge, cancel=cancel
                )
            except _Missing:
                if base == "/v3":
                    base = "/v3beta"  # etcd 3.3
                    continue
                raise GatewayOff(
                    f"cannot {what}: etcd's JSON gateway is off",
                    hint="start etcd with --enable-grpc-gateway",
                ) from None
            except http.Unreachable as error:
                if "grpc" in error.kinds:
                    raise GatewayOff(
                        f"cannot {what}: etcd serves only gRPC here", details=error.details
                    ) from None
                error.message = f"cannot {what}: {error.message}"
                raise
            except FlanctlError as error:
                error.message = f"cannot {what}: {error.message}"
                raise
            self._base = base
            return answers[-1], answer.unsure

    def _read(self, answer: http.Answer) -> dict[str, Any]:
        """The message in an answer. Refusal when another endpoint may do better."""
        document = _document(answer.body)
        if document is None or (answer.status == 200 and not _is_etcd(document)):
            if answer.status == 404 and self._is_etcd_at(answer.endpoint):
                raise _Missing
            server = answer.headers.get("server", "")
            by = f", server {server[:40]!r}" if server else ""
            raise http.Refusal(f"answers HTTP but is not etcd (status {answer.status}{by})")
        if answer.status == 200:
            return document
        refused = _refused(document)
        _raise_if_transient(refused, answer.endpoint, served=self._http.good is not None)
        raise refused

    def _is_etcd_at(self, endpoint: Endpoint) -> bool:
        try:
            answer = self._http.ask(
                endpoint, "GET", "/version", deadline=time.monotonic() + 1.0, patience=1.0
            )
        except http.Refusal:
            return False
        return "etcdserver" in (_document(answer.body) or {})

    def explain(self, refused: _Refused, what: str) -> FlanctlError:
        """etcd's refusal as ours; its words are kept."""
        words = refused.words
        if refused.code == _PERMISSION_DENIED:
            who = f'user "{self._user}"' if self._user else "we"
            return NotPermitted(f"{who} may not {what} (etcd: {words})")
        if refused.code == _UNAUTHENTICATED or any(
            sign in words for sign in ("user name is empty", "authentication failed", "user name not found")
        ):
            hint = "--user NAME, and its password" if self._user is None else None
            return NotPermitted(f"cannot {what}: etcd wants a login (etcd: {words})" if self._user is None
                                else f'cannot {what}: login as "{self._user}" was refused (etcd: {words})', hint=hint)  # fmt: skip
        if "database space exceeded" in words:
            return RegistryUnreachable(
                f"cannot {what}: etcd is full (etcd: {words})",
                hint="etcdctl alarm list; compact, defrag and disarm",
            )
        return Invalid(f"cannot {what} (etcd: {words})")


class _Garbage(RegistryUnreachable):
    """In etcd's form, but not what etcd sends. Asking again may do better; nothing is wrong with the request."""


class _Missing(Exception):
    """etcd has no such path."""


def _is_etcd(document: Mapping[str, Any]) -> bool:
    """Every answer of etcd's carries the cluster's header, in a stream inside `result`."""
    result = document.get("result", document)
    return isinstance(result, dict) and isinstance(result.get("header"), dict)


def _document(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _refused(document: Mapping[str, Any]) -> _Refused:
    """3.4 writes error and message, 3.5 and later only message; a stream wraps both in `error`."""
    inner = document.get("error")
    source = inner if isinstance(inner, dict) else document
    code = source.get("code", source.get("grpc_code", 0))
    words = source.get("message") or source.get("error") or "no reason given"
    return _Refused(code if isinstance(code, int) else 0, str(words)[:500])


def _raise_if_transient(refused: _Refused, endpoint: Endpoint, *, served: bool) -> None:
    """An election, an overload, a member without quorum: the next endpoint, then this one again.

    `served`: a gateway of this cluster has served us before, so its trouble is a passing one.
    """
    words = refused.words
    if "CommonName" in words and "ignored" in words:
        raise GatewayOff(f"etcd's JSON gateway takes no login by client certificate (etcd: {words})")
    if refused.code == _UNAVAILABLE and endpoint.scheme == "https" and not (refused.own or served):
        # The gateway dials its server with the server's own certificate, which may be no good as a client's.
        raise http.Refusal(f"its JSON gateway cannot reach etcd: {words}", kind="grpc")
    overload = refused.code == _EXHAUSTED and "too many requests" in words
    if refused.code in {_UNAVAILABLE, _DEADLINE} or overload:
        raise http.Refusal(words, again=True, unsure=True)
    known = {_INVALID_ARGUMENT, 5, 6, _PERMISSION_DENIED, _EXHAUSTED, _PRECONDITION, _OUT_OF_RANGE, 12}
    if refused.code not in known and refused.code != _UNAUTHENTICATED:
        raise http.Refusal(words, unsure=True)


def _token_ended(refused: _Refused) -> bool:
    return refused.code == _UNAUTHENTICATED or any(
        sign in refused.words
        for sign in ("invalid auth token", "user name is empty", "revision of auth store is old")
    )


def _range(prefix: bytes) -> tuple[bytes, bytes]:
    """First key and end of everything that starts with `prefix` (etcd: "\\0" is the end of all keys)."""
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return prefix or b"\0", b"\0"
    return prefix, stem[:-1] + bytes([stem[-1] + 1])


def _seconds(ttl: float) -> int:
    return max(1, math.ceil(ttl))


def _unchanged(key: str, expected: int) -> dict[str, str]:
    return {"key": _b64(key.encode()), "target": "MOD", "result": "EQUAL", "mod_revision": str(expected)}


def _b64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _bytes(message: Mapping[str, Any], name: str) -> bytes:
    text = message.get(name, "")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (ValueError, TypeError):
        raise _Garbage(f"etcd sent {name!r} that is not base64") from None


def _int(message: Mapping[str, Any], name: str) -> int:
    """A number that may come as a string; left out means 0."""
    number = message.get(name, 0)
    if isinstance(number, str) and len(number) < 21 and number.removeprefix("-").isascii():
        try:
            return int(number)
        except ValueError:
            pass
    elif isinstance(number, int):
        return number
    raise _Garbage(f"etcd sent {name!r} that is not a number")


def _items(message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    items = message.get(name) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _Garbage(f"etcd sent {name!r} that is not a list of messages")
    return items


def _revision(answer: Mapping[str, Any]) -> int:
    header = answer.get("header")
    revision = _int(header, "revision") if isinstance(header, dict) else 0
    if revision < 1:
        raise _Garbage("etcd answered without a revision")
    return revision


def _entry(kv: Mapping[str, Any]) -> Entry | Unreadable:
    raw = _bytes(kv, "key")
    try:
        key = raw.decode()
    except UnicodeDecodeError:
        return Unreadable(raw)
    lease = _int(kv, "lease")
    return Entry(key, _bytes(kv, "value"), _int(kv, "mod_revision"), str(lease) if lease else None)


def _current(answer: Mapping[str, Any]) -> Entry | None:
    """What the range in a transaction's failure branch found."""
    for response in _items(answer, "responses"):
        found = response.get("response_range")
        if isinstance(found, dict):
            for kv in _items(found, "kvs"):
                entry = _entry(kv)
                if isinstance(entry, Entry):
                    return entry
    return None


class GatewayWatch:
    """Changes below a prefix, read from one member's stream in the thread that iterates; there is no other thread.

    The stream itself is silent while nothing happens, so the same member is asked for its health every 3 s on a
    connection of its own; a member that stops answering is left for the next one. An eventfd ends every wait when
    somebody closes the watch.
    """

    def __init__(self, store: EtcdGatewayStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._what = f"watch {prefix}"
        self._last = after
        """The highest revision of which everything was handed out."""
        self._ready: deque[Event] = deque()
        self._stream: http.Connection | None = None
        self._text = bytearray()
        self._scanned = 0
        self._next_probe = 0.0
        self._refusals: dict[Endpoint, http.Refusal] = {}
        self._lost: float | None = time.monotonic()
        """Since when no member serves us (time.monotonic); None while one does."""
        self._back_off = 0.0
        self._turn = store.first()
        self._stale: str | None = None
        """A token the server called ended."""
        self._over = False
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._busy = threading.Lock()

    def __iter__(self) -> GatewayWatch:
        return self

    def __enter__(self) -> GatewayWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        with self._store.lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        # Whoever iterates wakes up and frees everything; if nobody does, it is for us to do.
        if self._busy.acquire(timeout=_CLOSE_WAIT):
            try:
                self._free()
            finally:
                self._busy.release()

    def __next__(self) -> Event:
        with self._busy:
            try:
                while not self._closed:
                    if self._ready:
                        return self._ready.popleft()
                    if self._over:
                        break
                    if self._stream is None:
                        self._open()
                    else:
                        self._step(self._stream)
            except http.Cancelled:
                pass
            finally:
                if self._closed or (self._over and not self._ready):
                    self._free()
            raise StopIteration

    # inside; `_busy` is held

    def _free(self) -> None:
        self._drop()
        self._ready.clear()
        with self._store.lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
        self._closed = True
        self._store.forget(self)

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._text.clear()
        self._scanned = 0

    def _fail(self, endpoint: Endpoint, refusal: http.Refusal) -> None:
        """A member does not serve us now: try the next, more and more slowly, and give up after `timeout`."""
        self._drop()
        now = time.monotonic()
        self._refusals[endpoint] = refusal
        self._turn += 1
        if self._lost is None:
            self._lost = now
        kinds = [self._refusals[at].kind for at in self._store.endpoints if at in self._refusals]
        only_grpc = kinds == ["grpc"] * len(self._store.endpoints)
        if now - self._lost >= self._store.timeout or only_grpc:
            lost, self._lost = now - self._lost, now  # who goes on iterating has us try again
            raise self._store.unreachable(self._what, self._refusals, lost)
        if self._turn % len(self._store.endpoints) == 0 or self._back_off == 0.0:
            self._back_off = min(max(_BACK_OFF[0], self._back_off * 2), _BACK_OFF[1])
        left = max(0.0, self._lost + self._store.timeout - now)
        http.sleep(min(self._back_off, left), self._wake)

    def _open(self) -> None:
        endpoints = self._store.endpoints
        endpoint = endpoints[self._turn % len(endpoints)]
        if self._lost is None:
            self._lost = time.monotonic()
        give_up = self._lost + self._store.timeout
        patience = max(self._store.timeout / len(endpoints), 0.1)
        deadline = min(max(give_up, time.monotonic() + 0.1), time.monotonic() + patience)
        start, end = _range(self._prefix.encode())
        create = {
            "key": _b64(start),
            "range_end": _b64(end),
            # From the last revision itself, whose events we drop: a watch that starts where the history was cut may
            # miss a delete there (etcd issue 18089).
            "start_revision": str(max(1, self._last)),
            "progress_notify": True,
        }
        try:
            self._stream = self._store.open_watch(
                endpoint, create, self._stale, deadline, self._wake, self._what
            )
            self._next_probe = time.monotonic() + _PROBE_EVERY
            while not self._ready and not self._over and self._lost is not None and self._stream is not None:
                self._read(self._stream, deadline)
        except TimeoutError:
            self._fail(endpoint, http.Refusal(f"no answer in {patience:.1f}s"))
        except http.Refusal as refusal:
            self._fail(endpoint, refusal)
        except http.Unreachable as error:  # from logging in
            self._fail(endpoint, http.Refusal(error.message))

    def _step(self, stream: http.Connection) -> None:
        """Read until an event or the time of the next probe."""
        try:
            self._read(stream, self._next_probe)
            return
        except http.Refusal as refusal:
            self._fail(stream.endpoint, refusal)
            return
        except TimeoutError:
            pass
        try:
            self._store.probe(stream.endpoint, self._wake)
        except http.Refusal as refusal:
            self._fail(stream.endpoint, refusal)
            return
        self._next_probe = time.monotonic() + _PROBE_EVERY
        self._ready.append(Progress(self._last))

    def _read(self, stream: http.Connection, deadline: float) -> None:
        """One piece of the stream and what is complete with it: one JSON document a line."""
        piece = stream.piece(deadline)
        if not piece:
            raise http.Refusal("ended the watch", again=True)
        self._text += piece
        if len(self._text) > http.MAX_BODY:
            raise http.Refusal("sends an endless message")
        while (end := self._text.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._text[:end])
            del self._text[: end + 1]
            self._scanned = 0
            if line.strip():
                try:
                    self._take(line)
                except _Garbage as error:
                    raise http.Refusal(error.message, again=True) from None
                if self._stream is None or self._over:
                    return
        self._scanned = len(self._text)

    def _take(self, line: bytes) -> None:
        document = _document(line)
        if document is None:
            raise http.Refusal("sends what is not JSON")
        result = document.get("result")
        if not isinstance(result, dict):
            refused = _refused(document)
            self._cancelled(refused.code, refused.words)
            return
        if compacted := _int(result, "compact_revision"):
            self._ready.append(Compacted(compacted))
            self._over = True
            self._drop()
            return
        if result.get("canceled"):
            self._cancelled(0, str(result.get("cancel_reason") or "no reason given")[:500])
            return
        self._lost = None
        self._back_off = 0.0
        self._stale = None
        self._refusals.clear()
        events = _items(result, "events")
        seen = last = self._last
        changes: list[Event] = []
        for event in events:
            kv = event.get("kv")
            if not isinstance(kv, dict):
                raise _Garbage("etcd sent an event without its key")
            revision = _int(kv, "mod_revision")
            if revision <= seen:
                continue  # handed out before the stream was opened again
            last = max(last, revision)
            item = _entry(kv)
            if isinstance(item, Unreadable):
                continue
            changes.append(Delete(item.key, revision) if event.get("type") == "DELETE" else Put(item))
        self._ready += changes
        self._last = last
        if not events and not result.get("created"):
            # A progress note: everything up to its revision has been sent.
            self._last = max(self._last, _revision(result))
            self._ready.append(Progress(self._last))

    def _cancelled(self, code: int, words: str) -> None:
        """The server ended the watch. For its own troubles we go on elsewhere; what is wrong with us is raised."""
        stream = self._stream
        assert stream is not None
        endpoint = stream.endpoint
        refused = _Refused(code or _code_in(words), words)
        self._drop()
        if _token_ended(refused) and self._stale is None and self._store.token:
            self._stale = self._store.token  # the next try logs in again
            return
        _raise_if_transient(refused, endpoint, served=True)
        self._over = True
        raise self._store.explain(refused, self._what)


def _code_in(words: str) -> int:
    """`rpc error: code = PermissionDenied desc = …` is how a cancel reason names its code."""
    codes = {
        "PermissionDenied": _PERMISSION_DENIED, "permission denied": _PERMISSION_DENIED,
        "Unauthenticated": _UNAUTHENTICATED, "invalid auth token": _UNAUTHENTICATED,
        "user name is empty": _INVALID_ARGUMENT, "InvalidArgument": _INVALID_ARGUMENT,
    }  # fmt: skip
    return next((code for sign, code in codes.items() if sign in words), _UNAVAILABLE)

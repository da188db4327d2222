"""etcd v3 over gRPC, with etcd3's stubs over channels of our own: what the agent uses.

    store = EtcdGrpcStore(parse_endpoints(["http://192.168.6.15:2379"]))
    store.list("/jxdd/network/subnets/")

Of the etcd3 library only the generated stubs serve us: its client knows one endpoint and its watcher spins when
etcd is down and is silent when a token has ended. Importing this module costs 0.2 s and 20 MB.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's C core writes to stderr on its own otherwise
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # we never fork without exec
with warnings.catch_warnings():
    # etcd3's generated modules make their descriptors the old way, which protobuf 3.20 calls deprecated.
    warnings.simplefilter("ignore")
    import grpc
    from etcd3 import etcdrpc as pb
    from etcd3.etcdrpc import kv_pb2

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
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from flanctl.registry.stores.endpoints import Endpoint

Q = TypeVar("Q")
A = TypeVar("A")

PAGE = 1000
"""Keys asked for at once."""

PROGRESS_FIRST, PROGRESS_SECONDS = 1.0, 20.0
"""When a watch first asks etcd for a sign of life, and how often from then on."""

ROUND_PAUSE = 0.1
"""Seconds between two rounds over all endpoints."""

REVOKE_SECONDS = 1.0

LOOK_SECONDS = 1.0
"""How long to find out why no endpoint can be talked to, for the error's sake."""

_BACK_OFF = (0.1, 2.0)
"""Seconds between two tries to open a watch, first and longest."""

_CHANNEL_OPTIONS = (
    # A hung member or a dead host is noticed within 9 s. etcd allows a ping each 5 s.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own back-off grows to 2 minutes: an agent would find its etcd again that much too late.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),  # how long a connection may take to be made
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_ares_query_timeout", 2000),
    ("grpc.use_local_subchannel_pool", 1),
    # The default of 4 MB breaks a watch's replay after a long absence, again and again.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

_PROGRESS_REQUEST = pb.WatchRequest.FromString(b"\x1a\x00")
"""WatchRequest{progress_request{}}: field 3, which came with etcd 3.4 and etcd3's stubs do not know by name."""

_Code = grpc.StatusCode
_TRANSIENT = {_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.ABORTED, _Code.CANCELLED}
_STRANGE = {_Code.UNKNOWN, _Code.INTERNAL, _Code.UNIMPLEMENTED, _Code.DATA_LOSS}

_SILENCE, _CLOSED, _NO_TLS = "no answer", "closed the connection", "the TLS handshake failed"
_REASONS = (
    ("Connection refused", "connection refused"),
    ("timed out", _SILENCE),
    ("No route to host", "no route to host"),
    ("Network is unreachable", "network is unreachable"),
    ("errors resolving", "host name not known"),
    ("DNS resolution failed", "host name not known"),
    ("Failed parsing HTTP/2", "answers, but is not etcd (no gRPC)"),
    ("http1.x server", "answers, but is not etcd (no gRPC)"),
    ("missing selected ALPN", "answers, but is not etcd (no gRPC)"),
    ("WRONG_VERSION_NUMBER", "speaks no TLS; try http://"),
    ("Hostname Verification Check failed", "its certificate is for another name"),
    ("certificate has expired", "its certificate has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by a CA we trust"),
    ("handshake failed", _NO_TLS),
    ("TSI_DATA_CORRUPTED", _NO_TLS),
    ("Connection reset by peer", _CLOSED),
    ("Socket closed", _CLOSED),
)
"""What gRPC says, and what a person reads; the first that fits."""


class _Refused(Exception):
    """etcd's own answer to a request: no. `unsure`: an earlier try of it may have been carried out."""

    def __init__(self, code: grpc.StatusCode, words: str, *, unsure: bool = False) -> None:
        super().__init__(words)
        self.code = code
        self.words = words
        self.unsure = unsure


class _Failed(Exception):
    """An endpoint did not serve us. `again`: it may soon; `unsure`: it may have carried out what we asked."""

    def __init__(self, reason: str, *, again: bool, unsure: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.unsure = unsure


class _Member:
    """One endpoint with its channel. The channel connects at the first call."""

    def __init__(self, endpoint: Endpoint, credentials: grpc.ChannelCredentials | None) -> None:
        self.endpoint = endpoint
        if credentials is None:
            self.channel = grpc.insecure_channel(endpoint.address, options=_CHANNEL_OPTIONS)
        else:
            self.channel = grpc.secure_channel(endpoint.address, credentials, options=_CHANNEL_OPTIONS)
        self.kv = pb.KVStub(self.channel)
        self.lease = pb.LeaseStub(self.channel)
        self.auth = pb.AuthStub(self.channel)
        self.watch = pb.WatchStub(self.channel)

    def keep_alive(
        self,
        request: pb.LeaseKeepAliveRequest,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> pb.LeaseKeepAliveResponse:
        """The stream for keep-alives, used for one."""
        call = self.lease.LeaseKeepAlive(iter((request,)), timeout=timeout, metadata=metadata)
        try:
            return next(call)
        except StopIteration:
            return pb.LeaseKeepAliveResponse()
        finally:
            call.cancel()


class EtcdGrpcStore:
    """A Store (see store.py) over etcd ≥ 3.3. `timeout` in seconds bounds every call, all endpoints included.

    `cacert`, `cert` and `key` are PEM files for https endpoints. Raises NotFound, NotPermitted or Invalid if one
    cannot be read.
    """

    name = "etcd v3 over gRPC"

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
        secure = any(endpoint.scheme == "https" for endpoint in endpoints)
        self._credentials = _credentials(cacert, cert, key) if secure else None
        self._plain = http.Transport(endpoints, timeout=timeout, cacert=cacert, cert=cert, key=key)
        """Asked nothing but what ails an endpoint that gRPC cannot talk to."""
        self._members: dict[Endpoint, _Member] = {}
        self._turn = 0
        self._good: Endpoint | None = None
        self._user = user
        self._password = password or ""
        self._login = threading.Lock()
        self.token: str | None = None
        self._lock = threading.Lock()
        self._watches: set[GrpcWatch] = set()
        self._closed = False

    def describe(self) -> str:
        return self.name if self._good is None else f"{self.name} at {self._good}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        with self._lock:
            members = tuple(self._members.values())
            self._members.clear()
        for member in members:
            member.channel.close()
        self._plain.close()

    # reading

    def get(self, key: str) -> Entry | None:
        deadline = self._deadline()
        entry = self._get(key, deadline)
        if entry is None or entry.lease is None:
            return entry
        return replace(entry, ttl=self._time_to_live(entry.lease, deadline)[0])

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        deadline = self._deadline()
        first, end = _range(prefix.encode())
        start, revision = first, at or 0
        entries: list[Entry] = []
        unreadable: list[Unreadable] = []
        while True:
            request = pb.RangeRequest(key=start, range_end=end, limit=PAGE, revision=revision)
            try:
                answer, _ = self._call(lambda member: member.kv.Range, request, deadline, f"list {prefix}")
            except _Refused as refused:
                if refused.code is not _Code.OUT_OF_RANGE or not revision:
                    raise self.explain(refused, f"list {prefix}") from None
                if at is not None:
                    raise Forgotten(at) from None
                # Compacted between two pages: what we have is of a revision nobody knows any more.
                start, revision = first, 0
                entries.clear()
                unreadable.clear()
                continue
            revision = revision or answer.header.revision
            for kv in answer.kvs:
                item = _entry(kv)
                if isinstance(item, Entry):
                    entries.append(item)
                else:
                    unreadable.append(item)
            if not answer.more or not answer.kvs:
                return Snapshot(tuple(entries), revision, tuple(unreadable))
            start = answer.kvs[-1].key + b"\0"

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        deadline = self._deadline()
        leases = dict.fromkeys(entry.lease for entry in entries if entry.lease is not None)
        left = {lease: self._time_to_live(lease, deadline)[0] for lease in leases}
        return tuple(
            entry if entry.lease is None else replace(entry, ttl=left[entry.lease]) for entry in entries
        )

    # writing

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        absent = pb.Compare(
            result=pb.Compare.EQUAL, target=pb.Compare.CREATE, key=key.encode(), create_revision=0
        )
        entry, current = self._put_if(absent, key, value, ttl, f"create {key}")
        if entry is None:
            raise KeyExists(key, current)
        return entry

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        entry, current = self._put_if(_unchanged(key, expected), key, value, ttl, f"write {key}")
        if entry is None:
            raise Changed(key, current)
        return entry

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        deadline = self._deadline()
        what = f"delete {key}"
        name = key.encode()
        if expected is None:
            gone, unsure = self._ask(
                lambda member: member.kv.DeleteRange, pb.DeleteRangeRequest(key=name), deadline, what
            )
            return gone.deleted > 0 or unsure
        request = pb.TxnRequest(
            compare=[_unchanged(key, expected)],
            success=[pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=name))],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=name))],
        )
        answer, unsure = self._ask(lambda member: member.kv.Txn, request, deadline, what)
        if answer.succeeded:
            return True
        current = _current(answer)
        if current is None:
            return unsure  # gone by an earlier try of ours whose answer was lost, or never there
        raise Changed(key, current)

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        deadline = self._deadline()
        if entry.lease is not None:
            left, granted = self._time_to_live(entry.lease, deadline)
            if left > 0 and granted == _seconds(ttl):
                request = pb.LeaseKeepAliveRequest(ID=_lease_id(entry.lease))
                what = f"renew {entry.key}"
                alive, _ = self._ask(lambda member: member.keep_alive, request, deadline, what)
                if alive.TTL > 0:
                    current = self._get(entry.key, deadline)
                    if current is None or current.revision != entry.revision:
                        raise Changed(entry.key, current)
                    return replace(current, ttl=float(alive.TTL))
        return self.replace(entry.key, entry.value, ttl=ttl, expected=entry.revision)

    def watch(self, prefix: str, *, after: int) -> GrpcWatch:
        watch = GrpcWatch(self, prefix, after)
        with self._lock:
            self._watches.add(watch)
            closed = self._closed
        if closed:
            watch.close()
        return watch

    # for GrpcWatch

    def revision(self, key: str) -> int:
        """The registry's revision now, read through consensus."""
        request = pb.RangeRequest(key=key.encode(), limit=1)
        answer, _ = self._ask(lambda member: member.kv.Range, request, self._deadline(), f"read {key}")
        return answer.header.revision

    def first(self) -> int:
        """The index of the endpoint to ask next."""
        return self._turn

    def forget(self, watch: GrpcWatch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def member(self, endpoint: Endpoint) -> _Member:
        with self._lock:
            if self._closed:
                raise RegistryUnreachable("the connection to etcd has been closed")
            member = self._members.get(endpoint)
            if member is None:
                credentials = self._credentials if endpoint.scheme == "https" else None
                member = self._members[endpoint] = _Member(endpoint, credentials)
            return member

    def session(self, deadline: float, stale: str | None = None) -> str | None:
        """The token to send; None without a user, empty while etcd asks for none. `stale` is one that has ended."""
        if self._user is None:
            return None
        with self._login:
            if self.token is None or self.token == stale:
                self.token = self._log_in(self._user, deadline)
            return self.token

    def unreachable(
        self, what: str, reasons: Mapping[Endpoint, str], *, seconds: float | None, unsure: bool = False
    ) -> FlanctlError:
        """The error for people; `in 5s` only if we did wait."""
        deadline = time.monotonic() + LOOK_SECONDS
        waited = seconds is not None
        refusals = {at: self._look(at, reason, deadline, waited=waited) for at, reason in reasons.items()}
        error = self._plain.nobody(refusals, seconds or 0.0, unsure=unsure)
        error.message = f"cannot {what}: {error.message}"
        return error

    def _look(self, endpoint: Endpoint, reason: str, deadline: float, *, waited: bool) -> http.Refusal:
        """gRPC keeps to itself that a port speaks TLS, or none, or wants another certificate; HTTP tells."""
        if reason in {_CLOSED, _NO_TLS}:
            patience = max(0.0, deadline - time.monotonic())
            try:
                self._plain.ask(endpoint, "GET", "/version", deadline=deadline, patience=patience)
            except http.Refusal as refusal:
                if refusal.kind != "silent":
                    return http.Refusal(refusal.reason, again=waited, kind=refusal.kind)
            except FlanctlError:
                pass  # a PEM file that was good when we began
        return http.Refusal(reason, again=waited)

    def explain(self, refused: _Refused, what: str) -> FlanctlError:
        """etcd's refusal as ours; its words are kept."""
        words = refused.words
        if refused.code is _Code.PERMISSION_DENIED:
            who = f'user "{self._user}"' if self._user else "we"
            return NotPermitted(f"{who} may not {what} (etcd: {words})")
        if _login_refused(refused):
            if self._user is None:
                return NotPermitted(
                    f"cannot {what}: etcd wants a login (etcd: {words})", hint="--user NAME, and its password"
                )
            return NotPermitted(f'cannot {what}: login as "{self._user}" was refused (etcd: {words})')
        if "database space exceeded" in words:
            return RegistryUnreachable(
                f"cannot {what}: etcd is full (etcd: {words})",
                hint="etcdctl alarm list; compact, defrag and disarm",
            )
        return Invalid(f"cannot {what} (etcd: {words})")

    # inside

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    def _get(self, key: str, deadline: float) -> Entry | None:
        request = pb.RangeRequest(key=key.encode())
        answer, _ = self._ask(lambda member: member.kv.Range, request, deadline, f"read {key}")
        entry = _entry(answer.kvs[0]) if answer.kvs else None
        return entry if isinstance(entry, Entry) else None

    def _time_to_live(self, lease: str, deadline: float) -> tuple[float, int]:
        """Seconds left (0 when the lease has ended) and seconds granted."""
        request = pb.LeaseTimeToLiveRequest(ID=_lease_id(lease))
        answer, _ = self._ask(
            lambda member: member.lease.LeaseTimeToLive, request, deadline, f"read lease {lease}"
        )
        return float(max(0, answer.TTL)), answer.grantedTTL

    def _grant(self, ttl: float, deadline: float, what: str) -> int:
        """A new lease. The id is ours, so that asking again after a lost answer makes no second one."""
        lease = (int.from_bytes(os.urandom(8), "big") >> 1) or 1
        request = pb.LeaseGrantRequest(TTL=_seconds(ttl), ID=lease)
        try:
            self._call(lambda member: member.lease.LeaseGrant, request, deadline, what)
        except _Refused as refused:
            if not (refused.unsure and "lease already exists" in refused.words):
                raise self.explain(refused, what) from None
        return lease

    def _revoke(self, lease: int) -> None:
        """A lease nobody uses ends by itself too, so failing to revoke it is no error."""
        if lease:
            request = pb.LeaseRevokeRequest(ID=lease)
            deadline = time.monotonic() + REVOKE_SECONDS
            try:
                self._ask(lambda member: member.lease.LeaseRevoke, request, deadline, "revoke a lease")
            except FlanctlError:
                pass

    def _put_if(
        self, guard: pb.Compare, key: str, value: bytes, ttl: float | None, what: str
    ) -> tuple[Entry | None, Entry | None]:
        """Put under a fresh lease if `guard` holds: (what was written, what is there instead).

        When an answer was lost the transaction is sent again; then the guard fails on our own value, which the
        lease's id tells from anybody else's.
        """
        deadline = self._deadline()
        lease = 0 if ttl is None else self._grant(ttl, deadline, what)
        name = key.encode()
        request = pb.TxnRequest(
            compare=[guard],
            success=[pb.RequestOp(request_put=pb.PutRequest(key=name, value=value, lease=lease))],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=name))],
        )
        try:
            answer, unsure = self._ask(lambda member: member.kv.Txn, request, deadline, what)
        except FlanctlError as error:
            if not (
                isinstance(error, http.Unreachable) and error.unsure
            ):  # else the key may hang on the lease
                self._revoke(lease)
            raise
        if answer.succeeded:
            return Entry(key, value, answer.header.revision, _lease_name(lease), ttl), None
        current = _current(answer)
        if unsure and current is not None and (current.value, current.lease) == (value, _lease_name(lease)):
            return replace(current, ttl=ttl), None
        self._revoke(lease)
        return None, current

    def _ask(
        self, method: Callable[[_Member], pb.Unary[Q, A]], request: Q, deadline: float, what: str
    ) -> tuple[A, bool]:
        """As `_call`, with etcd's refusals as our errors."""
        try:
            return self._call(method, request, deadline, what)
        except _Refused as refused:
            raise self.explain(refused, what) from None

    def _call(
        self, method: Callable[[_Member], pb.Unary[Q, A]], request: Q, deadline: float, what: str
    ) -> tuple[A, bool]:
        """One request with its answer, and whether an earlier try of it may have been carried out.

        Logs in when a user is set, and once more when the token has ended. Raises _Refused and RegistryUnreachable.
        """
        stale: str | None = None
        while True:
            token = self.session(deadline, stale)
            try:
                return self._round(method, request, token, deadline, what)
            except _Refused as refused:
                if token is None or stale is not None or not _token_ended(refused):
                    raise
            stale = token

    def _log_in(self, user: str, deadline: float) -> str:
        request = pb.AuthenticateRequest(name=user, password=self._password)
        what = f'log in as "{user}"'
        try:
            answer, _ = self._round(lambda member: member.auth.Authenticate, request, None, deadline, what)
        except _Refused as refused:
            if (
                refused.code is _Code.FAILED_PRECONDITION
            ):  # "authentication is not enabled": as etcdctl, go on
                return ""
            raise self.explain(refused, what) from None
        return answer.token

    def _round(
        self,
        method: Callable[[_Member], pb.Unary[Q, A]],
        request: Q,
        token: str | None,
        deadline: float,
        what: str,
    ) -> tuple[A, bool]:
        """Ask one endpoint after the other, from the one that answered last, each with its share of the time.

        Goes round again while an endpoint may come back; where all refuse the connection nothing is waited for.
        """
        started = time.monotonic()
        metadata = _metadata(token)
        reasons: dict[Endpoint, str] = {}
        unsure = False
        count = len(self.endpoints)
        while True:
            again = False
            for tried in range(count):
                turn = self._turn
                endpoint = self.endpoints[turn % count]
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                share = left / (count - tried)
                try:
                    answer = method(self.member(endpoint))(request, timeout=share, metadata=metadata)
                except grpc.RpcError as error:
                    try:
                        self.judge(error, share)
                    except _Failed as failed:
                        _note(reasons, endpoint, failed.reason)
                        again = again or failed.again
                        unsure = unsure or failed.unsure
                    except _Refused as refused:
                        refused.unsure = unsure
                        raise
                except ValueError as error:  # gRPC: "Cannot invoke RPC on closed channel!"
                    raise RegistryUnreachable("the connection to etcd has been closed") from error
                else:
                    self._good = endpoint
                    return answer, unsure
                with self._lock:
                    if self._turn == turn:
                        self._turn = turn + 1
            left = deadline - time.monotonic()
            if left <= 0 or not again:
                seconds = time.monotonic() - started if again or left <= 0 else None
                raise self.unreachable(what, reasons, seconds=seconds, unsure=unsure)
            time.sleep(min(ROUND_PAUSE, left))

    def judge(self, error: grpc.RpcError, seconds: float) -> None:
        """Raise _Failed if another endpoint may do better, _Refused if this is etcd's answer."""
        code, words = error.code(), _words(error.details())
        connecting = words.startswith(("failed to connect", "errors resolving", "DNS resolution"))
        overload = code is _Code.RESOURCE_EXHAUSTED and "too many requests" in words
        if code in _TRANSIENT or overload:
            reason = _reason(words)
            if code is _Code.DEADLINE_EXCEEDED:
                reason = f"{_SILENCE} in {seconds:.1f}s"
            elif reason == _SILENCE and not connecting:
                reason = words  # etcd's own "request timed out, possibly due to …"
            # A packet may be lost while connecting too; a refusal is there to stay for now.
            raise _Failed(reason, again=reason == _SILENCE or not connecting, unsure=not connecting) from None
        if code in _STRANGE and not _token_ended(_Refused(code, words)):
            raise _Failed(f"answers, but not as etcd does ({words})", again=False, unsure=True) from None
        raise _Refused(code, words) from None


class _Stream:
    """One watch on one member: the call, and the thread gRPC runs our requests in, which also keeps the time."""

    def __init__(self, member: _Member, create: pb.WatchRequest, token: str | None, patience: float) -> None:
        self.endpoint = member.endpoint
        self.patience = patience
        self.late = False
        """The member did not create the watch within `patience` seconds of being asked (connecting not counted)."""
        self._heard = threading.Event()
        self._done = threading.Event()
        # With hasleader etcd ends the watch when the member has no leader; else it stays silent for ever.
        metadata = (*_metadata(token), ("hasleader", "true"))
        self._call = member.watch.Watch(self._requests(create), metadata=metadata)

    def next(self) -> pb.WatchResponse:
        return next(self._call)

    def heard(self) -> None:
        """The watch has been created."""
        self._heard.set()

    def end(self) -> None:
        self._done.set()
        self._heard.set()
        self._call.cancel()

    def _requests(self, create: pb.WatchRequest) -> Iterator[pb.WatchRequest]:
        yield create
        if not self._heard.wait(self.patience):
            self.late = True
            self._call.cancel()
        pause = PROGRESS_FIRST
        while not self._done.wait(pause):
            yield _PROGRESS_REQUEST
            pause = PROGRESS_SECONDS


class GrpcWatch:
    """Changes below a prefix. One stream at a time; when it breaks, another member goes on after the last event.

    Iterate in one thread; `close` from any.
    """

    def __init__(self, store: EtcdGrpcStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._last = after
        """The highest revision of which everything was taken in."""
        self._ready: deque[Event] = deque()
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._closed = threading.Event()
        self._over = False
        self._turn = store.first()
        self._lost: float | None = None
        """Since when no member serves us (time.monotonic)."""
        self._reasons: dict[Endpoint, str] = {}
        self._back_off = 0.0
        self._stale: str | None = None
        """A token etcd called ended."""

    def __iter__(self) -> GrpcWatch:
        return self

    def __enter__(self) -> GrpcWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._drop()
        self._store.forget(self)

    def __next__(self) -> Event:
        while not self._closed.is_set():
            if self._ready:
                return self._ready.popleft()
            if self._over:
                break
            stream = self._stream or self._open()
            if stream is not None:
                self._read(stream)
        raise StopIteration

    # inside; called by the iterating thread

    def _open(self) -> _Stream | None:
        """A stream on the next member, not yet known to work; None if there was none to be had."""
        store = self._store
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
        patience = max(0.1, min(store.timeout / len(store.endpoints), self._lost + store.timeout - now))
        endpoint = store.endpoints[self._turn % len(store.endpoints)]
        first, end = _range(self._prefix.encode())
        # From the last revision itself, whose events we drop: a watch that starts in the future gets no answer to
        # progress requests (etcd 3.5.8 and later), and one that starts where the history was cut may miss a delete
        # there (etcd issue 18089).
        create = pb.WatchCreateRequest(
            key=first, range_end=end, start_revision=max(1, self._last), progress_notify=True
        )
        try:
            token = store.session(now + patience, self._stale)
            member = store.member(endpoint)
            with self._lock:
                if not self._closed.is_set():
                    self._stream = _Stream(member, pb.WatchRequest(create_request=create), token, patience)
                return self._stream
        except ValueError:  # gRPC: "Cannot invoke RPC on closed channel!"
            self._fail(endpoint, "the connection has been closed")
        except http.Unreachable as error:  # nobody to log in to
            self._fail(endpoint, next(iter(error.details)).rpartition("   ")[2])
        return None

    def _read(self, stream: _Stream) -> None:
        try:
            response = stream.next()
        except StopIteration:
            self._fail(stream.endpoint, "ended the watch")
        except grpc.RpcError as error:
            if self._closed.is_set():
                return
            if stream.late:
                self._fail(stream.endpoint, f"no answer in {stream.patience:.1f}s")
                return
            try:
                self._store.judge(error, stream.patience)
            except _Failed as failed:
                self._fail(stream.endpoint, failed.reason)
            except _Refused as refused:
                self._refused(refused, stream.endpoint)
        else:
            self._take(response, stream)

    def _take(self, response: pb.WatchResponse, stream: _Stream) -> None:
        if response.compact_revision:
            self._ready.append(Compacted(response.compact_revision))
            self._over = True
            self._drop()
            return
        if response.canceled:
            words = _words(response.cancel_reason)
            self._refused(_Refused(_code_in(words), words), stream.endpoint)
            return
        stream.heard()
        self._lost = None
        self._reasons.clear()
        self._back_off = 0.0
        self._stale = None
        behind = response.created and response.header.revision < self._last
        if behind and self._store.revision(self._prefix) < self._last:
            # Not a member that lags, but an etcd that lost its data: it would be silent until it has caught up.
            self._ready.append(Compacted(response.header.revision))
            self._over = True
            self._drop()
            return
        seen = self._last
        for event in response.events:
            revision = event.kv.mod_revision
            if revision <= seen:
                continue  # taken in before the stream was opened again
            self._last = max(self._last, revision)
            item = _entry(event.kv)
            if isinstance(item, Unreadable):
                continue
            deleted = event.type == kv_pb2.Event.DELETE
            self._ready.append(Delete(item.key, revision) if deleted else Put(item))
        if not response.events and not response.created:
            # What etcd sends on its own counts for this watch. Its answer to our request (watch id -1) may overtake
            # events before 3.4.25 and 3.5.8 (etcd issue 15220): a sign of life, but nothing to resume from.
            if response.watch_id >= 0:
                self._last = max(self._last, response.header.revision)
            self._ready.append(Progress(self._last))

    def _refused(self, refused: _Refused, endpoint: Endpoint) -> None:
        """etcd ended the watch. For its own troubles we go on elsewhere; what is wrong with us is raised."""
        if _token_ended(refused) and self._store.token is not None and self._stale is None:
            self._drop()
            self._stale = self._store.token  # the next try logs in again
            return
        if refused.code is _Code.UNAVAILABLE:
            self._fail(endpoint, refused.words or "ended the watch")
            return
        self._over = True
        self._drop()
        raise self._store.explain(refused, f"watch {self._prefix}")

    def _fail(self, endpoint: Endpoint, reason: str) -> None:
        """A member does not serve us now: try the next, more and more slowly, and give up after `timeout`."""
        self._drop()
        _note(self._reasons, endpoint, reason)
        self._turn += 1
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
        gone = now - self._lost
        if gone >= self._store.timeout:
            self._lost = None  # who goes on iterating has us try again
            raise self._store.unreachable(f"watch {self._prefix}", self._reasons, seconds=gone) from None
        if self._back_off == 0.0 or self._turn % len(self._store.endpoints) == 0:
            self._back_off = min(max(_BACK_OFF[0], self._back_off * 2), _BACK_OFF[1])
        self._closed.wait(min(self._back_off, self._store.timeout - gone))

    def _drop(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.end()


def _credentials(cacert: str | None, cert: str | None, key: str | None) -> grpc.ChannelCredentials:
    """Without `cacert` the system's CAs count, as for curl and etcdctl. A `cert` file may hold the key too."""
    import ssl

    from flanctl.registry.stores.http import tls_context

    tls_context(
        cacert, cert, key
    )  # OpenSSL looks at the files and says what is wrong; gRPC only fails to connect
    roots = cacert or ssl.get_default_verify_paths().cafile
    files = (roots, None if cert is None else key or cert, cert)
    return grpc.ssl_channel_credentials(
        *(None if path is None else Path(path).read_bytes() for path in files)
    )


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return (("token", token),) if token else ()


def _words(details: str | None) -> str:
    return (details or "no reason given")[:500].removeprefix("etcdserver: ")


def _note(reasons: dict[Endpoint, str], endpoint: Endpoint, reason: str) -> None:
    """What was said before tells more than a silence, and a first silence was the longest."""
    if endpoint not in reasons or not reason.startswith(_SILENCE):
        reasons[endpoint] = reason


def _reason(words: str) -> str:
    return next((reason for sign, reason in _REASONS if sign in words), words)


def _token_ended(refused: _Refused) -> bool:
    return refused.code is _Code.UNAUTHENTICATED or any(
        sign in refused.words
        for sign in ("invalid auth token", "user name is empty", "revision of auth store is old")
    )


def _login_refused(refused: _Refused) -> bool:
    return _token_ended(refused) or any(
        sign in refused.words for sign in ("authentication failed", "user name not found")
    )


def _code_in(words: str) -> grpc.StatusCode:
    """A cancelled watch names its reason only in words; what we do not know is the member's own trouble."""
    signs = {
        "ermission denied": _Code.PERMISSION_DENIED,
        "PermissionDenied": _Code.PERMISSION_DENIED,
        "invalid auth token": _Code.UNAUTHENTICATED,
        "Unauthenticated": _Code.UNAUTHENTICATED,
        "user name is empty": _Code.INVALID_ARGUMENT,
        "InvalidArgument": _Code.INVALID_ARGUMENT,
    }
    return next((code for sign, code in signs.items() if sign in words), _Code.UNAVAILABLE)


def _range(prefix: bytes) -> tuple[bytes, bytes]:
    """First key and end of everything that starts with `prefix` (etcd: "\\0" is the end of all keys)."""
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return prefix or b"\0", b"\0"
    return prefix, stem[:-1] + bytes([stem[-1] + 1])


def _seconds(ttl: float) -> int:
    return max(1, math.ceil(ttl))


def _unchanged(key: str, expected: int) -> pb.Compare:
    return pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key.encode(), mod_revision=expected)


def _lease_name(lease: int) -> str | None:
    return str(lease) if lease else None


def _lease_id(lease: str) -> int:
    return int(lease)


def _entry(kv: kv_pb2.KeyValue) -> Entry | Unreadable:
    try:
        key = kv.key.decode()
    except UnicodeDecodeError:
        return Unreadable(kv.key)
    return Entry(key, kv.value, kv.mod_revision, _lease_name(kv.lease))


def _current(answer: pb.TxnResponse) -> Entry | None:
    """What the range in a transaction's failure branch found."""
    for response in answer.responses:
        for kv in response.response_range.kvs:
            entry = _entry(kv)
            if isinstance(entry, Entry):
                return entry
    return None

"""etcd v3 over gRPC, with etcd3's stubs over channels of our own: for where the JSON gateway is off.

    store = EtcdGrpcStore(parse_endpoints(["http://192.168.6.15:2379"]))
    store.list("/jxdd/network/subnets/")

Of the etcd3 library only the generated stubs serve us: its client knows one endpoint and its watcher spins when
etcd is down and is silent when a token has ended. Importing this module costs 0.2 s and 20 MB.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's C core writes to stderr on its own otherwise
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # we never fork without exec
# Names as every other program of the host has them (nsswitch.conf). gRPC's own resolver asks a name server even for what
# stands in /etc/hosts, and has no answer while that one is away.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
with warnings.catch_warnings():
    # etcd3's generated modules make their descriptors the old way, which protobuf 3.20 calls deprecated.
    warnings.simplefilter("ignore")
    import grpc
    from etcd3 import etcdrpc as pb
    from etcd3.etcdrpc import kv_pb2

from flanctl.errors import FlanctlError, RegistryUnreachable
from flanctl.registry.stores import http
from flanctl.registry.stores.etcd_v3 import (
    ABORTED,
    CANCELLED,
    DATA_LOSS,
    DEADLINE,
    INTERNAL,
    UNAVAILABLE,
    UNIMPLEMENTED,
    UNKNOWN,
    Deed,
    EtcdV3Store,
    Garbage,
    Page,
    Refused,
    Txn,
    V3Watch,
    cancelled,
    page_of,
    prefix_range,
    readable,
)
from flanctl.registry.stores.store import Entry, Unreadable
from flanctl.registry.stores.watch import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flanctl.registry.stores.endpoints import Endpoint
    from flanctl.registry.stores.store import Event
    from flanctl.registry.stores.tls import TlsFiles

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")

PROGRESS_FIRST, PROGRESS_SECONDS = 1.0, 20.0
"""When a watch first asks etcd for a sign of life, and how often from then on."""

ROUND_PAUSE = 0.1
"""Seconds between two rounds over all endpoints."""

LOOK_SECONDS = 1.0
"""How long to find out why no endpoint can be talked to, for the error's sake."""

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
    # Not 30 s: a member that moved is looked up again as soon as its old address is silent.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # The default of 4 MB breaks a watch's replay after a long absence, again and again.
    ("grpc.max_receive_message_length", http.MAX_BODY),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

_PROGRESS_REQUEST = pb.WatchRequest.FromString(b"\x1a\x00")
"""WatchRequest{progress_request{}}: field 3, which came with etcd 3.4 and etcd3's stubs do not know by name."""

_TRANSIENT = {UNAVAILABLE, DEADLINE, ABORTED, CANCELLED}
_STRANGE = {UNKNOWN, INTERNAL, UNIMPLEMENTED, DATA_LOSS}

_SILENCE, _CLOSED, _NO_TLS = "no answer", "closed the connection", "the TLS handshake failed"
_UNTRUSTED = "its certificate is not trusted"
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
    ("Hostname Verification Check failed", _UNTRUSTED),
    ("certificate has expired", _UNTRUSTED),
    ("CERTIFICATE_VERIFY_FAILED", _UNTRUSTED),
    ("handshake failed", _NO_TLS),
    ("TSI_DATA_CORRUPTED", _NO_TLS),
    ("Connection reset by peer", _CLOSED),
    ("Socket closed", _CLOSED),
)
"""What gRPC says, and what a person reads; the first that fits."""


class _Member:
    """One endpoint with its channel. The channel connects at the first call."""

    def __init__(self, endpoint: Endpoint, files: TlsFiles) -> None:
        self.endpoint = endpoint
        self.generation = 0
        """The TLS files' that the channel was made with."""
        if endpoint.scheme == "https":
            self.generation = files.look()
            credentials = grpc.ssl_channel_credentials(*files.pem())
            self.channel = grpc.secure_channel(endpoint.address, credentials, options=_CHANNEL_OPTIONS)
        else:
            self.channel = grpc.insecure_channel(endpoint.address, options=_CHANNEL_OPTIONS)
        self.kv = pb.KVStub(self.channel)
        self.lease = pb.LeaseStub(self.channel)
        self.auth = pb.AuthStub(self.channel)
        self.cluster = pb.ClusterStub(self.channel)
        self.maintenance = pb.MaintenanceStub(self.channel)
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


class EtcdGrpcStore(EtcdV3Store):
    """EtcdV3Store by gRPC. `cacert`, `cert` and `key` are PEM files for https endpoints.

    Raises what http.Transport raises for them.
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
        super().__init__(endpoints, timeout=timeout, user=user, password=password)
        self._plain = http.Transport(endpoints, timeout=timeout, cacert=cacert, cert=cert, key=key)
        """Asked nothing but what ails an endpoint that gRPC cannot talk to. It reads the PEM files too: OpenSSL says what is
        wrong with one, gRPC only fails to connect."""
        self._members: dict[Endpoint, _Member] = {}
        self._turn = 0
        self._good: Endpoint | None = None

    def describe(self) -> str:
        return self.name if self._good is None else f"{self.name} at {self._good}"

    def close(self) -> None:
        super().close()
        with self.lock:
            members = tuple(self._members.values())
            self._members.clear()
        for member in members:
            member.channel.close()
        self._plain.close()

    # one request each

    def _range(
        self, deed: Deed, start: bytes, end: bytes | None, *, limit: int = 0, revision: int = 0
    ) -> Page:
        request = pb.RangeRequest(key=start, range_end=end or b"", limit=limit, revision=revision)

        def parse(answer: pb.RangeResponse) -> Page:
            found = ((kv.key, kv.value, kv.mod_revision, kv.lease) for kv in answer.kvs)
            return page_of(found, start, end, more=answer.more, revision=answer.header.revision)

        return self._logged_in(
            deed, lambda token: self._round(lambda member: member.kv.Range, request, token, deed, parse)
        )[0]

    def _put(self, deed: Deed, key: bytes, value: bytes, lease: int, expected: int) -> Txn:
        put = pb.PutRequest(key=key, value=value, lease=lease)
        return self._transaction(deed, key, expected, pb.RequestOp(request_put=put))

    def _delete_at(self, deed: Deed, key: bytes, expected: int) -> Txn:
        gone = pb.DeleteRangeRequest(key=key)
        return self._transaction(deed, key, expected, pb.RequestOp(request_delete_range=gone))

    def _delete(self, deed: Deed, key: bytes) -> bool:
        request = pb.DeleteRangeRequest(key=key)
        answer, unsure = self._call(lambda member: member.kv.DeleteRange, request, deed)
        return answer.deleted > 0 or unsure

    def _transaction(self, deed: Deed, key: bytes, expected: int, act: pb.RequestOp) -> Txn:
        if expected:
            guard = pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=expected)
        else:
            guard = pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.CREATE, key=key, create_revision=0)
        request = pb.TxnRequest(
            compare=[guard],
            success=[act],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=key))],
        )
        answer, unsure = self._call(lambda member: member.kv.Txn, request, deed)
        return Txn(answer.succeeded, answer.header.revision, _current(answer), unsure)

    def _lease_grant(self, deed: Deed, lease: int, ttl: int) -> None:
        self._call(lambda member: member.lease.LeaseGrant, pb.LeaseGrantRequest(TTL=ttl, ID=lease), deed)

    def _lease_revoke(self, deed: Deed, lease: int) -> None:
        self._call(lambda member: member.lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease), deed)

    def _lease_left(self, deed: Deed, lease: int) -> tuple[int, int]:
        request = pb.LeaseTimeToLiveRequest(ID=lease)
        answer, _ = self._call(lambda member: member.lease.LeaseTimeToLive, request, deed)
        return answer.TTL, answer.grantedTTL

    def _lease_keep(self, deed: Deed, lease: int) -> int:
        request = pb.LeaseKeepAliveRequest(ID=lease)
        return self._call(lambda member: member.keep_alive, request, deed)[0].TTL

    def _authenticate(self, deed: Deed, user: str, password: str, cancel: int) -> str:  # noqa: ARG002  no descriptor
        request = pb.AuthenticateRequest(name=user, password=password)
        return self._round(lambda member: member.auth.Authenticate, request, None, deed, _as_it_is)[0].token

    def _out_of_space(self, deed: Deed) -> Sequence[int]:
        request = pb.AlarmRequest(action=pb.AlarmRequest.GET)
        answer, _ = self._call(lambda member: member.maintenance.Alarm, request, deed)
        return [alarm.memberID for alarm in answer.alarms if alarm.alarm == pb.NOSPACE]

    def _names(self, deed: Deed) -> Mapping[int, str]:
        request = pb.MemberListRequest()
        answer, _ = self._call(lambda member: member.cluster.MemberList, request, deed)
        return {member.ID: member.name for member in answer.members}

    def _new_watch(self, prefix: str, after: int) -> GrpcWatch:
        return GrpcWatch(self, prefix, after)

    # for GrpcWatch

    def first(self) -> int:
        """The index of the endpoint to ask next."""
        return self._turn

    def member(self, endpoint: Endpoint) -> _Member:
        """With the certificate that is in use now: a channel keeps the one it was made with."""
        generation = self._plain.tls.look() if endpoint.scheme == "https" else 0
        with self.lock:
            if self._closed:
                raise RegistryUnreachable("the connection to etcd has been closed")
            member = self._members.get(endpoint)
            if member is not None and member.generation == generation:
                return member
            fresh = self._members[endpoint] = _Member(endpoint, self._plain.tls)
        if member is not None:
            member.channel.close()  # its watch goes on over the new one
        return fresh

    def _leave(self, endpoint: Endpoint) -> None:
        """A name may have other addresses: a new channel goes on to one that speaks, the old stays where it hangs."""
        with self.lock:
            member = self._members.pop(endpoint, None)
        if member is not None:
            member.channel.close()

    def renewed(self, member: _Member) -> bool:
        """Whether the TLS files have changed since its channel was made."""
        return member.generation > 0 and self._plain.tls.look() != member.generation

    def unreachable(
        self,
        what: str,
        refusals: Mapping[Endpoint, http.Refusal],
        seconds: float | None,
        *,
        unsure: bool = False,
    ) -> FlanctlError:
        """The error for people; `in 5s` only if we did wait."""
        deadline = time.monotonic() + LOOK_SECONDS
        waited = seconds is not None
        seen = {at: self._look(at, said, deadline, waited=waited) for at, said in refusals.items()}
        error = self._plain.nobody(seen, seconds or 0.0, unsure=unsure)
        error.message = f"cannot {what}: {error.message}"
        return error

    def _look(self, endpoint: Endpoint, said: http.Refusal, deadline: float, *, waited: bool) -> http.Refusal:
        """gRPC keeps to itself that a port speaks TLS, or none, or whose certificate it has; HTTP tells."""
        if said.reason in {_CLOSED, _NO_TLS, _UNTRUSTED}:
            patience = max(0.0, deadline - time.monotonic())
            try:
                self._plain.ask(endpoint, "GET", "/version", deadline=deadline, patience=patience)
            except http.Refusal as refusal:
                if refusal.kind != "silent":
                    return http.Refusal(refusal.reason, again=waited, kind=refusal.kind)
            except FlanctlError:
                pass  # a PEM file that was good when we began
        return http.Refusal(said.reason, again=waited)

    # inside

    def _call(self, method: Callable[[_Member], pb.Unary[Q, A]], request: Q, deed: Deed) -> tuple[A, bool]:
        """One request with its answer, and whether an earlier try of it may have been carried out."""
        return self._logged_in(deed, lambda token: self._round(method, request, token, deed, _as_it_is))

    def _round(
        self,
        method: Callable[[_Member], pb.Unary[Q, A]],
        request: Q,
        token: str | None,
        deed: Deed,
        parse: Callable[[A], T],
    ) -> tuple[T, bool]:
        """Ask one endpoint after the other, from the one that answered last, each with its share of the time.

        An answer that `parse` calls Garbage is none.

        Goes round again while an endpoint may come back; where all refuse the connection nothing is waited for.
        """
        started = time.monotonic()
        refusals: dict[Endpoint, http.Refusal] = {}
        unsure = False
        count = len(self.endpoints)
        while True:
            again = False
            for tried in range(count):
                turn = self._turn
                endpoint = self.endpoints[turn % count]
                left = deed.deadline - time.monotonic()
                if left <= 0:
                    break
                share = http.patience(left, count, tried, endpoint)
                try:
                    answer = method(self.member(endpoint))(request, timeout=share, metadata=_metadata(token))
                    parsed = parse(answer)
                except grpc.RpcError as error:
                    refusal = self.judge(error, share)
                    http.note(refusals, endpoint, refusal)
                    if refusal.kind == "silent" and endpoint.named:
                        self._leave(endpoint)
                    again = again or refusal.again
                    unsure = unsure or refusal.unsure
                except Garbage as error:
                    http.note(refusals, endpoint, http.Refusal(error.message, unsure=True))
                    unsure = True
                except ValueError as error:  # gRPC: "Cannot invoke RPC on closed channel!"
                    raise RegistryUnreachable("the connection to etcd has been closed") from error
                else:
                    self._good = endpoint
                    return parsed, unsure
                with self.lock:
                    if self._turn == turn:
                        self._turn = turn + 1
            left = deed.deadline - time.monotonic()
            if left <= 0 or not again:
                seconds = time.monotonic() - started if again or left <= 0 else None
                raise self.unreachable(deed.what, refusals, seconds, unsure=unsure)
            time.sleep(min(ROUND_PAUSE, left))

    def judge(self, error: grpc.RpcError, seconds: float) -> http.Refusal:
        """Why another endpoint may do better. Raises Refused if this is etcd's answer."""
        refused = Refused(error.code().value[0], error.details() or "no reason given")
        code, words = refused.code, refused.words
        if "Received message larger" in words:  # our own gRPC's words; etcd's begin small
            return http.Refusal(f"answers with more than {http.MAX_BODY >> 20} MB", unsure=True)
        connecting = words.startswith(("failed to connect", "errors resolving", "DNS resolution"))
        if code in _TRANSIENT or refused.overload:
            reason = _reason(words)
            kind = "silent" if reason == _SILENCE else ""
            if code == DEADLINE:
                reason, kind = f"{_SILENCE} in {seconds:.1f}s", "silent"
            elif reason == _SILENCE and not connecting:
                reason = words  # etcd's own "request timed out, possibly due to …"
            # A packet may be lost while connecting too; a refusal is there to stay for now.
            again = reason == _SILENCE or not connecting
            return http.Refusal(reason, again=again, unsure=not connecting, kind=kind)
        if code in _STRANGE and not refused.token_ended:
            return http.Refusal(f"answers, but not as etcd does ({words})", unsure=True)
        raise refused from None


class _Stream:
    """One watch on one member: the call, and the thread gRPC runs our requests in, which also keeps the time."""

    def __init__(self, member: _Member, create: pb.WatchRequest, token: str | None, patience: float) -> None:
        self.member = member
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


class GrpcWatch(V3Watch):
    """Changes below a prefix. One stream at a time; when it breaks, another member goes on after the last event."""

    def __init__(self, store: EtcdGrpcStore, prefix: str, after: int) -> None:
        super().__init__(store, prefix, after)
        self._store = store
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._closed = threading.Event()

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
        store, endpoint, patience = self._store, self._endpoint, self._begin()
        first, end = prefix_range(self._prefix.encode())
        # From the last revision itself, whose events we drop: a watch that starts in the future gets no answer to
        # progress requests (etcd 3.5.8 and later), and one that starts where the history was cut may miss a delete
        # there (etcd issue 18089).
        create = pb.WatchCreateRequest(
            key=first, range_end=end, start_revision=max(1, self._last), progress_notify=True
        )
        try:
            token = store.session(time.monotonic() + patience, self._stale)
            member = store.member(endpoint)
            with self._lock:
                if not self._closed.is_set():
                    self._stream = _Stream(member, pb.WatchRequest(create_request=create), token, patience)
                return self._stream
        except ValueError:  # gRPC: "Cannot invoke RPC on closed channel!"
            self._fail(endpoint, http.Refusal("the connection has been closed"))
        except http.Unreachable as error:  # nobody to log in to
            self._fail(endpoint, http.Refusal(next(iter(error.details)).rpartition("   ")[2]))
        return None

    def _read(self, stream: _Stream) -> None:
        try:
            response = stream.next()
        except StopIteration:
            self._fail(stream.endpoint, http.Refusal("ended the watch"))
        except grpc.RpcError as error:
            if self._closed.is_set():
                return
            if stream.late:
                words = f"{_SILENCE} in {stream.patience:.1f}s"
                self._fail(stream.endpoint, http.Refusal(words, kind="silent"))
                return
            try:
                self._fail(stream.endpoint, self._store.judge(error, stream.patience))
            except Refused as refused:
                self._refused(refused, stream.endpoint)
        else:
            self._response(response, stream)

    def _response(self, response: pb.WatchResponse, stream: _Stream) -> None:
        if response.compact_revision:
            self._forgotten(response.compact_revision)
            return
        if response.canceled:
            self._refused(cancelled(response.cancel_reason or "no reason given"), stream.endpoint)
            return
        stream.heard()
        if response.created:
            self._created(response.header.revision)
        self._take(
            [
                Change(_entry(event.kv), event.kv.mod_revision, event.type == kv_pb2.Event.DELETE)
                for event in response.events
            ],
            # What etcd sends on its own counts for this watch. Its answer to our request (watch id -1) may overtake
            # events before 3.4.25 and 3.5.8 (etcd issue 15220): a sign of life, but nothing to resume from.
            0 if response.events or response.created or response.watch_id < 0 else response.header.revision,
        )
        if not response.events and not response.created:
            self._alive()
        if self._store.renewed(stream.member):
            self._drop()  # and open again with the certificate that is in use now

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def _drop(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.end()


def _as_it_is(answer: A) -> A:
    return answer


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return (("token", token),) if token else ()


def _reason(words: str) -> str:
    return next((reason for sign, reason in _REASONS if sign in words), words)


def _entry(kv: kv_pb2.KeyValue) -> Entry | Unreadable:
    return readable(kv.key, kv.value, kv.mod_revision, kv.lease)


def _current(answer: pb.TxnResponse) -> Entry | None:
    """What the range in a transaction's failure branch found."""
    for response in answer.responses:
        for kv in response.response_range.kvs:
            entry = _entry(kv)
            if isinstance(entry, Entry):
                return entry
    return None

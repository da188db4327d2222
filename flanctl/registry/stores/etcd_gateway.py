"""etcd v3 through its JSON gateway: no native code and little to import, so it is what commands use.

    store = EtcdGatewayStore(parse_endpoints(["http://192.168.6.15:2379"]))
    store.list("/jxdd/network/subnets/")

etcd's api_reference_v3 names the messages: bytes are base64, 64-bit numbers are strings, zero values are left out.
Three ways to run etcd leave the gateway useless while gRPC works: those raise GatewayOff.
"""

from __future__ import annotations

import binascii
import json
import time
from typing import TYPE_CHECKING, Any, TypeVar

from flanctl.errors import FlanctlError, RegistryUnreachable
from flanctl.registry.stores import http
from flanctl.registry.stores.etcd_v3 import (
    ALREADY_EXISTS,
    DEADLINE,
    EXHAUSTED,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OUT_OF_RANGE,
    PERMISSION_DENIED,
    PRECONDITION,
    UNAUTHENTICATED,
    UNAVAILABLE,
    UNIMPLEMENTED,
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
from flanctl.registry.stores.http_watch import PROBE_WAIT, HttpWatch
from flanctl.registry.stores.store import Entry, Unreadable
from flanctl.registry.stores.watch import Change
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flanctl.registry.stores.endpoints import Endpoint

    Message = Mapping[str, Any]

T = TypeVar("T")

_KNOWN = frozenset(
    {
        INVALID_ARGUMENT,
        NOT_FOUND,
        ALREADY_EXISTS,
        PERMISSION_DENIED,
        EXHAUSTED,
        PRECONDITION,
        OUT_OF_RANGE,
        UNIMPLEMENTED,
        UNAUTHENTICATED,
    }
)
"""What etcd answers when the request is at fault; any other code is the member's trouble."""


class GatewayOff(FlanctlError):
    """etcd is there but its JSON gateway does not serve us; gRPC will."""

    exit_code = RegistryUnreachable.exit_code
    default_id = "gateway-off"


class EtcdGatewayStore(EtcdV3Store):
    """EtcdV3Store by HTTP. `cacert`, `cert` and `key` are PEM files for https endpoints.

    Raises what http.Transport raises for them.
    """

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
        super().__init__(endpoints, timeout=timeout, user=user, password=password)
        self._http = http.Transport(endpoints, timeout=timeout, cacert=cacert, cert=cert, key=key)
        self._base = "/v3"

    def describe(self) -> str:
        good = self._http.good
        return self.name if good is None else f"{self.name} at {good}"

    def close(self) -> None:
        super().close()
        self._http.close()

    # one request each

    def _range(
        self, deed: Deed, start: bytes, end: bytes | None, *, limit: int = 0, revision: int = 0
    ) -> Page:
        question = {"key": _b64(start)}
        if end is not None:
            question["range_end"] = _b64(end)
        if limit:
            question["limit"] = str(limit)
        if revision:
            question["revision"] = str(revision)

        def parse(answer: Message, _: bool) -> Page:
            found = map(_raw, _items(answer, "kvs"))
            return page_of(found, start, end, more=bool(answer.get("more")), revision=_revision(answer))

        return self._call("kv/range", question, deed, parse)

    def _put(self, deed: Deed, key: bytes, value: bytes, lease: int, expected: int) -> Txn:
        put = {"key": _b64(key), "value": _b64(value)}
        if lease:
            put["lease"] = str(lease)
        return self._transaction(deed, key, expected, {"request_put": put})

    def _delete_at(self, deed: Deed, key: bytes, expected: int) -> Txn:
        return self._transaction(deed, key, expected, {"request_delete_range": {"key": _b64(key)}})

    def _delete(self, deed: Deed, key: bytes) -> bool:
        return self._call(
            "kv/deleterange",
            {"key": _b64(key)},
            deed,
            lambda answer, unsure: _int(answer, "deleted") > 0 or unsure,
        )

    def _transaction(self, deed: Deed, key: bytes, expected: int, act: Mapping[str, Any]) -> Txn:
        guard = {"key": _b64(key), "result": "EQUAL"}
        guard |= (
            {"target": "MOD", "mod_revision": str(expected)}
            if expected
            else {"target": "CREATE", "create_revision": "0"}
        )
        question = {
            "compare": [guard],
            "success": [act],
            "failure": [{"request_range": {"key": guard["key"]}}],
        }

        def parse(answer: Message, unsure: bool) -> Txn:
            succeeded = bool(answer.get("succeeded"))
            return Txn(succeeded, _revision(answer), None if succeeded else _current(answer), unsure)

        return self._call("kv/txn", question, deed, parse)

    def _lease_grant(self, deed: Deed, lease: int, ttl: int) -> None:
        self._call("lease/grant", {"ID": str(lease), "TTL": str(ttl)}, deed, lambda *_: None)

    def _lease_revoke(self, deed: Deed, lease: int) -> None:
        self._call("lease/revoke", {"ID": str(lease)}, deed, lambda *_: None)

    def _lease_left(self, deed: Deed, lease: int) -> tuple[int, int]:
        return self._call(
            "lease/timetolive",
            {"ID": str(lease)},
            deed,
            lambda answer, _: (_int(answer, "TTL"), _int(answer, "grantedTTL")),
        )

    def _lease_keep(self, deed: Deed, lease: int) -> int:
        def parse(answer: Message, _: bool) -> int:
            result = answer.get("result")
            return max(0, _int(result, "TTL")) if isinstance(result, dict) else 0

        return self._call("lease/keepalive", {"ID": str(lease)}, deed, parse)

    def _authenticate(self, deed: Deed, user: str, password: str, cancel: int) -> str:
        def parse(answer: Message, _: bool) -> str:
            token = answer.get("token")
            if not isinstance(token, str):
                raise Garbage("etcd sent no token")
            return token

        question = json.dumps({"name": user, "password": password}).encode()
        return self._post("auth/authenticate", question, None, deed, parse, cancel)

    def _out_of_space(self, deed: Deed) -> Sequence[int]:
        def parse(answer: Message, _: bool) -> list[int]:
            alarms = _items(answer, "alarms")
            return [_int(alarm, "memberID") for alarm in alarms if alarm.get("alarm") == "NOSPACE"]

        return self._call("maintenance/alarm", {"action": "GET"}, deed, parse)

    def _names(self, deed: Deed) -> Mapping[int, str]:
        def parse(answer: Message, _: bool) -> dict[int, str]:
            return {_int(member, "ID"): str(member.get("name", "")) for member in _items(answer, "members")}

        return self._call("cluster/member/list", {}, deed, parse)

    def _new_watch(self, prefix: str, after: int) -> GatewayWatch:
        return GatewayWatch(self, prefix, after)

    # for GatewayWatch

    def first(self) -> int:
        """The index of the endpoint that answered last."""
        good = self._http.good
        return 0 if good is None else self.endpoints.index(good)

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
        if token := self.session(deadline, stale, cancel):
            headers["Authorization"] = token
        body = json.dumps({"create_request": create}).encode()
        stream = self._http.stream(
            endpoint, "POST", f"{self._base}/watch", body, headers, deadline=deadline, cancel=cancel
        )
        if stream.status == 200:
            return stream
        status = stream.status
        try:
            text = stream.piece(deadline)
        finally:
            stream.close()
        _raise_if_by_certificate(text)
        document = http.document(text)
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
            deadline=time.monotonic() + PROBE_WAIT, patience=PROBE_WAIT, cancel=cancel,
        )  # fmt: skip

    def unreachable(
        self, what: str, refusals: Mapping[Endpoint, http.Refusal], seconds: float
    ) -> FlanctlError:
        return self._meaning(what, self._http.nobody(refusals, seconds, waited=True))

    # inside

    def _meaning(self, what: str, error: FlanctlError) -> FlanctlError:
        if isinstance(error, http.Unreachable) and "grpc" in error.kinds:
            return GatewayOff(f"cannot {what}: etcd serves only gRPC here", details=error.details)
        error.message = f"cannot {what}: {error.message}"
        return error

    def _call(
        self, path: str, question: Mapping[str, Any], deed: Deed, parse: Callable[[Message, bool], T]
    ) -> T:
        """One request, and what `parse` makes of its answer and of whether an earlier try may have been carried out."""
        body = json.dumps(question).encode()
        return self._logged_in(deed, lambda token: self._post(path, body, token, deed, parse))

    def _post(
        self,
        path: str,
        body: bytes,
        token: str | None,
        deed: Deed,
        parse: Callable[[Message, bool], T],
        cancel: int = -1,
    ) -> T:
        headers = {"Authorization": token} if token else {}
        parsed: list[T] = []
        base = self._base

        def judge(answer: http.Answer) -> None:
            try:
                parsed.append(parse(self._read(answer), answer.unsure))
            except Garbage as error:
                raise http.Refusal(error.message, unsure=True) from None

        while True:
            try:
                self._http.request(
                    "POST",
                    f"{base}/{path}",
                    body,
                    headers,
                    deadline=deed.deadline,
                    judge=judge,
                    cancel=cancel,
                )
            except _Missing:
                if base == "/v3":
                    base = "/v3beta"  # etcd 3.3
                    continue
                raise GatewayOff(
                    f"cannot {deed.what}: etcd's JSON gateway is off",
                    hint="start etcd with --enable-grpc-gateway",
                ) from None
            except FlanctlError as error:
                raise self._meaning(deed.what, error) from None
            self._base = base
            return parsed[-1]

    def _read(self, answer: http.Answer) -> dict[str, Any]:
        """The message in an answer. Refusal when another endpoint may do better."""
        document = http.document(answer.body)
        if document is None:
            _raise_if_by_certificate(answer.body)
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
        return "etcdserver" in (http.document(answer.body) or {})


class _Missing(Exception):
    """etcd has no such path."""


def _is_etcd(document: Mapping[str, Any]) -> bool:
    """Every answer of etcd's carries the cluster's header, in a stream inside `result`; but 3.4's with its alarms."""
    result = document.get("result", document)
    return isinstance(result, dict) and (isinstance(result.get("header"), dict) or "alarms" in result)


def _refused(document: Mapping[str, Any]) -> Refused:
    """3.4 writes error and message, 3.5 and later only message; a stream wraps both in `error`."""
    inner = document.get("error")
    source = inner if isinstance(inner, dict) else document
    code = source.get("code", source.get("grpc_code", 0))
    words = source.get("message") or source.get("error") or "no reason given"
    return Refused(code if isinstance(code, int) else 0, str(words))


def _raise_if_by_certificate(text: bytes) -> None:
    """With logins by a certificate's name the gateway refuses every request: in 3.4 as bare text, not as JSON."""
    if b"CommonName" in text and b"ignored" in text:
        words = printable(text[:200].decode(errors="replace").strip())
        raise GatewayOff(f"etcd's JSON gateway takes no login by client certificate (etcd: {words})")


def _raise_if_transient(refused: Refused, endpoint: Endpoint, *, served: bool) -> None:
    """An election, an overload, a member without quorum: the next endpoint, then this one again.

    `served`: a gateway of this cluster has served us before, so its trouble is a passing one.
    """
    words = refused.words
    _raise_if_by_certificate(words.encode())
    if refused.code == UNAVAILABLE and endpoint.scheme == "https" and not (refused.own or served):
        # The gateway dials its server with the server's own certificate, which may be no good as a client's.
        raise http.Refusal(f"its JSON gateway cannot reach etcd: {words}", kind="grpc")
    if refused.code in {UNAVAILABLE, DEADLINE} or refused.overload:
        raise http.Refusal(words, again=True, unsure=True)
    if refused.code not in _KNOWN:
        raise http.Refusal(words, unsure=True)


def _b64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _bytes(message: Mapping[str, Any], name: str) -> bytes:
    text = message.get(name, "")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (ValueError, TypeError):
        raise Garbage(f"etcd sent {name!r} that is not base64") from None


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
    raise Garbage(f"etcd sent {name!r} that is not a number")


def _items(message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    items = message.get(name) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Garbage(f"etcd sent {name!r} that is not a list of messages")
    return items


def _revision(answer: Mapping[str, Any]) -> int:
    header = answer.get("header")
    revision = _int(header, "revision") if isinstance(header, dict) else 0
    if revision < 1:
        raise Garbage("etcd answered without a revision")
    return revision


def _raw(kv: Mapping[str, Any]) -> tuple[bytes, bytes, int, int]:
    return _bytes(kv, "key"), _bytes(kv, "value"), _int(kv, "mod_revision"), _int(kv, "lease")


def _entry(kv: Mapping[str, Any]) -> Entry | Unreadable:
    return readable(*_raw(kv))


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


class GatewayWatch(V3Watch, HttpWatch):
    """Changes below a prefix, read from one member's stream."""

    def __init__(self, store: EtcdGatewayStore, prefix: str, after: int) -> None:
        super().__init__(store, prefix, after)
        self._gateway = store

    def _connect(self, endpoint: Endpoint, deadline: float) -> http.Connection:
        start, end = prefix_range(self._prefix.encode())
        create = {
            "key": _b64(start),
            "range_end": _b64(end),
            # From the last revision itself, whose events we drop: a watch that starts where the history was cut may
            # miss a delete there (etcd issue 18089).
            "start_revision": str(max(1, self._last)),
            "progress_notify": True,
        }
        return self._gateway.open_watch(endpoint, create, self._stale, deadline, self._wake, self._what)

    def _ended(self, stream: http.Connection) -> None:  # noqa: ARG002  the base's signature
        raise http.Refusal("ended the watch", again=True)

    def _line(self, line: bytes) -> None:
        try:
            self._message(line)
        except Garbage as error:
            raise http.Refusal(error.message, again=True) from None

    def _message(self, line: bytes) -> None:
        document = http.document(line)
        if document is None:
            raise http.Refusal("sends what is not JSON")
        result = document.get("result")
        if not isinstance(result, dict):
            refused = _refused(document)
            self._cancelled(refused if refused.code else cancelled(refused.words))
            return
        if compacted := _int(result, "compact_revision"):
            self._forgotten(compacted)
            return
        if result.get("canceled"):
            self._cancelled(cancelled(str(result.get("cancel_reason") or "no reason given")))
            return
        header = result.get("header")
        if result.get("created"):
            self._created(_int(header, "revision") if isinstance(header, dict) else 0)
        events = _items(result, "events")
        changes: list[Change] = []
        for event in events:
            kv = event.get("kv")
            if not isinstance(kv, dict):
                raise Garbage("etcd sent an event without its key")
            changes.append(Change(_entry(kv), _int(kv, "mod_revision"), event.get("type") == "DELETE"))
        if events or result.get("created"):
            self._take(changes)
        else:  # a progress note: everything up to its revision has been sent
            self._take((), _revision(result))
            self._alive()

    def _cancelled(self, refused: Refused) -> None:
        assert self._stream is not None
        endpoint = self._stream.endpoint
        if not refused.token_ended:
            _raise_if_transient(refused, endpoint, served=True)
        self._refused(refused, endpoint)

"""etcd v2's key API over HTTP, for flannel 0.7.1's clusters: etcd 2.3 up to 3.5 (3.4 and 3.5 with --enable-v2).

    store = EtcdV2Store(parse_endpoints(["http://192.168.6.15:2379"]))
    store.list("/jxdd/network/subnets/")

A revision is a node's modifiedIndex, a snapshot's the X-Etcd-Index. What v2 cannot do as v3 does: keys are paths (no
empty, `.` or `..` part; a key that starts with `_` is hidden from lists), values are text, a list has no pages, only the last
1000 events of the whole store are kept, and a lease has no name, so `Entry.lease` is the index the key was created
at. Source: etcd's Documentation/v2/api.md and error codes, and what 3.4 answers.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import http
from flanctl.registry.stores.http_watch import GATHER, PROBE_WAIT, HttpWatch
from flanctl.registry.stores.store import Changed, Entry, Forgotten, KeyExists, Snapshot, Unreadable
from flanctl.registry.stores.watch import Change, ResumingWatch
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flanctl.registry.stores.endpoints import Endpoint

    Message = Mapping[str, Any]

T = TypeVar("T")

_KEY_NOT_FOUND, _COMPARE_FAILED, _NOT_A_FILE, _NOT_A_DIRECTORY, _EXISTS = 100, 101, 102, 104, 105
_UNAUTHORIZED, _INDEX_CLEARED = 110, 401
_RAFT = range(300, 400)
"""An election, a time-out: the next endpoint."""

_SLACK = 2.0
"""Seconds a fresh TTL may be off, for v2 counts whole ones."""


class EtcdV2Missing(RegistryUnreachable):
    """etcd is there and serves no v2 API: 3.6 and newer have none, 3.4 and 3.5 only with --enable-v2."""

    default_id = "no-v2"


class _Refused(Exception):
    """etcd's error: its code, words, and the store's index then."""

    def __init__(self, code: int, words: str, index: int) -> None:
        super().__init__(words)
        self.code = code
        self.words = words
        self.index = index
        self.unsure = False
        """An earlier try of the request may have been carried out."""


class EtcdV2Store:
    """A Store (see store.py) over etcd's v2 API. `timeout` in seconds bounds every call, all endpoints included.

    `cacert`, `cert` and `key` are PEM files for https endpoints. Raises what http.Transport raises for them.
    """

    name = "etcd v2 over HTTP"
    api = "v2"

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
        self.lock = threading.Lock()
        self.headers = {} if user is None else {"Authorization": _basic(user, password or "")}
        self._http = http.Transport(endpoints, timeout=timeout, cacert=cacert, cert=cert, key=key)
        self._user = user
        self._watches: set[ResumingWatch] = set()
        self._closed = False

    def describe(self) -> str:
        good = self._http.good
        return self.name if good is None else f"{self.name} at {good}"

    def close(self) -> None:
        with self.lock:
            self._closed = True
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()
        self._http.close()

    def version(self) -> str:
        """The server's version, "" if it says none. Raises RegistryUnreachable and NotPermitted."""
        answer = self._http.request("GET", "/version", headers=self.headers)
        return str((http.document(answer.body) or {}).get("etcdserver", ""))

    # reading

    def get(self, key: str) -> Entry | None:
        return self._current(key, f"read {key}")

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        if at is not None:
            raise Forgotten(at)  # v2 keeps no values of the past
        folder = _folder(prefix)
        path = f"{_path(folder)}?recursive=true&sorted=true&quorum=true"

        def parse(answer: Message) -> tuple[list[Entry], list[Unreadable]]:
            entries: list[Entry] = []
            unreadable: list[Unreadable] = []
            for node in _files(answer):
                item = _entry(node, prefix)
                if isinstance(item, Unreadable):
                    if item.key.startswith(prefix.encode()):
                        unreadable.append(item)
                elif item is not None and item.key.startswith(prefix):
                    entries.append(replace(item, ttl=None))
            return sorted(entries, key=lambda entry: entry.key.encode()), unreadable

        try:
            (entries, unreadable), headers = self._ask("GET", path, {}, f"list {prefix}", parse)
        except _Refused as refused:
            if refused.code != _KEY_NOT_FOUND:
                raise self._explain(refused, f"list {prefix}") from None
            return Snapshot((), refused.index)
        return Snapshot(tuple(entries), _index(headers), tuple(unreadable))

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """A directory is asked for the TTLs of all its keys at once."""
        folders = {_folder(entry.key) for entry in entries if entry.lease is not None}
        left: dict[tuple[str, str | None], float] = {}
        for folder in folders:
            what = f"read TTLs below {folder}"
            try:
                found, _ = self._ask(
                    "GET",
                    f"{_path(folder)}?quorum=true",
                    {},
                    what,
                    lambda answer, folder=folder: [_entry(node, folder) for node in _files(answer)],  # type: ignore[misc]
                )
            except _Refused as refused:
                if refused.code == _KEY_NOT_FOUND:
                    continue
                raise self._explain(refused, what) from None
            for item in found:
                if isinstance(item, Entry) and item.ttl is not None:
                    left[item.key, item.lease] = item.ttl
        return tuple(
            entry if entry.lease is None else replace(entry, ttl=left.get((entry.key, entry.lease), 0.0))
            for entry in entries
        )

    # writing

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        what, began = f"create {key}", time.monotonic()
        form = {"value": _text(key, value), "prevExist": "false", **_ttl(ttl)}
        try:
            return self._written("PUT", key, form, what)
        except _Refused as refused:
            if refused.code not in {_EXISTS, _NOT_A_FILE}:
                raise self._explain(refused, what) from None
            current = self._current(key, what)
            if refused.unsure and current is not None and _fresh(current, value, ttl, began):
                return current
            raise KeyExists(key, current) from None

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        what, began = f"write {key}", time.monotonic()
        form = {"value": _text(key, value), "prevIndex": str(expected), **_ttl(ttl)}
        try:
            return self._written("PUT", key, form, what)
        except _Refused as refused:
            current = self._lost(refused, key, what)
            if (
                refused.unsure
                and current is not None
                and current.revision > expected
                and _fresh(current, value, ttl, began)
            ):
                return current
            raise Changed(key, current) from None

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        what = f"delete {key}"
        form = {} if expected is None else {"prevIndex": str(expected)}
        try:
            self._ask("DELETE", _path(key), form, what, lambda _: None)
        except _Refused as refused:
            current = self._lost(refused, key, what)
            if current is not None:
                raise Changed(key, current) from None
            return refused.unsure  # gone by an earlier try of ours whose answer was lost, or never there
        return True

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        """`refresh=true` leaves the value to the server and wakes no watch, but the key gets a new index."""
        what, began = f"renew {entry.key}", time.monotonic()
        form = {"refresh": "true", "prevIndex": str(entry.revision), **_ttl(ttl)}
        try:
            renewed = self._written("PUT", entry.key, form, what)
        except _Refused as refused:
            current = self._lost(refused, entry.key, what)
            if not (refused.unsure and current is not None and _fresh(current, entry.value, ttl, began)):
                raise Changed(entry.key, current) from None
            renewed = current
        if renewed.value == entry.value:
            return renewed
        # etcd before 2.3 does not know the word and takes the value we did not send.
        return self.replace(entry.key, entry.value, ttl=ttl, expected=renewed.revision)

    # watching

    def watch(self, prefix: str, *, after: int) -> V2Watch:
        watch = V2Watch(self, prefix, after)
        with self.lock:
            self._watches.add(watch)
            closed = self._closed
        if closed:
            watch.close()
        return watch

    def forget(self, watch: ResumingWatch) -> None:
        with self.lock:
            self._watches.discard(watch)

    def first(self) -> int:
        """The index of the endpoint that answered last."""
        good = self._http.good
        return 0 if good is None else self.endpoints.index(good)

    def poll(
        self, endpoint: Endpoint, path: str, deadline: float, cancel: int, on: http.Connection | None
    ) -> http.Connection:
        """The answer of a long poll, its head read, which etcd sends at once. Raises http.Refusal."""
        return self._http.stream(
            endpoint, "GET", path, b"", self.headers, deadline=deadline, cancel=cancel, on=on
        )

    def probe(self, endpoint: Endpoint, cancel: int) -> None:
        """Whether a member serves and follows a leader: without one a v2 watch is silent for ever.

        An alarm (NOSPACE) makes it unhealthy too and is none of v2's business. 3.5 says which it is, 3.4 no more than "false".
        """

        def ask(path: str) -> http.Answer:
            deadline = time.monotonic() + PROBE_WAIT
            return self._http.ask(
                endpoint, "GET", path, deadline=deadline, patience=PROBE_WAIT, cancel=cancel
            )

        said = http.document(ask("/health?serializable=true").body) or {}
        if str(said.get("health")).lower() != "false":
            return
        reason = str(said.get("reason") or "")
        well = "alarm" in reason.lower() if reason else ask("/v2/members/leader").status == 200
        if not well:
            raise http.Refusal(f"is not healthy ({reason or 'no leader'})", again=True)

    def unreachable(
        self, what: str, refusals: Mapping[Endpoint, http.Refusal], seconds: float
    ) -> FlanctlError:
        return _with(what, self._http.nobody(refusals, seconds, waited=True))

    def refusal(self, refused: _Refused, what: str) -> FlanctlError:
        """For the watch: etcd's error as ours."""
        return self._explain(refused, what)

    # inside

    def _current(self, key: str, what: str) -> Entry | None:
        """A key's entry, None if there is none or it is a directory."""
        try:
            entry, _ = self._ask(
                "GET", _path(key) + "?quorum=true", {}, what, lambda answer: _entry(answer["node"], key)
            )
        except _Refused as refused:
            if refused.code in {_KEY_NOT_FOUND, _NOT_A_DIRECTORY}:
                return None
            raise self._explain(refused, what) from None
        return entry if isinstance(entry, Entry) else None

    def _lost(self, refused: _Refused, key: str, what: str) -> Entry | None:
        """What is there instead of what a compare-and-swap expected. Raises if it was refused for something else."""
        if refused.code in {_KEY_NOT_FOUND, _NOT_A_FILE, _NOT_A_DIRECTORY}:
            return None
        if refused.code != _COMPARE_FAILED:
            raise self._explain(refused, what) from None
        return self._current(key, what)

    def _written(self, method: str, key: str, form: Mapping[str, str], what: str) -> Entry:
        def parse(answer: Message) -> Entry:
            entry = _entry(answer["node"], key)
            if not isinstance(entry, Entry):
                raise _Garbage("etcd sent another key than was written")
            return entry

        return self._ask(method, _path(key), form, what, parse)[0]

    def _ask(
        self,
        method: str,
        path: str,
        form: Mapping[str, str],
        what: str,
        parse: Callable[[Message], T],
    ) -> tuple[T, Mapping[str, str]]:
        """One request: what `parse` makes of its answer, and the answer's headers."""
        query = "&".join(f"{name}={value}" for name, value in form.items())
        if method == "DELETE" and query:
            path, query = f"{path}?{query}", ""
        parsed: list[T] = []

        def judge(answer: http.Answer) -> None:
            try:
                parsed.append(parse(self._read(self._followed(answer, method, path, query))))
            except _Garbage as error:
                raise http.Refusal(str(error), unsure=True) from None

        try:
            answer = self._http.request(method, path, query.encode(), self.headers, judge=judge)
        except _NoV2:
            raise EtcdV2Missing(
                f"cannot {what}: this etcd serves no v2 API", hint="--api v3, or start etcd with --enable-v2"
            ) from None
        except FlanctlError as error:
            raise _with(what, error) from None
        return parsed[-1], answer.headers

    def _followed(self, answer: http.Answer, method: str, path: str, query: str) -> http.Answer:
        """A redirect is followed once, and only to a member we were told of."""
        if answer.status not in {301, 302, 307, 308}:
            return answer
        place = answer.headers.get("location", "")
        for endpoint in self.endpoints:
            if endpoint != answer.endpoint and place.startswith(f"{endpoint}/"):
                patience = http.patience(self.timeout, 1 + len(self.endpoints))
                deadline = time.monotonic() + patience
                there = self._http.ask(
                    endpoint, method, path, query.encode(), self.headers, deadline=deadline, patience=patience
                )
                return replace(there, unsure=there.unsure or answer.unsure)
        raise http.Refusal(f"redirects to {place[:100]!r}, which is none of the endpoints")

    def _read(self, answer: http.Answer) -> dict[str, Any]:
        """The message in an answer. Refusal when another endpoint may do better."""
        document = http.document(answer.body)
        if document is None or not ("errorCode" in document or "node" in document or "message" in document):
            if answer.status == 404 and self._is_etcd_at(answer.endpoint):
                raise _NoV2
            server = answer.headers.get("server", "")
            by = f", server {server[:40]!r}" if server else ""
            raise http.Refusal(f"answers HTTP but is not etcd (status {answer.status}{by})")
        if "node" in document and answer.status in {200, 201}:
            if not isinstance(document["node"], dict):
                raise http.Refusal("sends a node that is none")
            return document
        refused = refused_by(document, answer.status, answer.headers)
        if refused.code in _RAFT or answer.status >= 500:
            raise http.Refusal(refused.words, again=True, unsure=True)
        refused.unsure = answer.unsure
        raise refused

    def _is_etcd_at(self, endpoint: Endpoint) -> bool:
        try:
            answer = self._http.ask(
                endpoint, "GET", "/version", deadline=time.monotonic() + 1.0, patience=1.0
            )
        except http.Refusal:
            return False
        return "etcdserver" in (http.document(answer.body) or {})

    def _explain(self, refused: _Refused, what: str) -> FlanctlError:
        """etcd's refusal as ours; its words are kept."""
        words = refused.words
        if refused.code == _UNAUTHORIZED:
            if self._user is None:
                return NotPermitted(
                    f"cannot {what}: etcd wants a login (etcd: {words})", hint="--user NAME, and its password"
                )
            return NotPermitted(
                f'cannot {what}: user "{self._user}" may not, or its password is wrong (etcd: {words})'
            )
        return Invalid(f"cannot {what} (etcd: {words})")


class _Garbage(Exception):
    """In etcd's form, but not what etcd sends."""


class _NoV2(Exception):
    """etcd has no such path."""


class V2Watch(HttpWatch):
    """Changes below a prefix by long polls: one event an answer, the next poll on the same connection."""

    def __init__(self, store: EtcdV2Store, prefix: str, after: int) -> None:
        super().__init__(store, prefix, after)
        self._v2 = store
        self._folder = _folder(prefix)
        self._again: http.Connection | None = None
        """The connection whose last answer is read."""
        self._told = False
        """The poll has had its event."""

    def _connect(self, endpoint: Endpoint, deadline: float) -> http.Connection | None:
        again, self._again = self._again, None
        self._told = False
        if again is None:
            self._v2.probe(endpoint, self._wake)  # a poll is taken by a member without a leader too
        path = f"{_path(self._folder)}?wait=true&recursive=true&waitIndex={self._last + 1}"
        try:
            stream = self._v2.poll(endpoint, path, deadline, self._wake, again)
        except http.Refusal:
            if again is None:
                raise
            return None  # closed while idle, which says nothing about the server
        if stream.status != 200:
            try:
                self._wrong(stream, deadline)
            finally:
                stream.close()
            return None
        self._take(())
        index = _index(stream.headers)
        # An answer brings one event: what has happened since we asked last is asked for without a pause.
        self._gather = GATHER if index <= self._last else 0.0
        if 0 < index < self._last and self._behind(index):
            stream.close()
            return None
        return stream

    def _behind(self, index: int) -> bool:
        """A member that is not as far as we are lags, or the data are not those we know."""
        try:
            index = self._v2.list(self._folder + "/").revision
        except FlanctlError:
            return False
        if index >= self._last:
            return False
        self._forgotten(index)
        return True

    def _wrong(self, stream: http.Connection, deadline: float) -> None:
        """An error instead of a poll."""
        document = http.document(stream.piece(deadline))
        if document is None or not ("errorCode" in document or "message" in document):
            raise http.Refusal(f"answers HTTP but is not etcd (status {stream.status})")
        refused = refused_by(document, stream.status, stream.headers)
        if refused.code == _INDEX_CLEARED:
            self._forgotten(refused.index)
        elif refused.code in _RAFT or stream.status >= 500:
            raise http.Refusal(refused.words, again=True)
        else:
            self._over = True
            raise self._v2.refusal(refused, self._what)

    def _ended(self, stream: http.Connection) -> None:
        """etcd may end a poll at any time, and ends it after each event."""
        text = bytes(self._text)
        if text.strip():
            self._line(text)
        if self._over:
            return
        self._text.clear()
        self._stream = None
        if not self._told:
            stream.close()
            raise http.Refusal("ended the watch", again=True)
        if stream.reusable:
            self._again = stream
        else:
            stream.close()

    def _drop(self) -> None:
        super()._drop()
        if self._again is not None:
            self._again.close()
            self._again = None

    def _line(self, line: bytes) -> None:
        self._told = True
        document = http.document(line)
        node = None if document is None else document.get("node")
        if document is None or not isinstance(node, dict):
            raise http.Refusal("sends what is not an event", again=True)
        try:
            revision = _number(node, "modifiedIndex")
            item = _entry(node, self._prefix)
        except _Garbage as error:
            raise http.Refusal(str(error), again=True) from None
        deleted = str(document.get("action")) in {"delete", "expire", "compareAndDelete"}
        if item is None and deleted:
            # A directory went with all that was in it, and only its own name is told.
            self._forgotten(max(revision, self._last))
            return
        key = item.key if isinstance(item, Unreadable) else b"" if item is None else item.key.encode()
        if item is None or not key.startswith(self._prefix.encode()):
            self._take((Change(Unreadable(key), revision, deleted=False),))
            self._alive()
            return
        shown = replace(item, ttl=None) if isinstance(item, Entry) else item
        self._take((Change(shown, revision, deleted),))
        if not self._ready:
            self._alive()


def refused_by(document: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> _Refused:
    """The error in an answer; a bare `message` is what etcd's HTTP layer says, for one that wants a login."""
    code = document.get("errorCode")
    if not isinstance(code, int):
        code = _UNAUTHORIZED if status in {401, 403} else 0
    cause = str(document.get("cause") or "")
    words = str(document.get("message") or "no reason given") + (f": {cause}" if cause else "")
    words = printable(words[:500])  # whoever answers may not be etcd
    index = document.get("index")
    return _Refused(code, words[:500], index if isinstance(index, int) else _index(headers))


def _with(what: str, error: FlanctlError) -> FlanctlError:
    error.message = f"cannot {what}: {error.message}"
    return error


def _basic(user: str, password: str) -> str:
    import binascii

    return "Basic " + binascii.b2a_base64(f"{user}:{password}".encode(), newline=False).decode()


def _path(key: str) -> str:
    """Where a key or directory is. Invalid for one that v2 would quietly take for another."""
    inner = key.removeprefix("/")
    if inner and not all(part and part not in {".", ".."} for part in inner.split("/")):
        raise Invalid(f"key {key!r} is none in etcd v2: its parts may not be empty, . or ..")
    try:
        return "/v2/keys/" + "/".join(_quoted(part.encode()) for part in inner.split("/"))
    except UnicodeEncodeError:
        raise Invalid(f"key {key!r} is not Unicode text") from None


def _folder(key: str) -> str:
    """The directory that holds a key, or everything that starts with a prefix."""
    return key.rpartition("/")[0]


def _text(key: str, value: bytes) -> str:
    """A value as it goes into a form. v2 hands values out as JSON text, which cannot hold every byte."""
    try:
        value.decode()
    except UnicodeDecodeError:
        raise Invalid(f"value of {key} is not UTF-8, which is all that etcd v2 keeps") from None
    return _quoted(value)


_PLAIN = {byte: chr(byte) for byte in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"}
"""What needs no percent in a URL or a form (RFC 3986 2.3)."""


def _quoted(data: bytes) -> str:
    return "".join([_PLAIN.get(byte) or f"%{byte:02X}" for byte in data])


def _ttl(ttl: float | None) -> dict[str, str]:
    return {} if ttl is None else {"ttl": str(max(1, math.ceil(ttl)))}


def _fresh(current: Entry, value: bytes, ttl: float | None, began: float) -> bool:
    """Whether this is what we wrote after `began`: our value with a TTL that has not run for longer."""
    if current.value != value or (ttl is None) != (current.ttl is None):
        return False
    return current.ttl is None or ttl is None or current.ttl >= ttl - (time.monotonic() - began) - _SLACK


def _files(answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes below an answer's that are no directories."""
    waiting = [answer.get("node")]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict):
            raise _Garbage("etcd sent a node that is none")
        if not node.get("dir"):
            yield node
            continue
        nodes = node.get("nodes") or []
        if not isinstance(nodes, list):
            raise _Garbage("etcd sent nodes that are no list")
        waiting += nodes


def _entry(node: Mapping[str, Any], asked: str) -> Entry | Unreadable | None:
    """A node as we know entries; None for a directory. `asked` is a key of ours: with or without its first slash."""
    key = node.get("key", "")
    if not isinstance(key, str):
        raise _Garbage("etcd sent a key that is no text")
    if not asked.startswith("/"):
        key = key.removeprefix("/")
    if node.get("dir"):
        return None
    if "\ufffd" in key:  # what is not UTF-8 comes as this
        return Unreadable(key.encode())
    value = node.get("value", "")
    if not isinstance(value, str):
        raise _Garbage(f"etcd sent a value of {key} that is no text")
    # surrogatepass: JSON may hold halves of characters, and a value is bytes to us.
    data = value.encode("utf-8", "surrogatepass")
    if "expiration" not in node:
        return Entry(key, data, _number(node, "modifiedIndex"))
    lease = str(_number(node, "createdIndex"))
    ttl = float(max(0, _number(node, "ttl")))
    return Entry(key, data, _number(node, "modifiedIndex"), lease, ttl)


def _number(node: Mapping[str, Any], name: str) -> int:
    number = node.get(name, 0)
    if not isinstance(number, int):
        raise _Garbage(f"etcd sent {name!r} that is not a number")
    return number


def _index(headers: Mapping[str, str]) -> int:
    text = headers.get("x-etcd-index", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0

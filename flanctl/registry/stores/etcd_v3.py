"""What etcd v3 means, whichever way it is asked: compare-and-swap, leases, pages, login, and its refusals.

The gateway and gRPC each say how one request is made (`_range`, `_put`, …); everything that follows from the answer
is here, once. A write whose answer was lost is sent again; the lease's id, which we choose, tells our own value from
anybody else's.
"""

from __future__ import annotations

import abc
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import http
from flanctl.registry.stores.store import Changed, Entry, Forgotten, KeyExists, Snapshot, Unreadable
from flanctl.registry.stores.watch import ResumingWatch
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from flanctl.registry.stores.endpoints import Endpoint

T = TypeVar("T")

PAGE = 5000
"""Keys asked for at once, a megabyte or so. For each page etcd counts all keys, which takes it as long as a thousand of them."""

MAX_LIST = 512 << 20
"""Bytes of keys and values a list may have in all: 20,000 leases are 3 MB."""

TTL_THREADS = 4
TTL_ALONE = 50
"""Up to this many leases are asked about by one thread."""

REVOKE_SECONDS = 1.0
ALARM_SECONDS = 1.0
"""How long to find out who is full, for the error's sake."""

CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE, NOT_FOUND, ALREADY_EXISTS = 1, 2, 3, 4, 5, 6
PERMISSION_DENIED, EXHAUSTED, PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED = 7, 8, 9, 10, 11, 12
INTERNAL, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = 13, 14, 15, 16
"""gRPC status codes (grpc/doc/statuscodes.md)."""


class Refused(Exception):
    """A gRPC status code and words: etcd's own, which it marks, or its gateway's (`own` is False)."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.own = "etcdserver:" in words
        self.words = printable(words[:500].removeprefix("etcdserver: "))  # whoever answers may not be etcd

    @property
    def token_ended(self) -> bool:
        return self.code == UNAUTHENTICATED or any(
            sign in self.words
            for sign in ("invalid auth token", "user name is empty", "revision of auth store is old")
        )

    @property
    def login_refused(self) -> bool:
        return self.token_ended or any(
            sign in self.words for sign in ("authentication failed", "user name not found")
        )

    @property
    def full(self) -> bool:
        return "database space exceeded" in self.words

    @property
    def overload(self) -> bool:
        return self.code == EXHAUSTED and "too many requests" in self.words


def cancelled(words: str) -> Refused:
    """A cancelled watch names its reason only in words; what we do not know is the member's own trouble."""
    signs = {
        "ermission denied": PERMISSION_DENIED, "PermissionDenied": PERMISSION_DENIED,
        "invalid auth token": UNAUTHENTICATED, "Unauthenticated": UNAUTHENTICATED,
        "user name is empty": INVALID_ARGUMENT, "InvalidArgument": INVALID_ARGUMENT,
    }  # fmt: skip
    return Refused(next((code for sign, code in signs.items() if sign in words), UNAVAILABLE), words)


class Garbage(RegistryUnreachable):
    """In etcd's form, but not what etcd sends. Asking again may do better; nothing is wrong with the request."""


@dataclass(frozen=True, slots=True)
class Deed:
    """What we are about, for errors, and until when (time.monotonic)."""

    what: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. `last` is its last key if there is more to come, else b""."""

    items: tuple[Entry | Unreadable, ...]
    last: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Txn:
    """A transaction's outcome. `unsure`: an earlier try of it may have been carried out."""

    succeeded: bool
    revision: int
    current: Entry | None
    unsure: bool


class EtcdV3Store(abc.ABC):
    """A Store (see store.py) over etcd ≥ 3.3. `timeout` in seconds bounds every call, all endpoints included."""

    name = "etcd v3"
    api = "v3"

    def __init__(
        self, endpoints: Sequence[Endpoint], *, timeout: float, user: str | None, password: str | None
    ) -> None:
        self.timeout = timeout
        self.endpoints = tuple(endpoints)
        self.token: str | None = None
        self.lock = threading.Lock()
        self._user = user
        self._password = password or ""
        self._login = threading.Lock()
        self._watches: set[ResumingWatch] = set()
        self._closed = False

    # how each way asks

    @abc.abstractmethod
    def _range(
        self, deed: Deed, start: bytes, end: bytes | None, *, limit: int = 0, revision: int = 0
    ) -> Page:
        """One key, or those from `start` to before `end`. An endpoint whose answer is none by `page_of` is left for the next.

        These raise Refused and what `unreachable` returns.
        """

    @abc.abstractmethod
    def _put(self, deed: Deed, key: bytes, value: bytes, lease: int, expected: int) -> Txn:
        """Write if the key is at revision `expected`; 0 means that it is not there."""

    @abc.abstractmethod
    def _delete_at(self, deed: Deed, key: bytes, expected: int) -> Txn: ...

    @abc.abstractmethod
    def _delete(self, deed: Deed, key: bytes) -> bool:
        """Whether it was there, or may have been when an answer was lost."""

    @abc.abstractmethod
    def _lease_grant(self, deed: Deed, lease: int, ttl: int) -> None: ...

    @abc.abstractmethod
    def _lease_revoke(self, deed: Deed, lease: int) -> None: ...

    @abc.abstractmethod
    def _lease_left(self, deed: Deed, lease: int) -> tuple[int, int]:
        """Seconds left (negative when the lease has ended) and seconds granted."""

    @abc.abstractmethod
    def _lease_keep(self, deed: Deed, lease: int) -> int:
        """The lease's new TTL in seconds, 0 when it has ended."""

    @abc.abstractmethod
    def _authenticate(self, deed: Deed, user: str, password: str, cancel: int) -> str: ...

    @abc.abstractmethod
    def _out_of_space(self, deed: Deed) -> Sequence[int]:
        """The ids of the members that have raised the alarm NOSPACE."""

    @abc.abstractmethod
    def _names(self, deed: Deed) -> Mapping[int, str]:
        """The members' names by their ids."""

    @abc.abstractmethod
    def _new_watch(self, prefix: str, after: int) -> ResumingWatch: ...

    @abc.abstractmethod
    def first(self) -> int:
        """The index of the endpoint a watch begins with."""

    @abc.abstractmethod
    def unreachable(
        self, what: str, refusals: Mapping[Endpoint, http.Refusal], seconds: float
    ) -> FlanctlError:
        """The error for a watch that nobody serves."""

    # reading

    def get(self, key: str) -> Entry | None:
        deed = self._deed(f"read {key}")
        entry = self._get(key, deed)
        if entry is None or entry.lease is None:
            return entry
        return replace(entry, ttl=self._time_to_live(entry.lease, deed)[0])

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        deed = self._deed(f"list {prefix}")
        first, end = prefix_range(prefix.encode())
        start, revision, size = first, at or 0, 0
        entries: list[Entry] = []
        unreadable: list[Unreadable] = []
        while True:
            try:
                page = self._range(deed, start, end, limit=PAGE, revision=revision)
            except Refused as refused:
                if refused.code != OUT_OF_RANGE or not revision:
                    raise self.explain(refused, deed.what) from None
                if at is not None:
                    raise Forgotten(at) from None
                # Compacted between two pages: what we have is of a revision nobody knows any more.
                start, revision, size = first, 0, 0
                entries.clear()
                unreadable.clear()
                continue
            revision = revision or page.revision
            for item in page.items:
                if isinstance(item, Entry):
                    entries.append(item)
                    size += len(item.value)
                else:
                    unreadable.append(item)
                size += len(item.key)
            if not page.last:
                return Snapshot(tuple(entries), revision, tuple(unreadable))
            if size > MAX_LIST:
                raise Garbage(f"cannot {deed.what}: etcd sent a list without end")
            start = page.last + b"\0"

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        deed = self._deed("read TTLs")
        leases = deque(dict.fromkeys(entry.lease for entry in entries if entry.lease is not None))
        left: dict[str, float] = {}
        errors: list[Exception] = []

        def work() -> None:
            try:
                while not errors:
                    lease = leases.popleft()
                    left[lease] = self._time_to_live(lease, deed)[0]
            except IndexError:
                return
            except Exception as error:  # raised in the calling thread below
                errors.append(error)
            finally:
                leases.clear()  # all asked, or no more to be asked: an error or Ctrl-C ends every thread

        helpers = TTL_THREADS - 1 if len(leases) > TTL_ALONE else 0
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
        entry, current = self._put_if(0, key, value, ttl, f"create {key}")
        if entry is None:
            raise KeyExists(key, current)
        return entry

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        entry, current = self._put_if(expected, key, value, ttl, f"write {key}")
        if entry is None:
            raise Changed(key, current)
        return entry

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        deed = self._deed(f"delete {key}")
        name = key.encode()
        if expected is None:
            return self._told(deed, lambda: self._delete(deed, name))
        done = self._told(deed, lambda: self._delete_at(deed, name, expected))
        if done.succeeded:
            return True
        if done.current is None:
            return done.unsure  # gone by an earlier try of ours whose answer was lost, or never there
        raise Changed(key, done.current)

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        deed = self._deed(f"renew {entry.key}")
        if entry.lease is not None:
            left, granted = self._time_to_live(entry.lease, deed)
            if left > 0 and granted == _seconds(ttl):
                alive = self._told(deed, lambda: self._lease_keep(deed, int(entry.lease or 0)))
                if alive > 0:
                    current = self._get(entry.key, deed)
                    if current is None or current.revision != entry.revision:
                        raise Changed(entry.key, current)
                    return replace(current, ttl=float(alive))
        return self.replace(entry.key, entry.value, ttl=ttl, expected=entry.revision)

    # watching

    def watch(self, prefix: str, *, after: int) -> ResumingWatch:
        watch = self._new_watch(prefix, after)
        with self.lock:
            self._watches.add(watch)
            closed = self._closed
        if closed:
            watch.close()
        return watch

    def forget(self, watch: ResumingWatch) -> None:
        with self.lock:
            self._watches.discard(watch)

    def close(self) -> None:
        with self.lock:
            self._closed = True
            watches = tuple(self._watches)
        for watch in watches:
            watch.close()

    def revision(self, key: str, deadline: float) -> int:
        """What the cluster, not one member that lags behind, is at, asked by a read of a key we may read."""
        deed = Deed(f"read {key}", deadline)
        return self._told(deed, lambda: self._range(deed, key.encode() or b"\0", None).revision)

    # login and refusals

    def session(self, deadline: float, stale: str | None = None, cancel: int = -1) -> str | None:
        """The token to send; None without a user, empty while etcd asks for none. `stale` is one that has ended."""
        if self._user is None:
            return None
        with self._login:
            if self.token is None or self.token == stale:
                self.token = self._log_in(self._user, deadline, cancel)
            return self.token

    def explain(self, refused: Refused, what: str, *, whose: str = "") -> FlanctlError:
        """etcd's refusal as ours; its words are kept. `whose` is who is full, where that was asked."""
        words = refused.words
        if refused.code == PERMISSION_DENIED:
            who = f'user "{self._user}"' if self._user else "we"
            return NotPermitted(f"{who} may not {what} (etcd: {words})")
        if refused.login_refused:
            if self._user is None:
                return NotPermitted(
                    f"cannot {what}: etcd wants a login (etcd: {words})", hint="--user NAME, and its password"
                )
            return NotPermitted(f'cannot {what}: login as "{self._user}" was refused (etcd: {words})')
        if refused.full:
            return RegistryUnreachable(
                f"cannot {what}: etcd is full{whose} (etcd: {words})",
                hint="etcdctl alarm list; compact, defrag and disarm",
            )
        return Invalid(f"cannot {what} (etcd: {words})")

    def _unwritten(self, refused: Refused, what: str) -> FlanctlError:
        """As `explain`, for a write, and with those who raised NOSPACE if etcd is full and tells."""
        return self.explain(refused, what, whose=self._whose() if refused.full else "")

    def _whose(self) -> str:
        """Who raised NOSPACE, to be read after "is full"; nothing if etcd does not tell. No role is needed to ask."""
        deed = Deed("read etcd's alarms", time.monotonic() + ALARM_SECONDS)
        try:
            full = self._out_of_space(deed)
            names = self._names(deed)
        except (FlanctlError, Refused):
            return ""
        who = ", ".join(f"{printable(names.get(one, '?')[:64])} ({one:x})" for one in full[:9])
        return f", NOSPACE raised by {who}" if who else ""

    def _logged_in(self, deed: Deed, send: Callable[[str | None], T]) -> T:
        """`send` with the token to send, and once more with a new one when it has ended."""
        stale: str | None = None
        while True:
            token = self.session(deed.deadline, stale)
            try:
                return send(token)
            except Refused as refused:
                if token is None or stale is not None or not refused.token_ended:
                    raise
            except http.Unreachable as error:
                # Some 3.4 builds hang up on a token they do not know (etcd issue 15256).
                if not token or stale is not None or "closed" not in error.kinds:
                    raise
            stale = token

    def _log_in(self, user: str, deadline: float, cancel: int) -> str:
        deed = Deed(f'log in as "{user}"', deadline)
        try:
            token = self._authenticate(deed, user, self._password, cancel)
        except Refused as refused:
            if refused.code == PRECONDITION:  # "authentication is not enabled": as etcdctl, go on without
                return ""
            raise self.explain(refused, deed.what) from None
        if not token.isascii() or not token.isprintable():
            raise Garbage(f"cannot {deed.what}: etcd sent no token")
        return token

    # inside

    def _deed(self, what: str) -> Deed:
        return Deed(what, time.monotonic() + self.timeout)

    def _told(self, deed: Deed, ask: Callable[[], T]) -> T:
        """The answer, or etcd's refusal as our error."""
        try:
            return ask()
        except Refused as refused:
            raise self.explain(refused, deed.what) from None

    def _get(self, key: str, deed: Deed) -> Entry | None:
        page = self._told(deed, lambda: self._range(deed, key.encode(), None))
        entry = page.items[0] if page.items else None
        return entry if isinstance(entry, Entry) else None

    def _time_to_live(self, lease: str, deed: Deed) -> tuple[float, int]:
        """Seconds left (0 when the lease has ended) and seconds granted."""
        left, granted = self._told(deed, lambda: self._lease_left(deed, int(lease)))
        return float(max(0, left)), granted

    def _grant(self, ttl: float, deed: Deed) -> int:
        """A new lease. The id is ours, so that asking again after a lost answer makes no second one."""
        lease = (int.from_bytes(os.urandom(8), "big") >> 1) or 1
        try:
            self._lease_grant(deed, lease, _seconds(ttl))
        except Refused as refused:
            if "lease already exists" not in refused.words:
                raise self._unwritten(refused, deed.what) from None
        return lease

    def _revoke(self, lease: int) -> None:
        """A lease nobody uses ends by itself too, so failing to revoke it is no error."""
        if lease:
            try:
                self._lease_revoke(Deed("revoke a lease", time.monotonic() + REVOKE_SECONDS), lease)
            except (FlanctlError, Refused):
                pass

    def _put_if(
        self, expected: int, key: str, value: bytes, ttl: float | None, what: str
    ) -> tuple[Entry | None, Entry | None]:
        """Put under a fresh lease if the key is at `expected`: (what was written, what is there instead)."""
        deed = self._deed(what)
        lease = 0 if ttl is None else self._grant(ttl, deed)
        try:
            done = self._put(deed, key.encode(), value, lease, expected)
        except Refused as refused:
            self._revoke(lease)
            raise self._unwritten(refused, what) from None
        except RegistryUnreachable as error:
            if isinstance(error, http.Unreachable) and not error.unsure:
                self._revoke(lease)  # else the key may hang on it
            raise
        except FlanctlError:
            self._revoke(lease)
            raise
        if done.succeeded:
            return Entry(key, value, done.revision, lease_name(lease), ttl), None
        current = done.current
        if (
            done.unsure
            and current is not None
            and (current.value, current.lease) == (value, lease_name(lease))
        ):
            return replace(current, ttl=ttl), None
        self._revoke(lease)
        return None, current


class V3Watch(ResumingWatch):
    """Token and cancellation of an etcd v3 watch."""

    def __init__(self, store: EtcdV3Store, prefix: str, after: int) -> None:
        super().__init__(store, prefix, after)
        self._v3 = store
        self._stale: str | None = None
        """A token the server called ended."""

    def _heard(self) -> None:
        super()._heard()
        self._stale = None

    def _created(self, revision: int) -> None:
        """The member has made the watch, at its revision. One that is behind us lags, or its data are another's."""
        self._take(())
        if 0 < revision < self._last:
            try:
                now = self._v3.revision(self._prefix, time.monotonic() + self._v3.timeout)
            except FlanctlError:
                return  # the watch is made, and whoever serves it will say what is wrong
            if now < self._last:
                self._forgotten(now)

    def _refused(self, refused: Refused, endpoint: Endpoint) -> None:
        """etcd ended the watch. For its own troubles we go on elsewhere; what is wrong with us is raised."""
        token = self._v3.token
        if refused.token_ended and token is not None and self._stale is None:
            self._drop()
            self._stale = token  # the next try logs in again
            return
        if refused.code == UNAVAILABLE:
            self._fail(endpoint, http.Refusal(refused.words or "ended the watch", again=True))
            return
        self._over = True
        self._drop()
        raise self._v3.explain(refused, self._what)


def prefix_range(prefix: bytes) -> tuple[bytes, bytes]:
    """First key and end of everything that starts with `prefix` (etcd: "\\0" is the end of all keys)."""
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return prefix or b"\0", b"\0"
    return prefix, stem[:-1] + bytes([stem[-1] + 1])


def page_of(
    found: Iterable[tuple[bytes, bytes, int, int]],
    start: bytes,
    end: bytes | None,
    *,
    more: bool,
    revision: int,
) -> Page:
    """What a range answered: keys with their values, revisions and leases. Raises Garbage for what no etcd answers.

    A key that was not asked for would be believed to lie where it does not, and pages that do not go on would never end.
    """
    if revision < 1:
        raise Garbage("etcd answered without a revision")
    items = []
    key, lowest = b"", start
    for key, value, changed, lease in found:
        if (
            key < lowest
            or (end is None and key != start)
            or (end is not None and end != b"\0" and key >= end)
        ):
            shown = printable(key[:80].decode(errors="replace"))
            raise Garbage(f'etcd sent the key "{shown}", which was not asked for')
        items.append(readable(key, value, changed, lease))
        lowest = key + b"\0"
    if more and not items:
        raise Garbage("etcd sent a list without end")
    return Page(tuple(items), key if more else b"", revision)


def readable(key: bytes, value: bytes, revision: int, lease: int) -> Entry | Unreadable:
    try:
        return Entry(key.decode(), value, revision, lease_name(lease))
    except UnicodeDecodeError:
        return Unreadable(key)


def lease_name(lease: int) -> str | None:
    return str(lease) if lease else None


def _seconds(ttl: float) -> int:
    return max(1, math.ceil(ttl))

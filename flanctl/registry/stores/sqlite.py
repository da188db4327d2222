"""The store in one file: a registry for trying things out, for the demo and for tests, with nothing to install.

    store = SqliteStore("registry.db")        # created if it is not there; any number of processes may share it

Time: a key's end is kept in seconds since boot (CLOCK_BOOTTIME), which all processes of one machine share and nobody
sets; the wall clock is set by hand, by NTP, and wrongly by boards without a battery. After a reboot those seconds mean
nothing, and how long the machine was off is unknown, so every key gets its full TTL anew, as etcd does when its leader
changes: later than promised is safe, earlier would give a living host's subnet away.

Expired keys are removed by whoever looks first, reader or watcher, each removal at a revision of its own; so nobody
ever sees a key beyond its time, and a watch sees it go.
"""

from __future__ import annotations

import collections
import os
import sqlite3
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Self

from flanctl.clock import BootClock
from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, RegistryUnreachable
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
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from flanctl.clock import Clock

APPLICATION_ID = 0x666C616E
"""`flan`; `file registry.db` shows it, and a file without it is not ours."""
SCHEMA_VERSION = 1
KEPT_EVENTS = 10_000
"""A watch may be this many revisions behind before it has to list again."""
COMPACT_EVERY = 256
"""Revisions between two compactions: one delete of many rows is cheaper than one with every write."""
LOOK_SECONDS = 0.1
"""Between two looks of a waiting watch. A look costs 0.2 ms of processor, most of it the waking up."""
PROGRESS_SECONDS = 1.0
BATCH = 500
"""Events read at once by a watch that is behind."""
MAX_VALUE = 1 << 20

_SCHEMA = (
    """CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1),
        revision INTEGER NOT NULL, compacted INTEGER NOT NULL, boot TEXT NOT NULL) STRICT""",
    """CREATE TABLE keys (key BLOB PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL,
        lease TEXT, ttl REAL, ends REAL) STRICT""",
    "CREATE INDEX keys_by_end ON keys (ends) WHERE ends IS NOT NULL",
    # One event per revision; a NULL value is a delete.
    "CREATE TABLE events (revision INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB, lease TEXT) STRICT",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


_Row = tuple[bytes, bytes, int, str | None]
"""Key, value, revision, lease."""


class _Meta(NamedTuple):
    revision: int
    compacted: int
    boot: str


class SqliteStore:
    """See stores/store.py for what each call promises. Opens the file at once.

    NotFound: no such directory. NotPermitted: file or directory cannot be written. Invalid: not a registry of ours.
    RegistryUnreachable: another process held the file longer than `timeout` seconds, or the disk failed.
    """

    name = "sqlite"
    api = ""

    def __init__(self, path: str, *, timeout: float = 5.0, clock: Clock | None = None) -> None:
        self._path = os.path.abspath(path)
        self._timeout = timeout
        self._clock = clock or BootClock()
        self._watches: weakref.WeakSet[SqliteWatch] = weakref.WeakSet()
        self._file = _File(self._path, timeout, self._clock)

    def describe(self) -> str:
        return f"sqlite {sqlite3.sqlite_version}, {self._path}"

    def get(self, key: str) -> Entry | None:
        with self._file.reading() as look:
            return look.entry(_encoded(key))

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        entries: list[Entry] = []
        unreadable: list[Unreadable] = []
        with self._file.reading() as look:
            for key, value, revision, lease in look.below(prefix) if at is None else look.past(prefix, at):
                if (text := _decoded(key)) is None:
                    unreadable.append(Unreadable(key))
                else:
                    entries.append(Entry(text, value, revision, lease))
            return Snapshot(tuple(entries), look.meta.revision if at is None else at, tuple(unreadable))

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        with self._file.reading() as look:
            return tuple(
                replace(entry, ttl=None if entry.lease is None else look.ttl_of(entry)) for entry in entries
            )

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        """Nothing is lost between us and a file, so a key that is there is somebody's."""
        with self._file.writing() as change:
            if (current := change.entry(_encoded(key))) is not None:
                raise KeyExists(key, current)
            return change.put(key, value, ttl)

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        with self._file.writing() as change:
            change.expect(key, expected)
            return change.put(key, value, ttl)

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        with self._file.writing() as change:
            if change.entry(_encoded(key)) is None:
                return False
            if expected is not None:
                change.expect(key, expected)
            change.remove(_encoded(key))
            return True

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        with self._file.writing() as change:
            current = change.expect(entry.key, entry.revision)
            if current.lease is None:
                return change.put(entry.key, current.value, ttl)
            change.extend(_encoded(entry.key), ttl)
            return replace(current, ttl=ttl)

    def watch(self, prefix: str, *, after: int) -> SqliteWatch:
        self._file.data_version()  # refuses if closed
        watch = SqliteWatch(_File(self._path, self._timeout, self._clock), self._clock, prefix, after)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        for watch in tuple(self._watches):
            watch.close()
        self._file.close()


class SqliteWatch:
    """Events from the file's log. Looks ten times a second whether any other connection has written.

    `PRAGMA data_version` does not change with this connection's own writes; the only ones it makes remove expired
    keys, and a look at the log follows those.
    """

    def __init__(self, file: _File, clock: Clock, prefix: str, after: int) -> None:
        self._file = file
        self._clock = clock
        self._range = _range(prefix)
        self._seen = after
        self._waiting: collections.deque[Event] = collections.deque()
        self._version: int | None = None
        self._next_end: float | None = None
        self._ended = False
        self._closed = threading.Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        progress_at = time.monotonic() + PROGRESS_SECONDS
        while not self._closed.is_set():
            if not self._waiting and not self._ended:
                self._look()
            if self._waiting:
                return self._waiting.popleft()
            if self._ended:
                break
            if time.monotonic() >= progress_at:
                return Progress(self._seen)
            self._closed.wait(LOOK_SECONDS)
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._file.close()

    def _look(self) -> None:
        try:
            version = self._file.data_version()
            due = self._next_end is not None and self._next_end <= self._clock.now()
            if version == self._version and not due:
                return
            with self._file.reading() as look:
                self._read(look)
        except RegistryUnreachable:
            if not self._closed.is_set():  # closed under our hands is the end, not a failure
                raise
            return
        # The version from before the read: a write between the two is looked at again, never missed.
        # A full batch leaves it unset, so that the next look goes on reading.
        self._version = version if len(self._waiting) < BATCH else None

    def _read(self, look: _Transaction) -> None:
        if self._seen < look.meta.compacted:
            self._ended = True
            self._waiting.append(Compacted(look.meta.compacted))
            return
        rows = look.execute(
            "SELECT revision, key, value, lease FROM events"
            " WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision LIMIT ?",
            (self._seen, *self._range, BATCH),
        ).fetchall()
        for revision, key, value, lease in rows:
            self._seen = revision
            if (text := _decoded(key)) is None:
                continue
            self._waiting.append(
                Delete(text, revision) if value is None else Put(Entry(text, value, revision, lease))
            )
        if len(rows) < BATCH:
            self._seen = max(self._seen, look.meta.revision)
        (self._next_end,) = look.execute("SELECT min(ends) FROM keys WHERE ends IS NOT NULL").fetchone()


class _File:
    """One connection to the file, for one thread at a time. Only this class and `_Transaction` know SQL's errors."""

    def __init__(self, path: str, timeout: float, clock: Clock) -> None:
        self._path = path
        self._timeout = timeout
        self._clock = clock
        self._boot = _boot_id()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        if "\0" in path:
            raise Invalid(f"{path!r} cannot be the name of a registry file")
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise NotFound(f"no directory {directory} for the registry file {os.path.basename(path)}")
        if os.path.isdir(path):
            raise Invalid(f"{path} is a directory, not a registry file")
        with self._translated():
            self._connection = connection = sqlite3.connect(
                path, timeout=timeout, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def data_version(self) -> int:
        with self._connected() as connection:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            return int(version)

    @contextmanager
    def reading(self) -> Iterator[_Transaction]:
        """A snapshot without expired keys. Writes only if there are some to remove."""
        with self._connected() as connection:
            look = self._begin(connection, "BEGIN")
            if look.stale():
                # A reader cannot become a writer if somebody has written since: begin anew.
                connection.execute("ROLLBACK")
                look = self._begin(connection, "BEGIN IMMEDIATE")
                look.renew()
            yield look
            connection.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[_Transaction]:
        """All or nothing. What had expired is removed even if the change itself is refused."""
        with self._connected() as connection:
            change = self._begin(connection, "BEGIN IMMEDIATE")
            change.renew()
            try:
                yield change
            except FlanctlError:
                connection.execute("COMMIT")  # refusals come before the first write of the change
                raise
            connection.execute("COMMIT")

    def _begin(self, connection: sqlite3.Connection, how: str) -> _Transaction:
        connection.execute(how)
        return _Transaction(connection, self._clock, self._boot)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            if self._connection is None:
                raise RegistryUnreachable(f"registry file {self._path} was closed")
            try:
                yield self._connection
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Recognise the file as ours or as new before the first byte of it is changed."""
        connection.execute("BEGIN")  # one look: another process may be making the tables now
        ours = self._recognised(connection)
        connection.execute("COMMIT")
        if not ours:
            connection.execute("BEGIN IMMEDIATE")
            if not self._recognised(connection):  # nobody was faster
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO meta VALUES (1, 1, 0, ?)", (self._boot,))
            connection.execute("COMMIT")
        # SQLite does not wait by itself for the lock this switch needs.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        # A write that was answered outlives a power cut; writes are rare enough to pay for it.
        connection.execute("PRAGMA synchronous = FULL")

    def _recognised(self, connection: sqlite3.Connection) -> bool:
        """True: ours. False: empty. Invalid: anybody else's."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION_ID:
            if version != SCHEMA_VERSION:
                raise Invalid(
                    f"registry file {self._path} has format {version}, this flanctl reads {SCHEMA_VERSION}"
                )
            # Every column's type too, so that what is read later is what it should be. 1 ms for 1,000 hosts.
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise Invalid(f"registry file {self._path} is damaged: {found}")
            return True
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application or version or tables:
            raise Invalid(
                f"{self._path} is another program's SQLite database, not a registry",
                hint="another path, sqlite:PATH; a file that is not there is created",
            )
        return False

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._meaning(error) from error
        except UnicodeDecodeError as error:  # Python reading SQLite's own words about a damaged schema
            raise Invalid(f"registry file {self._path} is damaged") from error

    def _meaning(self, error: sqlite3.Error) -> FlanctlError:
        extended = getattr(error, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if extended == sqlite3.SQLITE_READONLY_DBMOVED or (
            code == sqlite3.SQLITE_IOERR and not os.path.exists(self._path)
        ):
            return RegistryUnreachable(f"registry file {self._path} was moved or removed while in use")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return RegistryUnreachable(
                f"registry file {self._path} was held by another process for {self._timeout:g} s"
            )
        if code in (
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_AUTH,
            sqlite3.SQLITE_CANTOPEN,
        ):
            return NotPermitted(
                f"registry file {self._path} cannot be opened for writing: {error}",
                hint=f"permission to write to {os.path.dirname(self._path)} and to the file",
            )
        if code == sqlite3.SQLITE_NOTADB:
            return Invalid(
                f"{self._path} is not a registry file: {error}",
                hint="another path, sqlite:PATH; a file that is not there is created",
            )
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
            return RegistryUnreachable(f"registry file {self._path}: {error}")
        if code == sqlite3.SQLITE_TOOBIG:
            return Invalid(f"value too big for registry file {self._path}: {error}")
        return Invalid(f"registry file {self._path} is damaged: {error}")


class _Transaction:
    """What can be asked and changed between BEGIN and COMMIT."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock, boot: str) -> None:
        self.execute = connection.execute
        self._now = clock.now()
        self._boot = boot
        row = self.execute("SELECT revision, compacted, boot FROM meta").fetchone()
        if row is None:
            raise sqlite3.DatabaseError("it has lost its revision")
        self.meta = _Meta(*row)

    def stale(self) -> bool:
        """Whether `renew` has something to do."""
        expired = self.execute("SELECT 1 FROM keys WHERE ends <= ? LIMIT 1", (self._now,)).fetchone()
        return expired is not None or self.meta.boot != self._boot

    def renew(self) -> None:
        """After a reboot start every TTL anew; then remove what has expired."""
        if self.meta.boot != self._boot:
            self.execute("UPDATE keys SET ends = ? + ttl WHERE ttl IS NOT NULL", (self._now,))
            self.execute("UPDATE meta SET boot = ?", (self._boot,))
            self.meta = self.meta._replace(boot=self._boot)
        expired = self.execute("SELECT key FROM keys WHERE ends <= ? ORDER BY ends", (self._now,)).fetchall()
        for (key,) in expired:
            self.remove(key)

    def entry(self, key: bytes) -> Entry | None:
        row = self.execute("SELECT value, revision, lease, ends FROM keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        value, revision, lease, ends = row
        return Entry(key.decode(), value, revision, lease, None if ends is None else ends - self._now)

    def below(self, prefix: str) -> list[_Row]:
        """Key, value, revision and lease of everything whose key starts with `prefix`, by key."""
        rows: list[_Row] = self.execute(
            "SELECT key, value, revision, lease FROM keys WHERE key >= ? AND key < ? ORDER BY key",
            _range(prefix),
        ).fetchall()
        return rows

    def past(self, prefix: str, at: int) -> list[_Row]:
        """The same at revision `at`: what has not changed since, and what the log says of the rest. Raises Forgotten."""
        if not self.meta.compacted <= at <= self.meta.revision:
            raise Forgotten(at)
        found = {row[0]: row for row in self.below(prefix) if row[2] <= at}
        later: set[bytes] = set()
        for revision, key, value, lease in self.execute(
            "SELECT revision, key, value, lease FROM events WHERE key >= ? AND key < ? ORDER BY revision",
            _range(prefix),
        ):
            if revision > at:
                later.add(key)
            elif value is None:
                found.pop(key, None)
            else:
                found[key] = (key, value, revision, lease)
        if self.meta.compacted and later - found.keys():
            raise Forgotten(at)  # it may be new, or its old value may have been compacted away
        return [found[key] for key in sorted(found)]

    def ttl_of(self, entry: Entry) -> float:
        """By the lease, not by the key: the key may have been written anew since."""
        current = self.entry(_encoded(entry.key))
        return current.ttl or 0.0 if current is not None and current.lease == entry.lease else 0.0

    def expect(self, key: str, revision: int) -> Entry:
        current = self.entry(_encoded(key))
        if current is None or current.revision != revision:
            raise Changed(key, current)
        return current

    def put(self, key: str, value: bytes, ttl: float | None) -> Entry:
        if len(value) > MAX_VALUE:
            raise Invalid(f"value of {key} has {len(value)} bytes, at most {MAX_VALUE} are kept")
        name, revision = _encoded(key), self._next_revision()
        # A lease is granted by a write and by no other: the revision names it.
        lease = None if ttl is None else f"{revision:x}"
        ends = None if ttl is None else self._now + ttl
        self.execute(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)", (name, value, revision, lease, ttl, ends)
        )
        self.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (revision, name, value, lease))
        return Entry(key, value, revision, lease, ttl)

    def extend(self, key: bytes, ttl: float) -> None:
        self.execute("UPDATE keys SET ttl = ?, ends = ? WHERE key = ?", (ttl, self._now + ttl, key))

    def remove(self, key: bytes) -> None:
        revision = self._next_revision()
        self.execute("DELETE FROM keys WHERE key = ?", (key,))
        self.execute("INSERT INTO events VALUES (?, ?, NULL, NULL)", (revision, key))

    def _next_revision(self) -> int:
        revision, compacted = self.meta.revision + 1, self.meta.compacted
        if revision % COMPACT_EVERY == 0 and revision - KEPT_EVENTS > compacted:
            compacted = revision - KEPT_EVENTS
            self.execute("DELETE FROM events WHERE revision <= ?", (compacted,))
        self.execute("UPDATE meta SET revision = ?, compacted = ?", (revision, compacted))
        self.meta = self.meta._replace(revision=revision, compacted=compacted)
        return revision


def _encoded(key: str) -> bytes:
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise Invalid(f"key {key!r} is not Unicode text") from None


def _decoded(key: bytes) -> str | None:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None


def _range(prefix: str) -> tuple[bytes, bytes]:
    """First key with the prefix and first key after all of them. UTF-8 has no byte 0xff."""
    first = _encoded(prefix)
    return (first, first[:-1] + bytes([first[-1] + 1])) if first else (b"", b"\xff" * 16)


def _boot_id() -> str:
    """A word that every process sees alike until the next boot. random(4)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""  # no /proc: reboots go unnoticed, keys may outlive their time

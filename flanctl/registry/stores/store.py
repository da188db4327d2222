"""What a key-value store must do for us; nothing of flannel is in here.

    snapshot = store.list("/jxdd/network/subnets/")
    with store.watch("/jxdd/network/subnets/", after=snapshot.revision) as watch:
        for event in watch: ...

One suite (tests/contract/test_store.py) runs over every store. All calls have a deadline (the store's
`timeout`), try every endpoint within it, and raise only the errors named here and in `flanctl.errors`:

- `RegistryUnreachable`  nobody answered in time, or not in a way we understand; nothing is known of the outcome
                         of a write (create and replace read back and recognise their own value)
- `NotPermitted`         the server refused the user, the token or the certificate
- `KeyExists`, `Changed` compare-and-swap lost; `.current` is what is there now
- `Invalid`              the server says the request itself is wrong; its words are kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flanctl import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as the store held it at `revision` (the revision of its last change).

    `lease` is the store's token for the key's time to live; None means the key stays until somebody deletes it.
    `ttl` is how many seconds were left when the entry was read, None if there is no TTL or it was not asked for.
    """

    key: str
    value: bytes
    revision: int
    lease: str | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A key that is not UTF-8. It is shown and counted, and hides no other."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys below a prefix, by key, at one revision. Watching goes on after that revision."""

    entries: tuple[Entry, ...]
    revision: int
    unreadable: tuple[Unreadable, ...] = ()


@dataclass(frozen=True, slots=True)
class Put:
    """A key was created or changed. `entry.ttl` is never known here."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Delete:
    """A key was deleted or expired (the store does not say which)."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing happened up to `revision`; the watch is alive."""

    revision: int


@dataclass(frozen=True, slots=True)
class Compacted:
    """The store has forgotten the events we asked for: list again. The watch ends after this."""

    at: int


Event = Put | Delete | Progress | Compacted


class KeyExists(errors.Conflict):
    """`create` found the key there. `current` is what holds it (None if it is gone again already)."""

    def __init__(self, key: str, current: Entry | None) -> None:
        super().__init__(f"key {key} exists already", id="key-exists")
        self.key = key
        self.current = current


class Changed(errors.Conflict):
    """The key is not at the revision we expected. `current` is None if the key is gone."""

    def __init__(self, key: str, current: Entry | None) -> None:
        what = "is gone" if current is None else f"was changed at revision {current.revision}"
        super().__init__(f"key {key} {what}", id="key-changed")
        self.key = key
        self.current = current


class Forgotten(errors.FlanctlError):
    """The store does not know, or no longer, how things were at that revision."""

    default_id = "forgotten"

    def __init__(self, revision: int) -> None:
        super().__init__(f"the registry does not know what it held at revision {revision}")


class Watch(Protocol):
    """Events in revision order, each once. Iterating blocks.

    `close` may be called from any thread and ends the iteration soon; closing twice is fine. A broken
    connection is mended inside (other endpoint, resume after the last revision seen). When no endpoint can be
    reached for the store's `timeout`, iterating raises `RegistryUnreachable`; the caller decides when to try again.
    """

    def __iter__(self) -> Iterator[Event]: ...
    def __next__(self) -> Event: ...
    def __enter__(self) -> Watch: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def close(self) -> None: ...


class Store(Protocol):
    """A key-value store with revisions, compare-and-swap, TTLs and watches. Safe to use from several threads.

    TTLs are in seconds; None means no TTL. Values are bytes, at most 1 MB (etcd's own limit is 1.5 MB).
    """

    @property
    def name(self) -> str:
        """For people: `etcd v3 over gRPC`, `sqlite`."""
        ...

    @property
    def api(self) -> str:
        """Which of an etcd's two sets of keys this is, `v2` or `v3` (as far as known); "" where there is one."""
        ...

    def describe(self) -> str:
        """Name, version and endpoint that answered last, as far as known, without asking again."""
        ...

    def get(self, key: str) -> Entry | None:
        """The entry with its TTL, or None."""
        ...

    def list(self, prefix: str, *, at: int | None = None) -> Snapshot:
        """Everything whose key starts with `prefix`, at one revision, read through consensus. TTLs are not asked.

        That revision is now, or `at`. Raises Forgotten for one that lies in the future or was compacted; a store
        that keeps no values of the past may raise it for any.
        """
        ...

    def with_ttl(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The same entries with `ttl` filled in. An entry whose lease has ended meanwhile gets ttl 0."""
        ...

    def create(self, key: str, value: bytes, *, ttl: float | None) -> Entry:
        """Write the key only if it is absent. Finding our own value after a lost answer counts as success.

        Raises KeyExists.
        """
        ...

    def replace(self, key: str, value: bytes, *, ttl: float | None, expected: int) -> Entry:
        """Write the key only if its revision is `expected`; the TTL starts anew. Raises Changed."""
        ...

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """Delete the key; False if it was not there. With `expected`, only at that revision. Raises Changed."""
        ...

    def refresh(self, entry: Entry, *, ttl: float) -> Entry:
        """Give the key its full `ttl` again without changing its value.

        The revision stays if the store can do so (etcd's keep-alive on a lease granted with this ttl), else the
        same value is written anew by compare-and-swap; use the returned entry from then on. Raises Changed if the
        key is gone or no longer at `entry.revision`.
        """
        ...

    def watch(self, prefix: str, *, after: int) -> Watch:
        """Changes of keys below `prefix` later than revision `after`."""
        ...

    def close(self) -> None:
        """Let go of connections and threads. Closing twice is fine."""
        ...

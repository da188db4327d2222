"""A writer of subnets, 50 times a second; a follower that is told of them; and what to make of the two.

with Follower(host, endpoints) as follower, Writer(host, endpoints, names) as writer:
    writer.go_on(50)
    revision = writer.revision
    until(lambda: follower.revision >= revision)
count(truth, follower.told)           # written, seen, lost, doubled; the truth is etcd's own (truth.py)
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Self

from flanctl.errors import FlanctlError
from flanctl.registry.stores.open import Connection, open_store
from tests.support.agents import FLANCTL, environment
from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flanctl.demo.hosts import Host
    from flanctl.registry.stores.store import Entry, Store
    from tests.drills.truth import Happened

RATE = 50
"""Changes a second."""
TTL = 3600.0
"""Seconds; longer than any drill, so that nothing ends by itself."""
FIRST = IPv4Address("10.99.0.1")
"""Public IP of the first change; each has another one, so that each can be told from all others."""


class Writer:
    """Adds a subnet, moves it to another host, removes it; then the next. A thread inside a host's namespace.

    An outage is waited out: what became of a write that nobody answered is read before the next. The truth about what
    was written is etcd's history, not ours.
    """

    def __init__(self, host: Host, connection: Connection, keys: Sequence[str]) -> None:
        self._host = host
        self._connection = connection
        self._keys = keys
        self._stop = threading.Event()
        self._may = threading.Event()
        self._may.set()
        self._rests = threading.Event()
        self._between = True
        """No key of ours is there: the last was removed again."""
        self._thread = threading.Thread(target=self._run)
        self._number = 0
        self.written = 0
        """Changes that were acknowledged."""
        self.last: Happened = (0, "", "")
        """The last that put something."""
        self.failed = 0
        """Writes nobody acknowledged."""
        self.longest = 0.0
        """Seconds between two acknowledged changes, at the most."""
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._may.set()
        self._thread.join()
        assert self._error is None, repr(self._error)

    def pause(self, *, refused: bool = False) -> None:
        """Write nothing more until `go_on`; what was added is removed again when this returns.

        With `refused` not before etcd has refused a change.
        """
        if refused:
            failed = self.failed
            until(lambda: self.failed > failed or self._error, what="a change is refused")
        self._may.clear()
        until(self._rests.is_set, seconds=60, what="the writer rests")

    def go_on(self, changes: int = 1, *, seconds: float = 60.0) -> None:
        """Until so many more were acknowledged."""
        self._rests.clear()
        self._may.set()
        goal = self.written + changes
        until(lambda: self.written >= goal or self._error, seconds=seconds, what="the writer goes on")
        assert self._error is None, repr(self._error)

    def _run(self) -> None:
        try:
            with inside(self._host.path), closing(open_store(self._connection)) as store:
                due = last = time.monotonic()
                steps = self._steps(store)
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    if not self._may.is_set() and self._between:
                        self._rests.set()
                        self._may.wait()
                        last = time.monotonic()
                        continue
                    if next(steps):
                        now = time.monotonic()
                        self.written += 1
                        self.longest = max(self.longest, now - last)
                        last = now
                    due = max(due + 1 / RATE, time.monotonic())
        except BaseException as error:
            self._error = error

    def _steps(self, store: Store) -> Iterator[bool]:
        """One change each; True if it was acknowledged."""
        while True:
            for key in self._keys:
                entry: Entry | None = None
                step = 0
                while step < 3:
                    self._between = False
                    try:
                        entry = self._change(store, key, entry, step)
                    except FlanctlError:
                        self.failed += 1
                        entry = self._read(store, key)
                        step = 0 if entry is None else 2
                        self._between = entry is None
                        yield False
                        continue
                    step += 1
                    self._between = step == 3
                    yield True

    def _change(self, store: Store, key: str, entry: Entry | None, step: int) -> Entry | None:
        if entry is not None and step == 2:
            store.delete(key, expected=entry.revision)
            return None
        self._number += 1
        value = b'{"PublicIP":"%s"}' % str(FIRST + self._number).encode()
        if entry is None:
            entry = store.create(key, value, ttl=TTL)
        else:
            entry = store.replace(key, value, ttl=TTL, expected=entry.revision)
        self.last = entry.revision, key, str(FIRST + self._number)
        return entry

    def _read(self, store: Store, key: str) -> Entry | None:
        """What is there after a write with an unknown outcome; asks until somebody answers."""
        while not self._stop.wait(0.1):
            try:
                return store.get(key)
            except FlanctlError:
                continue
        return None


@dataclass(frozen=True, slots=True)
class Told:
    """A line of `subnets watch -w json`, and when we read it (time.monotonic)."""

    at: float
    fields: Mapping[str, object]

    @property
    def event(self) -> str:
        return str(self.fields["event"])

    @property
    def happened(self) -> Happened:
        return int(str(self.fields["revision"])), str(self.fields["key"]), str(self.fields["public_ip"])


class Follower:
    """`flanctl subnets watch --all -w json` on a host, from before the first change to the end."""

    def __init__(self, host: Host, endpoints: str, prefix: Sequence[str] = (), **more: str) -> None:
        self._process: subprocess.Popen[str] = host.popen(
            [*prefix, *FLANCTL, "subnets", "watch", "--all", "-w", "json"],
            env=environment(endpoints, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told: list[Told] = []
        """Changes, in the order in which they were told."""
        self.listed: list[Told] = []
        self.said: list[str] = []
        """Lines of stderr: outages and their ends."""
        self.revision = 0
        """That of the last change told."""
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        for thread in self._threads:
            thread.join()
        assert not any("Traceback" in line for line in self.said), "".join(self.said)

    def wait_listed(self) -> None:
        until(lambda: self.listed, seconds=30, what=f"the follower has listed\n{''.join(self.said)}")

    def wait_told(self, what: Callable[[Told], bool], *, seconds: float = 60.0) -> Told:
        """The first change of which `what` is true; those told before count too."""
        looked = 0

        def look() -> Told | None:
            nonlocal looked
            while looked < len(self.told):
                looked += 1
                if what(self.told[looked - 1]):
                    return self.told[looked - 1]
            assert self._process.poll() is None, f"the follower ended\n{''.join(self.said)}"
            return None

        found = until(look, seconds=seconds, fail=False)
        assert found, f"the follower was not told in {seconds:g} s; it said\n{''.join(self.said[-20:])}"
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            one = Told(time.monotonic(), json.loads(line))
            if one.event == "listed":
                self.listed.append(one)
            else:
                self.told.append(one)
                self.revision = one.happened[0]

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line)


@dataclass(frozen=True, slots=True)
class Count:
    written: int
    seen: int
    lost: int
    doubled: int


def count(truth: Sequence[Happened], told: Sequence[Told]) -> Count:
    """Each thing that happened, told once. What was told and never happened is a mistake of ours, not a number."""
    seen = Counter(one.happened for one in told)
    invented = seen.keys() - set(truth)
    assert not invented, f"told but never written: {sorted(invented)[:5]}"
    return Count(
        written=len(truth),
        seen=len(seen),
        lost=sum(one not in seen for one in truth),
        doubled=sum(times - 1 for times in seen.values()),
    )

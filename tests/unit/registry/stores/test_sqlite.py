"""The file behind the sqlite store. What every store promises is in tests/contract/test_store.py."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import sqlite
from flanctl.registry.stores.sqlite import SqliteStore
from flanctl.registry.stores.store import Compacted, Delete, KeyExists, Progress, Put
from tests.support.clock import FakeClock
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "registry.db")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(path: str, clock: FakeClock) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path, clock=clock)) as store:
        yield store


def sql(path: str, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).fetchall()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's power over files; a user's tests have none to give up."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestFile:
    def test_it_is_made_if_it_is_not_there_and_known_again(self, path: str) -> None:
        with contextlib.closing(SqliteStore(path)) as store:
            entry = store.create("/a", b"1", ttl=None)
        with contextlib.closing(SqliteStore(path)) as store:
            assert store.get("/a") == entry
            assert store.describe() == f"sqlite {sqlite3.sqlite_version}, {path}"

    def test_an_empty_file_is_as_good_as_none(self, path: str) -> None:
        open(path, "w").close()
        SqliteStore(path).close()

    def test_a_missing_directory_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=f"no directory {tmp_path}/none for the registry file r.db"):
            SqliteStore(str(tmp_path / "none" / "r.db"))

    def test_a_directory_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(Invalid, match="is a directory"):
            SqliteStore(str(tmp_path))

    def test_a_name_that_cannot_be(self) -> None:
        with pytest.raises(Invalid, match="cannot be the name"):
            SqliteStore("a\0b")

    def test_memory_is_a_name_like_any_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        SqliteStore(":memory:").close()
        assert (tmp_path / ":memory:").exists()

    def test_a_file_of_another_kind_is_left_alone(self, path: str) -> None:
        content = b'{"Network": "172.17.0.0/16"}\n' * 100
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(Invalid, match="is not a registry file"):
            SqliteStore(path)
        with open(path, "rb") as file:
            assert file.read() == content

    @pytest.mark.parametrize(
        "statement", ["CREATE TABLE theirs (x)", "PRAGMA application_id = 7", "PRAGMA user_version = 3"]
    )
    def test_another_programs_database_is_left_alone(self, path: str, statement: str) -> None:
        sql(path, statement)
        with open(path, "rb") as file:
            content = file.read()
        with pytest.raises(Invalid, match="another program's SQLite database"):
            SqliteStore(path)
        with open(path, "rb") as file:
            assert file.read() == content

    def test_a_newer_format_is_refused(self, path: str) -> None:
        SqliteStore(path).close()
        sql(path, "PRAGMA user_version = 9")
        with pytest.raises(Invalid, match="has format 9, this flanctl reads 1"):
            SqliteStore(path)

    def test_a_file_or_directory_one_may_not_write_to_is_not_permitted(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
            path = os.path.join(folder, "registry.db")
            SqliteStore(path).close()
            os.chmod(path, 0o444)
            os.chmod(folder, 0o555)
            with as_nobody():
                for one in (path, os.path.join(folder, "new.db")):
                    with pytest.raises(NotPermitted, match="cannot be opened for writing") as caught:
                        SqliteStore(one).create("/a", b"", ttl=None)
                    assert one in caught.value.message
                    assert caught.value.hint == f"permission to write to {folder} and to the file"
            os.chmod(folder, 0o755)

    def test_a_place_where_not_even_root_may_write(self) -> None:
        with pytest.raises(NotPermitted, match="cannot be opened for writing"):
            SqliteStore("/proc/flanctl.db")

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4))
    def test_a_damaged_file_is_refused_or_read_never_a_crash(
        self, tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[int, int]]
    ) -> None:
        path = str(tmp_path_factory.mktemp("damaged") / "r.db")
        with contextlib.closing(SqliteStore(path, clock=FakeClock())) as store:
            store.create("/a", b"1" * 50, ttl=100)
            store.create("/ü", b"2" * 50, ttl=None)
        with open(path, "rb") as file:
            content = bytearray(file.read())
        used = [place for place, byte in enumerate(content) if byte]
        for place, byte in damages:
            content[used[place % len(used)]] = byte
        with open(path, "wb") as file:
            file.write(content)
        with (
            contextlib.suppress(FlanctlError),
            contextlib.closing(SqliteStore(path, timeout=0.01, clock=FakeClock())) as store,
        ):
            for entry in store.list("/").entries:
                store.get(entry.key)
            with store.watch("/", after=0) as watch:
                next(watch)

    def test_a_file_that_is_moved_away_is_noticed_by_a_write(self, path: str, store: SqliteStore) -> None:
        os.rename(path, path + ".old")
        with pytest.raises(RegistryUnreachable, match="was moved or removed"):
            store.create("/a", b"1", ttl=None)

    def test_a_file_held_by_another_process_is_waited_for(self, path: str) -> None:
        with contextlib.closing(SqliteStore(path, timeout=0.1)) as store:
            holder = sqlite3.connect(path, isolation_level=None)
            with contextlib.closing(holder):
                holder.execute("BEGIN IMMEDIATE")
                with pytest.raises(RegistryUnreachable, match=r"held by another process for 0\.1 s"):
                    store.create("/a", b"1", ttl=None)
                assert store.get("/a") is None, "readers do not wait"
            assert store.create("/a", b"1", ttl=None)


class TestTime:
    def test_the_last_moment_of_a_key_is_just_before_its_end(
        self, store: SqliteStore, clock: FakeClock
    ) -> None:
        store.create("/a", b"1", ttl=60)
        clock.advance(59.5)
        entry = store.get("/a")
        assert entry is not None
        assert entry.ttl == pytest.approx(0.5)
        clock.advance(0.5)
        assert store.get("/a") is None

    def test_each_expired_key_goes_at_a_revision_of_its_own_in_order_of_their_ends(
        self, store: SqliteStore, clock: FakeClock
    ) -> None:
        store.create("/b", b"", ttl=20)
        last = store.create("/a", b"", ttl=30)
        clock.advance(100)
        assert store.list("/").entries == ()
        with store.watch("/", after=last.revision) as watch:
            assert [next(watch), next(watch)] == [
                Delete("/b", last.revision + 1),
                Delete("/a", last.revision + 2),
            ]

    def test_what_expired_is_removed_even_when_the_write_that_finds_it_is_refused(
        self, path: str, store: SqliteStore, clock: FakeClock
    ) -> None:
        store.create("/a", b"", ttl=10)
        store.create("/b", b"", ttl=None)
        clock.advance(10)
        with pytest.raises(KeyExists):
            store.create("/b", b"", ttl=None)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT key FROM keys").fetchall() == [(b"/b",)]

    def test_after_a_reboot_every_key_has_its_full_ttl(self, path: str) -> None:
        """The clock starts anew: by the old one keys would live for days, or be dead already."""
        for uptime_before, uptime_after in ((1e6, 50.0), (50.0, 1e6)):
            clock = FakeClock(uptime_before)
            with contextlib.closing(SqliteStore(path, clock=clock)) as store:
                entry = store.create("/a", b"", ttl=100)
                stays = store.create("/b", b"", ttl=None)
                clock.advance(90)
                sql(path, "UPDATE meta SET boot = 'the boot before'")
            with contextlib.closing(SqliteStore(path, clock=(clock := FakeClock(uptime_after)))) as store:
                (timed, _) = store.with_ttl(store.list("/").entries)
                assert (timed.revision, timed.ttl) == (entry.revision, 100)
                clock.advance(99)
                assert store.get("/a") is not None
                clock.advance(1)
                assert store.list("/").entries == (stays,)
                store.delete("/b")

    def test_a_lease_is_not_taken_for_a_later_one_of_the_same_key(
        self, store: SqliteStore, clock: FakeClock
    ) -> None:
        old = store.create("/a", b"", ttl=10)
        clock.advance(10)
        new = store.create("/a", b"", ttl=10)
        assert [entry.ttl for entry in store.with_ttl([old, new])] == [0, 10]


class TestLog:
    def test_the_last_events_are_kept_and_older_ones_forgotten(
        self, store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "KEPT_EVENTS", 10)
        monkeypatch.setattr(sqlite, "COMPACT_EVERY", 5)
        entry = first = store.create("/a", b"", ttl=None)
        for _ in range(40):
            entry = store.replace("/a", b"", ttl=None, expected=entry.revision)
        with store.watch("/", after=first.revision) as watch:
            (compacted,) = list(watch)
        assert isinstance(compacted, Compacted)
        assert entry.revision - 15 <= compacted.at <= entry.revision - 10
        with store.watch("/", after=compacted.at) as watch:
            kept = [next(watch) for _ in range(entry.revision - compacted.at)]
        assert kept[-1] == Put(entry)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM events").fetchone() == (len(kept),)

    def test_a_quiet_watch_does_not_fall_behind_a_loud_neighbour(
        self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "KEPT_EVENTS", 10)
        monkeypatch.setattr(sqlite, "COMPACT_EVERY", 1)
        monkeypatch.setattr(sqlite, "PROGRESS_SECONDS", 0.0)
        with store.watch("/quiet/", after=store.list("/").revision) as watch:
            for number in range(20):
                entry = store.create(f"/loud/{number}", b"", ttl=None)
                assert next(watch) == Progress(entry.revision)
            mine = store.create("/quiet/a", b"", ttl=None)
            assert next(watch) == Put(mine)

    def test_a_watch_far_behind_gets_every_event(
        self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "BATCH", 7)
        made = [store.create(f"/{number}", b"", ttl=None) for number in range(21)]
        with store.watch("/", after=1) as watch:
            assert [next(watch) for _ in made] == [Put(entry) for entry in made]

    def test_a_waiting_watch_costs_next_to_nothing(self, store: SqliteStore) -> None:
        """0.2 % of a processor where this was written; the bound is for loaded machines."""
        with store.watch("/", after=0) as watch:
            next(watch)
            began, used = time.monotonic(), time.thread_time()
            next(watch)
            assert time.thread_time() - used < 0.01 * (time.monotonic() - began)


class TestEnd:
    def test_closing_the_store_ends_its_watches(self, store: SqliteStore) -> None:
        watches = [store.watch("/", after=0) for _ in range(3)]
        ended = [threading.Thread(target=list, args=(watch,), daemon=True) for watch in watches]
        for thread in ended:
            thread.start()
        store.close()
        store.close()
        for thread in ended:
            thread.join(2)
            assert not thread.is_alive()

    def test_a_closed_store_says_so(self, store: SqliteStore) -> None:
        store.close()
        for act in (lambda: store.get("/a"), lambda: store.watch("/", after=0)):
            with pytest.raises(RegistryUnreachable, match="was closed"):
                act()


class TestRefusals:
    def test_a_value_above_1_mib_is_refused(self, store: SqliteStore) -> None:
        assert store.create("/a", bytes(1 << 20), ttl=None)
        with pytest.raises(Invalid, match="has 1048577 bytes"):
            store.create("/b", bytes((1 << 20) + 1), ttl=None)
        assert store.get("/b") is None

    def test_a_key_that_is_no_text_is_refused(self, store: SqliteStore) -> None:
        for act in (store.get, store.delete, store.list):
            with pytest.raises(Invalid, match="is not Unicode text"):
                act("/\udcff")


class TestProcesses:
    def test_many_that_make_the_file_at_once_share_it(self, path: str) -> None:
        """The very first moment: no file, no tables, no journal mode yet."""

        def run(number: int) -> bool:
            with contextlib.closing(SqliteStore(path)) as store:
                try:
                    store.create("/a", b"%d" % number, ttl=100)
                except KeyExists:
                    return False
                return True

        with ThreadPoolExecutor(6) as pool:
            assert sorted(pool.map(run, range(6))) == [False] * 5 + [True]

    def test_exactly_one_process_wins_each_key(self, path: str) -> None:
        code = """if True:
            import sys
            from flanctl.registry.stores.sqlite import SqliteStore
            from flanctl.registry.stores.store import KeyExists
            store = SqliteStore(sys.argv[1])
            for number in range(50):
                try:
                    store.create(f"/{number}", sys.argv[2].encode(), ttl=100)
                    print(number)
                except KeyExists:
                    pass
        """
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, path, str(number)], stdout=subprocess.PIPE, text=True
            )
            for number in range(3)
        ]
        won = [process.communicate()[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert sorted(int(number) for numbers in won for number in numbers) == list(range(50))
        with contextlib.closing(SqliteStore(path)) as store:
            for winner, numbers in enumerate(won):
                for number in numbers:
                    entry = store.get(f"/{number}")
                    assert entry is not None
                    assert entry.value == b"%d" % winner

    def test_one_that_is_killed_while_it_writes_hurts_nobody(self, path: str) -> None:
        """A key and its event are written together or not at all, and the lock goes with the process."""
        code = """if True:
            import itertools, sys
            from flanctl.registry.stores.sqlite import SqliteStore
            store = SqliteStore(sys.argv[1])
            for number in itertools.count():
                store.create(f"/{number:06}", b"x" * 1000, ttl=None)
        """
        with contextlib.closing(SqliteStore(path)) as store:
            process = subprocess.Popen([sys.executable, "-c", code, path])
            try:
                until(lambda: len(store.list("/").entries) >= 20)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            snapshot = store.list("/")
            with store.watch("/", after=1) as watch:
                assert [next(watch) for _ in snapshot.entries] == [Put(entry) for entry in snapshot.entries]
            assert store.create("/a", b"", ttl=None).revision == snapshot.revision + 1

"""Which store an endpoint gives, what that costs to import, and the way from the gateway to gRPC."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.errors import NotFound, NotPermitted, RegistryUnreachable, UsageError
from flanctl.registry.stores import open as opening
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore, GatewayOff
from flanctl.registry.stores.memory import MemoryStore
from flanctl.registry.stores.open import Connection, open_store
from flanctl.registry.stores.sqlite import SqliteStore
from flanctl.registry.stores.store import Put
from flanctl.registry.stores.switching import AutoStore, FallbackStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.registry.stores.open import Api
    from flanctl.registry.stores.store import Store


class TestChoice:
    def test_sqlite_names_a_file(self, tmp_path: Path) -> None:
        connection = Connection((f"sqlite:{tmp_path}/r, 1.db",))
        with contextlib.closing(open_store(connection)) as store:
            assert isinstance(store, SqliteStore)
            assert store.describe().endswith(f"{tmp_path}/r, 1.db")

    def test_the_files_errors_come_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no directory"):
            open_store(Connection((f"sqlite:{tmp_path}/none/r.db",)))

    @pytest.mark.parametrize(
        "endpoint", ["http://127.0.0.1:2379", "https://etcd-1:2379", "etcd-1", "[::1]:2379"]
    )
    def test_anything_else_is_etcd_and_connects_to_nobody_yet(self, endpoint: str) -> None:
        with contextlib.closing(open_store(Connection((endpoint,)))) as store:
            assert isinstance(store, FallbackStore)
            assert store.name == EtcdGatewayStore.name

    @pytest.mark.parametrize(
        ("endpoints", "words"),
        [
            ((), "no etcd endpoint given"),
            (("",), "no etcd endpoint given"),
            (("memory:",), "memory: is for tests only"),
            (("sqlite:",), "sqlite: names no file"),
            (("sqlite:/a", "sqlite:/b"), "either sqlite:PATH or etcd|a file is a registry by itself"),
            (("http://a", "sqlite:/b"), "a file is a registry by itself"),
            (("sqlite:/b", "http://a"), "a file is a registry by itself"),
            (("consul://a",), "consul://a"),
            (("http://a", "unix:///run/etcd"), "unix:///run/etcd"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, endpoints: tuple[str, ...], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            open_store(Connection(endpoints))

    @pytest.mark.parametrize(
        "error",
        [
            ImportError("libstdc++.so.6: cannot open shared object file: No such file or directory"),
            OSError("cannot map cygrpc"),
            ModuleNotFoundError("No module named 'grpc'"),
            TypeError("Descriptors cannot be created directly."),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_that_grpc_cannot_be_loaded_is_said_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        class Broken:
            """What a C library that is not there does to an import."""

            def find_spec(self, name: str, *_: object) -> None:
                if name == "flanctl.registry.stores.etcd_grpc":
                    raise error

        monkeypatch.delitem(sys.modules, "flanctl.registry.stores.etcd_grpc", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        with pytest.raises(opening.GrpcMissing) as caught:
            opening._open_grpc((), Connection(("http://a",)))
        assert caught.value.message == f"gRPC cannot be loaded ({error})"

    @pytest.mark.parametrize("api", ["v2", "v3", "auto"])
    def test_a_ca_that_is_not_there_is_an_error_at_once_and_no_registry_to_wait_for(
        self, tmp_path: Path, api: Api
    ) -> None:
        how = Connection(("http://a", "https://b"), cacert=str(tmp_path / "ca.pem"), api=api)
        with pytest.raises(NotFound, match=r"no such file: .*/ca\.pem"):
            open_store(how, key="/n/config")
        open_store(replace(how, endpoints=("http://a",)), key="/n/config").close()

    def test_a_password_is_never_shown(self) -> None:
        connection = Connection(("http://a",), user="root", password="hunter2")
        assert "hunter2" not in repr(connection)


HEAVY = ("grpc", "etcd3", "google.protobuf", "http.client", "ssl", "sqlite3", "asyncio", "logging", "socket")


def loaded(code: str) -> set[str]:
    """Which heavy modules a fresh Python has in the end."""
    program = f"{code}\nimport sys\nprint(*({HEAVY!r} & sys.modules.keys()))".replace(
        repr(HEAVY), repr(set(HEAVY))
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


class TestImports:
    def test_the_module_itself_loads_nothing_heavy(self) -> None:
        assert loaded("import flanctl.registry.stores.open") == set()

    def test_a_file_loads_only_sqlite(self, tmp_path: Path) -> None:
        code = "from flanctl.registry.stores.open import *\n"
        code += f"open_store(Connection(('sqlite:{tmp_path}/r.db',))).get('/a')"
        assert loaded(code) == {"sqlite3"}

    def test_the_gateway_loads_no_grpc_and_over_http_no_ssl(self) -> None:
        code = "from flanctl.registry.stores.open import *\n"
        code += "open_store(Connection(('http://127.0.0.1:1',)))"
        assert not loaded(code) & {"grpc", "etcd3", "google.protobuf", "ssl", "sqlite3", "asyncio", "logging"}


class Etcd2:
    """What AutoStore asks of v2, held in memory."""

    def __init__(self, *, version: str = "3.4.23") -> None:
        self.data = MemoryStore()
        self.asked: list[float | None] = []
        self._version = version

    def open(self, timeout: float | None) -> Any:
        self.asked.append(timeout)
        store: Any = self.data.another()
        store.api, store.name, store.version = "v2", "etcd v2", lambda: self._version
        return store


CONFIG = "/net/config"


class TestAuto:
    @pytest.fixture
    def v3(self) -> MemoryStore:
        return MemoryStore()

    @pytest.mark.parametrize(
        ("in_v3", "in_v2", "api", "sentences"),
        [
            (True, False, "", [("memory is taken: the config is there", False)]),
            (False, True, "v2", [("etcd v2 is taken: the config is there and not in v3", False)]),
            (
                True,
                True,
                "",
                [
                    (f"{CONFIG} is in etcd v3 and in v2: v3 is taken; --api v2 for the other", True),
                    ("memory is taken: the config is there", False),
                ],
            ),
            (False, False, "", []),
        ],
    )
    def test_the_one_that_holds_the_config_is_taken(
        self, v3: MemoryStore, in_v3: bool, in_v2: bool, api: str, sentences: list[tuple[str, bool]]
    ) -> None:
        v2 = Etcd2()
        for held, store in ((in_v3, v3), (in_v2, v2.data)):
            if held:
                store.another().create(CONFIG, b"{}", ttl=None)
        said: list[tuple[str, bool]] = []
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *words: said.append(words))) as store:
            assert (store.get(CONFIG) is not None) == (in_v3 or in_v2)
            assert (store.api, said) == (api, sentences)
            store.list("/net/")
            assert said == sentences, "decided and said once"
            assert (store.why in store.describe()) and bool(store.why) == (in_v3 or in_v2)

    def test_who_waits_for_a_config_finds_it_in_either(self, v3: MemoryStore) -> None:
        v2 = Etcd2()
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *_: None)) as store:
            assert store.get(CONFIG) is None
            v2.data.create(CONFIG, b"{}", ttl=None)
            assert store.get(CONFIG) is not None
            assert store.api == "v2"
            with store.watch("/net/", after=1) as watch:
                assert isinstance(next(watch), Put)

    @pytest.mark.parametrize("api", ["v2", "v3"])
    def test_who_held_a_lease_in_one_stays_there_whatever_comes_back(self, v3: MemoryStore, api: str) -> None:
        """An etcd that lost its data has no config; or an old one, in the other API."""
        v2 = Etcd2()
        (v2.data if api == "v3" else v3).create(CONFIG, b"old", ttl=None)
        said: list[tuple[str, bool]] = []
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *words: said.append(words))) as store:
            store.stay("")
            store.stay(api)
            assert store.get(CONFIG) is None
            store.create("/net/subnets/172.17.41.0-24", b"ours", ttl=60)
            assert len((v2.data if api == "v2" else v3).list("/net/subnets/").entries) == 1
            assert said == [
                (f"{'etcd v2' if api == 'v2' else 'memory'} is taken: this host's lease is there", False)
            ]

    def test_who_is_on_v2_moves_to_v3_when_it_is_there_and_nothing_speaks_against_it(
        self, v3: MemoryStore
    ) -> None:
        v2 = Etcd2()
        v2.data.create(CONFIG, b"old", ttl=None)
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *_: None)) as store:
            assert store.move(lambda _: None) == "memory is in use"  # nobody has asked anything yet
            assert store.get(CONFIG) is not None
            assert store.move(lambda _: None) == f"{CONFIG} is not in v3"
            v3.create(CONFIG, b"new", ttl=None)
            v3.fail("get", RegistryUnreachable("no leader"))
            assert store.move(lambda _: None) == "no leader"
            assert store.move(lambda there: "not yet" if there is v3 else "another") == "not yet"
            assert store.api == "v2"
            with store.watch("/net/", after=v2.data.list("/").revision) as watch:
                assert store.move(lambda _: None) is None
                assert list(watch) == [], "a watch on v2 ends"
            assert (store.api, store.get(CONFIG).value) == (v3.api, b"new")  # type: ignore[union-attr]
            assert store.move(lambda _: None) == "memory is in use"

    def test_a_v3_in_trouble_is_not_exchanged_for_what_is_left_in_v2(self, v3: MemoryStore) -> None:
        v2 = Etcd2()
        v2.data.create(CONFIG, b"old", ttl=None)
        v3.fail("get", RegistryUnreachable("no leader"))
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *_: None)) as store:
            with pytest.raises(RegistryUnreachable, match="no leader"):
                store.get(CONFIG)

    def test_a_v2_that_does_not_let_us_look_is_said_only_where_v3_holds_nothing(
        self, v3: MemoryStore
    ) -> None:
        class Guarded(Etcd2):
            def open(self, timeout: float | None) -> Any:
                store = super().open(timeout)
                store.fail("get", NotPermitted("etcd wants a login"))
                return store

        with contextlib.closing(AutoStore(v3, Guarded().open, CONFIG, lambda *_: None)) as store:
            with pytest.raises(NotPermitted, match="wants a login") as caught:
                store.get(CONFIG)
            assert "--api v3" in (caught.value.hint or "")
            v3.create(CONFIG, b"{}", ttl=None)
            assert store.get(CONFIG) is not None

    def test_an_etcd_older_than_3_has_only_v2(self, v3: MemoryStore) -> None:
        v3.fail("get", RegistryUnreachable("answers, but is not etcd (no gRPC)"), times=9)
        v2 = Etcd2(version="2.3.8")
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *_: None)) as store:
            assert store.get(CONFIG) is None
            assert store.api == "v2"

    def test_no_right_to_look_is_no_absence(self, v3: MemoryStore) -> None:
        v3.fail("get", NotPermitted("permission denied"), times=2)
        v2 = Etcd2()
        v2.data.create(CONFIG, b"old", ttl=None)
        with contextlib.closing(AutoStore(v3, v2.open, CONFIG, lambda *_: None)) as store:
            with pytest.raises(NotPermitted):
                store.get(CONFIG)


OFF = GatewayOff("cannot get /a: the gateway is off")


@pytest.fixture
def gateway() -> MemoryStore:
    """Both stores are clients of one registry, as in life."""
    return MemoryStore()


@pytest.fixture
def grpc(gateway: MemoryStore) -> MemoryStore:
    return gateway.another()


@pytest.fixture
def opened() -> list[Store]:
    return []


@pytest.fixture
def store(gateway: MemoryStore, grpc: MemoryStore, opened: list[Store]) -> Iterator[FallbackStore]:
    def open_grpc() -> Store:
        opened.append(grpc)
        return grpc

    with contextlib.closing(FallbackStore(gateway, open_grpc)) as store:
        yield store


class TestFallback:
    def test_while_the_gateway_serves_grpc_is_not_opened(
        self, store: FallbackStore, opened: list[Store]
    ) -> None:
        entry = store.create("/a", b"1", ttl=10)
        entry = store.replace("/a", b"2", ttl=10, expected=entry.revision)
        entry = store.refresh(entry, ttl=10)
        assert store.get("/a") is not None
        assert len(store.with_ttl(store.list("/").entries)) == 1
        assert store.delete("/a", expected=entry.revision)
        assert opened == []

    def test_the_call_that_finds_it_off_is_made_again_and_the_gateway_not_asked_any_more(
        self, store: FallbackStore, gateway: MemoryStore, grpc: MemoryStore, opened: list[Store]
    ) -> None:
        gateway.fail("create", OFF)
        entry = store.create("/a", b"1", ttl=None)
        assert store.get("/a") == entry
        assert (gateway.calls, grpc.calls, opened) == (["create"], ["create", "get"], [grpc])

    def test_other_errors_are_passed_on(
        self, store: FallbackStore, gateway: MemoryStore, opened: list[Store]
    ) -> None:
        gateway.fail("get", RegistryUnreachable("nobody answers"))
        with pytest.raises(RegistryUnreachable, match="nobody answers"):
            store.get("/a")
        assert opened == []

    def test_many_threads_switch_once(
        self, store: FallbackStore, gateway: MemoryStore, opened: list[Store]
    ) -> None:
        gateway.fail("get", OFF, times=8)
        threads = [threading.Thread(target=store.get, args=("/a",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1

    def test_a_watch_is_opened_by_grpc(self, store: FallbackStore, gateway: MemoryStore) -> None:
        gateway.fail("watch", OFF)
        with store.watch("/", after=1) as watch:
            entry = store.create("/a", b"1", ttl=None)
            assert next(watch) == Put(entry)

    def test_a_running_watch_goes_on_after_the_last_event(
        self, store: FallbackStore, gateway: MemoryStore
    ) -> None:
        a = store.create("/a", b"1", ttl=None)
        with store.watch("/", after=a.revision - 1) as watch:
            assert next(watch) == Put(a)
            gateway.fail("get", OFF)
            store.get("/a")  # the store switches, and the watch with it
            b = store.create("/b", b"2", ttl=None)
            assert next(watch) == Put(b)
            watch.close()
            assert list(watch) == []

    def test_a_watch_closed_before_the_switch_stays_closed(
        self, store: FallbackStore, gateway: MemoryStore, grpc: MemoryStore
    ) -> None:
        watch = store.watch("/", after=1)
        watch.close()
        gateway.fail("get", OFF)
        store.get("/a")
        assert list(watch) == []
        assert "watch" not in grpc.calls

    def test_without_the_libraries_the_gateways_words_stand(
        self, monkeypatch: pytest.MonkeyPatch, gateway: MemoryStore
    ) -> None:
        monkeypatch.setitem(sys.modules, "flanctl.registry.stores.etcd_grpc", None)
        store = FallbackStore(gateway, lambda: opening._open_grpc((), Connection(("http://a",))))
        gateway.fail("get", GatewayOff("cannot get /a: the gateway is off"))
        with pytest.raises(GatewayOff, match="the gateway is off") as caught:
            store.get("/a")
        assert "gRPC cannot be loaded" in caught.value.details[0]
        store.close()

    def test_closed_it_does_not_switch(
        self, store: FallbackStore, gateway: MemoryStore, opened: list[Store]
    ) -> None:
        store.close()
        store.close()
        gateway.fail("get", OFF)
        with pytest.raises(GatewayOff):
            store.get("/a")
        assert opened == []

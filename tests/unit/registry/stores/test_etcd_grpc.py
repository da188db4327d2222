"""EtcdGrpcStore against a scripted gRPC server: lost answers, refusals, hangs, and endpoints that are no etcd."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import pytest

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import etcd_grpc, etcd_v3
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
from flanctl.registry.stores.store import Changed, Compacted, Delete, KeyExists, Progress, Put
from tests.support.deadline import until
from tests.unit.registry.stores.pki import make_pki, needs_openssl, server_context
from tests.unit.registry.stores.scripted import Scripted, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

door: Any = etcd_grpc
grpc, pb, kv_pb2 = door.grpc, door.pb, door.kv_pb2
Code = grpc.StatusCode

KEY = "/a/b"
MINE = b"mine"


class Etcd:
    """A gRPC server that answers each method with the script's next step, the last one again and again.

    A step is an answer, a (code, words) to fail with, or a function of (request, context) that gives either.
    """

    def __init__(self) -> None:
        self.script: dict[str, list[Any]] = defaultdict(list)
        self.asked: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        pb.add_KVServicer_to_server(self, self._server)
        pb.add_LeaseServicer_to_server(self, self._server)
        pb.add_WatchServicer_to_server(self, self._server)
        pb.add_AuthServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.script["LeaseGrant"] = [lambda request, _: pb.LeaseGrantResponse(ID=request.ID, TTL=request.TTL)]
        self.script["LeaseRevoke"] = [pb.LeaseRevokeResponse()]
        self.script["Authenticate"] = [pb.AuthenticateResponse(token="t1")]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(5)
        self._pool.shutdown()

    def __getattr__(self, method: str) -> Callable[[Any, Any], Any]:
        return lambda request, context: self._answer(method, request, context)

    def Watch(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        self.metadata.append(dict(context.invocation_metadata()))
        first = next(requests)
        yield from self._step("Watch", first, context)

    def _answer(self, method: str, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        return self._step(method, request, context)

    def _step(self, method: str, request: Any, context: Any) -> Any:
        self.asked[method].append(request)
        script = self.script[method]
        step = script.pop(0) if len(script) > 1 else script[0]
        if callable(step):
            step = step(request, context)
        if isinstance(step, tuple):
            context.abort(*step)
        return step


def quiet(context: Any) -> None:
    """Nothing more until the client or the server's end ends it."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(30)


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd() as server:
        yield server


@contextlib.contextmanager
def opened(*endpoints: str, timeout: float = 5.0, **more: Any) -> Iterator[EtcdGrpcStore]:
    with contextlib.closing(EtcdGrpcStore(parse_endpoints(endpoints), timeout=timeout, **more)) as store:
        yield store


def kv(value: bytes = MINE, *, key: bytes = KEY.encode(), revision: int = 7, lease: int = 0) -> Any:
    return kv_pb2.KeyValue(key=key, value=value, mod_revision=revision, lease=lease)


def written(revision: int = 7) -> Any:
    return pb.TxnResponse(header=pb.ResponseHeader(revision=revision), succeeded=True)


def lost(*there: Any) -> Any:
    """The transaction's guard failed, and this is what the key holds."""
    found = pb.RangeResponse(kvs=there)
    return pb.TxnResponse(succeeded=False, responses=[pb.ResponseOp(response_range=found)])


def listed(*kvs: Any, revision: int = 7, more: bool = False) -> Any:
    return pb.RangeResponse(header=pb.ResponseHeader(revision=revision), kvs=kvs, more=more)


LOST_ANSWER = (Code.UNAVAILABLE, "etcdserver: leader changed")


class TestLostAnswers:
    def test_a_create_recognises_its_own_value(self, etcd: Etcd) -> None:
        def own(request: Any, _: Any) -> Any:
            put = request.success[0].request_put
            return lost(kv(put.value, lease=put.lease))

        etcd.script["Txn"] = [LOST_ANSWER, own]
        with opened(etcd.endpoint) as store:
            entry = store.create(KEY, MINE, ttl=60)
        (granted,) = etcd.asked["LeaseGrant"]
        assert (entry.value, entry.revision, entry.lease) == (MINE, 7, str(granted.ID))
        assert not etcd.asked["LeaseRevoke"]

    @pytest.mark.parametrize("other", [kv(MINE, lease=5), kv(b"yours")])
    def test_an_equal_value_under_another_lease_is_not_our_own(self, etcd: Etcd, other: Any) -> None:
        etcd.script["Txn"] = [LOST_ANSWER, lost(other)]
        with opened(etcd.endpoint) as store, pytest.raises(KeyExists) as exists:
            store.create(KEY, MINE, ttl=60)
        assert exists.value.current is not None
        assert exists.value.current.value == other.value
        assert [r.ID for r in etcd.asked["LeaseRevoke"]] == [etcd.asked["LeaseGrant"][0].ID]

    def test_without_a_lost_answer_our_value_there_is_somebody_elses(self, etcd: Etcd) -> None:
        etcd.script["Txn"] = [lost(kv(MINE))]
        with opened(etcd.endpoint) as store, pytest.raises(Changed):
            store.replace(KEY, MINE, ttl=None, expected=3)

    def test_a_grant_that_was_carried_out_already_counts(self, etcd: Etcd) -> None:
        etcd.script["LeaseGrant"] = [
            LOST_ANSWER,
            (Code.FAILED_PRECONDITION, "etcdserver: lease already exists"),
        ]
        etcd.script["Txn"] = [written()]
        with opened(etcd.endpoint) as store:
            store.create(KEY, MINE, ttl=60)
        first, second = etcd.asked["LeaseGrant"]
        assert first.ID == second.ID

    def test_a_delete_that_was_carried_out_already_counts(self, etcd: Etcd) -> None:
        etcd.script["Txn"] = [LOST_ANSWER, lost()]
        with opened(etcd.endpoint) as store:
            assert store.delete(KEY, expected=7)

    def test_a_write_nobody_answered_keeps_its_lease(self, etcd: Etcd) -> None:
        """The key may hang on it."""
        etcd.script["Txn"] = [LOST_ANSWER]
        with (
            opened(etcd.endpoint, timeout=0.5) as store,
            pytest.raises(RegistryUnreachable, match=r"in 0\.5s"),
        ):
            store.create(KEY, MINE, ttl=60)
        assert not etcd.asked["LeaseRevoke"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "words", "kind"),
        [
            (Code.PERMISSION_DENIED, "etcdserver: permission denied", NotPermitted),
            (Code.INVALID_ARGUMENT, "etcdserver: user name is empty", NotPermitted),
            (Code.INVALID_ARGUMENT, "etcdserver: key is not provided", Invalid),
            (Code.NOT_FOUND, "etcdserver: requested lease not found", Invalid),
            (Code.FAILED_PRECONDITION, "etcdserver: duplicate key given", Invalid),
            (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", Invalid),
            (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", RegistryUnreachable),
            (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max", Invalid),
        ],
    )
    def test_etcds_words_are_kept(self, etcd: Etcd, code: Any, words: str, kind: type[FlanctlError]) -> None:
        etcd.script["Txn"] = [(code, words)]
        with opened(etcd.endpoint) as store, pytest.raises(kind) as refused:
            store.create(KEY, MINE, ttl=60)
        assert words.removeprefix("etcdserver: ") in refused.value.message
        assert len(etcd.asked["Txn"]) == 1, "asking again would change nothing"
        assert len(etcd.asked["LeaseRevoke"]) == 1, "a lease nobody uses goes"

    @pytest.mark.parametrize(
        "code", [Code.UNKNOWN, Code.INTERNAL, Code.UNIMPLEMENTED, Code.DATA_LOSS], ids=str
    )
    def test_what_we_do_not_understand_is_no_answer(self, etcd: Etcd, code: Any) -> None:
        etcd.script["Range"] = [(code, "what is this")]
        with opened(etcd.endpoint) as store, pytest.raises(RegistryUnreachable) as error:
            store.list("/a/")
        assert error.value.details == (f"{etcd.endpoint}   answers, but not as etcd does (what is this)",)


class TestLogin:
    def test_a_token_that_ended_costs_one_login(self, etcd: Etcd) -> None:
        etcd.script["Authenticate"] = [
            pb.AuthenticateResponse(token="t1"), pb.AuthenticateResponse(token="t2")
        ]  # fmt: skip
        etcd.script["Range"] = [(Code.UNAUTHENTICATED, "etcdserver: invalid auth token"), listed()]
        with opened(etcd.endpoint, user="root", password="s3cret") as store:
            store.list("/a/")
        assert [m.get("token") for m in etcd.metadata] == [None, "t1", None, "t2"]
        assert "s3cret" not in repr(store) + store.describe()

    def test_a_token_refused_twice_is_an_error_without_the_password(self, etcd: Etcd) -> None:
        etcd.script["Range"] = [(Code.UNAUTHENTICATED, "etcdserver: invalid auth token")]
        with (
            opened(etcd.endpoint, user="root", password="s3cret") as store,
            pytest.raises(NotPermitted) as refused,
        ):
            store.list("/a/")
        assert "s3cret" not in f"{refused.value!r} {refused.value.details} {refused.value.hint}"
        assert len(etcd.asked["Range"]) == 2

    def test_an_etcd_without_logins_is_asked_without_token(self, etcd: Etcd) -> None:
        etcd.script["Authenticate"] = [
            (Code.FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
        ]
        etcd.script["Range"] = [listed()]
        with opened(etcd.endpoint, user="root", password="x") as store:
            store.list("/a/")
            store.list("/a/")
        assert len(etcd.asked["Authenticate"]) == 1


@pytest.fixture
def nobody() -> str:
    """An endpoint that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def deaf() -> Iterator[str]:
    """An endpoint that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class TestEndpoints:
    def test_refused_by_all_is_said_at_once_and_for_each(self, nobody: str) -> None:
        other = "http://127.0.0.1:9"
        started = time.monotonic()
        with opened(nobody, other) as store, pytest.raises(RegistryUnreachable) as error:
            store.list("/a/")
        assert time.monotonic() - started < 2
        assert error.value.message == "cannot list /a/: none of 2 endpoints answered"
        assert [line.split(maxsplit=1)[1] for line in error.value.details] == ["connection refused"] * 2
        assert [line.split()[0] for line in error.value.details] == [nobody, other]

    def test_a_silent_endpoint_costs_its_share_once(self, etcd: Etcd, deaf: str) -> None:
        etcd.script["Range"] = [listed()]
        with opened(deaf, etcd.endpoint, timeout=1.0) as store:
            assert store.list("/a/").revision == 7
            started = time.monotonic()
            store.list("/a/")
            assert time.monotonic() - started < 0.4
            assert store.describe() == f"etcd v3 over gRPC at {etcd.endpoint}"

    def test_an_endpoint_that_stays_silent_is_waited_for(self, deaf: str) -> None:
        """Not given up at the first lost packet: the whole time-out is its."""
        started = time.monotonic()
        with opened(deaf, timeout=1.5) as store, pytest.raises(RegistryUnreachable) as error:
            store.list("/a/")
        assert 1.4 < time.monotonic() - started < 2.5
        assert error.value.message == "cannot list /a/: the only endpoint did not answer in 1.5s"
        assert "no answer" in error.value.details[0]
        assert "0.0s" not in error.value.details[0]

    def test_a_server_that_is_no_etcd_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def hello() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        with server.accept()[0] as client:
                            client.recv(1000)
                            client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

            thread = threading.Thread(target=hello)
            thread.start()
            with (
                opened(f"http://127.0.0.1:{server.getsockname()[1]}") as store,
                pytest.raises(RegistryUnreachable) as error,
            ):
                store.list("/a/")
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
        assert "answers, but is not etcd" in error.value.details[0]

    @needs_openssl
    def test_plain_and_tls_mixed_up_are_said(self, etcd: Etcd, tmp_path: Path) -> None:
        pki = make_pki(tmp_path)
        with Scripted(lambda _: ok(), tls=server_context(pki)) as server:
            with opened(f"127.0.0.1:{server.port}") as store, pytest.raises(RegistryUnreachable) as error:
                store.list("/a/")
            assert f"speaks TLS: write https://127.0.0.1:{server.port}" in error.value.details[0]
        endpoint = f"https://127.0.0.1:{etcd.port}"
        with (
            opened(endpoint, cacert=str(pki / "ca.pem")) as store,
            pytest.raises(RegistryUnreachable) as error,
        ):
            store.list("/a/")
        assert "TLS" in error.value.details[0]

    @needs_openssl
    def test_a_missing_client_certificate_is_not_permitted(self, tmp_path: Path) -> None:
        """Waiting would not help, so it is not an outage."""
        pki = make_pki(tmp_path)
        context = server_context(pki, ask_client=True)
        context.set_alpn_protocols(["h2"])
        with (
            Scripted(lambda _: ok(), tls=context) as server,
            opened(f"https://127.0.0.1:{server.port}", cacert=str(pki / "ca.pem")) as store,
            pytest.raises(NotPermitted, match="cannot list /a/: etcd refused our client certificate"),
        ):
            store.list("/a/")

    def test_files_that_are_no_good_are_named(self, tmp_path: Path) -> None:
        junk = tmp_path / "ca.pem"
        junk.write_text("junk")
        endpoint = parse_endpoints(["https://127.0.0.1:1"])
        with pytest.raises(Invalid, match=r"ca\.pem"):
            EtcdGrpcStore(endpoint, cacert=str(junk))
        with pytest.raises(NotFound, match=r"no\.pem"):
            EtcdGrpcStore(endpoint, cacert=str(tmp_path / "no.pem"))

    def test_an_answer_of_100_mb_is_not_taken(self, etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bounded as over HTTP; the bound is lowered here so that no test moves so much."""
        options = [
            (name, 100_000 if name == "grpc.max_receive_message_length" else value)
            for name, value in door._CHANNEL_OPTIONS
        ]
        monkeypatch.setattr(etcd_grpc, "_CHANNEL_OPTIONS", options)
        assert dict(door._CHANNEL_OPTIONS)["grpc.max_receive_message_length"] == 100_000
        etcd.script["Range"] = [listed(kv(b"x" * 200_000))]
        with opened(etcd.endpoint) as store, pytest.raises(RegistryUnreachable) as error:
            store.list("/a/")
        assert error.value.details == (f"{etcd.endpoint}   answers with more than 64 MB",)

    def test_a_closed_store_says_so(self, etcd: Etcd) -> None:
        with opened(etcd.endpoint) as store:
            pass
        with pytest.raises(RegistryUnreachable, match="closed"):
            store.list("/a/")
        assert list(store.watch("/a/", after=1)) == []


class TestList:
    def test_pages_are_of_one_revision(self, etcd: Etcd) -> None:
        pages = [listed(kv(key=b"/a/1"), more=True), listed(kv(key=b"/a/2"), revision=9)]
        etcd.script["Range"] = list(pages)
        with opened(etcd.endpoint) as store:
            snapshot = store.list("/a/")
        assert ([entry.key for entry in snapshot.entries], snapshot.revision) == (["/a/1", "/a/2"], 7)
        first, second = etcd.asked["Range"]
        assert (first.revision, second.revision, second.key) == (0, 7, b"/a/1\0")

    def test_a_compaction_between_pages_starts_anew(self, etcd: Etcd) -> None:
        etcd.script["Range"] = [
            listed(kv(key=b"/a/1"), kv(key=b"/a/\xff"), more=True),
            (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted"),
            listed(kv(key=b"/a/1"), kv(key=b"/a/\xfe"), revision=9),
        ]
        with opened(etcd.endpoint) as store:
            snapshot = store.list("/a/")
        assert len(snapshot.entries) == 1
        assert [bad.key for bad in snapshot.unreadable] == [b"/a/\xfe"]
        assert snapshot.revision == 9

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            (b"/a/", (b"/a/", b"/a0")),
            (b"a\xff", (b"a\xff", b"b")),
            (b"\xff\xff", (b"\xff\xff", b"\0")),
            (b"", (b"\0", b"\0")),
        ],
    )
    def test_the_end_of_a_prefix(self, prefix: bytes, expected: tuple[bytes, bytes]) -> None:
        assert etcd_v3.prefix_range(prefix) == expected


def event(revision: int, *, deleted: bool = False, key: bytes = KEY.encode()) -> Any:
    kind = kv_pb2.Event.DELETE if deleted else kv_pb2.Event.PUT
    return kv_pb2.Event(type=kind, kv=kv(b"%d" % revision, key=key, revision=revision))


def told(*events: Any, **more: Any) -> Any:
    revision = max((e.kv.mod_revision for e in events), default=7)
    return pb.WatchResponse(header=pb.ResponseHeader(revision=revision), events=events, **more)


CREATED = told(created=True)


def iter_then_quiet(context: Any) -> Iterator[Any]:
    yield CREATED
    quiet(context)


class TestWatch:
    def test_a_broken_stream_goes_on_where_it_was(self, etcd: Etcd) -> None:
        def breaks(_: Any, context: Any) -> Any:
            yield CREATED
            yield told(event(8), event(8, key=b"/a/c"), event(9, deleted=True), event(10, key=b"/a/\xff"))
            context.abort(Code.UNAVAILABLE, "etcdserver: no leader")

        etcd.script["Watch"] = [
            breaks,
            [
                pb.WatchResponse(header=pb.ResponseHeader(revision=11), created=True),
                told(event(9, deleted=True), event(10, key=b"/a/\xff")),
                told(event(11)),
            ],
        ]
        with opened(etcd.endpoint) as store, store.watch("/a/", after=7) as watch:
            events = [next(watch) for _ in range(4)]
        assert [e.entry.revision for e in events if isinstance(e, Put)] == [8, 8, 11]
        assert events[2] == Delete(KEY, 9)
        assert [r.create_request.start_revision for r in etcd.asked["Watch"]][:2] == [7, 10]
        assert all(m.get("hasleader") == "true" for m in etcd.metadata)

    def test_what_is_forgotten_ends_it(self, etcd: Etcd) -> None:
        etcd.script["Watch"] = [[CREATED, told(canceled=True, compact_revision=50)]]
        with opened(etcd.endpoint) as store:
            assert list(store.watch("/a/", after=7)) == [Compacted(50)]

    def test_only_what_etcd_says_unasked_moves_the_revision(self, etcd: Etcd) -> None:
        """The answer to a progress request may overtake events in old versions."""
        asked = pb.WatchResponse(header=pb.ResponseHeader(revision=90), watch_id=-1)
        unasked = pb.WatchResponse(header=pb.ResponseHeader(revision=80))
        etcd.script["Watch"] = [[CREATED, asked, unasked]]
        with opened(etcd.endpoint) as store, store.watch("/a/", after=7) as watch:
            assert [next(watch), next(watch)] == [Progress(7), Progress(80)]

    def test_one_that_is_accepted_and_ended_again_and_again_is_none(self, etcd: Etcd) -> None:
        etcd.script["Watch"] = [[CREATED]]
        with opened(etcd.endpoint, timeout=1.0) as store, store.watch("/a/", after=7) as watch:
            with pytest.raises(RegistryUnreachable, match="cannot watch /a/") as error:
                next(watch)
        assert error.value.details == (f"{etcd.endpoint}   ended the watch",)
        assert len(etcd.asked["Watch"]) < 8

    def test_a_store_that_has_gone_back_makes_the_reader_list_again(self, etcd: Etcd) -> None:
        etcd.script["Watch"] = [lambda _, context: iter_then_quiet(context)]
        etcd.script["Range"] = [listed(revision=7)]
        with opened(etcd.endpoint) as store:
            assert list(store.watch("/a/", after=900)) == [Compacted(7)]

    def test_a_watch_we_may_not_have_is_an_error(self, etcd: Etcd) -> None:
        words = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
        etcd.script["Watch"] = [[told(created=True, canceled=True, cancel_reason=words)]]
        with (
            opened(etcd.endpoint) as store,
            store.watch("/a/", after=7) as watch,
            pytest.raises(NotPermitted, match="permission denied"),
        ):
            next(watch)

    def test_a_token_that_ended_costs_one_login(self, etcd: Etcd) -> None:
        ended = told(created=True, canceled=True, cancel_reason="etcdserver: invalid auth token")
        etcd.script["Watch"] = [[ended], [CREATED, told(event(8))]]
        with opened(etcd.endpoint, user="root", password="x") as store, store.watch("/a/", after=7) as watch:
            assert isinstance(next(watch), Put)
        assert len(etcd.asked["Authenticate"]) == 2

    def test_a_watch_that_is_never_made_is_no_answer(self, etcd: Etcd) -> None:
        def silent(_: Any, context: Any) -> Any:
            quiet(context)
            yield from ()

        etcd.script["Watch"] = [silent]
        with (
            opened(etcd.endpoint, timeout=0.6) as store,
            store.watch("/a/", after=7) as watch,
            pytest.raises(RegistryUnreachable) as error,
        ):
            next(watch)
        assert error.value.message == "cannot watch /a/: the only endpoint did not answer in 0.6s"
        assert error.value.details == (f"{etcd.endpoint}   no answer in 0.6s",)

    def test_iterating_on_after_that_tries_again(self, etcd: Etcd, nobody: str) -> None:
        with opened(nobody, timeout=0.3) as store, store.watch("/a/", after=7) as watch:
            for _ in range(2):
                with pytest.raises(RegistryUnreachable, match=r"did not answer in \d"):
                    next(watch)

    @pytest.mark.parametrize("state", ["waiting", "no endpoint", "never created"])
    def test_closing_ends_it_soon(self, etcd: Etcd, nobody: str, state: str) -> None:
        ready = threading.Event()

        def wait(_: Any, context: Any) -> Any:
            if state == "waiting":
                yield CREATED
            ready.set()
            quiet(context)

        etcd.script["Watch"] = [wait]
        with opened(nobody if state == "no endpoint" else etcd.endpoint, timeout=30) as store:
            watch = store.watch("/a/", after=7)
            thread = threading.Thread(target=lambda: list(watch))
            thread.start()
            if state == "no endpoint":
                until(lambda: watch._refusals)
            else:
                assert ready.wait(10)
            started = time.monotonic()
            watch.close()
            thread.join(5)
            assert time.monotonic() - started < 0.4
            watch.close()


def test_importing_it_is_silent() -> None:
    """etcd3's generated modules warn under protobuf 3.20, and gRPC's core likes to log."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import flanctl.registry.stores.etcd_grpc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

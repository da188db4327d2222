"""What only the gateway store must do, against real etcds over a wire that loses answers, and against liars.

What every store must do is in tests/contract/test_store.py.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import etcd_gateway, etcd_v3, http_watch
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore, GatewayOff
from flanctl.registry.stores.store import Changed, Compacted, Delete, Entry, KeyExists, Progress, Put
from tests.support.etcd import Cluster
from tests.support.stores import VERSIONS
from tests.unit.registry.stores.pki import make_pki, needs_openssl, server_context
from tests.unit.registry.stores.scripted import Request, Scripted, closed_port, etcd, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEADER = {"header": {"cluster_id": "1", "member_id": "1", "revision": "7", "raft_term": "2"}}

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=VERSIONS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(request.param, folder=tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def prefix() -> str:
    return f"/gateway/{next(_numbers)}/"


def opened(*endpoints: str, timeout: float = 5.0, **login: str) -> contextlib.closing[EtcdGatewayStore]:
    return contextlib.closing(EtcdGatewayStore(parse_endpoints(endpoints), timeout=timeout, **login))


def local(server: Scripted) -> str:
    return f"127.0.0.1:{server.port}"


def forward(cluster: Cluster, request: Request) -> bytes:
    """Have the real etcd do it."""
    link = http.client.HTTPConnection(cluster.endpoints[0].removeprefix("http://"), timeout=5)
    try:
        link.request(request.method, request.path, request.body)
        answer = link.getresponse()
        return ok(answer.read(), status=f"{answer.status} {answer.reason}")
    finally:
        link.close()


@contextlib.contextmanager
def losing(cluster: Cluster, lost: Callable[[Request], bool]) -> Iterator[EtcdGatewayStore]:
    """A store whose requests are carried out, and whose answers are lost where `lost` says so."""

    def answer(request: Request) -> bytes | None:
        said = forward(cluster, request)
        return None if lost(request) else said

    with Scripted(answer) as wire, opened(local(wire)) as store:
        yield store


def once(path: str) -> Callable[[Request], bool]:
    left = [1]

    def lost(request: Request) -> bool:
        if request.path.endswith(path) and left:
            left.pop()
            return True
        return False

    return lost


def leases(cluster: Cluster) -> int:
    return int(cluster.etcdctl("lease", "list").split()[1])


# lost answers


@pytest.mark.parametrize("lost", ["lease/grant", "kv/txn"])
@pytest.mark.parametrize("ttl", [60.0, None])
def test_create_knows_its_own_value_when_an_answer_was_lost(
    cluster: Cluster, prefix: str, lost: str, ttl: float | None
) -> None:
    before = leases(cluster)
    with losing(cluster, once(lost)) as store:
        entry = store.create(f"{prefix}a", b"v", ttl=ttl)
        assert store.list(prefix).entries == (Entry(entry.key, b"v", entry.revision, entry.lease),)
    assert (entry.lease is None) == (ttl is None)
    assert leases(cluster) - before == (ttl is not None)


def test_replace_and_delete_know_their_own_deed_when_an_answer_was_lost(
    cluster: Cluster, prefix: str
) -> None:
    with losing(cluster, lambda _: False) as store:
        first = store.create(f"{prefix}a", b"v", ttl=None)
    with losing(cluster, once("kv/txn")) as store:
        second = store.replace(first.key, b"w", ttl=60, expected=first.revision)
        assert store.list(prefix).entries[0].revision == second.revision
    with losing(cluster, once("kv/txn")) as store:
        assert store.delete(first.key, expected=second.revision)
    assert cluster.etcdctl("get", "--prefix", prefix) == ""


def test_an_equal_value_of_somebody_else_is_not_taken_for_ours(cluster: Cluster, prefix: str) -> None:
    with losing(cluster, lambda _: False) as other:
        theirs = other.create(f"{prefix}a", b"same", ttl=60)
    with losing(cluster, once("kv/txn")) as store:
        before = leases(cluster)
        with pytest.raises(KeyExists) as caught:
            store.create(f"{prefix}a", b"same", ttl=60)
        assert caught.value.current == Entry(theirs.key, b"same", theirs.revision, theirs.lease)
        with pytest.raises(Changed):
            store.replace(f"{prefix}a", b"same", ttl=60, expected=theirs.revision - 1)
        assert leases(cluster) == before  # ours were given back


def test_a_lease_that_may_be_in_use_is_left_alone(cluster: Cluster, prefix: str) -> None:
    with losing(cluster, lambda request: request.path.endswith("kv/txn")) as store:
        with pytest.raises(RegistryUnreachable):
            store.create(f"{prefix}a", b"v", ttl=60)
    assert cluster.etcdctl("get", "--print-value-only", f"{prefix}a") == "v\n"


@pytest.mark.parametrize("nth", range(6))
def test_refresh_with_any_answer_lost_leaves_the_key_with_its_full_time(
    cluster: Cluster, prefix: str, nth: int
) -> None:
    with losing(cluster, lambda _: False) as store:
        entry = store.create(f"{prefix}a", b"v", ttl=100)
    asked = itertools.count()
    with losing(cluster, lambda _: next(asked) == nth) as store:
        ttl = 100 if nth < 3 else 200
        entry = store.refresh(entry, ttl=ttl)
        found = store.get(entry.key)
    assert found is not None
    assert (found.value, found.revision, found.lease) == (b"v", entry.revision, entry.lease)
    assert found.ttl is not None
    assert ttl - 5 < found.ttl <= ttl


# reading


def test_a_long_list_comes_in_pages_of_one_revision(
    cluster: Cluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_v3, "PAGE", 3)
    for i in range(8):
        cluster.etcdctl("put", f"{prefix}{i}", "old")
    pages = itertools.count()

    def between(request: Request) -> bool:
        if request.path.endswith("range") and next(pages) == 1:
            cluster.etcdctl("put", f"{prefix}7", "new")
            cluster.etcdctl("put", f"{prefix}8", "new")
        return False

    with losing(cluster, between) as store:
        snapshot = store.list(prefix)
        assert [entry.key[-1] for entry in snapshot.entries] == list("01234567")
        assert {entry.value for entry in snapshot.entries} == {b"old"}
        with store.watch(prefix, after=snapshot.revision):
            pass
        assert len(store.list(prefix).entries) == 9


def test_a_list_whose_revision_is_compacted_between_pages_begins_again(
    cluster: Cluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_v3, "PAGE", 3)
    for i in range(5):
        cluster.etcdctl("put", f"{prefix}{i}", "old")
    pages = itertools.count()

    def answer(request: Request) -> bytes:
        if request.path.endswith("range") and next(pages) == 1:
            said = json.loads(cluster.etcdctl("put", f"{prefix}0", "new", "--write-out=json"))
            cluster.etcdctl("compact", str(said["header"]["revision"]))
        return forward(cluster, request)

    with Scripted(answer) as wire, opened(local(wire)) as store:
        assert [entry.value for entry in store.list(prefix).entries] == [b"new"] + [b"old"] * 4


def test_ttls_of_many_leases_are_all_found_and_of_an_ended_one_is_zero(cluster: Cluster, prefix: str) -> None:
    with opened(*cluster.endpoints) as store:
        entries = [store.create(f"{prefix}{i}", b"", ttl=100 + i) for i in range(60)]
        forever = store.create(f"{prefix}x", b"", ttl=None)
        cluster.etcdctl("lease", "revoke", f"{int(entries[7].lease or 0):x}")
        found = store.with_ttl([*entries, forever])
    ttls = [entry.ttl for entry in found]
    assert ttls[-1] is None
    assert ttls[7] == 0
    for i, ttl in enumerate(ttls[:-1]):
        assert i == 7 or (ttl is not None and 90 + i < ttl <= 100 + i)


# login


@pytest.fixture(params=VERSIONS)
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(request.param, folder=tmp_path / "etcd") as cluster:
        for command in (
            "user add root:secret", "user grant-role root root", "user add ro:look", "role add reader",
            "role grant-permission reader --prefix=true read /open/", "user grant-role ro reader", "auth enable",
        ):  # fmt: skip
            cluster.etcdctl(*command.split())
        yield cluster


def test_login_rights_and_a_token_that_ends(guarded: Cluster) -> None:
    with opened(*guarded.endpoints, user="root", password="secret") as root:
        put = root.create("/open/a", b"v", ttl=60)
        root.token = "gone.1"
        assert root.get("/open/a") is not None
        root.token = "gone.2"
        with root.watch("/open/", after=put.revision - 1) as watch:
            event = next(watch)
        assert isinstance(event, Put)
    with opened(*guarded.endpoints, user="ro", password="look") as reader:
        assert len(reader.list("/open/").entries) == 1
        with pytest.raises(
            NotPermitted, match=r'^user "ro" may not create /open/b \(etcd: permission denied'
        ):
            reader.create("/open/b", b"", ttl=None)
        with pytest.raises(NotPermitted, match='user "ro" may not list /secret/'):
            reader.list("/secret/")
        with (
            pytest.raises(NotPermitted, match='user "ro" may not watch /secret/'),
            reader.watch("/secret/", after=1) as w,
        ):
            next(w)
    with (
        opened(*guarded.endpoints, user="ro", password="wrong") as wrong,
        pytest.raises(NotPermitted) as caught,
    ):
        wrong.get("/open/a")
    assert 'login as "ro" was refused' in caught.value.message
    assert "wrong" not in caught.value.message
    with opened(*guarded.endpoints) as nobody:
        with pytest.raises(NotPermitted) as caught:
            nobody.get("/open/a")
        assert caught.value.hint is not None
        with pytest.raises(NotPermitted), nobody.watch("/open/", after=1) as watch:
            next(watch)


def test_a_login_nobody_asked_for_is_no_harm(cluster: Cluster) -> None:
    with opened(*cluster.endpoints, user="root", password="x") as store:
        assert store.get("/nothing") is None


def test_a_server_that_hangs_up_on_an_old_token_gets_a_new_one() -> None:
    def answer(request: Request) -> bytes | None:
        if request.path.endswith("authenticate"):
            return etcd({**HEADER, "token": "new"})
        return etcd(HEADER) if "Authorization: new" in request.head else None

    with Scripted(answer) as server, opened(local(server), user="u", password="p") as store:
        store.token = "old"
        assert store.get("/a") is None


# failover


# watch


def test_closing_from_another_thread_ends_a_watch_at_once_wherever_it_waits(cluster: Cluster) -> None:
    with Scripted(lambda _: (hung.ended.wait(20), None)[1]) as hung:
        for endpoint in (cluster.endpoints[0], local(hung), f"127.0.0.1:{closed_port()}"):
            with opened(endpoint) as store:
                watch = store.watch(
                    "/", after=json.loads(cluster.etcdctl("get", "/", "-w=json"))["header"]["revision"]
                )
                timer = threading.Timer(0.2, watch.close)
                timer.start()
                begin = time.monotonic()
                assert [event for event in watch if not isinstance(event, Progress)] == []
                assert time.monotonic() - begin < 0.6
                timer.join()
                watch.close()


def test_a_watch_nobody_serves_raises_after_the_timeout_and_may_be_asked_again() -> None:
    with opened(f"127.0.0.1:{closed_port()}", timeout=0.4) as store, store.watch("/", after=1) as watch:
        for _ in range(2):
            begin = time.monotonic()
            with pytest.raises(RegistryUnreachable) as caught:
                next(watch)
            assert 0.3 < time.monotonic() - begin < 1
            assert "connection refused" in caught.value.details[0]
            assert caught.value.message.startswith("cannot watch /: the only endpoint did not answer in 0.4s")


def chunk(*messages: object) -> bytes:
    body = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    return b"%x\r\n%s\r\n" % (len(body), body)


def chunked(*messages: object) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(*messages)


def result(**fields: object) -> dict[str, object]:
    return {"result": {**HEADER, **fields}}


def put(key: str, revision: int) -> dict[str, object]:
    return {"kv": {"key": etcd_gateway._b64(key.encode()), "mod_revision": str(revision)}}


def test_a_watch_resumes_after_what_it_has_seen_and_hands_nothing_out_twice() -> None:
    def answer(request: Request) -> bytes:
        start = int(request.json()["create_request"]["start_revision"])
        if start == 5:  # the revision seen last, then the stream breaks
            return chunked(result(created=True), result(events=[put("/a", 6), put("/b", 6)])) + b"0\r\n\r\n"
        assert start == 6
        return chunked(
            result(created=True),
            result(events=[put("/b", 6), put("/c", 8), {"type": "DELETE", **put("/a", 9)}]),
        )

    with Scripted(answer) as server, opened(local(server)) as store, store.watch("/", after=5) as watch:
        found = list(itertools.islice(watch, 4))
    assert found == [
        Put(Entry("/a", b"", 6)), Put(Entry("/b", b"", 6)), Put(Entry("/c", b"", 8)), Delete("/a", 9),
    ]  # fmt: skip


def test_changes_that_follow_one_another_are_read_together_and_what_is_there_is_never_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    more: queue.SimpleQueue[range] = queue.SimpleQueue()

    def answer(_: Request) -> Iterator[bytes]:
        yield chunked(result(created=True))
        while revisions := more.get():
            # A value each, so that much is under way at once.
            value = etcd_gateway._b64(b"x" * 30_000)
            events = ({"kv": {**put("/a", revision)["kv"], "value": value}} for revision in revisions)  # type: ignore[dict-item]
            yield b"".join(chunk(result(events=[event])) for event in events)

    def pause(seconds: float, _: int) -> None:
        pauses.append(seconds)
        more.put(range(56, 60))  # what comes meanwhile

    monkeypatch.setattr(http_watch, "GATHER", 60.0)
    monkeypatch.setattr(http_watch, "_MOMENT", 5.0)  # however slowly this machine sends what is there
    monkeypatch.setattr(http_watch.http, "sleep", pause)
    with Scripted(answer) as server, opened(local(server)) as store, store.watch("/", after=5) as watch:
        more.put(range(6, 56))
        found = list(itertools.islice(watch, 50))
        assert pauses == []
        monkeypatch.setattr(http_watch, "_MOMENT", 0.001)
        found += itertools.islice(watch, 4)
        assert 0 < pauses[0] <= 60
        assert len(pauses) == 1
        more.put(range(0))
    assert [event.entry.revision for event in found if isinstance(event, Put)] == list(range(6, 60))


@pytest.mark.parametrize(
    "message",
    [
        {"kvs": [{"key": "!!!"}]},
        {"kvs": [{"key": "L2E=", "value": 7}]},
        {"kvs": [{"key": "L2E=", "mod_revision": "many"}]},
        {"kvs": "none"},
        {"kvs": [7]},
        {"header": {}},
    ],
)
def test_what_no_etcd_sends_is_no_answer(message: dict[str, Any]) -> None:
    """Nothing is wrong with what was asked, so whoever waits for a registry goes on waiting."""
    with (
        Scripted(lambda _: etcd({**HEADER, **message})) as server,
        opened(local(server)) as store,
        pytest.raises(RegistryUnreachable, match="cannot list /") as caught,
    ):
        store.list("/")
    assert "etcd" in caught.value.details[0]


def test_a_watch_leaves_a_member_that_sends_garbage_and_misses_nothing() -> None:
    """The changes of one revision are handed out together or not at all."""
    garbage = result(events=[put("/a", 6), {"kv": {"key": "!!!", "mod_revision": "6"}}])
    with (
        Scripted(lambda _: chunked(result(created=True), garbage)) as one,
        Scripted(lambda _: chunked(result(created=True), result(events=[put("/a", 6), put("/b", 6)]))) as two,
        opened(local(one), local(two)) as store,
        store.watch("/", after=5) as watch,
    ):
        assert list(itertools.islice(watch, 2)) == [Put(Entry("/a", b"", 6)), Put(Entry("/b", b"", 6))]


def test_a_watch_too_far_behind_says_so_and_ends() -> None:
    lost = chunked(result(created=True), result(canceled=True, compact_revision="9"))
    with Scripted(lambda _: lost) as server, opened(local(server)) as store:
        assert list(store.watch("/", after=1)) == [Compacted(9)]


def test_a_watch_that_is_accepted_and_ended_again_and_again_is_none() -> None:
    """It is opened again ever more slowly, and after the time-out said to be none."""
    with Scripted(lambda _: chunked(result(created=True)) + b"0\r\n\r\n") as server:
        with opened(local(server), timeout=1.0) as store, store.watch("/", after=5) as watch:
            with pytest.raises(RegistryUnreachable, match="cannot watch /") as caught:
                next(watch)
        assert "ended the watch" in caught.value.details[0]
        assert len(server.requests) < 8


def test_a_watch_on_a_store_that_has_gone_back_makes_the_reader_list_again() -> None:
    """All data lost and etcd empty again: revisions start anew, and a watch from an old one would say nothing."""

    def answer(request: Request) -> bytes:
        return chunked(result(created=True)) if "watch" in request.path else etcd(HEADER)

    with Scripted(answer) as server, opened(local(server)) as store:
        assert list(store.watch("/", after=900)) == [Compacted(7)]


def test_a_watch_on_a_member_that_only_lags_goes_on() -> None:
    ahead = {"header": {**HEADER["header"], "revision": "900"}}

    def answer(request: Request) -> bytes:
        if "watch" in request.path:
            return chunked(result(created=True), result(events=[put("/a", 901)]))
        return etcd(ahead)

    with Scripted(answer) as server, opened(local(server)) as store, store.watch("/", after=900) as watch:
        assert next(watch) == Put(Entry("/a", b"", 901))


@pytest.mark.parametrize("key", ["L2E=", "L2I="])
def test_a_list_without_end_is_no_answer(key: str) -> None:
    """More is always to come, and what comes is what was there, or what was asked for is passed over."""
    page = {
        **HEADER,
        "kvs": [{"key": "L2I=", "mod_revision": "3"}, {"key": key, "mod_revision": "3"}],
        "more": True,
    }
    with Scripted(lambda _: etcd(page)) as server, opened(local(server)) as store:
        with pytest.raises(RegistryUnreachable, match="cannot list /: the only endpoint") as caught:
            store.list("/")
    assert "which was not asked for" in caught.value.details[0]


def test_a_list_that_is_said_to_go_on_and_holds_nothing_is_no_answer() -> None:
    with Scripted(lambda _: etcd({**HEADER, "more": True})) as server, opened(local(server)) as store:
        with pytest.raises(RegistryUnreachable, match="cannot list /: the only endpoint") as caught:
            store.list("/")
    assert "etcd sent a list without end" in caught.value.details[0]


def test_who_sends_what_was_not_asked_for_is_left_for_the_next() -> None:
    strange = etcd({**HEADER, "kvs": [{"key": etcd_gateway._b64(b"/b"), "mod_revision": "3"}]})
    right = etcd({**HEADER, "kvs": [{"key": etcd_gateway._b64(b"/a/1"), "mod_revision": "3"}]})
    with Scripted(lambda _: strange) as one, Scripted(lambda _: right) as two:
        with opened(local(one), local(two)) as store:
            assert [entry.key for entry in store.list("/a/").entries] == ["/a/1"]
            assert store.get("/a/1") == Entry("/a/1", b"", 3)


def test_a_watch_ended_for_want_of_a_leader_goes_on_at_the_next_member() -> None:
    no_leader = result(
        canceled=True, cancel_reason="rpc error: code = Unavailable desc = etcdserver: no leader"
    )
    error = {"error": {"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader"}}
    for message in (no_leader, error):
        with (
            Scripted(lambda _, message=message: chunked(result(created=True), message)) as one,  # type: ignore[misc]
            Scripted(lambda _: chunked(result(created=True), result(events=[put("/a", 6)]))) as two,
            opened(local(one), local(two)) as store,
            store.watch("/", after=5) as watch,
        ):
            assert next(watch) == Put(Entry("/a", b"", 6))


def test_a_member_that_hangs_is_left_when_it_does_not_answer_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_watch, "PROBE_EVERY", 0.2)
    monkeypatch.setattr(etcd_gateway, "PROBE_WAIT", 0.2)

    def hang(request: Request) -> bytes | None:
        if "health" in request.path:
            one.ended.wait(20)
            return None
        return chunked(result(created=True))

    def serve(request: Request) -> bytes:
        if "health" in request.path:
            return ok(b"full", status="503 Service Unavailable")  # it answers: a full disk watches well
        return chunked(result(created=True), result(events=[put("/a", 6)]))

    with Scripted(hang) as one, Scripted(serve) as two:
        with opened(local(one), local(two)) as store, store.watch("/", after=5) as watch:
            assert next(watch) == Put(Entry("/a", b"", 6))
            assert next(watch) == Progress(6)


# servers that are something else


@needs_openssl
def test_a_gateway_whose_certificate_is_for_servers_only_is_said_and_a_passing_trouble_is_not_taken_for_it(
    pki: Path,
) -> None:
    """The words are those of 3.4 and 3.7 with --client-cert-auth and an extendedKeyUsage of serverAuth."""
    troubles: list[str] = []

    def answer(_: Request) -> bytes:
        if troubles:
            return etcd({"code": 14, "message": troubles.pop()}, status="503 Service Unavailable")
        return etcd(HEADER)

    with Scripted(answer, tls=server_context(pki)) as server:
        for words in ("connection closed", "write tcp 127.0.0.1:1->127.0.0.1:2: write: broken pipe"):
            with opened(f"https://{local(server)}", cacert=str(pki / "ca.pem")) as store:
                for deed in (lambda: store.get("/a"), lambda: next(store.watch("/", after=1))):
                    troubles[:] = [words]
                    with pytest.raises(GatewayOff) as caught:
                        deed()
                    assert words in caught.value.details[0]
                troubles[:] = ["etcdserver: leader changed"]
                assert store.get("/a") is None
                troubles[:] = [words]
                assert store.get("/a") is None


@pytest.mark.needs("etcd37")
def test_a_gateway_that_is_off_is_said(tmp_path: Path) -> None:
    with Cluster("3.7", folder=tmp_path, extra=["--enable-grpc-gateway=false"]) as cluster:
        with opened(*cluster.endpoints) as store:
            with pytest.raises(GatewayOff):
                store.get("/a")
            with pytest.raises(GatewayOff), store.watch("/a", after=1) as watch:
                next(watch)


@pytest.mark.parametrize(
    "answer",
    [
        b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00@\x00",
        etcd(
            {
                "error": "etcdserver: CommonName of client sending a request against gateway will be ignored",
                "code": 3,
            },
            status="400 Bad Request",
        ),
    ],
)
def test_servers_that_only_grpc_reaches_are_told_apart(answer: bytes) -> None:
    with Scripted(lambda _: answer, close=True) as server, opened(local(server)) as store:
        with pytest.raises(GatewayOff) as caught:
            store.get("/a")
    assert caught.value.exit_code == 3


def test_etcd_3_3_is_served_by_its_own_path(cluster: Cluster, prefix: str) -> None:
    def answer(request: Request) -> bytes:
        if request.path.startswith("/v3/"):
            return ok(b"404 page not found\n", status="404 Not Found")
        return forward(
            cluster, Request(request.method, request.path.replace("v3beta", "v3"), "", request.body)
        )

    with Scripted(answer) as wire, opened(local(wire)) as store:
        entry = store.create(f"{prefix}a", b"v", ttl=60)
        assert store.list(prefix).entries == (Entry(entry.key, b"v", entry.revision, entry.lease),)
        assert [request.path for request in wire.requests].count("/v3/lease/grant") == 1


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"<html>welcome</html>"),
        ok(b"not found", status="404 Not Found"),
        ok(b'{"hello": "world"}'),
        ok(b"[]"),
        ok(b"[" * 10_000),
        ok(b'{"header":' * 10_000),
        ok(b"", status="302 Found"),
        ok(b"Forbidden", status="403 Forbidden"),
    ],
)
def test_a_web_server_is_not_taken_for_etcd(answer: bytes) -> None:
    with Scripted(lambda _: answer) as server, opened(local(server), timeout=0.3) as store:
        with pytest.raises(RegistryUnreachable) as caught:
            store.get("/a")
        assert "answers HTTP but is not etcd" in caught.value.details[0]
        with pytest.raises(RegistryUnreachable), store.watch("/a", after=1) as watch:
            next(watch)


def test_a_member_with_troubles_is_passed_over_and_asked_again() -> None:
    troubles = iter(["etcdserver: no leader", "etcdserver: request timed out", "etcdserver: leader changed"])

    def answer(_: Request) -> bytes:
        if (words := next(troubles, None)) is not None:
            return etcd({"code": 14, "message": words}, status="503 Service Unavailable")
        return etcd(HEADER)

    with Scripted(answer) as server, opened(local(server)) as store:
        assert store.get("/a") is None
        assert len(server.requests) == 4


def test_etcds_own_words_are_kept() -> None:
    full = etcd({"code": 8, "message": "etcdserver: mvcc: database space exceeded"}, status="429 Too Many")
    with Scripted(lambda _: full) as server, opened(local(server)) as store:
        with pytest.raises(RegistryUnreachable, match=r"cannot create /a: etcd is full \(etcd: mvcc"):
            store.create("/a", b"", ttl=None)
    with (
        Scripted(lambda _: full) as server,
        opened(local(server), user="u", password="p") as store,
        pytest.raises(RegistryUnreachable, match='cannot log in as "u": etcd is full'),
    ):
        store.create("/a", b"", ttl=None)
    large = etcd({"code": 3, "message": "etcdserver: request is too large"}, status="400 Bad Request")
    with Scripted(lambda _: large) as server, opened(local(server)) as store:
        with pytest.raises(Invalid, match=r"cannot create /a \(etcd: request is too large\)"):
            store.create("/a", b"", ttl=None)


_WORDS = (
    "header kvs key value lease mod_revision revision more succeeded responses response_range result error code "
    "message events kv canceled TTL ID"
).split()
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["7", "AA==", "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_json)
def test_any_json_is_an_answer_or_our_error(message: Any) -> None:
    said = message if not isinstance(message, dict) else {**HEADER, **message}

    def answer(request: Request) -> bytes:
        if "watch" in request.path:
            return chunked(said) + b"0\r\n\r\n"
        return etcd(said)

    def watched() -> None:
        """A watch that is accepted, tells nothing and ends is opened again for ever: closing ends it."""
        with store.watch("/", after=1) as watch:
            closing = threading.Timer(0.1, watch.close)
            closing.start()
            try:
                list(itertools.islice(watch, 2))
            finally:
                closing.cancel()
                closing.join()

    with Scripted(answer) as server, opened(local(server), timeout=0.05) as store:
        deeds: list[Callable[[], object]] = [
            lambda: store.get("/a"),
            lambda: store.create("/a", b"", ttl=None),
            lambda: store.delete("/a", expected=3),
            lambda: store.refresh(Entry("/a", b"", 1, "5"), ttl=9),
            watched,
        ]
        for deed in deeds:
            with contextlib.suppress(FlanctlError):
                deed()

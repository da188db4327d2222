"""What only the v2 store must do: lost answers, redirects, its error codes, its watch, and servers that are no etcd."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import http_watch
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_v2 import EtcdV2Missing, EtcdV2Store
from flanctl.registry.stores.store import Changed, Compacted, Delete, Entry, KeyExists, Put
from tests.support.etcd import Cluster
from tests.unit.registry.stores.scripted import Request, Scripted, closed_port, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def opened(*servers: Scripted, timeout: float = 5.0, **login: str) -> contextlib.closing[EtcdV2Store]:
    endpoints = parse_endpoints([f"127.0.0.1:{server.port}" for server in servers])
    return contextlib.closing(EtcdV2Store(endpoints, timeout=timeout, **login))


def said(message: object, *, status: str = "200 OK", index: int = 7, more: str = "") -> bytes:
    body = json.dumps(message).encode() + b"\n"
    head = f"HTTP/1.1 {status}\r\nX-Etcd-Index: {index}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def node(key: str = "/a/b", value: str = "v", modified: int = 7, **more: object) -> dict[str, object]:
    return {"key": key, "value": value, "modifiedIndex": modified, "createdIndex": 5, **more}


def mine(**more: object) -> dict[str, object]:
    return node(expiration="2026-11-25T22:47:47Z", ttl=60, **more)


def event(action: str, shown: dict[str, object]) -> bytes:
    return said({"action": action, "node": shown}, index=100)


def error(code: int, words: str, *, index: int = 7, status: str = "400 Bad Request") -> bytes:
    return said({"errorCode": code, "message": words, "cause": "/a/b", "index": index}, status=status)


EXISTS = error(105, "Key already exists", status="412 Precondition Failed")
COMPARE = error(101, "Compare failed", status="412 Precondition Failed")
MISSING = error(100, "Key not found", status="404 Not Found")


HEALTHY = ok(b'{"health":"true"}')
SICK = ok(b'{"health":"false"}', status="503 Service Unavailable")


class Script:
    """Answers in order, the last one again and again; None hangs up. Of its health it always speaks well."""

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = list(answers)

    def __call__(self, request: Request) -> bytes | None:
        if "health" in request.path:
            return HEALTHY
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class TestLostAnswers:
    def test_a_create_recognises_its_own_value(self) -> None:
        with Scripted(Script(None, EXISTS, event("get", mine()))) as server, opened(server) as store:
            assert store.create("/a/b", b"v", ttl=60) == Entry("/a/b", b"v", 7, "5", 60.0)

    @pytest.mark.parametrize(
        "there", [mine(value="w"), node(), node(expiration="2026-11-25T22:47:47Z", ttl=40)]
    )
    def test_what_has_another_value_or_an_older_ttl_is_not_its_own(self, there: dict[str, object]) -> None:
        with Scripted(Script(None, EXISTS, event("get", there))) as server, opened(server) as store:
            with pytest.raises(KeyExists):
                store.create("/a/b", b"v", ttl=60)

    def test_nothing_lost_an_equal_value_is_somebody_elses(self) -> None:
        with Scripted(Script(EXISTS, event("get", mine()))) as server, opened(server) as store:
            with pytest.raises(KeyExists):
                store.create("/a/b", b"v", ttl=60)

    def test_replace_refresh_and_delete_know_their_own_deed(self) -> None:
        later = event("get", mine(modified=9))
        with Scripted(Script(None, COMPARE, later)) as server, opened(server) as store:
            assert store.replace("/a/b", b"v", ttl=60, expected=7).revision == 9
        with Scripted(Script(None, COMPARE, later)) as server, opened(server) as store:
            assert store.refresh(Entry("/a/b", b"v", 7, "5"), ttl=60).revision == 9
        with Scripted(Script(None, MISSING)) as server, opened(server) as store:
            assert store.delete("/a/b", expected=7)
        with (
            Scripted(Script(None, COMPARE, event("get", node(value="w")))) as server,
            opened(server) as store,
        ):
            with pytest.raises(Changed):
                store.replace("/a/b", b"v", ttl=60, expected=5)


def test_a_server_that_does_not_know_refresh_has_not_emptied_the_value_for_long() -> None:
    """etcd before 2.3 takes it for a write without a value."""
    with (
        Scripted(
            Script(
                event("compareAndSwap", mine(value="", modified=8)), event("compareAndSwap", mine(modified=9))
            )
        ) as server,
        opened(server) as store,
    ):
        assert store.refresh(Entry("/a/b", b"v", 7, "5"), ttl=60).value == b"v"
        first, second = (request.body for request in server.requests)
    assert first == b"refresh=true&prevIndex=7&ttl=60"
    assert second == b"value=v&prevIndex=8&ttl=60"


class TestRefusals:
    def test_a_login_is_basic_and_its_refusal_names_the_user_and_no_password(self) -> None:
        denied = said({"message": "Insufficient credentials"}, status="401 Unauthorized")
        with Scripted(Script(denied)) as server:
            with (
                opened(server, user="ro", password="hunter2") as store,
                pytest.raises(NotPermitted) as caught,
            ):
                store.get("/a")
            assert "Authorization: Basic cm86aHVudGVyMg==" in server.requests[0].head
            assert 'user "ro" may not' in caught.value.message
            assert "hunter2" not in str(caught.value)
            with opened(server) as store, pytest.raises(NotPermitted, match="etcd wants a login"):
                store.get("/a")

    def test_etcds_words_are_kept(self) -> None:
        with Scripted(Script(error(107, "Root is read only"))) as server, opened(server) as store:
            with pytest.raises(Invalid, match=r"cannot create /a/b \(etcd: Root is read only: /a/b\)"):
                store.create("/a/b", b"v", ttl=None)

    def test_an_election_is_waited_for(self) -> None:
        raft = error(300, "Raft Internal Error", status="500 Internal Server Error")
        with Scripted(Script(raft, raft, event("get", node()))) as server, opened(server) as store:
            assert store.get("/a/b") == Entry("/a/b", b"v", 7)

    @pytest.mark.parametrize("key", ["/a//b", "/a/../b", "/./b", "/a/"])
    def test_a_key_that_v2_would_take_for_another_is_refused_by_name(self, key: str) -> None:
        with Scripted(Script(event("get", node()))) as server, opened(server) as store:
            with pytest.raises(Invalid, match="is none in etcd v2"):
                store.get(key)
            assert server.requests == []

    @pytest.mark.parametrize(
        "answer",
        [
            ok(b"<html>"),
            ok(b"[]"),
            ok(b"[" * 10_000),
            ok(b'{"hello": 1}'),
            said({"action": "get", "node": 7}),
            said({"action": "get", "node": node(value=7)}),  # type: ignore[arg-type]
            said({"action": "get", "node": node(modified="x")}),  # type: ignore[arg-type]
            ok(b"", status="403 Forbidden"),
        ],
    )
    def test_what_no_etcd_sends_is_no_answer(self, answer: bytes) -> None:
        with Scripted(Script(answer)) as server, opened(server, timeout=0.3) as store:
            for deed in (
                lambda: store.get("/a/b"),
                lambda: store.list("/a/"),
                lambda: store.create("/a/b", b"v", ttl=9),
            ):
                with pytest.raises(RegistryUnreachable):
                    deed()

    def test_an_etcd_without_v2_says_so(self) -> None:
        def answer(request: Request) -> bytes:
            if request.path == "/version":
                return ok(b'{"etcdserver":"3.7.0","etcdcluster":"3.7.0"}')
            return ok(b"404 page not found\n", status="404 Not Found")

        with Scripted(answer) as server, opened(server) as store:
            with pytest.raises(EtcdV2Missing, match="serves no v2 API"):
                store.get("/a/b")


class TestRedirects:
    def test_to_a_member_we_know_it_is_followed(self) -> None:
        with Scripted(Script(event("get", node()))) as leader:
            place = f"Location: http://127.0.0.1:{leader.port}/v2/keys/a/b?quorum=true\r\n"
            with (
                Scripted(Script(said({}, status="307 Temporary Redirect", more=place))) as follower,
                opened(follower, leader) as store,
            ):
                assert store.get("/a/b") == Entry("/a/b", b"v", 7)
                assert len(leader.requests) == 1

    def test_anywhere_else_it_is_not_followed_and_the_login_stays_with_us(self) -> None:
        with Scripted(Script(event("get", node()))) as stranger:
            place = f"Location: http://127.0.0.1:{stranger.port}/v2/keys/a/b\r\n"
            with (
                Scripted(Script(said({}, status="307 Temporary Redirect", more=place))) as server,
                opened(server, user="root", password="s3cret") as store,
            ):
                with pytest.raises(RegistryUnreachable) as caught:
                    store.get("/a/b")
                assert "which is none of the endpoints" in caught.value.details[0]
                assert stranger.requests == []


class TestWatch:
    def test_each_event_once_and_the_next_poll_after_it_on_the_same_connection(self) -> None:
        polls = itertools.count()

        def answer(request: Request) -> bytes:
            if "health" in request.path:
                return HEALTHY
            number = next(polls)
            shown = [
                event("create", mine(modified=8)),
                event("expire", node(modified=9)),
                event("compareAndDelete", node(key="/a/c", modified=11)),
                event("set", node(modified=12)),
            ][number]
            wanted = [8, 9, 10, 12][number]
            assert f"waitIndex={wanted}&" in request.path + "&"
            return shown

        with Scripted(answer) as server, opened(server) as store, store.watch("/a/", after=7) as watch:
            assert list(itertools.islice(watch, 4)) == [
                Put(Entry("/a/b", b"v", 8, "5")), Delete("/a/b", 9), Delete("/a/c", 11), Put(Entry("/a/b", b"v", 12)),
            ]  # fmt: skip
            assert server.connections == 2, "one for the polls, one for its health"

    def test_what_is_forgotten_ends_it(self) -> None:
        cleared = error(401, "The event in requested index is outdated and cleared", index=2000)
        with Scripted(Script(cleared)) as server, opened(server) as store:
            assert list(store.watch("/a/", after=7)) == [Compacted(2000)]

    def test_a_directory_that_goes_makes_the_reader_list_again(self) -> None:
        gone = event("delete", {"key": "/a", "dir": True, "modifiedIndex": 9, "createdIndex": 3})
        with Scripted(Script(gone)) as server, opened(server) as store:
            assert list(store.watch("/a/", after=7)) == [Compacted(9)]

    def test_a_store_that_has_gone_back_makes_the_reader_list_again(self) -> None:
        """All data lost: the index starts anew, and a poll for an old one would wait for ever."""
        with Scripted(lambda request: said({}) if "wait" in request.path else MISSING) as server:
            with opened(server) as store:
                assert list(store.watch("/a/", after=900)) == [Compacted(7)]

    def test_a_member_without_a_leader_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_watch, "PROBE_EVERY", 0.1)

        asked: list[str] = []

        def alone(request: Request) -> bytes | None:
            if "health" in request.path:
                asked.append(request.path)
                return HEALTHY if len(asked) == 1 else SICK
            return b"HTTP/1.1 200 OK\r\nX-Etcd-Index: 7\r\nTransfer-Encoding: chunked\r\n\r\n"

        with Scripted(alone) as one, Scripted(Script(event("set", node(modified=8)))) as two:
            with opened(one, two) as store, store.watch("/a/", after=7) as watch:
                assert next(watch) == Put(Entry("/a/b", b"v", 8))

    def test_one_that_ends_every_poll_without_a_word_is_no_watch(self) -> None:
        """It is opened again ever more slowly, and after the time-out said to be none."""
        empty = b"HTTP/1.1 200 OK\r\nX-Etcd-Index: 7\r\nContent-Length: 0\r\n\r\n"
        begin = time.monotonic()
        with Scripted(Script(empty)) as server, opened(server, timeout=1.0) as store:
            with store.watch("/a/", after=7) as watch, pytest.raises(RegistryUnreachable) as caught:
                next(watch)
        assert 0.9 < time.monotonic() - begin < 3
        assert "ended the watch" in caught.value.details[0]
        assert len(server.requests) < 16

    def test_nobody_there_is_said_after_the_timeout(self) -> None:
        endpoints = parse_endpoints([f"127.0.0.1:{closed_port()}"])
        with contextlib.closing(EtcdV2Store(endpoints, timeout=0.3)) as store:
            with (
                store.watch("/a/", after=7) as watch,
                pytest.raises(RegistryUnreachable, match="cannot watch /a/"),
            ):
                next(watch)


_WORDS = "node nodes key value dir modifiedIndex createdIndex expiration ttl errorCode message index action".split()
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["/a/b", "set", "expire"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_json, st.sampled_from(["200 OK", "201 Created", "400 Bad Request", "500 No", "307 Else"]))
def test_any_json_is_an_answer_or_our_error(message: Any, status: str) -> None:
    with Scripted(Script(said(message, status=status))) as server, opened(server, timeout=0.05) as store:

        def watched() -> None:
            """One that goes on being told nothing new is no error: closing ends it."""
            with store.watch("/a/", after=1) as watch:
                closing = threading.Timer(0.1, watch.close)
                closing.start()
                try:
                    list(itertools.islice(watch, 2))
                finally:
                    closing.cancel()
                    closing.join()

        deeds: list[Callable[[], object]] = [
            lambda: store.get("/a/b"),
            lambda: store.list("/a/"),
            lambda: store.create("/a/b", b"", ttl=None),
            lambda: store.delete("/a/b", expected=3),
            lambda: store.refresh(Entry("/a/b", b"", 1, "5"), ttl=9),
            lambda: store.with_ttl([Entry("/a/b", b"", 1, "5")]),
            watched,
        ]
        for deed in deeds:
            with contextlib.suppress(FlanctlError):
                deed()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster("3.4", members=3, v2=True, folder=tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


def _store(cluster: Cluster, **more: Any) -> contextlib.closing[EtcdV2Store]:
    return contextlib.closing(EtcdV2Store(parse_endpoints(cluster.endpoints), **more))


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_frozen_member_costs_a_call_three_seconds_at_most(cluster: Cluster, first: int) -> None:
    with _store(cluster) as store:
        store.create(f"/frozen/{first}", b"1", ttl=None)
        index = next(i for i, text in enumerate(cluster.endpoints) if text in store.describe())
        cluster.freeze(index)
        try:
            begin = time.monotonic()
            assert store.get(f"/frozen/{first}") is not None
            assert time.monotonic() - begin < 3.5
        finally:
            cluster.thaw(index)
            cluster.wait()


@pytest.mark.needs("etcd34")
def test_many_keys_are_listed_at_one_index_with_a_ttl_each(cluster: Cluster) -> None:
    with _store(cluster) as store:
        for number in range(200):
            store.create(f"/many/{number:04}", b"x", ttl=600.0)
        snapshot = store.list("/many/")
        assert [entry.key[-4:] for entry in snapshot.entries] == [f"{n:04}" for n in range(200)]
        timed = store.with_ttl(snapshot.entries)
        assert all(entry.ttl is not None and 500 < entry.ttl <= 600 for entry in timed)

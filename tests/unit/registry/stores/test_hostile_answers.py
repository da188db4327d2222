"""Whatever a server answers over HTTP, each store ends each call soon: with a result, or with one clear line."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import FlanctlError
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore
from flanctl.registry.stores.etcd_v2 import EtcdV2Store
from flanctl.registry.stores.store import Entry, Snapshot
from tests.support.fuzz import fuzzed
from tests.unit.registry.stores.scripted import Request, Scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanctl.registry.stores.store import Store

KEY = "/net/subnets/172.17.41.0-24"
HELD = Entry(KEY, b'{"PublicIP":"192.168.6.2"}', 7, "77", 60.0)
TIMEOUT = 0.1
SLACK = 10.0
"""Seconds beyond the time-out: a shared machine stops for longer than one thinks."""

# ---- what is said ---------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 2**64), st.sampled_from(["0", "7", "-1", "1e9", "9" * 40, "٧", "", " 7", "0x7", 1.5])
)
TEXTS = st.one_of(
    st.binary(max_size=20).map(lambda data: base64.b64encode(data).decode()),
    st.sampled_from([base64.b64encode(KEY.encode()).decode(), KEY, "a", "!", "L2E=\n", "\ud800", "\0"]),
    st.text(max_size=8),
)
WRONG = st.one_of(st.none(), st.booleans(), st.just([]), st.just({}), st.just([[{}]]), NUMBERS, TEXTS)


def message(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Some of the fields, each as it should be or as it should not."""
    return st.fixed_dictionaries({}, optional={name: st.one_of(kind, WRONG) for name, kind in fields.items()})


KV = message(
    dict.fromkeys(("key", "value"), TEXTS)
    | dict.fromkeys(("mod_revision", "create_revision", "version", "lease"), NUMBERS)
)
HEADER = message({"revision": NUMBERS, "cluster_id": NUMBERS})
RANGE = {"header": HEADER, "kvs": st.lists(KV, max_size=4), "more": st.booleans(), "count": NUMBERS}
EVENTS = st.lists(message({"type": st.sampled_from(["PUT", "DELETE"]), "kv": KV}), max_size=3)
RESULT = message(
    {
        "header": HEADER, "created": st.booleans(), "canceled": st.booleans(), "compact_revision": NUMBERS,
        "cancel_reason": TEXTS, "watch_id": NUMBERS, "events": EVENTS, "TTL": NUMBERS,
    }
)  # fmt: skip
V3 = message(
    RANGE
    | {
        "succeeded": st.booleans(), "responses": st.lists(message({"response_range": message(RANGE)}), max_size=2),
        "deleted": NUMBERS, "TTL": NUMBERS, "grantedTTL": NUMBERS, "ID": NUMBERS, "result": RESULT, "token": TEXTS,
        "error": TEXTS, "code": st.integers(-1, 20), "message": TEXTS, "etcdserver": TEXTS,
    }
)  # fmt: skip
LEAF = {
    "key": TEXTS, "value": TEXTS, "modifiedIndex": NUMBERS, "createdIndex": NUMBERS, "ttl": NUMBERS, "dir": st.booleans(),
    "expiration": TEXTS,
}  # fmt: skip
V2 = message(
    {
        "action": st.sampled_from(["get", "set", "expire", "delete", "compareAndSwap"]),
        "node": message(LEAF | {"nodes": st.lists(message(LEAF | {"nodes": st.just([])}), max_size=3)}),
        "prevNode": message(LEAF), "errorCode": NUMBERS, "message": TEXTS, "cause": TEXTS, "index": NUMBERS,
        "etcdserver": TEXTS,
    }
)  # fmt: skip
DEEP = st.sampled_from(
    [
        b'{"kvs":' * 10_000,
        b"[" * 50_000,
        b'{"node":' * 10_000,
        b'{"header":{"revision":' + b"9" * 5000 + b"}}",
    ]
)
BODIES = st.one_of(
    st.one_of(V3, V2).map(lambda found: json.dumps(found).encode()),
    st.lists(V3, max_size=3).map(
        lambda found: b"\n".join(json.dumps({"result": one}).encode() for one in found)
    ),
    st.binary(max_size=60),
    DEEP,
)
STATUSES = st.sampled_from(
    [b"200 OK"] * 4
    + [b"302 Found", b"401 x", b"403 x", b"404 x", b"412 x", b"500 x", b"503 x", b"999", b"0", b"-1 x"]
)
HEADERS = st.lists(
    st.sampled_from(
        [
            b"X-Etcd-Index: 7", b"X-Etcd-Index: -7", b"X-Etcd-Index: x", b"Location: http://127.0.0.1:1/", b"Location: /",
            b"Connection: close", b"Content-Type: application/json", b"X: " + b"y" * 70_000, b": ", b"\xff\xfe",
            b"Content-Length: 3", b"Content-Length: -1", b"Content-Length: 99999999999999999999",
            b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
        ]
    ),
    max_size=3,
)  # fmt: skip


def whole(status: bytes, headers: list[bytes], body: bytes, chunked: bool) -> bytes:
    """An answer in HTTP's form, but for what `headers` spoil."""
    if chunked:
        headers = [*headers, b"Transfer-Encoding: chunked"]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    elif not any(header.startswith(b"Content-Length") for header in headers):
        headers = [*headers, b"Content-Length: %d" % len(body)]
    return b"HTTP/1.1 " + status + b"\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


ANSWERS = st.one_of(
    st.builds(whole, STATUSES, HEADERS, BODIES, st.booleans()),
    st.builds(whole, st.just(b"200 OK"), st.just([]), BODIES, st.booleans()),
    st.builds(
        lambda said, share: said[: int(len(said) * share)],
        st.builds(whole, STATUSES, HEADERS, BODIES, st.booleans()),
        st.floats(0, 1),
    ),
    st.binary(max_size=60),
)
ENDLESS = st.sampled_from(
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: y\r\n" * 500),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4\r\n    \r\n" * 500),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000;" + b"x" * 8000),
        (b"HTTP/1.1 200 OK\r\n\r\n", b'{"result":{}}\n' * 300),
        (b"", b"\0" * 5000),
    ]
)

# ---- what is asked --------------------------------------------------------------------------------------------------


def follow(store: Store) -> None:
    with store.watch("/net/", after=5) as watch:
        for _ in itertools.islice(watch, 5):
            pass


CALLS: list[Callable[[Store], object]] = [
    lambda store: store.get(KEY),
    lambda store: store.list("/net/subnets/"),
    lambda store: store.create(KEY, b"x", ttl=60),
    lambda store: store.replace(KEY, b"x", ttl=60, expected=7),
    lambda store: store.delete(KEY),
    lambda store: store.delete(KEY, expected=7),
    lambda store: store.refresh(HELD, ttl=60),
    lambda store: store.with_ttl([HELD]),
    follow,
]
STORES = {"gateway": EtcdGatewayStore, "v2": EtcdV2Store}


def ends_well(kind: str, call: Callable[[Store], object], answer: Callable[[Request], Any]) -> None:
    with Scripted(answer) as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        ends_soon(call, STORES[kind](parse_endpoints([endpoint]), timeout=TIMEOUT))


def ends_soon(call: Callable[[Store], object], store: Store) -> None:
    """With a result that holds, or one clear line."""
    began = time.monotonic()
    with contextlib.closing(store):
        try:
            found = call(store)
        except FlanctlError as error:
            for line in (error.message, *error.details, error.hint or ""):
                assert line.isprintable(), repr(line)
                assert len(line) < 1000, line[:2000]
        else:
            if isinstance(found, Snapshot):
                assert all(entry.key.startswith("/net/subnets/") for entry in found.entries)
    assert time.monotonic() - began < 5 * TIMEOUT + SLACK


@pytest.mark.parametrize("kind", sorted(STORES))
@pytest.mark.parametrize("status", [b"200 OK", b"302 Found", b"400 x", b"503 x"])
def test_words_of_a_server_are_one_line_that_can_be_printed(kind: str, status: bytes) -> None:
    """Found by the test below."""
    words = {"code": 3, "errorCode": 3, "message": "a\ud800\n\x1b[31m", "cause": "b\r\n", "etcdserver": "x"}
    answer = whole(status, [], json.dumps(words).encode(), False)
    said: Iterator[bytes | None] = itertools.chain([answer], itertools.repeat(None))
    ends_well(kind, CALLS[0], lambda _: next(said))


@partial(fuzzed, examples=80)
@given(st.sampled_from(sorted(STORES)), st.sampled_from(CALLS), st.lists(ANSWERS, min_size=1, max_size=4))
def test_no_answer_breaks_a_store(kind: str, call: Callable[[Store], object], answers: list[bytes]) -> None:
    said: Iterator[bytes | None] = itertools.chain(answers, itertools.repeat(None))
    ends_well(kind, call, lambda _: next(said))


@partial(fuzzed, examples=20)
@given(st.sampled_from(sorted(STORES)), st.sampled_from(CALLS), ENDLESS)
def test_no_answer_without_end_keeps_a_store_for_ever(
    kind: str, call: Callable[[Store], object], endless: tuple[bytes, bytes]
) -> None:
    start, piece = endless
    ends_well(kind, call, lambda _: itertools.chain([start], itertools.repeat(piece)))

"""Whatever a server answers over gRPC, the store ends each call soon: with a result, or with one clear line."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.errors import FlanctlError
from flanctl.registry.stores import etcd_grpc
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
from tests.support.fuzz import fuzzed
from tests.unit.registry.stores.test_hostile_answers import CALLS, KEY, TIMEOUT, ends_soon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanctl.registry.stores.store import Store

door: Any = etcd_grpc
grpc, pb, kv_pb2 = door.grpc, door.pb, door.kv_pb2
STREAMS = ("/Watch", "/LeaseKeepAlive")

# ---- what is said ---------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 7, -1]))
KEYS = st.one_of(st.binary(max_size=20), st.sampled_from([KEY.encode(), b"/net/subnets/\xff", b""]))


def message(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Some of the fields; numbers and bytes are what protobuf's types can hold, as etcd never sends them."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda found: kind(**found))


HEADER = message(pb.ResponseHeader, cluster_id=st.integers(0, 2**64 - 1), revision=NUMBERS)
KV = message(
    kv_pb2.KeyValue,
    key=KEYS,
    value=st.binary(max_size=40),
    mod_revision=NUMBERS,
    create_revision=NUMBERS,
    version=NUMBERS,
    lease=NUMBERS,
)
RANGE = message(
    pb.RangeResponse, header=HEADER, kvs=st.lists(KV, max_size=4), more=st.booleans(), count=NUMBERS
)
TXN = message(
    pb.TxnResponse,
    header=HEADER,
    succeeded=st.booleans(),
    responses=st.lists(message(pb.ResponseOp, response_range=RANGE), max_size=2),
)
EVENT = message(kv_pb2.Event, type=st.sampled_from([0, 1]), kv=KV, prev_kv=KV)
WATCH = message(
    pb.WatchResponse,
    header=HEADER,
    watch_id=NUMBERS,
    created=st.booleans(),
    canceled=st.booleans(),
    compact_revision=NUMBERS,
    events=st.lists(EVENT, max_size=3),
)
TTL = message(pb.LeaseTimeToLiveResponse, header=HEADER, ID=NUMBERS, TTL=NUMBERS, grantedTTL=NUMBERS)
WHOLE = st.one_of(RANGE, TXN, WATCH, TTL).map(lambda found: found.SerializeToString())


def damaged(data: bytes, at: float, bits: int, keep: float) -> bytes:
    """One byte otherwise, and the end cut off."""
    if data:
        place = min(int(len(data) * at), len(data) - 1)
        data = data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
    return data[: int(len(data) * keep) + 1]


BYTES = st.one_of(
    WHOLE,
    st.builds(damaged, WHOLE, st.floats(0, 1), st.integers(0, 255), st.one_of(st.just(1.0), st.floats(0, 1))),
    st.binary(max_size=60),
)
CODES = st.sampled_from([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["etcdserver: no leader", "etcdserver: invalid auth token", "a\n\x1b[31mb", "\0", "x" * 5000]
    ),
)
ANSWERS = st.one_of(BYTES, st.tuples(CODES, WORDS))


class Liar(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types here
    """Answers whatever is asked with the next of `script`, bytes as they are; then every call fails."""

    def __init__(self) -> None:
        self.script: list[bytes | tuple[Any, str]] = []

    def service(self, details: Any) -> Any:
        if details.method.endswith(STREAMS):
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(lambda _, context: self._next(context))

    def _next(self, context: Any) -> bytes:
        said = self.script.pop(0) if self.script else (grpc.StatusCode.UNAVAILABLE, "no more")
        if isinstance(said, bytes):
            return said
        context.abort(*said)
        raise AssertionError("abort raises")

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        next(requests, None)
        while True:
            yield self._next(context)


@contextlib.contextmanager
def liar(script: list[bytes | tuple[Any, str]]) -> Iterator[str]:
    handler = Liar()
    handler.script = list(script)
    pool = ThreadPoolExecutor(8)
    server = grpc.server(pool, handlers=[handler], options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait(5)
        pool.shutdown()


def ends_well(call: Callable[[Store], object], script: list[bytes | tuple[Any, str]]) -> None:
    with liar(script) as endpoint:
        ends_soon(call, EtcdGrpcStore(parse_endpoints([endpoint]), timeout=TIMEOUT))


@partial(fuzzed, examples=60)
@given(st.sampled_from(CALLS), st.lists(ANSWERS, min_size=1, max_size=4))
def test_no_answer_breaks_the_store(
    call: Callable[[Store], object], answers: list[bytes | tuple[Any, str]]
) -> None:
    ends_well(call, answers)


@pytest.mark.parametrize("words", ["a\n\x1b[31mb", "x" * 5000])
@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNAVAILABLE", "INTERNAL", "UNAUTHENTICATED"])
def test_words_of_a_server_are_one_line_that_can_be_printed(code: str, words: str) -> None:
    ends_well(CALLS[0], [(grpc.StatusCode[code], words)] * 3)


def test_a_list_without_end_ends_and_a_whole_one_is_read() -> None:
    """Each page says that there is more, behind the same key."""
    page = pb.RangeResponse(
        header=pb.ResponseHeader(revision=7),
        kvs=[kv_pb2.KeyValue(key=KEY.encode(), mod_revision=7)],
        more=True,
    )
    for more, words in ((True, "the only endpoint did not answer"), (False, None)):
        page.more = more
        with (
            liar([page.SerializeToString()] * 10) as endpoint,
            contextlib.closing(EtcdGrpcStore(parse_endpoints([endpoint]), timeout=5)) as store,
        ):
            if words is None:
                assert [entry.key for entry in store.list("/net/subnets/").entries] == [KEY]
            else:
                with pytest.raises(FlanctlError, match=words) as caught:
                    store.list("/net/subnets/")
                assert f'etcd sent the key "{KEY}", which was not asked for' in caught.value.details[0]


@pytest.mark.parametrize("call", CALLS[:2])
def test_a_key_nobody_asked_for_is_refused(call: Callable[[Store], object]) -> None:
    """Found by the fuzzer: a list of subnets with a key of nobody's in it."""
    page = pb.RangeResponse(
        header=pb.ResponseHeader(revision=7), kvs=[kv_pb2.KeyValue(key=b"/elsewhere", mod_revision=7)]
    )
    with (
        liar([page.SerializeToString()] * 3) as endpoint,
        contextlib.closing(EtcdGrpcStore(parse_endpoints([endpoint]), timeout=5)) as store,
        pytest.raises(FlanctlError, match="the only endpoint did not answer") as caught,
    ):
        call(store)
    assert 'etcd sent the key "/elsewhere", which was not asked for' in caught.value.details[0]


def test_who_sends_what_was_not_asked_for_is_left_for_the_next() -> None:
    header = pb.ResponseHeader(revision=7)
    strange = pb.RangeResponse(header=header, kvs=[kv_pb2.KeyValue(key=b"/elsewhere", mod_revision=7)])
    right = pb.RangeResponse(header=header, kvs=[kv_pb2.KeyValue(key=KEY.encode(), mod_revision=7)])
    with (
        liar([strange.SerializeToString()] * 3) as one,
        liar([right.SerializeToString()] * 3) as two,
        contextlib.closing(EtcdGrpcStore(parse_endpoints([one, two]), timeout=5)) as store,
    ):
        assert [entry.key for entry in store.list("/net/subnets/").entries] == [KEY]

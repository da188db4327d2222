# What registry/stores/etcd_grpc.py uses of etcd3 0.12.0's generated code (etcd's rpc.proto), which ships no types.
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from etcd3.etcdrpc.kv_pb2 import Event, KeyValue
from grpc import Channel

Q = TypeVar("Q", contravariant=True)
A = TypeVar("A", covariant=True)

class Call(Protocol[A]):
    def __next__(self) -> A: ...
    def cancel(self) -> bool: ...

class Unary(Protocol[Q, A]):
    def __call__(
        self, request: Q, timeout: float | None = ..., metadata: Sequence[tuple[str, str]] = ...
    ) -> A: ...

class Stream(Protocol[Q, A]):
    def __call__(
        self, requests: Iterator[Q], timeout: float | None = ..., metadata: Sequence[tuple[str, str]] = ...
    ) -> Call[A]: ...

class ResponseHeader:
    revision: int

class RangeRequest:
    def __init__(
        self, key: bytes = ..., range_end: bytes = ..., limit: int = ..., revision: int = ...
    ) -> None: ...

class RangeResponse:
    header: ResponseHeader
    kvs: Sequence[KeyValue]
    more: bool

class PutRequest:
    def __init__(self, key: bytes = ..., value: bytes = ..., lease: int = ...) -> None: ...

class DeleteRangeRequest:
    def __init__(self, key: bytes = ...) -> None: ...

class DeleteRangeResponse:
    deleted: int

class RequestOp:
    def __init__(
        self,
        request_range: RangeRequest | None = ...,
        request_put: PutRequest | None = ...,
        request_delete_range: DeleteRangeRequest | None = ...,
    ) -> None: ...

class ResponseOp:
    response_range: RangeResponse

class Compare:
    EQUAL: int
    CREATE: int
    MOD: int
    def __init__(
        self,
        result: int = ...,
        target: int = ...,
        key: bytes = ...,
        create_revision: int = ...,
        mod_revision: int = ...,
    ) -> None: ...

class TxnRequest:
    def __init__(
        self,
        compare: Sequence[Compare] = ...,
        success: Sequence[RequestOp] = ...,
        failure: Sequence[RequestOp] = ...,
    ) -> None: ...

class TxnResponse:
    header: ResponseHeader
    succeeded: bool
    responses: Sequence[ResponseOp]

class LeaseGrantRequest:
    def __init__(self, TTL: int = ..., ID: int = ...) -> None: ...

class LeaseGrantResponse:
    ID: int

class LeaseRevokeRequest:
    def __init__(self, ID: int = ...) -> None: ...

class LeaseRevokeResponse: ...

class LeaseKeepAliveRequest:
    def __init__(self, ID: int = ...) -> None: ...

class LeaseKeepAliveResponse:
    TTL: int

class LeaseTimeToLiveRequest:
    def __init__(self, ID: int = ...) -> None: ...

class LeaseTimeToLiveResponse:
    TTL: int
    grantedTTL: int

class AuthenticateRequest:
    def __init__(self, name: str = ..., password: str = ...) -> None: ...

class AuthenticateResponse:
    token: str

NOSPACE: int

class AlarmRequest:
    GET: int
    def __init__(self, action: int = ...) -> None: ...

class AlarmMember:
    memberID: int
    alarm: int

class AlarmResponse:
    alarms: Sequence[AlarmMember]

class Member:
    ID: int
    name: str

class MemberListRequest:
    def __init__(self) -> None: ...

class MemberListResponse:
    members: Sequence[Member]

class WatchCreateRequest:
    def __init__(
        self, key: bytes = ..., range_end: bytes = ..., start_revision: int = ..., progress_notify: bool = ...
    ) -> None: ...

class WatchRequest:
    def __init__(self, create_request: WatchCreateRequest | None = ...) -> None: ...
    @classmethod
    def FromString(cls, data: bytes) -> WatchRequest: ...

class WatchResponse:
    header: ResponseHeader
    watch_id: int
    created: bool
    canceled: bool
    compact_revision: int
    cancel_reason: str
    events: Sequence[Event]

class KVStub:
    def __init__(self, channel: Channel) -> None: ...
    Range: Unary[RangeRequest, RangeResponse]
    DeleteRange: Unary[DeleteRangeRequest, DeleteRangeResponse]
    Txn: Unary[TxnRequest, TxnResponse]

class LeaseStub:
    def __init__(self, channel: Channel) -> None: ...
    LeaseGrant: Unary[LeaseGrantRequest, LeaseGrantResponse]
    LeaseRevoke: Unary[LeaseRevokeRequest, LeaseRevokeResponse]
    LeaseTimeToLive: Unary[LeaseTimeToLiveRequest, LeaseTimeToLiveResponse]
    LeaseKeepAlive: Stream[LeaseKeepAliveRequest, LeaseKeepAliveResponse]

class WatchStub:
    def __init__(self, channel: Channel) -> None: ...
    Watch: Stream[WatchRequest, WatchResponse]

class ClusterStub:
    def __init__(self, channel: Channel) -> None: ...
    MemberList: Unary[MemberListRequest, MemberListResponse]

class MaintenanceStub:
    def __init__(self, channel: Channel) -> None: ...
    Alarm: Unary[AlarmRequest, AlarmResponse]

class AuthStub:
    def __init__(self, channel: Channel) -> None: ...
    Authenticate: Unary[AuthenticateRequest, AuthenticateResponse]

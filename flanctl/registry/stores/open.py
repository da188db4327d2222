"""From settings to an open store: the one place that knows which stores there are.

    store = open_store(Connection(("http://192.168.6.15:2379",)))

Nothing heavy is imported before it is known to be needed: a command on a file loads no HTTP, one over HTTP no gRPC.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from flanctl.errors import FlanctlError, NotFound, RegistryUnreachable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanctl.registry.stores.endpoints import Endpoint
    from flanctl.registry.stores.etcd_v2 import EtcdV2Store
    from flanctl.registry.stores.store import Store

Api = Literal["auto", "v2", "v3"]

_SQLITE = "sqlite:"

LOOK_SECONDS = 2.0
"""How long the API that is not used is asked whether it holds a config too."""


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a registry. `timeout` in seconds bounds every call; files are PEM; the password is never shown."""

    endpoints: tuple[str, ...]
    timeout: float = 5.0
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    api: Api = "v3"


def unheard(sentence: str, warning: bool) -> None:
    """Nobody asked."""


def open_store(
    connection: Connection,
    *,
    create: bool = True,
    key: str | None = None,
    say: Callable[[str, bool], None] = unheard,
) -> Store:
    """The store the endpoints name. For etcd no connection is made yet; a file is opened at once.

    `sqlite:PATH` alone is a file. Anything else is etcd. Its v3 API is asked by the JSON gateway, and by gRPC where the
    gateway is off (docs/decisions/0022).
    With api `auto` the first question decides for v3 or v2, by which of them holds `key`, the network's config.
    `say(sentence, warning)` is told which way was taken and why.
    `create=False` is for who only asks: a file that is not there is NotFound then, and a slip of the pen makes none.
    Raises UsageError for endpoints that cannot mean anything, and what SqliteStore raises.
    """
    schemes = [endpoint.strip().partition(":")[0].lower() for endpoint in connection.endpoints]
    if "memory" in schemes:
        raise UsageError("endpoint memory: is for tests only", hint="sqlite:PATH needs no server either")
    if "sqlite" in schemes:
        return _open_file(connection, create=create)

    from flanctl.registry.stores.endpoints import parse_endpoints

    endpoints = parse_endpoints(connection.endpoints)
    if connection.api == "v2":
        return _open_v2(endpoints, connection)
    v3 = _open_v3(endpoints, connection, say)
    if connection.api == "v3" or key is None:
        return v3

    from flanctl.registry.stores.switching import AutoStore

    return AutoStore(v3, lambda timeout: _open_v2(endpoints, connection, timeout), key, say)


def holds(connection: Connection, api: Api, key: str) -> bool:
    """Whether an API of these servers, or either with `auto`, has the key; False also when it is not served or says nothing soon."""
    from dataclasses import replace

    short = replace(connection, api=api, timeout=min(LOOK_SECONDS, connection.timeout))
    store = open_store(short, create=False, key=key)
    try:
        return store.get(key) is not None
    except FlanctlError:
        return False
    finally:
        store.close()


def _open_v3(
    endpoints: Sequence[Endpoint], connection: Connection, say: Callable[[str, bool], None]
) -> Store:
    from flanctl.registry.stores.switching import FallbackStore

    return FallbackStore(_open_gateway(endpoints, connection), lambda: _open_grpc(endpoints, connection), say)


def _open_file(connection: Connection, *, create: bool) -> Store:
    (first, *others) = (endpoint.strip() for endpoint in connection.endpoints)
    if others:
        raise UsageError(
            f"a file is a registry by itself, but {len(connection.endpoints)} endpoints are given:"
            f" {', '.join(connection.endpoints)}",
            hint="either sqlite:PATH or etcd endpoints",
        )
    if not (path := first[len(_SQLITE) :]):
        raise UsageError(f"endpoint {first} names no file", hint="sqlite:PATH")

    from flanctl.registry.stores.sqlite import SqliteStore

    if not create and not os.path.lexists(path) and os.path.isdir(os.path.dirname(path) or "."):
        raise NotFound(f"there is no registry {path}", hint="flanctl net init makes it", id="no-registry")
    return SqliteStore(path, timeout=connection.timeout)


def _open_gateway(endpoints: Sequence[Endpoint], connection: Connection) -> Store:
    from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore

    return EtcdGatewayStore(
        endpoints,
        timeout=connection.timeout,
        cacert=connection.cacert,
        cert=connection.cert,
        key=connection.key,
        user=connection.user,
        password=connection.password,
    )


def _open_v2(
    endpoints: Sequence[Endpoint], connection: Connection, timeout: float | None = None
) -> EtcdV2Store:
    from flanctl.registry.stores.etcd_v2 import EtcdV2Store

    return EtcdV2Store(
        endpoints,
        timeout=connection.timeout if timeout is None else min(timeout, connection.timeout),
        cacert=connection.cacert,
        cert=connection.cert,
        key=connection.key,
        user=connection.user,
        password=connection.password,
    )


class GrpcMissing(RegistryUnreachable):
    """etcd3 or grpc is not installed, not in versions that go together, or lacks a library of the system's."""


def _open_grpc(endpoints: Sequence[Endpoint], connection: Connection) -> Store:
    try:
        from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
    except (ImportError, OSError, TypeError) as error:
        # ImportError: no libstdc++ for cygrpc. TypeError: etcd3 0.12.0's messages under protobuf 4 and newer.
        raise GrpcMissing(f"gRPC cannot be loaded ({error})") from error
    return EtcdGrpcStore(
        endpoints,
        timeout=connection.timeout,
        cacert=connection.cacert,
        cert=connection.cert,
        key=connection.key,
        user=connection.user,
        password=connection.password,
    )

"""Which of flanctl's stores each version of etcd is asked by, for tests that run on both.

@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("kind", "cluster"), SERVED, indirect=["cluster"], scope="module")    # cluster: a fixture of the
                                        # module, its parameter a version; `scope` lets tests share it, one start each else
with opened(kind, cluster.endpoints, timeout=2.0) as store: …
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore
from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
from flanctl.registry.stores.etcd_v2 import EtcdV2Store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanctl.registry.stores.store import Store
    from tests.support.etcd import Version

STORES: dict[str, Callable[..., Store]] = {"gateway": EtcdGatewayStore, "grpc": EtcdGrpcStore}
WITH_V2: dict[str, Callable[..., Store]] = {**STORES, "v2": EtcdV2Store}
"""What etcd 3.4 can be asked by; 3.7 has no v2."""

_NEEDS = {"3.4": pytest.mark.needs("etcd34"), "3.7": pytest.mark.needs("etcd37")}
VERSIONS = [pytest.param(version, marks=mark) for version, mark in _NEEDS.items()]
SERVED = [
    pytest.param(kind, version, id=f"{kind}-{version}", marks=mark)
    for version, mark in _NEEDS.items()
    for kind in (WITH_V2 if version == "3.4" else STORES)
]
"""A store and a version of etcd that serves it."""
SERVED_V3 = [one for one in SERVED if one.values[0] in STORES]


def kinds(version: Version) -> dict[str, Callable[..., Store]]:
    """The stores that version can be asked by."""
    return WITH_V2 if version == "3.4" else STORES


def opened(kind: str, endpoints: Sequence[str], **more: Any) -> contextlib.closing[Store]:
    """A store, closed at the end of the block; `more` are its timeout, certificates and login."""
    return contextlib.closing(WITH_V2[kind](parse_endpoints(endpoints), **more))

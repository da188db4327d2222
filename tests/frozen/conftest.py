from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.capabilities import frozen_executable
from tests.support.etcd import Cluster
from tests.support.frozen import ok


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Path:
    """A copy of the executable in a folder that READ_ONLY does not hide."""
    folder = tempfile.mkdtemp(prefix="flanctl-test-", dir="/usr/local")
    os.chmod(folder, 0o755)
    yield Path(shutil.copy2(frozen_executable(), folder))
    shutil.rmtree(folder)


def _network(cluster) -> str:
    endpoint = cluster.endpoints[0]
    ok("net", "init", "--network", "172.17.0.0/16", env={"FLANCTL_ENDPOINTS": endpoint})
    ok("reserve", "172.17.7.0/24", "192.168.6.7", "--yes", env={"FLANCTL_ENDPOINTS": endpoint})
    return endpoint


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    """The endpoint of an etcd with a network in it and one reserved subnet."""
    with Cluster("3.4", folder=tmp_path_factory.mktemp("etcd")) as cluster:
        yield _network(cluster)


@pytest.fixture(scope="module")
def grpc_only(tmp_path_factory):
    """The same, but its JSON gateway is off: every command has to load cygrpc."""
    folder = tmp_path_factory.mktemp("etcd-grpc")
    with Cluster("3.4", folder=folder, extra=["--enable-grpc-gateway=false"]) as cluster:
        yield _network(cluster)


@pytest.fixture
def ls(request):
    """`ls(endpoint, **how)`: the subnets that `flanctl subnets ls` lists."""

    def ask(endpoint, **how):
        out = ok("subnets", "ls", "-w", "json", env={"FLANCTL_ENDPOINTS": endpoint}, **how)
        return [subnet["subnet"] for subnet in json.loads(out)["subnets"]]

    return ask

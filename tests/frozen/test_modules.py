"""What a command does not use is not imported: the frozen file itself tells what it has loaded."""

from __future__ import annotations

import pytest

from tests.support.capabilities import frozen_executable
from tests.support.frozen import modules_of, ok, run

pytestmark = pytest.mark.needs("frozen")

# Upper bounds, by top-level name and without the C halves (`_json`): what is not named must not appear.
START = set(
    "sys builtins oxidized_importer io marshal posix time zipimport codecs encodings abc __main__ __future__ stat genericpath"
    " posixpath os gc atexit errno importlib inspect platform difflib dataclasses".split()
)  # importlib.metadata and the last four are stand-ins until they are used (flanctl/frozen.py)
CLICK = START | set(
    "click collections contextlib copy copyreg dataclasses datetime enum fnmatch functools gettext importlib ipaddress"
    " itertools keyword locale math ntpath operator pathlib re reprlib shlex threading types typing urllib uuid warnings"
    " weakref".split()
)
JSON = CLICK | {"json"}
SQLITE = JSON | {"sqlite3"}
GATEWAY = JSON | set("array binascii bisect random select selectors socket stringprep unicodedata".split())
TABLE = {"tabulate", "html", "textwrap"}
"""What a table with rows takes."""

HEAVY = {
    "grpc", "google", "etcd3", "six", "tenacity", "asyncio", "concurrent", "pyroute2", "logging", "email", "http",
    "urllib.request", "ast", "dis", "tokenize", "linecache", "traceback", "tempfile", "shutil", "subprocess", "ctypes", "decimal",
    "multiprocessing", "xml", "pkgutil", "zipfile", "csv", "flanctl.agent.daemon", "flanctl.demo", "flanctl._native",
}  # fmt: skip


@pytest.fixture
def subnet_env(tmp_path):
    path = tmp_path / "subnet.env"
    path.write_text(
        "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    return path


def assert_only(modules, allowed):
    assert "sys" in modules, "nothing was printed"
    assert not modules & HEAVY
    extra = {name for name in modules if name.partition(".")[0] not in allowed}
    assert {name for name in extra if name.lstrip("_") == name and not name.startswith("flanctl")} == set()


def test_mk_docker_opts(subnet_env, tmp_path):
    """Not even click: a shell script's place is taken at each start of docker."""
    link = tmp_path / "mk-docker-opts.sh"
    link.symlink_to(frozen_executable())
    modules = modules_of("-f", subnet_env, "-d", tmp_path / "out", exe=link)
    assert_only(modules, START)
    assert not modules & {"re", "typing", "pathlib", "click", "collections", "functools", "enum"}
    assert "DOCKER_OPT_BIP" in (tmp_path / "out").read_text()


def test_version():
    assert_only(modules_of("version"), CLICK)


def test_docker_opts(subnet_env):
    assert_only(modules_of("docker-opts", "-f", subnet_env, "-d", "-"), CLICK)


@pytest.mark.parametrize("form", ["table", "json"])
def test_net_validate(form):
    modules = modules_of("net", "validate", "-", "-w", form, stdin='{"Network": "10.0.0.0/8"}')
    assert_only(modules, JSON)
    assert not modules & {"socket", "sqlite3", "ssl"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    modules = modules_of("completion", shell)
    assert not modules & {"grpc", "asyncio", "ssl", "sqlite3", "socket", "pyroute2", "logging"}


@pytest.mark.parametrize(
    "words",
    [
        ["net", "get"],
        ["subnets", "ls"],
        ["subnets", "ls", "-w", "simple"],
        ["watch", "--for", "10ms"],
    ],
    ids=" ".join,
)
def test_a_registry_in_a_file(words, tmp_path):
    registry = f"sqlite:{tmp_path}/r.db"
    ok("net", "init", "--network", "10.0.0.0/8", "--endpoints", registry)
    ok("reserve", "10.0.7.0/24", "192.168.6.7", "--yes", "--endpoints", registry)
    modules = modules_of(*words, "--endpoints", registry)
    assert_only(modules, SQLITE | TABLE | {"random", "bisect", "unicodedata"})
    assert "tabulate" not in modules or "-w" not in words
    assert not modules & {"socket", "ssl", "selectors"}


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize(
    "words",
    [
        ["net", "get"],
        ["subnets", "ls"],
        ["subnets", "ls", "-w", "json"],
        ["watch", "--for", "10ms"],
    ],
    ids=" ".join,
)
def test_etcd_over_the_gateway(words, etcd):
    modules = modules_of(*words, env={"FLANCTL_ENDPOINTS": etcd})
    assert_only(modules, GATEWAY | TABLE)
    assert not modules & {"ssl", "sqlite3"}


@pytest.mark.needs("etcd34")
def test_capacity_asks_the_kernel_for_its_own_address_and_no_more(etcd, tmp_path):
    file = f"sqlite:{tmp_path}/r.db"
    ok("net", "init", "--network", "10.0.0.0/8", "--endpoints", file)
    for endpoint in (file, etcd):
        modules = modules_of("capacity", "--endpoints", endpoint)
        assert not modules & {"grpc", "etcd3", "asyncio", "ssl", "flanctl.agent.daemon"}


@pytest.mark.needs("etcd34")
def test_grpc_is_loaded_where_the_gateway_is_off(grpc_only):
    """The list can tell: what the tests above forbid shows where it is used."""
    modules = modules_of("subnets", "ls", env={"FLANCTL_ENDPOINTS": grpc_only})
    assert {"grpc", "grpc._cython.cygrpc", "etcd3"} <= modules
    assert not modules & {"pyroute2", "sqlite3"}


def test_it_tells_only_when_asked():
    assert run("version").err == ""

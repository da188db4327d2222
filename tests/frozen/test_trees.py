"""Copied into a Debian tree that has no Python, `scp` is the whole installation."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from flanctl.demo.hosts import Lab
from tests.support.capabilities import frozen_executable
from tests.support.deadline import until
from tests.support.debian_tree import ENVIRONMENT, Tree
from tests.support.etcd import Cluster

pytestmark = [pytest.mark.needs("frozen", "debian-tree", "tun"), pytest.mark.timeout(300)]

SUITES = {"bookworm": "2.36", "bullseye": "2.31"}
"""With their glibc. buster and older have left Debian's mirrors for its archive, which is not asked here."""


@pytest.fixture(scope="module", params=SUITES)
def tree(request, tmp_path_factory):
    try:
        made = Tree.unpack(tmp_path_factory.mktemp("tree") / request.param, request.param)
    except AssertionError as why:
        if request.param == "bookworm":
            raise
        pytest.skip(f"the mirror of this machine has no {request.param}: {str(why).splitlines()[-1]}")
    shutil.copy2(frozen_executable(), made / "usr/bin/flanctl")
    yield made
    shutil.rmtree(made.root)


def test_it_is_a_tree_without_python_and_with_that_glibc(tree):
    assert not list((tree / "usr/bin").glob("python*"))
    assert not list((tree / "usr/lib").glob("python3*/os.py"))
    assert SUITES[tree.root.name] in tree.ok("ldd", "--version").partition("\n")[0]


def test_it_starts(tree):
    assert tree.ok("flanctl", "version").startswith("flanctl 0.")
    assert '"frozen": true' in tree.ok("flanctl", "version", "-w", "json")


def test_a_config_is_validated(tree):
    (tree / "tmp/config.json").write_text('{"Network": "10.0.0.0/8"}')
    assert "10.0.0.0/8" in tree.ok("flanctl", "net", "validate", "/tmp/config.json")


def test_a_registry_in_a_file(tree):
    registry = ["--endpoints", "sqlite:/tmp/registry.db"]
    tree.ok("flanctl", "net", "init", "--network", "172.17.0.0/16", *registry)
    tree.ok("flanctl", "reserve", "172.17.7.0/24", "192.168.6.7", "--yes", *registry)
    assert "172.17.7.0/24" in tree.ok("flanctl", "subnets", "ls", *registry)
    assert "255" in tree.ok("flanctl", "capacity", *registry)
    tree.ok("flanctl", "unreserve", "192.168.6.7", "--yes", *registry)
    assert "172.17.7.0/24" not in tree.ok("flanctl", "subnets", "ls", *registry)


def test_the_scripts_place(tree):
    tree.ok("ln", "-sf", "flanctl", "/usr/bin/mk-docker-opts.sh")
    (tree / "run/subnet.env").write_text(
        "FLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    tree.ok("mk-docker-opts.sh", "-f", "/run/subnet.env", "-d", "/run/docker.env")
    assert "--bip=172.17.41.1/24" in (tree / "run/docker.env").read_text()


def start(host, tree, log, endpoints, *options):
    with log.open("wb") as stream:
        words = tree.command(
            "env", f"FLANCTL_ENDPOINTS={endpoints}", "flanctl", "agent", "--subnet-file", "/run/flannel/subnet.env", *options
        )  # fmt: skip
        return host.popen(words, env=ENVIRONMENT, stdout=stream, stderr=stream)


def wait_ready(process, log):
    until(lambda: " ready " in log.read_text() or process.poll() is not None, seconds=40, fail=False)
    assert re.search(r" ready +network=172.17.0.0/16", log.read_text()), log.read_text()


def test_agent_check_and_the_agent_itself(tree, tmp_path):
    log = tmp_path / "log"
    with Lab("tree") as lab:
        host = lab.add_host()
        registry = "sqlite:/tmp/agents.db"
        tree.ok("flanctl", "net", "init", "--network", "172.17.0.0/16", "--endpoints", registry)
        check = host.run(
            tree.command("flanctl", "agent", "--check", "--endpoints", registry), env=ENVIRONMENT, check=False
        )
        assert check.returncode == 0, check
        process = start(host, tree, log, registry)
        wait_ready(process, log)
        assert "172.17.0.0/16" in host.run(["ip", "route"]).stdout
        process.terminate()
        assert process.wait(10) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def bare(tree):
    """The tree without libstdc++."""
    aside = tree.root.with_name(f"{tree.root.name}-aside")
    aside.mkdir()
    moved = list(tree.root.glob("usr/lib/x86_64-linux-gnu/libstdc++.so*"))
    assert moved
    for path in moved:
        path.rename(aside / path.name)
    yield tree
    for path in moved:
        (aside / path.name).rename(path)
    aside.rmdir()


def in_host(host, *words):
    done = subprocess.run(
        host.command(list(words)), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.needs("etcd34")
def test_without_libstdcxx_all_works_over_the_gateway_and_where_that_is_off_it_is_named(bare, tmp_path):
    log = tmp_path / "log"
    with Lab("bare") as lab:
        host = lab.add_host()
        with Cluster(
            "3.4", folder=tmp_path / "etcd", host=str(host.address), prefix=host.command([])
        ) as cluster:
            endpoint = cluster.endpoints[0]
            for words in (["net", "init", "--network", "172.17.0.0/16"], ["subnets", "ls"], ["capacity"]):
                in_host(host, *bare.command("flanctl", *words, "--endpoints", endpoint))
            process = start(host, bare, log, endpoint)
            wait_ready(process, log)
            process.terminate()
            assert process.wait(10) == 0, log.read_text()
            assert "libstdc++" not in log.read_text()
        with Cluster(
            "3.4",
            folder=tmp_path / "off",
            host=str(host.address),
            prefix=host.command([]),
            extra=["--enable-grpc-gateway=false"],
        ) as cluster:
            ask = bare.command("flanctl", "capacity", "--endpoints", cluster.endpoints[0])
            done = subprocess.run(
                host.command(ask), env=ENVIRONMENT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 3, done
            assert "JSON gateway is off" in done.stderr
            assert "gRPC cannot be loaded (libstdc++.so.6" in done.stderr
    assert "Traceback" not in log.read_text()

"""What stands in the file, looked at from outside: glibc, size, the builder's traces, its list of parts."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess

import pytest
from checks import builder_traces

from tests.frozen.test_damage import layout  # noqa: F401  a fixture
from tests.support.capabilities import frozen_executable
from tests.support.frozen import ok

pytestmark = pytest.mark.needs("frozen")


def glibc_versions(path):
    done = subprocess.run(["objdump", "-T", path], capture_output=True, text=True, check=True)
    found = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(\d[\d.]*)", done.stdout)}
    assert found, f"{path} asks for no glibc at all: is it read rightly?"
    return found


@pytest.fixture(scope="module")
def cygrpc(layout, tmp_path_factory):  # noqa: F811
    offset, length = layout[0]["grpc._cython.cygrpc"]
    path = tmp_path_factory.mktemp("cygrpc") / "cygrpc.so"
    with frozen_executable().open("rb") as file:
        file.seek(offset)
        path.write_bytes(file.read(length))
    return path


@pytest.mark.needs("binutils")
def test_glibc_2_17_is_enough_for_the_program_and_for_cygrpc(cygrpc):
    assert max(glibc_versions(frozen_executable())) <= (2, 17)
    assert max(glibc_versions(cygrpc)) <= (2, 17)


@pytest.mark.needs("binutils")
def test_no_semaphore_is_the_c_librarys():
    """Its time-outs follow the wall clock, and half of ours with half of its would be none (waits.rs)."""
    done = subprocess.run(["objdump", "-T", frozen_executable()], capture_output=True, text=True, check=True)
    ours = {line.split()[-1] for line in done.stdout.splitlines() if " .text\t" in line}
    theirs = set(re.findall(r"\*UND\*.*\b(sem_\w+)", done.stdout))
    assert {"sem_init", "sem_post", "sem_timedwait"} <= ours
    assert theirs == set()


@pytest.mark.needs("binutils")
def test_what_it_needs_of_the_host(cygrpc):
    def needed(path):
        done = subprocess.run(["objdump", "-p", path], capture_output=True, text=True, check=True)
        return set(re.findall(r"NEEDED +(\S+)", done.stdout))

    of_glibc = {
        f"lib{name}" for name in ("c.so.6", "m.so.6", "dl.so.2", "pthread.so.0", "util.so.1", "rt.so.1")
    }
    loader = {"ld-linux-x86-64.so.2"}
    assert needed(frozen_executable()) <= of_glibc | loader
    assert needed(cygrpc) <= of_glibc | loader | {"libstdc++.so.6", "libgcc_s.so.1"}


@pytest.mark.needs("binutils")
def test_no_executable_stack_and_no_page_both_writable_and_executable(cygrpc):
    for path in (frozen_executable(), cygrpc):
        done = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if re.match(r" +(LOAD|GNU_STACK) ", line):
                assert not re.search(r" RWE ", line), line


def test_at_most_60_mb():
    assert frozen_executable().stat().st_size <= 60_000_000


def test_nothing_of_the_build_machine_is_in_it():
    """Folders, user, host and secrets of this machine (where it was built, in the usual run), and what such things look like."""
    content = frozen_executable().read_bytes()
    assert builder_traces(content) == []
    homes = set(re.findall(rb"/home/[\w.-]+|/root/\.[\w.-]+|/Users/[\w.-]+", content))
    assert homes <= {b"/home/user"}, "pyroute2's own example is the only one"
    for sign in (b"-----BEGIN RSA PRIVATE KEY-----\n", b"AKIA", b"ghp_"):
        assert not re.search(re.escape(sign) + rb"[A-Za-z0-9+/]{16,}", content)
    for sign in (b"/.cargo/registry/", b"/.rustup/", b"/.cache/", b"site-packages/grpc"):
        around = {
            content[found.start() - 40 : found.end() + 30] for found in re.finditer(re.escape(sign), content)
        }
        assert not {text for text in around if re.search(rb"/(home|root|Users|work)/", text)}


def test_the_list_of_parts_belongs_to_this_file():
    path = frozen_executable().with_name("flanctl.cdx.json")
    if not path.exists():
        pytest.skip(f"no {path} beside the file")
    document = json.loads(path.read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    digest = hashlib.sha256(frozen_executable().read_bytes()).hexdigest()
    assert document["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert path.with_name("flanctl.sha256").read_text() == f"{digest}  flanctl\n"
    parts = {part["name"]: part for part in document["components"]}
    for name in (
        "click",
        "etcd3",
        "grpcio",
        "protobuf",
        "pyroute2",
        "tabulate",
        "openssl",
        "sqlite3",
        "python3.11",
        "pyo3",
    ):
        assert parts[name]["version"]
    for part in parts.values():
        assert part["licenses"], part["name"]
    identities = [part["bom-ref"] for part in document["components"] if "bom-ref" in part]
    assert len(identities) == len(set(identities))


def test_version_tells_every_part():
    shown = json.loads(ok("version", "-w", "json"))
    text = json.dumps(shown)
    for name in ("revision", "python", "openssl", "sqlite", "etcd3", "grpc", "pyroute2", "rust"):
        assert name in text.lower(), name
    assert re.search(r"[0-9a-f]{40}", text), "the git revision"
    assert re.search(r"20\d\d-\d\d-\d\dT", text), "the date of the build"
    path = frozen_executable().with_name("flanctl.cdx.json")
    if path.exists():
        properties = json.loads(path.read_text())["metadata"]["component"]["properties"]
        assert properties[0]["value"] in text

"""Where it may write and what it may map: cygrpc is the one library that is loaded out of the file."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.frozen import NO_MEMFD, NO_WX, READ_ONLY, mounted, ok, run

pytestmark = [pytest.mark.needs("frozen", "root"), pytest.mark.timeout(60)]

LISTED = ["172.17.7.0/24"]
MEMFD_NOEXEC = Path("/proc/sys/vm/memfd_noexec")
FOLDERS = ("/run", "/dev/shm", "/tmp", "/var/tmp")


def test_the_surroundings_are_as_described(elsewhere):
    """What READ_ONLY promises the tests below: no file can be made that can be executed."""
    script = """
    touch /usr/local/here && exit 3
    for folder in /run /dev/shm /tmp /var/tmp; do
        printf '#!/bin/sh\\n' >$folder/it; chmod +x $folder/it; $folder/it && exit 4
    done
    exit 0
    """
    assert run("-c", script, exe="/bin/sh", prefix=mounted(READ_ONLY)).code == 0


def test_read_only_root_without_a_place_to_execute_from(elsewhere, tmp_path):
    assert ok("version", exe=elsewhere, prefix=mounted(READ_ONLY)).startswith("flanctl ")
    out = ok(
        "net", "validate", "-", exe=elsewhere, prefix=mounted(READ_ONLY), stdin='{"Network": "10.0.0.0/8"}'
    )
    assert "10.0.0.0/8" in out


@pytest.mark.needs("etcd34")
def test_read_only_root_loads_cygrpc_from_memory(elsewhere, grpc_only, ls):
    assert ls(grpc_only, exe=elsewhere, prefix=mounted(READ_ONLY)) == LISTED


@pytest.mark.needs("etcd34")
def test_read_only_root_over_the_gateway(elsewhere, etcd, ls):
    assert ls(etcd, exe=elsewhere, prefix=mounted(READ_ONLY)) == LISTED


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_memfd_noexec(level, grpc_only, ls):
    """The setting belongs to a pid namespace; at 2 no memfd can be executed and a file takes its place."""
    if not MEMFD_NOEXEC.exists():
        pytest.skip("this kernel has no vm.memfd_noexec (Linux 6.3)")
    before = MEMFD_NOEXEC.read_text()
    script = f'echo {level} >{MEMFD_NOEXEC}; exec "$@"'
    prefix = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-euc", script, "sh"]
    assert ls(grpc_only, prefix=prefix) == LISTED
    assert MEMFD_NOEXEC.read_text() == before


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize("place", FOLDERS)
def test_without_memfd_an_unlinked_file_in_the_first_folder_that_can(place, grpc_only, elsewhere, ls):
    """Kernels before 3.17, seccomp filters that do not know memfd_create. The other folders are noexec."""
    script = "mount -o remount,bind,ro /\n" + "".join(
        f"mount -t tmpfs {'' if folder == place else '-o noexec'} tmpfs {folder}\n" for folder in FOLDERS
    )
    prefix = [*NO_MEMFD, *mounted(f'{script} exec "$@"')]
    assert ls(grpc_only, exe=elsewhere, prefix=prefix) == LISTED


def _files():
    return {path for folder in FOLDERS for path in Path(folder).glob(".flanctl-*")}


@pytest.mark.needs("etcd34")
def test_without_memfd_no_file_stays(grpc_only, ls):
    before = _files()
    assert ls(grpc_only, prefix=NO_MEMFD) == LISTED
    assert _files() <= before


@pytest.mark.needs("etcd34")
def test_no_place_at_all_is_one_clear_error(grpc_only, elsewhere):
    """Only what needs cygrpc fails, with the places that were tried and why not."""
    prefix = [*NO_MEMFD, *mounted(READ_ONLY)]
    answer = run("subnets", "ls", exe=elsewhere, prefix=prefix, env={"FLANCTL_ENDPOINTS": grpc_only})
    assert answer.code not in {0, 1, 2}, answer
    assert answer.out == ""
    assert answer.err.startswith("flanctl subnets ls: ")
    for place in ("memory", *FOLDERS):
        assert re.search(rf"{place}: ", answer.err), answer.err
    assert ok("version", exe=elsewhere, prefix=prefix)


@pytest.mark.needs("etcd34")
def test_memory_deny_write_execute(etcd, grpc_only, ls):
    """cygrpc, OpenSSL and CPython run without a page that is or was writable and becomes executable."""
    probe = subprocess.run([*NO_WX, "true"], capture_output=True, text=True, check=False)
    if "prctl" in probe.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    for endpoint in (etcd, grpc_only):
        assert ls(endpoint, prefix=NO_WX) == LISTED


@pytest.mark.needs("etcd34")
def test_protect_system_strict(elsewhere, grpc_only, ls):
    """systemd's words for: all read-only but /dev, /proc, /sys; /tmp private."""
    script = 'mount -o remount,bind,ro /; mount -t tmpfs tmpfs /tmp; exec "$@"'
    assert ls(grpc_only, exe=elsewhere, prefix=[*NO_WX, *mounted(script)]) == LISTED


@pytest.mark.needs("etcd34")
def test_a_folder_for_libraries_that_belongs_to_somebody_else_is_no_danger(grpc_only, ls, tmp_path):
    """A file planted under a guessed name is never opened: O_EXCL and 64 random bits."""
    planted = Path("/run") / f".flanctl-{os.getpid()}-0"
    planted.write_text("not a library")
    try:
        assert ls(grpc_only, prefix=NO_MEMFD) == LISTED
        assert planted.read_text() == "not a library"
    finally:
        planted.unlink()

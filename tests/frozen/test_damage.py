"""A file that was cut off or altered, a kernel that is too old, a CPU of the baseline: one clear line, no crash."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from tests.support.capabilities import frozen_executable
from tests.support.frozen import ok, run

pytestmark = pytest.mark.needs("frozen")


@pytest.fixture(scope="module")
def layout():
    """Where the parts are: {name: (offset, length)}, and the size of the file (packaging/freeze/assemble.py)."""
    with frozen_executable().open("rb") as file:
        size = file.seek(-64, 2) + 64
        entries = struct.unpack("<Q", file.read(64)[40:48])[0]
        file.seek(size - 64 - 56 * entries)
        parts = {}
        for _ in range(entries):
            name, offset, length = struct.unpack("<40sQQ", file.read(56))
            parts[name.rstrip(b"\0").decode()] = (offset, length)
    return parts, size


@pytest.fixture
def copy(tmp_path):
    return shutil.copy2(frozen_executable(), tmp_path / "flanctl")


def assert_said(answer, path):
    """The one line and what to do about it, and nothing else."""
    first, second = answer.err.splitlines()
    assert first.startswith(f"flanctl: the file {path} is damaged: "), answer
    assert second == "try: copy it again and compare it with flanctl.sha256"
    assert (answer.code, answer.out) == (1, "")


CUTS = {
    "the last byte": lambda parts, size: size - 1,
    "half of the trailer": lambda parts, size: size - 32,
    "the trailer": lambda parts, size: size - 64,
    "the table": lambda parts, size: size - 64 - 56 * len(parts),
    "the last part": lambda parts, size: max(offset for offset, _ in parts.values()),
    "half": lambda parts, size: size // 2,
    "half of the modules": lambda parts, size: (
        sum(parts["packed-resources"]) - parts["packed-resources"][1] // 2
    ),
    "all parts": lambda parts, size: min(offset for offset, _ in parts.values()),
}


@pytest.mark.parametrize("what", CUTS)
def test_cut_off(what, layout, copy):
    with copy.open("r+b") as file:
        file.truncate(CUTS[what](*layout))
    assert_said(run("version", exe=copy), copy)


def test_cut_off_within_the_program_nothing_of_it_runs(layout, copy):
    """The kernel ends it before its first instruction, or has it read as a script: no line of ours is possible there."""
    parts, _ = layout
    program = min(offset for offset, _ in parts.values())
    for size in (program // 2, 4096, 64):
        with copy.open("r+b") as file:
            file.truncate(size)
        try:
            done = subprocess.run([copy, "version"], capture_output=True, check=False)
        except OSError as error:
            assert "Exec format error" in str(error)
        else:
            assert done.returncode in {-11, -7}
            assert (done.stdout, done.stderr) == (b"", b"")


def test_something_hangs_on_behind(copy):
    """`cat >>`, a transfer that resumed at the wrong place."""
    with copy.open("ab") as file:
        file.write(b"\0" * 100)
    assert_said(run("version", exe=copy), copy)


@pytest.mark.parametrize("beyond", [0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_page_of_the_modules_overwritten(beyond, layout, copy):
    """If the page is used it is told, if not the answer is the right one; never a crash, never a dump."""
    offset, length = layout[0]["packed-resources"]
    with copy.open("r+b") as file:
        file.seek(offset + int(length * beyond))
        file.write(b"\xff" * 4096)
    assert_told_or_right(run("version", exe=copy), copy)


def test_all_modules_overwritten(layout, copy):
    offset, length = layout[0]["packed-resources"]
    with copy.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x90" * length)
    assert_said(run("version", exe=copy), copy)


def test_one_bit_of_every_module_flipped(layout, copy):
    """Each 4096th byte: the code of whatever is imported is wrong somewhere."""
    offset, length = layout[0]["packed-resources"]
    with copy.open("r+b") as file:
        file.seek(offset)
        content = bytearray(file.read(length))
        for at in range(len(content) // 2, len(content), 512):
            content[at] ^= 0x10
        file.seek(offset)
        file.write(content)
    assert_told_or_right(run("net", "validate", "-", exe=copy, stdin='{"Network": "10.0.0.0/8"}'), copy)


@pytest.mark.parametrize("beyond", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_page_of_the_program_overwritten(beyond, layout, copy):
    end = min(offset for offset, _ in layout[0].values())
    with copy.open("r+b") as file:
        file.seek(int(end * beyond) & ~4095)
        file.write(b"\xcc\x0f\x0b\xff" * 1024)
    assert_told_or_right(run("version", exe=copy), copy)


def test_the_relocations_overwritten_the_dynamic_loader_ends_it(layout, copy):
    """They are read before the first instruction of ours: the words and the exit code are the loader's."""
    end = min(offset for offset, _ in layout[0].values())
    with copy.open("r+b") as file:
        file.seek(int(end * 0.1) & ~4095)
        file.write(b"\xcc\x0f\x0b\xff" * 1024)
    done = subprocess.run([copy, "version"], capture_output=True, check=False)
    assert (done.returncode in {127, -11, -7}, done.stdout) == (True, b"")


@pytest.mark.needs("etcd34")
@pytest.mark.parametrize("how", ["its head", "its code"])
def test_the_library_altered(how, layout, copy, grpc_only):
    offset, length = layout[0]["grpc._cython.cygrpc"]
    with copy.open("r+b") as file:
        file.seek(offset + (0 if how == "its head" else length // 2 & ~4095))
        file.write(b"\x0f\x0b" * (64 if how == "its head" else length // 8))
    answer = run("subnets", "ls", exe=copy, env={"FLANCTL_ENDPOINTS": grpc_only})
    assert (answer.code != 0, answer.out) == (True, "")
    assert "damaged" in answer.err
    assert ok("version", exe=copy).startswith("flanctl ")


def assert_told_or_right(answer, path):
    if answer.code:
        assert "is damaged: its content was altered" in answer.err, answer
        assert "try: copy it again and compare it with flanctl.sha256" in answer.err
    else:
        assert ("flanctl 0." in answer.out or "10.0.0.0/8" in answer.out, answer.err) == (True, "")


def test_an_old_kernel_is_told_by_its_number():
    answer = run("version", prefix=["setarch", "--uname-2.6"])
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.count("\n") == 1
    assert "this kernel is Linux 2.6." in answer.err
    assert "needs 3.10 or newer" in answer.err


@pytest.mark.needs("qemu-user")
@pytest.mark.parametrize("cpu", ["qemu64", "Opteron_G1", "Conroe"])
def test_a_cpu_of_the_baseline(cpu):
    """x86-64 as it was in 2003 (Opteron_G1: no SSSE3, no AVX) is all it asks for."""
    assert ok("version", prefix=["qemu-x86_64", "-cpu", cpu]).startswith("flanctl ")
    assert "10.0.0.0/8" in ok(
        "net", "validate", "-", prefix=["qemu-x86_64", "-cpu", cpu], stdin='{"Network": "10.0.0.0/8"}'
    )

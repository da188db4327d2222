"""What it is started with: environment, folder, descriptors, limits, user."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.capabilities import frozen_executable
from tests.support.frozen import NOBODY, ok, run

pytestmark = pytest.mark.needs("frozen")

CONFIG = '{"Network": "10.0.0.0/8"}'


def sh(script):
    return ["sh", "-euc", script, "sh"]


def test_without_any_environment_every_kind_of_command_works(tmp_path):
    registry = f"sqlite:{tmp_path}/r.db"
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry)
    assert "10.1.0.0/16" in ok("net", "get", "--endpoints", registry)
    assert "10.0.0.0/8" in ok("net", "validate", "-", stdin=CONFIG)
    assert "subnets" in ok("subnets", "--help")


def test_no_home(tmp_path):
    for home in ("", "/nonexistent", str(tmp_path / "file")):
        assert ok("version", env={"HOME": home}).startswith("flanctl ")


@pytest.mark.parametrize("kind", ["text", "code that ends the process"])
def test_pythons_variables_and_modules_in_the_current_folder_do_not_count(tmp_path, kind):
    trap = "this is not Python" if kind == "text" else "import os; os._exit(77)"
    for name in ("click", "os", "flanctl", "sitecustomize", "usercustomize", "encodings", "startup"):
        (tmp_path / f"{name}.py").write_text(trap)
    (tmp_path / "pyvenv.cfg").write_text("home = /nonexistent\n")
    variables = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": str(tmp_path),
        "PYTHONSTARTUP": str(tmp_path / "startup.py"),
        "PYTHONINSPECT": "1",
        "PYTHONVERBOSE": "1",
        "PYTHONDEBUG": "1",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONMALLOC": "nonsense",
        "PYTHONHASHSEED": "nonsense",
        "PYTHONPROFILEIMPORTTIME": "1",
        "PYTHONPLATLIBDIR": str(tmp_path),
        "PYTHONEXECUTABLE": "/nonexistent",
        "PYTHONUSERBASE": str(tmp_path),
    }
    for exe in (frozen_executable(), _beside(tmp_path)):
        assert ok("version", exe=exe, env=variables, cwd=tmp_path).startswith("flanctl 0.")
        assert "10.0.0.0/8" in ok("net", "validate", "-", exe=exe, env=variables, cwd=tmp_path, stdin=CONFIG)


def _beside(folder: Path) -> Path:
    """The executable in the folder of the traps: its own folder does not count either."""
    (folder / "flanctl").symlink_to(frozen_executable())
    return folder / "flanctl"


def test_a_current_folder_that_is_gone(tmp_path):
    assert ok(
        "version", prefix=sh(f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"')
    )


@pytest.mark.parametrize(
    "variables",
    [{}, {"LANG": "C"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LC_ALL": "de_DE.ISO-8859-1"}, {"LANG": "nonsense"}],
)  # fmt: skip
def test_utf8_whatever_the_locale(variables, tmp_path):
    registry = f"sqlite:{tmp_path}/wörld 岡.db"
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry, env=variables)
    ok("reserve", "10.1.7.0/24", "192.168.6.7", "--yes", "--endpoints", registry, env=variables)
    shown = json.loads(ok("subnets", "ls", "-w", "json", "--endpoints", registry, env=variables))
    assert shown["subnets"][0]["subnet"] == "10.1.7.0/24"
    answer = run("net", "get", "--endpoints", f"sqlite:{tmp_path}/gibt’s nicht 岡", env=variables)
    assert "gibt’s nicht 岡" in answer.err


CLOSED = [descriptors for size in (1, 2, 3) for descriptors in itertools.combinations((0, 1, 2), size)]


@pytest.mark.parametrize("closed", CLOSED, ids=lambda closed: "".join(map(str, closed)))
def test_closed_standard_descriptors(closed, tmp_path):
    """What is written goes where it can go, no file gets what was meant for people, a lost answer is no success."""
    registry = tmp_path / "registry.db"
    shut = " ".join(f"{number}>&-" for number in closed)
    prefix = sh(f'exec "$@" {shut}')
    endpoint = f"sqlite:{registry}"
    lost = 1 in closed
    made = run("net", "init", "--network", "10.1.0.0/16", "--endpoints", endpoint, prefix=prefix)
    assert made.code == lost, made
    answer = run("net", "get", "--endpoints", endpoint, prefix=prefix)
    assert (answer.code, "10.1.0.0/16" in answer.out) == (lost, not lost), answer
    assert ("cannot write the answer" in answer.err) == (lost and 2 not in closed)
    wrong = run("net", "validate", "/nonexistent/file", prefix=prefix)
    assert (wrong.code != 0, "/nonexistent/file" in wrong.err) == (True, 2 not in closed), wrong
    reading = run("net", "validate", "-", stdin=CONFIG, prefix=prefix)
    assert (reading.code == 0) == (0 not in closed and not lost), reading
    content = registry.read_bytes()
    assert content.startswith(b"SQLite format 3\0")
    assert b"FLANNEL" not in content


@pytest.mark.parametrize("limit", [64, 16])
def test_few_descriptors(limit, tmp_path):
    registry = f"sqlite:{tmp_path}/r.db"
    prefix = ["prlimit", f"--nofile={limit}"]
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry, prefix=prefix)
    assert "10.1.0.0/16" in ok("net", "get", "--endpoints", registry, prefix=prefix)


@pytest.mark.needs("etcd34")
def test_few_descriptors_with_grpc(grpc_only, ls):
    assert ls(grpc_only, prefix=["prlimit", "--nofile=64"]) == ["172.17.7.0/24"]


@pytest.fixture
def memory_group():
    """`sh` words that put a command into a memory cgroup (v1 or v2) of 128 MB, and its peak."""
    base = next(
        (
            path
            for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
            if (path / "memory.limit_in_bytes").exists()
            or (
                (path / "cgroup.controllers").exists()
                and "memory" in (path / "cgroup.controllers").read_text()
            )
        ),
        None,
    )
    if base is None or os.geteuid() != 0:
        pytest.skip("needs root and a memory cgroup")
    group = base / f"flanctl-test-{os.getpid()}"
    group.mkdir()
    v1 = (group / "memory.limit_in_bytes").exists()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(128 << 20))
    yield (
        sh(f'echo $$ >{group}/cgroup.procs; exec "$@"'),
        group / ("memory.max_usage_in_bytes" if v1 else "memory.peak"),
    )
    group.rmdir()


def test_128_mb_of_memory(memory_group, tmp_path):
    prefix, peak = memory_group
    registry = f"sqlite:{tmp_path}/r.db"
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry, prefix=prefix)
    assert "10.1.0.0/16" in ok("net", "get", "--endpoints", registry, prefix=prefix)
    assert ok("version", prefix=[*prefix, *NOBODY])
    assert int(peak.read_text()) < 128 << 20


@pytest.mark.needs("etcd34")
def test_128_mb_of_memory_over_etcd(etcd, grpc_only, memory_group, ls):
    """cygrpc's 17 MB in a memfd count as memory of the group."""
    prefix, _ = memory_group
    for endpoint in (etcd, grpc_only):
        assert ls(endpoint, prefix=prefix) == ["172.17.7.0/24"]


@pytest.mark.parametrize("limit", ["--as", "--data"])
def test_128_mb_of_address_space(limit, tmp_path):
    """Stricter than what is promised: RLIMIT_AS counts the mapped file as well."""
    prefix = ["prlimit", f"{limit}={128 << 20}"]
    assert ok("version", prefix=prefix)
    assert "10.0.0.0/8" in ok("net", "validate", "-", stdin=CONFIG, prefix=prefix)


@pytest.mark.needs("root")
def test_an_ordinary_user(elsewhere, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(path.stat().st_mode | 0o111)
    registry = f"sqlite:{folder}/r.db"
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry, exe=elsewhere, prefix=NOBODY)
    assert "10.1.0.0/16" in ok("net", "get", "--endpoints", registry, exe=elsewhere, prefix=NOBODY)


@pytest.mark.needs("root", "etcd34")
def test_an_ordinary_user_over_grpc(elsewhere, grpc_only, ls):
    assert ls(grpc_only, exe=elsewhere, prefix=NOBODY) == ["172.17.7.0/24"]


def test_executable_but_not_readable(elsewhere):
    """The kernel lets it run; its own end cannot be read. One line that says so."""
    elsewhere.chmod(0o711)
    try:
        answer = run("version", exe=elsewhere, prefix=NOBODY)
        assert answer.code == 1
        assert "Permission denied" in answer.err
    finally:
        elsewhere.chmod(0o755)


def test_a_host_without_proc_is_told(elsewhere):
    answer = run(
        "version",
        exe=elsewhere,
        prefix=["unshare", "--mount", "sh", "-c", 'umount -l /proc; exec "$@"', "sh"],
    )
    assert answer.code == 1
    assert "/proc" in answer.err


def test_an_interrupt_is_said_and_cleaned_up_after(tmp_path):
    """Ctrl-C arrives as KeyboardInterrupt, as under any Python; 130 is what a shell expects of it."""
    registry = f"sqlite:{tmp_path}/r.db"
    ok("net", "init", "--network", "10.1.0.0/16", "--endpoints", registry)
    with subprocess.Popen(
        [frozen_executable(), "watch", "--endpoints", registry],
        env={},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        assert "listed" in watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, said = watch.communicate(timeout=20)
    assert (watch.returncode, said.splitlines()[-1]) == (130, "interrupted")

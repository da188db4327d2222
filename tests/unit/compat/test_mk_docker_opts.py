"""mk-docker-opts.sh by name: what the real script did under dash, byte for byte, and what is ours on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flanctl.compat import mk_docker_opts
from tests.support.cli import program
from tests.unit.model.vectors import load

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = "mk-docker-opts.sh"
ALL = load("mk-docker-opts.json")["vectors"]
RUNS = [run for run in ALL if run["shell"] == "dash"]
NOTE = (
    "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
)
NOTE_FILE = (
    'DOCKER_OPT_BIP="--bip=172.17.41.1/24"\nDOCKER_OPT_IPMASQ="--ip-masq=true"\nDOCKER_OPT_MTU="--mtu=1472"\n'
    'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'
)


@dataclass(frozen=True)
class Ended:
    code: int
    out: bytes
    err: str


class Script:
    """Runs one command line: in this process, or as the file FLANCTL_EXE names when that is under test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capture: Any) -> None:
        self.folder = folder
        self.options = folder / "docker"
        self._monkeypatch = monkeypatch
        self._capture = capture

    def run(self, *words: str, env: dict[str, str] | None = None, process: bool = False) -> Ended:
        if process or "FLANCTL_EXE" in os.environ:
            done = subprocess.run(
                [*program(SCRIPT), *words],
                env={"PATH": os.environ["PATH"], **(env or {})},
                capture_output=True,
                check=False,
                cwd=self.folder,
            )
            err = done.stderr.decode(errors="surrogateescape").replace(*program(SCRIPT), SCRIPT)
            return Ended(done.returncode, done.stdout, err)
        with self._monkeypatch.context() as patch:
            patch.setattr(os, "environ", {"PATH": os.environ["PATH"], **(env or {})})
            patch.chdir(self.folder)
            code = mk_docker_opts.main([SCRIPT, *words])
        said = self._capture.readouterr()
        return Ended(code, said.out, said.err.decode(errors="surrogateescape"))

    def written(self) -> str | None:
        return self.options.read_bytes().decode() if self.options.exists() else None


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> Iterator[Script]:
    (tmp_path / "subnet.env").write_text(NOTE)
    yield Script(tmp_path, monkeypatch, capsysbinary)


def ours_on_purpose(run: dict[str, Any]) -> bool:
    """0.28.9's appended route check, and its 0 where nothing was written: we stay with 0.7.1's script."""
    appended = "Your routing table" in run["stderr"] or "cannot create" in run["stderr"]
    return run["version"] == "v0.28.9" and appended


def name_of(run: dict[str, Any]) -> str:
    return "-".join([run["version"], run["subnet_env_name"], *run["args"][4:], *run["process_env"]])


def test_the_vectors_are_all_there() -> None:
    assert len(RUNS) == 250
    assert sum(map(ours_on_purpose, RUNS)) == 4


@pytest.mark.parametrize("run", [run for run in RUNS if not ours_on_purpose(run)], ids=name_of)
def test_it_is_the_script_byte_for_byte(run: dict[str, Any], script: Script) -> None:
    subnet_file = script.folder / "subnet.env"
    subnet_file.unlink()
    if run["subnet_env"] is not None:
        subnet_file.write_bytes(run["subnet_env"].encode())
    if run["existing_docker_env"] is not None:
        script.options.write_text(run["existing_docker_env"])
    done = script.run(
        *(word.replace("$TMP", str(script.folder)) for word in run["args"]), env=run["process_env"]
    )
    # Whoever recorded the runs read stderr as text: CR LF became LF.
    assert done.err.replace("\r\n", "\n").replace(str(script.folder), "$TMP") == run["stderr"]
    assert done.out.decode() == run["stdout"]
    assert done.code == run["exit_code"]
    untouched = run["existing_docker_env"]
    assert script.written() == (untouched if run["file_content"] is None else run["file_content"])


@pytest.mark.parametrize("run", [run for run in RUNS if ours_on_purpose(run)], ids=name_of)
def test_of_the_newer_script_we_leave_the_appended_check(run: dict[str, Any], script: Script) -> None:
    """The file is the same; a route to our own subnet is the agent's business, and a failed write ends with 2."""
    (script.folder / "subnet.env").write_text(run["subnet_env"])
    done = script.run(*(word.replace("$TMP", str(script.folder)) for word in run["args"]))
    assert script.written() == run["file_content"]
    assert done.code == (2 if "cannot create" in run["stderr"] else 0)


def test_the_deployment_notes_line_as_a_process(script: Script) -> None:
    done = script.run(
        "-f", "subnet.env", "-k", "DOCKER_NETWORK_OPTIONS", "-d", str(script.options), process=True
    )
    assert (done.code, done.out, done.err) == (0, b"", "")
    assert script.written() == NOTE_FILE


@pytest.mark.parametrize(
    ("words", "content"),
    [
        (["-kX", "-c"], 'X=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'),
        (["-ckX"], 'X=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'),
        (["-cm", "-kX"], 'X=" --bip=172.17.41.1/24 --mtu=1472"\n'),
        (["-cmk", "X"], 'X=" --bip=172.17.41.1/24 --mtu=1472"\n'),
        (["-c", "--", "-kX"], 'DOCKER_OPTS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'),
        (["-c", "-", "-kX"], 'DOCKER_OPTS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'),
        (["-c", "", "-kX"], 'DOCKER_OPTS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'),
        (["-k", "-c", "-c"], None),
    ],
)
def test_getopts(words: list[str], content: str | None, script: Script) -> None:
    done = script.run("-fsubnet.env", "-ddocker", *words)
    assert script.written() == content
    assert done.code == (0 if content else 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-z"], "Illegal option -z"),
        (["-iz"], "Illegal option -z"),
        (["--help"], "Illegal option --"),
        (["-:"], "Illegal option -:"),
        (["-k"], "No arg for -k option"),
        (["-if"], "No arg for -f option"),
        (["-h"], SCRIPT + " [-f"),
        (["-i?"], SCRIPT + " [-f"),
    ],
)
def test_a_bad_word_is_usage_and_leaves_the_file(words: list[str], says: str, script: Script) -> None:
    script.options.write_text("OLD\n")
    done = script.run("-f", "subnet.env", "-d", "docker", *words)
    assert done.code == 1
    assert done.err.startswith(says)
    assert done.err.endswith("(useful for older Docker version)\n\n")
    assert script.written() == "OLD\n"


@pytest.mark.parametrize(
    "text",
    [
        "FLANNEL_MTU=$(reboot)\n",
        "FLANNEL_MTU=`reboot`\n",
        "FLANNEL_MTU=$X\n",
        "reboot\n",
        "FLANNEL_MTU=1; reboot\n",
        "FLANNEL_MTU='1\n",
        "if true; then X=1; fi\n",
        "FLANNEL_MTU=1\0\n",
        "DOCKER_OPT_X='a\\\\b'\n",
        "DOCKER_OPT_X='*'\n",
        "DOCKER_OPT_X='--log-opt $(reboot)'\n",
        "A=" + "1" * 70_000 + "\n",
    ],
    ids=lambda text: text[:30],
)
def test_what_needs_a_shell_is_refused_in_one_line_and_nothing_is_written(text: str, script: Script) -> None:
    (script.folder / "subnet.env").write_text(text)
    script.options.write_text("OLD\n")
    done = script.run("-f", "subnet.env", "-d", "docker")
    assert done.code == 1
    assert done.err.startswith(f"{SCRIPT}: ")
    assert done.err.count("\n") == 1
    assert script.written() == "OLD\n"


@pytest.mark.parametrize("key", ["", "A B", "1", "A-B", "$X"])
def test_a_key_that_is_no_name_is_refused(key: str, script: Script) -> None:
    done = script.run("-f", "subnet.env", "-d", "docker", "-k", key)
    assert done.code == 1
    assert "is not a variable name" in done.err
    assert script.written() is None


def test_a_pattern_that_no_file_matches_stays_as_it_is(script: Script) -> None:
    done = script.run(
        "-f", "subnet.env", "-d", "docker", "-i", env={"DOCKER_OPT_X": "--log-opt=tag=[{{.Name}}]"}
    )
    assert done.code == 0
    assert 'DOCKER_OPT_X="--log-opt=tag=[{{.Name}}]"\n' in (script.written() or "")


def test_undecodable_bytes_pass_through(script: Script) -> None:
    (script.folder / "subnet.env").write_bytes(b"DOCKER_OPT_X=--label=\xff\xfe\n")
    assert script.run("-f", "subnet.env", "-d", "docker", "-i").code == 0
    assert script.options.read_bytes() == b'DOCKER_OPT_X="--label=\xff\xfe"\n'


def test_a_link_stays_one_and_the_mode_stays(script: Script) -> None:
    real = script.folder / "real"
    real.write_text("OLD\n")
    real.chmod(0o640)
    script.options.symlink_to(real)
    assert script.run("-f", "subnet.env", "-d", "docker", "-c").code == 0
    assert script.options.is_symlink()
    assert real.read_text().startswith("DOCKER_OPTS=")
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(entry.name for entry in script.folder.iterdir()) == ["docker", "real", "subnet.env"]


@pytest.mark.needs("root", "netns")
def test_a_file_that_is_a_mount_is_written_in_place(script: Script) -> None:
    """As `ReadWritePaths=/run/flannel/docker` makes it: it cannot be replaced, only written."""
    script.options.write_text("OLD" * 100)
    inode = script.options.stat().st_ino
    words = " ".join([*program(SCRIPT), "-f subnet.env -d docker -k DOCKER_NETWORK_OPTIONS"])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount --bind docker docker && exec {words}"],
        cwd=script.folder,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert script.written() == NOTE_FILE
    assert script.options.stat().st_ino == inode
    assert sorted(entry.name for entry in script.folder.iterdir()) == ["docker", "subnet.env"]


def test_a_device_is_written_to_and_a_full_one_ends_with_2(script: Script) -> None:
    done = script.run("-f", "subnet.env", "-d", "/dev/stdout", "-c", process=True)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(b'DOCKER_OPTS=" --bip')
    done = script.run("-f", "subnet.env", "-d", "/dev/full", "-i")
    assert done.code == 2
    assert "cannot create /dev/full: No space left on device" in done.err
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nodir/docker", "Directory nonexistent"),
        ("subnet.env/x", "Directory nonexistent"),
        ("", "Directory nonexistent"),
        (".", "Is a directory"),
    ],
)
def test_a_write_that_fails_never_ends_with_0(path: str, why: str, script: Script) -> None:
    """The script's own answer to -i is 0 then, because its last `if` has nothing to do."""
    done = script.run("-f", "subnet.env", "-d", path, "-i")
    assert done.code == 2
    assert done.err == "".join(
        f"{SCRIPT}: {line}: cannot create {path}: {why}\n" for line in (86, 94, 94, 94)
    )


def test_a_missing_or_odd_subnet_file_counts_as_empty(script: Script) -> None:
    for path in ("nosuch", ".", "/dev/null", ""):
        assert script.run("-f", path, "-d", "docker", "-c").code == 0
        assert script.written() == 'DOCKER_OPTS=""\n'


TEXT = st.text(st.sampled_from("ab '\"$\\*?=-\n\t;#~ÿ1[:/"), max_size=6)


@given(
    words=st.lists(
        st.sampled_from(["-i", "-c", "-m", "-ic", "-k", "-kX", "--", "x", "-z", "-h", "-?", ""]), max_size=4
    ),
    environment=st.dictionaries(
        st.sampled_from(
            ["DOCKER_OPT_A", "DOCKER_OPTS", "X", "FLANNEL_MTU", "FLANNEL_IPMASQ", "X_DOCKER_OPT_"]
        ),
        TEXT,
    ),
    subnet_env=TEXT | st.just(NOTE) | TEXT.map("DOCKER_OPT_B={}\n".format),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_it_ends_with_0_1_or_2_and_writes_all_or_nothing(
    words: list[str], environment: dict[str, str], subnet_env: str, script: Script
) -> None:
    (script.folder / "subnet.env").write_text(subnet_env)
    script.options.write_text("OLD\n")
    done = script.run("-f", "subnet.env", "-d", "docker", *words, env=environment)
    assert done.code in (0, 1)
    assert (script.written() == "OLD\n") == (done.code == 1)
    assert "Traceback" not in done.err


def test_it_loads_next_to_nothing() -> None:
    """The start is the interpreter's own time and a few milliseconds; each of these would be more than the rest."""
    code = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1])\n"
        "from flanctl.entry import run\n"
        "assert run(['mk-docker-opts.sh', '-d', '/dev/stdout', '-f', '/nosuch']) == 0\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(Path.cwd())], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {
        "re",
        "enum",
        "typing",
        "dataclasses",
        "click",
        "json",
        "pathlib",
        "tempfile",
        "logging",
        "shlex",
    }
    assert "flanctl.compat.mk_docker_opts" in loaded
    assert len(loaded) < 20

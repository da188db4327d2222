"""`make freeze` when something is wrong: what it says, that nothing half-made stays, that the next run goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import application
import checks
import cpython
import pytest
import sbom
from application import Build, Freeze
from layers import Cache, Failure, Layer, Surroundings
from sources import PACKAGES, Source, read_lock
from toolchain import Toolchain

from tests.support.deadline import until

DIGEST = "a" * 64
FREEZE = Path("packaging/freeze").absolute()


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache")
    made.logs.mkdir(parents=True)
    return made


@pytest.fixture
def tools(cache, tmp_path):
    (tmp_path / "tools/ziglang-0.13.0.dist-info").mkdir(parents=True)
    return Toolchain(tmp_path / "tools", cache, "key", "rustc 1.85.0 (0 2025-01-01)")


def git(root, *words):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", *words],
        cwd=root,
        check=True,
        capture_output=True,
    )


# ---- commands -------------------------------------------------------------------------------------------------------


def test_what_went_wrong_is_not_pushed_out_by_what_went_by(cache):
    """make prints its commands on stdout, the compiler's error stands on stderr, which comes first in time."""
    with pytest.raises(Failure) as caught:
        cache.run("tool", ["sh", "-c", "echo the error >&2; seq 100; exit 1"])
    assert "the error" in caught.value.details


def test_a_log_is_one_runs(cache, tmp_path):
    cache.run("tool", ["echo", "first"])
    cache.run("tool", ["echo", "second"])
    assert "first" in (cache.logs / "tool.log").read_text()
    assert "second" in (cache.logs / "tool.log").read_text()
    Cache(tmp_path / "cache").run("tool", ["echo", "third"])
    assert "first" not in (cache.logs / "tool.log").read_text()


def test_a_recipe_that_fails_is_named_by_its_layer(cache, tools, tmp_path):
    source = Layer("source-thing", ("1",), lambda folder: (folder / "tree").mkdir())
    script = tmp_path / "thing.sh"
    script.write_text("echo no rule >&2\nfalse\n")

    def build(folder):
        cpython._run_recipe(cache, tools, "thing", script, source, folder)

    with pytest.raises(Failure, match=r"^library-thing: .* ended with 1") as caught:
        cache.have(Layer("library-thing", ("1",), build))
    assert "no rule" in caught.value.details
    assert str(cache.logs / "library-thing.log") in caught.value.details[-1]
    script.write_text('echo done >"$OUT/made"\n')
    folder = cache.have(Layer("library-thing", ("1",), build))
    assert (folder / "made").read_text() == "done\n"
    assert not (folder / "work").exists()


# ---- killed ---------------------------------------------------------------------------------------------------------

SLOW = """
import sys
from pathlib import Path
from layers import Cache, Layer
cache = Cache(Path(sys.argv[1]))
wait = 'echo half >half; echo started; until [ -e ../go ]; do sleep 0.05; done; echo ended >>../order'
with cache.locked():
    cache.have(Layer("slow", ("1",), lambda folder: cache.run("slow", ["sh", "-c", wait], cwd=folder)))
"""
NEXT = """
import sys
from pathlib import Path
from layers import Cache, Layer
cache = Cache(Path(sys.argv[1]))
with cache.locked():
    (cache.folder / "slow/order").open("a").write("next\\n")
    cache.have(Layer("slow", ("1",), lambda folder: (folder / "whole").write_text("whole")))
"""


def test_the_next_freeze_waits_for_what_a_killed_one_left_running(tmp_path):
    """SIGKILL leaves make and its compilers at work in the very folder the next freeze would build in."""
    folder = tmp_path / "cache"

    def start(code):
        return subprocess.Popen(
            [sys.executable, "-c", code, folder],
            env={**os.environ, "PYTHONPATH": str(FREEZE)},
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = start(SLOW)
    half = until(lambda: next(folder.glob("slow/*.partial/half"), None), seconds=20)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    after = start(NEXT)
    assert "waiting for it" in after.stderr.readline()
    (folder / "slow/go").touch()
    _, said = after.communicate(timeout=20)
    assert after.returncode == 0, said
    assert (folder / "slow/order").read_text() == "ended\nnext\n"
    assert not half.exists()
    assert [path.read_text() for path in folder.glob("slow/*/whole")] == ["whole"]


# ---- the cache folder -----------------------------------------------------------------------------------------------


def freeze(*words, **environment):
    return subprocess.run(
        [sys.executable, FREEZE, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_space_in_the_caches_name_is_refused_before_anything_is_built(tmp_path):
    done = freeze("freeze", FLANCTL_CACHE=str(tmp_path / "a b"))
    assert done.returncode == 1
    assert "has a space in its name" in done.stderr
    assert done.stderr.endswith("try: name another one: FLANCTL_CACHE=/some/folder make freeze\n")
    assert not (tmp_path / "a b").exists()


@pytest.mark.needs("root")
def test_a_disk_that_is_full_from_the_start(tmp_path):
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        + ['mount -t tmpfs -o size=4k,nr_inodes=6 tmpfs "$1"; exec "$2" "$3" freeze --out "$1"', "sh"]
        + [tmp_path, sys.executable, FREEZE],
        env={**os.environ, "FLANCTL_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"the disk of {tmp_path}" in done.stderr or "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "freeze: try: " in done.stderr


@pytest.mark.needs("root")
def test_a_layer_that_cannot_be_read_is_told(tmp_path):
    """As an ordinary user finds one that root has built: here root without its right to read everything."""
    code = """
import sys
from pathlib import Path
from layers import Cache, Failure, Layer
cache = Cache(Path(sys.argv[1]))
try:
    cache.have(Layer("thing", ("1",), lambda folder: (folder / "file").write_text("made")))
except Failure as failure:
    sys.exit(f"{failure.what} | {failure.hint}")
"""
    made = Cache(tmp_path / "cache")
    made.logs.mkdir(parents=True)
    folder = made.have(Layer("thing", ("1",), lambda folder: (folder / "file").write_text("made")))
    os.chown(folder / "file", 65534, 65534)
    (folder / "file").chmod(0o600)
    done = subprocess.run(
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", code, made.folder],
        env={**os.environ, "PYTHONPATH": str(FREEZE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("thing: [Errno 13] Permission denied"), done.stderr
    assert "FLANCTL_CACHE=" in done.stderr


# ---- sources.lock ---------------------------------------------------------------------------------------------------


def lock_of(tmp_path, text):
    path = tmp_path / "sources.lock"
    path.write_text(text)
    return path


def test_a_lock_that_is_not_there(tmp_path):
    with pytest.raises(Failure, match=r"sources\.lock cannot be read") as caught:
        read_lock(tmp_path / "sources.lock")
    assert "git checkout" in caught.value.hint


@pytest.mark.parametrize(
    "line",
    [f"  {DIGEST} a.dsc", "curl 1", f"zlib 1\n  {DIGEST} ../a.dsc"],
    ids=["no name", "unknown", "elsewhere"],
)
def test_a_lock_of_something_else_is_refused(tmp_path, line):
    with pytest.raises(Failure, match="is not understood"):
        read_lock(lock_of(tmp_path, line + "\n"))


def test_a_source_without_a_description_is_not_whole(tmp_path):
    text = "".join(f"{name} 1\n  {DIGEST} {name}.tar\n  {DIGEST} {name}.dsc\n" for name in PACKAGES)
    assert set(read_lock(lock_of(tmp_path, text))) == set(PACKAGES)
    with pytest.raises(Failure, match=r"lacks zlib$"):
        read_lock(lock_of(tmp_path, text.replace("zlib.dsc", "zlib.txt")))


# ---- what the build is called ---------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    root = tmp_path / "repository"
    (root / "flanctl").mkdir(parents=True)
    (root / "flanctl/__init__.py").write_text("")
    (root / "README.md").write_text("")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_a_clean_tree_is_its_commit_and_a_changed_one_says_so(repository):
    clean = Build.of(repository)
    assert len(clean.revision) == 40
    (repository / "README.md").write_text("changed")
    assert Build.of(repository) == clean, "it is not in the file"
    (repository / "flanctl/new.py").write_text("")
    assert Build.of(repository).revision == clean.revision + "+changes", "frozen, though git does not know it"
    (repository / "flanctl/new.py").unlink()
    (repository / "flanctl/__init__.py").write_text("changed")
    assert Build.of(repository).revision == clean.revision + "+changes"


def test_an_unpacked_archive_does_not_take_the_revision_of_a_repository_around_it(repository):
    archive = repository / "unpacked"
    archive.mkdir()
    assert Build.of(archive).revision == "unknown"


def test_without_git_the_revision_is_unknown(repository, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert Build.of(repository).revision == "unknown"
    assert "version will say unknown" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["yesterday", "-1", "1.5", "9" * 20])
def test_a_date_that_is_none(repository, monkeypatch, text):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(Failure, match="SOURCE_DATE_EPOCH is") as caught:
        Build.of(repository)
    assert caught.value.hint == "unset SOURCE_DATE_EPOCH"


# ---- the result -----------------------------------------------------------------------------------------------------


class Small(Freeze):
    """A freeze whose layers are there: a small program, one library, a list of Python parts."""

    def __init__(self, cache, tools, folder):
        folder.mkdir()
        for path in ("stage", "libraries"):
            (folder / path).mkdir()
        self.folder = folder
        source = folder / "x.c"
        source.write_text("int main(void) { return 0; }\n")
        subprocess.run(["cc", "-o", folder / "program", source], check=True)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Dmain=f", "-o", folder / "libraries/lib.so", source], check=True
        )
        (folder / "packed-resources").write_bytes(b"modules")
        locked = {name: Source(name, "1", (("a.dsc", DIGEST),)) for name in PACKAGES}
        super().__init__(cache, tools, Path.cwd(), (folder, "key"), locked)

    def dependencies(self):
        return self.folder

    def native(self):
        return self.folder / "native.o", "key"

    def resources(self, dependencies):
        return self.folder

    def executable(self, resources, native):
        return self.folder / "program"


@pytest.fixture
def job(cache, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "GLIBC", "2.99")  # the compiler of this machine made the program
    monkeypatch.setattr(sbom, "_rust_parts", lambda job: [])
    return Small(cache, tools, tmp_path / "small")


def test_the_three_files(job, tmp_path):
    digest = application._once(job, tmp_path / "dist")
    assert sorted(os.listdir(tmp_path / "dist")) == ["flanctl", "flanctl.cdx.json", "flanctl.sha256"]
    assert (tmp_path / "dist/flanctl.sha256").read_text() == f"{digest}  flanctl\n"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Surroundings),
        (OSError(errno.EROFS, "Read-only file system"), Failure),
        (Failure("cargo metadata failed", hint="look"), Failure),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_result_that_is_not_finished_changes_nothing(job, tmp_path, monkeypatch, error, kind):
    """What stood there before stays, all three files of one build."""
    out = tmp_path / "dist"
    application._once(job, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    job.build = replace(job.build, revision="another")
    (job.folder / "packed-resources").write_bytes(b"other modules")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(application, "write_sbom", fail)
        with pytest.raises(kind):
            application._once(job, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    application._once(job, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before


def test_what_a_killed_freeze_left_beside_the_result_goes(job, tmp_path):
    (tmp_path / "dist/.new").mkdir(parents=True)
    (tmp_path / "dist/.new/flanctl").write_text("half")
    application._once(job, tmp_path / "dist")
    assert len(os.listdir(tmp_path / "dist")) == 3


def test_the_folder_that_cannot_be_written_is_named(job, tmp_path):
    (tmp_path / "dist").write_text("a file")
    with pytest.raises(Failure, match=rf"^result: cannot write to {tmp_path}/dist: ") as caught:
        application._once(job, tmp_path / "dist")
    assert caught.value.details == (), "no log is named that nobody wrote"


@pytest.fixture
def small_freeze(job, monkeypatch):
    """application.freeze over the small layers."""
    monkeypatch.setattr(application, "Freeze", lambda *_: job)

    def run(out, *, twice=True):
        application.freeze(job.cache, job.tools, job.root, (job.folder, "key"), job.locked, out, twice=twice)

    return run


def test_two_builds_that_are_the_same(small_freeze, cache, tmp_path, capsys):
    (cache.folder / "native").mkdir()
    small_freeze(tmp_path / "dist")
    assert "both builds are the same" in capsys.readouterr().err
    assert not (cache.folder / "first").exists()
    assert not (cache.folder / "native").exists(), "the second build began from nothing"


def test_of_two_builds_that_differ_both_can_be_looked_at(small_freeze, job, cache, tmp_path, monkeypatch):
    (cache.folder / "native").mkdir()
    (cache.folder / "native/first").write_text("")
    builds = iter(["one", "other"])

    def resources(dependencies):
        (job.folder / "packed-resources").write_text(next(builds))
        return job.folder

    monkeypatch.setattr(job, "resources", resources)
    with pytest.raises(Failure, match="the two builds differ") as caught:
        small_freeze(tmp_path / "dist")
    assert str(cache.folder / "first") in caught.value.hint
    assert (cache.folder / "first/native/first").exists()


# ---- cargo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "runs"), [("Could not resolve host", 1), ("No space left on device", 1), ("corrupt metadata", 2)]
)
def test_what_cargo_has_kept_is_dropped_only_where_that_can_help(job, tmp_path, says, runs):
    target = tmp_path / "target"
    target.mkdir()
    command = ["sh", "-c", f"echo run >>{tmp_path}/runs; echo '{says}' >&2; exit 1"]
    with pytest.raises(Failure):
        job._cargo("native", command, tmp_path, dict(os.environ), target)
    assert len((tmp_path / "runs").read_text().split()) == runs
    assert target.exists() == (runs == 1)


def test_cargo_is_told_to_watch_the_static_libraries(tmp_path):
    """pyo3 takes them in when it is compiled: without this a new OpenSSL would be named and the old one linked."""
    for name in ("libssl.a", "libz.a", "default_python_config.rs"):
        (tmp_path / name).write_text("")
    assert application._watched(Path("/steady"), tmp_path).decode().splitlines() == [
        "extra_build_script_line=cargo:rerun-if-changed=/steady/libssl.a",
        "extra_build_script_line=cargo:rerun-if-changed=/steady/libz.a",
    ]


# ---- traces of the builder ------------------------------------------------------------------------------------------


def test_a_host_with_an_ordinary_name_can_build(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    monkeypatch.setattr("getpass.getuser", lambda: "debian")
    assert checks.builder_traces(b"localhost debian") == []


def test_a_user_without_a_name_can_build(monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert checks.builder_traces(b"anything") == []


def test_the_cache_folder_is_a_trace(tmp_path):
    assert checks.builder_traces(f"x{tmp_path}/cargo".encode(), tmp_path) == ["the cache folder"]


# ---- the list of parts ----------------------------------------------------------------------------------------------


def test_only_crates_that_are_linked_are_parts():
    def node(name, **needs):
        deps = [{"pkg": need, "dep_kinds": [{"kind": kind}]} for need, kind in needs.items()]
        return {"id": name, "deps": deps}

    packages = {
        name: {"targets": [{"kind": ["proc-macro" if name == "macro" else "lib"]}]}
        for name in ("own", "linked", "deep", "tested", "built", "macro", "syn")
    }
    nodes = [
        node("own", linked=None, tested="dev", built="build", macro=None),
        node("linked", deep=None),
        node("macro", syn=None),
        *map(node, ("deep", "tested", "built", "syn")),
    ]
    listed = {"resolve": {"nodes": nodes}, "workspace_members": ["own"]}
    assert sbom._linked(listed, packages) == {"own", "linked", "deep"}


def test_rust_and_what_zig_links_are_parts(job):
    parts = {part["name"]: part for part in sbom._c_parts(job)}
    assert parts["libunwind"]["version"] == "of ziglang 0.13.0"
    assert set(PACKAGES) <= set(parts)


def test_a_debian_version_is_written_as_purls_want_it(job):
    job.locked = {"openssl": Source("openssl", "1:3.0.20-1~deb12u2+b1", ())}
    assert sbom._c_parts(job)[0]["purl"] == (
        "pkg:deb/debian/openssl@1:3.0.20-1~deb12u2%2Bb1?arch=source&distro=bookworm"
    )

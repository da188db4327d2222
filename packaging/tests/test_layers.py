"""The build cache: what is broken, half-written or of other inputs is built again, and a failure says how to go on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import layers
import pytest
from layers import Cache, Failure, Layer, text_of

from tests.support.deadline import until


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache")
    made.logs.mkdir(parents=True)
    return made


class Builds:
    """A layer whose builds are counted."""

    def __init__(self, name="thing", inputs=("1",), content="made"):
        self.times = 0
        self.content = content
        self.layer = Layer(name, inputs, self._build)

    def _build(self, folder):
        self.times += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(self.content)
        (folder / "link").symlink_to("sub/file")


def test_built_once(cache):
    builds = Builds()
    folder = cache.have(builds.layer)
    assert (folder / "sub/file").read_text() == "made"
    assert cache.taken["thing"] > 0
    assert cache.have(builds.layer) == folder
    assert builds.times == 1
    assert cache.taken["thing"] == 0.0


def test_other_inputs_are_another_layer(cache):
    one = cache.have(Builds(inputs=("1",)).layer)
    two = cache.have(Builds(inputs=("2",)).layer)
    assert one != two
    assert one.exists()
    assert Layer("a", ("b", "c"), print).key != Layer("a", ("bc",), print).key


def test_old_builds_go(cache):
    folders = [cache.have(Builds(inputs=(str(number),)).layer) for number in range(layers.KEPT)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 + age, 1000 + age))
    newest = cache.have(Builds(inputs=("new",)).layer)
    assert [folder.exists() for folder in (*folders, newest)] == [False, True, True, True]


def _change(folder):
    (folder / "sub/file").write_text("chan")


def _shorten(folder):
    os.truncate(folder / "sub/file", 1)


def _remove(folder):
    (folder / "sub/file").unlink()


def _add(folder):
    (folder / "more").write_text("")


def _relink(folder):
    (folder / "link").unlink()
    (folder / "link").symlink_to("/etc/passwd")


def _no_list(folder):
    (folder / layers.MANIFEST).unlink()


def _half_a_list(folder):
    os.truncate(folder / layers.MANIFEST, 10)


@pytest.mark.parametrize("harm", [_change, _shorten, _remove, _add, _relink, _no_list, _half_a_list])
def test_what_is_not_as_it_was_built_is_built_again(cache, harm, capsys):
    builds = Builds()
    harm(cache.have(builds.layer))
    folder = cache.have(builds.layer)
    assert builds.times == 2
    assert (folder / "sub/file").read_text() == "made"
    assert (folder / "link").readlink() == Path("sub/file")
    assert layers.damage(folder) is None
    assert "building it again" in capsys.readouterr().err


def test_what_an_interruption_left_is_not_used(cache):
    builds = Builds()
    partial = cache.folder / "thing" / f"{builds.layer.key}.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("half")
    folder = cache.have(builds.layer)
    assert not (folder / "half").exists()
    assert os.listdir(cache.folder / "thing") == [folder.name]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "interrupted while building the layer thing"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (Failure("it does not", hint="do it"), "it does not"),
    ],
)
def test_a_build_that_fails_leaves_nothing_and_the_next_one_works(cache, error, says):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(Failure) as caught:
        cache.have(Layer("thing", ("1",), build))
    assert says in caught.value.what
    assert caught.value.hint
    assert os.listdir(cache.folder / "thing") == []
    assert (cache.have(Builds().layer) / "sub/file").exists()


def test_a_bug_is_no_failure_but_leaves_nothing_either(cache):
    def build(folder):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cache.have(Layer("thing", ("1",), build))
    assert os.listdir(cache.folder / "thing") == []


@pytest.mark.needs("root")
def test_a_full_disk_is_told_by_its_folder_and_size(tmp_path):
    """A real one, of 64 kB, in a process of its own for the mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = """
import sys
from pathlib import Path
from layers import Cache, Failure, Layer
cache = Cache(Path(sys.argv[1]))
with cache.locked():
    try:
        cache.have(Layer("big", ("1",), lambda folder: (folder / "f").write_bytes(bytes(1 << 20))))
    except Failure as failure:
        print(failure.what, "|", failure.hint)
    try:
        cache.run("tool", ["sh", "-c", "head -c 1000000 /dev/zero >" + sys.argv[1] + "/f"])
    except Failure as failure:
        print(failure.what, "|", failure.hint)
"""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        + [f'mount -t tmpfs -o size=64k tmpfs {disk}; exec "$@"', "sh", sys.executable, "-c", code, disk],
        env={"PYTHONPATH": "packaging/freeze", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    for line, layer in ((first, "big"), (second, "tool")):
        assert line.startswith(f"{layer}: the disk of {disk} is full | make room")
        assert "run make freeze again" in line


def test_a_command_that_fails(cache):
    with pytest.raises(Failure, match=r"tool: `sh -c echo out; echo why >&2; exit 3` ended with 3") as caught:
        cache.run("tool", ["sh", "-c", "echo out; echo why >&2; exit 3"])
    assert "why" in caught.value.details
    assert str(cache.logs / "tool.log") in caught.value.details[-1]
    assert "why" in (cache.logs / "tool.log").read_text()


def test_only_the_failed_commands_own_output_is_shown(cache):
    cache.run("tool", ["echo", "earlier"])
    with pytest.raises(Failure) as caught:
        cache.run("tool", ["sh", "-c", "echo later >&2; exit 1"])
    assert "earlier" not in " ".join(caught.value.details)


def test_a_command_that_is_not_there(cache):
    with pytest.raises(Failure, match="there is no program flanctl-nosuch") as caught:
        cache.run("tool", ["flanctl-nosuch"])
    assert caught.value.hint == "scripts/need freeze"


@pytest.mark.needs("netns")
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "pip", "download", "--retries=0", "--timeout=2", "--no-deps", "-d", "FOLDER", "click"],
        ["curl", "-sS", "--max-time", "5", "http://registry.example/"],
    ],
    ids=["pip", "curl"],
)  # fmt: skip
def test_without_a_network(cache, tmp_path, command):
    """What the tool says of it is recognised, in a namespace that has none."""
    with pytest.raises(Failure, match="layer: something could not be fetched") as caught:
        cache.run(
            "layer", ["unshare", "--net", *(str(tmp_path) if word == "FOLDER" else word for word in command)]
        )
    assert caught.value.hint.startswith("check the network, then run make freeze again")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Failure, match="cannot write to the cache folder") as caught,
        Cache(tmp_path / "file" / "c").locked(),
    ):
        pass
    assert "FLANCTL_CACHE=" in caught.value.hint


def test_one_freeze_at_a_time(tmp_path, capsys):
    folder = tmp_path / "cache"
    order = []
    second = threading.Thread(target=lambda: _second(folder, order))
    with Cache(folder).locked():
        second.start()
        until(lambda: "waiting for it" in capsys.readouterr().err)
        order.append("first ends")
    second.join(10)
    assert order == ["first ends", "second"]


def _second(folder, order):
    with Cache(folder).locked():
        order.append("second")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_leaves_nothing_and_frees_the_lock(tmp_path, number):
    """make freeze's own way: python packaging/freeze turns SIGTERM into what Ctrl-C does."""
    code = """
import signal, sys, time
from pathlib import Path
from layers import Cache, Failure, Layer
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    cache.run("slow", ["sleep", "60"])
cache = Cache(Path(sys.argv[1]))
with cache.locked():
    try:
        cache.have(Layer("slow", ("1",), build))
    except Failure as failure:
        sys.exit(failure.what)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cache"],
        env={"PYTHONPATH": "packaging/freeze", "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "building\n"
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "interrupted while building the layer slow" in said
    assert os.listdir(tmp_path / "cache" / "slow") == []
    with Cache(tmp_path / "cache").locked():
        pass


def test_inputs_are_names_and_contents(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a").write_text("1")
    before = text_of(folder)
    (folder / "sub/a").write_text("2")
    changed = text_of(folder)
    (folder / "sub/a").rename(folder / "sub/b")
    renamed = text_of(folder)
    assert len({before, changed, renamed}) == 3
    assert all("in/sub/" in text for text in before)


@pytest.mark.needs("netns", "apt")
def test_without_a_network_apt_is_not_blamed_for_its_empty_lists(tmp_path):
    code = """
import sys
from pathlib import Path
from layers import Cache, Failure
from sources import Apt
cache = Cache(Path(sys.argv[1]))
cache.logs.mkdir(parents=True)
for ask in (lambda: Apt(cache).fetch("source-zlib", "zlib=1", cache.folder), lambda: Apt(cache).lock("zlib")):
    try:
        ask()
    except Failure as failure:
        print(failure.what, "|", failure.hint)
"""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", code, tmp_path / "cache"],
        env={"PYTHONPATH": "packaging/freeze", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fetched, locked = done.stdout.splitlines()
    assert fetched.startswith("source-zlib: something could not be fetched | check the network"), fetched
    assert locked.startswith("apt: something could not be fetched | check the network"), locked

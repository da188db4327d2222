"""`flanctl install` and `uninstall` on trees: what comes, what is kept, and that no moment is a bad one to be killed at."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import FlanctlError, Invalid
from flanctl.install import plan as plans
from flanctl.install.ledger import Ledger
from flanctl.install.places import Root
from flanctl.install.plan import plan
from tests.support.cli import flanctl

NAMES = ("usr/bin/flanneld", "usr/bin/flanneld-start", "usr/libexec/flannel/mk-docker-opts.sh")
DOCKER = "usr/lib/systemd/system/docker.service"
DROP_IN = "etc/systemd/system/docker.service.d/flanctl.conf"
DOCKER_TEXT = """[Service]
Type=notify
ExecStart=/usr/bin/dockerd -H fd:// \\
    --containerd=/run/containerd/containerd.sock
"""


def tree(folder, *, files=(), docker=DOCKER_TEXT):
    """A host's bones, with flannel's package as far as `files` says."""
    for name in ("usr/bin", "usr/lib/systemd/system", "etc/systemd/system", "var/lib"):
        (folder / name).mkdir(parents=True)
    if docker:
        (folder / DOCKER).write_text(docker)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"flannel's own {name}".encode())
        (folder / name).chmod(0o755)
    return folder


def picture(folder):
    """Everything below a folder: kinds, content, modes, owners and times of files."""
    seen = {}
    for base, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(base, name)
            about = os.lstat(path)
            kind, what = stat.S_IFMT(about.st_mode), ""
            if kind == stat.S_IFLNK:
                what = os.readlink(path)
            elif kind == stat.S_IFREG:
                what = (Path(path).read_bytes(), about.st_mtime_ns)
            mode = about.st_mode if kind != stat.S_IFLNK else 0
            seen[os.path.relpath(path, folder)] = (kind, mode, about.st_uid, what)
    return seen


def without_times(seen):
    return {
        name: (*rest, what[0] if isinstance(what, tuple) else what) for name, (*rest, what) in seen.items()
    }


def put(folder, *, as_flanneld=True):
    """What the command does after asking."""
    root = Root(folder)
    with Ledger.opened(root) as ledger:
        for step in plan(root, ledger, as_flanneld=as_flanneld).steps:
            if step.needed:
                ledger.put(step.place, root.look(step.place), step.wanted)


def take_back(folder):
    root = Root(folder)
    with Ledger.opened(root) as ledger:
        stays = [place for place in tuple(reversed(ledger.entries)) if not ledger.take_back(place)]
        ledger.remove_folders()
    return stays


# ---- what the commands do -------------------------------------------------------------------------------------------


def test_it_links_the_three_names_and_uninstall_restores_the_bytes(tmp_path):
    tree(tmp_path, files=NAMES)
    before = picture(tmp_path)
    done = flanctl("install", "--as-flanneld", "--yes", "--root", tmp_path)
    assert done.code == 0, done.err
    assert [os.readlink(tmp_path / name) for name in NAMES] == ["/usr/bin/flanctl"] * 3
    assert (tmp_path / "usr/bin/flanctl").exists()
    assert (
        "ExecStart=/usr/bin/flanneld-start $FLANNEL_OPTIONS"
        in (tmp_path / "etc/systemd/system/flanneld.service").read_text()
    )
    after = picture(tmp_path)

    again = flanctl("install", "--as-flanneld", "--yes", "--root", tmp_path)
    assert (again.code, again.out, again.err) == (0, "", "nothing to change: everything is in its place\n")
    assert picture(tmp_path) == after

    back = flanctl("uninstall", "--yes", "--root", tmp_path)
    assert back.code == 0, back.err
    assert picture(tmp_path) == before
    twice = flanctl("uninstall", "--yes", "--root", tmp_path)
    assert (twice.code, twice.err) == (0, "nothing to take back: no install is recorded here\n")
    assert picture(tmp_path) == before


def test_the_agent_s_own_unit_comes_where_no_package_brought_it(tmp_path):
    tree(tmp_path)
    put(tmp_path, as_flanneld=False)
    assert (tmp_path / "etc/systemd/system/flanctl-agent.service").is_file()
    assert not (tmp_path / "usr/bin/flanneld").exists()
    packaged = tree(tmp_path / "packaged")
    (packaged / "usr/lib/systemd/system/flanctl-agent.service").write_text("[Unit]\n")
    put(packaged, as_flanneld=False)
    assert not (packaged / "etc/systemd/system/flanctl-agent.service").exists()


def test_flannel_s_own_unit_stays_the_one(tmp_path):
    tree(tmp_path, files=(*NAMES, "usr/lib/systemd/system/flanneld.service"))
    done = flanctl("install", "--as-flanneld", "--yes", "--root", tmp_path)
    assert not (tmp_path / "etc/systemd/system/flanneld.service").exists()
    # Its operator gives docker the options; how, is not ours to say.
    assert not (tmp_path / DROP_IN).exists()
    assert "docker.service does not read /run/flannel/docker yet" in done.err


def test_docker_s_own_command_line_goes_into_the_drop_in(tmp_path):
    tree(tmp_path)
    put(tmp_path)
    lines = (tmp_path / DROP_IN).read_text().splitlines()
    command = "/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock $DOCKER_NETWORK_OPTIONS"
    assert lines[-2:] == ["ExecStart=", f"ExecStart={command}"]
    assert {"Wants=flanneld.service", "After=flanneld.service", "EnvironmentFile=/run/flannel/docker"} <= set(
        lines
    )


@pytest.mark.parametrize(
    ("docker", "wanted"),
    [
        ("[Service]\nEnvironmentFile=-/run/flannel/docker\nExecStart=/usr/bin/dockerd $X\n", None),
        ("[Service]\nExecStart=/usr/bin/dockerd-current $DOCKER_NETWORK_OPTIONS\n", []),
        (
            "[Service]\n#EnvironmentFile=/run/flannel/docker\nExecStart=/usr/bin/dockerd -D\n",
            ["/usr/bin/dockerd -D"],
        ),
        ("[Service]\nExecStart=/old\nExecStart=\nExecStart=/usr/bin/dockerd -D\n", ["/usr/bin/dockerd -D"]),
        ("", None),
    ],
)
def test_the_drop_in_holds_what_docker_s_unit_lacks(tmp_path, docker, wanted):
    tree(tmp_path, docker=docker)
    put(tmp_path)
    if wanted is None:
        assert not (tmp_path / DROP_IN).exists()
        return
    commands = [
        line.removeprefix("ExecStart=").removesuffix(" $DOCKER_NETWORK_OPTIONS")
        for line in (tmp_path / DROP_IN).read_text().splitlines()
        if line.startswith("ExecStart=/")
    ]
    assert commands == wanted


def test_dry_run_shows_the_steps_and_changes_nothing(tmp_path):
    tree(tmp_path, files=NAMES[:1])
    before = picture(tmp_path)
    shown = flanctl("install", "--as-flanneld", "--dry-run", "--root", tmp_path, "-w", "json")
    steps = json.loads(shown.out)["steps"]
    assert {"action": "link", "path": f"{tmp_path}/usr/bin/flanneld", "now": "a file", "then": "a link to /usr/bin/flanctl"} in steps  # fmt: skip
    assert picture(tmp_path) == before
    put(tmp_path)
    after = picture(tmp_path)
    shown = flanctl("uninstall", "--dry-run", "--root", tmp_path, "-w", "simple")
    assert f"restore\t{tmp_path}/usr/bin/flanneld\ta link to /usr/bin/flanctl\ta file\n" in shown.out
    assert picture(tmp_path) == after


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_without_a_terminal_and_yes_nothing_happens(tmp_path, command):
    tree(tmp_path)
    if command == "uninstall":
        put(tmp_path)
    before = picture(tmp_path)
    done = flanctl(command, "--root", tmp_path)
    assert done.code == 2
    assert "there is no terminal to ask on, nothing was changed" in done.err
    assert picture(tmp_path) == before


def test_a_daemon_json_that_dockerd_would_refuse_is_said(tmp_path):
    tree(tmp_path)
    (tmp_path / "etc/docker").mkdir()
    (tmp_path / "etc/docker/daemon.json").write_text('{"bip": "10.0.0.1/24"}')
    done = flanctl("install", "--dry-run", "--root", tmp_path)
    assert "/etc/docker/daemon.json has bip" in done.err


# ---- odd hosts ------------------------------------------------------------------------------------------------------


def test_a_link_to_itself_is_replaced_and_comes_back(tmp_path):
    tree(tmp_path)
    for name in (*NAMES[:2], "usr/bin/flanctl"):
        (tmp_path / name).symlink_to(os.path.basename(name))
    before = picture(tmp_path)
    put(tmp_path)
    assert os.readlink(tmp_path / NAMES[0]) == "/usr/bin/flanctl"
    assert (tmp_path / "usr/bin/flanctl").exists()
    take_back(tmp_path)
    assert picture(tmp_path) == before


def test_a_program_that_bears_flanneld_s_name_is_not_linked_to_itself(tmp_path):
    tree(tmp_path, files=NAMES[:1])
    (tmp_path / "usr/bin/flanctl").symlink_to("flanneld")
    put(tmp_path)
    assert os.readlink(tmp_path / NAMES[0]) == "/usr/bin/flanctl"
    assert os.readlink(tmp_path / "usr/bin/flanctl") != "flanneld"
    assert (tmp_path / "usr/bin/flanctl").exists()


@pytest.mark.parametrize(("target", "said"), [("/usr/libexec", "leads out of"), ("flannel", "in a circle")])
def test_a_folder_that_leads_elsewhere_is_refused_before_anything_changes(tmp_path, target, said):
    tree(tmp_path)
    (tmp_path / "usr/libexec").mkdir()
    (tmp_path / "usr/libexec/flannel").symlink_to(target)
    before = picture(tmp_path)
    done = flanctl("install", "--as-flanneld", "--yes", "--root", tmp_path)
    assert done.code == 6
    assert said in done.err
    assert picture(tmp_path) == before


def test_a_folder_at_a_name_is_refused_before_anything_changes(tmp_path):
    tree(tmp_path)
    (tmp_path / NAMES[1]).mkdir()
    before = picture(tmp_path)
    done = flanctl("install", "--as-flanneld", "--yes", "--root", tmp_path)
    assert done.code == 6
    assert "neither a file nor a link" in done.err
    assert picture(tmp_path) == before


def test_what_somebody_put_there_since_stays_and_the_rest_goes_back(tmp_path):
    tree(tmp_path, files=NAMES)
    put(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[0]).write_bytes(b"yum reinstall flannel")
    done = flanctl("uninstall", "--yes", "--root", tmp_path)
    assert done.code == 0
    assert f"{tmp_path}/usr/bin/flanneld was changed since by somebody else" in done.err
    assert (tmp_path / NAMES[0]).read_bytes() == b"yum reinstall flannel"
    assert (tmp_path / NAMES[1]).read_bytes() == b"flannel's own usr/bin/flanneld-start"


def test_an_upgrade_of_flannel_between_two_installs_is_what_comes_back(tmp_path):
    tree(tmp_path, files=NAMES)
    put(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[0]).write_bytes(b"flannel 0.7.2")
    put(tmp_path)
    assert os.readlink(tmp_path / NAMES[0]) == "/usr/bin/flanctl"
    take_back(tmp_path)
    assert (tmp_path / NAMES[0]).read_bytes() == b"flannel 0.7.2"


def test_a_link_of_ours_that_was_deleted_does_not_cost_the_original(tmp_path):
    tree(tmp_path, files=NAMES)
    before = picture(tmp_path)
    put(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    put(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    take_back(tmp_path)
    assert picture(tmp_path) == before


def test_a_ledger_that_cannot_be_read_stops_both_and_says_where_the_files_are(tmp_path):
    tree(tmp_path, files=NAMES)
    put(tmp_path)
    ledger = tmp_path / "var/lib/flanctl/install/ledger.json"
    for text in ("", "{", "[]", '{"form": 9}', '{"form": 1, "places": {"/x": {}}, "made": []}'):
        ledger.write_text(text)
        before = picture(tmp_path)
        for command in (("install", "--as-flanneld"), ("uninstall",)):
            done = flanctl(*command, "--yes", "--root", tmp_path)
            assert (done.code, "cannot be understood" in done.err) == (6, True), done
        assert picture(tmp_path) == before


def test_one_host_has_one_of_the_two(tmp_path):
    tree(tmp_path)
    put(tmp_path)
    before = picture(tmp_path)
    done = flanctl("install", "--yes", "--root", tmp_path)
    assert done.code == 5
    assert "an earlier install has put flanneld.service here" in done.err
    assert picture(tmp_path) == before


def test_two_at_once_do_not_mix(tmp_path):
    tree(tmp_path)
    with Ledger.opened(Root(tmp_path)):
        done = flanctl("install", "--yes", "--root", tmp_path)
    assert done.code == 5
    assert "another flanctl install or uninstall is at work" in done.err


def test_a_place_that_cannot_be_written_is_said_and_the_next_run_goes_on(tmp_path, monkeypatch):
    tree(tmp_path, files=NAMES)
    before = picture(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", full)
        with pytest.raises(FlanctlError, match="No space left on device"):
            put(tmp_path)
    put(tmp_path)
    assert os.readlink(tmp_path / NAMES[2]) == "/usr/bin/flanctl"
    take_back(tmp_path)
    assert picture(tmp_path) == before


# ---- killed ---------------------------------------------------------------------------------------------------------

_CHANGES = ("rename", "symlink", "mkdir", "unlink", "rmdir", "chown", "open")


class Killed(BaseException):
    """The process is gone: nothing it would do afterwards reaches the disk."""


class Mortal:
    """The system calls that change a disk, up to the one with a number: before that the process ends."""

    def __init__(self, patch, at):
        self.count, self.at = 0, at
        for name in _CHANGES:
            patch.setattr(os, name, self._counted(getattr(os, name), name))
        patch.setattr(os, "fsync", lambda _: None)

    def _counted(self, real, name):
        def call(*words, **more):
            if name == "open" and not words[1] & os.O_CREAT:
                return real(*words, **more)
            self.count += 1
            if self.count >= self.at:
                raise Killed
            return real(*words, **more)

        return call


def killed_at(act, number):
    """Whether there was such a moment."""
    with pytest.MonkeyPatch.context() as patch:
        Mortal(patch, number)
        try:
            act()
        except Killed:
            return True
    return False


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _moments(act, folder, start):
    """A tree for each moment at which `act` can be killed, as it is then."""
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder, symlinks=True)
        if not killed_at(lambda: act(folder), number):
            return
        yield number


@pytest.mark.parametrize("act", [put, take_back])
def test_killed_at_any_moment_both_ways_lead_to_a_right_tree(tmp_path, quick, act):
    original = tree(tmp_path / "original", files=NAMES)
    bare = picture(original)
    done = tmp_path / "done"
    shutil.copytree(original, done, symlinks=True)
    put(done)
    finished = without_times(picture(done))
    start = original if act is put else done
    moments = 0
    for number in _moments(act, tmp_path / "now", start):
        moments += 1
        now, other = tmp_path / "now", tmp_path / "other"
        shutil.copytree(now, other, symlinks=True)
        take_back(now)
        assert picture(now) == bare, number
        put(other)
        seen = without_times(picture(other))
        names = {name for name in seen if not name.startswith("var/lib/flanctl/install/")}
        assert {name: seen[name] for name in names} == {
            name: what for name, what in finished.items() if not name.startswith("var/lib/flanctl/install/")
        }, number
        take_back(other)
        assert picture(other) == bare, number
        shutil.rmtree(other)
    assert moments > 30


_kinds = st.sampled_from(["absent", "file", "link", "loop"])


@given(
    kinds=st.tuples(*[_kinds] * 3),
    lives=st.lists(st.tuples(st.sampled_from([put, take_back]), st.integers(1, 60)), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_whatever_was_there_and_however_often_it_was_killed_uninstall_restores_it(
    tmp_path_factory, kinds, lives
):
    folder = tree(tmp_path_factory.mktemp("tree") / "t")
    for name, kind in zip(NAMES, kinds, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_bytes(os.urandom(8))
            path.chmod(0o4755)
        elif kind != "absent":
            path.symlink_to(path.name if kind == "loop" else "/opt/flannel/it")
    before = picture(folder)
    for act, number in lives:
        killed_at(lambda act=act: act(folder), number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        assert take_back(folder) == []
    assert picture(folder) == before
    shutil.rmtree(folder)


def test_an_empty_root_is_not_this_folder(tmp_path):
    done = flanctl("install", "--yes", "--root", "", cwd=tmp_path)
    assert (done.code, list(tmp_path.iterdir())) == (2, [])


def test_a_tree_that_is_none_is_an_error(tmp_path):
    with pytest.raises(Invalid):
        Root(tmp_path / "missing")
    assert plans.PROGRAM == "/usr/bin/flanctl"

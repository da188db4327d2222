"""The deb and the rpm installed, upgraded, removed and purged in a Debian tree without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flanctl import __version__
from tests.packages.conftest import NEEDS
from tests.support.debian_tree import Tree

pytestmark = [pytest.mark.needs(*NEEDS), pytest.mark.timeout(400)]

FILES = (
    "usr/bin/flanctl",
    "etc/flanctl/flanctl.toml",
    "usr/lib/systemd/system/flanctl-agent.service",
    "usr/share/man/man1/flanctl-subnets-ls.1.gz",
    "usr/share/man/man8/flanctl-agent.8.gz",
    "usr/share/bash-completion/completions/flanctl",
    "usr/share/doc/flanctl/examples/docker.conf",
)
EDITED = 'endpoints = "http://192.0.2.1:2379"\n'


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Unpacked once: 170 MB in 9,000 files take a busy disk ten seconds."""
    made = Tree.unpack(tmp_path_factory.mktemp("debian") / "tree")
    assert made.run("sh", "-c", "command -v python3 python").code != 0
    yield made
    shutil.rmtree(made.root)


@pytest.fixture
def tree(bare):
    yield bare
    bare.run("dpkg", "-P", "flanctl")
    subprocess.run([*_RPM, bare.root, "--nodeps", "-e", "flanctl"], capture_output=True, check=False)
    for left in ("etc/flanctl", "var/lib/flanctl", "run/systemd"):
        shutil.rmtree(bare / left, ignore_errors=True)
    (bare / "usr/bin/systemctl").unlink(missing_ok=True)
    assert _there(bare) == []
    assert str(bare.root) not in Path("/proc/self/mountinfo").read_text()


def _deb(made):
    return next(made.glob("*.deb"))


def _rpm(made):
    return next(made.glob("*.rpm"))


def _dpkg(tree, package, *options):
    shutil.copy(package, tree / "flanctl.deb")
    return tree.ok("dpkg", *options, "-i", "/flanctl.deb")


# --force-debian: Debian's rpm asks whether we mean it.
_RPM = ("rpm", "--force-debian", "--root")


def _rpm_in(tree, *words):
    done = subprocess.run(
        [*_RPM, tree.root, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _there(tree):
    return [name for name in FILES if (tree / name).exists()]


def test_the_deb_brings_an_executable_that_runs_without_python(tree, made):
    _dpkg(tree, _deb(made))
    assert _there(tree) == list(FILES)
    assert tree.ok("flanctl", "version", "-w", "simple") == f"{__version__}\n"
    # dpkg's own check of everything it installed.
    assert tree.ok("dpkg", "--verify", "flanctl") == ""
    # Nothing is enabled by installing.
    assert not list((tree / "etc/systemd").rglob("flanctl*"))


def test_bash_completes_the_installed_program(tree, made):
    _dpkg(tree, _deb(made))
    script = """
        source /usr/share/bash-completion/completions/flanctl
        COMP_WORDS=(flanctl su) COMP_CWORD=1
        _flanctl_completion flanctl
        echo "${COMPREPLY[@]}"
    """
    assert tree.ok("bash", "-c", script).split() == ["subnets"]


def test_an_edited_config_survives_upgrade_and_removal_of_the_deb_and_goes_with_purge(tree, made, newer):
    _dpkg(tree, _deb(made))
    config, state = tree / "etc/flanctl/flanctl.toml", tree / "var/lib/flanctl/subnet"
    config.write_text(EDITED)
    state.write_text("172.17.7.0/24")
    _dpkg(tree, newer("deb"), "--force-confdef", "--force-confold")
    assert tree.ok("dpkg-query", "-W", "-f", "${Version}", "flanctl") == f"{__version__}-2"
    assert config.read_text() == EDITED
    assert "news" in (tree / "etc/flanctl/flanctl.toml.dpkg-dist").read_text()

    tree.ok("dpkg", "-r", "flanctl")
    assert _there(tree) == ["etc/flanctl/flanctl.toml"]
    assert config.read_text() == EDITED
    assert state.read_text() == "172.17.7.0/24"

    tree.ok("dpkg", "-P", "flanctl")
    assert not state.parent.exists()
    assert not config.exists()
    assert not config.parent.exists()


def test_a_config_nobody_edited_is_renewed_by_an_upgrade(tree, made, newer):
    _dpkg(tree, _deb(made))
    _dpkg(tree, newer("deb"))
    assert "news" in (tree / "etc/flanctl/flanctl.toml").read_text()


def test_removing_the_deb_puts_back_what_an_install_had_replaced(tree, made):
    (tree / "usr/bin/flanneld").write_text("flannel's own")
    _dpkg(tree, _deb(made))
    tree.ok("flanctl", "install", "--as-flanneld", "--yes")
    assert os.readlink(tree / "usr/bin/flanneld") == "/usr/bin/flanctl"
    assert tree.run("flanneld", "--version").code == 0
    # The package's program is the one: nothing is copied over it.
    assert tree.ok("dpkg", "--verify", "flanctl") == ""
    tree.ok("dpkg", "-r", "flanctl")
    assert (tree / "usr/bin/flanneld").read_text() == "flannel's own"
    assert not os.path.lexists(tree / "usr/bin/flanneld-start")
    assert not (tree / "etc/systemd/system/flanneld.service").exists()
    (tree / "usr/bin/flanneld").unlink()


@pytest.mark.needs("rpm")
def test_the_rpm_brings_the_same_and_keeps_an_edited_config(tree, made, newer):
    # --nodeps: the tree is Debian's, rpm's database in it knows no glibc and no iptables.
    _rpm_in(tree, "-i", "--nodeps", str(_rpm(made)))
    assert _there(tree) == list(FILES)
    assert tree.ok("flanctl", "version", "-w", "simple") == f"{__version__}\n"
    config, state = tree / "etc/flanctl/flanctl.toml", tree / "var/lib/flanctl/subnet"
    config.write_text(EDITED)
    state.write_text("172.17.7.0/24")

    _rpm_in(tree, "-U", "--nodeps", str(newer("rpm")))
    assert _rpm_in(tree, "-q", "flanctl").strip() == f"flanctl-{__version__}-2.x86_64"
    assert config.read_text() == EDITED
    assert "news" in (tree / "etc/flanctl/flanctl.toml.rpmnew").read_text()

    _rpm_in(tree, "-e", "--nodeps", "flanctl")
    assert _there(tree) == []
    # rpm keeps an edited config under this name, and has no purge: what the agent wrote stays.
    assert (tree / "etc/flanctl/flanctl.toml.rpmsave").read_text() == EDITED
    assert state.exists()


def test_installing_and_removing_ask_systemd_for_no_more_than_they_say(tree, made, newer):
    """The maintainer scripts in front of a systemctl that writes down what it is asked."""
    calls = tree / "calls"
    systemctl = tree / "usr/bin/systemctl"
    systemctl.write_text('#!/bin/sh\necho "$*" >>/calls\n')
    systemctl.chmod(0o755)
    (tree / "run/systemd/system").mkdir(parents=True)

    def asked():
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return lines

    _dpkg(tree, _deb(made))
    assert asked() == ["daemon-reload"]
    _dpkg(tree, newer("deb"))
    # The old version's postrm comes first, then the new one's postinst.
    assert asked() == ["daemon-reload", "daemon-reload", "try-restart flanctl-agent.service"]
    tree.ok("dpkg", "-r", "flanctl")
    assert asked() == [
        "stop flanctl-agent.service",
        "--quiet --no-reload disable flanctl-agent.service",
        "daemon-reload",
    ]
    tree.ok("dpkg", "-P", "flanctl")
    assert asked() == ["daemon-reload"]


def test_no_file_or_folder_is_writable_by_others(tree, made):
    _dpkg(tree, _deb(made))
    for name in tree.ok("dpkg", "-L", "flanctl").split():
        about = os.lstat(tree.root / name.lstrip("/"))
        assert about.st_uid == about.st_gid == 0, name
        assert not about.st_mode & 0o022 or name == "/", name

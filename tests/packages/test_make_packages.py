"""`make packages` itself: same bytes twice, and what it says and leaves when something is missing or breaks off."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest

from flanctl import __version__
from flanctl.demo.hosts import Lab
from tests.packages.conftest import EPOCH, NEEDS
from tests.support.agents import flanctl
from tests.support.capabilities import frozen_executable
from tests.support.deadline import until
from tests.support.dockerd import Dockerd

BUILD = [sys.executable, "packaging/packages.py"]


def _build(folder, prefix=(), **environment):
    return subprocess.run(
        [*prefix, *BUILD, folder],
        env=os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _stand_in(folder, text):
    program = folder / "flanctl"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_without_the_frozen_file_it_says_make_freeze(tmp_path):
    done = _build(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"make packages: there is no {tmp_path}/flanctl yet\ntry: make freeze\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo 0.0.9", f"is version 0.0.9, this source tree is {__version__}\ntry: make freeze"),
        ("echo no glibc >&2; exit 1", "failed (3 words ended with 1):\n  no glibc\ntry: make freeze"),
    ],
)
def test_a_file_of_another_version_or_one_that_does_not_run_is_not_packed(tmp_path, program, said):
    _stand_in(tmp_path, program)
    done = _build(tmp_path)
    assert done.returncode == 1
    assert said.replace("3 words", f"{tmp_path}/flanctl") in done.stderr
    assert os.listdir(tmp_path) == ["flanctl"]


def test_an_epoch_that_is_none_is_refused(tmp_path):
    _stand_in(tmp_path, f"echo {__version__}")
    done = _build(tmp_path, SOURCE_DATE_EPOCH="yesterday")
    assert (done.returncode, done.stderr) == (
        1,
        'make packages: SOURCE_DATE_EPOCH "yesterday" is not a number of seconds\n',
    )


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_twice_is_the_same_bytes_whatever_umask_and_time_zone(made, tmp_path):
    (tmp_path / "flanctl").symlink_to(frozen_executable())
    done = _build(tmp_path, prefix=["sh", "-c", 'umask 077; exec "$@"', "sh"], TZ="Asia/Tokyo", LANG="C")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "SHA256SUMS").read_text() == (made / "SHA256SUMS").read_text()


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_the_sums_are_those_of_the_files_and_nothing_else_is_left(made):
    lines = (made / "SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    assert {*(line.split("  ")[1] for line in lines), "SHA256SUMS", "flanctl"} == set(os.listdir(made))


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_a_full_disk_is_said_and_leaves_nothing(made, tmp_path):
    # `made` first: nfpm and the image's base are in the cache then. 1 MB holds no package.
    inner = 'mount -t tmpfs -o size=1m tmpfs "$0" && ln -s "$1" "$0/flanctl" && shift && "$@"; code=$?; ls -A "$0"; exit $code'
    prefix = ["unshare", "--mount", "sh", "-c", inner, str(tmp_path), str(frozen_executable())]
    done = _build(tmp_path, prefix=prefix)
    assert done.returncode == 1
    assert "no space left on device" in done.stderr.lower()
    assert f"flanctl_{__version__}" in done.stderr
    assert done.stdout.split() == ["flanctl"]


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_was_there(made, tmp_path, number):
    (tmp_path / "flanctl").symlink_to(frozen_executable())
    old = tmp_path / f"flanctl_{__version__}_amd64.deb"
    old.write_text("the one before")
    process = subprocess.Popen(
        [*BUILD, str(tmp_path)],
        env=os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list(tmp_path.glob(".packages-*/*.deb")), seconds=60)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("make packages: interrupted at ")
    assert err.endswith("try: make packages again; nothing was replaced\n")
    assert sorted(os.listdir(tmp_path)) == ["flanctl", old.name]
    assert old.read_text() == "the one before"


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_what_a_killed_run_left_goes_with_the_next(made, tmp_path):
    _stand_in(tmp_path, f"echo {__version__}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".packages-{ended.pid}").mkdir()
    alive = tmp_path / f".packages-{os.getpid()}"
    alive.mkdir()
    assert _build(tmp_path).returncode == 0
    assert list(tmp_path.glob(".packages-*")) == [alive]


def _image(made):
    return made / f"flanctl-{__version__}-image.tar"


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_the_image_is_an_oci_layout_whose_digests_hold(made):
    with tarfile.open(_image(made)) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    for name, blob in content.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(blob).hexdigest() == name.rpartition("/")[2]
    assert json.loads(content["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (described,) = json.loads(content["index.json"])["manifests"]

    def blob(about):
        found = content["blobs/" + about["digest"].replace(":", "/")]
        assert len(found) == about["size"]
        return found

    manifest = json.loads(blob(described))
    config = json.loads(blob(manifest["config"]))
    assert config["config"]["Entrypoint"] == ["/usr/bin/flanctl"]
    # What `docker load` reads names the same blobs.
    (docker,) = json.loads(content["manifest.json"])
    assert docker["Config"].endswith(manifest["config"]["digest"].removeprefix("sha256:"))
    for layer, path in zip(manifest["layers"], docker["Layers"], strict=True):
        assert path.endswith(layer["digest"].removeprefix("sha256:"))


@pytest.mark.needs(*NEEDS)
@pytest.mark.timeout(400)
def test_nothing_of_this_machine_is_in_the_image(made, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    with tarfile.open(_image(made)) as tar:
        for path in json.loads(tar.extractfile("manifest.json").read())[0]["Layers"]:
            with tarfile.open(fileobj=tar.extractfile(path), mode="r:gz") as layer:
                names = layer.getnames()
                assert not {"./etc/hostname", "etc/hostname", "etc/resolv.conf", "etc/apt/sources.list"} & {
                    name.removeprefix("./") for name in names
                }
                assert {(member.uid, member.uname, member.mtime) for member in layer} <= {
                    (0, "", 0),
                    (42, "", 0),  # _apt's and group shadow's own folders, by number
                }
                assert not any("python" in name and name.endswith("bin") for name in names)


@pytest.mark.needs(*NEEDS, "dockerd")
@pytest.mark.timeout(400)
def test_docker_loads_the_image_and_it_runs(made, tmp_path):
    options = tmp_path / "docker.env"
    options.write_text('DOCKER_NETWORK_OPTIONS="--bridge=none --iptables=false"\n')
    with Lab("image") as lab, Dockerd(lab.add_host(), options) as docker:
        assert f"flanctl:{__version__}" in docker.client("load", "-i", str(_image(made)), timeout=120)
        run = ("run", "--rm", "--network", "none")
        assert docker.client(*run, "flanctl", "version", "-w", "simple", timeout=60).strip() == __version__
        # What the agent calls is there, and so are the CA certificates.
        shown = docker.client(*run, "--entrypoint", "/usr/sbin/iptables", "flanctl", "--version")
        assert shown.startswith("iptables v")
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        verified = docker.client(
            *run, "--entrypoint", "/usr/bin/openssl", "flanctl", "x509", "-noout", "-subject", "-in", bundle
        )
        assert verified.startswith("subject=")


@pytest.mark.needs(*NEEDS, "dockerd", "tun")
@pytest.mark.timeout(400)
def test_the_images_agent_becomes_ready_with_the_two_capabilities_the_docs_name(made, tmp_path):
    options = tmp_path / "docker.env"
    options.write_text('DOCKER_NETWORK_OPTIONS="--bridge=none --iptables=false"\n')
    with Lab("image") as lab:
        host = lab.add_host()
        flanctl(host, f"sqlite:{tmp_path}/registry.db", "net", "init", "--network", "172.17.0.0/16")
        with Dockerd(host, options) as docker:
            docker.client("load", "-i", str(_image(made)), timeout=120)
            volumes = [
                word
                for inside in ("run/flannel", "run/flanctl", "var/lib/flanctl")
                for word in ("-v", f"{tmp_path}/{inside}:/{inside}")
            ]
            docker.client(
                *("run", "--detach", "--name", "agent", "--network", "host", "--cap-drop", "all"),
                *("--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW", "--device", "/dev/net/tun", *volumes),
                *("-v", f"{tmp_path}:/registry", "-e", "FLANCTL_ENDPOINTS=sqlite:/registry/registry.db"),
                *("flanctl", "agent"),
                timeout=60,
            )
            subnet = tmp_path / "run/flannel/subnet.env"
            ready = until(subnet.exists, seconds=40, fail=False)
            assert ready, host.run(["ip", "link"]).stdout
            assert "flannel0" in host.run(["ip", "route"]).stdout
            assert "172.17.0.0/16" in host.run(["iptables-save"]).stdout
            docker.client("stop", "agent", timeout=60)
    assert lab.leftovers() == ()

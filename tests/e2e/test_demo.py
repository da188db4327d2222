"""The first minute: it holds, it cleans up whatever happens, and it says plainly when it cannot run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.cli import flanctl, program
from tests.support.deadline import until

pytestmark = [pytest.mark.needs("root", "netns", "tun", "iptables", "ping"), pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """What a demo leaves in the temporary directory shows."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tempfile.tempdir = None
    yield tmp_path
    tempfile.tempdir = None


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("flanctl-demo-*")]


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program(), "demo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def namespaces_of(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"flan-{pid}-*")]


def test_every_step_holds_within_a_minute_and_nothing_is_left(own_temporary_folder):
    began = time.monotonic()
    answer = flanctl("demo", timeout=60)
    assert answer.code == 0, answer
    assert time.monotonic() - began < 60
    assert answer.out.rstrip().endswith("All 8 steps hold.")
    for shown in (
        "h1# flanctl net init --network 172.17.0.0/16",
        "h1# flanctl agent --iface eth0 &",
        "ready network=172.17.0.0/16 subnet=172.17.",
        "h1# flanctl subnets ls",
        'DOCKER_NETWORK_OPTIONS=" --bip=172.17.',
        "Gbit/s, SHA-256 equal",
        "3 packets transmitted, 3 received",
        "60 of 60 answered meanwhile",
        "drop-unknown-sender=1",
    ):
        assert shown in answer.out, shown
    assert "\x1b" not in answer.out, "colours only on a terminal"
    assert left(own_temporary_folder) == []


def test_json_tells_the_steps_and_nothing_else():
    answer = flanctl("demo", "-w", "json", timeout=60)
    document = json.loads(answer.out)
    assert len(document["steps"]) == 8
    assert document["steps"][4]["gbit_per_second"] > 0
    assert all(step["at_seconds"] < 60 for step in document["steps"])


@pytest.mark.needs("bpf")
@pytest.mark.parametrize(
    ("path", "used"),
    [("auto", "kernel"), ("tc", "kernel"), ("tun", "userspace"), ("tun-plain", "userspace")],
)
def test_it_shows_each_data_path_in_use(path, used):
    answer = flanctl("demo", "--data-path", path, timeout=60)
    assert answer.code == 0, answer
    assert f"h1# flanctl agent --iface eth0 --data-path {path} &" in answer.out
    assert f"data-path={used}" in answer.out
    assert re.search(rf"data +{used} path; .* packets out", answer.out)
    assert re.search(rf"✓ \d+ of \d+ packets came in by the path in use, {used}", answer.out)


@pytest.mark.needs("etcd34")
def test_with_a_real_etcd_and_three_hosts(own_temporary_folder):
    answer = flanctl("demo", "--etcd", "--hosts", "3", timeout=90)
    assert answer.code == 0, answer
    assert "(http is the registry)" in answer.out
    assert "3 hosts, 3 different subnets" in answer.out
    assert left(own_temporary_folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["1. ", "2. ", "5. ", "7. "])
def test_ended_at_any_step_nothing_is_left(own_temporary_folder, number, moment):
    demo = started()
    assert demo.stdout is not None
    while not (line := demo.stdout.readline()).startswith(moment):
        assert demo.poll() is None, line
    demo.send_signal(number)
    _, said = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert said == "interrupted\n"
    assert namespaces_of(demo.pid) == []
    assert left(own_temporary_folder) == []


def test_kept_it_stays_and_says_how_to_enter_and_how_to_remove_it(own_temporary_folder):
    demo = started("--keep")
    out, said = demo.communicate(timeout=60)
    try:
        assert demo.returncode == 0, said
        assert len(namespaces_of(demo.pid)) >= 7
        enter = re.search(r"Enter a host: +(nsenter --net=\S+)", out)
        export = re.search(r"export (FLANCTL_ENDPOINTS=\S+)", out)
        assert enter is not None
        assert export is not None
        inside = [
            *enter[1].split(),
            "env",
            export[1],
            *program(),
            "subnets",
            "ls",
            "-w",
            "simple",
        ]
        assert subprocess.run(inside, capture_output=True, text=True, check=True).stdout.count("\n") == 3
    finally:
        removal = re.search(r"Remove it all: +(.*)", out)
        assert removal is not None
        subprocess.run(["sh", "-c", removal[1]], check=True, capture_output=True)
    until(lambda: not namespaces_of(demo.pid))
    assert left(own_temporary_folder) == []


def test_the_first_step_that_does_not_hold_ends_it_with_1(own_temporary_folder):
    fake = own_temporary_folder / "bin"
    fake.mkdir()
    (fake / "ping").write_text("#!/bin/sh\necho 'no answer here'\nexit 1\n")
    (fake / "ping").chmod(0o755)
    answer = flanctl("demo", env={"PATH": f"{fake}:{os.environ['PATH']}"}, timeout=60)
    assert answer.code == 1
    assert re.search(r"flanctl demo: h1c1: ping .* ended with 1", answer.err)
    assert "no answer here" in answer.out
    assert "steps hold" not in answer.out
    assert left(own_temporary_folder) == []


def test_not_root_is_one_line():
    answer = flanctl("demo", prefix=["setpriv", "--reuid=65534", "--clear-groups"])
    if "No module named" in answer.err or "Permission denied" in answer.err:
        pytest.fail(f"the interpreter is not readable for others here: {answer.err}")
    assert (answer.code, answer.out) == (7, "")
    assert answer.err == "flanctl demo: hosts in network namespaces need root\ntry: sudo flanctl demo\n"


def test_no_tun_is_one_line():
    answer = flanctl(
        "demo", prefix=["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    )
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("flanctl demo: hosts in network namespaces need /dev/net/tun: ")
    assert answer.err.count("\n") == 2

"""What can be seen of a host without its agent."""

from __future__ import annotations

import os

import pytest

from flanctl.agent.host import daemons, look_around

ENV = "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"


@pytest.fixture
def proc(tmp_path):
    """A /proc of our own; `add` puts a process into it."""
    folder = tmp_path / "proc"

    def add(pid, *words, namespace="net:[1]"):
        (folder / str(pid) / "ns").mkdir(parents=True)
        (folder / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
        if namespace is not None:
            os.symlink(namespace, folder / str(pid) / "ns" / "net")

    add("self", "me")
    add.folder = folder
    return add


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("/usr/bin/flanneld", "-etcd-prefix=/x"), "flanneld"),
        (("/usr/bin/flanctl", "agent"), "flanctl agent"),
        (("flanctl", "--endpoints", "http://a", "agent", "--iface", "eth0"), "flanctl agent"),
        (("/usr/bin/python3.11", "-m", "flanctl", "agent"), "flanctl agent"),
        (("/opt/.venv/bin/python", "/opt/.venv/bin/flanctl", "agent"), "flanctl agent"),
        (("/usr/bin/flanctl", "status"), None),
        (("/usr/sbin/agent", "flanctl"), None),
        (("vi", "flanctl", "agent"), None),
        (("kube-flanneld-helper",), None),
        (("",), None),
        ((), None),
    ],
)
def test_daemons_are_known_by_their_command_line(proc, words, name):
    proc(41, *words)
    assert daemons(proc.folder) == (() if name is None else ((name, 41),))


def test_only_those_of_our_network_count_and_those_we_may_not_see(proc):
    proc(9, "flanneld", namespace="net:[2]")
    proc(10, "flanneld")
    proc(11, "flanneld", namespace=None)
    assert daemons(proc.folder) == (("flanneld", 10), ("flanneld", 11))


def test_a_process_that_ends_meanwhile_and_a_proc_that_is_not_there_are_nothing(proc, tmp_path):
    (proc.folder / "77").mkdir()
    assert daemons(proc.folder) == ()
    assert daemons(tmp_path / "none") == ()


def test_files_are_read_or_said_why_not(tmp_path, proc):
    facts = look_around(tmp_path / "subnet.env", proc=proc.folder)
    assert facts.subnet_file is None
    assert facts.subnet_trouble == f"there is no {tmp_path}/subnet.env"
    (tmp_path / "subnet.env").write_text(ENV)
    (tmp_path / "docker").write_text('DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --mtu=1472"\n')
    facts = look_around(tmp_path / "subnet.env", proc=proc.folder)
    assert str(facts.subnet_file.subnet) == "172.17.41.0/24"
    assert facts.docker_bip == "172.17.41.1/24"


@pytest.mark.parametrize("content", [b"", b"FLANNEL_SUBNET=x\n", b"\xff\xfe", b"A=1\n" * 100_000])
def test_a_subnet_file_that_makes_no_sense_is_a_sentence(tmp_path, proc, content):
    (tmp_path / "subnet.env").write_bytes(content)
    facts = look_around(tmp_path / "subnet.env", proc=proc.folder)
    assert facts.subnet_file is None
    assert str(tmp_path / "subnet.env") in facts.subnet_trouble


def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path, proc):
    os.mkfifo(tmp_path / "subnet.env")
    assert look_around(tmp_path / "subnet.env", proc=proc.folder).subnet_file is None

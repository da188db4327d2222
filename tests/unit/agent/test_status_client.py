"""Asking the agent: what can stand in for an answer, and what it is called."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest

from flanctl.agent.status_client import NoAgent, Silent, ask
from flanctl.errors import Invalid

GOOD = {"schema": 1, "state": "ready"}


@contextmanager
def agent(path, *parts, hold=False, pause=0.0):
    """Whoever connects is sent `parts`; with `hold` the connection stays open."""
    done = threading.Event()
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve():
            channel, _ = listener.accept()
            with closing(channel):
                try:
                    channel.recv(4096)
                    for part in parts:
                        channel.sendall(part)
                        done.wait(pause)
                except OSError:
                    return
                if hold:
                    done.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(5)


def reply(document, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n" + json.dumps(document).encode()


def test_the_document_comes_back(tmp_path):
    with agent(tmp_path / "s", reply(GOOD)[:20], reply(GOOD)[20:]):
        assert ask(tmp_path / "s") == GOOD


def test_no_socket_and_no_directory_are_no_agent(tmp_path):
    for path in (tmp_path / "s", tmp_path / "no" / "s"):
        with pytest.raises(NoAgent, match="is missing"):
            ask(path)


def test_a_dead_agents_socket_and_a_plain_file_are_no_agent(tmp_path):
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_path / "s"))
    (tmp_path / "f").write_text("x")
    for name in ("s", "f"):
        with pytest.raises(NoAgent, match="nobody listens"):
            ask(tmp_path / name)


@pytest.mark.parametrize("parts", [(), (b"HTTP/1.1 200 OK\r\n",)])
def test_who_takes_the_connection_and_says_nothing_more_is_silent(tmp_path, parts):
    with agent(tmp_path / "s", *parts, hold=True):
        began = time.monotonic()
        with pytest.raises(Silent, match="does not answer within"):
            ask(tmp_path / "s", seconds=0.3)
        assert time.monotonic() - began < 3


def test_a_drip_does_not_move_the_deadline(tmp_path):
    with agent(tmp_path / "s", *([b"x"] * 1000), pause=0.05):
        began = time.monotonic()
        with pytest.raises(Silent):
            ask(tmp_path / "s", seconds=0.4)
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", reply([]), reply({}), reply({"state": 7}), reply(GOOD, b"500 No"),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b"HTTP/1.1 x\r\n\r\n{}", b"\xff\xfe\r\n\r\n\xff",
    ],
)  # fmt: skip
def test_who_is_no_agent_is_said_to_be_none(tmp_path, answer):
    with agent(tmp_path / "s", answer), pytest.raises(Invalid, match="no flanctl agent"):
        ask(tmp_path / "s")


def test_an_endless_answer_is_cut(tmp_path):
    with agent(tmp_path / "s", *([b"x" * 1_000_000] * 8)), pytest.raises((Invalid, Silent)):
        ask(tmp_path / "s")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_other_users_may_not_ask(tmp_path):
    """In a process of its own, as nobody."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "s"))
        os.chmod(tmp_path / "s", 0o600)
        listener.listen(1)
        script = (
            "import os, sys; from pathlib import Path; from flanctl.agent.status_client import ask\n"
            "folder = os.open(sys.argv[1], os.O_PATH)\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "try: ask(Path(f'/proc/self/fd/{folder}/s'))\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert done.stdout.startswith("NotPermitted ")

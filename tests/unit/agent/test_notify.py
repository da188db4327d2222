"""systemd hears what it needs to."""

from __future__ import annotations

import socket

import pytest

from flanctl.agent.notify import Notify


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_arrive_as_sd_notify_has_them(tmp_path, abstract):
    address = f"@flanctl-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + address[1:] if abstract else address)
        notify = Notify(address)
        notify.waiting("waiting for etcd", seconds=65)
        notify.ready("network=10.0.0.0/8")
        notify.stopping()
        got = [systemd.recv(4096).decode() for _ in range(3)]
    assert got == [
        "STATUS=waiting for etcd\nEXTEND_TIMEOUT_USEC=65000000",
        "READY=1\nSTATUS=network=10.0.0.0/8",
        "STOPPING=1\nSTATUS=stopping",
    ]


def test_outside_systemd_nothing_happens():
    Notify("").ready("x")


def test_a_systemd_that_is_gone_is_no_error(tmp_path):
    Notify(str(tmp_path / "gone")).ready("x")

"""systemd hears what it needs to."""

from __future__ import annotations

import os
import socket

import pytest

from flanctl.agent.notify import Notify, watchdog_seconds


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


def test_a_text_with_line_ends_cannot_become_an_assignment(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        notify = Notify(str(tmp_path / "notify"))
        notify.status("bad key\nMAINPID=1")
        notify.waiting("bad key\nMAINPID=1", seconds=1)
        notify.ready("bad key\nMAINPID=1")
        for _ in range(3):
            assert "\nMAINPID" not in systemd.recv(4096).decode()


def test_outside_systemd_nothing_happens():
    Notify("").ready("x")


def test_a_systemd_that_is_gone_is_no_error(tmp_path):
    Notify(str(tmp_path / "gone")).ready("x")


# ---- the watchdog -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "0"}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "9" * 400}, 0.0),
        ({"WATCHDOG_USEC": "٣"}, 0.0),
    ],
)
def test_the_watchdog_is_systemds_wish_for_this_process(monkeypatch, environment, seconds):
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert watchdog_seconds() == seconds
    assert Notify("").watchdog == seconds


def test_signs_of_life_are_sent_only_to_a_watchdog(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        Notify(address, watchdog=0).alive()
        Notify(address, watchdog=3).alive()
        Notify(address, watchdog=0).status("degraded: x")
        assert [systemd.recv(4096).decode() for _ in range(2)] == ["WATCHDOG=1", "STATUS=degraded: x"]


def test_a_systemd_that_does_not_read_holds_nobody_up(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        notify = Notify(address, watchdog=3)
        for _ in range(10_000):  # its queue holds some hundred
            notify.alive()

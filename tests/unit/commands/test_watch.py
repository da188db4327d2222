"""`flanctl subnets watch`: lines as they are promised, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import pytest

from flanctl.commands.watch import _Printer
from flanctl.errors import RegistryUnreachable
from flanctl.registry.changes import Back, Lost
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import Running, flanctl, program

PREFIX = "/jxdd/network"
KEY = f"{PREFIX}/subnets/172.17.90.0-24"


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(str(tmp_path / "registry.db"))
    store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
    store.create(f"{PREFIX}/subnets/172.17.7.0-24", b'{"PublicIP":"192.168.6.15"}', ttl=86400)
    yield store
    store.close()


@pytest.fixture
def registry(tmp_path, store):
    return {"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'registry.db'}", "TZ": "UTC"}


def change(store, told=lambda count: None, *, renewals=False):
    """Added, moved, renewed, reserved, unreadable, removed; each once the one before it was told."""
    entry = store.create(KEY, b'{"PublicIP":"192.168.6.9"}', ttl=86400)
    lines = 2
    told(lines)
    for value, ttl in (
        (b'{"PublicIP":"192.168.6.10"}', 86400),
        (b'{"PublicIP":"192.168.6.10"}', 86400),
        (b'{"PublicIP":"192.168.6.10"}', None),
        (b"\x1b[2J\n", None),
    ):
        renewal = (value, ttl is None) == (entry.value, entry.lease is None)
        entry = store.replace(KEY, value, ttl=ttl, expected=entry.revision)
        lines += renewals or not renewal
        told(lines)
    store.delete(KEY)
    return entry.revision + 1


def test_the_table(store, registry, tmp_path):
    with Running(tmp_path / "w", "subnets", "watch", env=registry) as watch:
        watch.wait_for(1)
        last = change(store, watch.wait_for)
        lines = watch.wait_for(6)
        assert watch.end(signal.SIGINT) == 130
        assert watch.lines() == lines
        errors = watch.errors()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert [re.sub(r"  +", "  ", line[10:]) for line in lines] == [
        f"listed  1 subnet at revision {last - 6}",
        f"added  172.17.90.0/24  192.168.6.9  ttl 24h  revision {last - 5}",
        f"moved  172.17.90.0/24  192.168.6.9 -> 192.168.6.10  ttl 24h  revision {last - 4}",
        f"changed  172.17.90.0/24  192.168.6.10  reserved  revision {last - 2}",
        f"unreadable  172.17.90.0/24  192.168.6.10 -> ?  (bad-value)  revision {last - 1}",
        f"removed  172.17.90.0/24  ?  revision {last}",
    ]
    assert max(map(len, lines)) <= 100
    assert errors == (
        f"everything up to revision {last} was told; --from-revision goes on there\ninterrupted\n"
    )


def test_simple_is_a_promise_and_renewals_come_only_with_all(store, registry, tmp_path):
    words = ("subnets", "watch", "-w", "simple", "--all")
    with Running(tmp_path / "w", *words, env=registry) as watch:
        watch.wait_for(1)
        last = change(store, watch.wait_for, renewals=True)
        lines = watch.wait_for(7)
    rows = [line.split("\t") for line in lines]
    assert all(row[0].isdigit() and len(row) == 7 for row in rows)
    assert [row[1:] for row in rows[1:]] == [
        ["added", "172.17.90.0/24", "192.168.6.9", "-", rows[1][5], str(last - 5)],
        ["moved", "172.17.90.0/24", "192.168.6.10", "192.168.6.9", rows[2][5], str(last - 4)],
        ["renewed", "172.17.90.0/24", "192.168.6.10", "-", rows[3][5], str(last - 3)],
        ["changed", "172.17.90.0/24", "192.168.6.10", "-", "-", str(last - 2)],
        ["unreadable", "172.17.90.0/24", "?", "192.168.6.10", "-", str(last - 1)],
        ["removed", "172.17.90.0/24", "?", "-", "-", str(last)],
    ]
    assert all(86000 < int(row[5]) <= 86400 for row in rows[1:4])


def test_json_is_one_object_a_line_and_can_be_resumed(store, registry, tmp_path):
    with Running(tmp_path / "w", "watch", "-w", "json", env=registry) as watch:
        (listed,) = map(json.loads, watch.wait_for(1))
    assert listed | {"time": ""} == {
        "schema": 1,
        "time": "",
        "event": "listed",
        "revision": store.list("/").revision,
        "resync": False,
        "subnets": [
            {
                "subnet": "172.17.7.0/24",
                "public_ip": "192.168.6.15",
                "kind": "lease",
                "ttl_seconds": listed["subnets"][0]["ttl_seconds"],
                "backend": "udp",
                "backend_data": None,
                "problem": None,
            }
        ],
        "unreadable": [],
    }
    last = change(store)
    words = ("watch", "-w", "json", "--from-revision", listed["revision"])
    with Running(tmp_path / "again", *words, env=registry) as watch:
        events = list(map(json.loads, watch.wait_for(5)))
    assert [(event["event"], event["revision"]) for event in events] == [
        ("added", last - 5),
        ("moved", last - 4),
        ("changed", last - 2),
        ("unreadable", last - 1),
        ("removed", last),
    ]
    assert list(events[0]) == [
        "schema",
        "time",
        "event",
        "subnet",
        "public_ip",
        "kind",
        "ttl_seconds",
        "backend",
        "backend_data",
        "problem",
        "old_public_ip",
        "expired",
        "resync",
        "key",
        "revision",
    ]
    moved = events[1]
    assert (moved["public_ip"], moved["old_public_ip"]) == ("192.168.6.10", "192.168.6.9")
    assert (events[2]["kind"], events[2]["ttl_seconds"]) == ("reservation", None)
    assert (events[3]["problem"], events[3]["old_public_ip"]) == ("bad-value", "192.168.6.10")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", moved["time"])


def test_it_ends_by_itself_after_the_time_given(registry):
    answer = flanctl("watch", "--for", "300ms", "-w", "simple", env=registry)
    assert (answer.code, answer.out.count("\n"), answer.err) == (0, 1, "")


def test_a_reader_that_goes_away_ends_it_quietly_before_anything_happens(registry, tmp_path):
    reading, writing = os.pipe()
    with Running(tmp_path / "w", "watch", env=registry, stdout=writing) as watch:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert "listed" in pipe.readline()
        assert watch.end() == 0
        assert watch.errors() == ""


def test_a_full_disk_ends_it(registry):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*program(), "watch", "--for", "20s"],
            env={**os.environ, **registry},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_an_outage_is_told_on_stderr(capsys):
    """tests/e2e/test_watch.py has a real one."""
    lost, back = Lost(RegistryUnreachable("none of 3 endpoints answered\x1b"), 83.2), Back(100.4, 2)
    printer = _Printer("table", "udp")
    printer.print(lost)
    printer.print(back)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  lost        the registry does not answer; nothing new since \d\d:\d\d:\d\d"
        r" \(none of 3 endpoints answered\\x1b\)",
        lines[0],
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d  back        after 1m; 2 changed, which follows", lines[1])
    printer = _Printer("json", "udp")
    printer.print(lost)
    printer.print(back)
    said = capsys.readouterr()
    assert said.out == ""
    one, two = map(json.loads, said.err.splitlines())
    assert (one["event"], one["silent_seconds"], one["message"]) == ("lost", 83.2, lost.error.message)
    assert (two["event"], two["after_seconds"], two["missed"]) == ("back", 100.4, 2)


def test_nonsense_is_a_usage_error(registry):
    for words in (
        ["--for", "soon"],
        ["--for", "-1s"],
        ["--for", "nan"],
        ["--from-revision", "0"],
        ["--from-revision", "x"],
    ):
        answer = flanctl("watch", *words, env=registry)
        assert (answer.code, answer.out) == (2, ""), words


def test_without_a_config_there_is_nothing_to_watch(tmp_path):
    env = {"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'r.db'}"}
    assert flanctl("watch", env=env).code == 4
    SqliteStore(str(tmp_path / "r.db")).close()
    answer = flanctl("watch", env=env)
    assert (answer.code, answer.out) == (4, "")
    assert "no network config" in answer.err

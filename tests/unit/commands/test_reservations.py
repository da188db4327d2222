"""`flanctl release`, `reserve`, `unreserve`: what they write, what they refuse, and that they ask."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess

import pytest

from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import flanctl, program
from tests.support.deadline import until

PREFIX = "/jxdd/network"
BARE = b'{"PublicIP":"192.168.6.60","PublicIPv6":null}'


def key(third):
    return f"{PREFIX}/subnets/172.17.{third}.0-24"


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(str(tmp_path / "registry.db"))
    store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
    store.create(key(7), b'{"PublicIP":"192.168.6.15"}', ttl=68400.5)
    store.create(key(60), BARE, ttl=None)
    store.create(key(88), b'{"PublicIP":"10.0.2.15"}', ttl=86400)
    store.create(key(89), b'{"PublicIP":"10.0.2.15"}', ttl=86400)
    yield store
    store.close()


@pytest.fixture
def run(tmp_path, store):
    env = {"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'registry.db'}"}
    return lambda *words, **more: flanctl(*words, env=env, **more)


def test_release_deletes_the_key_and_nothing_else(run, store):
    before = store.list("/").entries
    answer = run("release", "172.17.7.0/24", "--yes")
    assert (answer.code, answer.out) == (0, "released 172.17.7.0/24 (192.168.6.15)\n")
    assert answer.err.startswith("warning: a flanneld that still runs on 192.168.6.15 loses its subnet")
    assert store.list("/").entries == tuple(entry for entry in before if entry.key != key(7))


def test_release_by_public_ip_in_every_form(run, store):
    answer = run("release", "192.168.6.15", "--yes", "-w", "json")
    document = json.loads(answer.out)
    assert document | {"warnings": []} == {
        "schema": 1,
        "action": "release",
        "changed": True,
        "subnet": "172.17.7.0/24",
        "public_ip": "192.168.6.15",
        "before": "lease",
        "after": None,
        "warnings": [],
    }
    simple = run("release", "172.17.88.0/24", "--yes", "-w", "simple").out
    assert simple == "172.17.88.0/24\t10.0.2.15\tlease\t-\tchanged\n"


def test_release_warns_that_an_agent_that_runs_takes_it_again(run, store):
    words = b'{"host":"node1","version":"1","data_path":"tun","instance":"a"}'
    store.create(f"{PREFIX}/flanctl/hosts/192.168.6.15", words, ttl=60)
    assert "192.168.6.15 (node1) announced a flanctl agent" in run("release", "192.168.6.15", "--yes").err


def test_release_says_when_it_is_this_hosts_own(run, store):
    store.create(key(99), b'{"PublicIP":"127.0.0.1"}', ttl=60)
    assert "172.17.99.0/24 is this host's own lease" in run("release", "127.0.0.1", "--dry-run").err


def test_reserve_a_free_subnet(run, store):
    answer = run("reserve", "172.17.61.0/24", "192.168.6.61", "--yes")
    assert (answer.code, answer.out, answer.err) == (0, "reserved 172.17.61.0/24 (192.168.6.61)\n", "")
    entry = store.get(key(61))
    assert (entry.value, entry.lease) == (b'{"PublicIP":"192.168.6.61","PublicIPv6":null}', None)
    assert run("reserve", "172.17.62.0/24", "192.168.6.62", "--yes", "--dialect", "0.7").code == 0
    assert store.get(key(62)).value == b'{"PublicIP":"192.168.6.62"}'


def test_reserve_what_the_host_holds_keeps_its_bytes(run, store):
    answer = run("reserve", "172.17.7.0/24", "192.168.6.15", "--yes", "-w", "json")
    document = json.loads(answer.out)
    assert (document["before"], document["after"], document["changed"]) == ("lease", "reservation", True)
    entry = store.get(key(7))
    assert (entry.value, entry.lease) == (b'{"PublicIP":"192.168.6.15"}', None)


def test_reserve_twice_is_fine_and_writes_nothing(run, store):
    revision = store.list("/").revision
    answer = run("reserve", "172.17.60.0/24", "192.168.6.60", "--yes", "-w", "json")
    assert (answer.code, json.loads(answer.out)["changed"]) == (0, False)
    assert store.list("/").revision == revision


def test_reserve_for_a_host_with_another_lease_says_when_it_moves(run):
    answer = run("reserve", "172.17.61.0/24", "192.168.6.15", "--dry-run")
    assert answer.code == 0
    assert "192.168.6.15 holds 172.17.7.0/24 now and keeps it until" in answer.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ["reserve", "172.17.7.0/24", "192.168.6.9"],
            5,
            "172.17.7.0/24 is leased to 192.168.6.15 (19h left)",
        ),
        (["reserve", "172.17.60.0/24", "192.168.6.9"], 5, "172.17.60.0/24 is reserved for 192.168.6.60"),
        (
            ["reserve", "172.17.61.0/24", "192.168.6.60"],
            5,
            "192.168.6.60 has 172.17.60.0/24 reserved already",
        ),
        (
            ["reserve", "172.17.61.5/24", "192.168.6.9"],
            2,
            "172.17.61.5/24 is not the first address of a subnet",
        ),
        (["reserve", "172.17.61.0", "192.168.6.9"], 2, '"172.17.61.0" is not a subnet like'),
        (["reserve", "172.17.61.0/33", "192.168.6.9"], 2, "neither a subnet nor an address"),
        (["reserve", "172.17.61.0/255.255.255.0", "192.168.6.9", "--dry-run"], 0, ""),
        (["reserve", "172.17.61.0/25", "192.168.6.9"], 6, "has length /25, the network's subnets have /24"),
        (["reserve", "10.1.2.0/24", "192.168.6.9"], 6, "is outside the network 172.17.0.0/16"),
        (["reserve", "172.17.0.0/24", "192.168.6.9"], 6, "is not from 172.17.1.0 to 172.17.255.0"),
        (["reserve", "172.17.61.0/24", "host9"], 2, '"host9" is not a public IP'),
        (["reserve", "172.17.61.0/24", "224.0.0.1"], 6, "224.0.0.1 is no host's address"),
        (["release", "172.17.60.0/24"], 5, "172.17.60.0/24 is reserved for 192.168.6.60, not leased"),
        (["release", "172.17.61.0/24"], 4, "no lease of 172.17.61.0/24 among 4"),
        (["release", "172.17.7.9/24"], 2, "172.17.7.9/24 is not the first address"),
        (["release", "172.17.7.9"], 4, "172.17.7.0/24 of 192.168.6.15 holds that address"),
        (["release", "10.0.2.15"], 5, "10.0.2.15 names 2 subnets"),
        (["release", "172.17"], 2, "neither a subnet nor an address"),
        (
            ["unreserve", "172.17.7.0/24"],
            5,
            "172.17.7.0/24 is leased to 192.168.6.15 (19h left), not reserved",
        ),
        (["unreserve", "172.17.61.0/24"], 4, "no reservation of 172.17.61.0/24 among 4"),
    ],
)
def test_what_is_refused_has_its_reason_and_its_code_and_changes_nothing(run, store, words, code, says):
    revision = store.list("/").revision
    answer = run(*words, *([] if "--dry-run" in words else ["--yes"]))
    assert answer.code == code, answer
    assert says in answer.err
    assert store.list("/").revision == revision


@pytest.mark.parametrize("bad", [(key(61), b"{"), (f"{PREFIX}/subnets/172.17.61.0-24-x", b"{}")])
def test_a_key_that_cannot_be_read_may_be_somebodys(run, store, bad):
    store.create(*bad, ttl=None)
    answer = run("reserve", "172.17.61.0/24", "192.168.6.61", "--yes")
    assert (answer.code, bad[0] in answer.err) == (5, True)
    if bad[1] == b"{":
        answer = run("release", "172.17.61.0/24", "--yes")
        assert (answer.code, bad[0] in answer.err) == (6, True)


def test_an_overlapping_lease_of_another_length_is_in_the_way(run, store):
    store.create(f"{PREFIX}/subnets/172.17.60.0-22", b'{"PublicIP":"192.168.6.70"}', ttl=60)
    answer = run("reserve", "172.17.61.0/24", "192.168.6.61", "--yes")
    assert answer.code == 5
    assert "172.17.60.0/22 is leased to 192.168.6.70" in answer.err
    assert "overlaps 172.17.61.0/24" in answer.err
    assert run("release", "172.17.60.0/22", "--yes").code == 0, "and can be released"


def test_two_keys_of_one_subnet_are_named_and_neither_is_chosen(run, store):
    """flannel reads `172.17.7.0-024` as the same subnet."""
    store.create(f"{PREFIX}/subnets/172.17.7.0-024", b'{"PublicIP":"192.168.6.16"}', ttl=60)
    answer = run("release", "172.17.7.0/24", "--yes")
    assert answer.code == 5
    for text in ("172.17.7.0/24 names 2 keys", f"{key(7)} of 192.168.6.15", "etcdctl del"):
        assert text in answer.err
    assert run("release", "192.168.6.16", "--yes").code == 0, "its host tells them apart"
    assert store.get(key(7)) is not None


def test_a_registry_that_is_away_says_so_before_anything_is_asked():
    answer = flanctl("release", "10.0.0.0/24", "--yes", "--endpoints", "http://127.0.0.1:1", "--timeout", "1")
    assert (answer.code, answer.out) == (3, "")
    assert "try: start etcd there" in answer.err


def test_unreserve_frees_what_nobody_says_he_uses(run, store):
    answer = run("unreserve", "192.168.6.60", "--yes")
    assert (answer.code, answer.out) == (0, "unreserved 172.17.60.0/24 (192.168.6.60)\n")
    assert store.get(key(60)) is None


@pytest.mark.parametrize("sign", ["announced", "data", "dialect"])
def test_unreserve_gives_a_time_to_what_a_host_may_use(run, store, sign):
    value, words = BARE, ["unreserve", "172.17.60.0/24", "--yes"]
    if sign == "announced":
        said = b'{"host":"node1","version":"1","data_path":"tun","instance":"a"}'
        store.create(f"{PREFIX}/flanctl/hosts/192.168.6.60", said, ttl=60)
    elif sign == "data":
        value = b'{"PublicIP":"192.168.6.60","BackendType":"vxlan","BackendData":{"VNI":1}}'
        store.replace(key(60), value, ttl=None, expected=store.get(key(60)).revision)
    else:
        words += ["--dialect", "0.7"]
    assert "it becomes a lease of 24h" in run(*words[:-1], "--dry-run").out or sign == "dialect"
    answer = run(*words)
    assert answer.code == 0
    assert "as a lease that ends unless renewed" in answer.out
    entry = store.get(key(60))
    assert entry.value == value
    assert 86300 < entry.ttl <= 86400


@pytest.mark.parametrize(
    "words",
    [
        ["release", "172.17.7.0/24"],
        ["reserve", "172.17.61.0/24", "192.168.6.61"],
        ["unreserve", "172.17.60.0/24"],
    ],
)
class TestAsking:
    def test_a_script_must_say_yes(self, run, store, words):
        revision = store.list("/").revision
        for stdin in (b"", b"y\n"):
            answer = run(*words, stdin=stdin)
            assert (answer.code, answer.out) == (2, "")
            assert "try: the same with --yes" in answer.err
        assert store.list("/").revision == revision

    def test_a_dry_run_says_what_it_would_do_and_does_not(self, run, store, words):
        revision = store.list("/").revision
        answer = run(*words, "--dry-run")
        assert answer.code == 0
        assert answer.out.startswith(f"would {' '.join(words[:2])}")
        assert json.loads(run(*words, "--dry-run", "-w", "json").out)["changed"] is False
        assert store.list("/").revision == revision

    @pytest.mark.parametrize("answer", ["y", "YES", "n", "", "maybe", signal.SIGINT])
    def test_on_a_terminal_it_asks(self, tmp_path, store, words, answer):
        revision = store.list("/").revision
        code, shown, out = ask(tmp_path, words, answer)
        assert f"{' '.join(words[:2])}" in shown
        agreed = answer in ("y", "YES")
        assert code == (0 if agreed else 130 if answer == signal.SIGINT else 1), shown
        assert (store.list("/").revision > revision) == agreed
        assert bool(out) == agreed
        assert agreed or "nothing was changed" in shown


def ask(tmp_path, words, answer):
    """Exit code, what the terminal showed, stdout."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [*program(), *words, "--endpoints", f"sqlite:{tmp_path / 'registry.db'}"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(controller, 4096)
        if answer == signal.SIGINT:
            process.send_signal(answer)
        else:
            os.write(controller, answer.encode() + b"\n")
        out = process.stdout.read()
        code = process.wait(20)

    def rest():
        nonlocal shown
        try:
            more = os.read(controller, 4096)
        except OSError:
            return True  # EIO: the other end is closed and everything was read
        shown += more
        return not more

    until(rest)
    os.close(controller)
    return code, shown.decode(), out.decode()


def test_what_changed_while_the_question_stood_is_left_alone(tmp_path, store):
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [
            *program(),
            "release",
            "172.17.7.0/24",
            "--endpoints",
            f"sqlite:{tmp_path / 'registry.db'}",
        ],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(controller, 4096)
        entry = store.replace(
            key(7), b'{"PublicIP":"192.168.6.77"}', ttl=60, expected=store.get(key(7)).revision
        )
        os.write(controller, b"y\n")
        assert process.stdout.read() == b""
        assert process.wait(20) == 5
    shown = os.read(controller, 4096).decode()
    os.close(controller)
    assert "172.17.7.0/24 was changed by somebody else just now, it was not released" in shown
    assert store.get(key(7)).value == entry.value

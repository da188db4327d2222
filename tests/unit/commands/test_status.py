"""`flanctl status` against an agent that says what a test wants: the screen, the forms, the exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from flanctl.agent.kernel.docker_accept import AcceptReport
from flanctl.agent.snapshot import FIELDS, HeldLease, Now, Place, Problem, Snapshot, document
from flanctl.agent.status_api import Answer, StatusApi
from flanctl.commands.status import _accept_words
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.cli import flanctl
from tests.support.deadline import until

PLACE = Place(
    IPv4Network("172.17.0.0/16"), 255, "udp", "userspace", "--data-path tun", "flannel0", "eth0", IPv4Address("192.168.6.2"), 1500, 1472
)  # fmt: skip
NOW = Now(boot=1_000_000.0, wall=1_800_000_000.0)
READY = Snapshot(
    state="ready",
    since=NOW.boot - 3 * 86400 - 4 * 3600,
    started=NOW.boot - 3 * 86400 - 4 * 3600,
    turned=NOW.boot,
    host="node1",
    version="0.1.0",
    pid=7,
    prefix="/jxdd/network",
    subnet_file="set by the fixture",
    place=PLACE,
    lease=HeldLease(
        IPv4Network("172.17.41.0/24"), NOW.boot + 19 * 3600 + 730, 86400.0, NOW.boot - 4 * 3600 - 48 * 60, 12
    ),
    registry="etcd v3 over HTTP at http://192.168.6.15:2379",
    answered=NOW.boot - 6,
    watched=NOW.boot - 6,
    revision=48211,
    peers=3,
    objects=(("link", 1, 0), ("route", 1, 0), ("rule", 2, 0)),
    drops_before=(NOW.boot - 60, 4),
)
COUNTERS = {"out_packets": 1_200_000, "in_packets": 1_100_000, "drop_unknown_sender": 4}
ENV = "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.{}.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
AWAY = Problem(
    "registry-unreachable",
    "none of 2 endpoints answered",
    NOW.boot - 760,
    ("http://192.168.6.15:2379   connection refused", "http://192.168.6.2:2379    no answer in 1.7s"),
)


class Host:
    """A host's files, and an agent on it while `agent` runs."""

    def __init__(self, folder):
        self.folder = folder
        self.subnet_env = folder / "subnet.env"
        self.env = {"FLANCTL_ENDPOINTS": f"sqlite:{folder / 'registry.db'}"}
        self.apis = []

    def agent(self, snapshot, **more):
        snapshot = replace(snapshot, subnet_file=str(self.subnet_env))
        return self.say(json.dumps(document(snapshot, COUNTERS, NOW, **more)))

    def say(self, text):
        api = StatusApi(lambda _: Answer(200, text), socket_path=self.folder / "agent.sock")
        api.open()
        thread = threading.Thread(target=api.run)
        thread.start()
        self.apis.append((api, thread))
        return self

    def lease(self, subnet="172.17.41", public_ip="192.168.6.2", **instance):
        store = SqliteStore(str(self.folder / "registry.db"))
        if store.get("/jxdd/network/config") is None:
            store.create("/jxdd/network/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
        value = json.dumps({"PublicIP": public_ip}).encode()
        store.create(f"/jxdd/network/subnets/{subnet}.0-24", value, ttl=86000)
        if instance:
            words = {"host": "h", "version": "1", "data_path": "userspace", **instance}
            store.create(f"/jxdd/network/flanctl/hosts/{public_ip}", json.dumps(words).encode(), ttl=86000)
        store.close()

    def status(self, *words, **more):
        return flanctl(
            "status", "--run-dir", self.folder, "--subnet-file", self.subnet_env, *words, env=self.env, **more
        )  # fmt: skip


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    made.subnet_env.write_text(ENV.format(41))
    yield made
    for api, thread in made.apis:
        api.stop()
        thread.join(5)
        assert not thread.is_alive()


def lines(answer):
    """Without those about devices of the machine that runs the test."""
    return [line for line in answer.out.splitlines() if not re.match(r"\w+ +(device|docker) ", line)]


# ---- an agent that answers --------------------------------------------------------------------------------------------


def test_the_screen_of_a_ready_host(host):
    answer = host.agent(READY).status()
    assert (answer.code, answer.err) == (0, "")
    assert lines(answer) == [
        "node1  ready  172.17.41.0/24 of 172.17.0.0/16  udp/userspace  mtu 1472  since 3d4h",
        "ok    lease      172.17.41.0/24 for 192.168.6.2, 19h12m left, renewed 4h48m ago",
        "ok    registry   etcd v3 over HTTP at http://192.168.6.15:2379, watch at revision 48211, last word 6s ago",
        "ok    peers      3 known; routes 1 of 1, rule chains 2 of 2",
        "ok    data       userspace path; 1.2M packets out, 1.1M in, 0 dropped in the last 1m",
        "ok    subnet.env 172.17.41.1/24, mtu 1472",
    ]


def test_the_age_on_the_screen_is_the_watchs_own_though_other_requests_are_answered(host):
    answer = host.agent(replace(READY, watched=NOW.boot - 100, answered=NOW.boot - 1)).status()
    assert "watch at revision 48211, last word 1m ago" in answer.out


def test_which_api_was_taken_and_why_is_on_the_screen_and_in_json(host):
    why = "both hold /jxdd/network/config"
    answer = host.agent(replace(READY, registry=f"etcd v3 over HTTP at http://m:2379 ({why})")).status()
    assert f"ok    registry   etcd v3 over HTTP at http://m:2379 ({why}), watch at" in answer.out
    document = json.loads(host.status("-w", "json").out)
    assert document["registry"]["store"].endswith(f"({why})")


def test_an_offload_that_was_given_up_is_on_the_screen_with_its_reason(host):
    lost = {"tso": (True, ""), "gso": (False, "IPsec covers a route (EIO)")}
    answer = host.agent(READY, offloads=lost).status()
    assert "1.1M in, without gso (IPsec covers a route (EIO)), 0 dropped" in answer.out


def test_the_screen_of_an_outage(host):
    away = replace(READY, found=(AWAY,), watched=NOW.boot - 760, answered=NOW.boot - 760)
    answer = host.agent(away).status()
    assert answer.code == 3
    assert lines(answer)[:7] == [
        "node1  degraded  172.17.41.0/24 of 172.17.0.0/16  udp/userspace  mtu 1472  since 3d4h",
        "ok    lease      172.17.41.0/24 for 192.168.6.2, 19h12m left; packets flow until peers see it expire",
        "fail  registry   none of 2 endpoints answered, for 12m   [registry-unreachable]",
        "                 http://192.168.6.15:2379   connection refused",
        "                 http://192.168.6.2:2379    no answer in 1.7s",
        "      next: bring the registry back; the agent tries again by itself and needs no restart",
        "ok    peers      3 known, as of revision 48211, 12m old; routes 1 of 1, rule chains 2 of 2",
    ]


def test_a_reservation_never_ends(host):
    reserved = replace(READY, lease=HeldLease(IPv4Network("172.17.41.0/24"), None, None, NOW.boot, 12))
    assert "ok    lease      172.17.41.0/24 for 192.168.6.2, reserved, never ends" in lines(
        host.agent(reserved).status()
    )


@pytest.mark.parametrize(
    ("found", "code", "brief"),
    [
        ((), 0, "node1  ready  172.17.41.0/24 of 172.17.0.0/16  udp/userspace  mtu 1472  since 3d4h"),
        ((AWAY,), 3, "fail registry-unreachable"),
        ((Problem("registry-denied", "no"),), 3, "fail registry-denied"),
        ((Problem("device-gone", "flannel0 is gone"),), 1, "fail device-gone"),
        ((Problem("lease-foreign", "taken"), AWAY, Problem("device-gone", "x")), 8, "fail lease-foreign"),
        ((AWAY, Problem("device-gone", "x")), 3, "fail registry-unreachable"),
        ((Problem("bad-key", "k"),), 0, "node1  ready  172.17.41.0/24 of 172.17.0.0/16  udp/userspace  mtu 1472  since 3d4h"),
    ],
)  # fmt: skip
def test_the_exit_code_follows_the_verdict_and_brief_is_one_line(host, found, code, brief):
    host.agent(replace(READY, found=found))
    answer = host.status("--brief")
    assert (answer.code, answer.out) == (code, brief + "\n")
    assert host.status().code == host.status("-w", "json").code == host.status("-w", "simple").code == code


def test_strict_makes_a_warning_count(host):
    host.agent(replace(READY, found=(Problem("bad-key", "k"),)))
    answer = host.status("--strict", "--brief")
    assert (answer.code, answer.out) == (1, "fail bad-key\n")


def test_a_starting_agent_ends_with_1_and_says_what_it_waits_for(host):
    starting = replace(
        READY, state="starting", lease=None, peers=None, objects=(), found=(Problem("no-config", "no config at /k"),)
    )  # fmt: skip
    answer = host.agent(starting).status()
    assert answer.code == 1
    assert answer.out.startswith("node1  starting  ")
    assert "fail  registry   no config at /k   [no-config]\n      next: flanctl net init" in answer.out


def test_many_problems_of_a_kind_are_cut_on_the_screen(host):
    host.agent(replace(READY, found=tuple(Problem("bad-key", f"key {n}") for n in range(30))))
    answer = host.status()
    assert answer.out.count("[bad-key]") == 5
    host.agent(replace(READY, found=tuple(Problem("duplicate-ip", f"lease {n}") for n in range(3))))
    assert host.status().out.count("next: flanctl subnets ls") == 1
    assert "warn  peers      25 more; -w json has them" in answer.out


def test_a_subnet_env_of_another_subnet_degrades_the_host(host):
    host.subnet_env.write_text(ENV.format(19))
    answer = host.agent(READY).status()
    assert answer.code == 1
    assert answer.out.startswith("node1  degraded  ")
    assert (
        f"{host.subnet_env} says 172.17.19.0/24, the lease is 172.17.41.0/24   [stale-subnet-env]"
        in answer.out
    )


def test_a_missing_subnet_env_degrades_the_host(host):
    host.subnet_env.unlink()
    assert host.agent(READY).status("--brief").out == "fail stale-subnet-env\n"


def test_a_docker_file_of_another_subnet_is_a_warning(host):
    (host.folder / "docker").write_text('DOCKER_NETWORK_OPTIONS=" --bip=172.17.19.1/24"\n')
    answer = host.agent(READY).status()
    assert answer.code == 0
    assert "says --bip=172.17.19.1/24, the lease wants 172.17.41.1/24   [docker-file-stale]" in answer.out
    assert "next: restart the agent's unit" in " ".join(answer.out.split())


def test_the_next_step_of_docker_problems_lasts():
    """docker-opts by hand is undone, or lacks what the unit gives it, at the agent's next start."""
    from flanctl.commands.status import _NEXT

    for name in ("docker-closed", "docker-file-stale"):
        assert "ExecStartPost=" in _NEXT[name]
        assert "flanctl docker-opts" not in _NEXT[name]


@pytest.fixture
def flanneld():
    """A process that looks like one."""
    process = subprocess.Popen(["bash", "-c", "exec -a /usr/bin/flanneld sleep 600"])
    until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"/usr/bin/flanneld"))
    yield process.pid
    process.kill()
    process.wait()


def test_a_flanneld_beside_the_agent_is_said(host, flanneld):
    answer = host.agent(READY).status()
    assert answer.code == 0
    assert f"warn  agent      flanneld runs beside the agent, pid {flanneld}   [two-flannels]" in answer.out


def test_a_flanneld_in_the_agents_place_is_said(host, flanneld):
    answer = host.status()
    assert answer.code == 4
    assert f"warn  agent      flanneld runs as pid {flanneld}" in answer.out


def test_what_an_agent_says_cannot_move_the_cursor(host):
    answer = host.agent(
        replace(READY, found=(Problem("bad-key", "key \x1b[2J\nok    lease  fine"),))
    ).status()
    assert "\x1b" not in answer.out
    assert "\nok    lease  fine" not in answer.out


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, ""),
        (AcceptReport("off"), "; accept rules off"),
        (AcceptReport(wanted=3), "; accept rules 3 of 3"),
        (AcceptReport(wanted=3, error="no"), "; accept rules 0 of 3"),
        (
            AcceptReport(wanted=3, before=("-A DOCKER-USER -j DROP", "-A x"), programs="iptables-legacy"),
            "; accept rules 3 of 3 by iptables-legacy, behind `-A DOCKER-USER -j DROP` and 1 more",
        ),
    ],
)
def test_dockers_line_tells_the_accept_rules(report, words):
    assert _accept_words(document(replace(READY, accept=report), COUNTERS, NOW)) == words


def test_an_agent_of_another_version_may_lack_what_came_later(host):
    shown = document(replace(READY, subnet_file=str(host.subnet_env)), COUNTERS, NOW)
    del (
        shown["docker_bridge_matches"],
        shown["docker_accept"],
        shown["waiting_for"],
        shown["problems_left_out"],
    )
    host.say(json.dumps({**shown, "something": "new"}))
    assert host.status().code == 0
    assert json.loads(host.status("-w", "json").out)["something"] == "new"


def test_json_is_the_agents_document_and_what_the_host_shows(host):
    answer = host.agent(READY).status("-w", "json")
    shown = json.loads(answer.out)
    assert tuple(shown)[: len(FIELDS)] == FIELDS
    assert tuple(shown)[len(FIELDS) :] == ("exit", "agent", "local")
    assert (shown["schema"], shown["verdict"], shown["exit"], shown["agent"]) == (1, "ready", 0, "answers")
    assert shown["lease"]["seconds_left"] == 69130
    assert shown["local"]["subnet_env"] == {
        "network": "172.17.0.0/16",
        "subnet": "172.17.41.0/24",
        "mtu": 1472,
    }


def test_simple_is_a_promise(host):
    rows = [
        line.split("\t")
        for line in host.agent(replace(READY, found=(AWAY,))).status("-w", "simple").out.splitlines()
    ]
    assert [row[0] for row in rows[:24]] == [
        "host", "agent", "verdict", "state", "state_seconds", "exit", "network", "subnet", "lease_kind",
        "lease_seconds_left", "public_ip", "backend", "data_path", "mtu", "registry_answers", "watch_revision",
        "watch_seconds_ago", "peers", "routes_wanted", "routes_missing", "packets_out", "packets_in",
        "dropped_recently", "data_path_why",
    ]  # fmt: skip
    values = {row[0]: row[1:] for row in rows}
    assert values["lease_seconds_left"] == ["69130"]
    assert values["registry_answers"] == ["false"]
    assert values["problem"] == ["registry-unreachable", "fail"]


# ---- nobody answers ---------------------------------------------------------------------------------------------------


def test_without_an_agent_it_says_what_is_still_known_and_ends_with_4(host):
    host.lease(public_ip="127.0.0.9")  # not ours by address: the loopback range does not count
    host.subnet_env.unlink()
    answer = host.status()
    assert answer.code == 4
    assert f"no agent on this host: {host.folder}/agent.sock is missing" in answer.out
    assert "[agent-missing]" in answer.out
    assert "warn  lease      the registry holds none for this host" in answer.out
    assert f"there is no {host.subnet_env}" in answer.out


def test_without_an_agent_the_lease_is_read_from_the_registry(host):
    host.lease(public_ip="192.0.2.77")
    host.env["FLANCTL_PUBLIC_IP"] = "192.0.2.77"
    answer = host.status()
    assert answer.code == 4
    assert "ok    lease      172.17.41.0/24 of 192.0.2.77 is in sqlite" in answer.out


def test_a_subnet_that_another_host_holds_is_a_lost_lease(host):
    host.lease(public_ip="192.0.2.88")
    answer = host.status()
    assert answer.code == 8
    assert (
        "fail  lease      lease 172.17.41.0/24 belongs to 192.0.2.88 at revision 3   [lease-foreign]"
        in answer.out
    )
    assert host.status("--brief").out == "fail lease-foreign\n"


def test_a_host_behind_nat_knows_itself_by_its_instance(host):
    host.lease(public_ip="192.0.2.88", instance="abc")
    state = host.folder / "state"
    state.mkdir()
    (state / "state.json").write_text(
        json.dumps({"instance": "abc", "prefix": "/jxdd/network", "subnet": None})
    )
    host.env["FLANCTL_STATE_DIR"] = str(state)
    answer = host.status()
    assert answer.code == 4
    assert "ok    lease      172.17.41.0/24 of 192.0.2.88 is in sqlite" in answer.out


def test_a_registry_that_does_not_answer_either_is_passed_over_quickly(host):
    host.env = {"FLANCTL_ENDPOINTS": "http://127.0.0.1:9"}
    answer = host.status(timeout=30)
    assert answer.code == 4
    assert re.search(r"(?m)^skip  registry   .*\n +http://127\.0\.0\.1:9   connection refused$", answer.out)


def test_without_an_agent_json_has_every_field_and_null_for_the_unknown(host):
    shown = json.loads(host.status("-w", "json").out)
    assert set(FIELDS) < set(shown)
    assert (shown["schema"], shown["state"], shown["exit"], shown["agent"]) == (1, None, 4, "missing")
    assert [problem["id"] for problem in shown["problems"]] == ["agent-missing"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to become")
def test_who_may_not_ask_sees_what_anybody_may_and_gets_7(host):
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        host.folder, host.subnet_env = Path(folder), Path(folder) / "subnet.env"
        host.subnet_env.write_text(ENV.format(41))
        host.agent(READY)
        answer = host.status(prefix=nobody)
        assert answer.code == 7, answer
        assert "only root may ask the agent" in answer.out
        assert "ok    subnet.env 172.17.41.1/24, mtu 1472" in answer.out
        assert host.status("--brief", prefix=nobody).out == "fail not-permitted\n"


@pytest.mark.parametrize("words", [("--timeout", "soon"), ("-w", "xml"), ("surplus",)])
def test_nonsense_is_a_usage_error(host, words):
    answer = host.status(*words)
    assert (answer.code, answer.out) == (2, "")

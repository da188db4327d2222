"""What follows from what the agent knows: problems, readiness, the document."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from flanctl.agent.backends.base import PeerTraffic
from flanctl.agent.snapshot import (
    BLOCKING,
    FIELDS,
    PROBLEMS,
    SHOWN,
    STALLED,
    HeldLease,
    Now,
    Place,
    Problem,
    Snapshot,
    document,
    not_ready,
    problems,
)

SUBNET = IPv4Network("172.17.41.0/24")
PLACE = Place(
    IPv4Network("172.17.0.0/16"), 255, "udp", "userspace", "--data-path tun", "flannel0", "eth0", IPv4Address("192.168.6.2"), 1500, 1472
)  # fmt: skip
STARTING = Snapshot(
    "starting", since=1000.0, started=1000.0, turned=1000.0, host="node1", version="0.1.0", pid=7,
    prefix="/jxdd/network", subnet_file="/run/flannel/subnet.env",
)  # fmt: skip
READY = replace(
    STARTING,
    state="ready",
    place=PLACE,
    lease=HeldLease(SUBNET, ends=87400.0, ttl=86400.0, renewed=1000.0, revision=12),
    registry="etcd v3 over HTTP at http://192.168.6.15:2379",
    answered=1000.0,
    watched=1000.0,
    revision=48211,
    peers=3,
    objects=(("link", 1, 0), ("route", 1, 0), ("rule", 1, 0)),
)
NOW = Now(boot=1010.0, wall=1_800_000_010.0)


def ids(snapshot, now=NOW):
    return [problem.id for problem in problems(snapshot, now)]


def test_a_ready_agent_has_no_problem_and_packets_flow():
    assert ids(READY) == []
    assert not_ready(READY, NOW) == ()


def test_the_document_has_every_field_that_scripts_were_promised():
    for snapshot in (STARTING, READY):
        assert tuple(document(snapshot, {}, NOW)) == FIELDS


def test_the_document_shows_traffic_by_peer_and_why_an_offload_is_off():
    peers = {
        "192.168.6.7": PeerTraffic(1, 100, 2, 200, 3, 12.6),
        "192.168.6.8": PeerTraffic(9, 9000, 0, 0, 0, None),
    }
    shown = document(READY, {}, NOW, peers=peers, offloads={"tso": (True, ""), "gso": (False, "EIO")})
    assert [(peer["public_ip"], peer["heard_seconds_ago"]) for peer in shown["peers"]["traffic"]] == [
        ("192.168.6.8", None),
        ("192.168.6.7", 12),
    ]
    assert shown["peers"]["traffic"][1]["drops"] == 3
    assert shown["offloads"] == {"tso": {"on": True, "why": None}, "gso": {"on": False, "why": "EIO"}}


def test_a_starting_agent_names_everything_that_is_missing():
    waiting = replace(STARTING, waiting="no config at /jxdd/network/config")
    assert not_ready(waiting, NOW) == (
        "no-lease: no config at /jxdd/network/config",
        "peers-incomplete: the first complete list of peers is not there yet",
    )


def test_until_subnet_env_is_written_it_is_not_ready():
    assert not_ready(replace(READY, state="leased"), NOW) == ("leased: subnet.env is not written yet",)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(28_000, []), (58_000, ["lease-short"]), (86_401, ["lease-missing"])]
)
def test_a_lease_that_is_not_renewed_shows_by_a_third_and_at_its_end(seconds, expected):
    now = Now(1000.0 + seconds, 0.0)
    fresh = replace(READY, turned=now.boot, watched=now.boot)
    assert ids(fresh, now) == expected
    assert bool(not_ready(fresh, now)) == ("lease-missing" in expected)


@pytest.mark.parametrize(("seconds", "expected"), [(86_000, []), (86_401, ["lease-missing"])])
def test_a_lease_gone_on_with_in_an_outage_has_an_end_though_nobody_knows_its_length(seconds, expected):
    now = Now(1000.0 + seconds, 0.0)
    known = HeldLease(SUBNET, ends=87400.0, ttl=None, renewed=None, revision=12)
    resumed = replace(READY, lease=known, turned=now.boot, watched=now.boot)
    assert ids(resumed, now) == expected
    assert document(resumed, {}, now)["lease"]["renewed_seconds_ago"] is None


def test_a_reservation_never_ends():
    now = Now(10.0**7, 0.0)
    reserved = replace(
        READY, lease=HeldLease(SUBNET, None, None, 1000.0, 12), turned=now.boot, watched=now.boot
    )
    assert ids(reserved, now) == []
    assert document(reserved, {}, now)["lease"]["kind"] == "reservation"


def test_a_loop_that_does_not_turn_is_a_problem_after_a_minute():
    assert ids(READY, Now(1000.0 + STALLED - 1, 0.0)) == []
    assert ids(READY, Now(1000.0 + STALLED + 1, 0.0)) == ["loop-stalled"]


def test_a_start_may_wait_longer_for_a_call_to_a_slow_registry():
    assert ids(STARTING, Now(1000.0 + STALLED + 1, 0.0)) == []
    assert ids(STARTING, Now(1601.0, 0.0)) == ["loop-stalled"]


def test_a_silent_watch_is_shown_unless_its_cause_is():
    now = Now(1130.0, 0.0)
    silent = replace(READY, turned=1130.0)
    assert ids(silent, now) == ["watch-old"]
    away = replace(silent, found=(Problem("registry-unreachable", "nobody", 1010.0),))
    assert ids(away, now) == ["registry-unreachable"]
    gone = replace(silent, found=(Problem("no-config", "nothing there", 1010.0),))
    assert ids(gone, now) == ["no-config", "watch-old"]


def test_a_registry_that_is_away_is_degraded_but_packets_flow():
    away = replace(READY, found=(Problem("registry-unreachable", "none of 3 endpoints answered", 990.0),))
    shown = document(away, {}, NOW)
    assert shown["verdict"] == "degraded"
    assert shown["registry"]["answers"] is False
    assert shown["registry"]["trouble"] == {
        "id": "registry-unreachable",
        "message": "none of 3 endpoints answered",
        "seconds": 20,
    }
    assert not_ready(away, NOW) == ()


def test_a_missing_config_is_not_a_registry_that_does_not_answer():
    shown = document(replace(STARTING, found=(Problem("no-config", "no config", 1000.0),)), {}, NOW)
    assert shown["registry"]["answers"] is True


@pytest.mark.parametrize("id_", sorted(BLOCKING))
def test_what_stops_packets_is_not_ready_and_says_why(id_):
    broken = replace(READY, found=(Problem(id_, "words"),))
    assert not_ready(broken, NOW) == (f"{id_}: words",)
    assert PROBLEMS[id_] == "fail"


def test_problems_are_shown_worst_first_and_at_most_so_many():
    many = tuple(Problem("bad-key", f"key {n}") for n in range(5000))
    snapshot = replace(READY, found=(*many, Problem("lease-foreign", "gone")))
    shown = document(snapshot, {}, NOW)
    assert shown["problems"][0]["id"] == "lease-foreign"
    assert (len(shown["problems"]), shown["problems_left_out"]) == (SHOWN, 5001 - SHOWN)


def test_drops_are_those_since_the_sample_and_never_negative():
    sampled = replace(READY, drops_before=(950.0, 10))
    assert (
        document(sampled, {"drop_short": 11, "drop_no_route": 2, "in_packets": 99}, NOW)["dropped_recently"]
        == 3
    )
    assert document(sampled, {"drop_short": 1}, NOW)["dropped_recently"] == 0, "a data plane made anew"


def test_moments_become_dates_of_the_wall_clock():
    shown = document(READY, {}, NOW)
    assert shown["as_of"] == "2027-01-15T08:00:10Z"
    assert shown["lease"]["renewed"] == "2027-01-15T08:00:00Z"
    assert shown["lease"]["expires"] == "2027-01-16T08:00:00Z"

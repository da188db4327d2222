"""The page Prometheus reads: its form, its completeness, its bounds."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flanctl.agent.backends.base import PeerTraffic
from flanctl.agent.meters import Meters
from flanctl.agent.metrics import REASONS, TABLE, render
from flanctl.agent.snapshot import MOST_PEERS, PROBLEMS, Problem, Taken
from tests.unit.agent.test_snapshot import NOW, READY, STARTING

FULL = replace(READY, taken=Taken(4, 1, 2, 3), docker_matches=True)
LINE = re.compile(
    r'(?P<name>[a-z_]+)(?P<labels>\{([a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (?P<value>-?[0-9.e+-]+)'
)


def samples(page):
    """{name{labels}: value}; every line is a comment or a sample, and no sample comes twice."""
    found = {}
    for line in page.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) [a-z_]+ .+", line), line
            continue
        match = LINE.fullmatch(line)
        assert match, line
        key = match["name"] + (match["labels"] or "")
        assert key not in found, key
        found[key] = float(match["value"])
    return found


PEERS = {
    "192.168.6.7": PeerTraffic(10, 1000, 20, 2000, 3, 1.5),
    "192.168.6.8": PeerTraffic(1, 100, 0, 0, 0, None),
}
OFFLOADS = {"tso": (True, ""), "gso": (False, "the outgoing device computes no checksums")}


def page(snapshot=FULL, counters=None, meters=None, now=NOW):
    ends = {"client": 1.8e9, "ca": 1.9e9}
    return render(snapshot, meters or Meters(), counters or {}, now, ends, peers=PEERS, offloads=OFFLOADS)


def names_in(text):
    return set(re.findall(r"(?m)^# TYPE ([a-z_]+) ", text))


def test_a_ready_agent_shows_every_metric_there_is():
    """flannel.md 11, row 23: there are none."""
    assert names_in(page()) == set(TABLE)
    samples(page())


def test_peers_are_counted_each_and_one_never_heard_of_has_no_time():
    shown = samples(page())
    assert shown['flanctl_peer_packets_total{peer="192.168.6.7",direction="in"}'] == 20
    assert shown['flanctl_peer_bytes_total{peer="192.168.6.8",direction="out"}'] == 100
    assert shown['flanctl_peer_dropped_packets_total{peer="192.168.6.7"}'] == 3
    heard = [key for key in shown if key.startswith("flanctl_peer_heard")]
    assert heard == ['flanctl_peer_heard_timestamp_seconds{peer="192.168.6.7"}']
    assert shown[heard[0]] == pytest.approx(NOW.wall - 1.5)


def test_of_many_peers_the_busiest_are_shown():
    many = {f"10.1.{n // 250}.{n % 250}": PeerTraffic(1, n, 0, 0, 0, None) for n in range(3 * MOST_PEERS)}
    text = render(FULL, Meters(), {}, NOW, peers=many)
    shown = samples(text)
    least = min(value for key, value in shown.items() if "bytes_total{peer" in key and "out" in key)
    assert text.count("flanctl_peer_dropped_packets_total{") == MOST_PEERS
    assert least == 2 * MOST_PEERS


def test_each_offload_is_1_or_0():
    shown = samples(page())
    assert shown['flanctl_offload{name="tso"}'] == 1
    assert shown['flanctl_offload{name="gso"}'] == 0


def test_a_starting_agent_shows_what_it_knows_and_nothing_made_up():
    shown = samples(page(STARTING))
    assert shown['flanctl_agent_state{state="starting"}'] == 1
    for name in ("flanctl_lease_expiry_timestamp_seconds", "flanctl_peers", "flanctl_docker_bridge_matches"):
        assert not any(key.startswith(name) for key in shown)


def test_known_label_values_are_there_from_the_start_with_0():
    shown = samples(page(STARTING))
    zero = [
        *(f'flanctl_dropped_packets_total{{reason="{reason}",path="userspace"}}' for reason in REASONS),
        *(f'flanctl_problem{{id="{id_}",severity="{severity}"}}' for id_, severity in PROBLEMS.items()),
        *(f'flanctl_lease_renewals_total{{result="{result}"}}' for result in ("ok", "error", "conflict")),
        *(f'flanctl_kernel_repairs_total{{kind="{kind}"}}' for kind in ("link", "route", "rule")),
        'flanctl_registry_requests_total{operation="list",result="timeout"}',
        'flanctl_watch_restarts_total{reason="compacted"}',
    ]
    assert [shown[key] for key in zero] == [0] * len(zero)


def test_counters_names_end_in_total_and_gauges_do_not():
    for name, (kind, text) in TABLE.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert text.endswith(".")


def test_packets_and_drops_come_from_the_data_plane():
    shown = samples(page(counters={"out_packets": 5, "in_bytes": 700, "drop_unknown_sender": 2}))
    assert shown['flanctl_packets_total{direction="out",path="userspace"}'] == 5
    assert shown['flanctl_bytes_total{direction="in",path="userspace"}'] == 700
    assert shown['flanctl_dropped_packets_total{reason="unknown_sender",path="userspace"}'] == 2


def test_a_problem_is_1_and_one_of_an_unknown_kind_makes_no_series():
    shown = samples(
        page(replace(FULL, found=(Problem("bad-key", "x"), Problem("bad-key", "y"), Problem("new", "z"))))
    )
    assert shown['flanctl_problem{id="bad-key",severity="warn"}'] == 1
    assert not any('id="new"' in key for key in shown)


def test_but_for_the_peers_traffic_the_page_does_not_grow_with_peers_and_problems():
    small = page()
    large = page(replace(FULL, peers=5000, found=tuple(Problem("bad-key", f"{n}") for n in range(5000))))
    assert len(large.splitlines()) == len(small.splitlines())


@pytest.mark.parametrize(
    ("flanctl", "expected"), [(None, (0, 0, 48)), (0, (0, 48, 0)), (45, (45, 3, 0)), (48, (48, 0, 0))]
)
def test_peers_are_told_apart_by_what_they_announce(flanctl, expected):
    shown = samples(page(replace(FULL, peers=48, flanctl_peers=flanctl)))
    assert expected == tuple(
        shown[f'flanctl_peers{{runs="{runs}"}}'] for runs in ("flanctl", "flanneld", "unknown")
    )


def test_the_ends_of_certificates_are_there_where_there_are_certificates():
    name = "flanctl_certificate_expiry_timestamp_seconds"
    assert samples(page())[f'{name}{{role="client"}}'] == 1.8e9
    assert name not in render(FULL, Meters(), {}, NOW)


def test_histograms_add_up():
    meters = Meters()
    for seconds in (0.001, 0.03, 7.0, 99.0):
        meters.request_seconds["list"].observe(seconds)
    shown = samples(page(meters=meters))
    name = "flanctl_registry_request_duration_seconds"
    assert shown[f'{name}_bucket{{operation="list",le="0.005"}}'] == 1
    assert shown[f'{name}_bucket{{operation="list",le="0.1"}}'] == 2
    assert shown[f'{name}_bucket{{operation="list",le="10.0"}}'] == 3
    assert shown[f'{name}_bucket{{operation="list",le="+Inf"}}'] == 4
    assert shown[f'{name}_count{{operation="list"}}'] == 4
    assert shown[f'{name}_sum{{operation="list"}}'] == pytest.approx(106.031)


def test_timestamps_are_the_wall_clocks():
    shown = samples(page())
    assert shown["flanctl_lease_expiry_timestamp_seconds"] == pytest.approx(1_800_000_000 + 86_400)
    assert shown["flanctl_watch_last_message_timestamp_seconds"] == pytest.approx(1_800_000_000)


def test_a_value_cannot_fake_a_label_or_a_line():
    shown = samples(page(replace(FULL, version='1"}\nflanctl_peers 7\\')))
    assert sum(key.startswith("flanctl_build_info") for key in shown) == 1


def test_the_process_is_told_as_the_kernel_knows_it():
    shown = samples(page())
    assert shown["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < shown["process_open_fds"] < 2000
    assert shown["process_resident_memory_bytes"] > 10_000_000
    assert 0 <= time.time() - shown["process_start_time_seconds"] < 3600


def test_the_reasons_are_the_data_planes():
    text = Path("native/dataplane/src/counters.rs").read_text()
    assert tuple(re.findall(r'^    [A-Z]\w+ => "(\w+)",', text, re.MULTILINE)) == REASONS


@pytest.mark.parametrize("doc", ["docs/monitoring.md", "docs/monitoring.zh-CN.md"])
def test_the_documented_table_is_the_codes(doc):
    rows = re.findall(r"(?m)^\| `((?:flanctl|process)_[a-z_]+)` \| (\w+) \|", Path(doc).read_text())
    assert dict(rows) == {name: kind for name, (kind, _) in TABLE.items()}


def test_the_documented_meanings_are_the_pages():
    rows = re.findall(
        r"(?m)^\| `([a-z_]+)` \| (?:gauge|counter|histogram) \| [^|]+ \| (.+) \|$",
        Path("docs/monitoring.md").read_text(),
    )
    assert dict(rows) == {name: text for name, (_, text) in TABLE.items()}


@pytest.mark.parametrize("doc", ["docs/monitoring.md", "docs/monitoring.zh-CN.md"])
def test_every_metric_and_label_value_an_alert_names_exists(doc):
    text = Path(doc).read_text()
    alerts = re.findall(r"(?m)^ +expr: (.+)$", text)
    assert len(alerts) >= 8
    shown = samples(page())
    for expression in alerts:
        for name, labels in re.findall(r"((?:flanctl|process)_[a-z_]+)(\{[^}]*\})?", expression):
            assert name in TABLE, expression
            for label in re.findall(r'[a-z]+="[^"]*"', labels):
                assert any(key.startswith(name) and label in key for key in shown), expression


@pytest.mark.parametrize("doc", ["docs/monitoring.md", "docs/monitoring.zh-CN.md"])
def test_every_problem_is_documented(doc):
    assert set(re.findall(r"(?m)^\| `([a-z0-9-]+)` \| (?:fail|warn) \|", Path(doc).read_text())) >= set(
        PROBLEMS
    )

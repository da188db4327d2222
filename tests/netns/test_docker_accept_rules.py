"""Docker's accept rules through the real iptables, as `iptables-save` shows them.

this process ── its own namespace: empty tables, no docker0
"""

from __future__ import annotations

import shutil
import subprocess
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.kernel import docker_accept
from flanctl.agent.kernel.docker_accept import DockerAccept
from tests.support.namespaces import new_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("root", "netns", "iptables")
NETWORK, SUBNET = IPv4Network("172.17.0.0/16"), IPv4Network("172.17.81.0/24")
_WHAT = '-s 172.17.0.0/16 -d 172.17.81.0/24 -i flannel0 {}-m comment --comment "flanctl docker-accept" -j'
RAW = [f"-A PREROUTING {_WHAT.format('')} ACCEPT"]
MANGLE = [f"-A PREROUTING {_WHAT.format('')} MARK --set-xmark 0x4000000/0x4000000"]
FILTER = ["-N DOCKER-USER", f"-A DOCKER-USER {_WHAT.format('-o docker0 ')} ACCEPT"]
DOCKERS = "-d 172.17.81.2/32 ! -i docker0 -j DROP"
"""What Docker 28 appends to PREROUTING of table raw for each container."""


@pytest.fixture
def accept() -> Iterator[DockerAccept]:
    with new_namespace():
        yield DockerAccept(NETWORK, SUBNET, "flannel0", has_docker=lambda: True)


def sh(words: str) -> None:
    subprocess.run(["sh", "-c", words], check=True)


def listing(table: str, programs: str = "iptables") -> list[str]:
    done = subprocess.run([programs, "-t", table, "-S"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("-P")]


def tables() -> tuple[list[str], list[str], list[str]]:
    return listing("raw"), listing("mangle"), listing("filter")


def test_three_rules_open_the_lease_for_the_network_by_the_tunnel_and_nothing_else(
    accept: DockerAccept,
) -> None:
    report = accept.ensure()
    assert (report.wanted, report.missing, len(report.repaired), report.before) == (3, 0, 3, ())
    assert tables() == (RAW, MANGLE, FILTER)
    assert accept.ensure().repaired == ()


@pytest.mark.parametrize(
    "harm",
    [
        "iptables -t raw -F",
        "iptables -t mangle -F PREROUTING",
        "iptables -F DOCKER-USER",
        "iptables -F; iptables -X DOCKER-USER",
        "printf '*raw\\nCOMMIT\\n*mangle\\nCOMMIT\\n*filter\\nCOMMIT\\n' | iptables-restore",
        "iptables -I DOCKER-USER -j RETURN",
        "iptables -t raw -I PREROUTING -i eth0 -j ACCEPT",
        f"iptables -t raw -I PREROUTING {DOCKERS}",
        "iptables -t raw -R PREROUTING 1 -s 10.0.0.0/8 -m comment --comment 'flanctl docker-accept' -j ACCEPT",
        f"iptables -t raw {RAW[0]}",
    ],
)
def test_each_harm_is_repaired_and_ours_are_first_again(accept: DockerAccept, harm: str) -> None:
    accept.ensure()
    sh(harm)
    assert accept.ensure().repaired
    assert [table[-1:] and table[table[0].startswith("-N")] for table in tables()] == [
        RAW[0],
        MANGLE[0],
        FILTER[1],
    ]
    assert accept.ensure().repaired == ()


@pytest.mark.needs("nft")
def test_a_flushed_ruleset_as_a_reload_of_the_firewall_leaves_it_is_repaired(accept: DockerAccept) -> None:
    accept.ensure()
    sh("nft flush ruleset")
    assert len(accept.ensure().repaired) == 3
    assert tables() == (RAW, MANGLE, FILTER)


def test_what_an_operator_refuses_at_the_beginning_stays_before_ours_and_is_told(
    accept: DockerAccept,
) -> None:
    """Also when ours are written after it, as after a boot that restored the operator's rules."""
    sh("iptables -N DOCKER-USER; iptables -A DOCKER-USER -s 172.17.9.0/24 -j REJECT")
    sh("iptables -A DOCKER-USER -j RETURN")
    report = accept.ensure()
    refusal = "-A DOCKER-USER -s 172.17.9.0/24 -j REJECT --reject-with icmp-port-unreachable"
    assert report.before == (refusal,)
    assert listing("filter") == [FILTER[0], refusal, FILTER[1], "-A DOCKER-USER -j RETURN"]
    sh("iptables -t raw -I PREROUTING -s 172.17.8.0/24 -j DROP")
    report = accept.ensure()
    assert (report.repaired, len(report.before)) == ((), 2)


def test_rules_of_others_stay_where_they_are_and_remove_takes_only_ours(accept: DockerAccept) -> None:
    sh(
        f"iptables -t raw -A PREROUTING {DOCKERS}; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER"
    )
    sh('iptables -A DOCKER-USER -m comment --comment "it\'s odd" -j RETURN')
    others = tables()
    accept.ensure()
    assert listing("raw") == [*RAW, *others[0]]
    accept.remove()
    assert tables() == others
    accept.remove()


def test_a_chain_that_only_we_made_goes_with_our_rules(accept: DockerAccept) -> None:
    accept.ensure()
    accept.remove()
    assert tables() == ([], [], [])


def test_without_docker_and_when_off_nothing_is_written_and_what_was_there_goes(accept: DockerAccept) -> None:
    accept.ensure()
    off = DockerAccept(NETWORK, SUBNET, "flannel0", wanted=False, has_docker=lambda: True)
    assert (off.ensure().mode, off.ensure().wanted, tables()) == ("off", 0, ([], [], []))
    accept.ensure()
    gone = DockerAccept(NETWORK, SUBNET, "flannel0", has_docker=lambda: False)
    assert (gone.ensure().mode, gone.ensure().wanted, tables()) == ("auto", 0, ([], [], []))


def test_another_lease_replaces_the_rules_of_the_old_one(accept: DockerAccept) -> None:
    DockerAccept(NETWORK, IPv4Network("172.17.9.0/24"), "flannel0", has_docker=lambda: True).ensure()
    assert len(accept.ensure().repaired) == 3
    assert tables() == (RAW, MANGLE, FILTER)


def test_a_docker0_is_enough_to_want_them_and_no_docker_at_all_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(docker_accept, "search_path", lambda: "/nowhere")
    with new_namespace():
        assert not docker_accept.docker_is_here()
        sh("ip link add docker0 type bridge")
        assert docker_accept.docker_is_here()


@pytest.mark.skipif(shutil.which("iptables-legacy", path="/usr/sbin") is None, reason="no iptables-legacy")
def test_where_docker_uses_the_other_variant_of_iptables_ours_go_there() -> None:
    """An accept among nft's tables is not heard by legacy's, where Docker drops."""
    with new_namespace():
        if subprocess.run(["iptables-legacy", "-N", "DOCKER"], capture_output=True, check=False).returncode:
            pytest.skip("this kernel has no legacy tables")
        accept = DockerAccept(NETWORK, SUBNET, "flannel0", has_docker=lambda: True)
        report = accept.ensure()
        assert report.programs == "iptables-legacy"
        assert listing("raw", "iptables-legacy") == RAW
        jump = "-A FORWARD -j DOCKER-USER"
        assert listing("filter", "iptables-legacy") == ["-N DOCKER", FILTER[0], jump, FILTER[1]]
        assert tables() == ([], [], [])
        assert accept.ensure().repaired == ()
        accept.remove()
        assert listing("raw", "iptables-legacy") == []


def test_looking_changes_nothing(accept: DockerAccept) -> None:
    accept.check()
    assert tables() == ([], [], [])

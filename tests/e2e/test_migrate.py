"""`flanctl migrate v2-to-v3` on a real etcd 3.4, whose two key spaces are apart; and hosts that move one by one.

etcd v2 ◀── flanneld 0.7.1, flanctl ──┐                 h1, h2  flanctl, told to move while packets flow
   ║  flanctl migrate v2-to-v3 --both │ one network     h3      flanneld 0.7.1, replaced by flanctl
etcd v3 ◀── flanneld 0.28.9, flanctl ─┘                 h4      flanneld 0.28.9, new in v3
"""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.e2e.reachability import MTU, RunningPing, assert_pings, wait_until_reachable
from tests.support.agents import RunningAgent, environment
from tests.support.cli import Running, flanctl, program
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.etcd_keys import Keys
from tests.support.flanneld_stand_in import PREFIX, StandIn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs("etcd34")
CONFIG = f"{PREFIX}/config"
FOLDER = f"{PREFIX}/subnets/"
NETWORK = '{"Network":"172.17.0.0/16"}'
DAY = 86400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster("3.4", folder=tmp_path_factory.mktemp("etcd"), v2=True) as started:
        yield started


class Place:
    """A prefix of its own in one etcd: v2 with a config, two leases and a reservation."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self.endpoints = cluster.endpoints[0]
        self.prefix = prefix
        self.v2, self.v3 = (Keys(None, self.endpoints, v2=v2) for v2 in (True, False))
        self.v2.put(f"{prefix}/config", NETWORK)
        self.v2.put(f"{prefix}/subnets/172.17.41.0-24", '{"PublicIP":"192.168.6.2"}', ttl=5000)
        self.v2.put(f"{prefix}/subnets/172.17.55.0-24", '{"PublicIP":"192.168.6.3","Rack":{"b":1}}', ttl=DAY)
        self.v2.put(f"{prefix}/subnets/172.17.60.0-24", '{"PublicIP":"192.168.6.4"}')

    def run(self, *words: str, **options: object):
        return flanctl("migrate", "v2-to-v3", *words, env=self.env, **options)

    @property
    def env(self) -> dict[str, str]:
        return {"FLANCTL_ENDPOINTS": self.endpoints, "FLANCTL_PREFIX": self.prefix}

    def there(self) -> dict[str, str]:
        return {key.removeprefix(self.prefix): text for key, text in self.v3.all(f"{self.prefix}/").items()}


WANTED = {
    "/config": NETWORK,
    "/subnets/172.17.41.0-24": '{"PublicIP":"192.168.6.2","PublicIPv6":null}',
    "/subnets/172.17.55.0-24": '{"PublicIP":"192.168.6.3","PublicIPv6":null,"Rack":{"b":1}}',
    "/subnets/172.17.60.0-24": '{"PublicIP":"192.168.6.4","PublicIPv6":null}',
}


@pytest.fixture
def place(cluster: Cluster, request: pytest.FixtureRequest) -> Place:
    return Place(cluster, f"/{request.node.name.split('[')[0][:40]}")


def test_it_shows_copies_and_verifies(place: Place) -> None:
    dry = place.run("--dry-run")
    assert dry.code == 0
    assert [line.replace("23h59m", "24h").split() for line in dry.out.splitlines()] == [
        ["SUBNET", "PUBLIC-IP", "KIND", "LEFT", "ACTION"],
        ["172.17.41.0/24", "192.168.6.2", "lease", "1h23m", "copy"],
        ["172.17.55.0/24", "192.168.6.3", "lease", "24h", "copy"],
        ["172.17.60.0/24", "192.168.6.4", "reservation", "-", "copy"],
        ["-", "-", "config", "-", "copy"],
    ]
    assert "4 of 4 keys would be written to etcd v3 " in dry.err
    assert place.there() == {}

    before = place.v2.all(place.prefix)
    done = place.run("-w", "json")
    assert done.code == 0
    told = json.loads(done.out)
    assert (told["schema"], told["written"], told["verified"]) == (1, 4, True)
    assert [one["action"] for one in told["keys"]] == ["copied"] * 4
    assert place.there() == WANTED
    assert 4900 <= (place.v3.ttl(f"{place.prefix}/subnets/172.17.41.0-24") or 0) <= 5000
    assert (place.v3.ttl(f"{place.prefix}/subnets/172.17.55.0-24") or 0) > DAY - 100
    assert place.v3.ttl(f"{place.prefix}/subnets/172.17.60.0-24") is None
    assert place.v2.all(place.prefix) == before

    again = place.run("-w", "simple")
    assert (again.code, {line.split("\t")[4] for line in again.out.splitlines()}) == (0, {"there"})
    # A host that is started now finds v3, and is told that there are two.
    listed = flanctl("subnets", "ls", "-w", "json", env=place.env)
    assert json.loads(listed.out)["dialect"] == "0.28"
    assert "is in etcd v3 and in v2: v3 is taken" in listed.err


def test_another_etcd_can_be_the_target(place: Place, tmp_path: Path) -> None:
    """One of etcd 2's time serves no v3."""
    with Cluster("3.4", folder=tmp_path / "new") as new:
        done = place.run(f"--to-endpoints={new.endpoints[0]}")
        assert done.code == 0, done.err
        assert place.there() == {}
        place.v3 = Keys(None, new.endpoints[0], v2=False)
        assert place.there() == WANTED
        # And where v2 is not served there is nothing to read.
        nothing = flanctl("migrate", "v2-to-v3", "--endpoints", new.endpoints[0])
        assert nothing.code == 3
        assert "this etcd serves no v2 API" in nothing.err
        assert "try: etcd 3.4 and 3.5 serve it with --enable-v2" in nothing.err


def test_a_login_must_be_good_for_both(tmp_path: Path) -> None:
    with Cluster("3.4", folder=tmp_path / "etcd", v2=True) as guarded:
        place = Place(guarded, PREFIX)
        for words in ("user add root:sesame", "user grant-role root root", "auth enable"):
            guarded.etcdctl(*words.split())
        refused = place.run()
        assert refused.code == 7
        assert "etcd keeps the users of v2 and v3 apart" in refused.err
        wrong = flanctl("migrate", "v2-to-v3", "--user=root", env=place.env | {"FLANCTL_PASSWORD": "open"})
        assert (wrong.code, "open" in wrong.err) == (7, False)
        right = flanctl("migrate", "v2-to-v3", "--user=root", env=place.env | {"FLANCTL_PASSWORD": "sesame"})
        assert right.code == 0, right.err


def test_what_v3_holds_of_others_is_refused_with_5(place: Place) -> None:
    place.v3.put(f"{place.prefix}/subnets/172.17.41.0-24", '{"PublicIP":"192.168.6.99"}')
    for words in ((), ("--dry-run",), ("--both",)):
        done = place.run(*words)
        assert done.code == 5
        assert "172.17.41.0/24 is 192.168.6.99's in v3 and 192.168.6.2's in v2" in done.err
        assert "nothing written" in done.err
    assert list(place.there()) == ["/subnets/172.17.41.0-24"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--prefix", "/nowhere"], 4, "no network config at /nowhere/config in etcd v2"),
        (["--endpoints", "http://127.0.0.1:1"], 3, "127.0.0.1:1"),
        (["--endpoints", "sqlite:/tmp/x"], 2, "a file has neither etcd v2 nor v3"),
        (["--to-endpoints", "sqlite:/tmp/x"], 2, "a file has neither etcd v2 nor v3"),
        (["--to-endpoints", ","], 2, "--to-endpoints names no endpoint"),
        (["--to-endpoints", "http://["], 2, "http://["),
        (["--api", "v2"], 2, "--api means nothing here"),
        (["--for", "5m"], 2, "--for needs --both"),
        (["--both", "--for", "soon"], 2, '--for "soon" is not'),
        (["--both", "--dry-run"], 2, "exclude each other"),
        (["extra"], 2, "extra"),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(place: Place, words, code, says) -> None:
    done = place.run(*words)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert place.there() == {}


def test_unreadable_keys_stay_behind_and_are_named(place: Place) -> None:
    place.v2.put(f"{place.prefix}/subnets/garbage", "x")
    done = place.run()
    assert done.code == 0
    assert f"warning: {place.prefix}/subnets/garbage stays behind: " in done.err
    assert place.there() == WANTED


def test_killed_in_the_middle_of_many_leases_it_goes_on_when_run_again(place: Place, tmp_path: Path) -> None:
    count = 300
    for number in range(count):
        key = f"{place.prefix}/subnets/172.17.{number % 200 + 1}.{number // 200 * 128}-25"
        place.v2.put(key, f'{{"PublicIP":"10.0.{number // 200}.{number % 200 + 1}"}}', ttl=DAY)
    for key in ("41.0-24", "55.0-24", "60.0-24"):
        place.v2.delete(f"{place.prefix}/subnets/172.17.{key}")
    for number in (signal.SIGKILL, signal.SIGINT):
        aim = len(place.there()) + 20
        with Running(tmp_path / str(int(number)), "migrate", "v2-to-v3", env=place.env) as running:
            until(lambda aim=aim: len(place.there()) > aim or running.process.poll() is not None, seconds=60)
            code = running.end(number)
        # On a fast day it has finished before the signal.
        assert code in {0, 130 if number == signal.SIGINT else -number}
        found = place.there()
        assert "/config" not in found or len(found) == count + 1
    assert place.run().code == 0
    found = place.there()
    assert len(found) == count + 1
    assert found["/config"] == NETWORK


def test_both_keeps_the_two_in_step_until_interrupted(place: Place, tmp_path: Path) -> None:
    words = ("migrate", "v2-to-v3", "--both", "-w", "json")
    subnets = f"{place.prefix}/subnets/"
    with Running(tmp_path, *words, env=place.env) as running:
        running.wait_for(2)  # the plan, and how many hosts write where
        place.v2.put(f"{subnets}172.17.70.0-24", '{"PublicIP":"192.168.6.7"}', ttl=DAY)
        until(lambda: "/subnets/172.17.70.0-24" in place.there())
        place.v3.put(f"{subnets}172.17.71.0-24", '{"PublicIP":"192.168.6.8","PublicIPv6":null}', ttl=4000)
        until(lambda: f"{subnets}172.17.71.0-24" in place.v2.all(place.prefix))
        assert place.v2.get(f"{subnets}172.17.71.0-24") == '{"PublicIP":"192.168.6.8"}'
        assert 3900 <= (place.v2.ttl(f"{subnets}172.17.71.0-24") or 0) <= 4000
        place.v3.delete(f"{subnets}172.17.70.0-24")
        until(lambda: f"{subnets}172.17.70.0-24" not in place.v2.all(place.prefix))
        place.v2.delete(f"{subnets}172.17.60.0-24")
        until(lambda: "/subnets/172.17.60.0-24" not in place.there())
        assert running.end(signal.SIGINT) == 130
        events = [json.loads(line) for line in running.lines()[1:]]
        copied = [(one["event"], one["to"], one["subnet"]) for one in events if one["event"] != "where"]
        assert copied == [
            ("copied", "v3", "172.17.70.0/24"),
            ("copied", "v2", "172.17.71.0/24"),
            ("deleted", "v2", "172.17.70.0/24"),
            ("deleted", "v3", "172.17.60.0/24"),
        ]
    done = place.run("--both", "--for", "1s")
    assert (done.code, place.there().keys() ^ {"/subnets/172.17.71.0-24"}) == (
        0,
        WANTED.keys() - {"/subnets/172.17.60.0-24"},
    )
    place.v3.put(f"{subnets}172.17.41.0-24", '{"PublicIP":"192.168.6.99"}', ttl=DAY)
    assert place.run("--both", "--for", "1s").code == 5


@pytest.mark.needs("root", "netns", "tun", "iptables")
def test_hosts_move_one_by_one_and_no_packet_is_lost(tmp_path: Path) -> None:
    with Lab("move") as lab:
        hosts = [lab.add_host() for _ in range(4)]
        with Cluster(
            "3.4",
            folder=tmp_path / "etcd",
            v2=True,
            host=str(lab.network.network_address + 1),
            prefix=lab.underlay.command([]),
        ) as cluster:
            endpoints = cluster.endpoints[0]
            v2, v3 = (Keys(lab.underlay.path, endpoints, v2=which) for which in (True, False))
            v2.put(CONFIG, NETWORK)
            flags = (f"-etcd-endpoints={endpoints}", f"-etcd-prefix={PREFIX}", "-iface=eth0")

            def ours(number: int) -> RunningAgent:
                host = hosts[number]
                return RunningAgent.start(host, tmp_path / host.name, "", *flags, name="flanneld").wait()

            agents = [ours(0), ours(1)]
            old = StandIn.start(hosts[2], tmp_path / "h3", endpoints, like="0.7.1").wait()
            subnets = [daemon.subnet for daemon in (*agents, old)]
            ends = [daemon.host.add_container(daemon.gateway, MTU) for daemon in (*agents, old)]
            for one in ends:
                for two in ends:
                    wait_until_reachable(one, two.address)

            # Nobody moves to where not all of the network is.
            def stays(why: str) -> None:
                agents[0].process.send_signal(signal.SIGHUP)
                agents[0].wait_log(f"etcd v2 stays in use, not v3: {why}")

            stays(f"{CONFIG} is not in v3")
            key = f"{FOLDER}{str(subnets[0]).replace('/', '-')}"
            v3.put(CONFIG, '{"Network":"172.18.0.0/16"}')
            stays("the network is 172.18.0.0/16 with /24 there")
            v3.put(CONFIG, NETWORK)
            stays(f"our lease {subnets[0]} is not there")
            v3.put(key, '{"PublicIP":"192.168.6.99"}')
            stays(f"{subnets[0]} is 192.168.6.99's there")
            v3.put(key, f'{{"PublicIP":"{hosts[0].address}"}}')
            stays("2 of 3 leases are not there, such as ")
            for one in (key, CONFIG):
                v3.delete(one)

            def everywhere() -> bool:
                """The same leases on both sides, each in its side's bytes."""
                one, two = v2.leases(), v3.leases()
                same = {net: text.replace("}", ',"PublicIPv6":null}') for net, text in one.items()}
                return same == two and all(str(subnet) in one for subnet in subnets)

            output = tmp_path / "mirror.log"
            with output.open("w") as stream:
                mirror = lab.underlay.popen(
                    [*program(), "migrate", "v2-to-v3", "--both"],
                    env=environment(endpoints),
                    stdout=stream,
                    stderr=stream,
                )
            said = output.read_text
            until(lambda: "0 of 3 leases are kept in v3" in said(), seconds=30, what=said())

            # Two hosts move where they are: told by a signal, while each of their packets is counted.
            pings = [RunningPing(ends[a], ends[b].address) for a, b in ((0, 1), (1, 2), (2, 0))]
            for number, agent in enumerate(agents, 1):
                agent.process.send_signal(signal.SIGHUP)
                agent.wait_log("moved to etcd v3 over HTTP")
                until(
                    lambda now=number: f"{now} of 3 leases are kept in v3" in said(),
                    seconds=30,
                    what=said(),
                )
                assert everywhere()
            for ping in pings:
                ping.wait_answers(5)
            assert [ping.lost() for ping in pings] == [0, 0, 0]

            # One goes back to v2, and comes again.
            agents[1].terminate()
            back = RunningAgent.start(
                hosts[1], tmp_path / "h2", "", *flags, name="flanneld", FLANCTL_API="v2"
            ).wait()
            assert back.subnet == subnets[1]
            until(lambda: said().count("1 of 3 leases are kept in v3") == 2, seconds=30, what=said())
            back.process.send_signal(signal.SIGHUP)
            back.wait_log("etcd v2 stays in use, not v3: --api v2 asks for it")
            back.terminate()
            agents[1] = ours(1)
            assert agents[1].subnet == subnets[1]
            until(lambda: said().count("2 of 3 leases are kept in v3") == 2, seconds=30, what=said())

            # A new host on v3 alone, and one that stays on v2, hear of each other.
            new = StandIn.start(hosts[3], tmp_path / "h4", endpoints, like="0.28.9").wait()
            subnets.append(new.subnet)
            ends.append(hosts[3].add_container(new.gateway, MTU))
            until(everywhere, seconds=30, what=said())
            for one in ends[:3]:
                wait_until_reachable(one, ends[3].address)
                wait_until_reachable(ends[3], one.address)

            # The last one on v2 is replaced, finds v3, and keeps its subnet.
            old.terminate()
            last = ours(2)
            assert last.subnet == subnets[2]
            last.wait_log("etcd v3 and in v2: v3 is taken")
            until(lambda: "4 of 4 leases are kept in v3" in said(), seconds=30, what=said())
            mirror.send_signal(signal.SIGINT)
            assert mirror.wait(20) == 130
            for key in v2.all(f"{PREFIX}/"):
                v2.delete(key)
            for one in ends:
                for two in ends:
                    assert_pings(one, two.address)
            assert agents[0].terminate() == 0
            agents[0] = agents[0].again().wait()
            assert agents[0].subnet == subnets[0]
            assert set(v3.leases()) == {str(subnet) for subnet in subnets}
    assert lab.leftovers() == ()

"""What operators do to an etcd in use: it fills up, asks for logins, changes its certificates, speaks two APIs."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.drills.field import PREFIX, drill, status
from tests.support.agents import flanctl
from tests.support.authority import Authority
from tests.support.deadline import until
from tests.support.etcd import Tls
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.drills.field import Field


def post(field: Field, member: int, path: str, question: dict[str, Any]) -> dict[str, Any]:
    """One request to a member's JSON gateway, from a host."""
    request = urllib.request.Request(
        f"{field.cluster.endpoints[member]}/v3/{path}", json.dumps(question).encode(), method="POST"
    )
    with inside(field.hosts[0].path), urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


# ---- a list of 20,000 -----------------------------------------------------------------------------------------------

BIG = "/big/network"
AT_ONCE = 100
"""Puts in one transaction; etcd takes 128."""


def plant(field: Field, count: int) -> None:
    """Leases below another prefix, a hundred on one TTL."""
    config = {"Network": "10.0.0.0/8", "SubnetLen": 24}
    puts = [(f"{BIG}/config", json.dumps(config), "0")]
    for start in range(0, count, AT_ONCE):
        lease = post(field, 0, "lease/grant", {"TTL": "86400"})["ID"]
        puts += [
            (
                f"{BIG}/subnets/10.{number >> 8}.{number & 255}.0-24",
                f'{{"PublicIP":"172.20.{number >> 8}.{number & 255}"}}',
                lease,
            )
            for number in range(256 + start, 256 + min(count, start + AT_ONCE))
        ]
        acts = [
            {
                "request_put": {
                    "key": base64.b64encode(key.encode()).decode(),
                    "value": base64.b64encode(value.encode()).decode(),
                    "lease": lease,
                }
            }
            for key, value, lease in puts
        ]
        assert post(field, 0, "kv/txn", {"success": acts})["succeeded"]
        puts = []


class Lister:
    """Runs `flanctl subnets ls` again and again; each list must be whole."""

    def __init__(self, field: Field, count: int) -> None:
        self._field = field
        self._count = count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.took: list[float] = []
        """Seconds of each list."""
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def one_more(self) -> None:
        """Until a list that began after now has ended."""
        goal = len(self.took) + 2
        until(lambda: len(self.took) >= goal or self._error, seconds=120, what="a list")
        assert self._error is None, repr(self._error)

    def _run(self) -> None:
        words = ["subnets", "ls", "--prefix", BIG, "--timeout", "20s", "-w", "simple"]
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                listed = flanctl(self._field.hosts[0], self._field.endpoints, *words).stdout
                self.took.append(time.monotonic() - began)
                names = [line.partition("\t")[0] for line in listed.splitlines()]
                assert len(names) == len(set(names)) == self._count
        except BaseException as error:
            self._error = error


@drill("list-during-failover", short=())
def test_a_list_of_20000_is_whole_while_the_leader_dies(field: Field) -> None:
    count = 20_000
    field.start()
    plant(field, count)
    with field.measuring() as measured:
        with Lister(field, count) as lister:
            lister.one_more()
            calm = max(lister.took)
            for _ in range(3):
                leader = field.cluster.leader()
                measured.hurt()
                field.cluster.kill(leader)
                measured.recovered()
                lister.one_more()
                measured.hurt()
                field.cluster.restart(leader)
                measured.recovered()
            lister.one_more()
        measured.note(lists=len(lister.took), list_seconds_before=calm, list_seconds_longest=max(lister.took))


# ---- no room --------------------------------------------------------------------------------------------------------


@drill("disk-full")
def test_a_full_etcd_costs_no_lease_and_no_packet(field: Field) -> None:
    """The alarm is raised by hand, as etcd itself does when its quota is used up; from then on it takes no write."""
    field.start("--lease-ttl", "20s")
    with field.measuring() as measured:
        measured.writer.pause()
        alarm = {"action": "ACTIVATE", "memberID": "0", "alarm": "NOSPACE"}
        assert "alarms" in post(field, 0, "maintenance/alarm", alarm)
        failed = measured.writer.failed
        refused = flanctl(
            field.hosts[0],
            field.endpoints,
            "reserve",
            "172.17.254.0/24",
            "192.168.66.99",
            "--yes",
            check=False,
        )
        assert refused.returncode == 3, refused.stderr
        assert "etcd is full" in refused.stderr
        before = renewals(field)
        field.lasting(full=60, short=3)
        assert measured.writer.failed == failed
        for agent in field.agents:
            document = status(agent)
            assert (document["verdict"], document["problems"]) == ("ready", []), document
        if field.case.full:  # keep-alives need no room
            assert all(now > then for now, then in zip(renewals(field), before, strict=True))
        measured.hurt()
        field.cluster.etcdctl("alarm", "disarm")
        measured.recovered()


def renewals(field: Field) -> list[int]:
    return [agent.log_text().count(" renewed ") for agent in field.agents]


# ---- logins ---------------------------------------------------------------------------------------------------------


def make_users(field: Field) -> None:
    """root, and one who may do what docs/registry.md says suffices."""
    for words in (
        "user add root:r00t",
        "user grant-role root root",
        "role add flannel",
        f"role grant-permission flannel --prefix=true readwrite {PREFIX}/",
        "user add flanctl:s3cret",
        "user grant-role flanctl flannel",
    ):
        field.cluster.etcdctl(*words.split())


def ask_for_logins(field: Field) -> None:
    field.cluster.etcdctl("auth", "enable")
    field.cluster.user = "root:r00t"


def nobody_told_a_secret(field: Field) -> None:
    for agent in field.agents:
        assert "s3cret" not in agent.log.read_text(errors="replace")


@drill("auth-on")
def test_logins_that_are_switched_on_under_way_cost_nothing(field: Field) -> None:
    field.start(user="flanctl", password="s3cret")
    make_users(field)
    with field.measuring() as measured:
        for _ in range(int(field.length(full=3, short=1))):
            measured.hurt()
            ask_for_logins(field)
            measured.recovered()
            field.lasting(full=5, short=1)
            measured.hurt()
            field.cluster.etcdctl("auth", "disable")
            field.cluster.user = ""
            measured.recovered()
        ask_for_logins(field)
        measured.recovered()
    nobody_told_a_secret(field)


@drill("token-expiry", short=())
def test_a_token_that_ends_between_its_uses_is_renewed_and_nothing_is_missed(field: Field) -> None:
    """Renewals every 5 s, tokens that live 3 s without use: each renewal meets one that has ended."""
    field.start("--lease-ttl", "15s", extra=["--auth-token-ttl=3"], user="flanctl", password="s3cret")
    make_users(field)
    ask_for_logins(field)
    with field.measuring() as measured:
        before = renewals(field)
        field.lasting(full=60, short=12)
        measured.hurt()
        measured.recovered()
        renewed = [now - then for now, then in zip(renewals(field), before, strict=True)]
        measured.note(renewals=min(renewed))
        assert min(renewed) >= field.length(full=6, short=1)
        for agent in field.agents:
            assert not re.search("it stands again|lease has ended", agent.log_text()), agent
    nobody_told_a_secret(field)


# ---- certificates ---------------------------------------------------------------------------------------------------


class Files:
    """What etcd and flanctl read, in a folder of its own; `put` exchanges a file in one step."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.ca = folder / "ca.pem"

    def put(self, name: str, *sources: Path) -> Path:
        new = self.folder / "new"
        new.write_bytes(b"".join(source.read_bytes() for source in sources))
        return new.rename(self.folder / name)

    def issue(self, authority: Authority, addresses: Sequence[object]) -> None:
        """New certificates for the members and the client."""
        for number, address in enumerate(addresses):
            cert, key = authority.issue(f"member{number}", f"IP:{address}")
            self.put(f"member{number}.key", key)
            self.put(f"member{number}.pem", cert)
        cert, key = authority.issue("client")
        self.put("client.key", key)
        self.put("client.pem", cert)

    def tls(self, members: int) -> Tls:
        pairs = [(self.folder / f"member{n}.pem", self.folder / f"member{n}.key") for n in range(members)]
        client = self.folder / "client.pem", self.folder / "client.key"
        return Tls(self.ca, tuple(pairs), client, client_auth=True)


@pytest.mark.needs("openssl")
@drill("certificates-rotated", short=())
def test_certificates_and_the_ca_are_replaced_under_way(field: Field, tmp_path: Path) -> None:
    """The way it is done: trust both CAs, restart; new certificates, restart; trust the new CA only, restart."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    addresses = [f"192.168.66.{number}" for number in (11, 12, 13)]
    files = Files(tmp_path / "pki")
    files.put("ca.pem", old.ca)
    files.issue(old, addresses)
    cert, key = files.folder / "client.pem", files.folder / "client.key"
    field.start(tls=files.tls(3), cacert=str(files.ca), cert=str(cert), key=str(key))
    assert [str(host.address) for host in field.members] == addresses
    with field.measuring() as measured:
        for step in ("both CAs", "new certificates", "the new CA"):
            if step == "both CAs":
                files.put("ca.pem", old.ca, new.ca)
            elif step == "new certificates":
                files.issue(new, addresses)
            else:
                files.put("ca.pem", new.ca)
            for member in range(3):
                measured.hurt()
                field.cluster.restart(member)
                measured.recovered()
        for agent in field.agents:
            assert not re.search("certificate|TLS", agent.log_text()), agent


# ---- two APIs -------------------------------------------------------------------------------------------------------


@drill("v2-and-v3", short=["3.4"], on=["3.4"])
def test_hosts_on_v3_stay_there_beside_an_old_network_in_v2_through_an_outage_and_a_restart(
    field: Field,
) -> None:
    field.start(v2=True)
    old = f"{field.cluster.endpoints[0]}/v2/keys{PREFIX}"
    for key, value in (
        ("config", '{"Network":"172.17.0.0/16"}'),
        ("subnets/172.17.99.0-24", '{"PublicIP":"192.168.66.99"}'),
        *(
            (f"subnets/{str(agent.subnet).replace('/', '-')}", '{"PublicIP":"192.168.66.98"}')
            for agent in field.agents
        ),
    ):
        field.hosts[0].run(["curl", "-sf", "-X", "PUT", f"{old}/{key}", "--data-urlencode", f"value={value}"])

    def in_v2() -> str:
        return field.hosts[0].run(["curl", "-sf", f"{old}/subnets?recursive=true&sorted=true"]).stdout

    before, subnets = in_v2(), [agent.subnet for agent in field.agents]
    with field.measuring() as measured:
        measured.writer.pause()
        for member in range(3):
            field.cluster.kill(member)
        for number in range(len(field.agents)):
            measured.end_agent(number)
            measured.note(ready_seconds=measured.start_agent(number))
            field.agents[number].wait_log("etcd v3 over gRPC is taken: this host's lease is there")
        field.lasting(full=30, short=1)
        measured.hurt()
        field.cluster.restart(0, 1, 2)
        measured.recovered()
        # And a start that finds both.
        measured.end_agent(1)
        measured.start_agent(1)
        field.agents[1].wait_log("is in etcd v3 and in v2: v3 is taken")
        measured.recovered()
    assert [agent.subnet for agent in field.agents] == subnets
    assert in_v2() == before

"""What operators do to an etcd in use: it fills up, asks for logins, changes its certificates, speaks two APIs."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.drills.field import drill, status
from tests.drills.truth import PREFIX
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


def full(field: Field) -> set[str]:
    """The members that have raised NOSPACE, as `etcdctl alarm list` has it, by name and id."""
    raised = field.cluster.etcdctl("alarm", "list")
    ids = {f"etcd{number}": field.cluster.id(number) for number in range(3)}
    return {f"{name} ({one})" for name, one in ids.items() if f"memberID:{int(one, 16)} " in raised}


def refused(field: Field) -> None:
    """Who asks for a subnet is told which members are full: a command, and an agent that has none yet."""
    before = full(field)
    words = ("reserve", "172.17.254.0/24", "192.168.66.99", "--yes")
    command = flanctl(field.hosts[0], field.endpoints, *words, check=False)
    assert command.returncode == 3, command.stderr
    assert "try: etcdctl alarm list; compact, defrag and disarm" in command.stderr
    told = r"etcd is full, NOSPACE raised by (.+) \(etcd: "
    for found in (re.search(told, command.stderr), field.newcomer.wait_log(told)):
        assert found, command.stderr
        assert before
        assert before <= set(found[1].split(", ")) <= full(field)
    assert status(field.newcomer)["state"] != "ready"


def nothing_noticed(field: Field) -> None:
    for agent in field.agents:
        document = status(agent)
        found = document["state"], document["verdict"], document["problems"]
        assert found == ("ready", "ready", []), document


def renewals(field: Field) -> list[int]:
    return [agent.log_text().count(" renewed ") for agent in field.agents]


def all_renewed(field: Field, before: list[int]) -> bool:
    return all(now > then for now, then in zip(renewals(field), before, strict=True))


def all_renew(field: Field) -> None:
    """Every agent renews its lease from now on, which takes a third of its TTL."""
    before = renewals(field)
    until(lambda: all_renewed(field, before), seconds=30, what="every agent has renewed its lease")


@drill("nospace-alarm")
def test_an_alarm_costs_no_lease_and_no_packet(field: Field) -> None:
    """The alarm is raised by hand, as etcd itself does when its quota is used up; from then on it takes no write."""
    field.start("--lease-ttl", "12s")
    member = (field.cluster.leader() + 1) % 3
    with field.measuring() as measured:
        who = str(int(field.cluster.id(member), 16))
        raised = post(
            field, 0, "maintenance/alarm", {"action": "ACTIVATE", "memberID": who, "alarm": "NOSPACE"}
        )
        assert raised["alarms"] == [{"memberID": who, "alarm": "NOSPACE"}]
        measured.writer.pause(refused=True)
        field.start_newcomer("--lease-ttl", "12s")
        refused(field)
        field.lasting(full=60, short=0)
        all_renew(field)
        nothing_noticed(field)
        measured.hurt()
        field.cluster.etcdctl("alarm", "disarm")
        measured.recovered()
        field.newcomer.wait()


QUOTA = 16 << 20
"""Bytes. What the drill's own changes take is a fraction of it."""


def use_up(field: Field, member: int) -> None:
    """Write through one member until it refuses."""
    value = base64.b64encode(bytes(1 << 20)).decode()
    for number in range(200):
        key = base64.b64encode(f"/fill/{number}".encode()).decode()
        try:
            post(field, member, "kv/put", {"key": key, "value": value})
        except urllib.error.HTTPError as error:
            assert "database space exceeded" in error.read().decode()
            break
    until(lambda: "NOSPACE" in field.cluster.etcdctl("alarm", "list"), what="the alarm is raised")


@drill("quota-used-up")
def test_a_quota_that_is_used_up_costs_no_lease_and_no_packet_and_is_mended_as_the_error_says(
    field: Field,
) -> None:
    field.start("--lease-ttl", "12s", extra=[f"--quota-backend-bytes={QUOTA}"])
    with field.measuring() as measured:
        measured.seal()
        measured.writer.go_on(10)
        use_up(field, member=0)
        measured.writer.pause(refused=True)
        field.start_newcomer("--lease-ttl", "12s")
        refused(field)
        field.lasting(full=60, short=0)
        all_renew(field)
        nothing_noticed(field)
        # A compaction forgets history, which therefore is read before; the follower and the agents have no part in that.
        field.cluster.etcdctl("del", "--prefix", "/fill/")
        measured.seal(marked=False)
        field.truth.forget()
        field.cluster.etcdctl("defrag")
        measured.hurt()
        field.cluster.etcdctl("alarm", "disarm")
        measured.recovered()
        field.newcomer.wait()


DISK = 160
"""MB; 128 of them are etcd's write-ahead log from the beginning."""


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return filler


@drill("disk-full")
def test_members_that_end_of_a_full_file_system_cost_no_lease_and_no_packet(field: Field) -> None:
    """Two of three, the leader first: etcd ends when it cannot write. The quota does not protect from this."""
    field.start("--lease-ttl", "12s", disks=DISK)
    cluster = field.cluster
    fillers: dict[int, Path] = {}
    with field.measuring() as measured:
        for _ in range(2):
            leader = cluster.leader()
            measured.hurt()
            fillers[leader] = fill(field.disk(leader))
            cluster.wait_end(leader, "no space left on device")
            if len(fillers) == 1:
                measured.recovered()
        field.lasting(full=60, short=1)
        for agent in field.agents:
            until(lambda agent=agent: not status(agent)["registry"]["answers"], what="the outage is known")
            assert status(agent)["state"] == "ready"
        listed = flanctl(field.hosts[0], field.endpoints, "subnets", "ls", check=False, **field.environment)
        assert listed.returncode == 3, listed
        for member in fillers:
            assert re.search(rf"{cluster.endpoints[member]} +connection refused", listed.stderr), (
                listed.stderr
            )
        for filler in fillers.values():
            filler.unlink()
        cluster.restart(*fillers)
        measured.hurt()
        measured.recovered()
        all_renew(field)


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


def logins(field: Field) -> int:
    """How many etcd has granted, by what its members count."""
    counted = 0
    for endpoint in field.cluster.endpoints:
        text = field.hosts[0].run(["curl", "-sf", f"{endpoint}/metrics"]).stdout
        for line in re.findall(r"^grpc_server_handled_total\{.*\} \d+$", text, re.MULTILINE):
            if 'grpc_code="OK"' in line and 'grpc_method="Authenticate"' in line:
                counted += int(line.rpartition(" ")[2])
    return counted


def nobody_told_a_secret(field: Field) -> None:
    for agent in field.agents:
        assert "s3cret" not in agent.log.read_text(errors="replace")


@drill("auth-on")
def test_logins_that_are_switched_on_under_way_cost_nothing(field: Field) -> None:
    field.start("--lease-ttl", "12s", user="flanctl", password="s3cret")
    make_users(field)
    with field.measuring() as measured:
        for _ in range(int(field.length(full=3, short=1))):
            measured.hurt()
            ask_for_logins(field)
            measured.recovered()
            all_renew(field)  # with a login: a watch that was there before goes on without
            measured.hurt()
            field.cluster.etcdctl("auth", "disable")
            field.cluster.user = ""
            measured.recovered()
        ask_for_logins(field)
        measured.recovered()
    nobody_told_a_secret(field)


@drill("token-expiry", short=())
def test_a_token_that_ends_between_its_uses_is_renewed_and_nothing_is_missed(field: Field) -> None:
    """Renewals every 5 s, tokens that live 3 s without use: most renewals meet one that has ended, and log in anew.

    The announcer's writes come at times of their own; one just before a renewal has kept the token alive.
    """
    field.start("--lease-ttl", "15s", extra=["--auth-token-ttl=3"], user="flanctl", password="s3cret")
    make_users(field)
    ask_for_logins(field)
    with field.measuring() as measured:
        before, logins_before = renewals(field), logins(field)
        field.lasting(full=60, short=12)
        measured.hurt()
        measured.recovered()
        renewed = [now - then for now, then in zip(renewals(field), before, strict=True)]
        assert logins(field) - logins_before >= sum(renewed) // 2, "tokens did not end"
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
            field.agents[number].wait_log("etcd v3 over HTTP is taken: this host's lease is there")
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

"""Leases on real etcd, at their worst: fifty hosts at once while the leader dies, and an etcd that lost everything."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import RegistryUnreachable
from flanctl.model.dialect import Dialect
from flanctl.model.lease import LeaseAttributes
from flanctl.model.network_config import NetworkConfig
from flanctl.registry.config import config_key
from flanctl.registry.leases import Keeper, LeaseRestored, Leases
from flanctl.registry.peers import ConfigSeen, Follower, PeersChanged, RegistryDoubted
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
from tests.support.deadline import until
from tests.support.etcd import Cluster
from tests.support.stores import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.registry.leases import Acquired
    from tests.support.etcd import Version

PREFIX = "/jxdd/network"
DIALECT = Dialect.V0_28
FIRST = IPv4Address("192.168.6.1")
FIFTY = NetworkConfig.parse(
    '{"Network":"10.0.0.0/22","SubnetLen":28,"SubnetMin":"10.0.0.16","SubnetMax":"10.0.3.32"}', DIALECT
)


@contextlib.contextmanager
def client(cluster: Cluster) -> Iterator[Leases]:
    with contextlib.closing(EtcdGrpcStore(parse_endpoints(cluster.endpoints))) as store:
        yield Leases(store, PREFIX, DIALECT)


def acquire(leases: Leases, number: int) -> Acquired:
    """As the agent does: an outage is waited out, every other error ends it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return leases.acquire(FIFTY, LeaseAttributes(FIRST + number))
        except RegistryUnreachable:
            if time.monotonic() > deadline:
                raise


@pytest.mark.parametrize("version", VERSIONS)
def test_fifty_hosts_at_once_on_a_network_of_fifty_all_get_one_while_the_leader_dies(
    version: Version, tmp_path: Path
) -> None:
    """flannel.md 11, row 8: there, one of six that start at once dies on a small network."""
    assert FIFTY.capacity == 50
    together = threading.Barrier(50)
    got: dict[int, Acquired] = {}
    renewed: dict[int, Acquired] = {}
    all_are_there = threading.Event()

    with Cluster(version, members=3, folder=tmp_path) as cluster:
        leader = cluster.leader()

        def host(number: int) -> None:
            with client(cluster) as leases:
                together.wait(60)
                got[number] = acquire(leases, number)
                assert all_are_there.wait(90)
                renewed[number] = leases.renew(got[number])

        with ThreadPoolExecutor(50) as pool:
            hosts = [pool.submit(host, number) for number in range(50)]
            until(lambda: len(got) >= 5, seconds=60, what="the first hosts have a subnet")
            cluster.kill(leader)
            at_death = len(got)
            until(
                lambda: len(got) == 50 or any(one.done() and one.exception() for one in hosts),
                seconds=90,
                what="every host has a subnet",
            )
            all_are_there.set()
            for one in hosts:
                one.result()
        assert at_death < 50, "the leader died too late to matter"
        subnets = {number: held.lease.subnet for number, held in got.items()}
        assert set(subnets.values()) == set(FIFTY.subnets())
        assert {number: held.lease.subnet for number, held in renewed.items()} == subnets
        with client(cluster) as leases:
            table = leases.table()
        assert {lease.subnet: lease.attributes.public_ip for lease in table.leases} == {
            subnet: FIRST + number for number, subnet in subnets.items()
        }


class Member:
    """One host's keeper and follower, joined as the agent joins them."""

    def __init__(self, leases: Leases, number: int) -> None:
        held = acquire(leases, number)
        self.subnet = held.lease.subnet
        self.reports: list[object] = []
        self.keeper = Keeper(leases, held, self.reports.append)
        self.follower = Follower(leases, self._hear, own=held.entry.key)
        self.threads = [threading.Thread(target=one.run) for one in (self.keeper, self.follower)]
        for thread in self.threads:
            thread.start()

    def _hear(self, message: object) -> None:
        self.reports.append(message)
        if isinstance(message, PeersChanged):
            table = self.follower.table()
            gone = {lease.key for lease in table.kept}
            if not any(lease.subnet == self.subnet and lease.key not in gone for lease in table.leases):
                self.keeper.wake()

    def subnets(self) -> set[object]:
        return {lease.subnet for lease in self.follower.table().leases}

    def count(self, kind: type[object]) -> int:
        return sum(isinstance(report, kind) for report in self.reports)

    def stop(self) -> None:
        self.keeper.stop()
        self.follower.stop()
        for thread in self.threads:
            thread.join(20)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_etcd_that_lost_everything_gets_all_leases_back_and_no_host_loses_a_route(
    version: Version, tmp_path: Path
) -> None:
    """flannel.md 11, row 3. The same subnets, nothing withdrawn meanwhile, and the missing config is told."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(version, folder=tmp_path))
        operator = stack.enter_context(client(cluster))
        operator.store.create(config_key(PREFIX), b"{}", ttl=None)
        for number in range(200):  # history, so that the new etcd's revision is far behind
            operator.store.create(f"/elsewhere/{number}", b"", ttl=None)
        members: list[Member] = []
        for number in range(4):
            members.append(Member(stack.enter_context(client(cluster)), number))
            stack.callback(members[-1].stop)
        all_of_them = {member.subnet for member in members}
        until(lambda: all(member.subnets() == all_of_them for member in members), seconds=20)

        cluster.kill(0)
        shutil.rmtree(tmp_path / "etcd0")
        cluster.restart(0)

        def back() -> bool:
            for member in members:
                assert member.subnets() == all_of_them, "a host lost its route to another"
            with contextlib.suppress(RegistryUnreachable):
                return {lease.subnet for lease in operator.table().leases} == all_of_them
            return False

        until(back, seconds=60, what="all leases are back")
        for member in members:
            assert member.count(LeaseRestored) >= 1
            until(lambda member=member: member.count(RegistryDoubted) >= 1, seconds=30)
            until(lambda member=member: ConfigSeen(None) in member.reports, seconds=30)
        assert {lease.attributes.public_ip for lease in operator.table().leases} == {
            FIRST + n for n in range(4)
        }

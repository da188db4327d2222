"""The udp backend over a fake kernel, with the real data plane between a socketpair and loopback. No root.

kernel ──┐ socketpair                     ┌── peer, 127.0.0.2, holds 172.17.7.0/24
         UdpBackend, 172.17.41.0/24, 127.0.0.1
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import TYPE_CHECKING

import pytest

from flanctl.agent.backends.udp import UdpBackend, port_holders
from flanctl.agent.kernel import tun
from flanctl.agent.kernel.fake import FakeKernel
from flanctl.agent.underlay import Underlay
from flanctl.errors import Conflict, FlanctlError, NotFound
from flanctl.model.dialect import Dialect
from flanctl.model.network_config import NetworkConfig
from flanctl.model.peers import Peer
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OWN = IPv4Network("172.17.41.0/24")
PEER = Peer(IPv4Network("172.17.7.0/24"), IPv4Address("127.0.0.2"), None, None)
NET = IPv4Network("172.17.0.0/16")


class Desk:
    """A fake host with its backend, on a UDP port of its own."""

    def __init__(
        self,
        *,
        dialect: Dialect = Dialect.V0_28,
        mtu: int = 1500,
        address: str = "127.0.0.1",
        data_path: str = "tun",
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.kernel = FakeKernel()
        link = self.kernel.add_link("eth0", mtu=mtu, addresses=("192.168.66.11/24",))
        self.config = NetworkConfig.parse(
            f'{{"Network":"172.17.0.0/16","Backend":{{"Type":"udp","Port":{self.port}}}}}', dialect
        )
        own = IPv4Address(address)
        self.underlay = Underlay(link, own, own, mtu, "chosen by the test", (), ())
        self.backend = UdpBackend(self.kernel, self.config, self.underlay, data_path=data_path)

    def started(self) -> Desk:
        self.backend.check()
        self.backend.start(OWN)
        return self

    def reaches_peer(self) -> bool:
        """Whether a packet that the kernel routes to the device arrives at the peer."""
        packet = inner("172.17.41.2", "172.17.7.2")
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as peer:
            peer.bind(("127.0.0.2", self.port))
            peer.settimeout(5)
            self.kernel.tuns["flannel0"].send(packet)
            return peer.recv(2000) == packet

    def close(self) -> None:
        self.backend.stop()
        self.kernel.close()


def inner(source: str, destination: str) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 7, 0, 64, 17, 0)
    return head + IPv4Address(source).packed + IPv4Address(destination).packed + b"payload!"


@pytest.fixture
def desks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Desk]]:
    """Where a test puts its desks, so that they are cleared. /dev/net/tun is only looked at: any file will do."""
    device = tmp_path / "tun"
    device.touch()
    monkeypatch.setattr(tun, "DEVICE", str(device))
    made: list[Desk] = []
    yield made
    for desk in made:
        desk.close()


@pytest.fixture
def desk(desks: list[Desk]) -> Desk:
    desks.append(Desk())
    return desks[0]


# ---- check ----------------------------------------------------------------------------------------------------------


def test_a_check_changes_nothing_and_may_be_repeated(desk: Desk) -> None:
    before = str(desk.kernel)
    desk.backend.check()
    desk.backend.check()
    assert str(desk.kernel) == before
    assert desk.kernel.tuns == {}


@pytest.mark.parametrize("kind", ["bridge", "veth", "dummy", None])
def test_a_flannel0_of_another_kind_is_refused(desk: Desk, kind: str | None) -> None:
    desk.kernel.add_link("flannel0", kind=kind)
    with pytest.raises(
        Conflict, match=rf"flannel0 exists and is a {kind or 'physical'} interface"
    ) as refused:
        desk.backend.check()
    assert (refused.value.id, refused.value.hint) == ("device-foreign", "ip link delete flannel0")


@pytest.mark.parametrize(("alias", "words"), [(None, "is not ours"), ("mine", 'has the alias "mine"')])
def test_a_tun_without_our_mark_is_refused_and_its_holder_named(
    desk: Desk, alias: str | None, words: str
) -> None:
    desk.kernel.add_link("flannel0", kind="tun", alias=alias)
    desk.kernel.holders["flannel0"] = ("flanneld (pid 4711)",)
    with pytest.raises(Conflict, match=rf"flannel0 exists and {words}, held by flanneld \(pid 4711\)") as no:
        desk.backend.check()
    assert no.value.hint == "stop flanneld (pid 4711)"


def test_our_device_in_another_agents_hands_is_refused(desk: Desk) -> None:
    desk.kernel.add_link("flannel0", kind="tun", alias="flanctl")
    desk.kernel.holders["flannel0"] = ("flanctl (pid 12)",)
    with pytest.raises(Conflict, match=r"flannel0 is held by flanctl \(pid 12\)") as refused:
        desk.backend.check()
    assert refused.value.id == "device-busy"


def test_our_device_of_the_last_run_is_fine(desk: Desk) -> None:
    desk.kernel.add_link("flannel0", kind="tun", alias="flanctl", carrier=False)
    desk.backend.check()


def test_without_the_tun_device_it_says_what_to_do(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun, "DEVICE", "/nowhere/net/tun")
    with pytest.raises(FlanctlError, match="no /nowhere/net/tun") as refused:
        desk.backend.check()
    assert refused.value.id == "no-tun"
    assert "modprobe tun" in str(refused.value.hint)


@pytest.mark.parametrize(("mtu", "fits"), [(95, False), (96, True), (576, True)])
def test_an_underlay_must_leave_room_for_what_a_link_must_carry_in_one_piece(
    desks: list[Desk], mtu: int, fits: bool
) -> None:
    desks.append(Desk(mtu=mtu))
    if fits:
        desks[0].backend.check()
        return
    with pytest.raises(FlanctlError, match=f"MTU of {mtu} leaves {mtu - 28} bytes"):
        desks[0].backend.check()


def test_a_port_in_use_is_refused_with_its_holder(desk: Desk) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as other:
        other.bind(("0.0.0.0", desk.port))
        with pytest.raises(Conflict, match=rf"UDP 127\.0\.0\.1:{desk.port} is in use by .*pid {os.getpid()}"):
            desk.backend.check()


def test_an_address_that_is_not_ours_cannot_be_listened_on(desks: list[Desk]) -> None:
    desks.append(Desk(address="192.0.2.1"))
    with pytest.raises(FlanctlError, match=r"cannot listen on UDP 192\.0\.2\.1:"):
        desks[0].backend.check()


def test_a_stop_lets_go_of_the_port_also_after_a_check_alone_and_twice(desk: Desk) -> None:
    desk.backend.check()
    desk.backend.stop()
    desk.backend.stop()
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as other:
        other.bind(("127.0.0.1", desk.port))


def test_port_holders_reads_what_linux_shows(tmp_path: Path) -> None:
    (tmp_path / "thread-self/net").mkdir(parents=True)
    (tmp_path / "thread-self/net/udp").write_text(
        "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "  1: 0B42A8C0:205D 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 777 2 0 0\n"
        "  2: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 888 2 0 0\n"
    )
    for pid, inode in (("41", 777), ("42", 888)):
        (tmp_path / pid / "fd").mkdir(parents=True)
        (tmp_path / pid / "comm").write_text("flanneld\n")
        (tmp_path / pid / "fd/3").symlink_to(f"socket:[{inode}]")
    assert port_holders(8285, proc=tmp_path) == ("flanneld (pid 41)",)
    assert port_holders(9999, proc=tmp_path) == ()
    assert port_holders(8285, proc=tmp_path / "nowhere") == ()


# ---- start and apply ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "prefix"), [(Dialect.V0_28, 32), (Dialect.V0_7, 16)])
def test_the_device_is_flannels_in_each_dialect(desks: list[Desk], dialect: Dialect, prefix: int) -> None:
    desks.append(Desk(dialect=dialect).started())
    kernel = desks[0].kernel
    link = kernel.link("flannel0")
    assert link is not None
    assert (link.kind, link.mtu, link.up, link.alias) == ("tun", 1472, True, "flanctl")
    assert link.addresses == (IPv4Interface(f"172.17.41.0/{prefix}"),)
    desks[0].backend.apply([])
    (route,) = kernel.routes(link=link.index)
    assert (route.destination, route.scope) == (NET, "link")


def test_an_apply_routes_packets_and_a_second_one_has_nothing_to_do(desk: Desk) -> None:
    desk.started()
    report = desk.backend.apply([PEER])
    assert (report.peers, report.failed) == (1, ())
    assert desk.reaches_peer()
    again = desk.backend.apply([PEER])
    assert (again.repaired, again.failed) == ((), ())


def test_the_plain_path_opens_a_tun_without_headers_and_uses_no_offload(desks: list[Desk]) -> None:
    desk = Desk(data_path="tun-plain")
    desks.append(desk.started())
    desk.backend.apply([PEER])
    assert desk.reaches_peer()
    assert not any(on for on, _ in desk.backend.offloads().values())
    assert until(desk.backend.peers)["127.0.0.2"].out_packets == 1


def test_a_peer_that_left_gets_nothing_more(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.backend.apply([])
    desk.kernel.tuns["flannel0"].send(inner("172.17.41.2", "172.17.7.2"))
    until(lambda: desk.backend.counters()["icmp_sent"] + desk.backend.counters()["drop_no_route"])
    assert desk.backend.counters()["out_packets"] == 0


def test_drift_is_repaired_and_said(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.set_link("flannel0", mtu=1300)
    (route,) = desk.kernel.routes(protocol=0x66)
    desk.kernel.delete_route(route)
    report = desk.backend.apply([PEER])
    assert report.repaired == (
        "mtu of flannel0 was 1300, set to 1472",
        "route 172.17.0.0/16 dev flannel0 was missing, added",
    )


def test_where_only_peers_have_changed_the_kernel_is_not_looked_at(desk: Desk) -> None:
    desk.started()
    desk.kernel.set_link("flannel0", mtu=1300)
    desk.backend.apply([], look=False)
    assert desk.kernel.link("flannel0").mtu == 1472, "nothing was looked at yet"
    desk.backend.apply([])
    desk.kernel.set_link("flannel0", mtu=1300)
    report = desk.backend.apply([PEER], look=False)
    assert desk.reaches_peer()
    assert (report.peers, report.repaired) == (1, ())
    assert [(one.kind, one.wanted, one.missing) for one in report.objects] == [
        ("link", 1, 0),
        ("route", 1, 0),
    ]
    assert desk.kernel.link("flannel0").mtu == 1300
    assert desk.backend.apply([PEER]).repaired == ("mtu of flannel0 was 1300, set to 1472",)


def test_a_data_plane_that_ended_is_started_anew_whatever_was_to_be_done(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.tuns["flannel0"].shutdown(socket.SHUT_RDWR)
    until(lambda: desk.backend.wait(1.0))
    assert "started anew" in desk.backend.apply([PEER], look=False).repaired[0]
    assert desk.reaches_peer()


def test_a_deleted_device_is_made_anew_with_its_peers(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.delete_link("flannel0")
    assert "flannel0 was gone, made anew" in desk.backend.apply([PEER]).repaired
    assert desk.reaches_peer()


def test_our_device_deleted_and_made_by_somebody_else_is_refused_and_left_alone(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.delete_link("flannel0")
    desk.kernel.add_link("flannel0", kind="bridge")
    theirs = str(desk.kernel)
    with pytest.raises(Conflict, match="flannel0 exists and is a bridge interface"):
        desk.backend.apply([PEER])
    assert str(desk.kernel) == theirs


def test_a_device_that_goes_while_we_repair_it_waits_for_the_next_apply(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.set_link("flannel0", mtu=1300)
    desk.kernel.fail_next("set_link", NotFound("cannot set mtu 1472 on flannel0: No such device"))
    assert desk.backend.apply([PEER]).failed == ("flannel0 is gone again",)
    assert desk.backend.apply([PEER]).failed == ()


def test_a_data_plane_that_ended_is_reported_and_started_anew(desk: Desk) -> None:
    desk.started().backend.apply([PEER])
    desk.kernel.tuns["flannel0"].shutdown(socket.SHUT_RDWR)  # as if the device had died
    why = until(lambda: desk.backend.wait(1.0))
    report = desk.backend.apply([PEER])
    assert report.repaired[0] == f"data plane had ended ({why}), started anew"
    assert desk.reaches_peer()
    assert desk.backend.wait(0.01) is None


def test_a_route_of_somebody_else_is_left_and_said(desk: Desk) -> None:
    docker = desk.kernel.add_link("docker0", kind="bridge", addresses=("172.17.0.1/16",))
    desk.started()
    report = desk.backend.apply([PEER])
    (sentence,) = report.failed
    assert "there is 172.17.0.0/16 dev docker0 by somebody else" in sentence
    assert [route.destination for route in desk.kernel.routes(link=docker.index)] == [NET]


def test_before_a_start_there_are_no_counters_and_nothing_to_wait_for(desk: Desk) -> None:
    assert desk.backend.counters() == {}
    desk.backend.stop()
    assert desk.backend.wait(5) is None


def test_after_a_stop_the_device_stays_and_the_next_start_takes_it_over(desks: list[Desk]) -> None:
    desks.append(Desk().started())
    first = desks[0]
    first.backend.apply([PEER])
    first.backend.stop()
    before = str(first.kernel)
    successor = UdpBackend(first.kernel, first.config, first.underlay)
    first.backend = successor
    successor.check()
    assert str(first.kernel).replace(" no-carrier", "") == before.replace(" no-carrier", "")
    successor.start(OWN)
    assert successor.apply([PEER]).failed == ()
    assert first.reaches_peer()


def test_peers_the_data_plane_has_already_are_told_anew_once_it_was_made_anew(desk: Desk) -> None:
    peers = (PEER,)
    desk.started().backend.apply(peers)
    desk.backend.apply(peers)
    assert desk.reaches_peer()
    desk.kernel.delete_link("flannel0")
    assert desk.backend.apply(peers).repaired
    assert desk.reaches_peer()
    desk.backend.apply(())
    assert desk.backend.counters()["drop_no_route"] == 0
    desk.kernel.tuns["flannel0"].send(inner("172.17.41.2", "172.17.7.2"))
    until(lambda: desk.backend.counters()["drop_no_route"] == 1)

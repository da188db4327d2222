"""Members of etcd die, hang, are slow, lose quorum, lose everything: hosts go on, and nobody misses a change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.drills.field import drill

if TYPE_CHECKING:
    from tests.drills.field import Field


@drill("leader-killed", short=["3.4", "3.7"])
def test_a_killed_leader_costs_no_packet_and_no_event(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        for _ in range(int(field.length(full=3, short=1))):
            leader = field.cluster.leader()
            measured.hurt()
            field.cluster.kill(leader)
            measured.recovered()
            field.cluster.restart(leader)
            measured.recovered()


@drill("follower-killed")
def test_a_killed_follower_costs_no_packet_and_no_event(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        leader = field.cluster.leader()
        for member in {0, 1, 2} - {leader}:
            measured.hurt()
            field.cluster.kill(member)
            measured.recovered()
            field.cluster.restart(member)
            measured.recovered()

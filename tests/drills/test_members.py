"""Members of etcd die, hang, are slow, lose quorum, lose everything: hosts go on, and nobody misses a change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.drills.field import drill, key_of, problems, status
from tests.drills.slow import Slow
from tests.support.deadline import until

if TYPE_CHECKING:
    from tests.drills.field import Field, Measured


@drill("leader-killed", short=["3.4", "3.7"], v2=True)
def test_a_killed_leader_costs_no_packet_and_no_event(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        for _ in range(int(field.length(full=3, short=1))):
            kill_leader(field, measured)


@drill("leader-killed-grpc", short=["3.4", "3.7"])
def test_where_the_json_gateway_is_off_a_killed_leader_costs_nothing_either(field: Field) -> None:
    field.start(extra=["--enable-grpc-gateway=false"])
    for agent in field.agents:
        agent.wait_log("gRPC is taken")
    with field.measuring() as measured:
        kill_leader(field, measured)


def kill_leader(field: Field, measured: Measured) -> None:
    """And have it back once all is well without it."""
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


@drill("member-frozen")
def test_a_frozen_member_costs_no_packet_and_no_event(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        for member in range(int(field.length(full=3, short=1))):
            measured.hurt()
            field.cluster.freeze(member)
            measured.recovered()
            field.lasting(full=20, short=0)
            measured.hurt()
            field.cluster.thaw(member)
            field.cluster.wait()
            measured.recovered()


@drill("quorum-lost", v2=True)
def test_a_lost_quorum_is_waited_out_and_costs_no_packet_and_no_event(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        leader = field.cluster.leader()
        gone = [leader, (leader + 1) % 3]
        for member in gone:
            field.cluster.kill(member)
        field.lasting(full=60, short=3)
        for agent in field.agents:
            until(lambda agent=agent: not status(agent)["registry"]["answers"], what="the outage is known")
            assert status(agent)["state"] == "ready"
        field.cluster.restart(*gone)
        measured.hurt()
        measured.recovered()


@drill("all-down", v2=True)
def test_agents_started_while_all_members_are_down_carry_packets_in_the_subnets_they_had(
    field: Field,
) -> None:
    field.start(hosts=int(field.length(full=3, short=2)))
    with field.measuring() as measured:
        subnets = [agent.subnet for agent in field.agents]
        for member in range(3):
            field.cluster.kill(member)
        ready = []
        for number in range(len(field.agents)):
            field.lasting(full=75, short=0)
            measured.end_agent(number)
            ready.append(measured.start_agent(number))
            field.agents[number].wait_log("going on with what we knew last")
        field.lasting(full=75, short=1)
        field.cluster.restart(0, 1, 2)
        measured.hurt()
        measured.recovered()
        measured.note(ready_seconds=max(ready))
        assert [agent.subnet for agent in field.agents] == subnets
        for agent in field.agents:
            agent.wait_log(r"lease \S+ (renewed|confirmed)")


@drill("data-lost", v2=True)
def test_an_etcd_that_lost_everything_has_all_leases_again_and_its_missing_config_is_said(
    field: Field,
) -> None:
    field.start()
    with field.measuring() as measured:
        measured.seal()
        for agent in field.agents:  # what was removed a moment ago is routed to for 2 s more
            until(lambda agent=agent: status(agent)["peers"]["count"] == len(field.agents), what="calm")
        for member in range(3):
            field.cluster.kill(member)
        field.lasting(full=20, short=0)
        field.cluster.start_empty()
        measured.hurt()
        ours = {key_of(agent): str(agent.host.address) for agent in field.agents}
        until(lambda: field.truth.state() == ours, seconds=60, what="every agent's lease is there again")
        measured.note(leases_back_seconds=measured.since_hurt())
        for agent in field.agents:
            until(lambda agent=agent: "no-config" in problems(agent), seconds=30, what="it is said")
        field.lasting(full=30, short=0)
        field.init_network()
        for agent in field.agents:
            until(lambda agent=agent: "no-config" not in problems(agent), seconds=30, what="it is over")
        measured.reopened()
        measured.hurt()
        measured.recovered()


@drill("compacted", v2=True)
def test_a_compaction_while_hosts_are_cut_off_is_made_up_by_a_list(field: Field) -> None:
    field.start()
    with field.measuring() as measured:
        measured.seal()
        with field.cut_off():
            measured.writer.go_on(int(field.length(full=1000, short=50)))
            field.lasting(full=30, short=0)
            field.truth.unmark()
            field.truth.forget()
        measured.hurt()
        measured.reopened()
        measured.recovered()


@drill("slow-member")
def test_a_slow_follower_and_then_a_slow_leader_cost_no_packet_and_no_event(field: Field) -> None:
    field.start()
    cluster, slow = field.cluster, 0
    with field.measuring() as measured:
        if cluster.leader() == slow:
            cluster.etcdctl("move-leader", cluster.id(1))
        measured.hurt()
        with Slow(field.lab, field.members[slow], seconds=field.length(full=0.15, short=0.1)):
            measured.recovered()
            field.lasting(full=30, short=0)
            measured.hurt()
            cluster.etcdctl("move-leader", cluster.id(slow))
            measured.recovered()
            field.lasting(full=30, short=0)
            assert cluster.leader() == slow
        measured.hurt()
        measured.recovered()


@drill("addresses-changed")
def test_members_replaced_one_by_one_on_new_addresses_are_found_by_their_names(field: Field) -> None:
    field.start(names=True)
    with field.measuring() as measured:
        for member in range(int(field.length(full=3, short=1))):
            measured.hurt()
            field.move_member(member)
            measured.recovered()

"""`/metrics`: the Prometheus text format, version 0.0.4.

`TABLE` is the promise: every name with its type and meaning; docs/monitoring.md has the same table and a test
compares them. Only what is truly fed is in it, and every label value known beforehand is there from the start with 0. Of
all that is there only flanctl_peer_… grows with the number of peers, up to MOST_PEERS. Times are timestamps (seconds
since 1970), not ages.
"""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING

from flanctl.agent.snapshot import PROBLEMS, busiest, counted, problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanctl.agent.backends.base import PeerTraffic
    from flanctl.agent.meters import Histogram, Meters, Tally
    from flanctl.agent.snapshot import Now, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REASONS = (
    "no_route", "short", "bad_version", "bad_length", "unknown_sender", "spoofed_source", "foreign_destination",
    "too_big", "send_error", "tun_error", "queue_full",
)  # fmt: skip
"""Why the data plane drops packets (native/dataplane/src/counters.rs; a test compares)."""

PATHS = ("userspace", "kernel")
STATES = ("starting", "leased", "ready", "stopping")

TABLE: Mapping[str, tuple[str, str]] = {
    "flanctl_build_info": ("gauge", "Always 1; the version is a label."),
    "flanctl_network_info": ("gauge", "Always 1, once a lease is held: network, subnet, public_ip, backend, data_path."),
    "flanctl_agent_state": ("gauge", "1 for the state the agent is in, else 0, by state."),
    "flanctl_problem": ("gauge", "1 while the problem is there, by id and severity."),
    "flanctl_lease_expiry_timestamp_seconds": ("gauge", "When our lease ends unless renewed; absent for a reservation."),
    "flanctl_lease_renewals_total": (
        "counter",
        "Renewals by result; conflict: the key was gone or rewritten, and stands again.",
    ),
    "flanctl_registry_requests_total": ("counter", "Requests to the registry by operation and result."),
    "flanctl_registry_request_duration_seconds": ("histogram", "How long they took, by operation."),
    "flanctl_registry_last_success_timestamp_seconds": ("gauge", "When the registry last answered."),
    "flanctl_watch_last_message_timestamp_seconds": ("gauge", "When the watch last brought anything, signs of life included."),
    "flanctl_watch_restarts_total": (
        "counter",
        "Watches that ended by themselves, by reason; one mended inside the client is not seen.",
    ),
    "flanctl_peers": ("gauge", "Other hosts this one routes to, by what they run; unknown until announcements were listed."),
    "flanctl_unreadable_entries": ("gauge", "Keys and values below subnets/ that cannot be understood, by kind."),
    "flanctl_subnets_capacity": ("gauge", "How many subnets the network has."),
    "flanctl_subnets_taken": ("gauge", "How many are taken, by kind."),
    "flanctl_kernel_objects_wanted": ("gauge", "Objects the kernel should have, by kind."),
    "flanctl_kernel_objects_missing": ("gauge", "Those it does not have, by kind."),
    "flanctl_kernel_repairs_total": ("counter", "Objects found missing or wrong and put right, by kind."),
    "flanctl_kernel_failures_total": ("counter", "Tries that left an object missing, by kind."),
    "flanctl_apply_duration_seconds": ("histogram", "How long one comparison with the kernel took."),
    "flanctl_packets_total": ("counter", "Inner packets carried, by direction and path."),
    "flanctl_bytes_total": ("counter", "Their bytes, by direction and path."),
    "flanctl_dropped_packets_total": ("counter", "Packets refused, by reason and path."),
    "flanctl_peer_packets_total": ("counter", "Packets between us and a peer, by its public IP."),
    "flanctl_peer_bytes_total": ("counter", "Bytes of them."),
    "flanctl_peer_dropped_packets_total": ("counter", "Packets not sent to a peer, or refused from it."),
    "flanctl_peer_heard_timestamp_seconds": ("gauge", "When a packet of a peer was last accepted."),
    "flanctl_path_switches_total": ("counter", "Changes of the path that packets take while they flow, by the path changed to."),
    "flanctl_offload": ("gauge", "1 if the kernel does this in bulk for user space's path, else 0."),
    "flanctl_tunnel_mtu_bytes": ("gauge", "Bytes an inner packet may have."),
    "flanctl_underlay_mtu_bytes": ("gauge", "The underlay's MTU."),
    "flanctl_docker_bridge_matches": ("gauge", "1 if docker0 has the lease's first address, else 0; absent without a docker0."),
    "flanctl_certificate_expiry_timestamp_seconds": (
        "gauge",
        "When the first certificate ends in the file of --cert (role client) or --cacert (role ca).",
    ),
    "process_cpu_seconds_total": ("counter", "User and system time of the agent."),
    "process_resident_memory_bytes": ("gauge", "Resident memory of the agent."),
    "process_virtual_memory_bytes": ("gauge", "Virtual memory of the agent."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_max_fds": ("gauge", "How many it may open."),
    "process_start_time_seconds": ("gauge", "When the agent started."),
}  # fmt: skip

_Sample = tuple[str, float]
"""What follows the metric's name (a histogram's suffix, labels), and the value."""


def render(
    snapshot: Snapshot,
    meters: Meters,
    counters: Mapping[str, int],
    now: Now,
    certificates: Mapping[str, float] = MappingProxyType({}),
    *,
    peers: Mapping[str, PeerTraffic] | None = None,
    offloads: Mapping[str, tuple[bool, str]] | None = None,
) -> str:
    """The whole page; `certificates` is when they end, by role. A metric without a value now is left out, its help with it."""
    lines: list[str] = []
    families = _families(snapshot, meters, counters, now) | _traffic(peers or {}, now)
    families["flanctl_certificate_expiry_timestamp_seconds"] = [
        (_labels(role=role), end) for role, end in certificates.items()
    ]
    families["flanctl_offload"] = [
        (_labels(name=name), float(on)) for name, (on, _) in (offloads or {}).items()
    ]
    for name, samples in families.items():
        kind, text = TABLE[name]
        if samples:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{rest} {_number(value)}" for rest, value in samples]
    return "\n".join(lines) + "\n"


def _families(
    snapshot: Snapshot, meters: Meters, counters: Mapping[str, int], now: Now
) -> dict[str, list[_Sample]]:
    place, lease, taken = snapshot.place, snapshot.lease, snapshot.taken
    there = counted(problems(snapshot, now))

    def of(path: str, name: str) -> int:
        """The counters are those of both paths together, and the kernel's share besides (backends/udp.py)."""
        kernels = counters.get(f"kernel_{name}", 0)
        return kernels if path == "kernel" else counters.get(name, 0) - kernels

    def moment(boot: float | None) -> list[_Sample]:
        return [] if boot is None else [("", round(now.wall + boot - now.boot, 3))]

    info = {}
    if place is not None and lease is not None:
        info = {
            "network": place.network, "subnet": lease.subnet, "public_ip": place.public_ip,
            "backend": place.backend, "data_path": place.data_path,
        }  # fmt: skip
    return {
        "flanctl_build_info": [(_labels(version=snapshot.version), 1)],
        "flanctl_network_info": [(_labels(**info), 1)] if info else [],
        "flanctl_agent_state": [(_labels(state=state), float(state == snapshot.state)) for state in STATES],
        "flanctl_problem": [
            (_labels(id=id_, severity=severity), float(there[id_] > 0)) for id_, severity in PROBLEMS.items()
        ],
        "flanctl_lease_expiry_timestamp_seconds": moment(None if lease is None else lease.ends),
        "flanctl_lease_renewals_total": _tally(meters.renewals, "result"),
        "flanctl_registry_requests_total": _tally(meters.requests, "operation", "result"),
        "flanctl_registry_request_duration_seconds": [
            sample
            for operation, histogram in meters.request_seconds.items()
            for sample in _buckets(histogram, operation=operation)
        ],
        "flanctl_registry_last_success_timestamp_seconds": moment(snapshot.answered),
        "flanctl_watch_last_message_timestamp_seconds": moment(snapshot.watched),
        "flanctl_watch_restarts_total": _tally(meters.restarts, "reason"),
        "flanctl_peers": _peers(snapshot.peers, snapshot.flanctl_peers),
        "flanctl_unreadable_entries": []
        if taken is None
        else [(_labels(kind="key"), taken.bad_keys), (_labels(kind="value"), taken.bad_values)],
        "flanctl_subnets_capacity": [] if place is None else [("", place.capacity)],
        "flanctl_subnets_taken": []
        if taken is None
        else [
            (_labels(kind="lease"), taken.leases),
            (_labels(kind="reservation"), taken.reservations),
            (_labels(kind="unreadable"), taken.bad_keys + taken.bad_values),
        ],
        "flanctl_kernel_objects_wanted": [
            (_labels(kind=kind), wanted) for kind, wanted, _ in snapshot.objects
        ],
        "flanctl_kernel_objects_missing": [
            (_labels(kind=kind), missing) for kind, _, missing in snapshot.objects
        ],
        "flanctl_kernel_repairs_total": _tally(meters.repairs, "kind"),
        "flanctl_kernel_failures_total": _tally(meters.failures, "kind"),
        "flanctl_apply_duration_seconds": _buckets(meters.apply_seconds),
        "flanctl_packets_total": [
            (_labels(direction=way, path=path), of(path, f"{way}_packets"))
            for path in PATHS
            for way in ("out", "in")
        ],
        "flanctl_bytes_total": [
            (_labels(direction=way, path=path), of(path, f"{way}_bytes"))
            for path in PATHS
            for way in ("out", "in")
        ],
        "flanctl_dropped_packets_total": [
            (_labels(reason=reason, path=path), of(path, f"drop_{reason}"))
            for path in PATHS
            for reason in REASONS
        ],
        "flanctl_path_switches_total": _tally(meters.path_switches, "to"),
        "flanctl_tunnel_mtu_bytes": [] if place is None else [("", place.mtu)],
        "flanctl_underlay_mtu_bytes": [] if place is None else [("", place.underlay_mtu)],
        "flanctl_docker_bridge_matches": []
        if snapshot.docker_matches is None
        else [("", float(snapshot.docker_matches))],
        **{name: [("", value)] for name, value in _process().items()},
    }


def _peers(peers: int | None, flanctl: int | None) -> list[_Sample]:
    """A host that announces nothing runs flanneld."""
    if peers is None:
        return []
    known = flanctl is not None
    counts = {"flanctl": flanctl or 0, "flanneld": peers - flanctl if flanctl is not None else 0}
    return [
        *((_labels(runs=runs), count) for runs, count in counts.items()),
        (_labels(runs="unknown"), 0 if known else peers),
    ]


def _traffic(peers: Mapping[str, PeerTraffic], now: Now) -> dict[str, list[_Sample]]:
    """The busiest, as many as status shows."""
    shown = busiest(peers)
    return {
        "flanctl_peer_packets_total": [
            (_labels(peer=peer, direction=way), count)
            for peer, traffic in shown
            for way, count in (("out", traffic.out_packets), ("in", traffic.in_packets))
        ],
        "flanctl_peer_bytes_total": [
            (_labels(peer=peer, direction=way), count)
            for peer, traffic in shown
            for way, count in (("out", traffic.out_bytes), ("in", traffic.in_bytes))
        ],
        "flanctl_peer_dropped_packets_total": [
            (_labels(peer=peer), traffic.drops) for peer, traffic in shown
        ],
        "flanctl_peer_heard_timestamp_seconds": [
            (_labels(peer=peer), round(now.wall - traffic.heard_seconds_ago, 3))
            for peer, traffic in shown
            if traffic.heard_seconds_ago is not None
        ],
    }


def _buckets(histogram: Histogram, **labels: str) -> list[_Sample]:
    buckets, total, count = histogram.read()
    return [
        *((f"_bucket{_labels(**labels, le=bound)}", below) for bound, below in buckets),
        (f"_sum{_labels(**labels)}", total),
        (f"_count{_labels(**labels)}", count),
    ]


def _tally(tally: Tally, *names: str) -> list[_Sample]:
    return [(_labels(**dict(zip(names, labels, strict=True))), count) for labels, count in tally.items()]


def _labels(**labels: object) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    """The three characters the format escapes in a label's value."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _process() -> dict[str, float]:
    """The usual ones of a process, from /proc (proc(5)); those it does not tell are left out."""
    times = os.times()
    found: dict[str, float] = {"process_cpu_seconds_total": round(times.user + times.system, 2)}
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/stat", encoding="ascii", errors="replace") as file:
            booted = next(float(line.split()[1]) for line in file if line.startswith("btime "))
        found["process_virtual_memory_bytes"] = int(fields[20])
        found["process_resident_memory_bytes"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        found["process_start_time_seconds"] = booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        found["process_open_fds"] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/limits", encoding="ascii", errors="replace") as file:
            found["process_max_fds"] = next(
                float(line.split()[3]) for line in file if line.startswith("Max open files ")
            )
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    return found

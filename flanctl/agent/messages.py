"""What the agent's workers and its signal handler post to its inbox; the loop in `daemon` takes them in turn."""

from __future__ import annotations

from dataclasses import dataclass

from flanctl.agent.supervisor import WorkerFailed
from flanctl.registry.announcements import AnnounceFailed, CloneSeen
from flanctl.registry.leases import KeeperReport
from flanctl.registry.peers import FollowerReport


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody wants us to end; `reason` is the signal's name."""

    reason: str


@dataclass(frozen=True, slots=True)
class PathFailed:
    """The data plane ended by itself."""

    why: str


@dataclass(frozen=True, slots=True)
class ShowCounters:
    """SIGUSR1: log the packet counters."""


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """Our device or the underlay changed: compare with what is wanted."""


@dataclass(frozen=True, slots=True)
class HostsChanged:
    """Other hosts run flanctl than before."""


@dataclass(frozen=True, slots=True)
class Reload:
    """SIGHUP: the machine is compared at once, and with --api auto an agent on etcd v2 looks whether it may move to v3."""


Message = (
    Stop
    | PathFailed
    | ShowCounters
    | Reload
    | LinkChanged
    | HostsChanged
    | WorkerFailed
    | FollowerReport
    | KeeperReport
    | CloneSeen
    | AnnounceFailed
)

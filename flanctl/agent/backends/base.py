"""What every backend promises the daemon.

    attributes = backend.prepare()          # before the lease exists: what peers must know
    backend.start(subnet)                   # device, address, socket; then .mtu is final
    report = backend.apply(peers)           # everything wanted; call it as often as you like
    backend.stop()                          # threads and descriptors end; kernel state stays

`check` only looks. `prepare` and everything after it may change the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Network

    from flanctl.model.peers import Peer


@dataclass(frozen=True, slots=True)
class Objects:
    """One kind of kernel object (link, route): how many are wanted, are still missing, had to be repaired."""

    kind: str
    wanted: int
    missing: int = 0
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What one `apply` did. `repaired` are sentences for the log; `failed` are kept for the next try."""

    peers: int
    repaired: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    objects: tuple[Objects, ...] = ()
    """The same in numbers, for status and metrics."""
    notes: tuple[str, ...] = ()
    """What an operator should read once, though nothing was wrong."""


@dataclass(frozen=True, slots=True)
class BackendAttributes:
    """The part of a lease that only the backend knows. Both None for udp (flannel writes no BackendType there)."""

    backend_type: str | None = None
    backend_data: object | None = None


class PeerTraffic(NamedTuple):
    """What passed between us and one peer since the data plane was made."""

    out_packets: int
    out_bytes: int
    in_packets: int
    in_bytes: int
    drops: int
    """What was not sent to it, and what it sent that was refused."""
    heard_seconds_ago: float | None
    """Since a packet of it was last accepted."""

    def plus(self, other: PeerTraffic) -> PeerTraffic:
        """What passed on both of two paths."""
        heard = [ago for ago in (self.heard_seconds_ago, other.heard_seconds_ago) if ago is not None]
        return PeerTraffic(
            self.out_packets + other.out_packets,
            self.out_bytes + other.out_bytes,
            self.in_packets + other.in_packets,
            self.in_bytes + other.in_bytes,
            self.drops + other.drops,
            min(heard, default=None),
        )


class Backend(Protocol):
    """One way to carry packets. Called from the daemon's one thread, except `wait` and `failure`."""

    @property
    def mtu(self) -> int:
        """Bytes an inner packet may have; known after `start`."""
        ...

    @property
    def device(self) -> str:
        """Name of the link packets enter; for status."""
        ...

    @property
    def data_path(self) -> str:
        """`userspace` or `kernel`, for the log and status."""
        ...

    @property
    def data_path_why(self) -> str:
        """Why it is not another path, or what to know about this one; a sentence, or nothing."""
        ...

    def told(self, *, lease_ends: float | None, flanctl: frozenset[IPv4Address] | None) -> None:
        """Before each `apply`: when our lease ends (seconds since boot, None: never), and which hosts run flanctl (None: not known yet)."""
        ...

    def check(self) -> None:
        """Find every reason why `start` could not work, and change nothing. Raises a FlanctlError."""
        ...

    def prepare(self) -> BackendAttributes: ...

    def start(self, subnet: IPv4Network) -> None:
        """Bring up the device for our own `subnet`. Idempotent over restarts: takes over what we left."""
        ...

    def apply(self, peers: Sequence[Peer], *, look: bool = True) -> ApplyReport:
        """Make kernel and data plane want exactly this, and repair drift. Keeps what failed for the next call.

        Without `look` only the peers and what was `told` count: nothing says that the device or its routes have changed.
        """
        ...

    def counters(self) -> Mapping[str, int]:
        """Packets and bytes by direction, drops by reason, since start."""
        ...

    def peers(self) -> Mapping[str, PeerTraffic]:
        """Traffic by public IP, of peers that had any. Any thread."""
        ...

    def offloads(self) -> Mapping[str, tuple[bool, str]]:
        """What the kernel can do in bulk: whether it does, and if not, why. Any thread."""
        ...

    def lost(self) -> None:
        """Our subnet is another host's: what would go on carrying packets for it without us ends. Never raises."""
        ...

    def wait(self, seconds: float) -> str | None:
        """Block until the data plane fails (the reason), or `seconds` passed or it was stopped (None)."""
        ...

    def stop(self) -> None:
        """End threads and close descriptors within 2 s. The device, its address and routes stay."""
        ...

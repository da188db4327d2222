"""The typed face of the Rust extension (native/pyext). No packet ever crosses into Python."""

from collections.abc import Mapping, Sequence
from typing import final

version: str

@final
class DataPlane:
    """The user-space packet path of the udp backend: TUN on one side, UDP socket on the other.

    `tun_fd` and `udp_fd` are duplicated; the caller keeps and closes its own. A SOCK_SEQPACKET or SOCK_DGRAM
    socketpair may stand in for the TUN, and any bound UDP/IPv4 socket for the underlay's. `mtu` is the TUN's, in
    bytes. `gateway` is our own subnet in interface form, `172.17.41.1/24`: inner destinations outside it are
    refused. `port` is where peers listen. `peer_check` is `strict` (outer source must be the public IP of the
    peer whose subnet holds the inner source), `subnet` (inner source must lie in some peer's subnet) or `off`.
    `offloads` are what the kernel may be asked to do in bulk: `all`, `none`, or names out of `tso,uso,gso,gro`.

    Raises ValueError for a nonsensical argument, OSError when a descriptor is not what it should be.
    """

    def __new__(
        cls,
        tun_fd: int,
        udp_fd: int,
        *,
        mtu: int,
        gateway: str,
        port: int,
        peer_check: str = "strict",
        offloads: str = "all",
    ) -> DataPlane: ...
    def start(self) -> None:
        """Start the worker. RuntimeError if it was started before."""

    def replace_routes(self, routes: Sequence[tuple[str, int, str]]) -> bool:
        """The whole table: (subnet base address, prefix length, peer's public IP). All or nothing.

        False when the table is the same as before. ValueError names the first bad route and changes nothing.
        """

    def counters(self) -> dict[str, int]:
        """`out_packets out_bytes in_packets in_bytes icmp_sent` and `drop_<reason>` for every reason, from 0."""

    def peers(self) -> dict[str, tuple[int, int, int, int, int, float | None]]:
        """By public IP, of those with any traffic: packets and bytes out, packets and bytes in, drops, and how many
        seconds ago it was last heard of.
        """

    def offloads(self) -> dict[str, tuple[bool, str]]:
        """`tso uso gso gro`: whether it is used now, and if not, why."""

    def failure(self) -> str | None:
        """Why the worker ended by itself (panic text or fatal errno), or None."""

    def wait(self, timeout: float) -> bool:
        """Block, without the GIL, up to `timeout` seconds; True once the worker has ended."""

    def stop(self, timeout: float = 5.0) -> bool:
        """Ask the worker to end and wait for it. Idempotent. False if it did not end in time."""

@final
class KernelPath:
    """The TC programs that carry packets in the kernel, and their maps. It attaches nothing.

    `settings` are backends/kernel_path.py's KernelSettings. Loads the programs, onto the maps pinned in the directory `pins` where those fit. Every method raises RuntimeError
    with what was tried and the kernel's words, ValueError for what means nothing.
    """

    def __new__(cls, pins: str, *, network: str, subnet_len: int) -> KernelPath: ...
    @staticmethod
    def probe(settings: Mapping[str, object], peer: str) -> None:
        """Run both programs over a packet to and from `peer` without a network, and compare every byte."""

    def direct_peers(self) -> list[str]:
        """Public IPs that packets go to from the kernel now."""

    def programs(self) -> tuple[int, int, int]:
        """Descriptors of flanctl_enc, flanctl_dec and flanctl_rx; ours, open as long as this object."""

    def configure(self, settings: Mapping[str, object]) -> None: ...
    def disable(self) -> None:
        """From now on the programs, where they are attached, give everything to user space."""

    def replace_peers(self, peers: Sequence[tuple[str, int, str, bool]]) -> bool:
        """The whole table: (subnet base address, prefix length, public IP, whether packets may go to it from the
        kernel). Only what differs is written; False if nothing does.
        """

    def pin(self) -> None:
        """Pin the maps for the agent after us, in place of what was pinned before."""

    def peers(self) -> dict[str, tuple[int, int, int, int, int, float | None]]:
        """By public IP: packets and bytes out, packets and bytes in, drops of what it sent, and the seconds since it was
        last heard; since it came into the table.
        """

    def counters(self) -> dict[str, int]:
        """`out_packets out_bytes in_packets in_bytes`, `stack_given stack_returned` (flanctl_dec to flannel0-rx),
        `drop_<reason>`, and `pass_<reason>`: given to user space.
        """

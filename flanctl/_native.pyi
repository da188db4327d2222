"""The typed face of the Rust extension (native/pyext). No packet ever crosses into Python."""

from collections.abc import Sequence
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

    Raises ValueError for a nonsensical argument, OSError when a descriptor is not what it should be.
    """

    def __new__(
        cls, tun_fd: int, udp_fd: int, *, mtu: int, gateway: str, port: int, peer_check: str = "strict"
    ) -> DataPlane: ...
    def start(self) -> None:
        """Start the worker. RuntimeError if it was started before."""

    def replace_routes(self, routes: Sequence[tuple[str, int, str]]) -> bool:
        """The whole table: (subnet base address, prefix length, peer's public IP). All or nothing.

        False when the table is the same as before. ValueError names the first bad route and changes nothing.
        """

    def counters(self) -> dict[str, int]:
        """`out_packets out_bytes in_packets in_bytes icmp_sent` and `drop_<reason>` for every reason, from 0."""

    def failure(self) -> str | None:
        """Why the worker ended by itself (panic text or fatal errno), or None."""

    def wait(self, timeout: float) -> bool:
        """Block, without the GIL, up to `timeout` seconds; True once the worker has ended."""

    def stop(self, timeout: float = 5.0) -> bool:
        """Ask the worker to end and wait for it. Idempotent. False if it did not end in time."""

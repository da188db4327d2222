"""What the agent may ask of a kernel. `netlink.NetlinkKernel` is the real one, `fake.FakeKernel` passes its tests.

Every call names the thing it was about when it fails: NotPermitted (no CAP_NET_ADMIN), NotFound (no such link),
Conflict (somebody else's), FlanctlError for the rest, with the kernel's own words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Interface

    from flanctl.agent.kernel.model import Link, Path, Route


class Kernel(Protocol):
    """One network namespace: the one of the thread that made the object."""

    def links(self) -> tuple[Link, ...]:
        """Every link by index."""
        ...

    def link(self, name: str) -> Link | None: ...

    def open_tun(self, name: str, *, vnet_hdr: bool = False, persistent: bool = True) -> int:
        """Make the TUN, or attach to the one that is there: a descriptor the caller closes. See tun.open_tun."""
        ...

    def tun_holders(self, name: str) -> tuple[str, ...]:
        """Other processes that hold the TUN, `flanneld (pid 4711)`; ourselves not counted."""
        ...

    def keep_tun(self, fd: int) -> None:
        """From now on the device outlives its last descriptor."""
        ...

    def set_link(
        self,
        name: str,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        alias: str | None = None,
        queue_length: int | None = None,
    ) -> None:
        """Set what is given in one request; None leaves a property as it is."""
        ...

    def silence_ipv6(self, name: str) -> bool:
        """No IPv6 on this link, so no router solicitations through it. True if something changed; never raises."""
        ...

    def delete_link(self, name: str) -> None:
        """Gone already is fine."""
        ...

    def add_address(self, name: str, address: IPv4Interface) -> None:
        """There already is fine."""
        ...

    def delete_address(self, name: str, address: IPv4Interface) -> None:
        """Gone already is fine."""
        ...

    def routes(self, *, link: int | None = None, protocol: int | None = None) -> tuple[Route, ...]:
        """Unicast IPv4 routes of the main table: all, or those out of one link, or of one protocol."""
        ...

    def add_route(self, route: Route) -> None:
        """Conflict when the main table has a route for this destination and metric."""
        ...

    def replace_route(self, route: Route) -> None:
        """Takes the place of whatever has this destination and metric: only for routes that are ours."""
        ...

    def delete_route(self, route: Route) -> None:
        """Gone already is fine."""
        ...

    def route_to(self, address: IPv4Address) -> Path | None:
        """Where packets to `address` would go, by every rule and table; None when nowhere."""
        ...

    def default_route(self) -> Route | None:
        """The default route of the main table with the lowest metric."""
        ...

    def exchange(self, kind: int, flags: int, body: bytes, what: str) -> list[bytes]:
        """An rtnetlink request in bytes, and the payloads of its answers: for traffic control (tc.py)."""
        ...

    def close(self) -> None: ...

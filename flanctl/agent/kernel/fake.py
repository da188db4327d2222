"""A kernel in memory, for tests without root. It passes the same test bodies as a real network namespace.

    kernel = FakeKernel()
    eth0 = kernel.add_link("eth0", addresses=("192.168.66.11/24",), up=True)
    kernel.fail_next("set_link", NotPermitted("cannot set mtu 1472 on flannel0: Operation not permitted"))
    print(kernel)
        1: eth0 mtu 1500 qlen 1000 up
            inet 192.168.66.11/24
        192.168.66.0/24 dev eth0 proto 2 scope link src 192.168.66.11

A TUN is one end of a SOCK_SEQPACKET pair, a packet a datagram, as the data plane takes it; `kernel.tuns[name]` is
the other end, where a test reads what we sent and writes what "the kernel" sends.
"""

from __future__ import annotations

import select
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import TYPE_CHECKING

from flanctl.agent.kernel.model import KERNEL_PROTOCOL, Link, Path, Route
from flanctl.errors import Conflict, FlanctlError, NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

_MTUS = range(68, 65536)


class FakeKernel:
    """Links, addresses and routes with the rules of Linux that our code relies on."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        self._routes: list[Route] = []
        self._failures: dict[str, list[FlanctlError]] = {}
        self._noisy: set[str] = set()
        self._transient: set[str] = set()
        self._descriptors: dict[int, str] = {}
        self._last_index = 0
        self.tuns: dict[str, socket.socket] = {}
        self.holders: dict[str, tuple[str, ...]] = {}
        """What `tun_holders` says: other processes, as a test wants them."""

    # --- for the test

    def add_link(
        self,
        name: str,
        *,
        kind: str | None = None,
        mtu: int = 1500,
        up: bool = True,
        carrier: bool = True,
        loopback: bool = False,
        alias: str | None = None,
        addresses: Sequence[str] = (),
    ) -> Link:
        """A link the machine has, with addresses such as "192.168.66.11/24"."""
        self._last_index += 1
        self._links[name] = Link(
            index=self._last_index,
            name=name,
            kind=kind,
            mtu=mtu,
            alias=alias,
            carrier=carrier,
            loopback=loopback,
            queue_length=500 if kind == "tun" else 1000,
        )
        self._noisy.add(name)
        for text in addresses:
            self.add_address(name, IPv4Interface(text))
        if up:
            self.set_link(name, up=True)
        return self._links[name]

    def fail_next(self, operation: str, error: FlanctlError) -> None:
        """The next call of the method `operation` raises `error` and does nothing; calls queue up."""
        self._failures.setdefault(operation, []).append(error)

    def __str__(self) -> str:
        lines = []
        for link in self._links.values():
            words = [f"{link.index}: {link.name}", link.kind, f"mtu {link.mtu} qlen {link.queue_length}"]
            words += ["up" if link.up else "down", None if link.carrier else "no-carrier"]
            words += [f"alias {link.alias}" if link.alias else None]
            lines.append(" ".join(filter(None, words)))
            lines += [f"    inet {address}" for address in link.addresses]
        names = {link.index: link.name for link in self._links.values()}
        for route in sorted(self._routes, key=lambda route: (route.destination, route.metric)):
            lines.append(
                f"{route.destination}"
                + (f" via {route.gateway}" if route.gateway else "")
                + f" dev {names[route.link]} proto {route.protocol} scope {route.scope}"
                + (f" src {route.source}" if route.source else "")
                + (f" metric {route.metric}" if route.metric else "")
                + (" onlink" if route.onlink else "")
            )
        return "\n".join(lines)

    # --- links

    def links(self) -> tuple[Link, ...]:
        self._called("links")
        return tuple(self._links.values())

    def link(self, name: str) -> Link | None:
        self._called("link")
        return self._links.get(name)

    def open_tun(self, name: str, *, vnet_hdr: bool = False, persistent: bool = True) -> int:  # noqa: ARG002
        self._called("open_tun")
        link = self._links.get(name)
        if link is None:
            link = self.add_link(name, kind="tun", up=False)
            self._transient.add(name)
        elif link.kind != "tun":
            raise Conflict(f"{name} exists and is not a TUN like ours", id="device-foreign")
        elif link.carrier:
            raise Conflict(f"{name} is held by another process", id="device-busy")
        else:
            self._forget_tun(name)
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        kernels.setblocking(False)
        self.tuns[name] = kernels
        self._links[name] = replace(link, carrier=True)
        fd = ours.detach()
        self._descriptors[fd] = name
        if persistent:
            self.keep_tun(fd)
        return fd

    def tun_holders(self, name: str) -> tuple[str, ...]:
        self._called("tun_holders")
        return self.holders.get(name, ())

    def keep_tun(self, fd: int) -> None:
        self._called("keep_tun")
        self._transient.discard(self._descriptors[fd])

    def set_link(
        self,
        name: str,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        alias: str | None = None,
        queue_length: int | None = None,
    ) -> None:
        self._called("set_link")
        link = self._known(name, "set a property of")
        if mtu is not None and mtu not in _MTUS:
            raise FlanctlError(f"cannot set mtu {mtu} on {name}: Invalid argument")
        was_up = link.up
        link = replace(
            link,
            up=link.up if up is None else up,
            mtu=link.mtu if mtu is None else mtu,
            alias=link.alias if alias is None else alias or None,
            queue_length=link.queue_length if queue_length is None else queue_length,
        )
        self._links[name] = link
        if link.up and not was_up:
            for address in link.addresses:
                self._connect(link, address)
        if was_up and not link.up:
            self._routes = [route for route in self._routes if route.link != link.index]

    def silence_ipv6(self, name: str) -> bool:
        self._called("silence_ipv6")
        noisy = name in self._noisy
        self._noisy.discard(name)
        return noisy

    def delete_link(self, name: str) -> None:
        self._called("delete_link")
        self._remove(name)

    # --- addresses

    def add_address(self, name: str, address: IPv4Interface) -> None:
        self._called("add_address")
        link = self._known(name, f"add {address} to")
        if address not in link.addresses:
            self._links[name] = replace(link, addresses=(*link.addresses, address))
            if link.up:
                self._connect(link, address)

    def delete_address(self, name: str, address: IPv4Interface) -> None:
        self._called("delete_address")
        link = self._links.get(name)
        if link is None or address not in link.addresses:
            return
        self._links[name] = replace(link, addresses=tuple(a for a in link.addresses if a != address))
        still = [own.ip for other in self._links.values() for own in other.addresses]
        connected = Route(address.network, link.index, None, KERNEL_PROTOCOL, "link", address.ip)
        self._routes = [
            route
            for route in self._routes
            if route != connected and (route.source is None or route.source in still)
        ]

    # --- routes

    def routes(self, *, link: int | None = None, protocol: int | None = None) -> tuple[Route, ...]:
        self._called("routes")
        return tuple(
            route
            for route in self._routes
            if link in {None, route.link} and protocol in {None, route.protocol}
        )

    def add_route(self, route: Route) -> None:
        self._called("add_route")
        if any(_key(other) == _key(route) for other in self._routes):
            raise Conflict(f"cannot add the route {route.destination}: File exists")
        self._insert(route, "add")

    def replace_route(self, route: Route) -> None:
        self._called("replace_route")
        kept = [other for other in self._routes if _key(other) != _key(route)]
        self._insert(route, "set")
        self._routes = [*kept, route]

    def delete_route(self, route: Route) -> None:
        self._called("delete_route")
        self._routes = [other for other in self._routes if other != route]

    def route_to(self, address: IPv4Address) -> Path | None:
        self._called("route_to")
        if any(address == own.ip for link in self._links.values() for own in link.addresses):
            loopback = next((link.index for link in self._links.values() if link.loopback), 0)
            return Path(loopback, address, None)
        fitting = [route for route in self._routes if address in route.destination]
        if not fitting:
            return None
        best = max(fitting, key=lambda route: (route.destination.prefixlen, -route.metric))
        own = next(
            (a.ip for link in self._links.values() if link.index == best.link for a in link.addresses), None
        )
        return Path(best.link, best.source or own, best.gateway)

    def default_route(self) -> Route | None:
        self._called("default_route")
        defaults = [route for route in self._routes if route.destination.prefixlen == 0]
        return min(defaults, key=lambda route: route.metric, default=None)

    def close(self) -> None:
        """Also closes the kernel's ends of the TUNs; the descriptors handed out are their holders' to close."""
        for name in list(self.tuns):
            self._forget_tun(name)

    # --- traffic control

    def exchange(self, kind: int, flags: int, body: bytes, what: str) -> list[bytes]:  # noqa: ARG002
        """What tc.py asks: here nobody has put a program on a link."""
        self._called("exchange")
        return []

    # --- inside

    def _called(self, operation: str) -> None:
        if failures := self._failures.get(operation):
            raise failures.pop(0)
        for name, end in list(self.tuns.items()):
            if _hung_up(end):  # the holder closed its descriptor
                self._links[name] = replace(self._links[name], carrier=False)
                if name in self._transient:
                    self._remove(name)

    def _remove(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            self._routes = [route for route in self._routes if route.link != link.index]
            self._forget_tun(name)

    def _forget_tun(self, name: str) -> None:
        if name in self.tuns:
            self.tuns.pop(name).close()
        self._transient.discard(name)
        self._descriptors = {fd: held for fd, held in self._descriptors.items() if held != name}

    def _known(self, name: str, what: str) -> Link:
        link = self._links.get(name)
        if link is None:
            raise NotFound(f"cannot {what} {name}: No such device")
        return link

    def _connect(self, link: Link, address: IPv4Interface) -> None:
        """The route Linux makes for an address with a prefix, on a link that is up."""
        if address.network.prefixlen < 32 and not link.loopback:
            route = Route(address.network, link.index, None, KERNEL_PROTOCOL, "link", address.ip)
            if route not in self._routes:
                self._routes.append(route)

    def _insert(self, route: Route, verb: str) -> None:
        link = next((link for link in self._links.values() if link.index == route.link), None)
        if link is None:
            raise NotFound(f"cannot {verb} the route {route.destination}: No such device")
        if not link.up:
            raise FlanctlError(f"cannot {verb} the route {route.destination}: Network is down")
        reachable = route.onlink or any(
            route.gateway in other.destination
            for other in self._routes
            if other.gateway is None and route.gateway
        )
        if route.gateway and not reachable:
            raise NotFound(f"cannot {verb} the route {route.destination}: Network is unreachable")
        self._routes.append(route)


def _key(route: Route) -> tuple[IPv4Network, int]:
    return route.destination, route.metric


def _hung_up(end: socket.socket) -> bool:
    poller = select.poll()
    poller.register(end, 0)
    return bool(poller.poll(0))

"""The kernel over rtnetlink: the only door to pyroute2, and only to its messages.

    kernel = NetlinkKernel()                  # the network namespace of this thread, from now on
    kernel.set_link("flannel0", mtu=1472, up=True)
    kernel.add_address("flannel0", IPv4Interface("172.17.41.0/32"))

pyroute2 0.9 runs an asyncio loop inside every socket, and importing the package brings 370 modules: measured 125 ms,
23.8 MB resident and a thread's worth of machinery for an agent that makes twenty calls at start. Its message classes
alone are 27 ms and 4.7 MB, so we take those and speak over a plain socket: one request, its answers, by sequence
number (RFC 3549). To get at the classes without the package's __init__, the parent module stands in sys.modules
unexecuted while they load, and leaves again: whoever imports pyroute2 afterwards gets all of it.

A dump that changed under us says NLM_F_DUMP_INTR and is half a truth; it is asked again, nobody else has to know
(containernetworking/plugins pkg/netlinksafe has the story).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.agent.kernel import tun
from flanctl.agent.kernel.model import Link, Route
from flanctl.agent.kernel.model import Path as RoutePath
from flanctl.errors import Conflict, FlanctlError, NotFound, NotPermitted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pyroute2.netlink import nlmsg


def _messages() -> tuple[type[nlmsg], type[nlmsg], type[nlmsg]]:
    """The three message classes, without running pyroute2/__init__.py (see above)."""
    stand_in = "pyroute2" not in sys.modules and importlib.util.find_spec("pyroute2")
    if stand_in:
        sys.modules["pyroute2"] = importlib.util.module_from_spec(stand_in)
    try:
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
        from pyroute2.netlink.rtnl.rtmsg import rtmsg
    finally:
        if stand_in:
            del sys.modules["pyroute2"]
    return ifinfmsg, ifaddrmsg, rtmsg


ifinfmsg, ifaddrmsg, rtmsg = _messages()

# include/uapi/linux/{netlink,rtnetlink,if_link,if}.h
SOL_NETLINK = 270
NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK, NETLINK_CAP_ACK = 11, 12, 10
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x01, 0x04, 0x10
NLM_F_DUMP, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x300, 0x100, 0x200, 0x400
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
IFF_UP, IFF_LOOPBACK, IFF_RUNNING = 0x1, 0x8, 0x40
ARPHRD_ETHER = 1
RTEXT_FILTER_SKIP_STATS = 8
RT_TABLE_MAIN, RTN_UNICAST, RTNH_F_ONLINK = 254, 1, 4
IFA_LOCAL, RTA_OIF, IFLA_IFNAME = 2, 4, 3
IN6_ADDR_GEN_MODE_NONE = 1

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SCOPES = {0: "global", 253: "link", 254: "host"}
_SCOPE_NUMBERS = {name: number for number, name in _SCOPES.items()}
_DUMP_TRIES = 20


class NetlinkKernel:
    """One rtnetlink socket in the network namespace of the thread that makes it. Any thread may use it."""

    def __init__(self) -> None:
        try:
            self._socket = _open()
        except OSError as error:
            raise FlanctlError(f"cannot open a netlink socket: {error.strerror}") from None
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            except OSError:
                continue  # each is younger than Linux 4.12; without them errors are shorter and dumps longer
        self._socket.settimeout(10.0)
        self._lock = threading.Lock()
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # --- links

    def links(self) -> tuple[Link, ...]:
        request = ifinfmsg()
        request["attrs"] = [["IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS]]
        messages = self._dump(RTM_GETLINK, request, "list the interfaces")
        addresses = self._addresses()
        return tuple(_to_link(message, addresses.get(message["index"], ())) for message in messages)

    def link(self, name: str) -> Link | None:
        request = ifinfmsg()
        request["attrs"] = [["IFLA_IFNAME", name], ["IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS]]
        try:
            messages = self._ask(RTM_GETLINK, request, f"look at {name}")
        except NotFound:
            return None
        return _to_link(messages[0], self._addresses(messages[0]["index"]).get(messages[0]["index"], ()))

    def open_tun(self, name: str, *, vnet_hdr: bool = False, persistent: bool = True) -> int:
        return tun.open_tun(name, vnet_hdr=vnet_hdr, persistent=persistent)

    def tun_holders(self, name: str) -> tuple[str, ...]:
        return tun.holders(name)

    def keep_tun(self, fd: int) -> None:
        tun.keep_tun(fd)

    def set_link(
        self,
        name: str,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        alias: str | None = None,
        queue_length: int | None = None,
    ) -> None:
        wanted = {"IFLA_MTU": mtu, "IFLA_IFALIAS": alias, "IFLA_TXQLEN": queue_length}
        said = {"up": up, "mtu": mtu, "alias": alias, "txqueuelen": queue_length}
        request = ifinfmsg()
        request["attrs"] = [["IFLA_IFNAME", name]]
        request["attrs"] += [[attribute, value] for attribute, value in wanted.items() if value is not None]
        if up is not None:
            request["flags"], request["change"] = IFF_UP if up else 0, IFF_UP
        what = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
        self._do(RTM_NEWLINK, 0, request, f"set {what} on {name}")

    def silence_ipv6(self, name: str) -> bool:
        switch = Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6"
        try:
            if switch.read_text().strip() == "1":
                return False
            switch.write_text("1")
        except OSError:
            return self._no_link_local(name)
        return True

    def _no_link_local(self, name: str) -> bool:
        """Where /proc/sys is read-only (containers): no link-local address, hence no solicitation.

        Two multicast listener reports still leave at "up". Looks first, because setting wakes the link monitor.
        """
        look = ifinfmsg()
        look["attrs"] = [["IFLA_IFNAME", name], ["IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS]]
        request = ifinfmsg()
        mode = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE]]}
        request["attrs"] = [["IFLA_IFNAME", name], ["IFLA_AF_SPEC", {"attrs": [["AF_INET6", mode]]}]]
        try:
            families = self._ask(RTM_GETLINK, look, f"look at {name}")[0].get_attr("IFLA_AF_SPEC")
            inet6 = families.get_attr("AF_INET6") if families else None
            if inet6 is None or inet6.get_attr("IFLA_INET6_ADDR_GEN_MODE") == IN6_ADDR_GEN_MODE_NONE:
                return False  # a kernel without IPv6 is as quiet
            self._do(RTM_NEWLINK, 0, request, f"turn IPv6 off on {name}")
        except FlanctlError:
            return False
        return True

    def delete_link(self, name: str) -> None:
        request = ifinfmsg()
        request["attrs"] = [["IFLA_IFNAME", name]]
        try:
            self._do(RTM_DELLINK, 0, request, f"delete {name}")
        except NotFound:
            return

    # --- addresses

    def add_address(self, name: str, address: IPv4Interface) -> None:
        request = self._address(name, address)
        self._do(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, request, f"add {address} to {name}")

    def delete_address(self, name: str, address: IPv4Interface) -> None:
        try:
            self._do(RTM_DELADDR, 0, self._address(name, address), f"delete {address} from {name}")
        except NotFound:
            return

    def _address(self, name: str, address: IPv4Interface) -> nlmsg:
        link = self.link(name)
        if link is None:
            raise NotFound(f"there is no interface {name} for {address}")
        request = ifaddrmsg()
        request["family"], request["prefixlen"], request["index"] = (
            socket.AF_INET,
            address.network.prefixlen,
            link.index,
        )
        request["attrs"] = [["IFA_LOCAL", str(address.ip)], ["IFA_ADDRESS", str(address.ip)]]
        return request

    def _addresses(self, index: int = 0) -> dict[int, tuple[IPv4Interface, ...]]:
        request = ifaddrmsg()
        request["family"], request["index"] = socket.AF_INET, index  # kernels before 4.20 ignore the index
        found: dict[int, tuple[IPv4Interface, ...]] = {}
        for message in self._dump(RTM_GETADDR, request, "list the addresses"):
            # IFA_ADDRESS is the other end on a point-to-point link; IFA_LOCAL is always ours.
            local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if local is not None:
                address = IPv4Interface(f"{local}/{message['prefixlen']}")
                found[message["index"]] = (*found.get(message["index"], ()), address)
        return found

    # --- routes

    def routes(self, *, link: int | None = None, protocol: int | None = None) -> tuple[Route, ...]:
        return self._routes(link=link, protocol=protocol)

    def _routes(
        self, *, link: int | None = None, protocol: int | None = None, length: int | None = None
    ) -> tuple[Route, ...]:
        """`length` of the prefix is looked at before a message is parsed: a router's table has many of the others."""
        request = rtmsg()
        request["family"], request["table"], request["type"] = socket.AF_INET, RT_TABLE_MAIN, RTN_UNICAST
        request["proto"] = protocol or 0
        request["attrs"] = [["RTA_TABLE", RT_TABLE_MAIN]] + ([["RTA_OIF", link]] if link else [])
        found = []
        for message in self._dump(RTM_GETROUTE, request, "list the routes", length):
            if (
                message.get_attr("RTA_TABLE", message["table"]) != RT_TABLE_MAIN
                or message["type"] != RTN_UNICAST
            ):
                continue
            route = _to_route(message)
            if route and link in {None, route.link} and protocol in {None, route.protocol}:
                found.append(route)
        return tuple(found)

    def add_route(self, route: Route) -> None:
        self._do(
            RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _from_route(route), f"add the route {route.destination}"
        )

    def replace_route(self, route: Route) -> None:
        request = _from_route(route)
        self._do(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, request, f"set the route {route.destination}")

    def delete_route(self, route: Route) -> None:
        try:
            self._do(RTM_DELROUTE, 0, _from_route(route), f"delete the route {route.destination}")
        except NotFound:
            return

    def route_to(self, address: IPv4Address) -> RoutePath | None:
        request = rtmsg()
        request["family"], request["dst_len"] = socket.AF_INET, 32
        request["attrs"] = [["RTA_DST", str(address)]]
        try:
            message = self._ask(RTM_GETROUTE, request, f"ask for the route to {address}")[0]
        except FlanctlError:
            return (
                None  # each kind of refusing route has its own errno: unreachable, prohibit, blackhole, throw
            )
        source, gateway = message.get_attr("RTA_PREFSRC"), message.get_attr("RTA_GATEWAY")
        return RoutePath(
            link=message.get_attr("RTA_OIF", 0),
            source=IPv4Address(source) if source else None,
            gateway=IPv4Address(gateway) if gateway else None,
        )

    def default_route(self) -> Route | None:
        return min(self._routes(length=0), key=lambda route: route.metric, default=None)

    # --- one conversation

    def _do(self, kind: int, flags: int, request: nlmsg, what: str) -> None:
        with self._lock:
            self._send(kind, flags | NLM_F_ACK, request, what)
            for _ in self._answers(what):
                pass

    def _ask(self, kind: int, request: nlmsg, what: str) -> list[nlmsg]:
        with self._lock:
            self._send(kind, NLM_F_ACK, request, what)
            return [_parse(answer) for answer in self._answers(what)]

    def _dump(self, kind: int, request: nlmsg, what: str, length: int | None = None) -> list[nlmsg]:
        with self._lock:
            for _ in range(_DUMP_TRIES):
                self._send(kind, NLM_F_DUMP, request, what)
                answers = list(self._answers(what))
                if not any(flags & NLM_F_DUMP_INTR for _, flags, _ in answers):
                    return [
                        _parse(answer)
                        for answer in answers
                        if answer[0] != NLMSG_DONE and length in {None, answer[2][_HEADER.size + 1]}
                    ]
        raise FlanctlError(f"cannot {what}: it changed {_DUMP_TRIES} times while the kernel was answering")

    def exchange(self, kind: int, flags: int, body: bytes, what: str) -> list[bytes]:
        """One request that is none of pyroute2's classes, and the payloads of its answers (tc.py)."""
        with self._lock:
            self._sequence += 1
            header = _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, self._sequence, 0)
            self._transmit(header + body, what)
            return [
                message[_HEADER.size :]
                for answer, _, message in self._answers(what)
                if answer not in {NLMSG_ERROR, NLMSG_DONE}
            ]

    def _send(self, kind: int, flags: int, request: nlmsg, what: str) -> None:
        self._sequence += 1
        request["header"] = {"type": kind, "flags": flags | NLM_F_REQUEST, "sequence_number": self._sequence}
        request.data = bytearray()
        request.encode()
        self._transmit(request.data, what)

    def _transmit(self, data: bytes | bytearray, what: str) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise FlanctlError(f"cannot {what}: {error.strerror}") from None

    def _answers(self, what: str) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, whole message) of every answer to the last request, until it is complete."""
        while True:
            try:
                # Asking for the size first would double the calls; the kernel fills at most 32 KiB for a dump
                # (NLMSG_GOODSIZE growth in netlink_recvmsg), and one link with many VFs may need more.
                data = self._socket.recv(1 << 17)
            except TimeoutError:
                raise FlanctlError(f"cannot {what}: the kernel did not answer in 10 s") from None
            except OSError as error:
                raise FlanctlError(f"cannot {what}: {error.strerror}") from None
            for kind, flags, sequence, message in _split(data):
                if sequence != self._sequence:
                    continue  # the rest of a dump that was given up
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", message, _HEADER.size)[0]
                    if number:
                        raise _error(number, _words(flags, message), what)
                    return
                if kind == NLMSG_DONE:
                    if flags & NLM_F_DUMP_INTR:
                        yield kind, flags, message
                    return
                yield kind, flags, message


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something about a watched link changed; look again. `what` is one of:

    `link`, `link-gone`, `address`, `address-gone`, `route-gone`, and `overflow` (events were lost: look at all).
    """

    what: str
    link: str


class LinkMonitor:
    """The kernel's events about a few links: blocks in `wait`, ends by `stop` from any thread.

        monitor = LinkMonitor({"flannel0", "eth0"})
        while not monitor.stopped:
            for event in monitor.wait(): ...

    Listens from the moment it is made, in the network namespace of that thread. A host with many containers or a
    routing daemon sends thousands of events about others: those are told apart by a few bytes and cost no parsing.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._socket = _open(RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE)
        self._socket.setblocking(False)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._indexes: dict[int, str] = {}
        for index, name in socket.if_nameindex():
            if name in self._names:
                self._indexes[index] = name
        self._ending = threading.Lock()
        self._closed = False
        self.stopped = False

    def wait(self, seconds: float | None = None) -> tuple[LinkEvent, ...]:
        """Block until a watched link changes. Empty when stopped, or when `seconds` have passed.

        Each event once, in the order in which the kernel sent the last of its kind.
        """
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.stopped:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poller.poll(left):
                return ()
            events: dict[LinkEvent, None] = {}
            try:
                while not self.stopped:
                    for event in self._events(self._socket.recv(1 << 17)):
                        events.pop(event, None)
                        events[event] = None
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise FlanctlError(f"cannot listen for link events: {error.strerror}") from None
                events[LinkEvent("overflow", "")] = None
            if events and not self.stopped:
                return tuple(events)
        return ()

    def stop(self) -> None:
        """`wait` returns at once, now and from now on. From any thread, at any time, also after `close`."""
        with self._ending:
            self.stopped = True
            if not self._closed:  # the number may be somebody else's descriptor by now
                os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """After the last `wait` has returned; twice is fine."""
        with self._ending:
            if not self._closed:
                self._closed = True
                self._socket.close()
                os.close(self._stop)

    def _events(self, data: bytes) -> Iterator[LinkEvent]:
        for kind, _, _, message in _split(data):
            if kind in {RTM_NEWLINK, RTM_DELLINK}:
                index = struct.unpack_from("=i", message, _HEADER.size + 4)[0]
                name = _attribute(message, 16, IFLA_IFNAME).rstrip(b"\0").decode(errors="replace")
                known = self._indexes.get(index)
                if kind == RTM_NEWLINK and name in self._names:
                    self._indexes[index] = name
                    yield LinkEvent("link", name)
                elif known is not None:  # deleted, or renamed away
                    del self._indexes[index]
                    yield LinkEvent("link-gone", known)
            elif kind in {RTM_NEWADDR, RTM_DELADDR}:
                index = struct.unpack_from("=I", message, _HEADER.size + 4)[0]
                if index in self._indexes:
                    yield LinkEvent(
                        "address" if kind == RTM_NEWADDR else "address-gone", self._indexes[index]
                    )
            elif kind == RTM_DELROUTE:
                oif = _attribute(message, 12, RTA_OIF)
                index = struct.unpack("=I", oif)[0] if len(oif) == 4 else 0
                if index in self._indexes:
                    yield LinkEvent("route-gone", self._indexes[index])


def _open(groups: int = 0) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        made.bind((0, groups))
    except OSError:
        made.close()
        raise
    return made


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, whole message) of each message in a datagram from the kernel."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, data[offset : offset + length]
        offset += (length + 3) & ~3


def _attribute(message: bytes, body: int, wanted: int) -> bytes:
    """One attribute's payload, by hand: events of others are not worth a parser."""
    offset = _HEADER.size + body
    while offset + 4 <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if length < 4:
            break
        if kind == wanted:
            return message[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return b""


def _parse(answer: tuple[int, int, bytes]) -> nlmsg:
    kind, _, data = answer
    message = {RTM_NEWLINK: ifinfmsg, RTM_NEWADDR: ifaddrmsg}.get(kind, rtmsg)(data)
    message.decode()
    return message


def _words(flags: int, message: bytes) -> str:
    """The sentence modern kernels add to an error (NLMSGERR_ATTR_MSG), or nothing."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    body = 4 + _HEADER.size
    if not flags & NLM_F_CAPPED:
        body = 4 + struct.unpack_from("=I", message, _HEADER.size + 4)[0]
    return _attribute(message, (body + 3) & ~3, 1).rstrip(b"\0").decode(errors="replace")


def _error(number: int, words: str, what: str) -> FlanctlError:
    text = f"cannot {what}: {os.strerror(number)}" + (f" ({words.rstrip('.')})" if words else "")
    if number in {errno.EPERM, errno.EACCES}:
        return NotPermitted(text, hint="run as root, or with CAP_NET_ADMIN")
    if number in {
        errno.ENODEV,
        errno.ENXIO,
        errno.EADDRNOTAVAIL,
        errno.ESRCH,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    }:
        return NotFound(text)
    if number in {errno.EEXIST, errno.EADDRINUSE}:
        return Conflict(text)
    return FlanctlError(text)


def _to_link(message: nlmsg, addresses: tuple[IPv4Interface, ...]) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
        alias=message.get_attr("IFLA_IFALIAS"),
        addresses=addresses,
        # Not the flag IFF_LOWER_UP: a link that is down never shows it, and a TUN may be down and held.
        carrier=bool(message.get_attr("IFLA_CARRIER", 1)),
        loopback=bool(message["flags"] & IFF_LOOPBACK),
        queue_length=message.get_attr("IFLA_TXQLEN", 0),
        running=bool(message["flags"] & IFF_RUNNING),
        ethernet=message["ifi_type"] == ARPHRD_ETHER,
    )


def _to_route(message: nlmsg) -> Route | None:
    link, gateway, flags = message.get_attr("RTA_OIF"), message.get_attr("RTA_GATEWAY"), message["flags"]
    if link is None:
        hops = message.get_attr("RTA_MULTIPATH")
        if not hops:
            return None
        link, gateway, flags = hops[0]["oif"], hops[0].get_attr("RTA_GATEWAY"), hops[0]["flags"]
    source = message.get_attr("RTA_PREFSRC")
    return Route(
        destination=IPv4Network((message.get_attr("RTA_DST", "0.0.0.0"), message["dst_len"])),  # noqa: S104  not a bind
        link=link,
        gateway=IPv4Address(gateway) if gateway else None,
        protocol=message["proto"],
        scope=_SCOPES.get(message["scope"], str(message["scope"])),
        source=IPv4Address(source) if source else None,
        metric=message.get_attr("RTA_PRIORITY", 0),
        onlink=bool(flags & RTNH_F_ONLINK),
    )


def _from_route(route: Route) -> nlmsg:
    request = rtmsg()
    request["family"], request["dst_len"] = socket.AF_INET, route.destination.prefixlen
    request["table"], request["type"], request["proto"] = RT_TABLE_MAIN, RTN_UNICAST, route.protocol
    request["scope"] = _SCOPE_NUMBERS[route.scope]
    request["flags"] = RTNH_F_ONLINK if route.onlink else 0
    request["attrs"] = [["RTA_DST", str(route.destination.network_address)], ["RTA_OIF", route.link]]
    if route.gateway:
        request["attrs"].append(["RTA_GATEWAY", str(route.gateway)])
    if route.source:
        request["attrs"].append(["RTA_PREFSRC", str(route.source)])
    if route.metric:
        request["attrs"].append(["RTA_PRIORITY", route.metric])
    return request

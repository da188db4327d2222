"""Which interface carries our packets between hosts, and under which address peers reach us.

    underlay = choose_underlay(kernel, iface=("eth0",))

Four ways in flanneld's order: `--iface` (names or addresses, the first that works), `--iface-regex` (addresses of
all interfaces first, then names), `--iface-can-reach` (the kernel's own route), else the default route. flannel
0.28 also reads a lone `--public-ip` that is a local address as a choice of interface, and refuses one that is not;
0.7 announces any. We take both: local chooses, anything else is announced with a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanctl.agent.kernel.links import ALIAS
from flanctl.errors import FlanctlError, Invalid, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.kernel.model import Link

_NAT = IPv4Network("10.0.2.0/24")
"""VirtualBox's and QEMU's user-mode NAT: every guest is 10.0.2.15, so all would share one lease."""

_CONTAINER_BRIDGES = ("docker", "virbr", "br-", "cni", "lxcbr", "podman")


@dataclass(frozen=True, slots=True)
class Underlay:
    """The external interface. `mtu` is its own, in bytes; encapsulation is the backend's to subtract."""

    link: Link
    address: IPv4Address
    """Local, for the socket."""
    public_ip: IPv4Address
    """Announced to peers."""
    mtu: int
    why: str
    """`named by --iface`, … for the log."""
    candidates: tuple[str, ...]
    """Other interfaces that could have been taken: `eth1 10.0.2.15 (NAT range)`."""
    warnings: tuple[str, ...]


def choose_underlay(
    kernel: Kernel,
    *,
    iface: Sequence[str] = (),
    iface_regex: Sequence[str] = (),
    iface_can_reach: str | None = None,
    public_ip: str | None = None,
) -> Underlay:
    """Decide, and say why. Looks only.

    Raises Invalid for an option that cannot mean anything, NotFound (id `no-interface`) when nothing fits, with
    one detail line per candidate that was tried, FlanctlError when the one that fits is down.
    """
    announced = _address(public_ip, "--public-ip") if public_ip else None
    links = kernel.links()
    local = {address.ip: link for link in links for address in link.addresses}
    link, address, why = _choose(kernel, links, local, iface, iface_regex, iface_can_reach, announced)
    warnings = []
    if not link.carrier:
        warnings.append(f"interface {link.name} has no carrier")
    if note := _doubt(link, address):
        warnings.append(f"interface {link.name} with {address} is doubtful as underlay ({note})")
    if announced and announced not in local:
        warnings.append(f"public IP {announced} is not an address of this host; peers must reach us there")
    others = tuple(
        f"{other.name} {first}" + (f" ({note})" if (note := _doubt(other, first)) else "")
        for other in links
        if other.index != link.index
        and other.up
        and not _never(other)
        and (first := _best(other)) is not None
    )
    return Underlay(link, address, announced or address, link.mtu, why, others, tuple(warnings))


def overlaps(network: IPv4Network, kernel: Kernel, *, ignore: Sequence[str] = ()) -> tuple[str, ...]:
    """Warnings: each address of this host whose own network overlaps flannel's `network`.

    Names in `ignore` (our device) do not count, nor do bridges that hold an address inside the network: that is
    dockerd's gateway where it should be.
    """
    found = []
    for link in kernel.links():
        if link.name in ignore:
            continue
        for address in link.addresses:
            inside = address.network.subnet_of(network) and address.network != network
            if address.network.overlaps(network) and not (inside and link.kind == "bridge"):
                found.append(f"network {network} overlaps {address} of interface {link.name}")
    return tuple(found)


def _choose(
    kernel: Kernel,
    links: tuple[Link, ...],
    local: dict[IPv4Address, Link],
    iface: Sequence[str],
    iface_regex: Sequence[str],
    iface_can_reach: str | None,
    announced: IPv4Address | None,
) -> tuple[Link, IPv4Address, str]:
    tried: list[tuple[str, FlanctlError]] = []
    ways: list[tuple[str, Callable[[], tuple[Link, IPv4Address]]]] = []
    ways += [(f"--iface {text}", partial(_named, links, local, text)) for text in iface if text]
    # A pattern that means nothing is an error even when --iface decides.
    ways += [
        (f"--iface-regex {text}", partial(_matching, links, _pattern(text))) for text in iface_regex if text
    ]
    if iface_can_reach:
        target = _address(iface_can_reach, "--iface-can-reach")
        ways.append((f"--iface-can-reach {target}", partial(_reaching, kernel, links, target)))
    for way, find in ways:
        try:
            return *_usable(find()), f"chosen by {way}"
        except FlanctlError as error:
            tried.append((way, error))
    if len(tried) == 1:
        way, cause = tried[0]
        hint = cause.hint or "name one of these with --iface"
        which = "no-interface" if isinstance(cause, NotFound) else cause.id
        raise type(cause)(f"{way}: {cause}", details=_list(links), hint=hint, id=which)
    if tried:
        raise NotFound(
            "none of the interface options fits",
            details=(*(f"{way}: {cause}" for way, cause in tried), *_list(links)),
            hint="name one of these with --iface",
            id="no-interface",
        )
    if announced in local:
        return *_usable(
            (local[announced], announced)
        ), f"which has the address given by --public-ip {announced}"
    try:
        return *_usable(_default(kernel, links)), "of the default route"
    except NotFound as error:
        raise NotFound(
            str(error), details=_list(links), hint="name one of these with --iface", id="no-interface"
        ) from None


def _usable(found: tuple[Link, IPv4Address]) -> tuple[Link, IPv4Address]:
    link = found[0]
    if not link.up:
        raise FlanctlError(
            f"interface {link.name} is down", hint=f"ip link set {link.name} up", id="interface-down"
        )
    return found


def _default(kernel: Kernel, links: tuple[Link, ...]) -> tuple[Link, IPv4Address]:
    route = kernel.default_route()
    link = next((link for link in links if route and link.index == route.link and not _never(link)), None)
    if link is None:
        raise NotFound("no interface is named and there is no default route")
    best = _best(link)
    if best is None:
        raise NotFound(f"interface {link.name} of the default route has no usable IPv4 address")
    return link, best


def _named(links: tuple[Link, ...], local: dict[IPv4Address, Link], text: str) -> tuple[Link, IPv4Address]:
    try:
        address = IPv4Address(text)
    except ValueError:
        pass
    else:
        if address not in local:
            raise NotFound(f"no interface has the address {address}")
        return local[address], address
    link = next((link for link in links if link.name == text), None)
    if link is None:
        raise NotFound(f"there is no interface {text}")
    best = _best(link)
    if best is None:
        raise NotFound(f"interface {text} has no usable IPv4 address")
    return link, best


def _matching(links: tuple[Link, ...], pattern: re.Pattern[str]) -> tuple[Link, IPv4Address]:
    for link in links:
        for address in link.addresses:
            if not _never(link) and pattern.search(str(address.ip)):
                return link, address.ip
    for link in links:
        if not _never(link) and pattern.search(link.name) and (best := _best(link)) is not None:
            return link, best
    raise NotFound(f'no interface has an address or a name that matches "{pattern.pattern}"')


def _reaching(kernel: Kernel, links: tuple[Link, ...], target: IPv4Address) -> tuple[Link, IPv4Address]:
    path = kernel.route_to(target)
    link = next((link for link in links if path and link.index == path.link), None)
    if path is None or link is None:
        raise NotFound(f"there is no route to {target}")
    if link.loopback:
        raise NotFound(f"{target} is an address of this host")
    source = path.source or _best(link)
    if source is None:
        raise NotFound(f"interface {link.name}, which reaches {target}, has no usable IPv4 address")
    return link, source


def _best(link: Link) -> IPv4Address | None:
    """The kernel's first address that others can reach: global before link-local, never loopback."""
    usable = [
        a.ip for a in link.addresses if not (a.ip.is_loopback or a.ip.is_unspecified or a.ip.is_multicast)
    ]
    return min(usable, key=lambda address: address.is_link_local, default=None)


def _doubt(link: Link, address: IPv4Address) -> str | None:
    if address in _NAT:
        return "NAT range"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if link.name.startswith(_CONTAINER_BRIDGES):
        return "a bridge for containers or guests"
    return None


def _list(links: tuple[Link, ...]) -> tuple[str, ...]:
    return tuple(
        f"{link.name:<15} {', '.join(str(address.ip) for address in link.addresses) or 'no IPv4 address'}"
        + ("" if link.up else " (down)")
        for link in links
        if not _never(link)
    )


def _never(link: Link) -> bool:
    """Loopback, and the device we left at the last run: nothing to find by itself."""
    return link.loopback or link.alias == ALIAS


def _address(text: str, option: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise Invalid(f'{option}: "{text}" is not an IPv4 address') from None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise Invalid(f'--iface-regex: "{text}" is not a regular expression: {error}') from None

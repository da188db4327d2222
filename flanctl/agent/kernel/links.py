"""Our device: whose it is, and making it what it should be.

    refuse_foreign(kernel, "flannel0")                    # above the ruled line: looks only
    fd = open_device(kernel, "flannel0")                  # makes it, or takes over what we left
    repaired = ensure_device(kernel, Device("flannel0", mtu=1472, address=IPv4Interface("172.17.41.0/32")))

The alias `flanctl` (shown by `ip link`) marks a device as ours, so that a freshly started agent knows it without
memory. flanneld's has none, and is not persistent: it goes when flanneld ends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import Conflict, NotFound

if TYPE_CHECKING:
    from ipaddress import IPv4Interface

    from flanctl.agent.kernel.door import Kernel
    from flanctl.agent.kernel.model import Link

ALIAS = "flanctl"
QUEUE_LENGTH = 1000
"""Packets; the TUN's own default of 500 loses bursts of small ones (data-path notes, 2.1)."""


@dataclass(frozen=True, slots=True)
class Device:
    """What our device should be: exactly this one IPv4 address, up, and nothing of IPv6."""

    name: str
    mtu: int
    address: IPv4Interface
    alias: str = ALIAS
    queue_length: int = QUEUE_LENGTH


def refuse_foreign(kernel: Kernel, name: str, *, alias: str = ALIAS) -> Link | None:
    """The device if it is ours and free, None if there is none. Changes nothing.

    Raises Conflict when the device lacks our mark, or when another process holds it (a second agent).
    """
    link = kernel.link(name)
    if link is None:
        return None
    held_by = kernel.tun_holders(name) if link.kind == "tun" and link.carrier else ()
    who = f", held by {', '.join(held_by)}" if held_by else ""
    hint = f"stop {held_by[0]}" if held_by else f"ip link delete {name}"
    if link.kind != "tun":
        raise Conflict(
            f"{name} exists and is a {link.kind or 'physical'} interface", hint=hint, id="device-foreign"
        )
    if link.alias != alias:
        what = f'has the alias "{link.alias}"' if link.alias else "is not ours"
        raise Conflict(f"{name} exists and {what}{who}", hint=hint, id="device-foreign")
    if held_by:
        raise Conflict(f"{name} is held by {', '.join(held_by)}", hint=hint, id="device-busy")
    return link


def open_device(kernel: Kernel, name: str, *, vnet_hdr: bool = False, alias: str = ALIAS) -> int:
    """Our TUN's descriptor; the device is made if need be. The caller closes it, the device stays.

    A new device becomes persistent only once it bears our mark: killed at any line, we leave either nothing or
    something we know again.
    """
    refuse_foreign(kernel, name, alias=alias)
    fd = kernel.open_tun(name, vnet_hdr=vnet_hdr, persistent=False)
    try:
        link = kernel.link(name)
        if link is None or link.alias != alias:
            kernel.set_link(name, alias=alias)
        kernel.keep_tun(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def ensure_device(kernel: Kernel, wanted: Device, link: Link | None = None) -> tuple[str, ...]:
    """Make the device what it should be; a sentence for each thing that was not, `mtu of flannel0 was 1500, …`.

    `link` is how it was found a moment ago. Call it as often as you like. Raises NotFound when the device is gone: its descriptor died with it, so whoever
    holds that must open a new one.
    """
    link = link or kernel.link(wanted.name)
    if link is None:
        raise NotFound(f"the device {wanted.name} is gone", id="device-gone")
    name, repaired = wanted.name, []
    # Before "up": an interface that comes up with IPv6 on sends router solicitations into the packet loop.
    if kernel.silence_ipv6(name):
        repaired.append(f"IPv6 was on at {name}, turned off")
    wrong = [
        f"{what} of {name} was {found}, set to {right}"
        for what, found, right in (
            ("alias", link.alias, wanted.alias),
            ("mtu", link.mtu, wanted.mtu),
            ("txqueuelen", link.queue_length, wanted.queue_length),
        )
        if found != right
    ]
    if wrong:
        kernel.set_link(name, alias=wanted.alias, mtu=wanted.mtu, queue_length=wanted.queue_length)
        repaired += wrong
    # The right address first: a route that names it as source never stands without it.
    if wanted.address not in link.addresses:
        kernel.add_address(name, wanted.address)
        repaired.append(f"address {wanted.address} was missing on {name}, added")
    for address in link.addresses:
        if address != wanted.address:
            kernel.delete_address(name, address)
            repaired.append(f"address {address} does not belong on {name}, deleted")
    if not link.up:
        kernel.set_link(name, up=True)
        repaired.append(f"{name} was down, set up")
    return tuple(repaired)

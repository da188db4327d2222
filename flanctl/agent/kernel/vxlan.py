"""VXLAN-GPE devices: what the kernel path has datagrams unpacked by (native/bpf/src/flannel.bpf.c, by_stack).

    make_gpe(kernel, "flannel0-rx", 58285)
    gpe_port(kernel, "flannel0-rx")           # 58285; None where there is no such device

They are made with `external` (collect_md), the only way the kernel has a GPE device (drivers/net/vxlan/vxlan_core.c,
VXLAN_F_ALLOWED_GPE); iproute2 does the same by `ip link add … type vxlan external gpe dstport …`.

Format: include/uapi/linux/if_link.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from flanctl.agent.kernel import attributes
from flanctl.errors import NotFound

if TYPE_CHECKING:
    from flanctl.agent.kernel.door import Kernel

RTM_NEWLINK, RTM_GETLINK = 16, 18
NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 0x04, 0x200, 0x400
IFLA_IFNAME, IFLA_LINKINFO = 3, 18
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_COLLECT_METADATA, IFLA_VXLAN_GPE = 7, 15, 25, 27
_NO_LINK = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
"""struct ifinfomsg of no link yet: the name says which."""


def make_gpe(kernel: Kernel, name: str, port: int) -> None:
    """Make the device, down. Raises Conflict where the name is taken, FlanctlError for the rest.

    The port is taken as it comes up, which is where the kernel says that another has it.
    """
    data = attributes.pack(
        (IFLA_VXLAN_LEARNING, b"\0"),
        (IFLA_VXLAN_PORT, struct.pack("!H", port)),
        (IFLA_VXLAN_COLLECT_METADATA, b"\1"),
        (IFLA_VXLAN_GPE, b""),
    )
    body = _NO_LINK + attributes.pack(
        (IFLA_IFNAME, name.encode() + b"\0"),
        (IFLA_LINKINFO, attributes.pack((IFLA_INFO_KIND, b"vxlan\0"), (IFLA_INFO_DATA, data))),
    )
    kernel.exchange(
        RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK, body, f"make the VXLAN-GPE device {name}"
    )


def gpe_port(kernel: Kernel, name: str) -> int | None:
    """The UDP port of a VXLAN-GPE device; None where `name` is none, or nothing."""
    body = _NO_LINK + attributes.pack((IFLA_IFNAME, name.encode() + b"\0"))
    try:
        answers = kernel.exchange(RTM_GETLINK, NLM_F_ACK, body, f"look at {name}")
    except NotFound:
        return None
    if not answers:
        return None
    info = attributes.unpack(attributes.unpack(answers[0][len(_NO_LINK) :]).get(IFLA_LINKINFO, b""))
    data = attributes.unpack(info.get(IFLA_INFO_DATA, b""))
    if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") != b"vxlan" or IFLA_VXLAN_GPE not in data:
        return None
    return int.from_bytes(data.get(IFLA_VXLAN_PORT, b""), "big") or None

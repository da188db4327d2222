"""What the host has set up for UDP datagrams that a path beside the IP stack would not honour.

Packets the kernel path carries enter and leave below netfilter and xfrm: a rule on our port is inert, and an IPsec policy
would be passed by (measured with counters on every hook).
"""

from __future__ import annotations

import re
import shutil
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

from flanctl.agent.kernel import attributes
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

NETLINK_XFRM = 6
XFRM_MSG_NEWSPDINFO, XFRM_MSG_GETSPDINFO, XFRMA_SPD_INFO = 0x24, 0x25, 1
NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")
_PORTS = re.compile(r"(?:\bdports?|\bsports?|--ports)\s+(?:!=\s+)?(\{[^}]*\}|[\d,:-]+)")
_SECONDS = 5.0
SHOWN = 3


def has_ipsec_policies() -> bool:
    """Whether anything of this namespace goes through IPsec, in, out or by; False where the kernel has no xfrm."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_XFRM) as channel:
            channel.settimeout(_SECONDS)
            channel.send(_HEADER.pack(_HEADER.size + 4, XFRM_MSG_GETSPDINFO, NLM_F_REQUEST, 1, 0) + bytes(4))
            answer = channel.recv(1 << 16)
    except OSError:
        return False
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != XFRM_MSG_NEWSPDINFO:
        return False
    counts = attributes.unpack(answer[_HEADER.size + 4 :]).get(XFRMA_SPD_INFO, b"")
    return len(counts) >= 12 and any(struct.unpack_from("=III", counts))  # incnt, outcnt, fwdcnt, …


def rules_on_port(port: int) -> tuple[str, ...]:
    """Firewall rules that name this UDP port, as the tools print them; empty where there are none, or no tools."""
    found = dict.fromkeys(
        line
        for command in (("iptables-save",), ("nft", "list", "ruleset"))
        for line in _printed(*command)
        if _names(line, port)
    )
    return tuple(printable(line) for line in found)[:SHOWN]


def _names(rule: str, port: int) -> bool:
    if rule.startswith(("#", ":", "table", "chain")) or "tcp" in rule.split():
        return False
    for match in _PORTS.finditer(rule):
        for words in re.split(r"[,\s{}]+", match[1]):
            first, _, last = words.replace("-", ":").partition(":")
            if first.isdigit() and int(first) <= port <= int(last if last.isdigit() else first):
                return True
    return False


def _printed(*command: str) -> Iterator[str]:
    program = shutil.which(command[0], path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        return
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in done.stdout.splitlines():
        yield line.strip()

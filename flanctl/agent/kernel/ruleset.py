"""Has a firewall rule changed since we looked? One question to the kernel instead of several runs of iptables-save.

before = generation()
...                                # look at the rules, and find them as wanted
generation() == before             # True: nobody has changed any since; None: cannot be told, look again

nf_tables counts the commits of each network namespace (net/netfilter/nf_tables_api.c, nf_tables_getgen). iptables-nft,
nft, firewalld and dockerd all go through it; iptables-legacy does not.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_NETLINK_NETFILTER = 12
_GETGEN, _NEWGEN = 10 << 8 | 16, 10 << 8 | 15
"""linux/netfilter/nfnetlink.h: the subsystem nftables is 10; nf_tables.h: NFT_MSG_GETGEN, NFT_MSG_NEWGEN."""
_NFTA_GEN_ID = 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")


def legacy_tables() -> bool:
    """iptables-legacy has tables in this namespace."""
    try:
        return bool(_LEGACY_TABLES.read_text().split())
    except OSError:
        return False


def generation() -> int | None:
    """The number of the ruleset in force; None where the kernel does not tell or not all rules are nf_tables'."""
    if legacy_tables():
        return None
    question = _HEADER.pack(_HEADER.size + 4, _GETGEN, 1, 1, 0) + struct.pack(
        "!BBH", 0, 0, 0
    )  # flag 1: NLM_F_REQUEST
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as channel:
            channel.settimeout(1.0)
            channel.sendto(question, (0, 0))
            return _parse(channel.recv(4096))
    except OSError:
        return None


def _parse(answer: bytes) -> int | None:
    if len(answer) < _HEADER.size + 4:
        return None
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _NEWGEN:  # an error: no nf_tables in this kernel, or no right to ask
        return None
    at, end = _HEADER.size + 4, min(length, len(answer))
    while at + _ATTRIBUTE.size <= end:
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _NFTA_GEN_ID and size == _ATTRIBUTE.size + 4 and at + size <= end:
            return int.from_bytes(answer[at + _ATTRIBUTE.size : at + size], "big")
        at += max(size + 3 & ~3, _ATTRIBUTE.size)
    return None

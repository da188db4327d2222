"""Netlink attributes as bytes (include/uapi/linux/netlink.h), for messages that are none of pyroute2's classes."""

from __future__ import annotations

import struct

_HEADER = struct.Struct("=HH")
_TYPE = 0x3FFF
"""Without the bits for nesting and byte order."""


def pack(*attributes: tuple[int, bytes]) -> bytes:
    """Each with its header, padded to four bytes."""
    return b"".join(
        (_HEADER.pack(_HEADER.size + len(data), kind) + data).ljust(
            _HEADER.size + (len(data) + 3 & ~3), b"\0"
        )
        for kind, data in attributes
    )


def unpack(data: bytes) -> dict[int, bytes]:
    """Payloads by type, the last of a kind; what is cut short is left out."""
    found, offset = {}, 0
    while offset + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            break
        found[kind & _TYPE] = data[offset + _HEADER.size : offset + length]
        offset += length + 3 & ~3
    return found

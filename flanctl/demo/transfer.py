"""Small senders and receivers that the demo starts inside its namespaces, so that it needs no other program.

The command `flanctl demo-transfer` (hidden: only the demo calls it) runs one of them where nsenter put it.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import sys
import time
from ipaddress import IPv4Address

CHUNK = bytes(range(256)) * 1024
"""256 KiB that are not all the same, so that a swapped or repeated packet shows in the hash."""


def serve(address: str, port: int) -> int:
    """Accept one connection, read it to its end, print bytes, seconds and SHA-256. Says `listening` first."""
    with socket.create_server((address, port)) as listener:
        print("listening", flush=True)
        listener.settimeout(20.0)
        channel, _ = listener.accept()
    digest, total, started = hashlib.sha256(), 0, time.monotonic()
    with channel:
        channel.settimeout(20.0)
        while data := channel.recv(1 << 20):
            digest.update(data)
            total += len(data)
    print(total, time.monotonic() - started, digest.hexdigest(), flush=True)
    return 0


def send(address: str, port: int, seconds: float) -> int:
    """Send for `seconds`, print bytes and SHA-256 of what was sent."""
    digest, total = hashlib.sha256(), 0
    with socket.create_connection((address, port), timeout=10.0) as channel:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            channel.sendall(CHUNK)
            digest.update(CHUNK)
            total += len(CHUNK)
    print(total, digest.hexdigest(), flush=True)
    return 0


def forge(target: str, port: int, inner_source: str, inner_destination: str) -> int:
    """Send one inner packet (a ping) as a stranger would: in a datagram to a host's flannel port."""
    packet = echo_request(IPv4Address(inner_source), IPv4Address(inner_destination))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.sendto(packet, (target, port))
    return 0


def echo_request(source: IPv4Address, destination: IPv4Address) -> bytes:
    """A whole IPv4 packet with an ICMP echo request (RFC 791, RFC 792), checksums included."""
    echo = struct.pack("!BBHHH", 8, 0, 0, 0x666C, 1) + b"flanctl demo"
    echo = echo[:2] + struct.pack("!H", _checksum(echo)) + echo[4:]
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(echo), 0, 0, 64, 1, 0, source.packed, destination.packed
    )
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + echo


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def main(words: list[str]) -> int:
    """`serve ADDRESS PORT`, `send ADDRESS PORT SECONDS`, `forge TARGET PORT INNER-SOURCE INNER-DESTINATION`."""
    match words:
        case ["serve", address, port]:
            return serve(address, int(port))
        case ["send", address, port, seconds]:
            return send(address, int(port), float(seconds))
        case ["forge", target, port, source, destination]:
            return forge(target, int(port), source, destination)
    sys.stderr.write("demo-transfer: unknown words\n")
    return 2

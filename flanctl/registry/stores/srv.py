"""Endpoints from DNS: the SRV records `_etcd-client-ssl._tcp.DOMAIN` and `_etcd-client._tcp.DOMAIN`, as etcdctl takes them.

    discover("example.com")          # ["https://etcd-1.example.com:2379", …]

The C library resolves no SRV records and dnspython does not fit into the executable for one question, so this asks the
servers of /etc/resolv.conf itself: one question over UDP, over TCP where the answer is cut (RFC 1035, 2782, 7766).
Answers are hostile until parsed: sizes, counts and jumps are bounded, and only what was asked for is believed.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import Invalid, NotFound, RegistryUnreachable, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

RESOLV_CONF = "/etc/resolv.conf"
PORT = 53
TRY_SECONDS = 2.0
"""How long one server may take to answer one question."""

SERVICES = (("_etcd-client-ssl._tcp.", "https"), ("_etcd-client._tcp.", "http"))
MAX_TARGETS = 64

_SRV, _IN, _NXDOMAIN = 33, 1, 3
_TRUNCATED = 0x0200


@dataclass(frozen=True, slots=True)
class _Target:
    priority: int
    weight: int
    port: int
    host: str


class _Broken(ValueError):
    """An answer that is none."""


def discover(domain: str, *, timeout: float, resolv_conf: str = RESOLV_CONF, port: int = PORT) -> list[str]:
    """The endpoints a domain names, https ones first, by priority. Blocks for `timeout` seconds at most.

    Raises UsageError for what is no domain, NotFound when it names none, RegistryUnreachable when no name server
    answers, Invalid when one answers nonsense.
    """
    domain = checked(domain)
    deadline = time.monotonic() + timeout
    servers = _servers(resolv_conf)
    found: dict[str, None] = {}
    for service, scheme in SERVICES:
        for target in _in_order(_ask(service + domain, servers, port, deadline)):
            host = f"[{target.host}]" if ":" in target.host else target.host
            found[f"{scheme}://{host}:{target.port}"] = None
    if not found:
        raise NotFound(
            f"DNS names no etcd in {domain}: there is neither"
            f" {SERVICES[0][0]}{domain} nor {SERVICES[1][0]}{domain}",
            hint="--endpoints URL,…",
            id="no-srv",
        )
    return list(found)


def checked(domain: str) -> str:
    """A domain one can ask for. Raises UsageError."""
    domain = domain.rstrip(".")
    for service, _ in SERVICES:
        _encoded(service + domain)
    return domain


def _ask(name: str, servers: Sequence[str], port: int, deadline: float) -> list[_Target]:
    """The SRV records of a name; none if it does not exist."""
    problems: list[str] = []
    for server in (*servers, *servers):  # a datagram may be lost
        left = deadline - time.monotonic()
        if left <= 0:
            break
        until = time.monotonic() + min(left, TRY_SECONDS)
        try:
            return _exchange(name, server, port, until)
        except TimeoutError:
            problems.append(f"{server}   no answer")
        except _Broken as error:
            problems.append(f"{server}   answers nonsense ({error})")
        except OSError as error:
            problems.append(f"{server}   {(error.strerror or str(error)).lower()}")
    details = tuple(dict.fromkeys(problems))
    if details and all("nonsense" in line for line in details):
        raise Invalid(f"cannot resolve {name}: no name server gives a good answer", details=details)
    raise RegistryUnreachable(
        f"cannot resolve {name}: no name server answered", details=details, hint="--endpoints URL,…"
    )


def _exchange(name: str, server: str, port: int, until: float) -> list[_Target]:
    number = int.from_bytes(os.urandom(2), "big")
    question = _encoded(name) + _SRV.to_bytes(2, "big") + _IN.to_bytes(2, "big")
    # Recursion wanted, one question.
    request = number.to_bytes(2, "big") + b"\x01\x00\x00\x01" + bytes(6) + question
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as link:
        link.connect((server, port))
        link.send(request)
        while True:
            link.settimeout(max(0.001, until - time.monotonic()))
            answer = link.recv(65535)
            if answer[:2] == request[:2]:  # else it answers somebody else
                break
            if time.monotonic() >= until:
                raise TimeoutError
    if len(answer) >= 4 and int.from_bytes(answer[2:4], "big") & _TRUNCATED:
        answer = _by_tcp(request, family, server, port, until)
    return parse_answer(answer, request)


def _by_tcp(request: bytes, family: int, server: str, port: int, until: float) -> bytes:
    with socket.socket(family, socket.SOCK_STREAM) as link:
        link.settimeout(max(0.001, until - time.monotonic()))
        link.connect((server, port))
        link.sendall(len(request).to_bytes(2, "big") + request)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            link.settimeout(max(0.001, until - time.monotonic()))
            more = link.recv(65537 - len(data))
            if not more:
                raise _Broken("it breaks off")
            data += more
    return data[2:]


def parse_answer(answer: bytes, request: bytes) -> list[_Target]:
    """The SRV records in an answer to `request`. Raises ValueError for one that does not fit it."""
    if len(answer) < 12 or answer[:2] != request[:2] or not answer[2] & 0x80:
        raise _Broken("no answer to what was asked")
    code = answer[3] & 0x0F
    if code == _NXDOMAIN:
        return []
    if code:
        raise _Broken(f"error {code}")
    questions, answers = (int.from_bytes(answer[at : at + 2], "big") for at in (4, 6))
    asked, _ = _name(request, 12)
    if questions != 1:
        raise _Broken("another question")
    name, at = _name(answer, 12)
    at += 4
    if name.lower() != asked.lower() or at > len(answer):
        raise _Broken("another question")
    names = {asked.lower()}
    targets: list[_Target] = []
    for _ in range(min(answers, 4 * MAX_TARGETS)):
        owner, at = _name(answer, at)
        kind, family = _two(answer, at), _two(answer, at + 2)
        length, data = _two(answer, at + 8), at + 10
        at = data + length
        if at > len(answer):
            raise _Broken("it breaks off")
        if family != _IN or owner.lower() not in names:
            continue
        if kind == 5:  # CNAME: the records that follow bear the other name
            names.add(_name(answer, data)[0].lower())
        elif kind == _SRV and length >= 7 and len(targets) < MAX_TARGETS:
            host, _end = _name(answer, data + 6)
            if host:  # "." means that there is decidedly none (RFC 2782)
                targets.append(
                    _Target(_two(answer, data), _two(answer, data + 2), _two(answer, data + 4), host)
                )
    return [target for target in targets if target.port]


def _in_order(targets: Sequence[_Target]) -> list[_Target]:
    """By priority, and among equals at random by weight (RFC 2782): hosts then spread over the members."""
    spread = random.Random()  # noqa: S311  spreads load, keeps no secret
    return sorted(targets, key=lambda target: (target.priority, -spread.random() * (target.weight + 1)))


def _encoded(name: str) -> bytes:
    """A name on the wire."""
    try:
        parts = [part.encode("ascii") for part in name.split(".")]
    except UnicodeEncodeError:
        parts = []
    if len(name) > 253 or not parts or not all(0 < len(part) < 64 for part in parts):
        raise UsageError(
            f"{name.partition('._tcp.')[2]!r} is not a domain", hint="--discovery-srv example.com"
        )
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def _name(message: bytes, at: int) -> tuple[str, int]:
    """A name and where it ends. Jumps (RFC 1035 4.1.4) only go back, so there is an end to them."""
    parts: list[str] = []
    end = 0
    limit = at
    while True:
        if at >= len(message):
            raise _Broken("it breaks off")
        length = message[at]
        if length >= 0xC0:
            target = _two(message, at) & 0x3FFF
            end = end or at + 2
            if target >= limit:
                raise _Broken("a name that goes in circles")
            at = limit = target
            continue
        if length >= 0x40:
            raise _Broken("a name of no known form")
        at += 1
        if length == 0:
            break
        part = message[at : at + length]
        if (
            len(part) < length
            or not part.isascii()
            or not all(33 <= byte < 127 and byte != 46 for byte in part)
        ):
            raise _Broken("a name of strange letters")
        parts.append(part.decode())
        at += length
        if sum(map(len, parts)) > 255:
            raise _Broken("a name without end")
    return ".".join(parts), end or at


def _two(message: bytes, at: int) -> int:
    if at + 2 > len(message):
        raise _Broken("it breaks off")
    return int.from_bytes(message[at : at + 2], "big")


def _servers(path: str) -> list[str]:
    """As the C library: the first three, and this host where none is named."""
    try:
        with open(path, errors="replace") as file:
            lines = file.read(65536).splitlines()
    except OSError:
        lines = []
    found: list[str] = []
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(str(ipaddress.ip_address(words[1].partition("%")[0])))
            except ValueError:
                continue
    return found[:3] or ["127.0.0.1"]

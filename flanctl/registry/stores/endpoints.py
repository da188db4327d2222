"""Where a registry listens: `http://192.168.6.15:2379,https://etcd-2:2379`, as etcdctl and flanneld write it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PORT = 2379
_SCHEMES = ("http", "https")
_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-_")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member's client address. `host` is without the brackets an IPv6 address wears in a URL."""

    scheme: str  # "http" or "https"
    host: str
    port: int

    @property
    def address(self) -> str:
        """What stands in a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def named(self) -> bool:
        """Whether the host is a name, which may have several addresses."""
        return not (":" in self.host or self.host.replace(".", "").isdigit())

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"


def parse_endpoints(texts: Sequence[str]) -> tuple[Endpoint, ...]:
    """Read endpoints in the order given, each once. A text may hold several, with commas.

    Without a scheme it is http, without a port 2379. UsageError names the one that means nothing.
    """
    found: dict[Endpoint, None] = {}
    for text in texts:
        for part in text.split(","):
            if word := part.strip():
                found[_parse(word)] = None
    if not found:
        raise UsageError("no etcd endpoint given", hint="--endpoints http://127.0.0.1:2379")
    return tuple(found)


def _parse(word: str) -> Endpoint:
    scheme, separator, rest = word.partition("://")
    if not separator:
        scheme, rest = "http", word
    scheme = scheme.lower()
    if scheme not in _SCHEMES:
        raise _nonsense(word, f"the scheme is one of {', '.join(_SCHEMES)}")
    authority, _, path = rest.partition("/")
    if path:
        raise _nonsense(word, "an endpoint has no path")
    if "@" in authority:
        raise UsageError(f"endpoint {_masked(word)} holds a user", hint="--user, and the password with it")
    return Endpoint(scheme, *_host_and_port(word, authority))


def _host_and_port(word: str, authority: str) -> tuple[str, int]:
    if authority.startswith("["):
        host, bracket, port = authority[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise _nonsense(word, "an IPv6 address looks like [fd00::1]:2379")
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            raise _nonsense(word, f"{host!r} is not an IPv6 address") from None
        return host, _port(word, port[1:] if port else None)
    if authority.count(":") > 1:
        raise _nonsense(word, "an IPv6 address stands in brackets, [fd00::1]:2379")
    host, colon, port = authority.partition(":")
    if not host or len(host) > 253 or not set(host.lower()) <= _HOST_CHARACTERS or host[0] in ".-":
        raise _nonsense(word, "it is [http://]HOST[:PORT]")
    if host.replace(".", "").isdigit():
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise _nonsense(word, f"{host} is not an IPv4 address") from None
    return host, _port(word, port if colon else None)


def _port(word: str, text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdigit()) or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise _nonsense(word, f"{text!r} is not a port")
    return int(text)


def _nonsense(word: str, why: str) -> UsageError:
    shown = _masked(word) if "@" in word else word
    return UsageError(f"endpoint {shown!r} cannot be read: {why}", hint="--endpoints http://127.0.0.1:2379")


def _masked(word: str) -> str:
    """A password written into a URL does not go to a screen or a log."""
    before, _, after = word.rpartition("@")
    return f"{before.partition('://')[0]}://…@{after}" if "://" in before else f"…@{after}"

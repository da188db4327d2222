"""What an agent knew last, so that its successor carries packets while the registry is silent.

    known.save(folder, Known(...))         # now and then, and when it stops
    found = known.load(folder)             # at a start that meets no registry

Only used while our lease cannot have ended: until then nobody else can hold the subnet, so going on is what the agent
would have done had it not been started again. The time is the wall clock's, the only one that outlives a reboot; where
that is wrong, the registry's first answer puts it right (decision 10).
"""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from math import isfinite
from typing import TYPE_CHECKING, Any

from flanctl.errors import Invalid
from flanctl.files import write_atomically
from flanctl.model.dialect import Dialect
from flanctl.model.lease import Lease, LeaseAttributes
from flanctl.model.peers import Peer
from flanctl.registry.stores.store import Entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE = "known.json"
FORMAT = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Known:
    """The network's config as it stood in the registry, our lease's entry, and whom we routed to."""

    prefix: str
    dialect: Dialect
    """What the network speaks; a registry that is silent does not tell."""
    config: bytes
    entry: Entry
    ends: float | None
    """Seconds since the epoch at which the lease ends at the earliest; None for a reservation."""
    peers: tuple[Peer, ...]
    api: str = ""
    """Which of an etcd's two sets of keys all this is from, `v2` or `v3`; "" where there is one, or nobody knows."""

    @property
    def left(self) -> float | None:
        """Seconds until the lease may end."""
        return None if self.ends is None else self.ends - time.time()

    def leases(self, key: Callable[[IPv4Network], str]) -> tuple[Lease, ...]:
        """The peers' leases, as far as we know them; `key` names the key of a subnet."""
        return tuple(
            Lease(
                peer.subnet,
                LeaseAttributes(
                    peer.public_ip, backend_type=peer.backend_type, backend_data=peer.backend_data
                ),
                0,
                reservation=False,
                key=key(peer.subnet),
            )
            for peer in self.peers
        )


def save(folder: Path, known: Known) -> None:
    """On disk when this returns. Raises what `write_atomically` raises."""
    entry = known.entry
    document = {
        "format": FORMAT,
        "prefix": known.prefix,
        "dialect": known.dialect.value,
        "config": b64encode(known.config).decode(),
        "lease": [entry.key, b64encode(entry.value).decode(), entry.revision, entry.lease],
        "ends": known.ends,
        "peers": [
            [str(peer.subnet), str(peer.public_ip), peer.backend_type, peer.backend_data]
            for peer in known.peers
        ],
        "api": known.api,
    }
    write_atomically(folder / FILE, json.dumps(document).encode() + b"\n", mode=0o600)


def load(folder: Path) -> Known | None:
    """None if there is none. Raises Invalid for one that cannot be read."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Invalid(f"cannot read {path}: {error.strerror}") from None
    try:
        return _parse(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Invalid(f"{path} cannot be understood ({type(error).__name__})") from None


def forget(folder: Path) -> None:
    """Our subnet is another host's: nobody shall go on with it."""
    try:
        (folder / FILE).unlink(missing_ok=True)
    except OSError:
        pass  # its time is limited, and the registry's first answer counts


def _parse(document: dict[str, Any]) -> Known:
    if document["format"] != FORMAT:
        raise ValueError
    prefix, config, ends = document["prefix"], document["config"], document["ends"]
    key, value, revision, lease = document["lease"]
    api = document.get("api", "")  # version 0.6 did not write it
    peers = []
    for subnet, public_ip, kind, data in document["peers"]:
        # Not numbers: ipaddress takes them for addresses too.
        if not (isinstance(subnet, str) and isinstance(public_ip, str) and isinstance(kind, str | None)):
            raise TypeError
        peers.append(Peer(IPv4Network(subnet), IPv4Address(public_ip), kind, data))
    if not (
        isinstance(prefix, str)
        and api in {"", "v2", "v3"}
        and isinstance(config, str)
        and isinstance(key, str)
        and isinstance(value, str)
        and isinstance(revision, int)
        and isinstance(lease, str | None)
        and (ends is None or (isinstance(ends, int | float) and isfinite(ends)))
    ):
        raise TypeError
    entry = Entry(key, b64decode(value), revision, lease)
    return Known(prefix, Dialect(document["dialect"]), b64decode(config), entry, ends, tuple(peers), api)

"""What flanctl hosts tell each other beside flannel's keys: `<prefix>/flanctl/hosts/<public-ip>`.

flannel never looks there, so its own keys stay byte-equal. The announcement lives as long as the lease and says
which program, version and data path a host runs, its name, and a random `instance` that unmasks cloned machines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from flanctl.registry.stores.store import Changed, KeyExists

if TYPE_CHECKING:
    from flanctl.registry.stores.store import Store


@dataclass(frozen=True, slots=True)
class Announcement:
    """One host's own words. Texts are as the host wrote them: hostile until printed with care."""

    host: str
    version: str
    data_path: str
    instance: str


def announce(store: Store, prefix: str, public_ip: IPv4Address, words: Announcement, *, ttl: float) -> None:
    """Write or renew our announcement. Raises what the store raises; losing a race to our own clone is no error."""
    key = f"{_folder(prefix)}{public_ip}"
    value = json.dumps(asdict(words), separators=(",", ":"), sort_keys=True).encode()
    try:
        current = store.get(key)
        if current is None:
            store.create(key, value, ttl=ttl)
        elif current.value == value:
            store.refresh(current, ttl=ttl)
        else:
            store.replace(key, value, ttl=ttl, expected=current.revision)
    except (KeyExists, Changed):
        return


def announcements(store: Store, prefix: str) -> dict[IPv4Address, Announcement]:
    """Who announced what, by public IP. What cannot be read is left out: nothing depends on it."""
    folder = _folder(prefix)
    found = {}
    for entry in store.list(folder).entries:
        try:
            address = IPv4Address(entry.key.removeprefix(folder))
            said = json.loads(entry.value)
            words = {name: said[name] for name in ("host", "version", "data_path", "instance")}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if all(isinstance(word, str) for word in words.values()):
            found[address] = Announcement(**words)
    return found


def _folder(prefix: str) -> str:
    return f"{prefix}/flanctl/hosts/"

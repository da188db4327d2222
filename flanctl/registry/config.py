"""The network's config in the registry: where it is, reading it, writing it in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flanctl.errors import Invalid, NotFound, UsageError
from flanctl.model.dialect import Dialect
from flanctl.model.json_text import MAX_BYTES
from flanctl.model.network_config import NetworkConfig

if TYPE_CHECKING:
    from flanctl.registry.stores.store import Entry, Store


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """The parsed config and the entry it was read from."""

    config: NetworkConfig
    entry: Entry


def clean_prefix(text: str) -> str:
    """The prefix as flannel joins it (Go's path.Join): doubled and trailing slashes vanish.

    A missing leading slash is kept: in etcd v3 `jxdd/network` and `/jxdd/network` are different prefixes. Raises
    UsageError for one that is empty, or holds blanks, control characters or `.`/`..` parts.
    """
    if not text.isprintable() or any(char.isspace() for char in text):
        raise UsageError(f"prefix {text!a} holds blanks or control characters", id="bad-prefix")
    parts = [part for part in text.split("/") if part]
    if not parts:
        raise UsageError(f'prefix "{text}" is empty', id="bad-prefix")
    if "." in parts or ".." in parts:
        raise UsageError(f'prefix "{text}" holds "." or ".." parts', id="bad-prefix")
    return ("/" if text.startswith("/") else "") + "/".join(parts)


def config_key(prefix: str) -> str:
    return f"{prefix}/config"


def subnets_prefix(prefix: str) -> str:
    """With its slash: flannel lists without, and takes `<prefix>/subnets.bak/…` for live leases."""
    return f"{prefix}/subnets/"


def no_config(prefix: str) -> NotFound:
    """What to raise when the key is not there."""
    return NotFound(
        f"no network config at {config_key(prefix)}",
        hint="flanctl net init --network 172.17.0.0/16   (or another --prefix)",
        id="no-config",
    )


def dialect_of(store: Store, wanted: Dialect | None) -> Dialect:
    """What the network speaks: `wanted`, else what goes with the store. Ask it after the store's first answer."""
    if wanted is not None:
        return wanted
    return Dialect.V0_7 if store.api == "v2" else Dialect.V0_28


def read_config(store: Store, prefix: str, dialect: Dialect | None) -> StoredConfig:
    """In `dialect`, or the store's. Raises NotFound (id `no-config`), Invalid with the position in the text, and what the store raises."""
    key = config_key(prefix)
    entry = store.get(key)
    if entry is None:
        raise no_config(prefix)
    config = NetworkConfig.parse(entry.value, dialect_of(store, dialect), name=key, strict=False)
    return StoredConfig(config, entry)


def write_config(store: Store, prefix: str, text: bytes, *, expected: Entry | None) -> Entry:
    """Create the config, or replace exactly what was shown (`expected`). Raises KeyExists, Changed, Invalid."""
    if len(text) > MAX_BYTES:
        raise Invalid(f"a config of {len(text)} bytes is larger than {MAX_BYTES}")
    key = config_key(prefix)
    if expected is None:
        return store.create(key, text, ttl=None)
    return store.replace(key, text, ttl=None, expected=expected.revision)

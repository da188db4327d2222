"""The way to the registry: settings in, an open store out.

with session(settings) as registry:
    table = registry.leases().table()
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flanctl.errors import NotFound, NotPermitted, RegistryUnreachable, UsageError
from flanctl.model.dialect import Dialect
from flanctl.registry.config import clean_prefix
from flanctl.registry.stores.open import Connection, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.registry.leases import Leases
    from flanctl.registry.stores.store import Store
    from flanctl.settings import Settings


@dataclass(frozen=True, slots=True)
class Session:
    """The open store with what every question to it needs."""

    settings: Settings
    store: Store
    prefix: str
    dialect: Dialect

    def leases(self) -> Leases:
        from flanctl.registry.leases import Leases

        return Leases(self.store, self.prefix, self.dialect)


@contextmanager
def session(
    settings: Settings,
    *,
    prefer: Literal["gateway", "grpc"] = "gateway",
    create: bool = False,
) -> Iterator[Session]:
    """Open the registry the settings name, making it (a file) only with `create`. Errors from it say where the endpoints were configured."""
    dialect = dialect_of(settings)
    prefix = clean_prefix(settings.text("prefix"))
    store = open_store(connection(settings), prefer=prefer, create=create)
    try:
        yield Session(settings, store, prefix, dialect)
    except RegistryUnreachable as error:
        error.details = (*error.details, f"(endpoints from {settings.source('endpoints')})")
        error.hint = error.hint or "start etcd there, or name the right endpoints with --endpoints"
        raise
    finally:
        store.close()


def dialect_of(settings: Settings) -> Dialect:
    """Raises UsageError for one that no flannel speaks."""
    return Dialect.parse(settings.choice("dialect", *(str(dialect) for dialect in Dialect)))


def connection(settings: Settings) -> Connection:
    """What the stores need to know. Raises UsageError for settings that contradict each other."""
    endpoints = settings.items("endpoints")
    if not endpoints:
        raise UsageError(f"no endpoint given ({settings.source('endpoints')} is empty)")
    cert, key = settings.optional("cert"), settings.optional("key")
    if (cert is None) != (key is None):
        given, missing = ("--cert", "--key") if cert else ("--key", "--cert")
        raise UsageError(f"{given} needs {missing}")
    # etcdctl's form: the password behind the name. It must never be taken for a part of the name and be shown.
    user, _, beside = (settings.optional("user") or "").partition(":")
    return Connection(
        endpoints=endpoints,
        timeout=settings.seconds("timeout"),
        cacert=settings.optional("cacert"),
        cert=cert,
        key=key,
        user=user or None,
        password=_password(settings) or beside or None,
    )


def _password(settings: Settings) -> str | None:
    """From --password-file, else from a variable; never from the command line, where everyone could read it."""
    path = settings.optional("password_file")
    if path is None:
        return settings.optional("password")
    try:
        return Path(path).read_text().rstrip("\r\n")
    except FileNotFoundError:
        raise NotFound(f"no password file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NotPermitted(f"cannot read password file {path}: {getattr(error, 'strerror', error)}") from None

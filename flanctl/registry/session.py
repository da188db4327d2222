"""The way to the registry: settings in, an open store out.

with session(settings) as registry:
    table = registry.leases().table()
"""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flanctl.errors import NotFound, NotPermitted, RegistryUnreachable, UsageError
from flanctl.model.dialect import Dialect
from flanctl.registry import config
from flanctl.registry.config import clean_prefix, config_key
from flanctl.registry.stores.open import Api, Connection, holds, open_store, unheard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flanctl.registry.leases import Leases
    from flanctl.registry.stores.store import Store
    from flanctl.settings import Settings


@dataclass(frozen=True, slots=True)
class Session:
    """The open store with what every question to it needs."""

    settings: Settings
    store: Store
    prefix: str
    wanted_dialect: Dialect | None
    """What --dialect says; None where it follows from the store."""

    @property
    def dialect(self) -> Dialect:
        """Ask it after the store's first answer."""
        return config.dialect_of(self.store, self.wanted_dialect)

    def stay(self, api: str) -> None:
        """Of an etcd that speaks both, go on with this one (AutoStore.stay)."""
        from flanctl.registry.stores.discovered import DiscoveredStore
        from flanctl.registry.stores.switching import AutoStore

        if isinstance(self.store, AutoStore | DiscoveredStore):
            self.store.stay(api)

    def move(self, objection: Callable[[Store], str | None]) -> str | None:
        """From etcd v2 to v3 (AutoStore.move); why not, where it was not done."""
        from flanctl.registry.stores.discovered import DiscoveredStore
        from flanctl.registry.stores.switching import AutoStore

        if isinstance(self.store, AutoStore | DiscoveredStore):
            return self.store.move(objection)
        return f"--api {self.settings.text('api')} asks for it"

    def leases(self) -> Leases:
        from flanctl.registry.leases import Leases

        return Leases(self.store, self.prefix, self.wanted_dialect)


@contextmanager
def session(
    settings: Settings,
    *,
    create: bool = False,
    patient: bool = False,
    say: Callable[[str, bool], None] = unheard,
) -> Iterator[Session]:
    """Open the registry the settings name, making it (a file) only with `create`.

    `say(sentence, warning)` is told which of several ways was taken and why. Errors from the registry say where the
    endpoints were configured. `patient` is for who waits for the registry: then a DNS that does not answer is a registry
    that does not, and is asked again.
    """
    dialect = wanted_dialect(settings)
    prefix = clean_prefix(settings.text("prefix"))
    domain = _domain(settings) if patient else None
    how = connection(settings, say, () if domain is None else (domain,))

    def opened(how: Connection) -> Store:
        return open_store(how, create=create, key=config_key(prefix), say=say)

    if domain is None:
        store = opened(how)
    else:
        from flanctl.registry.stores.discovered import DiscoveredStore
        from flanctl.registry.stores.srv import checked

        checked(domain)
        store = DiscoveredStore(
            lambda: _endpoints(settings, say), lambda found: opened(replace(how, endpoints=found)), say
        )
    try:
        yield Session(settings, store, prefix, dialect)
    except RegistryUnreachable as error:
        where = "discovery_srv" if settings.optional("discovery_srv") else "endpoints"
        error.details = (*error.details, f"(endpoints from {settings.source(where)})")
        error.hint = error.hint or "start etcd there, or name the right endpoints with --endpoints"
        raise
    except NotFound as error:
        if error.id == "no-config" and how.api != "auto" and store.api and domain is None:
            _look_elsewhere(error, how, config_key(prefix))
        if error.id == "no-config" and settings.source("prefix") == "default" and domain is None:
            _look_at_flannels(error, how)
        raise
    finally:
        store.close()


@contextmanager
def both_apis(
    settings: Settings,
    *,
    to_endpoints: tuple[str, ...] = (),
    say: Callable[[str, bool], None] = unheard,
) -> Iterator[tuple[Session, Session]]:
    """etcd v2 and etcd v3 of the servers the settings name, v3 at `to_endpoints` if those are given.

    Each speaks its own dialect. Raises UsageError for a file, and what the stores raise later.
    """
    prefix = clean_prefix(settings.text("prefix"))
    how = connection(settings, say)
    if any(endpoint.strip().startswith("sqlite:") for endpoint in (*how.endpoints, *to_endpoints)):
        raise UsageError("a file has neither etcd v2 nor v3", hint="--endpoints with the URLs of an etcd")
    there = replace(how, api="v3", endpoints=to_endpoints or how.endpoints)
    with (
        closing(open_store(replace(how, api="v2"))) as v2,
        closing(open_store(there, say=say)) as v3,
    ):
        try:
            yield Session(settings, v2, prefix, Dialect.V0_7), Session(settings, v3, prefix, Dialect.V0_28)
        except RegistryUnreachable as error:
            if error.id == "no-v2":
                error.hint = (
                    "etcd 3.4 and 3.5 serve it with --enable-v2; 3.6 cannot: migrate before that upgrade"
                )
            error.hint = error.hint or "start etcd there, or name the right endpoints with --endpoints"
            raise
        except NotPermitted as error:
            apart = "etcd keeps the users of v2 and v3 apart: name and password must be good for both"
            error.details = (*error.details, apart)
            raise


def _look_elsewhere(error: NotFound, how: Connection, key: str) -> None:
    """A config that is there, only by the API that was not asked, is said."""
    other: Api = "v3" if how.api == "v2" else "v2"
    error.message = f"no network config at {key} in etcd {how.api}"
    if holds(how, other, key):
        error.message += f"; found in {other}"
        error.hint = f"--api {other}"


def _look_at_flannels(error: NotFound, how: Connection) -> None:
    """Where nobody named a prefix, the network may stand below the one flanneld takes then."""
    from flanctl.flanneld_flags import PREFIX

    if holds(how, how.api, config_key(PREFIX)):
        error.message += f"; there is one at {config_key(PREFIX)}, flannel's default"
        error.hint = f"--prefix {PREFIX}"


def wanted_dialect(settings: Settings) -> Dialect | None:
    """Raises UsageError for one that no flannel speaks."""
    if settings.optional("dialect") is None:
        return None
    return Dialect.parse(settings.choice("dialect"))


def dialect_of(settings: Settings) -> Dialect:
    """For what is looked at before the registry is asked."""
    by_api = Dialect.V0_7 if settings.text("api") == "v2" else Dialect.V0_28
    return wanted_dialect(settings) or by_api


def connection(
    settings: Settings, say: Callable[[str, bool], None] = unheard, endpoints: tuple[str, ...] = ()
) -> Connection:
    """What the stores need to know, on these endpoints if some are given. Raises UsageError for settings that
    contradict each other.

    May ask DNS for the endpoints, and a terminal for the password.
    """
    endpoints = endpoints or _endpoints(settings, say)
    if not endpoints:
        raise UsageError(f"no endpoint given ({settings.source('endpoints')} is empty)")
    cert, key = settings.optional("cert"), settings.optional("key")
    if (cert is None) != (key is None):
        given, missing = ("cert", "key") if cert else ("key", "cert")
        raise UsageError(f"{settings.flag(given)} needs {settings.flag(missing)}")
    # etcdctl's form: the password behind the name. It must never be taken for a part of the name and be shown.
    user, _, beside = (settings.optional("user") or "").partition(":")
    if beside and settings.source("user").startswith("--"):
        say(
            "a password on the command line is seen by everyone on this host (ps);"
            " --password-file or FLANCTL_PASSWORD hides it",
            True,
        )
    password = _password(settings) or beside or None
    if user and password is None and not endpoints[0].startswith("sqlite:"):
        password = _asked(user)
    return Connection(
        endpoints=endpoints,
        timeout=settings.seconds("timeout"),
        cacert=settings.optional("cacert"),
        cert=cert,
        key=key,
        user=user or None,
        password=password,
        api=_api(settings),
    )


def _endpoints(settings: Settings, say: Callable[[str, bool], None]) -> tuple[str, ...]:
    """Those that were given, or those a domain's SRV records name where nobody gave any."""
    domain = _domain(settings)
    if domain is None:
        return settings.items("endpoints")
    from flanctl.registry.stores.srv import discover

    found = discover(domain, timeout=settings.seconds("timeout"))
    say(f"{domain} names {', '.join(found)}", False)
    return tuple(found)


def _domain(settings: Settings) -> str | None:
    """Whose SRV records name the endpoints, where nobody named these."""
    domain = settings.optional("discovery_srv")
    if domain is not None and settings.source("endpoints") == "--endpoints":
        if settings.source("discovery_srv") == "--discovery-srv":
            raise UsageError("--endpoints and --discovery-srv exclude each other")
        return None
    return domain


def _api(settings: Settings) -> Api:
    chosen = settings.choice("api")
    return "v2" if chosen == "v2" else "v3" if chosen == "v3" else "auto"


def _asked(user: str) -> str | None:
    """The password, typed on a terminal; None where there is none, for a user may have an empty one."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    from getpass import getpass

    try:
        return getpass(f'password of "{user}": ')
    except EOFError:
        return None


def _password(settings: Settings) -> str | None:
    """From --password-file, else from a variable; never from the command line, where everyone could read it."""
    path = settings.optional("password_file")
    if path is None:
        return settings.optional("password")
    try:
        with open(path) as file:
            return file.read().rstrip("\r\n")
    except FileNotFoundError:
        raise NotFound(f"no password file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NotPermitted(f"cannot read password file {path}: {getattr(error, 'strerror', error)}") from None

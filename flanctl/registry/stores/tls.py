"""TLS to etcd: whom we believe, who we are, and files that change while we run.

    files = TlsFiles(cacert="/etc/etcd/ca.pem", cert=None, key=None)
    files.context()                         # an ssl.SSLContext; a new one once a file has changed

`ssl` is imported by the first https endpoint, not by commands that need none.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted

if TYPE_CHECKING:
    import ssl

LOOK_SECONDS = 1.0
"""How often the files are looked at."""

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # RHEL, Fedora
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # RHEL 10
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine, BSD
)
"""Where systems keep their CAs. The frozen OpenSSL knows only /etc/ssl, which on RHEL holds no hashed names."""

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h), which `ssl` has no name for."""


class TlsFiles:
    """The PEM files of one store: CA, certificate, key. Safe to use from several threads.

    What is broken at the first look is an error; what breaks later (a rotation half done) leaves the last good
    state in use until the files are whole again.
    """

    def __init__(self, cacert: str | None, cert: str | None, key: str | None) -> None:
        self.cacert, self.cert, self.key = cacert, cert, key
        self.generation = 0
        """Grows by one each time other files are in use."""
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stamp: tuple[object, ...] = ()
        self._looked = 0.0

    def context(self) -> ssl.SSLContext:
        """For new connections. Raises NotFound, NotPermitted or Invalid, naming the file, at the first call only."""
        with self._lock:
            now = time.monotonic()
            if self._context is not None and now - self._looked < LOOK_SECONDS:
                return self._context
            self._looked = now
            stamp = tuple(map(_stamp, (self.cacert, self.cert, self.key)))
            if self._context is not None and stamp == self._stamp:
                return self._context
            try:
                self._context = tls_context(self.cacert, self.cert, self.key)
            except FlanctlError:
                if self._context is None:
                    raise
                return self._context
            self._stamp = stamp
            self.generation += 1
            return self._context

    def look(self) -> int:
        """The generation after a look at the files."""
        self.context()
        return self.generation

    def pem(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """CAs, key and certificate as gRPC takes them. A `cert` file may hold the key too."""
        paths = (
            self.cacert or system_bundle(),
            None if self.cert is None else self.key or self.cert,
            self.cert,
        )
        found: list[bytes | None] = []
        for path in paths:
            if path is None:
                found.append(None)
                continue
            with open(path, "rb") as file:
                found.append(file.read())
        return found[0], found[1], found[2]


def tls_context(cacert: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Verify the server by `cacert` (else the system's CAs) and show `cert` with `key` if given.

    Raises NotFound, NotPermitted or Invalid naming the file.
    """
    import ssl

    for path in (cacert, cert, key):
        if path is not None:
            _readable(path)
    if key is not None and cert is None:
        raise Invalid(f"{key} is a key without its certificate", hint="--cert FILE")
    try:
        context = ssl.create_default_context(cafile=cacert or _missing_bundle())
    except ssl.SSLError:
        raise Invalid(f"{cacert} holds no CA certificate in PEM form") from None
    if cacert is not None:
        # Python 3.13 refuses private CAs without keyUsage, which most openssl recipes make; etcdctl takes them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if cert is not None:

        def ask() -> str:
            raise Invalid(
                f"{key or cert} is encrypted and we ask no passphrase", hint="openssl rsa -in KEY -out PLAIN"
            )

        try:
            context.load_cert_chain(cert, key, password=ask)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise Invalid(f"{key or cert} is not the key of {cert}") from None
            raise Invalid(f"{cert} and {key or cert} are not a certificate and its key in PEM form") from None
    return context


def lenient(context: ssl.SSLContext, cacert: str | None) -> ssl.SSLContext:
    """As `context`, but for any name and any time: only to read in a certificate why it was refused."""
    import ssl

    looking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    looking.check_hostname = False
    looking.verify_flags |= _NO_CHECK_TIME
    if cacert is None:
        looking.load_default_certs()
    for der in context.get_ca_certs(binary_form=True):
        looking.load_verify_locations(cadata=der)
    return looking


def complaint(certificate: object, host: str, verdict: str) -> str | None:
    """What a person reads about a certificate (`getpeercert`) that was refused with OpenSSL's `verdict`."""
    import ssl

    if not isinstance(certificate, dict) or not certificate:
        return None
    if "expired" in verdict or "not yet valid" in verdict:
        field, words = (
            ("notAfter", "expired") if "expired" in verdict else ("notBefore", "is not valid before")
        )
        seconds = ssl.cert_time_to_seconds(str(certificate[field]))
        return f"its certificate {words} {time.strftime('%Y-%m-%d', time.gmtime(seconds))}"
    names = ", ".join(str(name) for _, name in certificate.get("subjectAltName", ()))[:200]
    return f"its certificate is for {names or 'nobody (no subjectAltName)'}, not for {host}"


def system_bundle() -> str | None:
    """The file with the system's CAs, None if there is none we know of."""
    import ssl

    places = (ssl.get_default_verify_paths().cafile, *BUNDLES)
    return next((path for path in places if path is not None and os.path.isfile(path)), None)


def _missing_bundle() -> str | None:
    """None where OpenSSL finds the system's CAs by itself."""
    import ssl

    paths = ssl.get_default_verify_paths()
    if paths.cafile is not None:
        return None
    try:
        if any(name.endswith(".0") for name in os.listdir(paths.capath or "")):
            return None
    except OSError:
        pass
    return system_bundle()


def _stamp(path: str | None) -> object:
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if os.path.isdir(path):
            raise Invalid(f"{path} is a directory, not a PEM file")
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except PermissionError:
        raise NotPermitted(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None

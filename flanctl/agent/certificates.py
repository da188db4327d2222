"""When the certificates end that stand between us and etcd: client certificate and CA, read where the operator put them.

`ssl` tells this of no certificate of our own, so the one field is read from the DER (RFC 5280 4.1): nothing is judged by
it, it is only shown, so that somebody renews in time.
"""

from __future__ import annotations

import calendar
import os
import re
import time
from base64 import b64decode
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 1 << 20
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_SEQUENCE, _VERSION = 0x30, 0xA0
_FORMS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
"""UTCTime and GeneralizedTime."""


class Certificates:
    """The files by role. `ends` may be asked from any thread; a file that has not changed is not read again."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = dict(files)
        self._known: dict[str, tuple[tuple[int, ...], float | None]] = {}

    def ends(self) -> dict[str, float]:
        """Seconds since 1970 at which the first certificate of each file ends; what cannot be read is left out."""
        found = {role: self._end(role, path) for role, path in self._files.items()}
        return {role: end for role, end in found.items() if end is not None}

    def _end(self, role: str, path: str) -> float | None:
        try:
            seen = os.stat(path)
            stamp = seen.st_ino, seen.st_mtime_ns, seen.st_size
            known = self._known.get(role)
            if known is None or known[0] != stamp:
                with open(path, "rb") as file:
                    known = self._known[role] = stamp, first_end(file.read(MAX_BYTES))
        except OSError:
            return None
        return known[1]


def first_end(pem: bytes) -> float | None:
    """When the first of the certificates in a PEM file ends, seconds since 1970; None if there is none to be read."""
    ends = []
    for block in _BLOCK.findall(pem):
        try:
            ends.append(_not_after(b64decode(block)))
        except (ValueError, IndexError):
            continue
    return min(ends, default=None)


def _not_after(der: bytes) -> float:
    """Raises ValueError or IndexError for what is no certificate."""
    at, end = _open(der, 0, _SEQUENCE)
    at, end = _open(der, at, _SEQUENCE)  # TBSCertificate
    if der[at] == _VERSION:
        at = _end(der, at)
    for _ in ("serialNumber", "signature", "issuer"):
        at = _end(der, at)
    at, end = _open(der, at, _SEQUENCE)  # Validity
    at = _end(der, at)  # notBefore
    start, end = _open(der, at, der[at])
    moment = time.strptime(der[start:end].decode("ascii"), _FORMS.get(der[at], "?"))
    return float(calendar.timegm(moment))


def _open(der: bytes, at: int, tag: int) -> tuple[int, int]:
    """Where the content of the element at `at` starts and ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if der[at] != tag or start + length > len(der):
        raise ValueError
    return start, start + length


def _end(der: bytes, at: int) -> int:
    return _open(der, at, der[at])[1]

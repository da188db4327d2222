"""Certificates as people make them, by the openssl program."""

from __future__ import annotations

import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

needs_openssl = pytest.mark.needs("openssl")


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_pki(folder: Path) -> Path:
    """A CA without keyUsage as people make them, one certificate for 127.0.0.1, one expired, one encrypted key."""
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    _openssl(
        folder, "req", "-x509", *curve, "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"
    )
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for name, days in (("good", "9"), ("old", "-1")):
        _openssl(
            folder, "req", *curve, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=x"
        )
        sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext"]
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem", "-days", days)
    _openssl(folder, "pkey", "-in", "good.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    return folder


def server_context(pki: Path, name: str = "good", *, ask_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
    if ask_client:
        context.load_verify_locations(pki / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context

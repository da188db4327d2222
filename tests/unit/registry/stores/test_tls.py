"""PEM files that change, and where the system keeps its CAs. Certificates against real servers: tests/contract."""

from __future__ import annotations

import shutil
import ssl
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import Invalid
from flanctl.registry.stores import tls
from tests.unit.registry.stores.pki import make_pki, needs_openssl

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(autouse=True)
def _always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.0)


def test_files_are_read_again_when_they_change_and_only_then(pki: Path, tmp_path: Path) -> None:
    for name in ("ca.pem", "good.pem", "good.key"):
        shutil.copy(pki / name, tmp_path)
    files = tls.TlsFiles(str(tmp_path / "ca.pem"), str(tmp_path / "good.pem"), str(tmp_path / "good.key"))
    first = files.context()
    assert files.context() is first
    assert files.look() == 1
    fresh = tmp_path / "fresh"
    shutil.copy(pki / "good.pem", fresh)
    fresh.rename(tmp_path / "good.pem")
    assert files.context() is not first
    assert files.look() == 2


@pytest.mark.parametrize("damage", ["half", "gone", "another's key"])
def test_a_rotation_half_done_leaves_the_last_good_ones_in_use(
    pki: Path, tmp_path: Path, damage: str
) -> None:
    for name in ("ca.pem", "good.pem", "good.key"):
        shutil.copy(pki / name, tmp_path)
    cert, key = tmp_path / "good.pem", tmp_path / "good.key"
    files = tls.TlsFiles(str(tmp_path / "ca.pem"), str(cert), str(key))
    first = files.context()
    if damage == "half":
        cert.write_bytes(cert.read_bytes()[:100])
    elif damage == "gone":
        key.unlink()
    else:
        shutil.copy(pki / "ca.key", key)
    assert files.context() is first
    assert files.look() == 1
    shutil.copy(pki / "good.pem", cert)
    shutil.copy(pki / "good.key", key)
    assert files.look() == 2
    assert files.context() is not first


def test_what_is_broken_from_the_start_is_an_error_each_time(pki: Path) -> None:
    files = tls.TlsFiles(str(pki / "ca.pem"), str(pki / "good.pem"), str(pki / "locked.key"))
    for _ in range(2):
        with pytest.raises(Invalid, match=r"locked\.key is encrypted and we ask no passphrase") as caught:
            files.context()
        assert "openssl rsa" in (caught.value.hint or "")


def test_what_grpc_takes_is_the_files_bytes_and_the_systems_cas_without_one(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.crt"
    bundle.write_bytes(b"the system's")
    monkeypatch.setattr(tls, "BUNDLES", (str(tmp_path / "no"), str(bundle)))
    nothing = ssl.DefaultVerifyPaths(None, None, "", "", "", "")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    assert tls.TlsFiles(None, None, None).pem() == (b"the system's", None, None)
    ca, cert, key = (str(pki / name) for name in ("ca.pem", "good.pem", "good.key"))
    roots, private, public = tls.TlsFiles(ca, cert, key).pem()
    assert roots == (pki / "ca.pem").read_bytes()
    assert private == (pki / "good.key").read_bytes()
    assert public == (pki / "good.pem").read_bytes()


def test_cas_are_found_where_rhel_has_them_too(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen OpenSSL looks into /etc/ssl/certs, which is there on RHEL, without the hashed names it needs."""
    folder = tmp_path / "certs"
    folder.mkdir()
    (folder / "ca-bundle.crt").symlink_to(pki / "ca.pem")
    empty = ssl.DefaultVerifyPaths(None, str(folder), "", "", "", str(folder))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: empty)
    monkeypatch.setattr(tls, "BUNDLES", (str(folder / "ca-bundle.crt"),))
    context = tls.tls_context(None, None, None)
    assert [dict(part[0] for part in ca["subject"])["commonName"] for ca in context.get_ca_certs()] == ["ca"]
    (folder / "12345678.0").symlink_to(pki / "ca.pem")
    assert tls._missing_bundle() is None, "OpenSSL finds them by itself"


def test_a_certificate_says_why_it_was_refused() -> None:
    shown = {
        "notBefore": "Jan  1 00:00:00 2030 GMT",
        "notAfter": "Nov  2 12:00:00 2026 GMT",
        "subjectAltName": (("DNS", "etcd-1"), ("IP Address", "10.0.0.1")),
    }
    assert tls.complaint(shown, "h", "certificate has expired") == "its certificate expired 2026-11-02"
    assert (
        tls.complaint(shown, "h", "certificate is not yet valid")
        == "its certificate is not valid before 2030-01-01"
    )
    assert (
        tls.complaint(shown, "h", "Hostname mismatch") == "its certificate is for etcd-1, 10.0.0.1, not for h"
    )
    assert (
        tls.complaint({"notAfter": "x"}, "h", "Hostname mismatch")
        == "its certificate is for nobody (no subjectAltName), not for h"
    )
    assert tls.complaint(None, "h", "expired") is None

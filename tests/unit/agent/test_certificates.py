"""When certificates end, read from files as openssl writes them, and from nonsense."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.agent.certificates import Certificates, first_end
from tests.unit.registry.stores.pki import make_pki, needs_openssl

if TYPE_CHECKING:
    from pathlib import Path


def as_openssl_says(path: Path) -> float:
    said = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout.strip()
    return time.mktime(time.strptime(said, "notAfter=%b %d %H:%M:%S %Y GMT")) - time.timezone


@needs_openssl
def test_the_end_is_openssls(tmp_path: Path) -> None:
    pki = make_pki(tmp_path)
    for name in ("ca.pem", "good.pem", "old.pem"):
        assert first_end((pki / name).read_bytes()) == as_openssl_says(pki / name), name
    both = (pki / "good.pem").read_bytes() + b"# and\n" + (pki / "old.pem").read_bytes()
    assert first_end(both) == as_openssl_says(pki / "old.pem"), "the first to end"


@needs_openssl
def test_a_file_that_changes_is_read_again_and_one_that_is_missing_is_left_out(tmp_path: Path) -> None:
    pki = make_pki(tmp_path)
    files = Certificates({"client": str(pki / "good.pem"), "ca": str(pki / "none.pem")})
    assert files.ends() == {"client": as_openssl_says(pki / "good.pem")}
    (pki / "old.pem").rename(pki / "good.pem")
    assert files.ends() == {"client": as_openssl_says(pki / "good.pem")}
    (pki / "good.pem").write_text("half a rota")
    assert files.ends() == {}


@needs_openssl
def test_a_far_end_is_read_too(tmp_path: Path) -> None:
    """From 2050 on the other form of time is written (RFC 5280 4.1.2.5)."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k -out c.pem -subj /CN=x -days 20000"
    subprocess.run(["openssl", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    assert first_end((tmp_path / "c.pem").read_bytes()) == pytest.approx(
        time.time() + 20_000 * 86_400, abs=90_000
    )


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(data: bytes) -> None:
    from base64 import b64encode

    assert first_end(data) is None
    block = b"-----BEGIN CERTIFICATE-----\n" + b64encode(data) + b"\n-----END CERTIFICATE-----\n"
    assert first_end(block) is None or isinstance(first_end(block), float)

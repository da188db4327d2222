"""What a command makes of endpoints that are no etcd, or lie: one clear line with endpoint and key, soon, in bounded memory."""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import flanctl
from tests.unit.registry.stores.pki import make_pki, needs_openssl, server_context
from tests.unit.registry.stores.scripted import Request, Scripted, etcd, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY = "/jxdd/network/config"
HEADER = {"header": {"revision": "7"}}
HEAD = b"HTTP/1.1 200 OK\r\n"

MEMORY = 600 << 20
"""Address space of the command in bytes; what it is told is larger, or has no end."""


def endless(start: bytes, piece: bytes) -> Callable[[Request], Iterator[bytes]]:
    return lambda _: itertools.chain([start], itertools.repeat(piece))


def fat(_: Request) -> Iterator[bytes]:
    """A value of 100 MB where the config should be."""
    yield (
        HEAD
        + b"Content-Length: 200000000\r\n\r\n"
        + b'{"header":{"revision":"7"},"kvs":[{"key":"L2E=","value":"'
    )
    for _ in range(200):
        yield b"A" * 1_000_000


def fixed(said: bytes | None) -> Callable[[Request], bytes | None]:
    return lambda _: said


LIARS: dict[str, tuple[Callable[[Request], bytes | Iterator[bytes] | None], str]] = {
    "a web server": (fixed(ok(b"<html>welcome</html>")), "answers HTTP but is not etcd (status 200)"),
    "garbage": (fixed(b"\x00\xff\x07 what"), "answers, but not in HTTP"),
    "ssh": (fixed(b"SSH-2.0-OpenSSH_9.2\r\n"), "answers, but not in HTTP"),
    "nothing": (fixed(None), "closed the connection without an answer"),
    "half an answer": (fixed(HEAD + b"Content-Length: 50\r\n\r\n{"), ""),
    "a redirect": (
        fixed(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
        "",
    ),
    "a head without end": (endless(HEAD, b"X-Header: " + b"x" * 5000 + b"\r\n"), "answers, but not in HTTP"),
    "a body without end": (
        endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        "answers with more than 64 MB",
    ),
    "100 MB": (fat, "answers with more than 64 MB"),
    "JSON 10,000 deep": (fixed(ok(b'{"kvs":' * 10_000)), "answers HTTP but is not etcd"),
    "arrays 100,000 deep": (fixed(ok(b'{"header":' + b"[" * 100_000)), "answers HTTP but is not etcd"),
}


@pytest.mark.needs("prlimit")
@pytest.mark.parametrize("api", ["v3", "v2"])
@pytest.mark.parametrize("liar", LIARS)
def test_it_is_named_with_endpoint_and_key_and_ends_with_3(liar: str, api: str) -> None:
    answer, words = LIARS[liar]
    with Scripted(answer, close=True) as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        begin = time.monotonic()
        said = flanctl(
            "net",
            "get",
            "--endpoints",
            endpoint,
            "--api",
            api,
            "--timeout",
            "2",
            prefix=("prlimit", f"--as={MEMORY}"),
        )
        assert time.monotonic() - begin < 20
    assert said.code == 3, said.err
    first, second, *_ = said.err.splitlines()
    assert first.startswith(f"flanctl net get: cannot read {KEY}: the only endpoint did not answer")
    assert second.strip().startswith(endpoint)
    assert words in second
    assert said.out == ""
    assert len(said.err) < 1000


@needs_openssl
def test_tls_where_http_was_written_is_said(tmp_path: Path) -> None:
    with Scripted(fixed(ok()), tls=server_context(make_pki(tmp_path))) as server:
        said = flanctl("net", "get", "--endpoints", f"http://127.0.0.1:{server.port}", "--api", "v3")
        assert said.code == 3
        assert f"speaks TLS: write https://127.0.0.1:{server.port}" in said.err


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ({"key": "!", "value": ""}, "'key' that is not base64"),
        ({"key": "L2E=", "value": "a"}, "'value' that is not base64"),
        ({"key": "L2E=", "mod_revision": "1e9"}, "'mod_revision' that is not a number"),
        ({"key": "L2E=", "lease": "9" * 30}, "'lease' that is not a number"),
    ],
)
def test_what_is_in_etcds_form_and_not_etcds_is_said(kv: dict[str, str], words: str) -> None:
    with Scripted(fixed(etcd({**HEADER, "kvs": [kv]}))) as server:
        said = flanctl("net", "get", "--endpoints", f"127.0.0.1:{server.port}", "--api", "v3", "-w", "json")
    error = json.loads(said.err)["error"]
    assert said.code == 3
    assert KEY in error["message"]
    assert f"http://127.0.0.1:{server.port}   etcd sent {words}" in error["details"]

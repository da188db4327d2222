"""An agent and a command whose first endpoint lies: the good member serves them, and nobody is kept waiting for long."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.etcd import Cluster
from tests.support.namespaces import inside
from tests.unit.registry.stores.pki import make_pki, server_context
from tests.unit.registry.stores.scripted import Request, Scripted, ok

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34", "openssl"),
    pytest.mark.timeout(180),
]

HEAD = b"HTTP/1.1 200 OK\r\n"
SUBNETS = "/jxdd/network/subnets/"
MEMORY = 400 << 20
"""Resident bytes an agent may have; what the liars send has no end, or is larger."""


def fixed(said: bytes | None) -> Callable[[Request], bytes | None]:
    return lambda _: said


def endless(_: Request) -> Iterator[bytes]:
    return itertools.chain(
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n"],
        itertools.repeat(b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    )


LIARS: dict[str, Callable[[Request], bytes | Iterator[bytes] | None]] = {
    "garbage": fixed(b"\x00\xff\x07 what"),
    "a web server": fixed(ok(b"<html>welcome</html>")),
    "half an answer": fixed(HEAD + b"Content-Length: 50\r\n\r\n{"),
    "a redirect": fixed(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
    "a body without end": endless,
    "nothing": fixed(None),
    "TLS where http was written": fixed(ok()),
    "a value that is not base64": fixed(ok(b'{"header":{"revision":"7"},"kvs":[{"key":"!"}]}')),
}


@pytest.mark.parametrize("api", ["v3", "v2"])
@pytest.mark.parametrize("liar", LIARS)
def test_the_good_member_serves_the_agent_and_the_commands(tmp_path: Path, liar: str, api: str) -> None:
    tls = server_context(make_pki(tmp_path)) if liar.startswith("TLS") else None
    with Lab("liars") as lab:
        host, registry = lab.add_host(), lab.add_host("etcd")
        with (
            Cluster(
                "3.4",
                folder=tmp_path / "etcd",
                host=str(registry.address),
                v2=api == "v2",
                prefix=registry.command([]),
            ) as cluster,
            inside(host.path),
            Scripted(LIARS[liar], close=True, tls=tls) as bad,
        ):
            good = cluster.endpoints[0]
            flanctl(host, good, "net", "init", "--network", "172.17.0.0/16", "--api", api)
            both = f"http://127.0.0.1:{bad.port},{good}"
            agent = RunningAgent.start(host, tmp_path / "agent", both, "--iface", "eth0", FLANCTL_API=api)
            subnet = agent.wait_ready()["subnet"]
            assert bad.connections > 0, "the liar was asked"
            # Another host comes: the watch hears of it.
            flanctl(host, good, "reserve", "172.17.9.0/24", "192.168.66.99", "--yes", "--api", api)
            agent.wait_log(r"172\.17\.9\.0/24")
            listed = flanctl(host, both, "subnets", "ls", "-w", "simple", "--api", api)
            assert {line.split()[0] for line in listed.stdout.splitlines()} == {subnet, "172.17.9.0/24"}
            with open(f"/proc/{agent.pid}/status", encoding="ascii") as file:
                resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
            assert resident * 1024 < MEMORY
            assert agent.terminate() == 0
            assert "Traceback" not in agent.log_text()
    assert lab.leftovers() == ()

"""An agent whose etcd DNS names: it waits for DNS as for etcd, and follows where DNS sends it."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest

from flanctl.demo.hosts import Lab
from tests.support.agents import RunningAgent, flanctl
from tests.support.etcd import Cluster
from tests.support.namespaces import inside
from tests.unit.registry.stores.test_srv import PLAIN, only, record

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

    from flanctl.demo.hosts import Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables", "etcd34")


class NameServer:
    """On a host's own 127.0.0.1:53: names one port of one address."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self.names = address, port
        self.silent = False
        with inside(host.path):
            self._link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._link.bind(("127.0.0.1", 53))
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._link.sendto(b"", self._link.getsockname())
        self._thread.join()
        self._link.close()

    def _run(self) -> None:
        while True:
            request, where = self._link.recvfrom(4096)
            if not request:
                return
            address, port = self.names
            if self.silent:
                continue
            self._link.sendto(only(PLAIN, record(host=address, port=port))(request, False), where)


class WithResolvConf:
    """A host whose programs read another /etc/resolv.conf, in a mount namespace of their own."""

    def __init__(self, host: Host, resolv_conf: Path) -> None:
        self._host = host
        self._words = [
            *("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"'),
            str(resolv_conf),
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return self._host.popen([*self._words, *arguments], **options)


def test_it_waits_for_dns_and_goes_where_dns_sends_it_when_nobody_answers(tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.1\n")
    with Lab("srv") as lab, contextlib.ExitStack() as stack:
        host = lab.add_host()
        cluster = stack.enter_context(
            Cluster("3.4", 3, folder=tmp_path / "etcd", host="192.168.66.1", prefix=lab.underlay.command([]))
        )
        flanctl(lab.underlay, ",".join(cluster.endpoints), "net", "init", "--network", "172.17.0.0/16")
        ports = [int(endpoint.rpartition(":")[2]) for endpoint in cluster.endpoints]
        there: Any = WithResolvConf(host, resolv_conf)
        options = ["--iface", "eth0", "--discovery-srv", "lan.example", "--timeout", "2s"]
        agent = RunningAgent.start(there, tmp_path / "agent", "", *options)
        agent.wait_log("waiting: cannot resolve _etcd-client-ssl._tcp.lan.example: no name server answered")

        server = stack.enter_context(NameServer(host, "192.168.66.1", ports[0]))
        subnet = agent.wait_ready()["subnet"]
        agent.wait_log(f"lan.example names http://192.168.66.1:{ports[0]}")

        cluster.kill(0)
        server.names = "192.168.66.1", ports[1]
        agent.wait_log("packets go on flowing", seconds=60)
        agent.wait_log(f"lan.example names http://192.168.66.1:{ports[1]}", seconds=60)
        agent.wait_log("registry answers again", seconds=60)
        assert agent.terminate() == 0
        # Without DNS once more: what was known last carries packets.
        server.silent = True
        agent = agent.again()
        agent.wait_log("going on with what we knew last")
        assert agent.wait_ready()["subnet"] == subnet
        agent.terminate()
    assert lab.leftovers() == ()

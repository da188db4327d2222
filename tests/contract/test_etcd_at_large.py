"""Real etcd in the shapes operators have it: 20,000 keys, IPv6, a gateway that serves not all, v2 and v3 side by side."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import pty
import select
import subprocess
import sys
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any, Literal

import pytest

from flanctl.errors import NotPermitted, RegistryUnreachable
from flanctl.registry.stores import etcd_v3
from flanctl.registry.stores.endpoints import parse_endpoints
from flanctl.registry.stores.etcd_gateway import EtcdGatewayStore
from flanctl.registry.stores.etcd_grpc import EtcdGrpcStore
from flanctl.registry.stores.open import Connection, open_store
from flanctl.registry.stores.store import Delete, Put
from tests.support.authority import Authority
from tests.support.cli import flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster, Tls
from tests.support.stores import SERVED, SERVED_V3, VERSIONS, opened
from tests.unit.registry.stores.scripted import Request, Scripted, ok

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.etcd import Version

openssl = pytest.mark.needs("openssl")

COUNT = 20_000
VALUE = '{"PublicIP":"192.168.200.200","PublicIPv6":null}'


@pytest.fixture(scope="module")
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """20,000 leases, as one etcd has them for a network of /12 or so."""
    with Cluster(request.param, folder=tmp_path_factory.mktemp("etcd")) as cluster:
        link = http.client.HTTPConnection(cluster.endpoints[0].removeprefix("http://"), timeout=30)
        with contextlib.closing(EtcdGatewayStore(parse_endpoints(cluster.endpoints))) as store:
            names = (f"/net/subnets/10.{n >> 8}.{n & 255}.0-24" for n in range(COUNT))
            for group in _batched(names, 100):
                puts = [{"request_put": {"key": _b64(name), "value": _b64(VALUE)}} for name in group]
                link.request("POST", "/v3/kv/txn", json.dumps({"success": puts}))
                assert link.getresponse().read()
            assert store.get("/net/subnets/10.0.0.0-24") is not None
        link.close()
        yield cluster


def _batched(names: Iterator[str], count: int) -> Iterator[list[str]]:
    while group := list(itertools.islice(names, count)):
        yield group


def _b64(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(("kind", "large"), SERVED_V3, indirect=["large"], scope="module")
def test_20000_leases_come_in_pages_of_one_revision_and_in_bounded_memory(
    large: Cluster, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer changes keys meanwhile. What the list takes beside its result is a page or two."""
    pages: list[tuple[int, int]] = []
    with opened(kind, large.endpoints, timeout=60.0) as store:
        real = store._range  # type: ignore[attr-defined]

        def counted(deed: Any, start: bytes, end: bytes | None, **more: int) -> Any:
            page = real(deed, start, end, **more)
            pages.append((len(page.items), more["revision"]))
            large.etcdctl("put", "/net/subnets/10.70.0.0-24", f"changed {len(pages)}")
            return page

        store.list("/net/subnets/10.0.0.")  # imports and connections are not what is measured
        monkeypatch.setattr(store, "_range", counted)
        tracemalloc.start()
        try:
            snapshot = store.list("/net/subnets/")
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(snapshot.entries) == COUNT
    assert [count for count, _ in pages] == [etcd_v3.PAGE] * (COUNT // etcd_v3.PAGE)
    assert {revision for _, revision in pages} == {0, snapshot.revision}
    changed = next(entry for entry in snapshot.entries if entry.key.endswith("10.70.0.0-24"))
    assert changed.revision <= snapshot.revision
    assert peak - kept < 6 << 20, f"{(peak - kept) >> 20} MB beside the result's {kept >> 20} MB"


@pytest.mark.parametrize(("kind", "version"), SERVED)
def test_an_ipv6_address_in_brackets(tmp_path: Path, kind: str, version: Version) -> None:
    with Cluster(version, folder=tmp_path, host="::1", v2=kind == "v2") as cluster:
        assert cluster.endpoints[0].startswith("http://[::1]:")
        with opened(kind, cluster.endpoints) as store:
            entry = store.create("/six/a", b"v", ttl=60)
            with store.watch("/six/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)
            assert "[::1]" in store.describe()


@openssl
@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_certificate_that_is_for_servers_only_leaves_grpc(tmp_path: Path, version: Version) -> None:
    """The gateway shows its server the server's own certificate, which is no client's (etcd issues 9785, 16590)."""
    authority = Authority(tmp_path / "pki")
    files = Tls(
        ca=authority.ca,
        members=(authority.issue("server", "IP:127.0.0.1", usage="serverAuth"),),
        client=authority.issue("client", usage="clientAuth"),
        client_auth=True,
    )
    with Cluster(version, folder=tmp_path / "etcd", tls=files) as cluster:
        said: list[str] = []
        connection = Connection(
            cluster.endpoints,
            cacert=str(authority.ca),
            cert=str(files.client[0]),
            key=str(files.client[1]),
        )
        store = open_store(connection, say=lambda sentence, _: said.append(sentence))
        with contextlib.closing(store):
            entry = store.create("/a/b", b"v", ttl=60)
            assert store.name == EtcdGrpcStore.name
            with store.watch("/a/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)
        assert len(said) == 1
        assert said[0].startswith("gRPC is taken: cannot create /a/b")


@openssl
@pytest.mark.parametrize("version", VERSIONS)
def test_a_login_by_the_certificates_name_leaves_grpc(tmp_path: Path, version: Version) -> None:
    """The gateway refuses it: "CommonName of client sending a request against gateway will be ignored"."""
    authority = Authority(tmp_path / "pki")
    files = Tls(
        ca=authority.ca,
        members=(authority.issue("server", "IP:127.0.0.1"),),
        client=authority.issue("root"),
        client_auth=True,
    )
    with Cluster(version, folder=tmp_path / "etcd", tls=files) as cluster:
        for command in ("user add root:secret", "user grant-role root root", "auth enable"):
            cluster.etcdctl(*command.split())
        connection = Connection(
            cluster.endpoints,
            cacert=str(authority.ca),
            cert=str(files.client[0]),
            key=str(files.client[1]),
        )
        with contextlib.closing(open_store(connection)) as store:
            assert store.create("/a/b", b"v", ttl=None)
            assert store.name == EtcdGrpcStore.name


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster("3.4", folder=tmp_path_factory.mktemp("etcd"), v2=True) as cluster:
        yield cluster


CONFIG = b'{"Network":"10.5.0.0/16"}'


def written(cluster: Cluster, api: Literal["v2", "v3"], prefix: str) -> None:
    with contextlib.closing(open_store(Connection(cluster.endpoints, api=api))) as store:
        store.create(f"{prefix}/config", CONFIG, ttl=None)


def asked(cluster: Cluster, prefix: str, *words: str) -> Any:
    return flanctl(*words, "--endpoints", cluster.endpoints[0], "--prefix", prefix)


@pytest.mark.needs("etcd34")
class TestApi:
    """What an operator of a 0.7.1 cluster, a new one, or one in the middle of it sees."""

    def test_a_config_that_is_in_v2_only_is_found_there_with_its_dialect(self, both: Cluster) -> None:
        written(both, "v2", "/old")
        said = asked(both, "/old", "net", "get", "--effective", "--debug")
        assert said.code == 0, said.err
        assert "etcd v2 over HTTP is taken: the config is there and not in v3" in said.err
        listed = asked(both, "/old", "subnets", "ls", "-w", "json")
        assert json.loads(listed.out)["dialect"] == "0.7"
        assert listed.err == "", "said only when asked for"
        kept = asked(both, "/old", "subnets", "ls", "-w", "json", "--dialect", "0.28")
        assert json.loads(kept.out)["dialect"] == "0.28"

    def test_where_only_v3_was_asked_it_says_that_v2_has_it_and_the_other_way_round(
        self, both: Cluster
    ) -> None:
        """flannel.md 11, row 19."""
        written(both, "v2", "/two")
        missed = asked(both, "/two", "net", "get", "--api", "v3")
        assert missed.code == 4
        assert "no network config at /two/config in etcd v3; found in v2" in missed.err
        assert "try: --api v2" in missed.err
        written(both, "v3", "/three")
        missed = asked(both, "/three", "net", "get", "--api", "v2")
        assert "no network config at /three/config in etcd v2; found in v3" in missed.err
        nowhere = asked(both, "/nowhere", "net", "get", "--api", "v3")
        assert (nowhere.code, "found in" in nowhere.err) == (4, False)

    def test_a_v2_network_below_flannels_own_prefix_is_pointed_at(self, both: Cluster) -> None:
        written(both, "v2", "/coreos.com/network")
        missed = flanctl("subnets", "ls", "--endpoints", both.endpoints[0])
        assert missed.code == 4
        assert "there is one at /coreos.com/network/config, flannel's default" in missed.err
        assert missed.err.endswith("try: --prefix /coreos.com/network\n")

    def test_where_both_have_one_v3_wins_with_a_warning(self, both: Cluster) -> None:
        written(both, "v2", "/both")
        written(both, "v3", "/both")
        said = asked(both, "/both", "subnets", "ls", "-w", "json")
        assert (said.code, json.loads(said.out)["dialect"]) == (0, "0.28")
        assert (
            "warning: /both/config is in etcd v3 and in v2: v3 is taken; --api v2 for the other" in said.err
        )

    def test_net_init_writes_where_the_network_is_and_new_ones_to_v3(self, both: Cluster) -> None:
        made = asked(both, "/fresh", "net", "init", "--network", "10.6.0.0/16")
        assert (made.code, "etcd v3" in made.err) == (0, True), made.err
        old = asked(both, "/fresh2", "net", "init", "--network", "10.6.0.0/16", "--api", "v2")
        assert (old.code, "etcd v2" in old.err) == (0, True), old.err
        again = asked(both, "/fresh2", "net", "init", "--network", "10.6.0.0/16")
        assert (again.code, "holds this already" in again.err) == (0, True), again.err

    def test_nonsense_is_a_usage_error(self, both: Cluster) -> None:
        assert asked(both, "/x", "net", "get", "--api", "v4").code == 2

    @pytest.mark.parametrize("large", VERSIONS, indirect=True)
    def test_an_etcd_without_v2_is_said(self, large: Cluster) -> None:
        said = asked(large, "/net", "net", "get", "--api", "v2")
        assert (said.code, "serves no v2 API" in said.err) == (3, True)
        assert "try: --api v3" in said.err

    def test_an_etcd_older_than_3_is_asked_by_v2(self, both: Cluster) -> None:
        """2.3 is not to be had any more: a wire to the real server lets through only what it had."""
        written(both, "v2", "/ancient")

        def answer(request: Request) -> bytes:
            if request.path == "/version":
                return ok(b'{"etcdserver":"2.3.8","etcdcluster":"2.3.0"}')
            if not request.path.startswith("/v2/"):
                return ok(b"404 page not found\n", status="404 Not Found")
            link = http.client.HTTPConnection(both.endpoints[0].removeprefix("http://"), timeout=5)
            with contextlib.closing(link):
                link.request(request.method, request.path, request.body)
                said = link.getresponse()
                index = said.headers.get("X-Etcd-Index", "0")
                body = said.read()
                head = f"HTTP/1.1 {said.status} {said.reason}\r\nX-Etcd-Index: {index}\r\n"
                return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

        with Scripted(answer) as wire:
            said = flanctl(
                "net", "get", "--debug", "--endpoints", f"127.0.0.1:{wire.port}", "--prefix", "/ancient"
            )
        assert said.code == 0, said.err
        assert "etcd v2 over HTTP is taken: this etcd is older than 3.0" in said.err


@pytest.mark.parametrize("version", VERSIONS)
def test_a_password_is_asked_for_on_a_terminal_and_never_echoed(tmp_path: Path, version: Version) -> None:
    with Cluster(version, folder=tmp_path) as cluster:
        for command in (
            ["user", "add", "root:s3 cret"],
            ["user", "grant-role", "root", "root"],
            ["auth", "enable"],
        ):
            cluster.etcdctl(*command)
        with contextlib.closing(
            EtcdGatewayStore(parse_endpoints(cluster.endpoints), user="root", password="s3 cret")
        ) as store:
            store.create("/net/config", CONFIG, ttl=None)
        with (
            pytest.raises(NotPermitted),
            contextlib.closing(EtcdGatewayStore(parse_endpoints(cluster.endpoints))) as store,
        ):
            store.get("/net/config")
        code, seen = _typed(
            "s3 cret\n",
            "net",
            "get",
            "--endpoints",
            cluster.endpoints[0],
            "--prefix",
            "/net",
            "--user",
            "root",
        )
        assert (code, CONFIG.decode() in seen) == (0, True), seen
        assert 'password of "root": ' in seen
        assert "s3 cret" not in seen
        without = flanctl(
            "net", "get", "--endpoints", cluster.endpoints[0], "--prefix", "/net", "--user", "root", stdin=b""
        )
        assert without.code == 7


def _typed(text: str, *words: str) -> tuple[int, str]:
    """Run a command on a terminal of its own and type when it asks: its exit code and all that was to be seen."""
    controller, terminal = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLANCTL_", "FLANNEL", "ETCDCTL_"))}
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "flanctl", *words],
        stdin=terminal, stdout=terminal, stderr=terminal, env=clean,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    answered = False
    timer = threading.Timer(30, process.kill)
    timer.start()
    try:
        while True:
            select.select([controller], [], [], 30)
            try:
                more = os.read(controller, 65536)
            except OSError:  # EIO: the last one has closed the terminal
                break
            seen += more
            if not answered and b": " in seen:
                os.write(controller, text.encode())
                answered = True
        return process.wait(), seen.decode()
    finally:
        timer.cancel()
        os.close(controller)


@pytest.mark.parametrize(("kind", "version"), SERVED_V3)
def test_a_full_etcd_is_named_and_reads_watches_renewals_and_deletions_go_on(
    tmp_path: Path, kind: str, version: Version
) -> None:
    """Its quota is really used up. What frees it is what the error's hint says."""
    quota = 8 << 20
    with (
        Cluster(version, folder=tmp_path, extra=[f"--quota-backend-bytes={quota}"]) as cluster,
        opened(kind, cluster.endpoints) as store,
    ):
        held = store.create("/full/held", b"v", ttl=60)
        old = store.create("/full/old", b"v", ttl=60)
        with pytest.raises(RegistryUnreachable, match=r"cannot create /fill/\d+: etcd is full"):
            for number in range(200):  # it counts what has been committed, ten times a second
                store.create(f"/fill/{number}", bytes(1 << 20), ttl=None)
        until(lambda: "NOSPACE" in cluster.etcdctl("alarm", "list"))  # 3.4 refuses first and raises it then
        with pytest.raises(RegistryUnreachable) as caught:
            store.create("/full/new", b"v", ttl=60)
        assert caught.value.message.startswith(
            f"cannot create /full/new: etcd is full, NOSPACE raised by etcd0 ({cluster.id(0)})"
        )
        assert caught.value.hint == "etcdctl alarm list; compact, defrag and disarm"
        assert store.refresh(held, ttl=60).revision == held.revision
        with store.watch("/full/", after=old.revision) as watch:
            assert store.delete(old.key, expected=old.revision)
            assert isinstance(next(watch), Delete)
        assert [entry.key for entry in store.list("/full/").entries] == [held.key]

        cluster.etcdctl("del", "--prefix", "/fill/")
        cluster.etcdctl("compact", str(store.list("/full/").revision))
        cluster.etcdctl("defrag")
        cluster.etcdctl("alarm", "disarm")
        assert store.create("/full/new", b"v", ttl=60)


@pytest.mark.needs("etcd34")
def test_v2s_keys_have_no_quota_and_an_alarm_ends_no_watch_of_them(tmp_path: Path) -> None:
    """3.4's health is then `false`, as without a leader, and no word says why."""
    with Cluster("3.4", folder=tmp_path, v2=True) as cluster, opened("v2", cluster.endpoints) as store:
        link = http.client.HTTPConnection(cluster.endpoints[0].removeprefix("http://"), timeout=10)
        raised = {"action": "ACTIVATE", "memberID": str(int(cluster.id(0), 16)), "alarm": "NOSPACE"}
        with contextlib.closing(link):
            link.request("POST", "/v3/maintenance/alarm", json.dumps(raised))
            assert b"NOSPACE" in link.getresponse().read()
            link.request("GET", "/health")
            assert json.loads(link.getresponse().read()) == {"health": "false"}
        entry = store.create("/full/a", b"v", ttl=60)
        with store.watch("/full/", after=entry.revision - 1) as watch:
            assert isinstance(next(watch), Put)
            assert store.delete(entry.key, expected=entry.revision)
            assert isinstance(next(watch), Delete)

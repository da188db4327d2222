"""Real etcd behind TLS and logins, by every store: certificates of each member, client certificates, rotation, roles."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest

from flanctl.errors import FlanctlError, NotPermitted, RegistryUnreachable
from flanctl.registry.stores import tls
from flanctl.registry.stores.store import Put
from tests.support.authority import Authority
from tests.support.cli import flanctl
from tests.support.deadline import until
from tests.support.etcd import Cluster, Tls
from tests.support.stores import SERVED, SERVED_V3, VERSIONS, opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.etcd import Version

pytestmark = pytest.mark.needs("openssl")
on_every_store = pytest.mark.parametrize(("kind", "secured"), SERVED, indirect=["secured"], scope="module")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def secured(
    request: pytest.FixtureRequest, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three members on addresses of their own, each with a certificate for its own only; clients must show one."""
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    files = Tls(
        ca=authority.ca,
        members=tuple(authority.issue(f"member{i}", f"IP:{host}") for i, host in enumerate(hosts)),
        client=authority.issue("client"),
        client_auth=True,
    )
    folder, old = tmp_path_factory.mktemp("etcd"), request.param == "3.4"
    with Cluster(request.param, members=3, folder=folder, host=hosts, v2=old, tls=files) as cluster:
        yield cluster


def shown(authority: Authority, name: str = "client") -> dict[str, str]:
    folder = authority.folder
    return {"cacert": str(authority.ca), "cert": f"{folder}/{name}.pem", "key": f"{folder}/{name}.key"}


@on_every_store
def test_each_member_is_known_by_its_own_certificate(
    authority: Authority, secured: Cluster, kind: str
) -> None:
    for endpoint in secured.endpoints:
        with opened(kind, (endpoint,), **shown(authority)) as store:
            key = f"/{kind}/{endpoint[8:17]}"
            entry = store.create(key, b"v", ttl=60)
            with store.watch(f"/{kind}/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)
            assert endpoint in store.describe()


@on_every_store
def test_without_a_client_certificate_we_are_not_permitted(
    authority: Authority, secured: Cluster, kind: str
) -> None:
    with opened(kind, secured.endpoints, cacert=str(authority.ca)) as store:
        with pytest.raises(NotPermitted, match="etcd refused our client certificate") as caught:
            store.get("/a")
    assert caught.value.hint == "--cert and --key"


@on_every_store
def test_a_name_the_certificate_does_not_bear_is_named_with_those_it_does(
    authority: Authority, secured: Cluster, kind: str
) -> None:
    port = secured.endpoints[0].rpartition(":")[2]
    with opened(kind, (f"https://localhost:{port}",), **shown(authority)) as store:
        with pytest.raises(RegistryUnreachable) as caught:
            store.get("/a")
    assert "its certificate is for 127.0.0.1, not for localhost" in caught.value.details[0]


@on_every_store
def test_a_ca_we_were_not_given_is_not_trusted(secured: Cluster, tmp_path: Path, kind: str) -> None:
    other = Authority(tmp_path / "other")
    cert, key = other.issue("client")
    with opened(kind, secured.endpoints[:1], cacert=str(other.ca), cert=str(cert), key=str(key)) as store:
        with pytest.raises(RegistryUnreachable) as caught:
            store.get("/a")
    assert "its certificate is not trusted" in caught.value.details[0]


@pytest.mark.parametrize(("kind", "version"), SERVED)
def test_an_expired_server_certificate_is_named_with_its_day(
    authority: Authority, tmp_path: Path, kind: str, version: Version
) -> None:
    """etcd itself reads its certificate anew for each connection, so a healthy one is let expire."""
    good, key = authority.issue("good", "IP:127.0.0.1")
    old, old_key = authority.issue("old", "IP:127.0.0.1", days=-1)
    cert = tmp_path / "server.pem"
    private = tmp_path / "server.key"
    shutil.copy(good, cert)
    shutil.copy(key, private)
    files = Tls(ca=authority.ca, members=((cert, private),), client=(good, key))
    with Cluster(version, folder=tmp_path / "etcd", v2=kind == "v2", tls=files) as cluster:
        with opened(kind, cluster.endpoints, cacert=str(authority.ca)) as store:
            store.get("/a")
        shutil.copy(old, cert)
        shutil.copy(old_key, private)
        with opened(kind, cluster.endpoints, cacert=str(authority.ca)) as store:
            with pytest.raises(RegistryUnreachable) as caught:
                store.get("/a")
        day = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 86400))
        assert f"its certificate expired {day}" in caught.value.details[0]


@on_every_store
def test_certificates_are_read_again_when_the_files_change(
    authority: Authority, secured: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What is used after the change is the new one: the old is overwritten by one that etcd refuses, and back."""
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.05)
    stranger = Authority(tmp_path / "stranger").issue("stranger")
    good = authority.folder / "client.pem", authority.folder / "client.key"
    cert, key = tmp_path / "cert.pem", tmp_path / "cert.key"

    def install(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, (cert, key), strict=True):
            fresh = target.with_suffix(".new")
            shutil.copy(source, fresh)
            fresh.rename(target)

    def served() -> bool:
        try:
            store.get("/rotation")
        except FlanctlError:
            return False
        return True

    install(good)
    with opened(
        kind, secured.endpoints, timeout=2.0, cacert=str(authority.ca), cert=str(cert), key=str(key)
    ) as store:
        assert served()
        install(stranger)
        until(lambda: not served(), what="the new, bad certificate is shown")
        install(good)
        until(served, what="the good one is shown again")
        cert.write_bytes(b"half a fi")
        time_is_up = time.monotonic() + 0.3
        while time.monotonic() < time_is_up:
            assert served(), "a rotation half done leaves the last good certificate in use"


@pytest.mark.parametrize(("kind", "version"), SERVED_V3)
def test_a_role_for_the_prefix_is_all_a_host_needs(tmp_path: Path, kind: str, version: Version) -> None:
    """The commands of docs/registry.md, over plaintext; rights of v3 are by key ranges."""
    with Cluster(version, folder=tmp_path / "etcd") as cluster:
        for command in (
            "user add root:secret", "user grant-role root root",
            "role add flannel", "role grant-permission flannel --prefix=true readwrite /jxdd/network/",
            "user add flanctl:host", "user grant-role flanctl flannel", "auth enable",
        ):  # fmt: skip
            cluster.etcdctl(*command.split())
        with opened(kind, cluster.endpoints, user="flanctl", password="host") as store:
            entry = store.create("/jxdd/network/subnets/172.17.1.0-24", b"v", ttl=60)
            assert store.list("/jxdd/network/subnets/").entries[0].key == entry.key
            assert store.with_ttl([entry])[0].ttl
            with store.watch("/jxdd/network/subnets/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)
            entry = store.refresh(entry, ttl=60)
            assert store.delete(entry.key, expected=entry.revision)
            with pytest.raises(NotPermitted, match='user "flanctl" may not read /other'):
                store.get("/other")


@pytest.mark.parametrize(("kind", "version"), SERVED_V3)
def test_logins_switched_on_and_tokens_that_run_out_cost_a_login_each(
    tmp_path: Path, kind: str, version: Version
) -> None:
    """The agent was given its user before the cluster wanted one."""
    with Cluster(version, folder=tmp_path / "etcd", extra=["--auth-token-ttl=1"]) as cluster:
        with opened(kind, cluster.endpoints, user="root", password="secret") as store:
            entry = store.create("/a/b", b"1", ttl=None)
            for command in ("user add root:secret", "user grant-role root root", "auth enable"):
                cluster.etcdctl(*command.split())
            assert store.get("/a/b") == entry
            token = store.token  # type: ignore[attr-defined]
            assert token
            begin = time.monotonic()
            until(
                lambda: time.monotonic() - begin > 3.5
            )  # nothing tells of a token that has ended but its use
            entry = store.replace("/a/b", b"2", ttl=None, expected=entry.revision)
            assert store.token != token  # type: ignore[attr-defined]
            with store.watch("/a/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)


@pytest.mark.needs("etcd34")
def test_v2_logs_in_with_each_request(tmp_path: Path) -> None:
    import json
    import urllib.request

    with Cluster("3.4", folder=tmp_path / "etcd", v2=True) as cluster:

        def put(path: str, body: object) -> None:
            request = urllib.request.Request(
                f"{cluster.endpoints[0]}/v2/auth/{path}", json.dumps(body).encode(), method="PUT"
            )
            request.add_header("Content-Type", "application/json")
            urllib.request.urlopen(request, timeout=5).close()

        put("users/root", {"user": "root", "password": "secret"})
        rights = {"kv": {"read": ["/jxdd/network/*"], "write": ["/jxdd/network/*"]}}
        put("roles/flannel", {"role": "flannel", "permissions": rights})
        put("users/flanctl", {"user": "flanctl", "password": "host", "roles": ["flannel"]})
        put("enable", {})
        request = urllib.request.Request(
            f"{cluster.endpoints[0]}/v2/auth/roles/guest",
            json.dumps({"role": "guest", "revoke": {"kv": {"read": ["/*"], "write": ["/*"]}}}).encode(),
            method="PUT",
            headers={"Authorization": "Basic cm9vdDpzZWNyZXQ=", "Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=5).close()
        with opened("v2", cluster.endpoints, user="flanctl", password="host") as store:
            entry = store.create("/jxdd/network/subnets/172.17.1.0-24", b"v", ttl=60)
            assert store.list("/jxdd/network/subnets/").entries[0].key == entry.key
            with store.watch("/jxdd/network/subnets/", after=entry.revision - 1) as watch:
                assert isinstance(next(watch), Put)
            with pytest.raises(NotPermitted):
                store.get("/other")
        for login in ({"user": "flanctl", "password": "wr0ng"}, {}):
            with opened("v2", cluster.endpoints, **login) as store, pytest.raises(NotPermitted) as caught:
                store.get("/jxdd/network/config")
            assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize("secured", VERSIONS, indirect=True)
def test_commands_tell_what_is_wrong_and_never_the_password(authority: Authority, secured: Cluster) -> None:
    endpoints = ",".join(secured.endpoints)
    files = [word for name, path in shown(authority).items() for word in (f"--{name}", path)]
    fine = flanctl("net", "init", "--network", "10.9.0.0/16", "--endpoints", endpoints, *files)
    assert fine.code == 0, fine.err
    refused = flanctl("net", "get", "--endpoints", endpoints, "--cacert", authority.ca)
    assert (refused.code, "refused our client certificate" in refused.err) == (7, True)
    told = flanctl(
        "net", "get", "--endpoints", endpoints, *files, "--user", "root:hunter2", "--debug", "-w", "json"
    )
    assert "a password on the command line is seen by everyone" in told.err
    assert "hunter2" not in told.out + told.err

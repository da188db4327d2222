"""CAs of the system and of --cacert, host names through the system's resolver, IPv6."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.deadline import until
from tests.support.etcd import _free_ports
from tests.support.frozen import mounted, ok, run

pytestmark = [pytest.mark.needs("frozen", "etcd34", "openssl"), pytest.mark.timeout(90)]

NAME = "registry.flanctl.example"
WAYS = ["gateway", "grpc"]


def _openssl(folder, *words):
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """ca.pem, and what it has signed: server.pem for NAME, 127.0.0.1 and ::1; client.pem."""
    folder = tmp_path_factory.mktemp("pki")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _openssl(
        folder,
        "req",
        "-x509",
        *curve,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=flanctl test ca",
        *usage,
    )
    (folder / "ext").write_text(
        f"subjectAltName=IP:127.0.0.1,IP:::1,DNS:{NAME}\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    for name in ("server", "client"):
        _openssl(
            folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext", "-days", "9"]
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    return folder


class Server:
    """An etcd on 127.0.0.1 and ::1, at one port; `tls` are its options for it."""

    def __init__(self, folder, *options, scheme="http"):
        self.port, peer = _free_ports(2)
        urls = f"{scheme}://127.0.0.1:{self.port},{scheme}://[::1]:{self.port}"
        self.scheme = scheme
        self._log = folder / "etcd.log"
        command = [
            "etcd",
            f"--data-dir={folder}/data",
            f"--listen-client-urls={urls}",
            f"--advertise-client-urls={urls}",
        ]
        command += [
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            "--logger=zap",
            "--log-outputs=stderr",
            *options,
        ]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def at(self, host):
        return f"{self.scheme}://{host}:{self.port}"

    def ready(self, **env):
        def answers():
            assert self.process.poll() is None, self._log.read_text()
            words = ["net", "init", "--network", "172.17.0.0/16"]
            return run(*words, env={"FLANCTL_ENDPOINTS": self.at("127.0.0.1"), **env}).code == 0

        until(answers, seconds=40, what=f"etcd answers; {self._log}")
        return self

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    servers = {
        way: Server(tmp_path_factory.mktemp(way), *(["--enable-grpc-gateway=false"] if way == "grpc" else []))
        for way in WAYS
    }
    yield {way: server.ready() for way, server in servers.items()}
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory, pki):
    certificate = [f"--cert-file={pki}/server.pem", f"--key-file={pki}/server.key"]
    servers = {
        way: Server(
            tmp_path_factory.mktemp(f"{way}-tls"),
            *certificate,
            *(["--enable-grpc-gateway=false"] if way == "grpc" else []),
            scheme="https",
        )
        for way in WAYS
    }
    yield {way: server.ready(FLANCTL_CACERT=str(pki / "ca.pem")) for way, server in servers.items()}
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, pki):
    """An etcd that asks clients for a certificate. Its own gateway has none to show it, so this is for gRPC."""
    options = [f"--cert-file={pki}/server.pem", f"--key-file={pki}/server.key", "--client-cert-auth"]
    server = Server(
        tmp_path_factory.mktemp("mutual"), *options, f"--trusted-ca-file={pki}/ca.pem", scheme="https"
    )
    files = {"CACERT": "ca.pem", "CERT": "client.pem", "KEY": "client.key"}
    environment = {f"FLANCTL_{name}": str(pki / file) for name, file in files.items()}
    yield server.ready(**environment), environment
    server.close()


def network(endpoint, **how):
    env = {"FLANCTL_ENDPOINTS": endpoint, **how.pop("env", {})}
    return json.loads(ok("net", "get", "-w", "json", env=env, **how))["config"]["Network"]


def refused(endpoint, **how):
    answer = run("net", "get", env={"FLANCTL_ENDPOINTS": endpoint, **how.pop("env", {})}, **how)
    assert (answer.code != 0, answer.out) == (True, ""), answer
    return answer.err


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_cacert(way, host, tls, pki):
    """localhost is not among the certificate's names: it is refused by name."""
    env = {"FLANCTL_CACERT": str(pki / "ca.pem")}
    if host == "localhost":
        assert "certificate" in refused(tls[way].at(host), env=env).lower()
    else:
        assert network(tls[way].at(host), env=env) == "172.17.0.0/16"


@pytest.mark.parametrize("way", WAYS)
def test_a_ca_that_nobody_knows_is_refused(way, tls):
    assert "certificate" in refused(tls[way].at("127.0.0.1")).lower()


def test_a_client_certificate(mutual):
    server, env = mutual
    assert network(server.at("127.0.0.1"), env=env) == "172.17.0.0/16"


# Where distributions keep the CAs of the system, in one file.
BUNDLES = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]


@pytest.mark.needs("root")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_systems_cas(way, bundle, tls, pki):
    """A host whose only CAs stand in this file: an empty /etc/ssl and /etc/pki, then the file."""
    # /etc is a copy, so that no folder stays in the tester's.
    script = f"""
    mount -t tmpfs tmpfs /run
    mkdir /run/etc
    cp -a /etc/. /run/etc
    rm -r /run/etc/ssl
    mkdir -p /run{bundle.rpartition("/")[0]}
    cp {pki}/ca.pem /run{bundle}
    mount --bind /run/etc /etc
    exec "$@"
    """
    assert network(tls[way].at("127.0.0.1"), prefix=mounted(script)) == "172.17.0.0/16"


@pytest.mark.parametrize("way", WAYS)
def test_ssl_cert_file(way, tls, pki):
    assert network(tls[way].at("127.0.0.1"), env={"SSL_CERT_FILE": str(pki / "ca.pem")}) == "172.17.0.0/16"


@pytest.mark.parametrize("way", WAYS)
def test_ipv6(way, plain):
    assert network(plain[way].at("[::1]")) == "172.17.0.0/16"


def hosts(folder, text):
    """A mount namespace in which /etc/hosts is `text` and nsswitch asks it alone."""
    (folder / "hosts").write_text(text)
    (folder / "nsswitch").write_text("hosts: files\n")
    return mounted(
        f'mount --bind {folder}/hosts /etc/hosts; mount --bind {folder}/nsswitch /etc/nsswitch.conf; exec "$@"'
    )


@pytest.mark.needs("root")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_host_names_by_the_systems_resolver(way, address, plain, tmp_path):
    prefix = hosts(tmp_path, f"{address} {NAME}\n")
    assert network(plain[way].at(NAME), prefix=prefix) == "172.17.0.0/16"


@pytest.mark.needs("root")
@pytest.mark.parametrize("way", WAYS)
def test_host_names_and_certificates_go_together(way, tls, pki, tmp_path):
    prefix = hosts(tmp_path, f"127.0.0.1 {NAME} other.example\n")
    env = {"FLANCTL_CACERT": str(pki / "ca.pem")}
    assert network(tls[way].at(NAME), prefix=prefix, env=env) == "172.17.0.0/16"
    assert "certificate" in refused(tls[way].at("other.example"), prefix=prefix, env=env).lower()


@pytest.mark.needs("root")
def test_a_name_nobody_knows_is_told(plain, tmp_path):
    said = refused(plain["gateway"].at("absent.example"), prefix=hosts(tmp_path, "127.0.0.1 localhost\n"))
    assert "absent.example" in said

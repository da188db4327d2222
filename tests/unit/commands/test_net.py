"""`flanctl net`: what is written, what is refused, and that nothing changes when it is."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading

import pytest

from tests.support.cli import flanctl


@pytest.fixture
def registry(tmp_path):
    return {"FLANCTL_ENDPOINTS": f"sqlite:{tmp_path / 'registry.db'}"}


def init(registry, *words, **options):
    return flanctl("net", "init", *words, env=registry, **options)


def test_init_writes_the_notes_bytes_and_says_what_and_where(registry):
    answer = init(registry, "--network", "172.17.0.0/16")
    assert answer.code == 0
    assert answer.out == (
        "KEY      /jxdd/network/config\n"
        'VALUE    {"Network":"172.17.0.0/16"}\n'
        "NETWORK  172.17.0.0/16\n"
        "SUBNETS  /24 from 172.17.1.0 to 172.17.255.0, 255 in all\n"
        "BACKEND  udp\n"
    )
    assert answer.err.startswith("wrote /jxdd/network/config at revision ")
    assert flanctl("net", "get", env=registry).out == '{"Network":"172.17.0.0/16"}\n'


def test_simple_and_json_keep_their_form(registry):
    simple = init(registry, "--network", "10.5.0.0/16", "-w", "simple")
    assert simple.out == '/jxdd/network/config\t{"Network":"10.5.0.0/16"}\n'
    answer = json.loads(init(registry, "--network", "10.5.0.0/16", "-w", "json").out)
    assert answer == {
        "schema": 1,
        "key": "/jxdd/network/config",
        "wrote": False,
        "revision": answer["revision"],
        "config": {"Network": "10.5.0.0/16"},
        "effective": {
            "Network": "10.5.0.0/16",
            "SubnetLen": 24,
            "SubnetMin": "10.5.1.0",
            "SubnetMax": "10.5.255.0",
            "Backend": {"Type": "udp", "Port": 8285},
        },
        "capacity": 255,
    }
    effective = flanctl("net", "get", "--effective", "-w", "simple", env=registry)
    assert effective.out == "10.5.0.0/16\t24\t10.5.1.0\t10.5.255.0\tudp\t255\n"


def test_options_file_and_standard_input_write_the_same_network(registry, tmp_path):
    file = tmp_path / "net.json"
    file.write_text('{"Network": "10.5.0.0/16", "SubnetLen": 25, "Backend": {"Type": "vxlan", "VNI": 7}}\n')
    assert init(registry, file).code == 0
    words = ("--network", "10.5.0.0/16", "--subnet-len", "25", "--backend", "vxlan,VNI=7")
    again = init(registry, *words)
    assert (again.code, "holds this already" in again.err) == (0, True)
    again = init(registry, "-", stdin=file.read_bytes())
    assert (again.code, "holds this already" in again.err) == (0, True)
    assert flanctl("net", "get", env=registry).out == file.read_text()


def test_a_different_config_is_shown_and_refused_without_force(registry):
    init(registry, "--network", "10.5.0.0/16")
    refused = init(registry, "--network", "10.6.0.0/16")
    assert refused.code == 5
    assert refused.out == ""
    assert '-  "Network": "10.5.0.0/16"' in refused.err
    assert '+  "Network": "10.6.0.0/16"' in refused.err
    assert flanctl("net", "get", env=registry).out == '{"Network":"10.5.0.0/16"}\n'
    assert init(registry, "--network", "10.6.0.0/16", "--force").code == 0
    assert flanctl("net", "get", env=registry).out == '{"Network":"10.6.0.0/16"}\n'


def test_a_change_that_orphans_live_leases_says_which(registry, tmp_path):
    from flanctl.registry.stores.sqlite import SqliteStore

    init(registry, "--network", "10.5.0.0/16")
    store = SqliteStore(str(tmp_path / "registry.db"))
    store.create("/jxdd/network/subnets/10.5.7.0-24", b'{"PublicIP":"192.168.6.2"}', ttl=60)
    store.close()
    refused = init(registry, "--network", "10.6.0.0/16")
    assert refused.code == 5
    assert "lease 10.5.7.0/24 of 192.168.6.2 does not fit the new config" in refused.err


def test_a_dry_run_writes_nothing(registry):
    init(registry, "--network", "10.9.0.0/16", "--prefix", "/other")
    answer = init(registry, "--network", "10.5.0.0/16", "--dry-run")
    assert (answer.code, "would write" in answer.err) == (0, True)
    missing = flanctl("net", "get", env=registry)
    assert missing.code == 4
    assert "no network config at /jxdd/network/config" in missing.err
    assert "try: flanctl net init" in missing.err


def test_a_network_below_flannels_own_prefix_is_pointed_at_where_nobody_named_one(registry):
    assert init(registry, "--network", "10.5.0.0/16", "--prefix", "/coreos.com/network").code == 0
    for words in (["net", "get"], ["subnets", "ls"]):
        answer = flanctl(*words, env=registry)
        assert (answer.code, answer.out) == (4, "")
        said = "no network config at /jxdd/network/config; there is one at /coreos.com/network/config, flannel's default"
        assert answer.err.endswith(f"{said}\ntry: --prefix /coreos.com/network\n")
    named = flanctl("net", "get", "--prefix", "/jxdd/network", env=registry)
    assert "coreos" not in named.err


def test_of_two_operators_at_once_one_is_refused_or_both_wrote_in_turn(registry):
    """Both create: exactly one config stands, and the other operator was told."""
    answers = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(init(registry, "--network", f"10.{n}.0.0/16")))
        for n in (5, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.code for answer in answers) == [0, 5]


BAD = {
    "empty": (b"", "empty"),
    "not json": (b'{"Network":\n  172}', "line 2, column 3"),
    "trailing": (b'{"Network":"10.0.0.0/8"} x', "column 26"),
    "bom": (b'\xef\xbb\xbf{"Network":"10.0.0.0/8"}', "byte order mark"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "wrong type": (b'{"Network":17}', "Network"),
    "missing": (b'{"SubnetLen":24}', "Network"),
    "too small": (b'{"Network":"10.0.0.0/29"}', "too small"),
    "ipv6": (b'{"Network":"fc00::/48"}', "Network"),
    "reversed": (b'{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.3.0"}', "SubnetM"),
    "outside": (b'{"Network":"10.0.0.0/16","SubnetMin":"10.9.0.0"}', "SubnetMin"),
    "unaligned": (b'{"Network":"10.0.0.0/16","SubnetMin":"10.0.0.7"}', "SubnetMin"),
    "unknown backend": (b'{"Network":"10.0.0.0/16","Backend":{"Type":"carrier-pigeon"}}', "carrier-pigeon"),
    "unknown option": (b'{"Network":"10.0.0.0/16","Backend":{"Type":"udp","Prot":1}}', "Prot"),
    "duplicate": (b'{"Network":"10.0.0.0/16","Network":"10.1.0.0/16"}', "twice"),
    "deep": (b"[" * 20_000, "line 1"),
    "huge": (b" " * 10_000_000, "larger"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_refused_with_its_place_and_changes_nothing(registry, tmp_path, case):
    content, says = BAD[case]
    file = tmp_path / "net.json"
    file.write_bytes(content)
    for words in (["net", "init", file], ["net", "validate", file]):
        answer = flanctl(*words, env=registry)
        assert (answer.code, answer.out) == (6, ""), answer
        assert says in answer.err, answer.err
        assert str(file) in answer.err
        assert len(answer.err) < 2000
    assert list(tmp_path.iterdir()) == [file]


def test_who_only_asks_makes_no_registry(registry, tmp_path):
    """A slip of the pen in a path is an error, not a new empty registry."""
    for words in (["net", "get"], ["net", "validate"], ["subnets", "ls"], ["subnets", "get", "10.0.0.1"]):
        answer = flanctl(*words, env=registry)
        assert (answer.code, "there is no registry" in answer.err) == (4, True), answer
    assert init(registry, "--network", "10.0.0.0/16", "--dry-run").code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda path: None, 4, "no such file"),
        (lambda path: path.mkdir(), 6, "is a directory"),
    ],
)
def test_a_file_that_is_none(registry, tmp_path, make, code, says):
    path = tmp_path / "net.json"
    make(path)
    answer = init(registry, path)
    assert (answer.code, says in answer.err) == (code, True)


@pytest.mark.needs("root")
def test_a_file_without_the_right_to_read(registry, tmp_path):
    path = tmp_path / "net.json"
    path.write_text("{}")
    path.chmod(0)
    os.chmod(tmp_path, 0o755)
    answer = init(
        registry,
        path,
        prefix=[
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-all",
            "--reuid=65534",
            "--clear-groups",
        ],
    )
    if "setpriv" in answer.err or "No module" in answer.err:
        pytest.skip(f"cannot drop rights here: {answer.err.strip()}")
    assert (answer.code, "no right to read" in answer.err) == (7, True), answer


def test_unknown_keys_are_warned_of_and_kept(registry):
    answer = init(registry, "-", stdin=b'{"Network":"10.0.0.0/16","Subnetlen2":24}')
    assert answer.code == 0
    assert "warning: standard input line 1, column 26" in answer.err
    assert "Subnetlen2" in flanctl("net", "get", env=registry).out


def test_a_network_that_covers_this_hosts_own_address_is_warned_of(registry):
    init(registry, "--network", "10.9.0.0/16", "--prefix", "/other")
    answer = init(registry, "--network", "0.0.0.0/1", "--dry-run")
    own = {line for line in answer.err.splitlines() if "covers this host's own address" in line}
    from flanctl.agent.kernel.addresses import local_addresses

    expected = [
        address for address in local_addresses() if not address.is_loopback and int(address) < 1 << 31
    ]
    assert len(own) == len(expected)


def test_validate_tells_what_it_means_in_both_dialects():
    small = b'{"Network":"10.0.0.0/23"}'
    new = json.loads(flanctl("net", "validate", "-", "-w", "json", stdin=small).out)
    old = json.loads(flanctl("net", "validate", "-", "-w", "json", "--dialect", "0.7", stdin=small).out)
    assert (new["effective"]["SubnetLen"], old["effective"]["SubnetLen"]) == (25, 24)
    assert new["valid"] is True


def test_validate_without_a_file_checks_what_is_stored_strictly(registry, tmp_path):
    from flanctl.registry.stores.sqlite import SqliteStore

    store = SqliteStore(str(tmp_path / "registry.db"))
    store.create(
        "/jxdd/network/config", b'{"Network":"10.0.0.0/16","Backend":{"Type":"udp","Prot":1}}', ttl=None
    )
    store.close()
    assert flanctl("net", "get", "--effective", env=registry).code == 0
    answer = flanctl("net", "validate", env=registry)
    assert (answer.code, "Prot" in answer.err) == (6, True)


class Server:
    """A TCP listener that answers each connection with the same bytes, then closes it."""

    def __init__(self, answer):
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return
            with channel:
                channel.settimeout(2)
                try:
                    channel.recv(65536)
                    channel.sendall(self._answer)
                except OSError:
                    continue

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def server():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1].port

    yield start
    for one in servers:
        one.close()


def test_nothing_listens():
    answer = flanctl("subnets", "ls", "--endpoints", "http://127.0.0.1:1", "--timeout", "2")
    assert (answer.code, answer.out) == (3, "")
    assert "connection refused" in answer.err.lower()
    assert "http://127.0.0.1:1" in answer.err
    assert "(endpoints from --endpoints)" in answer.err


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\nhello\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{",
        b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"kvs":"no"}',
    ],
)
def test_something_that_is_not_etcd_is_named(server, reply):
    port = server(reply)
    answer = flanctl("subnets", "ls", "--endpoints", f"http://127.0.0.1:{port}", "--timeout", "2")
    assert answer.code == 3, answer
    assert f"http://127.0.0.1:{port}" in answer.err
    assert len(answer.err) < 2000


def test_a_sqlite_file_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    other = sqlite3.connect(path)
    other.execute("create table t (x)")
    other.commit()
    other.close()
    before = path.read_bytes()
    answer = flanctl("net", "init", "--network", "10.0.0.0/16", "--endpoints", f"sqlite:{path}")
    assert (answer.code, str(path) in answer.err) == (6, True)
    assert path.read_bytes() == before
    path.write_text("this is no database at all, but it is long enough to be looked at as one" * 20)
    answer = flanctl("subnets", "ls", "--endpoints", f"sqlite:{path}")
    assert (answer.code, str(path) in answer.err) == (6, True)


def test_a_sqlite_file_in_a_directory_that_is_not_there(tmp_path):
    answer = flanctl("subnets", "ls", "--endpoints", f"sqlite:{tmp_path}/no/such/r.db")
    assert answer.code in {4, 7}
    assert "no/such" in answer.err


@pytest.mark.parametrize("prefix", ["/a//b/", "//a/b"])
def test_doubled_slashes_in_a_prefix_are_one_as_in_flannel(registry, prefix):
    answer = init(registry, "--network", "10.0.0.0/16", "--prefix", prefix, "-w", "json")
    assert json.loads(answer.out)["key"] == "/a/b/config"

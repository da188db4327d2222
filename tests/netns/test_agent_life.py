"""The agent as a process on a host: starts, refusals, repairs, restarts. The kernel, the registry and systemd are real.

h1 ─ 192.168.66.11 ─┬─ under0 .1          one registry file, one folder per agent
h2 ─ 192.168.66.12 ─┘
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.agents import FLANCTL, RunningAgent, environment, flanctl
from tests.support.deadline import until
from tests.support.namespaces import inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.demo.hosts import Container, Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables")
TABLES = ("nat", "filter", "raw", "mangle")
RULES = json.loads(Path("tests/vectors/iptables-rules.json").read_text())["v0.28.9"]
NAT = RULES["--ip-masq"]["nat"]
FILTER = RULES["--iptables-forward-rules (default true)"]["filter"]
CONFIG = "/jxdd/network/config"
SUBNETS = "/jxdd/network/subnets/"
MTU = 1472


@dataclass
class Place:
    """One host, one registry, and what an agent there would be told."""

    host: Host
    folder: Path

    @property
    def endpoints(self) -> str:
        return f"sqlite:{self.folder / 'registry.db'}"

    def store(self) -> SqliteStore:
        return SqliteStore(str(self.folder / "registry.db"))

    def start(self, *options: str, folder: str = "agent", **more: str) -> RunningAgent:
        return RunningAgent.start(self.host, self.folder / folder, self.endpoints, *options, **more)

    def attempt(self, *options: str, folder: str = "agent", prefix: tuple[str, ...] = ()) -> tuple[int, str]:
        """An agent that should end by itself: exit code and stderr, which is never a traceback."""
        own = self.folder / folder
        own.mkdir(exist_ok=True)
        done = self.host.run(
            [
                *prefix, *FLANCTL, "agent", "--subnet-file", f"{own}/subnet.env", "--state-dir", f"{own}/state",
                "--run-dir", f"{own}/run", *options,
            ],
            env=environment(self.endpoints),
            check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""
        return done.returncode, done.stderr

    def leases(self) -> dict[str, bytes]:
        with closing(self.store()) as store:
            return {entry.key.removeprefix(SUBNETS): entry.value for entry in store.list(SUBNETS).entries}

    def machine(self) -> tuple[str, ...]:
        """What an agent may change on its host, as ip(8) and iptables tell it, without numbers that only count."""
        links = json.loads(self.host.run(["ip", "-d", "-j", "address", "show"]).stdout)
        shown = [
            (
                link["ifname"], link["mtu"], "UP" in link["flags"], link.get("ifalias"),
                [(a["local"], a["prefixlen"]) for a in link["addr_info"] if a["family"] == "inet"],
            )
            for link in links
        ]  # fmt: skip
        routes = self.host.run(["ip", "route", "show", "table", "main"]).stdout.replace(" linkdown", "")
        return (
            "\n".join(map(str, sorted(shown))),
            "\n".join(sorted(line.strip() for line in routes.splitlines())),
            *(f"{table}: {listing(self.host, table)}" for table in TABLES),
        )

    def files(self) -> list[str]:
        """Everything below the agents' folders but the run directory, whose lock file may stay."""
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and "registry.db" not in path.name and path.parent.name != "run"
        )

    def everything(self) -> object:
        return self.machine(), self.files(), self.leases()


def listing(host: Host, table: str) -> list[str]:
    done = host.run(["iptables", "-t", table, "-S"])
    return [line for line in done.stdout.splitlines() if not line.startswith("-P")]


def configured(folder: Path, text: bytes = b'{"Network":"172.17.0.0/16"}') -> Path:
    with closing(SqliteStore(str(folder / "registry.db"))) as store:
        store.create(CONFIG, text, ttl=None)
    return folder


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("life") as made:
        made.add_host()
        yield made
    assert made.leftovers() == ()


@pytest.fixture
def place(lab: Lab, tmp_path: Path) -> Iterator[Place]:
    """The same host for every test, put back afterwards; a registry and folders of its own."""
    before = {process.pid for process in lab.processes}
    built = Place(lab.hosts[0], configured(tmp_path))
    clean = built.machine()
    yield built
    for process in lab.processes:
        if process.pid not in before and process.poll() is None:
            process.kill()
            process.wait()
    if "flannel0-rx" in built.host.run(["ip", "-o", "link"]).stdout:
        # The kernel path outlives its agent.
        flanctl(built.host, "", "cleanup", "--yes", "--run-dir", f"{built.folder}/agent/run")
    if "flannel0" in built.host.run(["ip", "-o", "link"]).stdout:
        built.host.run(["ip", "link", "delete", "flannel0"])
    for table in TABLES:
        built.host.run(["iptables", "-t", table, "-F"])
        built.host.run(["iptables", "-t", table, "-X"])
    assert built.machine() == clean


# ---- start ----------------------------------------------------------------------------------------------------------


def test_subnet_env_is_flannels_four_lines_to_the_byte(place: Place) -> None:
    agent = place.start("--iface", "eth0", "--ip-masq").wait()
    base = agent.subnet.network_address
    assert (
        agent.subnet_file.read_bytes()
        == (
            f"FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET={base + 1}/24\nFLANNEL_MTU={MTU}\nFLANNEL_IPMASQ=true\n"
        ).encode()
    )
    assert agent.subnet_file.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(agent.folder)) == ["agent.log", "run", "state", "subnet.env"]


def test_device_address_and_route_are_flannels(place: Place) -> None:
    agent = place.start().wait()
    links, routes, *_ = place.machine()
    assert f"('flannel0', {MTU}, True, 'flanctl', [('{agent.subnet.network_address}', 32)])" in links
    assert "172.17.0.0/16 dev flannel0 proto 102 scope link" in routes


def test_the_0_7_dialects_device_has_the_whole_networks_prefix(place: Place) -> None:
    agent = place.start("--dialect", "0.7").wait()
    links, routes, *_ = place.machine()
    assert f"[('{agent.subnet.network_address}', 16)]" in links
    assert "172.17.0.0/16 dev flannel0 proto kernel" in routes
    assert list(place.leases().values()) == [b'{"PublicIP":"192.168.66.11"}']


def test_the_rules_are_flannels_to_the_letter(place: Place) -> None:
    agent = place.start("--ip-masq", "--docker-accept=off").wait()
    subnet = str(agent.subnet)
    assert listing(place.host, "nat") == [line.replace("172.17.81.0/24", subnet) for line in NAT]
    assert listing(place.host, "filter") == FILTER


def test_rules_that_are_not_wanted_are_not_made_and_old_ones_go(place: Place) -> None:
    agent = place.start("--ip-masq").wait()
    assert agent.terminate() == 0
    place.start("--ip-masq=false", "--iptables-forward-rules=false", "--docker-accept=off").wait()
    assert listing(place.host, "nat") == []
    assert listing(place.host, "filter") == []


def test_systemd_hears_READY_once_subnet_env_is_there_and_STOPPING_at_the_end(place: Place) -> None:
    path = place.folder / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as channel:
        channel.bind(str(path))
        channel.settimeout(20)
        agent = place.start(NOTIFY_SOCKET=str(path))
        while (said := channel.recv(4096).decode()).startswith("STATUS="):
            pass  # what it does until then
        assert said.startswith("READY=1\nSTATUS=network=172.17.0.0/16 subnet=")
        assert agent.subnet_file.exists()
        agent.wait_ready()
        assert agent.terminate() == 0
        assert channel.recv(4096).decode().startswith("STOPPING=1")


def test_without_a_config_it_waits_and_with_one_it_uses_its_network_and_port(place: Place) -> None:
    with closing(place.store()) as store:
        store.delete(CONFIG)
        agent = place.start()
        agent.wait_log("waiting: .*config")
        assert place.leases() == {}
        assert not agent.subnet_file.exists()
        assert agent.terminate() == 0
        store.create(CONFIG, b'{"Network":"10.77.0.0/16","Backend":{"Type":"udp","Port":7777}}', ttl=None)
    assert agent.again().wait_ready()["network"] == "10.77.0.0/16"
    holders = place.host.run(["ss", "-Hlun", "sport", "=", ":7777"], check=False).stdout
    assert "192.168.66.11:7777" in holders


# ---- which interface ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "interface eth0 192.168.66.11 mtu=1500, of the default route"),
        (("--iface", "eth0"), "interface eth0 192.168.66.11 mtu=1500, chosen by --iface eth0"),
        (("--iface", "192.168.66.11"), "chosen by --iface 192.168.66.11"),
        (("--iface", "eth7", "--iface", "eth0"), "chosen by --iface eth0"),
        (("--iface-regex", r"192\.168\.66\."), "chosen by --iface-regex"),
        (("--iface-regex", "^eth"), "chosen by --iface-regex ^eth"),
        (("--iface-can-reach", "192.168.66.1"), "chosen by --iface-can-reach 192.168.66.1"),
        (("--public-ip", "192.168.66.11"), "which has the address given by --public-ip 192.168.66.11"),
        (("--public-ip", "203.0.113.5"), "warn  public IP 203.0.113.5 is not an address of this host"),
    ],
)
def test_a_check_says_which_interface_and_why_and_changes_and_holds_nothing(
    place: Place, options: tuple[str, ...], said: str
) -> None:
    before = place.everything()
    code, text = place.attempt("--check", *options)
    assert (code, said in text, "nothing stands in the way" in text) == (0, True, True), text
    assert place.everything() == before
    assert not (place.folder / "agent" / "run").exists()


def test_a_public_address_that_is_not_local_is_announced_all_the_same(place: Place) -> None:
    agent = place.start("--public-ip", "203.0.113.5").wait()
    assert agent.ready["public-ip"] == "203.0.113.5"
    assert b'"203.0.113.5"' in next(iter(place.leases().values()))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--iface", "eth7"), 4, "--iface eth7: there is no interface eth7"),
        (("--iface", "192.168.66.99"), 4, "no interface has the address 192.168.66.99"),
        (("--iface", "bare0"), 4, "interface bare0 has no usable IPv4 address"),
        (("--iface", "down0"), 1, "interface down0 is down"),
        (("--iface-regex", "["), 6, "is not a regular expression"),
        (("--iface-regex", "^wlan"), 4, "no interface has an address or a name that matches"),
        (("--iface-can-reach", "8.8.8"), 6, "is not an IPv4 address"),
        (("--public-ip", "here"), 6, "is not an IPv4 address"),
    ],
)
def test_an_interface_that_cannot_be_used_is_a_clear_refusal_with_the_others_listed(
    place: Place, options: tuple[str, ...], code: int, said: str
) -> None:
    place.host.ip_batch(
        "link add bare0 type bridge", "link set bare0 up",
        "link add down0 type bridge", "address add 10.1.2.3/24 dev down0",
    )  # fmt: skip
    try:
        before = place.everything()
        ended, text = place.attempt(*options)
        assert ended == code, text
        assert said in text
        if code in {1, 4}:
            assert "eth0            192.168.66.11" in text
        assert "try: " in text or code == 6
        assert place.everything() == before
    finally:
        place.host.ip_batch("link delete bare0", "link delete down0")


# ---- refusals before anything is changed ----------------------------------------------------------------------------


def refused(place: Place, code: int, *words: str, options: tuple[str, ...] = (), **more: object) -> None:
    """An agent that cannot start says all `words`, ends with `code`, and leaves everything as it was."""
    before = place.everything()
    ended, text = place.attempt(*options, **more)  # type: ignore[arg-type]
    assert ended == code, text
    for word in words:
        assert word in text
    assert len([line for line in text.splitlines() if line.startswith("flanctl agent: ")]) == 1
    assert place.everything() == before


def settled(place: Place) -> RunningAgent:
    """An agent that has written all its files; known.json is the last, after READY."""
    agent = place.start().wait()
    until(lambda: any(place.folder.rglob("known.json")))
    return agent


def test_a_second_agent_in_the_same_directories_is_refused_by_pid(place: Place) -> None:
    agent = settled(place)
    refused(place, 5, "another flanctl agent runs on this host", f"pid {agent.pid}")
    assert agent.terminate() == 0


def test_a_second_agent_with_directories_of_its_own_is_refused_by_pid(place: Place) -> None:
    agent = settled(place)
    refused(place, 5, "flannel0 is held by ", f"pid {agent.pid}", folder="second")
    refused(place, 5, "another flanctl agent runs on this host", f"pid {agent.pid}", options=("--check",))
    assert agent.terminate() == 0


def test_a_foreign_process_on_the_port_is_named(place: Place) -> None:
    with inside(place.host.path):
        channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(channel):
        channel.bind(("0.0.0.0", 8285))
        refused(place, 5, "UDP 192.168.66.11:8285 is in use by ", f"pid {os.getpid()}")


@pytest.mark.parametrize(
    "make",
    [
        "tuntap add flannel0 mode tun",
        "tuntap add flannel0 mode tap",
        "link add flannel0 type bridge",
        "link add flannel0 type veth peer name other0",
    ],
)
def test_a_flannel0_that_is_not_ours_is_refused_and_untouched(place: Place, make: str) -> None:
    place.host.ip_batch(make)
    refused(place, 5, "flannel0 exists and is ", "try: ip link delete flannel0")


def test_a_tun_with_anothers_alias_is_refused(place: Place) -> None:
    place.host.ip_batch("tuntap add flannel0 mode tun", "link set flannel0 alias mine")
    refused(place, 5, 'flannel0 exists and has the alias "mine"')


def test_a_tun_that_flanneld_holds_is_refused_by_its_pid(place: Place) -> None:
    """Not persistent and without a mark, as flanneld makes it."""
    hold = "import sys; from flanctl.agent.kernel.tun import open_tun; open_tun('flannel0', persistent=False); print(1, flush=True); sys.stdin.read()"
    with place.host.popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        refused(place, 5, "flannel0 exists and is not ours, held by ", f"pid {holder.pid}", "try: stop ")


@pytest.mark.parametrize(
    "prefix",
    [
        ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"),
        ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    ],
    ids=["root without CAP_NET_ADMIN", "not root"],
)
def test_without_rights_it_says_which_are_missing(place: Place, prefix: tuple[str, ...]) -> None:
    if place.host.run([*prefix, *FLANCTL, "version"], check=False, env=environment()).returncode != 0:
        pytest.skip("this checkout cannot be read without root")
    # pytest's own directories are closed to others.
    options = ("--subnet-file", "/run/flanctl-test/subnet.env")
    refused(place, 7, "the agent needs CAP_NET_ADMIN", "try: run it as root", prefix=prefix, options=options)


def hidden(mount: str) -> tuple[str, ...]:
    """A command prefix: a mount namespace of its own, changed by a shell command."""
    return ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")


def test_without_dev_net_tun_it_says_so(place: Place) -> None:
    refused(place, 1, "no /dev/net/tun", "modprobe tun", prefix=hidden("mount -t tmpfs none /dev/net"))


def test_an_underlay_too_narrow_for_the_tunnel_is_refused(place: Place) -> None:
    place.host.set_mtu(90)
    try:
        refused(place, 1, "MTU of 90 leaves 62 bytes")
    finally:
        place.host.set_mtu(1500)


@pytest.mark.parametrize("option", ["--subnet-file", "--state-dir", "--run-dir"])
def test_a_path_in_a_directory_that_does_not_exist_is_refused(place: Place, option: str) -> None:
    name = f"{place.folder}/no/such/thing"
    refused(place, 4, f"there is no directory {place.folder}/no", options=(option, name))


def test_a_subnet_file_on_a_read_only_file_system_is_refused(place: Place) -> None:
    own = place.folder / "agent"
    own.mkdir()
    prefix = hidden(f"mkdir -p {own}/ro && mount -t tmpfs -o ro none {own}/ro")
    refused(place, 7, f"cannot write {own}/ro/subnet.env", prefix=prefix, options=("--subnet-file", f"{own}/ro/subnet.env"))  # fmt: skip
    (own / "ro").rmdir()


def test_a_full_disk_under_subnet_env_is_said_and_the_next_start_takes_the_same_subnet(place: Place) -> None:
    own = place.folder / "agent"
    own.mkdir()
    (own / "full").mkdir()
    fill = f"head -c 4096 /dev/zero > {own}/full/filler 2>&1"
    prefix = hidden(f"mount -t tmpfs -o size=4k none {own}/full && {fill}")
    code, text = place.attempt("--subnet-file", f"{own}/full/subnet.env", prefix=prefix)
    assert (code, "subnet.env: No space left on device" in text) == (1, True), text
    (had,) = place.leases()
    place.start().wait()
    assert list(place.leases()) == [had]


def test_a_directory_as_subnet_file_is_refused(place: Place) -> None:
    refused(place, 2, "is a directory", options=("--subnet-file", str(place.folder)))


def test_a_full_network_says_how_full(place: Place) -> None:
    with closing(place.store()) as store:
        entry = store.get(CONFIG)
        assert entry is not None
        store.replace(CONFIG, b'{"Network":"10.5.0.0/28","SubnetLen":30}', ttl=None, expected=entry.revision)
        for number in (4, 8, 12):
            store.create(f"{SUBNETS}10.5.0.{number}-30", b'{"PublicIP":"192.168.66.99"}', ttl=86400)
    refused(place, 5, "3 of 3 subnets taken in 10.5.0.0/28")


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (b"{", 6, "line 1, column 2"),
        (b'{"Network":"172.17.0.0/16","Backend":{"Type":"vxlan"}}', 6, 'backend "vxlan"'),
    ],
)
def test_a_config_we_cannot_serve_is_refused(place: Place, config: bytes, code: int, said: str) -> None:
    with closing(place.store()) as store:
        entry = store.get(CONFIG)
        assert entry is not None
        store.replace(CONFIG, config, ttl=None, expected=entry.revision)
    refused(place, code, said)


# ---- stop, restart, reboot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_less_than_five_seconds_and_leaves_everything_in_place(
    place: Place, number: signal.Signals
) -> None:
    agent = place.start("--ip-masq").wait()
    machine, leases = place.machine(), place.leases()
    assert agent.terminate(number, seconds=5) == 0
    assert f"reason={number.name} lease=kept" in agent.log_text()
    assert (place.machine(), place.leases()) == (machine, leases)
    assert agent.subnet_file.exists()


def test_a_stop_while_it_starts_is_no_failure(place: Place) -> None:
    """SIGTERM as soon as it speaks; wherever that hits, it ends in order."""
    agent = place.start()
    agent.wait_log("settings ")
    assert agent.terminate() in {0, -signal.SIGTERM}  # its handlers may not be in place yet
    assert len(place.leases()) <= 1


@pytest.mark.parametrize(
    "end", ["SIGTERM", "SIGKILL", "reboot", "reboot and lease expired", "all files lost"]
)
def test_the_same_subnet_after(place: Place, end: str) -> None:
    agent = place.start("--ip-masq").wait()
    machine, leases, subnet = place.machine(), place.leases(), agent.subnet
    match end:
        case "SIGTERM":
            agent.terminate()
            agent = agent.again()
        case "SIGKILL":
            agent.kill()
            agent = agent.again()
        case "reboot":
            agent = agent.reboot(keep_state=True)
        case "all files lost":
            agent = agent.reboot()
        case _:
            agent.kill()
            with closing(place.store()) as store:
                store.delete(SUBNETS + next(iter(leases)))
            agent = agent.reboot(keep_state=True)
    assert agent.wait().subnet == subnet
    assert (place.machine(), place.leases()) == (machine, leases)


# ---- the registry meanwhile -----------------------------------------------------------------------------------------


def test_a_deleted_lease_is_written_again(place: Place) -> None:
    agent = place.start().wait()
    leases = place.leases()
    with closing(place.store()) as store:
        store.delete(SUBNETS + next(iter(leases)))
    agent.wait_log("was gone or rewritten, it stands again")
    assert place.leases() == leases


def test_a_lease_overwritten_by_another_host_ends_the_agent_with_8(place: Place) -> None:
    agent = place.start().wait()
    (name,) = place.leases()
    with closing(place.store()) as store:
        entry = store.get(SUBNETS + name)
        assert entry is not None
        store.replace(entry.key, b'{"PublicIP":"192.168.66.99"}', ttl=86400, expected=entry.revision)
    assert agent.wait_end(seconds=10) == 8
    assert f"flanctl agent: lease {agent.subnet} taken by 192.168.66.99 at revision " in agent.log_text()
    assert place.leases() == {name: b'{"PublicIP":"192.168.66.99"}'}


TEN = "10s"
"""The shortest lease the agent takes."""


def stopped_beyond_its_lease(place: Place) -> RunningAgent:
    """An agent that slept (SIGSTOP; a suspended machine looks the same) until its lease had ended."""
    agent = place.start("--lease-ttl", TEN).wait()
    assert len(place.leases()) == 1
    agent.process.send_signal(signal.SIGSTOP)
    until(lambda: place.leases() == {}, seconds=30, what="the lease has ended")
    return agent


def test_an_agent_stopped_beyond_its_lease_has_the_same_subnet_again(place: Place) -> None:
    """flannel.md 11, row 29."""
    agent = stopped_beyond_its_lease(place)
    agent.process.send_signal(signal.SIGCONT)
    name = f"{agent.subnet.network_address}-{agent.subnet.prefixlen}"
    until(lambda: list(place.leases()) == [name], seconds=10)
    agent.wait_log("it stands again")
    assert agent.process.poll() is None
    assert agent.terminate() == 0


def test_an_agent_stopped_beyond_its_lease_ends_with_8_when_its_subnet_was_taken(place: Place) -> None:
    """flannel.md 11, rows 7 and 29: never two holders."""
    agent = stopped_beyond_its_lease(place)
    name = f"{agent.subnet.network_address}-{agent.subnet.prefixlen}"
    taken = b'{"PublicIP":"192.168.66.77"}'
    with closing(place.store()) as store:
        store.create(SUBNETS + name, taken, ttl=600)
    agent.process.send_signal(signal.SIGCONT)
    assert agent.wait_end() == 8
    assert "taken by 192.168.66.77" in agent.log_text()
    assert place.leases() == {name: taken}
    with closing(place.store()) as store:
        assert store.list("/jxdd/network/flanctl/hosts/").entries == (), "nobody takes us for its holder"
    again = agent.again().wait()
    assert again.subnet != agent.subnet
    assert (
        f"had {agent.subnet} and has {again.subnet} now: {agent.subnet} belongs to 192.168.66.77"
        in again.log_text()
    )
    assert again.terminate() == 0


@pytest.mark.parametrize("ttl", ["9s", "0", "-5s", "400000h", "soon", "1d", "inf", "nan"])
def test_a_lease_time_that_makes_no_sense_is_a_usage_error(place: Place, ttl: str) -> None:
    code, said = place.attempt("--lease-ttl", ttl)
    assert code == 2
    assert "--lease-ttl" in said


# ---- harm while it runs ---------------------------------------------------------------------------------------------


@dataclass
class Pair:
    places: tuple[Place, Place]
    agents: tuple[RunningAgent, RunningAgent]
    containers: tuple[Container, Container]

    def flows(self) -> bool:
        one, two = self.containers
        return one.run(["ping", "-c1", "-W1", str(two.address)], check=False).returncode == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = configured(tmp_path_factory.mktemp("pair"))
    with Lab("pair") as lab:
        places = Place(lab.add_host(), folder), Place(lab.add_host(), folder)
        agents = tuple(
            place.start("--ip-masq", "--iptables-resync", "0.3", folder=place.host.name).wait()
            for place in places
        )
        containers = tuple(agent.host.add_container(agent.gateway, MTU) for agent in agents)
        yield Pair(places, agents, containers)  # type: ignore[arg-type]  # two of each
    assert lab.leftovers() == ()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("ip link delete flannel0", "flannel0 was gone, made anew"),
        ("ip link set flannel0 mtu 1300", "mtu of flannel0 was 1300, set to 1472"),
        ("ip link set flannel0 down", "flannel0 was down, set up"),
        ("ip address flush dev flannel0", "was missing on flannel0, added"),
        ("ip address add 10.9.9.9/24 dev flannel0", "10.9.9.9/24 does not belong on flannel0, deleted"),
        ("ip link set flannel0 alias somebody", "alias of flannel0 was somebody, set to flanctl"),
        ("ip link set flannel0 txqueuelen 7", "txqueuelen of flannel0 was 7"),
        ("ip route delete 172.17.0.0/16", "route 172.17.0.0/16 dev flannel0 was missing, added"),
        ("iptables -t nat -F", "chain FLANNEL-POSTRTG of table nat had 0 rules"),
        ("iptables -t nat -F FLANNEL-POSTRTG", "chain FLANNEL-POSTRTG of table nat had 0 rules"),
        ("iptables -t nat -I FLANNEL-POSTRTG -j RETURN", "had 7 rules, not the 6"),
        ("iptables -F; iptables -X", "chain FLANNEL-FWD of table filter was missing, written"),
        ("iptables -F FORWARD", "the jump from FORWARD to chain FLANNEL-FWD of table filter was missing"),
        ("iptables -t raw -F", "the rule for Docker in chain PREROUTING of table raw was missing"),
        ("iptables -t mangle -F", "the rule for Docker in chain PREROUTING of table mangle was missing"),
        (
            "iptables -F DOCKER-USER",
            "chain DOCKER-USER of table filter was missing",
        ),
    ],
)
def test_harm_is_repaired_said_and_packets_flow_again(pair: Pair, harm: str, said: str) -> None:
    until(pair.flows, what="packets before the harm")
    place, agent = pair.places[0], pair.agents[0]
    before = place.machine()
    place.host.run(["sh", "-c", harm])
    until(lambda: said in agent.log_text(), what=f"{said!r} from {agent}")
    until(lambda: place.machine() == before, what=f"repair; now {place.machine()}, before {before}")
    until(pair.flows, what="packets after the repair")


def test_a_device_that_somebody_else_put_in_place_of_ours_ends_the_agent_and_is_left_alone(
    place: Place,
) -> None:
    agent = place.start().wait()
    agent.process.send_signal(signal.SIGSTOP)
    place.host.ip_batch("link delete flannel0", "link add flannel0 type bridge")
    theirs = place.machine()
    agent.process.send_signal(signal.SIGCONT)
    assert agent.wait_end(seconds=10) == 5
    assert "flannel0 exists and is a bridge interface" in agent.log_text()
    assert place.machine() == theirs

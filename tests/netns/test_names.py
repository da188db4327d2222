"""The agent by flannel's names: flanneld and flanneld-start, with flannel's flags, variables and log files."""

from __future__ import annotations

import os
import re
import signal
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flanctl.demo.hosts import Lab
from flanctl.registry.stores.sqlite import SqliteStore
from tests.support.agents import RunningAgent, environment
from tests.support.cli import program
from tests.support.deadline import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanctl.demo.hosts import Host

pytestmark = pytest.mark.needs("root", "netns", "tun", "iptables")
PREFIX = "/jxdd/network"
SUBNET_ENV = re.compile(
    r"FLANNEL_NETWORK=172\.17\.0\.0/16\nFLANNEL_SUBNET=172\.17\.\d+\.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
)
LINE = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \w+\.py:\d+\] .+")


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab("names") as lab:
        yield lab.add_host()


@pytest.fixture
def registry(tmp_path: Path) -> str:
    path = tmp_path / "registry.db"
    with closing(SqliteStore(str(path))) as store:
        store.create(f"{PREFIX}/config", b'{"Network":"172.17.0.0/16"}', ttl=None)
    return f"sqlite:{path}"


def test_the_deployment_notes_command_line(host, registry, tmp_path):
    """flanneld-start as the CentOS unit runs it: files in log_dir, nothing on stderr, ready, SIGTERM, 0."""
    logs = tmp_path / "log"
    logs.mkdir()
    agent = RunningAgent.start(
        host,
        tmp_path / "agent",
        registry,
        "--logtostderr=false",
        f"--log_dir={logs}/",
        "--iface=eth0",
        name="flanneld-start",
        FLANNEL_ETCD_ENDPOINTS=registry,
        FLANNEL_ETCD_PREFIX=PREFIX,
    )
    info = logs / "flanneld.INFO"
    until(
        lambda: info.exists() and " ready network=172.17.0.0/16 " in info.read_text(),
        seconds=30,
        what=str(agent),
    )
    assert SUBNET_ENV.fullmatch(agent.subnet_file.read_text())
    assert Path(f"/proc/{agent.pid}/comm").read_text() == "flanneld\n"
    assert agent.terminate() == 0
    assert agent.log_text() == ""
    name = os.readlink(info)
    assert re.fullmatch(rf"flanneld\.[\w-]+\.root\.log\.INFO\.\d{{8}}-\d{{6}}\.{agent.pid}", name)
    lines = info.read_text().splitlines()
    assert lines[0].startswith("Log file created at: ")
    assert lines[1].startswith("Running on machine: ")
    assert lines[2].startswith("Binary: ")
    assert lines[3] == "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu threadid file:line] msg"
    assert all(LINE.fullmatch(line) for line in lines[4:]), lines
    assert "] stopped after=" in lines[-1]


def test_flanneld_logs_to_stderr_and_keeps_its_subnet(host, registry, tmp_path):
    """Flags in Go's grammar, the rest in FLANNELD_*; started again as `flanctl agent` it has the same subnet."""
    agent = RunningAgent.start(
        host,
        tmp_path / "agent",
        registry,
        f"-etcd-endpoints={registry}",
        "-etcd-prefix",
        PREFIX,
        "-ip-masq",
        name="flanneld",
        FLANNELD_IFACE="eth0",
    ).wait()
    subnet = agent.subnet
    assert "FLANNEL_IPMASQ=true\n" in agent.subnet_file.read_text()
    assert all(LINE.fullmatch(line) for line in agent.log_text().splitlines())
    twice = host.run(
        [*program("flanneld"), f"-etcd-endpoints={registry}", f"-etcd-prefix={PREFIX}"],
        env=environment(FLANCTL_RUN_DIR=str(agent.folder / "run"), FLANCTL_STATE_DIR=str(tmp_path / "no")),
        check=False,
    )
    assert twice.returncode == 1
    assert f"another flanctl agent runs on this host (pid {agent.pid}, " in twice.stderr
    assert agent.terminate() == 0
    later = RunningAgent.start(host, tmp_path / "agent", registry, "--iface", "eth0").wait()
    assert later.subnet == subnet
    assert later.terminate() == 0


def test_a_log_directory_that_is_missing_keeps_nobody_from_starting(host, registry, tmp_path):
    agent = RunningAgent.start(
        host,
        tmp_path / "agent",
        registry,
        f"-etcd-endpoints={registry}",
        f"-etcd-prefix={PREFIX}",
        "-logtostderr=false",
        f"-log_dir={tmp_path}/nosuch",
        "-v=5",
        "-public-ipv6=fc00::1",
        name="flanneld",
    ).wait()
    assert agent.log_text().count("no log files: ") == 1
    assert agent.log_text().count(" is ignored: ") == 2
    assert agent.terminate() == 0
    assert not (tmp_path / "nosuch").exists()


def test_a_full_disk_under_log_dir_is_said_once_and_ends_nothing(host, registry, tmp_path):
    """glog ends the program; here the lines come to stderr."""
    folder, logs = tmp_path / "agent", tmp_path / "log"
    folder.mkdir()
    logs.mkdir()
    full = f"mount -t tmpfs -o size=4k none {logs} && head -c 4096 /dev/zero >{logs}/filler"
    flags = (
        f"-etcd-endpoints={registry}",
        f"-etcd-prefix={PREFIX}",
        "-logtostderr=false",
        f"-log_dir={logs}",
    )
    with (folder / "agent.log").open("ab") as stream:
        process = host.popen(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", f'{full}; exec "$@"', "sh"),
                *(*program("flanneld"), "--subnet-file", f"{folder}/subnet.env", *flags),
            ],
            env=environment(FLANCTL_STATE_DIR=f"{folder}/state", FLANCTL_RUN_DIR=f"{folder}/run"),
            stdout=stream,
            stderr=stream,
        )
    agent = RunningAgent(host, folder, registry, flags, process, name="flanneld").wait()
    said = f"cannot write a log file in {logs}: No space left on device; its lines come here"
    assert agent.log_text().count(said) == 1
    assert agent.terminate() == 0
    assert SUBNET_ENV.fullmatch(agent.subnet_file.read_text())


def test_a_wrong_config_is_waited_out_and_a_wrong_interface_or_address_ends_with_1(host, registry, tmp_path):
    """flannel.md 1.4: 0.7.1 tries a config for ever; a missing interface ends it."""
    path = registry.removeprefix("sqlite:")
    with closing(SqliteStore(path)) as store:
        store.create("/wrong/config", b'{"Network":"172.17.0.0/16","Backend":{"Type":"nosuch"}}', ttl=None)
    flags = (f"-etcd-endpoints={registry}", "-etcd-prefix=/wrong", "-iface=eth0")
    agent = RunningAgent.start(host, tmp_path / "agent", registry, *flags, name="flanneld")
    agent.wait_log(r"waiting: .*nosuch")
    with closing(SqliteStore(path)) as store:
        entry = store.get("/wrong/config")
        store.replace("/wrong/config", b'{"Network":"172.18.0.0/16"}', ttl=None, expected=entry.revision)
    assert agent.ready["network"] == "172.18.0.0/16"
    assert agent.terminate() == 0
    for number, (flag, says) in enumerate({"-iface=nosuch0": "nosuch0", "-public-ip=abc": '"abc"'}.items()):
        bad = (f"-etcd-endpoints={registry}", f"-etcd-prefix={PREFIX}", flag)
        agent = RunningAgent.start(host, tmp_path / str(number), registry, *bad, name="flanneld")
        assert agent.wait_end() == 1
        assert says in agent.log_text()


@pytest.mark.parametrize(
    ("flag", "says"),
    {
        "-iface=nosuch0": "nosuch0",
        "-iface-regex=[": "not a regular expression",
        "-iface-can-reach=abc": '"abc"',
        "-public-ip=abc": '"abc"',
    }.items(),
)
def test_a_wrong_interface_or_address_ends_with_1_while_etcd_is_away(flag, says, host, tmp_path):
    """0.7.1 looks it up before it asks etcd; nobody should wait for etcd to hear of it."""
    bad = ("-etcd-endpoints=http://127.0.0.1:1", f"-etcd-prefix={PREFIX}", flag)
    agent = RunningAgent.start(host, tmp_path / "agent", "", *bad, name="flanneld")
    assert agent.wait_end() == 1
    assert says in agent.log_text()
    assert "waiting" not in agent.log_text()


def test_signals_that_flanneld_dies_of(host, registry, tmp_path):
    """A second SIGTERM changes nothing in the stop of the first; SIGQUIT ends it by the signal."""
    flags = (f"-etcd-endpoints={registry}", f"-etcd-prefix={PREFIX}", "-iface=eth0")
    agent = RunningAgent.start(host, tmp_path / "agent", registry, *flags, name="flanneld").wait()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.terminate() == 0
    assert agent.log_text().count("] stopped after=") == 1
    no_core = ("prlimit", "--core=0")
    agent = RunningAgent.start(
        host, tmp_path / "agent", registry, *flags, name="flanneld", prefix=no_core
    ).wait()
    assert agent.terminate(signal.SIGQUIT) == -signal.SIGQUIT


@pytest.mark.parametrize("lacking", ["etcd", "config", "subnet"])
def test_what_0_7_1_retries_for_ever_is_waited_for_until_it_is_there(lacking, host, registry, tmp_path):
    """flannel.md 1.4: etcd down, no config, out of subnets; SIGTERM while it waits ends it with 0."""
    path = registry.removeprefix("sqlite:")
    endpoints, prefix, says = registry, "/later", r"waiting: .*/later/config"
    lease = "/later/subnets/172.19.0.4-30"
    if lacking == "etcd":
        endpoints, says = "http://127.0.0.1:1", r"waiting: .*127\.0\.0\.1:1"
    elif lacking == "subnet":
        says = r"waiting: .*subnets taken"
        with closing(SqliteStore(path)) as store:
            store.create("/later/config", b'{"Network":"172.19.0.0/28","SubnetLen":30}', ttl=None)
            for number in (4, 8, 12):
                key = f"/later/subnets/172.19.0.{number}-30"
                store.create(key, b'{"PublicIP":"10.9.9.%d"}' % (number + 1), ttl=3600.0)
    flags = (f"-etcd-endpoints={endpoints}", f"-etcd-prefix={prefix}", "-iface=eth0")
    agent = RunningAgent.start(host, tmp_path / "agent", endpoints, *flags, name="flanneld")
    agent.wait_log(says)
    if lacking != "etcd":
        with closing(SqliteStore(path)) as store:
            if lacking == "config":
                store.create("/later/config", b'{"Network":"172.19.0.0/16"}', ttl=None)
            else:
                store.delete(lease, expected=store.get(lease).revision)
        assert agent.ready["network"].startswith("172.19.0.0/")
    assert agent.terminate() == 0

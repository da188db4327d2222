"""What a command loads: start-up is a promise, and heavy libraries are its enemy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = [
    "grpc",
    "etcd3",
    "pyroute2",
    "asyncio",
    "ssl",
    "http.client",
    "sqlite3",
    "logging",
    "requests",
    "urllib3",
    "tabulate",
]


def loaded(*words, stdin=""):
    script = (
        "import sys, json\n"
        "from flanctl.cli import main\n"
        "code = main(json.loads(sys.argv[1]))\n"
        "sys.stderr.write('\\nLOADED ' + json.dumps(sorted(sys.modules)))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(words))],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.rpartition("LOADED ")[2]))


@pytest.fixture
def subnet_env(tmp_path):
    file = tmp_path / "subnet.env"
    file.write_text(
        "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    return str(file)


@pytest.mark.parametrize("case", ["version", "docker-opts", "net validate", "completion"])
def test_commands_that_need_no_registry_load_nothing_heavy(case, subnet_env):
    words = {
        "version": ["version"],
        "docker-opts": ["docker-opts", "-f", subnet_env, "-d", "-"],
        "net validate": ["net", "validate", "-"],
        "completion": ["completion", "zsh"],
    }[case]
    modules = loaded(*words, stdin='{"Network":"10.0.0.0/8"}')
    assert not modules & set(HEAVY)


def test_a_command_on_sqlite_loads_no_etcd_client(tmp_path):
    registry = f"sqlite:{tmp_path / 'r.db'}"
    loaded("net", "init", "--network", "10.0.0.0/16", "--endpoints", registry)
    for words in (
        ["subnets", "ls"],
        ["reserve", "10.0.7.0/24", "192.168.6.2", "--yes"],
        ["unreserve", "192.168.6.2", "--yes"],
        ["watch", "--for", "10ms"],
    ):
        modules = loaded(*words, "-w", "simple", "--endpoints", registry)
        assert not modules & {"grpc", "etcd3", "pyroute2", "asyncio", "ssl", "http.client", "tabulate"}, words


def test_settings_without_files_cost_no_parser():
    """Every command reads them: regular expressions, TOML and look-alikes are for files and errors."""
    script = (
        "import sys; before = set(sys.modules); import flanctl.settings as s;"
        "found = s.resolve({}, environment={}, toml_file='/nonexistent', sysconfig_files=['/nonexistent']);"
        "found.number('healthz_port'); print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = {"flanctl.environment_file", "flanctl.flanneld_flags", "flanctl.flanneld_line", "flanctl.go_flags"}
    loaded = set(done.stdout.split())
    assert "flanctl.settings" in loaded
    assert not loaded & ({"shlex", "tomllib", "difflib", "ipaddress", "pathlib", "click"} | ours)

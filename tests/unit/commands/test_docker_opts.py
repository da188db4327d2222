"""dockerd's options, and every way their source can be broken."""

from __future__ import annotations

import json
import stat

import pytest
from click.testing import CliRunner

from flanctl.commands import docker_opts as command
from tests.support.cli import flanctl

NOTE = (
    "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
)


@pytest.fixture
def env_file(tmp_path):
    file = tmp_path / "subnet.env"
    file.write_text(NOTE)
    return file


def test_the_deployment_notes_file_comes_out_byte_for_byte(tmp_path, env_file):
    target = tmp_path / "docker"
    answer = flanctl("docker-opts", "-f", env_file, "-d", target)
    assert (answer.code, answer.out) == (0, "")
    assert answer.err == f"wrote {target}: --bip=172.17.41.1/24 --mtu=1472 (from {env_file})\n"
    assert target.read_text() == (
        'DOCKER_OPT_BIP="--bip=172.17.41.1/24"\n'
        'DOCKER_OPT_IPMASQ="--ip-masq=true"\n'
        'DOCKER_OPT_MTU="--mtu=1472"\n'
        'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'
    )
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_dash_prints(env_file):
    answer = flanctl("docker-opts", "-c", "-f", env_file, "-d", "-")
    assert answer.out == 'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'


def test_what_another_environment_file_gave_comes_first(env_file):
    answer = flanctl(
        "docker-opts", "-c", "-f", env_file, "-d", "-", env={"DOCKER_NETWORK_OPTIONS": "--log-level=warn"}
    )
    assert answer.out.startswith('DOCKER_NETWORK_OPTIONS="--log-level=warn  --bip=')


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 4, "no subnet file"),
        ("", 6, "is empty"),
        ("\n \n", 6, "is empty"),
        (NOTE.replace("\n", "\r\n"), 6, "line 1"),
        (
            "FLANNEL_NETWORK=172.17.0.0/16\nFLANNEL_SUBNET=172.17.41.1/24\n",
            6,
            "FLANNEL_MTU, FLANNEL_IPMASQ missing",
        ),
        (NOTE[:-8], 6, "subnet.env"),
        (NOTE.replace("false", "maybe"), 6, "FLANNEL_IPMASQ"),
        (NOTE.replace("1472", "'1472"), 6, "line 3"),
        ("\x00\xff", 6, "subnet.env"),
    ],
)
def test_a_broken_source_is_named_and_the_target_stays(tmp_path, content, code, says):
    file, target = tmp_path / "subnet.env", tmp_path / "docker"
    target.write_text("as it was\n")
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    answer = flanctl("docker-opts", "-f", file, "-d", target)
    assert answer.code == code
    assert says in answer.err
    assert "try: " in answer.err
    assert answer.err.startswith("flanctl docker-opts: ")
    assert target.read_text() == "as it was\n"


def test_quotes_are_read_as_a_shell_reads_them(tmp_path):
    file = tmp_path / "subnet.env"
    file.write_text(NOTE.replace("1472", '"1472"').replace("false", "'false'"))
    assert "--mtu=1472" in flanctl("docker-opts", "-f", file, "-d", "-").out


def test_an_unwritable_target_is_an_error(tmp_path, env_file):
    answer = flanctl("docker-opts", "-f", env_file, "-d", tmp_path / "no" / "such" / "docker")
    assert answer.code == 4
    assert "there is no directory" in answer.err
    answer = flanctl("docker-opts", "-f", env_file, "-d", tmp_path)
    assert answer.code != 0
    assert "cannot write" in answer.err


def test_the_source_may_not_be_a_directory(tmp_path):
    answer = flanctl("docker-opts", "-f", tmp_path, "-d", "-")
    assert (answer.code, "Is a directory" in answer.err) == (6, True)


def _with_systemctl(folder, text):
    """An environment in which systemctl is a script that writes down what it is asked."""
    script = folder / "systemctl"
    script.write_text(f'#!/bin/sh\necho "$*" >>{folder}/asked\n{text}\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_docker_is_restarted_when_its_options_changed_and_only_then(tmp_path, env_file):
    env = _with_systemctl(tmp_path, "")
    words = ("docker-opts", "-f", env_file, "-d", tmp_path / "docker", "--restart", "docker.service")
    asked = tmp_path / "asked"
    first = flanctl(*words, env=env)
    assert "the options changed: docker.service is restarted, if it runs" in first.err
    assert asked.read_text() == "--no-block try-restart docker.service\n"
    assert "options changed" not in flanctl(*words, env=env).err
    assert asked.read_text().count("\n") == 1
    env_file.write_text(NOTE.replace("1472", "1422"))
    flanctl(*words, env=env)
    assert asked.read_text().count("\n") == 2


def test_a_restart_that_fails_is_said_and_the_file_is_there(tmp_path, env_file):
    env = _with_systemctl(tmp_path, "echo no bus >&2; exit 1")
    answer = flanctl("docker-opts", "-f", env_file, "-d", tmp_path / "docker", "--restart", "docker", env=env)
    assert answer.code == 0
    assert "warning: the options changed and docker was not restarted: no bus" in answer.err
    assert (tmp_path / "docker").exists()


def test_printing_restarts_nothing(env_file):
    answer = flanctl("docker-opts", "-f", env_file, "-d", "-", "--restart", "docker")
    assert (answer.code, answer.out) == (2, "")


def test_accept_adds_what_the_nftables_backend_needs(env_file):
    answer = flanctl("docker-opts", "-c", "-f", env_file, "-d", "-", "--accept")
    assert answer.out == (
        'DOCKER_NETWORK_OPTIONS=" --allow-direct-routing --bip=172.17.41.1/24 '
        '--bridge-accept-fwmark=0x4000000/0x4000000 --ip-masq=true --mtu=1472"\n'
    )


@pytest.mark.parametrize(
    ("daemon_json", "options", "accepted"),
    [
        ('{"firewall-backend": "nftables"}', (), True),
        ('{"firewall-backend": "nftables"}', ("--no-accept",), False),
        ('{"firewall-backend": "nftables"}', ("--format", "network"), False),
        ('{"firewall-backend": "iptables"}', (), False),
        ('{"firewall-backend": "iptables"}', ("--accept",), True),
        ('{"data-root": "/nftables"}', (), False),
        ('["nftables"]', (), False),
        ('{"firewall-backend": "nftables",', (), False),
        ("[" * 100_000 + '"nftables"', (), False),
        (None, (), False),
    ],
)
def test_where_daemon_json_names_the_nftables_backend_nobody_has_to_ask(
    tmp_path, env_file, monkeypatch, daemon_json, options, accepted
):
    monkeypatch.setattr(command, "DAEMON_JSON", tmp_path / "daemon.json")
    if daemon_json is not None:
        command.DAEMON_JSON.write_text(daemon_json)
    answer = CliRunner().invoke(command.docker_opts, ["-f", str(env_file), "-d", "-", *options])
    assert answer.exit_code == 0, answer.output
    assert ("--allow-direct-routing" in answer.output) is accepted


def test_json_itself_says_whether_it_needs_accept(tmp_path, env_file):
    target = tmp_path / "daemon.json"
    target.write_text('{"firewall-backend": "nftables"}')
    assert flanctl("docker-opts", "--format", "json", "-f", env_file, "-d", target).code == 0
    assert json.loads(target.read_text())["bridge-accept-fwmark"] == "0x4000000/0x4000000"


def test_json_is_merged_into_the_file_and_its_mode_kept(tmp_path, env_file):
    target = tmp_path / "daemon.json"
    target.write_text('{\n  "log-driver": "local"\n}\n')
    target.chmod(0o600)
    answer = flanctl("docker-opts", "--format", "json", "-f", env_file, "-d", target)
    assert (answer.code, answer.out) == (0, "")
    assert answer.err.startswith(f"wrote {target}: --bip=172.17.41.1/24 --mtu=1472")
    assert json.loads(target.read_text()) == {
        "log-driver": "local", "bip": "172.17.41.1/24", "mtu": 1472, "ip-masq": True,
    }  # fmt: skip
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    written = target.stat().st_mtime_ns
    answer = flanctl("docker-opts", "--format", "json", "-f", env_file, "-d", target)
    assert (answer.code, "nothing to change" in answer.err) == (0, True)
    assert target.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ('{"a": 1,}', 6, "line 1, column 8"),
        ('{"bridge": "br0"}', 5, '"bridge"'),
        (" " * 1_000_001, 6, "larger"),
    ],
)
def test_a_daemon_json_that_cannot_take_it_stays_as_it_was(tmp_path, env_file, content, code, says):
    target = tmp_path / "daemon.json"
    target.write_text(content)
    answer = flanctl("docker-opts", "--format", "json", "-f", env_file, "-d", target)
    assert answer.code == code
    assert says in answer.err
    assert target.read_text() == content
    assert [path.name for path in tmp_path.iterdir() if "daemon" in path.name] == ["daemon.json"]


def test_json_and_network_print_too(env_file):
    answer = flanctl("docker-opts", "--format", "json", "--accept", "-m", "-f", env_file, "-d", "-")
    assert json.loads(answer.out) == {
        "bip": "172.17.41.1/24", "mtu": 1472,
        "allow-direct-routing": True, "bridge-accept-fwmark": "0x4000000/0x4000000",
    }  # fmt: skip
    answer = flanctl("docker-opts", "--format", "network", "-f", env_file)
    assert answer.out == (
        "--driver=bridge --subnet=172.17.41.0/24 --gateway=172.17.41.1 --opt=com.docker.network.driver.mtu=1472 "
        "--opt=com.docker.network.bridge.enable_ip_masquerade=true\n"
    )


def test_what_is_about_lines_of_variables_is_refused_elsewhere(env_file):
    answer = flanctl("docker-opts", "--format", "json", "-i", "-f", env_file, "-d", "-")
    assert (answer.code, "--format env" in answer.err) == (2, True)


def test_docker_is_restarted_for_a_daemon_json_that_changed(tmp_path, env_file):
    env = _with_systemctl(tmp_path, "")
    words = ("docker-opts", "--format", "json", "-f", env_file, "-d", tmp_path / "daemon.json")
    for _ in range(2):
        assert flanctl(*words, "--restart", "docker", env=env).code == 0
    assert (tmp_path / "asked").read_text() == "--no-block try-restart docker\n"

"""Manners of the command line: help, exit codes, streams, completion, closed pipes, full disks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from flanctl import errors
from flanctl.cli import flanctl as root
from tests.support.cli import flanctl, program

COMMANDS = [
    "net init",
    "net get",
    "net validate",
    "subnets ls",
    "subnets get",
    "subnets watch",
    "watch",
    "release",
    "reserve",
    "unreserve",
    "capacity",
    "agent",
    "migrate v2-to-v3",
    "status",
    "config",
    "config check",
    "cleanup",
    "docker-opts",
    "install",
    "uninstall",
    "demo",
    "version",
    "completion",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_and_shows_an_example(command):
    answer = flanctl(*command.split(), "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: flanctl {command}")
    assert re.search(r"Examples?:\n +(flanctl|source|echo)", answer.out), answer.out
    assert max(map(len, answer.out.splitlines())) <= 100


def test_every_command_is_in_the_help_and_in_this_list():
    answer = flanctl("--help")
    shown = {name for name in root.list_commands(None) if not root.get_command(None, name).hidden}
    assert shown == {command.split()[0] for command in COMMANDS}
    for name in shown:
        assert re.search(rf"^  {name} ", answer.out, re.MULTILINE)


def test_examples_in_help_are_real_options():
    """Each option an example uses is one its command has."""
    for command in COMMANDS:
        text = flanctl(*command.split(), "--help").out
        example = text.partition("Example")[2].partition("Options:")[0]
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", example):
            assert f"{option}" in text.partition("Options:")[2] or option in flanctl("--help").out, (
                command,
                option,
            )


def test_exit_codes_are_those_documented():
    codes = {
        errors.FlanctlError: 1,
        errors.UsageError: 2,
        errors.RegistryUnreachable: 3,
        errors.NotFound: 4,
        errors.Conflict: 5,
        errors.Invalid: 6,
        errors.NotPermitted: 7,
        errors.LeaseLost: 8,
    }
    assert {kind: kind.exit_code for kind in codes} == codes
    assert errors.INTERRUPTED == 130
    text = flanctl("--help").out
    for word in (
        "2 usage",
        "3 registry unreachable",
        "4 not found",
        "5 conflict",
        "7 not permitted",
        "8 lease lost",
    ):
        assert word in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["subnet", "ls"], "did you mean subnets?"),
        (["net", "inti"], "did you mean init?"),
        (["subnets", "ls", "--nosuch"], "--nosuch"),
        (["subnets", "get"], "SUBNET|ADDRESS"),
        (["net", "init"], "nothing to write"),
        (["net", "init", "x.json", "--network", "10.0.0.0/8"], "exclude each other"),
        (["subnets", "ls", "-w", "yaml"], "yaml"),
        (["subnets", "get", "172.17.41"], "neither a subnet nor an address"),
        (["subnets", "ls", "--timeout", "soon"], "is not a duration"),
        (["subnets", "ls", "--cert", "/x"], "--cert needs --key"),
        (["subnets", "ls", "--prefix", "/a b"], "blanks"),
        (["subnets", "ls", "--endpoints", ","], "no endpoint"),
        (["subnets", "ls", "--dialect", "9"], "9"),
        (["agent", "--peer-check", "never"], "one of strict, subnet, off"),
        (["demo", "--hosts", "1"], "--hosts"),
        ([], "Usage: flanctl"),
    ],
)
def test_wrong_words_are_usage_errors_and_write_nothing_to_stdout(words, says):
    answer = flanctl(*words)
    assert answer.code in {2, 6}, answer
    assert answer.out == ""
    assert says in answer.err


def test_options_may_stand_before_or_after_the_command(tmp_path):
    registry = f"sqlite:{tmp_path / 'r.db'}"
    before = flanctl("--endpoints", registry, "-w", "json", "net", "init", "--network", "10.0.0.0/16")
    after = flanctl("net", "get", "--endpoints", registry, "-w", "json")
    assert (before.code, after.code) == (0, 0)
    assert json.loads(before.out)["config"] == json.loads(after.out)["config"] == {"Network": "10.0.0.0/16"}


def test_errors_are_json_when_answers_are():
    answer = flanctl("subnets", "get", "nonsense", "-w", "json")
    error = json.loads(answer.err)["error"]
    assert (answer.out, error["exit"], error["id"]) == ("", 2, "usage")


def test_debug_shows_where_an_error_came_from():
    done = subprocess.run(
        [*program(), "subnets", "get", "x", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_closed_pipe_ends_quietly():
    script = f"{program()[0]} completion bash | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["version"], ["--help"], ["net", "--help"], ["nosuch"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_on_stdout_is_an_error(words, buffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*program(), *words],
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == (2 if words == ["nosuch"] else 1)
    assert ("No space left on device" in done.stderr) == (words != ["nosuch"])
    assert "Traceback" not in done.stderr
    assert "report" not in done.stderr


def test_a_closed_stderr_does_not_decide_what_is_written(tmp_path):
    """A warning that nobody reads must not turn into an exit code, nor keep the config from being written."""
    registry = f"sqlite:{tmp_path / 'r.db'}"
    for number, closing in enumerate(("2>&1 >/dev/null | true", "2>&-", "2>/dev/full")):
        words = f"{program()[0]} net init - --endpoints {registry} --prefix /p{number}"
        script = (
            f'echo \'{{"Network":"172.31.0.0/16","Foo":1}}\' | {words} {closing}; exit ${{PIPESTATUS[1]}}'
        )
        done = subprocess.run(
            ["bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, closing
        assert "172.31.0.0" in flanctl("net", "get", "--endpoints", registry, "--prefix", f"/p{number}").out


@pytest.mark.parametrize("words", ["version", "version -w json"])
@pytest.mark.parametrize(("closed", "code"), [("0<&-", 0), ("1>&-", 1), ("2>&-", 0)])
def test_closed_standard_streams_do_no_harm_and_a_lost_answer_is_no_success(closed, code, words):
    done = subprocess.run(
        ["bash", "-c", f"{program()[0]} {words} {closed}"],
        capture_output=True,
        text=True,
        check=False,
    )
    lost = "flanctl: cannot write the answer to standard output: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (code, lost if code else "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_what_their_shell_accepts(shell):
    answer = flanctl("completion", shell)
    assert (answer.code, answer.err) == (0, "")
    assert "_FLANCTL_COMPLETE" in answer.out
    if shutil.which(shell):
        check = subprocess.run([shell, "-n"], input=answer.out, capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stderr


def test_completion_answers_with_commands_and_options():
    ask = {"_FLANCTL_COMPLETE": "bash_complete", "COMP_WORDS": "flanctl subn", "COMP_CWORD": "1"}
    assert "plain,subnets" in flanctl(env=ask).out
    ask |= {"COMP_WORDS": "flanctl subnets ls --end", "COMP_CWORD": "3"}
    assert "plain,--endpoints" in flanctl(env=ask).out


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        ("flanctl subnets ls --api ", ["plain,auto", "plain,v2", "plain,v3"]),
        ("flanctl --dialect 0.2", ["plain,0.28"]),
        ("flanctl agent --peer-check s", ["plain,strict", "plain,subnet"]),
        ("flanctl subnets ls --cacert ", ["file,"]),
        ("flanctl agent --state-dir /va", ["dir,/va"]),
        ("flanctl config check -w s", ["plain,simple"]),
        ("flanctl config ch", ["plain,check"]),
    ],
)
def test_completion_of_values_comes_from_the_settings_table(words, answers):
    ask = {"_FLANCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert flanctl(env=ask).out.splitlines() == answers


def test_completion_knows_this_hosts_interfaces():
    ask = {"_FLANCTL_COMPLETE": "bash_complete", "COMP_WORDS": "flanctl agent --iface ", "COMP_CWORD": "3"}
    assert "plain,lo" in flanctl(env=ask).out.splitlines()


def test_version_in_every_form():
    assert re.fullmatch(r"flanctl \d+\.\d+\.\d+\n", flanctl("version").out)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", flanctl("version", "-w", "simple").out)
    assert json.loads(flanctl("version", "-w", "json").out)["schema"] == 1


def test_an_unexpected_failure_is_one_line_and_its_traceback_only_with_debug(tmp_path):
    (tmp_path / "flanctl.py").write_text("")
    script = (
        "import flanctl.commands.version as v, sys\n"
        "def boom(text): raise ZeroDivisionError('zero')\n"
        "v.output.data = boom\n"
        "from flanctl.cli import main\n"
        "sys.exit(main(['version']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("flanctl version: unexpected ZeroDivisionError: zero\ntry: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--etcd-endpoints"], ["--endpoints"]])
def test_flannelds_own_flags_mean_the_same(tmp_path, words):
    registry = f"sqlite:{tmp_path / 'r.db'}"
    assert (
        flanctl("net", "init", "--network", "10.0.0.0/16", *words, registry, "--etcd-prefix", "/x").code == 0
    )
    assert "10.0.0.0" in flanctl("net", "get", "--endpoints", registry, "--prefix", "/x").out


@pytest.mark.parametrize(
    "word", ["--ip-masq", "--ip-masq=true", "--ip-masq=false", "--iptables-forward-rules=false"]
)
def test_switches_take_gos_forms(word):
    """Only the endpoint is wrong here, so the switch was understood."""
    assert (
        "no endpoint given" in flanctl("agent", word, "--endpoints", ",").err
        or "CAP_NET_ADMIN" in flanctl("agent", word).err
    )


def test_a_switch_with_nonsense_is_a_usage_error():
    answer = flanctl("agent", "--ip-masq=maybe")
    assert answer.code in {2, 7}
    assert "--ip-masq" in answer.err or "CAP_NET_ADMIN" in answer.err

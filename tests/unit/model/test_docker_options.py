"""The option logic of mk-docker-opts.sh, and the shell's way of reading subnet.env."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.errors import Invalid, UsageError
from flanctl.model.docker_options import docker_options, read_variables
from tests.unit.model.vectors import load

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = [run for run in load("mk-docker-opts.json")["vectors"] if run["shell"] == "dash"]
"""dash is /bin/sh where flannel's units run; the other shells' oddities come with the script's own face."""

KNOWN_FLAGS = {"-f", "-d", "-i", "-c", "-m", "-k", "-ic", "-ci", "-cm", "-im", "-icm"}


def flags(run: dict[str, Any]) -> tuple[set[str], str | None]:
    """Letters given, and the argument of -k. What follows the first word that is no flag is ignored by getopts."""
    letters: set[str] = set()
    key = None
    words = iter(run["args"])
    for word in words:
        if not word.startswith("-"):
            break
        if word in ("-f", "-d", "-k"):
            argument = next(words, None)
            key = argument if word == "-k" else key
        letters.update(word[1:])
    return letters, key


def is_a_usage_error(run: dict[str, Any]) -> bool:
    return (
        "Illegal option" in run["stderr"]
        or "-?" in run["args"]
        or "requires an argument" in run["stderr"]
        or ("-h" in run["args"] or "No arg for" in run["stderr"])
    )


EXCLUDED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "usage: flags are the command's, not the logic's": is_a_usage_error,
    "the output file cannot be written: I/O is the command's": lambda run: "cannot create" in run["stderr"],
    "CR LF: the script passes the CR on into dockerd's options, we refuse the file": (
        lambda run: "\r" in (run["subnet_env"] or "")
    ),
    "a value with a blank: the script's word splitting writes a broken file, we keep the value whole": (
        lambda run: any(" " in value for name, value in run["process_env"].items() if "DOCKER_OPT_" in name)
    ),
    "a key that contains DOCKER_OPT_: the script takes its own variables for options, we refuse the key": (
        lambda run: "DOCKER_OPT_" in (flags(run)[1] or "")
    ),
}


def test_each_exclusion_excludes_something() -> None:
    for reason, excludes in EXCLUDED.items():
        assert any(map(excludes, RUNS)), reason


def _name(run: dict[str, Any]) -> str:
    return "-".join([run["version"], run["subnet_env_name"], *run["args"][4:], *run["process_env"]])


@pytest.mark.parametrize(
    "run", [run for run in RUNS if not any(excludes(run) for excludes in EXCLUDED.values())], ids=_name
)
def test_the_file_is_the_scripts(run: dict[str, Any]) -> None:
    """0.28.9's later exit code 1 for a route that exists already does not change the file."""
    letters, key = flags(run)
    read_file = "$TMP/subnet.env" in run["args"]
    variables = run["process_env"] | read_variables((read_file and run["subnet_env"]) or "")

    def made() -> str:
        return docker_options(
            variables,
            individual="i" in letters,
            combined="c" in letters,
            key=key or "DOCKER_OPTS",
            ip_masq="m" not in letters,
        )

    if run["file_content"] is None:
        assert "Invalid value of FLANNEL_IPMASQ" in run["stderr"]
        with pytest.raises(Invalid, match="FLANNEL_IPMASQ"):
            made()
    else:
        assert made() == run["file_content"]


NOTE = {
    "FLANNEL_NETWORK": "172.17.0.0/16",
    "FLANNEL_SUBNET": "172.17.41.1/24",
    "FLANNEL_MTU": "1472",
    "FLANNEL_IPMASQ": "false",
}


def combined(variables: dict[str, str], **how: Any) -> str:
    return docker_options(variables, individual=False, combined=True, **how)


def test_the_deployment_notes_file() -> None:
    assert combined(NOTE, key="DOCKER_NETWORK_OPTIONS") == (
        'DOCKER_NETWORK_OPTIONS=" --bip=172.17.41.1/24 --ip-masq=true --mtu=1472"\n'
    )


def test_a_value_with_a_blank_stays_whole() -> None:
    assert '"--label=a b"' in docker_options(
        NOTE | {"DOCKER_OPT_LABELS": "--label=a b"}, individual=True, combined=False
    )


def test_an_empty_option_leaves_its_blank() -> None:
    """As in the script, which appends ` $OPT_VALUE` whatever it is."""
    assert combined({"DOCKER_OPT_X": ""}) == 'DOCKER_OPTS=" "\n'


def test_what_no_shell_would_have_as_a_variable_is_no_option() -> None:
    assert combined({"DOCKER_OPT_A-B": "x", "1DOCKER_OPT_": "y"}) == 'DOCKER_OPTS=""\n'


@pytest.mark.parametrize("value", ['"', "$(reboot)", "`reboot`", "\\", "a\nb", "a\tb", "\x7f", "\udcff"])
@pytest.mark.parametrize("name", ["FLANNEL_SUBNET", "FLANNEL_MTU", "DOCKER_OPT_X", "DOCKER_OPTS"])
def test_a_value_that_would_break_out_of_the_quotes_is_refused(name: str, value: str) -> None:
    with pytest.raises(Invalid, match="cannot carry"):
        combined(NOTE | {name: value})


@pytest.mark.parametrize("key", ["", "A B", "1A", "A=B", 'A"', "DOCKER_OPT_ALL", "MY_DOCKER_OPT_", "A\n"])
def test_a_key_that_is_no_variable_name_is_a_usage_error(key: str) -> None:
    with pytest.raises(UsageError):
        combined(NOTE, key=key)


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("", {}),
        ("\n\n  # nothing\n\t#\n", {}),
        ("A=1\nB=2\nA=3\n", {"A": "3", "B": "2"}),
        ("A=1 B=2 # both\n", {"A": "1", "B": "2"}),
        ("export A=1\n  export\tB=2\n", {"A": "1", "B": "2"}),
        ("A=\n", {"A": ""}),
        ("A=x#y\n", {"A": "x#y"}),
        ("A='a b'\"c d\"e\\ f\n", {"A": "a bc de f"}),
        ('A="\\"\\\\\\n\\$"\n', {"A": '"\\\\n$'}),
        ("A='\\'\n", {"A": "\\"}),
        ("A='$x `y` ~'\n", {"A": "$x `y` ~"}),
        ("A=ä\t\n", {"A": "ä"}),
        ("A=b=c\n", {"A": "b=c"}),
    ],
)
def test_quotes_and_comments_are_the_shells(text: str, variables: dict[str, str]) -> None:
    assert read_variables(text) == variables


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A=1\r\n", "line 1: Windows line end (CR LF)"),
        ("A=1\nB=2\r\n", "line 2: Windows line end (CR LF)"),
        ("A=1\nFLANNEL_SUB", "line 2: no newline at the end, the file is half-written"),
        ("A=1\nFLANNEL_MTU=14", "line 2: no newline at the end, the file is half-written"),
        ("A=1\nreboot\n", "line 2: 'reboot' is not an assignment like NAME=value"),
        ("A = 1\n", "line 1: 'A = 1' is not an assignment"),
        ("1A=1\n", "is not an assignment"),
        ("A=1; reboot\n", "A contains ';', which only a shell can understand"),
        ("A=$(reboot)\n", "A contains '$'"),
        ('A="$B"\n', "A contains '$'"),
        ("A=`reboot`\n", "A contains '`'"),
        ("A=~/x\n", "A contains '~'"),
        ("A='x\n", "the quote in A is not closed"),
        ('A="x\n', "the quote in A is not closed"),
        ("A=x\\\nB=2\n", "A goes on in the next line"),
        ("A='\0'\n", "A contains the control character '\\x00'"),
        ("A=\x1b[2J\n", "A contains the control character '\\x1b'"),
        (b"A=1\nB=\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("A=" + "1" * 70_000 + "\n", "70003 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_needs_a_shell_is_refused_with_its_line(text: bytes | str, says: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_variables(text)
    assert str(caught.value).startswith("subnet.env ")
    assert says in str(caught.value)


ENV_TEXT = st.lists(
    st.sampled_from(
        [
            "A=",
            "B=",
            "export ",
            "x",
            "1.2/3",
            "'",
            '"',
            "\\",
            " ",
            "\t",
            "\n",
            "#",
            "=",
            "~",
            ":",
            "*",
            "ä",
            "$",
            ";",
        ]
    ),
    max_size=14,
).map(lambda parts: "".join(parts) + "\n")


@given(ENV_TEXT)
@settings(max_examples=200, deadline=None)
def test_what_is_read_is_what_sh_would_have(text: str) -> None:
    try:
        variables = read_variables(text)
    except Invalid:
        return
    script = f'unset A B; {text}\nprintf "%s|%s|" "${{A-unset}}" "${{B-unset}}"'
    shell = subprocess.run(["sh", "-c", script], capture_output=True, check=True, text=True, env={})
    assert shell.stdout == f"{variables.get('A', 'unset')}|{variables.get('B', 'unset')}|"


@given(st.binary(max_size=100) | st.text(max_size=100))
def test_arbitrary_text_is_at_most_invalid(text: bytes | str) -> None:
    try:
        variables = read_variables(text)
    except Invalid:
        return
    assert all(name.isidentifier() for name in variables)


@given(
    st.dictionaries(
        st.sampled_from(["FLANNEL_SUBNET", "FLANNEL_IPMASQ", "DOCKER_OPT_Z", "DOCKER_OPTS"]), st.text()
    )
)
def test_a_file_that_is_made_reads_back(variables: dict[str, str]) -> None:
    try:
        text = docker_options(variables, individual=True, combined=True)
    except Invalid:
        return
    assert "DOCKER_OPTS" in read_variables(text)

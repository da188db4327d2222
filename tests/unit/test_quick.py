"""`flanctl subnets ls` understood without click: as click understands it, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl import quick
from flanctl.commands.options import flags_of
from flanctl.commands.subnets import ls
from tests.support.cli import flanctl

NAMES = sorted(quick.NAMES)
VALUES = [
    "",
    "-",
    "--",
    "-w",
    "x",
    "a=b",
    "=",
    "json",
    "simple",
    "table",
    "http://127.0.0.1:1",
    "--prefix",
    "0",
    "é",
]
WORDS = st.one_of(
    st.sampled_from([*NAMES, *VALUES, "--help", "-h", "--debug", "-wjson", "--write", "--endp"]),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
)


def by_click(words):
    """What the command itself makes of them, or the error it would show."""
    try:
        with ls.make_context("ls", list(words)) as context:
            return dict(flags_of(context))
    except (click.ClickException, click.exceptions.Exit) as error:
        return type(error).__name__


@given(st.lists(WORDS, max_size=6))
def test_what_it_understands_click_understands_alike(words):
    found = quick.flags(words)
    if found is None:
        return
    form = found.get(quick.WRITE_OUT.name, "table")
    if form not in quick.WRITE_OUT.choices:
        return  # left to click
    assert by_click(words) == found


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-w", "json"],
        ["--prefix=/p", "--write-out", "simple"],
        ["--etcd-prefix", "/p", "--timeout", "2s"],
    ],
)
def test_the_plain_forms_are_understood(words):
    assert quick.flags(words) == by_click(words)


@pytest.mark.parametrize(
    "words", [["--help"], ["x"], ["--debug"], ["-wjson"], ["--prefix"], ["--prefix", "-x"], ["--prefi", "/p"]]
)
def test_what_is_not_plain_is_left_to_click(words):
    assert quick.flags(words) is None


@pytest.mark.parametrize("words", [[], ["-w", "simple"], ["-w", "json"], ["-w", "xml"], ["-w", ""]])
@pytest.mark.parametrize("prefix", ["/jxdd/network", "/empty", "relative"])
def test_both_ways_print_the_same_and_end_alike(tmp_path, words, prefix):
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    assert flanctl("net", "init", "--network", "172.31.0.0/16", "--endpoints", registry).code == 0
    told = {"FLANCTL_ENDPOINTS": registry, "FLANCTL_PREFIX": prefix}
    plain = flanctl("subnets", "ls", *words, env=told)
    slow = flanctl("--prefix", prefix, "subnets", "ls", *words, env=told)

    def timeless(answer):
        if '"as_of"' in answer.out:
            return {**json.loads(answer.out), "as_of": None}
        return answer.out

    assert (plain.code, timeless(plain), plain.err) == (slow.code, timeless(slow), slow.err)


def test_click_is_not_imported_for_it(tmp_path):
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    assert flanctl("net", "init", "--network", "172.31.0.0/16", "--endpoints", registry).code == 0
    script = (
        "import sys; from flanctl import entry;"
        f"code = entry.run(['flanctl', 'subnets', 'ls', '-w', 'simple', '--endpoints', {registry!r}]);"
        "print(code, 'click' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0 False\n", "")


def test_a_warning_is_heard_by_both_ways(tmp_path):
    """A password on the command line: everyone on the host reads it."""
    registry = f"sqlite:{tmp_path / 'registry.db'}"
    assert flanctl("net", "init", "--network", "172.31.0.0/16", "--endpoints", registry).code == 0
    words = ["--user", "root:x", "-w", "simple"]
    plain = flanctl("subnets", "ls", *words, "--endpoints", registry)
    slow = flanctl("--endpoints", registry, "subnets", "ls", *words)
    assert plain == slow
    assert plain.err.startswith("warning: ")

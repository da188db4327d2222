"""EnvironmentFile= and $FLANNEL_OPTIONS, read as systemd 252 and 257 read them (tests/vectors/environment-file.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flanctl.environment_file import Entry, Unreadable, environment, parse, quoted, split
from tests.support.fuzz import fuzzed

RECORDED = json.loads((Path(__file__).parents[1] / "vectors" / "environment-file.json").read_text())
CASES = {case["name"]: case for case in RECORDED["cases"]}
PIECES = st.sampled_from(
    ["A", "B1", "=", " ", "\t", "\n", "\r", "\\", '"', "'", "#", ";", "$", "`", "é", "\ufeff", "\0"]
)
FILES = st.lists(PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode())


def content(case) -> bytes:
    return bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode()


def ours(content: bytes, **how):
    try:
        found = {entry.name: entry.text or "" for entry in parse(content, **how) if entry.counts}
    except Unreadable:
        return {"variables": None, "words": []}
    return {"variables": found, "words": split(found.get("FLANNEL_OPTIONS", ""))}


@pytest.mark.parametrize("name", CASES)
def test_a_file_means_what_systemd_says_it_means(name):
    case = CASES[name]
    assert ours(content(case)) == {"variables": case["variables"], "words": case["words"]}
    if case["variables"] is not None:
        assert environment(content(case)) == case["variables"]


@pytest.mark.parametrize("name", CASES)
def test_an_older_systemd_differs_only_behind_a_comment_that_ends_in_a_backslash(name):
    case = CASES[name]
    older = case.get("but", {}).get("252", {"variables": case["variables"], "words": case["words"]})
    assert ours(content(case), old_comments=True) == older


def test_enough_was_recorded_and_from_both():
    assert len(CASES) >= 60
    assert RECORDED["systemd"] == [252, 257]


@fuzzed
@given(FILES | st.binary(max_size=60))
def test_no_file_raises_anything_but_its_own_error(content):
    try:
        entries = parse(content)
    except Unreadable as error:
        assert str(error)
        assert 0 <= error.line <= content.count(b"\n") + 1
    else:
        lines = content.count(b"\n") + 1
        assert all(1 <= entry.line <= lines and 0 <= entry.unclosed <= lines for entry in entries)
        assert [entry.line for entry in entries] == sorted(entry.line for entry in entries)


@given(
    st.text(st.sampled_from("ab '\"\\$`\t\n\r#;=é"), max_size=30)
    | st.text(st.characters(codec="utf-8"), max_size=30)
)
@example("\ufffe")
def test_what_is_quoted_reads_back_the_same(text):
    try:
        assert environment(f"A={quoted(text)}\nB=2\n".encode()) == {"A": text, "B": "2"}
    except Unreadable:
        assert "\0" in text or any(
            ord(each) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(each) < 0xFDF0 for each in text
        )


@given(st.lists(st.text(st.sampled_from("ab '\"\\$\t\né"), max_size=8), max_size=6))
def test_words_that_are_quoted_split_into_the_same_words(words):
    line = " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
    assert split(line) == words


@fuzzed
@given(st.text(max_size=60))
def test_splitting_loses_nothing_but_blanks_quotes_and_backslashes(text):
    def kept(text):
        return [char for char in text if char not in " \t\n\r'\"\\"]

    assert kept("".join(split(text))) == kept(text)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("\n# c\nA='1\n2'\n", Entry(3, "A", "1\n2")),
        ("A\n", Entry(1, "A")),
        ("\nA=1 \\\n'2\n", Entry(2, "A", "1 '2")),
        ("A=\n\nB='x\n\"y\n", Entry(3, "B", 'x\n"y\n', unclosed=3)),
        ('A="1\n2" \\\n3', Entry(1, "A", "1\n23", beside=True)),
        ("A='1' '2'", Entry(1, "A", "12", beside=True)),
        ("A='1'\\\n", Entry(1, "A", "1")),
    ],
)
def test_an_entry_knows_its_line_and_what_is_odd_about_its_quotes(text, entry):
    assert parse(text.encode())[-1] == entry

"""Go's flag grammar against a small oracle: the rules of flag.FlagSet.parseOne and strconv, written down once more."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.go_flags import BadFlag, Given, boolean, flags_in, integer

SWITCHES = {"b", "ip-masq"}
WORD = st.text(st.sampled_from("-=abx1 "), max_size=6) | st.sampled_from(
    ["--", "-", "-b", "--b", "-b=false", "-ip-masq", "-x", "--x=1", "-x=", "true", "---x", "-=1", "--=", ""]
)


def oracle(words: list[str]) -> tuple[list[tuple[str, str | None]], list[str] | str]:
    """The flags and the rest, or the word that Go calls bad syntax; recursive where flags_in is a loop."""
    if not words or not re.match(r"-.", words[0], re.DOTALL):
        return [], words
    if words[0] == "--":
        return [], words[1:]
    shape = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", words[0], re.DOTALL)
    if shape is None:
        return [], words[0]
    name, text = shape[1], shape[2]
    used = 1
    if text is None and name not in SWITCHES and len(words) > 1:
        text, used = words[1], 2
    flags, rest = oracle(words[used:])
    return [(name, text), *flags], rest


@given(st.lists(WORD, max_size=7))
def test_words_are_taken_apart_as_go_does(words: list[str]) -> None:
    flags, rest = oracle(list(words))
    taken: list[tuple[str, str | None]] = []
    left = list(words)
    try:
        taken.extend((flag.name, flag.text) for flag in flags_in(left, SWITCHES))
    except BadFlag as error:
        assert isinstance(rest, str)
        assert str(error) == f"bad flag syntax: {rest}"
    else:
        assert left == rest
    assert taken == flags if isinstance(rest, list) else taken == flags[: len(taken)]


def test_a_value_may_look_like_a_flag_and_a_switch_takes_no_word() -> None:
    words = ["-iface", "-b", "--ip-masq", "true", "-x"]
    assert list(flags_in(words, SWITCHES)) == [Given("iface", "-b"), Given("ip-masq", None)]
    assert words == ["true", "-x"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("5", 5), ("-5", -5), ("+5", 5), ("010", 8), ("0o10", 8), ("0x1F", 31), ("0b11", 3), ("1_000", 1000),
        ("0_7", 7), ("0x_f", 15), ("00", 0), ("-0x10", -16), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_integers_are_gos(text: str, number: int) -> None:
    assert integer(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 5",
        "5 ",
        "08",
        "5s",
        "1.0",
        "1e3",
        "--5",
        "+-5",
        "_1",
        "1_",
        "1__0",
        "0x",
        "0_",
        "０",
        "9223372036854775808",
        "x",
    ],
)
def test_what_go_does_not_take_for_a_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"parse error|out of range"):
        integer(text)


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_int64_reads_back_in_every_base(number: int) -> None:
    sign, size = ("-" if number < 0 else ""), abs(number)
    for text in (str(number), f"{sign}{size:#x}", f"{sign}{size:#o}", f"{sign}{size:#b}", f"{sign}0{size:o}"):
        assert integer(text) == number


def test_booleans_are_gos() -> None:
    assert all(boolean(text) for text in ("1", "t", "T", "true", "TRUE", "True"))
    assert not any(boolean(text) for text in ("0", "f", "F", "false", "FALSE", "False"))
    for text in ("", "yes", "on", "tRUE", " true", "2"):
        with pytest.raises(ValueError, match="parse error"):
            boolean(text)

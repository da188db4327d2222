"""The scanner takes exactly RFC 8259, says where it stops, and writes what Go writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanctl.model import json_text
from flanctl.model.json_text import JsonError, Number, plain, quote, show, write

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


def read(text: bytes | str) -> Any:
    return plain(json_text.parse(text, name="t")[2])


@given(VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert read(write(value, short_escapes=True)) == value
    assert read(write(value, short_escapes=False)) == value


@given(VALUES, st.booleans())
def test_any_json_of_the_standard_library_is_read_the_same(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1)
    assert read(text) == json.loads(text)


@given(VALUES)
def test_compact_text_keeps_its_bytes(value: Any) -> None:
    text = json.dumps(value, separators=(",", ":"))
    for mark in "<>&":  # these Go never leaves as they are
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    assert write(read(text), short_escapes=True) == text


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0123456789abcdefnultrs \n', max_size=60))
def test_anything_else_is_a_json_error(text: bytes | str) -> None:
    try:
        value = read(text)
    except JsonError as error:
        assert error.line >= 1
        assert error.column >= 1
        assert str(error).startswith(f"t line {error.line}, column {error.column}: ")
    else:
        assert write(value, short_escapes=True)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


@given(st.text(alphabet='{}[]",:\\u0/bdEe+-.truefalsn \n\t\x00', max_size=40))
@settings(max_examples=200)
def test_it_refuses_what_the_standard_library_refuses(text: str) -> None:
    """Except that we also refuse NaN, half surrogate pairs and numbers beyond a double."""
    try:
        json.loads(text, parse_constant=_refuse)
    except ValueError:
        with pytest.raises(JsonError):
            read(text)


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("", (1, 1), "empty"),
        (" \n\t", (2, 2), "empty"),
        ("{", (1, 2), "a key in double quotes is expected, found end of text"),
        ('{"a":1,}', (1, 7), "',' before '}' is one too many"),
        ("[1,]", (1, 3), "',' before ']' is one too many"),
        ('{"a" 1}', (1, 6), "':' is expected after the key"),
        ('{\n "a": 1\n "b": 2\n}', (3, 2), "',' or '}' is expected, found"),
        ("{'a': 1}", (1, 2), "a key in double quotes is expected"),
        ("['a']", (1, 2), "not single ones"),
        ("[a]", (1, 2), 'a" is not a JSON value'),
        ("True", (1, 1), "must be written true"),
        ("[NaN]", (1, 2), "NaN"),
        ("[-Infinity]", (1, 2), "a value is expected"),
        ("[1e999]", (1, 2), "too large"),
        ("[" + "9" * 5000 + "]", (1, 2), "too large"),
        ("[01]", (1, 3), "',' or ']' is expected"),
        ("[1] // why", (1, 5), "after the end"),
        ("// why", (1, 1), "no comments"),
        ('"a', (1, 1), "not closed"),
        ('"a\nb"', (1, 3), "control character U+000A"),
        ('"a\0b"', (1, 3), "control character U+0000"),
        ('"\\x41"', (1, 2), "is not a JSON escape"),
        ('"\\u12"', (1, 2), "four hexadecimal digits"),
        ('"\\u+123"', (1, 2), "four hexadecimal digits"),
        ('"ab\\ud800"', (1, 4), "half of a surrogate pair"),
        ('"\\ud800\\ud800"', (1, 2), "half of a surrogate pair"),
        ('"\ud800"', (1, 2), "half of a surrogate pair"),
        ("\ufeff{}", (1, 1), "byte order mark"),
        (b"\xef\xbb\xbf{}", (1, 1), "byte order mark"),
        ("{}".encode("utf-16"), (1, 1), "UTF-16"),
        (b'{"\xc3\xa4\xff": 1}', (1, 4), "byte 0xff is not UTF-8"),
        ("[" * 10_000, (1, 65), "64 levels of nesting"),
        ('{"a":' * 10_000, (1, 1 + 5 * 64), "64 levels of nesting"),
        ("[" * 65 + "]" * 65, (1, 65), "64 levels of nesting"),
        (" " * 10_000_000, (1, 1), "10000000 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_error_says_what_and_where(text: bytes | str, where: tuple[int, int], says: str) -> None:
    with pytest.raises(JsonError) as caught:
        read(text)
    assert (caught.value.line, caught.value.column) == where
    assert says in str(caught.value)


def test_what_is_nested_less_is_read() -> None:
    assert read("[" * 64 + "]" * 64)


@pytest.mark.parametrize("text", ["1e3", "0.10", "-0", "1E+2", "123456789" * 34])
def test_a_number_keeps_its_spelling(text: str) -> None:
    value = read(text)
    assert isinstance(value, Number)
    assert write(value, short_escapes=True) == text
    assert value == float(text)
    assert value != read("7.0")


@pytest.mark.parametrize("text", ['"\\u0041"', '"\\/"', '"\\ud83d\\ude00"', '"\\u0008"', '{"\\u0041":1}'])
def test_a_string_keeps_its_spelling(text: str) -> None:
    assert write(read(text), short_escapes=True) == text
    assert read(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<a&b>", r'"\u003ca\u0026b\u003e"'),
        ("\u2028\u2029", r'"\u2028\u2029"'),
        ('"\\', r'"\"\\"'),
        ("\n\r\t", r'"\n\r\t"'),
        ("\0\x1f\x7f", '"\\u0000\\u001f\x7f"'),
        ("ä中😀/", '"ä中😀/"'),
        ("\ufeff\ud800x\udc00", '"\ufeff\ufffdx\ufffd"'),
    ],
)
def test_strings_are_escaped_as_go_does(text: str, written: str) -> None:
    assert quote(text, short_escapes=True) == written
    assert quote(text, short_escapes=False) == written


def test_backspace_and_form_feed_got_a_short_form_in_go_1_22() -> None:
    assert quote("\b\f", short_escapes=True) == r'"\b\f"'
    assert quote("\b\f", short_escapes=False) == r'"\u0008\u000c"'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_has_no_form_for_is_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        write(value, short_escapes=True)


@given(st.text())
def test_foreign_text_in_an_error_cannot_touch_the_terminal(text: str) -> None:
    shown = show(text)
    assert shown.isprintable()
    assert len(shown) <= 40 * 10 + 2

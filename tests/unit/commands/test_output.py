"""How answers look."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanctl.commands import output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "never"),
        (-3, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h"),
        (81660, "22h41m"),
        (86400, "24h"),
        (172800, "2d"),
        (187200, "2d4h"),
    ],
)
def test_ages(seconds, text):
    assert output.age(seconds) == text


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_no_value_breaks_a_line_or_steers_the_terminal(cells):
    import io
    from contextlib import redirect_stdout

    stream = io.StringIO()
    with redirect_stdout(stream):
        output.simple([cells])
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\t") == len(cells) - 1
    assert "\x1b" not in text

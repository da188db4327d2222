"""How answers look."""

from __future__ import annotations

import io
import sys

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
    from contextlib import redirect_stdout

    stream = io.StringIO()
    with redirect_stdout(stream):
        output.simple([cells])
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\t") == len(cells) - 1
    assert "\x1b" not in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def seconds(monkeypatch):
    """A clock in a list."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_progress_on_a_terminal_is_one_line_after_a_second_and_leaves_none(monkeypatch, seconds):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with output.Progress("asking") as progress:
        progress(1, 20)
        assert stream.getvalue() == ""
        seconds[0] = 1.0
        progress(5, 20)
        progress(6, 20)
        seconds[0] = 1.2
        progress(7, 20)
    assert stream.getvalue() == "\r\x1b[Kasking: 5 of 20\r\x1b[Kasking: 7 of 20\r\x1b[K"


def test_progress_in_a_log_is_a_line_after_ten_seconds_and_each_half_minute(monkeypatch, seconds):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with output.Progress("asking") as progress:
        for now in range(75):
            seconds[0] = float(now)
            progress(now, 75)
    assert stream.getvalue() == "asking: 10 of 75\nasking: 40 of 75\nasking: 70 of 75\n"


def test_quick_work_says_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with output.Progress("asking") as progress:
        progress(20, 20)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("use", [output.flush, output.refuse_without_reader])
def test_a_stdout_that_the_parent_closed_is_an_error_of_the_system(use, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        use()

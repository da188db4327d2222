"""A stop is asked for once, however often it is said."""

from __future__ import annotations

import os
import signal

import pytest

from flanctl.agent.messages import Stop
from flanctl.agent.signals import Signals, StopRequested


def test_a_second_signal_does_not_break_into_the_stop_that_the_first_began():
    """While the start waits for the registry a stop is an exception; what cleans up behind it must not get another."""
    posted = []
    signals = Signals(posted.append)
    cleaned = False
    with signals.handled(), pytest.raises(StopRequested), signals.waiting():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned = True
    assert cleaned
    assert [type(each) for each in posted] == [Stop, Stop]
    assert signals.stop_reason == "SIGINT"

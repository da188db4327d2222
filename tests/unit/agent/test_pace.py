"""A burst goes through at once, a storm at its pace, and calm fills the bucket again."""

from __future__ import annotations

from flanctl.agent.pace import Pace
from tests.support.clock import FakeClock


def taken(pace: Pace, clock: FakeClock, seconds: float, step: float = 0.01) -> int:
    """How many are let through in so many seconds by who wants one at every step."""
    count, end = 0, clock.now() + seconds
    while clock.now() < end - step / 2:
        if pace.due() <= clock.now():
            pace.take()
            count += 1
        clock.advance(step)
    return count


def test_a_burst_is_let_through_at_once_and_no_more_than_that():
    clock = FakeClock()
    pace = Pace(clock, burst=20, seconds=0.5)
    for _ in range(20):
        assert pace.due() <= clock.now()
        pace.take()
    assert pace.due() == clock.now() + 0.5


def test_a_storm_goes_at_the_pace():
    clock = FakeClock()
    pace = Pace(clock, burst=20, seconds=0.5)
    taken(pace, clock, 1.0)
    assert 19 <= taken(pace, clock, 10.0) <= 21


def test_calm_earns_the_next_burst_but_never_a_larger_one():
    clock = FakeClock()
    pace = Pace(clock, burst=20, seconds=0.5)
    taken(pace, clock, 1.0)
    clock.advance(3600.0)
    for _ in range(20):
        assert pace.due() <= clock.now()
        pace.take()
    assert pace.due() > clock.now()

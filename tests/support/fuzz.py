"""Property tests that go on for as long as there is time.

    @fuzzed
    @given(st.binary())
    def test_no_value_does_harm(value): ...

In `make test` such a test runs once, with hypothesis' usual hundred examples. `make fuzz` gives all of them together
`FLANCTL_FUZZ_SECONDS`: each draws anew, from new seeds, until its share is over.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = float(os.environ.get("FLANCTL_FUZZ_SECONDS", "0"))
_all: list[str] = []
"""Of all modules that were collected: whoever fuzzes shares the time with them."""


def fuzzed(test: Callable[[], None], *, examples: int = 100) -> Callable[[], None]:
    """Marks a `@given` test without other arguments; slow ones draw fewer `examples` a turn."""
    # A shared machine stops for longer than a deadline, sooner or later in ten minutes.
    test = settings(deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])(test)

    def again_and_again() -> None:
        end = time.monotonic() + SECONDS / len(_all)
        test()
        while time.monotonic() < end:
            test()

    again_and_again.__name__ = test.__name__
    again_and_again.__doc__ = test.__doc__
    again_and_again.__module__ = test.__module__
    _all.append(test.__name__)
    marked: Callable[[], None] = pytest.mark.fuzz(again_and_again)
    return marked

"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(condition: Callable[[], T], *, seconds: float = 10.0, fail: bool = True, what: str = "") -> T:
    """The first true answer of `condition`, looked at every 20 ms; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            if fail:
                raise AssertionError(f"not so within {seconds} s: {what or condition}")
            return answer
        time.sleep(0.02)

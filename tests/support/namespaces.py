"""A network namespace for the running thread, gone at the end of the block.

Python 3.11 has no os.unshare and os.setns. Only this thread moves: sockets it opens, /proc/thread-self and programs
it starts belong to the new namespace, the rest of the process stays where it was.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def new_namespace() -> Iterator[None]:
    """An empty one: only a loopback, down."""
    with _back_home():
        _checked(_libc.unshare(CLONE_NEWNET))
        yield


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """One that exists, such as a lab's host's."""
    with _back_home():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(fd, CLONE_NEWNET))
        finally:
            os.close(fd)
        yield


@contextmanager
def _back_home() -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _checked(_libc.setns(home, CLONE_NEWNET))
        os.close(home)

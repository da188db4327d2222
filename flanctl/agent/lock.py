"""One agent per run directory, held by a lock that the kernel lets go of with the process."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flanctl.errors import Conflict, NotFound, NotPermitted
from flanctl.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """One agent per run directory. Raises Conflict naming the other, NotPermitted, NotFound."""
    path = run_dir / "agent.lock"
    try:
        make_directory(run_dir)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise NotFound(f"cannot make {run_dir}: there is no directory {run_dir.parent}") from None
    except OSError as error:
        raise NotPermitted(f"cannot lock {path}: {error.strerror}", hint="run as root") from None
    try:
        _take_lock(handle, path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # The kernel lets go of the lock with the descriptor, also after SIGKILL; the file may stay.
        os.close(handle)


def refuse_locked(run_dir: Path) -> None:
    """Raise Conflict when another agent holds the run directory's lock; leaves nothing behind."""
    path = run_dir / "agent.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # no agent has run here yet; whether we may make the file shows when we do
    try:
        _take_lock(handle, path)
    finally:
        os.close(handle)


def _take_lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "?"
        raise Conflict(
            f"another flanctl agent runs on this host (pid {holder}, {path})",
            hint="stop it first",
            id="already-running",
        ) from None

"""Files that others read while we write them: whole or not at all, and still there after power loss."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` in one step, on disk when this returns.

    The last directory is made if it is missing (/run/flannel is, after each boot); a longer missing path is more
    likely a slip of the pen and an error. A symbolic link stays one and its target is replaced; a device or pipe is
    refused, because a rename would put a file in its place (`-d /dev/full` as root). Raises NotFound, NotPermitted,
    Invalid, or FlanctlError for a full disk.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Invalid(f"cannot write {path}: it is a device or pipe, not a file", id="not-a-file")
    folder = path.parent
    try:
        make_directory(folder)
        handle, temporary = tempfile.mkstemp(prefix=_temporary(path), dir=folder)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _sync_directory(folder)
    except OSError as error:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise _cannot_write(path, error) from None


def sweep(path: Path) -> None:
    """Remove what a process that was killed in `write_atomically(path)` has left beside it."""
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(_temporary(path) + "*"):
        leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """How the names of our unfinished files begin: nobody else's `.subnet.env.bak` does."""
    return f".{path.name}.flanctl-"


def make_directory(folder: Path) -> None:
    """Make the last level of `folder` if it is missing, on disk when this returns. Raises OSError."""
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError:
        return
    _sync_directory(folder.parent)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> FlanctlError:
    if isinstance(error, FileNotFoundError):
        return NotFound(
            f"cannot write {path}: there is no directory {path.parent}", hint=f"mkdir -p {path.parent}"
        )
    if isinstance(error, PermissionError) or error.errno == 30:  # EROFS
        return NotPermitted(f"cannot write {path}: {error.strerror}")
    return FlanctlError(f"cannot write {path}: {error.strerror}", id="cannot-write")

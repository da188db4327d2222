"""Files that others read while we write them: whole or not at all, and still there after power loss."""

from __future__ import annotations

import os

from flanctl.errors import FlanctlError, Invalid, NotFound, NotPermitted

TYPE_CHECKING = False  # mk-docker-opts.sh comes through here: neither typing nor pathlib at its start
if TYPE_CHECKING:
    from pathlib import Path


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` in one step, on disk when this returns.

    The last directory is made if it is missing (/run/flannel is, after each boot); a longer missing path is more
    likely a slip of the pen and an error. A symbolic link stays one and its target is replaced; a device or pipe is
    refused, because a rename would put a file in its place (`-d /dev/full` as root). Raises NotFound, NotPermitted,
    Invalid, or FlanctlError for a full disk.
    """
    real = type(path)(os.path.realpath(path))
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise Invalid(f"cannot write {real}: it is a device or pipe, not a file", id="not-a-file")
    try:
        make_directory(real.parent)
        replace_file(str(real), content, mode=mode)
    except OSError as error:
        raise _cannot_write(real, error) from None


def replace_file(path: str, content: bytes, *, mode: int) -> None:
    """Put a new file in the place of `path` (no symbolic link), whole and on disk. Raises OSError; then nothing changed."""
    temporary = unfinished(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _sync_directory(os.path.dirname(path) or ".")
    except OSError:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise


def sweep(path: Path) -> None:
    """Remove what a process that was killed in `write_atomically(path)` has left beside it."""
    remove_unfinished(type(path)(os.path.realpath(path)))


def remove_unfinished(path: Path) -> None:
    """The same for a path that is not followed if it is a link."""
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for leftover in names:
        if leftover.startswith(_temporary(name)):
            try:
                os.unlink(os.path.join(folder, leftover))
            except FileNotFoundError:
                pass


def unfinished(path: Path | str) -> str:
    """A new name beside `path` for what is to be renamed to it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f"{_temporary(name)}{os.urandom(6).hex()}")


def _temporary(name: str) -> str:
    """How the names of our unfinished files begin: nobody else's `.subnet.env.bak` does."""
    return f".{name}.flanctl-"


def make_directory(folder: Path) -> None:
    """Make the last level of `folder` if it is missing, on disk when this returns. Raises OSError."""
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError:
        return
    _sync_directory(str(folder.parent))


def _sync_directory(folder: str) -> None:
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

"""A file's place below a root: what is there, and putting something else there in one step.

A place is a path as the host knows it (`/usr/bin/flanneld`); the root is `/`, or the folder a tree lies in. Links are
never followed at a place itself; the folders above it may be links, as long as they stay below the root.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flanctl.errors import Invalid, NotPermitted
from flanctl.files import replace_file, unfinished

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class State:
    """What stands at a place. `text` is a link's target or the SHA-256 of a file's content."""

    kind: str
    """absent, link or file."""
    text: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Raises TypeError for what `document()` has not made."""
        return cls(**document)

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return {"absent": "nothing", "link": f"a link to {self.text}", "file": "a file"}[self.kind]


ABSENT = State("absent")


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link that is wanted."""

    target: str

    @property
    def state(self) -> State:
        return State("link", self.target)


@dataclass(frozen=True, slots=True)
class File:
    """A file that is wanted, root's."""

    content: bytes
    mode: int = 0o644

    @property
    def state(self) -> State:
        return State("file", hashlib.sha256(self.content).hexdigest(), self.mode)


Wanted = Link | File


class Root:
    """The root all places are below."""

    def __init__(self, folder: Path) -> None:
        """Raises Invalid where there is no such folder."""
        if not folder.is_dir():
            raise Invalid(f"{folder} is not a directory", id="not-a-directory")
        self.folder = folder.resolve()
        self.is_host = self.folder == Path("/")

    def path(self, place: str) -> Path:
        """Where a place is for us. Raises Invalid for one that a link above it leads out of the root, or in a circle."""
        path = self.folder / place.lstrip("/")
        try:
            parent = path.parent.resolve(strict=False)
        except (OSError, RuntimeError):  # Python 3.11 says RuntimeError for a circle, newer ones OSError
            raise Invalid(f"{path.parent} is a link that leads in a circle", id="link-circle") from None
        if not parent.is_relative_to(self.folder):
            raise Invalid(f"{path.parent} leads out of {self.folder}, to {parent}", id="outside-root")
        return parent / path.name

    def look(self, place: str) -> State:
        """Raises Invalid for a folder, device or pipe, NotPermitted for what must not be read."""
        path = self.path(place)
        try:
            about = os.lstat(path)
            if stat.S_ISLNK(about.st_mode):
                return State("link", os.readlink(path))
            if stat.S_ISREG(about.st_mode):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                return State("file", digest, stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid)
        except (FileNotFoundError, NotADirectoryError):
            return ABSENT
        except OSError as error:
            raise NotPermitted(f"cannot read {path}: {error.strerror}") from None
        raise Invalid(f"{path} is neither a file nor a link", hint=f"move {path} away first", id="not-a-file")

    def put(self, place: str, wanted: Wanted) -> None:
        """Whole or not at all, on disk when this returns. The folder is there. Raises OSError."""
        path = self.path(place)
        if isinstance(wanted, File):
            replace_file(str(path), wanted.content, mode=wanted.mode)
            return
        new = unfinished(path)
        os.symlink(wanted.target, new)
        os.rename(new, path)

    def restore(self, place: str, before: State, backup: Path | None) -> None:
        """Put back what `before` says: nothing, a link, or the file whose copy `backup` is, with everything about it."""
        path = self.path(place)
        if before.kind == "absent":
            path.unlink(missing_ok=True)
        elif before.kind == "link":
            self.put(place, Link(before.text))
        else:
            assert backup is not None
            new = unfinished(path)
            copy_whole(backup, Path(new))
            os.rename(new, path)


def copy_whole(source: Path, target: Path) -> None:
    """Content, owner, mode, times and extended attributes (SELinux label, capabilities), on disk. Raises OSError."""
    shutil.copyfile(source, target, follow_symlinks=False)
    about = os.lstat(source)
    os.chown(target, about.st_uid, about.st_gid)
    shutil.copystat(source, target)  # after chown, which takes setuid and capabilities away
    handle = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

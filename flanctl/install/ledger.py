"""What an install has put where, and what was there before: enough to take it back, after a power cut at any moment.

    /var/lib/flanctl/install/ledger.json      one entry for each place, one line for each folder we made
    /var/lib/flanctl/install/N                copies of the files that were there

    install    copy what is there ──▶ write the entry ──▶ put ours
    uninstall  put back what was there ──▶ strike the entry out ──▶ remove the copy

Whoever stops between two arrows, both ways lead on from there: an entry is written before its place changes, and what
stands at the place tells how far it came. What is neither ours nor what was there before is somebody else's since: an
install keeps that instead, an uninstall leaves it.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from flanctl.errors import Conflict, FlanctlError, Invalid, NotPermitted
from flanctl.files import remove_unfinished, write_atomically
from flanctl.install.places import ABSENT, State, copy_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flanctl.install.places import Root, Wanted

FOLDER = "/var/lib/flanctl/install"
_FORM = 1


@dataclass(slots=True)
class Entry:
    """One place. `ours` is everything we have ever put there; `copy` the name of the old file's copy, if it was one."""

    before: State
    ours: list[State]
    copy: str | None


class Ledger:
    """The ledger of one root. `opened` reads it; every change is on disk before the place changes."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.folder = root.path(f"{FOLDER}/x").parent
        self.entries: dict[str, Entry] = {}
        self.made: list[str] = []
        """Folders that were not there, in the order they were made."""

    @classmethod
    def read(cls, root: Root) -> Self:
        """What is written, or nothing. Raises Invalid for a ledger that cannot be understood."""
        ledger = cls(root)
        try:
            document = json.loads(ledger._file.read_bytes())
            if document["form"] != _FORM:
                raise ValueError(f"form {document['form']}")
            for place, entry in document["places"].items():
                ours = [State.read(state) for state in entry["ours"]]
                ledger.entries[place] = Entry(State.read(entry["before"]), ours, entry["copy"])
            ledger.made = list(document["made"])
        except FileNotFoundError:
            pass
        except PermissionError:
            raise NotPermitted(f"no right to read {ledger._file}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Invalid(
                f"{ledger._file} cannot be understood: {error}",
                hint=f"the files that were replaced lie beside it; put them back by hand, then remove {ledger.folder}",
                id="bad-ledger",
            ) from None
        return ledger

    @classmethod
    @contextmanager
    def opened(cls, root: Root) -> Iterator[Self]:
        """Read, for changes: nobody else changes it meanwhile. Raises Conflict while somebody does, NotPermitted."""
        folder = cls(root).folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotPermitted(f"cannot write in {folder}: {error.strerror}", hint="run it as root") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict("another flanctl install or uninstall is at work", id="busy") from None
            ledger = cls.read(root)
            for place in ledger.entries:
                remove_unfinished(root.path(place))  # of a run that was killed
            try:
                yield ledger
            finally:
                ledger.tidy()
        finally:
            os.close(handle)

    def keeps(self, place: str, state: State) -> bool:
        """Whether `state` is somebody's of whom we have no copy yet: it has to be kept before we put ours there.

        Where ours was deleted nobody else's stands.
        """
        entry = self.entries.get(place)
        return entry is None or not (state == ABSENT or _among(state, entry.ours) or state == entry.before)

    def put(self, place: str, state: State, wanted: Wanted) -> None:
        """Ours at a place where `state` stands, what was there kept. Raises FlanctlError."""
        with _said(f"cannot write {self.root.path(place)}"):
            if self.keeps(place, state):
                self.entries[place] = Entry(state, [], self._copied(place) if state.kind == "file" else None)
            entry = self.entries[place]
            if not _among(wanted.state, entry.ours):
                entry.ours.append(wanted.state)
            self._make_folders(place)
            self._write()
            self.root.put(place, wanted)
            self._sweep()

    def take_back(self, place: str) -> bool:
        """What was there before is there again; False where it is somebody else's by now, which stays. Raises FlanctlError."""
        entry = self.entries[place]
        state = self.root.look(place)
        theirs = self.keeps(place, state)
        with _said(f"cannot restore {self.root.path(place)}"):
            if not theirs and state != entry.before:
                self.root.restore(place, entry.before, self.folder / entry.copy if entry.copy else None)
            del self.entries[place]
            self._write()
            self._sweep()
        return not theirs

    def remove_folders(self) -> None:
        """Those we made, as far as nothing of others is in them."""
        for place in reversed(self.made):
            try:
                os.rmdir(self.root.path(place))
            except OSError:
                pass
        self.made.clear()
        self._write()

    @property
    def _file(self) -> Path:
        return self.folder / "ledger.json"

    def _write(self) -> None:
        document = {
            "form": _FORM,
            "places": {
                place: {
                    "before": entry.before.document(),
                    "ours": [state.document() for state in entry.ours],
                    "copy": entry.copy,
                }
                for place, entry in self.entries.items()
            },
            "made": self.made,
        }
        write_atomically(self._file, json.dumps(document, indent=1).encode())

    def _copied(self, place: str) -> str:
        """Copy the file at a place to a name nobody has; the name."""
        taken = {entry.copy for entry in self.entries.values()}
        name = next(str(number) for number in range(1, 1000) if str(number) not in taken)
        copy_whole(self.root.path(place), self.folder / name)
        return name

    def _make_folders(self, place: str) -> None:
        missing = []
        folder = place.rpartition("/")[0]
        while folder and not self.root.path(folder).is_dir():
            missing.append(folder)
            folder = folder.rpartition("/")[0]
        if missing:
            # Noted first: one that is noted and not there is passed over, one that is there and not noted would stay.
            self.made += [folder for folder in reversed(missing) if folder not in self.made]
            self._write()
            for folder in reversed(missing):
                self.root.path(folder).mkdir(mode=0o755, exist_ok=True)

    def _sweep(self) -> None:
        """What no entry speaks of: copies of what has been put back, and whatever a run that was killed has left."""
        taken = {self._file.name, *(entry.copy for entry in self.entries.values())}
        for path in self.folder.iterdir():
            if path.name not in taken:
                path.unlink()

    def tidy(self) -> None:
        """Nothing recorded: nothing left of us."""
        if self.entries or self.made:
            return
        self._sweep()
        self._file.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            try:
                folder.rmdir()
            except OSError:
                return  # the agent's memory of its subnet is there


def _among(state: State, ours: list[State]) -> bool:
    """Owner aside: what we put belongs to whoever ran us."""
    return any((state.kind, state.text, state.mode) == (one.kind, one.text, one.mode) for one in ours)


@contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FlanctlError(
            f"{what}: {error.strerror or error}",
            hint="mend that and run it again: it goes on where it stopped; or flanctl uninstall",
            id="install-incomplete",
        ) from None

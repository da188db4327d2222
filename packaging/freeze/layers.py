"""Layers: what the freeze is made of, each kept under the hash of everything it was made from.

    zlib = Layer("zlib", inputs=(recipe, sources_key), build=lambda folder: …)
    folder = cache.have(zlib)     # built now, or as it was built before

A layer is built in a folder of another name and gets its own by one rename, after a list of its files with their
sizes and SHA-256 was written into it. A layer whose files are not exactly those of its list is built again, so what an
interruption, a full disk or a curious hand left behind is never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MANIFEST = ".layer.json"
KEPT = 3
"""How many builds of one layer stay, newest first: switching between two branches costs nothing."""
OTHER_FOLDER = "name another one: FLANCTL_CACHE=/some/folder make freeze"
FULL = 64 << 20
"""With less room than this (bytes) a failure is put down to the disk."""


class Failure(Exception):
    """What failed, why, and how to go on; the only thing a user of `make freeze` sees."""

    def __init__(self, what: str, *details: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.details, self.hint = what, details, hint


class Surroundings(Failure):
    """Nothing is wrong with what was built: the disk is full, or the network away."""


@dataclass(frozen=True)
class Layer:
    """`inputs` is everything the result depends on: texts, versions, keys of other layers."""

    name: str
    inputs: tuple[str, ...]
    build: Callable[[Path], None]

    @property
    def key(self) -> str:
        return hashlib.sha256("\0".join((self.name, *self.inputs)).encode()).hexdigest()[:24]


class Cache:
    """The folder of all layers. One freeze at a time works in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.taken: dict[str, float] = {}
        """Seconds each layer took in this run; 0.0 where it was there."""
        self._lock: tuple[int, ...] = ()
        self._logged: set[Path] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other freeze works here. Raises Failure where the folder cannot be used."""
        if re.search(r"\s", str(self.folder)):
            raise Failure(
                f"the cache folder {str(self.folder)!r} has a space in its name, which configure and rustc take for two words",
                hint=OTHER_FOLDER,
            )
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise Failure(
                f"cannot write to the cache folder {self.folder}: {error.strerror}", hint=OTHER_FOLDER
            ) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another freeze, or what a killed one has left running, is at work; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._lock = (lock,)
            yield
        finally:
            self._lock = ()
            os.close(lock)

    def have(self, layer: Layer) -> Path:
        """The layer's folder, built first if it is missing or not whole. Raises Failure."""
        final = self.folder / layer.name / layer.key
        try:
            if final.exists():
                if why := damage(final):
                    say(f"{layer.name}: {why}; building it again")
                    shutil.rmtree(final)
                else:
                    os.utime(final)
                    self.taken[layer.name] = 0.0
                    return final
        except OSError as error:
            raise self.failed(layer.name, str(error), hint=OTHER_FOLDER) from None
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        started = time.monotonic()
        say(f"{layer.name}: building")
        try:
            partial.mkdir(parents=True)
            layer.build(partial)
            seal(partial)
            partial.rename(final)
        except KeyboardInterrupt:
            raise Failure(
                f"interrupted while building the layer {layer.name}",
                hint="make freeze goes on with this layer; those before it are kept",
            ) from None
        except OSError as error:
            raise self.failed(layer.name, str(error)) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.taken[layer.name] = time.monotonic() - started
        say(f"{layer.name}: {self.taken[layer.name]:.0f} s")
        self._forget_old(final)
        return final

    def _forget_old(self, newest: Path) -> None:
        builds = [
            folder
            for folder in newest.parent.iterdir()
            if folder != newest and folder.is_dir() and not folder.name.endswith(".partial")
        ]
        builds.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in builds[KEPT - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)

    def run(
        self,
        layer: str,
        command: Sequence[object],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> str:
        """Run a command with its output in the layer's log; returns what it printed on stdout. Raises Failure.

        The log is this run's. The command and its children hold the lock too: what a killed freeze leaves running must end
        before the next one builds in the same folders.
        """
        log = self.logs / f"{layer}.log"
        shown = " ".join(str(word) for word in command)
        with log.open("ab" if log in self._logged else "wb") as out:
            self._logged.add(log)
            out.write(f"\n$ {shown}\n".encode())
            out.flush()
            begin = out.tell()
            try:
                done = subprocess.run(
                    [str(word) for word in command],
                    cwd=cwd,
                    env=None if env is None else dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    check=False,
                    pass_fds=self._lock,
                )
            except FileNotFoundError:
                raise Failure(
                    f"{layer}: there is no program {command[0]}", hint="scripts/need freeze"
                ) from None
            said = out.tell()
            out.write(done.stdout)
        printed = done.stdout.decode(errors="replace")
        if done.returncode:
            # On stdout compilers' command lines go by; what went wrong stands on stderr.
            complaint = log.read_bytes()[begin:said].decode(errors="replace")
            raise self.failed(
                layer, f"`{shown[:160]}` ended with {done.returncode}", printed + "\n" + complaint, hint=hint
            )
        return printed

    def failed(
        self, layer: str, cause: str, output: str = "", *, hint: str = "", folder: Path | None = None
    ) -> Failure:
        """The failure of a layer, with the likely reason where one can be told; `folder` is where it was writing to."""
        folder = folder or self.folder
        lines = [line for line in output.splitlines() if line.strip()][-15:]
        again = "then run make freeze again: finished layers are kept"
        if shutil.disk_usage(folder).free < FULL or "No space left on device" in output + cause:
            return Surroundings(
                f"{layer}: the disk of {folder} is full",
                cause,
                hint=f"make room (3 GB are enough), {again}",
            )
        if any(sign in output for sign in OFFLINE):
            return Surroundings(
                f"{layer}: something could not be fetched", *lines[-5:], hint=f"check the network, {again}"
            )
        log = self.logs / f"{layer}.log"
        return Failure(
            f"{layer}: {cause}",
            *lines,
            *([f"(all of it: {log})"] if log in self._logged else []),
            hint=hint or f"mend what the lines above say, {again}",
        )


OFFLINE = (
    "Temporary failure in name resolution",
    "Temporary failure resolving",
    "Could not resolve",
    "Failed to establish a new connection",
    "failed to download",
    "Network is unreachable",
    "Could not connect to",
    "Connection refused",
    "Connection timed out",
    "spurious network error",
    "No matching distribution found",
)
"""What pip, apt and cargo print when there is no way to their registry."""


def say(text: str) -> None:
    """Progress goes to stderr, a line at a time."""
    sys.stderr.write(f"freeze: {text}\n")
    sys.stderr.flush()


def seal(folder: Path) -> None:
    """Write the list of files, as the last thing before a layer gets its name."""
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(_listing(folder), sort_keys=True))
    with manifest.open("rb") as file:
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What is wrong with a finished layer, or None."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "its list of files is missing or broken"
    found = _listing(folder)
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            return f"{name} is not as it was built"
    return None


def _listing(folder: Path) -> dict[str, str]:
    listing = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            inside = str(path.relative_to(folder))
            if inside == MANIFEST:
                continue
            if path.is_symlink():
                listing[inside] = f"-> {path.readlink()}"
                continue
            with path.open("rb") as file:
                listing[inside] = hashlib.file_digest(file, "sha256").hexdigest()
    return listing


def text_of(*paths: Path) -> tuple[str, ...]:
    """The content of files as inputs of a layer; a folder stands for all files in it, by name."""
    texts = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                texts.append(f"{file.relative_to(path.parent)} {digest}")
    return tuple(texts)


def recipe(*functions: Callable[..., object]) -> str:
    """The text of a layer's build function and of what it calls, as one of the layer's inputs."""
    return "".join(map(inspect.getsource, functions))

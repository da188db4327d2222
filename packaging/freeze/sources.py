"""Debian's source packages of CPython and its libraries, pinned by version and SHA-256 in packaging/sources.lock.

They are fetched by apt, which checks Debian's signatures, from wherever this machine's apt fetches; the lists of source
packages are kept apart from the machine's own, so neither root nor a change of its configuration is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cmp_to_key
from pathlib import Path
from typing import TYPE_CHECKING

from layers import Failure, Layer

if TYPE_CHECKING:
    from layers import Cache

PACKAGES = ("zlib", "bzip2", "xz-utils", "libffi", "sqlite3", "openssl", "python3.11")


@dataclass(frozen=True)
class Source:
    """One package of the lock: its files with their SHA-256."""

    name: str
    version: str
    files: tuple[tuple[str, str], ...]

    @property
    def pin(self) -> str:
        return f"{self.name}={self.version}"


def read_lock(path: Path) -> dict[str, Source]:
    """The lock by package name. Raises Failure for one that is not whole."""
    found: dict[str, Source] = {}
    name = version = ""
    files: list[tuple[str, str]] = []

    def close() -> None:
        if name:
            found[name] = Source(name, version, tuple(files))

    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise Failure(
            f"{path.name} cannot be read: {error}", hint="git checkout packaging/sources.lock"
        ) from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        file = line.startswith(" ")
        if (
            len(words) != 2
            or (file and (not name or "/" in words[1] or not re.fullmatch("[0-9a-f]{64}", words[0])))
            or (not file and words[0] not in PACKAGES)
        ):
            raise Failure(
                f"{path.name}:{number} is not understood: {line}", hint="make lock-sources renews it"
            )
        if file:
            files.append((words[1], words[0]))
        else:
            close()
            name, version, files = words[0], words[1], []
    close()
    whole = {name for name, source in found.items() if any(file.endswith(".dsc") for file, _ in source.files)}
    if missing := [package for package in PACKAGES if package not in whole]:
        raise Failure(f"{path.name} lacks {', '.join(missing)}", hint="make lock-sources renews it")
    return found


def source_layer(cache: Cache, source: Source) -> Layer:
    """The unpacked, patched source of one package, in the layer's folder `tree`."""

    def build(folder: Path) -> None:
        layer = f"source-{source.name}"
        fetched = folder / "fetched"
        fetched.mkdir()
        apt = Apt(cache)
        apt.fetch(layer, source.pin, fetched)
        for name, expected in source.files:
            found = sha256(fetched / name) if (fetched / name).exists() else "nothing"
            if found != expected:
                raise Failure(
                    f"{layer}: {name} is not the file that was locked",
                    f"locked {expected}",
                    f"found  {found}",
                    hint="if Debian has a newer release, make lock-sources takes it",
                )
        dsc = next(name for name, _ in source.files if name.endswith(".dsc"))
        # apt has checked the signature of the list that named these very hashes.
        cache.run(layer, ["dpkg-source", "--no-check", "-x", fetched / dsc, folder / "tree"])
        shutil.rmtree(fetched)

    return Layer(f"source-{source.name}", (source.pin, *map(repr, source.files)), build)


class Apt:
    """apt with lists of source packages of its own."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.folder = cache.folder / "apt"
        self.config = self.folder / "apt.conf"

    def _prepare(self) -> dict[str, str]:
        parts = self.folder / "sources"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        for name in ("lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        etc = Path("/etc/apt")
        for path in (etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))):
            if path.suffix == ".list" and path.is_file():
                lines = [line for line in path.read_text().splitlines() if line.startswith("deb ")]
                text = "".join(f"deb-src {line.removeprefix('deb ')}\n" for line in lines)
            elif path.suffix == ".sources" and path.is_file():
                text = re.sub(r"(?m)^Types:.*$", "Types: deb-src", path.read_text())
            else:
                continue
            (parts / path.name).write_text(text)
        self.config.write_text(
            'Dir::Etc::sourcelist "/dev/null";\n'
            f'Dir::Etc::sourceparts "{parts}";\n'
            f'Dir::State::lists "{self.folder}/lists";\n'
            f'Dir::Cache "{self.folder}/cache";\n'
            'APT::Sandbox::User "";\n'  # the files are ours: apt must not become its own user to write them
        )
        return {**os.environ, "APT_CONFIG": str(self.config), "LC_ALL": "C"}

    def fetch(self, layer: str, pin: str, folder: Path) -> None:
        """Download the files of one version. Raises Failure where this machine's apt does not know it."""
        if not shutil.which("apt-get"):
            raise Failure(
                f"{layer}: the sources are Debian's and this machine has no apt", hint="freeze on Debian 12"
            )
        environment = self._prepare()
        updated = self.cache.run(layer, ["apt-get", "update", "-q"], env=environment)
        try:
            self.cache.run(
                layer, ["apt-get", "source", "-q", "--download-only", pin], cwd=folder, env=environment
            )
        except Failure as failure:
            offered = self.versions(pin.partition("=")[0])
            if offered and pin.partition("=")[2] not in offered:
                raise Failure(
                    f"{layer}: Debian no longer has {pin}",
                    f"it has {', '.join(offered)}: most likely a security release",
                    hint="make lock-sources takes the newest; then make freeze",
                ) from None
            raise self._explained(layer, failure, updated) from None

    def _explained(self, layer: str, failure: Failure, updated: str) -> Failure:
        """`apt-get update` ends with 0 where it got no list, and whoever looks into the lists then gets the blame."""
        return self.cache.failed(layer, failure.what, updated) if "Err:" in updated else failure

    def versions(self, name: str) -> list[str]:
        """What apt offers of a package, newest first; nothing where it has no lists."""
        environment = self._prepare()
        try:
            shown = self.cache.run("apt", ["apt-cache", "showsrc", name], env=environment)
        except Failure:
            return []
        versions = dict.fromkeys(re.findall(r"(?m)^Version: (\S+)", shown))
        return sorted(versions, key=cmp_to_key(_by_debian), reverse=True)

    def lock(self, name: str) -> Source:
        """The newest version that can be fetched: an index may name one its archive has not, so try downwards."""
        environment = self._prepare()
        updated = self.cache.run("apt", ["apt-get", "update", "-q"], env=environment)
        for version in self.versions(name):
            folder = self.folder / "lock"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                self.cache.run(
                    "apt",
                    ["apt-get", "source", "-q", "--download-only", f"{name}={version}"],
                    cwd=folder,
                    env=environment,
                )
            except Failure:
                continue
            files = tuple((path.name, sha256(path)) for path in sorted(folder.iterdir()))
            shutil.rmtree(folder)
            return Source(name, version, files)
        failure = Failure(f"no version of {name} can be fetched", hint=f"look into {self.cache.logs}/apt.log")
        raise self._explained("apt", failure, updated)


def lock_sources(cache: Cache, path: Path) -> None:
    """Write the newest fetchable versions to the lock."""
    lines = [
        "# What CPython and its libraries are built from: Debian source packages, pinned. `make lock-sources` renews it."
    ]
    for name in PACKAGES:
        source = Apt(cache).lock(name)
        lines.append(f"{source.name} {source.version}")
        lines.extend(f"  {digest} {file}" for file, digest in source.files)
    path.write_text("\n".join(lines) + "\n")


def _by_debian(one: str, other: str) -> int:
    """dpkg's order of versions, which only dpkg knows well."""
    for relation, order in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", one, relation, other], check=False).returncode == 0:
            return order
    return 0


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A Debian tree without Python, in which packages are installed and the executable runs: a host of its own, on disk.

    tree = Tree.unpack(tmp_path / "tree")
    tree.run("dpkg", "-i", "/flanctl.deb")       # chroot; /proc and /dev exist for this one call
    assert (tree / "usr/bin/flanctl").exists()

minbase is what debootstrap --variant=minbase makes; iptables is in it because flanctl's packages depend on it. Mounts are made
in a mount namespace that ends with the call, so none can stay.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARGUMENTS = ("--variant=minbase", "--include=iptables")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
_ENTER = """
set -e
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot "$0" "$@"
"""


def debian_folder(name: str, suite: str, arguments: Sequence[str]) -> Path:
    """A tree that is only read, unpacked once beside its tar in the cache; several runs at once wait for the first.

    `arguments` are mmdebstrap's. AssertionError with its own words where it fails.
    """
    tar = _tar(f"{name}-{suite}", suite, arguments)
    folder = tar.with_suffix("")
    with tar.with_suffix(".tar.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            _unpack(tar, new)
            new.rename(folder)
    return folder


def _tar(name: str, suite: str, arguments: Sequence[str]) -> Path:
    made = subprocess.run(
        [Path(__file__).parents[2] / "scripts/debian-tree", name, suite, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


def _unpack(tar: Path, folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["tar", "-C", folder, "-xpf", tar, "--numeric-owner"], check=True)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Tree:
    root: Path

    @classmethod
    def unpack(cls, root: Path, suite: str = "bookworm") -> Self:
        """The cached tree (made by the first call: half a minute), unpacked into a new folder.

        AssertionError with mmdebstrap's own words where the mirror has no such suite.
        """
        _unpack(_tar(f"debian-{suite}", suite, _ARGUMENTS), root)
        return cls(root)

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def command(self, *words: str) -> list[str]:
        """The words that run a command in the tree; give it ENVIRONMENT, the tester's may not fit."""
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, str(self.root), *words]

    def run(self, *words: str, timeout: float = 60.0) -> Answer:
        """Run to the end in the tree, with an empty environment but for PATH."""
        done = subprocess.run(
            self.command(*words),
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str) -> str:
        """Run; fails unless it ends with 0. Its stdout."""
        answer = self.run(*words)
        assert answer.code == 0, f"{words} ended with {answer.code}:\n{answer.out}{answer.err}"
        return answer.out

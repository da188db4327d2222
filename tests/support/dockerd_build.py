"""The newest dockerd and the runc it needs, built from their Go modules (tests/dockerd), once.

`python -m tests.support.dockerd_build` builds them beforehand and prints the folder: ten minutes or more on two cores
and 1.5 GB of Go's caches, then they lie in flanctl's cache folder until go.mod, go.sum or the way to build them changes.

    dockerd   github.com/moby/moby/v2, the line after Docker 29; runs with Debian's containerd 1.6 and docker 20.10
    runc      Debian's 1.1.5 is too old for it; without libseccomp, so containers want seccomp=unconfined
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "dockerd"
_BUILDS = (
    ("dockerd", "github.com/moby/moby/v2/cmd/dockerd", "0"),
    ("runc", "github.com/opencontainers/runc", "1"),
)
"""Program, its package, and whether it needs C (CGO_ENABLED): runc enters namespaces before Go starts."""
_FLAGS = ("-trimpath", "-ldflags=-s -w", "-buildvcs=false")


def built() -> Path:
    """The folder with both; built by the first who asks, while others wait."""
    folder = _folder()
    if _is_whole(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for program, package, cgo in _BUILDS:
            if not (folder / program).exists():
                _build(folder / program, package, cgo)
    return folder


def missing() -> str | None:
    """None if they lie there; else what to do. Nobody waits ten minutes for a test he did not ask for."""
    return None if _is_whole(_folder()) else "python -m tests.support.dockerd_build builds it (ten minutes)"


def _folder() -> Path:
    base = os.environ.get("FLANCTL_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    inputs = [(SOURCES / name).read_bytes() for name in ("go.mod", "go.sum")]
    inputs.append(repr((_BUILDS, _FLAGS)).encode())
    digest = hashlib.sha256(b"\n".join(inputs)).hexdigest()[:16]
    return Path(base).absolute() / "flanctl" / f"dockerd-{digest}"


def _is_whole(folder: Path) -> bool:
    return all((folder / program).exists() for program, _, _ in _BUILDS)


def _build(target: Path, package: str, cgo: str) -> None:
    new = target.with_suffix(".new")
    done = subprocess.run(
        ["nice", "go", "build", *_FLAGS, "-o", str(new), package],
        cwd=SOURCES,
        env=os.environ | {"CGO_ENABLED": cgo},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{package} does not build:\n{done.stderr[-4000:]}"
    new.rename(target)


if __name__ == "__main__":
    print(built())

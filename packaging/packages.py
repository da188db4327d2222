"""`make packages`: deb, rpm and container image around dist/flanctl, and their SHA256SUMS.

    python packaging/packages.py [FOLDER]     the folder that holds flanctl and gets the packages; default dist

    dist/flanctl ──┬─ nfpm ── flanctl_VERSION_amd64.deb, flanctl-VERSION.x86_64.rpm
    source tree ───┤          (man pages, completions, sample config are made from the commands)
    Debian ────────┴───────── flanctl-VERSION-image.tar

Everything is written into a folder of its own and moved into place at the end, SHA256SUMS last: whatever happens
before, the folder holds what it held. Same inputs and SOURCE_DATE_EPOCH (default: the commit's time), same bytes.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import describe
import image

from flanctl import __version__

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""rpm's and Linux' word to dpkg's and Go's."""


class Failed(Exception):
    """What failed, and how to go on."""


def main(folder: Path) -> int:
    """Make all packages of `folder`/flanctl in `folder`; the exit code."""
    work = folder / f".packages-{os.getpid()}"
    step = "start"
    try:
        executable = _executable(folder)
        epoch = _epoch()
        _sweep(folder)
        work.mkdir()
        stage = work / "stage"
        step = "man pages, completions, sample config"
        fill_stage(stage, epoch)
        machine = platform.machine()
        made = []
        for kind, name in (
            ("deb", f"flanctl_{__version__}_{ARCHITECTURES[machine]}.deb"),
            ("rpm", f"flanctl-{__version__}.{machine}.rpm"),
        ):
            step = name
            package(kind, work / name, executable=executable, stage=stage, epoch=epoch)
            made.append(work / name)
        step = "image"
        base = _run("the image's base", ["scripts/debian-tree", "image-base", "bookworm", *image.BASE])
        made.append(work / f"flanctl-{__version__}-image.tar")
        image.write(
            made[-1],
            base=Path(base.strip()),
            executable=executable,
            version=__version__,
            arch=ARCHITECTURES[machine],
            epoch=epoch,
        )
        step = "moving the packages into place"
        _publish(made, work)
    except Failed as error:
        return _say(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _say(f"{step} failed: {error.strerror}{where}\ntry: make packages again; nothing was replaced")
    except KeyboardInterrupt:
        return _say(f"interrupted at {step}\ntry: make packages again; nothing was replaced", 130)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _executable(folder: Path) -> Path:
    """`folder`/flanctl, run once: a file of another version or machine must not be packed under this one's name."""
    path = folder / "flanctl"
    if not path.exists():
        raise Failed(f"there is no {_short(path)} yet\ntry: make freeze")
    if platform.machine() not in ARCHITECTURES:
        raise Failed(f"packages for {platform.machine()} are not known to packaging/packages.py")
    version = _run(_short(path), [str(path), "version", "-w", "simple"], hint="make freeze").strip()
    if version != __version__:
        raise Failed(
            f"{_short(path)} is version {version}, this source tree is {__version__}\ntry: make freeze"
        )
    return path


def _epoch() -> int:
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        text = _run("the commit's time", ["git", "log", "-1", "--format=%ct"], hint="set SOURCE_DATE_EPOCH")
    try:
        return int(text)
    except ValueError:
        raise Failed(f'SOURCE_DATE_EPOCH "{text}" is not a number of seconds') from None


def _sweep(folder: Path) -> None:
    """Remove the folders of runs that were killed."""
    for left in folder.glob(".packages-*"):
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left)


def _nfpm() -> Path:
    """nfpm in .cache, built once per state of packaging/nfpm."""
    sources = ROOT / "packaging" / "nfpm"
    digest = hashlib.sha256(b"".join((sources / name).read_bytes() for name in ("go.mod", "go.sum")))
    folder = ROOT / ".cache" / f"nfpm-{digest.hexdigest()[:16]}"
    binary = folder / "nfpm"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            print("building nfpm (once, about a minute)", flush=True)
            new = folder / "nfpm.new"
            build = ["go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", str(new)]
            _run(
                "nfpm (Go)",
                [*build, "github.com/goreleaser/nfpm/v2/cmd/nfpm"],
                folder=sources,
                hint="it needs Go and, the first time, the Go module proxy; then make packages again",
            )
            new.rename(binary)
    return binary


def fill_stage(stage: Path, epoch: int) -> None:
    """Write what is made from the command line itself into the folder `stage`."""
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch))
    for name, text in describe.man_pages(__version__, date).items():
        _write(stage / "man" / f"man{name[-1]}" / f"{name}.gz", gzip.compress(text.encode(), 9, mtime=0))
    for shell in ("bash", "zsh", "fish"):
        script = _run(f"the completion for {shell}", [sys.executable, "-m", "flanctl", "completion", shell])
        _write(stage / "completions" / f"flanctl.{shell}", script.encode())
    _write(stage / "flanctl.toml", describe.sample_config().encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o644)


def package(
    kind: str, target: Path, *, executable: Path, stage: Path, epoch: int, release: str = "1"
) -> None:
    """Write the deb or rpm around `executable` to `target`. Raises Failed."""
    words = [str(_nfpm()), "package", "--config", "packaging/nfpm.yaml", "--packager", kind]
    _run(
        target.name,
        [*words, "--target", str(target)],
        environment={
            "VERSION": __version__,
            "RELEASE": release,
            "ARCH": ARCHITECTURES[platform.machine()],
            "EXECUTABLE": str(executable.resolve()),  # nfpm would pack a link as a link
            "STAGE": str(stage),
            "SOURCE_DATE_EPOCH": str(epoch),
        },
    )


def _publish(made: list[Path], work: Path) -> None:
    sums = work / "SHA256SUMS"
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in made]
    sums.write_text("".join(lines))
    for path in (*made, sums):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    # Sums that do not fit the files must never stand beside them.
    folder = work.parent
    (folder / sums.name).unlink(missing_ok=True)
    for path in (*made, sums):
        path.chmod(0o644)
        print(f"{_short(folder / path.name)}  {path.stat().st_size / 1e6:.1f} MB")
        path.rename(folder / path.name)


def _run(
    what: str,
    words: list[str],
    *,
    folder: Path = ROOT,
    hint: str = "run make packages again",
    environment: dict[str, str] | None = None,
) -> str:
    """stdout. Raises Failed with the program's last words."""
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise Failed(f"{what} failed: {words[0]}: {error.strerror}\ntry: {hint}") from None
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in (done.stderr or done.stdout).strip().splitlines()[-12:])
        raise Failed(f"{what} failed ({words[0]} ended with {done.returncode}):\n{said}\ntry: {hint}")
    return done.stdout


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _say(text: str, code: int = 1) -> int:
    print(f"make packages: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else DIST))

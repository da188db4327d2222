"""From CPython and the packages to dist/flanctl: stage, resources, packet path, executable, and the parts behind it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assemble import assemble
from checks import check
from layers import Failure, Layer, Surroundings, recipe, say, text_of
from sbom import python_parts, write_sbom
from toolchain import EPOCH_OF_SOURCES, GLIBC, TARGET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layers import Cache
    from sources import Source
    from toolchain import Toolchain

PYO3_CONFIG = "pyo3-build-config-file.txt"
HERE = "@the folder of this file@"
MOST_BYTES = 60_000_000
"""The promise about the file's size."""
# Of a package only what runs is taken: no tests, no C sources, no typing stubs. grpc's own list of authorities cannot be found
# in one file (etcd_grpc.py hands the system's to it).
DROPPED = (
    "__pycache__", "tests", "bin", "*.pyi", "*.pyx", "*.pxd", "*.pxi", "*.c", "*.cc", "*.h", "*.proto", "*.pth", "py.typed",
    "_credentials",
)  # fmt: skip
FROZEN = ("flanctl", "native", "packaging", "pyoxidizer.bzl", "requirements")
"""What the file is made of; a change elsewhere makes no other file."""


@dataclass(frozen=True)
class Build:
    """What `flanctl version -w json` tells of the build."""

    revision: str
    epoch: int

    @classmethod
    def of(cls, root: Path) -> Build:
        """From git; SOURCE_DATE_EPOCH goes before the commit's date."""

        def git(*words: str) -> str:
            if not (root / ".git").exists() or not shutil.which("git"):
                return ""  # an unpacked archive, perhaps within somebody else's repository
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
            return done.stdout.strip() if done.returncode == 0 else ""

        revision = git("rev-parse", "HEAD")
        if not revision:
            say("no git revision can be told here: version will say unknown")
        # Files that nobody has added yet are frozen like all others.
        dirty = "+changes" if git("status", "--porcelain", "--", *FROZEN) else ""
        epoch = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct") or EPOCH_OF_SOURCES
        if not re.fullmatch(r"\d{1,11}", epoch, re.ASCII):
            raise Failure(
                f"SOURCE_DATE_EPOCH is {epoch!r}, not a number of seconds since 1970",
                hint="unset SOURCE_DATE_EPOCH",
            )
        return cls(revision + dirty if revision else "unknown", int(epoch))


class Freeze:
    """One run: the layers from CPython up."""

    def __init__(
        self,
        cache: Cache,
        tools: Toolchain,
        root: Path,
        distribution: tuple[Path, str],
        locked: dict[str, Source],
    ) -> None:
        self.cache, self.tools, self.root, self.locked = cache, tools, root, locked
        self.distribution, self.distribution_key = distribution
        self.build = Build.of(root)

    def dependencies(self) -> Path:
        """The locked packages as pip installs them, stripped to what runs; their shared libraries as parts of the file."""
        lock = self.root / "requirements/runtime.txt"

        def build(folder: Path) -> None:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            installed = folder / "installed"
            self.cache.run(
                "dependencies",
                [*pip, "--no-compile", "--no-build-isolation", "--require-hashes"]
                + ["--target", installed, "-r", lock],
            )
            stage = folder / "stage"
            shutil.copytree(installed, stage, ignore=shutil.ignore_patterns(*DROPPED))
            shutil.rmtree(installed)
            libraries = folder / "libraries"
            libraries.mkdir()
            for path in sorted(stage.rglob("*.so")):
                module = str(path.relative_to(stage).with_name(path.name.partition(".")[0])).replace("/", ".")
                self.cache.run("dependencies", ["strip", "--strip-unneeded", path])
                path.rename(libraries / f"{module}.so")

        layer = Layer("dependencies", (*text_of(lock), recipe(build), *DROPPED), build)
        return self.cache.have(layer)

    def native(self) -> tuple[Path, str]:
        """The packet path as one object whose only global symbol is PyInit__native."""
        source = self.root / "native"
        parts = [source / name for name in ("bpf", "dataplane", "pyext", "Cargo.toml", "Cargo.lock")]

        def build(folder: Path) -> None:
            target = self.cache.folder / "cargo-native"
            environment = self.tools.environment(
                CARGO_TARGET_DIR=str(target),
                RUSTFLAGS=self._remapped(source),
                PYO3_NO_PYTHON="1",
                PYO3_BUILD_EXTENSION_MODULE="1",
            )
            self._cargo(
                "native",
                ["cargo", "rustc", "--quiet", "--release", "--locked", "--package", "pyext", "--lib"]
                + ["--crate-type", "staticlib", "--target", TARGET],
                source,
                environment,
                target,
            )
            library = target / TARGET / "release/lib_native.a"
            # It brings its own copies of Rust's library and of pyo3, which must not meet those of pyembed. Without
            # --force-group-allocation the first panic crashes: a COMDAT group that is dropped takes along the pointer to
            # the personality function.
            link = ["ld", "-r", "-S", "--force-group-allocation", "-u", "PyInit__native", "-o"]
            self.cache.run("native", [*link, folder / "native.o", library])
            self.cache.run("native", ["objcopy", "--keep-global-symbol=PyInit__native", folder / "native.o"])

        layer = Layer(
            "native",
            (*text_of(*parts), recipe(build), self.tools.key, self.tools.rust),
            build,
        )
        return self.cache.have(layer) / "native.o", layer.key

    def resources(self, dependencies: Path) -> Path:
        """PyOxidizer's part: bytecode of everything, libpython, the interpreter's settings."""
        bzl = self.root / "pyoxidizer.bzl"
        package = self.root / "flanctl"
        about = self._about(dependencies)

        def build(folder: Path) -> None:
            stage = folder / "stage"
            # No metadata: PyOxidizer writes the data files of a package in random order, and nobody reads them at run time.
            shutil.copytree(dependencies / "stage", stage, ignore=shutil.ignore_patterns("*.dist-info"))
            shutil.copytree(
                package, stage / "flanctl", ignore=shutil.ignore_patterns(*DROPPED, "_native*.so", ".*")
            )
            (stage / "flanctl/_build.py").write_text(about)
            compiled = self.root / "packaging/freeze/compiled.py"
            run = [sys.executable, "-B", compiled, self.root, stage / "flanctl/_compiled.py"]
            self.cache.run("resources", run)
            names = sorted(
                {path.name.removesuffix(".py") for path in stage.iterdir() if path.suffix in {"", ".py"}}
            )
            work = folder / "work"
            work.mkdir()
            shutil.copy(bzl, work)
            digest = hashlib.sha256(self.distribution.read_bytes()).hexdigest()
            variables = {
                "DIST": str(self.distribution),
                "DIST_SHA256": digest,
                "STAGE": str(stage),
                "PACKAGES": ",".join(names),
            }
            command = [
                self.tools.pyoxidizer,
                "build",
                "resources",
                "--path",
                work,
                "--system-rust",
                "--release",
            ]
            command += ["--target-triple", TARGET]
            for name, text in variables.items():
                command += ["--var", name, text]
            # It compiles a table of modules: with our compiler, whatever this machine's is. What it unpacks goes with it.
            unpacked = folder / "unpacked"
            environment = self.tools.environment(CC=str(self.tools.cc), PYOXIDIZER_CACHE_DIR=str(unpacked))
            self.cache.run("resources", command, cwd=work, env=environment)
            made = work / "build" / TARGET / "release/resources"
            self._name_members(made / "libpython3.a")
            shutil.move(made / "packed-resources", folder)
            link = folder / "link"
            link.mkdir()
            for path in (
                made / "libpython3.a",
                made / "default_python_config.rs",
                *unpacked.rglob("build/lib/*.a"),
            ):
                shutil.move(path, link)
            (link / PYO3_CONFIG).write_text(_anywhere((made / PYO3_CONFIG).read_text()))
            for path in (work, stage, unpacked):
                shutil.rmtree(path)

        sources = tuple(
            f"{path.relative_to(self.root)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(package.rglob("*.py"))
            if "__pycache__" not in path.parts
        )
        layer = Layer(
            "resources",
            (
                *sources,
                *text_of(bzl, self.root / "packaging/freeze/compiled.py", self.root / "packaging/systemd"),
                recipe(build, _anywhere, Freeze._name_members),
                about,
            )
            + (self.distribution_key, self.tools.key, dependencies.name),
            build,
        )
        return self.cache.have(layer)

    def _about(self, dependencies: Path) -> str:
        """The module flanctl._build."""
        parts = {name: source.version for name, source in self.locked.items()}
        packages = {
            part["name"]: part["version"] for part in python_parts(dependencies / "stage") if "purl" in part
        }
        return (
            '"""How this executable was built; written by `make freeze`."""\n\n'
            f"REVISION = {self.build.revision!r}\nEPOCH = {self.build.epoch!r}\n"
            f"RUST = {self.tools.rust!r}\nSOURCES = {parts!r}\nPACKAGES = {packages!r}\n"
        )

    def _name_members(self, library: Path) -> None:
        """One member of PyOxidizer's libpython is compiled in a folder with a random name, which it bears and tells."""
        listed = self.cache.run("resources", ["ar", "t", library]).split()
        member = next(name for name in listed if name.endswith("-config.o"))
        run = self.cache.run
        run("resources", ["ar", "x", library, member], cwd=library.parent)
        run("resources", ["ar", "dD", library, member])
        (library.parent / member).rename(library.parent / "config.o")
        run("resources", ["strip", "--strip-debug", "config.o"], cwd=library.parent)
        run("resources", ["ar", "rD", library, "config.o"], cwd=library.parent)
        (library.parent / "config.o").unlink()

    def executable(self, resources: Path, native: tuple[Path, str]) -> Path:
        """CPython and Rust, linked; the modules are not in it yet, so that their change needs no linking."""
        crate = self.root / "packaging/executable"
        link = resources / "link"

        def build(folder: Path) -> None:
            target = self.cache.folder / "cargo-executable"
            steady = self.cache.folder / "link"
            steady.mkdir(exist_ok=True)
            for path in link.iterdir():
                # cargo goes by paths and times: where nothing changed it must not see a change.
                content = path.read_bytes().replace(HERE.encode(), str(steady).encode())
                copy = steady / path.name
                if path.name == PYO3_CONFIG:
                    content += _watched(steady, link)
                if not copy.exists() or copy.read_bytes() != content:
                    copy.write_bytes(content)
            environment = self.tools.environment(
                CARGO_TARGET_DIR=str(target),
                RUSTFLAGS=self._remapped(crate),
                PYO3_CONFIG_FILE=str(steady / PYO3_CONFIG),
                FREEZE_ARTIFACTS=str(steady),
                FREEZE_NATIVE=str(native[0]),
                CARGO_ZIGBUILD_ZIG_PATH=str(self.tools.zig),
            )
            self._cargo(
                "executable",
                [self.tools.folder / "bin/cargo-zigbuild", "zigbuild", "--quiet", "--release", "--locked"]
                + ["--target", f"{TARGET}.{GLIBC}"],
                crate,
                environment,
                target,
            )
            shutil.copy(target / TARGET / "release/flanctl", folder / "flanctl")

        layer = Layer(
            "executable",
            (*text_of(link), recipe(build, _watched), native[1], self.tools.key, self.tools.rust)
            + text_of(crate / "src", crate / "build.rs", crate / "Cargo.toml", crate / "Cargo.lock"),
            build,
        )
        return self.cache.have(layer) / "flanctl"

    def _remapped(self, source: Path) -> str:
        cargo = os.environ.get("CARGO_HOME") or str(Path.home() / ".cargo")
        places = {str(self.cache.folder): "/build", cargo: "/cargo", str(source): "."}
        return " ".join(f"--remap-path-prefix={place}={name}" for place, name in places.items())

    def _cargo(
        self, layer: str, command: Sequence[object], cwd: Path, environment: dict[str, str], target: Path
    ) -> None:
        """cargo keeps what it compiled; what an interruption broke in there must not fail every later run."""
        fresh = not target.exists()
        try:
            self.cache.run(layer, command, cwd=cwd, env=environment)
        except Surroundings:
            raise
        except Failure as failure:
            if fresh or any("error[E" in line for line in failure.details):
                raise
            say(f"{layer}: failed; once more without what cargo had kept")
            shutil.rmtree(target, ignore_errors=True)
            self.cache.run(layer, command, cwd=cwd, env=environment)


def _anywhere(config: str) -> str:
    """PyOxidizer's settings for pyo3 with HERE for the folders they name, which are others each time."""
    config = re.sub("(?m)^executable=.*", "executable=python3.11", config)
    config = re.sub("(?m)(rustc-link-search=native=).*", rf"\g<1>{HERE}", config)
    return "\n".join(dict.fromkeys(config.splitlines())) + "\n"


def _watched(folder: Path, libraries: Path) -> bytes:
    """pyo3 takes the static libraries in when it is compiled, and cargo looks at none of them unless it is told to."""
    names = sorted(path.name for path in libraries.glob("*.a"))
    return "".join(
        f"extra_build_script_line=cargo:rerun-if-changed={folder / name}\n" for name in names
    ).encode()


def freeze(
    cache: Cache,
    tools: Toolchain,
    root: Path,
    distribution: tuple[Path, str],
    locked: dict[str, Source],
    out: Path,
    *,
    twice: bool,
) -> None:
    """Write `out`/flanctl, .sha256 and .cdx.json, or nothing. Raises Failure."""
    job = Freeze(cache, tools, root, distribution, locked)
    digest = _once(job, out)
    if twice:
        say("and once more, from the sources of everything that changes with a commit")
        first = cache.folder / "first"
        shutil.rmtree(first, ignore_errors=True)
        first.mkdir()
        for name in (
            "dependencies",
            "native",
            "resources",
            "executable",
            "cargo-native",
            "cargo-executable",
            "link",
        ):
            if (cache.folder / name).exists():
                (cache.folder / name).rename(first / name)
        again = _once(job, out)
        if again != digest:
            raise Failure(
                "the two builds differ",
                f"first  {digest}",
                f"second {again}",
                hint=f"compare the layers of both: {first} and {cache.folder}",
            )
        shutil.rmtree(first)
        say(f"both builds are the same: {digest}")


def _once(job: Freeze, out: Path) -> str:
    dependencies = job.dependencies()
    native = job.native()
    resources = job.resources(dependencies)
    program = job.executable(resources, native)
    parts = {"packed-resources": resources / "packed-resources"}
    parts |= {path.stem: path for path in sorted((dependencies / "libraries").glob("*.so"))}
    result = out / "flanctl"
    new = out / ".new"
    try:
        # All three or none: what was there before stays until the last of them is written.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        file = new / result.name
        assemble(program, parts, file)
        check(job.cache, file, program, list(parts.values())[1:], most_bytes=MOST_BYTES)
        write_sbom(job, dependencies, file, new / "flanctl.cdx.json")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (new / "flanctl.sha256").write_text(f"{digest}  flanctl\n")
        for path in sorted(new.iterdir()):
            path.rename(out / path.name)
    except OSError as error:
        folder = out if out.is_dir() else None
        raise job.cache.failed(
            "result", f"cannot write to {out}: {error.strerror or error}", folder=folder
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    say(f"{result}: {result.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
    return digest

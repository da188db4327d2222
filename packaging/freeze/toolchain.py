"""The compilers: zig, which links against the glibc of any age, and PyOxidizer, both as their PyPI wheels."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layers import Failure, Layer, text_of

if TYPE_CHECKING:
    from pathlib import Path

    from layers import Cache

GLIBC = "2.17"
"""CentOS 7's: the oldest the executable runs on."""
TARGET = "x86_64-unknown-linux-gnu"
EPOCH_OF_SOURCES = "1700000000"
"""The date inside everything that does not change with a commit (archive members, __DATE__): any fixed one will do."""

# Beside the wheels, wherever they are. zig adds trapping UBSan checks unless told not to, and CPython relies on wrapping here
# and there. FREEZE_PREFIX_MAP hides the build folder, which differs from builder to builder.
WRAPPER = f"""#!/bin/sh
exec "${{0%/*}}/../ziglang/zig" cc -target x86_64-linux-gnu.{GLIBC} -fno-sanitize=undefined \\
    ${{FREEZE_PREFIX_MAP:+"$FREEZE_PREFIX_MAP"}} "$@"
"""


@dataclass(frozen=True)
class Toolchain:
    """Where the tools are, and the environment in which everything is compiled."""

    folder: Path
    cache: Cache
    key: str
    rust: str
    """`rustc --version`."""

    @property
    def zig(self) -> Path:
        return self.folder / "ziglang" / "zig"

    @property
    def pyoxidizer(self) -> Path:
        return self.folder / "bin" / "pyoxidizer"

    @property
    def cc(self) -> Path:
        return self.folder / "freeze" / "freeze-cc"

    def environment(self, **more: str) -> dict[str, str]:
        """An environment of our own making, so that nothing of the builder's gets in."""
        kept = ("HOME", "USER", "PATH", "CARGO_HOME", "RUSTUP_HOME", "TMPDIR")
        inherited = {name: os.environ[name] for name in kept if name in os.environ}
        # Where a registry is reached through a proxy, a mirror or a CA of the site, that is set in the environment.
        inherited |= {
            name: text
            for name, text in os.environ.items()
            if name.lower().endswith("_proxy")
            or name.startswith(("PIP_", "SSL_CERT_", "CARGO_HTTP_", "CARGO_NET_"))
        }
        path = f"{self.folder / 'freeze'}:{self.folder / 'bin'}:{inherited.get('PATH', '/usr/bin:/bin')}"
        return {
            **inherited,
            "PATH": path,
            "LC_ALL": "C",
            "TZ": "UTC",
            "SOURCE_DATE_EPOCH": EPOCH_OF_SOURCES,
            "ZIG_GLOBAL_CACHE_DIR": str(self.cache.folder / "zig"),
            "ZIG_LOCAL_CACHE_DIR": str(self.cache.folder / "zig"),
            # OpenSSL and CPython write the compiler's name into what they build: a name, not a path.
            "CC": "freeze-cc",
            "AR": "ar",
            "RANLIB": "ranlib",
            **more,
        }


def have_toolchain(cache: Cache, python: str, requirements: Path) -> Toolchain:
    """Install the pinned wheels and write the compiler's wrapper. Raises Failure."""
    cargo = shutil.which("cargo")
    if cargo is None:
        raise Failure(
            "there is no cargo on this machine", hint="install Rust (1.85 or newer), then make freeze"
        )
    rust = cache.run("toolchain", ["rustc", "--version"]).strip()

    def build(folder: Path) -> None:
        cache.run(
            "toolchain",
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            + ["--no-compile", "--only-binary", ":all:", "--require-hashes", "--target", folder]
            + ["-r", requirements],
        )
        wrapper = folder / "freeze" / "freeze-cc"
        wrapper.parent.mkdir()
        wrapper.write_text(WRAPPER)
        wrapper.chmod(0o755)

    layer = Layer("toolchain", (*text_of(requirements), WRAPPER), build)
    return Toolchain(cache.have(layer), cache, layer.key, rust)

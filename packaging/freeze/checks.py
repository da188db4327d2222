"""What a finished executable must be: old enough in what it asks of glibc, small enough, and silent about its builder."""

from __future__ import annotations

import getpass
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from layers import Failure, say
from toolchain import GLIBC

if TYPE_CHECKING:
    from layers import Cache


def check(cache: Cache, result: Path, program: Path, libraries: list[Path], *, most_bytes: int) -> None:
    """Raises Failure with what is wrong."""
    newest = max((_glibc(cache, path) for path in (program, *libraries)), key=_number)
    say(f"asks for glibc {newest} at most")
    size = result.stat().st_size
    if size > most_bytes:
        raise Failure(
            f"the file has {size} bytes, more than {most_bytes}",
            hint="look what grew: flanctl.cdx.json lists the parts",
        )
    if found := builder_traces(result.read_bytes(), cache.folder):
        raise Failure(
            "the file tells who built it",
            *found,
            hint="find the layer it comes from and add a path mapping there; "
            "a name that is an ordinary word belongs to ORDINARY in packaging/freeze/checks.py",
        )


def _glibc(cache: Cache, path: Path) -> str:
    """The newest glibc version an ELF file asks for. Raises Failure above GLIBC, and for a strong symbol without version."""
    lines = cache.run("checks", ["objdump", "-T", path]).splitlines()
    versions = {version for line in lines for version in re.findall(r"GLIBC_(\d[\d.]*)", line)}
    newest = max(versions, key=_number, default="0")
    if _number(newest) > _number(GLIBC):
        symbols = [line.split()[-1] for line in lines if f"GLIBC_{newest})" in line]
        raise Failure(
            f"{path.name} asks for glibc {newest}, newer than {GLIBC}",
            f"for {', '.join(symbols[:8])}",
            hint="something was compiled with this machine's compiler instead of freeze-cc",
        )
    strong = [
        line.split()[-1]
        for line in lines
        if "*UND*" in line and "GLIBC" not in line and not re.search(r"^\S+ +w ", line)
    ]
    # A library finds these in the executable (the API of Python) or in libstdc++.
    foreign = [
        name
        for name in strong
        if not name.startswith(("Py", "_Py", "_Z", "__cxa", "__gxx", "_Unwind", "__gmon", "_ITM"))
    ]
    if foreign:
        raise Failure(
            f"{path.name} needs symbols that no glibc {GLIBC} has",
            ", ".join(foreign[:8]),
            hint="make them weak",
        )
    return newest


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


ORDINARY = {
    *(
        "root",
        "nobody",
        "user",
        "admin",
        "default",
        "node",
        "master",
        "server",
        "worker",
        "agent",
        "host",
        "container",
    ),
    *(
        "localhost",
        "localhost.localdomain",
        "linux",
        "debian",
        "ubuntu",
        "fedora",
        "centos",
        "alpine",
        "docker",
    ),
    *("build", "buildd", "builder", "runner", "vagrant", "github", "gitlab", "python", "flannel", "flanctl"),
}
"""Names of users and hosts that prove nothing: programs and their documentation hold these words."""


def builder_traces(content: bytes, cache: Path | None = None) -> list[str]:
    """Words of this machine in a file: home, folders, user, host, and what its environment holds in secret."""
    words = {"the home folder": str(Path.home()) + "/", "the working folder": str(Path.cwd())}
    if cache:
        words["the cache folder"] = str(cache)
    try:
        user = getpass.getuser()
    except KeyError:  # a container's user number without a name
        user = ""
    names = {"the user name": user, "the host name": socket.gethostname()}
    words |= {what: name for what, name in names.items() if name not in ORDINARY}
    for name, text in os.environ.items():
        if re.search("TOKEN|SECRET|PASSWORD|KEY|PROXY|INDEX_URL|FIND_LINKS", name, re.IGNORECASE):
            words[f"the environment's {name}"] = text
    return [what for what, word in words.items() if len(word) > 5 and word.encode() in content]

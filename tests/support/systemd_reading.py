"""What systemd makes of an EnvironmentFile=: files in; the process's variables and the words of $FLANNEL_OPTIONS out.

    readings = read(tree, [b"FLANNEL_OPTIONS='--iface=eth0 --ip-masq'\\n"])
    readings[0].words                                # ["--iface=eth0", "--ip-masq"]

`tree` is a Debian with systemd and dbus; it is booted once for all files (two seconds, and 0.1 for each) with a memory
overlay over it, and nothing stays.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_READ = r"""#!/bin/sh
systemctl --version | head -n 1 >/answers/version
cd /files
for name in *.env; do
    run="systemd-run --quiet --wait -p EnvironmentFile=/files/$name"
    $run -p "StandardOutput=file:/answers/$name" /usr/bin/env -0
    echo $? >"/answers/$name.code"
    $run -p "StandardOutput=file:/answers/$name.words" /files/words '$FLANNEL_OPTIONS'
done
"""
_WORDS = r"""#!/bin/sh
for word; do printf '%s\0' "$word"; done
"""
_UNIT = """[Unit]
Requires=dbus.service
After=dbus.service
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/files/read
"""
_BOOT = """
set -e
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
exec systemd-nspawn "$@"
"""


@dataclass(frozen=True)
class Reading:
    """`variables` is None where systemd refuses the file and starts nothing."""

    variables: dict[str, str] | None
    words: list[str]


def read(tree: Path, files: Sequence[bytes], *, seconds: float = 600.0) -> list[Reading]:
    """systemd's answers, in the files' order. AssertionError with the machine's console if it did not answer all."""
    return read_with_version(tree, files, seconds=seconds)[1]


def read_with_version(
    tree: Path, files: Sequence[bytes], *, seconds: float = 600.0
) -> tuple[int, list[Reading]]:
    """systemd's version (252) beside."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given, answers, unit = folder / "files", folder / "answers", folder / "read.service"
        given.mkdir()
        answers.mkdir()
        unit.write_text(_UNIT)
        for program, text in (("read", _READ), ("words", _WORDS)):
            (given / program).write_text(text)
            (given / program).chmod(0o755)
        names = [f"{number:05}.env" for number in range(len(files) + 1)]
        for each, content in zip(names, (b"", *files), strict=True):
            (given / each).write_bytes(content)
        booted = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOT, "sh"),
                *("--quiet", f"--directory={tree}", "--volatile=overlay", "--boot", "--private-network"),
                *("--register=no", "--keep-unit", "--console=pipe", "--link-journal=no"),
                *(f"--bind-ro={given}:/files", f"--bind={answers}:/answers"),
                *(f"--bind-ro={unit}:/etc/systemd/system/read.service", "--", "--unit=read.service"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        console = (booted.stdout + booted.stderr).decode(errors="replace")
        assert all((answers / f"{each}.code").exists() for each in names), console[-3000:]
        without = _variables(answers / names[0])
        assert without is not None, console[-3000:]
        version = int((answers / "version").read_text().split()[1])
        return version, [_reading(answers, each, without) for each in names[1:]]


def _reading(answers: Path, name: str, without: dict[str, str]) -> Reading:
    found = _variables(answers / name)
    if found is None:
        return Reading(None, [])
    words = (answers / f"{name}.words").read_bytes().decode().split("\0")[:-1]
    return Reading({each: text for each, text in found.items() if each not in without}, words)


def _variables(answer: Path) -> dict[str, str] | None:
    if answer.with_name(answer.name + ".code").read_text() != "0\n":
        return None
    pairs = answer.read_bytes().decode().split("\0")[:-1]
    return dict(pair.partition("=")[::2] for pair in pairs)

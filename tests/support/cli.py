"""The command line as a test sees it: words in; exit code, stdout and stderr out; in a process of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.deadline import until


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def program(name="flanctl"):
    """The words that start flanctl, or the program it is by another name: a link to the same file.

    FLANCTL_EXE names the file (a frozen executable, say); without it the one in this environment's bin is meant.
    """
    file = os.environ.get("FLANCTL_EXE") or str(Path(sys.executable).with_name("flanctl"))
    return [file if name == "flanctl" else _link(name, os.path.abspath(file))]


@cache
def _link(name, file):
    folder = tempfile.mkdtemp(prefix="flanctl-names-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = os.path.join(folder, name)
    os.symlink(file, link)
    return link


def _environment(env):
    clean = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("FLANCTL_", "FLANNEL", "ETCDCTL_"))
    }
    return clean | (env or {})


class Running:
    """`flanctl WORDS` that goes on running: `lines()` and `errors()` are what it has written so far.

    Its stdout is a file unless `stdout` says otherwise, so a line that shows there was flushed.
    """

    def __init__(self, folder, *words, env=None, stdout=None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [*program(), *map(str, words)],
                env=_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        assert "Traceback" not in self.errors(), self.errors()

    def lines(self):
        """Whole lines only."""
        return [line[:-1] for line in self._out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def errors(self):
        return self._err.read_text()

    def wait_for(self, count, seconds=30.0):
        """The lines, once there are `count`."""
        until(
            lambda: len(self.lines()) >= count or self.process.poll() is not None,
            seconds=seconds,
            what=f"{count} lines; {self.errors()}",
        )
        assert len(self.lines()) >= count, self.errors()
        return self.lines()

    def end(self, number=None, seconds=20.0):
        """The exit code, after a signal if one is given."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


def flanctl(*words, env=None, stdin=None, timeout=60, prefix=(), **options) -> Answer:
    """Run `flanctl WORDS` with no settings but those of `env`; never a traceback."""
    done = subprocess.run(
        [*prefix, *program(), *map(str, words)],
        env=_environment(env),
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=False,
        **options,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in err, err
    return Answer(done.returncode, out, err)

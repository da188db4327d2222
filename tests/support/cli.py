"""The command line as a test sees it: words in; exit code, stdout and stderr out; in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def flanctl(*words, env=None, stdin=None, timeout=60, prefix=(), **options) -> Answer:
    """Run `flanctl WORDS` with no settings but those of `env`; never a traceback."""
    clean = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("FLANCTL_", "FLANNEL", "ETCDCTL_"))
    }
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "flanctl", *map(str, words)],
        env=clean | (env or {}),
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=False,
        **options,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in err, err
    return Answer(done.returncode, out, err)

"""The frozen executable as somebody runs it who has nothing else: no environment, no folder, no Python.

run("version")                                    # an Answer; fails on a traceback or an end by a signal
run("subnets", "ls", prefix=mounted(READ_ONLY), env={…})  # in a mount namespace of its own
modules_of("net", "validate", "-", stdin=…)       # what it had imported at its end
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.capabilities import frozen_executable
from tests.support.cli import Answer

READ_ONLY = """
mount -o remount,bind,ro /
for folder in /tmp /var/tmp /run /dev/shm; do
    [ -d $folder ] && mount -t tmpfs -o noexec tmpfs $folder
done
exec "$@"
"""
"""Nothing can be written that can be executed: the root read-only, what stays writable noexec."""
CONFINE = [sys.executable, "-S", str(Path(__file__).with_name("confine.py"))]
NO_MEMFD = [*CONFINE, "no-memfd", "--"]
NO_WX = [*CONFINE, "no-wx", "--"]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
# What ld.so, the kernel or CPython say when they give up; nobody is helped by that.
_DUMPS = re.compile(
    r"Traceback|Fatal Python error|Could not find platform|panicked at|core dumped|error while loading shared"
)


def mounted(script, *command):
    """A command in a mount namespace that `script` (sh) has changed; the script ends with `exec "$@"`."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh", *command]


def outside(folder):
    """A copy of the executable that is still there when /tmp is another one."""
    return Path(shutil.copy2(frozen_executable(), folder))


def run(*words, prefix=(), exe=None, env=None, stdin="", timeout=60, **options):
    """Run with exactly the environment `env` and no other word of the tester's."""
    done = subprocess.run(
        [*map(str, prefix), str(exe or frozen_executable()), *map(str, words)],
        env=env or {},
        input=stdin.encode(),
        capture_output=True,
        timeout=timeout,
        check=False,
        **options,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert not _DUMPS.search(out + err), out + err
    assert 0 <= done.returncode < 128, f"ended by a signal: {done.returncode}\n{err}"
    return Answer(done.returncode, out, err)


def ok(*words, **options):
    """Its stdout; it must end with 0."""
    answer = run(*words, **options)
    assert answer.code == 0, answer
    return answer.out


def modules_of(*words, env=None, **options):
    """The names of all modules a command had imported when it ended (with 0)."""
    answer = run(*words, env={"FLANCTL_SHOW_MODULES": "1", **(env or {})}, **options)
    assert answer.code == 0, answer
    names = answer.err.split("\n")
    return {name for name in names if re.fullmatch(r"[\w.]+", name)}

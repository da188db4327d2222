"""`python packaging/freeze …`: what `make freeze` and its relatives call.

freeze           dist/flanctl, its SHA-256 and its list of parts
freeze --twice   build it a second time from scratch (all layers that change with a commit) and compare
cpython          the static CPython alone (what takes longest)
lock-sources     the newest Debian sources into packaging/sources.lock
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from layers import Cache, Failure, say

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"


def main() -> int:
    parser = argparse.ArgumentParser(prog="packaging/freeze", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["freeze", "cpython", "lock-sources"])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the result")
    parser.add_argument("--twice", action="store_true", help="build again from scratch and compare")
    chosen = parser.parse_args()
    # A `kill` must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = os.environ.get("FLANCTL_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache = Cache(Path(base).absolute() / "flanctl" / "freeze")
    try:
        with cache.locked():
            try:
                run(chosen, cache)
            except (
                OSError
            ) as error:  # between the layers: a log that cannot be written, a file that went away
                raise cache.failed("freeze", str(error)) from None
    except Failure as failure:
        lines = [failure.what, *(f"  {line}" for line in failure.details), f"try: {failure.hint}"]
        sys.stderr.write("".join(f"freeze: {line}\n" for line in lines))
        return 1
    except KeyboardInterrupt:
        say("interrupted; make freeze goes on where it stopped")
        return 130
    return 0


def run(chosen: argparse.Namespace, cache: Cache) -> None:
    from cpython import have_distribution
    from sources import lock_sources, read_lock
    from toolchain import have_toolchain

    lock = PACKAGING / "sources.lock"
    if chosen.what == "lock-sources":
        lock_sources(cache, lock)
        return
    tools = have_toolchain(cache, sys.executable, ROOT / "requirements/freeze.txt")
    locked = read_lock(lock)
    distribution = have_distribution(cache, tools, locked, PACKAGING)
    if chosen.what == "cpython":
        return
    from application import freeze

    freeze(cache, tools, ROOT, distribution, locked, chosen.out, twice=chosen.twice)


if __name__ == "__main__":
    sys.exit(main())

"""Where every start begins: called by another name, flanctl is that program.

A link (symbolic or hard) or `exec -a` gives the name. `flanneld`, `flanneld-start` and `mk-docker-opts.sh` are known;
every other name is flanctl. A name chooses what is imported: mk-docker-opts.sh is run at each start of a unit and
pays for nothing it does not use, so nothing but `sys` is imported here.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing itself would be a third of mk-docker-opts.sh's start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def main() -> NoReturn:
    """The process's whole life. Never returns: ends with the exit code.

    So `main()` and `sys.exit(main())` mean the same, for a console script, `python -m flanctl` and the frozen
    executable.
    """
    if getattr(sys, "frozen", False):
        from flanctl import frozen

        frozen.start()
        frozen.leave(run(sys.argv))
    sys.exit(run(sys.argv))


def run(argv: Sequence[str]) -> int:
    """Be the program `argv[0]` names, with the words behind it; its exit code."""
    name = argv[0].rpartition("/")[2] if argv else ""
    if name == "mk-docker-opts.sh":
        from flanctl.compat import mk_docker_opts

        return mk_docker_opts.main(argv)
    if name == "flanneld":
        from flanctl.compat import flanneld

        return flanneld.main(argv[1:])
    if name == "flanneld-start":
        from flanctl.compat import flanneld_start

        return flanneld_start.main(argv[1:])
    if list(argv[1:]) in (["version"], ["--version"]):
        # What scripts ask most, answered without an option parser, which would be most of its time.
        return _version()
    if list(argv[1:3]) == ["subnets", "ls"]:
        from flanctl import quick, streams

        streams.speak_utf8()
        code = quick.subnets_ls(argv[3:])
        if code is not None:
            return code
    from flanctl import cli

    return cli.main(argv[1:])


def _version() -> int:
    from flanctl import streams, version_line

    streams.speak_utf8()
    try:
        streams.out().write(version_line() + "\n")
    except BrokenPipeError:
        return streams.quiet_end()
    except OSError as error:
        return streams.unwritable(error, 1)
    return streams.flushed(0)

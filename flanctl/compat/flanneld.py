"""flanneld by name: flannel's command line and log in front of the same agent as `flanctl agent`.

    flanneld -etcd-endpoints=http://192.168.6.2:2379 -etcd-prefix=/jxdd/network --iface=eth0

Settings, strongest first: flag, FLANCTL_*, FLANNELD_*, /etc/flanctl/flanctl.toml, flannel's default. flanneld never
looked at sysconfig files, FLANNEL_* or ETCDCTL_* by itself (systemd and flanneld-start do), so neither do we.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from flanctl import __version__
from flanctl.errors import INTERRUPTED, FlanctlError, LeaseLost, UsageError
from flanctl.flanneld_flags import ENDPOINTS, FLAGS, PREFIX
from flanctl.flanneld_line import parse, read_environment, refuse, threshold
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanctl.compat.glog import Glog
    from flanctl.flanneld_line import CommandLine
    from flanctl.settings import Settings

DEFAULTS = {"endpoints": ENDPOINTS, "prefix": PREFIX}
"""Settings whose default is another one than flanctl's."""


def main(words: Sequence[str], *, program: str = "flanneld") -> int:
    """Run one command line to the daemon's end; its exit code.

    0 after SIGTERM, SIGINT, --help and --version; 2 for a command line that means nothing; 8 when another host took
    our subnet; 1 for everything else, as flannel has it (flannel.md 1.4).
    """
    try:
        given = parse(words)
        if given.flags.get("help") == "true":
            say(usage())
            return 0
        if given.flags.get("version") == "true":
            say(f"flanctl {__version__} as flanneld\n")
            return 0
        read_environment(given, os.environ)
        refuse(given)
    except UsageError as error:
        _last_words(None, program, error)
        return error.exit_code
    return _run(given, program)


def _run(given: CommandLine, program: str) -> int:
    glog = None
    try:
        chosen = settings(given)
        glog = _log(given)
        for sentence in given.warnings:
            glog.warn(sentence)
        from flanctl.agent.start import start

        start(chosen, log=glog, patient=True)
    except FlanctlError as error:
        _last_words(glog, program, error)
        return error.exit_code if isinstance(error, UsageError | LeaseLost) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # the last line of defence: no traceback reaches the journal
        bug = FlanctlError(f"unexpected {type(error).__name__}: {error}", hint="report this line", id="bug")
        _last_words(glog, program, bug)
        return 1
    finally:
        if glog is not None:
            glog.close()
    return 0


def usage() -> str:
    """--help, from the table."""
    rows = [(f"  -{row.name}{'=' + row.default if row.default else ''}", row.help) for row in FLAGS.values()]
    width = max(len(left) for left, _ in rows if len(left) < 44)
    lines = [f"{left:<{width}}  {right}" for left, right in rows]
    return "\n".join(
        [
            f"Usage: flanneld [OPTION]...   (flanctl {__version__} in flanneld's place)",
            *lines,
            "Each can be set by FLANNELD_ and its name in capitals, - as _; a flag wins.",
            "",
        ]
    )


# ---- from flannel's flags to our settings ---------------------------------------------------------------------------


def settings(given: CommandLine, *, environment: Mapping[str, str] | None = None) -> Settings:
    """flanctl's settings as this command line has them. Raises UsageError and NotPermitted for the settings file."""
    from flanctl.settings import TABLE, Value, resolve

    env = os.environ if environment is None else environment
    ours = {name: text for name, text in env.items() if name.startswith("FLANCTL_")}
    theirs = {FLAGS[name].variable: text for name, text in given.variables.items()}
    chosen = resolve({}, environment=ours | theirs, sysconfig_files=())
    chosen.as_flanneld = True
    for row in TABLE.values():
        if row.name in DEFAULTS and chosen.source(row.name) == "default":
            chosen.values[row.name] = Value(DEFAULTS[row.name], "flanneld's default")
        if row.flanneld is not None and row.flanneld in given.flags:
            chosen.values[row.name] = Value(given.flags[row.flanneld], f"-{row.flanneld}")
    return chosen


def _log(given: CommandLine) -> Glog:
    from flanctl.compat.glog import Glog

    to_files = not given.switch("logtostderr")
    directory = (given.text("log_dir") or os.environ.get("TMPDIR") or "/tmp") if to_files else None  # noqa: S108  glog's
    return Glog(
        directory=directory,
        also_stderr=given.switch("alsologtostderr"),
        at_least=threshold(given.text("stderrthreshold")),
    )


# ---- saying it ------------------------------------------------------------------------------------------------------


def _last_words(log: Glog | None, program: str, error: FlanctlError) -> None:
    text = "; ".join(map(printable, (error.message, *error.details)))
    if log is None:
        say(f"{program}: {text}\n" + (f"try: {error.hint}\n" if error.hint else ""))
    elif not isinstance(error, LeaseLost):  # the agent has said that itself
        log.error(text, **({"try": error.hint} if error.hint else {}))


def say(text: str) -> None:
    """To standard error, as far as there is one."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, AttributeError, ValueError):
        pass  # stderr is closed or full: nobody is left to tell

"""flanneld by name: flannel's command line and log in front of the same agent as `flanctl agent`.

    flanneld -etcd-endpoints=http://192.168.6.2:2379 -etcd-prefix=/jxdd/network --iface=eth0

Settings, strongest first: flag, FLANCTL_*, FLANNELD_*, /etc/flanctl/flanctl.toml, flannel's default. flanneld never
looked at sysconfig files, FLANNEL_* or ETCDCTL_* by itself (systemd and flanneld-start do), so neither do we.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flanctl import __version__
from flanctl.errors import INTERRUPTED, FlanctlError, LeaseLost, UsageError
from flanctl.flanneld_flags import ENDPOINTS, FLAGS, PREFIX, SWITCHES, Fate
from flanctl.go_flags import BadFlag, boolean, flags_in, integer
from flanctl.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanctl.compat.glog import Glog
    from flanctl.flanneld_flags import Flag
    from flanctl.settings import Settings

DEFAULTS = {"endpoints": ENDPOINTS, "prefix": PREFIX}
"""Settings whose default is another one than flanctl's."""


@dataclass(slots=True)
class CommandLine:
    """Flags and variables after flannel's rules: last one wins, a list collects. Values by flag name."""

    flags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        return self.flags.get(name, self.variables.get(name, FLAGS[name].default))

    def switch(self, name: str) -> bool:
        return boolean(self.text(name))


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


# ---- the command line -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> CommandLine:
    """Flags by Go's grammar. Raises UsageError for an unknown one, a bad value, and a word that would end the flags.

    flannel 0.28.9 ends with 0 on a flag it does not know and passes over every flag behind a stray word
    (`--ip-masq true --iface=eth0`); a unit then runs nothing, or something else than it says.
    """
    try:
        return _parse(words)
    except (UsageError, BadFlag) as error:
        raise UsageError(str(error), hint="flanneld --help") from None


def _parse(words: Sequence[str]) -> CommandLine:
    given = CommandLine()
    rest = list(words)
    for flag in flags_in(rest, SWITCHES | {"h"}):
        name = "help" if flag.name == "h" else flag.name
        row = FLAGS.get(name)
        if row is None:
            raise UsageError(f"flag provided but not defined: -{name}{_nearest(name)}")
        if flag.text is None and row.kind != "bool":
            raise UsageError(f"flag needs an argument: -{name}")
        text = _checked(row, "true" if flag.text is None else flag.text, f"-{name}")
        if row.kind == "list" and name in given.flags:
            text = f"{given.flags[name]}\n{text}"
        given.flags[name] = text
    if rest and not given.flags.keys() & {"help", "version"}:
        raise UsageError(_stray(rest, words))
    return given


def _checked(row: Flag, text: str, source: str) -> str:
    """The value, switches and numbers in one spelling. Raises UsageError with Go's words."""
    try:
        if row.kind == "bool":
            return str(boolean(text)).lower()
        if row.kind == "int":
            return str(integer(text))
        if row.name == "stderrthreshold":
            from flanctl.compat.glog import threshold

            threshold(text)
    except ValueError as error:
        kind = "boolean value" if row.kind == "bool" else "value"
        why = error if row.kind != "string" else "it is INFO, WARNING, ERROR or FATAL"
        raise UsageError(f'invalid {kind} "{text}" for flag {source}: {why}') from None
    return text


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name.replace("_", "-"), [known.replace("_", "-") for known in FLAGS], n=1)
    known = next((known for known in FLAGS if near and known.replace("_", "-") == near[0]), None)
    return f"; did you mean -{known}?" if known else ""


def _stray(rest: list[str], words: Sequence[str]) -> str:
    before = words[len(words) - len(rest) - 1].lstrip("-") if len(rest) < len(words) else ""
    if before in SWITCHES and rest[0] in {"true", "false"}:
        return (
            f'"{rest[0]}" ends the flags, what stands behind it would be ignored; write -{before}={rest[0]}'
        )
    return f'unexpected word "{rest[0]}"; flanneld takes flags only'


def read_environment(given: CommandLine, environment: Mapping[str, str]) -> None:
    """FLANNELD_* where no flag was given; an empty one counts as unset, a bad one is said and left, as in flannel."""
    for row in FLAGS.values():
        text = environment.get(row.variable, "")
        if not text or row.name in given.flags or row.name in {"help", "version"}:
            continue
        try:
            given.variables[row.name] = _checked(row, text, row.variable)
        except UsageError as error:
            given.warnings.append(f"{error.message}; the default {row.default or 'none'} is used")


def refuse(given: CommandLine) -> None:
    """Raises UsageError for what would be another program; notes what has no effect here."""
    for name, text in (given.variables | given.flags).items():
        row = FLAGS[name]
        shown = f"-{name}" if name in given.flags else row.variable
        if row.fate is Fate.KEPT or text == row.default:
            continue
        if row.fate is Fate.REFUSED:
            raise UsageError(f"{shown} is {row.help}")
        given.warnings.append(f"{shown} is {row.help}")
    if "etcd-password" in given.flags:
        given.warnings.append(
            "-etcd-password is seen by everyone on this host; FLANNELD_ETCD_PASSWORD is not"
        )


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
    for row in TABLE.values():
        if row.name in DEFAULTS and chosen.source(row.name) == "default":
            chosen.values[row.name] = Value(DEFAULTS[row.name], "flanneld's default")
        if row.flanneld is not None and row.flanneld in given.flags:
            chosen.values[row.name] = Value(given.flags[row.flanneld], f"-{row.flanneld}")
    return chosen


def _log(given: CommandLine) -> Glog:
    from flanctl.compat.glog import Glog, threshold

    to_files = not given.switch("logtostderr")
    directory = (given.text("log_dir") or os.environ.get("TMPDIR") or "/tmp") if to_files else None  # noqa: S108  glog's
    if not to_files and given.text("log_dir"):
        given.warnings.append("-log_dir has no effect without -logtostderr=false")
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

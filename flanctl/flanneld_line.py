"""flanneld's command line and variables, understood by flannel's rules: for `flanneld` itself and for what checks its files.

line = parse(["-etcd-prefix=/jxdd/network", "--iface", "eth0"])
read_environment(line, os.environ)
line.text("iface")                                   # "eth0"
[remark.says for remark in remarks(line)]            # what has no effect, contradicts itself or is refused
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flanctl.errors import UsageError
from flanctl.flanneld_flags import FLAGS, SWITCHES, Fate
from flanctl.go_flags import BadFlag, boolean, flags_in, integer
from flanctl.text import nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flanctl.flanneld_flags import Flag

SEVERITIES = ("INFO", "WARNING", "ERROR", "FATAL")
"""glog's."""
NEVER_EMPTY = {"etcd-endpoints": "give etcd's URLs, comma separated", "etcd-prefix": "give the network's key"}


@dataclass(frozen=True, slots=True)
class Remark:
    """Something about a flag or variable, named as it was written (`-v`, `FLANNELD_V`). `fatal` ends flanneld with 2."""

    subject: str
    id: str
    says: str
    fatal: bool = False


@dataclass(slots=True)
class CommandLine:
    """Flags and variables after flannel's rules: last one wins, a list collects. Values by flag name."""

    flags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    problems: list[Remark] = field(default_factory=list)
    """What Go would refuse, in the order of the words."""
    ignored: list[Remark] = field(default_factory=list)
    """Variables whose value is none; flannel goes on with the default."""
    overruled: dict[str, str] = field(default_factory=dict)
    """What stood there first, for flags given twice with different values."""
    warnings: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        return self.flags.get(name, self.variables.get(name, FLAGS[name].default))

    def switch(self, name: str) -> bool:
        return boolean(self.text(name))

    def given(self) -> Mapping[str, str]:
        """Every flag that has a value from somewhere."""
        return self.variables | self.flags

    def written(self, name: str) -> str:
        """How the one that counts was written."""
        return f"-{name}" if name in self.flags else FLAGS[name].variable


def parse(words: Sequence[str]) -> CommandLine:
    """Flags by Go's grammar. Raises UsageError for an unknown one, a bad value, and a word that would end the flags.

    flannel 0.28.9 ends with 0 on a flag it does not know and passes over every flag behind a stray word
    (`--ip-masq true --iface=eth0`); a unit then runs nothing, or something else than it says.
    """
    given = read(words)
    if given.problems:
        raise UsageError(given.problems[0].says, hint="flanneld --help")
    return given


def read(words: Sequence[str]) -> CommandLine:
    """The same with all that is wrong noted; such a flag counts as not given."""
    given = CommandLine()
    rest = list(words)
    try:
        for flag in flags_in(rest, SWITCHES | {"h"}):
            name = "help" if flag.name == "h" else flag.name
            row = FLAGS.get(name)
            if row is None:
                near = nearest(name, FLAGS)
                hint = f"; did you mean -{near}?" if near else ""
                says = f"flag provided but not defined: -{name}{hint}"
                given.problems.append(Remark(f"-{name}", "unknown-flag", says, fatal=True))
            elif flag.text is None and row.kind != "bool":
                says = f"flag needs an argument: -{name}"
                given.problems.append(Remark(f"-{name}", "bad-value", says, fatal=True))
            else:
                _take(given, row, "true" if flag.text is None else flag.text)
    except BadFlag as error:
        given.problems.append(Remark("", "bad-flag", str(error), fatal=True))
    else:
        if rest and not given.flags.keys() & {"help", "version"}:
            hidden = "etcd-password" in given.flags  # `-etcd-password = secret`: it is the secret
            says = "unexpected word behind -etcd-password" if hidden else _stray(rest, words)
            given.problems.append(Remark("", "stray-word", says, fatal=True))
    return given


def _take(given: CommandLine, row: Flag, text: str) -> None:
    try:
        text = _checked(row, text, f"-{row.name}")
    except UsageError as error:
        given.problems.append(Remark(f"-{row.name}", "bad-value", error.message, fatal=True))
        return
    before = given.flags.get(row.name)
    if row.kind == "list" and before is not None:
        text = f"{before}\n{text}"
    elif before is not None and before != text:
        given.overruled[row.name] = before
    given.flags[row.name] = text


def _checked(row: Flag, text: str, source: str) -> str:
    """The value, switches and numbers in one spelling. Raises UsageError with Go's words."""
    try:
        if row.kind == "bool":
            return str(boolean(text)).lower()
        if row.kind == "int":
            return str(integer(text))
        if row.name == "stderrthreshold":
            threshold(text)
    except ValueError as error:
        kind = "boolean value" if row.kind == "bool" else "value"
        why = error if row.kind != "string" else "it is INFO, WARNING, ERROR or FATAL"
        raise UsageError(f'invalid {kind} "{text}" for flag {source}: {why}') from None
    return text


def threshold(text: str) -> int:
    """`stderrthreshold`: a severity's name or number. Raises ValueError as glog does for another."""
    if text.upper() in SEVERITIES:
        return SEVERITIES.index(text.upper())
    return int(text)


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
            says = f"{error.message}; the default {row.default or 'none'} is used"
            given.ignored.append(Remark(row.variable, "bad-value", says))
            given.warnings.append(says)


def refuse(given: CommandLine) -> None:
    """Raises UsageError for what would be another program or mean nothing; notes what has no effect here."""
    for remark in remarks(given):
        if remark.fatal:
            raise UsageError(remark.says)
        given.warnings.append(remark.says)


def remarks(given: CommandLine) -> Iterator[Remark]:
    """What a command line that Go takes leaves to be said: refused, without effect, contradicting itself."""
    for name, text in given.given().items():
        row, shown = FLAGS[name], given.written(name)
        if row.fate is not Fate.KEPT and text != row.default:
            refused = row.fate is Fate.REFUSED
            yield Remark(
                shown, "refused-flag" if refused else "dead-flag", f"{shown} is {row.help}", fatal=refused
            )
        if name in NEVER_EMPTY and not text:
            yield Remark(shown, "empty-value", f"{shown} is empty; {NEVER_EMPTY[name]}", fatal=True)
    for name, before in given.overruled.items():
        last = given.flags[name]
        says = f'-{name} is given twice; the last, "{last}", counts and not "{before}"'
        if name in {"etcd-password", "etcd-username"} or "@" in last + before:  # secrets, or URLs with one
            says = f"-{name} is given twice; the last counts"
        yield Remark(f"-{name}", "contradiction", says)
    yield from _without_effect(given)
    if "etcd-password" in given.flags:
        says = "-etcd-password is seen by everyone on this host; FLANNELD_ETCD_PASSWORD is not"
        yield Remark("-etcd-password", "password-seen", says)


def _without_effect(given: CommandLine) -> Iterator[Remark]:
    """Flags that another one switches off."""
    named = given.given()
    if given.switch("logtostderr"):
        for name in ("log_dir", "alsologtostderr", "stderrthreshold"):
            if named.get(name, FLAGS[name].default) != FLAGS[name].default:
                shown = given.written(name)
                yield Remark(shown, "contradiction", f"{shown} has no effect without -logtostderr=false")
    if named.get("healthz-ip", FLAGS["healthz-ip"].default) != FLAGS["healthz-ip"].default and not int(
        given.text("healthz-port")
    ):
        shown = given.written("healthz-ip")
        yield Remark(shown, "contradiction", f"{shown} has no effect without -healthz-port")

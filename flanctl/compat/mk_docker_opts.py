"""mk-docker-opts.sh by name: flannel 0.7.1's script as dash runs it, without a shell (flannel.md 4.2).

    mk-docker-opts.sh -k DOCKER_NETWORK_OPTIONS -d /run/flannel/docker

What it prints, writes and ends with is the script's, oddities included, because units and drop-ins were written
around them: `set` decides the order, an inherited DOCKER_OPT_* is an option too, and a value with a blank comes out
in pieces. Three things are ours: the file is replaced whole wherever it can be; a write that failed never ends with 0; and
what only a shell could answer (a command or `$` in the subnet file, a backslash, a pattern that matches files) is
refused in one line before anything is written.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from flanctl.errors import FlanctlError, Invalid
from flanctl.files import replace_file
from flanctl.model.docker_options import MARK, MAX_BYTES, flannel_options, is_name, read_variables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

SUBNET_FILE = "/run/flannel/subnet.env"
OPTIONS_FILE = "/run/docker_opts.env"
LETTERS = {"f": True, "d": True, "i": False, "c": False, "m": False, "k": True, "?": False, "h": False}
"""getopts' letters, and whether one takes an argument."""
USAGE = """\
{} [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k COMBINED-KEY]

Generate Docker daemon options based on flannel env file
OPTIONS:
\t-f\tPath to flannel env file. Defaults to /run/flannel/subnet.env
\t-d\tPath to Docker env file to write to. Defaults to /run/docker_opts.env
\t-i\tOutput each Docker option as individual var. e.g. DOCKER_OPT_MTU=1500
\t-c\tOutput combined Docker options into DOCKER_OPTS var
\t-k\tSet the combined options key to this value (default DOCKER_OPTS=)
\t-m\tDo not output --ip-masq (useful for older Docker version)

"""
CREATE_LINE, OPTION_LINE, COMBINED_LINE = 86, 94, 102
"""Lines of the script that write; dash names them when one of them cannot."""
UNREPLACEABLE = frozenset({errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS})
"""Why a file that may be written cannot be replaced: it is a mount itself, or its directory may not be written."""
_SHELL_ONLY = '"`$&|;<>()#*?[]{}~!^%\\'


def main(argv: Sequence[str]) -> int:
    """Run one command line; its exit code: 0, 1 for usage and bad input, 2 for a file that cannot be read or written."""
    script = argv[0]
    try:
        return _run(script, argv[1:])
    except _End as end:
        _say(end.text)
        return end.code
    except FlanctlError as error:
        _say(f"{script}: {error.message}\n")
        return 1


class _End(Exception):
    """The script's own last words."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def _run(script: str, words: Sequence[str]) -> int:
    # A shell takes over only variables with a shell's name.
    variables = {name: text for name, text in os.environ.items() if is_name(name)}
    variables |= {"flannel_env": SUBNET_FILE, "docker_env": OPTIONS_FILE, "combined_opts_key": "DOCKER_OPTS"}
    variables |= {"indiv_opts": "false", "combined_opts": "false", "ipmasq": "true"}
    _read_flags(script, words, variables)
    if variables["indiv_opts"] == variables["combined_opts"] == "false":
        variables |= {"indiv_opts": "true", "combined_opts": "true"}
    variables |= _sourced(script, variables["flannel_env"])
    try:
        variables |= flannel_options(variables, ip_masq=variables["ipmasq"] == "true")
    except Invalid:
        text = f"Invalid value of FLANNEL_IPMASQ: {variables['FLANNEL_IPMASQ']}\n"
        raise _End(1, text) from None
    content, complaints, writes = _render(script, variables)
    _write(script, variables["docker_env"], content, writes)
    _say(complaints)
    return 0


# ---- getopts --------------------------------------------------------------------------------------------------------


def _read_flags(script: str, words: Sequence[str], variables: dict[str, str]) -> None:
    """As dash's getopts goes through them, up to the first word that is no flag. Raises _End with the usage."""
    names = {"f": "flannel_env", "d": "docker_env", "k": "combined_opts_key"}
    switches = {"i": ("indiv_opts", "true"), "c": ("combined_opts", "true"), "m": ("ipmasq", "false")}
    here = 0
    while here < len(words) and len(words[here]) > 1 and words[here].startswith("-") and words[here] != "--":
        cluster = words[here][1:]
        here += 1
        while cluster:
            letter, cluster = cluster[0], cluster[1:]
            if letter not in LETTERS:
                _usage(script, f"Illegal option -{letter}\n")
            if letter in "?h":
                _usage(script)
            if not LETTERS[letter]:
                name, text = switches[letter]
                variables |= {name: text, "OPTARG": ""}
                continue
            if not cluster:
                if here == len(words):
                    _usage(script, f"No arg for -{letter} option\n")
                cluster = words[here]
                here += 1
            variables[names[letter]] = variables["OPTARG"] = cluster
            break
    variables["opt"] = "?"


def _usage(script: str, before: str = "") -> NoReturn:
    raise _End(1, before + USAGE.format(script))


# ---- the subnet file ------------------------------------------------------------------------------------------------


def _sourced(script: str, path: str) -> dict[str, str]:
    """What sourcing the file gives; nothing where it is no file, as `[ -f … ]` has it."""
    if not os.path.isfile(path):
        return {}
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _End(2, f"{script}: cannot open {path}: {error.strerror}\n") from None
    return read_variables(content, name=path, as_shell=True)


# ---- `for opt in $(set | grep DOCKER_OPT_)` -------------------------------------------------------------------------


def _render(script: str, variables: dict[str, str]) -> tuple[str, str, list[int]]:
    """The file's text, what the shell would complain of, and the script's lines that write, each once per write."""
    key = variables["combined_opts_key"]
    if not is_name(key):
        raise Invalid(f"-k {key!r} is not a variable name")
    before = variables.get(key, "")
    variables["docker_opts"] = before and before + " "
    lines: list[str] = []
    writes = [CREATE_LINE]
    complaints = ""
    for word in _marked_words(variables):
        name = word.partition("=")[0]
        variables |= {"opt": word, "OPT_NAME": name}
        value, complaint = _evaluated(name, variables)
        if complaint:
            complaints += f"{script}: 1: eval: Syntax error: Unterminated quoted string\n"
        if variables["indiv_opts"] == "true":
            lines.append(f'{name}="{value}"\n')
            writes.append(OPTION_LINE)
        variables |= {"OPT_VALUE": value, "docker_opts": f"{variables['docker_opts']} {value}"}
    if variables["combined_opts"] == "true":
        lines.append(f'{key}="{variables["docker_opts"]}"\n')
        writes.append(COMBINED_LINE)
    content = "".join(lines)
    if "\\" in content:
        raise Invalid("an option holds a backslash, which the script's echo would interpret")
    return content, complaints, writes


def _marked_words(variables: Mapping[str, str]) -> list[str]:
    """The words of those lines of `set` (by name, values quoted) that hold DOCKER_OPT_."""
    words: list[str] = []
    for name in sorted(variables):
        value = variables[name]
        if MARK not in name and MARK not in value:
            continue
        for line in f"{name}={_quoted(value)}".split("\n"):
            if MARK in line:
                words += _split(line)
    return [_not_a_pattern(word, variables["docker_env"]) for word in words]


def _quoted(value: str) -> str:
    """As dash's `set` shows a value: in single quotes, runs of single quotes in double quotes between them."""
    shown, rest = "", value
    while True:
        plain, quote, rest = rest.partition("'")
        shown += f"'{plain}'"
        if not quote:
            return shown
        run = 1 + len(rest) - len(rest.lstrip("'"))
        rest = rest[run - 1 :]
        shown += '"' + "'" * run + '"'
        if not rest:
            return shown


def _evaluated(name: str, variables: Mapping[str, str]) -> tuple[str, bool]:
    r"""What `eval echo "\$NAME"` prints, and whether it fails for a single quote that is not closed."""
    if any(character in _SHELL_ONLY for character in name):
        raise Invalid(
            f"{name!r} is a piece of an option with a blank in it, which only a shell can understand"
        )
    if quotes := name.count("'"):
        if quotes % 2:
            return "", True
        raise Invalid(
            f"{name!r} is a piece of an option with a blank in it, which only a shell can understand"
        )
    if name.startswith("-"):
        text = name[1:]  # `$-` is empty in a script
    else:
        end = len(name)
        while end and not is_name(name[:end]):
            end -= 1
        if not end:
            raise Invalid(
                f"{name!r} is a piece of an option with a blank in it, which only a shell can understand"
            )
        text = variables.get(name[:end], "") + name[end:]
    words = [_not_a_pattern(word, variables["docker_env"]) for word in _split(text)]
    return " ".join(words[1:] if words[:1] == ["-n"] else words), False


def _split(text: str) -> list[str]:
    """Field splitting at IFS: blank, tab, newline and nothing else."""
    return [word for word in text.replace("\t", " ").replace("\n", " ").split(" ") if word]


def _not_a_pattern(word: str, output: str) -> str:
    """The word, unless a shell might put names of files (`output` is there by then) in its place. Raises Invalid then."""
    if "\\" in word:
        raise Invalid(f"{word!r} holds a backslash, which the script's echo would interpret")
    start = min((at for at in map(word.find, "*?[") if at >= 0), default=-1)
    if start < 0:
        return word
    folder, begin = os.path.split(word[:start])
    try:
        names = (*os.listdir(folder or "."), os.path.basename(output))
        if any(name.startswith(begin) for name in names):
            raise Invalid(f"{word!r} is a pattern that files match; a shell would put their names here")
    except OSError:
        pass
    return word


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(script: str, path: str, content: str, writes: list[int]) -> None:
    """Whole or not at all; what is no file (a pipe, /dev/stdout) is written to. Raises _End(2) as dash words it."""
    data = os.fsencode(content)
    try:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            status = None
        if status is None or stat.S_ISREG(status.st_mode):
            _replace(os.path.realpath(path) if path else path, data, status)
        else:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "wb") as file:
                file.write(data)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "Directory nonexistent" if missing else error.strerror
        raise _End(
            2, "".join(f"{script}: {line}: cannot create {path}: {why}\n" for line in writes)
        ) from None


def _replace(path: str, data: bytes, status: os.stat_result | None) -> None:
    if not path:
        raise FileNotFoundError
    if status is None:
        mask = os.umask(0)
        os.umask(mask)
        replace_file(path, data, mode=0o666 & ~mask)
        return
    if not os.access(path, os.W_OK):  # a rename would not ask for it, `>` does
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        replace_file(path, data, mode=stat.S_IMODE(status.st_mode))
    except OSError as error:
        if error.errno not in UNREPLACEABLE:
            raise
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.truncate()


def _say(text: str) -> None:
    try:
        sys.stderr.buffer.write(os.fsencode(text))
        sys.stderr.flush()
    except (OSError, AttributeError, ValueError):
        pass  # stderr is closed or full: nobody is left to tell
